"""A whole run: memory first, then rounds; the result is there at any time, however it ends."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence

from ... import bundle as bundles
from ... import kernels
from ..._version import __version__
from . import machine, ops, protocol
from .protocol import Limits, Outcome, RunnerError
from .results import MAX_TEXT, Machine, OpTime, Result, Variant
from .subjects import Facts, Process, examine, subject
from .worker import Settings

PROFILES = 5  # pictures whose ops are timed; of each op the median counts


def run(
    chosen: Mapping[str, Settings],
    limits: Limits,
    told: Callable[[Result], object] = lambda result: None,
    stage: Callable[[str], object] = lambda text: None,
    name: str | None = None,
    command: str = "",
) -> Result:
    """Measure every entry of `chosen`, the first being what the others are held against.

    `told` hears of the result so far after every round, `stage` what is being done before.  `name`
    is the machine's.  Raises RunnerError if nothing could be measured, or an entry asks for what
    its bundle does not do.
    """
    here, identity, created = machine.describe(name), secrets.token_hex(8), now()
    facts: dict[str, Facts] = {}
    errors: dict[str, RunnerError] = {}
    for label, settings in chosen.items():
        stage(f"memory of {label}")
        try:
            facts[label] = examine(settings)
        except RunnerError as error:
            if error.usage:
                raise RunnerError(f"{label}: {error}" if len(chosen) > 1 else str(error), True) \
                    from None  # fmt: skip
            errors[label] = error
    if not facts:
        raise next(iter(errors.values()))

    def made(outcome: Outcome) -> Result:
        return Result(
            identity, created, f"ferrotype {__version__}", here, outcome.describe(),
            tuple(variant(label, facts.get(label), outcome, errors) for label in chosen), command,
        )  # fmt: skip

    stage("warm-up")
    subjects = [subject(label, chosen[label]) for label in facts]
    outcome = protocol.measure(subjects, limits, lambda so_far: told(made(so_far)))
    if outcome.error and not any(outcome.samples.values()):
        raise outcome.error
    return made(outcome)


def variant(
    label: str, facts: Facts | None, outcome: Outcome, errors: Mapping[str, RunnerError]
) -> Variant:
    """Everything known of one entry."""
    error = outcome.errors.get(label) or (str(errors[label]) if label in errors else None)
    text = None if error is None else "".join(c if c.isprintable() else " " for c in error)
    samples = tuple(outcome.samples.get(label, ()))
    if facts is None:
        return Variant(label, "unknown", "unknown", samples, error=(text or "")[:MAX_TEXT])
    return Variant(
        label,
        samples=samples,
        starts=tuple(outcome.starts.get(label, ())),
        firsts=tuple(outcome.firsts.get(label, ())),
        error=text and text[:MAX_TEXT],
        **{f.name: getattr(facts, f.name) for f in dataclasses.fields(facts)},
    )


def now() -> str:
    """UTC, as a result has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def machine_text(m: Machine) -> str:
    """A machine as a line: processor, cores, memory, system, what drew."""
    memory = "" if m.memory_bytes is None else f", {m.memory_bytes / 2**30:.0f} GiB"
    units = f" ({', '.join(m.units)})" if m.units else ""
    guest = ", a virtual machine" if m.virtual else ""
    versions = ", ".join(f"{k} {v}" for k, v in m.versions.items())
    named = "" if m.name == m.cpu else f"{m.name}: "
    return f"{named}{m.cpu}{units}, {m.cores} cores{memory}; {m.system}{guest}; {versions}"


# --- op by op -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Profiled:
    """Ops of one picture, the one of middle length; times in seconds since it began."""

    label: str
    seconds: float
    spans: tuple[tuple[str, float, float], ...]  # stage, start, end
    ops: tuple[tuple[str, str, str, str, float, float, float, float], ...]  # ops.as_row
    ceilings: Mapping[str, float]  # FLOP/s by arithmetic


def profile(label: str, settings: Settings, pictures: int = PROFILES) -> Profiled:
    """Draw a few pictures with every op timed.  Raises RunnerError for other engines."""
    process = Process.open(settings)
    try:
        isa = settings.isa or kernels.isas()[0]
        before = ops.ceilings(isa, settings.threads)
        process.ask(profile=0)
        found = [process.ask(profile=seed) for seed in range(pictures)]
        after = ops.ceilings(isa, settings.threads)
    finally:
        process.close()
    middle = sorted(found, key=lambda one: one["seconds"])[len(found) // 2]
    return Profiled(
        label,
        middle["seconds"],
        tuple((name, start, end) for name, start, end in middle["spans"]),
        tuple(tuple(row) for row in middle["ops"]),
        {kind: (rate + after[kind]) / 2 for kind, rate in before.items()},
    )


def check_native(chosen: Mapping[str, Settings]) -> None:
    """Raise RunnerError, before anything is measured, if ops of an entry cannot be timed."""
    for settings in chosen.values():
        if (target := bundles.load(settings.bundle).manifest.target) != "native":
            raise RunnerError(
                f"ops are timed by the native engine, {settings.bundle} is for {target}: convert "
                "it with --target native, or leave out --profile"
            )


def with_ops(result: Result, found: Mapping[str, Profiled]) -> Result:
    """The result with the ops of every variant that was profiled."""
    variants = tuple(
        dataclasses.replace(v, profile=op_times(found[v.name])) if v.name in found else v
        for v in result.variants
    )
    return dataclasses.replace(result, variants=variants)


def op_times(profiled: Profiled) -> tuple[OpTime, ...]:
    """Ops of one kind and shape together, those that took longest first."""
    groups: dict[tuple[str, str], list[Sequence]] = {}
    for row in profiled.ops:
        groups.setdefault((row[0], row[2]), []).append(row)
    found = []
    for (component, op), rows in groups.items():
        seconds, flop, moved = (sum(row[i] for row in rows) for i in (5, 6, 7))
        ceiling = profiled.ceilings.get(rows[0][3])
        found.append(OpTime(component, op, len(rows), seconds, flop, moved, ceiling))
    return tuple(sorted(found, key=lambda entry: -entry.seconds))
