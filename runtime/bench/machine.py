"""What this machine is: processor, instructions, memory, system, versions.  No names of people."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path

from ... import kernels
from ..._version import __version__
from ..engines.native import cores
from .results import MAX_TEXT, Machine
from .sensors import Sensors

UNITS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",  # as Linux spells them
    "asimd", "asimddp", "i8mm", "bf16",
)  # fmt: skip
PACKAGES = ("numpy", "onnxruntime")


def describe(
    name: str | None = None, root: Path = Path("/"), packages: Sequence[str] = ()
) -> Machine:
    """This machine; `name` is what to call it, else its processor.  `root`: of /proc and /sys."""
    info = _text(root / "proc/cpuinfo")
    processor = cpu(info)
    governor = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    return Machine(
        name=_plain(name or processor),
        cpu=_plain(processor),
        system=_plain(f"{platform.system()} {release()} {platform.machine()}"),
        cores=cores(),
        units=tuple(unit for unit in UNITS if unit in flags(info)),
        memory_bytes=memory_bytes(),
        virtual="hypervisor" in flags(info) if info else None,
        governor=_plain(governor) or None,
        energy=Sensors(root).source or None,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        versions=versions(packages),
    )


def release() -> str:
    """Of the system, without what a vendor added to the number."""
    found = re.match(r"[0-9]+(?:\.[0-9]+)?", platform.release())
    return found[0] if found else platform.release()


def cpu(info: str) -> str:
    """The processor's name as the system has it; `info` is the text of /proc/cpuinfo."""
    found = re.search(r"^model name\s*: (.+)$", info, re.MULTILINE)
    if found:
        return found[1].strip()
    if sys.platform == "darwin":
        asked = ("sysctl", "-n", "machdep.cpu.brand_string")
        return _output(*asked) or platform.processor() or platform.machine()
    return platform.processor() or platform.machine() or "CPU"


def flags(info: str) -> list[str]:
    """The features of the first core in the text of /proc/cpuinfo."""
    found = re.search(r"^(?:flags|Features)\s*: (.+)$", info, re.MULTILINE)
    return found[1].split() if found else []


def memory_bytes() -> int | None:
    """Of the machine; None where the system does not say."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PAGE_SIZE" not in names or "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Of Python, of what draws, and of the native engine's best instruction set."""
    found = {"ferrotype": _own_version(), "python": platform.python_version()}
    found |= {p: v for p in (*PACKAGES, *packages) if (v := package_version(p))}
    if kernels.available():
        found["native"] = kernels.isas()[0]
    return found


def package_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return version_of(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Of the checkout that this is; "" if it is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    return _output("git", "-C", str(root), "describe", "--always", "--dirty")


def _own_version() -> str:
    found = commit()
    return f"{__version__} ({found})" if found else __version__


def _output(*command: str) -> str:
    """What a program of the system says; "" if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_TEXT].strip()
