"""Rounds in which everything takes its turn, until the intervals are narrow or the time is over.

What takes turns is a Subject: it opens a Runner, which draws one picture when asked.  Each round
asks every runner once, in an order of its own; every second round has that order reversed, so that
whoever comes before has no part in who is faster.  Every few rounds all begin anew, so that where
a process happens to lie in memory is noise and no bias.  Pictures before a runner's first timed one
warm it up and are not kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import numpy as np

from ...errors import FerrotypeError
from ..engines.native import cores
from .results import Protocol as Description
from .results import Sample
from .sensors import Sensors, speed_probe
from .statistics import median_interval, paired_ratio
from .verdict import fewest_rounds

FEWEST = 8  # rounds before an interval may end the run: below, ranks say too little


class RunnerError(FerrotypeError):
    """What was to be measured cannot go on.  `usage`: it was asked for what it does not do."""

    def __init__(self, message: str, usage: bool = False) -> None:
        super().__init__(message)
        self.usage = usage


@dataclass(frozen=True)
class Picture:
    """Seconds of one picture in all, and of every run of its stages."""

    seconds: float
    stages: dict[str, tuple[float, ...]]


class Runner(Protocol):
    """Draws on request; `pid` is the process that does, None if nobody may look at it."""

    pid: int | None

    def ready(self) -> None:
        """Called before every picture and its clock: what made room for others comes back.

        Raises RunnerError.
        """

    def picture(self, seed: int) -> Picture:
        """Raises RunnerError."""

    def close(self) -> None:
        """Called once, whatever happened."""


@dataclass(frozen=True)
class Subject:
    """Something to measure, by a name that no other has."""

    name: str
    open: Callable[[], Runner]  # raises RunnerError
    threads: int = 1


@dataclass(frozen=True)
class Limits:
    """When to stop: `target` is half of the widest interval of any median or ratio, as a part."""

    rounds: int = 1000
    seconds: float = 60.0
    target: float = 0.02
    confidence: float = 0.95
    warmup: int = 1
    restart: int = 5
    seed: int = 0
    each: float = math.inf  # seconds of one subject's pictures, after which it sits out


@dataclass
class Outcome:
    """What was measured so far, by the subjects' names."""

    limits: Limits
    samples: dict[str, list[Sample]]
    errors: dict[str, str] = field(default_factory=dict)
    starts: dict[str, list[float]] = field(default_factory=dict)  # seconds until it was open
    firsts: dict[str, list[float]] = field(default_factory=dict)  # of the first picture after that
    rounds: int = 0
    stopped: str = "interrupted"
    elapsed: float = 0.0
    error: RunnerError | None = None  # the first
    sitting_out: set[str] = field(default_factory=set)  # those that had the time of `each`

    def describe(self) -> Description:
        """For the result."""
        at = self.limits
        return Description(
            self.rounds, at.warmup, at.confidence, self.stopped, self.elapsed, at.restart,
            at.target, at.seconds, at.seed,
        )  # fmt: skip

    def narrow(self) -> bool:
        """Whether every interval is as narrow as was asked for."""
        gone = self.errors.keys() | self.sitting_out
        alive = [samples for name, samples in self.samples.items() if name not in gone]
        at = self.limits
        times = [[sample.seconds for sample in found] for found in alive]
        fewest = max(FEWEST, fewest_rounds(len(times) - 1))
        if not times or min(map(len, times)) < fewest:
            return False
        if any(median_interval(t, at.confidence).half > at.target for t in times):
            return False
        first = times[0]
        ratios = [paired_ratio(t, first[: len(t)], at.confidence) for t in times[1:]]
        return all(ratio.half <= at.target for ratio in ratios)


def measure(
    subjects: Sequence[Subject],
    limits: Limits,
    told: Callable[[Outcome], object] = lambda outcome: None,
    sensors: Sensors | None = None,
    probe: Callable[[], float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Measure until a limit; an interrupt or an error keeps what there is.

    `told` hears of the outcome after every round.  A subject that fails leaves the rounds; the run
    goes on with the others.
    """
    threads = max(subject.threads for subject in subjects)
    run = _Run(subjects, limits, sensors or Sensors(), probe or speed_probe(threads), clock)
    outcome = run.outcome
    try:
        outcome.stopped = run.rounds(told)
    except KeyboardInterrupt:
        outcome.stopped = "interrupted"
    finally:
        outcome.elapsed = clock() - run.began
        run.close()
    return outcome


class _Run:
    """The runners of a run, and what they have said."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        limits: Limits,
        sensors: Sensors,
        probe: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        names = [subject.name for subject in subjects]
        self._limits, self._sensors, self._probe, self._clock = limits, sensors, probe, clock
        self._subjects = {subject.name: subject for subject in subjects}
        self._runners: dict[str, Runner] = {}
        self._rng = np.random.default_rng(limits.seed)
        self._order = list(names)
        self._cores = cores()
        self.outcome = Outcome(limits, {n: [] for n in names}, starts={n: [] for n in names})
        self.began = clock()

    def rounds(self, told: Callable[[Outcome], object]) -> str:
        """Why they ended."""
        for index in count():
            if index % self._limits.restart == 0:
                self._open_all(seed=index)
            if reason := self._none_left():
                return reason
            for name in self._next_order(index):
                self._one(name, index)
            self.outcome.rounds = index + 1
            self.outcome.elapsed = self._clock() - self.began
            told(self.outcome)
            if reason := self._over():
                return reason
        raise AssertionError("there is always another round")

    def close(self) -> None:
        while self._runners:
            _, runner = self._runners.popitem()
            runner.close()

    def _over(self) -> str:
        at, outcome = self._limits, self.outcome
        if reason := self._none_left():
            return reason
        if outcome.narrow():
            return "interval"
        if outcome.elapsed >= at.seconds:
            return "seconds"
        return "rounds" if outcome.rounds >= at.rounds else ""

    def _none_left(self) -> str:
        """Why there is nobody whose turn it could be; "" if there is."""
        if self._subjects:
            return ""
        return "seconds" if self.outcome.sitting_out else "failed"

    def _next_order(self, index: int) -> list[str]:
        """A new order, or the one before in reverse."""
        if index % 2:
            self._order.reverse()
        else:
            self._order = [str(name) for name in self._rng.permutation(sorted(self._subjects))]
        return [name for name in self._order if name in self._subjects]

    def _open_all(self, seed: int) -> None:
        """New runners, warmed up; two of a subject are never there at once."""
        self.close()
        for name, subject in list(self._subjects.items()):
            with self._leaving(name):
                began = self._clock()
                self._runners[name] = subject.open()
                self.outcome.starts[name].append(self._clock() - began)
                for i in range(self._limits.warmup):
                    picture = self._runners[name].picture(seed)
                    if i == 0:
                        self.outcome.firsts.setdefault(name, []).append(picture.seconds)

    def _one(self, name: str, index: int) -> None:
        runner, threads = self._runners[name], self._subjects[name].threads
        with self._leaving(name):
            runner.ready()
            speed, started = self._probe(), self._clock() - self.began
            before = self._sensors.read(runner.pid)
            picture = runner.picture(index)
            after = self._sensors.read(runner.pid)
            between = self._sensors.between(before, after, threads, self._cores)
            sample = Sample(
                index, started, picture.seconds, picture.stages, self._sensors.mhz(),
                self._sensors.celsius(), between.joules, speed, between.waited, between.stolen,
            )  # fmt: skip
            taken = self.outcome.samples[name]
            taken.append(sample)
            if sum(one.seconds for one in taken) >= self._limits.each:
                self.outcome.sitting_out.add(name)
                self._end(name)

    @contextmanager
    def _leaving(self, name: str) -> Iterator[None]:
        """A subject whose runner fails in here is measured no more."""
        try:
            yield
        except RunnerError as error:
            self._leave(name, error)

    def _leave(self, name: str, error: RunnerError) -> None:
        self.outcome.errors[name] = str(error)
        self.outcome.error = self.outcome.error or error
        self._end(name)

    def _end(self, name: str) -> None:
        """It takes no more turns."""
        del self._subjects[name]
        if name in self._runners:
            self._runners.pop(name).close()
