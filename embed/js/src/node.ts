/** Bundles in folders, for Node. */
import { readFile, realpath, stat } from "node:fs/promises";
import { join, resolve, sep } from "node:path";
import { open as openSource, type Bundle, type ReadOptions, type Source } from "./bundle.js";
import { BundleError } from "./errors.js";
import { MANIFEST } from "./manifest.js";
import { checkLength } from "./sources.js";

/** The bundle in a folder. */
export function fromFolder(folder: string): Source {
  const path = (name: string): string => join(folder, ...name.split("/"));
  return {
    name: folder,
    locate: (name) => resolve(path(name)),
    async read(name, file) {
      file.signal?.throwIfAborted();
      const found = await stat(path(name)).catch(() => null);
      if (!found?.isFile()) {
        const what = found ? "not a file" : "missing";
        throw new BundleError(
          name === MANIFEST
            ? `${folder} is not a bundle: its ${MANIFEST} is ${what}`
            : `${path(name)} is ${what}; copy or convert the bundle again`,
        );
      }
      const [root, real] = await Promise.all([realpath(folder), realpath(path(name))]);
      if (!real.startsWith(root + sep)) {
        throw new BundleError(`${path(name)} is a link that leaves the bundle`);
      }
      checkLength(name, found.size, file);
      const data = await readFile(path(name), { signal: file.signal });
      checkLength(name, data.length, file); // it may have changed meanwhile
      file.onBytes?.(data.length);
      return new Uint8Array(data.buffer, data.byteOffset, data.length) as Uint8Array<ArrayBuffer>;
    },
  };
}

/** Open the bundle in a folder. */
export function open(folder: string, options: ReadOptions = {}): Promise<Bundle> {
  return openSource(fromFolder(folder), options);
}
