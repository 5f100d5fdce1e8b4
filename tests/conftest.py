"""Bundles to try things on."""

import shutil
import signal

import pytest

from ferrotype.benchmarks.checkpoints import EMOJI, TINY, TINY_XL, write_checkpoint
from ferrotype.runtime.pipeline import EMBEDDED_ONNX
from ferrotype.tests.browser import browse, chromium  # noqa: F401
from ferrotype.tests.node import npm  # noqa: F401

# A shell's background job, and all that it starts, would be deaf to the interrupts of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def trained():
    """The folder of the trained checkpoint that the embedded bundle was made from."""
    return EMOJI


@pytest.fixture(scope="session")
def plain(trained, tmp_path_factory):
    """The trained model as a native bundle in bf16, to make smaller."""
    from ferrotype.convert import convert

    return convert(trained, tmp_path_factory.mktemp("plain") / "plain.ferro", "native").folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A tiny Stable Diffusion 1; its projections around attention are convolutions."""
    torch = pytest.importorskip("torch")
    return write_checkpoint(tmp_path_factory.mktemp("sd") / "sd", TINY, torch.float32)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """A tiny SDXL; its projections around attention are linear layers."""
    torch = pytest.importorskip("torch")
    return write_checkpoint(tmp_path_factory.mktemp("xl") / "xl", TINY_XL, torch.float32)


@pytest.fixture
def emoji(tmp_path):
    """A copy of the embedded ONNX bundle to break."""
    return shutil.copytree(EMBEDDED_ONNX, tmp_path / "emoji.ferro")


def pytest_collection_modifyitems(items, config):
    """What opens pages is a test of the browser, and left to its own process."""
    pages = [item for item in items if "chromium" in getattr(item, "fixturenames", ())]
    for item in pages:
        item.add_marker("browser")
    if pages and "browser" not in config.option.markexpr:
        config.hook.pytest_deselected(items=pages)
        items[:] = [item for item in items if item not in pages]
