"""Which weights a program reads when, so that they can pass through a window of memory."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..kernels import Range
from .program import Graph, Node, Weight, round_up

NEAR = 1 << 16  # bytes between two tensors of an op that are not worth a range of their own
HOLD = 48  # ops between two uses of a range: a pass over an image in bands reads all of its own
PAGE = mmap.PAGESIZE
FAULT_AROUND = 1 << 16  # bytes that Linux maps around a page that is touched


@dataclass(frozen=True)
class Schedule:
    """Ranges in the order of their first use; `floor` is the most that one op needs at once."""

    ranges: tuple[Range, ...]
    floor: int
    rows: int  # bytes of tables that are read row by row, and never pass through
    left: tuple[int, ...]  # bytes of ranges that are not done with before each op

    def windows(self, weights: int) -> list[int]:
        """Bytes that `weights` can pass through, largest first: room for what comes next, or none.

        Empty where as much as all of them would be needed.
        """
        largest = max((r.bytes for r in self.ranges), default=0)
        sizes = {self.floor, self.floor + largest}
        return [size for size in sorted(sizes, reverse=True) if size < weights]


def schedule(
    graph: Graph, places: Mapping[str, Weight], file_bytes: int, page: int = PAGE
) -> Schedule:
    """What every op reads, in whole pages of a weights file of so many bytes."""
    uses: dict[tuple[int, int], list[int]] = {}
    rows = 0
    for index, node in enumerate(graph.nodes):
        for extent in _extents(node, places, file_bytes, page):
            uses.setdefault(extent, []).append(index)
        rows += _rows_of_a_table(node, places, page)
    ranges = [
        Range(start, end - start, first, last)
        for (start, end), ops in uses.items()
        for first, last in _holds(ops)
    ]
    ranges.sort(key=lambda r: (r.first, r.offset))
    count = len(graph.nodes)
    return Schedule(tuple(ranges), _floor(ranges, count), rows, tuple(_left(ranges, count)))


def _extents(
    node: Node, places: Mapping[str, Weight], file_bytes: int, page: int
) -> list[tuple[int, int]]:
    """Whole pages that an op reads, those close to each other as one piece."""
    wanted = [p for p in (node.weight, node.bias) if p and p.form != "table"]
    found: list[tuple[int, int]] = []
    for place in sorted((places[p.name] for p in wanted), key=lambda place: place.offset):
        start = place.offset // page * page
        end = min(round_up(place.offset + place.bytes, page), file_bytes)
        if found and start - found[-1][1] < NEAR:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def _rows_of_a_table(node: Node, places: Mapping[str, Weight], page: int) -> int:
    """Bytes of an embedding's tables that come into memory: a row for every id, what is near."""
    tables = [p for p in (node.weight, node.bias) if p and p.form == "table"]
    count = node.out.h * node.out.w
    return sum(
        min(
            places[t.name].bytes,
            count * (round_up(places[t.name].bytes // t.outputs, page) + FAULT_AROUND),
        )
        for t in tables
    )


def _holds(ops: Sequence[int]) -> list[tuple[int, int]]:
    """The first and the last op of every time that a range is held."""
    holds = [(ops[0], ops[0])]
    for op in ops[1:]:
        if op - holds[-1][1] <= HOLD:
            holds[-1] = holds[-1][0], op
        else:
            holds.append((op, op))
    return holds


def _left(ranges: Sequence[Range], ops: int) -> list[int]:
    done = [0] * (ops + 1)
    for r in ranges:
        done[r.last + 1] += r.bytes
    total, left = sum(done), []
    for count in done[:ops]:
        total -= count
        left.append(total)
    return left


def _floor(ranges: Sequence[Range], ops: int) -> int:
    change = [0] * (ops + 1)
    for r in ranges:
        change[r.first] += r.bytes
        change[r.last + 1] -= r.bytes
    most = now = 0
    for step in change:
        now += step
        most = max(most, now)
    return most
