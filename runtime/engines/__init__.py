"""Engines: what runs a component.  One is a callable, arrays by name in, float32 arrays out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...bundle import Bundle, BundleError

Arrays = dict[str, np.ndarray]
Engine = Callable[[Arrays], Arrays]


def open_engine(bundle: Bundle, component: str, threads: int | None = None) -> Engine:
    """Load a component of the bundle on the engine of its target; dropping the result frees it.

    Raises BundleError if the component cannot be loaded.
    """
    match bundle.manifest.target:
        case "onnx":
            from .onnx import OnnxEngine

            return OnnxEngine(bundle, component, threads)
        case target:
            raise BundleError(f"this ferrotype has no engine for target {target!r}, only for onnx")
