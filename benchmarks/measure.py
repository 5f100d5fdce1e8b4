"""What every benchmark shares: the machine's description, and a process measured from outside."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ferrotype.runtime.bench import machine

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measured:
    """One finished process: seconds, and the highest memory seen, in MiB."""

    seconds: float
    peak: float  # resident, of the whole process: the kernel's own high-water mark
    anonymous: float  # of it private to the process, without mapped files; sampled every 10 ms
    stdout: str


def run(*command: str, cwd: Path | None = None) -> Measured:
    """Run a command to its end; raises CalledProcessError with its stderr if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak = anonymous = 0.0
    while process.poll() is None:
        now = status(process.pid)
        peak = max(peak, now.get("VmHWM", 0.0))
        anonymous = max(anonymous, now.get("RssAnon", 0.0))
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    out, err = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return Measured(seconds, peak, anonymous, out)


def ferrotype(*arguments: str) -> tuple[str, ...]:
    """The command line of this very installation."""
    return (sys.executable, "-c", "from ferrotype.cli import main; main()", *arguments)


def status(pid: int | str = "self") -> dict[str, float]:
    """The memory lines of a process in MiB, by the kernel's names; empty once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.rstrip().endswith(" kB"))
    return {key: int(value.split()[0]) / 1024 for key, value in pairs}


def describe(*packages: str) -> str:
    """Machine, threads, commit and versions, for the top of a result."""
    versions = ", ".join(
        f"{p} {machine.package_version(p) or 'missing'}" for p in (*machine.PACKAGES, *packages)
    )
    memory = (machine.memory_bytes() or 0) / 2**30
    return (
        f"{_cpu()}, {os.cpu_count()} cores, {memory:.0f} GiB; {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}; {versions}; "
        f"commit {machine.commit() or 'unknown'}"
    )


def _cpu() -> str:
    """The processor's kind and its vector units, as the kernel lists them."""
    found = machine.describe()
    return f"{found.cpu} ({', '.join(found.units) or platform.machine()})"
