/** What no vector says: damaged bundles, cancelling, the order of stages, refusals. */
import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import {
  cpSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { createServer, type RequestListener } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import * as ort from "onnxruntime-node";
import { halves } from "../src/engine.js";
import { strictJson } from "../src/json.js";
import { parseManifest } from "../src/manifest.js";
import {
  BundleError,
  OptionError,
  Pipeline,
  fromFiles,
  fromUrl,
  Tokenizer,
  makeNoise,
  open,
  parseTable,
  type Watched,
} from "../src/index.js";
import { open as openFolder } from "../src/node.js";
import { toPicture } from "../src/pictures.js";
import { sample } from "../src/samplers.js";
import { fma } from "../src/seeds.js";
import { plainSha256, sha256 } from "../src/sha256.js";
import { withDevice } from "../src/webgpu.js";
import { root } from "./tools.js";

const EMOJI = root("models/emoji-onnx.ferro");
const scratch = mkdtempSync(join(tmpdir(), "ferrotype-"));
after(() => rmSync(scratch, { recursive: true }));

function copy(name: string): string {
  const folder = join(scratch, name);
  cpSync(EMOJI, folder, { recursive: true });
  return folder;
}

async function served<T>(listener: RequestListener, use: (url: string) => Promise<T>): Promise<T> {
  const server = createServer(listener).listen(0, "127.0.0.1");
  await new Promise((resolve) => server.once("listening", resolve));
  try {
    return await use(`http://127.0.0.1:${(server.address() as AddressInfo).port}/emoji.ferro`);
  } finally {
    server.closeAllConnections();
    server.close();
  }
}

const file = (url: string): Buffer =>
  readFileSync(join(EMOJI, url.replace("/emoji.ferro/", "").split("?")[0]!));

test("sha256, written out, is Web Crypto's", async () => {
  for (const length of [0, 1, 55, 56, 63, 64, 65, 119, 120, 1000, 4096 + 7]) {
    const data = new Uint8Array(randomBytes(length));
    const expected = createHash("sha256").update(data).digest("hex");
    assert.equal(Buffer.from(plainSha256(data)).toString("hex"), expected);
    assert.equal(await sha256(data), expected);
  }
});

test("float16 to the nearest, ties to even", () => {
  // value, bits: by IEEE 754's table of binary16
  const known: [number, number][] = [
    [0, 0],
    [-0, 0x8000],
    [1, 0x3c00],
    [-2, 0xc000],
    [65504, 0x7bff],
    [65519.99, 0x7bff],
    [65520, 0x7c00],
    [-Infinity, 0xfc00],
    [2 ** -14, 0x0400],
    [2 ** -24, 1],
    [2 ** -25, 0],
    [3 * 2 ** -25, 2],
    [1 + 2 ** -11, 0x3c00],
    [1 + 3 * 2 ** -11, 0x3c02],
    [0.1, 0x2e66],
    [NaN, 0x7e00],
    [2047.6, 0x6800],
  ];
  for (const [value, bits] of known) assert.equal(halves([value])[0], bits, String(value));
});

test("JSON that parsers read differently is refused", () => {
  assert.deepEqual(strictJson('{"a": [1, "a", {"a": -2.5e3}], "b\\"": null}'), {
    a: [1, "a", { a: -2500 }],
    'b"': null,
  });
  for (const [text, said] of [
    ['{"a": 1, "a": 2}', /twice/],
    ['{"a": 1, "\\u0061": 2}', /twice/],
    ['{"x": [{"b": 1, "c": "b", "b": 3}]}', /twice/],
    ['{"a": 1e999}', /finite/],
    ['{"a": 9223372036854775808}', /64 bits/],
    ["[".repeat(33) + "]".repeat(33), /deeper/],
    ['{"a": NaN}', /JSON/],
    ["{} x", /JSON/],
  ] as const)
    assert.throws(() => strictJson(text), said);
});

test("a bundle is read by URL, and what is wrong with it is said", async () => {
  const paths: string[] = [];
  await served(
    (request, response) => {
      paths.push(request.url!);
      response.end(file(request.url!));
    },
    async (url) => {
      const bundle = await open(fromUrl(url));
      assert.equal(
        bundle.sha256,
        createHash("sha256").update(file("/emoji.ferro/manifest.json")).digest("hex"),
      );
      let came = 0;
      const name = "text_encoder/model.onnx.data";
      const data = await bundle.read(name, { onBytes: (count) => (came += count) });
      assert.equal(came, data.length);
      assert.deepEqual(paths, ["/emoji.ferro/manifest.json", `/emoji.ferro/${name}`]);
      await assert.rejects(bundle.read("../secret"), /is not in its manifest/);
    },
  );
  const name = "unet/model.onnx";
  const faults: [string, (data: Buffer) => Buffer | number | null, RegExp][] = [
    [
      "cut off",
      (data) => data.subarray(0, 1000),
      /unet\/model.onnx ended after 1,000 of [\d,]+ bytes.*fetch it again/,
    ],
    [
      "too long",
      (data) => Buffer.concat([data, data]),
      /more than the [\d,]+ bytes that its manifest says/,
    ],
    [
      "another",
      (data) => Buffer.alloc(data.length),
      /sha256 of unet\/model.onnx is .*damaged or replaced/,
    ],
    ["missing", () => 404, /answers 404: the bundle is incomplete/],
    ["broken off", () => null, /ended after [\d,]+ of [\d,]+ bytes|cannot be fetched/],
  ];
  for (const [what, change, said] of faults) {
    await served(
      (request, response) => {
        const data = file(request.url!);
        const changed = request.url!.endsWith(name) ? change(data) : data;
        if (changed === null) {
          response.writeHead(200, { "content-length": data.length });
          response.write(data.subarray(0, 5000), () => response.destroy());
        } else if (typeof changed === "number") response.writeHead(changed).end();
        else response.end(changed);
      },
      async (url) => {
        const bundle = await open(fromUrl(url));
        await assert.rejects(bundle.read(name), (error: Error) => {
          assert.ok(error instanceof BundleError, `${what}: ${error.stack}`);
          assert.match(error.message, said);
          return true;
        });
      },
    );
  }
  await served(
    (_, response) => void response.writeHead(404).end(),
    (url) => assert.rejects(open(fromUrl(url)), /is no bundle: its manifest.json answers 404/),
  );
  await served(
    (_, response) => void response.end("<html>"),
    (url) => assert.rejects(open(fromUrl(url)), /is not a valid manifest/),
  );
});

test("a download is cancelled", async () => {
  await served(
    (request, response) => {
      const data = file(request.url!);
      if (request.url!.endsWith(".json")) response.end(data);
      else response.writeHead(200, { "content-length": data.length }).write(data.subarray(0, 100)); // and waits
    },
    async (url) => {
      const bundle = await open(fromUrl(url));
      const stop = new AbortController();
      const onBytes = () => stop.abort(new Error("enough"));
      const read = bundle.read("unet/model.onnx", { signal: stop.signal, onBytes });
      await assert.rejects(read, /enough/);
    },
  );
});

test("a folder on disk", async () => {
  const cut = copy("cut");
  truncateSync(join(cut, "unet/model.onnx.data"), 10);
  await assert.rejects((await openFolder(cut)).verify(), /unet\/model.onnx.data ended after 10 of/);
  const linked = copy("linked");
  rmSync(join(linked, "unet/model.onnx"));
  symlinkSync(join(EMOJI, "unet/model.onnx"), join(linked, "unet/model.onnx"));
  await assert.rejects((await openFolder(linked)).verify(), /is a link that leaves the bundle/);
  await assert.rejects(openFolder(scratch), /is not a bundle: its manifest.json is missing/);
  await assert.rejects(
    openFolder(root("models/emoji.ferro")),
    /is for native, this library runs onnx/,
  );
  const flipped = copy("flipped");
  const path = join(flipped, "text_encoder/model.onnx.data");
  const data = readFileSync(path);
  data[5000]! ^= 1;
  writeFileSync(path, data);
  const pipe = new Pipeline(await openFolder(flipped), { ort });
  await assert.rejects(pipe.generate("x"), /damaged or replaced/); // before onnxruntime opens it
});

test("chosen files", async () => {
  const { files } = parseManifest(readFileSync(join(EMOJI, "manifest.json"), "utf8"));
  const all = new Map<string, Blob>(
    ["manifest.json", ...files.keys()].map((name) => [
      `Downloads/emoji.ferro/${name}`,
      new Blob([readFileSync(join(EMOJI, name))]),
    ]),
  );
  const bundle = await open(fromFiles(all));
  await bundle.verify({ paths: ["text_encoder", "tokenizer"] });
  all.delete("Downloads/emoji.ferro/unet/model.onnx");
  const fewer = await open(fromFiles(all));
  await assert.rejects(fewer.read("unet/model.onnx"), /is missing: choose the whole folder/);
  await assert.rejects(
    open(fromFiles([new File(["x"], "x.png")])),
    /no manifest.json is among them/,
  );
});

test("stages are loaded and released in the plan's order, one at a time", async () => {
  const events: Watched[] = [];
  const bundle = await openFolder(EMOJI);
  const pipe = new Pipeline(bundle, { ort, watch: (event) => events.push(event) });
  const planned = pipe.plan({ steps: 2 });
  assert.deepEqual(
    planned.map(({ component, runs }) => [component, runs]),
    [
      ["text_encoder", 1],
      ["unet", 2],
      ["vae_decoder", 1],
    ],
  );
  await pipe.generate("a pizza", { steps: 2 });
  const expected = planned.flatMap(({ component, runs }) => [
    `${component} load`,
    ...Array(runs).fill(`${component} run`),
    `${component} free`,
  ]);
  assert.deepEqual(
    events.map(({ component, what }) => `${component} ${what}`),
    expected,
  );
  events.length = 0;
  await pipe.generate("a pizza", { steps: 1, seed: 5 }); // the prompt is known
  assert.ok(!events.some(({ component }) => component === "text_encoder"));
});

test("resident and staged draw the same; seeds do not", async () => {
  const bundle = await openFolder(EMOJI);
  const staged = new Pipeline(bundle, { ort });
  const resident = new Pipeline(bundle, { ort, resident: true });
  const one = await staged.generate("a fox", { seed: 8, steps: 1 });
  assert.deepEqual(await resident.generate("a fox", { seed: 8, steps: 1 }), one);
  assert.deepEqual(await resident.generate("a fox", { seed: 8, steps: 1 }), one);
  assert.notDeepEqual(await staged.generate("a fox", { seed: 9, steps: 1 }), one);
  await resident.release();
});

test("cancelled between steps", async () => {
  const pipe = new Pipeline(await openFolder(EMOJI), { ort });
  const stop = new AbortController();
  const seen: number[] = [];
  await assert.rejects(
    (async () => {
      for await (const step of pipe.steps("a fox", { signal: stop.signal })) {
        seen.push(step.index);
        assert.equal(pipe.preview(step).data.length, 4 * step.width * step.height);
        setTimeout(() => stop.abort(new Error("stop")));
      }
    })(),
    /stop/,
  );
  assert.deepEqual(seen, [1]);
  await pipe.generate("a fox", { steps: 1 }); // and it draws again
});

test("from an image", async () => {
  const pipe = new Pipeline(await openFolder(EMOJI), { ort });
  const image = await pipe.generate("a pizza", { seed: 1 });
  const near = await pipe.generate("a pizza", { image, strength: 0.3, steps: 2 });
  const differ =
    near.data.reduce((sum, value, i) => sum + Math.abs(value - image.data[i]!), 0) /
    near.data.length;
  assert.ok(differ > 0 && differ < 12, String(differ));
  assert.throws(
    () => pipe.steps("x", { image, size: [64, 64] }),
    /the image is 128x128: scale it to 64x64/,
  );
});

test("refusals come before anything is loaded", async () => {
  const pipe = new Pipeline(await openFolder(EMOJI), { ort });
  for (const [options, said] of [
    [{ size: [100, 128] }, /100 is no multiple of 8, try 104/],
    [{ steps: 0 }, /steps must be a whole number/],
    [{ seed: -1 }, /outside 0 to 18446744073709551615/],
    [{ seed: 1.5 }, /a seed is a whole number/],
    [{ sampler: "heun" }, /unknown sampler "heun": choose from ddim/],
    [{ guidance: 51 }, /must be from 0 to 50/],
    [{ negative: "x" }, /no effect at guidance 1/],
    [{ rng: "dice" }, /unknown rng/],
    [{ steps: 51 }, /51 steps need/],
  ] as const)
    assert.throws(
      () => pipe.steps("x", options as object),
      (e: Error) => e instanceof OptionError && said.test(e.message),
    );
  assert.throws(() => pipe.steps("(a:101)"), /weight 101 of 'a'/);
  const small = new Pipeline(pipe.bundle, { ort, memory: 20 << 20 });
  assert.throws(
    () => small.steps("x"),
    /unet needs about [\d,]+ MiB at 128x128, the limit is 20 MiB: allow/,
  );
  assert.throws(() => makeNoise("numpy", 2n ** 32n), /outside/);
  assert.throws(
    () => parseTable('{"format": "ferrotype-sampler", "version": 2}'),
    /not a sampler table: it is/,
  );
});

test("a few-step model's recipe is kept to, unless forced", async () => {
  const bundle = await openFolder(EMOJI);
  const recipe = {
    ...bundle.manifest.recipe,
    name: "lcm-lora",
    allowed_steps: [1, 2, 4],
    guidance_range: [1, 2] as [number, number],
  };
  const strict = Object.assign(Object.create(Object.getPrototypeOf(bundle)), bundle, {
    manifest: { ...bundle.manifest, recipe },
  });
  const pipe = new Pipeline(strict, { ort });
  assert.throws(
    () => pipe.recipe({ steps: 20, guidance: 7 }),
    /steps 20, guidance 7: this model was distilled for 1, 2, 4 steps of lcm, guidance 1 to 2 \(lcm-lora\): use steps 4, guidance 2, or force/,
  );
  assert.equal(pipe.recipe({ steps: 20, guidance: 7, force: true }).steps, 20);
});

test("a stored table is run as the recipe's own", async () => {
  const pipe = new Pipeline(await openFolder(EMOJI), { ort });
  const { tables } = JSON.parse(readFileSync(root("tests/conformance/tables.json"), "utf8"));
  const stored = tables.find(({ table, strength }: any) => table?.sampler === "ddim" && !strength);
  const table = parseTable(JSON.stringify(stored.table));
  const drawn = await pipe.generate("a fox", { table });
  assert.equal(drawn.data.length, 4 * 128 * 128);
});

test("a fused multiply-add rounds once", () => {
  const [small, one] = [2 ** -12, 1 + 2 ** -23];
  // 1 + 2^-23 + 2^-24, less 2^-70: below the middle of two floats, where doubles see the middle.
  assert.equal(fma(small * one, small * (1 - 2 ** -23), one), one);
  assert.equal(fma(small, small, one), 1 + 2 ** -22); // the middle: to even
  assert.equal(fma(-small * one, small * (1 - 2 ** -23), -one), -one);
});

test("a product with a zero coefficient does not exist", async () => {
  const zeros = { timestep: 0, scale: 1, a: 0, b: 1, cx: 0, c0: 1, c1: 0, c2: 0, cn: 0 };
  const table = { sampler: "", startImage: 0, startNoise: 1, rows: [zeros, { ...zeros, b: 2 }] };
  const model = (x: Float32Array) => Promise.resolve(x.map(() => 3));
  const noise = () => assert.fail("no noise is drawn");
  const found: number[] = [];
  for await (const step of sample(model, Float32Array.of(Infinity, NaN), table, noise)) {
    found.push(...step.latents);
  }
  assert.deepEqual(found, [3, 3, 6, 6]);
});

test("of merges of one rank the leftmost is first", () => {
  const raw = JSON.parse(readFileSync(join(EMOJI, "tokenizer/tokenizer.json"), "utf8"));
  const { vocab } = raw.model;
  vocab.aa = 5000;
  raw.model.merges = [["a", "a"]];
  const tokenizer = new Tokenizer(JSON.stringify(raw), 32, "<|endoftext|>");
  assert.deepEqual(tokenizer.encode("aaab"), [5000, vocab.a, vocab["b</w>"]]);
  assert.deepEqual(tokenizer.encode("aaaaa"), [5000, 5000, vocab["a</w>"]]);
  assert.throws(() => tokenizer.encode("a".repeat(70_000)), /the most is 65536/);
  raw.pre_tokenizer.pretokenizers[0].pattern.Regex = "(a+)+$";
  assert.throws(() => new Tokenizer(JSON.stringify(raw), 32, "<|endoftext|>"), /it splits by/);
});

test("pixels are rounded half to even and cut off", () => {
  const planes = Float32Array.of(-1, 1, 0, -0.99, 3, -3, 1 / 255, 0.2, 5 / 255);
  const rgb = [...toPicture(planes, 3, 1).data].filter((_, i) => i % 4 !== 3);
  // 127.5 + 127.5 * value: 0, 255, 127.5 | 1.275, over, under | 128, 153, 130
  assert.deepEqual(rgb, [0, 1, 128, 255, 255, 153, 128, 0, 130]);
});

/** A `navigator.gpu` with one adapter, and the devices that were asked of it. */
function fakeGpu(features: string[], subgroupMinSize?: number, adapter = true) {
  const asked: GPUDeviceDescriptor[] = [];
  let lose!: () => void;
  const gpu = {
    requestAdapter: async () =>
      adapter
        ? {
            features: new Set(features),
            info: { subgroupMinSize },
            limits: { maxBufferSize: 2 ** 31 },
            requestDevice: async (descriptor: GPUDeviceDescriptor) => {
              asked.push(descriptor);
              return { lost: new Promise<void>((resolve) => (lose = resolve)) };
            },
          }
        : null,
  };
  return { gpu: gpu as unknown as GPU, asked, lose: () => lose() };
}

const asksForWebGpu = { executionProviders: ["webgpu", "wasm"] };

test("WebGPU with narrow subgroups gets one device without them for all sessions", async () => {
  const fake = fakeGpu(["subgroups", "shader-f16", "timestamp-query"], 4);
  const first = await withDevice(asksForWebGpu, fake.gpu);
  const other = await withDevice({ executionProviders: [{ name: "webgpu" }] }, fake.gpu);
  assert.equal(fake.asked.length, 1);
  assert.deepEqual(fake.asked[0]!.requiredFeatures, ["shader-f16"]);
  assert.equal(fake.asked[0]!.requiredLimits!["maxBufferSize"], 2 ** 31);
  const [provider, wasm] = first.executionProviders! as [{ name: string; device: object }, string];
  assert.equal(provider.name, "webgpu");
  assert.equal(wasm, "wasm");
  assert.equal((other.executionProviders![0] as typeof provider).device, provider.device);

  fake.lose();
  await new Promise((resolve) => setTimeout(resolve));
  const again = await withDevice(asksForWebGpu, fake.gpu);
  assert.notEqual((again.executionProviders![0] as typeof provider).device, provider.device);
  assert.equal(fake.asked.length, 2);
});

test("a width of subgroups that is not said counts as narrow", async () => {
  const fake = fakeGpu(["subgroups"]);
  await withDevice(asksForWebGpu, fake.gpu);
  assert.deepEqual(fake.asked[0]!.requiredFeatures, []);
});

test("onnxruntime chooses the device where its attention is right, or the app has chosen", async () => {
  const narrow = fakeGpu(["subgroups"], 4);
  const own = { executionProviders: [{ name: "webgpu", device: {} as GPUDevice }] };
  for (const [options, fake] of [
    [asksForWebGpu, fakeGpu(["subgroups"], 8)],
    [asksForWebGpu, fakeGpu(["shader-f16"])],
    [asksForWebGpu, fakeGpu([], undefined, false)],
    [own, narrow],
    [{ executionProviders: ["wasm"] }, narrow],
    [{}, narrow],
  ] as const) {
    assert.deepEqual(await withDevice(options, fake.gpu), options);
    assert.equal(fake.asked.length, 0);
  }
  assert.equal(await withDevice(asksForWebGpu, undefined), asksForWebGpu);
});
