// The noise of elit.seeding, number by number: a SHA-256 of the seed keys numpy's generator Philox, whose bits become
// normal numbers by the ziggurat method, as in numpy's standard_normal in float32.

const MASK64 = (1n << 64n) - 1n;

/** Returns the first `count` primes. */
function primes(count) {
  const found = [];
  for (let n = 2; found.length < count; n++) if (found.every((p) => n % p)) found.push(n);
  return found;
}

const fraction = (x) => Math.floor((x - Math.floor(x)) * 2 ** 32) >>> 0;
const ROUND_CONSTANTS = primes(64).map((p) => fraction(Math.cbrt(p)));
const INITIAL_HASH = primes(8).map((p) => fraction(Math.sqrt(p)));

/** Computes the SHA-256 of a text (FIPS 180-4) as eight numbers of 32 bits. */
export function sha256(text) {
  const bytes = new TextEncoder().encode(text);
  const blocks = Math.ceil((bytes.length + 9) / 64);
  const padded = new DataView(new ArrayBuffer(blocks * 64));
  bytes.forEach((byte, i) => padded.setUint8(i, byte));
  padded.setUint8(bytes.length, 0x80);
  padded.setUint32(blocks * 64 - 4, bytes.length * 8);
  const rotate = (x, n) => (x >>> n) | (x << (32 - n));
  const hash = [...INITIAL_HASH];
  const w = new Array(64);
  for (let block = 0; block < blocks; block++) {
    for (let i = 0; i < 16; i++) w[i] = padded.getUint32(block * 64 + 4 * i);
    for (let i = 16; i < 64; i++) {
      const s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >>> 3);
      const s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >>> 10);
      w[i] = (w[i - 16] + s0 + w[i - 7] + s1) | 0;
    }
    let [a, b, c, d, e, f, g, h] = hash;
    for (let i = 0; i < 64; i++) {
      const s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
      const t1 = (h + s1 + ((e & f) ^ (~e & g)) + ROUND_CONSTANTS[i] + w[i]) | 0;
      const s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
      const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((value, i) => (hash[i] = (hash[i] + value) >>> 0));
  }
  return hash;
}

/** The counter-based generator Philox4x64-10 (Salmon et al. 2011), keyed by 128 bits. */
export class Philox {
  constructor(key) {
    this.key = [key & MASK64, key >> 64n];
    this.counter = 0n;
    this.words = []; // of 32 bits, not yet handed out
  }

  nextBlock() {
    this.counter += 1n;
    let [a, b, c, d] = [0n, 64n, 128n, 192n].map((shift) => (this.counter >> shift) & MASK64);
    let [k0, k1] = this.key;
    for (let round = 0; round < 10; round++) {
      const left = 0xd2e7470ee14c6c93n * a;
      const right = 0xca5a826395121157n * c;
      [a, b, c, d] = [(right >> 64n) ^ b ^ k0, right & MASK64, (left >> 64n) ^ d ^ k1, left & MASK64];
      k0 = (k0 + 0x9e3779b97f4a7c15n) & MASK64;
      k1 = (k1 + 0xbb67ae8584caa73bn) & MASK64;
    }
    for (const word of [a, b, c, d]) this.words.push(Number(word & 0xffffffffn), Number(word >> 32n));
    this.words.reverse();
  }

  /** Returns the next 32 bits. */
  bits() {
    if (!this.words.length) this.nextBlock();
    return this.words.pop();
  }

  /** Returns a number in [0, 1) with 24 bits. */
  uniform() {
    return (this.bits() >>> 8) / 2 ** 24;
  }
}

// The ziggurat (Marsaglia & Tsang 2000) covers the density exp(-x^2 / 2) by 256 layers of equal area. R is the right
// edge of the lowest one, beyond which lies the tail. A layer holds the right edges of x, scaled to 23 bits.
const R = 3.654152885361009;
const BITS = 2 ** 23;
const density = (x) => Math.exp(-0.5 * x * x);
const tail = (() => { // the area beyond R, by Simpson's rule
  const steps = 4000, h = 10 / steps;
  let sum = 0;
  for (let i = 0; i <= steps; i++) sum += (i % 2 ? 4 : i && i < steps ? 2 : 1) * density(R + i * h);
  return (sum * h) / 3;
})();
const AREA = R * density(R) + tail;
const LAYERS = (() => {
  const edges = new Array(256);
  edges[255] = R;
  for (let i = 254; i >= 1; i--) edges[i] = Math.sqrt(-2 * Math.log(AREA / edges[i + 1] + density(edges[i + 1])));
  edges[0] = AREA / density(R); // of the lowest layer as if it were a rectangle
  return edges.map((edge, i) => ({
    inside: Math.floor(((i === 0 ? R : i === 1 ? 0 : edges[i - 1]) / edge) * BITS),
    width: Math.fround(edge / BITS),
    density: Math.fround(i === 0 ? 1 : density(edge)),
  }));
})();

/** Draws one standard normal number in float32. */
function normal(random) {
  for (;;) {
    const bits = random.bits();
    const layer = bits & 0xff;
    const place = bits >>> 9;
    const { inside, width, density: top } = LAYERS[layer];
    const x = Math.fround(place * width) * (bits & 0x100 ? -1 : 1);
    if (place < inside) return x;
    if (layer === 0) {
      for (;;) {
        const far = -Math.log1p(-random.uniform()) / R;
        const height = -Math.log1p(-random.uniform());
        if (2 * height > far * far) return Math.fround(place & 0x100 ? -(R + far) : R + far);
      }
    }
    if ((LAYERS[layer - 1].density - top) * random.uniform() + top < density(x)) return x;
  }
}

/** Draws the noise from which a seed starts: `count` numbers, those of elit.sample(model, seeds=[seed]). */
export function startNoise(seed, count) {
  const hash = sha256(`(${BigInt(seed)}, 'start')`);
  const key = hash.slice(0, 4).reduce((sum, word) => (sum << 32n) | BigInt(word), 0n);
  const random = new Philox(key);
  return Float64Array.from({ length: count }, () => normal(random));
}
