"""The onnx target on onnxruntime's CPU provider."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle, BundleError, Tensor
from . import Arrays, check_shapes
from .onnx_weights import lend

MODEL = "model.onnx"
M_MMAP_THRESHOLD = -3  # of mallopt
# Bytes from which on a freed block goes back to the system.  From 1 MiB on, a peak varies by 5 MiB.
RETURNED = 256 << 10
DTYPES = {  # onnxruntime's names -> NumPy's
    "float": "float32",
    "float16": "float16",
    "double": "float64",
    "int32": "int32",
    "int64": "int64",
}


class OnnxEngine:
    """One loaded component; its weights stay mapped from the bundle, read-only.

    Weights of another precision than the arithmetic's are expanded while loading; `frugal` has each
    expanded when it is used, every time, so that only a few are held at once.  The outputs are the
    same bytes.  Weights of few bits are always expanded when they are used.  Raises BundleError
    when onnxruntime refuses the graph or it does not match the manifest.
    """

    def __init__(
        self, bundle: Bundle, component: str, threads: int | None = None, frugal: bool = False
    ) -> None:
        return_freed_memory()
        self._spec = bundle.component(component)
        self._path = bundle.path(f"{self._spec.path}/{MODEL}")
        self._borrowed: list[Any] = []  # by the session, which does not keep them
        folding = not (quantized(bundle) or (frugal and expands(bundle, component)))
        repeated = component == "unet"
        self._session = _session(self._path, threads, self._borrowed, folding, repeated)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._names = list(self._spec.outputs)
        self._check_names("takes", [i.name for i in inputs], self._spec.inputs)
        self._check_names("returns", [o.name for o in outputs], self._spec.outputs, more=True)
        self._dtypes = {i.name: _dtype(i.type, self._path) for i in inputs}

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run the graph; inputs are cast to its dtypes, outputs come as float32."""
        sizes: dict[str, int] = {}
        try:
            feed = {n: _cast(n, value, self._dtypes[n]) for n, value in inputs.items()}
            values = self._session.run(self._names, feed)
            found = {n: v.astype(np.float32) for n, v in zip(self._names, values, strict=True)}
        except Exception as error:  # onnxruntime's own errors share no base class
            raise BundleError(
                f"onnxruntime cannot run {self._path}: {_first_line(error)}"
            ) from None
        check_shapes(str(self._path), self._spec.inputs, feed, sizes)
        check_shapes(str(self._path), self._spec.outputs, found, sizes)
        return found

    def _check_names(
        self, verb: str, found: list[str], manifest: dict[str, Tensor], more: bool = False
    ) -> None:
        """Raise BundleError unless they are the manifest's, or `more`: what other tools read."""
        if manifest.keys() - found or (set(found) - manifest.keys() and not more):
            names = ", ".join(found)[:300]
            raise BundleError(
                f"{self._path} {verb} {names}; the manifest says {', '.join(manifest)}"
            )


def quantized(bundle: Bundle) -> bool:
    """Whether weights are stored in fewer bits than any type that is computed in."""
    return bundle.manifest.precision.weights not in ("fp32", "fp16")


def expands(bundle: Bundle, component: str) -> bool:
    """Whether weights are stored in another precision than is computed in: then frugal differs."""
    weights = bundle.manifest.precision.weights
    return weights != bundle.activations(component) and not quantized(bundle)


def return_freed_memory() -> None:
    """Have glibc give back what is free now, and from now on every block of some size at once.

    By default its threshold grows with the blocks that are freed, and the peak then depends on what
    ran before: an autoencoder took up to half as much again.  Costs up to a tenth of the time of
    small pictures, nothing that can be measured at 512x512.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, RETURNED)
        libc.malloc_trim(0)


def _session(
    path: Path,
    threads: int | None,
    borrowed: list[Any] | None = None,
    folding: bool = True,
    repeated: bool = True,
) -> Any:
    """A session; what it borrows is put into `borrowed`, without which it reads its weights itself.

    Without `folding` no constants are computed beforehand, of which expanded weights are one kind.
    `repeated`: runs after the first are faster and take more.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: one per core
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # what a stage used goes back when the stage is done
    # A block that a later tensor is to have would be held until then: half of what a run takes.
    options.enable_mem_reuse = False
    options.enable_mem_pattern = repeated  # one block for a whole run, with holes
    # Repacking weights and layouts, the default, is slower to load, costs a second copy of the
    # weights, and gained no speed: benchmarks/results/graphs.md.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if not folding:  # nor int8 and int4, which would be repacked into private memory
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Idle workers must not spin: they would take the cores from an app's own threads.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        if borrowed is not None:
            borrowed += lend(options, path)
        return onnxruntime.InferenceSession(
            path,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=[] if folding else ["ConstantFolding"],
        )
    except Exception as error:  # onnxruntime's own errors share no base class
        raise BundleError(f"onnxruntime cannot load {path}: {_first_line(error)}") from None


def _cast(name: str, value: Any, dtype: np.dtype) -> np.ndarray:
    """The input in a graph's type; a fraction is not cut off, for the picture would be another."""
    array = np.asarray(value)
    found = array.astype(dtype)
    if dtype.kind == "i" and array.dtype.kind == "f" and (found != array).any():
        raise ValueError(f"{name} is {array.flat[0]:g}, and it takes whole numbers alone; choose "
                         "another sampler or spacing")  # fmt: skip
    return found


def _dtype(name: str, path: Path) -> np.dtype:
    """NumPy's dtype for onnxruntime's `tensor(float16)`."""
    inner = name.removeprefix("tensor(").removesuffix(")")
    if inner not in DTYPES:
        known = ", ".join(DTYPES)
        raise BundleError(f"{path} takes a {name}; this ferrotype feeds only {known}")
    return np.dtype(DTYPES[inner])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
