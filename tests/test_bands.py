"""An image in bands of rows: every op, and the engine as a whole, gives the bytes of the whole."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from ferrotype import kernels
from ferrotype.kernels import Act, Kind, Op, Program, Tensor, Type
from ferrotype.tests import kernels_cases as table
from ferrotype.tests.kernels_cases import ABOVE, BELOW, Case, padded
from ferrotype.tests.test_kernels import HERE, SEED, cases, in_memory, need

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")

MIXED = (1, 2, 3, 7, 1)  # heights of bands, again and again
# How the rows are cut, and the threads that run them; the whole image has one.
CUTS = {"1": ((1,), 2), "2": ((2,), 3), "3": ((3,), 1), "7": ((7,), 2), "mixed": (MIXED, 3)}
FLOATS = (Type.F32, Type.BF16, Type.F16)


def bands(height: int, rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First row and the one after the last of every band."""
    start = i = 0
    while start < height:
        end = min(start + rows[i % len(rows)], height)
        yield start, end
        start, i = end, i + 1


def cut(t: Tensor, first: int, count: int) -> Tensor:
    """Rows of a tensor; those around them are its border."""
    part = Tensor.from_buffer_copy(t)
    part.offset += first * t.row * Type(t.type).bytes
    part.h = count
    return part


def part_of(op: Op, start: int, end: int) -> Op:
    """The op for some rows of its result."""
    part = Op.from_buffer_copy(op)
    height = op.out.h
    part.out = cut(op.out, start, end - start)
    part.band = (ABOVE if start else 0) | (BELOW if end < height else 0)
    for name in ("b", "c"):
        if getattr(op, name).h:
            setattr(part, name, cut(getattr(op, name), start, end - start))
    if op.upsample:
        part.a = cut(op.a, start // 2, (end - start) // 2)
    else:
        stride = max(1, op.stride)
        rows = min(stride * (end - start), op.a.h - stride * start)
        part.a = cut(op.a, stride * start, rows)
    return part


def normed(op: Op, heights: Sequence[int], sums: Tensor) -> list[Op]:
    """A group norm as sums over bands, and bands that are normalized with them."""
    ops = []
    for start, end in bands(op.a.h, heights):
        a = cut(op.a, start, end - start)
        ops.append(Op(kind=Kind.MOMENTS, out=sums, a=a, size=start))
    for start, end in bands(op.a.h, heights[::-1]):
        part = part_of(op, start, end)
        part.kind, part.b, part.size = Kind.AFFINE, sums, op.a.h * op.a.w
        ops.append(part)
    return ops


def result(case: Case, ops: Sequence[Op], isa: str, threads: int, room: int) -> np.ndarray:
    """The arena after these ops, with so many bytes more and scratch behind it."""
    start = -(-(case.arena.size + room) // 64) * 64
    for op in ops:
        op.scratch = start
    end = start + max(kernels.scratch(op, threads, isa) for op in ops)
    arena = in_memory(case.arena, end)
    Program(ops, end, case.weights.size, threads, isa).run(arena, in_memory(case.weights))
    return arena[: case.arena.size]


def in_bands(case: Case, op: Op, heights: Sequence[int], isa: str, threads: int) -> np.ndarray:
    if op.kind != Kind.GROUP_NORM:
        ops = [part_of(op, start, end) for start, end in bands(op.out.h, heights)]
        return result(case, ops, isa, threads, 0)
    channels = 5 * padded(op.a.c)
    place = -(-case.arena.size // 64) * 64
    sums = Tensor(place, Type.F32, 1, 1, channels, channels, channels, 0)
    ops = normed(op, heights, sums)
    return result(case, ops, isa, threads, 64 + 4 * channels)


def same_in_bands(case: Case, isa: str) -> None:
    """However the rows are cut; an op that doubles or has tiles of two rows, by twos."""
    whole = Op.from_buffer_copy(case.op)
    by = 1
    if whole.kind == Kind.MATMUL:
        whole.winograd = 2 * kernels.uses_winograd(case.op, isa)
        by = 2 if whole.winograd or whole.upsample else 1
    expected = result(case, [whole], isa, 1, 0)
    for name, (rows, threads) in CUTS.items():
        heights = tuple(by * n for n in rows)
        found = in_bands(case, Op.from_buffer_copy(whole), heights, isa, threads)
        wrong = np.flatnonzero(found != expected)
        assert not len(wrong), f"{case}: {isa}, bands of {name}: {len(wrong)} bytes, at {wrong[:5]}"


def can_be_cut(op: Op) -> bool:
    norm_of_two = op.kind == Kind.GROUP_NORM and op.b.h
    return op.out.h > 1 and not op.band and not norm_of_two


KINDS = (Kind.MATMUL, Kind.GROUP_NORM, Kind.LAYER_NORM, Kind.UNARY, Kind.ADD, Kind.LOAD, Kind.STORE)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.lower())
def test_an_op_over_bands_gives_the_bytes_of_the_whole(kind, isa):
    need(isa)
    images = [case for case in cases(kind) if can_be_cut(case.op)]
    assert len(images) >= len(FLOATS)
    for case in images:
        same_in_bands(case, isa)


@functools.cache
def made(spec: table.MatMul | table.GroupNorm, types: Any) -> Case:
    with threadpool_limits(1):  # numpy's
        return spec.case(spec.label(), SEED, types)


def convolutions() -> Iterator[table.MatMul]:
    """Images that are higher than those of the table, of what a U-Net and a VAE do."""
    ring = {"side": 3, "border": (1, 1)}
    yield table.MatMul(23, 6, (20,), 33, act=Act.SILU, **ring)
    yield table.MatMul(23, 6, (20,), 33, add=True, residual=True, in_place=True, **ring)
    yield table.MatMul(22, 7, (20,), 33, stride=2, **ring)
    yield table.MatMul(23, 6, (20,), 33, stride=2, **ring)
    yield table.MatMul(22, 6, (20,), 33, stride=2, pad=0, **ring)
    yield table.MatMul(23, 7, (20,), 33, stride=2, pad=0, **ring)
    yield table.MatMul(11, 5, (24,), 40, upsample=True, **ring)
    yield table.MatMul(23, 5, (24,), 40, border=(0, 1), residual=True)
    yield table.MatMul(23, 5, (24,), 40, border=(1, 0), residual=True, in_place=True)
    yield table.MatMul(23, 5, (24,), 40, stride=2)
    yield table.MatMul(22, 6, (64,), 80, winograd=2, residual=True, **ring)
    yield table.MatMul(30, 50, (64,), 65, winograd=1, act=Act.SILU, wide=(16, 32), **ring)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("spec", [*convolutions()], ids=table.MatMul.label)
def test_a_convolution_over_bands_gives_the_bytes_of_the_whole(spec, isa):
    need(isa)
    for types in {**table.PAIRS, **table.NARROW}.values():
        same_in_bands(made(spec, types), isa)


def norms() -> Iterator[table.GroupNorm]:
    """Rows around what is added up at once, and pixels around what fp32 adds up."""
    for h, w in ((2, 1), (23, 64), (64, 5), (65, 3), (129, 2), (150, 65)):
        yield table.GroupNorm(h, w, (24,), 3, Act.SILU, border=(h % 2, 1))
    yield table.GroupNorm(31, 20, (33,), 11, wide=(16, 32), border=(1, 0), mean=50.0)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("spec", [*norms()], ids=table.GroupNorm.label)
def test_a_norm_over_bands_gives_the_bytes_of_the_whole(spec, isa):
    need(isa)
    for kind in FLOATS:
        same_in_bands(made(spec, kind), isa)
