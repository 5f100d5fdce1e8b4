"""The native target on our own CPU engine: mapped weights, one arena, a program per input size."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ... import kernels
from ...bundle import Bundle, BundleError, Component, strict_json
from ...kernels import KernelError, Program, Type
from .. import models
from ..bands import Bands, in_bands
from ..layout import Layout, lay_out
from ..program import (
    INT8,
    LINE,
    STORED,
    TYPES,
    Graph,
    GraphError,
    Input,
    Node,
    Output,
    Packed,
    Storage,
    Weight,
    activation_type,
)
from ..window import schedule
from . import Arrays, check_shapes

WEIGHTS, INDEX = "weights.bin", "weights.json"
FORMAT = 1  # of the index
MAX_THREADS = 64  # of the engine
CACHED_FILES = 8  # components whose index was read; some hundred kilobytes each at full size
CACHED_SIZES = 4  # programs; each holds idle threads and a few hundred ops
DTYPES = {Type.F32: np.float32, Type.BF16: np.uint16, Type.F16: np.float16, Type.I32: np.int32}


@dataclass(frozen=True)
class Fit:
    """How a component is made to fit: it changes memory and time, never a byte of what comes out.

    `bands`: large images in bands of rows.  `window`: bytes of weights in memory at once.
    """

    bands: Bands | None = None
    window: int | None = None

    def fresh(self, component: str) -> bool:
        """Whether the arena begins anew: it grows while what is left of the weights shrinks."""
        return self.window is not None and component in ("vae_decoder", "vae_encoder")


class Arena:
    """Memory for activations, shared by components that run one after the other.

    Nothing else that is large is allocated: its size is what the plan says.
    """

    def __init__(self) -> None:
        self._room: mmap.mmap | None = None
        self._bytes = np.empty(0, np.uint8)

    def take(self, size: int, fresh: bool = False) -> np.ndarray:
        """That many bytes, from the start of a page; what was there is lost.

        `fresh`: none of them is in memory before it is written.
        """
        if len(self._bytes) < size:
            self.release()  # never two of them
            self._room = mmap.mmap(-1, max(size, 1))
            self._bytes = np.frombuffer(self._room, np.uint8)
        elif self._room and hasattr(self._room, "madvise"):
            start = 0 if fresh else -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            if start < len(self._bytes):  # of a larger component before
                self._room.madvise(mmap.MADV_DONTNEED, start)
        return self._bytes[:size]

    def release(self) -> None:
        """Give it back, once nobody holds a view."""
        self._room, self._bytes = None, np.empty(0, np.uint8)


@dataclass(frozen=True)
class Files:
    """A component's network and where its weights are; nothing of them is read."""

    component: str
    config: Mapping[str, Any]
    outputs: tuple[str, ...]
    folder: Path
    places: Mapping[str, Weight]
    bytes: int  # of the weights
    type: Type  # of activations
    narrow: bool  # whether attention multiplies int8

    def graph(self, shapes: models.Shapes) -> Graph:
        """The network for inputs of these shapes.  Raises BundleError."""
        try:
            graph = models.build(self.component, self.config, shapes, self.type, self.outputs)
            return graph.narrowed() if self.narrow else graph
        except GraphError as error:
            raise BundleError(f"{self.folder}: {error}") from None

    def prepare(
        self, shapes: models.Shapes, bands: Bands | None, threads: int, isa: str | None
    ) -> tuple[Graph, Layout]:
        """The network with everything in its place."""
        graph = self.graph(shapes)
        if bands:
            graph = in_bands(graph, bands, partial(_uses_winograd, self.places, isa))
        scratch = partial(kernels.scratch, threads=threads, isa=isa)
        return graph, lay_out(graph, self.places, scratch)


_opened: OrderedDict[tuple, tuple[Component, Files]] = OrderedDict()


def open_files(bundle: Bundle, component: str) -> Files:
    """Check what a component's folder says of its weights; kept until something changes.

    Raises BundleError.
    """
    spec = bundle.component(component)
    folder = bundle.path(spec.path)
    try:
        stats = [(folder / name).stat() for name in (INDEX, WEIGHTS)]
    except OSError:  # reading it says what is wrong
        return _open_files(bundle, component)
    states = [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]
    key = (folder, component, bundle.manifest.precision.activations, *states)
    if key not in _opened or _opened[key][0] != spec:
        _opened[key] = spec, _open_files(bundle, component)
        while len(_opened) > CACHED_FILES:
            _opened.popitem(last=False)
    _opened.move_to_end(key)
    return _opened[key][1]


def _open_files(bundle: Bundle, component: str) -> Files:
    spec = bundle.component(component)
    folder, kind = bundle.path(spec.path), _activations(bundle, component)
    try:
        packed = models.weights(component, spec.config, spec.outputs)
    except GraphError as error:
        raise BundleError(f"{folder}: {error}") from None
    narrow = bundle.activations(component) == INT8
    places = read_index(folder, packed, narrow)
    _check_types(folder, packed, places, kind)
    size = (folder / WEIGHTS).stat().st_size
    return Files(component, spec.config, tuple(spec.outputs), folder, places, size, kind, narrow)


def _uses_winograd(places: Mapping[str, Weight], isa: str | None, node: Node) -> bool:
    return kernels.uses_winograd(node.lower(places), isa)


@dataclass(frozen=True)
class _Prepared:
    """A component for inputs of one size; a layout's many ops are the program's by now."""

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    offsets: Mapping[Storage, int]
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
        arena: Arena | None = None,
        fit: Fit | None = None,
    ) -> None:
        kernels.library()
        self._spec = bundle.component(component)
        self._files = open_files(bundle, component)
        self._threads, self._isa = threads or usable_threads(), isa
        self._map = _map(self._files.folder / WEIGHTS)
        self._weights = np.frombuffer(self._map, np.uint8)
        self._spoilt = ""  # what has become of the file since
        self._prepared: OrderedDict[tuple, _Prepared] = OrderedDict()
        self._arena = arena or Arena()
        self.fit = fit or Fit()

    def __call__(self, inputs: Arrays, times: np.ndarray | None = None) -> Arrays:
        """Run the network; inputs are cast to what it reads, outputs come as float32.

        `times`, uint64 by op of `program`, receives nanoseconds.
        """
        sizes: dict[str, int] = {}
        where = str(self._files.folder)
        if inputs.keys() != self._spec.inputs.keys():
            names = ", ".join(self._spec.inputs)
            raise BundleError(f"{where} takes {names}; given were {', '.join(inputs) or 'none'}")
        check_shapes(where, self._spec.inputs, inputs, sizes)
        ready = self._prepare({name: np.shape(value) for name, value in inputs.items()})
        fresh = self.fit.fresh(self._files.component)
        arena = self._arena.take(ready.program.arena_bytes, fresh)
        for entry in ready.inputs:
            write_input(arena, ready.offsets, entry, inputs[entry.name])
        try:
            self._run(ready.program, arena, times)
        except KernelError as error:
            raise BundleError(f"{where}/{WEIGHTS} changed while it was read: {error}; copy or "
                              "convert the bundle again") from None  # fmt: skip
        found = {o.name: read_output(arena, ready.offsets, o) for o in ready.outputs}
        check_shapes(where, self._spec.outputs, found, sizes)
        return found

    def layout(self, shapes: models.Shapes) -> Layout:
        """Where everything would lie for inputs of these shapes; `models.sizes` tells them."""
        return self._files.prepare(shapes, self.fit.bands, self._threads, self._isa)[1]

    def program(self, shapes: models.Shapes) -> Program:
        """The ops that run for inputs of these shapes."""
        return self._prepare(shapes).program

    def release(self) -> None:
        """Let go of the weights' pages; the next run maps them again."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the mapped file."""
        return self._weights.nbytes

    def _run(self, program: Program, arena: np.ndarray, times: np.ndarray | None) -> None:
        """Raises KernelError if the weights' file was cut short, and at every run after that.

        What was missing may be zeros in the mapping, even once the file is whole again.
        """
        if self._spoilt:
            raise KernelError(self._spoilt)
        try:
            program.run(arena, self._weights, times)
            if (size := self._map.size()) != self.weight_bytes:  # in the last page nothing faults
                raise KernelError(f"it had {self.weight_bytes:,} bytes and has {size:,}")
        except KernelError as error:
            self._spoilt = str(error)
            raise

    def _prepare(self, shapes: models.Shapes) -> _Prepared:
        inputs = sorted((name, tuple(shape)) for name, shape in shapes.items())
        key = (*inputs, self.fit)
        if key not in self._prepared:
            made = self._make(shapes)
            while len(self._prepared) >= CACHED_SIZES:
                self._prepared.popitem(last=False)
            self._prepared[key] = made
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def _make(self, shapes: models.Shapes) -> _Prepared:
        files, bands = self._files, self.fit.bands
        graph, placed = files.prepare(shapes, bands, self._threads, self._isa)
        for verb, found, manifest in (
            ("reads", graph.inputs, self._spec.inputs),
            ("returns", graph.outputs, self._spec.outputs),
        ):
            if {entry.name for entry in found} != manifest.keys():
                names = ", ".join(entry.name for entry in found)
                raise BundleError(
                    f"{files.folder} {verb} {names}; the manifest says {', '.join(manifest)}"
                )
        program = Program(
            placed.ops, placed.arena_bytes, self._weights.nbytes, self._threads, self._isa
        )
        if self.fit.window is not None:
            program.stream(schedule(graph, files.places, files.bytes).ranges, self.fit.window)
        named = {i.value.storage for i in graph.inputs} | {o.value.storage for o in graph.outputs}
        offsets = {storage: placed.offsets[storage] for storage in named}
        return _Prepared(graph.inputs, graph.outputs, offsets, program)


def usable_threads() -> int:
    """One for every core that this process may run on, up to what the engine takes."""
    return min(cores(), MAX_THREADS)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(
            f"{path} cannot be mapped into memory ({reason}): copy the bundle to a local disk"
        ) from None


# --- files --------------------------------------------------------------------------------------


def read_index(folder: Path, packed: Sequence[Packed], narrow: bool = False) -> dict[str, Weight]:
    """Where every tensor is in weights.bin, which must hold exactly those of `packed`.

    `narrow`: matrices of int8 are multiplied with activations that are rounded to int8.
    Raises BundleError with one line for whatever is wrong.
    """
    path = folder / INDEX
    try:
        raw = strict_json(path.read_text(encoding="utf-8"))
        size = (folder / WEIGHTS).stat().st_size
        return _check_index(raw, packed, size, narrow)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} does not fit: {error}; convert the checkpoint again") from None


def _check_index(raw: Any, packed: Sequence[Packed], size: int, narrow: bool) -> dict[str, Weight]:
    """The index as places; ValueError names what is wrong."""
    _require(isinstance(raw, dict) and raw.keys() == {"format", "bytes", "tensors"}, "its fields")
    _require(raw["format"] == FORMAT, f"its format is not {FORMAT}")
    _require(raw["bytes"] == size, f"{WEIGHTS} has {size:,} bytes, it says {raw['bytes']}")
    tensors = raw["tensors"]
    _require(isinstance(tensors, dict), "tensors is no object")
    wanted = {tensor.name for tensor in packed}
    for names, problem in ((wanted - tensors.keys(), "no"), (tensors.keys() - wanted, "unknown")):
        _require(not names, f"{problem} tensor {min(names, default='')[:100]!r}")
    places = {
        tensor.name: _check_entry(tensor, tensors[tensor.name], size, narrow) for tensor in packed
    }
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        _require(place.offset >= end, f"{name} overlaps another tensor")
        end = place.offset + place.bytes
    return places


def _check_entry(tensor: Packed, entry: Any, size: int, narrow: bool) -> Weight:
    name = tensor.name
    fields = {"form", "type", "offset", "bytes", "shape"}
    _require(isinstance(entry, dict) and entry.keys() == fields, f"the fields of {name}")
    _require(entry["form"] == tensor.form, f"{name} is of another form than {tensor.form}")
    _require(entry["type"] in list(STORED), f"{name} is of no type of {', '.join(STORED)}")
    kind = STORED[entry["type"]]
    _require(tensor.type(kind) == kind, f"{name} must be fp32")
    shape, offset = tensor.shape(kind), entry["offset"]
    _require(entry["shape"] == list(shape), f"{name} is not of the shape {shape}")
    needed, scales = tensor.bytes(kind)
    _require(entry["bytes"] == needed, f"{name} has not {needed:,} bytes")
    inside = type(offset) is int and 0 <= offset <= size - needed and offset % LINE == 0
    _require(inside, f"{name} is not at a multiple of {LINE} inside the file")
    quantized = bool(tensor.scales(kind))
    return Weight(
        kind, offset, needed, offset + scales if quantized else None, narrow and quantized
    )


def _check_types(
    folder: Path, packed: Sequence[Packed], places: Mapping[str, Weight], activations: Type
) -> None:
    """16-bit activations are multiplied only with weights of their own type, or of few bits."""
    for tensor in packed:
        kind = places[tensor.name].type
        plain = tensor.is_matrix and kind in TYPES.values()
        if activations != Type.F32 and plain and kind != activations:
            raise BundleError(
                f"{folder}: {tensor.name} is {kind.name}, activations are {activations.name}: "
                "convert again with both alike, or with activations fp32"
            )


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _activations(bundle: Bundle, component: str) -> Type:
    name = bundle.activations(component)
    kind = activation_type(name)
    if kind is None:
        raise BundleError(
            f"{bundle.folder}: activations {name!r} are not known, only {', '.join(TYPES)}, {INT8}"
        )
    return kind


def cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- arrays -------------------------------------------------------------------------------------


def write_input(
    arena: np.ndarray, offsets: Mapping[Storage, int], entry: Input, array: np.ndarray
) -> None:
    """Put an array where the graph reads it."""
    slot = _slot(arena, offsets, entry)
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


def read_output(arena: np.ndarray, offsets: Mapping[Storage, int], entry: Output) -> np.ndarray:
    """An array of the graph as float32, in memory of its own."""
    storage = entry.value.storage
    slot = _slot(arena, offsets, entry)
    if not storage.planar:
        return widen(slot[:, : entry.value.c], storage.type).reshape(entry.shape)
    found = np.full(entry.shape, entry.fill, np.float32)
    found.reshape(-1)[: slot.size] = slot
    return found


def _slot(arena: np.ndarray, offsets: Mapping[Storage, int], entry: Input | Output) -> np.ndarray:
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
