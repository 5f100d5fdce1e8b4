/** Draw in Node: node examples/draw.mjs BUNDLE PROMPT [SEED] [OUT.png] */
import { writeFileSync } from "node:fs";
import * as ort from "onnxruntime-node";
import { Pipeline, encodePng } from "ferrotype";
import { open } from "ferrotype/node";

const [folder, prompt, seed = "0", out = "out.png"] = process.argv.slice(2);
if (prompt === undefined) {
  console.error("usage: node draw.mjs BUNDLE PROMPT [SEED] [OUT.png]");
  process.exit(2);
}
try {
  const bundle = await open(folder);
  const pipe = new Pipeline(bundle, { ort, note: (text) => console.error(`note: ${text}`) });
  let last;
  for await (const step of pipe.steps(prompt, { seed: BigInt(seed) })) {
    last = step;
    console.error(`step ${step.index} of ${step.total}`);
  }
  const picture = await pipe.decode(last);
  await pipe.release();
  const settings = { prompt, seed, rng: "torch", steps: String(last.total) };
  const about = { bundle: bundle.manifest.model, bundle_sha256: bundle.sha256 };
  writeFileSync(out, await encodePng(picture, { ...settings, ...about }));
  console.log(out);
} catch (error) {
  console.error(`Error: ${error.message}`);
  process.exit(1);
}
