// The planner of elit plan, with the milliseconds of this machine: of a number of steps, the level of each of them that
// gives the least error within a latency. What lower levels and fewer steps cost in error was measured at the export.

const STEPS = [4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 48, 56, 64];
const UNITS = 1000; // in which a latency is cut

/** Interpolates y linearly at `at` between points whose x rise; outside it stays. */
function interpolate(at, x, y) {
  const i = x.findIndex((value) => value >= at);
  if (i === 0) return y[0];
  if (i < 0) return y[y.length - 1];
  return y[i - 1] + ((y[i] - y[i - 1]) * (at - x[i - 1])) / (x[i] - x[i - 1]);
}

/** Returns the error of too few steps, on a line in both logarithms. */
function errorOfSteps(calibration, steps) {
  const x = calibration.step_counts.map(Math.log);
  const y = calibration.step_errors.map(Math.log);
  const at = Math.min(Math.max(x.findIndex((value) => value >= Math.log(steps)) - 1, 0), x.length - 2);
  const i = Math.log(steps) > x[x.length - 1] ? x.length - 2 : at;
  return Math.exp(y[i] + ((y[i + 1] - y[i]) / (x[i + 1] - x[i])) * (Math.log(steps) - x[i]));
}

/**
 * Plans a sample.
 *
 * @param calibration levels, times (falling), errors of each time and level, step_counts and step_errors.
 * @param milliseconds of one step at each level.
 * @param limit milliseconds of the whole sample.
 * @returns {levels, error, milliseconds}, or null where nothing is that fast.
 */
export function plan(calibration, milliseconds, limit) {
  const times = [...calibration.times].reverse();
  const errors = calibration.levels.map((_, level) => calibration.errors.map((row) => row[level]).reverse());
  const units = milliseconds.map((ms) => Math.ceil((ms / limit) * UNITS));
  let best = null;
  for (const steps of STEPS) {
    let least = new Float64Array(UNITS + 1).fill(0); // error so far within so many units
    const choices = [];
    for (let step = 0; step < steps; step++) {
      const next = new Float64Array(UNITS + 1).fill(Infinity);
      const choice = new Int16Array(UNITS + 1).fill(-1);
      units.forEach((cost, level) => {
        const error = interpolate(1 - step / steps, times, errors[level]) / steps;
        for (let used = cost; used <= UNITS; used++) {
          if (least[used - cost] + error < next[used]) [next[used], choice[used]] = [least[used - cost] + error, level];
        }
      });
      least = next;
      choices.push(choice);
    }
    if (!Number.isFinite(least[UNITS])) continue;
    const error = Math.hypot(errorOfSteps(calibration, steps), least[UNITS]);
    if (best && best.error <= error) continue;
    const chosen = [];
    for (let step = steps - 1, left = UNITS; step >= 0; step--) {
      chosen.unshift(choices[step][left]);
      left -= units[chosen[0]];
    }
    best = {
      levels: chosen.map((level) => calibration.levels[level]),
      error,
      milliseconds: chosen.reduce((sum, level) => sum + milliseconds[level], 0),
    };
  }
  return best;
}
