"""Weights in few bits in the order of the native engine: blocks of outputs, taps, inputs, outputs.

A tap of an output is a row here, so that int4's groups are of one tap; docs/engine.md.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..bundle import Memory
from ..kernels import Type
from ..runtime import models
from ..runtime.engines.native import FORMAT, INDEX
from ..runtime.layout import lay_out
from ..runtime.program import GROUP, LINE, STORED, Packed, Weight, round_up
from .recipe import Form, Recipe, RecipeError
from .rounding import Rounder
from .weights import Integers, quantize

PAGE = 4096  # what matrices are aligned to
THREADS = (1, 4)  # that a bundle states its memory for
NAMES = {kind: name for name, kind in STORED.items()}
FORMS = {"w8": Type.I8, "w4": Type.I4}  # that the engine multiplies
BY_OUTPUT = Form("int", 8, "channel")


def to_int8(panel: np.ndarray, rounder: Rounder | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, taps, inputs, 16) as int8, and the scale of every output, (blocks, 16) float32.

    `rounder` knows what is multiplied with them.  ValueError for weights that are not finite.
    """
    blocks, taps, inputs, lanes = panel.shape
    rows = panel.transpose(0, 3, 1, 2).reshape(blocks * lanes, taps * inputs)
    importance = None if rounder is None else np.tile(rounder.importance, taps)
    found = quantize(rows, BY_OUTPUT, importance)
    assert isinstance(found, Integers)
    values, scales = found.values, found.scale.astype(np.float32)
    if rounder is not None:
        values = rounder(rows.reshape(-1, inputs), scales.repeat(taps, 0), -127, 127)
    values = values.reshape(blocks, lanes, taps, inputs).transpose(0, 2, 3, 1)
    return values, scales.reshape(blocks, lanes)


def to_int4(
    panel: np.ndarray,
    group: int,
    sources: Sequence[int] | None = None,
    rounder: Rounder | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, taps, inputs, 16) as -8..7, and float16 scales, (blocks, taps, groups, 16).

    Groups of inputs begin anew with every source, of so many; its last is what is left.  `rounder`
    knows what is multiplied with them.  ValueError for weights that are not finite.
    """
    blocks, taps, inputs, lanes = panel.shape
    rows = panel.transpose(0, 3, 1, 2).reshape(-1, inputs)
    values, scales, first = np.empty(rows.shape, np.int8), [], 0
    for size in group_sizes(sources or (inputs,), group):
        part = slice(first, first + size)
        importance = None if rounder is None else rounder.importance[part]
        found = quantize(rows[:, part], Form("int", 4, "block", size), importance)
        assert isinstance(found, Integers)
        values[:, part] = found.values
        scales.append(found.scale)
        first += size
    scale = np.concatenate(scales, 1)
    if rounder is not None:
        sizes = group_sizes(sources or (inputs,), group)
        values = rounder(rows, scale.astype(np.float32).repeat(sizes, 1), -8, 7)
    shape = (blocks, lanes, taps, -1)
    return values.reshape(shape).transpose(0, 2, 3, 1), scale.reshape(shape).transpose(0, 2, 3, 1)


def group_sizes(sources: Sequence[int], group: int) -> list[int]:
    """How many inputs each group has."""
    return [min(group, source - first) for source in sources for first in range(0, source, group)]


# --- the file -----------------------------------------------------------------------------------


def choose(
    component: str, requests: Sequence[Packed], recipe: Recipe
) -> tuple[dict[str, Type], dict[str, str]]:
    """What matrices that a recipe quantizes are stored as, by name; why the others are not.

    Tensors that are joined take the form of most bits that one of them has.  Raises RecipeError for
    another form than w8 and w4, which are what the engine multiplies.
    """
    few_bits, kept = {}, {}
    for request in requests:
        if not request.is_matrix:
            continue
        taps = (request.side, request.side) if request.side > 1 else ()
        shape = (request.outputs, sum(request.inputs), *taps)
        forms = [recipe.choose(component, source, shape) for source in request.sources]
        form, why = max(forms, key=lambda found: found[0].bits)
        if form.quantizes:
            few_bits[request.name] = _type_of(form)
        else:
            kept[request.name] = why
    return few_bits, kept


def check_forms(recipe: Recipe) -> None:
    """Raise RecipeError if a form is none that the engine multiplies, whatever it is for."""
    for form in (recipe.default, *(rule.form for rule in recipe.rules)):
        if form.quantizes:
            _type_of(form)


def _type_of(form: Form) -> Type:
    if str(form) not in FORMS:
        raise RecipeError(f"weights {form}: the native target stores {', '.join(FORMS)}, not that")
    return FORMS[str(form)]


def layout(
    requests: Sequence[Packed],
    weights: Type,
    few_bits: Mapping[str, Type] | None = None,
    narrow: bool = False,
) -> dict[str, Weight]:
    """Where each tensor lies in the file, one after the other, by name.

    `narrow`: what is multiplied with int8 is rounded to int8, as in `read_index`.
    """
    places: dict[str, Weight] = {}
    end = 0
    for request in requests:
        kind = request.type((few_bits or {}).get(request.name, weights))
        start = round_up(end, PAGE if request.is_matrix else LINE)
        size, scales = request.bytes(kind)
        scaled = bool(request.scales(kind))
        places[request.name] = Weight(
            kind, start, size, start + scales if scaled else None, narrow and scaled
        )
        end = start + size
    return places


def memory(
    component: str,
    config: Mapping[str, Any],
    outputs: Collection[str],
    shapes: models.Shapes,
    places: Mapping[str, Weight],
    activations: Type,
) -> dict[str, Memory]:
    """What the engine needs for inputs of these shapes, by the number of threads."""
    graph = models.build(component, config, shapes, activations, outputs)
    size = max(place.offset + place.bytes for place in places.values())
    found = {}
    for threads in THREADS:
        placed = lay_out(graph, places, partial(kernels.scratch, threads=threads))
        held = max(live - own for live, own in zip(placed.live, placed.scratch, strict=True))
        name = f"{threads} thread{'s' if threads > 1 else ''}"
        found[name] = Memory(size, held, placed.arena_bytes - held)
    return found


def write_index(
    folder: Path, requests: Sequence[Packed], places: Mapping[str, Weight], size: int
) -> None:
    """Write weights.json: where each tensor is in the file of so many bytes."""
    entries = {
        request.name: {
            "form": request.form,
            "type": NAMES[place.type],
            "offset": place.offset,
            "bytes": place.bytes,
            "shape": list(request.shape(place.type)),
        }
        for request, place in ((r, places[r.name]) for r in requests)
    }
    index = {"format": FORMAT, "bytes": size, "tensors": entries}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def together(elements: np.ndarray, count: int) -> np.ndarray:
    """(blocks, taps, inputs, 16) with so many inputs of an output side by side, as they lie."""
    blocks, taps, inputs, lanes = elements.shape
    split = elements.reshape(blocks, taps, inputs // count, count, lanes)
    return np.ascontiguousarray(split.swapaxes(3, 4))


def packed_int4(values: np.ndarray, scales: np.ndarray, sources: Sequence[int]) -> np.ndarray:
    """What `to_int4` found as bytes: of every group 16 scales, then values by eights."""
    blocks, taps, _, lanes = values.shape
    parts, first = [], 0
    for i, size in enumerate(group_sizes(sources, GROUP)):
        four = values[:, :, first : first + size].view(np.uint8) & 15
        eights = four.reshape(blocks, taps, size // 8, 8, lanes).swapaxes(3, 4)
        packed = eights[..., ::2] | eights[..., 1::2] << 4
        own = np.ascontiguousarray(scales[:, :, i], "<f2").view(np.uint8)
        parts += [own, packed.reshape(blocks, taps, -1)]
        first += size
    return np.concatenate(parts, 2)
