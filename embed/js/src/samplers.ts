/**
 * Samplers as tables: step i is a row of numbers, and one loop of a few lines runs every row.
 *
 *     denoised = a*x + b*model(scale*x, timestep)
 *     x = cx*x + c0*denoised + c1*previous + c2*before + cn*noise
 *
 * A table is computed in float64 as runtime/samplers.py does and rounded once to float32; format
 * and loop: docs/samplers.md.
 */
import { OptionError } from "./errors.js";
import type { Recipe } from "./manifest.js";
import * as schedules from "./schedules.js";
import type { Noise } from "./seeds.js";

const FORMAT = "ferrotype-sampler";
const VERSION = 1;
const KEYS = new Set([
  "format",
  "version",
  "sampler",
  "start_image",
  "start_noise",
  "columns",
  "rows",
]);

/** The columns of a row, in order; every number is exactly a float32. */
export const COLUMNS = ["timestep", "scale", "a", "b", "cx", "c0", "c1", "c2", "cn"] as const;

export type Row = Record<(typeof COLUMNS)[number], number>;

export interface Table {
  sampler: string;
  /** First x = startImage*latents + startNoise*noise; 0 without an image. */
  startImage: number;
  startNoise: number;
  rows: Row[];
}

/** (scaled x, timestep) -> the network's output, all of one length. */
export type Model = (x: Float32Array, timestep: number) => Promise<Float32Array>;

/** What is left after a row: the latents, and the network's present idea of the result. */
export interface Denoised {
  index: number;
  total: number;
  latents: Float32Array;
  denoised: Float32Array;
}

/** The rows of a recipe; `strength` in (0, 1] is for a start from an image. */
export function makeTable(recipe: Recipe, strength?: number): Table {
  const sampler = schedules.choose("sampler", recipe.sampler, SAMPLERS);
  schedules.choose("prediction type", recipe.prediction_type, PREDICTIONS);
  if (!(recipe.eta >= 0 && recipe.eta <= 1)) {
    throw new OptionError(`eta is ${recipe.eta}: it must be from 0 to 1`);
  }
  if (strength !== undefined && !(strength > 0 && strength <= 1)) {
    throw new OptionError(`strength is ${strength}: it must be above 0 and at most 1`);
  }
  const plan = sampler(recipe, strength);
  const rows = plan.columns[0].map((_, i) => {
    const values = plan.columns.map((column) => (typeof column === "number" ? column : column[i]!));
    if (!values.every(Number.isFinite)) {
      throw new OptionError(
        `${recipe.sampler} with ${recipe.prediction_type} prediction has no finite steps from ` +
          `timestep ${plan.columns[0][0]}: at zero SNR only v_prediction or sample works`,
      );
    }
    return toRow(values);
  });
  const [image, noise] = strength === undefined ? plan.textStart : plan.imageStart;
  return {
    sampler: recipe.sampler,
    startImage: Math.fround(image),
    startNoise: Math.fround(noise),
    rows,
  };
}

function toRow(values: number[]): Row {
  const rounded = values.map((value) => Math.fround(value) + 0); // + 0: no -0
  return Object.fromEntries(COLUMNS.map((name, i) => [name, rounded[i]])) as Row;
}

/** The first x from a draw of noise and, for a table made with a strength, image latents. */
export function start(table: Table, noise: Float32Array, image?: Float32Array): Float32Array {
  if (table.startImage && !image) {
    throw new OptionError("this table starts from an image: give its latents, or no strength");
  }
  return sum(noise.length, [table.startImage, image], [table.startNoise, noise]);
}

/** Run the table from x: float32 throughout, one value after each row. */
export async function* sample(
  model: Model,
  x: Float32Array,
  table: Table,
  noise: Noise,
): AsyncGenerator<Denoised, void, void> {
  let previous: Float32Array | undefined;
  let before: Float32Array | undefined;
  const { length } = x;
  for (const [i, row] of table.rows.entries()) {
    const output = await model(sum(length, [row.scale, x]), row.timestep);
    const denoised = sum(length, [row.a, x], [row.b, output]);
    const fresh = row.cn ? noise(length) : undefined;
    x = sum(
      length,
      [row.cx, x],
      [row.c0, denoised],
      [row.c1, previous],
      [row.c2, before],
      [row.cn, fresh],
    );
    yield { index: i + 1, total: table.rows.length, latents: x, denoised };
    [before, previous] = [previous, denoised];
  }
}

/** Products added left to right in float32; one with a zero coefficient does not exist. */
function sum(length: number, ...terms: [number, Float32Array | undefined][]): Float32Array {
  const result = new Float32Array(length);
  const there = terms.filter(([c]) => c !== 0) as [number, Float32Array][];
  there.forEach(([c, values], place) => {
    // Storing rounds to float32; a float64 product of two floats is exact, so it rounds once.
    if (place === 0) for (let i = 0; i < length; i++) result[i] = c * values[i]!;
    else for (let i = 0; i < length; i++) result[i] = result[i]! + Math.fround(c * values[i]!);
  });
  return result;
}

// --- samplers -----------------------------------------------------------------------------------

type Column = number | number[];

/** A Table before rounding; columns in the order of COLUMNS. */
interface Plan {
  columns: [number[], ...Column[]];
  textStart: [number, number];
  imageStart: [number, number];
}

type Sampler = (recipe: Recipe, strength?: number) => Plan;

// (a, b) of denoised = a*x + b*output, where x = alpha*clean + sigma*noise, alpha^2 + sigma^2 = 1
const PREDICTIONS: Record<string, (alpha: number, sigma: number) => [number, number]> = {
  epsilon: (alpha, sigma) => [1 / alpha, -sigma / alpha],
  v_prediction: (alpha, sigma) => [alpha, -sigma],
  sample: () => [0, 1],
};

/** DDIM (Song et al. 2021), with eta. */
function ddim(recipe: Recipe, strength?: number): Plan {
  const cumprod = schedules.alphasCumprod(recipe);
  const t = schedules.timesteps(recipe, strength);
  const apart = Math.floor(recipe.train_steps / recipe.steps);
  const listed = recipe.timesteps.length > 0 || recipe.spacing === "lcm";
  const after = t.map((value, i) => (listed ? (t[i + 1] ?? -1) : value - apart));
  const end = recipe.set_alpha_to_one ? 1 : cumprod[0]!;
  const now = t.map((at) => cumprod[at]!);
  const target = after.map((at) => (at < 0 ? end : cumprod[at]!));
  const cn = now.map((n, i) => {
    const goal = target[i]!;
    return recipe.eta * Math.sqrt(((1 - goal) / (1 - n)) * (1 - n / goal));
  });
  const cx = now.map((n, i) => Math.sqrt(Math.max(1 - target[i]! - cn[i]! ** 2, 0) / (1 - n)));
  const c0 = now.map((n, i) => Math.sqrt(target[i]!) - cx[i]! * Math.sqrt(n));
  return variancePreserving(recipe, t, now, { cx, c0, cn });
}

/** Latent consistency model (Luo et al. 2023): denoise, then back to the next noise level. */
function lcm(recipe: Recipe, strength?: number): Plan {
  const cumprod = schedules.alphasCumprod(recipe);
  const t = consistencyTimesteps(recipe, strength);
  const target = [...t.slice(1).map((at) => cumprod[at]!), 1];
  const plan = variancePreserving(
    recipe,
    t,
    t.map((at) => cumprod[at]!),
    { cx: 0, c0: target.map(Math.sqrt), cn: target.map((goal) => Math.sqrt(1 - goal)) },
  );
  // The boundary condition: at t = 0 the model's answer would be x itself.
  const [, scale, a, b, ...rest] = plan.columns as [number[], Column, number[], number[]];
  const scaled = t.map((at) => at * recipe.timestep_scaling);
  const skip = scaled.map((s) => 0.25 / (s ** 2 + 0.25));
  const out = scaled.map((s) => s / Math.sqrt(s ** 2 + 0.25));
  const bound = (column: number[]): number[] => column.map((value, i) => out[i]! * value);
  const columns: Plan["columns"] = [
    t,
    scale,
    bound(a).map((value, i) => value + skip[i]!),
    bound(b),
    ...rest,
  ];
  return { ...plan, columns };
}

/** Trajectory consistency (Zheng et al. 2024): eta is gamma, the noise put back at a step. */
function tcd(recipe: Recipe, strength?: number): Plan {
  const cumprod = schedules.alphasCumprod(recipe);
  const t = consistencyTimesteps(recipe, strength);
  const after = [...t.slice(1), 0];
  // In float32 as diffusers, because the floor of a product that is nearly whole is an index.
  const share = Math.fround(1 - recipe.eta);
  const s = after.map((at) => Math.floor(Math.fround(share * at)));
  const now = t.map((at) => cumprod[at]!);
  const there = s.map((at) => cumprod[at]!);
  const target = after.map((at) => cumprod[at]!);
  const back = target.map((goal, i) => Math.sqrt(goal / there[i]!));
  const cx = back.map((b, i) => b * Math.sqrt((1 - there[i]!) / (1 - now[i]!)));
  const c0 = back.map((b, i) => b * Math.sqrt(there[i]!) - cx[i]! * Math.sqrt(now[i]!));
  const cn = target.map((goal, i) => Math.sqrt(1 - goal / there[i]!));
  return variancePreserving(recipe, t, now, { cx, c0, cn });
}

/** Euler's method on the ODE in x = clean + sigma*noise (Karras et al. 2022). */
function euler(recipe: Recipe, strength?: number): Plan {
  const [t, sigma] = eulerLevels(recipe, strength);
  const cx = t.map((_, i) => sigma[i + 1]! / sigma[i]!);
  return varianceExploding(recipe, t, sigma, cx);
}

/** Ancestral Euler: to a level below the target, then noise back up to it. */
function eulerA(recipe: Recipe, strength?: number): Plan {
  const [t, sigma] = eulerLevels(recipe, strength);
  const cn = t.map((_, i) => sigma[i + 1]! * Math.sqrt(1 - (sigma[i + 1]! / sigma[i]!) ** 2));
  const cx = t.map((_, i) => Math.sqrt(sigma[i + 1]! ** 2 - cn[i]! ** 2) / sigma[i]!);
  return varianceExploding(recipe, t, sigma, cx, cn);
}

/** DPM-Solver++(2M), midpoint (Lu et al. 2022); first order in the first and the last step. */
function dpmpp2m(recipe: Recipe, strength?: number): Plan {
  const t = schedules.timesteps(recipe, strength, { openEnd: true });
  const levels = schedules.sigmas(schedules.alphasCumprod(recipe));
  return dpmpp2mOf(recipe, t, [...t.map((at) => levels[at]!), 0]);
}

/** DPM-Solver++(2M) on the sigmas of Karras et al., whatever the spacing. */
function dpmpp2mKarras(recipe: Recipe, strength?: number): Plan {
  if (recipe.timesteps.length) {
    throw new OptionError("dpmpp_2m_karras places its own timesteps: leave recipe.timesteps empty");
  }
  schedules.requireSteps("steps", recipe.steps, recipe.train_steps);
  const levels = schedules.sigmas(schedules.alphasCumprod(recipe));
  const sigma = schedules.tail(schedules.karras(levels, recipe.steps), strength);
  const t = schedules.timestepOf(sigma, levels).map(schedules.roundHalfEven);
  return dpmpp2mOf(recipe, t, [...sigma, 0]);
}

function dpmpp2mOf(recipe: Recipe, t: number[], sigma: number[]): Plan {
  const { alpha, s, h } = logSnr(sigma);
  const cx = t.map((_, i) => s[i + 1]! / s[i]!);
  const whole = t.map((_, i) => wholeOf(alpha, cx, i));
  // The share of the extrapolation from the previous denoised.
  const half = t.map((_, i) => (0 < i && i < t.length - 1 ? h[i]! / h[i - 1]! / 2 : 0));
  const c0 = whole.map((w, i) => w * (1 + half[i]!));
  const c1 = whole.map((w, i) => -w * half[i]!);
  const now = alpha.slice(0, -1).map((value) => value ** 2);
  return variancePreserving(recipe, t, now, { cx, c0, c1, sigma: s.slice(0, -1) });
}

/**
 * UniPC of order 2, bh2 (Zhao et al. 2023).
 *
 * Its corrector replaces the last prediction made by a better one once `denoised` is known. Both
 * carry the same x over, so correcting means adding the difference of their weights to x.
 */
function unipc(recipe: Recipe, strength?: number): Plan {
  const t = schedules.timesteps(recipe, strength, { openEnd: true });
  const levels = schedules.sigmas(schedules.alphasCumprod(recipe));
  const { alpha, s, h } = logSnr([...t.map((at) => levels[at]!), 0]);
  const cx = t.map((_, i) => s[i + 1]! / s[i]!);
  const c: number[][] = [[], [], []]; // weights of this, the previous and the denoised before
  let predictor: [number, number] = [0, 0];
  for (let i = 0; i < t.length; i++) {
    let weights: [number, number, number] = [0, 0, 0];
    if (i > 0) {
      const whole = wholeOf(alpha, cx, i - 1);
      const [end, first, before] = unipcCorrector(h[i - 1]!, i > 1 ? -h[i - 2]! / h[i - 1]! : 0);
      weights = [end * whole, first * whole - predictor[0], before * whole - predictor[1]];
    }
    const w = 0 < i && i < t.length - 1 ? (-0.5 * h[i]!) / h[i - 1]! : 0;
    const whole = wholeOf(alpha, cx, i);
    predictor = [(1 - w) * whole, w * whole];
    c[0]!.push(cx[i]! * weights[0] + predictor[0]);
    c[1]!.push(cx[i]! * weights[1] + predictor[1]);
    c[2]!.push(cx[i]! * weights[2]);
  }
  const now = alpha.slice(0, -1).map((value) => value ** 2);
  const sigma = s.slice(0, -1);
  return variancePreserving(recipe, t, now, { cx, c0: c[0]!, c1: c[1]!, c2: c[2]!, sigma });
}

function wholeOf(alpha: number[], cx: number[], i: number): number {
  return alpha[i + 1]! - cx[i]! * alpha[i]!;
}

/** Weights of the denoised at the end, the start and before the start of a step of length h. */
function unipcCorrector(h: number, r: number): [number, number, number] {
  if (r === 0) return [0.5, 0.5, 0]; // nothing was before
  const b = Math.expm1(-h);
  const b1 = (b / -h - 1) / b;
  const b2 = (((b / -h - 1) / -h - 0.5) * 2) / b;
  const before = (b1 - b2) / (1 - r);
  const end = b1 - before;
  return [end, 1 - end - before / r, before / r];
}

export const SAMPLERS: Record<string, Sampler> = {
  ddim,
  euler,
  euler_a: eulerA,
  dpmpp_2m: dpmpp2m,
  dpmpp_2m_karras: dpmpp2mKarras,
  unipc,
  lcm,
  tcd,
};

/** What a sampler is run with where nothing else is said; 0 for the others. */
export const ETA: Record<string, number> = { tcd: 0.3 };

/** What a sampler is spaced by when the recipe was made for another one; trailing for the others. */
export const SPACING: Record<string, string> = { lcm: "lcm", tcd: "lcm" };

function consistencyTimesteps(recipe: Recipe, strength?: number): number[] {
  if (recipe.spacing === "leading" && !recipe.timesteps.length) {
    throw new OptionError(
      `${recipe.sampler} has to start at the noisiest timestep, leading does not: ` +
        "set spacing to lcm (its lattice) or trailing",
    );
  }
  return schedules.timesteps(recipe, strength);
}

/** Timesteps, fractional with linspace, and their sigmas, interpolated, with a final 0. */
function eulerLevels(recipe: Recipe, strength?: number): [number[], number[]] {
  const t = schedules.timesteps(recipe, strength, { whole: false });
  const levels = schedules.sigmas(schedules.alphasCumprod(recipe));
  return [t, [...schedules.interp(t, schedules.range(levels.length), levels), 0]];
}

/** alpha, sigma (their squares sum to 1), and the steps in log(alpha/sigma), last infinite. */
function logSnr(sigma: number[]): { alpha: number[]; s: number[]; h: number[] } {
  const alpha = sigma.map((value) => 1 / Math.sqrt(value ** 2 + 1));
  const h = sigma.slice(0, -2).map((value, i) => Math.log(value / sigma[i + 1]!));
  return { alpha, s: sigma.map((value, i) => value * alpha[i]!), h: [...h, Infinity] };
}

function variancePreserving(
  recipe: Recipe,
  t: number[],
  cumprod: number[],
  c: { cx: Column; c0: number[]; c1?: Column; c2?: Column; cn?: Column; sigma?: number[] },
): Plan {
  const alpha = cumprod.map(Math.sqrt);
  const sigma = c.sigma ?? cumprod.map((value) => Math.sqrt(1 - value));
  const pairs = alpha.map((value, i) => PREDICTIONS[recipe.prediction_type]!(value, sigma[i]!));
  const columns: Plan["columns"] = [
    t,
    1,
    pairs.map(([a]) => a),
    pairs.map(([, b]) => b),
    c.cx,
    c.c0,
    c.c1 ?? 0,
    c.c2 ?? 0,
    c.cn ?? 0,
  ];
  return { columns, textStart: [0, 1], imageStart: [alpha[0]!, sigma[0]!] };
}

function varianceExploding(
  recipe: Recipe,
  t: number[],
  sigma: number[],
  cx: number[],
  cn: Column = 0,
): Plan {
  const scale = t.map((_, i) => 1 / Math.sqrt(sigma[i]! ** 2 + 1));
  const pairs = scale.map((value, i) =>
    PREDICTIONS[recipe.prediction_type]!(value, sigma[i]! * value),
  );
  const a = pairs.map(([value], i) => value * scale[i]!);
  const c0 = cx.map((value) => 1 - value);
  const noise = recipe.spacing === "leading" ? Math.hypot(sigma[0]!, 1) : sigma[0]!;
  const columns: Plan["columns"] = [t, scale, a, pairs.map(([, b]) => b), cx, c0, 0, 0, cn];
  return { columns, textStart: [0, noise], imageStart: [1, sigma[0]!] };
}

// --- stored tables ------------------------------------------------------------------------------

/** The table that `ferrotype plan --sampler-table -o` wrote; an OptionError for anything else. */
export function parseTable(text: string): Table {
  try {
    const raw = JSON.parse(text);
    if (raw.format !== FORMAT || raw.version !== VERSION) {
      throw new Error(`it is ${raw.format} ${raw.version}, we read ${FORMAT} ${VERSION}`);
    }
    const unknown = Object.keys(raw).find((key) => !KEYS.has(key));
    if (unknown !== undefined) throw new Error(`unknown key ${unknown}`);
    if (JSON.stringify(raw.columns) !== JSON.stringify(COLUMNS)) {
      throw new Error(`columns are ${JSON.stringify(raw.columns)}`);
    }
    if (!Array.isArray(raw.rows) || !raw.rows.length) throw new Error("it has no rows");
    const rows = raw.rows.map((row: unknown) => {
      if (!Array.isArray(row) || row.length !== COLUMNS.length) throw new Error("a row is short");
      return toRow(row.map(float32));
    });
    return {
      sampler: String(raw.sampler),
      startImage: float32(raw.start_image),
      startNoise: float32(raw.start_noise),
      rows,
    };
  } catch (error) {
    throw new OptionError(`not a sampler table: ${(error as Error).message}`);
  }
}

function float32(value: unknown): number {
  const rounded = typeof value === "number" ? Math.fround(value) : NaN;
  if (!Number.isFinite(rounded)) throw new Error(`${JSON.stringify(value)} is no finite float32`);
  return rounded;
}
