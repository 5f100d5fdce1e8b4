/** JSON that every parser reads alike, and readers that turn it into typed values. */

export const MAX_DEPTH = 32; // of objects in objects

/** A value that is not as the format says; the message names the field. */
export class FormatError extends Error {}

/**
 * Parse JSON with no key twice, numbers of 64 bits, at most 32 levels.
 *
 * Throws FormatError or SyntaxError. Parsers disagree on what is refused here.
 */
export function strictJson(text: string): unknown {
  const value: unknown = JSON.parse(text); // from here on the syntax is sound
  const open: (Set<string> | null)[] = []; // the keys of an object, null for a list
  let key = false; // whether a text that follows is a key
  for (const [token] of text.matchAll(/"(?:[^"\\]|\\.)*"|[{}[\],]|[-\d][-+.\deE]*/g)) {
    if (token === "{" || token === "[") {
      open.push(token === "{" ? new Set() : null);
      if (open.length >= MAX_DEPTH) throw new FormatError(`it nests deeper than ${MAX_DEPTH}`);
      key = token === "{";
    } else if (token === "}" || token === "]") {
      open.pop();
      key = false;
    } else if (token === ",") {
      key = open.at(-1) !== null;
    } else if (token[0] !== '"') {
      checkNumber(token);
    } else if (key) {
      const name = JSON.parse(token) as string;
      const keys = open.at(-1)!;
      if (keys.has(name)) throw new FormatError(`an object names the key ${short(name)} twice`);
      keys.add(name);
      key = false;
    }
  }
  return value;
}

function checkNumber(token: string): void {
  if (/[.eE]/.test(token)) {
    if (Number.isFinite(Number(token))) return;
    throw new FormatError(`${token.slice(0, 40)} is not a finite number`);
  }
  const fits = token.length <= 20 && BigInt(token.replace("-", "")) < 2n ** 63n;
  if (!fits) throw new FormatError(`${token.slice(0, 40)} does not fit 64 bits`);
}

// --- readers ------------------------------------------------------------------------------------

/** Turns a value into T; `where` is the field's name for messages. */
export type Reader<T> = (value: unknown, where: string) => T;

interface Optional<T> {
  reader: Reader<T>;
  otherwise: T;
}

type Fields = Record<string, Reader<unknown> | Optional<unknown>>;
type Read<F> = {
  [K in keyof F]: F[K] extends Reader<infer T> ? T : F[K] extends Optional<infer T> ? T : never;
};

export function optional<T>(reader: Reader<T>, otherwise: T): Optional<T> {
  return { reader, otherwise };
}

export const text: Reader<string> = (value, where) => {
  if (typeof value !== "string") throw expected("text", value, where);
  return value;
};

export const flag: Reader<boolean> = (value, where) => {
  if (typeof value !== "boolean") throw expected("true or false", value, where);
  return value;
};

export function number(low = -Infinity, high = Infinity): Reader<number> {
  return (value, where) => {
    if (typeof value !== "number") throw expected("a number", value, where);
    if (value < low || value > high) throw outside(value, low, high, where);
    return value;
  };
}

export function whole(low = -Infinity, high = Infinity): Reader<number> {
  const read = number(low, high);
  return (value, where) => {
    if (!Number.isSafeInteger(value)) throw expected("a whole number", value, where);
    return read(value, where);
  };
}

export function oneOf(...names: string[]): Reader<string> {
  return (value, where) => {
    if (names.includes(text(value, where))) return value as string;
    throw new FormatError(`${where}: ${short(value)} is not one of ${names.join(", ")}`);
  };
}

export const anything: Reader<unknown> = (value) => value;

export function list<T>(reader: Reader<T>): Reader<T[]> {
  return (value, where) => {
    if (!Array.isArray(value)) throw expected("a list", value, where);
    return value.map((inner, i) => reader(inner, `${where}[${i}]`));
  };
}

export function pair<T>(reader: Reader<T>): Reader<[T, T]> {
  return (value, where) => tuple(reader, 2)(value, where) as [T, T];
}

export function tuple<T>(reader: Reader<T>, count: number): Reader<T[]> {
  return (value, where) => {
    const found = list(reader)(value, where);
    if (found.length === count) return found;
    throw new FormatError(`${where}: ${count} values expected, found ${found.length}`);
  };
}

export function nullable<T>(reader: Reader<T>): Reader<T | null> {
  return (value, where) => (value === null ? null : reader(value, where));
}

/** An object with any names. */
export function named<T>(reader: Reader<T>): Reader<Map<string, T>> {
  return (value, where) => {
    const entries = Object.entries(object(value, where));
    return new Map(
      entries.map(([name, inner]) => {
        if (!name || /[\p{C}\p{Z}]/u.test(name.replaceAll(" ", ""))) {
          throw new FormatError(`${where}: ${short(name)} is not a name`);
        }
        return [name, reader(inner, where ? `${where}.${name}` : name)];
      }),
    );
  };
}

/** An object with exactly these fields. */
export function record<F extends Fields>(fields: F): Reader<Read<F>> {
  return (value, where) => {
    const raw = object(value, where);
    const dot = where ? `${where}.` : "";
    for (const name of Object.keys(raw)) {
      if (!Object.hasOwn(fields, name))
        throw new FormatError(`${dot}${name}: not a field of format 1`);
    }
    const entries = Object.entries(fields).map(([name, field]) => {
      if (Object.hasOwn(raw, name)) {
        const reader = typeof field === "function" ? field : field.reader;
        return [name, reader(raw[name], `${dot}${name}`)];
      }
      if (typeof field === "function") throw new FormatError(`${dot}${name}: missing`);
      return [name, field.otherwise];
    });
    return Object.fromEntries(entries) as Read<F>;
  };
}

function object(value: unknown, where: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw expected("an object", value, where || "manifest");
  }
  return value as Record<string, unknown>;
}

function expected(what: string, value: unknown, where: string): FormatError {
  return new FormatError(`${where}: ${what} expected, found ${short(value)}`);
}

function outside(value: number, low: number, high: number, where: string): FormatError {
  return new FormatError(`${where} is ${value}, not in ${low}..${high}`);
}

function short(value: unknown): string {
  const shown = JSON.stringify(value) ?? String(value);
  return shown.length <= 40 ? shown : `${shown.slice(0, 39)}…`;
}
