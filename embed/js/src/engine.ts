/** One loaded component on onnxruntime: arrays by name in, float32 arrays out. */
import type { InferenceSession, Tensor, TensorConstructor } from "onnxruntime-common";
import type { Bundle, ReadOptions } from "./bundle.js";
import { BundleError, OptionError, PipelineError, printable } from "./errors.js";
import type { Component, TensorSpec } from "./manifest.js";
import { withDevice } from "./webgpu.js";

/** onnxruntime-web, onnxruntime-node or onnxruntime-react-native: the module, imported by the app. */
export interface Ort {
  InferenceSession: {
    create(path: string, options?: InferenceSession.SessionOptions): Promise<InferenceSession>;
    create(model: Uint8Array, options?: InferenceSession.SessionOptions): Promise<InferenceSession>;
  };
  Tensor: TensorConstructor;
}

/** float32 values, or whole numbers, and their shape. */
export interface NDArray {
  data: Float32Array | number[];
  shape: readonly number[];
}

export interface Float32NDArray extends NDArray {
  data: Float32Array;
}

export type Arrays = Record<string, NDArray>;

const MODEL = "model.onnx";
const SESSION: InferenceSession.SessionOptions = {
  graphOptimizationLevel: "extended",
  enableCpuMemArena: false, // what a stage used goes back when the stage is done
  logSeverityLevel: 3,
  // A second copy of the weights, which gained no speed: benchmarks/results/graphs.md.
  extra: { session: { disable_prepacking: "1" } },
};

export class Engine {
  private constructor(
    readonly component: string,
    private readonly ort: Ort,
    private readonly spec: Component,
    private readonly session: InferenceSession,
  ) {}

  /** Read, verify and load a component; throws BundleError where onnxruntime refuses it. */
  static async load(
    ort: Ort,
    bundle: Bundle,
    component: string,
    options: InferenceSession.SessionOptions,
    byPath: boolean,
    read: ReadOptions,
  ): Promise<Engine> {
    const spec = bundle.component(component);
    const model = `${spec.path}/${MODEL}`;
    try {
      const all = { ...SESSION, ...(await withDevice(options)) };
      let session: InferenceSession;
      if (byPath) {
        if (!bundle.source.locate) throw new OptionError(`${bundle.source.name} has no paths`);
        await bundle.verify({ ...read, paths: [spec.path] });
        session = await ort.InferenceSession.create(bundle.source.locate(model), all);
      } else {
        const graph = await bundle.read(model, read);
        const beside = bundle.files(spec.path).filter((file) => file.endsWith(".data"));
        const externalData: { path: string; data: Uint8Array }[] = [];
        for (const file of beside) {
          const path = file.slice(spec.path.length + 1);
          externalData.push({ path, data: await bundle.read(file, read) });
        }
        session = await ort.InferenceSession.create(graph, { ...all, externalData });
      }
      const engine = new Engine(component, ort, spec, session);
      engine.#sameNames("takes", session.inputNames, spec.inputs);
      engine.#sameNames("returns", session.outputNames, spec.outputs);
      return engine;
    } catch (error) {
      read.signal?.throwIfAborted();
      if (error instanceof BundleError || error instanceof OptionError) throw error;
      throw new BundleError(`onnxruntime cannot load ${model}: ${printable(String(error))}`);
    }
  }

  async run(inputs: Arrays): Promise<Record<string, Float32NDArray>> {
    const sizes = new Map<string, number>();
    const feeds: Record<string, Tensor> = {};
    for (const [name, spec] of this.spec.inputs) {
      const array = inputs[name];
      if (!array) throw new BundleError(`${this.component} takes ${name}, which no host knows`);
      checkShape(this.component, name, spec, array.shape, sizes);
      feeds[name] = tensor(this.ort, name, spec.dtype, array);
    }
    let outputs: InferenceSession.ReturnType;
    try {
      outputs = await this.session.run(feeds);
    } catch (error) {
      throw new PipelineError(
        `onnxruntime cannot run ${this.component}: ${printable(String(error))}`,
      );
    } finally {
      for (const feed of Object.values(feeds)) feed.dispose();
    }
    const found: Record<string, Float32NDArray> = {};
    for (const [name, spec] of this.spec.outputs) {
      const output = outputs[name]! as Tensor;
      checkShape(this.component, name, spec, output.dims, sizes);
      found[name] = { data: floats(output), shape: output.dims };
      output.dispose();
    }
    return found;
  }

  async release(): Promise<void> {
    await this.session.release();
  }

  #sameNames(verb: string, found: readonly string[], manifest: Map<string, unknown>): void {
    if (found.length === manifest.size && found.every((name) => manifest.has(name))) return;
    const names = printable(found.join(", "));
    const wanted = [...manifest.keys()].join(", ");
    throw new BundleError(`${this.component} ${verb} ${names}; the manifest says ${wanted}`);
  }
}

/** Dimensions of one name are of one size, kept in `sizes`. */
function checkShape(
  component: string,
  name: string,
  { shape }: TensorSpec,
  found: readonly number[],
  sizes: Map<string, number>,
): void {
  const wanted = shape.map((dimension, i) => {
    if (typeof dimension === "number") return dimension;
    if (!sizes.has(dimension)) sizes.set(dimension, found[i]!);
    return sizes.get(dimension)!;
  });
  if (wanted.length === found.length && wanted.every((size, i) => size === found[i])) return;
  throw new BundleError(
    `${component}: ${name} has the shape (${found.join(", ")}), the manifest says (${shape.join(", ")})`,
  );
}

/** The input in a graph's type; a fraction is not cut off, for the picture would be another. */
function tensor(ort: Ort, name: string, dtype: string, { data, shape }: NDArray): Tensor {
  if (dtype === "float32") return new ort.Tensor("float32", Float32Array.from(data), shape);
  if (dtype === "float16") return new ort.Tensor("float16", halves(data), shape);
  const values = Array.from(data);
  const fraction = values.find((value) => !Number.isInteger(value));
  if (fraction !== undefined) {
    throw new OptionError(
      `${name} is ${fraction}, and it takes whole numbers alone; choose another sampler or spacing`,
    );
  }
  if (dtype === "int32") return new ort.Tensor("int32", Int32Array.from(values), shape);
  if (dtype === "int64") return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
  throw new BundleError(
    `${name} is ${printable(dtype, 40)}; only float32, float16, int32 and int64 are fed`,
  );
}

function floats(output: Tensor): Float32Array {
  const { data } = output;
  if (data instanceof Float32Array) return data;
  if (data instanceof Uint16Array && output.type === "float16") return unhalved(data);
  return Float32Array.from(data as ArrayLike<number>); // Float16Array, where there is one
}

const word = new Float32Array(1);
const bits = new Uint32Array(word.buffer);

/** float32 to the bits of float16, to the nearest, ties to even. */
export function halves(values: ArrayLike<number>): Uint16Array {
  return Uint16Array.from(values, (value) => {
    word[0] = value;
    const sign = (bits[0]! >>> 16) & 0x8000;
    const size = Math.abs(word[0]!);
    if (!(size < 65520)) return sign | (Number.isNaN(size) ? 0x7e00 : 0x7c00);
    const exponent = Math.max(Math.floor(Math.log2(size || 2 ** -24)), -14);
    // 2^10 steps between one power of two and the next; adding 1.5 * 2^52 rounds to a whole one.
    const steps = size * 2 ** (10 - exponent) + 1.5 * 2 ** 52 - 1.5 * 2 ** 52;
    return sign | (steps + (exponent + 14) * 1024);
  });
}

function unhalved(values: Uint16Array): Float32Array {
  return Float32Array.from(values, (value) => {
    const exponent = (value >> 10) & 31;
    const fraction = value & 1023;
    const sign = value & 0x8000 ? -1 : 1;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return exponent ? sign * (1024 + fraction) * 2 ** (exponent - 25) : sign * fraction * 2 ** -24;
  });
}
