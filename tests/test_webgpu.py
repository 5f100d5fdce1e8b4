"""The JavaScript library on WebGPU, with Chromium's software adapter."""

import functools
import http.server
import shutil
import threading

import numpy as np
import pytest

from ferrotype import parity
from ferrotype.runtime.pipeline import EMBEDDED_ONNX, Pipeline
from ferrotype.tests.node import EMBED, run

FLOOR = 60  # dB
TOO_LONG = 300_000  # milliseconds: the adapter is slow
PAGE = """<!doctype html><meta charset=utf-8><title>t</title><link rel=icon href=data:,>
<script type=module>
import * as ort from "./ort/ort.webgpu.bundle.min.mjs";
import { Pipeline, fromUrl, open } from "./ferrotype/index.js";
ort.env.wasm.wasmPaths = new URL("ort/", location.href).href;
window.draw = async (prompt, options) => {
  const bundle = await open(fromUrl(new URL("bundle/", location.href).href));
  const session = { executionProviders: ["webgpu"] };
  const pipe = new Pipeline(bundle, { ort, session });
  const { width, height, data } = await pipe.generate(prompt, options);
  await pipe.release();
  return { width, height, data: Array.from(data) };
};
window.ready = true;
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def site(npm, tmp_path):
    """The address of a page with the library, onnxruntime's WebGPU build and the bundle."""
    tsc = EMBED / "node_modules" / ".bin" / "tsc"
    run(tsc, "-p", "tsconfig.build.json", "--outDir", tmp_path / "ferrotype")
    (tmp_path / "ort").mkdir()
    built = EMBED / "node_modules" / "onnxruntime-web" / "dist"
    for path in (built / "ort.webgpu.bundle.min.mjs", *built.glob("*.asyncify.*")):
        shutil.copy(path, tmp_path / "ort")
    shutil.copytree(EMBEDDED_ONNX, tmp_path / "bundle")
    (tmp_path / "index.html").write_text(PAGE)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_it_draws_on_webgpu(site, browse):
    page = browse(site)
    page.tab.set_default_timeout(TOO_LONG)
    if not page.tab.evaluate("navigator.gpu?.requestAdapter().then(Boolean)"):
        pytest.skip("this Chromium has no WebGPU adapter, not even in software")
    page.tab.wait_for_function("window.ready")
    found = page.tab.evaluate("draw('a red apple', { seed: 7n, steps: 1 })")
    pixels = np.array(found["data"]).reshape(found["height"], found["width"], 4)[..., :3]
    ours = np.asarray(Pipeline.load(EMBEDDED_ONNX).generate("a red apple", seed=7, steps=1))
    assert parity.psnr(ours.astype(float), pixels.astype(float), peak=255.0) > FLOOR
    assert page.errors == []
