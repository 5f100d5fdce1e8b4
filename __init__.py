"""Ferrotype: Stable Diffusion for edge devices, checked and in few steps.

pipe = ferrotype.load()                  # the embedded model, or ferrotype.load("my.ferro")
pipe.generate("a red apple").save("apple.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .bundle import BundleError
    from .convert import ConvertError
    from .errors import FerrotypeError
    from .parity import ParityError
    from .runtime.pipeline import Pipeline, PipelineError
    from .runtime.plan import Refusal
    from .runtime.samplers import Step

__all__ = [
    "BundleError",
    "ConvertError",
    "FerrotypeError",
    "ParityError",
    "Pipeline",
    "PipelineError",
    "Refusal",
    "Step",
    "__version__",
    "load",
]

# Where each public name lives; nothing is imported before it is asked for.
_HOME = {
    "BundleError": ".bundle",
    "ConvertError": ".convert",
    "FerrotypeError": ".errors",
    "ParityError": ".parity",
    "Pipeline": ".runtime.pipeline",
    "PipelineError": ".runtime.pipeline",
    "Refusal": ".runtime.plan",
    "Step": ".runtime.samplers",
}


def load(
    path: Any = None,
    threads: int | None = None,
    resident: bool = False,
    memory: int | str | None = None,
) -> Pipeline:
    """Open a bundle, or without a path the embedded one; see Pipeline.load."""
    from .runtime.pipeline import Pipeline

    return Pipeline.load(path, threads, resident, memory=memory)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
