"""Pages in a headless Chromium, as a person would see them.

    def test_it(browse):
        page = browse(path_or_url, width=390, dark=True)
        assert page.errors == []

They run in a process of their own, `pytest -m browser`, which test_in_browser.py starts: playwright
keeps a loop of greenlets for the whole session, beside which other tests of one worker crashed.

Chromium is Debian's: where it is missing and this process may install packages, it is installed;
where not, tests that take `browse` skip with the reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ferrotype.tests.debian import missing

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PACKAGE = "chromium"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    # WebGPU without a GPU: Chromium's own software adapter.
    "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan",
)  # fmt: skip
TOO_LONG = 60_000  # milliseconds


@dataclass
class Page:
    """An open page; `tab` is playwright's own, for everything else."""

    tab: Any
    errors: list[str] = field(default_factory=list)  # of the console, of scripts, of requests
    requests: list[str] = field(default_factory=list)  # addresses, in order

    def picture(self, path: Path) -> Path:
        """The whole page as a PNG, however long it is."""
        self.tab.screenshot(path=path, full_page=True)
        return path


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A running Chromium, as playwright's Browser."""
    playwright = pytest.importorskip("playwright.sync_api")
    if why := missing(PROGRAMS, PACKAGE):
        pytest.skip(why)
    program = next(filter(None, map(shutil.which, PROGRAMS)))
    with playwright.sync_playwright() as driver:
        try:
            running = driver.chromium.launch(executable_path=program, args=list(FLAGS))
        except playwright.Error as error:
            pytest.skip(f"{program} does not start: {str(error).splitlines()[0]}")
        yield running
        running.close()


@pytest.fixture
def browse(chromium: Any) -> Iterator[Callable[..., Page]]:
    """Opens pages: (path or URL, width, height, dark) -> Page; they are closed after the test."""
    contexts = []

    def visit(where: str | Path, width: int = 1280, height: int = 800, dark: bool = False) -> Page:
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
        )
        contexts.append(context)
        context.set_default_timeout(TOO_LONG)
        page = Page(context.new_page())
        _watch(page)
        page.tab.goto(where.absolute().as_uri() if isinstance(where, Path) else where)
        return page

    yield visit
    for context in contexts:
        context.close()


def _watch(page: Page) -> None:
    """Note whatever goes wrong, and every address that is asked for."""

    def said(message: Any) -> None:
        if message.type in ("error", "warning"):
            page.errors.append(f"{message.type}: {message.text}")

    page.tab.on("console", said)
    page.tab.on("pageerror", lambda error: page.errors.append(f"exception: {error}"))
    page.tab.on("requestfailed", lambda asked: page.errors.append(f"failed: {asked.url}"))
    page.tab.on("request", lambda asked: page.requests.append(asked.url))
