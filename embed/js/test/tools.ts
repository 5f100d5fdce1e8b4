import { fileURLToPath } from "node:url";

/** A path of the checkout, from build/test. */
export function root(path: string): string {
  return fileURLToPath(new URL(`../../../../${path}`, import.meta.url));
}

/** In dB; without a peak the largest magnitude expected is it. */
export function psnr(expected: ArrayLike<number>, found: ArrayLike<number>, peak?: number): number {
  let sum = 0;
  let most = 0;
  for (let i = 0; i < expected.length; i++) {
    sum += (expected[i]! - found[i]!) ** 2;
    most = Math.max(most, Math.abs(expected[i]!));
  }
  return 10 * Math.log10(((peak ?? most) ** 2 * expected.length) / Math.max(sum, 1e-30));
}
