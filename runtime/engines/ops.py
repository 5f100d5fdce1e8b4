"""A native component op by op, for a look at what lies between: its output is the engine's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ... import kernels
from ...bundle import Bundle
from ..program import Graph, Node, Value
from . import Arrays
from .native import DTYPES, WEIGHTS, open_files, read_output, usable_threads, widen, write_input


class Ops:
    """Runs a component; between two ops, `read` tells what a tensor holds."""

    def __init__(
        self, bundle: Bundle, component: str, threads: int | None = None, isa: str | None = None
    ) -> None:
        self.files = open_files(bundle, component)
        self._threads, self._isa = threads or usable_threads(), isa
        self._weights = np.memmap(self.files.folder / WEIGHTS, np.uint8, "r")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.graph: Graph

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run the network; arrays in, float32 arrays out."""
        for _ in self.run(inputs):
            pass
        return self.outputs()

    def outputs(self) -> Arrays:
        """What the network returns, after a run."""
        return {o.name: read_output(self._arena, self._offsets, o) for o in self.graph.outputs}

    def run(self, inputs: Arrays) -> Iterator[tuple[Node, bool]]:
        """Every op twice: before it has run, and (True) after."""
        self._prepare({name: np.shape(value) for name, value in inputs.items()})
        for entry in self.graph.inputs:
            write_input(self._arena, self._offsets, entry, inputs[entry.name])
        for node, program in zip(self.graph.nodes, self._programs, strict=True):
            yield node, False
            program.run(self._arena, self._weights)
            yield node, True

    def read(self, value: Value | None) -> np.ndarray | None:
        """What a tensor, or a slice of one, holds: (pixels, channels) float32; None of planes."""
        if value is None or value.storage.planar:
            return None
        s, size = value.storage, value.storage.type.bytes
        start = self._offsets[s] + value.first * size
        strides = (s.row * size, s.pixel * size, size)
        pixels = np.ndarray((s.h, s.w, value.c), DTYPES[s.type], self._arena.data, start, strides)
        return widen(pixels, s.type).reshape(-1, value.c)

    def _prepare(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if shapes == self._shapes:
            return
        self.graph, placed = self.files.prepare(shapes, None, self._threads, self._isa)
        self._arena, self._offsets = kernels.aligned(placed.arena_bytes), placed.offsets
        size = self._weights.nbytes
        self._programs = [
            kernels.Program([op], placed.arena_bytes, size, 1, self._isa) for op in placed.ops
        ]
        self._shapes = shapes
