"""What a run found: one JSON object of a fixed form, whoever wrote it.  Format: docs/bench.md."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...bundle import read_fields, strict_json
from ...errors import FerrotypeError

FORMAT, VERSION = "ferrotype-bench", 1
MAX_BYTES = 64 << 20  # of a file
MAX_TEXT = 300  # letters of a name
MAX_SAMPLES = 100_000
MAX_SECONDS = 1e7
LEAST, MOST = 1e-9, 1e30  # of any figure that is not 0
STAGES = ("load", "text_encoder", "text_encoder_2", "unet", "vae_decoder", "other")  # as shown
STOPPED = ("interval", "seconds", "rounds", "interrupted", "failed")
NEEDED = ("variants", "samples", "stages")  # also where they are empty


class ResultError(FerrotypeError):
    """What was given as a result is none, or of another version.  The message says where."""


@dataclass(frozen=True)
class Machine:
    """What was measured on.  `name` is what the device is called in plots and tables."""

    name: str
    cpu: str
    system: str
    cores: int  # that the process may use
    units: tuple[str, ...] = ()  # vector instructions that matter here
    memory_bytes: int | None = None
    virtual: bool | None = None  # a guest of a hypervisor, which may take time away
    governor: str | None = None  # of the clock
    energy: str | None = None  # where it is from: RAPL, battery
    load: float | None = None  # average of the last minute, before
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _texts(name=self.name, cpu=self.cpu, system=self.system, **_named("units", self.units))
        _texts(**{f"versions.{k[:40]}": v for k, v in self.versions.items()})
        _require(1 <= self.cores <= 1 << 20, f"cores is {self.cores}")


@dataclass(frozen=True)
class Protocol:
    """How it was measured: rounds, what ended them, and the confidence of every interval."""

    rounds: int
    warmup: int
    confidence: float
    stopped: str
    elapsed: float  # seconds, warm-up included
    restart: int | None = None  # rounds after which processes begin anew
    target: float | None = None  # half of the interval's width, as a part of the median
    limit: float | None = None  # seconds
    seed: int | None = None  # of the order within rounds

    def __post_init__(self) -> None:
        _require(self.stopped in STOPPED, f"stopped is {self.stopped[:40]!r}, not of "
                 f"{', '.join(STOPPED)}")  # fmt: skip
        _require(0 < self.confidence < 1, f"confidence is {self.confidence:g}")
        _require(0 <= self.rounds <= MAX_SAMPLES, f"rounds is {self.rounds}")


@dataclass(frozen=True)
class Sample:
    """One picture.  Seconds by stage, a U-Net step each; None where the system does not tell."""

    round: int
    start: float  # seconds since the run began
    seconds: float
    stages: dict[str, tuple[float, ...]]
    mhz: float | None = None  # the fastest core's clock
    celsius: float | None = None
    joules: float | None = None
    speed: float | None = None  # FLOP/s of a bare loop right before: the machine itself
    waited: float | None = None  # part of the time that its threads waited for a core
    stolen: float | None = None  # part of the time that a hypervisor took

    def __post_init__(self) -> None:
        _require(LEAST <= self.seconds < MAX_SECONDS, f"seconds is {self.seconds:g}")
        _require(0 <= self.start < MAX_SECONDS, f"start is {self.start:g}")
        for stage, times in self.stages.items():
            _texts(stage=stage)
            good = len(times) <= 1000 and all(0 <= t < MAX_SECONDS for t in times)
            _require(good, f"stages.{stage} are no times")
        for name in ("mhz", "joules", "speed", "waited", "stolen"):
            _figure(name, getattr(self, name) or 0.0)
        _require(abs(self.celsius or 0) < 1e4, f"celsius is {self.celsius}")


@dataclass(frozen=True)
class StageMemory:
    """The most bytes of a stage above the process before it: as planned, in all, by kind."""

    stage: str
    predicted: int | None = None
    peak: int | None = None
    anonymous: int | None = None
    file: int | None = None

    def __post_init__(self) -> None:
        _texts(stage=self.stage)


@dataclass(frozen=True)
class Timeline:
    """Memory while one picture was drawn, apart from those that are timed.

    Stages are (name, start, end) in seconds, samples (seconds, anonymous bytes, file bytes).
    """

    stages: tuple[tuple[str, float, float], ...]
    samples: tuple[tuple[float, int, int], ...]

    def __post_init__(self) -> None:
        _require(len(self.samples) <= MAX_SAMPLES, f"{len(self.samples)} samples are too many")
        _texts(**_named("stages", [stage for stage, _, _ in self.stages]))


@dataclass(frozen=True)
class Quality:
    """How near to its original a bundle draws, from its own report; dB."""

    mean_psnr: float
    worst_psnr: float

    def __post_init__(self) -> None:
        good = max(abs(self.mean_psnr), abs(self.worst_psnr)) < 1e4
        _require(good, "mean_psnr or worst_psnr is no quality in dB")


@dataclass(frozen=True)
class OpTime:
    """Ops of one kind and shape in a picture."""

    component: str
    op: str
    count: int
    seconds: float
    flop: float
    bytes: float
    ceiling: float | None = None  # FLOP/s

    def __post_init__(self) -> None:
        _texts(component=self.component, op=self.op)
        for name in ("seconds", "flop", "bytes", "ceiling"):
            _figure(name, getattr(self, name) or 0.0)

    @property
    def share(self) -> float | None:
        """Of the ceiling that was reached; None for what does not multiply."""
        if not self.ceiling or not self.flop or not self.seconds:
            return None
        return self.flop / self.seconds / self.ceiling


@dataclass(frozen=True)
class Variant:
    """One of what was compared, with everything measured of it."""

    name: str
    engine: str
    model: str
    samples: tuple[Sample, ...]
    weights: str = ""
    activations: str = ""
    bundle_sha256: str | None = None
    bundle_bytes: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    starts: tuple[float, ...] = ()  # seconds from a fresh process to ready, by process
    firsts: tuple[float, ...] = ()  # seconds of the first picture of each process, not in samples
    predicted_peak: int | None = None
    memory: tuple[StageMemory, ...] = ()
    timeline: Timeline | None = None
    quality: Quality | None = None
    profile: tuple[OpTime, ...] = ()
    error: str | None = None  # why it ended early

    def __post_init__(self) -> None:
        _texts(name=self.name, engine=self.engine, model=self.model, weights=self.weights)
        _texts(activations=self.activations, error=self.error or "")
        if self.bundle_sha256 is not None:
            _require(re.fullmatch("[0-9a-f]{64}", self.bundle_sha256), "bundle_sha256 is no hash")
        _require(len(self.samples) <= MAX_SAMPLES, f"{len(self.samples)} samples are too many")
        good = all(0 <= t < MAX_SECONDS for t in (*self.starts, *self.firsts))
        _require(good, "starts or firsts are no times")
        for key, value in self.settings.items():
            _texts(setting=key)
            plain = value is None or type(value) in (str, int, float, bool)
            _require(plain, f"settings.{key} is neither text nor a number")
            _texts(**{f"settings.{key}": str(value)})

    @property
    def totals(self) -> list[float]:
        return [sample.seconds for sample in self.samples]

    def stage(self, name: str) -> list[float]:
        """Seconds of a stage in every picture that has it, all its runs together."""
        return [sum(s.stages[name]) for s in self.samples if name in s.stages]

    @property
    def unet_steps(self) -> list[list[float]]:
        """Seconds of every picture's steps; what guidance runs twice is two."""
        return [list(s.stages["unet"]) for s in self.samples if "unet" in s.stages]

    @property
    def peak(self) -> int | None:
        """The most bytes of any stage."""
        return max((m.peak for m in self.memory if m.peak is not None), default=None)

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same work in another result."""
        return self.model, self.weights, self.activations, tuple(sorted(
            (k, v) for k, v in self.settings.items() if k not in ("isa", "threads")
        ))  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A run: one machine, one protocol, the variants that took turns; the first is the baseline."""

    id: str
    created: str  # UTC, as 2026-11-26T08:30:00Z
    tool: str
    machine: Machine
    protocol: Protocol
    variants: tuple[Variant, ...]
    command: str = ""
    format: str = FORMAT
    version: int = VERSION

    def __post_init__(self) -> None:
        _require(re.fullmatch("[0-9a-f]{8,64}", self.id), "id is not of 8 to 64 digits 0-9a-f")
        date = r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-6][0-9]Z"
        _require(re.fullmatch(date, self.created), "created is not as 2026-11-26T08:30:00Z")
        _texts(tool=self.tool)
        plain = self.command.isprintable() or not self.command
        _require(plain and len(self.command) <= 4000, "command is too long or not printable")
        names = [variant.name for variant in self.variants]
        _require(names, "there are no variants")
        _require(len(set(names)) == len(names), "two variants have the same name")

    @property
    def measured(self) -> tuple[Variant, ...]:
        """The variants that have samples."""
        return tuple(variant for variant in self.variants if variant.samples)


def dumps(result: Result) -> str:
    """Strict JSON that loads reads back; what is not known is left out."""
    return json.dumps(_known(dataclasses.asdict(result)), allow_nan=False) + "\n"


def loads(text: str, where: str = "the result") -> Result:
    """The result that dumps, or another program, wrote; ResultError says what is wrong in it."""
    try:
        raw = strict_json(text)
        if not isinstance(raw, dict):
            raise ValueError("it is no object")
        found = raw.get("format"), raw.get("version")
        if found != (FORMAT, VERSION) or type(found[1]) is not int:  # first: newer ones differ
            told = " ".join(str(part)[:40] for part in found)
            raise ValueError(f"it is {told}, this reads {FORMAT} {VERSION}")
        return read_fields(Result, raw, "")
    except RecursionError:
        raise ResultError(f"{where} is not a benchmark's: it nests too deeply") from None
    except (ValueError, TypeError) as error:
        raise ResultError(f"{where} is not a benchmark's: {error}") from None


def load(path: Path) -> Result:
    """Read a file; its size is looked at before."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ResultError(f"{path} has {size:,} bytes: no result has more than {MAX_BYTES:,}")
        return loads(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ResultError(f"{path} is not a benchmark's: it is no UTF-8 text") from None
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror or error}") from None


def _known(value: Any) -> Any:
    """Without fields that are None or empty, and floats of nine digits: a clock has no more."""
    if isinstance(value, dict):
        kept = {k: _known(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if k in NEEDED or v not in (None, {}, [])}
    if isinstance(value, (list, tuple)):
        return [_known(entry) for entry in value]
    return float(f"{value:.9g}") if type(value) is float else value


def _named(name: str, values: Iterable[str]) -> Mapping[str, str]:
    return {f"{name}[{i}]": value for i, value in enumerate(values)}


def _texts(**texts: str) -> None:
    """Text is printable and not endless: it goes to terminals and into pages."""
    for name, text in texts.items():
        good = len(text) <= MAX_TEXT and (text.isprintable() or not text)
        _require(good, f"{name} is no printable text of at most {MAX_TEXT} letters")


def _figure(name: str, value: float) -> None:
    """What is measured is 0 or of a size that can be reckoned with."""
    _require(value == 0 or LEAST <= value <= MOST, f"{name} is {value:g}")


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)


def as_rows(result: Result) -> list[dict[str, Any]]:
    """A row per picture and stage, for tables of other programs."""
    rows = []
    for variant in result.variants:
        head = {
            "result": result.id, "created": result.created, "machine": result.machine.name,
            "variant": variant.name, "engine": variant.engine, "model": variant.model,
            "weights": variant.weights, "activations": variant.activations,
            **{f"setting_{k}": v for k, v in variant.settings.items()},
        }  # fmt: skip
        for sample in variant.samples:
            more = {
                k: getattr(sample, k)
                for k in ("start", "mhz", "celsius", "joules", "speed", "waited", "stolen")
            }
            parts = [("total", 0, sample.seconds)]
            parts += [(n, i, s) for n, times in sample.stages.items() for i, s in enumerate(times)]
            for stage, index, seconds in parts:
                rows.append({
                    **head, "round": sample.round, "stage": stage, "index": index,
                    "seconds": seconds, **more,
                })  # fmt: skip
    return rows
