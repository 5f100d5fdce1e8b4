"""The code is formatted, linted and typed; the generated help page is fresh."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import ferrotype
from ferrotype.cli import main

ROOT = Path(ferrotype.__file__).parent


def run(*command, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    run("ruff", *command.split(), ".")


def test_mypy(tmp_path):
    # The checkout is the package, so mypy has to see it under the package's name.
    (tmp_path / "ferrotype").symlink_to(ROOT)
    cache = os.devnull if os.environ.get("CI") else str(ROOT / ".mypy_cache")
    config = str(ROOT / "pyproject.toml")
    run("mypy", "--config-file", config, "--cache-dir", cache, "-p", "ferrotype", cwd=tmp_path)


def test_clang_format():
    folders = ("kernels", "tests", "embed/c")
    sources = [p for f in folders for end in ("h", "cpp", "c") for p in ROOT.glob(f"{f}/*.{end}")]
    call = "import clang_format; clang_format.clang_format()"
    done = subprocess.run(
        [sys.executable, "-c", call, "--dry-run", "-Werror", *sources],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def help_page():
    """docs/cli.md: the help of every command, as it is printed."""
    parts = ["# The command line\n\nWritten by `python tests/test_lint.py`; a test compares.\n"]
    top = click.Context(main, info_name="ferrotype", terminal_width=88, **main.context_settings)
    for context in contexts(top):
        parts.append(f"## {context.command_path}\n\n```\n{context.get_help()}\n```\n")
    return "\n".join(parts)


def contexts(outer):
    """A command, and if it is a group all that it has."""
    yield outer
    for name, command in getattr(outer.command, "commands", {}).items():
        yield from contexts(click.Context(command, outer, name))


def test_the_help_page_is_fresh():
    assert (ROOT / "docs" / "cli.md").read_text() == help_page()


if __name__ == "__main__":
    (ROOT / "docs" / "cli.md").write_text(help_page())
