"""From a checkpoint to a bundle: the only part that may import torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..bundle import Precision
from .checkpoint import ConvertError

if TYPE_CHECKING:
    from ..bundle import Bundle

__all__ = ["TARGETS", "ConvertError", "convert"]

TARGETS = ("onnx",)
STAGES = 13  # of a model with one text encoder; a second one makes 3 more


def convert(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    target: str = "onnx",
    weights: str = "fp16",
    activations: str = "fp32",
    size: tuple[int, int] | None = None,
    name: str | None = None,
    licence: str | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Bundle:
    """Convert a checkpoint folder to a bundle at `out`, which exists only once it was compared.

    `size` (width, height) fixes the picture size; by default every multiple of 8 works.
    `name` and `licence` are those of the checkpoint's folder and model card if not given.
    `progress` is told the name of every stage as it begins, STAGES in all, for SDXL 3 more.
    Raises ConvertError for a checkpoint or an option that does not work, ParityError for a result
    below its floor, BundleError if `out` cannot be written; nothing is left behind then.
    """
    if target not in TARGETS:
        raise ConvertError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    try:
        from .build import build
    except ModuleNotFoundError as error:
        raise ConvertError(
            f"converting needs {error.name}: install the extra, pip install '.[convert]' in a clone"
        ) from None
    precision = Precision(weights, activations)
    return build(checkpoint, out, precision, size, name, licence, force, progress)
