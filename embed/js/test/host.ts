/**
 * Answers a file of questions, so that tests in Python can compare: node host.mjs ASKED ANSWERED.
 *
 * { "tokens": [{"tokenizer", "length", "pad", "most", "prompts"}], "parsed": [prompt],
 *   "noise": [{"rng", "seed", "counts"}], "tables": [[recipe, strength]], "manifests": [text] }
 */
import { readFileSync, writeFileSync } from "node:fs";
import { parseManifest } from "../src/manifest.js";
import { parse } from "../src/prompts.js";
import { COLUMNS, makeTable } from "../src/samplers.js";
import { makeNoise } from "../src/seeds.js";
import { Tokenizer } from "../src/tokenizer.js";

const [, , asked, answered] = process.argv as [string, string, string, string];
const {
  tokens = [],
  parsed = [],
  noise = [],
  tables = [],
  manifests = [],
} = JSON.parse(readFileSync(asked, "utf8"));

/** What a call returns, or what it says is wrong. */
function or<T>(call: () => T): T | string {
  try {
    return call();
  } catch (error) {
    return `${(error as Error).name}: ${(error as Error).message}`;
  }
}

const bits = (values: ArrayLike<number>): string =>
  Buffer.from(Float32Array.from(values).buffer).toString("hex");

writeFileSync(
  answered,
  JSON.stringify({
    tokens: tokens.map(({ tokenizer, length, pad, most, prompts }: any) => {
      const encoder = new Tokenizer(readFileSync(tokenizer, "utf8"), length, pad);
      return prompts.map((prompt: string) => or(() => encoder.chunks(prompt, most)));
    }),
    parsed: parsed.map((prompt: string) => or(() => parse(prompt))),
    noise: noise.map(({ rng, seed, counts }: any) =>
      or(() => {
        const draw = makeNoise(rng, BigInt(seed));
        return counts.map((count: number) => bits(draw(count)));
      }),
    ),
    tables: tables.map(([recipe, strength]: any) =>
      or(() => {
        const table = makeTable(recipe, strength ?? undefined);
        const rows = table.rows.flatMap((row) => COLUMNS.map((name) => row[name]));
        return bits([table.startImage, table.startNoise, ...rows]);
      }),
    ),
    manifests: manifests.map((text: string) => or(() => parseManifest(text) && "")),
  }),
);
