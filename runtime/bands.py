"""Large images in bands of rows: the same bytes in a fraction of the memory.

An op on an image needs only some rows of what it reads, so a run of ops can work from the top
down with a few rows of every tensor between them.  A group norm stands in the way: it needs sums
over the whole image first.  So the ops are run in passes, one for each norm: a pass computes, band
by band, what the norm's input needs, and adds it up.  What a pass computes is either kept whole for
those after it, or forgotten and computed again.

    pass 1    x -> doubled -> sums of norm1
    pass 2    x -> doubled -> norm1 -> conv1 -> sums of norm2; conv1's result is kept, or not
    pass 3    ... -> norm2 -> conv2 + shortcut -> kept, upon what nobody reads any more

Rows are computed once in a pass: every tensor between two ops has a buffer of a band and the rows
above it that are still needed, which are moved up before each band.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels import Kind, Type
from .layout import IN_PLACE
from .program import LINE, Graph, Node, Storage, Value, padded, round_up

POINTWISE = (Kind.UNARY, Kind.ADD, Kind.LOAD, Kind.STORE, Kind.AFFINE, Kind.MOMENTS)
IMAGE = 8  # an image with fewer rows is not worth cutting
SHARE = 8  # tensors below this part of the largest are left alone
ABOVE, BELOW = 1, 2  # ft_op.band
EVEN = 2  # rows: Winograd's tiles and doubled images come in pairs

Uses = Callable[[Node], bool]


@dataclass(frozen=True)
class Bands:
    """How: `rows` of an image at a time; of tensors, those up to `keep` bytes are kept whole."""

    rows: int
    keep: int


def in_bands(graph: Graph, bands: Bands, winograd: Uses) -> Graph:
    """The graph with its large images in bands; `winograd` says which ops the engine runs so.

    The graph's storages are changed: it must not be used afterwards.  Returns it as it is where
    nothing is large.
    """
    span = _span(graph)
    if span is None:
        return graph
    first, last = span
    steps = [step for node in graph.nodes[first:last] for step in _steps(node, winograd)]
    outside = [v for node in graph.nodes[last:] for v in node.reads]
    wanted = {v.storage for v in (*outside, *(o.value for o in graph.outputs))}
    passes = _passes(steps, wanted, bands.keep)
    wanted |= {i.value.storage for i in graph.inputs}
    counts = [_schedule(one, bands.rows) for one in passes]
    for i, one in enumerate(passes):
        _overlay(one, passes[i + 1 :], wanted)
    _slide(passes, wanted)
    nodes = [node for one, count in zip(passes, counts, strict=True) for node in _emit(one, count)]
    return dataclasses.replace(graph, nodes=(*graph.nodes[:first], *nodes, *graph.nodes[last:]))


def choices(graph: Graph) -> list[int]:
    """Values of `keep` that differ, from nothing but what must be kept to everything."""
    span = _span(graph)
    if span is None:
        return []
    nodes = graph.nodes[span[0] : span[1]]
    sizes = {n.a.storage.bytes for n in nodes if n.kind is Kind.GROUP_NORM}
    return [0, *sorted(sizes)]


# --- which ops ----------------------------------------------------------------------------------


def _span(graph: Graph) -> tuple[int, int] | None:
    """The longest run of ops that can be cut, from the first large tensor to the last."""
    limit = _largest(graph) // SHARE
    best: tuple[int, int] | None = None
    first: int | None = None
    for i, node in enumerate(graph.nodes):
        if not _can_be_cut(node):
            first = None
        elif max(v.storage.bytes for v in (node.out, node.a)) > limit:
            first = i if first is None else first
            if best is None or i + 1 - first > best[1] - best[0]:
                best = first, i + 1
    if best is None:
        return None
    first, last = best  # planes come and go with it
    loads = graph.nodes[first - 1].kind is Kind.LOAD and graph.nodes[first].a.h >= IMAGE
    stores = last < len(graph.nodes) and graph.nodes[last].kind is Kind.STORE
    return first - loads, last + stores


def _largest(graph: Graph) -> int:
    return max(node.out.storage.bytes for node in graph.nodes)


def _can_be_cut(node: Node) -> bool:
    if node.kind not in (Kind.MATMUL, Kind.GROUP_NORM, *POINTWISE):
        return False
    if node.kind is Kind.GROUP_NORM and node.b:
        return False
    images = [v for v in (node.out, node.a, node.b, node.c) if v]
    return all(v.storage.h >= IMAGE and not v.joined for v in images)


# --- steps: ops that work row by row ------------------------------------------------------------


@dataclass(eq=False)
class _Step:
    """An op that can be cut into bands, and of each pass how far it is after every band."""

    node: Node
    target: bool = False  # sums of a norm
    ends: list[int] = dataclasses.field(default_factory=list)  # rows of out, by band

    @property
    def out(self) -> Storage:
        return self.node.out.storage

    @property
    def height(self) -> int:
        """Rows that the op makes, or adds up."""
        return self.node.a.storage.h if self.target else self.out.h

    @property
    def images(self) -> list[tuple[str, Storage]]:
        """What is read row by row, with the role that it has."""
        names = ("a", "b", "c") if self.node.kind is not Kind.AFFINE else ("a",)
        values = [(name, getattr(self.node, name)) for name in names]
        return [(name, value.storage) for name, value in values if value]

    def reaches(self, role: str, rows: int) -> int:
        """How many rows of what it reads the first `rows` of its own need."""
        settings = self.node.settings
        if role == "c" or settings.get("side", 1) == 1:
            return rows if role == "c" else (rows - 1) * int(settings.get("stride", 1)) + 1
        if settings.get("upsample"):
            return -(-rows // 2) + 1
        return (rows - 1) * int(settings["stride"]) + 3 - int(settings["pad"])

    def starts(self, role: str, row: int) -> int:
        """The first row of what it reads that its own row `row` needs."""
        settings = self.node.settings
        if role == "c" or settings.get("side", 1) == 1:
            return row if role == "c" else row * int(settings.get("stride", 1))
        if settings.get("upsample"):
            return max(0, row // 2 - 1)
        return max(0, row * int(settings["stride"]) - int(settings["pad"]))


def _steps(node: Node, winograd: Uses) -> Iterator[_Step]:
    """The op itself; of a group norm, its sums and what is done with them."""
    if node.kind is Kind.GROUP_NORM:
        a = node.a.storage
        channels = 5 * padded(a.c)
        sums = Value(Storage(1, 1, channels, Type.F32), channels)
        yield _Step(Node(node.name, Kind.MOMENTS, sums, node.a), target=True)
        settings = {**node.settings, "size": a.h * a.w}
        yield _Step(dataclasses.replace(node, kind=Kind.AFFINE, b=sums, settings=settings))
    else:
        settings = dict(node.settings)
        if settings.get("winograd"):
            # 3: of however few tiles, but not on a matrix unit, which the whole is not run so on
            settings["winograd"] = 3 if winograd(node) else 0
        yield _Step(dataclasses.replace(node, settings=settings))


# --- passes -------------------------------------------------------------------------------------


@dataclass
class _Pass:
    """Steps in order; `kept` are the tensors that they leave behind whole."""

    steps: list[_Step]
    kept: set[Storage]
    read: list[Storage]  # whole, of earlier passes or from outside, in order


def _passes(steps: Sequence[_Step], wanted: set[Storage], keep: int) -> list[_Pass]:
    """One for the sums of every norm, and one for what is wanted in the end."""
    makers = {step.out: step for step in steps if not step.target}
    made: set[Storage] = set()
    found: list[list[_Step]] = []
    final = [makers[s] for s in makers if s in wanted]
    for target in (*([step] for step in steps if step.target), final):
        needed = _closure(target, makers, made)
        found.append([dataclasses.replace(s, ends=[]) for s in steps if s in needed])
        made |= {s.out for s in needed if not s.target and _may_keep(s, wanted, keep)}
    passes = []
    kept_so_far: set[Storage] = set()
    for i, own in enumerate(found):
        outs = {step.out for step in own}
        later = {s for one in found[i + 1 :] for s in _whole_reads(one)} | wanted
        kept = {s for s in outs & made & later if s not in kept_so_far}
        kept_so_far |= kept
        passes.append(_Pass(own, kept, _whole_reads(own)))
    return [one for one in passes if one.steps]


def _closure(
    targets: Sequence[_Step], makers: dict[Storage, _Step], made: set[Storage]
) -> set[_Step]:
    """The steps that make what the targets need, back to what is there already."""
    needed: set[_Step] = set()
    waiting = list(targets)
    while waiting:
        step = waiting.pop()
        if step in needed:
            continue
        needed.add(step)
        waiting += [makers[s] for _, s in step.images if s in makers and s not in made]
    return needed


def _whole_reads(steps: Sequence[_Step]) -> list[Storage]:
    outs = {step.out for step in steps}
    found = (s for step in steps for _, s in step.images if s not in outs)
    return list(dict.fromkeys(found))  # in an order, so that a plan and its run are laid out alike


def _may_keep(step: _Step, wanted: set[Storage], keep: int) -> bool:
    """Small ones, what is wanted, and the trunk: a sum with a residual costs most to make again."""
    if step.node.kind is Kind.AFFINE:
        return False
    return step.out in wanted or step.node.c is not None or step.out.bytes <= keep


def _overlay(one: _Pass, later: Sequence[_Pass], wanted: set[Storage]) -> None:
    """Let a kept tensor lie upon a like one that is read here for the last time, row by row."""
    needed = {s for p in later for s in p.read} | wanted
    for step in one.steps:
        if step.out not in one.kept:
            continue
        free = (
            s
            for s in one.read
            if s not in needed and _alike(step.out, s) and _in_time(one, step, s)
        )
        if under := next(free, None):
            step.out.upon = under
            needed.add(under)
            border = under.border or step.out.border
            place: Storage | None = step.out
            while place is not None:  # all that lie in one place lie alike
                place.border, place = border, place.upon


def _in_time(one: _Pass, writer: _Step, under: Storage) -> bool:
    """Whether every row is read for the last time before the writer's is written upon it."""
    order = {id(step): i for i, step in enumerate(one.steps)}
    for step in one.steps:
        for role in (role for role, read in step.images if read is under):
            if step is writer:
                if role not in IN_PLACE.get(step.node.kind, ()):
                    return False
                continue
            before = step.ends if order[id(step)] < order[id(writer)] else [0, *step.ends]
            for done, written in zip(before, writer.ends, strict=False):
                if done < step.height and step.starts(role, done) < written:
                    return False
    return True


def _slide(passes: Sequence[_Pass], wanted: set[Storage]) -> None:
    """Let the largest kept tensor grow into the place of the smaller one that it is made of.

    That one lies at the end of its place, and gives up its rows before they are written upon.
    """
    best: tuple[int, Storage, Storage, int] | None = None
    for i, one in enumerate(passes):
        needed = {s for p in passes[i + 1 :] for s in p.read} | wanted
        taken = {step.out.upon for step in one.steps}
        for step in one.steps:
            if step.out not in one.kept or step.out.upon or step.out in wanted:
                continue
            for under in one.read:
                if under in needed or under in taken:
                    continue
                start = _slid(one, step, under)
                saved = step.out.bytes + under.bytes - max(step.out.bytes, start + under.bytes)
                if saved > 0 and (best is None or saved > best[0]):
                    best = saved, step.out, under, start
    if best:
        _, out, under, start = best
        out.pin, under.pin = 0, start


def _slid(one: _Pass, writer: _Step, under: Storage) -> int:
    """How far behind the start of the writer's tensor another must lie to be read in time."""
    order = {id(step): i for i, step in enumerate(one.steps)}
    readers = [(s, role) for s in one.steps for role, read in s.images if read is under]
    if any(order[id(step)] >= order[id(writer)] for step, _ in readers):
        return writer.out.bytes
    out = writer.out
    start = 0
    for band, end in enumerate(writer.ends[:-1]):
        first = min(step.starts(role, step.ends[band]) for step, role in readers)
        written = out.lead + end * out.row * out.type.bytes
        unread = under.lead + (first * under.row - under.pixel) * under.type.bytes
        start = max(start, written - unread)
    return round_up(start, LINE)


def _alike(a: Storage, b: Storage) -> bool:
    """But for a border, which the one may get from the other."""
    fields = ("h", "w", "c", "type", "planar")
    return all(getattr(a, name) == getattr(b, name) for name in fields)


# --- bands --------------------------------------------------------------------------------------


def _emit(one: _Pass, count: int) -> Iterator[Node]:
    """The ops of a pass, band by band."""
    rings = _rings(one, count)
    for band in range(count):
        for step in one.steps:
            ring = rings.get(step.out)
            if ring and band:
                yield from ring.move(step, band)
            start, end = step.ends[band - 1] if band else 0, step.ends[band]
            if start < end:
                yield _cut(step, band, start, end, rings)


def _schedule(one: _Pass, rows: int) -> int:
    """Fill in how far each step is after each band; returns the number of bands.

    The last step leads: what it needs of the others, they have made before.
    """
    readers: dict[Storage, list[tuple[_Step, str]]] = {}
    for step in one.steps:
        for role, storage in step.images:
            readers.setdefault(storage, []).append((step, role))
    leader = one.steps[-1]
    count = -(-leader.height // rows)
    for band in range(1, count + 1):
        for step in reversed(one.steps):
            height = step.height
            inside = readers.get(step.out, [])
            if step is leader or not inside or band == count:
                wanted = -(-height * band // count)
            else:
                wanted = max(s.reaches(role, s.ends[-1]) for s, role in inside)
            before = step.ends[-1] if step.ends else 0
            step.ends.append(max(before, min(height, round_up(wanted, EVEN))))
    return count


@dataclass
class _Ring:
    """The rows of a tensor that a pass holds: `bases` is the first of them, by band."""

    storage: Storage
    bases: list[int]

    def move(self, step: _Step, number: int) -> Iterator[Node]:
        """What is still needed of the bands before goes to the top."""
        base, before = self.bases[number], self.bases[number - 1]
        count = step.ends[number - 1] - base
        if count <= 0 or base == before:
            return
        gap = base - before
        for first in range(0, count, gap):  # never upon rows that are still to be moved
            yield self._copy(step.node.name, first + gap, first, min(gap, count - first))
        if step.ends[number - 1] == step.height and self.storage.border:
            # The one below, which is cleared first: in the last copy that could be what is read.
            yield self._copy(step.node.name, count - 1, count - 1, 1, ABOVE)

    def _copy(
        self, name: str, source: int, target: int, rows: int, band: int = ABOVE | BELOW
    ) -> Node:
        out, a = (Value(self.storage, self.storage.c, top=t, rows=rows) for t in (target, source))
        return Node(name, Kind.UNARY, out, a, band=band)


def _rings(one: _Pass, count: int) -> dict[Storage, _Ring]:
    """A buffer for every tensor that is not kept, as high as it ever needs to be."""
    rings = {}
    for step in one.steps:
        if step.target or step.out in one.kept:
            continue
        readers = [(s, role) for s in one.steps for role, read in s.images if read is step.out]
        bases = [0]
        for band in range(1, count):
            first = min(s.starts(role, s.ends[band - 1]) for s, role in readers)
            bases.append(max(bases[-1], min(first, step.ends[band - 1])))
        height = max(end - base for end, base in zip(step.ends, bases, strict=True))
        rings[step.out] = _Ring(dataclasses.replace(step.out, h=height), bases)
    return rings


def _cut(step: _Step, band: int, start: int, end: int, rings: dict[Storage, _Ring]) -> Node:
    """The op for the rows from start to end."""
    node = step.node
    changed: dict[str, Any] = {}
    for role, storage in step.images:
        first = start if role == "c" else _first_row(step, start)
        count = end - start if role == "c" else _row_count(step, start, end, storage.h)
        changed[role] = _rows(getattr(node, role), first, count, band, rings)
    if step.target:
        return dataclasses.replace(node, before=start, **changed)
    changed["out"] = _rows(node.out, start, end - start, band, rings)
    place = (ABOVE if start else 0) | (BELOW if end < step.height else 0)
    return dataclasses.replace(node, band=place, **changed)


def _first_row(step: _Step, start: int) -> int:
    """The row of what is read that row 0 of the engine's op counts from: its border is above."""
    settings = step.node.settings
    return start // 2 if settings.get("upsample") else start * int(settings.get("stride", 1))


def _row_count(step: _Step, start: int, end: int, height: int) -> int:
    settings = step.node.settings
    if settings.get("upsample"):
        return (end - start) // 2
    stride = int(settings.get("stride", 1))
    return min(stride * (end - start), height - stride * start)


def _rows(value: Value, first: int, count: int, band: int, rings: dict[Storage, _Ring]) -> Value:
    ring = rings.get(value.storage)
    if ring is None:
        return dataclasses.replace(value, top=first, rows=count)
    return dataclasses.replace(
        value, storage=ring.storage, top=first - ring.bases[band], rows=count
    )
