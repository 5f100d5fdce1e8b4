/**
 * Noise schedules and timestep spacings, as runtime/schedules.py computes them: float64 throughout,
 * with the same operations in the same order (NumPy's linspace, arange and interp included).
 */
import { OptionError } from "./errors.js";
import type { Recipe } from "./manifest.js";

const ZERO_SNR_ALPHA = 2 ** -24; // stands for alpha_cumprod 0 where a sampler divides by it
const KARRAS_RHO = 7;

type Spacing = (steps: number, recipe: Recipe, strength?: number) => number[];

const BETAS: Record<string, (start: number, end: number, count: number) => number[]> = {
  linear: (start, end, count) => linspace(start, end, count),
  scaled_linear: (start, end, count) =>
    linspace(Math.sqrt(start), Math.sqrt(end), count).map((b) => b * b),
  // Improved DDPM's cosine schedule (Nichol and Dhariwal 2021), which has no start and end.
  squaredcos_cap_v2: (_start, _end, count) => {
    const bar = range(count + 1).map((i) => {
      const cos = Math.cos((((i / count + 0.008) / 1.008) * Math.PI) / 2);
      return cos * cos;
    });
    return range(count).map((i) => Math.min(1 - bar[i + 1]! / bar[i]!, 0.999));
  },
};

/** The share of signal left at each training timestep: falling, of length train_steps. */
export function alphasCumprod(recipe: Recipe): number[] {
  const betas = choose("beta schedule", recipe.beta_schedule, BETAS);
  requireSteps("train_steps", recipe.train_steps);
  if (!(0 < recipe.beta_start && recipe.beta_start <= recipe.beta_end && recipe.beta_end < 1)) {
    const found = `${recipe.beta_start} and ${recipe.beta_end}`;
    throw new OptionError(`beta_start and beta_end must rise between 0 and 1, found ${found}`);
  }
  let product = 1;
  const cumprod = betas(recipe.beta_start, recipe.beta_end, recipe.train_steps).map(
    (beta) => (product *= 1 - beta),
  );
  return recipe.zero_terminal_snr ? zeroTerminalSnr(cumprod) : cumprod;
}

/** Shift and stretch so that the last timestep is pure noise (Lin et al. 2023, algorithm 1). */
function zeroTerminalSnr(cumprod: number[]): number[] {
  const root = cumprod.map(Math.sqrt);
  const first = root[0]!;
  const last = root.at(-1)!;
  if (first === last) throw new OptionError("zero terminal SNR needs at least 2 train_steps");
  return root.map((r) => (((r - last) * first) / (first - last)) ** 2);
}

/** Noise per unit of signal at each training timestep: rising, finite. */
export function sigmas(cumprod: number[]): number[] {
  return cumprod.map((c) => (c === 0 ? ZERO_SNR_ALPHA : c)).map((c) => Math.sqrt((1 - c) / c));
}

const SPACINGS: Record<string, Spacing> = {
  leading: (steps, recipe) =>
    range(steps)
      .reverse()
      .map((i) => i * Math.floor(recipe.train_steps / steps) + recipe.steps_offset),
  trailing: (steps, recipe) => {
    // NumPy fills a range with multiples of the difference of its first two values.
    const first = recipe.train_steps;
    const delta = first - first / steps - first;
    return range(steps).map((i) => roundHalfEven(first + i * delta) - 1);
  },
  linspace: (steps, recipe) => linspace(0, recipe.train_steps - 1, steps).reverse(),
  lcm: lcmSpacing,
};

/** Evenly from the lattice of LCM's distillation; a lower strength shortens the lattice. */
function lcmSpacing(steps: number, recipe: Recipe, strength = 1): number[] {
  requireSteps("original_steps", recipe.original_steps, recipe.train_steps);
  const points = Math.trunc(recipe.original_steps * strength);
  if (steps > points) {
    throw new OptionError(
      `${steps} steps need as many points of the lcm lattice, strength ${strength} leaves ` +
        `${points} of ${recipe.original_steps}: take fewer steps or a higher strength`,
    );
  }
  const apart = Math.floor(recipe.train_steps / recipe.original_steps);
  return linspace(0, points, steps, false).map((at) => (points - Math.floor(at)) * apart - 1);
}

/**
 * The timesteps to visit, falling; fewer than `steps` when an image gives a strength below 1.
 *
 * `whole` rounds linspace half to even. `openEnd` (solvers in log-SNR) spaces one more point, by
 * leading and linspace, and leaves it out, so that the last step does not start at the end.
 */
export function timesteps(
  recipe: Recipe,
  strength?: number,
  { whole = true, openEnd = false } = {},
): number[] {
  const spacing = choose("spacing", recipe.spacing, SPACINGS);
  requireSteps("steps", recipe.steps, recipe.train_steps);
  let t: number[];
  if (recipe.timesteps.length) {
    t = [...recipe.timesteps];
    if (t.length !== recipe.steps) {
      throw new OptionError(
        `${t.length} timesteps are listed for ${recipe.steps} steps: make equal`,
      );
    }
    if (whole && t.some((value) => value !== roundHalfEven(value))) {
      throw new OptionError(`${recipe.sampler} needs whole timesteps, found ${t.join(", ")}`);
    }
  } else if (spacing === lcmSpacing) {
    return lcmSpacing(recipe.steps, recipe, strength ?? 1);
  } else if (openEnd && (spacing === SPACINGS.leading || spacing === SPACINGS.linspace)) {
    t = spacing(recipe.steps + 1, recipe).slice(0, -1);
  } else {
    t = spacing(recipe.steps, recipe);
  }
  if (whole) t = t.map(roundHalfEven);
  const falling = t.every((value, i) => i === 0 || value < t[i - 1]!);
  if (!falling || t[0]! > recipe.train_steps - 1 || t.at(-1)! < 0) {
    throw new OptionError(
      `${recipe.spacing} timesteps run from ${t[0]} to ${t.at(-1)} in ${recipe.steps} steps; ` +
        `they must fall strictly, within 0 and ${recipe.train_steps - 1}: take fewer steps`,
    );
  }
  return tail(t, strength);
}

/** The last share of the steps, for a start from an image. */
export function tail(t: number[], strength?: number): number[] {
  const kept = strength === undefined ? t.length : Math.trunc(t.length * strength);
  if (kept < 1) {
    throw new OptionError(
      `strength ${strength} leaves none of ${t.length} steps: ` +
        `use at least ${Number((1 / t.length).toPrecision(3))}, or more steps`,
    );
  }
  return t.slice(t.length - kept);
}

/** Sigmas from the noisiest to the cleanest level, even in sigma^(1/7) (Karras et al. 2022). */
export function karras(sigma: number[], steps: number): number[] {
  const low = sigma[0]! ** (1 / KARRAS_RHO);
  const high = sigma.at(-1)! ** (1 / KARRAS_RHO);
  return linspace(0, 1, steps).map((ramp) => (high + ramp * (low - high)) ** KARRAS_RHO);
}

/** Where each `sigma` lies among the rising `levels`, linear in log sigma; fractional. */
export function timestepOf(sigma: number[], levels: number[]): number[] {
  return interp(sigma.map(Math.log), levels.map(Math.log), range(levels.length));
}

/** The entry of that name, or an OptionError that lists the names there are. */
export function choose<T>(what: string, name: string, table: Record<string, T>): T {
  if (!Object.hasOwn(table, name)) {
    const names = Object.keys(table).join(", ");
    throw new OptionError(`unknown ${what} ${JSON.stringify(name)}: choose from ${names}`);
  }
  return table[name]!;
}

export function requireSteps(what: string, value: number, limit?: number): void {
  if (!Number.isInteger(value) || value < 1) {
    throw new OptionError(`${what} must be a whole number from 1, found ${value}`);
  }
  if (limit !== undefined && value > limit) {
    throw new OptionError(`${what} is ${value}, the most is ${limit} (train_steps): take fewer`);
  }
}

// --- NumPy's arithmetic -------------------------------------------------------------------------

export function range(count: number): number[] {
  return Array.from({ length: count }, (_, i) => i);
}

export function linspace(start: number, stop: number, count: number, endpoint = true): number[] {
  const parts = endpoint ? count - 1 : count;
  const step = (stop - start) / parts;
  const values = range(count).map((i) => (parts ? i * step : 0) + start);
  if (endpoint && count > 1) values[count - 1] = stop;
  return values;
}

/** Linear interpolation between rising points `xs`; flat outside. */
export function interp(at: number[], xs: number[], ys: number[]): number[] {
  const last = xs.length - 1;
  return at.map((x) => {
    if (x <= xs[0]!) return ys[0]!;
    if (x >= xs[last]!) return ys[last]!;
    let low = 0;
    for (let high = last; high - low > 1; ) {
      const middle = (low + high) >> 1;
      if (xs[middle]! <= x) low = middle;
      else high = middle;
    }
    const slope = (ys[low + 1]! - ys[low]!) / (xs[low + 1]! - xs[low]!);
    return xs[low] === x ? ys[low]! : slope * (x - xs[low]!) + ys[low]!;
  });
}

export function roundHalfEven(x: number): number {
  const floor = Math.floor(x);
  const rest = x - floor;
  if (rest !== 0.5) return rest < 0.5 ? floor : floor + 1;
  return floor % 2 === 0 ? floor : floor + 1;
}
