"""Builds engines from graphs with the vendor's own package, imported when needed.

The builder runs in a process of its own: it writes to stderr, and a fault in it ends the process.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from ...bundle import BundleError

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # that tensorrt-rtx builds for
FIGURES = {  # in the builder's log
    "total": r"Total Activation Memory: (\d+)",
    "scratch": r"Max Scratch Memory: (\d+)",
    "weights": r"Total Weights Memory: (\d+)",
}
MAX_REASON = 300  # characters of a vendor's message
MOVE = "convert with other weights, or with --target onnx"

Sizes = dict[str, tuple[int, int, int]]  # of a dimension by its name: least, usual, most


def compile_engine(
    model: Path,
    engine: Path,
    capability: str | None,
    sizes: Sizes,
    weight_streaming: bool = False,
    vendor: str = "tensorrt_rtx",
) -> dict[str, Any]:
    """Build an engine from a graph, for a compute capability or for the GPU that is here.

    Returns `weights`, `activations` and `scratch` in bytes, `seconds`, and `builder`. Raises
    BundleError with the builder's reason.
    """
    request = json.dumps(
        {
            "model": str(model),
            "engine": str(engine),
            "capability": capability,
            "sizes": sizes,
            "weight_streaming": weight_streaming,
            "vendor": vendor,
        }
    )
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=request, capture_output=True, text=True, errors="replace")
    answer = _answer(done, vendor)
    if "error" in answer:
        raise BundleError(answer["error"])
    return answer


def engine_name(capability: str) -> str:
    """The file of the engine for a compute capability: sm86.engine for 8.6."""
    return f"sm{capability.replace('.', '')}.engine"


def _answer(done: subprocess.CompletedProcess[str], vendor: str) -> dict[str, Any]:
    """The line that the process wrote, or how it ended without one."""
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        code = done.returncode
        how = f"crashed with signal {-code}" if code < 0 else f"ended with status {code}"
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"{vendor} {how} while building: {_one_line(last)}; {MOVE}"}


# --- in a process of its own --------------------------------------------------------------------


def main() -> None:
    """Read a request from stdin, build, and write one line of JSON."""
    try:
        answer = _compile(json.load(sys.stdin))
    except BundleError as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"error": f"the engine cannot be written: {error.strerror or error}"}
    print(json.dumps(answer), flush=True)


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    """What the process of its own does."""
    trt = vendor_module(request["vendor"])
    if trt is None:
        name = request["vendor"].replace("_", "-")
        raise BundleError(f"building needs {name}: pip install {name}")
    log, start = vendor_logger(trt), time.perf_counter()
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["model"]):
        reason = _parser_reason(parser)
        raise BundleError(f"{vendor_version(trt)} cannot read the graph: {reason}; {MOVE}")
    config = builder.create_builder_config()
    _set_target(trt, config, request["capability"])
    if request["weight_streaming"]:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    _add_profile(builder, network, config, request["sizes"])
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleError(f"{vendor_version(trt)} cannot build the graph: {log.reason()}; {MOVE}")
    Path(request["engine"]).write_bytes(plan)
    seconds = round(time.perf_counter() - start, 2)
    return {**_memory(log), "seconds": seconds, "builder": vendor_version(trt)}


def _memory(log: Any) -> dict[str, int]:
    """What the engine takes on the device, in bytes, from the builder's log."""
    found = {name: log.figure(pattern) for name, pattern in FIGURES.items()}
    return {
        "weights": found["weights"],
        "activations": max(0, found["total"] - found["scratch"]),  # the total has both
        "scratch": found["scratch"],
    }


def _strongly_typed(trt: Any) -> int:
    """The flags of a network whose graph says every type; later versions know no other."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _set_target(trt: Any, config: Any, capability: str | None) -> None:
    """tensorrt-rtx builds for the GPU that it is told, tensorrt always for the one that is here."""
    if not hasattr(config, "set_compute_capability"):
        if capability is not None:
            raise BundleError(f"{vendor_version(trt)} builds only on the device itself")
        return
    name = "CURRENT" if capability is None else f"SM{capability.replace('.', '')}"
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)


def _add_profile(builder: Any, network: Any, config: Any, sizes: Sizes) -> None:
    """The least, usual and most of every open dimension, which is known by its name."""
    profile, used = builder.create_optimization_profile(), False
    for tensor in map(network.get_input, range(network.num_inputs)):
        shape = tuple(tensor.shape)
        if min(shape, default=1) >= 0:
            continue
        names = [tensor.get_dimension_name(i) for i in range(len(shape))]
        for name, size in zip(names, shape, strict=True):
            if size < 0 and name not in sizes:
                raise BundleError(f"{tensor.name}: dimension {name!r} is open and has no range")
        three = [
            [sizes[name][k] if size < 0 else size for name, size in zip(names, shape, strict=True)]
            for k in range(3)
        ]
        profile.set_shape(tensor.name, *three)
        used = True
    if used:
        config.add_optimization_profile(profile)


def _parser_reason(parser: Any) -> str:
    """The parser's first complaint and the node that it is about."""
    if not parser.num_errors:
        return "the parser gives no reason"
    error = parser.get_error(0)
    return _one_line(f"{error.node_operator()} {error.node_name()}: {error.desc()}")


# --- the vendor's module, also for the engine ---------------------------------------------------


def vendor_module(name: str) -> Any:
    """The vendor's module, or None if it or a library of it is not there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (ImportError, OSError):
        return None


def vendor_version(trt: Any) -> str:
    return f"{trt.__name__} {trt.__version__}"


def vendor_logger(trt: Any) -> Any:
    """A logger that collects and prints nothing; the vendor's class is known only by now."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.told: list[str] = []
            self.faults: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.faults.append(message)
            elif severity == trt.ILogger.INFO:
                self.told.append(message)

        def reason(self) -> str:
            return _one_line(self.faults[-1]) if self.faults else "it gives no reason"

        def figure(self, pattern: str) -> int:
            found = [m[1] for line in self.told if (m := re.search(pattern, line))]
            return int(found[-1]) if found else 0

    return Log()


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 1] + "…"


if __name__ == "__main__":
    main()
