"""Intervals hold what they should, as scipy counts it; verdicts say no more than is so."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from ferrotype.runtime.bench import statistics, verdict
from ferrotype.runtime.bench.statistics import Interval
from ferrotype.tests.bench_results import result, rng, samples, variant

CONFIDENCES = (0.9, 0.95, 0.99)


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("count", [1, 5, 6, 7, 12, 31, 200])
def test_a_median_is_between_sorted_values_by_the_binomial_distribution(count, confidence):
    values = rng().exponential(size=count)
    found = statistics.median_interval(values, confidence)
    rank = int(stats.binom.ppf((1 - confidence) / 2, count, 0.5))  # as many at least are below
    assert found.middle == pytest.approx(np.median(values))
    if rank == 0:
        assert (found.low, found.high) == (0.0, math.inf)
    else:
        assert (found.low, found.high) == (np.sort(values)[rank - 1], np.sort(values)[-rank])


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("count", [8, 9, 20, 40])
def test_a_paired_ratio_ends_where_wilcoxons_test_does(count, confidence):
    generator = rng()
    ours, theirs = generator.lognormal(0.1, 0.2, count), generator.lognormal(0, 0.2, count)
    found = statistics.paired_ratio(ours, theirs, confidence)
    logs = np.log(ours / theirs)

    def p(ratio):
        return stats.wilcoxon(logs - math.log(ratio), method="exact").pvalue

    for edge, inside in ((found.low, 1 + 1e-9), (found.high, 1 - 1e-9)):
        assert p(edge * inside) > 1 - confidence
        assert p(edge / inside) <= 1 - confidence


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("counts", [(5, 6), (8, 8), (12, 30), (40, 25)])
def test_an_unpaired_ratio_ends_where_mann_and_whitneys_test_does(counts, confidence):
    generator = rng()
    ours, theirs = (generator.lognormal(0, 0.2, count) for count in counts)
    found = statistics.unpaired_ratio(ours, theirs, confidence)

    def p(ratio):
        return stats.mannwhitneyu(ours / ratio, theirs, method="exact").pvalue

    for edge, inside in ((found.low, 1 + 1e-9), (found.high, 1 - 1e-9)):
        assert p(edge * inside) > 1 - confidence
        assert p(edge / inside) <= 1 - confidence


def test_many_values_are_approximated_as_scipy_does():
    generator = rng()
    ours, theirs = generator.lognormal(0, 0.2, 300), generator.lognormal(0, 0.2, 300)
    found = statistics.paired_ratio(ours, theirs, 0.95)
    assert found.low < np.exp(np.median(np.log(ours / theirs))) < found.high
    p = stats.wilcoxon(np.log(ours / theirs) - math.log(found.low * 0.999)).pvalue
    assert p < 0.06


def test_a_drift_is_between_quarters_with_kendalls_test():
    generator = rng()
    values = 1 + 0.003 * np.arange(40) + 0.02 * generator.standard_normal(40)
    found = statistics.drift(values)
    ends = np.median(values[-10:]) - np.median(values[:10])
    assert found.change == pytest.approx(ends / np.median(values))
    expected = stats.kendalltau(np.arange(40), values, method="asymptotic").pvalue
    assert found.p == pytest.approx(expected, rel=0.5, abs=1e-4)  # ours corrects for continuity
    assert statistics.drift(values[:7]) is None


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_what_changes_at_once_is_a_drift(share):
    """As a neighbour comes; without noise most pairs have no slope."""
    values = np.where(np.arange(40) < share * 40, 1.0, 1.4)
    found = statistics.drift(values)
    assert found.change == pytest.approx(0.4 / np.median(values))
    assert found.p < 1e-3


def test_an_even_series_has_no_drift():
    assert statistics.drift([1.0] * 20) == statistics.Drift(0.0, 1.0)


def test_few_pairs_say_nothing():
    found = statistics.paired_ratio([1.0] * 7, [2.0] * 7, 0.99)
    assert not math.isfinite(found.high)
    assert statistics.fewest_pairs(0.01) == 8
    assert math.isfinite(statistics.paired_ratio([1.0] * 8, [2.0] * 8, 0.99).high)


# --- verdicts -----------------------------------------------------------------------------------


def one_verdict(ours, theirs):
    [found] = verdict.verdicts(result(variant("a", theirs), variant("b", ours)))
    return found


def test_two_runs_of_the_same_show_no_difference():
    """One in a hundred may; of 150 more than 9 would be one chance in 100,000."""
    generator = rng()
    words = [one_verdict(samples(generator, 1.0), samples(generator, 1.0)).word for _ in range(150)]
    assert sum(word != verdict.SAME for word in words) <= 9


def test_a_slowdown_of_a_tenth_is_found():
    generator = rng()
    for _ in range(10):
        found = one_verdict(samples(generator, 1.1), samples(generator, 1.0))
        assert found.word == verdict.SLOWER
        assert found.ratio.holds(1.1) or abs(found.ratio.middle - 1.1) < 0.05
        assert found.text.startswith("b is slower than a: 1.")


def test_what_slows_a_whole_round_down_does_not_count():
    """A neighbour who comes and goes: both took turns under him, five times as slow."""
    generator = rng()
    busy = generator.uniform(1, 5, 30)

    def factor(part):
        return busy[round(part * 29)]

    ours, theirs = (
        samples(generator, seconds, noise=0.02, factor=factor) for seconds in (0.9, 1.0)
    )
    found = one_verdict(ours, theirs)
    assert found.word == verdict.FASTER
    assert found.factor.holds(1 / 0.9)


def test_faster_is_told_as_a_factor_above_one():
    generator = rng()
    found = one_verdict(samples(generator, 0.5), samples(generator, 1.0))
    assert found.text.startswith("b is faster than a: ")
    assert found.factor.middle == pytest.approx(2, rel=0.1)
    assert found.factor.low < found.factor.middle < found.factor.high


def test_a_difference_that_nobody_would_notice_is_none():
    taken = samples(rng(), 1.0)
    slower = tuple(replace(s, seconds=s.seconds * 1.005) for s in taken)
    assert one_verdict(slower, taken).word == verdict.SAME
    slower = tuple(replace(s, seconds=s.seconds * 1.02) for s in taken)
    assert one_verdict(slower, taken).word == verdict.SLOWER


def test_only_rounds_that_both_took_part_in_count():
    taken = samples(rng(), 1.0, rounds=20)
    found = one_verdict(taken[:12], taken[3:])
    assert found.word == verdict.SAME
    assert found.ratio == Interval(1.0, 1.0, 1.0)
    assert one_verdict(taken[:5], taken).word == verdict.UNKNOWN


def test_pictures_of_different_sizes_are_not_compared():
    generator = rng()
    large = [variant(n, samples(generator, 1.0)) for n in ("a", "b")]
    small = [
        variant(n, samples(generator, 0.2), settings={"size": "256x256", "steps": 4})
        for n in ("c", "d")
    ]
    found = verdict.verdicts(result(large[0], small[0], large[1], small[1]))
    assert [(v.base, v.other) for v in found] == [("a", "b"), ("c", "d")]
    assert verdict.fewest_rounds(len(found)) == 9  # each must be surer than one alone


# --- results of other times ---------------------------------------------------------------------


def apart(ours, theirs, **more):
    [found] = verdict.compare(result(variant("a", theirs)), result(variant("a", ours), **more))
    return found


def test_the_same_at_another_time_shows_no_difference():
    generator = rng()
    words = [apart(samples(generator, 1.01), samples(generator, 1.0)).word for _ in range(50)]
    assert sum(word != verdict.SAME for word in words) <= 4


def test_a_slowdown_is_found_between_results():
    generator = rng()
    found = apart(samples(generator, 1.2), samples(generator, 1.0))
    assert found.word == verdict.SLOWER
    assert "of " in found.other


def test_a_machine_that_was_slower_itself_is_not_the_programs_fault():
    generator = rng()
    slow = samples(generator, 1.3, speed=lambda part: 1.0e9)
    found = apart(slow, samples(generator, 1.0, speed=lambda part: 1.3e9))
    assert found.word == verdict.SAME
    assert "bare loop" in found.notes[0]
    assert apart(slow, samples(generator, 1.0, speed=lambda part: 1.0e9)).word == verdict.SLOWER


def test_other_machines_are_compared_by_their_names():
    generator = rng()
    phone = samples(generator, 3.0, speed=lambda part: 1e9)
    found = apart(phone, samples(generator, 1.0, speed=lambda part: 9e9), machine="a phone")
    assert found.text.startswith("a on a phone is slower than a on a laptop: ")


def test_work_is_matched_by_name_and_then_by_settings():
    generator = rng()
    taken = samples(generator, 1.0, rounds=10)
    first = result(variant("a", taken), variant("x", taken, settings={"size": "1x1"}))
    second = result(
        variant("y", taken, settings={"size": "1x1"}), variant("a", taken), machine="a phone"
    )
    pairs = [(a.name, b.name) for a, b in verdict.matched(first, second)]
    assert pairs == [("a", "a"), ("x", "y")]
    third = result(variant("a", taken), variant("z", taken, settings={"size": "2x2"}))
    assert [b.name for _, b in verdict.matched(first, third)] == ["a"]


# --- whether a run can be trusted ---------------------------------------------------------------


def told(taken, **more):
    found = result(variant("a", taken), variant("b", taken), **more)
    return verdict.warnings(found), verdict.is_steady(found)


def test_a_steady_run_is_not_warned_of():
    steady = samples(rng(), 1.0, noise=0.01, speed=lambda part: 1e9, waited=lambda part: 0.0)
    assert told(steady) == ([], True)


@pytest.mark.parametrize(
    "clock, speed, reason",
    [
        (lambda part: 3000 - 900 * part, lambda part: 1e9, "throttled"),
        (lambda part: 2600.0, lambda part: 1e9 * (1 - 0.3 * part), "bare loop slowed down by"),
        (lambda part: 2600.0, lambda part: 1e9, "a neighbour began, or memory is short"),
    ],
    ids=["clock", "loop", "neither"],
)
def test_a_throttle_is_flagged_with_what_shows_it(clock, speed, reason):
    slower = samples(rng(), 1.0, noise=0.02, factor=lambda p: 1 + 0.3 * p, mhz=clock, speed=speed)
    warnings, steady = told(slower)
    assert not steady
    assert "times rose by" in warnings[0]
    assert reason in warnings[0]


def test_a_run_that_warms_up_is_flagged():
    faster = samples(rng(), 1.0, noise=0.02, factor=lambda part: 1 - 0.3 * part)
    warnings, _ = told(faster)
    assert "times fell by" in warnings[0]


def test_a_neighbour_is_flagged():
    warnings, steady = told(samples(rng(), 1.0, noise=0.02, waited=lambda part: 0.4 * (part > 0.5)))
    assert not steady
    assert any("other processes had the cores for 2" in text for text in warnings)
    warnings, _ = told(samples(rng(), 1.0, noise=0.02, stolen=lambda part: 0.2))
    assert any("hypervisor took 20%" in text for text in warnings)


def test_times_that_spread_are_not_to_be_quoted():
    warnings, _ = told(samples(rng(), 1.0, rounds=40, noise=0.2))
    assert any("do not quote" in text for text in warnings)
