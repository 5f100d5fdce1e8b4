"""Weights as the native engine reads them: packed for its kernels, tensor by tensor into one file.

The layout is one for every instruction set: blocks of 16 outputs, the inputs of bfloat16 in pairs,
of int8 in fours and of int4 in eights; docs/engine.md draws it.  Neither torch nor the engine is
needed, and the same checkpoint gives the same bytes on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from .. import bundle as bundles
from ..bundle import Tensor
from ..kernels import LANES, Type
from ..quantize.native import layout, packed_int4, to_int4, to_int8, together, write_index
from ..runtime import models
from ..runtime.engines.native import WEIGHTS
from ..runtime.program import FEW_BITS, GROUP, STORED, TYPES, Packed, padded
from .checkpoint import Checkpoint, CheckpointError, Tensors, is_skipped, new_attention_name
from .rounding import to_bf16, to_half

ROWS = 4 * LANES  # outputs that are packed at once: what is held beside the tensor itself
VECTORS = ("vector", "geglu_vector")
PARTS = {  # component -> what its tensors in the file of the autoencoder begin with
    "vae_decoder": ("decoder.", "post_quant_conv."),
    "vae_encoder": ("encoder.", "quant_conv."),
}
# Rows (and columns) of a 3x3 filter that meet one source pixel when the image is doubled before,
# by whether the output's row is odd.
DOUBLED = (((0,), (1, 2)), ((0, 1), (2,)))


def write(
    checkpoint: Checkpoint,
    component: str,
    requests: Sequence[Packed],
    folder: Path,
    weights: str,
    few_bits: Mapping[str, Type] | None = None,
    written: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Write weights.bin and weights.json; return how many values fp16 rounds to zero, by tensor.

    `weights` is what matrices are stored as, fp32, bf16 or fp16, and `few_bits` those, by name,
    that are not.  `written` is told the bytes so far, and those in all.  Raises ConvertError, also
    for a tensor of the checkpoint that no request reads.
    """
    tensors = Tensors(checkpoint, folder_of(component), halves=weights == "fp16")
    names = _names(checkpoint, component, requests, tensors)
    places = layout(requests, TYPES[weights], few_bits)
    total = max(place.offset + place.bytes for place in places.values())
    lost: dict[str, int] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / WEIGHTS).open("wb") as file:
        for request in requests:
            place = places[request.name]
            file.write(bytes(place.offset - file.tell()))
            arrays = (tensors[names[s]] for s in request.sources)
            for part in _parts(request, arrays, place.type, lost):
                file.write(part.data)
                written(file.tell(), total)
        size = file.tell()
    write_index(folder, requests, places, size)
    return lost


def interface(
    checkpoint: Checkpoint, component: str, latents: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs as every target names them, float32 whatever is computed in.

    `latents`, (width, height), is the only size that is taken; None leaves it open.
    """
    config, states = checkpoint.configs[folder_of(component)], checkpoint.family == "sdxl"
    inputs, outputs = models.interface(component, config, states)
    if component == "text_encoder_2" and checkpoint.clip_skip:  # its last layers stay
        old = bundles.states_of(outputs)
        layer = config["num_hidden_layers"] - 1 - checkpoint.clip_skip
        outputs = {f"hidden_states.{layer}" if n == old else n: t for n, t in outputs.items()}
    if latents is not None:
        side = checkpoint.vae_scale
        own = side if component == "vae_encoder" else 1
        known: dict[int | str, int] = {}
        for name, count in zip(("width", "height"), latents, strict=True):
            known |= {name: own * count, f"{side} * {name}": side * count}
            known[f"{name} // {side}"] = count
        inputs, outputs = ({n: _fixed(t, known) for n, t in ts.items()} for ts in (inputs, outputs))
    return inputs, outputs


def _fixed(tensor: Tensor, known: dict[int | str, int]) -> Tensor:
    return Tensor(tensor.dtype, tuple(known.get(n, n) for n in tensor.shape))


def pack(request: Packed, arrays: Sequence[np.ndarray], weights: str) -> np.ndarray:
    """The bytes of one tensor, made of the checkpoint's `arrays` in the order of its sources."""
    parts = _parts(request, arrays, request.type(STORED[weights]), {})
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])


# --- names --------------------------------------------------------------------------------------


def folder_of(component: str) -> str:
    """The checkpoint's folder that holds a component."""
    return "vae" if component in PARTS else component


def _names(
    checkpoint: Checkpoint, component: str, requests: Sequence[Packed], tensors: Tensors
) -> dict[str, str]:
    """The name in the checkpoint's files of every source; what no request reads is an error."""
    found = {_plain_name(component, name): name for name in tensors}
    sources = {source for request in requests for source in request.sources}
    names = {source: found.get(_plain_name(component, source), "") for source in sources}
    missing = sorted(source for source, name in names.items() if not name)
    unread = set(tensors) - set(names.values())
    left = sorted(n for n in unread if not _is_ignored(checkpoint, component, n))
    for problem, those in (("are missing", missing), ("are read by no layer", left)):
        if those:
            raise CheckpointError(
                f"{component}: {len(those)} weights {problem} ({', '.join(those[:5])}); "
                "its config.json and its weights do not belong together"
            )
    return names


def _plain_name(component: str, name: str) -> str:
    """What a tensor is called today, without the prefix that some files of CLIP have."""
    name = new_attention_name(name) if component in PARTS else name
    return name.removeprefix("text_model.") if component.startswith("text_encoder") else name


def _is_ignored(checkpoint: Checkpoint, component: str, name: str) -> bool:
    """Whether a tensor may be left out of the file, because nobody reads it there."""
    if component in PARTS:  # the other half of the autoencoder is another component
        return name.startswith(next(p for part, p in PARTS.items() if part != component))
    if name.endswith("position_ids"):  # 0, 1, 2 ...: old files carry it
        return True
    if is_skipped(checkpoint, component, name):
        return True
    if component != "text_encoder" or checkpoint.family != "sdxl":
        return False
    last = checkpoint.configs[component]["num_hidden_layers"] - 1  # SDXL reads those before it
    plain = _plain_name(component, name)
    return plain.startswith((f"encoder.layers.{last}.", "final_layer_norm."))


# --- the layout ---------------------------------------------------------------------------------


def _panels(request: Packed, arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """A tensor in the order of the file, a few outputs at a time; float32, or as `arrays` are.

    Of a matrix (blocks, taps, inputs, 16), of a table (rows, values), of a vector (values,).
    """
    source = _checked(request, _joined(arrays))
    order = _order(request)
    if request.form in VECTORS:
        yield _take(source, order)
    elif request.form == "table":
        for first in range(0, len(source), ROWS):
            yield _pad_inputs(source[first : first + ROWS], request.inputs)
    elif request.form == "upsample":
        for rows in DOUBLED:
            for columns in DOUBLED:
                for first in range(0, len(order), ROWS):
                    filters = _take(source, order[first : first + ROWS])
                    yield _blocks(_quarter(filters, rows, columns), request.inputs)
    else:
        for first in range(0, len(order), ROWS):
            yield _blocks(_take(source, order[first : first + ROWS]), request.inputs)


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    first, *others = arrays
    return np.concatenate([first, *others]) if others else first


def _checked(request: Packed, source: np.ndarray) -> np.ndarray:
    """A matrix as (outputs, inputs, taps), others as they are; refuses what has another shape."""
    if source.shape not in request.source_shapes:
        raise CheckpointError(
            f"{request.name}: {', '.join(request.sources)} is {source.shape}, the layer needs "
            f"{request.source_shapes[0]}: config.json and weights do not belong together"
        )
    if request.is_matrix:
        return source.reshape(request.outputs, sum(request.inputs), request.side**2)
    return source


def _order(request: Packed) -> np.ndarray:
    """The outputs as they are stored, -1 where none is: blocks are whole.

    GEGLU's values and gates, the two halves of the source, alternate block by block.
    """
    if request.form not in ("geglu", "geglu_vector"):
        return _whole_blocks(np.arange(request.outputs))
    halves = np.arange(request.outputs).reshape(2, -1)
    value, gate = (_whole_blocks(half).reshape(-1, LANES) for half in halves)
    return np.stack([value, gate], axis=1).reshape(-1)


def _whole_blocks(outputs: np.ndarray) -> np.ndarray:
    return np.pad(outputs, (0, -len(outputs) % LANES), constant_values=-1)


def _take(source: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Those outputs of the source, zeros for -1."""
    taken = np.zeros((len(order), *source.shape[1:]), source.dtype)
    taken[order >= 0] = source[order[order >= 0]]
    return taken


def _quarter(
    filters: np.ndarray, rows: Sequence[Sequence[int]], columns: Sequence[Sequence[int]]
) -> np.ndarray:
    """The 2x2 filters, (outputs, inputs, 4), that 3x3 ones are at one parity of a doubled image."""
    wide = filters.astype(np.float64).reshape(*filters.shape[:2], 3, 3)
    taps = [
        sum(wide[:, :, y, x] for y in together for x in beside)
        for together in rows
        for beside in columns
    ]
    return np.stack(taps, axis=-1).astype(np.float32)


def _blocks(filters: np.ndarray, inputs: Sequence[int]) -> np.ndarray:
    """(outputs, inputs, taps) to (blocks, taps, inputs, 16)."""
    by_tap = _pad_inputs(filters.transpose(2, 0, 1), inputs)  # (taps, outputs, inputs)
    taps, outputs, padded = by_tap.shape
    blocks = by_tap.reshape(taps, outputs // LANES, LANES, padded)
    return np.ascontiguousarray(blocks.transpose(1, 0, 3, 2))


def _pad_inputs(values: np.ndarray, inputs: Sequence[int]) -> np.ndarray:
    """The last axis, of several sources side by side, each filled up to whole blocks."""
    filled = np.zeros((*values.shape[:-1], sum(map(padded, inputs))), values.dtype)
    source = target = 0
    for count in inputs:
        filled[..., target : target + count] = values[..., source : source + count]
        source, target = source + count, target + padded(count)
    return filled


def _parts(
    request: Packed, arrays: Iterable[np.ndarray], kind: Type, lost: dict[str, int]
) -> Iterator[np.ndarray]:
    """A tensor as it is stored, piece by piece; the scales of int8 come last."""
    scales = []
    for panel in _panels(request, arrays):
        if kind in FEW_BITS.values():
            packed, *scale = _few_bits(request, panel, kind)
            scales += scale
            yield packed
        else:
            yield _stored(request.name, panel, kind, lost)
    if scales:
        _, start = request.bytes(kind)
        matrix = math.prod(request.shape(kind))
        yield np.zeros(start - matrix, np.uint8)
        yield np.concatenate(scales).astype("<f4")


def _few_bits(request: Packed, panel: np.ndarray, kind: Type) -> tuple[np.ndarray, ...]:
    """A panel as whole numbers; of int8 also the scales, which int4 has among them."""
    try:
        if kind == Type.I8:
            values, scales = to_int8(panel)
            return together(values, 4), scales
        sources = [padded(count) for count in request.inputs]
        return (packed_int4(*to_int4(panel, GROUP, sources), sources),)
    except ValueError as error:
        raise CheckpointError(f"{request.name}: {error}; use weights fp32") from None


def _stored(name: str, panel: np.ndarray, kind: Type, lost: dict[str, int]) -> np.ndarray:
    """A panel in the type of the file, contiguous; bfloat16 with the inputs in pairs."""
    if kind is Type.F32:
        return np.ascontiguousarray(panel, "<f4")
    if kind is Type.F16:
        if panel.dtype == np.float16:
            return np.ascontiguousarray(panel, "<f2")
        zeros: dict[str, int] = {}
        half = to_half(name, panel, zeros)
        if zeros:
            lost[name] = lost.get(name, 0) + zeros[name]
        return np.ascontiguousarray(half, "<f2")
    return together(to_bf16(name, panel), 2)
