"""Weights rounded to 16 bits, with what is lost told; numpy alone."""

from __future__ import annotations

import numpy as np

from .checkpoint import ConvertError


def to_half(name: str, array: np.ndarray, lost: dict[str, int]) -> np.ndarray:
    """Round to float16; what becomes Inf is an error, what becomes 0 is counted in `lost`."""
    with np.errstate(over="ignore", under="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise ConvertError(
            f"{name} reaches {np.abs(array).max():.4g}, float16 ends at 65504; use weights fp32"
        )
    if zeros := int(((half == 0) & (array != 0)).sum()):
        lost[name] = zeros
    return half


def to_bf16(name: str, array: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, nearest even, as its bits in uint16; Inf is an error."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    odd += 0x7FFF
    odd += bits
    rounded = (odd >> 16).astype(np.uint16)
    if ((rounded & 0x7FFF) >= 0x7F80).any():
        raise ConvertError(
            f"{name} reaches {np.abs(array).max():.4g}, bfloat16 ends at 3.39e38; use weights fp32"
        )
    return rounded
