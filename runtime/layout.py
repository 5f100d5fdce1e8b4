"""Where every tensor of a graph lies in one arena: the peak of memory, known before anything runs.

A tensor has a place from the op that writes it to the last that reads it, scratch during its op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..kernels import Kind, Op
from .program import LINE, Graph, Node, Storage, Value, Weight, round_up

# Ops that read a tensor only where they write the same pixel, so that out may lie upon it.
IN_PLACE: dict[Kind, tuple[str, ...]] = {
    Kind.MATMUL: ("c",),
    Kind.UNARY: ("a",),
    Kind.ADD: ("a", "b"),
    Kind.GROUP_NORM: ("a",),
    Kind.LAYER_NORM: ("a",),
}


@dataclass(frozen=True)
class Layout:
    """A graph with everything in its place."""

    ops: tuple[Op, ...]
    names: tuple[str, ...]  # of each op's layer
    offsets: Mapping[Storage, int]  # bytes into the arena, of the first pixel
    arena_bytes: int
    live: tuple[int, ...]  # bytes in use during each op, scratch included
    touched: tuple[int, ...]  # bytes from the start of the arena that ops so far have written
    scratch: tuple[int, ...]  # bytes of it
    ends: tuple[int, ...]  # bytes from the start to the end of what is in use during each op

    @property
    def peak(self) -> int:
        """The most bytes in use at once: what no arena for this order of ops can be below."""
        return max(self.live)


@dataclass(slots=True)
class _Buffer:
    """A piece of the arena, in use from an op to another."""

    bytes: int
    first: int
    last: int
    pin: int | None = None  # where it starts, if that is not ours to choose


def lay_out(graph: Graph, weights: Mapping[str, Weight], scratch: Callable[[Op], int]) -> Layout:
    """Place a graph's tensors; `scratch` says how many bytes an op needs."""
    ops = [node.lower(weights) for node in graph.nodes]
    needs = [round_up(scratch(op), LINE) for op in ops]
    buffers = _buffers(graph)
    working = [_Buffer(size, i, i) for i, size in enumerate(needs)]
    pieces = _unique([*buffers.values(), *(piece for piece in working if piece.bytes)])
    starts, arena_bytes = _place(pieces)
    start = dict(zip(map(id, pieces), starts, strict=True))
    for node, op, piece in zip(graph.nodes, ops, working, strict=True):
        for name in ("out", "a", "b", "c", "add"):
            value: Value | None = getattr(node, name)
            if value:
                getattr(op, name).offset += start[id(buffers[value.storage])]
        op.scratch = start.get(id(piece), 0)
    return Layout(
        tuple(ops),
        tuple(node.name for node in graph.nodes),
        {storage: start[id(b)] + storage.lead for storage, b in buffers.items()},
        arena_bytes,
        tuple(_live(pieces, len(ops))),
        tuple(_touched(pieces, starts, len(ops))),
        tuple(needs),
        tuple(_ends(pieces, starts, len(ops))),
    )


# --- lives --------------------------------------------------------------------------------------


def _buffers(graph: Graph) -> dict[Storage, _Buffer]:
    """The piece of every tensor; two share one where an op writes upon what it read last."""
    last = _last_uses(graph)
    kept = {output.value.storage for output in graph.outputs}
    buffers = {i.value.storage: _new(i.value.storage, 0, last) for i in graph.inputs}
    for index, node in enumerate(graph.nodes):
        out = node.out.storage
        if out in buffers:  # written band by band
            continue
        under = out.upon or _overwritten(node, index, last, kept)
        if under:
            buffers[out] = buffers[under]
            buffers[out].last = max(buffers[out].last, last[out])
        else:
            buffers[out] = _new(out, index, last)
    for storage in kept:
        buffers[storage].last = len(graph.nodes) - 1
    for storage, buffer in buffers.items():
        if storage.pin is not None:
            buffer.pin = storage.pin
    return buffers


def _new(storage: Storage, first: int, last: Mapping[Storage, int]) -> _Buffer:
    return _Buffer(storage.bytes, first, last.get(storage, first))


def _last_uses(graph: Graph) -> dict[Storage, int]:
    return {v.storage: i for i, node in enumerate(graph.nodes) for v in (node.out, *node.reads)}


def _overwritten(
    node: Node, index: int, last: Mapping[Storage, int], kept: set[Storage]
) -> Storage | None:
    """The tensor that the op's output may lie upon.

    None where either is pinned: its neighbour counts on the life and the place that it has alone.
    """
    for name in IN_PLACE.get(node.kind, ()):
        value: Value | None = getattr(node, name)
        if value is None or value.c != value.storage.c or value.h != value.storage.h:
            continue
        storage = value.storage
        readers = [v for v in node.reads if v.storage is storage]
        pinned = storage.pin is not None or node.out.storage.pin is not None
        dies = last[storage] == index and storage not in kept and not pinned
        if dies and len(readers) == 1 and storage.like(node.out.storage):
            return storage
    return None


def _unique(pieces: list[_Buffer]) -> list[_Buffer]:
    return list({id(piece): piece for piece in pieces}.values())


def _live(pieces: list[_Buffer], count: int) -> list[int]:
    """Bytes in use during each op."""
    change = np.zeros(count + 1, np.int64)
    for piece in pieces:
        change[piece.first] += piece.bytes
        change[piece.last + 1] -= piece.bytes
    return change.cumsum()[:-1].tolist()


def _touched(pieces: list[_Buffer], starts: list[int], count: int) -> list[int]:
    """Bytes from the start of the arena that were in use during any op so far."""
    ends = np.zeros(count, np.int64)
    for piece, start in zip(pieces, starts, strict=True):
        ends[piece.first] = max(ends[piece.first], start + piece.bytes)
    return np.maximum.accumulate(ends).tolist()


def _ends(pieces: list[_Buffer], starts: list[int], count: int) -> list[int]:
    """Bytes from the start of the arena above which nothing is in use, by op."""
    ends = np.zeros(count, np.int64)
    for piece, start in zip(pieces, starts, strict=True):
        during = ends[piece.first : piece.last + 1]
        np.maximum(during, start + piece.bytes, out=during)
    return ends.tolist()


# --- places -------------------------------------------------------------------------------------


def _place(pieces: list[_Buffer]) -> tuple[list[int], int]:
    """Where each piece starts, and the bytes of all: the best of some greedy orders.

    Pisarchyk and Lee 2020: large pieces first, each at the lowest place that is free all its life.
    """
    bytes_, first, last = (
        np.array([getattr(piece, name) for piece in pieces], np.int64)
        for name in ("bytes", "first", "last")
    )
    count = int(last.max()) + 1
    live = np.array(_live(pieces, count))
    crowd = np.array([live[p.first : p.last + 1].max() for p in pieces])
    index = np.arange(len(pieces))
    pinned = np.array([piece.pin is not None for piece in pieces])
    fixed = np.array([piece.pin or 0 for piece in pieces])
    orders = (
        np.lexsort((index, first, -bytes_)),
        np.lexsort((index, first, -bytes_, -crowd)),
        np.lexsort((index, first, -bytes_ * (last - first + 1))),
        np.lexsort((index, -bytes_, first)),
    )
    best: tuple[np.ndarray, int] | None = None
    for order in orders:
        order = np.concatenate([order[pinned[order]], order[~pinned[order]]])
        starts = _first_fit(order, bytes_, first, last, pinned, fixed)
        total = int((starts + bytes_).max())
        if best is None or total < best[1]:
            best = starts, total
        if total == live.max():  # nothing can be smaller
            break
    assert best
    return best[0].tolist(), best[1]


def _first_fit(
    order: np.ndarray,
    bytes_: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    pinned: np.ndarray,
    fixed: np.ndarray,
) -> np.ndarray:
    """The lowest free start of each piece, in the given order; of those pinned, where they are."""
    starts = np.zeros(len(order), np.int64)
    for position, piece in enumerate(order):
        if pinned[piece]:
            starts[piece] = fixed[piece]
            continue
        placed = order[:position]
        beside = placed[(first[placed] <= last[piece]) & (last[placed] >= first[piece])]
        if not len(beside):
            continue
        beside = beside[np.argsort(starts[beside], kind="stable")]
        ends = np.maximum.accumulate(starts[beside] + bytes_[beside])
        gaps = np.concatenate([[0], ends])  # where each gap starts; the last has no end
        room = starts[beside] - gaps[:-1] >= bytes_[piece]
        starts[piece] = gaps[int(room.argmax())] if room.any() else gaps[-1]
    return starts
