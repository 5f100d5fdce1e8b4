/**
 * Keeps the page for a time without network, and lets it have threads where the server does not
 * send the two headers that isolate it. The bundle's files are kept by the library.
 */
declare const FILES: string[]; // put in by build.mjs, as is the version
declare const VERSION: string;
declare const self: ServiceWorkerGlobalScope;

const CACHE = `ferrotype-page-${VERSION}`;

self.addEventListener("install", (event) => {
  event.waitUntil(
    caches
      .open(CACHE)
      .then((cache) => cache.addAll(FILES.map((file) => new Request(file, { cache: "no-cache" }))))
      .then(() => self.skipWaiting()),
  );
});

self.addEventListener("activate", (event) => {
  const old = (name: string): boolean => name.startsWith("ferrotype-page-") && name !== CACHE;
  event.waitUntil(
    caches
      .keys()
      .then((names) => Promise.all(names.filter(old).map((name) => caches.delete(name))))
      .then(() => self.clients.claim()),
  );
});

self.addEventListener("fetch", (event) => {
  const scope = self.registration.scope;
  const url = event.request.url.split(/[?#]/)[0]!;
  const file = url.startsWith(scope) ? url.slice(scope.length) || "./" : "";
  if (event.request.method === "GET" && FILES.includes(file)) event.respondWith(answer(file));
});

async function answer(file: string): Promise<Response> {
  const kept = await (await caches.open(CACHE)).match(new URL(file, self.registration.scope));
  return isolated(kept ?? (await fetch(file)));
}

function isolated(response: Response): Response {
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, headers });
}

export {};
