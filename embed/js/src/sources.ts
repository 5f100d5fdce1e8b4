/** Where bundles come from in a browser: a URL, kept for a time without network, or chosen files. */
import { BundleError, printable } from "./errors.js";
import { count, type ReadFile, type Source } from "./bundle.js";
import { MANIFEST } from "./manifest.js";

/**
 * The bundle at a URL, which is that of its folder.
 *
 * Verified files are kept in the Cache API under the name `cache` (null: not), by their hash; the
 * manifest is asked for anew and taken from there without a network.
 */
export function fromUrl(
  url: string | URL,
  { cache = "ferrotype" }: { cache?: string | null } = {},
): Source {
  const base = new URL(`${String(url).replace(/\/*$/, "")}/`, globalThis.location?.href).href;
  const store = cache !== null && globalThis.caches ? caches.open(cache) : null;
  const address = (name: string): string =>
    base + name.split("/").map(encodeURIComponent).join("/");
  const key = (name: string, hash?: string): string =>
    hash ? `${address(name)}?sha256=${hash}` : address(name);

  return {
    name: base.replace(/\/$/, ""),
    async read(name, file) {
      const kept = file.sha256 && (await (await store)?.match(key(name, file.sha256)));
      if (kept) return body(kept, name, file);
      let response: Response;
      try {
        response = await fetch(address(name), { signal: file.signal ?? null, cache: "no-cache" });
      } catch (error) {
        file.signal?.throwIfAborted();
        const old = name === MANIFEST && (await (await store)?.match(key(name)));
        if (old) return body(old, name, file);
        throw new BundleError(`${address(name)} cannot be fetched: ${(error as Error).message}`);
      }
      if (!response.ok) {
        throw new BundleError(
          name === MANIFEST
            ? `${base} is no bundle: its ${MANIFEST} answers ${response.status}`
            : `${address(name)} answers ${response.status}: the bundle is incomplete`,
        );
      }
      return body(response, name, file);
    },
    async keep(name, data, hash) {
      const where = await store;
      if (!where || (hash && (await where.match(key(name, hash))))) return;
      try {
        await where.put(key(name, hash), new Response(data));
      } catch {
        // No room left, or a private window: it is fetched again next time.
      }
    },
  };
}

/** A response's bytes, into a buffer of the size that they must have. */
async function body(
  response: Response,
  name: string,
  file: ReadFile,
): Promise<Uint8Array<ArrayBuffer>> {
  const reader = response.body?.getReader();
  const pieces: Uint8Array[] = [];
  const whole = file.bytes === undefined ? null : new Uint8Array(file.bytes);
  let at = 0;
  try {
    while (reader) {
      const { done, value } = await reader.read();
      if (done) break;
      if (at + value.length > file.limit) throw tooLong(name, file);
      if (whole) whole.set(value, at);
      else pieces.push(value);
      at += value.length;
      file.onBytes?.(value.length);
    }
  } catch (error) {
    await reader?.cancel().catch(() => undefined);
    file.signal?.throwIfAborted();
    if (error instanceof BundleError) throw error;
    throw truncated(name, at, file, (error as Error).message);
  }
  if (whole && at < whole.length) throw truncated(name, at, file);
  return whole ?? joined(pieces, at);
}

function joined(pieces: Uint8Array[], length: number): Uint8Array<ArrayBuffer> {
  const data = new Uint8Array(length);
  let at = 0;
  for (const piece of pieces) {
    data.set(piece, at);
    at += piece.length;
  }
  return data;
}

/** Chosen files of one bundle: an `<input webkitdirectory>`'s, or a Map of paths in it. */
export function fromFiles(files: Iterable<File> | ReadonlyMap<string, Blob>): Source {
  const all = new Map<string, Blob>(
    files instanceof Map
      ? files
      : Array.from(files as Iterable<File>, (file) => [file.webkitRelativePath || file.name, file]),
  );
  // The folder that was chosen may hold the bundle, or be in it.
  const manifests = [...all.keys()].filter((path) => `/${path}`.endsWith(`/${MANIFEST}`));
  const nearest = manifests.sort((a, b) => a.length - b.length)[0] ?? MANIFEST;
  const root = nearest.slice(0, -MANIFEST.length);
  return {
    name: root.replace(/\/$/, "") || "the chosen files",
    async read(name, file) {
      file.signal?.throwIfAborted();
      const blob = all.get(root + name);
      if (!blob) {
        throw new BundleError(
          name === MANIFEST
            ? `the chosen files are no bundle: no ${MANIFEST} is among them`
            : `${printable(root + name)} is missing: choose the whole folder of the bundle`,
        );
      }
      checkLength(name, blob.size, file);
      file.onBytes?.(blob.size);
      return new Uint8Array(await blob.arrayBuffer());
    },
  };
}

/** Throws BundleError unless a file has the size that it must have. */
export function checkLength(name: string, found: number, file: ReadFile): void {
  if (file.bytes !== undefined && found < file.bytes) throw truncated(name, found, file);
  if (found > file.limit) throw tooLong(name, file);
}

function truncated(name: string, at: number, { bytes }: ReadFile, why = ""): BundleError {
  const of = bytes === undefined ? "" : ` of ${count(bytes)}`;
  const reason = why ? ` (${printable(why, 80)})` : "";
  return new BundleError(`${name} ended after ${count(at)}${of} bytes${reason}: fetch it again`);
}

function tooLong(name: string, { bytes, limit }: ReadFile): BundleError {
  const wanted =
    bytes === undefined
      ? `more than ${count(limit)} bytes, the limit`
      : `more than the ${count(bytes)} bytes that its manifest says`;
  return new BundleError(`${name} has ${wanted}: it is not of this bundle`);
}
