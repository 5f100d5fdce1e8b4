/** Times of the stages of pictures as JSON: node examples/time.mjs BUNDLE node|wasm THREADS COUNT */
import { Pipeline } from "ferrotype";
import { open } from "ferrotype/node";

const [folder, engine, threads, count] = process.argv.slice(2);
const ort = await import(engine === "node" ? "onnxruntime-node" : "onnxruntime-web/wasm");
if (engine === "wasm") ort.env.wasm.numThreads = Number(threads); // more than 1: browsers only
const session = engine === "node" ? { intraOpNumThreads: Number(threads) } : {};
const bundle = await open(folder);
const pictures = [];
for (let seed = 0; seed < Number(count); seed++) {
  const times = {};
  const watch = ({ component, milliseconds }) => {
    times[component] = (times[component] ?? 0) + milliseconds / 1000;
  };
  // A new pipeline: it knows no prompts, so that every stage is loaded and run.
  const pipe = new Pipeline(bundle, { ort, session, byPath: engine === "node", watch });
  await pipe.generate("a red apple on a sky blue background", { seed });
  pictures.push(times);
}
console.log(JSON.stringify({ pictures, rss: process.memoryUsage.rss() }));
process.exit(0); // threads of wasm would keep it
