"""Rounds: turns are fair, runs end when they should, and whatever happens keeps what there is."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ferrotype.runtime.bench import protocol, sensors, verdict
from ferrotype.runtime.bench.protocol import Limits, Picture, RunnerError, Subject, measure
from ferrotype.tests.bench_results import result, rng, variant


@dataclass
class World:
    """A clock that only moves when somebody draws, and a list of who did."""

    now: float = 0.0
    drawn: list = field(default_factory=list)
    opened: list = field(default_factory=list)
    open: set = field(default_factory=set)

    def subject(self, name, seconds, fails=None, opens=True):
        """Draws in `seconds`, or as a function of when; `fails` is at which picture."""
        return Subject(name, lambda: Drawer(self, name, seconds, fails, opens), 2)


class Drawer:
    pid = None

    def __init__(self, world, name, seconds, fails, opens):
        if opens is not True:
            raise RunnerError(opens)
        assert name not in world.open, "two of a kind at once"
        world.open.add(name)
        world.opened.append(name)
        world.now += 0.5
        self._world, self._name, self._seconds, self._fails = world, name, seconds, fails

    def ready(self):
        pass

    def picture(self, seed):
        world = self._world
        if self._fails is not None and world.drawn.count(self._name) >= self._fails:
            raise self._raise()
        seconds = self._seconds(world.now) if callable(self._seconds) else self._seconds
        world.now += seconds
        world.drawn.append(self._name)
        return Picture(seconds, {"unet": (seconds,)})

    def _raise(self):
        return RunnerError("the bundle is gone")

    def close(self):
        self._world.open.remove(self._name)


def run(world, *subjects, told=lambda outcome: None, probe=lambda: 1.0, **limits):
    outcome = measure(
        subjects,
        Limits(**{"seconds": 1e6, **limits}),
        told,
        sensors.Sensors(Path("/nothing/is/here")),
        probe,
        lambda: world.now,
    )
    assert world.open == set(), "a runner was left open"
    return outcome


def test_everyone_has_a_turn_in_every_round_and_orders_are_reversed():
    world = World()
    outcome = run(world, *(world.subject(n, 1.0) for n in "abc"), rounds=8, target=-1, warmup=0)
    rounds = [world.drawn[i : i + 3] for i in range(0, len(world.drawn), 3)]
    assert len(rounds) == outcome.rounds == 8
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert all(a == b[::-1] for a, b in zip(rounds[::2], rounds[1::2], strict=True))
    assert len({tuple(order) for order in rounds}) > 2  # not always the same pair
    assert outcome.stopped == "rounds"
    assert [s.round for s in outcome.samples["a"]] == list(range(8))


def test_warm_up_is_apart_and_processes_begin_anew():
    world = World()
    seconds = iter([9.0, 2.0, *[1.0] * 3] * 3)  # the first picture of a process takes longest
    subject = world.subject("a", lambda now: next(seconds))
    outcome = run(world, subject, rounds=7, target=-1, warmup=2, restart=3)
    assert world.opened == ["a"] * 3
    assert len(world.drawn) == 7 + 3 * 2
    assert len(outcome.samples["a"]) == 7
    assert {s.seconds for s in outcome.samples["a"]} == {1.0}
    assert outcome.firsts["a"] == [9.0] * 3
    assert outcome.starts["a"] == [0.5] * 3
    assert outcome.describe().warmup == 2


def test_narrow_intervals_end_a_run():
    generator = rng()
    world = World()
    noisy = world.subject("a", lambda now: 1 + 0.05 * generator.standard_normal())
    outcome = run(world, noisy, target=0.03, rounds=2000)
    assert outcome.stopped == "interval"
    times = [s.seconds for s in outcome.samples["a"]]
    half = protocol.median_interval(times, 0.95).half
    assert half <= 0.03
    before = protocol.median_interval(times[:-1], 0.95).half
    assert before > 0.03 or len(times) == protocol.FEWEST


def test_steady_times_end_a_run_only_when_a_verdict_is_possible():
    world = World()
    outcome = run(world, *(world.subject(n, 1.0) for n in "abcde"), target=0.02)
    assert outcome.stopped == "interval"
    assert outcome.rounds == verdict.fewest_rounds(4) == 10


def test_a_time_limit_ends_a_run():
    world = World()
    outcome = run(world, world.subject("a", 2.0), seconds=21.0, target=-1, restart=100)
    assert outcome.stopped == "seconds"
    assert 21.0 <= outcome.elapsed <= 23.0 + 0.5


def test_who_had_its_share_sits_out_and_the_others_go_on():
    world = World()
    outcome = run(world, world.subject("a", 1.0), world.subject("slow", 10.0), each=25.0,
                  target=0.02)  # fmt: skip
    assert len(outcome.samples["slow"]) == 3
    assert outcome.sitting_out == {"slow"}
    assert outcome.errors == {}
    assert outcome.stopped == "interval"  # which the one that sits out does not hold up
    assert len(outcome.samples["a"]) == outcome.rounds >= protocol.FEWEST


def test_a_run_ends_when_all_had_their_share():
    world = World()
    outcome = run(world, *(world.subject(n, 10.0) for n in "ab"), each=20.0, target=-1, restart=1)
    assert outcome.stopped == "seconds"
    assert [len(found) for found in outcome.samples.values()] == [2, 2]


def test_an_interrupt_keeps_what_was_measured():
    world = World()

    def interrupt(outcome):
        if outcome.rounds == 4:
            raise KeyboardInterrupt

    outcome = run(world, world.subject("a", 1.0), world.subject("b", 1.0), told=interrupt)
    assert outcome.stopped == "interrupted"
    assert [len(found) for found in outcome.samples.values()] == [4, 4]


def test_an_interrupt_within_a_round_keeps_its_pictures():
    world = World()

    def seconds(now):
        if world.drawn.count("a") == 6:
            raise KeyboardInterrupt
        return 1.0

    outcome = run(world, world.subject("a", seconds), world.subject("b", 1.0), warmup=0)
    assert outcome.stopped == "interrupted"
    assert len(outcome.samples["a"]) == 6
    assert len(outcome.samples["b"]) in (6, 7)


def test_a_bundle_that_vanishes_leaves_the_others_to_go_on():
    world = World()
    subjects = world.subject("a", 1.0, fails=5), world.subject("b", 1.0)
    outcome = run(world, *subjects, rounds=12, target=-1, restart=100)
    assert outcome.errors == {"a": "the bundle is gone"}
    assert len(outcome.samples["a"]) == 4  # and one to warm up
    assert len(outcome.samples["b"]) == 12
    assert outcome.stopped == "rounds"


def test_it_may_vanish_between_processes_too():
    world = World()
    gone = []

    def open_once():
        if gone:
            raise RunnerError("no manifest")
        gone.append(True)
        return Drawer(world, "a", 1.0, None, True)

    outcome = run(world, Subject("a", open_once), world.subject("b", 1.0), rounds=9, target=-1)
    assert outcome.errors == {"a": "no manifest"}
    assert [len(found) for found in outcome.samples.values()] == [5, 9]


def test_nothing_left_ends_a_run():
    world = World()
    outcome = run(world, world.subject("a", 1.0, fails=3))
    assert outcome.stopped == "failed"
    assert len(outcome.samples["a"]) == 2
    assert str(outcome.error) == "the bundle is gone"


# --- planted: what the protocol must see, and what it must not ----------------------------------


def verdict_of(outcome):
    measured = [variant(name, tuple(taken)) for name, taken in outcome.samples.items()]
    return result(*measured)


def noise(generator):
    return 1 + 0.04 * generator.standard_normal() + 0.03 * generator.exponential()


def test_a_planted_slowdown_is_found_and_the_same_is_not():
    generator = rng()
    world = World()
    outcome = run(
        world,
        world.subject("base", lambda now: noise(generator)),
        world.subject("same", lambda now: noise(generator)),
        world.subject("slower", lambda now: 1.1 * noise(generator)),
        rounds=60,
        target=-1,
    )
    words = {v.other: v.word for v in verdict.verdicts(verdict_of(outcome))}
    assert words["slower"] == verdict.SLOWER
    # One in a hundred may differ by chance: then at least by little.
    ratios = {v.other: v.ratio.middle for v in verdict.verdicts(verdict_of(outcome))}
    assert abs(ratios["same"] - 1) < 0.04


def test_a_planted_throttle_is_flagged_and_verdicts_hold_under_it():
    """From the middle on everything takes 1.4 times as long, as under a busy neighbour."""
    generator = rng()
    world = World()

    def slowed(factor):
        return lambda now: factor * noise(generator) * (1.4 if now > 60 else 1.0)

    def probe():
        return 1e9 / (1.4 if world.now > 60 else 1.0)

    subjects = world.subject("base", slowed(1.0)), world.subject("slower", slowed(1.1))
    outcome = run(world, *subjects, rounds=60, target=-1, restart=100, probe=probe)
    found = verdict_of(outcome)
    assert not verdict.is_steady(found)
    assert any("bare loop slowed down" in text for text in verdict.warnings(found))
    [only] = verdict.verdicts(found)
    assert only.word == verdict.SLOWER
    assert abs(only.ratio.middle - 1.1) < 0.05


# --- sensors ------------------------------------------------------------------------------------


RAPL = "sys/class/powercap/intel-rapl:{}"


def rapl(root, package, energy, limit=262143328850):
    folder = root / RAPL.format(package)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")


def test_energy_is_of_whole_packages_and_counters_begin_anew(tmp_path):
    rapl(tmp_path, 0, 900)
    rapl(tmp_path, 1, 5_000_000)
    rapl(tmp_path, "0:0", 123)  # a part of package 0
    found = sensors.Sensors(tmp_path)
    assert (found.source, found.missing) == ("RAPL", "")
    before = found.read()
    rapl(tmp_path, 0, 400)  # beyond its limit, from 0 again
    rapl(tmp_path, 1, 7_000_000)
    rapl(tmp_path, "0:0", 999_123)
    between = found.between(before, found.read(), 1, 1)
    assert between.joules == pytest.approx((262143328851 - 500 + 2_000_000) / 1e6)


def test_a_battery_is_read_where_there_is_no_counter(tmp_path):
    folder = tmp_path / "sys/class/power_supply/BAT0"
    folder.mkdir(parents=True)
    for name, text in {
        "type": "Battery", "status": "Discharging", "current_now": "2000000",
        "voltage_now": "12000000",
    }.items():  # fmt: skip
        (folder / name).write_text(text + "\n")
    found = sensors.Sensors(tmp_path)
    assert found.source == "battery"
    before = sensors.Reading(10.0, watts=24.0)
    assert found.read().watts == pytest.approx(24.0)
    assert found.between(before, sensors.Reading(12.0, watts=26.0), 1, 1).joules == 50.0
    (folder / "status").write_text("Charging\n")
    assert found.read().watts is None


def test_no_energy_is_said_to_be_missing(tmp_path):
    found = sensors.Sensors(tmp_path)
    assert found.read().energy is None
    assert "no energy counter" in found.missing
    (tmp_path / RAPL.format(0)).mkdir(parents=True)  # as for a user who is not root
    assert "root only" in sensors.Sensors(tmp_path).missing


def test_clock_temperature_waiting_and_stolen_time(tmp_path):
    cpu = tmp_path / "sys/devices/system/cpu"
    for core, khz in enumerate((1800000, 3400000)):
        (cpu / f"cpu{core}/cpufreq").mkdir(parents=True)
        (cpu / f"cpu{core}/cpufreq/scaling_cur_freq").write_text(f"{khz}\n")
    for i, (kind, value) in enumerate({"acpitz": 90000, "x86_pkg_temp": 71500}.items()):
        zone = tmp_path / f"sys/class/thermal/thermal_zone{i}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(kind)
        (zone / "temp").write_text(str(value))
    found = sensors.Sensors(tmp_path)
    assert (found.mhz(), found.celsius()) == (3400.0, 71.5)

    def state(waited, steal):
        for task, nanoseconds in enumerate(waited):
            place = tmp_path / f"proc/7/task/{task + 7}"
            place.mkdir(parents=True, exist_ok=True)
            (place / "schedstat").write_text(f"1 {nanoseconds} 3\n")
        (tmp_path / "proc/stat").write_text(f"cpu  1 2 3 4 5 6 7 {steal} 0 0\ncpu0 1\n")

    state((1_000_000, 0), 100)
    before = found.read(7)
    state((401_000_000, 200_000_000), 150)
    after = found.read(7)
    assert after.waited - before.waited == pytest.approx(0.6)
    span = sensors.Reading(before.seconds + 1.0, waited=after.waited, stolen=after.stolen)
    between = found.between(before, span, threads=2, cores=2)
    assert between.waited == pytest.approx(0.3)
    assert between.stolen == pytest.approx(0.25)


def test_the_probe_tells_a_speed():
    assert sensors.speed_probe(1)() > 1e5
