/** Draws, off the page's thread: one bundle, one run at a time. */
import * as ort from "onnxruntime-web/wasm";
import { Pipeline, fromFiles, fromUrl, open, type Bundle } from "../src/index.js";
import type { FromWorker, Model, Pixels, ToWorker } from "./messages.js";

const DRAWING = ["text_encoder", "text_encoder_2", "unet", "vae_decoder", "tokenizer"];
const MOST_THREADS = 4;

// What onnxruntime's heap has grown to is nowhere to be asked, so its memory is kept when it is made.
const heaps: WebAssembly.Memory[] = [];
const { Memory } = WebAssembly;
WebAssembly.Memory = class extends Memory {
  constructor(descriptor: WebAssembly.MemoryDescriptor) {
    super(descriptor);
    heaps.push(this);
  }
};

const beside = (name: string): string => new URL(name, self.location.href).href;
ort.env.wasm.wasmPaths = {
  mjs: beside("ort-wasm-simd-threaded.mjs"),
  wasm: beside("ort-wasm-simd-threaded.wasm"),
};
ort.env.wasm.numThreads = self.crossOriginIsolated
  ? Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1)
  : 1; // threads share memory, which pages that are not isolated may not

let bundle: Bundle | undefined;
let pipe: Pipeline | undefined;
let cancel = new AbortController();

function say(message: FromWorker, transfer: Transferable[] = []): void {
  self.postMessage(message, { transfer });
}

function show(pixels: Pixels): Transferable[] {
  return [pixels.data.buffer];
}

self.onmessage = async ({ data }: MessageEvent<ToWorker>) => {
  if (data.do === "cancel") return cancel.abort();
  cancel = new AbortController();
  const { signal } = cancel;
  try {
    if (data.do === "open") await openBundle(data);
    else await draw(data, signal);
  } catch (error) {
    if (signal.aborted) say({ is: "cancelled" });
    else say({ is: "failed", message: error instanceof Error ? error.message : String(error) });
    await pipe?.release();
  }
};

async function openBundle({ url, files }: { url?: string; files?: File[] }): Promise<void> {
  const opened = await open(files ? fromFiles(files) : fromUrl(url!));
  await pipe?.release();
  [bundle, pipe] = [opened, undefined];
  say({ is: "opened", model: describe(opened) });
}

function describe({ manifest, sha256 }: Bundle): Model {
  const { weights, activations } = manifest.precision;
  return {
    name: manifest.model,
    licence: manifest.licence,
    precision: `${weights} weights, ${activations} arithmetic`,
    bytes: drawingBytes(),
    sha256,
    steps: manifest.recipe.steps,
    allowedSteps: manifest.recipe.allowed_steps,
    size: manifest.sizes.default,
  };
}

function drawingBytes(): number {
  return DRAWING.reduce((total, path) => total + bundle!.bytesOf(path), 0);
}

async function draw(
  {
    prompt,
    seed,
    steps,
    resident,
  }: { prompt: string; seed: number; steps: number; resident: boolean },
  signal: AbortSignal,
): Promise<void> {
  if (!bundle) throw new Error("no bundle is open");
  if (pipe?.options.resident !== resident) {
    await pipe?.release();
    pipe = new Pipeline(bundle, {
      ort,
      resident,
      watch: (event) => say({ is: "timed", ...event }),
      note: (text) => say({ is: "note", text }),
    });
  }
  const total = drawingBytes();
  let loaded = 0;
  let told = 0;
  const onBytes = (count: number): void => {
    loaded += count;
    if (loaded - told < total / 200) return;
    told = loaded;
    say({ is: "bytes", loaded, total });
  };
  const options = { seed, steps, signal, onBytes };
  say({ is: "started", plan: pipe.plan(options), threads: ort.env.wasm.numThreads! });
  const begin = performance.now();
  let last;
  for await (const step of pipe.steps(prompt, options)) {
    last = step;
    const preview = pipe.preview(step);
    say({ is: "step", index: step.index, total: step.total, preview }, show(preview));
  }
  const picture = await pipe.decode(last!, options);
  if (!resident) await pipe.release();
  const heap = heaps.reduce((sum, memory) => sum + memory.buffer.byteLength, 0);
  say({ is: "drawn", picture, milliseconds: performance.now() - begin, heap }, show(picture));
}
