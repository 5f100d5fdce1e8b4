"""The demo page as a person uses it, in a headless Chromium, served as `ferrotype demo` does."""

import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from ferrotype import bundle, parity
from ferrotype.runtime import demo, pictures
from ferrotype.runtime.pipeline import EMBEDDED_ONNX, Pipeline

PROMPT = "a rocket on a black background"


@contextmanager
def served(folder=EMBEDDED_ONNX, files=None):
    """The address of the page with the bundle in a folder, or with some files of its own."""
    server = demo.server(bundle.load(EMBEDDED_ONNX if files else folder))
    if files:
        server.RequestHandlerClass.table.update(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def address():
    with served() as where:
        yield where


def ready(page):
    page.tab.wait_for_selector("#draw:enabled")
    return page.tab


def done(tab, text="Done"):
    tab.wait_for_selector(f"#status:text-is('{text}')")


def saved(tab, path):
    """The PNG that the page offers, and its pixels."""
    with tab.expect_download() as download:
        tab.click("#save")
    download.value.save_as(path)
    return download.value.suggested_filename, np.asarray(Image.open(path).convert("RGB"))


def test_it_draws_what_python_draws(address, browse, tmp_path):
    page = browse(address)
    tab = ready(page)
    assert tab.evaluate("crossOriginIsolated")  # or it would have one thread
    tab.fill("#prompt", PROMPT)
    tab.fill("#seed", "11")
    tab.press("#prompt", "Enter")
    done(tab)
    assert tab.get_attribute("#preview", "width") == "16"  # of the steps' latents
    name, pixels = saved(tab, tmp_path / "one.png")
    assert name == "a-rocket-on-a-black-background-11.png"
    ours = np.asarray(Pipeline.load(EMBEDDED_ONNX).generate(PROMPT, seed=11))
    assert parity.psnr(ours.astype(float), pixels.astype(float), peak=255.0) > 45
    text = pictures.read_text(tmp_path / "one.png")
    assert (text["prompt"], text["seed"], text["steps"]) == (PROMPT, "11", "4")
    rows = tab.locator("#bars dt").all_inner_texts()
    assert rows == ["Text encoder", "U-Net × 4", "Decoder"]
    assert "MB planned" in tab.inner_text("#memory")

    tab.fill("#seed", "12")  # another seed, and the first again
    tab.click("#draw")
    done(tab)
    _, other = saved(tab, tmp_path / "two.png")
    assert (other != pixels).mean() > 0.05
    tab.check("#resident")
    tab.click("#strip li:last-child button")
    done(tab)
    _, again = saved(tab, tmp_path / "three.png")
    assert (again == pixels).all()
    assert page.errors == []
    assert all(url.startswith((address, "blob:", "data:")) for url in page.requests)


def test_it_is_cancelled_and_draws_again(address, browse):
    page = browse(address, width=390, height=844, dark=True)
    tab = ready(page)
    press = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))"
    tab.evaluate(
        f"document.getElementById('draw').click(); {press}"
    )  # at once: not when it is done
    done(tab, "Cancelled")
    assert not tab.is_visible("#save")
    tab.click("#examples li:first-child button")
    done(tab)
    assert tab.input_value("#prompt") == "a penguin"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    for control in tab.locator("button, input, textarea, a.button, summary").all():
        name = control.evaluate(
            "e => (e.labels?.[0]?.textContent ?? e.ariaLabel ?? '') + e.textContent"
        )
        assert name.strip(), control.evaluate("e => e.outerHTML")
    assert page.errors == []


def test_without_a_network(browse, tmp_path):
    """Once drawn, the page and the model are there when the server is not."""
    with served() as where:
        page = browse(where)
        tab = ready(page)
        tab.evaluate("navigator.serviceWorker.ready.then(() => 0)")
        tab.click("#draw")
        done(tab)
        _, before = saved(tab, tmp_path / "one.png")
        assert page.errors == []
    tab.reload()
    ready(page)
    tab.click("#draw")
    done(tab)
    _, after = saved(tab, tmp_path / "two.png")
    assert (before == after).all()
    assert all("bundle/manifest.json" in error or "ERR_" in error for error in page.errors)


def broken(tmp_path, name, change):
    path = tmp_path / "broken"
    path.write_bytes(change((EMBEDDED_ONNX / name).read_bytes()))
    return {f"bundle/{name}": path}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("manifest.json", lambda data: b"<html>", "is not a valid manifest"),
        ("manifest.json", lambda data: data.replace(b'"onnx"', b'"coreml"'), "is for coreml"),
        ("unet/model.onnx.data", lambda data: data[:1000], "ended after 1,000 of 17,113,088 bytes"),
        ("tokenizer/tokenizer.json", lambda data: data[:-1] + b" ", "it was damaged or replaced"),
    ],
    ids=["no bundle", "another target", "truncated", "damaged"],
)
def test_what_is_wrong_is_said(browse, tmp_path, name, change, said):
    with served(files=broken(tmp_path, name, change)) as where:
        page = browse(where)
        if name != "manifest.json":
            ready(page).click("#draw")
        page.tab.wait_for_selector("#alert:not([hidden])")
        text = page.tab.inner_text("#alert")
        assert said in text
        assert "\n" not in text
        assert page.errors == []
        assert page.tab.is_visible("#empty")
        # Another bundle can be opened, and draws.
        page.tab.click("#model summary")
        page.tab.set_input_files("#folder", EMBEDDED_ONNX)
        page.tab.wait_for_selector("#status:text-is('Ready')")
        page.tab.click("#draw")
        done(page.tab)
        assert page.tab.is_hidden("#alert")


def test_a_link_brings_its_settings(address, browse):
    page = browse(f"{address}#prompt=a+pizza&seed=5&steps=2")
    tab = ready(page)
    tab.click("#draw")
    done(tab)
    assert tab.get_attribute("#picture", "aria-label") == "Picture of: a pizza"
    assert tab.locator("#bars dt").all_inner_texts()[1] == "U-Net × 2"
    assert page.errors == []


# --- the server, without a browser ----------------------------------------------------------------


def get(address, path, host=None, method="GET"):
    where = address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(where, timeout=60)
    connection.request(method, path, headers={"Host": host or where})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_only_what_is_listed_is_served(address):
    answer, body = get(address, "/")
    assert answer.status == 200
    assert b"<title>Ferrotype</title>" in body
    assert "'self'" in answer.headers["Content-Security-Policy"]
    answer, body = get(address, "/bundle/manifest.json")
    assert json.loads(body)["model"] == "emoji"
    answer, body = get(address, "/ort-wasm-simd-threaded.wasm", method="HEAD")
    assert (answer.headers["Content-Encoding"], body) == ("gzip", b"")
    for path in (
        "/../cli.py",
        "/bundle/../../cli.py",
        "/%2e%2e/cli.py",
        "/bundle/",
        "//etc/passwd",
    ):
        assert get(address, path)[0].status == 404, path
    assert get(address, "/", host="evil.example:80")[0].status == 421
    assert get(address, "/", method="POST")[0].status == 501


def test_the_command(tmp_path):
    code = "from ferrotype.cli import main; main(prog_name='ferrotype')"
    command = [sys.executable, "-c", code, "demo"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--no-browser"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        where = process.stdout.readline().strip()
        assert get(where, "/")[0].status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
    native = shutil.copytree(EMBEDDED_ONNX.with_name("emoji.ferro"), tmp_path / "native.ferro")
    found = subprocess.run([*command, native], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "a browser runs onnx" in found.stderr
    out = tmp_path / "site"
    found = subprocess.run([*command, "-o", out], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.split()[0]) == (0, str(out))
