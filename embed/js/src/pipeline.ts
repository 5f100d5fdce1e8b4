/** The pipeline: a bundle, a prompt and a seed become latents, step by step, and then a picture. */
import type { InferenceSession } from "onnxruntime-common";
import type { Bundle, ReadOptions } from "./bundle.js";
import { Engine, type Arrays, type Float32NDArray, type Ort } from "./engine.js";
import { OptionError, PipelineError, printable } from "./errors.js";
import { TEXT_ENCODERS, checkSize, statesOf, type Recipe, type Size } from "./manifest.js";
import { toPicture, toPlanes, toPreview, type Picture } from "./pictures.js";
import { planStages, type Stage } from "./plan.js";
import { MAX_CHUNKS, parse, weigh } from "./prompts.js";
import { checkRecipe } from "./recipes.js";
import {
  ETA,
  SAMPLERS,
  SPACING,
  makeTable,
  sample,
  start,
  type Denoised,
  type Table,
} from "./samplers.js";
import { choose } from "./schedules.js";
import { makeNoise, type Noise } from "./seeds.js";
import { Tokenizer, type Tokens } from "./tokenizer.js";

const MAX_GUIDANCE = 50;
const CACHED_PROMPTS = 64; // encoding again would load the text encoder

/** What was done to a component, and what it took. */
export interface Watched {
  component: string;
  what: "load" | "run" | "free";
  milliseconds: number;
}

export interface PipelineOptions {
  /** The module onnxruntime-web, -node or -react-native. */
  ort: Ort;
  /** Options for every session, such as `executionProviders`. */
  session?: InferenceSession.SessionOptions;
  /** Keep every component in memory once loaded: faster pictures, more memory. */
  resident?: boolean;
  /** Bytes that no stage may need more than, by the plan; a run that would is refused. */
  memory?: number;
  /** Have the engine open files by their path; default: where the source has paths. */
  byPath?: boolean;
  /** Told of each load, run and release. */
  watch?: (event: Watched) => void;
  /** Told what a person should know, such as words that were not read. */
  note?: (text: string) => void;
}

export interface RunOptions {
  /** A whole number from 0; a bigint beyond 2^53. */
  seed?: number | bigint;
  steps?: number;
  negative?: string;
  guidance?: number;
  sampler?: string;
  spacing?: string;
  eta?: number;
  /** [width, height] in pixels. */
  size?: Size;
  /** A picture of that size to start from. */
  image?: Picture;
  /** With an image: 1 forgets it, near 0 keeps it. */
  strength?: number;
  /** `torch`, or `numpy`. */
  rng?: string;
  /** A stored sampler table to run, in place of the recipe's. */
  table?: Table;
  /** Insist on what the model was not distilled for. */
  force?: boolean;
  /** Ends the run, also its downloads, with the signal's reason. */
  signal?: AbortSignal;
  /** Told how many bytes of the bundle have come. */
  onBytes?: (count: number) => void;
}

/** After a step: `latents` are 4 planes (channels) of height times width. */
export interface Step extends Denoised {
  width: number;
  height: number;
}

interface Text {
  states: Float32NDArray;
  pooled: Float32NDArray | undefined;
}

interface Run {
  recipe: Recipe;
  table: Table;
  noise: Noise;
  size: Size;
  options: RunOptions;
}

export class Pipeline {
  readonly #engines = new Map<string, Engine>();
  readonly #tokenizers = new Map<string, Tokenizer>();
  readonly #texts = new Map<string, Text>();
  #turn: Promise<unknown> = Promise.resolve(); // one component runs at a time

  constructor(
    readonly bundle: Bundle,
    readonly options: PipelineOptions,
  ) {}

  /** The bundle's recipe with what the caller changes; throws OptionError, RecipeRefusal. */
  recipe({ steps, sampler, guidance, spacing, eta, force }: RunOptions = {}): Recipe {
    const own = this.bundle.manifest.recipe;
    let recipe = own;
    if (guidance !== undefined && !(0 <= guidance && guidance <= MAX_GUIDANCE)) {
      throw new OptionError(`guidance is ${guidance}: it must be from 0 to ${MAX_GUIDANCE}`);
    }
    if (sampler !== undefined && sampler !== own.sampler) {
      choose("sampler", sampler, SAMPLERS);
      recipe = {
        ...recipe,
        sampler,
        spacing: SPACING[sampler] ?? "trailing",
        eta: ETA[sampler] ?? 0,
        timesteps: [],
      };
    }
    recipe = {
      ...recipe,
      steps: steps ?? recipe.steps,
      guidance: guidance ?? recipe.guidance,
      spacing: spacing ?? recipe.spacing,
      eta: eta ?? recipe.eta,
    };
    if (!force) checkRecipe(recipe, own);
    else if (own.name && (recipe.steps !== own.steps || recipe.spacing !== own.spacing)) {
      recipe = { ...recipe, timesteps: [] }; // those were of its own steps
    }
    return recipe;
  }

  /** What a run loads, runs and releases, in order, and what each stage takes. */
  plan(options: RunOptions = {}): Stage[] {
    const run = this.#checked(options);
    const passes = this.#twoPasses(run.recipe.guidance) ? 2 : 1;
    return planStages(this.bundle, {
      size: run.size,
      steps: run.table.rows.length * passes,
      texts: passes,
      image: Boolean(options.image),
      resident: this.options.resident ?? false,
      limit: this.options.memory,
    });
  }

  /**
   * Denoise: a value after each step. Whoever iterates owns progress, preview and cancelling.
   *
   * Arguments are checked here, before anything is loaded: OptionError says what would work.
   */
  steps(prompt: string, options: RunOptions = {}): AsyncGenerator<Step, void, void> {
    const run = this.#checked(options);
    this.plan(options);
    parse(prompt);
    parse(options.negative ?? "");
    return this.#denoise(prompt, run);
  }

  /** The short way: every step, then the picture. */
  async generate(prompt: string, options: RunOptions = {}): Promise<Picture> {
    let last: Step | undefined;
    for await (const step of this.steps(prompt, options)) last = step;
    const picture = await this.decode(last!, options);
    if (!this.options.resident) await this.release();
    return picture;
  }

  /** The picture of a step's latents. */
  async decode(step: Step, options: ReadOptions = {}): Promise<Picture> {
    const factor = Math.fround(this.#scalingFactor);
    const channels = step.latents.length / (step.width * step.height);
    const latent_sample = {
      data: step.latents.map((value) => value / factor),
      shape: [1, channels, step.height, step.width],
    };
    const { sample } = await this.#run("vae_decoder", { latent_sample }, options);
    if (!sample!.data.every(Number.isFinite)) {
      throw new PipelineError(
        "the vae_decoder returned NaN or Inf, which would be a black picture: " +
          "convert with --activations fp32",
      );
    }
    const [, , height, width] = sample!.shape as [number, number, number, number];
    return toPicture(sample!.data, width, height);
  }

  /** A linear guess at the picture, one pixel per latent: at once, without a network. */
  preview(step: Step): Picture {
    return toPreview(step.denoised, step.width, step.height, this.bundle.manifest.preview);
  }

  /** Give back the memory of every loaded component. */
  async release(): Promise<void> {
    await this.#alone(() => this.#releaseAll());
  }

  /** A prompt's tokens by text encoder, all in the same number of chunks. */
  async tokens(prompt: string, options: ReadOptions = {}): Promise<Map<string, Tokens>> {
    const found = new Map<string, Tokens>();
    for (const encoder of this.#textEncoders) {
      const tokenizer = await this.#tokenizer(encoder, options);
      found.set(encoder, tokenizer.chunks(prompt, this.#readsChunks ? MAX_CHUNKS : 1));
    }
    const most = Math.max(...[...found.values()].map(({ ids }) => ids.length));
    for (const [encoder, tokens] of found) {
      if (tokens.dropped) {
        const read = tokens.ids.flat().length;
        const lost = printable(tokens.dropped, 40);
        this.options.note?.(
          `the text encoder reads ${read} tokens, so the end of the prompt is unused: '${lost}'`,
        );
      }
      found.set(encoder, (await this.#tokenizer(encoder, options)).padded(tokens, most));
    }
    return found;
  }

  // --- a run ------------------------------------------------------------------------------------

  #checked(options: RunOptions): Run {
    const { sizes } = this.bundle.manifest;
    const recipe = this.recipe(options);
    const size = checkSize(sizes, options.size ?? sizes.default);
    const { image, strength = 0.6 } = options;
    if (image && (image.width !== size[0] || image.height !== size[1])) {
      const found = `${image.width}x${image.height}`;
      throw new OptionError(`the image is ${found}: scale it to ${size[0]}x${size[1]} first`);
    }
    const table = options.table ?? makeTable(recipe, image && strength);
    if (!image !== !table.startImage) {
      throw new OptionError("the table starts from an image and none was given, or the reverse");
    }
    const noise = makeNoise(options.rng ?? "torch", options.seed ?? 0);
    if (options.negative && !this.#twoPasses(recipe.guidance)) {
      throw new OptionError(
        `a negative prompt has no effect at guidance ${recipe.guidance} with this model: ` +
          `leave it out${this.#embedsGuidance ? "" : " or set guidance above 1"}`,
      );
    }
    return { recipe, table, noise, size, options };
  }

  async *#denoise(prompt: string, run: Run): AsyncGenerator<Step, void, void> {
    const { table, noise, size, options } = run;
    const { guidance } = run.recipe;
    const [text, negative] = await this.#encodeBoth(prompt, run);
    const side = 2 ** (this.#decoderConfig<number[]>("block_out_channels").length - 1);
    const channels = this.#decoderConfig<number>("latent_channels");
    const [width, height] = [size[0] / side, size[1] / side];
    const image = options.image && (await this.#encodeImage(options.image, noise, options));
    const fresh = noise(channels * width * height);
    const extra = this.#extraInputs(guidance, size);

    const predict = async (x: Float32Array, timestep: number): Promise<Float32Array> => {
      const inputs: Arrays = {
        ...extra,
        sample: { data: x, shape: [1, channels, height, width] },
        timestep: { data: [timestep], shape: [] },
      };
      const conditional = await this.#unet(inputs, text, options);
      if (!negative) return conditional;
      const unconditional = await this.#unet(inputs, negative, options);
      const scale = Math.fround(guidance);
      return unconditional.map((value, i) => {
        return value + Math.fround(scale * Math.fround(conditional[i]! - value));
      });
    };

    for await (const step of sample(predict, start(table, fresh, image), table, noise)) {
      if (!step.latents.every(Number.isFinite)) {
        throw new PipelineError(
          `the unet returned NaN or Inf at step ${step.index} of ${step.total}: ` +
            "the bundle's precision overflows; convert with --activations fp32",
        );
      }
      yield { ...step, width, height };
    }
  }

  async #unet(inputs: Arrays, text: Text, options: ReadOptions): Promise<Float32Array> {
    const all: Arrays = { ...inputs, encoder_hidden_states: text.states };
    if (text.pooled) all.text_embeds = text.pooled;
    return (await this.#run("unet", all, options)).out_sample!.data;
  }

  #extraInputs(guidance: number, [width, height]: Size): Arrays {
    const extra: Arrays = {};
    if (this.#embedsGuidance) extra.timestep_cond = this.#guidanceEmbedding(guidance);
    if (this.#unetInputs.has("time_ids")) {
      // As if trained on pictures of this size, and nothing cropped.
      extra.time_ids = { data: [height, width, 0, 0, height, width], shape: [1, 6] };
    }
    return extra;
  }

  /** Sinusoids of the guidance scale, as latent consistency models were trained with. */
  #guidanceEmbedding(guidance: number): Float32NDArray {
    const width = this.bundle.component("unet").config.get("time_cond_proj_dim") as number;
    const half = width / 2;
    const data = new Float32Array(width);
    for (let i = 0; i < half; i++) {
      const angle = 1000 * (guidance - 1) * Math.exp(i * -(Math.log(10000) / (half - 1)));
      data[i] = Math.sin(angle);
      data[half + i] = Math.cos(angle);
    }
    return { data, shape: [1, width] };
  }

  /** Latents of a picture; draws once from `noise`. */
  async #encodeImage(image: Picture, noise: Noise, options: ReadOptions): Promise<Float32Array> {
    const sample = { data: toPlanes(image), shape: [1, 3, image.height, image.width] };
    const { latent_parameters } = await this.#run("vae_encoder", { sample }, options);
    const { data } = latent_parameters!;
    const count = data.length / 2;
    const draw = noise(count);
    const factor = Math.fround(this.#scalingFactor);
    return data.slice(0, count).map((mean, i) => {
      const logVariance = Math.min(Math.max(data[count + i]!, -30), 20);
      const std = Math.fround(Math.exp(0.5 * logVariance));
      return Math.fround(mean + Math.fround(std * draw[i]!)) * factor;
    });
  }

  // --- text -------------------------------------------------------------------------------------

  async #encodeBoth(prompt: string, run: Run): Promise<[Text, Text?]> {
    const { options, recipe } = run;
    const negative = options.negative ?? "";
    const [long, other] = [
      await this.tokens(prompt, options),
      await this.tokens(negative, options),
    ];
    const chunks = Math.max(chunksOf(long), this.#twoPasses(recipe.guidance) ? chunksOf(other) : 1);
    const text = await this.#encode(prompt, long, chunks, options);
    if (!this.#twoPasses(recipe.guidance)) return [text];
    if (recipe.zero_negative && !negative) return [text, zerosLike(text)];
    return [text, await this.#encode(negative, other, chunks, options)];
  }

  async #encode(
    prompt: string,
    all: Map<string, Tokens>,
    chunks: number,
    options: ReadOptions,
  ): Promise<Text> {
    const key = `${chunks} ${prompt}`;
    const known = this.#texts.get(key);
    if (known) return known;
    const parts: Float32NDArray[] = [];
    let pooled: Float32NDArray | undefined;
    for (const [encoder, tokens] of all) {
      const padded = (await this.#tokenizer(encoder, options)).padded(tokens, chunks);
      const outputs: Record<string, Float32NDArray>[] = [];
      for (const row of padded.ids) {
        const input_ids = { data: row, shape: [1, row.length] };
        outputs.push(await this.#run(encoder, { input_ids }, options));
      }
      const name = statesOf(Object.keys(outputs[0]!));
      const states = concatenated(outputs.map((output) => output[name]!));
      const normed = name === "last_hidden_state"; // what SDXL reads is not: its mean means nothing
      const weights = Float32Array.from(padded.weights.flat());
      parts.push({ ...states, data: weigh(states.data, weights, normed) });
      pooled = outputs[0]!.text_embeds;
    }
    const text = { states: sideBySide(parts), pooled };
    if (this.#texts.size >= CACHED_PROMPTS) this.#texts.delete(this.#texts.keys().next().value!);
    this.#texts.set(key, text);
    return text;
  }

  async #tokenizer(encoder: string, options: ReadOptions): Promise<Tokenizer> {
    const name = TEXT_ENCODERS[encoder as keyof typeof TEXT_ENCODERS];
    let tokenizer = this.#tokenizers.get(name);
    if (!tokenizer) {
      const spec = this.bundle.manifest.tokenizers.get(name);
      if (!spec) throw new OptionError(`${this.bundle.source.name} has no ${name}`);
      const path = `${spec.path}/tokenizer.json`;
      const text = new TextDecoder().decode(await this.bundle.read(path, options));
      tokenizer = new Tokenizer(text, spec.max_length, spec.pad_token, path);
      this.#tokenizers.set(name, tokenizer);
    }
    return tokenizer;
  }

  // --- components -------------------------------------------------------------------------------

  #run(
    component: string,
    inputs: Arrays,
    options: ReadOptions,
  ): Promise<Record<string, Float32NDArray>> {
    return this.#alone(async () => {
      if (options.signal) await waiting(); // an engine that blocks its thread hides messages
      options.signal?.throwIfAborted();
      const engine = this.#engines.get(component) ?? (await this.#load(component, options));
      const outputs = await this.#timed(component, "run", () => engine.run(inputs));
      options.signal?.throwIfAborted();
      return outputs;
    });
  }

  async #load(component: string, options: ReadOptions): Promise<Engine> {
    if (!this.options.resident) await this.#releaseAll(); // so that two are never in memory
    const { ort, session = {}, byPath = this.bundle.source.locate !== undefined } = this.options;
    const engine = await this.#timed(component, "load", () =>
      Engine.load(ort, this.bundle, component, session, byPath, options),
    );
    this.#engines.set(component, engine);
    return engine;
  }

  async #releaseAll(): Promise<void> {
    const engines = [...this.#engines.values()];
    this.#engines.clear();
    for (const engine of engines) {
      await this.#timed(engine.component, "free", () => engine.release());
    }
  }

  async #timed<T>(component: string, what: Watched["what"], job: () => Promise<T>): Promise<T> {
    const begin = performance.now();
    const result = await job();
    this.options.watch?.({ component, what, milliseconds: performance.now() - begin });
    return result;
  }

  /** Run a job when those before it are done. */
  #alone<T>(job: () => Promise<T>): Promise<T> {
    const result = this.#turn.then(job, job);
    this.#turn = result.catch(() => undefined);
    return result;
  }

  get #textEncoders(): string[] {
    return Object.keys(TEXT_ENCODERS).filter((name) => this.bundle.manifest.components.has(name));
  }

  get #unetInputs(): Map<string, { shape: (string | number)[] }> {
    return this.bundle.component("unet").inputs;
  }

  get #scalingFactor(): number {
    return this.#decoderConfig<number>("scaling_factor");
  }

  #decoderConfig<T>(key: string): T {
    return this.bundle.component("vae_decoder").config.get(key) as T; // checked with the manifest
  }

  /** Whether the U-Net takes text of any length. */
  get #readsChunks(): boolean {
    return typeof this.#unetInputs.get("encoder_hidden_states")?.shape[1] === "string";
  }

  /** Whether the U-Net takes the guidance scale as an input (distilled latent consistency). */
  get #embedsGuidance(): boolean {
    return this.#unetInputs.has("timestep_cond");
  }

  #twoPasses(guidance: number): boolean {
    return guidance !== 0 && guidance !== 1 && !this.#embedsGuidance;
  }
}

/** Lets whatever waits for this thread be heard, such as a message that cancels. */
function waiting(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve));
}

function chunksOf(tokens: Map<string, Tokens>): number {
  return Math.max(...[...tokens.values()].map(({ ids }) => ids.length));
}

/** (1, tokens, channels) of all chunks in a row. */
function concatenated(arrays: Float32NDArray[]): Float32NDArray {
  const [, tokens, channels] = arrays[0]!.shape as [number, number, number];
  const data = new Float32Array(arrays.length * tokens * channels);
  arrays.forEach((array, i) => data.set(array.data, i * tokens * channels));
  return { data, shape: [1, arrays.length * tokens, channels] };
}

/** States of all text encoders, joined along channels. */
function sideBySide(parts: Float32NDArray[]): Float32NDArray {
  if (parts.length === 1) return parts[0]!;
  const tokens = parts[0]!.shape[1]!;
  const widths = parts.map(({ shape }) => shape[2]!);
  const channels = widths.reduce((total, width) => total + width, 0);
  const data = new Float32Array(tokens * channels);
  let first = 0;
  parts.forEach((part, i) => {
    const width = widths[i]!;
    for (let t = 0; t < tokens; t++) {
      data.set(part.data.subarray(t * width, (t + 1) * width), t * channels + first);
    }
    first += width;
  });
  return { data, shape: [1, tokens, channels] };
}

function zerosLike({ states, pooled }: Text): Text {
  const zeros = (array: Float32NDArray): Float32NDArray => ({
    data: new Float32Array(array.data.length),
    shape: array.shape,
  });
  return { states: zeros(states), pooled: pooled && zeros(pooled) };
}
