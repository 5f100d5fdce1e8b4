"""The native target on our own CPU engine: mapped weights, one arena, a program per input size."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import kernels
from ...bundle import Bundle, BundleError, strict_json
from ...kernels import Program, Type
from .. import models
from ..plan import Plan, plan
from ..program import LINE, TYPES, Graph, GraphError, Input, Output, Packed, Weight
from . import Arrays, check_shapes

WEIGHTS, INDEX = "weights.bin", "weights.json"
FORMAT = 1  # of the index
MAX_THREADS = 64  # of the engine
CACHED_SIZES = 4  # programs; each holds idle threads and a few hundred ops
DTYPES = {Type.F32: np.float32, Type.BF16: np.uint16, Type.F16: np.float16, Type.I32: np.int32}


@dataclass(frozen=True)
class _Prepared:
    """A component for inputs of one size."""

    graph: Graph
    plan: Plan
    program: Program


class NativeEngine:
    """One component; its weights are mapped from the bundle and used in place.

    Not for two threads at once: calls share an arena.  `isa` forces an instruction set, by name.
    Raises BundleError for files that do not fit the component, KernelError without an engine.
    """

    def __init__(
        self,
        bundle: Bundle,
        component: str,
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        kernels.library()
        self._spec, self._component = bundle.component(component), component
        folder = self._folder = bundle.path(self._spec.path)
        self._threads = threads or min(_cores(), MAX_THREADS)
        self._isa = isa
        self._type = _activations(bundle)
        try:
            packed = models.weights(component, self._spec.config, self._spec.outputs)
        except GraphError as error:
            raise BundleError(f"{folder}: {error}") from None
        self._places = read_index(folder, packed)
        _check_types(folder, packed, self._places, self._type)
        self._weights = np.memmap(folder / WEIGHTS, np.uint8, "r")
        self._prepared: OrderedDict[tuple, _Prepared] = OrderedDict()
        self._arena = np.empty(0, np.uint8)

    def __call__(self, inputs: Arrays, times: np.ndarray | None = None) -> Arrays:
        """Run the network; inputs are cast to what it reads, outputs come as float32.

        `times`, uint64 by op of `program`, receives nanoseconds.
        """
        sizes: dict[str, int] = {}
        where = str(self._folder)
        if inputs.keys() != self._spec.inputs.keys():
            names = ", ".join(self._spec.inputs)
            raise BundleError(f"{where} takes {names}; given were {', '.join(inputs) or 'none'}")
        check_shapes(where, self._spec.inputs, inputs, sizes)
        ready = self._prepare({name: np.shape(value) for name, value in inputs.items()})
        if len(self._arena) < ready.plan.arena_bytes:
            self._arena = np.empty(0, np.uint8)  # never two of them
            self._arena = kernels.aligned(ready.plan.arena_bytes)
        for entry in ready.graph.inputs:
            write_input(self._arena, ready.plan, entry, inputs[entry.name])
        ready.program.run(self._arena, self._weights, times)
        found = {o.name: read_output(self._arena, ready.plan, o) for o in ready.graph.outputs}
        check_shapes(where, self._spec.outputs, found, sizes)
        return found

    def plan(self, shapes: models.Shapes) -> Plan:
        """Where everything would lie for inputs of these shapes; `models.sizes` tells them."""
        return self._prepare(shapes).plan

    def program(self, shapes: models.Shapes) -> Program:
        """The ops that run for inputs of these shapes."""
        return self._prepare(shapes).program

    @property
    def weight_bytes(self) -> int:
        """Bytes of the mapped file."""
        return self._weights.nbytes

    def _prepare(self, shapes: models.Shapes) -> _Prepared:
        key = tuple(sorted((name, tuple(shape)) for name, shape in shapes.items()))
        if key not in self._prepared:
            made = self._make(shapes)
            while len(self._prepared) >= CACHED_SIZES:
                self._prepared.popitem(last=False)
            self._prepared[key] = made
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def _make(self, shapes: models.Shapes) -> _Prepared:
        config, outputs = self._spec.config, self._spec.outputs
        try:
            graph = models.build(self._component, config, shapes, self._type, outputs)
        except GraphError as error:
            raise BundleError(f"{self._folder}: {error}") from None
        for verb, found, manifest in (
            ("reads", graph.inputs, self._spec.inputs),
            ("returns", graph.outputs, self._spec.outputs),
        ):
            if {entry.name for entry in found} != manifest.keys():
                names = ", ".join(entry.name for entry in found)
                raise BundleError(
                    f"{self._folder} {verb} {names}; the manifest says {', '.join(manifest)}"
                )
        placed = plan(graph, self._places, self._scratch)
        program = Program(
            placed.ops, placed.arena_bytes, self._weights.nbytes, self._threads, self._isa
        )
        return _Prepared(graph, placed, program)

    def _scratch(self, op: kernels.Op) -> int:
        return kernels.scratch(op, self._threads, self._isa)


# --- files --------------------------------------------------------------------------------------


def read_index(folder: Path, packed: Sequence[Packed]) -> dict[str, Weight]:
    """Where every tensor is in weights.bin, which must hold exactly those of `packed`.

    Raises BundleError with one line for whatever is wrong.
    """
    path = folder / INDEX
    try:
        raw = strict_json(path.read_text(encoding="utf-8"))
        size = (folder / WEIGHTS).stat().st_size
        return _check_index(raw, packed, size)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} does not fit: {error}; convert the checkpoint again") from None


def _check_index(raw: Any, packed: Sequence[Packed], size: int) -> dict[str, Weight]:
    """The index as places; ValueError names what is wrong."""
    _require(isinstance(raw, dict) and raw.keys() == {"format", "bytes", "tensors"}, "its fields")
    _require(raw["format"] == FORMAT, f"its format is not {FORMAT}")
    _require(raw["bytes"] == size, f"{WEIGHTS} has {size:,} bytes, it says {raw['bytes']}")
    tensors = raw["tensors"]
    _require(isinstance(tensors, dict), "tensors is no object")
    wanted = {tensor.name for tensor in packed}
    for names, problem in ((wanted - tensors.keys(), "no"), (tensors.keys() - wanted, "unknown")):
        _require(not names, f"{problem} tensor {min(names, default='')[:100]!r}")
    places = {tensor.name: _check_entry(tensor, tensors[tensor.name], size) for tensor in packed}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        _require(place.offset >= end, f"{name} overlaps another tensor")
        end = place.offset + place.bytes
    return places


def _check_entry(tensor: Packed, entry: Any, size: int) -> Weight:
    name = tensor.name
    fields = {"form", "type", "offset", "bytes", "shape"}
    _require(isinstance(entry, dict) and entry.keys() == fields, f"the fields of {name}")
    _require(entry["form"] == tensor.form, f"{name} is of another form than {tensor.form}")
    _require(entry["type"] in list(TYPES), f"{name} is of no type of {', '.join(TYPES)}")
    kind = TYPES[entry["type"]]
    _require(tensor.type(kind) == kind, f"{name} must be fp32")
    shape, offset = tensor.shape(kind), entry["offset"]
    _require(entry["shape"] == list(shape), f"{name} is not of the shape {shape}")
    needed = math.prod(shape) * kind.bytes
    _require(entry["bytes"] == needed, f"{name} has not {needed:,} bytes")
    inside = type(offset) is int and 0 <= offset <= size - needed and offset % LINE == 0
    _require(inside, f"{name} is not at a multiple of {LINE} inside the file")
    return Weight(kind, offset, needed)


def _check_types(
    folder: Path, packed: Sequence[Packed], places: Mapping[str, Weight], activations: Type
) -> None:
    """16-bit activations are multiplied only with weights of their own type."""
    for tensor in packed:
        kind = places[tensor.name].type
        if activations != Type.F32 and tensor.is_matrix and kind != activations:
            raise BundleError(
                f"{folder}: {tensor.name} is {kind.name}, activations are {activations.name}: "
                "convert again with both alike, or with activations fp32"
            )


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _activations(bundle: Bundle) -> Type:
    name = bundle.manifest.precision.activations
    if name not in TYPES:
        raise BundleError(
            f"{bundle.folder}: activations {name!r} are not known, only {', '.join(TYPES)}"
        )
    return TYPES[name]


def _cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- arrays -------------------------------------------------------------------------------------


def write_input(arena: np.ndarray, placed: Plan, entry: Input, array: np.ndarray) -> None:
    """Put an array where the graph reads it."""
    slot = _slot(arena, placed.offsets, entry)
    kind = entry.value.storage.type
    if kind == Type.I32:
        slot[:] = np.asarray(array).reshape(slot.shape)
        return
    values = np.asarray(array, np.float32)
    if entry.shift:
        values = values + np.float32(entry.shift)
    if entry.value.storage.planar:
        slot[:] = values.reshape(slot.shape)
        return
    c = entry.value.c
    slot[:, :c] = narrow(values.reshape(-1, c), kind)
    slot[:, c:] = 0


def read_output(arena: np.ndarray, placed: Plan, entry: Output) -> np.ndarray:
    """An array of the graph as float32, in memory of its own."""
    storage = entry.value.storage
    slot = _slot(arena, placed.offsets, entry)
    if not storage.planar:
        return widen(slot[:, : entry.value.c], storage.type).reshape(entry.shape)
    found = np.full(entry.shape, entry.fill, np.float32)
    found.reshape(-1)[: slot.size] = slot
    return found


def _slot(arena: np.ndarray, offsets: Mapping[Any, int], entry: Input | Output) -> np.ndarray:
    """The elements of an array in the arena: in a row if planar, else (pixels, padded channels)."""
    storage = entry.value.storage
    count = storage.c * storage.h * storage.w if storage.planar else storage.h * storage.row
    start = offsets[storage]
    values = arena[start : start + count * storage.type.bytes].view(DTYPES[storage.type])
    return values if storage.planar else values.reshape(-1, storage.pixel)


def narrow(values: np.ndarray, kind: Type) -> np.ndarray:
    """float32 as elements of a type; bfloat16, the upper half of a float32, as its bits."""
    if kind != Type.BF16:
        return values.astype(DTYPES[kind])
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16  # ties to even
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def widen(elements: np.ndarray, kind: Type) -> np.ndarray:
    """Elements of a type as float32, in memory of its own."""
    if kind != Type.BF16:
        return elements.astype(np.float32)
    return (elements.astype(np.uint32) << 16).view(np.float32)
