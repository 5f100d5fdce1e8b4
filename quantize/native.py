"""Weights in few bits in the order of the native engine: blocks of outputs, taps, inputs, outputs.

A tap of an output is a row here, so that int4's groups are of one tap; docs/engine.md.
"""

from __future__ import annotations

import numpy as np

from .recipe import Form
from .weights import Integers, quantize

BY_OUTPUT = Form("int", 8, "channel")


def to_int8(panel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, taps, inputs, 16) as int8, and the scale of every output, (blocks, 16) float32.

    ValueError for weights that are not finite.
    """
    blocks, taps, inputs, lanes = panel.shape
    rows = panel.transpose(0, 3, 1, 2).reshape(blocks * lanes, taps * inputs)
    found = quantize(rows, BY_OUTPUT)
    assert isinstance(found, Integers)
    values = found.values.reshape(blocks, lanes, taps, inputs).transpose(0, 2, 3, 1)
    return values, found.scale.astype(np.float32).reshape(blocks, lanes)


def to_int4(panel: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, taps, inputs, 16) as -8..7, and float16 scales, (blocks, taps, groups, 16).

    The last group is what is left of the inputs.  ValueError for weights that are not finite.
    """
    blocks, taps, inputs, lanes = panel.shape
    rows = panel.transpose(0, 3, 1, 2).reshape(-1, inputs)
    whole = inputs // group * group
    parts = [_groups(rows[:, :whole], group)] if whole else []
    parts += [_groups(rows[:, whole:], inputs - whole)] if whole < inputs else []
    values, scales = (np.concatenate(those, 1) for those in zip(*parts, strict=True))
    shape = (blocks, lanes, taps, -1)
    return values.reshape(shape).transpose(0, 2, 3, 1), scales.reshape(shape).transpose(0, 2, 3, 1)


def _groups(rows: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    found = quantize(rows, Form("int", 4, "block", group))
    assert isinstance(found, Integers)
    return found.values, found.scale
