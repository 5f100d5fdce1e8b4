"""Intervals without assumptions about how times are distributed: ranks, medians, pairs.

Times of programs have long tails and no bell curve.  A median's interval is between two of the
sorted values, by the binomial distribution; a ratio's is Hodges and Lehmann's (1963), by the
distribution of Wilcoxon's signed ranks for runs that took turns, by Mann and Whitney's for runs
that did not; a drift is from the first to the last quarter, tested by Mann and Kendall's count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

EXACT = 60  # values up to which distributions of ranks are counted, not approximated
FEWEST_FOR_DRIFT = 8
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure with its confidence interval; infinite bounds where too few values say nothing."""

    middle: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of its width, as a part of the figure."""
        return (self.high - self.low) / 2 / self.middle if self.middle else math.inf

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def inverse(self) -> Interval:
        """Of one over the figure."""
        return Interval(1 / self.middle, 1 / self.high, 1 / self.low if self.low else math.inf)


@dataclass(frozen=True)
class Drift:
    """How a series moved from its first quarter to its last.

    `change` is that of their medians, as a part of the whole's; `p` the chance of as clear a trend
    among values in any order.
    """

    change: float
    p: float


def median(values: Sequence[float]) -> float:
    return float(np.median(np.asarray(values, np.float64)))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median, and the sorted values that hold the true one with at least that confidence.

    With fewer than 6 values (for 95 %) no two of them do: the bounds are then 0 and infinity.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    middle = float(np.median(ordered))
    rank = _binomial_rank(len(ordered), 1 - confidence)
    if rank == 0:
        return Interval(middle, 0.0, math.inf)
    return Interval(middle, float(ordered[rank - 1]), float(ordered[-rank]))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], confidence: float) -> Interval:
    """ours / theirs of rounds in which both took their turn.

    The middle of all averages of two rounds' ratios (of their logarithms), and those of the
    averages that Wilcoxon's signed ranks leave with that confidence.
    """
    logs = np.log(np.asarray(ours, np.float64)) - np.log(np.asarray(theirs, np.float64))
    first, second = np.triu_indices(len(logs))
    averages = np.sort((logs[first] + logs[second]) / 2)
    return _between(averages, _signed_rank(len(logs), 1 - confidence))


def unpaired_ratio(ours: Sequence[float], theirs: Sequence[float], confidence: float) -> Interval:
    """ours / theirs of two series that were measured apart."""
    a, b = (np.log(np.asarray(values, np.float64)) for values in (ours, theirs))
    differences = np.sort((a[:, None] - b[None, :]).ravel())
    return _between(differences, _rank_sum(len(a), len(b), 1 - confidence))


def fewest_pairs(alpha: float) -> int:
    """Pairs from which on a ratio has an interval at that confidence: all may be on one side."""
    return math.ceil(math.log2(2 / alpha))


def drift(values: Sequence[float]) -> Drift | None:
    """How far values in the order of their measurement moved, at once or slowly; None of too few.

    A slope would not see what happens at once: most pairs lie on one side of it.
    """
    if len(values) < FEWEST_FOR_DRIFT:
        return None
    v = np.asarray(values, np.float64)
    quarter = len(v) // 4
    first, last, middle = (float(np.median(part)) for part in (v[:quarter], v[-quarter:], v))
    earlier, later = np.triu_indices(len(v), 1)
    count = float(np.sign(v[later] - v[earlier]).sum())
    return Drift((last - first) / middle if middle else 0.0, _kendall_p(count, v))


def outliers(values: Sequence[float]) -> int:
    """How many are farther above the median than 5 times the usual distance from it."""
    v = np.asarray(values, np.float64)
    distance = float(np.median(np.abs(v - np.median(v))))
    return int((v > np.median(v) + 5 * max(distance, 1e-12)).sum())


# --- distributions of ranks ---------------------------------------------------------------------


def _between(ordered: Floats, rank: int) -> Interval:
    """The middle of sorted logarithms, and the values `rank` from either end; 0: none do."""
    middle = math.exp(float(np.median(ordered)))
    if rank == 0:
        return Interval(middle, 0.0, math.inf)
    return Interval(middle, math.exp(float(ordered[rank - 1])), math.exp(float(ordered[-rank])))


@functools.cache
def _binomial_rank(count: int, alpha: float) -> int:
    """The largest k so that the k-th value from either end holds the median between them."""
    below, rank = 0.0, 0
    for k in range(count // 2):
        below += math.exp(_log_choose(count, k) - count * math.log(2))
        if 2 * below > alpha:
            break
        rank = k + 1
    return rank


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@functools.cache
def _signed_rank(count: int, alpha: float) -> int:
    """The same among averages of pairs: sums of the ranks 1 to `count`, each with either sign."""
    total = count * (count + 1) // 2
    if count > EXACT:
        sigma = math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
        return _normal_rank(total / 2, sigma, alpha)
    ways = np.zeros(total + 1)
    ways[0] = 1.0
    for rank in range(1, count + 1):
        ways[rank:] = ways[rank:] + ways[:-rank]
        ways /= 2
    return _tail_rank(ways, alpha)


@functools.cache
def _rank_sum(m: int, n: int, alpha: float) -> int:
    """The same among all differences of two series: how many of m x n pairs are the wrong way."""
    if m > EXACT or n > EXACT:
        return _normal_rank(m * n / 2, math.sqrt(m * n * (m + n + 1) / 12), alpha)
    # ways[j][u]: choices of j values of the first series with u pairs
    ways = np.zeros((m + 1, m * n + 1))
    ways[0, 0] = 1.0
    for place in range(1, m + n + 1):  # by ranks: the j-th chosen lies above place - j of the other
        for j in range(min(m, place), 0, -1):
            shift = place - j
            if shift <= n:
                ways[j, shift:] += ways[j - 1, : m * n + 1 - shift]
    return _tail_rank(ways[m] / ways[m].sum(), alpha)


def _tail_rank(chances: Floats, alpha: float) -> int:
    """How many values of a count, from 0 on, have less than half of alpha together."""
    below = 2 * np.cumsum(chances)
    return int(np.searchsorted(below, alpha, side="right"))


def _normal_rank(mean: float, sigma: float, alpha: float) -> int:
    return max(0, int(mean - _normal_quantile(1 - alpha / 2) * sigma))


def _normal_quantile(p: float) -> float:
    """By bisection of the error function; p above 0.5."""
    low, high = 0.0, 12.0
    for _ in range(60):
        middle = (low + high) / 2
        if math.erf(middle / math.sqrt(2)) < 2 * p - 1:
            low = middle
        else:
            high = middle
    return low


def _kendall_p(count: float, values: Floats) -> float:
    """Of a count of rising less falling pairs as far from zero; ties are counted out."""
    n = len(values)
    ties = np.unique(values, return_counts=True)[1].astype(np.float64)
    variance = (n * (n - 1) * (2 * n + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
    if variance <= 0:
        return 1.0
    z = max(0.0, abs(count) - 1) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))
