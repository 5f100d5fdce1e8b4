/** What the page and its worker say to each other. */
import type { Stage } from "../src/index.js";

export type ToWorker =
  | { do: "open"; url?: string; files?: File[] }
  | { do: "draw"; prompt: string; seed: number; steps: number; resident: boolean }
  | { do: "cancel" };

export interface Model {
  name: string;
  licence: string;
  precision: string;
  /** Of the components that draw from text. */
  bytes: number;
  sha256: string;
  steps: number;
  allowedSteps: number[];
  size: [number, number];
}

export interface Pixels {
  width: number;
  height: number;
  data: Uint8ClampedArray<ArrayBuffer>;
}

export type FromWorker =
  | { is: "opened"; model: Model }
  | { is: "started"; plan: Stage[]; threads: number }
  | { is: "bytes"; loaded: number; total: number }
  | { is: "timed"; component: string; what: "load" | "run" | "free"; milliseconds: number }
  | { is: "step"; index: number; total: number; preview: Pixels }
  | { is: "drawn"; picture: Pixels; milliseconds: number; heap: number }
  | { is: "note"; text: string }
  | { is: "cancelled" }
  | { is: "failed"; message: string };
