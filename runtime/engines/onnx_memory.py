"""What a component takes on onnxruntime: measured when it is converted, predicted for any size.

onnxruntime tells nobody what it will allocate, so a fresh process runs the component and reads its
own peak from the kernel.  Run as a module, this file is that process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import TEXT_ENCODERS, Bundle, BundleError, Memory, Sizes, Tensor, dumps, loads
from ..memory import read, reset_peak
from . import Arrays
from .onnx import OnnxEngine, expands

Size = tuple[int, int]

# Added to what is not mapped: how far a peak lies from the line through those measured, and what
# the heap's holes differ by from one process to the next.
MARGIN, SLACK = 0.02, 2 << 20
FRUGAL = " frugal"  # after the size, in the manifest
RUNS = 2  # in the first, weights are not all resident yet when activations are at their peak
ENOUGH = 0.1  # seconds of running; the heap's holes differ from run to run as well
QUICK = 1.0  # seconds that a run may take for a larger size to be measured as well


# --- predicting ---------------------------------------------------------------------------------


def memory(bundle: Bundle, component: str, size: Size, frugal: bool = False) -> Memory:
    """What the component will take at a picture size, (width, height), from the manifest.

    Between the sizes measured, and beyond the largest, memory is a line over the pixels; MARGIN and
    SLACK are added.  Raises BundleError where the manifest has no figures.
    """
    points = _points(bundle, component, frugal and expands(bundle, component))
    weights, activations, scratch = (
        _interpolated(points, math.prod(size), field.name) for field in dataclasses.fields(Memory)
    )
    return Memory(
        math.ceil(weights),
        math.ceil(activations * (1 + MARGIN)) + SLACK,
        math.ceil(scratch * (1 + MARGIN)),
    )


def _points(bundle: Bundle, component: str, frugal: bool) -> dict[int, Memory]:
    """What was measured, by pixels in ascending order."""
    ending = FRUGAL if frugal else ""
    points: dict[int, Memory] = {}
    for name, found in bundle.component(component).memory.items():
        if match := re.fullmatch(rf"([0-9]{{1,5}})x([0-9]{{1,5}}){ending}", name):
            pixels = int(match[1]) * int(match[2])
            same = points.setdefault(pixels, found)
            points[pixels] = max(same, found, key=lambda m: m.total)
    if not points:
        raise BundleError(
            f"{bundle.folder} does not say what {component} takes"
            f"{' without expanded weights' if frugal else ''}: convert the checkpoint again"
        )
    return dict(sorted(points.items()))


def _interpolated(points: Mapping[int, Memory], pixels: int, field: str) -> float:
    """A field at so many pixels; what is smaller than all measured takes as much as the least."""
    places = list(points)
    values = [getattr(point, field) for point in points.values()]
    if len(places) == 1 or pixels <= places[0]:
        return values[0]
    right = min(max(bisect_left(places, pixels), 1), len(places) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (places[right] - places[left])
    if pixels > places[right]:
        slope = max(0, slope)
    return values[left] + slope * (pixels - places[left])


# --- measuring ----------------------------------------------------------------------------------


def measured(bundle: Bundle) -> dict[str, dict[str, Memory]]:
    """What every component takes, by component and picture size; empty where nobody can tell.

    Frugal figures are there only if frugal differs, and gives the same outputs.  Raises BundleError
    when a component does not run.
    """
    found = {}
    for component in bundle.manifest.components:
        normal = _in_a_process(bundle, component, frugal=False)
        if normal is None:
            return {}
        found[component] = _memories(normal)
        if expands(bundle, component):
            frugal = _in_a_process(bundle, component, frugal=True)
            if frugal and frugal["outputs"] == normal["outputs"]:
                found[component] |= _memories(frugal, FRUGAL)
    return found


def _memories(report: dict[str, Any], ending: str = "") -> dict[str, Memory]:
    return {name + ending: Memory(**fields) for name, fields in report["memory"].items()}


def _in_a_process(bundle: Bundle, component: str, frugal: bool) -> dict[str, Any] | None:
    """The report of `_report`, from a process that did nothing else; None where none can be."""
    command = [sys.executable, "-m", __name__, str(bundle.folder.resolve()), component]
    done = subprocess.run(
        command + ["frugal"] * frugal,
        input=dumps(bundle.manifest),
        capture_output=True,
        text=True,
        cwd=bundle.folder,  # not a checkout, whose folders Python would import
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise BundleError(f"{component} could not be run to measure its memory: {said[:300]}")
    return json.loads(done.stdout)


def _report(bundle: Bundle, component: str, frugal: bool) -> dict[str, Any] | None:
    """Memory by size, and a hash of the outputs at the first; None where the system says nothing.

    onnxruntime itself is not loaded before, so that it counts.
    """
    before, sizes = _resident(), bundle.manifest.sizes
    if before is None or not reset_peak():
        return None
    found, outputs = {}, ""
    for size in _sizes(sizes, component):
        entry, results, seconds = _measure(bundle, component, size, frugal, before)
        outputs = outputs or _hash(results)
        found["{}x{}".format(*size)] = dataclasses.asdict(entry)
        if sizes.allowed is None and size == sizes.default and seconds > QUICK:
            break
    return {"memory": found, "outputs": outputs}


def _measure(
    bundle: Bundle, component: str, size: Size, frugal: bool, before: int
) -> tuple[Memory, Arrays, float]:
    """What is taken above `before`, the outputs, and how many seconds one run took.

    In a session of its own: what one has run before, at another size, changes its peak.
    """
    reset_peak()
    engine = OnnxEngine(bundle, component, frugal=frugal)
    loaded = (_resident() or before) - before - _mapped(bundle, component)
    results, seconds = _run(engine, _inputs(bundle, component, size))
    mapped = _mapped(bundle, component)
    activations = _peak() - before - mapped - loaded
    return Memory(mapped, max(0, activations), max(0, loaded)), results, seconds


def _run(engine: OnnxEngine, feed: Arrays) -> tuple[Arrays, float]:
    """The outputs, and how many seconds one run took."""
    started, count, seconds = time.perf_counter(), 0, 0.0
    while count < RUNS or seconds < ENOUGH:
        results, count = engine(feed), count + 1
        seconds = time.perf_counter() - started
    return results, seconds / count


def _sizes(sizes: Sizes, component: str) -> list[Size]:
    """The sizes to measure: all if they are few, else half, once and twice the default's sides."""
    if component in TEXT_ENCODERS:  # text has no size
        return [sizes.default]
    if sizes.allowed is not None:
        return list(sizes.allowed)
    scaled = [_scaled(sizes, scale) for scale in (0.5, 1, 2)]
    return list(dict.fromkeys(scaled))


def _scaled(sizes: Sizes, scale: float) -> Size:
    width, height = (
        min(
            max(round(scale * side / sizes.multiple) * sizes.multiple, sizes.minimum), sizes.maximum
        )
        for side in sizes.default
    )
    return width, height


def _inputs(bundle: Bundle, component: str, size: Size) -> Arrays:
    """Any numbers of the shapes of one picture."""
    rng, scale = np.random.default_rng(0), 1
    if component != "vae_encoder":
        scale = 2 ** (len(bundle.component("vae_decoder").config["block_out_channels"]) - 1)
    dims = {
        "batch": 1,
        "width": size[0] // scale,
        "height": size[1] // scale,
        "sequence": bundle.manifest.tokenizers["tokenizer"].max_length,
    }
    return {n: _input(t, dims, rng) for n, t in bundle.component(component).inputs.items()}


def _input(tensor: Tensor, dims: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    shape = [dims[n] if isinstance(n, str) else n for n in tensor.shape]
    if tensor.dtype.startswith("int"):
        return np.ones(shape, tensor.dtype)
    return rng.standard_normal(shape).astype(tensor.dtype)


def _hash(results: Arrays) -> str:
    digest = hashlib.sha256()
    for value in results.values():
        digest.update(value.tobytes())
    return digest.hexdigest()


def _resident() -> int | None:
    reading = read()
    return reading.resident if reading else None


def _peak() -> int:
    reading = read()
    return (reading and reading.peak) or 0


def _mapped(bundle: Bundle, component: str) -> int:
    """The bytes of the component's files that are resident."""
    folder, total, inside = str(bundle.path(bundle.component(component).path)), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = folder + "/" in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def _main(arguments: Sequence[str]) -> None:
    folder, component, *frugal = arguments
    bundle = Bundle(Path(folder), loads(sys.stdin.read()))
    print(json.dumps(_report(bundle, component, bool(frugal))))


if __name__ == "__main__":
    _main(sys.argv[1:])
