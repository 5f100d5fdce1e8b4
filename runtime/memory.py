"""How much memory there is, how much this process has, and what it had while something ran.

Three kinds are told apart everywhere: *anonymous* memory, which only the process can give back;
*file* pages, which the system may drop at any time, as of mapped weights; and the *peak* of both,
which the kernel keeps exactly where samples could miss it.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import re
import reprlib
import sys
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import FerrotypeError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MAX_BYTES = 1 << 50  # no budget is larger: it would be a typing error
UNITS = {
    "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
}  # fmt: skip
FORMAT, VERSION = "ferrotype-memory-trace", 1
STATUS_BYTES = 1 << 14  # of /proc/self/status, however many groups the user is in
UNLIMITED = 1 << 60  # control groups of version 1 say so with the largest number of pages
SHARE = Fraction(3, 4)  # of what is free: the rest is for whatever else starts meanwhile

# --- given back ---------------------------------------------------------------------------------


def trim() -> None:
    """Have the C library give freed memory back to the system, where it can be asked (glibc)."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


# --- amounts ------------------------------------------------------------------------------------


def parse_bytes(text: str) -> int:
    """Bytes of "512MiB", "1.5 GB" or "800m": KiB, MiB, GiB are 1024s; KB, MB, GB are 1000s.

    K, M and G alone are 1024s, as memory is sold.  Anything else is a ValueError.
    """
    shown = reprlib.repr(text)
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) *([a-z]*)", text.strip(" ").lower())
    if match and not match[2]:
        raise ValueError(f"{shown} has no unit: write KiB, MiB or GiB after it, for example 512MiB")
    if not match or match[2] not in UNITS:
        raise ValueError(
            f"{shown} is no amount of memory: write a number and KiB, MiB, GiB, KB, MB or GB, "
            "for example 512MiB or 1.5GiB"
        )
    count = int(Fraction(match[1]) * UNITS[match[2]])
    if not 1 <= count <= MAX_BYTES:
        limit = "less than a byte" if count < 1 else f"more than {format_bytes(MAX_BYTES)}"
        raise ValueError(f"{shown} is {limit}: write for example 512MiB or 1.5GiB")
    return count


def format_bytes(count: int, up: bool = False) -> str:
    """ "256 MiB", "1.25 GiB": three digits, rounded to the nearest, or up.

    What is rounded up is enough when parse_bytes reads it: write the least budget like that.
    """
    if count < 0:
        return f"-{format_bytes(-count)}"
    powers = {1: "B", KIB: "KiB", MIB: "MiB", GIB: "GiB"}
    unit = next((u for u in powers if _rounded(count, u, up) < 1024), GIB)
    digits = f"{float(_rounded(count, unit, up)):.2f}".rstrip("0").rstrip(".")
    return f"{digits} {powers[unit]}"


def _rounded(count: int, unit: int, up: bool) -> Fraction:
    """Of three digits, or whole."""
    scale = 10 ** _decimals(count, unit)
    exact = Fraction(count * scale, unit)
    return Fraction(math.ceil(exact) if up else round(exact), scale)


def _decimals(count: int, unit: int) -> int:
    """How many digits after the point make three in all."""
    if unit == 1 or count >= 100 * unit:
        return 0
    return 1 if count >= 10 * unit else 2


# --- this process -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """The resident bytes of this process; None where the system does not say."""

    anonymous: int | None  # the heap, stacks, private pages that were written
    file: int | None  # pages of mapped files: libraries, weights
    shared: int | None  # shared memory, which no file can bring back
    peak: int | None  # the most of all together since the start, or since reset_peak()

    @property
    def resident(self) -> int | None:
        """All together."""
        if self.anonymous is None or self.file is None:
            return None
        return self.anonymous + self.file + (self.shared or 0)


def read() -> Reading | None:
    """What this process has now; None where the system says nothing, as on Windows.

    Linux counts by core and adds up in batches, so each figure may be off by 128 KiB per core.
    """
    try:
        return _reading(_status())
    except OSError:
        return _reading_of_rusage()


def _status() -> bytes:
    """15 us, whatever the process has; smaps_rollup walks its pages and takes 9 ms for a GiB."""
    with open("/proc/self/status", "rb", buffering=0) as stream:
        return stream.read()


_LINES = re.compile(rb"^(VmHWM|RssAnon|RssFile|RssShmem):\s*([0-9]+) kB$", re.MULTILINE)


def _reading(status: bytes) -> Reading:
    found = {name: int(kib) * KIB for name, kib in _LINES.findall(status)}
    return Reading(*map(found.get, (b"RssAnon", b"RssFile", b"RssShmem", b"VmHWM")))


def _reading_of_rusage() -> Reading | None:
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else KIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Reading(None, None, None, peak * unit)


def reset_peak() -> bool:
    """Let the peak begin anew from what is resident now; False where that is impossible."""
    try:
        descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
        try:
            os.write(descriptor, b"5")
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


# --- the machine --------------------------------------------------------------------------------


def available() -> int | None:
    """Bytes that may be used without harm to others; None where the system does not say.

    Linux: what it calls available, and what the limits of all control groups above leave.
    """
    if sys.platform == "win32":
        return _available_to_windows()
    if sys.platform == "linux":
        return _available_to_linux(Path("/"))
    return _available_by_sysconf()


def default_budget() -> int | None:
    """Three quarters of what is available, so that the machine stays usable; None: unknown."""
    free = available()
    return None if free is None else int(free * SHARE)


def _available_to_linux(root: Path) -> int | None:
    meminfo = _text(root / "proc/meminfo")
    found = re.search(r"^MemAvailable:\s*([0-9]+) kB$", meminfo, re.MULTILINE)
    return min([*([int(found[1]) * KIB] if found else []), *_cgroup_rooms(root)], default=None)


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """What each limited control group above this process leaves; both versions may be there."""
    lines = re.findall(r"^[0-9]+:(.*?):(/.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    for controllers, path in lines:
        # Inside a container the path may be the host's: then only its last level is there, as root.
        levels = [PurePosixPath(path), *PurePosixPath(path).parents]
        for level in (str(level).lstrip("/") for level in levels):
            if not controllers:
                yield from _room_v2(root / "sys/fs/cgroup" / level)
                yield from _room_v2(root / "sys/fs/cgroup/unified" / level)
            elif "memory" in controllers.split(","):
                yield from _room_v1(root / "sys/fs/cgroup/memory" / level)


def _room_v2(group: Path) -> Iterator[int]:
    for name in ("memory.max", "memory.high"):  # above "high" the kernel slows the group down
        yield from _room(group, name, "memory.current", "inactive_file")


def _room_v1(group: Path) -> Iterator[int]:
    yield from _room(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _room(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    """The limit without what is in use; file pages that nobody needs now count as free."""
    most, used = _text(group / limit).strip(), _text(group / usage).strip()
    if not (most.isdecimal() and used.isdecimal()) or int(most) >= UNLIMITED:
        return
    found = re.search(rf"^{cache} ([0-9]+)$", _text(group / "memory.stat"), re.MULTILINE)
    yield max(0, int(most) - int(used) + (int(found[1]) if found else 0))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):  # the latter for a path or a text that is none
        return ""


def _available_by_sysconf() -> int | None:
    """Free pages; where only those built in are known, as on macOS, half of them."""
    names = os.sysconf_names
    if "SC_PAGE_SIZE" not in names or "SC_PHYS_PAGES" not in names:
        return None
    pages = os.sysconf("SC_PHYS_PAGES") // 2
    if "SC_AVPHYS_PAGES" in names:
        pages = os.sysconf("SC_AVPHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE")


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 5),
    ]


def _available_to_windows() -> int | None:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    kernel32 = getattr(ctypes, "windll").kernel32  # noqa: B009  # unknown to mypy elsewhere
    return status.available if kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None


# --- a trace ------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """Memory at a moment, in bytes over that of the trace's beginning: may be below zero."""

    seconds: float
    anonymous: int  # with shared memory, which is as much the process's own
    file: int
    label: str  # of the stage that runs; "" before the first mark


@dataclass(frozen=True)
class Stage:
    """What ran from one mark to the next."""

    label: str  # "" for what came before the first mark
    step: int | None
    start: float  # seconds
    end: float
    peak: int | None  # anonymous and file together, by the kernel; None where it cannot say

    @property
    def name(self) -> str:
        return self.label if self.step is None else f"{self.label} {self.step}"


@dataclass(frozen=True)
class Recording:
    """What a Trace saw; plateaus are kept by their ends."""

    samples: tuple[Sample, ...]
    stages: tuple[Stage, ...]  # each begins where the one before ends
    baseline: tuple[int, int]  # bytes when the trace began: anonymous, file
    interval: float  # seconds between samples
    budget: int | None
    plan: dict[str, Any] | None  # what was predicted, as the caller described it
    machine: dict[str, Any]

    @property
    def marked(self) -> tuple[Stage, ...]:
        """The stages that were marked: all but what came before the first mark."""
        return tuple(stage for stage in self.stages if stage.label)

    @property
    def peak(self) -> int:
        """The most bytes over the baseline, anonymous and file together."""
        exact = (stage.peak for stage in self.stages if stage.peak is not None)
        return max(*(s.anonymous + s.file for s in self.samples), *exact, 0)

    @property
    def peak_anonymous(self) -> int:
        """The most anonymous bytes that a sample saw: no kernel keeps this figure."""
        return max(sample.anonymous for sample in self.samples)

    @property
    def exact(self) -> bool:
        """Whether the peak is the kernel's, not only the highest sample."""
        return all(stage.peak is not None for stage in self.stages)

    def to_json(self) -> str:
        """Strict JSON that from_json reads back."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "machine": self.machine,
            "interval": self.interval,
            "baseline": self.baseline,
            "budget": self.budget,
            "plan": self.plan,
            "stages": [[s.label, s.step, s.start, s.end, s.peak] for s in self.stages],
            "samples": [sample[:3] for sample in self.samples],
        }
        return json.dumps(head, allow_nan=False, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Recording:
        """The recording that to_json wrote; else a ValueError that says in one line what is wrong.

        Labels of samples follow from the stages.
        """
        from ..bundle import strict_json

        try:
            return _recording(strict_json(text))
        except RecursionError:
            raise ValueError("not a memory trace: it is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"not a memory trace: {error}") from None


class TraceError(FerrotypeError):
    """This system does not tell what a process has in memory."""


class Trace:
    """Samples this process's memory on a thread from entering to leaving; see `recording` then.

    with Trace(budget=512 << 20) as trace:
        trace.mark("text_encoder")
        ...
        trace.mark("unet", step=1)

    Marks also make the kernel's peak begin anew, so that each stage has its own exact one, even
    where a call that holds the interpreter's lock keeps samples from being taken.  That peak is
    the process's: two traces at once would spoil each other's.
    """

    def __init__(
        self,
        plan: Mapping[str, Any] | None = None,
        budget: int | None = None,
        interval: float = 0.005,
    ) -> None:
        if not 0 < interval < 3600:
            raise ValueError(f"interval {interval!r} is not a number of seconds above 0, as 0.005")
        # Copied by way of JSON, so that what cannot be saved fails before the run, not after it.
        self._plan = None if plan is None else json.loads(json.dumps(dict(plan), allow_nan=False))
        self._budget = budget
        self._interval = interval

    def __enter__(self) -> Trace:
        if (now := read()) is None or now.resident is None:
            raise TraceError(
                f"{platform.system()} does not say how much memory a process has, "
                "so there is no trace: run it on Linux, or without one"
            )
        self._status = open("/proc/self/status", "rb", buffering=0)
        self._lock = threading.Lock()
        self._stop, warm = threading.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(warm,), name="ferrotype-memory", daemon=True
        )
        try:
            self._begin(warm)
        except BaseException:  # __exit__ is not called for an interrupt in here
            self._end()
            raise
        return self

    def _begin(self, warm: threading.Event) -> None:
        with self._lock:
            self._thread.start()
            warm.wait()  # the thread's own stack and heap belong to the baseline
            self._exact = reset_peak()
            self._base = self._counts()
            self._rows = array("q", [0, 0, 0])  # nanoseconds, anonymous, file; and so on
            self._stages = [Stage("", None, 0.0, 0.0, None)]
            self._started = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        try:
            with self._lock:
                self._close(*self._sample())
                self._stop.set()  # no sample comes after it
        finally:
            self._end()

    def _end(self) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()
        else:  # it could not begin
            self._status.close()

    def mark(self, label: str, step: int | None = None) -> None:
        """A stage begins, and the one before ends."""
        if not label or not label.isprintable():
            raise ValueError(f"{label!r} is no label: it must be printable text")
        if step is not None and (type(step) is not int or step < 0):
            raise ValueError(f"step {step!r} is not a whole number from 0")
        with self._lock:
            seconds, counts = self._sample()
            self._close(seconds, counts)
            self._rows.extend(self._rows[-3:])  # that plateau ends, and a new one begins
            self._stages.append(Stage(label, step, seconds, seconds, None))
            self._exact = self._exact and reset_peak()

    @property
    def recording(self) -> Recording:
        """What was seen, until now if the trace still runs."""
        with self._lock:
            if not self._stop.is_set():
                self._close(*self._sample())
            stages = tuple(self._stages)
            rows = self._rows[:]
        points = [(t / 1e9, a, f) for t, a, f in zip(*(rows[i::3] for i in range(3)), strict=True)]
        return Recording(
            _labelled(points, stages),
            stages,
            self._base[:2],
            self._interval,
            self._budget,
            self._plan,
            _machine(),
        )

    def _run(self, warm: threading.Event) -> None:
        with self._status:
            self._counts()
            warm.set()
            while not self._stop.wait(self._interval):
                with self._lock:
                    if not self._stop.is_set():
                        self._sample()

    def _sample(self) -> tuple[float, _Counts]:
        counts = self._counts()
        elapsed = time.perf_counter_ns() - self._started
        self._add(elapsed, counts.anonymous - self._base.anonymous, counts.file - self._base.file)
        return elapsed / 1e9, counts

    def _counts(self) -> _Counts:
        """A file kept open is read in half the time."""
        now = _reading(os.pread(self._status.fileno(), STATUS_BYTES, 0))
        anonymous = (now.anonymous or 0) + (now.shared or 0)
        return _Counts(anonymous, now.file or 0, now.peak or 0)

    def _add(self, *row: int) -> None:
        """Remember a sample; in the middle of a plateau it takes the place of the last.

        Either is one call, so that no interrupt leaves half of a row.
        """
        if tuple(self._rows[-2:]) == tuple(self._rows[-5:-3]) == row[1:]:
            self._rows[-3] = row[0]
        else:
            self._rows.extend(row)

    def _close(self, seconds: float, counts: _Counts) -> None:
        """The last stage ends now, or at least not before."""
        peak = counts.peak - sum(self._base[:2]) if self._exact else None
        self._stages[-1] = replace(self._stages[-1], end=seconds, peak=peak)


class _Counts(NamedTuple):
    """A Reading as a trace needs it."""

    anonymous: int
    file: int
    peak: int


def _labelled(
    points: Sequence[tuple[float, int, int]], stages: Sequence[Stage]
) -> tuple[Sample, ...]:
    """Samples with the label of the stage that they fall into; a mark's is the new stage's."""
    samples, current = [], 0
    for seconds, anonymous, file in points:
        while current + 1 < len(stages) and seconds >= stages[current + 1].start:
            current += 1
        samples.append(Sample(seconds, anonymous, file, stages[current].label))
    return tuple(samples)


def _machine() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)  # fewer than there are in a container
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
    }


# --- reading a recording ------------------------------------------------------------------------

KEYS = {
    "format", "version", "machine", "interval", "baseline", "budget", "plan", "stages", "samples",
}  # fmt: skip


def _recording(raw: Any) -> Recording:
    """A recording from parsed JSON; ValueError names the first thing that does not fit."""
    if not isinstance(raw, dict):
        raise ValueError(f"it is {reprlib.repr(raw)}, not an object")
    found = raw.get("format"), raw.get("version")
    if found != (FORMAT, VERSION) or type(found[1]) is not int:  # first: newer ones have other keys
        raise ValueError(f"it is {reprlib.repr(found)}, we read {(FORMAT, VERSION)}")
    if wrong := sorted(raw.keys() ^ KEYS):
        raise ValueError(f"key {wrong[0][:40]!r} is {'unknown' if wrong[0] in raw else 'missing'}")
    stages = tuple(_stage(row) for row in _list("stages", raw["stages"], 5))
    points = [_point(row) for row in _list("samples", raw["samples"], 3)]
    _check_order(points, stages)
    [(anonymous, file)] = _list("baseline", [raw["baseline"]], 2)
    return Recording(
        _labelled(points, stages),
        stages,
        (_whole("baseline", anonymous, 0), _whole("baseline", file, 0)),
        _seconds(raw["interval"]),
        None if raw["budget"] is None else _whole("budget", raw["budget"], 1),
        None if raw["plan"] is None else _dict("plan", raw["plan"]),
        _dict("machine", raw["machine"]),
    )


def _stage(row: Sequence[Any]) -> Stage:
    label, step, start, end, peak = row
    if not isinstance(label, str) or not (label == "" or label.isprintable()):
        raise ValueError(f"{reprlib.repr(label)} is no label of a stage")
    return Stage(
        label,
        None if step is None else _whole("step", step, 0),
        _seconds(start),
        _seconds(end),
        None if peak is None else _whole("peak", peak),
    )


def _point(row: Sequence[Any]) -> tuple[float, int, int]:
    seconds, anonymous, file = row
    return _seconds(seconds), _whole("anonymous", anonymous), _whole("file", file)


def _check_order(points: Sequence[tuple[float, int, int]], stages: Sequence[Stage]) -> None:
    """Time runs forward, and each stage begins where the one before ends."""
    if any(b[0] < a[0] for a, b in pairwise(points)):
        raise ValueError("its samples run back in time")
    if any(stage.end < stage.start for stage in stages):
        raise ValueError("a stage of it ends before it starts")
    if any(a.end != b.start for a, b in pairwise(stages)):
        raise ValueError("a stage of it does not start where the one before ends")
    if any((stage.label == "") != (index == 0) for index, stage in enumerate(stages)):
        raise ValueError("its first stage, and no other, has an empty label")


def _list(name: str, value: Any, width: int) -> list[Any]:
    """At least one list of `width` entries."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} are {reprlib.repr(value)}, not a list")
    for row in value:
        if not isinstance(row, list) or len(row) != width:
            raise ValueError(f"{reprlib.repr(row)} in {name} is no list of {width}")
    return value


def _dict(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {reprlib.repr(value)}, not an object")
    return value


def _whole(name: str, value: Any, least: int = -MAX_BYTES) -> int:
    if type(value) is not int or not least <= value <= MAX_BYTES:
        raise ValueError(f"{name} is {reprlib.repr(value)}, not a whole number in its range")
    return value


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{reprlib.repr(value)} is not a number of seconds")
    return float(value)
