"""The tests that open pages, in a process of their own: see browser.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_pages_in_a_browser(tmp_path):
    """Runs what is marked browser; a run in which something was skipped says so here."""
    options = ["-m", "browser", "-n", "0", "-q", "-p", "no:cacheprovider", "--basetemp"]
    command = (sys.executable, "-m", "pytest", *options, str(tmp_path / "pages"), str(HERE))
    others = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=HERE.parent, env=others, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert re.search(r"\d+ (passed|skipped)", done.stdout), done.stdout
    if skipped := re.findall(r"^SKIPPED \[\d+\] (.*)", done.stdout, re.MULTILINE):
        pytest.skip("; ".join(skipped))
