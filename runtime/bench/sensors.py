"""What the system shows beside the clock: energy, frequency, temperature, time that others took.

Every figure is None where there is no such file or it may not be read; `missing` says why.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ... import kernels
from ...kernels import Type

PROBE = 0.008  # seconds of the loop that shows the machine's own speed
SPINS = 60_000  # of the loop in Python where the native engine is not there


@dataclass(frozen=True)
class Reading:
    """Counters at a moment: joules and seconds since some start."""

    seconds: float
    energy: tuple[int, ...] | None = None  # microjoules by package, which begin anew at a limit
    watts: float | None = None  # of a battery that is being emptied
    waited: float | None = None  # of the threads of the process that draws, for a core
    stolen: float | None = None  # by the hypervisor, of all cores


@dataclass(frozen=True)
class Between:
    """What went by from a reading to another."""

    joules: float | None
    waited: float | None  # part of the time
    stolen: float | None


class Sensors:
    """Reads /sys and /proc below `root`; `source` says where energy is from, "" if nowhere."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._packages, self._limits, self.missing = self._find_energy()
        self._battery = None if self._packages else self._find_battery()
        self.source = "RAPL" if self._packages else "battery" if self._battery else ""
        if self.source:
            self.missing = ""
        self._ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100

    def read(self, pid: int | None = None) -> Reading:
        """Everything that counts; `pid` is the process that draws."""
        return Reading(
            time.perf_counter(),
            self._energy(),
            self._watts(),
            None if pid is None else self._waited(pid),
            self._stolen(),
        )

    def between(self, before: Reading, after: Reading, threads: int, cores: int) -> Between:
        """`threads` of the process could have waited, time of `cores` could have been stolen."""
        seconds = max(after.seconds - before.seconds, 1e-9)
        joules = None
        if before.energy and after.energy:
            pairs = zip(before.energy, after.energy, self._limits, strict=True)
            joules = sum((b - a) % limit for a, b, limit in pairs) / 1e6
        elif before.watts is not None and after.watts is not None:
            joules = (before.watts + after.watts) / 2 * seconds

        def part(a: float | None, b: float | None, of: int) -> float | None:
            return None if a is None or b is None else min(1.0, max(0.0, b - a) / (seconds * of))

        waited = part(before.waited, after.waited, threads)
        return Between(joules, waited, part(before.stolen, after.stolen, cores))

    def mhz(self) -> float | None:
        """The fastest core's clock now.  A guest's is what the hypervisor chose to say."""
        cpus = self._root / "sys/devices/system/cpu"
        found = [_number(p) for p in cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
        known = [value / 1000 for value in found if value]
        if not known:
            info = _text(self._root / "proc/cpuinfo")
            known = [float(m) for m in re.findall(r"^cpu MHz\s*: ([0-9.]+)$", info, re.MULTILINE)]
        return max(known, default=None)

    def celsius(self) -> float | None:
        """The hottest zone of the processor, or of all if none is said to be its."""
        zones = {
            _text(zone / "type").strip().lower(): _number(zone / "temp")
            for zone in (self._root / "sys/class/thermal").glob("thermal_zone*")
        }
        known = {k: v / 1000 for k, v in zones.items() if v is not None and 0 < v < 150_000}
        own = {k: v for k, v in known.items() if re.search("cpu|pkg|soc|core", k)}
        return max((own or known).values(), default=None)

    # --- counters -------------------------------------------------------------------------------

    def _find_energy(self) -> tuple[list[Path], list[int], str]:
        """Counters of whole packages; the parts of a package are in them already."""
        folder = self._root / "sys/class/powercap"
        found = sorted(p for p in folder.glob("*rapl:*") if p.name.count(":") == 1)
        if not found:
            return [], [], "this system shows no energy counter (RAPL) and no battery"
        limits = [_number(package / "max_energy_range_uj") for package in found]
        if any(_number(package / "energy_uj") is None for package in found) or not all(limits):
            return [], [], f"{found[0]}/energy_uj may be read by root only"
        return found, [int(limit) + 1 for limit in limits if limit], ""

    def _energy(self) -> tuple[int, ...] | None:
        values = [_number(package / "energy_uj") for package in self._packages]
        known = [int(value) for value in values if value is not None]
        return tuple(known) if known and len(known) == len(values) else None

    def _find_battery(self) -> Path | None:
        for supply in sorted((self._root / "sys/class/power_supply").glob("*")):
            if _text(supply / "type").strip() == "Battery" and self._power(supply) is not None:
                return supply
        return None

    def _watts(self) -> float | None:
        if self._battery is None or _text(self._battery / "status").strip() != "Discharging":
            return None
        return self._power(self._battery)

    def _power(self, supply: Path) -> float | None:
        power = _number(supply / "power_now")
        if power is not None:
            return abs(power) / 1e6
        current, voltage = _number(supply / "current_now"), _number(supply / "voltage_now")
        return None if current is None or voltage is None else abs(current * voltage) / 1e12

    def _waited(self, pid: int) -> float | None:
        """Seconds that the process's threads were ready and had no core."""
        total, seen = 0, False
        for task in (self._root / "proc" / str(pid) / "task").glob("[0-9]*"):
            fields = _text(task / "schedstat").split()
            if len(fields) == 3 and fields[1].isdecimal():
                total, seen = total + int(fields[1]), True
        return total / 1e9 if seen else None

    def _stolen(self) -> float | None:
        fields = _text(self._root / "proc/stat").split("\n", 1)[0].split()
        if len(fields) < 9 or fields[0] != "cpu" or not fields[8].isdecimal():
            return None
        return int(fields[8]) / self._ticks


def speed_probe(threads: int) -> Callable[[], float]:
    """A loop of bare arithmetic: its speed is the machine's own, whatever is measured beside it.

    FLOP/s of multiply-accumulates where the native engine is there, else additions of Python.
    """
    if kernels.available():
        isa = kernels.isas()[0]
        return lambda: kernels.ceiling(isa, Type.F32, threads, PROBE)

    def spin() -> float:
        total, began = 0, time.perf_counter()
        for i in range(SPINS):
            total += i
        return SPINS / (time.perf_counter() - began)

    return spin


def _number(path: Path) -> float | None:
    with contextlib.suppress(ValueError):
        return float(_text(path))
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
