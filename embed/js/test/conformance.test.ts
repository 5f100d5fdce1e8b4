/** The vectors of tests/conformance, as README.md there says. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import * as native from "onnxruntime-node";
import * as wasm from "onnxruntime-web/wasm";
import {
  Pipeline,
  makeNoise,
  makeTable,
  OptionError,
  parseTable,
  Tokenizer,
  type Ort,
} from "../src/index.js";
import { open } from "../src/node.js";
import { psnr, root } from "./tools.js";

const folder = root("tests/conformance/");
const json = (name: string): any => JSON.parse(readFileSync(folder + name, "utf8"));

function floats(name: string): Float32Array {
  const data = readFileSync(folder + name);
  return new Float32Array(data.buffer.slice(data.byteOffset, data.byteOffset + (data.length & ~3)));
}

test("token ids and weights", () => {
  const text = readFileSync(root("models/emoji-onnx.ferro/tokenizer/tokenizer.json"), "utf8");
  const tokenizer = new Tokenizer(text, 32, "<|endoftext|>");
  const { chunks, tokens } = json("tokens.json");
  for (const { prompt, ids, weights } of tokens) {
    const found = tokenizer.chunks(prompt, chunks);
    assert.deepEqual(found.ids, ids, prompt);
    assert.deepEqual(
      found.weights.flat().map(Math.fround),
      weights.flat().map(Math.fround),
      prompt,
    );
  }
});

test("noise, bit for bit", () => {
  const { file, seeds } = json("seeds.json");
  const values = floats(file);
  const known = seeds.filter(({ rng }: any) => rng !== "pcg64"); // which a host may leave out
  assert.equal(known.length, 9);
  for (const { rng, seed, draws, offset } of known) {
    const noise = makeNoise(rng, BigInt(seed));
    let at = offset;
    for (const count of draws) {
      const found = noise(count);
      for (let i = 0; i < count; i++)
        assert.ok(Object.is(found[i], values[at + i]), `${rng} ${seed}`);
      at += count;
    }
  }
});

test("sampler tables, bit for bit", () => {
  let made = 0;
  for (const { recipe, strength, table } of json("tables.json").tables) {
    const make = () => makeTable(recipe, strength ?? undefined);
    if (table === null) assert.throws(make, OptionError);
    else assert.deepEqual(make(), parseTable(JSON.stringify(table)), JSON.stringify(recipe));
    made += 1;
  }
  assert.ok(made > 100);
});

const engines: [string, Ort, boolean][] = [
  ["node", native, true],
  ["wasm", wasm, false],
];

for (const [name, ort, byPath] of engines) {
  test(`latents after each step and the picture, onnxruntime of ${name}`, async () => {
    wasm.env.wasm.numThreads = 1;
    const { floors, pictures } = json("pictures.json");
    const floor = floors["emoji-onnx.ferro"];
    const bundle = await open(root("models/emoji-onnx.ferro"));
    const cases = pictures.filter((picture: any) => picture.bundle === "emoji-onnx.ferro");
    assert.equal(cases.length, 2);
    for (const { prompt, seed, size, identity, file, latents, ...asked } of cases) {
      assert.equal(bundle.sha256, identity);
      const pipe = new Pipeline(bundle, { ort, byPath });
      const { negative, steps, sampler, guidance } = asked;
      const options = { negative, steps, sampler, guidance, seed: BigInt(seed), size };
      const values = floats(file);
      const count = latents[1] * latents[2] * latents[3];
      let last;
      for await (const step of pipe.steps(prompt, options)) {
        const expected = values.subarray((step.index - 1) * count, step.index * count);
        const close = psnr(expected, step.latents);
        assert.ok(close > floor, `${file}, step ${step.index}: ${close} dB`);
        last = step;
      }
      assert.equal(last!.index, latents[0]);
      const pixels = new Uint8Array(readFileSync(folder + file)).subarray(4 * latents[0] * count);
      const { data } = await pipe.decode(last!);
      const rgb = data.filter((_, i) => i % 4 !== 3);
      assert.equal(rgb.length, pixels.length);
      const close = psnr(pixels, rgb, 255);
      assert.ok(close > floor, `${file}: ${close} dB`);
      await pipe.release();
    }
  });
}
