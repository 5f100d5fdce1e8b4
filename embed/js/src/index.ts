export { Bundle, open, type ReadFile, type ReadOptions, type Source } from "./bundle.js";
export type { Ort } from "./engine.js";
export {
  BundleError,
  FerrotypeError,
  OptionError,
  PipelineError,
  RecipeRefusal,
} from "./errors.js";
export type { Component, Manifest, Recipe, Size } from "./manifest.js";
export type { Picture } from "./pictures.js";
export { encodePng } from "./png.js";
export {
  Pipeline,
  type PipelineOptions,
  type RunOptions,
  type Step,
  type Watched,
} from "./pipeline.js";
export type { Stage } from "./plan.js";
export { escape as escapePrompt, parse as parsePrompt } from "./prompts.js";
export { makeTable, parseTable, type Row, type Table } from "./samplers.js";
export { makeNoise, type Noise } from "./seeds.js";
export { fromFiles, fromUrl } from "./sources.js";
export { Tokenizer, type Tokens } from "./tokenizer.js";
