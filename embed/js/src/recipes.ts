/** What a model was distilled for, and the refusal of anything else (runtime/recipes.py). */
import { RecipeRefusal } from "./errors.js";
import type { Recipe } from "./manifest.js";

/** Throws RecipeRefusal unless `asked` keeps to what the bundle's `own` recipe allows. */
export function checkRecipe(asked: Recipe, own: Recipe): void {
  const wrong: string[] = [];
  const use: string[] = [];
  const allowed = own.allowed_steps;
  for (const option of ["sampler", "spacing"] as const) {
    if (allowed.length && asked[option] !== own[option]) {
      wrong.push(`${option} ${asked[option]}`);
      use.push(`${option} ${own[option]}`);
    }
  }
  if (allowed.length && !allowed.includes(asked.steps)) {
    const far = (n: number): number => Math.abs(n - asked.steps);
    wrong.push(`steps ${asked.steps}`);
    use.push(`steps ${allowed.reduce((best, n) => (far(n) < far(best) ? n : best))}`);
  }
  if (own.guidance_range) {
    const [low, high] = own.guidance_range;
    const scale = asked.guidance || 1; // without guidance, either way
    if (!(low <= scale && scale <= high)) {
      wrong.push(`guidance ${asked.guidance}`);
      use.push(`guidance ${Math.min(Math.max(scale, low), high)}`);
    }
  }
  if (!wrong.length) return;
  throw new RecipeRefusal(
    `${wrong.join(", ")}: this model was distilled for ${limits(own)} (${own.name}): ` +
      `use ${use.join(", ")}, or force to insist`,
  );
}

/** What a recipe allows, in words; empty if that is anything. */
export function limits({ allowed_steps: allowed, sampler, guidance_range: range }: Recipe): string {
  const parts: string[] = [];
  if (allowed.length) {
    const unit = allowed.length === 1 && allowed[0] === 1 ? "step" : "steps";
    parts.push(`${allowed.join(", ")} ${unit} of ${sampler}`);
  }
  if (range) {
    const [low, high] = range;
    parts.push(low === 1 && high === 1 ? "no guidance" : `guidance ${low} to ${high}`);
  }
  return parts.join(", ");
}
