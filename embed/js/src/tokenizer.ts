/**
 * Prompt to token ids: CLIP's byte-pair encoding from a bundle's tokenizer.json, with the results of
 * the `tokenizers` library that the Python runtime uses (runtime/tokenizer.py).
 */
import { BundleError, OptionError, printable } from "./errors.js";
import * as prompts from "./prompts.js";
import type { Span } from "./prompts.js";
import { LETTERS, NUMBERS } from "./unicode.js";

/** A prompt in chunks of what the text encoder reads: start, tokens, end, padding. */
export interface Tokens {
  /** Each of maxLength ids. */
  ids: number[][];
  /** The end of the prompt that did not fit; empty if all of it did. */
  dropped: string;
  /** Per chunk and token, 1 where nobody said another. */
  weights: number[][];
}

interface Added {
  id: number;
  content: string;
  normalized: boolean;
}

const WHITE = "\\t-\\r\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const SPACES = new RegExp(`[${WHITE}]+`, "gu");
const SUFFIX = "</w>"; // of a token that ends a word
const CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d";
// Not \p{L} and \p{N}: every browser has another version of Unicode.
const L = classOf(LETTERS);
const N = classOf(NUMBERS);
const WORDS = `${CONTRACTIONS}|[${L}]+|[${N}]|[^${WHITE}${L}${N}]+`;
const ENDS = "<\\|startoftext\\|>|<\\|endoftext\\|>|";
// What transformers 4 and 5 write, by its own text; other expressions are not run: they are others'.
const SPLITS = new Map(
  ["", ENDS].map((ends) => {
    const written = `${ends}${CONTRACTIONS}|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+`;
    return [written, new RegExp(ends + WORDS, "gu")];
  }),
);
// GPT-2's own splitting, which the byte-level step does once more.
const PARTS = new RegExp(`${CONTRACTIONS}|[${L}]+|[${N}]+|[^${WHITE}${L}${N}]+`, "gu");
const MAX_WORDS = 10_000; // whose tokens are remembered
const MAX_TEXT = 1 << 16; // characters of a prompt

export class Tokenizer {
  readonly #vocab: Map<string, number>;
  readonly #merges = new Map<string, { rank: number; joined: string }>();
  readonly #added: Added[];
  readonly #split: RegExp;
  readonly #unknown: string | undefined;
  readonly #spelled: Map<string, string>;
  readonly #known = new Map<string, number[]>();
  readonly #start: number;
  readonly #end: number;
  readonly #pad: number;
  readonly #length: number;

  /** Throws BundleError where `text` is no tokenizer.json of CLIP's kind. */
  constructor(text: string, maxLength: number, padToken: string, where = "tokenizer.json") {
    try {
      const raw = JSON.parse(text);
      const model = raw.model;
      this.#split = checkKind(raw);
      this.#vocab = new Map(Object.entries(model.vocab as Record<string, number>));
      for (const id of this.#vocab.values()) whole(id);
      for (const [rank, merge] of (model.merges as (string | string[])[]).entries()) {
        const [left, right, more] = typeof merge === "string" ? merge.split(" ") : merge;
        const joined = `${left}${right}`;
        if (!left || !right || more !== undefined || !this.#vocab.has(joined)) {
          throw new Error(`merge ${rank} is ${JSON.stringify(merge)}`);
        }
        this.#merges.set(`${left} ${right}`, { rank, joined });
      }
      this.#unknown = this.#vocab.has(model.unk_token) ? model.unk_token : undefined;
      this.#added = (raw.added_tokens ?? []).map(readAdded);
      this.#spelled = spelled(this.#added.map(({ content }) => content));
      [this.#start, this.#end] = frame(raw.post_processor);
      const pad = this.#added.find(({ content }) => content === padToken)?.id;
      this.#pad = whole(pad ?? this.#vocab.get(padToken), `the padding token ${padToken}`);
    } catch (error) {
      throw new BundleError(
        `${where} is no tokenizer of CLIP's kind: ${printable((error as Error).message)}`,
      );
    }
    this.#length = maxLength;
  }

  /** A prompt, with its weights, in at most `most` chunks; OptionError for a weight out of range. */
  chunks(prompt: string, most: number): Tokens {
    const room = this.#length - 2;
    const rows: [number, number][][] = [];
    let dropped = "";
    const sections = prompts.parse(this.#spellOut(wellFormed(prompt)));
    for (const [i, spans] of sections.entries()) {
      const tokens = spans.flatMap(({ text, weight }) =>
        this.encode(text).map((id): [number, number] => [id, weight]),
      );
      const pieces: [number, number][][] = [];
      for (let at = 0; at < tokens.length; at += room) pieces.push(tokens.slice(at, at + room));
      if (!pieces.length && (i < sections.length - 1 || !rows.length)) pieces.push([]); // as before a BREAK
      const left = Math.max(0, most - rows.length);
      if (pieces.length > left) dropped += this.#rest(spans, left * room);
      rows.push(...pieces.slice(0, left));
    }
    return {
      ids: rows.map((row) => this.#framed(row.map(([id]) => id))),
      weights: rows.map((row) => this.#weights(row.map(([, weight]) => weight))),
      dropped: dropped.trim(),
    };
  }

  /** So many chunks, at least those there are: empty ones are added. */
  padded(tokens: Tokens, chunks: number): Tokens {
    const more = Array.from({ length: chunks - tokens.ids.length });
    return {
      ...tokens,
      ids: [...tokens.ids, ...more.map(() => this.#framed([]))],
      weights: [...tokens.weights, ...more.map(() => this.#weights([]))],
    };
  }

  /** The ids of a text, without start and end. */
  encode(text: string): number[] {
    if (text.length > MAX_TEXT) {
      throw new OptionError(`the prompt has ${text.length} characters, the most is ${MAX_TEXT}`);
    }
    const raw = this.#added.filter(({ normalized }) => !normalized);
    const normal = this.#added.filter(({ normalized }) => normalized);
    return cut(text, raw, (token) => token.content).flatMap((piece) =>
      typeof piece !== "string"
        ? [piece.id]
        : cut(normalize(piece), normal, (token) => normalize(token.content)).flatMap((inner) =>
            typeof inner !== "string" ? [inner.id] : this.#words(inner),
          ),
    );
  }

  #words(text: string): number[] {
    const words = text.match(this.#split) ?? [];
    return words.flatMap((word) => (word.match(PARTS) ?? []).flatMap((part) => this.#word(part)));
  }

  #word(word: string): number[] {
    let ids = this.#known.get(word);
    if (!ids) {
      ids = this.#merged(word).flatMap((token) => this.#vocab.get(token) ?? []);
      if (this.#known.size >= MAX_WORDS) this.#known.clear();
      this.#known.set(word, ids);
    }
    return ids;
  }

  /** The tokens of a word: the pair of the lowest rank is joined, until no pair is known. */
  #merged(word: string): string[] {
    const letters = Array.from(new TextEncoder().encode(word), (byte) => BYTES[byte]!);
    letters[letters.length - 1] += SUFFIX;
    const parts = letters.map((letter) =>
      this.#vocab.has(letter) ? letter : (this.#unknown ?? letter),
    );
    const merge = (i: number) => this.#merges.get(`${parts[i]} ${parts[i + 1]}`);
    const ranks = parts.map((_, i) => merge(i)?.rank ?? Infinity); // of a part and the next
    for (;;) {
      const best = ranks.reduce((least, rank, i) => (rank < ranks[least]! ? i : least), 0);
      if (!(ranks[best]! < Infinity)) return parts;
      parts.splice(best, 2, merge(best)!.joined);
      ranks.splice(best, 1);
      for (const i of [best - 1, best]) if (i >= 0) ranks[i] = merge(i)?.rank ?? Infinity;
    }
  }

  #framed(tokens: number[]): number[] {
    const ids = [this.#start, ...tokens, this.#end];
    return [...ids, ...Array<number>(this.#length - ids.length).fill(this.#pad)];
  }

  #weights(weights: number[]): number[] {
    return [1, ...weights, ...Array<number>(this.#length - 1 - weights.length).fill(1)];
  }

  #spellOut(prompt: string): string {
    if ([...this.#spelled].every(([token, every]) => token === every)) return prompt;
    const longestFirst = [...this.#spelled.keys()].sort((a, b) => b.length - a.length);
    const pattern = new RegExp(longestFirst.map(escapeRegex).join("|"), "giu");
    return prompt.replace(pattern, (found) => this.#spelled.get(found.toLowerCase()) ?? found);
  }

  /** The text of spans from where its first tokens are more than `kept`; for people. */
  #rest(spans: Span[], kept: number): string {
    for (const [i, { text }] of spans.entries()) {
      const count = this.encode(text).length;
      if (kept < count) {
        const letters = [...text];
        let [low, high] = [0, letters.length]; // so many letters fit, so many do not
        while (high - low > 1) {
          const middle = (low + high) >> 1;
          if (this.encode(letters.slice(0, middle).join("")).length <= kept) low = middle;
          else high = middle;
        }
        const after = spans.slice(i + 1).map((span) => span.text);
        return `${letters.slice(low).join("")}${after.join("")} `;
      }
      kept -= count;
    }
    return "";
  }
}

/** Half a surrogate pair has no bytes. */
function wellFormed(text: string): string {
  return text.replace(/\p{Cs}/gu, "?");
}

/** NFC, runs of white space as one blank, lower case: each code point for itself, as in Rust. */
function normalize(text: string): string {
  const composed = text.normalize("NFC").replace(SPACES, " ");
  return Array.from(composed, (letter) => letter.toLowerCase()).join("");
}

/** A text cut at its tokens, the longest of those that begin at one place. */
function cut(
  text: string,
  tokens: Added[],
  spelling: (token: Added) => string,
): (string | Added)[] {
  const known = new Map(tokens.map((token) => [spelling(token), token]));
  known.delete("");
  if (!known.size) return text ? [text] : [];
  const longestFirst = [...known.keys()].sort((a, b) => b.length - a.length);
  const pattern = new RegExp(longestFirst.map(escapeRegex).join("|"), "gu");
  const pieces: (string | Added)[] = [];
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    if (match.index > end) pieces.push(text.slice(end, match.index));
    pieces.push(known.get(match[0])!);
    end = match.index + match[0].length;
  }
  if (end < text.length) pieces.push(text.slice(end));
  return pieces;
}

function escapeRegex(text: string): string {
  return text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
}

/** Tokens that were added, in lower case; one of several vectors with all of them: `<x> <x>_1`. */
function spelled(added: string[]): Map<string, string> {
  const known = new Set(added.map((token) => token.toLowerCase()));
  return new Map(
    [...known].map((token) => {
      const every = [token];
      while (known.has(`${token}_${every.length}`)) every.push(`${token}_${every.length}`);
      return [token, every.join(" ")];
    }),
  );
}

/** The splitting expression of a tokenizer.json whose steps are those that are built in here. */
function checkKind(raw: any): RegExp {
  const { model, normalizer, pre_tokenizer: before } = raw;
  const is = (found: unknown, wanted: unknown, what: string): void => {
    if (JSON.stringify(found) !== JSON.stringify(wanted)) {
      throw new Error(`its ${what} is ${JSON.stringify(found)}, not ${JSON.stringify(wanted)}`);
    }
  };
  is(model.type, "BPE", "model");
  is(model.end_of_word_suffix, SUFFIX, "suffix");
  is(model.continuing_subword_prefix || "", "", "prefix");
  is(model.dropout ?? null, null, "dropout");
  is(
    [model.byte_fallback ?? false, model.ignore_merges ?? false, model.fuse_unk ?? false],
    [false, false, false],
    "model's options",
  );
  is(
    normalizer.normalizers.map((n: any) => n.type),
    ["NFC", "Replace", "Lowercase"],
    "normalizer",
  );
  is(normalizer.normalizers[1].pattern, { Regex: "\\s+" }, "normalizer's pattern");
  is(normalizer.normalizers[1].content, " ", "normalizer's content");
  is(
    before.pretokenizers.map((p: any) => p.type),
    ["Split", "ByteLevel"],
    "pre-tokenizer",
  );
  const [first, bytes] = before.pretokenizers;
  is([first.behavior, first.invert], ["Removed", true], "splitting");
  is([bytes.add_prefix_space, bytes.use_regex ?? true], [false, true], "byte-level step");
  const split = SPLITS.get(first.pattern?.Regex);
  if (!split) throw new Error(`it splits by ${JSON.stringify(first.pattern)}`);
  return split;
}

function readAdded(raw: any): Added {
  if (raw.single_word || raw.lstrip || raw.rstrip) {
    throw new Error(`the added token ${JSON.stringify(raw.content)} takes in what is around it`);
  }
  return { id: whole(raw.id), content: String(raw.content), normalized: Boolean(raw.normalized) };
}

/** The ids of the tokens around a text. */
function frame(raw: any): [number, number] {
  if (raw?.type === "RobertaProcessing") return [whole(raw.cls[1]), whole(raw.sep[1])];
  if (raw?.type === "TemplateProcessing") {
    const [start, , end] = raw.single.map((part: any) => part.SpecialToken?.id);
    const id = (name: string): number => whole(raw.special_tokens[name].ids[0]);
    return [id(start), id(end)];
  }
  throw new Error("it puts no start and end around a text");
}

function whole(value: unknown, what = "an id"): number {
  if (!Number.isInteger(value) || (value as number) < 0) throw new Error(`${what} is ${value}`);
  return value as number;
}

/** The inside of a character class: ranges, from the end of the one before, in base 36. */
function classOf(table: string): string {
  const escape = (code: number): string => `\\u{${code.toString(16)}}`;
  let last = 0;
  const ranges = table
    .trim()
    .split(" ")
    .map((range) => {
      const [gap, length = "0"] = range.split(".") as [string, string?];
      const first = last + parseInt(gap, 36);
      last = first + parseInt(length, 36);
      return `${escape(first)}-${escape(last)}`;
    });
  return ranges.join("");
}

/** The characters that stand for bytes: printable ones for themselves, others from 256 on. */
const BYTES = ((): string[] => {
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const printed = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
    return String.fromCharCode(printed ? byte : next++);
  });
})();
