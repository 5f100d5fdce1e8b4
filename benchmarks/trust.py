"""Whether `ferrotype bench` can be trusted: what is planted into real pictures must be found.

    python benchmarks/trust.py        # five minutes; writes results/bench.md

The embedded bundle against itself; against itself held up by a tenth of every picture; and against
itself while, from the middle of the run on, other processes take the cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ferrotype.benchmarks import measure
from ferrotype.runtime.bench import machine, run, tables, verdict
from ferrotype.runtime.bench.protocol import Limits, Outcome, Picture, Subject
from ferrotype.runtime.bench.protocol import measure as measure_rounds
from ferrotype.runtime.bench.results import Result, Variant
from ferrotype.runtime.bench.subjects import Process
from ferrotype.runtime.bench.worker import Settings
from ferrotype.runtime.engines.native import usable_threads
from ferrotype.runtime.pipeline import EMBEDDED

HELD_UP = 0.1  # of a picture
SETTINGS = Settings(EMBEDDED, usable_threads(), (256, 256))
SPIN = "while True: pass"


@dataclass
class HeldUp:
    """A runner that takes longer than it draws: a slowdown that is known."""

    process: Process
    part: float = HELD_UP
    pid: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.pid = self.process.pid

    def ready(self) -> None:
        self.process.ready()

    def picture(self, seed: int) -> Picture:
        drawn = self.process.picture(seed)
        wait = self.part * drawn.seconds
        began = time.perf_counter()
        while time.perf_counter() - began < wait:  # works, as a slower program would
            pass
        stages = {**drawn.stages, "other": (drawn.stages["other"][0] + wait,)}
        return Picture(drawn.seconds + wait, stages)

    def close(self) -> None:
        self.process.close()


class Neighbours:
    """Processes that take every core from a round on."""

    def __init__(self, after: int) -> None:
        self._after, self._running = after, list[subprocess.Popen]()

    def __call__(self, outcome: Outcome) -> None:
        if outcome.rounds == self._after:
            command = [sys.executable, "-c", SPIN]
            self._running = [subprocess.Popen(command) for _ in range(usable_threads())]

    def leave(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()


def plain() -> Process:
    return Process.open(SETTINGS)


def held_up() -> HeldUp:
    return HeldUp(Process.open(SETTINGS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="exit with 1 if one is not found")
    chosen = parser.parse_args()
    limits = Limits(rounds=chosen.rounds, seconds=1e6, target=-1)  # all of the rounds
    neighbours = Neighbours(chosen.rounds // 2)
    try:
        found = {
            "The same bundle twice": pair(limits, "the same", plain),
            "One held up by a tenth of every picture": pair(limits, "held up", held_up),
            "Neighbours on every core from the middle on, and one held up by a tenth": pair(
                limits, "held up", held_up, neighbours
            ),
        }
    finally:
        neighbours.leave()
    text = report(found, chosen.rounds)
    (measure.RESULTS / "bench.md").write_text(text)
    print(text)
    if chosen.check and (wrong := missed(list(found.values()))):
        sys.exit("\n".join(["missed:", *wrong]))


def pair(
    limits: Limits, name: str, other: Callable, told: Callable[[Outcome], object] = lambda o: None
) -> Result:
    """The embedded bundle and another in turn."""
    subjects = [Subject("bundle", plain, SETTINGS.threads), Subject(name, other, SETTINGS.threads)]
    outcome = measure_rounds(subjects, limits, told)
    width, height = SETTINGS.size
    settings = {"size": f"{width}x{height}", "threads": SETTINGS.threads}
    return Result(
        "0" * 16, run.now(), "trust.py", machine.describe(), outcome.describe(),
        tuple(Variant(n, "native", "emoji", tuple(taken), settings=settings)
              for n, taken in outcome.samples.items()),
    )  # fmt: skip


def missed(found: Sequence[Result]) -> list[str]:
    """What should have been said and was not."""
    words = [verdict.verdicts(result)[0].word for result in found]
    wrong = []
    if words[0] != verdict.SAME:
        wrong.append(f"the same bundle twice: {words[0]}")
    if words[1] != verdict.SLOWER:
        wrong.append(f"held up: {words[1]}")
    if words[2] == verdict.FASTER:  # under neighbours it may be hidden, never turned round
        wrong.append("held up under neighbours: faster")
    if verdict.is_steady(found[-1]):
        wrong.append("neighbours: not flagged")
    return wrong


def report(found: dict[str, Result], rounds: int) -> str:
    lines = [
        "# What is planted is found",
        "",
        "`python benchmarks/trust.py --check`",
        "",
        f"{measure.describe()}; {SETTINGS.threads} threads.",
        "",
        "The embedded bundle at {}x{}, ".format(*SETTINGS.size) + f"{rounds} rounds in turn.  "
        "Every sentence is what `ferrotype bench` says of such a run.",
    ]
    for title, result in found.items():
        lines += ["", f"## {title}", "", tables.summary(result).markdown(), ""]
        lines += [f"- {text}" for text in tables.sentences(result)]
        lines += [f"- note: {text}" for text in verdict.warnings(result)]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
