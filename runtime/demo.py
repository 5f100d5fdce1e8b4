"""The demo page: served on this machine, or written as a folder for any static host.

The page is embed/js/demo, built; it draws in the browser with an ONNX bundle.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from ..bundle import MANIFEST, Bundle, BundleError
from .pictures import PictureError

PAGE = Path(__file__).parent.parent / "embed" / "js" / "demo" / "page"
LOCAL = "127.0.0.1"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".wasm": "application/wasm",
    ".json": "application/json",
    ".md": "text/plain; charset=utf-8",
}
HEADERS = {
    # These two isolate the page, without which browsers give it one thread.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def files(bundle: Bundle) -> dict[str, Path]:
    """What the page asks for, by its path on the server: the page's own files and the bundle's.

    Raises BundleError for a bundle that browsers cannot run.
    """
    if bundle.manifest.target != "onnx":
        raise BundleError(
            f"{bundle.folder} is for {bundle.manifest.target}, a browser runs onnx: "
            "ferrotype convert CHECKPOINT --target onnx"
        )
    if not (PAGE / "index.html").is_file():
        raise BundleError(f"{PAGE} has no index.html: install ferrotype again")
    page = {path.name.removesuffix(".gz"): path for path in PAGE.iterdir()}
    names = [MANIFEST, *bundle.manifest.files]
    return {**page, **{f"bundle/{name}": bundle.path(name) for name in names}}


def export(bundle: Bundle, out: Path) -> int:
    """Write the page and the bundle into the new folder `out`; returns their bytes.

    Raises PictureError if it exists or cannot be written, BundleError as `files` does.
    """
    found = files(bundle)
    if out.exists() or not out.parent.is_dir():
        raise PictureError(f"{out} exists or has no folder around it: name a new one")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:40]}.") as staged:
        site = Path(staged) / "site"
        for name, path in found.items():
            target = site.joinpath(*PurePosixPath(name).parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".gz":
                with gzip.open(path) as packed, target.open("wb") as plain:
                    shutil.copyfileobj(packed, plain)
            else:
                shutil.copyfile(path, target)
        size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
        site.rename(out)
    return size


def server(bundle: Bundle, port: int = 0) -> ThreadingHTTPServer:
    """A server of `files` on 127.0.0.1, not yet started; port 0 is any that is free."""
    found = files(bundle)

    class Handler(_Handler):
        table = found

    return ThreadingHTTPServer((LOCAL, port), Handler)


class _Handler(BaseHTTPRequestHandler):
    table: dict[str, Path]
    protocol_version = "HTTP/1.1"
    server_version = "ferrotype"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (LOCAL, "localhost"):  # a page elsewhere that took this address as its own
            return self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        path = self.table.get(unquote(urlsplit(self.path).path).lstrip("/") or "index.html")
        if path is None or not path.is_file():
            return self.send_error(HTTPStatus.NOT_FOUND)
        packed = path.suffix == ".gz"
        kind = Path(path.stem if packed else path.name).suffix
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", TYPES.get(kind, "application/octet-stream"))
        self.send_header("Content-Length", str(path.stat().st_size))
        if packed:  # every browser unpacks it
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if body:
            for piece in _pieces(path):
                self.wfile.write(piece)
        return None

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass  # stderr is for people

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the browser gave up
            self.close_connection = True


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            yield piece
