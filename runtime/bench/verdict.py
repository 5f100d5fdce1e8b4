"""What measurements say, in words: faster by a factor with its interval, or no difference shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from .results import Result, Sample, Variant
from .statistics import (
    Interval,
    drift,
    fewest_pairs,
    median,
    outliers,
    paired_ratio,
    unpaired_ratio,
)

CONFIDENCE = 0.99  # of all verdicts of a run together: one in a hundred may say more than is so
RELEVANT = 0.01  # a difference below it is none that anybody would notice
APART = 0.02  # what two runs of the same at different times may differ by all the same
CLEAR = 0.01  # chance of as clear a drift by accident
DRIFT = 0.03  # part of the time by which it must have changed to be told
SPREAD = 0.10  # between the tenth and the ninetieth of a hundred: beyond, do not quote
FEWEST = 8  # times that have a spread
WAITED = 0.05  # part of the time that others had the cores
FASTER, SLOWER, SAME, UNKNOWN = "faster", "slower", "no difference shown", "too few rounds"


@dataclass(frozen=True)
class Verdict:
    """How `other` compares with `base`: `ratio` is the time of the other to the base's."""

    base: str
    other: str
    word: str
    ratio: Interval
    notes: tuple[str, ...] = ()

    @property
    def factor(self) -> Interval:
        """By which it is faster, or slower: above 1 where it is."""
        return self.ratio.inverse if self.word == FASTER else self.ratio

    @property
    def text(self) -> str:
        """One sentence."""
        if self.word in (FASTER, SLOWER):
            return f"{self.other} is {self.word} than {self.base}: {times(self.factor)}"
        if self.word == SAME:
            return (f"no difference shown between {self.base} and {self.other}: "
                    f"{times(self.ratio)} the time")  # fmt: skip
        return f"too few rounds to compare {self.other} with {self.base}"


def times(ratio: Interval) -> str:
    """1.12x (1.09 to 1.15)."""
    if not math.isfinite(ratio.high):
        return f"{ratio.middle:.2f}x"
    return f"{ratio.middle:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def word(ratio: Interval) -> str:
    """Faster or slower only if the whole interval says so, and by enough to matter."""
    if not math.isfinite(ratio.high):
        return UNKNOWN
    if ratio.holds(1.0) or abs(math.log(ratio.middle)) < RELEVANT:
        return SAME
    return FASTER if ratio.middle < 1 else SLOWER


def verdicts(result: Result, stage: str = "") -> list[Verdict]:
    """Every variant against the first that did the same work, of rounds in which both took turns.

    `stage`: of one stage alone.
    """
    pairs = [(base, other) for base, *others in by_work(result) for other in others]
    confidence = 1 - doubt(len(pairs))
    found = []
    for base, other in pairs:
        ours, theirs = in_turn(other, base, stage)
        if ours:
            ratio = paired_ratio(ours, theirs, confidence)
            found.append(Verdict(base.name, other.name, word(ratio), ratio))
    return found


def by_work(result: Result) -> list[list[Variant]]:
    """Variants that have samples, those with pictures of the same size and steps together."""
    groups: dict[tuple, list[Variant]] = {}
    for variant in result.measured:
        groups.setdefault(work_of(variant), []).append(variant)
    return list(groups.values())


def work_of(variant: Variant) -> tuple[object, ...]:
    """Which pictures it drew: times of others are not to be compared with it."""
    return tuple(variant.settings.get(key) for key in ("size", "steps"))


def doubt(comparisons: int) -> float:
    """Chance of a wrong word in each, so that together they have no more than one in a hundred."""
    return (1 - CONFIDENCE) / max(1, comparisons)


def fewest_rounds(comparisons: int) -> int:
    """Below, there is no verdict."""
    return fewest_pairs(doubt(comparisons))


def in_turn(ours: Variant, theirs: Variant, stage: str = "") -> tuple[list[float], list[float]]:
    """Seconds of the rounds that both have."""
    a, b = ({s.round: _seconds(s, stage) for s in v.samples} for v in (ours, theirs))
    both = [r for r in a if r in b and a[r] and b[r]]
    return [a[r] for r in both], [b[r] for r in both]


def _seconds(sample: Sample, stage: str) -> float:
    return sum(sample.stages.get(stage, ())) if stage else sample.seconds


def compare(base: Result, other: Result) -> list[Verdict]:
    """Variants that did the same work in two results, the second against the first.

    They did not take turns, and what the machine did meanwhile is not known: so the interval is
    APART wider on either side, and on the same machine as much wider as a bare loop ran faster or
    slower.
    """
    pairs = matched(base, other)
    confidence = 1 - doubt(len(pairs))
    found = []
    for a, b in pairs:
        ratio = unpaired_ratio(b.totals, a.totals, confidence)
        speed = _speed(base, other, a, b)
        wider = Interval(
            ratio.middle,
            ratio.low * (1 - APART) * min(1.0, speed),
            ratio.high * (1 + APART) * max(1.0, speed),
        )
        notes = (_speed_note(speed),) if abs(speed - 1) >= DRIFT else ()
        found.append(Verdict(*_labels(base, other, a, b), word(wider), wider, notes))
    return found


def matched(base: Result, other: Result) -> list[tuple[Variant, Variant]]:
    """Variants of both that are the same work: by name, else by model and settings, in order."""
    left = list(other.measured)
    pairs = []
    for a in base.measured:
        same = [b for b in left if b.name == a.name] or [b for b in left if b.key == a.key]
        if same:
            pairs.append((a, same[0]))
            left.remove(same[0])
    if not pairs and len(base.measured) == len(other.measured) == 1:
        pairs = [(base.measured[0], other.measured[0])]  # one of each: that is what was meant
    return pairs


def _labels(base: Result, other: Result, a: Variant, b: Variant) -> tuple[str, str]:
    """Names that tell the two apart: by variant, by machine, else by time."""
    if a.name != b.name:
        return a.name, b.name
    if base.machine.name != other.machine.name:
        return f"{a.name} on {base.machine.name}", f"{b.name} on {other.machine.name}"
    return f"{a.name} of {base.id[:8]}", f"{b.name} of {other.id[:8]}"


def _speed(base: Result, other: Result, a: Variant, b: Variant) -> float:
    """How fast the machine itself was in the second result, to the first; 1 if that is unknown."""
    if base.machine.cpu != other.machine.cpu or base.machine.name != other.machine.name:
        return 1.0  # another machine: its speed is what is asked for
    speeds = [[s.speed for s in v.samples if s.speed] for v in (a, b)]
    return median(speeds[1]) / median(speeds[0]) if all(speeds) else 1.0


def _speed_note(speed: float) -> str:
    how = "faster" if speed > 1 else "slower"
    return (f"the machine itself was {abs(speed - 1):.0%} {how} in the second run, by a bare loop, "
            "and intervals are as much wider: to be sure, measure both in one run")  # fmt: skip


# --- whether a run can be trusted ---------------------------------------------------------------


def warnings(result: Result) -> list[str]:
    """What was not as it should be meanwhile, a sentence each; empty if all was well."""
    found = []
    if (moved := _drift(result)) is not None:
        found.append(moved)
    found += _others(result)
    found += _spread(result)
    for variant in result.variants:
        if variant.error:
            found.append(f"{variant.name} ended early: {variant.error}")
    if result.protocol.stopped == "interrupted":
        found.append(f"interrupted after {result.protocol.rounds} rounds")
    return found


def is_steady(result: Result) -> bool:
    """Whether there was neither a drift nor a neighbour."""
    return _drift(result) is None and not _others(result)


def _by_round(result: Result, name: str) -> list[float]:
    """Middle of each round's values, each a part of its variant's median."""
    rows = []
    for variant in result.measured:
        known = [(s.round, value) for s in variant.samples if (value := getattr(s, name))]
        if known:
            middle = median([value for _, value in known])
            rows += [(index, value / middle) for index, value in known]
    rows.sort()
    rounds = groupby(rows, key=lambda row: row[0])
    return [median([value for _, value in group]) for _, group in rounds]


def _drift(result: Result) -> str | None:
    """A trend of all variants together, and whether the machine's own speed has it too."""
    found = drift(_by_round(result, "seconds"))
    if found is None or found.p >= CLEAR or abs(found.change) < DRIFT:
        return None
    if found.change < 0:
        return (f"times fell by {-found.change:.0%} over the run: it was still warming up, or a "
                "neighbour left; measure again with more --warmup")  # fmt: skip
    own, clock = drift(_by_round(result, "speed")), drift(_by_round(result, "mhz"))
    text = f"times rose by {found.change:.0%} over the run"
    if clock and clock.p < CLEAR and clock.change < -DRIFT:
        return f"{text}, as the clock fell by {-clock.change:.0%}: the processor is throttled"
    if own and own.p < CLEAR and own.change < -DRIFT:
        return (f"{text}, and a bare loop slowed down by {-own.change:.0%} as well: the machine is "
                "throttled or shared with a neighbour")  # fmt: skip
    return f"{text}: a neighbour began, or memory is short"


def _others(result: Result) -> list[str]:
    """Time that other processes and the hypervisor had, and a speed that comes and goes."""
    found = []
    samples = [sample for variant in result.measured for sample in variant.samples]
    waited = [s.waited for s in samples if s.waited is not None]
    if waited and (share := sum(waited) / len(waited)) > WAITED:
        found.append(f"other processes had the cores for {share:.0%} of the time that threads were "
                     "ready to run: end them, or compare only what took turns here")  # fmt: skip
    stolen = [s.stolen for s in samples if s.stolen is not None]
    if stolen and (share := sum(stolen) / len(stolen)) > WAITED:
        found.append(f"the hypervisor took {share:.0%} of the processor's time away")
    return found


def _spread(result: Result) -> list[str]:
    """Whose times are not to be quoted."""
    known = {v.name: spread(v.totals) for v in result.measured if len(v.totals) >= FEWEST}
    wide = {name: part for name, part in known.items() if part > SPREAD}
    if not wide:
        return []
    low, high = (f"{pick(wide.values()):.0%}" for pick in (min, max))
    parts = high if low == high else f"{low} to {high}"
    far = sum(outliers(v.totals) for v in result.measured if v.name in wide)
    more = f", {far} picture{'s' * (far > 1)} far above the others" if far else ""
    return [f"times of {', '.join(wide)} spread by {parts}{more}: do not quote them without their "
            "intervals"]  # fmt: skip


def spread(values: Sequence[float]) -> float:
    """Between the tenth and the ninetieth of a hundred, as a part of the median."""
    ordered = sorted(values)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.9))
    return (high - low) / median(ordered)
