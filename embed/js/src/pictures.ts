/** From networks' planes to pixels and back. */
import { roundHalfEven } from "./schedules.js";

/** RGBA, 8 bits, row by row: what `new ImageData(data, width, height)` takes. */
export interface Picture {
  width: number;
  height: number;
  data: Uint8ClampedArray<ArrayBuffer>;
}

/** Planes of red, green and blue in about [-1, 1], one after the other, as a picture. */
export function toPicture(planes: Float32Array, width: number, height: number): Picture {
  const count = width * height;
  const data = new Uint8ClampedArray(4 * count);
  for (let i = 0; i < count; i++) {
    for (let c = 0; c < 3; c++) {
      // In float32 as the Python runtime, and half to even, so that equal floats are equal bytes.
      const value = Math.fround(Math.fround(planes[c * count + i]! / 2) + 0.5);
      data[4 * i + c] = roundHalfEven(Math.fround(Math.min(Math.max(value, 0), 1) * 255));
    }
    data[4 * i + 3] = 255;
  }
  return { width, height, data };
}

/** A picture, on white where it is transparent, as planes in [-1, 1]. */
export function toPlanes({ width, height, data }: Picture): Float32Array {
  const count = width * height;
  const planes = new Float32Array(3 * count);
  for (let i = 0; i < count; i++) {
    const alpha = data[4 * i + 3]! / 255;
    for (let c = 0; c < 3; c++) {
      const onWhite = Math.round(data[4 * i + c]! * alpha + 255 * (1 - alpha));
      planes[c * count + i] = Math.fround(onWhite / 127.5) - 1;
    }
  }
  return planes;
}

/**
 * A linear guess at the picture of latents, one pixel for each; scale it up smoothly.
 *
 * `weights` are the manifest's `preview`: RGB per channel, then the bias.
 */
export function toPreview(
  latents: Float32Array,
  width: number,
  height: number,
  weights: readonly number[][],
): Picture {
  const count = width * height;
  const bias = weights.at(-1)!;
  const planes = new Float32Array(3 * count);
  for (let i = 0; i < count; i++) {
    for (let rgb = 0; rgb < 3; rgb++) {
      let value = bias[rgb]!;
      for (let c = 0; c + 1 < weights.length; c++)
        value += latents[c * count + i]! * weights[c]![rgb]!;
      planes[rgb * count + i] = value;
    }
  }
  return toPicture(planes, width, height);
}
