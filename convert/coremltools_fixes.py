"""What coremltools 9.0 needs beside the torch and numpy that this project pins; one reason each.

tests/test_coreml.py fails for each of these as soon as coremltools no longer needs it.
"""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any


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
