"""Results as tables of text: for the terminal, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..memory import MIB
from . import verdict
from .results import STAGES, OpTime, Result, Variant
from .run import machine_text
from .statistics import Interval, median, median_interval

TITLES = {
    "load": "load", "text_encoder": "text encoder", "text_encoder_2": "second text encoder",
    "unet": "U-Net", "vae_encoder": "VAE encoder", "vae_decoder": "VAE", "other": "other",
}  # fmt: skip
LISTED = 12  # ops of a profile that are shown by themselves


@dataclass(frozen=True)
class Table:
    """A head and rows of text; columns after the first `texts` are figures, aligned right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1

    @property
    def turned(self) -> Table:
        """Rows as columns: narrower where there are few rows."""
        head, *rows = zip(self.head, *self.rows, strict=True)
        return Table(head, tuple(rows))

    def only(self, *columns: str) -> Table:
        """Those columns, of which the first is text."""
        places = [self.head.index(name) for name in columns]
        rows = tuple(tuple(row[i] for i in places) for row in self.rows)
        return Table(columns, rows)

    def markdown(self) -> str:
        lines = [
            self.head,
            ["---" if i < self.texts else "---:" for i in range(len(self.head))],
            *self.rows,
        ]
        return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def duration(seconds: float) -> str:
    """Three digits: 1.23 s, 45.6 ms, 789 us."""
    if not math.isfinite(seconds):
        return "-"
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit * 0.9995:
            return f"{_digits(seconds / unit)} {name}"
    return f"{_digits(seconds / 1e-6)} us"


def on_axis(high: float) -> Callable[[float], str]:
    """How durations are written along an axis up to `high`: all in one unit."""
    unit, name = next((u for u in ((1.0, "s"), (1e-3, "ms")) if high >= u[0]), (1e-6, "us"))
    return lambda seconds: f"{seconds / unit:g} {name}" if seconds else "0"


def _digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{decimals}f}"


def mib(count: int | None) -> str:
    return "-" if count is None else f"{count / MIB:,.1f} MiB"


def bounds(interval: Interval) -> str:
    """From the low to the high bound; "-" if there are too few values."""
    if not math.isfinite(interval.high):
        return "-"
    low, high = duration(interval.low), duration(interval.high)
    number, unit = low.split()
    return f"{number if high.endswith(f' {unit}') else low} to {high}"


def stages_of(result: Result) -> list[str]:
    """Those that any variant has, in the order of a picture."""
    seen = {name for v in result.variants for s in v.samples for name in s.stages}
    return [name for name in (*STAGES, *sorted(seen - set(STAGES))) if name in seen]


def summary(result: Result) -> Table:
    """A row per variant: the picture, its stages, memory, and how it compares."""
    stages = stages_of(result)
    energy = any(s.joules is not None for v in result.variants for s in v.samples)
    head = ["", "picture", interval_title(result), *(stage_title(s) for s in stages)]
    peaks = any(v.peak is not None for v in result.variants)
    head += ["memory"] if peaks else []
    head += ["energy"] if energy else []
    found = {v.other: v for v in verdict.verdicts(result)}
    head += ["to the first"] if found else []
    rows = []
    for variant in result.variants:
        if not variant.samples:
            rows.append((variant.name, *("-" for _ in head[1:])))
            continue
        total = median_interval(variant.totals, result.protocol.confidence)
        row = [variant.name, duration(total.middle), bounds(total)]
        row += [_stage(variant, stage) for stage in stages]
        row += [mib(variant.peak)] if peaks else []
        row += [joules(variant)] if energy else []
        if found:
            one = found.get(variant.name)
            row += [verdict.times(one.ratio) if one else "1.00x"]
        rows.append(tuple(row))
    return Table(tuple(head), tuple(rows))


def interval_title(result: Result) -> str:
    return f"{result.protocol.confidence:.0%} interval"


def stage_title(stage: str) -> str:
    return "U-Net step" if stage == "unet" else TITLES.get(stage, stage)


def _stage(variant: Variant, stage: str) -> str:
    """The median of a stage; of the U-Net that of a step."""
    times = stage_times(variant, stage)
    return duration(median(times)) if times else "-"


def stage_times(variant: Variant, stage: str) -> list[float]:
    """Seconds of every run of a stage that repeats, else of the stage in every picture."""
    if stage == "unet":
        return [seconds for steps in variant.unet_steps for seconds in steps]
    return variant.stage(stage)


def joules(variant: Variant) -> str:
    known = energies(variant)
    return f"{median(known):,.3g} J" if known else "-"


def energies(variant: Variant) -> list[float]:
    """Joules of every picture where the system showed them."""
    return [s.joules for s in variant.samples if s.joules is not None]


def memory(result: Result) -> Table:
    """A row per variant and stage."""
    rows = [
        (v.name, TITLES.get(m.stage, m.stage),
         mib(m.predicted), mib(m.peak), mib(m.anonymous), mib(m.file))
        for v in result.variants for m in v.memory
    ]  # fmt: skip
    head = ("", "stage", "predicted", "peak", "of it anonymous", "file-backed")
    return Table(head, tuple(rows), texts=2)


def comparison(found: Sequence[verdict.Verdict]) -> Table:
    """Verdicts of two results."""
    rows = [(f"{v.other} to {v.base}", v.word, verdict.times(v.ratio)) for v in found]
    return Table(("", "verdict", "time"), tuple(rows), texts=2)


def profile(found: Sequence[OpTime]) -> Table:
    """Ops that take longest, the others together."""
    total = sum(entry.seconds for entry in found) or 1.0
    rows = [_op_row(entry, total) for entry in found[:LISTED]]
    rest = found[LISTED:]
    if rest:
        seconds = sum(entry.seconds for entry in rest)
        count = sum(entry.count for entry in rest)
        rows.append(("the others", "", str(count), duration(seconds), f"{seconds / total:.0%}",
                     "", "", "", ""))  # fmt: skip
    head = ("op", "in", "times", "together", "of all", "MFLOP", "MB", "GFLOP/s", "of the ceiling")
    return Table(head, tuple(rows), texts=2)


def _op_row(entry: OpTime, total: float) -> tuple[str, ...]:
    rate = entry.flop / entry.seconds / 1e9 if entry.flop and entry.seconds else None
    return (
        entry.op, TITLES.get(entry.component, entry.component), str(entry.count),
        duration(entry.seconds), f"{entry.seconds / total:.0%}",
        _digits(entry.flop / 1e6) if entry.flop else "-", f"{entry.bytes / 1e6:,.1f}",
        _digits(rate) if rate else "-", "-" if entry.share is None else f"{entry.share:.0%}",
    )  # fmt: skip


def listing(results: Sequence[Result]) -> Table:
    """A row per result that is kept."""
    rows = [
        (r.id[:8], r.created.replace("T", " ").rstrip("Z"), r.machine.name,
         ", ".join(v.name for v in r.variants)[:60], str(r.protocol.rounds),
         ", ".join(duration(median(v.totals)) for v in r.measured))
        for r in results
    ]  # fmt: skip
    return Table(
        ("id", "when (UTC)", "machine", "measured", "rounds", "picture"), tuple(rows), texts=4
    )


def sentences(result: Result) -> Iterator[str]:
    """Every verdict, or the time of a picture where there is nothing to compare."""
    found = verdict.verdicts(result)
    known = [one for one in found if one.word != verdict.UNKNOWN]
    yield from (one.text for one in known)
    if len(known) < len(found):
        needed = verdict.fewest_rounds(len(found))
        yield (f"too few rounds for a verdict: {result.protocol.rounds}, at least {needed} are "
               "needed: allow more --seconds")  # fmt: skip
    if len(result.measured) == 1:
        [only] = result.measured
        total = median_interval(only.totals, result.protocol.confidence)
        wide = f" ({result.protocol.confidence:.0%} interval {bounds(total)})"
        yield (f"{only.name}: a picture in {duration(total.middle)}"
               f"{wide if math.isfinite(total.high) else ''}")  # fmt: skip


def how(result: Result) -> str:
    """The protocol in a sentence."""
    p = result.protocol
    ends = {
        "interval": f"until every interval was within {p.target or 0:.0%}",
        "seconds": f"for {p.elapsed:.0f} s, the time it was given",
        "rounds": "as many as it was given", "interrupted": "when it was interrupted",
        "failed": "when nothing was left to measure",
    }  # fmt: skip
    turns = "taking turns in" if len(result.variants) > 1 else "in"
    fresh = f", fresh processes every {p.restart} rounds" if p.restart else ""
    return (f"{turns} {p.rounds} rounds, {ends[p.stopped]}; {p.warmup} to warm up{fresh}; times "
            "are medians")  # fmt: skip


def conditions(result: Result) -> str:
    """What the system showed beside the clock while it was measured."""
    samples = [sample for variant in result.measured for sample in variant.samples]
    mhz, celsius, speed, waited = (
        [value for s in samples if (value := getattr(s, name)) is not None]
        for name in ("mhz", "celsius", "speed", "waited")
    )
    parts = []
    if mhz:
        parts.append(f"clock {median(mhz):,.0f} MHz, at least {min(mhz):,.0f}")
    if celsius:
        parts.append(f"at most {max(celsius):.0f} °C")
    if any(speed):
        spread = verdict.spread([value for value in speed if value])
        parts.append(
            f"a bare loop at {median(speed) / 1e9:,.3g} G operations/s, spread {spread:.0%}"
        )
    if waited:
        parts.append(f"threads waited {sum(waited) / len(waited):.0%} of the time for a core")
    if result.machine.load is not None:
        parts.append(f"load {result.machine.load:g} before")
    energy = result.machine.energy
    parts.append(f"energy by {energy}" if energy else "no energy shown by the system")
    return "; ".join(parts)


def markdown(results: Sequence[Result]) -> str:
    """A section per result."""
    parts = []
    for result in results:
        parts += [f"## {result.machine.name}, {result.created[:10]}", machine_text(result.machine)]
        if result.command:
            parts.append(f"`{result.command}`")
        how_text = how(result)
        parts.append(how_text[0].upper() + how_text[1:] + ".")
        told = conditions(result)
        parts.append(f"{told[0].upper()}{told[1:]}.")
        parts.append(summary(result).markdown())
        parts.append("\n".join(f"- {text}" for text in sentences(result)))
        parts += ["\n".join(f"- note: {text}" for text in notes)] if (
            notes := verdict.warnings(result)) else []  # fmt: skip
        if memory(result).rows:
            parts.append(memory(result).markdown())
        for variant in result.variants:
            if variant.profile:
                parts += [f"### Ops of {variant.name}", profile(variant.profile).markdown()]
    return "# Latency\n\n" + "\n\n".join(parts) + "\n"
