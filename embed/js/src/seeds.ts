/**
 * Noise from a seed, bit for bit as runtime/seeds.py draws it: `torch` is torch.randn of a CPU
 * generator on x86-64, `numpy` is np.random.RandomState(seed).randn rounded to float32.
 */
import { OptionError } from "./errors.js";
import { choose } from "./schedules.js";

/** One draw of so many standard normal values; the stream advances with every call. */
export type Noise = (count: number) => Float32Array;

const { fround } = Math;

// Cephes' single precision polynomials (S. Moshier), highest power first.
const LOG = [
  7.0376836292e-2, -1.151461031e-1, 1.167699874e-1, -1.2420140846e-1, 1.4249322787e-1,
  -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
].map(fround);
const SIN = [-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1].map(fround);
const COS = [2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2].map(fround);
const LN2 = [-2.1219444e-4, 0.693359375].map(fround); // low and high part
// The negative of pi/4 in three parts.
const QUARTER_PI = [-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8].map(fround);

/** A stream of noise; throws OptionError for a seed outside its range. */
export function makeNoise(rng: string, seed: number | bigint): Noise {
  const make = choose("rng", rng, SEEDS);
  return make(seed);
}

const SEEDS: Record<string, (seed: number | bigint) => Noise> = {
  // torch keeps 64 bits of the seed, but its Mersenne twister starts from the low 32.
  torch: (seed) => torchNoise(Number(checked(seed, 64n) & 0xffffffffn)),
  numpy: (seed) => numpyNoise(Number(checked(seed, 32n))),
};

function checked(seed: number | bigint, bits: bigint): bigint {
  if (typeof seed === "number" && !Number.isSafeInteger(seed)) {
    throw new OptionError(`a seed is a whole number, not ${seed}; a bigint beyond 2^53`);
  }
  const value = BigInt(seed);
  if (value < 0n || value >= 1n << bits) {
    throw new OptionError(`seed ${value} is outside 0 to ${(1n << bits) - 1n}: choose one inside`);
  }
  return value;
}

function torchNoise(seed: number): Noise {
  const next = mersenneTwister(seed);
  const uniform = (): number => (next() & 0xffffff) * 2 ** -24;
  let spare: number | undefined; // the second value of a pair drawn by a small call

  /** One value in double precision; every other one was kept from the call before. */
  const single = (): number => {
    if (spare !== undefined) {
      const value = spare;
      spare = undefined;
      return value;
    }
    const theta = 2 * Math.PI * bits53(next(), next());
    const radius = Math.sqrt(-2 * Math.log1p(-bits53(next(), next())));
    spare = radius * Math.sin(theta);
    return radius * Math.cos(theta);
  };

  return (count) => {
    if (count < 16) return Float32Array.from({ length: count }, single);
    // Blocks of 16; where the last one is incomplete, the last 16 values are drawn anew.
    const values = Float32Array.from({ length: count }, uniform);
    const whole = count - (count % 16);
    for (let at = 0; at < whole; at += 16) boxMuller(values, at);
    if (whole < count) {
      for (let i = count - 16; i < count; i++) values[i] = uniform();
      boxMuller(values, count - 16);
    }
    return values;
  };
}

/** The low 53 bits of 64, as a share of 1. */
function bits53(high: number, low: number): number {
  return ((high & 0x1fffff) * 2 ** 32 + low) / 2 ** 53;
}

/** NumPy's legacy stream: the polar method on 53 bits, in double precision. */
function numpyNoise(seed: number): Noise {
  const next = mersenneTwister(seed);
  const uniform = (): number => ((next() >>> 5) * 67108864 + (next() >>> 6)) / 9007199254740992;
  let spare: number | undefined;
  const single = (): number => {
    if (spare !== undefined) {
      const value = spare;
      spare = undefined;
      return value;
    }
    for (;;) {
      const x1 = 2 * uniform() - 1;
      const x2 = 2 * uniform() - 1;
      const r2 = x1 * x1 + x2 * x2;
      if (r2 >= 1 || r2 === 0) continue;
      const f = Math.sqrt((-2 * Math.log(r2)) / r2);
      spare = f * x1;
      return f * x2;
    }
  };
  return (count) => Float32Array.from({ length: count }, single);
}

/** MT19937 (Matsumoto and Nishimura 1998): the next 32 bits at every call. */
function mersenneTwister(seed: number): () => number {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) {
    const last = state[i - 1]! ^ (state[i - 1]! >>> 30);
    state[i] = Math.imul(1812433253, last) + i;
  }
  let at = 624;
  const twist = (): void => {
    for (let i = 0; i < 624; i++) {
      const y = (state[i]! & 0x80000000) | (state[(i + 1) % 624]! & 0x7fffffff);
      state[i] = state[(i + 397) % 624]! ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    at = 0;
  };
  return () => {
    if (at === 624) twist();
    let y = state[at++]!;
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** Uniform to normal in place: 8 pairs (j, j + 8) of a block of 16, in float32 throughout. */
function boxMuller(values: Float32Array, at: number): void {
  for (let i = at; i < at + 8; i++) {
    const radius = fround(Math.sqrt(fround(-2 * log(fround(1 - values[i]!)))));
    const [sin, cos] = sincos(fround(fround(2 * Math.PI) * values[i + 8]!));
    values[i] = fround(radius * cos) + 0; // adding the mean 0 turns -0 into 0
    values[i + 8] = fround(radius * sin) + 0;
  }
}

const SQRT_HALF = fround(Math.sqrt(0.5));

/** Natural logarithm of a positive normal float as torch's AVX2 code rounds it. */
function log(value: number): number {
  word32[0] = value; // mantissa in [0.5, 1) and exponent
  let e = (bits32[0]! >>> 23) - 126;
  bits32[0] = (bits32[0]! & 0x7fffff) | (126 << 23);
  let x = word32[0]!;
  if (x < SQRT_HALF) {
    e -= 1;
    x = fround(x + x);
  }
  x = fround(x - 1);
  const z = fround(x * x);
  let y = fma(fround(horner(LOG, x) * x), z, fround(e * LN2[0]!));
  y = fround(y - fround(z * 0.5));
  return fma(e, LN2[1]!, fround(x + y));
}

/** Sine and cosine of a float in [0, 2 pi] as torch's AVX2 code rounds them. */
function sincos(value: number): [number, number] {
  const octant = (Math.trunc(fround(value * fround(4 / Math.PI))) + 1) & ~1;
  let x = value;
  for (const part of QUARTER_PI) x = fma(octant, part, x);
  const z = fround(x * x);
  let cos = fround(fma(fround(horner(COS, z) * z), z, -fround(z * 0.5)) + 1);
  let sin = fma(fround(horner(SIN, z) * z), x, x);
  if (octant & 2) [sin, cos] = [cos, sin];
  return [octant & 4 ? -sin : sin, (octant + 2) & 4 ? -cos : cos];
}

function horner(coefficients: number[], x: number): number {
  let y = coefficients[0]!;
  for (let i = 1; i < coefficients.length; i++) y = fma(y, x, coefficients[i]!);
  return y;
}

const word32 = new Float32Array(1);
const bits32 = new Uint32Array(word32.buffer);
const word64 = new Float64Array(1);
const bits64 = new BigUint64Array(word64.buffer); // whatever the machine's order of bytes
const LOW = 0x1fffffffn;
const HALF = 0x10000000n;

/** a * b + c rounded once to float32, as the processor's fused instruction does. */
export function fma(a: number, b: number, c: number): number {
  const product = a * b; // exact: 24 + 24 bits
  const total = product + c;
  // Rounding twice goes wrong only where the first rounding lands midway between two floats.
  word64[0] = total;
  if ((bits64[0]! & LOW) === HALF) {
    const back = total - product;
    const error = product - (total - back) + (c - back); // of the first rounding, exactly
    if (error !== 0) {
      bits64[0] = bits64[0]! + (error > 0 === total > 0 ? 1n : -1n);
      return fround(word64[0]!);
    }
  }
  return fround(total);
}
