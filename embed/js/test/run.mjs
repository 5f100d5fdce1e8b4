/** Compile the tests with esbuild, then run them: `npm test`, or `node test/run.mjs --only-build`. */
import { spawnSync } from "node:child_process";
import { readdirSync, rmSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = fileURLToPath(new URL(".", import.meta.url));
const out = fileURLToPath(new URL("../build/test/", import.meta.url));
rmSync(out, { recursive: true, force: true });
await build({
  entryPoints: readdirSync(here)
    .filter((name) => name.endsWith(".ts"))
    .map((name) => here + name),
  outdir: out,
  outExtension: { ".js": ".mjs" },
  bundle: true,
  platform: "node",
  format: "esm",
  packages: "external",
  target: "node20",
  sourcemap: "inline",
  logLevel: "warning",
});
if (!process.argv.includes("--only-build")) {
  const tests = readdirSync(out).filter((name) => name.endsWith(".test.mjs"));
  const done = spawnSync(
    process.execPath,
    ["--enable-source-maps", "--test", ...tests.map((name) => out + name)],
    { stdio: "inherit" },
  );
  process.exit(done.status ?? 1);
}
