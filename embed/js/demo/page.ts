/** The page: what a person sees and presses. The worker draws. */
import { encodePng } from "../src/png.js";
import type { FromWorker, Model, Pixels, ToWorker } from "./messages.js";

const EXAMPLES = [
  "a penguin",
  "a rocket on a black background",
  "a pizza",
  "an octopus on a pink background",
  "a cactus",
  "a guitar on a yellow background",
  "a rainbow",
  "a fox on a green background",
];
const NAMES: Record<string, string> = {
  text_encoder: "Text encoder",
  text_encoder_2: "Text encoder 2",
  unet: "U-Net",
  vae_decoder: "Decoder",
};
const MOST_STEPS = 50;
const KEPT = 12; // pictures of the strip

interface Job {
  prompt: string;
  seed: number;
  steps: number;
}

function by<T extends HTMLElement>(id: string): T {
  return document.getElementById(id) as T;
}

const form = by<HTMLFormElement>("form");
const prompt = by<HTMLTextAreaElement>("prompt");
const seed = by<HTMLInputElement>("seed");
const steps = by<HTMLInputElement>("steps");
const resident = by<HTMLInputElement>("resident");
const progress = by<HTMLProgressElement>("progress");
const picture = by<HTMLCanvasElement>("picture");
const preview = by<HTMLCanvasElement>("preview");
const worker = new Worker("worker.js", { type: "module" });

let model: Model | undefined;
let job: Job | undefined; // what is being drawn
let times = new Map<string, { load: number; runs: number[] }>();
let plannedPeak = 0;
let saved = ""; // the address of the PNG

function tell(message: ToWorker): void {
  worker.postMessage(message);
}

// --- what the worker says -------------------------------------------------------------------------

worker.onmessage = ({ data }: MessageEvent<FromWorker>) => {
  switch (data.is) {
    case "opened":
      return opened(data.model);
    case "started":
      plannedPeak = Math.max(...data.plan.map(({ peak }) => peak));
      return;
    case "bytes":
      return move(
        0.3 * Math.min(1, data.loaded / data.total),
        `Reading the model: ${megabytes(data.loaded)}`,
      );
    case "timed":
      return timed(data);
    case "step":
      picture.classList.remove("on");
      paint(preview, data.preview);
      return move(0.4 + (0.5 * data.index) / data.total, `Step ${data.index} of ${data.total}`);
    case "drawn":
      return void drawn(data);
    case "note":
      return complain(data.text, "note");
    case "cancelled":
      restore();
      return finish("Cancelled");
    case "failed":
      restore();
      finish("");
      if (!model) by("invite").textContent = "No model is open";
      return complain(data.message);
  }
};
worker.onerror = (event) => {
  event.preventDefault();
  finish("");
  complain(`The worker stopped: ${event.message || "it could not be loaded"}. Reload the page.`);
};

function opened(found: Model): void {
  model = found;
  const { allowedSteps } = found;
  steps.max = String(
    allowedSteps.length ? Math.max(...allowedSteps) : Math.min(MOST_STEPS, 2 * found.steps),
  );
  steps.min = String(allowedSteps.length ? Math.min(...allowedSteps) : 1);
  if (!asked.has("steps")) steps.value = String(found.steps);
  showSteps();
  by("invite").textContent =
    `Press Draw, or choose an example. The model is ${megabytes(found.bytes)}.`;
  facts({
    Name: found.name,
    Picture: `${found.size[0]} × ${found.size[1]} pixels, ${found.steps} steps`,
    Precision: found.precision,
    Size: megabytes(found.bytes),
    Licence: found.licence,
    Identity: found.sha256.slice(0, 16),
  });
  setBusy(false);
  by("status").textContent = "Ready";
}

function timed({ component, what, milliseconds }: FromWorker & { is: "timed" }): void {
  if (what === "free") return;
  const time = times.get(component) ?? { load: 0, runs: [] };
  times.set(component, time);
  if (what === "load") time.load += milliseconds;
  else time.runs.push(milliseconds);
  const next = { text_encoder: "Reading the prompt", unet: "Denoising", vae_decoder: "Decoding" }[
    component
  ];
  if (next && what === "load") move(progress.value, next);
  if (component === "vae_decoder") move(what === "load" ? 0.93 : 1, "Decoding");
}

async function drawn({
  picture: pixels,
  milliseconds,
  heap,
}: FromWorker & { is: "drawn" }): Promise<void> {
  const done = job!;
  paint(picture, pixels);
  picture.setAttribute("aria-label", `Picture of: ${done.prompt}`);
  finish("Done", `${seconds(milliseconds)}`);
  showTimes(milliseconds, heap);
  remember(done, pixels);
  const settings = {
    prompt: done.prompt,
    seed: `${done.seed}`,
    rng: "torch",
    steps: `${done.steps}`,
  };
  const about = {
    ...settings,
    size: `${pixels.width}x${pixels.height}`,
    bundle: model!.name,
    bundle_sha256: model!.sha256,
    software: "ferrotype.js",
  };
  await offer(new Blob([await encodePng(pixels, about)], { type: "image/png" }), done);
}

// --- drawing --------------------------------------------------------------------------------------

function draw(): void {
  if (job || !model || !form.reportValidity()) return;
  job = {
    prompt: prompt.value.trim().replace(/\s+/g, " "),
    seed: seed.valueAsNumber,
    steps: steps.valueAsNumber,
  };
  times = new Map();
  by("alert").hidden = true;
  by("total").textContent = "";
  setBusy(true);
  preview.classList.remove("on"); // the last picture stays until there is something to see
  move(0, "Starting");
  history.replaceState(
    null,
    "",
    `#${new URLSearchParams(Object.entries(job).map(([k, v]) => [k, String(v)]))}`,
  );
  tell({ do: "draw", ...job, resident: resident.checked });
}

function setBusy(busy: boolean): void {
  by<HTMLButtonElement>("draw").disabled = busy || !model;
  by("draw").textContent = busy ? "Drawing …" : "Draw";
  by("cancel").hidden = !busy;
  progress.classList.toggle("idle", !busy);
  for (const button of document.querySelectorAll<HTMLButtonElement>("#examples button"))
    button.disabled = busy;
  by<HTMLInputElement>("folder").disabled = busy;
  by("plate").setAttribute("aria-busy", String(busy));
}

function finish(status: string, total = ""): void {
  job = undefined;
  setBusy(false);
  by("status").textContent = status;
  by("total").textContent = total;
}

function move(share: number, status: string): void {
  if (!job) return;
  progress.value = Math.max(share, share === 0 ? 0 : progress.value);
  by("status").textContent = status;
}

/** The picture before, if there is one, after a run that came to nothing. */
function restore(): void {
  preview.classList.remove("on");
  picture.classList.toggle("on", saved !== "");
  by("empty").hidden = saved !== "";
}

function paint(canvas: HTMLCanvasElement, { width, height, data }: Pixels): void {
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d")!.putImageData(new ImageData(data, width, height), 0, 0);
  canvas.classList.add("on");
  by("empty").hidden = true;
}

function complain(text: string, kind = ""): void {
  const alert = by("alert");
  alert.className = `alert ${kind}`;
  alert.textContent = text;
  alert.hidden = false;
}

// --- what came of it ------------------------------------------------------------------------------

function showTimes(total: number, heap: number): void {
  const rows: HTMLElement[] = [];
  for (const [component, { load, runs }] of times) {
    const run = runs.reduce((sum, one) => sum + one, 0);
    const name = element(
      "dt",
      `${NAMES[component] ?? component}${runs.length > 1 ? ` × ${runs.length}` : ""}`,
    );
    const track = element("dd", "", "track");
    for (const [kind, took] of [
      ["load", load],
      ["run", run],
    ] as const) {
      const bar = element("i", "", kind);
      bar.style.width = `${(100 * took) / total}%`;
      track.append(bar);
    }
    track.setAttribute("aria-label", `load ${milliseconds(load)}, run ${milliseconds(run)}`);
    rows.push(name, track, element("dd", milliseconds(load + run), "took"));
  }
  by("bars").replaceChildren(...rows);
  by("memory").textContent = `memory ${megabytes(heap)}, ${megabytes(plannedPeak)} planned`;
  by("timing").hidden = false;
}

async function offer(png: Blob, { prompt, seed }: Job): Promise<void> {
  URL.revokeObjectURL(saved);
  saved = URL.createObjectURL(png);
  const name = `${
    prompt
      .toLowerCase()
      .replace(/[^a-z0-9]+/g, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 60) || "picture"
  }-${seed}.png`;
  const save = by<HTMLAnchorElement>("save");
  save.href = saved;
  save.download = name;
  save.hidden = false;
  by("link").hidden = !navigator.clipboard;
  const shared = { files: [new File([png], name, { type: "image/png" })] };
  by("share").hidden = !navigator.canShare?.(shared);
  by("share").onclick = () => void navigator.share(shared).catch(() => undefined); // closed by the person
}

function remember(done: Job, pixels: Pixels): void {
  const small = document.createElement("canvas");
  paint(small, pixels);
  const button = element("button", "") as HTMLButtonElement;
  button.type = "button";
  button.title = `${done.prompt}, seed ${done.seed}, ${done.steps} steps`;
  button.setAttribute("aria-label", `Draw again: ${button.title}`);
  button.append(small);
  button.onclick = () => {
    if (job) return;
    set(done);
    draw();
  };
  const item = element("li", "");
  item.append(button);
  const strip = by("strip");
  strip.prepend(item);
  while (strip.children.length > KEPT) strip.lastElementChild!.remove();
  by("drawn").hidden = strip.children.length < 2;
}

function set({ prompt: text, seed: number, steps: count }: Job): void {
  prompt.value = text;
  seed.value = String(number);
  steps.value = String(count);
  showSteps();
}

function showSteps(): void {
  by("steps-shown").textContent = steps.value;
}

function facts(all: Record<string, string>): void {
  by("facts").replaceChildren(
    ...Object.entries(all).flatMap(([name, value]) => [element("dt", name), element("dd", value)]),
  );
}

function element(tag: string, text: string, kind = ""): HTMLElement {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;
}

function milliseconds(value: number): string {
  return `${Math.round(value).toLocaleString("en-US")} ms`;
}

function seconds(value: number): string {
  return `${(value / 1000).toFixed(value < 10_000 ? 2 : 1)} s`;
}

// --- what the person does -------------------------------------------------------------------------

form.onsubmit = (event) => {
  event.preventDefault();
  draw();
};
prompt.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  draw();
};
document.onkeydown = (event) => {
  if (event.key === "Escape" && job) tell({ do: "cancel" });
};
by("cancel").onclick = () => tell({ do: "cancel" });
by("dice").onclick = () => {
  seed.value = String(crypto.getRandomValues(new Uint32Array(1))[0]! % 1_000_000);
  draw();
};
by("link").onclick = async () => {
  await navigator.clipboard.writeText(location.href);
  by("status").textContent = "Link copied: it draws the same picture";
};
steps.oninput = showSteps;
by<HTMLInputElement>("folder").onchange = ({ target }) => {
  const { files } = target as HTMLInputElement;
  if (!files?.length) return;
  by("alert").hidden = true;
  by("status").textContent = "Opening the bundle …";
  tell({ do: "open", files: [...files] });
  (target as HTMLInputElement).value = "";
};
by("examples").append(
  ...EXAMPLES.map((text) => {
    const button = element("button", text) as HTMLButtonElement;
    button.type = "button";
    button.onclick = () => {
      prompt.value = text;
      draw();
    };
    const item = element("li", "");
    item.append(button);
    return item;
  }),
);

// A link brings its settings along.
const asked = new URLSearchParams(location.hash.slice(1));
if (asked.has("prompt")) prompt.value = asked.get("prompt")!;
if (/^\d{1,10}$/.test(asked.get("seed") ?? "")) seed.value = asked.get("seed")!;
if (/^\d{1,3}$/.test(asked.get("steps") ?? "")) steps.value = asked.get("steps")!;
showSteps();

tell({ do: "open", url: new URL("bundle/", location.href).href });
if (navigator.serviceWorker) {
  navigator.serviceWorker.register("sw.js").catch(() => undefined); // then it needs the network
}
