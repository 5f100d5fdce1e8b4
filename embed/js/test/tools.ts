import { fileURLToPath } from "node:url";

/** A path of the checkout, from build/test. */
export function root(path: string): string {
  return fileURLToPath(new URL(`../../../../${path}`, import.meta.url));
}

/** In dB; without a peak the range that `expected` has is it. */
export function psnr(expected: ArrayLike<number>, found: ArrayLike<number>, peak?: number): number {
  let sum = 0;
  let [least, most] = [Infinity, -Infinity];
  for (let i = 0; i < expected.length; i++) {
    sum += (expected[i]! - found[i]!) ** 2;
    [least, most] = [Math.min(least, expected[i]!), Math.max(most, expected[i]!)];
  }
  return 10 * Math.log10(((peak ?? most - least) ** 2 * expected.length) / Math.max(sum, 1e-30));
}
