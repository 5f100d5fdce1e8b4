/** An opened bundle: its manifest, and files that are whole and have the hash it says. */
import { BundleError, printable } from "./errors.js";
import { MANIFEST, MAX_MANIFEST_BYTES, isBelow, parseManifest } from "./manifest.js";
import type { Component, Manifest } from "./manifest.js";
import { sha256 } from "./sha256.js";

/** More than one buffer of a browser or of wasm's 32 bits can hold beside its copy. */
const MAX_FILE_BYTES = 2 ** 31 - 1;

export interface ReadOptions {
  /** Cancels the download. */
  signal?: AbortSignal | undefined;
  /** Told how many bytes have come since the last call. */
  onBytes?: ((count: number) => void) | undefined;
}

export interface ReadFile extends ReadOptions {
  /** The size that the file must have; without it (the manifest) a limit. */
  bytes?: number;
  limit: number;
  sha256?: string;
}

/** Where a bundle's files come from: a URL, chosen files, a folder on disk. */
export interface Source {
  /** For messages. */
  readonly name: string;
  /**
   * The contents of a file of the bundle.
   *
   * Throws BundleError if it is not there, or is shorter or longer than it must be.
   */
  read(name: string, file: ReadFile): Promise<Uint8Array<ArrayBuffer>>;
  /** Keeps what was verified for a time without network. */
  keep?(name: string, data: Uint8Array<ArrayBuffer>, sha256?: string): Promise<void>;
  /** The path of a file where the engine can open it by itself. */
  locate?(name: string): string;
}

export class Bundle {
  constructor(
    readonly source: Source,
    readonly manifest: Manifest,
    /** The bundle's identity: the hash of its manifest, which holds the hash of every file. */
    readonly sha256: string,
  ) {}

  /** The component of that name, or a BundleError that lists those there are. */
  component(name: string): Component {
    const found = this.manifest.components.get(name);
    if (found) return found;
    const have = [...this.manifest.components.keys()].join(", ");
    throw new BundleError(`${this.source.name} has no ${name}: it holds ${have}`);
  }

  /** The files at or below a path of the bundle. */
  files(path: string): string[] {
    return [...this.manifest.files.keys()].filter((file) => isBelow(file, path));
  }

  /** The size of a file, or of all below a folder, as the manifest says. */
  bytesOf(path: string): number {
    const sizes = this.files(path).map((file) => this.manifest.files.get(file)!.bytes);
    return sizes.reduce((total, size) => total + size, 0);
  }

  /** A file's contents, of the size and hash that the manifest says; else a BundleError. */
  async read(name: string, options: ReadOptions = {}): Promise<Uint8Array<ArrayBuffer>> {
    const file = this.manifest.files.get(name);
    if (!file) {
      throw new BundleError(`${this.source.name}: ${printable(name)} is not in its manifest`);
    }
    if (file.bytes > MAX_FILE_BYTES) {
      throw new BundleError(
        `${name} has ${count(file.bytes)} bytes, a host of JavaScript holds ` +
          `${count(MAX_FILE_BYTES)}: convert with fewer bits, --weights w8`,
      );
    }
    const asked = { ...options, bytes: file.bytes, limit: file.bytes, sha256: file.sha256 };
    const data = await this.source.read(name, asked);
    const found = await sha256(data);
    if (found !== file.sha256) {
      throw new BundleError(
        `${this.source.name}: the sha256 of ${name} is ${found.slice(0, 12)}…, the manifest says ` +
          `${file.sha256.slice(0, 12)}…: it was damaged or replaced, fetch the bundle again`,
      );
    }
    await this.source.keep?.(name, data, file.sha256);
    return data;
  }

  /** Read and hash every file (or those of some paths); throws BundleError at the first that is wrong. */
  async verify(options: ReadOptions & { paths?: string[] } = {}): Promise<void> {
    for (const name of this.manifest.files.keys()) {
      options.signal?.throwIfAborted();
      if (options.paths && !options.paths.some((path) => isBelow(name, path))) continue;
      await this.read(name, options);
    }
  }
}

/** Open a bundle for onnxruntime: its manifest is read and checked, and no weights yet. */
export async function open(source: Source, options: ReadOptions = {}): Promise<Bundle> {
  const data = await source.read(MANIFEST, { ...options, limit: MAX_MANIFEST_BYTES });
  const manifest = parseManifest(decode(data, source.name), `${source.name}/${MANIFEST}`);
  if (manifest.target !== "onnx") {
    throw new BundleError(
      `${source.name} is for ${printable(manifest.target, 40)}, this library runs onnx: ` +
        "ferrotype convert CHECKPOINT --target onnx",
    );
  }
  await source.keep?.(MANIFEST, data);
  return new Bundle(source, manifest, await sha256(data));
}

function decode(data: Uint8Array, where: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(data);
  } catch {
    throw new BundleError(`${where}/${MANIFEST} is not UTF-8 text`);
  }
}

/** 12,345,678. */
export function count(bytes: number): string {
  return bytes.toLocaleString("en-US");
}
