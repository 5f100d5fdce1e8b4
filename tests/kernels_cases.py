"""Ops of the native engine with inputs, a float64 reference of each, and how far it may be off.

A case is one op over an arena of its own.  Its inputs are drawn at realistic scales and rounded to
the type they are stored in before the reference sees them, so what remains is the rounding of sums
(unit roundoff U = 2^-24 of fp32, in which every kernel adds up) and that of the result.

Bounds.  With S = sum of |terms|, a sum of n terms in fp32, in whatever order, is off by at most
n U S; roundings being as often up as down, it stays within 4 sqrt(n) U S (Higham & Mary 2019, with
a constant that fails once in thousands of years of runs).  `sum_error` is the smaller of the two,
plus four roundings for bias, addend, residual and instructions that round pairs of products
towards odd.  A function f passes errors on times its slope (at most 1.2 for all of ours) and adds
its own, ACT_ERROR.  The result is rounded once more: half a unit in the last place of its type.
Each reference below states what else its op does.

Everything in the arena that no tensor of the op covers is filled with halfwords that are NaN in
every type: what is read by mistake spoils the result, what is written by mistake is noticed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ferrotype.kernels import LANES, Act, Kind, Op, Tensor, Type

U = 2.0**-24
ROUNDING = {Type.F32: 2.0**-24, Type.BF16: 2.0**-8, Type.F16: 2.0**-11}
SMALLEST = {Type.F32: 2.0**-126, Type.BF16: 2.0**-126, Type.F16: 2.0**-25}  # errors below normals
SLOPE = 1.2  # of every activation function
ACT_ERROR = 8 * U  # of an activation function, per |x|; tanh3 is made of 1 - e^-x: per |x| + 1
PAIRS = {  # of activations and weights that every instruction set multiplies
    "f32": (Type.F32, Type.F32),
    "f32-bf16": (Type.F32, Type.BF16),
    "f32-f16": (Type.F32, Type.F16),
    "bf16": (Type.BF16, Type.BF16),
    "f16": (Type.F16, Type.F16),
    **{
        f"{name}-{few.name.lower()}": (Type[name.upper()], few)
        for name in ("f32", "bf16", "f16")
        for few in (Type.I8, Type.I4)
    },
}
NARROW = {  # the same with activations that become int8
    f"{kind.name.lower()}-narrow": (kind, Type.I8, True) for kind in (Type.F32, Type.BF16, Type.F16)
}
FLOATS = {"f32": Type.F32, "bf16": Type.BF16, "f16": Type.F16}
ABOVE, BELOW = 1, 2  # ft_op.band
GUARD = 256  # bytes before the first and after the last tensor


def padded(channels: int) -> int:
    return -(-channels // LANES) * LANES


# --- numbers as they are stored -----------------------------------------------------------------


def encode(values: np.ndarray, kind: Type) -> np.ndarray:
    """Round to a type: an array of its bits, uint16 for bf16."""
    if kind == Type.BF16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
    names = {Type.F32: np.float32, Type.F16: np.float16, Type.I32: np.int32, Type.U8: np.uint8}
    names[Type.I8] = np.int8
    return np.ascontiguousarray(values).astype(names[kind])


def decode(stored: np.ndarray, kind: Type) -> np.ndarray:
    """float64 of what encode gives."""
    if kind == Type.BF16:
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # garbage is NaN
        return stored.astype(np.float64)


def rounded(values: np.ndarray, kind: Type) -> np.ndarray:
    return decode(encode(values, kind), kind)


def garbage(rng: np.random.Generator, size: int) -> np.ndarray:
    """Bytes whose every halfword is NaN, or the upper half of one."""
    half = rng.integers(0x7F81, 0x8000, -(-size // 2), np.uint16)
    half |= rng.integers(0, 2, half.size, np.uint16) << np.uint16(15)
    return half.view(np.uint8)[:size].copy()


# --- packed weights, as ferrotype.h and docs/engine.md describe them ----------------------------


def pack(weight: np.ndarray, sources: tuple[int, ...], kind: Type, geglu: bool = False) -> bytes:
    """(outputs, taps, inputs) of one or two sources to blocks of 16 outputs."""
    blocks = all_blocks(weight, sources, geglu)
    side_by_side = {Type.BF16: 2, Type.I8: 4}.get(kind, 1)
    n, taps, k, lanes = blocks.shape
    blocks = blocks.reshape(n, taps, k // side_by_side, side_by_side, lanes).swapaxes(3, 4)
    return encode(blocks, kind).tobytes()


def all_blocks(weight: np.ndarray, sources: tuple[int, ...], geglu: bool) -> np.ndarray:
    """(blocks, taps, k, 16); of geglu, blocks of values and gates alternate."""
    halves = [_blocks(half, sources) for half in np.split(weight, 1 + geglu)]
    return np.stack(halves, 1).reshape(-1, *halves[0].shape[1:])


def pack_int4(
    q: np.ndarray, scale: np.ndarray, sources: tuple[int, ...], geglu: bool = False
) -> bytes:
    """(outputs, taps, inputs) of -8..7, and of what each is multiplied by, alike in a group."""
    starts = np.cumsum([0, *sources])
    parts = []
    for a, b in pairwise(starts):  # groups begin anew with a source
        values, scales = (all_blocks(x[:, :, a:b], (b - a,), geglu) for x in (q, scale))
        for first in range(0, values.shape[2], 32):
            group = values[:, :, first : first + 32].astype(np.int64) & 15
            n, taps, k, lanes = group.shape
            nibbles = group.reshape(n, taps, k // 8, 8, lanes).swapaxes(3, 4)
            packed = (nibbles[..., ::2] | nibbles[..., 1::2] << 4).astype(np.uint8)
            own = np.ascontiguousarray(scales[:, :, first], np.float16).view(np.uint8)
            parts += [own, packed.reshape(n, taps, -1)]
    return np.concatenate(parts, 2).tobytes()


def _blocks(weight: np.ndarray, sources: tuple[int, ...]) -> np.ndarray:
    outputs, taps, _ = weight.shape
    parts = np.split(weight, np.cumsum(sources)[:-1], axis=2)
    parts = [np.pad(p, ((0, 0), (0, 0), (0, padded(p.shape[2]) - p.shape[2]))) for p in parts]
    joined = np.concatenate(parts, 2)
    joined = np.pad(joined, ((0, padded(outputs) - outputs), (0, 0), (0, 0)))
    return joined.reshape(-1, LANES, taps, joined.shape[2]).transpose(0, 2, 3, 1)


def pack_upsample(weight: np.ndarray, kind: Type, scale: np.ndarray | None = None) -> bytes:
    """(outputs, 3, 3, inputs) to the four 2x2 convolutions of the image before its doubling."""
    near = {0: ([0], [1, 2]), 1: ([0, 1], [2])}  # rows of the kernel that fall onto one source row
    parts = []
    for py, px in ((0, 0), (0, 1), (1, 0), (1, 1)):
        taps = [weight[:, r][:, :, c].sum((1, 2)) for r in near[py] for c in near[px]]
        whole, sources = np.stack(taps, 1), (weight.shape[3],)
        if scale is None:
            parts.append(pack(whole, sources, kind))
        else:
            parts.append(pack_int4(whole, np.broadcast_to(scale, whole.shape), sources))
    return b"".join(parts)


def vector(values: np.ndarray, geglu: bool = False) -> bytes:
    """A bias, gamma or beta: fp32, padded; that of a geglu by alternating blocks."""
    halves = [np.pad(v, (0, padded(v.size) - v.size)) for v in np.split(values, 1 + geglu)]
    blocks = np.stack([half.reshape(-1, LANES) for half in halves], 1)
    return blocks.astype(np.float32).tobytes()


# --- a case -------------------------------------------------------------------------------------


@dataclass
class Region:
    """A piece of the arena: bytes, of which `lead` lie before a multiple of 64."""

    data: np.ndarray
    lead: int = 0
    start: int = 0


@dataclass
class Placed:
    """A tensor, the region that it lies in, and its values as they are stored."""

    tensor: Tensor
    region: Region
    at: int  # of pixel (0, 0) in the region
    values: np.ndarray
    planes: bool = False


@dataclass
class Case:
    """One op over an arena; `expected` and `bound` are what `out` must hold, up to what."""

    name: str
    seed: int
    op: Op
    arena: np.ndarray
    weights: np.ndarray
    writable: np.ndarray  # bytes of the arena that the op may change
    expected: np.ndarray
    bound: np.ndarray

    def moved(self, by: int, scratch: int) -> Op:
        """The op with its tensors further on in the arena, and its scratch there."""
        op = Op.from_buffer_copy(self.op)
        op.scratch = scratch
        for name in ("out", "a", "b", "c", "add"):
            tensor = getattr(op, name)
            tensor.offset += by if tensor.h else 0
        return op

    def result(self, arena: np.ndarray) -> np.ndarray:
        """float64 of `out`, padding and border cut off, after a look at both."""
        t = self.op.out
        kind = Type(t.type)
        if self.op.kind == Kind.STORE:
            return _planes(arena, t).astype(np.float64)
        if self.op.kind == Kind.BYTES:
            dense = arena[t.offset : t.offset + t.h * t.w * t.c]
            return dense.reshape(t.h, t.w, t.c).astype(np.float64)
        if self.op.kind == Kind.MOMENTS:
            return sums_of(arena[t.offset : t.offset + t.c * kind.bytes])
        values = _pixels(arena, t)
        inside = values[t.border : t.h + t.border, t.border : t.w + t.border]
        assert not inside[..., t.c :].any(), f"{self}: the padding of the channels is not zero"
        frame = values[_written_rows(t, self.op.band)].copy()
        above = t.border and not self.op.band & ABOVE
        frame[above : t.h + above, t.border : t.w + t.border] = 0
        assert not frame.any(), f"{self}: the border is not zero"
        return inside[..., : t.c]

    def check(self, arena: np.ndarray) -> float:
        """The largest error as a part of what it may be; AssertionError if that is over 1."""
        changed = (arena != self.arena) & ~self.writable
        assert not changed.any(), (
            f"{self}: {changed.sum()} bytes changed outside of the result, "
            f"the first at {changed.argmax()} (out is at {self.op.out.offset})"
        )
        found = self.result(arena)
        with np.errstate(invalid="ignore", over="ignore"):
            part = np.abs(found - self.expected) / self.bound
        part[(found == self.expected) | np.isnan(found) & np.isnan(self.expected)] = 0
        worst = np.unravel_index(np.argmax(np.nan_to_num(part, nan=np.inf)), part.shape)
        assert part[worst] <= 1, (
            f"{self}: {np.sum(~(part <= 1))} of {part.size} values are off, at {worst} "
            f"{found[worst]:.9g} for {self.expected[worst]:.9g} +- {self.bound[worst]:.2g}"
        )
        return float(part[worst])

    def __str__(self) -> str:
        return f"{self.name} (KERNEL_SEED={self.seed})"


def _written_rows(t: Tensor, band: int) -> slice:
    """Of a tensor with its border, those that an op writes: others are another band's."""
    first = t.border if band & ABOVE else 0
    return slice(first, t.h + (t.border if band & BELOW else 2 * t.border))


def _planes(memory: np.ndarray, t: Tensor, at: int | None = None) -> np.ndarray:
    """The (c, h, w) elements of planes, to read or to write."""
    start = t.offset if at is None else at
    return np.ndarray((t.c, t.h, t.w), np.float32, memory.data, start, (4 * t.pixel, 4 * t.row, 4))


def sums_of(stored: np.ndarray) -> np.ndarray:
    """float64 of what FT_MOMENTS keeps: by channel, two sums in fp64, and the shift in fp32."""
    totals = stored.size // 5 * 4
    return np.concatenate([stored[:totals].view(np.float64), stored[totals:].view(np.float32)])


def _pixels(arena: np.ndarray, t: Tensor) -> np.ndarray:
    """float64 (h, w, padded channels) of a tensor, with its border."""
    size, b = Type(t.type).bytes, t.border
    bits = np.dtype({4: np.float32, 2: np.uint16 if t.type == Type.BF16 else np.float16}[size])
    start = t.offset - b * (t.row + t.pixel) * size
    shape = (t.h + 2 * b, t.w + 2 * b, padded(t.c))
    strides = (t.row * size, t.pixel * size, size)
    view = np.ndarray(shape, bits, arena.data, start, strides)
    return decode(view, Type(t.type))


@dataclass
class Build:
    """A case in the making: tensors and weights, which `finish` lays out in any order."""

    rng: np.random.Generator
    tensors: list[Placed] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return scale * self.rng.standard_normal(shape)

    def tensor(
        self,
        values: np.ndarray,
        kind: Type,
        border: int = 0,
        wide: tuple[int, int] = (0, 0),
        out: bool = False,
    ) -> Placed:
        """Place (h, w, c) values; `wide`: elements more than needed per pixel and per row.

        The region of a result (`out`) is left as garbage.
        """
        h, w, c = values.shape
        size = kind.bytes
        pixel = padded(c) + wide[0]
        row = (w + 2 * border) * pixel + wide[1]
        lead = border * (row + pixel) * size
        after = ((h - 1 + border) * row + (w - 1 + border) * pixel + padded(c)) * size
        region = Region(garbage(self.rng, lead + after), lead)
        placed = self._place(region, lead, (h, w, c, pixel, row, border), values, kind)
        if not out:
            view = self._view(placed)
            view[:] = 0
            view[border : h + border, border : w + border, :c] = encode(values, kind)
        return placed

    def dense(self, values: np.ndarray, kind: Type) -> Placed:
        """Place (h, w, c) values without padding."""
        h, w, c = values.shape
        region = Region(np.frombuffer(encode(values, kind).tobytes(), np.uint8).copy())
        return self._place(region, 0, (h, w, c, c, c * w, 0), values, kind)

    def planes(self, values: np.ndarray, apart: int = 0) -> Placed:
        """Place (h, w, c) values as planes of fp32 with so many elements between them."""
        h, w, c = values.shape
        pixel = h * w + apart
        region = Region(garbage(self.rng, 4 * ((c - 1) * pixel + h * w)))
        placed = self._place(region, 0, (h, w, c, pixel, w, 0), values, Type.F32)
        placed.planes = True
        _planes(region.data, placed.tensor, 0)[:] = values.transpose(2, 0, 1)
        return placed

    def sums(self, shift: np.ndarray, totals: np.ndarray) -> Placed:
        """Place what FT_MOMENTS keeps: by channel a shift, and the two totals."""
        placed = self.tensor(np.zeros((1, 1, 5 * shift.size)), Type.F32, out=True)
        parts = (totals.astype(np.float64), shift.astype(np.float32))
        placed.region.data[:] = np.frombuffer(b"".join(p.tobytes() for p in parts), np.uint8)
        return placed

    def fused(self, parts: list[np.ndarray], kind: Type) -> list[Placed]:
        """Tensors that lie side by side in the pixels of one; each fills whole lanes."""
        h, w, _ = parts[0].shape
        starts = np.cumsum([0, *(p.shape[2] for p in parts)])
        region = Region(garbage(self.rng, h * w * int(starts[-1]) * kind.bytes))
        whole = np.concatenate(parts, 2)
        region.data[:] = np.frombuffer(encode(whole, kind).tobytes(), np.uint8)
        pixel = whole.shape[2]
        return [
            self._place(region, s * kind.bytes, (h, w, p.shape[2], pixel, pixel * w, 0), p, kind)
            for p, s in zip(parts, starts.tolist(), strict=False)
        ]

    def _place(
        self, region: Region, at: int, sizes: tuple[int, ...], values: np.ndarray, kind: Type
    ) -> Placed:
        names = ("h", "w", "c", "pixel", "row", "border")
        tensor = Tensor(type=kind, **dict(zip(names, sizes, strict=True)))
        exact = rounded(values, kind)
        placed = Placed(tensor, region, at, exact)
        self.tensors.append(placed)
        if not any(r is region for r in self.regions):
            self.regions.append(region)
        return placed

    def _view(self, placed: Placed) -> np.ndarray:
        """The bits of a channels-last tensor, with its border, to write to."""
        t, data = placed.tensor, placed.region.data
        size, b = Type(t.type).bytes, t.border
        bits = {Type.F32: np.float32, Type.BF16: np.uint16, Type.F16: np.float16}[Type(t.type)]
        shape = (t.h + 2 * b, t.w + 2 * b, padded(t.c))
        start = placed.at - b * (t.row + t.pixel) * size
        return np.ndarray(shape, bits, data.data, start, (t.row * size, t.pixel * size, size))

    def finish(
        self,
        name: str,
        seed: int,
        expected: np.ndarray,
        bound: np.ndarray,
        weight: bytes | None = None,
        bias: bytes | None = None,
        scales: bytes | None = None,
        **fields: Any,
    ) -> Case:
        """Lay out; `fields` are those of the op, tensors as they were placed."""
        arena = self._lay_out()
        op = Op()
        for key, value in fields.items():
            setattr(op, key, value.tensor if isinstance(value, Placed) else value)
        weights = bytearray(garbage(self.rng, 64).tobytes())
        given = {"weight": weight, "bias": bias, "scales": scales}
        for key in self.rng.permutation(list(given)).tolist():
            data = given[key]
            if data is not None:
                weights += garbage(self.rng, -len(weights) % 64 + 64).tobytes()
                setattr(op, key, len(weights))
                weights += data
        packed = np.frombuffer(bytes(weights), np.uint8)
        writable = self._writable(fields["out"], arena.size, fields.get("band", 0))
        shape = expected.shape
        return Case(
            name, seed, op, arena, packed, writable, expected, np.broadcast_to(bound, shape)
        )

    def _lay_out(self) -> np.ndarray:
        position = GUARD
        for i in self.rng.permutation(len(self.regions)):
            region = self.regions[i]
            gap = 64 * int(self.rng.integers(0, 3))
            region.start = -(-(position + gap + region.lead) // 64) * 64 - region.lead
            position = region.start + region.data.size
        arena = garbage(self.rng, position)
        for region in self.regions:
            arena[region.start : region.start + region.data.size] = region.data
        for placed in self.tensors:
            placed.tensor.offset = placed.region.start + placed.at
        return arena

    def _writable(self, out: Placed, size: int, band: int) -> np.ndarray:
        mask = np.zeros(size, bool)
        t = out.tensor
        bytes_ = Type(t.type).bytes
        if t.type == Type.U8:
            mask[t.offset : t.offset + t.h * t.w * t.c] = True
            return mask
        if out.planes:
            for c in range(t.c):
                start = t.offset + c * t.pixel * bytes_
                mask[start : start + t.h * t.w * bytes_] = True
            return mask
        b = t.border
        start = t.offset - b * (t.row + t.pixel) * bytes_
        shape = (t.h + 2 * b, t.w + 2 * b, padded(t.c) * bytes_)
        view = np.ndarray(shape, bool, mask.data, start, (t.row * bytes_, t.pixel * bytes_, 1))
        view[_written_rows(t, band)] = True
        return mask


# --- mathematics --------------------------------------------------------------------------------

erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


ACTS: dict[Act, Callable[[np.ndarray], np.ndarray]] = {
    Act.NONE: lambda x: x,
    Act.SILU: lambda x: x * sigmoid(x),
    Act.GELU: lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    Act.QUICK_GELU: lambda x: x * sigmoid(1.702 * x),
    Act.RELU: lambda x: np.maximum(x, 0),
    Act.TANH3: lambda x: 3 * np.tanh(x / 3),
}


def sum_error(n: int, total: np.ndarray | float) -> Any:
    """What a sum in fp32 of n terms whose sizes add up to `total` may be off."""
    return (min(n, 4 * math.sqrt(n)) + 4) * U * total


def activated(act: Act, x: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    own = 0 if act in (Act.NONE, Act.RELU) else ACT_ERROR * (np.abs(x) + (act == Act.TANH3))
    return ACTS[act](x), (1 if act == Act.NONE else SLOPE) * error + own


def stored(y: np.ndarray, error: np.ndarray, kind: Type) -> np.ndarray:
    """The bound once y, off by an error, is rounded to a type."""
    return error + ROUNDING[kind] * (np.abs(y) + error) + SMALLEST[kind]


def convolve(
    x: np.ndarray, weight: np.ndarray, size: tuple[int, int], stride: int, pad: int
) -> np.ndarray:
    """(h, w, inputs) by (outputs, side, side, inputs), tap by tap; zeros lie around the image."""
    side = weight.shape[1]
    room = np.pad(x, ((pad, side), (pad, side), (0, 0)))
    total = np.zeros((*size, weight.shape[0]))
    for ky in range(side):
        for kx in range(side):
            rows = room[ky : ky + size[0] * stride : stride]
            taps = rows[: size[0], kx : kx + size[1] * stride : stride][:, : size[1]]
            total += (taps.reshape(-1, taps.shape[2]) @ weight[:, ky, kx].T).reshape(total.shape)
    return total


# Winograd's F(2x2, 3x3): of pixels, of weights, of sums (Lavin & Gray 2016).
PIXELS = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], float)
WEIGHTS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
SUMS = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], float)


def winograd_error(x: np.ndarray, kernel: np.ndarray, kind: Type) -> np.ndarray:
    """What a 3x3 convolution may be off if 2x2 outputs are made of 16 sums of products.

    Transformed pixels v and weights u are rounded to the type: per product u v an error of at most
    2 R u v, independent of the others, so that a result is off by 8 times the root of their
    squares' sum once in 10^13 values (Hoeffding).  The transforms and sums are in fp32, of terms
    that are larger than those of the direct form and cancel: 12 roundings and those of the sum.
    """
    h, w, _ = x.shape
    room = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    tiles = np.stack([room[i : i + h : 2, j : j + w : 2] for i in range(4) for j in range(4)], 2)
    tiles = tiles.reshape(*tiles.shape[:2], 4, 4, -1)

    def sums(v: np.ndarray, u: np.ndarray) -> np.ndarray:
        y, x, _, _, k = v.shape
        products = v.reshape(y * x, 16, k).swapaxes(0, 1) @ u.reshape(-1, 16, k).transpose(1, 2, 0)
        pixels = np.einsum(
            "ai,bj,ijtn->abtn", abs(SUMS), abs(SUMS), products.reshape(4, 4, y * x, -1)
        )
        return pixels.reshape(2, 2, y, x, -1).transpose(2, 0, 3, 1, 4).reshape(2 * y, 2 * x, -1)

    def transformed(d: np.ndarray, g: np.ndarray, b: np.ndarray, a: np.ndarray) -> Any:
        v = np.einsum("ip,jq,yxpqk->yxijk", b, b, d, optimize=True)
        return v, np.einsum("ip,jq,npqk->nijk", a, a, g, optimize=True)

    v, u = transformed(tiles, kernel, PIXELS, WEIGHTS)
    squares = sums(v**2, u**2)
    total = sums(*transformed(abs(tiles), abs(kernel), abs(PIXELS), abs(WEIGHTS)))
    own = 0 if kind == Type.F32 else 8 * math.sqrt(2) * ROUNDING[kind] * np.sqrt(squares)
    return own + sum_error(x.shape[2], total) + 12 * U * total


def winograd_int8(x: np.ndarray, weight: np.ndarray, kind: Type) -> tuple[np.ndarray, np.ndarray]:
    """A 3x3 convolution by Winograd's products of int8, and the sum of their sizes.

    x, (h, w, inputs), is of a type, weight, (outputs, 3, 3, inputs), whole numbers.  A tile's
    transformed pixels, sums in fp32 of columns and then of rows, become int8 by position.  Of
    the transformed weights of an output, four times which are whole, the largest becomes 127, by a
    factor of 15 bits whose product is cut to eighths before it is rounded.
    """
    h, w, _ = x.shape
    room = np.pad(x, ((1, 1), (1, 1), (0, 0))).astype(np.float32)
    d = [[room[i : i + h : 2, j : j + w : 2] for j in range(4)] for i in range(4)]

    def combined(a: Any) -> list:
        return [a[0] - a[2], a[1] + a[2], a[2] - a[1], a[1] - a[3]]

    columns = [combined([d[i][j] for i in range(4)]) for j in range(4)]  # [j][i]
    v = [combined([columns[j][i] for j in range(4)]) for i in range(4)]
    u = np.einsum("ip,jq,npqk->nijk", 2 * WEIGHTS, 2 * WEIGHTS, weight).astype(np.int64)
    most = np.maximum(127, abs(u).max((1, 2, 3)))
    factor = np.where(most > 127, 127 * 32768 // most, 32767)
    u = ((16 * u * factor[:, None, None, None] >> 16) + 4) >> 3
    assert abs(u).max() <= 127
    scale = np.where(most > 127, 8192 / factor, 0.25)
    y, total = np.zeros((2, h // 2, 2, w // 2, 2, len(weight)))
    for i, j in np.ndindex(4, 4):
        whole = int8_pixels(rounded(v[i][j], kind))
        for into, m, a in (
            (y, whole @ u[:, i, j].T, SUMS),
            (total, abs(whole) @ abs(u[:, i, j]).T, abs(SUMS)),
        ):
            into += np.einsum("a,b,yxn->yaxbn", a[:, i], a[:, j], m * scale)
    return y.reshape(h, w, -1), total.reshape(h, w, -1)


def int8_pixels(x: np.ndarray) -> np.ndarray:
    """(h, w, c) rounded to the nearest 127th of the largest of each pixel, a quotient in fp32."""
    largest = np.abs(x).max(2, keepdims=True).astype(np.float32)
    largest[largest < 1e-30] = np.inf  # zeros
    whole = np.rint(x * (np.float32(127) / largest).astype(np.float64))
    return whole * np.where(np.isinf(largest), 0, largest / np.float32(127)).astype(np.float64)


def whole(x: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest 127th of the largest, ties away from zero."""
    scale = largest.astype(np.float32) / np.float32(127)
    per = np.where(largest < 1e-30, 0, 1 / np.where(largest < 1e-30, 1, scale)).astype(np.float32)
    halves = np.trunc(x * per * 2).astype(np.int64)  # the product in float32
    return np.sign(halves) * ((abs(halves) + 1) // 2) * scale.astype(float)


def doubled(x: np.ndarray) -> np.ndarray:
    return x.repeat(2, 0).repeat(2, 1)


# --- matrix products ----------------------------------------------------------------------------


@dataclass(frozen=True)
class MatMul:
    """Sizes and options of a matrix product; c: channels of a, and of b if there are two."""

    h: int
    w: int
    c: tuple[int, ...]
    n: int  # outputs; of a geglu the result's
    side: int = 1
    stride: int = 1
    pad: int = -1  # -1: as the side needs
    upsample: bool = False
    geglu: bool = False
    act: Act = Act.NONE
    bias: bool = True
    add: bool = False
    residual: bool = False
    in_place: bool = False  # the result replaces the residual
    late: bool = False
    winograd: int = 0  # 2: wherever it can be
    band: int = 0
    border: tuple[int, int] = (0, 0)  # of inputs, of the result
    wide: tuple[int, int] = (0, 0)
    out: Type | None = None  # None: of activations
    crop: int = 0  # rows of the result left out

    @property
    def rows_above(self) -> int:
        return self.side // 2 if self.pad < 0 else self.pad

    @property
    def size(self) -> tuple[int, int]:
        if self.upsample:
            return 2 * self.h, 2 * self.w
        extra = self.rows_above + (1 if self.side == 3 else 0) - self.side
        return tuple((s + extra) // self.stride + 1 for s in (self.h, self.w))

    def label(self) -> str:
        parts = [f"{self.h}x{self.w}x{'+'.join(map(str, self.c))}to{self.n}"]
        parts += [f"k{self.side}s{self.stride}p{self.rows_above}"] if self.side == 3 else []
        parts += ["s2"] if self.side == 1 and self.stride == 2 else []
        flags = ("upsample", "winograd", "geglu", "add", "residual", "in_place", "late")
        parts += [flag for flag in flags if getattr(self, flag)]
        parts += [self.act.name.lower()] if self.act else []
        parts += [] if self.bias else ["nobias"]
        parts += [f"border{self.border[0]}{self.border[1]}"] if any(self.border) else []
        parts += ["wide"] if any(self.wide) else []
        parts += [f"to-{self.out.name.lower()}"] if self.out is not None else []
        parts += [f"crop{self.crop}"] if self.crop else []
        parts += ["always"] if self.winograd == 2 else []
        parts += [f"band{self.band}"] if self.band else []
        return "-".join(parts)

    def case(self, name: str, seed: int, types: tuple) -> Case:
        """The sums are of k = taps x inputs products; see the top for the rest.

        `types`: of activations, of weights, and whether activations become int8.
        """
        build = Build(np.random.default_rng(seed))
        kind, weight_kind, *narrow = types
        out_kind = kind if self.out is None else self.out
        size = (self.size[0] - self.crop, self.size[1])
        a = [
            build.tensor(build.normal(self.h, self.w, c), kind, self.border[0], self.wide)
            for c in self.c
        ]
        weight, packed, scales = self.weights(build.rng, kind, weight_kind)
        bias = build.normal(weight.shape[0], scale=0.3) if self.bias else None
        extra: dict[str, Any] = {}
        if self.residual:
            c = build.tensor(build.normal(*size, self.n), out_kind, self.border[1], self.wide)
            extra["c"] = c
        if self.add:
            extra["add"] = build.tensor(build.normal(1, 1, self.n, scale=0.3), Type.F32)
        if self.in_place:
            out = c
        else:
            zeros = np.zeros((*size, self.n))
            out = build.tensor(zeros, out_kind, self.border[1], self.wide, out=True)
        sources = [t.values for t in a]
        winograd = 2 if narrow and self.winograd else self.winograd  # the same products everywhere
        own = np.frombuffer(scales, np.float32) if narrow else None
        y, error = self.reference(kind, sources, weight, bias, extra, size, own)
        extra |= {"b": a[1]} if len(a) == 2 else {}
        return build.finish(
            name,
            seed,
            y,
            stored(y, error, out_kind),
            packed,
            None if bias is None else vector(bias, self.geglu),
            scales,
            narrow=len(narrow),
            kind=Kind.MATMUL,
            act=self.act,
            out=out,
            a=a[0],
            weight_type=weight_kind,
            side=self.side,
            stride=self.stride,
            pad=self.rows_above,
            upsample=self.upsample,
            geglu=self.geglu,
            late=self.late,
            winograd=winograd,
            band=self.band,
            **extra,
        )

    def fits_winograd(self, kind: Type, size: tuple[int, int]) -> bool:
        """Whether products of int8 are Winograd's, where they may be."""
        even = not any(s % 2 for s in size)
        return bool(self.winograd) and even and kind != Type.F16 and min(*self.c, self.n) >= 64

    def weights(
        self, rng: np.random.Generator, kind: Type, weight_kind: Type
    ) -> tuple[np.ndarray, bytes, bytes | None]:
        """(outputs, taps, inputs) as they are multiplied, packed, and the scales of int8.

        Whole numbers times a power of two, where upsampling packs the sums of up to four, so that
        these are exact in every type.
        """
        shape = (self.n * (1 + self.geglu), self.side**2, sum(self.c))
        size = 1 / math.sqrt(shape[1] * shape[2])
        most = {Type.I8: 31 if self.upsample else 127, Type.I4: 1 if self.upsample else 7}
        high = most.get(weight_kind, 63)
        low = -2 if self.upsample else -8
        q = rng.integers(low if weight_kind == Type.I4 else -high, high + 1, shape)
        near = 2.0 ** round(math.log2(1.7 * size / high))
        cube = q.reshape(self.n, 3, 3, -1) if self.upsample else q
        if weight_kind == Type.I8:
            scale = rounded(near * rng.uniform(0.5, 1.5, shape[0]), Type.F32)
            pack_it = pack_upsample(cube, Type.I8) if self.upsample else None
            scales = vector(scale, self.geglu) * (4 if self.upsample else 1)
            return (
                q * scale[:, None, None],
                pack_it or pack(q, self.c, Type.I8, self.geglu),
                scales,
            )
        if weight_kind == Type.I4:
            if self.upsample:
                return q * near, pack_upsample(cube, Type.I4, np.float64(near)), None
            scale = self.group_scales(rng, near, shape)
            packed = pack_int4(q, scale, self.c, self.geglu)
            return rounded(q * scale, kind), packed, None
        weight = q * near
        if self.upsample:
            return weight, pack_upsample(cube * near, weight_kind), None
        return weight, pack(weight, self.c, weight_kind, self.geglu), None

    def group_scales(
        self, rng: np.random.Generator, near: float, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Of int4: for every 32 inputs of a source, tap and output."""
        parts = []
        for c in self.c:
            groups = near * rng.uniform(0.5, 1.5, (*shape[:2], -(-c // 32)))
            parts.append(rounded(groups, Type.F16).repeat(32, 2)[:, :, :c])
        return np.concatenate(parts, 2)

    def reference(
        self,
        kind: Type,
        sources: list[np.ndarray],
        weight: np.ndarray,
        bias: np.ndarray | None,
        extra: dict[str, Placed],
        size: tuple[int, int],
        scales: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The result and its bound; `scales`: of outputs, where int8 is multiplied by int8."""
        narrow = scales is not None
        x = np.concatenate([int8_pixels(s) if narrow else s for s in sources], 2)
        x = doubled(x) if self.upsample else x
        kernel = weight.reshape(weight.shape[0], self.side, self.side, -1)
        b = 0 if bias is None else rounded(bias, Type.F32)
        add = extra["add"].values if "add" in extra else 0
        residual = extra["c"].values if "c" in extra else 0
        if narrow and self.fits_winograd(kind, size):
            scale = scales[: self.n].astype(float)
            q = np.rint(kernel / scale[:, None, None, None])
            y, total = (part * scale for part in winograd_int8(sources[0], q, kind))
            y += b + add
        else:
            y = convolve(x, kernel, size, self.stride, self.rows_above) + b + add
            total = convolve(abs(x), abs(kernel), size, self.stride, self.rows_above)
        total += np.abs(b) + np.abs(add)
        total += np.abs(residual) if self.late else 0
        y = y + residual if self.late else y
        error = sum_error(weight[0].size, total)
        if self.winograd and not narrow and not any(s % 2 for s in size):
            error = error + winograd_error(x, kernel, kind)
        if self.geglu:  # a product: errors of each factor times the other
            (value, gate), (e_value, e_gate) = np.split(y, 2, 2), np.split(error, 2, 2)
            gate, e_gate = activated(Act.GELU, gate, e_gate)
            y = value * gate
            error = abs(value) * e_gate + abs(gate) * e_value + e_value * e_gate + U * abs(y)
        else:
            y, error = activated(self.act, y, error)
        if not self.late:
            y = y + residual
            error = error + U * (abs(y) + np.abs(residual))
        return y, error


TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49)
INPUTS = (1, 3, 4, 15, 16, 17, 31, 32, 33, 47, 64, 65, 100)
OUTPUTS = (1, 3, 4, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 80, 81, 129)
IMAGES = ((1, 1), (1, 5), (6, 1), (3, 4), (7, 9), (8, 8), (5, 17))
EPILOGUES: tuple[dict[str, Any], ...] = (
    {"bias": False},
    {"act": Act.SILU},
    {"act": Act.GELU, "residual": True},
    {"act": Act.QUICK_GELU},
    {"act": Act.RELU, "residual": True, "late": True},
    {"act": Act.RELU, "bias": False},
    {"add": True},
    {"add": True, "residual": True, "bias": False},
    {"add": True, "act": Act.SILU, "residual": True, "in_place": True},
    {"residual": True, "in_place": True, "border": (0, 1)},
    {"residual": True, "out": Type.F32},
    {"out": Type.F32, "act": Act.SILU},
    {"out": Type.BF16},
    {"out": Type.F16, "act": Act.GELU},
    {"wide": (16, 0), "border": (1, 0)},
    {"wide": (48, 64), "border": (0, 1), "residual": True},
    {"border": (1, 1), "add": True},
)


def linears() -> Iterator[MatMul]:
    """Rows, inputs and outputs around every size of tile; epilogues; long sums, cut in chunks."""
    for i, tokens in enumerate(TOKENS):
        c, n = INPUTS[i % len(INPUTS)], OUTPUTS[i * 4 % len(OUTPUTS)]
        yield MatMul(1, tokens, (c,), n)
    for i, n in enumerate(OUTPUTS):
        yield MatMul(1, 5 + i, (INPUTS[-1 - i % len(INPUTS)],), n)
    for i, epilogue in enumerate(EPILOGUES):
        yield MatMul(2, 7 + i, (33,), (17, 80, 64)[i % 3], **epilogue)
    for i, (c, d) in enumerate(((16, 16), (17, 5), (64, 33), (3, 48))):
        yield MatMul(3, 6 + i, (c, d), 33 + 16 * i, residual=i == 1)
    for i, n in enumerate((1, 15, 16, 17, 32, 33, 64, 80)):
        yield MatMul(1, 9 + 3 * i, (40,), n, geglu=True, bias=i != 2, residual=i == 3)
    yield MatMul(1, 7, (1600,), 70)
    yield MatMul(1, 50, (3216,), 17, act=Act.SILU, add=True)
    yield MatMul(2, 3, (1600, 3100), 20)
    yield MatMul(1, 3, (4000,), 40, geglu=True)
    yield MatMul(21, 40, (20,), 24)
    yield MatMul(1, 450, (1552,), 8)
    yield MatMul(7, 5, (9,), 8, stride=2)


def convolutions() -> Iterator[MatMul]:
    """Images of every parity by stride and padding, and what the U-Net and the VAE put on top."""
    for i, (h, w) in enumerate(IMAGES):
        c, n = (3, 4, 17, 33, 16, 65, 8)[i], (5, 16, 17, 64, 80, 3, 33)[i]
        ring = (1, i % 2)
        yield MatMul(h, w, (c,), n, side=3, border=ring)
        yield MatMul(h, w, (n,), c, side=3, stride=2, border=ring)
        if h > 1 and w > 1:
            yield MatMul(h, w, (c,), n, side=3, stride=2, pad=0, border=ring)
        yield MatMul(h, w, (c,), n, side=3, upsample=True, border=ring)
    last = {"side": 3, "border": (1, 1)}
    yield MatMul(4, 5, (16,), 20, act=Act.SILU, add=True, **last)
    yield MatMul(4, 5, (16,), 20, residual=True, add=True, **last)
    yield MatMul(4, 5, (24,), 20, residual=True, in_place=True, **last)
    yield MatMul(5, 3, (24,), 20, residual=True, late=True, act=Act.RELU, **last)
    yield MatMul(5, 7, (24,), 3, out=Type.F32, **last)
    yield MatMul(5, 7, (24,), 20, wide=(32, 48), **last)
    yield MatMul(4, 3, (24,), 20, upsample=True, wide=(16, 16), act=Act.RELU, **last)
    yield MatMul(4, 3, (40,), 70, upsample=True, residual=True, add=True, **last)
    yield MatMul(6, 5, (8,), 20, crop=2, **last)
    yield MatMul(3, 5, (352,), 17, **last)
    yield MatMul(2, 2, (1552,), 17, **last)
    yield MatMul(20, 21, (180,), 9, **last)
    yield MatMul(15, 14, (800,), 9, upsample=True, **last)
    for band in (ABOVE, BELOW, ABOVE | BELOW):
        yield MatMul(4, 5, (24,), 20, band=band, **last)
    yield MatMul(1, 5, (24,), 20, band=ABOVE | BELOW, wide=(16, 32), **last)
    yield MatMul(3, 4, (16,), 20, upsample=True, band=BELOW, **last)
    yield MatMul(5, 7, (16,), 20, stride=2, band=ABOVE, **last)
    yield MatMul(3, 5, (20,), 16, band=ABOVE, border=(0, 1), residual=True, in_place=True)


def winograds() -> Iterator[MatMul]:
    """Sizes that are large enough to be worth it, and what is not fit and goes the direct way."""
    for h, w, c, n in ((16, 16, 64, 64), (8, 34, 80, 65), (22, 18, 100, 130)):
        yield MatMul(h, w, (c,), n, side=3, border=(1, 1), winograd=True)
    fit = {"side": 3, "winograd": True, "border": (1, 1)}
    yield MatMul(16, 16, (64,), 64, act=Act.SILU, add=True, residual=True, wide=(16, 32), **fit)
    yield MatMul(16, 18, (64,), 80, residual=True, in_place=True, **fit)
    yield MatMul(16, 18, (70,), 64, out=Type.F32, bias=False, **fit)
    yield MatMul(15, 17, (64,), 64, **fit)
    yield MatMul(6, 8, (20,), 20, **fit)
    always = fit | {"winograd": 2}
    for h, w in ((2, 2), (2, 6), (4, 2), (6, 8), (8, 16)):
        yield MatMul(h, w, (64,), 64, **always)
    yield MatMul(4, 6, (65,), 129, act=Act.SILU, add=True, residual=True, wide=(16, 32), **always)
    yield MatMul(2, 10, (64,), 80, band=ABOVE | BELOW, residual=True, in_place=True, **always)
    yield MatMul(4, 4, (80,), 64, band=ABOVE, out=Type.F32, **always)
    yield MatMul(3, 4, (64,), 64, **always)
    yield MatMul(4, 5, (64,), 64, **always)
    yield MatMul(4, 4, (63,), 64, **always)


# --- norms --------------------------------------------------------------------------------------


def norm_input(build: Build, h: int, w: int, c: int, mean: float) -> np.ndarray:
    """Values whose mean and spread differ by channel."""
    centre = mean + build.normal(c)
    return centre + build.normal(h, w, c) * build.rng.uniform(0.5, 2, c)


@dataclass(frozen=True)
class GroupNorm:
    """Sizes and options of a group norm; c: channels of a, and of b if there are two."""

    h: int
    w: int
    c: tuple[int, ...]
    groups: int
    act: Act = Act.NONE
    border: tuple[int, int] = (0, 0)
    wide: tuple[int, int] = (0, 0)
    mean: float = 0.0
    constant: bool = False

    def label(self) -> str:
        parts = [f"{self.h}x{self.w}x{'+'.join(map(str, self.c))}by{self.groups}"]
        parts += [self.act.name.lower()] if self.act else []
        parts += [f"border{self.border[0]}{self.border[1]}"] if any(self.border) else []
        parts += ["wide"] if any(self.wide) else []
        parts += [f"mean{self.mean:g}"] if self.mean else []
        return "-".join(parts + (["constant"] if self.constant else []))

    def case(self, name: str, seed: int, kind: Type) -> Case:
        """Sums of differences from a channel's first pixel p, in fp32 over 64 pixels at most, then
        in fp64: the mean is off by sum_error(64) of mean |x - p|, the variance by twice that of
        mean (x - p)^2.  Applied as x * scale + shift in fp32, three roundings of the parts.
        """
        build = Build(np.random.default_rng(seed))
        eps = float(np.float32(1e-5))
        inputs = [norm_input(build, self.h, self.w, c, self.mean) for c in self.c]
        if self.constant:
            inputs = [np.full_like(x, 0.75) for x in inputs]
        a = [build.tensor(x, kind, self.border[0], self.wide) for x in inputs]
        x = np.concatenate([t.values for t in a], 2)
        n = x.shape[2]
        gamma, beta = 1 + build.normal(n, scale=0.2), build.normal(n, scale=0.2)
        out = build.tensor(np.zeros_like(x), kind, self.border[1], self.wide, out=True)
        g, b = rounded(gamma, Type.F32), rounded(beta, Type.F32)

        def by_group(values: np.ndarray) -> np.ndarray:
            means = values.reshape(-1, self.groups, n // self.groups).mean((0, 2))
            return means.repeat(n // self.groups)

        mean = by_group(x)
        variance = by_group((x - mean) ** 2) + eps
        scale = g / np.sqrt(variance)
        e_mean = sum_error(64, by_group(abs(x - x[0, 0]))) + U * abs(mean)
        e_variance = 2 * sum_error(64, by_group((x - x[0, 0]) ** 2))
        y = (x - mean) * scale + b
        error = abs(scale) * (e_mean + abs(x - mean) * e_variance / (2 * variance))
        error = error + 3 * U * (abs(x * scale) + abs(mean * scale) + abs(b))
        y, error = activated(self.act, y, error)
        return build.finish(
            name,
            seed,
            y,
            stored(y, error, kind),
            vector(gamma),
            vector(beta),
            kind=Kind.GROUP_NORM,
            act=self.act,
            out=out,
            a=a[0],
            groups=self.groups,
            x=eps,
            **({"b": a[1]} if len(a) == 2 else {}),
        )


def group_norms() -> Iterator[GroupNorm]:
    """Groups of 1 to all channels, groups across two sources, 1 pixel to more than 64 x 64."""
    sizes = ((1, 1), (1, 7), (3, 5), (8, 8), (9, 15))
    channels = (1, 4, 15, 16, 17, 32, 33, 64, 96)
    for i, c in enumerate(channels):
        h, w = sizes[i % len(sizes)] if c > 1 else (3, 4)
        act = (Act.NONE, Act.SILU)[i % 2]
        yield GroupNorm(h, w, (c,), groups=max(1, c // 4 if c % 4 == 0 else 1), act=act)
    yield GroupNorm(5, 4, (24,), 24)
    yield GroupNorm(5, 4, (48, 48), 3, Act.SILU, border=(1, 1))  # the second group is across
    yield GroupNorm(3, 4, (32, 33), 5, border=(0, 1))
    yield GroupNorm(6, 5, (16, 8), 8, Act.SILU, wide=(16, 32))
    yield GroupNorm(6, 5, (40,), 8, Act.SILU, (1, 1), (16, 32))
    yield GroupNorm(5, 5, (32,), 8, Act.RELU)
    yield GroupNorm(5, 5, (32,), 8, Act.QUICK_GELU)
    yield GroupNorm(5, 5, (32,), 8, Act.GELU)
    yield GroupNorm(70, 61, (16,), 4, Act.SILU)
    for h, w in ((1, 63), (2, 64), (3, 65), (63, 1), (64, 2), (65, 3), (130, 129)):
        yield GroupNorm(h, w, (17,), 1, border=(h % 2, 1))
    yield GroupNorm(9, 9, (32,), 4, mean=100.0)
    yield GroupNorm(4, 4, (32,), 4, constant=True)


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of a band, added to those of `before` rows above, if there are any.

    Differences from the shift p and their sums are in fp32 over 64 pixels at most: off by
    sum_error(64) of |x - p|, and twice that of (x - p)^2; adding those up in fp64 costs nothing.
    """

    h: int
    w: int
    c: int
    before: int = 0
    border: int = 0
    wide: tuple[int, int] = (0, 0)
    mean: float = 0.0
    steady: bool = False  # all alike but for the first: errors of a long sum would all add up

    def label(self) -> str:
        parts = [f"{self.h}x{self.w}x{self.c}"]
        parts += ["steady"] if self.steady else []
        parts += [f"after{self.before}"] if self.before else []
        parts += ["border"] if self.border else []
        parts += ["wide"] if any(self.wide) else []
        return "-".join(parts + ([f"mean{self.mean:g}"] if self.mean else []))

    def case(self, name: str, seed: int, kind: Type) -> Case:
        build = Build(np.random.default_rng(seed))
        values = norm_input(build, self.h, self.w, self.c, self.mean)
        if self.steady:
            values[:] = values[0, -1]
            values[0, 0] = 0
        a = build.tensor(values, kind, self.border, self.wide)
        x = np.pad(a.values, ((0, 0), (0, 0), (0, padded(self.c) - self.c)))
        n, shift, totals = x.shape[2], x[0, 0], np.zeros((2, x.shape[2]))
        if self.before:
            shift, totals = build.normal(n), 1e3 * build.normal(2, n)
            shift[self.c :], totals[:, self.c :] = 0, 0
            out = build.sums(shift, totals)
            shift = rounded(shift, Type.F32)
        else:
            out = build.tensor(np.zeros((1, 1, 5 * n)), Type.F32, out=True)
        away, count = x - shift, min(64, self.w)
        y = np.stack([totals[0] + away.sum((0, 1)), totals[1] + (away**2).sum((0, 1))])
        sizes = np.stack([abs(away).sum((0, 1)), 2 * (away**2).sum((0, 1))])
        error = sum_error(count, sizes) + 2.0**-50 * abs(totals)
        y, error = np.concatenate([*y, shift]), np.concatenate([*error, np.zeros(n)])
        fields = {"kind": Kind.MOMENTS, "size": self.before}
        return build.finish(name, seed, y, error + SMALLEST[Type.F32], out=out, a=a, **fields)


def moments() -> Iterator[Moments]:
    """Channels around a vector; pixels around what fp32 adds up; rows around a batch of them."""
    for i, c in enumerate((1, 4, 15, 16, 17, 31, 32, 33, 64, 96)):
        yield Moments(1 + i % 3, 1 + 3 * i, c, before=i % 2 * 5)
    for i, (h, w) in enumerate(((1, 1), (1, 63), (2, 64), (3, 65), (1, 128), (1, 129))):
        yield Moments(h, w, 20, before=i % 2)
    for h in (63, 64, 65, 129):
        yield Moments(h, 3, 17, before=h % 2 * 7)
    yield Moments(5, 6, 24, border=1, wide=(16, 32))
    yield Moments(5, 6, 24, before=3, border=1, wide=(16, 32))
    yield Moments(4, 33, 16, mean=100.0)
    yield Moments(1, 3000, 17, steady=True)
    yield Moments(3000, 1, 17, steady=True)


@dataclass(frozen=True)
class Affine:
    """A band of a group norm: `above` and `below` are rows that the sums are of as well.

    The sums are exact and what is made of them is in fp64; applied as x * scale + shift in fp32,
    three roundings of the parts.
    """

    h: int
    w: int
    c: int
    groups: int
    act: Act = Act.NONE
    above: int = 0
    below: int = 0
    border: tuple[int, int] = (0, 0)
    wide: tuple[int, int] = (0, 0)
    in_place: bool = False

    def label(self) -> str:
        parts = [f"{self.h}x{self.w}x{self.c}by{self.groups}"]
        parts += [self.act.name.lower()] if self.act else []
        parts += [f"rows{self.above}+{self.below}"] if self.above or self.below else []
        parts += [f"border{self.border[0]}{self.border[1]}"] if any(self.border) else []
        parts += ["wide"] if any(self.wide) else []
        return "-".join(parts + (["in-place"] if self.in_place else []))

    def case(self, name: str, seed: int, kind: Type) -> Case:
        build = Build(np.random.default_rng(seed))
        eps, n = float(np.float32(1e-5)), self.c
        image = norm_input(build, self.above + self.h + self.below, self.w, n, 0.0)
        a = build.tensor(image[self.above : self.above + self.h], kind, self.border[0], self.wide)
        whole, x = rounded(image, kind), a.values
        shift, away = whole[0, 0], whole - whole[0, 0]
        totals = np.stack([away.sum((0, 1)), (away**2).sum((0, 1))])
        extra = ((0, 0), (0, padded(n) - n))
        sums = build.sums(np.pad(shift, extra[1]), np.pad(totals, extra))
        gamma, beta = 1 + build.normal(n, scale=0.2), build.normal(n, scale=0.2)
        g, b = rounded(gamma, Type.F32), rounded(beta, Type.F32)
        each = n // self.groups
        grouped = whole.reshape(-1, self.groups, each)
        mean = grouped.mean((0, 2)).repeat(each)
        scale = g / np.sqrt(grouped.var((0, 2)).repeat(each) + eps)
        y = (x - mean) * scale + b
        error = 3 * U * (abs(x * scale) + abs(mean * scale) + abs(b))
        y, error = activated(self.act, y, error)
        out = a
        if not self.in_place:
            out = build.tensor(np.zeros_like(x), kind, self.border[1], self.wide, out=True)
        band = (ABOVE if self.above else 0) | (BELOW if self.below else 0)
        return build.finish(
            name,
            seed,
            y,
            stored(y, error, kind),
            vector(gamma),
            vector(beta),
            kind=Kind.AFFINE,
            act=self.act,
            out=out,
            a=a,
            b=sums,
            groups=self.groups,
            size=whole.shape[0] * self.w,
            band=band,
            x=eps,
        )


def affines() -> Iterator[Affine]:
    """Bands at the top, in the middle, at the bottom; channels around a vector; borders."""
    for i, c in enumerate((1, 4, 15, 16, 17, 32, 33, 64, 96)):
        groups = max(1, c // 4 if c % 4 == 0 else 1)
        yield Affine(1 + i % 4, 3 + i, c, groups, (Act.NONE, Act.SILU)[i % 2], i % 3, (i + 1) % 3)
    for above, below in ((0, 0), (0, 3), (2, 0), (2, 3)):
        yield Affine(3, 4, 20, 5, Act.SILU, above, below, border=(0, 1))
        yield Affine(1, 5, 24, 8, Act.NONE, above, below, border=(1, 1), wide=(16, 32))
        yield Affine(2, 7, 16, 4, Act.SILU, above, below, border=(1, 1), in_place=True)
    for i, w in enumerate((1, 63, 64, 65, 129)):
        yield Affine(1 + i % 2, w, 17, 1, above=i)
    for act in (Act.GELU, Act.QUICK_GELU, Act.RELU):
        yield Affine(4, 5, 32, 8, act, below=1)


@dataclass(frozen=True)
class LayerNorm:
    """Sizes and options of a layer norm."""

    h: int
    w: int
    c: int
    border: tuple[int, int] = (0, 0)
    wide: tuple[int, int] = (0, 0)
    mean: float = 0.0

    def label(self) -> str:
        parts = [f"{self.h}x{self.w}x{self.c}"]
        parts += ["border"] if any(self.border) else []
        parts += ["wide"] if any(self.wide) else []
        return "-".join(parts + ([f"mean{self.mean:g}"] if self.mean else []))

    def case(self, name: str, seed: int, kind: Type) -> Case:
        """In fp32: the mean of n, then the mean of squared differences from it.  An error of the
        mean shifts all differences, and enters the variance as its square."""
        build = Build(np.random.default_rng(seed))
        eps, n = float(np.float32(1e-5)), self.c
        values = norm_input(build, self.h, self.w, n, self.mean)
        a = build.tensor(values, kind, self.border[0], self.wide)
        gamma, beta = 1 + build.normal(n, scale=0.2), build.normal(n, scale=0.2)
        out = build.tensor(np.zeros_like(values), kind, self.border[1], self.wide, out=True)
        x, g, b = a.values, rounded(gamma, Type.F32), rounded(beta, Type.F32)
        mean = x.mean(2, keepdims=True)
        variance = ((x - mean) ** 2).mean(2, keepdims=True) + eps
        y = (x - mean) / np.sqrt(variance) * g + b
        e_mean = sum_error(n, abs(x).mean(2, keepdims=True))
        off = e_mean + U * abs(x)
        e_variance = sum_error(n, variance) + 2 * off.max() ** 2
        e_variance = e_variance + 2 * (off * abs(x - mean)).mean(2, keepdims=True)
        norm = abs(x - mean) / np.sqrt(variance)
        error = abs(g) * (off / np.sqrt(variance) + norm * (e_variance / variance / 2 + 4 * U))
        error = error + 3 * U * (abs(y) + abs(b) + abs(mean * g) / np.sqrt(variance))
        return build.finish(
            name,
            seed,
            y,
            stored(y, error, kind),
            vector(gamma),
            vector(beta),
            kind=Kind.LAYER_NORM,
            out=out,
            a=a,
            x=eps,
        )


def layer_norms() -> Iterator[LayerNorm]:
    for i, c in enumerate((2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 320, 768)):
        yield LayerNorm(1, 1 + i * 3, c)
    yield LayerNorm(3, 5, 40, border=(1, 1), wide=(16, 0))
    yield LayerNorm(1, 130, 17)
    yield LayerNorm(1, 5, 64, mean=30.0)
    yield LayerNorm(1, 5, 1)


# --- attention ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Sizes and options of attention; queries and keys: (h, w) of their tokens."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    heads: int
    size: int
    causal: bool = False
    fused: bool = False
    spread: float = 1.0  # of scores
    rising: bool = False  # later keys score higher, so that maxima keep moving
    border: tuple[int, int] = (0, 0)
    wide: tuple[int, int] = (0, 0)

    def label(self) -> str:
        q, k = ("x".join(map(str, t)) if t[0] > 1 else str(t[1]) for t in (self.queries, self.keys))
        parts = [f"{q}by{k}-{self.heads}of{self.size}"]
        parts += [flag for flag in ("causal", "fused", "rising") if getattr(self, flag)]
        parts += [f"spread{self.spread:g}"] if self.spread != 1 else []
        parts += ["border"] if any(self.border) else []
        return "-".join(parts + (["wide"] if any(self.wide) else []))

    def inputs(self, build: Build, kind: Type) -> tuple[Placed, Placed, Placed]:
        c = self.heads * self.size
        q = build.normal(*self.queries, c, scale=self.spread)
        k, v = build.normal(*self.keys, c), build.normal(*self.keys, c)
        if self.rising:
            steps = np.linspace(-1, 1, self.keys[0] * self.keys[1]).reshape(*self.keys, 1)
            q, k = abs(q), abs(k) * steps
        if self.fused:
            q, k, v = build.fused([q, k, v], kind)
            return q, k, v
        placed = [build.tensor(x, kind, self.border[0], self.wide) for x in (q, k, v)]
        return placed[0], placed[1], placed[2]

    def case(self, name: str, seed: int, types: Type | tuple) -> Case:
        """`types`: of everything, or that with int8 and True, where products are of int8.

        An error e of a score changes its weight by a factor of exp(e): e is that of a sum of
        `size` products, times scale, and a few roundings of the largest score.  Weights are rounded
        to the type before they multiply the values; those of f16 lose what is below 2^-25.  Their
        sum, and the sum over values, add those of n keys; moving the maximum costs a few more.
        """
        kind, *narrow = types if isinstance(types, tuple) else (types,)
        build = Build(np.random.default_rng(seed))
        a, b, c = self.inputs(build, kind)
        scale = float(np.float32(1 / math.sqrt(self.size)))
        channels = self.heads * self.size
        zeros = np.zeros((*self.queries, channels))
        out = build.tensor(zeros, kind, self.border[1], self.wide, out=True)

        def by_head(x: np.ndarray) -> np.ndarray:
            return x.reshape(-1, self.heads, self.size).swapaxes(0, 1)

        q, k, v = (by_head(t.values) for t in (a, b, c))
        y, error = (self.of_int8 if narrow else self.plain)(kind, q, k, v, scale)
        y, error = (x.swapaxes(0, 1).reshape(zeros.shape) for x in (y, error))
        return build.finish(
            name,
            seed,
            y,
            stored(y, error, kind),
            kind=Kind.ATTENTION,
            out=out,
            a=a,
            b=b,
            c=c,
            heads=self.heads,
            size=self.size,
            causal=self.causal,
            narrow=int(bool(narrow)),
            scale=scale,
        )

    def plain(
        self, kind: Type, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        scores = q @ k.swapaxes(1, 2) * scale
        e_scores = sum_error(self.size, abs(q) @ abs(k).swapaxes(1, 2)) * scale
        e_scores = e_scores + 4 * U * abs(scores)
        if self.causal:
            later = np.triu(np.ones(scores.shape[1:], bool), 1)
            scores[:, later], e_scores[:, later] = -np.inf, 0
        raised = np.exp(scores - scores.max(2, keepdims=True))
        total = raised.sum(2, keepdims=True)
        y = raised / total @ v
        n = scores.shape[2]
        part = e_scores.max(2, keepdims=True) * 2 + 16 * U + sum_error(n, 1.0)
        own = 0 if kind == Type.F32 else ROUNDING[kind]
        error = (part + own) * (raised / total @ abs(v)) + part * abs(y)
        if kind == Type.F16:
            error += SMALLEST[kind] * abs(v).sum(1, keepdims=True) / total
        return y, error

    def of_int8(
        self, kind: Type, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Queries by token, keys less their mean by 512 of them, values by channel become int8.

        Weights are 127ths of the largest in a row of 512 keys.  One that lies between two, by as
        much as its power of 2 may be off, may become either.
        """
        q = int8_pixels(q)
        mean = np.cumsum(k, 1, np.float32)[:, -1:] / np.float32(k.shape[1])
        v = whole(v.astype(np.float32), abs(v).max(1, keepdims=True))
        n = k.shape[1]
        weights, either = np.zeros((2, len(q), q.shape[1], n))
        tops = []
        for i in range(0, n, 512):
            part = k[:, i : i + 512].astype(np.float32) - mean
            part = whole(part, abs(part).max((1, 2), keepdims=True))
            scores = q @ part.swapaxes(1, 2) * scale
            if self.causal:
                scores[
                    :, np.arange(i, i + part.shape[1]) > np.arange(q.shape[1])[:, None]
                ] = -np.inf
            tops.append(scores.max(2, keepdims=True))
            here = np.where(np.isinf(tops[-1]), 0, tops[-1])  # nothing so far
            raised = 127 * np.exp(scores - here)
            off = raised * (1e-4 + 16 * U * (abs(here) + abs(np.maximum(scores, -1e9))))
            weights[..., i : i + 512] = np.rint(raised)
            either[..., i : i + 512] = np.rint(raised + off) != np.rint(raised - off)
        top = np.max(tops, 0)
        for i, here in enumerate(tops):
            weights[..., 512 * i : 512 * (i + 1)] *= np.exp(here - top)
            either[..., 512 * i : 512 * (i + 1)] *= np.exp(here - top)
        total = weights.sum(2, keepdims=True)
        y = weights @ v / total
        left = total - either.sum(2, keepdims=True)
        error = (either @ abs(v) + either.sum(2, keepdims=True) * abs(y)) / left
        return y, error + (sum_error(n, 1.0) + 64 * U) * (weights @ abs(v)) / total


def attentions() -> Iterator[Attention]:
    """Heads of odd and of real sizes, queries and keys around every block, self, cross, causal."""
    for i, size in enumerate((1, 5, 8, 15, 16, 17, 31, 32, 33, 40, 64, 80, 160, 512)):
        tokens = (1, 15, 16, 17, 33, 47, 48, 49, 50, 64, 65, 31, 20, 9)[i]
        yield Attention((1, tokens), (1, tokens), heads=1 + i % 3, size=size)
    for keys in (1, 2, 15, 31, 33, 77, 255, 256, 257, 600):
        yield Attention((1, 19), (1, keys), heads=2, size=8)
    yield Attention((1, 100), (1, 77), heads=8, size=40)
    yield Attention((8, 9), (1, 77), heads=2, size=40, border=(1, 1), wide=(16, 32))
    yield Attention((6, 5), (6, 5), heads=4, size=5, border=(0, 1))
    yield Attention((7, 9), (7, 9), heads=4, size=16, fused=True)
    yield Attention((1, 50), (1, 50), heads=1, size=64, fused=True)
    for tokens in (1, 16, 49, 77, 300):
        yield Attention((1, tokens), (1, tokens), heads=2, size=8 + tokens % 16, causal=True)
    yield Attention((1, 40), (1, 300), heads=1, size=40, spread=20.0)
    yield Attention((1, 40), (1, 600), heads=2, size=16, spread=8.0, rising=True)
    yield Attention((1, 520), (1, 520), heads=1, size=8, causal=True, spread=4.0, rising=True)


# --- the rest -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    """Rows of a table plus rows of another: one addition in fp32."""

    ids: tuple[int, ...]
    rows: int
    c: int
    border: int = 0

    def label(self) -> str:
        return f"{len(self.ids)}of{self.rows}x{self.c}" + ("-border" if self.border else "")

    def case(self, name: str, seed: int, kind: Type) -> Case:
        build = Build(np.random.default_rng(seed))
        table, place = build.normal(self.rows, self.c), build.normal(len(self.ids), self.c)
        ids = np.array(self.ids, np.int64)
        a = build.dense(ids.reshape(1, -1, 1), Type.I32)
        # An id that is not in the table reads the nearest row, never other memory.
        rows = rounded(table, Type.F32)[ids.clip(0, self.rows - 1)]
        y = (rows + rounded(place, Type.F32))[None]
        out = build.tensor(np.zeros_like(y), kind, self.border, out=True)
        extra = ((0, 0), (0, padded(self.c) - self.c))
        weight, bias = (np.pad(t, extra).astype(np.float32).tobytes() for t in (table, place))
        bound = stored(y, U * abs(y), kind)
        sizes = {"kind": Kind.EMBEDDING, "size": self.rows}
        return build.finish(name, seed, y, bound, weight, bias, out=out, a=a, **sizes)


@dataclass(frozen=True)
class Sinusoid:
    """diffusers' get_timestep_embedding.  Angles are in fp64, each result is rounded twice."""

    numbers: tuple[float, ...]
    c: int
    flip: bool = True
    shift: float = 0.0
    border: int = 0

    def label(self) -> str:
        parts = [f"{len(self.numbers)}x{self.c}"] + (["flip"] if self.flip else [])
        return "-".join(parts + ([f"shift{self.shift:g}"] if self.shift else []))

    def case(self, name: str, seed: int, kind: Type) -> Case:
        build = Build(np.random.default_rng(seed))
        t = np.array(self.numbers).reshape(1, -1, 1)
        a = build.dense(t, Type.F32)
        y = sinusoid(a.values, self.c, self.flip, self.shift)
        out = build.tensor(np.zeros_like(y), kind, self.border, out=True)
        angle = abs(a.values).max() * 2.0**-50
        bound = stored(y, U * abs(y) + angle, kind)
        fields = {"kind": Kind.SINUSOID, "flip": int(self.flip), "x": self.shift}
        return build.finish(name, seed, y, bound, out=out, a=a, **fields)


def sinusoid(t: np.ndarray, channels: int, flip: bool, shift: float) -> np.ndarray:
    """(..., 1) numbers to cosines and sines.

    get_timestep_embedding puts sines first unless flip_sin_to_cos; `flip` here turns that back.
    """
    half = channels // 2
    angle = t * np.exp(-math.log(10000) * np.arange(half) / (half - shift))
    first, second = (np.sin, np.cos) if flip else (np.cos, np.sin)
    y = np.concatenate([first(angle), second(angle)], -1)
    return np.pad(y, [*[(0, 0)] * (y.ndim - 1), (0, channels - 2 * half)])


@dataclass(frozen=True)
class Rounding:
    """a + b rounded to the nearest, ties to even: exactly, for it is all that happens.

    Half of the sums lie halfway between two numbers, or next to that; some overflow, some are NaN.
    Sums of bf16 and f16 are exact in fp32.  Subnormal numbers of fp32 may count as zero.
    """

    w: int

    def label(self) -> str:
        return f"rounding{self.w}"

    def case(self, name: str, seed: int, kind: Type) -> Case:
        build = Build(np.random.default_rng(seed))
        exponents = build.rng.integers(-10, 10, (1, self.w, 16))
        values = build.normal(1, self.w, 16) * 2.0**exponents
        half = np.abs(values) * ROUNDING[kind] * build.rng.choice([1.0, 1.01, 0.99], values.shape)
        exact = rounded(values, kind)
        unit = 2.0 ** np.floor(np.log2(abs(exact))) * ROUNDING[kind]
        other = np.where(build.rng.integers(0, 2, values.shape), unit, half)
        top = {Type.F32: 3e38, Type.BF16: 3e38, Type.F16: 6e4}[kind]
        values[0, 0, :8] = top, -top, np.nan, 1, np.inf, -np.inf, np.inf, 2.0**-14
        other[0, 0, :8] = top, -top, 1, np.nan, 1, 1, -np.inf, -(2.0**-15) - 2.0**-24
        a, b = build.tensor(values, kind), build.tensor(other, kind)
        with np.errstate(invalid="ignore", over="ignore"):
            y = rounded((a.values + b.values).astype(np.float32), kind)
        out = build.tensor(np.zeros_like(values), kind, out=True)
        bound = np.full_like(y, 1e-300)
        return build.finish(name, seed, y, bound, kind=Kind.ADD, out=out, a=a, b=b)


EXTREMES = (0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 88.0, -88.0, 104.0, -104.0, 3e4, -3e4)


@dataclass(frozen=True)
class Unary:
    """act(a), or act(a + b): one rounding more."""

    h: int
    w: int
    c: int
    act: Act = Act.NONE
    two: bool = False
    out: Type | None = None
    border: tuple[int, int] = (0, 0)
    wide: tuple[int, int] = (0, 0)
    in_place: bool = False
    band: int = 0

    def label(self) -> str:
        parts = [f"{self.h}x{self.w}x{self.c}"]
        parts += [f"band{self.band}"] if self.band else []
        parts += [self.act.name.lower()] if self.act else []
        parts += [f"to-{self.out.name.lower()}"] if self.out is not None else []
        parts += ["border"] if any(self.border) else []
        parts += ["wide"] if any(self.wide) else []
        return "-".join(parts + (["in-place"] if self.in_place else []))

    def case(self, name: str, seed: int, kind: Type) -> Case:
        build = Build(np.random.default_rng(seed))
        out_kind = kind if self.out is None else self.out
        values = build.normal(self.h, self.w, self.c, scale=3.0)
        values.ravel()[: len(EXTREMES)] = EXTREMES[: values.size]
        a = build.tensor(values, kind, self.border[0], self.wide)
        x, extra = a.values, {}
        if self.two:
            extra["b"] = build.tensor(build.normal(*values.shape), kind, self.border[0])
            x = x + extra["b"].values
        y, error = activated(self.act, x, U * abs(x) * self.two)
        out = a
        if not self.in_place:
            zeros = np.zeros_like(values)
            out = build.tensor(zeros, out_kind, self.border[1], self.wide, out=True)
        bound = stored(y, error, out_kind)
        extra |= {"kind": Kind.ADD if self.two else Kind.UNARY, "act": self.act, "band": self.band}
        return build.finish(name, seed, y, bound, out=out, a=a, **extra)


@dataclass(frozen=True)
class Load:
    """Planes to channels-last, each value x times act(value): one rounding more.

    `apart`: elements between two planes.
    """

    h: int
    w: int
    c: int
    x: float = 1.0
    act: Act = Act.NONE
    border: int = 0
    wide: tuple[int, int] = (0, 0)
    apart: int = 0
    band: int = 0

    def label(self) -> str:
        label = f"{self.h}x{self.w}x{self.c}-x{self.x:g}-{self.act.name.lower()}-b{self.border}"
        label += f"-apart{self.apart}" if self.apart else ""
        return label + (f"-band{self.band}" if self.band else "")

    def case(self, name: str, seed: int, kind: Type) -> Case:
        build = Build(np.random.default_rng(seed))
        values = build.normal(self.h, self.w, self.c, scale=4.0)
        a = build.planes(values, self.apart)
        x = float(np.float32(self.x))
        y, error = activated(self.act, a.values, np.zeros_like(values))
        y, error = y * x, error * abs(x) + U * abs(y * x)
        out = build.tensor(np.zeros_like(y), kind, self.border, self.wide, out=True)
        bound = stored(y, error, kind)
        fields = {"kind": Kind.LOAD, "act": self.act, "x": x, "band": self.band}
        return build.finish(name, seed, y, bound, out=out, a=a, **fields)


@dataclass(frozen=True)
class Store:
    """Channels-last to planes, a x + y: two roundings, or one."""

    h: int
    w: int
    c: int
    x: float = 1.0
    y: float = 0.0
    border: int = 0
    wide: tuple[int, int] = (0, 0)
    apart: int = 0  # elements between two planes

    def label(self) -> str:
        label = f"{self.h}x{self.w}x{self.c}-x{self.x:g}-y{self.y:g}-b{self.border}"
        return label + (f"-apart{self.apart}" if self.apart else "")

    def case(self, name: str, seed: int, kind: Type) -> Case:
        build = Build(np.random.default_rng(seed))
        a = build.tensor(build.normal(self.h, self.w, self.c), kind, self.border, self.wide)
        x, y = (float(np.float32(v)) for v in (self.x, self.y))
        expected = (a.values * x + y).transpose(2, 0, 1)
        error = 2 * U * (abs(a.values * x) + abs(y)).transpose(2, 0, 1) + SMALLEST[Type.F32]
        out = build.planes(np.full((self.h, self.w, self.c), np.nan), self.apart)
        fields = {"kind": Kind.STORE, "x": x, "y": y}
        return build.finish(name, seed, expected, error, out=out, a=a, **fields)


@dataclass(frozen=True)
class Bytes:
    """Clamped and rounded: exact but where fp32 moves a value across the middle of two bytes."""

    h: int
    w: int
    x: float = 0.5
    y: float = 0.5
    border: int = 0
    wide: tuple[int, int] = (0, 0)

    def label(self) -> str:
        return f"{self.h}x{self.w}-x{self.x:g}-y{self.y:g}-b{self.border}"

    def case(self, name: str, seed: int, kind: Type) -> Case:
        build = Build(np.random.default_rng(seed))
        values = build.normal(self.h, self.w, 3, scale=0.8)
        values.ravel()[:9] = (1, -1, 0, 50, -50, 1e4, -1e4, 1.001, -1.001)[: values.size]
        a = build.tensor(values, kind, self.border, self.wide)
        exact = np.clip(a.values * self.x + self.y, 0, 1) * 255
        y = np.rint(exact)
        middle = abs(abs(exact - y) - 0.5) <= 4 * U * 255
        out = build.dense(np.full(values.shape, 77), Type.U8)
        fields = {"kind": Kind.BYTES, "x": self.x, "y": self.y}
        bound = np.where(middle, 1.0, 1e-9)
        return build.finish(name, seed, y, bound, out=out, a=a, **fields)


@dataclass(frozen=True)
class Pick:
    """One row of a, exactly; without the id, the first row."""

    ids: tuple[int, ...]
    id: int
    row: int
    c: int
    border: int = 0
    wide: tuple[int, int] = (0, 0)

    def label(self) -> str:
        return f"{self.row}of{len(self.ids)}x{self.c}-id{self.id}"

    def case(self, name: str, seed: int, kind: Type) -> Case:
        build = Build(np.random.default_rng(seed))
        a = build.tensor(build.normal(1, len(self.ids), self.c), kind, self.border, self.wide)
        b = build.dense(np.array(self.ids).reshape(1, -1, 1), Type.I32)
        y = a.values[:, self.row : self.row + 1]
        out = build.tensor(np.zeros_like(y), kind, self.border, self.wide, out=True)
        fields = {"kind": Kind.PICK, "size": self.id}
        return build.finish(name, seed, y, np.full_like(y, 1e-30), out=out, a=a, b=b, **fields)


def others() -> Iterator[Any]:
    yield Embedding((0,), 1, 1)
    yield Embedding((3, 0, 9, 9, 5), 10, 17, border=1)
    yield Embedding((6, -1, 7, 2**31 - 1, -(2**31)), 7, 32)
    yield Embedding(tuple(range(77)), 80, 40)
    yield Sinusoid((981.0,), 320)
    yield Sinusoid((0.0, 1.0, 999.0, 0.5), 33, border=1)
    yield Sinusoid((512.0, 512.0, 0.0, 0.0, 1024.0, 1024.0), 256, flip=False)
    yield Sinusoid((17.25,), 64, flip=False, shift=1.0)
    yield Sinusoid((3.0,), 2)
    for i, c in enumerate((1, 4, 15, 16, 17, 33)):
        for act in Act:
            yield Unary(1 + i, 3 + i, c, act)
    yield Unary(4, 70, 24, Act.SILU, border=(1, 1), wide=(16, 16))
    yield Unary(4, 5, 24, Act.SILU, in_place=True)
    for band in (ABOVE, BELOW, ABOVE | BELOW):
        yield Unary(2, 5, 17, border=(1, 1), band=band)
        yield Unary(1, 3, 17, two=True, border=(0, 1), wide=(16, 16), band=band)
        yield Load(3, 5, 4, border=1, band=band, apart=7 * band)
    for out in FLOATS.values():
        yield Unary(3, 4, 17, out=out)
        yield Unary(3, 4, 17, Act.SILU, out=out)
    for act in (Act.NONE, Act.SILU, Act.GELU, Act.QUICK_GELU, Act.RELU, Act.TANH3):
        yield Unary(3, 67, 17, act, two=True)
    yield Unary(4, 5, 33, two=True, border=(1, 1), wide=(16, 16))
    yield Unary(4, 5, 33, two=True, in_place=True)
    yield Rounding(100)
    yield Load(5, 7, 4)
    yield Load(1, 1, 1, 1 / 0.18215, border=1)
    yield Load(4, 6, 17, 0.5, Act.TANH3, border=1, wide=(16, 32))
    yield Load(3, 3, 16, 2.0, Act.SILU)
    yield Load(2, 5, 17, apart=1)
    yield Load(1, 3, 1, border=1, apart=9)
    yield Store(5, 7, 4)
    yield Store(1, 1, 1, 0.5, 0.5, border=1)
    yield Store(4, 6, 17, 0.13025, -1.0, border=1, wide=(16, 32))
    yield Store(2, 5, 17, apart=1)
    yield Store(3, 5, 3, 0.5, 0.5, border=1, apart=40)
    yield Bytes(1, 1)
    yield Bytes(7, 5, border=1)
    yield Bytes(9, 33, 1.0, 0.0, wide=(16, 0))
    yield Pick((49406, 320, 49407, 49407), 49407, 2, 40)
    yield Pick((5, 8, 320, 320), -1, 2, 17, border=1, wide=(16, 0))
    yield Pick((5, 8, 320), 7, 0, 16)
    yield Pick((-5, -8), -1, 0, 16)


# --- the table ----------------------------------------------------------------------------------

Recipe = Callable[[int], Case]


def _table() -> Iterator[tuple[str, Kind, Any, Any]]:
    for i, spec in enumerate((*linears(), *convolutions(), *winograds())):
        for j, (name, types) in enumerate({**PAIRS, **NARROW}.items()):
            if types[1] in (Type.I8, Type.I4) and (i + j) % 3:
                continue  # a third of the shapes each
            yield f"matmul-{name}-{spec.label()}", Kind.MATMUL, spec, types
    families = (
        (group_norms(), Kind.GROUP_NORM),
        (moments(), Kind.MOMENTS),
        (affines(), Kind.AFFINE),
        (layer_norms(), Kind.LAYER_NORM),
        (attentions(), Kind.ATTENTION),
        (others(), None),
    )
    for specs, kind in families:
        for spec in specs:
            code = kind or _kind(spec)
            for name, one in {**FLOATS, **(NARROW if kind is Kind.ATTENTION else {})}.items():
                yield f"{code.name.lower()}-{name}-{spec.label()}", code, spec, one


def _kind(spec: Any) -> Kind:
    if isinstance(spec, Rounding):
        return Kind.ADD
    if isinstance(spec, Unary):
        return Kind.ADD if spec.two else Kind.UNARY
    return Kind[type(spec).__name__.upper()]


SPECS = {name: (kind, spec, types) for name, kind, spec, types in _table()}
NAMES = {kind: [name for name, (k, _, _) in SPECS.items() if k == kind] for kind in Kind}


def make(name: str, seed: int) -> Case:
    """A case of the table; its inputs depend on the seed and its name alone."""
    _, spec, types = SPECS[name]
    case = spec.case(name, (seed << 32) + zlib.crc32(name.encode()), types)
    case.seed = seed
    return case
