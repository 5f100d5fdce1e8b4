/** A bundle's manifest, read as strictly as bundle.py reads it; docs/bundle.md is the format. */
import { BundleError, OptionError, printable } from "./errors.js";
import {
  FormatError,
  anything,
  flag,
  list,
  named,
  nullable,
  number,
  oneOf,
  optional,
  pair,
  record,
  strictJson,
  text,
  tuple,
  whole,
  type Reader,
} from "./json.js";

const FORMAT = 1;
export const MANIFEST = "manifest.json";
export const MAX_MANIFEST_BYTES = 16 << 20;
const MAX_PATH = 200;
const DEVICES = /^(con|prn|aux|nul|com[1-9]|lpt[1-9])$/i;
export const TEXT_ENCODERS = { text_encoder: "tokenizer", text_encoder_2: "tokenizer_2" } as const;
const TIME_IDS = 6;
const OUTPUTS: [string, string, number][] = [
  ["unet", "out_sample", 4],
  ["vae_decoder", "sample", 4],
  ["vae_encoder", "latent_parameters", 4],
];

/** `name` if it is a relative path that stays below the bundle on every system. */
const path: Reader<string> = (value, where) => {
  const name = text(value, where);
  if (name.length <= MAX_PATH && name.split("/").every(isPlain)) return name;
  const shown = printable(JSON.stringify(name), 100);
  throw new FormatError(`${where}: ${shown} is not a plain path inside the bundle`);
};

function isPlain(part: string): boolean {
  return (
    /^[!-~]([ -~]*[!-~])?$/.test(part) &&
    !/[\\:*?"<>|]|^\.|\.$/.test(part) &&
    !DEVICES.test(part.split(".")[0]!)
  );
}

const dimension: Reader<string | number> = (value, where) =>
  typeof value === "string" && value ? value : whole(1)(value, where);

const tensor = record({ dtype: text, shape: list(dimension) });
const memory = record({ weights: whole(0), activations: whole(0), scratch: whole(0) });
const hash: Reader<string> = (value, where) => {
  if (/^[0-9a-f]{64}$/.test(text(value, where))) return value as string;
  throw new FormatError(`${where} is not 64 hex digits`);
};

const component = record({
  path,
  config: named(anything),
  inputs: named(tensor),
  outputs: named(tensor),
  parts: optional(list(text), []),
  memory: optional(named(memory), new Map()),
  activations: optional(text, ""),
});

const sizes = record({
  default: pair(whole()),
  multiple: optional(whole(1), 8),
  minimum: optional(whole(1, 1 << 16), 64),
  maximum: optional(whole(1, 1 << 16), 2048),
  allowed: optional(nullable(list(pair(whole()))), null),
});

const recipe = record({
  sampler: text,
  steps: whole(1, 1000),
  guidance: number(0),
  prediction_type: optional(oneOf("epsilon", "v_prediction", "sample"), "epsilon"),
  spacing: optional(oneOf("leading", "trailing", "linspace", "lcm"), "leading"),
  train_steps: optional(whole(2, 100_000), 1000),
  beta_start: optional(number(Number.MIN_VALUE, 1 - 2 ** -53), 0.00085),
  beta_end: optional(number(Number.MIN_VALUE, 1 - 2 ** -53), 0.012),
  beta_schedule: optional(oneOf("scaled_linear", "linear", "squaredcos_cap_v2"), "scaled_linear"),
  zero_terminal_snr: optional(flag, false),
  steps_offset: optional(whole(), 1),
  set_alpha_to_one: optional(flag, false),
  original_steps: optional(whole(), 50),
  timestep_scaling: optional(number(), 10),
  eta: optional(number(), 0),
  timesteps: optional(list(number()), []),
  zero_negative: optional(flag, false),
  name: optional(text, ""),
  allowed_steps: optional(list(whole(1, 1000)), []),
  guidance_range: optional(nullable(pair(number(0))), null),
});

const manifest = record({
  format: whole(),
  tool: text,
  model: text,
  family: text,
  target: text,
  licence: text,
  source: record({ name: text, sha256: text }),
  precision: record({ weights: text, activations: text }),
  sizes,
  recipe,
  preview: list(tuple(number(), 3)),
  tokenizers: named(record({ path, max_length: whole(3, 1 << 16), pad_token: text })),
  components: named(component),
  parity: named(anything),
  options: optional(named(text), new Map()),
  files: named(record({ bytes: whole(0), sha256: hash })),
});

export type Manifest = ReturnType<typeof manifest>;
export type Component = ReturnType<typeof component>;
export type TensorSpec = ReturnType<typeof tensor>;
export type Recipe = ReturnType<typeof recipe>;
export type Sizes = ReturnType<typeof sizes>;
export type Size = [width: number, height: number];

/** Parse a manifest; every fault is a BundleError that names the field. */
export function parseManifest(source: string, where = MANIFEST): Manifest {
  try {
    const raw = strictJson(source) as { format?: unknown } | null;
    // First: a newer format may have fields we do not know.
    if (raw && Object.hasOwn(raw, "format") && raw.format !== FORMAT) {
      throw new BundleError(
        `${where}: it is format ${printable(JSON.stringify(raw.format), 40)}, this ferrotype ` +
          `reads ${FORMAT}; update ferrotype or convert the checkpoint again`,
      );
    }
    const read = manifest(raw, "");
    checkNames(read);
    checkSizes(read.sizes);
    checkNetworks(read);
    return read;
  } catch (error) {
    if (!(error instanceof FormatError || error instanceof SyntaxError)) throw error;
    throw new BundleError(`${where} is not a valid manifest: ${printable(error.message)}`);
  }
}

/** `size`, or an OptionError that names the sizes that work. */
export function checkSize(sizes: Sizes, size: Size): Size {
  const fault = sizeFault(sizes, size);
  if (fault) throw new OptionError(fault);
  return size;
}

function sizeFault(sizes: Sizes, [width, height]: Size): string {
  const { allowed, minimum, maximum, multiple } = sizes;
  const said = `size ${width}x${height}:`;
  if (allowed) {
    if (allowed.some(([w, h]) => w === width && h === height)) return "";
    return `${said} this bundle draws only ${allowed.map(([w, h]) => `${w}x${h}`).join(", ")}`;
  }
  for (const side of [width, height]) {
    if (!Number.isInteger(side) || side < minimum || side > maximum) {
      return `${said} ${side} is outside ${minimum}..${maximum}`;
    }
    if (side % multiple) {
      const near = Math.max(minimum, Math.round(side / multiple) * multiple);
      return `${said} ${side} is no multiple of ${multiple}, try ${near}`;
    }
  }
  return "";
}

function checkSizes(sizes: Sizes): void {
  require(sizes.minimum <= sizes.maximum, "sizes: minimum and maximum are not in order");
  const fault = sizeFault(sizes, sizes.default);
  require(!fault, `sizes: ${fault}`);
}

function checkNames({ files, components, tokenizers, recipe }: Manifest): void {
  const folded = new Set<string>();
  for (const name of files.keys()) {
    path(name, "files");
    const lower = name.toLowerCase();
    require(lower !== MANIFEST, `files: ${name} cannot hold its own hash`);
    require(!folded.has(lower), `files: ${name} is there twice but for its case`);
    folded.add(lower);
  }
  for (const [name, part] of [...components, ...tokenizers]) {
    const holds = [...files.keys()].some((file) => isBelow(file, part.path));
    require(holds, `${name} is at ${part.path}, which lists no file`);
  }
  for (const [name, { path: at, parts }] of components) {
    for (const part of parts) path(`${at}/${part}`, `components.${name}.parts`);
  }
  const [low, high] = recipe.guidance_range ?? [0, 0];
  require(low <= high, `recipe: guidance_range ${low} to ${high} does not rise from 0`);
}

/** What every host computes with must be there, before a network is loaded for it. */
function checkNetworks({ components, preview }: Manifest): void {
  for (const [name, output, rank] of OUTPUTS) {
    if (components.has(name)) checkOutput(components, name, output, rank);
  }
  for (const name of Object.keys(TEXT_ENCODERS)) {
    const part = components.get(name);
    if (part)
      checkOutput(components, name, statesOf(part.outputs.keys()) || "last_hidden_state", 3);
  }
  const decoder = components.get("vae_decoder")?.config;
  if (decoder) {
    const where = "components.vae_decoder.config";
    const channels = whole(1, 64)(decoder.get("latent_channels"), `${where}.latent_channels`);
    const blocks = list(whole())(decoder.get("block_out_channels"), `${where}.block_out_channels`);
    require(1 <= blocks.length && blocks.length <= 8, `${where}.block_out_channels: not 1 to 8`);
    number(Number.MIN_VALUE)(decoder.get("scaling_factor"), `${where}.scaling_factor`);
    const rows = preview.length;
    require(rows === channels + 1, `preview has ${rows} rows, ${channels + 1} expected`);
  }
  const unet = components.get("unet");
  if (unet?.inputs.has("timestep_cond")) {
    const width = unet.config.get("time_cond_proj_dim");
    const where = "components.unet.config.time_cond_proj_dim";
    require(whole(4, 1 << 16)(width, where) % 2 === 0, `${where} is ${width}, not even`);
  }
  const ids = unet?.inputs.get("time_ids")?.shape;
  require(!ids ||
    (ids.length === 2 && ids[1] === TIME_IDS), `unet: time_ids is not of ${TIME_IDS}`);
  if (unet?.inputs.has("text_embeds")) {
    require(components.has(
      "text_encoder_2",
    ), "components: no text_encoder_2, which the unet needs");
    checkOutput(components, "text_encoder_2", "text_embeds", 2);
  }
}

function checkOutput(
  parts: Manifest["components"],
  name: string,
  output: string,
  rank: number,
): void {
  const found = parts.get(name)!.outputs.get(output)?.shape.length;
  require(found === rank, `components.${name}.outputs: no ${output} of ${rank} dimensions`);
}

/** Which of a text encoder's outputs the U-Net attends to; empty if it is not just one. */
export function statesOf(outputs: Iterable<string>): string {
  const found = [...outputs].filter((name) =>
    /^(last_hidden_state|hidden_states\.\d+)$/.test(name),
  );
  return found.length === 1 ? found[0]! : "";
}

/** Whether a file is a component's path, or in the folder of that name. */
export function isBelow(file: string, folder: string): boolean {
  return file === folder || file.startsWith(`${folder}/`);
}

function require(holds: boolean, message: string): void {
  if (!holds) throw new FormatError(message);
}
