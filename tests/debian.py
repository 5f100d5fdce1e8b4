"""Programs that tests take and pip does not install: Debian's packages, installed where allowed."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Sequence

TOO_LONG = 600  # seconds


@functools.cache
def missing(programs: Sequence[str], packages: str) -> str:
    """Why none of `programs` is here, or ""; first tries to install Debian's `packages`."""
    if any(map(shutil.which, programs)):
        return ""
    why = _install(packages.split())
    if any(map(shutil.which, programs)):
        return ""
    return f"no {' or '.join(programs)} (Debian: {packages}): {why}"


def _install(packages: Sequence[str]) -> str:
    """Why that was not possible, or ""."""
    if not shutil.which("apt-get"):
        return "there is no apt-get to install it with"
    if os.geteuid():
        return "only root may install it"
    # Workers may come here at once: each waits for the one before.
    apt = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300")
    install = (*apt, "install", "-y", "--no-install-recommends", *packages)
    for command in (install, (*apt, "update"), install):
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                text=True,
                timeout=TOO_LONG,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"apt-get did not end within {TOO_LONG} s"
        if command is install and not done.returncode:
            return ""
    return (done.stderr.strip().splitlines() or ["apt-get failed"])[-1]
