// The page: its controls, pictures and numbers.

import { startNoise } from "./random.js";
import { plan } from "./planner.js";
import { Model } from "./sampler.js";

const at = (id) => document.getElementById(id);
const percent = (level, of) => (level === of ? "full" : `${level}/${of}`);

/** Paints a sample (C * H * W) in [-1, 1] on a new canvas. */
function picture(pixels, [channels, height, width]) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const data = canvas.getContext("2d").createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) {
      const value = pixels[(channels === 3 ? c : 0) * width * height + i];
      data.data[4 * i + c] = Math.round((Math.min(Math.max(value, -1), 1) + 1) * 127.5);
    }
    data.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
  return canvas;
}

/** Shows pictures with captions in place of what an element held. */
function show(id, pictures) {
  at(id).replaceChildren(
    ...pictures.map(([canvas, caption]) => {
      const figure = document.createElement("figure");
      figure.append(canvas, Object.assign(document.createElement("figcaption"), { textContent: caption }));
      return figure;
    }),
  );
}

const model = await Model.load();
const { about } = model;
const { levels, num_latents: all } = about;
let milliseconds = null;

/** Reads the controls. */
function wanted() {
  const scale = Number(at("scale").value);
  return {
    seed: Math.trunc(Number(at("seed").value)),
    label: Number(at("label").value),
    steps: Math.min(Math.max(1, Math.trunc(Number(at("steps").value))), Number(at("steps").max)),
    level: levels[Number(at("budget").value)],
    scale: about.config.num_classes && Number.isFinite(scale) ? scale : 1,
  };
}

/** Draws a sample and returns it with the milliseconds that it took. */
async function timed(settings) {
  await model.warmUp(settings.scale === 1 ? settings.levels : [...settings.levels, levels[0]]);
  const start = performance.now();
  const pixels = await model.sample(settings);
  return [pixels, performance.now() - start];
}

const schedule = (level, steps) => new Array(steps).fill(level);

/** Says in short how many steps have which level, such as "3 × 16, 5 × 4". */
function inShort(schedule) {
  const runs = [];
  for (const level of schedule) {
    if (runs.at(-1)?.level === level) runs.at(-1).steps++;
    else runs.push({ level, steps: 1 });
  }
  return runs.map(({ level, steps }) => `${steps} × ${level}`).join(", ");
}

async function drawOne() {
  const { level, steps, ...settings } = wanted();
  const [pixels, ms] = await timed({ ...settings, levels: schedule(level, steps) });
  show("one", [[picture(pixels, about.input_shape), `${percent(level, all)} · ${ms.toFixed(0)} ms`]]);
}

async function drawAll() {
  const { steps, ...settings } = wanted();
  const chosen = levels.filter((level) => levels.length <= 6 || level === all || Number.isInteger(Math.log2(level)));
  const shown = [];
  for (const level of chosen) {
    const [pixels, ms] = await timed({ ...settings, levels: schedule(level, steps) });
    shown.push([picture(pixels, about.input_shape), `${percent(level, all)} · ${ms.toFixed(0)} ms`]);
    show("all", shown);
  }
}

async function drawPlan() {
  milliseconds ??= await model.measure(about.calibration.levels);
  const { scale, seed, label } = wanted();
  const weak = scale === 1 ? 0 : milliseconds[0];
  const limit = Number(at("latency").value);
  const found = plan(about.calibration, milliseconds.map((ms) => ms + weak), limit);
  if (!found) {
    const least = 4 * (milliseconds[0] + weak);
    at("told").textContent = `Nothing is that fast here: the least is about ${Math.ceil(least)} ms.`;
    return;
  }
  const [pixels, ms] = await timed({ seed, label, scale, levels: found.levels });
  at("told").textContent =
    `${found.levels.length} steps: ${inShort(found.levels)} of ${all} latents; ` +
    `planned ${found.milliseconds.toFixed(0)} ms, took ${ms.toFixed(0)} ms.`;
  show("planned", [[picture(pixels, about.input_shape), `${ms.toFixed(0)} ms`]]);
}

let last = Promise.resolve();
/** Runs one thing after the other, and tells its errors on the page. */
function queue(work) {
  last = last.then(async () => {
    at("status").textContent = `Working on ${model.backend} …`;
    try {
      await work();
      at("status").textContent = `Ready, on ${model.backend}.`;
    } catch (error) {
      at("status").textContent = `This did not work: ${error.message}`;
    }
  });
  return last;
}

const classes = about.config.num_classes;
for (let label = 0; label < classes; label++) at("label").add(new Option(about.class_names?.[label] ?? label, label));
at("of-class").hidden = at("of-scale").hidden = !classes;
at("steps").value = Math.min(about.steps, 20);
Object.assign(at("budget"), { max: levels.length - 1, value: levels.length - 1 });
at("planning").hidden = !about.calibration;

const say = () => (at("level").textContent = percent(wanted().level, all));
say();
at("budget").addEventListener("input", say);
for (const id of ["label", "seed", "steps", "scale", "budget"]) at(id).addEventListener("change", () => queue(drawOne));
at("draw").addEventListener("click", () => queue(drawOne));
at("compare").addEventListener("click", () => queue(drawAll));
at("plan").addEventListener("click", () => queue(drawPlan));

window.elit = { model, startNoise, plan, ready: queue(drawOne).then(() => queue(drawAll)) };
