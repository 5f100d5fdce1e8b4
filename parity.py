"""How close what was written is to the original: PSNR, cosine, a census; named floors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .errors import FerrotypeError

FP16_MAX = 65504.0
PSNR_CAP = 200.0  # dB; equal arrays have an infinite PSNR, which JSON cannot hold

# In dB, by (weights, activations): `component` for every output of a network on realistic inputs,
# `picture` for the final RGB picture of the fixed prompt and seed.
FLOORS = {
    ("fp32", "fp32"): {"component": 80.0, "picture": 45.0},
    ("fp16", "fp32"): {"component": 50.0, "picture": 40.0},
    ("fp16", "fp16"): {"component": 40.0, "picture": 35.0},
    # bfloat16 has 8 bits of precision where fp16 has 11; 10 dB or more below the lowest that random
    # and trained models reached.
    ("bf16", "fp32"): {"component": 45.0, "picture": 37.0},
    ("bf16", "bf16"): {"component": 40.0, "picture": 32.0},
    # Weights quantized to so many bits at the least, whatever the rest computes in; a few dB
    # below the lowest that random and trained models reached (benchmarks/results/coreml.md).
    ("8-bit", "fp32"): {"component": 45.0, "picture": 35.0},
    ("6-bit", "fp32"): {"component": 35.0, "picture": 25.0},
    ("4-bit", "fp32"): {"component": 22.0, "picture": 15.0},
    ("2-bit", "fp32"): {"component": 14.0, "picture": 8.0},
}
# The native engine: bf16, or int8 as well where it meets weights of int8.
FLOORS |= {
    ("8-bit", "bf16"): {"component": 35.0, "picture": 30.0},
    ("8-bit", "int8"): {"component": 25.0, "picture": 22.0},
    ("4-bit", "bf16"): {"component": 20.0, "picture": 15.0},
    ("4-bit", "int8"): {"component": 20.0, "picture": 15.0},
}
FLOORS |= {(weights, "fp16"): floor for (weights, _), floor in FLOORS.items() if "bit" in weights}


class ParityError(FerrotypeError):
    """What was written differs from the original by more than the named floor allows."""


@dataclass(frozen=True)
class Census:
    """What an array holds: how many NaN and Inf, and the largest finite magnitude."""

    nan: int
    inf: int
    max_abs: float

    @property
    def fp16_headroom(self) -> float:
        """How many times the largest finite magnitude fits below fp16's limit of 65504."""
        return FP16_MAX / max(self.max_abs, 1e-30)


@dataclass(frozen=True)
class Comparison:
    """One output of a network against the original's, over all recorded runs."""

    psnr: float  # dB, against the peak-to-peak range of the original
    cosine: float
    max_error: float
    census: Census  # of the output found


def census(array: np.ndarray) -> Census:
    """Count what would draw a black picture; `max_abs` is over the finite values."""
    finite = np.isfinite(array)
    nan = int(np.isnan(array).sum())
    largest = float(np.abs(array, where=finite, out=np.zeros(array.shape)).max(initial=0.0))
    return Census(nan, array.size - int(finite.sum()) - nan, largest)


def psnr(reference: np.ndarray, found: np.ndarray, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB, at most PSNR_CAP; -inf never: not-a-number counts as 0 dB.

    `peak` is the range that the signal may have: 1 for a picture in [0, 1]; by default the range
    that `reference` has.
    """
    a, b = np.asarray(reference, np.float64), np.asarray(found, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} in the original, {b.shape} found")
    if not np.isfinite(b).all():
        return 0.0
    error = math.sqrt(np.mean((a - b) ** 2))
    peak = float(np.ptp(a)) if peak is None else peak
    if error == 0.0:
        return PSNR_CAP
    return max(0.0, min(PSNR_CAP, 20 * math.log10(max(peak, 1e-30) / error)))


def cosine(reference: np.ndarray, found: np.ndarray) -> float:
    """Cosine of the angle between two arrays seen as vectors; 1 if both are zero, 0 if one is.

    Also 0 if a value is not finite.
    """
    a, b = np.ravel(reference).astype(np.float64), np.ravel(found).astype(np.float64)
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    if norm == 0.0:
        return float(np.array_equal(a, b))
    return float(a @ b / norm) if math.isfinite(norm) else 0.0


def compare(reference: list[np.ndarray], found: list[np.ndarray]) -> Comparison:
    """Compare an output over several runs as one long signal.

    Raises ValueError when shapes or the number of runs differ.
    """
    if len(reference) != len(found):
        raise ValueError(f"{len(reference)} runs of the original, {len(found)} found")
    for a, b in zip(reference, found, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"shapes differ: {a.shape} in the original, {b.shape} found")
    a = np.concatenate([np.ravel(x).astype(np.float64) for x in reference])
    b = np.concatenate([np.ravel(x).astype(np.float64) for x in found])
    counts = census(b)
    error = float(np.abs(a - b).max()) if counts.nan + counts.inf == 0 else FP16_MAX
    return Comparison(psnr(a, b), cosine(a, b), error, counts)


def floors(weights: str, activations: str) -> dict[str, float]:
    """The named floors of a precision, in dB; ValueError lists the precisions that have some."""
    try:
        return FLOORS[weights, activations]
    except KeyError:
        known = ", ".join(f"{w} weights with {a} activations" for w, a in FLOORS)
        raise ValueError(
            f"no floor for {weights} weights with {activations} activations; there is: {known}"
        ) from None


def check(name: str, found: float, floor: float, hint: str = "") -> None:
    """Raise ParityError if a PSNR is below its floor."""
    if found < floor:
        raise ParityError(f"{name}: PSNR {found:.1f} dB, the floor is {floor:.0f} dB{hint}")


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Plain numbers, rounded to what means something, for the manifest."""
    flat = asdict(comparison)
    del flat["census"]
    digits = {"psnr": 2, "cosine": 9}
    flat = {k: round(v, digits[k]) if k in digits else float(f"{v:.3g}") for k, v in flat.items()}
    return {**flat, **census_as_json(comparison.census)}


def census_as_json(counts: Census) -> dict[str, Any]:
    """Plain numbers for the manifest."""
    return {
        "nan": counts.nan,
        "inf": counts.inf,
        "max_abs": float(f"{counts.max_abs:.4g}"),
        "fp16_headroom": float(f"{counts.fp16_headroom:.3g}"),
    }
