"""The onnx target on onnxruntime's CPU provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle, BundleError, Tensor
from . import Arrays, check_shapes

MODEL = "model.onnx"
DTYPES = {  # onnxruntime's names -> NumPy's
    "float": "float32",
    "float16": "float16",
    "double": "float64",
    "int32": "int32",
    "int64": "int64",
}


class OnnxEngine:
    """One loaded component; weights are memory-mapped from the bundle where they are not repacked.

    Raises BundleError when onnxruntime refuses the graph or it does not match the manifest.
    """

    def __init__(self, bundle: Bundle, component: str, threads: int | None = None) -> None:
        self._spec = bundle.component(component)
        self._path = bundle.path(f"{self._spec.path}/{MODEL}")
        self._session = _session(self._path, threads)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._names = [o.name for o in outputs]
        self._same_names("takes", [i.name for i in inputs], self._spec.inputs)
        self._same_names("returns", self._names, self._spec.outputs)
        self._dtypes = {i.name: _dtype(i.type, self._path) for i in inputs}

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run the graph; inputs are cast to its dtypes, outputs come as float32."""
        sizes: dict[str, int] = {}
        try:
            feed = {name: np.asarray(value, self._dtypes[name]) for name, value in inputs.items()}
            values = self._session.run(None, feed)
            found = {n: v.astype(np.float32) for n, v in zip(self._names, values, strict=True)}
        except Exception as error:  # onnxruntime's own errors share no base class
            raise BundleError(
                f"onnxruntime cannot run {self._path}: {_first_line(error)}"
            ) from None
        check_shapes(str(self._path), self._spec.inputs, feed, sizes)
        check_shapes(str(self._path), self._spec.outputs, found, sizes)
        return found

    def _same_names(self, verb: str, found: list[str], manifest: dict[str, Tensor]) -> None:
        if set(found) != manifest.keys():
            names = ", ".join(found)[:300]
            raise BundleError(
                f"{self._path} {verb} {names}; the manifest says {', '.join(manifest)}"
            )


def _session(path: Path, threads: int | None) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: one per core
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # what a stage used goes back when the stage is done
    # Repacking weights and layouts, the default, is slower to load, costs a second copy of the
    # weights, and gained no speed: benchmarks/results/graphs.md.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    # Idle workers must not spin: they would take the cores from an app's own threads.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors share no base class
        raise BundleError(f"onnxruntime cannot load {path}: {_first_line(error)}") from None


def _dtype(name: str, path: Path) -> np.dtype:
    """NumPy's dtype for onnxruntime's `tensor(float16)`."""
    inner = name.removeprefix("tensor(").removesuffix(")")
    if inner not in DTYPES:
        known = ", ".join(DTYPES)
        raise BundleError(f"{path} takes a {name}; this ferrotype feeds only {known}")
    return np.dtype(DTYPES[inner])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
