"""The JavaScript library's folder, and Node to run it with."""

import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest

import ferrotype

EMBED = Path(ferrotype.__file__).parent / "embed" / "js"


def run(*command, **options):
    done = subprocess.run(
        command, cwd=EMBED, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="session")
def npm():
    """Node, and what package-lock.json names; processes that come here at once wait in turn."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node and npm are not installed")
    if int(run("node", "-p", "parseInt(process.versions.node)")) < 20:
        pytest.skip("node is older than 20")
    lock, done = EMBED / "package-lock.json", EMBED / "node_modules" / ".package-lock.json"
    with lock.open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not done.is_file() or done.stat().st_mtime < lock.stat().st_mtime:
            found = subprocess.run(
                ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                cwd=EMBED, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if found.returncode:
                pytest.skip(f"npm ci does not work here: {found.stderr.strip()[-200:]}")
            done.touch()
