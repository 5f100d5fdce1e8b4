"""Noise from a seed, without torch: `noise = SEEDS["torch"](42)`, then `noise(shape)` per draw.

`TorchNoise` returns the very bits that torch.randn(shape, generator=torch.Generator("cpu")
.manual_seed(seed)) returns on x86-64 with AVX2 or AVX-512.  What differs elsewhere is measured in
docs/samplers.md.  Checked with torch 2.13 in tests/test_seeds.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

F32 = np.float32
Array32 = npt.NDArray[np.float32]
Noise = Callable[[tuple[int, ...]], Array32]

# Cephes' single precision polynomials (S. Moshier), highest power first.
LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
       -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
LN2 = (-2.12194440e-4, 0.693359375)  # low and high part
QUARTER_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)  # its negative


class TorchNoise:
    """The stream of one torch CPU generator; it advances with every call, as torch's does."""

    def __init__(self, seed: int) -> None:
        # torch keeps 64 bits of the seed, but its Mersenne twister starts from the low 32.
        self._engine = np.random.RandomState(_checked(seed, 64) & 0xFFFFFFFF)
        self._spare: float | None = None  # the second value of a pair drawn by a small call

    def __call__(self, shape: tuple[int, ...]) -> Array32:
        """Standard normal float32 of any shape; 16 values are the smallest vectorised draw."""
        count = math.prod(shape)
        values = self._blocks(count) if count >= 16 else self._singles(count)
        return values.reshape(shape)

    def _bits(self, count: int) -> npt.NDArray[np.uint32]:
        return self._engine.randint(0, 2**32, count, dtype=np.uint32)

    def _uniform(self, count: int) -> Array32:
        return (self._bits(count) & 0xFFFFFF).astype(F32) * F32(2**-24)

    def _blocks(self, count: int) -> Array32:
        """Blocks of 16; where the last one is incomplete, the last 16 values are drawn anew."""
        uniform = self._uniform(count)
        whole = count - count % 16
        values = np.empty(count, F32)
        values[:whole] = _box_muller(uniform[:whole])
        if whole < count:
            values[-16:] = _box_muller(self._uniform(16))
        return values

    def _singles(self, count: int) -> Array32:
        return np.array([self._single() for _ in range(count)], F32)

    def _single(self) -> float:
        """One value in double precision; every other one was kept from the call before."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        high, low, high2, low2 = (int(bits) for bits in self._bits(4))
        theta = 2 * math.pi * ((high << 32 | low) % 2**53 / 2**53)
        radius = math.sqrt(-2 * math.log1p(-((high2 << 32 | low2) % 2**53 / 2**53)))
        self._spare = radius * math.sin(theta)
        return radius * math.cos(theta)


def numpy_noise(seed: int) -> Noise:
    """NumPy's legacy stream, `np.random.RandomState(seed).randn`, rounded to float32."""
    engine = np.random.RandomState(_checked(seed, 32))
    return lambda shape: engine.standard_normal(shape).astype(F32)


def pcg64_noise(seed: int) -> Noise:
    """NumPy's current stream, `np.random.default_rng(seed).standard_normal` in float32."""
    engine = np.random.default_rng(_checked(seed, 64))
    return lambda shape: engine.standard_normal(shape, dtype=F32)


SEEDS: dict[str, Callable[[int], Noise]] = {
    "torch": TorchNoise,
    "numpy": numpy_noise,
    "pcg64": pcg64_noise,
}


def _checked(seed: int, bits: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ValueError(f"a seed is a whole number, not {seed!r}")
    if not 0 <= seed < 2**bits:
        raise ValueError(f"seed {seed} is outside 0 to {2**bits - 1}: choose one inside")
    return int(seed)


def _box_muller(uniform: Array32) -> Array32:
    """Uniform to normal, 8 pairs (j, j + 8) per block of 16, in float32 throughout."""
    pairs = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(F32(-2) * _log(F32(1) - pairs[:, 0]))
    sin, cos = _sincos(F32(2 * math.pi) * pairs[:, 1])
    # Adding the mean 0 turns -0 into 0.
    return np.stack([radius * cos, radius * sin], axis=1).reshape(-1) + F32(0)


def _log(x: Array32) -> Array32:
    """Natural logarithm of positive normal floats as torch's AVX2 code rounds it."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < F32(math.sqrt(0.5))
    e = (exponent - small).astype(F32)
    x = np.where(small, mantissa + mantissa, mantissa) - F32(1)
    z = x * x
    y = _fma(_horner(LOG, x) * x, z, e * F32(LN2[0]))
    y = y - z * F32(0.5)
    return _fma(e, F32(LN2[1]), x + y)


def _sincos(x: Array32) -> tuple[Array32, Array32]:
    """Sine and cosine of floats in [0, 2 pi] as torch's AVX2 code rounds them."""
    octant = ((x * F32(4 / math.pi)).astype(np.int32) + 1) & ~1
    for part in QUARTER_PI:
        x = _fma(octant.astype(F32), F32(part), x)
    z = x * x
    cos = _fma(_horner(COS, z) * z, z, -(z * F32(0.5))) + F32(1)
    sin = _fma(_horner(SIN, z) * z, x, x)
    swap = (octant & 2) != 0
    sin, cos = np.where(swap, cos, sin), np.where(swap, sin, cos)
    return (
        np.where((octant & 4) != 0, -sin, sin),
        np.where(((octant + 2) & 4) != 0, -cos, cos),
    )


def _horner(coefficients: tuple[float, ...], x: Array32) -> Array32:
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = _fma(y, x, F32(c))
    return y


def _fma(a: Array32, b: Array32 | F32, c: Array32 | F32) -> Array32:
    """a * b + c rounded once to float32, as the processor's fused instruction does."""
    product = np.multiply(a, b, dtype=np.float64)  # exact: 24 + 24 bits
    total = product + c
    # Rounding twice goes wrong only where the first rounding lands midway between two floats.
    midway = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if midway.any():
        back = total - product
        error = (product - (total - back)) + (c - back)  # of the first rounding, exactly
        toward = np.nextafter(total, np.copysign(np.inf, error))
        total = np.where(midway & (error != 0), toward, total)
    return total.astype(F32)
