/**
 * Prompts as they are written for Stable Diffusion: weights in brackets, chunks without limit.
 * The syntax is AUTOMATIC1111's, as runtime/prompts.py reads it; docs/prompts.md.
 */
import { OptionError, printable } from "./errors.js";

const MORE = 1.1; // of a pair of parentheses without a number
const LESS = 1 / 1.1; // of a pair of brackets
const MAX_WEIGHT = 100; // beyond it is a slip, and in the end infinity
export const MAX_CHUNKS = 32;
const MEANT = 0.01; // the least of a mean that says something, to that of the magnitudes

// Python's \s, \d and \w, which are Unicode's and not quite JavaScript's.
const SPACE =
  "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]";
const NUMBER = "[+-]?(?:\\p{Nd}+\\.?\\p{Nd}*|\\.\\p{Nd}+)";
const WORD = "[\\p{L}\\p{N}_]";
const MARK = new RegExp(
  `\\\\([^]?)|:${SPACE}*(${NUMBER})${SPACE}*\\)|[()\\[\\]]|(?<!${WORD})BREAK(?!${WORD})`,
  "gu",
);

/** A piece of a prompt, and what the states of its tokens are multiplied by. */
export interface Span {
  text: string;
  weight: number;
}

/**
 * The sections of a prompt between one BREAK and the next, at least one; each is its spans.
 *
 * What closes nothing is text, what nothing closes reaches to the end. Throws OptionError for a
 * weight beyond 100.
 */
export function parse(prompt: string): Span[][] {
  const sections: Span[][] = [[]];
  const pieces: Span[] = []; // of all sections, in order
  const opened: [string, number][] = []; // brackets, and the first piece inside each

  const add = (text: string): void => {
    if (!text) return;
    const piece = { text, weight: 1 };
    pieces.push(piece);
    sections.at(-1)!.push(piece);
  };
  const close = (bracket: string, weight: number): boolean => {
    const at = opened.findLastIndex(([found]) => found === bracket);
    if (at < 0) return false;
    for (const piece of pieces.slice(opened.splice(at, 1)[0]![1])) piece.weight *= weight;
    return true;
  };

  let end = 0;
  for (const mark of prompt.matchAll(MARK)) {
    const [found, literal, number] = mark as unknown as [string, string?, string?];
    add(prompt.slice(end, mark.index));
    end = mark.index + found.length;
    if (literal !== undefined) add(literal);
    else if (found === "(" || found === "[") opened.push([found, pieces.length]);
    else if (found === "BREAK") sections.push([]);
    else if (number !== undefined) {
      if (!close("(", decimal(number))) add(found);
    } else if (!close(found === ")" ? "(" : "[", found === ")" ? MORE : LESS)) add(found);
  }
  add(prompt.slice(end));
  while (close("(", MORE));
  while (close("[", LESS));
  return sections.map(merged);
}

/** A number whose digits may be of any script, as Python's float reads it. */
function decimal(text: string): number {
  return Number(text.replace(/\p{Nd}/gu, (digit) => String(digitOf(digit.codePointAt(0)!))));
}

/** Unicode puts the ten digits of a script in a row, and some rows end to end. */
function digitOf(code: number): number {
  let first = code;
  while (/\p{Nd}/u.test(String.fromCodePoint(first - 1))) first--;
  return (code - first) % 10;
}

/** Neighbours of one weight are one span: words are not cut where nothing differs. */
function merged(section: Span[]): Span[] {
  const spans: Span[] = [];
  for (const { text, weight } of section) {
    if (!(Math.abs(weight) <= MAX_WEIGHT)) {
      throw new OptionError(
        `weight ${weight} of '${printable(text, 40)}' in the prompt: it must be from ` +
          `${-MAX_WEIGHT} to ${MAX_WEIGHT}`,
      );
    }
    const last = spans.at(-1);
    if (last?.weight === weight) last.text += text;
    else spans.push({ text, weight });
  }
  return spans;
}

/** `text` as a prompt that means it literally, brackets, backslashes and BREAK included. */
export function escape(text: string): string {
  const marks = new RegExp(`[\\\\()\\[\\]]|(?<!${WORD})BREAK(?!${WORD})`, "gu");
  return text.replace(marks, (mark) => `\\${mark}`);
}

/**
 * States, tokens times channels, multiplied by the weights of their tokens.
 *
 * With `restore`, the mean over all is then made what it was; but not where it is next to nothing,
 * as the ratio would be noise. Weights of 1 leave every byte as it is.
 */
export function weigh(states: Float32Array, weights: Float32Array, restore: boolean): Float32Array {
  if (weights.every((weight) => weight === 1)) return states;
  const channels = states.length / weights.length;
  const scaled = states.map((value, i) => value * weights[Math.floor(i / channels)]!);
  const before = mean(states);
  const after = mean(scaled);
  const size = MEANT * mean(states.map(Math.abs));
  if (!restore || Math.min(Math.abs(before), Math.abs(after)) < size) return scaled;
  const ratio = Math.fround(before / after);
  return scaled.map((value) => value * ratio);
}

function mean(values: Float32Array): number {
  return values.reduce((total, value) => total + value, 0) / values.length;
}
