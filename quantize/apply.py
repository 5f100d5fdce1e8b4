"""A native bundle made smaller: its weights rounded to fewer bits, checked again, without torch."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import bundle as bundles
from .. import parity
from ..bundle import Bundle, Component, Precision
from ..kernels import LANES, Type
from ..runtime import check, models
from ..runtime.engines.native import INDEX, WEIGHTS, Files, narrow, open_files, widen
from ..runtime.program import (
    GROUP,
    INT8,
    TYPES,
    Packed,
    Weight,
    activation_type,
    padded,
)
from . import native
from .calibrate import Statistics
from .recipe import UNQUANTIZED, Recipe, RecipeError
from .rounding import Rounder

Progress = Callable[[str], None]
LEAST = 2  # pixels per input, below which second moments say nothing about most directions


@dataclasses.dataclass(frozen=True)
class Layer:
    """What became of a matrix: `psnr` is of its weights, in dB."""

    name: str
    form: str
    bytes: int
    psnr: float
    why: str = ""  # it is not quantized


def quantize_bundle(
    source: Bundle,
    out: str | os.PathLike,
    recipe: Recipe,
    activations: str | None = None,
    statistics: Statistics | None = None,
    force: bool = False,
    progress: Progress = lambda stage: None,
    evaluate: Callable[[Bundle], Mapping[str, Any]] = lambda made: {},
) -> Bundle:
    """Write `source` with the recipe's forms to `out`, compared with the recorded original.

    `activations` are those of the source if not given; `statistics` of calibrate make errors
    smaller where they matter.  What `evaluate` returns of the bundle, to whose folder it may add,
    is kept in its report as "quantized".  Raises RecipeError for a recipe that does not fit,
    ParityError below a floor, BundleError if `source` is not a native bundle or `out` cannot be
    written.
    """
    activations = activations or source.manifest.precision.activations
    check_quantizable(source, recipe, activations)
    precision = Precision("mixed" if recipe.rules else str(recipe.default), activations)
    floors = parity.floors(f"{recipe.least_bits}-bit", activations)
    with bundles.staging(out, force) as staged:
        _copy_the_rest(source, staged)
        components, layers = {}, {}
        for name in source.manifest.components:
            progress(name)
            found = _component(source, name, staged, recipe, activations, statistics or {})
            components[name], layers[name] = found
        _check_used(recipe, source)
        recorded = {**source.manifest.parity, **_report(layers), "floors": floors}
        manifest = dataclasses.replace(
            source.manifest, precision=precision, components=components, parity=recorded
        )
        made = Bundle(staged, dataclasses.replace(manifest, files=bundles.list_files(staged)))
        report = check.compare(made, progress=progress)
        if problem := next(check.problems(report), None):
            raise parity.ParityError(f"{out}: {problem}; a recipe may keep more of it")
        told = {**recorded, **report, "quantized_from": source.sha256}
        if pictures := evaluate(made):
            told["quantized"] = dict(pictures)
        return bundles.save(staged, out, dataclasses.replace(manifest, parity=told), force)


def check_quantizable(source: Bundle, recipe: Recipe, activations: str) -> None:
    """Raise RecipeError for a bundle, a recipe or activations that do not go together."""
    if source.manifest.target != "native":
        raise RecipeError(
            f"{source.folder} is made for {source.manifest.target}: quantize a native bundle, or "
            "convert the checkpoint with --weights"
        )
    stored = source.manifest.precision.weights
    if stored not in TYPES:
        raise RecipeError(
            f"{source.folder} has weights {stored} already: errors would add up, so quantize the "
            "bundle that it was made of"
        )
    if not recipe.least_bits:
        raise RecipeError("the recipe quantizes nothing")
    native.check_forms(recipe)
    if recipe.model not in (None, source.manifest.model):
        raise RecipeError(
            f"the recipe was made for {recipe.model!r}, this is {source.manifest.model!r}"
        )
    if activations not in UNQUANTIZED:
        raise RecipeError(f"activations {activations!r}: there is {', '.join(UNQUANTIZED)}")


def _copy_the_rest(source: Bundle, staged: Path) -> None:
    for name in source.manifest.files:
        if Path(name).name in (WEIGHTS, INDEX):
            continue
        target = staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path(name), target)


def _check_used(recipe: Recipe, source: Bundle) -> None:
    names = [
        f"{component}/{name}"
        for component, spec in source.manifest.components.items()
        for request in models.weights(component, spec.config, spec.outputs)
        if request.is_matrix
        for name in request.sources
    ]
    recipe.check_used(names)


# --- a component --------------------------------------------------------------------------------


def _component(
    source: Bundle,
    component: str,
    staged: Path,
    recipe: Recipe,
    activations: str,
    statistics: Statistics,
) -> tuple[Component, list[Layer]]:
    spec, files = source.component(component), open_files(source, component)
    requests = models.weights(component, spec.config, spec.outputs)
    few_bits, kept = native.choose(component, requests, recipe)
    own = exception(source, component, activations)
    activations = own or activations
    plain = TYPES[UNQUANTIZED[activations]]
    places = native.layout(requests, plain, few_bits, activations == INT8)
    folder = staged / spec.path
    folder.mkdir(parents=True, exist_ok=True)
    raw = np.memmap(files.folder / WEIGHTS, np.uint8, "r")
    layers = []
    with (folder / WEIGHTS).open("wb") as file:
        for request in requests:
            place = places[request.name]
            file.write(bytes(place.offset - file.tell()))
            moments = statistics.get(f"{component}/{request.name}")
            try:
                data, psnr = written(request, files, raw, place, moments)
            except ValueError as error:
                raise RecipeError(f"{component}/{request.sources[0]}: {error}") from None
            file.write(data)
            if request.is_matrix:
                form = native.NAMES[place.type]
                why = kept.get(request.name, "")
                layers.append(Layer(request.name, form, place.bytes, round(psnr, 2), why))
        size = file.tell()
    native.write_index(folder, requests, places, size)
    shapes = _default_shapes(source, component)
    kind = activation_type(activations) or Type.F32
    memory = native.memory(component, spec.config, spec.outputs, shapes, places, kind)
    return dataclasses.replace(spec, memory=memory, activations=own), layers


def exception(source: Bundle, component: str, activations: str) -> str:
    """What a component computes in if not in `activations`; empty if it does.

    What overflowed does so again, if all the others compute in what they did.
    """
    same = activations == source.manifest.precision.activations
    return source.component(component).activations if same else ""


def _default_shapes(source: Bundle, component: str) -> models.Shapes:
    spec, manifest = source.component(component), source.manifest
    tokens = max(tokenizer.max_length for tokenizer in manifest.tokenizers.values())
    levels = len(source.component("vae_decoder").config["block_out_channels"])
    side = 1 if component == "vae_encoder" else 2 ** (levels - 1)  # pixels, or latents
    width, height = manifest.sizes.default
    return models.sizes(component, spec.config, (width // side, height // side), tokens)


def written(
    request: Packed, files: Files, raw: np.ndarray, place: Weight, moments: Any
) -> tuple[bytes, float]:
    """A tensor as it will lie in the file, and how near it is to what it was, in dB."""
    own = files.places[request.name]
    if place.type == own.type:
        return raw[own.offset : own.offset + own.bytes].tobytes(), parity.PSNR_CAP
    panel = unpacked(request, raw, own)
    if place.type in TYPES.values():
        data = narrow(panel, place.type)
        stored = native.together(data, 2) if place.type is Type.BF16 else data
        return stored.tobytes(), _snr(panel, widen(data, place.type))
    rounder = None
    if moments is not None and moments.count >= LEAST * len(moments.second):
        rounder = Rounder(moments.second)
    if place.type is Type.I8:
        values, scales = native.to_int8(panel, rounder)
        matrix = native.together(values, 4).tobytes()
        gap = bytes(request.bytes(Type.I8)[1] - len(matrix))
        whole = matrix + gap + scales.astype("<f4").tobytes()
        return whole, _snr(panel, values * scales[:, None, None])
    sources = [padded(count) for count in request.inputs]
    values, scales = native.to_int4(panel, GROUP, sources, rounder)
    each = scales.astype(np.float32).repeat(native.group_sizes(sources, GROUP), 2)
    return native.packed_int4(values, scales, sources).tobytes(), _snr(panel, values * each)


def unpacked(request: Packed, raw: np.ndarray, place: Weight) -> np.ndarray:
    """A plain matrix of the file as float32, (blocks, taps, inputs, 16)."""
    shape = request.shape(place.type)
    stored = raw[place.offset : place.offset + place.bytes]
    kinds = {Type.F32: "<f4", Type.F16: "<f2", Type.BF16: "<u2"}
    elements = stored.view(kinds[place.type])
    taps, inputs = request.side**2, sum(map(padded, request.inputs))
    taps = 4 if request.form == "upsample" else taps
    if place.type is Type.BF16:
        pairs = elements.reshape(-1, taps, inputs // 2, LANES, 2).swapaxes(3, 4)
        elements = np.ascontiguousarray(pairs)
    assert math.prod(shape) == elements.size
    return widen(elements.reshape(-1, taps, inputs, LANES), place.type)


def _snr(original: np.ndarray, found: np.ndarray) -> float:
    noise = float(np.square(original - found, dtype=np.float64).sum())
    signal = float(np.square(original, dtype=np.float64).sum())
    if not noise or not signal:
        return parity.PSNR_CAP
    return min(parity.PSNR_CAP, 10 * math.log10(signal / noise))


def _report(layers: Mapping[str, Sequence[Layer]]) -> dict[str, Any]:
    """For the manifest: forms and reasons by component, and every layer."""
    return {
        "weights": {c: dict(Counter(layer.form for layer in found)) for c, found in layers.items()},
        "not_compressed": {
            c: dict(Counter(layer.why for layer in found if layer.why))
            for c, found in layers.items()
        },
        "layers": {
            c: [[layer.name, layer.form, layer.bytes, layer.psnr] for layer in found]
            for c, found in layers.items()
        },
    }
