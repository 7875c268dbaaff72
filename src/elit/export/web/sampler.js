// Sampling in the browser, step by step as elit.sample does it: the state in float64, the model in float32.

import * as ort from "./runtime/ort.webgpu.bundle.min.mjs";
import { startNoise } from "./random.js";

ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
if (!globalThis.crossOriginIsolated) ort.env.wasm.numThreads = 1; // threads need headers that a plain server lacks

/** A model on its runtime. */
export class Model {
  /** Loads the model of a folder, on WebGPU where there is one and else in WebAssembly. */
  static async load(folder = new URL("./", import.meta.url)) {
    const about = await (await fetch(new URL("model.json", folder))).json();
    const file = new URL("model.onnx", folder).href;
    if (navigator.gpu && (await navigator.gpu.requestAdapter().catch(() => null))) {
      try {
        const session = await ort.InferenceSession.create(file, { executionProviders: ["webgpu"] });
        return new Model(about, session, "WebGPU");
      } catch (error) {
        console.warn("WebGPU cannot run this model:", error.message);
      }
    }
    return new Model(about, await ort.InferenceSession.create(file, { executionProviders: ["wasm"] }), "WebAssembly");
  }

  constructor(about, session, backend) {
    Object.assign(this, { about, session, backend });
    this.size = about.input_shape.reduce((a, b) => a * b);
    this.warm = new Set(); // levels that ran before
  }

  /** Returns the velocity at a state (C * H * W) and time, for a class (null is none), at a level. */
  async velocity(x, t, label, level) {
    const inputs = {
      x: new ort.Tensor("float32", Float32Array.from(x), [1, ...this.about.input_shape]),
      t: new ort.Tensor("float32", [t], [1]),
      latent_index: new ort.Tensor("int64", BigInt64Array.from({ length: level }, (_, i) => BigInt(i)), [level]),
    };
    const classes = this.about.config.num_classes;
    if (classes) inputs.y = new ort.Tensor("int64", [BigInt(label ?? classes)], [1]);
    const outputs = await this.session.run(inputs);
    return outputs[this.session.outputNames[0]].data;
  }

  /**
   * Draws a sample from a seed with Euler steps.
   *
   * @param label a class; without meaning for an unconditional model.
   * @param levels of each step, the number of latents per window.
   * @param scale of guidance by a weak term without class; 1 is none.
   * @param weakLevel the level of the weak term.
   * @returns the sample (C * H * W) in the model's space, Float32Array.
   */
  async sample({ seed, label = 0, levels, scale = 1, weakLevel = this.about.levels[0] }) {
    const x = startNoise(seed, this.size);
    const steps = levels.length;
    for (let step = 0; step < steps; step++) {
      const t = 1 - step / steps;
      const dt = 1 - (step + 1) / steps - t;
      const strong = await this.velocity(x, t, label, levels[step]);
      const weak = scale === 1 ? strong : await this.velocity(x, t, null, weakLevel);
      for (let i = 0; i < x.length; i++) x[i] += dt * (weak[i] + scale * (strong[i] - weak[i]));
    }
    return Float32Array.from(x);
  }

  /** Runs levels that have not run yet, since a first evaluation is slower than those after it. */
  async warmUp(levels) {
    for (const level of levels) {
      if (!this.warm.has(level)) await this.velocity(startNoise(0, this.size), 1, 0, level);
      this.warm.add(level);
    }
  }

  /** Measures the milliseconds of one evaluation at each of some levels: the median of several rounds. */
  async measure(levels, rounds = 7) {
    const x = startNoise(0, this.size);
    const times = levels.map(() => []);
    await this.warmUp(levels);
    for (let round = 0; round < rounds; round++) {
      for (const [i, level] of levels.entries()) {
        const start = performance.now();
        await this.velocity(x, 0.5, 0, level);
        times[i].push(performance.now() - start);
      }
    }
    return times.map((of) => of.sort((a, b) => a - b)[of.length >> 1]);
  }
}
