"""GGML's quantized types: blocks of a few bits and their scales, expanded to float32.

Every function takes rows of uint8, one row a block.  Numbers lie in bit planes: a run of bytes has
the first values in its lowest bits, then as many in the next ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Scales = tuple[np.ndarray, np.ndarray | None]  # (blocks, groups) each: factors, minima


@dataclass(frozen=True)
class Plane:
    """Where a number's bits lie in a block, how many they are, and the bytes of a run."""

    start: int
    bytes: int
    bits: int
    run: int

    def unpack(self, blocks: np.ndarray) -> np.ndarray:
        """(blocks, values) whole numbers below 2 ** bits."""
        raw = blocks[:, self.start : self.start + self.bytes].reshape(len(blocks), -1, 1, self.run)
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]
        return (raw >> shifts & np.uint8((1 << self.bits) - 1)).reshape(len(blocks), -1)


@dataclass(frozen=True)
class Layout:
    """A type whose value is factor * (number - middle) - minimum, by group.

    `high` are the bits above those of `low`.
    """

    values: int
    bytes: int
    low: Plane
    scales: Callable[[np.ndarray], Scales]
    high: Plane | None = None
    middle: int = 0
    signed: bool = False

    def decode(self, raw: np.ndarray) -> np.ndarray:
        """Bytes of whole blocks to float32."""
        blocks = raw.reshape(-1, self.bytes)
        numbers = self.low.unpack(blocks)
        if self.high is not None:
            numbers |= self.high.unpack(blocks) << np.uint8(self.low.bits)
        factors, minima = self.scales(blocks)
        values = (
            numbers.view(np.int8 if self.signed else np.uint8)
            .astype(np.float32)
            .reshape(*factors.shape, -1)
        )
        values -= np.float32(self.middle)
        values *= factors[..., None]
        if minima is not None:
            values -= minima[..., None]
        return values.reshape(-1)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """(blocks, 1) float32 of the fp16 at this byte."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _one(blocks: np.ndarray) -> Scales:
    return _half(blocks, 0), None


def _one_and_minimum(blocks: np.ndarray) -> Scales:
    return _half(blocks, 0), -_half(blocks, 2)  # stored as what is added


def _q2_k(blocks: np.ndarray) -> Scales:
    """16 groups: the factor in the low four bits, the minimum in the high ones."""
    packed = blocks[:, :16]
    return _half(blocks, 80) * (packed & 15), _half(blocks, 82) * (packed >> 4)


def _q3_k(blocks: np.ndarray) -> Scales:
    """16 groups of 6 bits, around 32: four of each in 8 bytes, the upper two in 4 bytes."""
    six = Plane(96, 8, 4, 8).unpack(blocks) | Plane(104, 4, 2, 4).unpack(blocks) << 4
    return _half(blocks, 108) * (six.astype(np.float32) - 32), None


def _q4_k(blocks: np.ndarray) -> Scales:
    """8 groups of 6 bits, factors and minima.

    The first four are whole in 4 bytes each, whose top bits belong to the last four; the low bits
    of those are in 4 more bytes.
    """
    sums, rest = [], blocks[:, 12:16]
    for i, low in enumerate((rest & 15, rest >> 4)):
        whole = blocks[:, 4 + 4 * i : 8 + 4 * i]
        six = np.concatenate([whole & 63, low | whole >> 6 << 4], axis=1)
        sums.append(_half(blocks, 2 * i) * six)
    return sums[0], sums[1]


def _q6_k(blocks: np.ndarray) -> Scales:
    """16 groups of int8."""
    return _half(blocks, 208) * blocks[:, 192:208].view(np.int8), None


def _q8_k(blocks: np.ndarray) -> Scales:
    return np.ascontiguousarray(blocks[:, :4]).view("<f4"), None


LAYOUTS = {
    "Q8_0": Layout(32, 34, Plane(2, 32, 8, 32), _one, signed=True),
    "Q4_0": Layout(32, 18, Plane(2, 16, 4, 16), _one, middle=8),
    "Q4_1": Layout(32, 20, Plane(4, 16, 4, 16), _one_and_minimum),
    "Q5_0": Layout(32, 22, Plane(6, 16, 4, 16), _one, Plane(2, 4, 1, 1), middle=16),
    "Q5_1": Layout(32, 24, Plane(8, 16, 4, 16), _one_and_minimum, Plane(4, 4, 1, 1)),
    "Q2_K": Layout(256, 84, Plane(16, 64, 2, 32), _q2_k),
    "Q3_K": Layout(256, 110, Plane(32, 64, 2, 32), _q3_k, Plane(0, 32, 1, 32), middle=4),
    "Q4_K": Layout(256, 144, Plane(16, 128, 4, 32), _q4_k),
    "Q5_K": Layout(256, 176, Plane(48, 128, 4, 32), _q4_k, Plane(16, 32, 1, 32)),
    "Q6_K": Layout(256, 210, Plane(0, 128, 4, 64), _q6_k, Plane(128, 64, 2, 32), middle=32),
    "Q8_K": Layout(256, 292, Plane(4, 256, 8, 256), _q8_k, signed=True),  # sums follow, unread
}
