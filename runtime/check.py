"""The check that a bundle carries: runs of the original, to be repeated on the device itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import parity
from ..bundle import Bundle, BundleError, Tensor
from .engines import Arrays, Engine, open_engine
from .pipeline import Pipeline

FOLDER = "check"
PICTURE = f"{FOLDER}/picture.png"
Runs = list[tuple[Arrays, Arrays]]  # inputs and outputs


def save(folder: Path, runs: dict[str, Runs], picture: np.ndarray) -> None:
    """Write recorded runs by component and the original's picture, (height, width, 3) in 0..1.

    An array is the file check/COMPONENT/RUN.NAME.npy.
    """
    for component, recorded in runs.items():
        place = folder / FOLDER / component
        place.mkdir(parents=True)
        for i, (inputs, outputs) in enumerate(recorded):
            for name, array in {**inputs, **outputs}.items():
                # A name may be an input and an output of different components, never of one.
                np.save(place / f"{i}.{name}.npy", np.asarray(array, order="C"))
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(folder / PICTURE)


def compare(
    bundle: Bundle,
    opener: Callable[[Bundle, str], Engine] = open_engine,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Run every component and draw the picture here; the report, in the form of a conversion's.

    Raises BundleError for a bundle without a check, or if this device cannot run it.
    """
    recorded = bundle.manifest.parity
    if PICTURE not in bundle.manifest.files:
        raise BundleError(f"{bundle.folder} carries no check: convert it again to get one")
    components = {}
    for name in bundle.manifest.components:
        progress(name)
        components[name] = _compare_component(bundle, name, opener)
    progress("picture")
    shown, options = recorded.get("picture", {}), ("prompt", "seed", "steps")
    pipe = Pipeline(bundle, opener=opener)
    try:
        prompt, seed, steps = (shown[key] for key in options)
        size = tuple(shown["size"])
        *_, last = pipe.steps(prompt, seed=seed, steps=steps, size=size, force=True)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{bundle.folder}: parity.picture is not valid: {error}") from None
    found = pipe.decode_array(last.latents)
    expected = _picture(bundle, found.shape)
    difference = float(f"{np.abs(found - expected).max():.3g}")
    psnr = round(parity.psnr(expected, found, peak=1.0), 2)
    return {
        "floors": recorded.get("floors", {}),
        "components": components,
        "picture": {**shown, "psnr": psnr, "max_error": difference},
    }


def problems(report: dict[str, Any]) -> Iterator[str]:
    """What in a report is below its floor, a line each."""
    floors = report["floors"]
    for name, outputs in report["components"].items():
        for output, result in outputs.items():
            if result["psnr"] < floors["component"]:
                yield f"{name} {output}: {result['psnr']:.1f} dB, floor {floors['component']:g} dB"
    if report["picture"]["psnr"] < floors["picture"]:
        yield f"the picture: {report['picture']['psnr']:.1f} dB, floor {floors['picture']:g} dB"


def _compare_component(
    bundle: Bundle, name: str, opener: Callable[[Bundle, str], Engine]
) -> dict[str, Any]:
    spec, engine = bundle.component(name), opener(bundle, name)
    expected: dict[str, list[np.ndarray]] = {output: [] for output in spec.outputs}
    found: dict[str, list[np.ndarray]] = {output: [] for output in spec.outputs}
    for run in range(_runs(bundle, name)):
        results = engine({n: _array(bundle, name, run, n, t) for n, t in spec.inputs.items()})
        for output, tensor in spec.outputs.items():
            expected[output].append(_array(bundle, name, run, output, tensor))
            found[output].append(results[output])
    return {o: parity.as_json(parity.compare(expected[o], found[o])) for o in spec.outputs}


def _runs(bundle: Bundle, component: str) -> int:
    prefix = f"{FOLDER}/{component}/"
    names = [n.removeprefix(prefix) for n in bundle.manifest.files if n.startswith(prefix)]
    count = len({name.split(".")[0] for name in names})
    if not count:
        raise BundleError(f"{bundle.folder} carries no check of {component}: convert it again")
    return count


def _array(bundle: Bundle, component: str, run: int, name: str, tensor: Tensor) -> np.ndarray:
    """A recorded array; only the file is believed, and no more of it than is there."""
    path = bundle.path(f"{FOLDER}/{component}/{run}.{name}.npy")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(f"{path} is not a recorded array: {error}") from None
    if array.ndim != len(tensor.shape) or array.dtype.kind not in "fiu":
        raise BundleError(f"{path} has the shape {array.shape}, not that of {name}")
    return np.asarray(array)


def _picture(bundle: Bundle, shape: tuple[int, ...]) -> np.ndarray:
    from .pictures import open_picture

    pixels = np.asarray(open_picture(bundle.path(PICTURE)).convert("RGB"), np.float32) / 255
    if pixels.shape != shape:
        raise BundleError(f"{bundle.path(PICTURE)} is {pixels.shape}, the picture drawn {shape}")
    return pixels
