"""Engines: what runs a component.  One is a callable, arrays by name in, float32 arrays out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ...bundle import Bundle, BundleError, Tensor

if TYPE_CHECKING:
    from ..plan import Stage
    from .native import Arena

Arrays = dict[str, np.ndarray]
Engine = Callable[[Arrays], Arrays]
TARGETS = ("onnx", "native", "coreml", "tensorrt")


def open_engine(
    bundle: Bundle,
    component: str,
    threads: int | None = None,
    isa: str | None = None,
    stage: Stage | None = None,
    arena: Arena | None = None,
) -> Engine:
    """Load a component of the bundle on the engine of its target; dropping the result frees it.

    `isa` is an instruction set by name, and `arena` memory that native components share: both are
    for the native engine alone.  `stage` is how a plan fits the component in.  Raises BundleError
    if the component cannot be loaded.
    """
    match bundle.manifest.target:
        case "onnx":
            from .onnx import OnnxEngine

            return OnnxEngine(bundle, component, threads, bool(stage and stage.frugal))
        case "native":
            from .native import NativeEngine

            return NativeEngine(
                bundle, component, threads, isa, arena, stage.fit if stage else None
            )
        case "coreml":
            from .coreml import CoremlEngine

            return CoremlEngine(bundle, component)
        case "tensorrt":
            from .tensorrt import TensorrtEngine

            return TensorrtEngine(bundle, component, threads)
        case target:
            raise BundleError(
                f"this ferrotype has no engine for target {target!r}, only for {', '.join(TARGETS)}"
            )


def check_shapes(
    where: str, manifest: dict[str, Tensor], arrays: Arrays, sizes: dict[str, int]
) -> None:
    """Compare arrays with the manifest; dimensions of one name are of one size, kept in `sizes`.

    Raises BundleError that names the array.
    """
    for name, tensor in manifest.items():
        found = np.shape(arrays[name])
        named = zip(tensor.shape, found, strict=False)
        wanted = [sizes.setdefault(d, n) if isinstance(d, str) else d for d, n in named]
        if list(found) != wanted or len(found) != len(tensor.shape):
            shape = ", ".join(str(sizes.get(str(d), d)) for d in tensor.shape)
            raise BundleError(f"{where}: {name} has the shape {found}, the manifest says ({shape})")
