"""What coremltools 9.0 needs beside the torch and numpy that this project pins; one reason each.

tests/test_coreml.py fails for a mended fault as soon as coremltools no longer has it.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..parity import FP16_MAX


@functools.cache
def coremltools() -> Any:
    """The module, quiet and mended; imported on first use since that takes seconds."""
    logger = logging.getLogger("coremltools")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logger.level
        # It logs that libraries of macOS are missing, and that newer torch was not tried.
        logging.disable(logging.ERROR)
        try:
            import coremltools as ct
        finally:
            logging.disable(logging.NOTSET)
            logger.setLevel(max(level, logging.ERROR))
    add_alias(ct)
    mend_cast(ct)
    look_once_for_overflow(ct)
    return ct


def add_alias(ct: Any) -> None:
    """torch.export of torch 2.13 emits aten.alias (CLIP's embeddings), which has no translation."""
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    @register_torch_op(override=True)
    def alias(context, node):
        [x] = _get_inputs(context, node, expected=1)
        context.add(x, torch_name=node.name)


def mend_cast(ct: Any) -> None:
    """numpy 2.4 made int(array of one element) an error, which the translation of casts does."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops

    original = ops._cast

    @functools.wraps(original)
    def cast(context, node, dtype, dtype_name):
        [x] = ops._get_inputs(context, node, expected=1)
        if x.val is not None and getattr(x.val, "size", 0) == 1 and getattr(x.val, "ndim", 0):
            context.add(mb.const(val=dtype(x.val.item()), name=node.name), node.name)
        else:
            original(context, node, dtype, dtype_name)

    ops._cast = cast


def look_once_for_overflow(ct: Any) -> None:
    """coremltools 9.0 makes index arrays of every weight to find what fp16 cannot hold.

    That is a third of a full-size translation and 0.8 GB at its peak; the extremes tell as much.
    """
    kind = ct.transform.FP16ComputePrecision
    original = kind.fp16_overflow

    def overflows(op):
        every = (v if isinstance(v, (list, tuple)) else [v] for v in op.inputs.values())
        return any(_is_large(var) for given in every for var in given) and original(op)

    kind.fp16_overflow = staticmethod(overflows)


def _is_large(var: Any) -> bool:
    """Whether a constant holds what fp16 does not, infinity and NaN among it."""
    if var.op is None or var.op.op_type != "const":
        return False
    value = np.asarray(var.op.val.val)
    if value.dtype != np.float32 or not value.size:
        return False
    return not max(float(value.max()), -float(value.min())) <= FP16_MAX


@contextmanager
def validated_once() -> Iterator[None]:
    """coremltools 9.0 validates the whole program after each of a hundred passes: here, not."""
    from coremltools.converters.mil.mil import Program

    original = Program.validate
    Program.validate = lambda self, *_, **__: None
    try:
        yield
    finally:
        Program.validate = original
