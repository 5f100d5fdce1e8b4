"""Palettes and integers: weights in a few bits, with the table or the scales that undo it.

Output channels are on axis 0: (out, in, kh, kw), (out, in) or (vocabulary, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..parity import FP16_MAX, PSNR_CAP
from .recipe import Form

TINY = 2.0**-24  # the least positive fp16
BINS = 512  # of the dynamic programme, or 4 per entry; so many distinct values get the optimum
ROUNDS = 300  # of Lloyd's iteration at most; one costs microseconds
CHUNK = 1 << 17  # values, so that the trials of scales stay in the cache
# Steps that the range of a row is divided into, by (bits, symmetric).  More steps than there are
# integers clip the range; fewer, as whole numbers, find the scale of what was quantized before.
STEPS = {
    (4, True): [*range(1, 7), *np.arange(6.5, 10, 0.25), *np.geomspace(10, 56, 13)],
    (4, False): [*range(1, 14), *np.arange(13.5, 18, 0.5), *np.geomspace(18, 100, 13)],
    (8, True): [*range(120, 132), *np.geomspace(132, 4 * 127, 20)],
    (8, False): [254, *np.geomspace(255, 4 * 255, 24)],
}
ONLY_EXACT = 254  # 255 steps may round to 254; wins only without error, else 253 would follow


@dataclass(frozen=True)
class Palette:
    """A look-up table per `group` output channels; an index into it per weight."""

    lut: np.ndarray  # (groups, 2**bits) float16, ascending
    indices: np.ndarray  # uint8, the weight's shape
    bits: int
    group: int

    @property
    def bytes(self) -> int:
        """Storage: indices packed at `bits` bits, tables in fp16."""
        return _packed(self.indices.size, self.bits) + 2 * self.lut.size

    def dequantize(self) -> np.ndarray:
        """The weights as float32."""
        rows = self.indices.reshape(len(self.lut), -1).astype(np.intp)
        found = np.take_along_axis(self.lut.astype(np.float32), rows, axis=1)
        return found.reshape(self.indices.shape)


@dataclass(frozen=True)
class Integers:
    """Weights as (values - zero_point) * scale; int4 is stored as int8 in -8..7.

    `scale` and `zero_point` have the rank of the weight: (out, 1, 1, 1) per channel,
    (out, in / block, 1, 1) per block, ones only per tensor.
    """

    values: np.ndarray  # int8, the weight's shape
    scale: np.ndarray  # float16
    zero_point: np.ndarray | None  # int8, the shape of `scale`; None: symmetric
    bits: int
    block: int  # input channels that share a scale; 0: all

    @property
    def bytes(self) -> int:
        """Storage: values and zero points packed at `bits` bits, scales in fp16."""
        zeros = 0 if self.zero_point is None else self.zero_point.size
        return (
            _packed(self.values.size, self.bits) + 2 * self.scale.size + _packed(zeros, self.bits)
        )

    def dequantize(self) -> np.ndarray:
        """The weights as float32."""
        rows = self.values.reshape(self.scale.size, -1).astype(np.float32)
        if self.zero_point is not None:
            rows -= self.zero_point.reshape(-1, 1)
        rows *= self.scale.astype(np.float32).reshape(-1, 1)
        return rows.reshape(self.values.shape)


def fits(shape: tuple[int, ...], form: Form) -> str | None:
    """Why a weight of that shape cannot take the form, or None if it can."""
    if form.granularity == "grouped" and (not shape or shape[0] % form.group):
        found = f"{shape[0]} output channels do" if shape else "a single value does"
        return f"{found} not divide into groups of {form.group}"
    if form.granularity == "channel" and not shape:
        return "a single value has no output channels"
    if form.granularity == "block" and len(shape) < 2:
        return f"{len(shape)} dimensions have no input values to divide into blocks"
    if form.granularity == "block" and shape[1] % form.group:
        return f"{shape[1]} input values do not divide into blocks of {form.group}"
    return None


def quantize(
    array: np.ndarray, form: Form, importance: np.ndarray | None = None
) -> Palette | Integers:
    """Quantize weights with the least squared error, weighted by `importance` if it is given.

    `importance` is not negative and broadcasts to the weight's shape.  ValueError says in one
    line why the weights cannot take the form.
    """
    with np.errstate(over="ignore"):  # it becomes infinite, which is refused
        array = np.asarray(array, np.float32)
    _check(array, form)
    weight = None if importance is None else _spread_importance(importance, array.shape)
    return (_palette if form.kind == "palette" else _integers)(array, form, weight)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Values of 1, 2, 3, 4, 6 or 8 bits as bytes without gaps, the first least significant."""
    each, values = 24 // bits, values.reshape(-1)
    words = np.zeros(-(-values.size // each), "<u4")  # three bytes of each are used
    for k in range(each):
        part = values[k::each]
        words[: part.size] |= part.astype("<u4") << (k * bits)
    return words.view(np.uint8).reshape(-1, 4)[:, :3].reshape(-1)[: _packed(values.size, bits)]


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """What `pack` was given: `count` values, as uint8."""
    each, count = 24 // bits, int(count)
    padded = np.zeros((-(-count // each), 4), np.uint8)
    whole, rest = divmod(packed.size, 3)
    padded[:whole, :3] = packed[: 3 * whole].reshape(-1, 3)
    if rest:
        padded[whole, :rest] = packed[3 * whole :]
    words, values = padded.view("<u4")[:, 0], np.empty((len(padded), each), np.uint8)
    for k in range(each):
        np.copyto(values[:, k], (words >> (k * bits)) & ((1 << bits) - 1), casting="unsafe")
    return values.reshape(-1)[:count]


def error(array: np.ndarray, quantized: Palette | Integers) -> dict[str, float]:
    """For reports: the RMS error relative to the RMS of the weights, and that in dB."""
    original = np.asarray(array, np.float32)
    noise = _energy(original - quantized.dequantize())
    signal = _energy(original)
    relative = math.sqrt(noise / signal) if signal else math.inf if noise else 0.0
    snr = PSNR_CAP if relative == 0 else min(PSNR_CAP, -20 * math.log10(relative))
    return {"relative_rms": relative, "snr": snr}


def _packed(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _energy(array: np.ndarray) -> float:
    return float(np.sum(np.square(array, dtype=np.float64)))


def _check(array: np.ndarray, form: Form) -> None:
    if not form.quantizes:
        raise ValueError(f"{form} is a plain cast: only palettes and integers are quantized")
    if not array.size:
        raise ValueError(f"a weight of shape {array.shape} has no values")
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise ValueError(f"{bad:,} of {array.size:,} weights are NaN or infinite")
    if reason := fits(array.shape, form):
        raise ValueError(f"{form}: {reason}")


def _spread_importance(importance: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    given = np.asarray(importance, np.float32)
    if not (np.isfinite(given).all() and (given >= 0).all()):
        raise ValueError("importance holds a value that is negative, NaN or infinite")
    try:
        return np.broadcast_to(given, shape)
    except ValueError:
        raise ValueError(
            f"importance of shape {given.shape} does not fit weights {shape}"
        ) from None


# --- palettes: one-dimensional k-means over the distinct fp16 values -----------------------------


def _palette(array: np.ndarray, form: Form, weight: np.ndarray | None) -> Palette:
    channels = array.shape[0] if array.shape else 1
    group = form.group or channels
    rows = array.reshape(channels // group, -1)
    weights = [None] * len(rows) if weight is None else weight.reshape(len(rows), -1)
    size = 2**form.bits
    lut = np.stack([_table(r, w, size) for r, w in zip(rows, weights, strict=True)])
    indices = np.empty(rows.shape, np.uint8)
    for row, centers, out in zip(rows, lut.astype(np.float32), indices, strict=True):
        out[:] = _nearest(row, centers)
    return Palette(lut.astype(np.float16), indices.reshape(array.shape), form.bits, group)


def _nearest(row: np.ndarray, centers: np.ndarray) -> np.ndarray:
    middles = (centers[1:] + centers[:-1]) / 2
    return np.searchsorted(middles, row)


def _table(row: np.ndarray, weight: np.ndarray | None, size: int) -> np.ndarray:
    """The `size` fp16 values, ascending, that stand for the row with the least squared error."""
    values, mass = _histogram(row, weight)
    if len(values) <= size:
        return np.pad(values, (0, size - len(values)), mode="edge")
    sums = np.stack([_outward(mass * values**power, values) for power in range(3)])
    starts = _starts(values, mass, sums, size)  # rounding stalls the iteration: without it, too
    results = [_lloyd(values, sums, s, d) for s in starts for d in (np.float16, np.float64)]
    return min(results, key=lambda centers: _loss(values, sums, centers))


def _histogram(row: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of the row in fp16, ascending, and how much each one weighs."""
    largest = float(np.abs(row).max())
    if largest > FP16_MAX:
        raise ValueError(f"a weight has magnitude {largest:.4g}, a table in fp16 ends at 65504")
    if weight is not None and not weight.any():
        weight = None
    pattern = (row.astype(np.float16) + np.float16(0)).view(np.uint16)  # + 0 makes -0 equal 0
    mass = np.zeros(1 << 16)
    for part in (slice(i, i + CHUNK) for i in range(0, len(pattern), CHUNK)):  # in the cache
        mass += np.bincount(pattern[part], None if weight is None else weight[part], 1 << 16)
    used = np.flatnonzero(mass)
    values = used.astype(np.uint16).view(np.float16).astype(np.float64)
    order = np.argsort(values)
    return values[order], mass[used][order].astype(np.float64)


def _outward(terms: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Prefix sums that count from the value 0, so that outliers do not swamp small values."""
    zero = int(np.searchsorted(values, 0.0))
    below = -np.cumsum(terms[:zero][::-1])[::-1]
    return np.concatenate([below, [0.0], np.cumsum(terms[zero:])])


def _starts(values: np.ndarray, mass: np.ndarray, sums: np.ndarray, size: int) -> list[np.ndarray]:
    """Edges of clusters to begin with: quantiles, and the optimum over bins of values."""
    gaps = np.gradient(values)
    bins = _divide(
        np.cbrt(mass * gaps**2), max(BINS, 4 * size)
    )  # density ** (1/3): Panter and Dite 1951
    return [_divide(mass, size), bins[_optimum(sums[:, bins], size)]]


def _divide(mass: np.ndarray, count: int) -> np.ndarray:
    """Edges that divide the values into at most `count` runs of about equal mass."""
    if len(mass) <= count:
        return np.arange(len(mass) + 1)
    total = np.cumsum(mass)
    inner = np.searchsorted(total, total[-1] * np.arange(1, count) / count)
    return np.unique(np.concatenate([[0], inner, [len(mass)]]))


def _optimum(sums: np.ndarray, size: int) -> np.ndarray:
    """Edges of the `size` runs of bins with the least loss, by dynamic programming.

    `sums` are the prefix sums at the edges of the bins.  Wang and Song 2011, Ckmeans.1d.dp.
    """
    count = sums.shape[1]
    loss = _run_loss(*(s[:, None] - s[None, :] for s in sums))  # [end, start]
    loss[np.triu_indices(count)] = np.inf
    best, back = loss[:, 0].copy(), np.zeros((size, count), np.int32)
    total = np.empty_like(loss)
    for used in range(1, size):
        np.add(loss, best, out=total)
        back[used] = total.argmin(axis=1)
        best = total[np.arange(count), back[used]]
    edges = [count - 1]
    for used in range(size - 1, -1, -1):
        edges.append(back[used][edges[-1]])
    return np.array(edges[::-1])


def _run_loss(mass: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared error of runs of values around their means rounded to fp16."""
    mean = _mean(mass, first)
    return np.maximum(second - mean * (2 * first - mean * mass), 0.0)


def _mean(mass: np.ndarray, first: np.ndarray, dtype: type = np.float16) -> np.ndarray:
    mean = np.divide(first, mass, out=np.zeros_like(first), where=mass > 0)
    return mean.astype(dtype).astype(np.float64)


def _means(sums: np.ndarray, edges: np.ndarray, dtype: type) -> np.ndarray:
    mass, first = np.diff(sums[:2, edges])
    return _mean(mass, first, dtype)


def _lloyd(values: np.ndarray, sums: np.ndarray, edges: np.ndarray, dtype: type) -> np.ndarray:
    """Move centres to their clusters' means and edges half-way between centres, until they rest."""
    centers = _means(sums, edges, dtype)
    for _ in range(ROUNDS):
        edges = _edges(values, centers)
        moved = np.where(np.diff(edges) > 0, _means(sums, edges, dtype), centers)
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers.astype(np.float16).astype(np.float64)


def _edges(values: np.ndarray, centers: np.ndarray) -> np.ndarray:
    inner = np.searchsorted(values, (centers[1:] + centers[:-1]) / 2)
    return np.concatenate([[0], inner, [len(values)]])


def _loss(values: np.ndarray, sums: np.ndarray, centers: np.ndarray) -> float:
    mass, first, second = np.diff(sums[:, _edges(values, centers)])
    return float(np.sum(second - centers * (2 * first - centers * mass)))


# --- integers: for every row of values that share a scale, the best of some trials ---------------


def _integers(array: np.ndarray, form: Form, weight: np.ndarray | None) -> Integers:
    shape = _scale_shape(array.shape, form)
    count = math.prod(shape)
    rows = array.reshape(count, -1)  # a block of input channels with all taps is contiguous
    weights = None if weight is None else weight.reshape(count, -1)
    scale, zero = np.empty((2, count, 1), np.float32)
    values = np.empty(rows.shape, np.int8)
    step = max(1, CHUNK // rows.shape[1])
    for part in (slice(i, i + step) for i in range(0, count, step)):
        piece = None if weights is None else weights[part]
        scale[part], zero[part] = _scales(rows[part], piece, form)
        values[part] = _round(rows[part], scale[part], zero[part], form)
    zeros = None if form.symmetric else zero.astype(np.int8).reshape(shape)
    scales = scale.astype(np.float16).reshape(shape)
    return Integers(values.reshape(array.shape), scales, zeros, form.bits, form.group)


def _scale_shape(shape: tuple[int, ...], form: Form) -> tuple[int, ...]:
    """One scale for all, per output channel, or per block of input channels with all taps."""
    if form.granularity == "tensor":
        return (1,) * len(shape)
    if form.granularity == "channel":
        return (shape[0],) + (1,) * (len(shape) - 1)
    return (shape[0], shape[1] // form.group) + (1,) * (len(shape) - 2)


def _limits(form: Form) -> tuple[int, int]:
    """The least and the greatest integer: -8..7, -128..127, or -127..127 where symmetric."""
    top = 2 ** (form.bits - 1) - 1
    return (-top if form.bits == 8 and form.symmetric else -top - 1), top


def _scales(
    rows: np.ndarray, weights: np.ndarray | None, form: Form
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of every row, (rows, 1) float32, with the least squared error."""
    if weights is not None:
        weights = np.where(weights.any(axis=1, keepdims=True), weights, np.float32(1))
    low = np.minimum(rows.min(axis=1, keepdims=True), 0)
    high = np.maximum(rows.max(axis=1, keepdims=True), 0)
    best = np.full(low.shape, np.inf, np.float32)
    scale, zero = np.ones_like(low), np.zeros_like(low)
    for steps in STEPS[form.bits, form.symmetric]:
        trial = _trial(low, high, float(steps), form)
        loss = _loss_of(rows, weights, *trial, form)
        better = loss == 0 if steps == ONLY_EXACT else loss < best
        best[better] = loss[better]
        scale[better], zero[better] = trial[0][better], trial[1][better]
    return scale, zero


def _trial(
    low: np.ndarray, high: np.ndarray, steps: float, form: Form
) -> tuple[np.ndarray, np.ndarray]:
    """Scale, as fp16 has it, and zero point if the range is divided into `steps`."""
    least, greatest = _limits(form)
    levels = greatest if form.symmetric else greatest - least
    reach = np.maximum(-low, high) if form.symmetric else high - low
    scale = _fp16_scale(reach, steps, levels)
    if form.symmetric:
        return scale, np.zeros_like(scale)
    clip = min(1.0, levels / steps)
    return scale, np.clip(np.rint(least - clip * low / scale), least, greatest)


def _fp16_scale(reach: np.ndarray, steps: float, levels: int) -> np.ndarray:
    """reach / steps, rounded to a positive fp16; rows of zeros get 1."""
    needed = float(reach.max()) / levels
    if needed > FP16_MAX:
        raise ValueError(f"a scale of {needed:.4g} is needed, fp16 ends at 65504")
    inside = np.clip(reach / np.float32(steps), TINY, FP16_MAX)
    return np.where(reach == 0, np.float32(1), inside.astype(np.float16).astype(np.float32))


def _round(rows: np.ndarray, scale: np.ndarray, zero: np.ndarray, form: Form) -> np.ndarray:
    result = rows / scale
    np.rint(result, out=result)
    result += zero
    return np.clip(result, *_limits(form), out=result)


def _loss_of(
    rows: np.ndarray, weights: np.ndarray | None, scale: np.ndarray, zero: np.ndarray, form: Form
) -> np.ndarray:
    """Squared error of every row, (rows, 1), if it is stored like that."""
    off = _round(rows, scale, zero, form)
    off -= zero
    off *= scale
    off -= rows
    if weights is None:
        return np.einsum("ij,ij->i", off, off)[:, None]
    return np.einsum("ij,ij,ij->i", off, off, weights)[:, None]
