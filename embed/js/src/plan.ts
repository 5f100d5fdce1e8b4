/** What a run loads, runs and releases, in order, and about how much memory each stage takes. */
import type { Bundle } from "./bundle.js";
import { OptionError } from "./errors.js";
import type { Component, Size } from "./manifest.js";

export interface Stage {
  component: string;
  runs: number;
  /** Size of its files, which are read (or downloaded) when it is loaded. */
  bytes: number;
  /** The most that is in memory while it is loaded or runs, resident components before it included. */
  peak: number;
}

export interface Asked {
  size: Size;
  steps: number;
  texts: number;
  image: boolean;
  resident: boolean;
  limit: number | undefined;
}

// Where the bundle was not measured: as read, as loaded, and as much again to work in.
const UNMEASURED = 3;

/** Throws OptionError where a stage needs more than the limit, with the least that would do. */
export function planStages(bundle: Bundle, asked: Asked): Stage[] {
  const { components } = bundle.manifest;
  const order: [string, number][] = [
    ["text_encoder", asked.texts],
    ["text_encoder_2", asked.texts],
    ["vae_encoder", asked.image ? 1 : 0],
    ["unet", asked.steps],
    ["vae_decoder", 1],
  ];
  const stages: Stage[] = [];
  let held = 0;
  for (const [component, runs] of order) {
    if (!runs || (!components.has(component) && component.endsWith("_2"))) continue;
    const bytes = bundle.bytesOf(bundle.component(component).path);
    const loaded = estimate(bundle.component(component), bytes, asked.size);
    // Its files are in memory twice while the engine copies them.
    stages.push({ component, runs, bytes, peak: held + bytes + loaded });
    if (asked.resident) held += loaded;
  }
  const most = stages.reduce((a, b) => (b.peak > a.peak ? b : a));
  if (asked.limit !== undefined && most.peak > asked.limit) {
    throw new OptionError(
      `${most.component} needs about ${mebibytes(most.peak)} at ${asked.size.join("x")}, the ` +
        `limit is ${mebibytes(asked.limit)}: allow ${mebibytes(most.peak)}` +
        `${asked.resident ? ", do without resident" : ""}, or convert with fewer bits`,
    );
  }
  return stages;
}

/** What a loaded component takes, by what was measured when the bundle was made. */
function estimate({ memory }: Component, bytes: number, [width, height]: Size): number {
  const points = [...memory]
    .filter(([size]) => /^\d+x\d+$/.test(size))
    .map(([size, { weights, activations, scratch }]) => {
      const [w, h] = size.split("x").map(Number) as [number, number];
      return { pixels: w * h, total: weights + activations + scratch };
    })
    .sort((a, b) => a.pixels - b.pixels);
  if (!points.length) return UNMEASURED * bytes;
  const pixels = width * height;
  const above = Math.max(
    1,
    points.findIndex((point) => point.pixels >= pixels),
  );
  const [low, high] = [points[above - 1]!, points[above] ?? points.at(-1)!];
  if (low.pixels === high.pixels) return low.total;
  const slope = (high.total - low.total) / (high.pixels - low.pixels);
  return Math.max(low.total + slope * (pixels - low.pixels), bytes);
}

function mebibytes(bytes: number): string {
  return `${Math.ceil(bytes / 2 ** 20).toLocaleString("en-US")} MiB`;
}
