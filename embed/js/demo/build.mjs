/** Build the page into demo/page: `npm run demo`. Its files are committed, so that pip needs no npm. */
import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

const here = fileURLToPath(new URL(".", import.meta.url));
const out = process.argv[2] ? `${process.argv[2]}/` : `${here}page/`;
const runtime = fileURLToPath(new URL("../node_modules/onnxruntime-web/dist/", import.meta.url));
const WASM = "ort-wasm-simd-threaded.wasm";
const GLUE = "ort-wasm-simd-threaded.mjs";

rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });
for (const name of ["index.html", "NOTICE.md"]) copyFileSync(here + name, out + name);
copyFileSync(runtime + GLUE, out + GLUE);
writeFileSync(`${out}${WASM}.gz`, gzipSync(readFileSync(runtime + WASM), { level: 9 }));

const options = {
  bundle: true,
  format: "esm",
  target: "es2022",
  minify: true,
  legalComments: "none",
  outdir: out,
  logLevel: "warning",
};
await build({
  ...options,
  entryPoints: [`${here}page.ts`, `${here}worker.ts`],
  conditions: ["onnxruntime-web-use-extern-wasm"], // the glue is a file beside the page
});
const shell = ["index.html", "page.js", "worker.js", GLUE];
const hash = createHash("sha256");
for (const name of shell) hash.update(readFileSync(out + name));
hash.update(readFileSync(runtime + WASM));
await build({
  ...options,
  entryPoints: [`${here}sw.ts`],
  format: "iife",
  define: {
    FILES: JSON.stringify(["./", ...shell.slice(1), WASM]),
    VERSION: JSON.stringify(hash.digest("hex").slice(0, 16)),
  },
});
