"""What the ops of ferrotype.h compute, in NumPy and float64, on the same arena and packed weights.

The oracle of whole graphs.  It reads strides, borders and offsets as the engine does, and it fills
with NaN whatever must not be read: the arena before a run, and each op's scratch.
"""

import math

import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from ferrotype.kernels import LANES, NO_WEIGHT, Act, Kind, Type
from ferrotype.tests.kernels_cases import int8_pixels

DTYPES = {Type.F32: np.float32, Type.BF16: np.uint16, Type.F16: np.float16, Type.I32: np.int32}
ABOVE, BELOW = 1, 2  # ft_op.band: rows of the same image are there, where else is a border
erf = np.vectorize(math.erf)


def padded(c):
    return -(-c // LANES) * LANES


def narrow(values, kind):
    if kind != Type.BF16:
        return values.astype(DTYPES[kind])
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widen(elements, kind):
    if kind == Type.BF16:
        elements = (elements.astype(np.uint32) << 16).view(np.float32)
    return elements.astype(np.float64)


class Machine:
    """Runs ops one by one; `arena` and `weights` are bytes."""

    def __init__(self, arena_bytes, weights):
        self.arena = np.full(arena_bytes, 0xFF, np.uint8)  # NaN in every type
        self.weights = weights

    def view(self, t):
        """Elements with the border: (h + 2 border, w + 2 border, padded channels)."""
        kind, edge = Type(t.type), t.border
        start = t.offset - edge * (t.row + t.pixel) * kind.bytes
        shape = (t.h + 2 * edge, t.w + 2 * edge, padded(t.c))
        last = ((shape[0] - 1) * t.row + (shape[1] - 1) * t.pixel + shape[2]) * kind.bytes
        assert start >= 0
        assert start + last <= len(self.arena)
        assert t.row >= t.pixel * shape[1]
        assert t.pixel >= padded(t.c)
        flat = self.arena[start : start + last].view(DTYPES[kind])
        strides = tuple(n * kind.bytes for n in (t.row, t.pixel, 1))
        return as_strided(flat, shape, strides)

    def read(self, t):
        """(h, w, padded channels); that padding is zero is checked."""
        view = self.view(t)
        values = widen(view[1:-1, 1:-1] if t.border else view, Type(t.type))
        assert not values[..., t.c :].any(), "padding is not zero"
        return values

    def read_around(self, t, band, below):
        """With its border, which must be zero but for the rows of bands above and below.

        The one below need not be there if it is not read.
        """
        values = widen(self.view(t), Type(t.type))
        if not below:
            values[-1] = 0
        assert not values[..., t.c :].any(), "padding is not zero"
        edge = values.copy()
        edge[(0 if band & ABOVE else 1) : (None if band & BELOW else -1), 1:-1] = 0
        assert not edge.any(), "border is not zero"
        return values

    def write(self, op, values):
        """(h, w, c), rounded to the type of out; padding and border become zero.

        Of the border, not what is above and below a band.
        """
        t = op.out
        view = self.view(t)
        first = t.border if op.band & ABOVE else 0
        view[first : len(view) - (t.border if op.band & BELOW else 0)] = 0
        inner = view[1:-1, 1:-1] if t.border else view
        inner[..., : t.c] = narrow(values[..., : t.c], Type(t.type))

    def dense(self, t):
        """(h, w, c) without padding."""
        kind = Type(t.type)
        flat = self.arena[t.offset : t.offset + t.h * t.w * t.c * kind.bytes].view(DTYPES[kind])
        assert (t.pixel, t.row) == (t.c, t.c * t.w)
        return flat.reshape(t.h, t.w, t.c)

    def planes(self, t):
        """(c, h, w), `pixel` elements from one plane to the next."""
        assert t.pixel >= t.h * t.w
        assert t.row == t.w
        assert t.type == Type.F32
        last = (t.c - 1) * t.pixel + t.h * t.w
        flat = self.arena[t.offset : t.offset + last * 4].view(np.float32)
        return as_strided(flat, (t.c, t.h, t.w), (4 * t.pixel, 4 * t.w, 4))

    def sums(self, t):
        """Of a norm: (2, channels) in float64, sums and squares; and the shift of each, float32."""
        channels = t.c // 5
        assert (t.h, t.w, t.type, t.offset % 8) == (1, 1, Type.F32, 0)
        stored = self.arena[t.offset : t.offset + 20 * channels]
        totals, shift = np.split(stored, [16 * channels])
        return totals.view(np.float64).reshape(2, channels), shift.view(np.float32)

    def weight(self, offset, kind, count):
        assert offset % 64 == 0
        return self.weights[offset : offset + count * kind.bytes].view(DTYPES[kind])

    def vector(self, offset, count):
        if offset == NO_WEIGHT:
            return np.zeros(count)
        return self.weight(offset, Type.F32, count).astype(np.float64)

    def run(self, op, scratch_bytes=0):
        self.arena[op.scratch : op.scratch + scratch_bytes] = 0xFF
        RUN[Kind(op.kind)](self, op)


def activate(x, act):
    with np.errstate(over="ignore"):
        match Act(act):
            case Act.NONE:
                return x
            case Act.SILU:
                return x / (1 + np.exp(-x))
            case Act.GELU:
                return x * 0.5 * (1 + erf(x / np.sqrt(2)))
            case Act.QUICK_GELU:
                return x / (1 + np.exp(-1.702 * x))
            case Act.RELU:
                return np.maximum(x, 0)
            case Act.TANH3:
                return 3 * np.tanh(x / 3)


# --- ops ----------------------------------------------------------------------------------------


def few_bits(data, kind, shape, sources):
    """What packed int8 or int4 stands for: (matrices, blocks, 16, taps, k) in float64.

    `sources`: the padded channels of each, k in all.  Scales of int8 are at the end of `data`.
    """
    matrices, blocks, lanes, taps, k = shape
    if kind == Type.I8:
        scales = data[-4 * matrices * blocks * lanes :].view(np.float32).astype(np.float64)
        fours = data[: math.prod(shape)].view(np.int8).reshape(matrices, blocks, taps, -1, lanes, 4)
        values = fours.transpose(0, 1, 4, 2, 3, 5).reshape(shape)
        return values * scales.reshape(matrices, blocks, lanes, 1, 1)
    found, start = np.empty(shape), 0
    rows, first = data.reshape(matrices, blocks, taps, -1), 0
    for size in (min(32, count - i) for count in sources for i in range(0, count, 32)):
        scales = np.ascontiguousarray(rows[..., start : start + 2 * lanes]).view(np.float16)
        start += 2 * lanes
        both = rows[..., start : start + size * lanes // 2]
        start += both.shape[-1]
        four = np.stack([both & 15, both >> 4], -1).astype(np.int8)  # of which 8..15 are negative
        eights = ((four ^ 8) - 8).reshape(matrices, blocks, taps, -1, lanes, 8)
        values = eights.transpose(0, 1, 4, 2, 3, 5).reshape(matrices, blocks, lanes, taps, size)
        scales = scales.astype(np.float64).transpose(0, 1, 3, 2)[..., None]
        found[..., first : first + size] = values * scales
        first += size
    assert (start, first) == (rows.shape[-1], k)
    return found


def matrices(m, op, taps, k, blocks):
    """(taps, k, outputs) of packed weights."""
    kind = Type(op.weight_type)
    parities = 4 if op.upsample else 1
    if kind in (Type.I8, Type.I4):
        w = few_bits_of(m, op, kind, (parities, blocks, LANES, taps, k))
        return w.transpose(0, 3, 4, 1, 2).reshape(parities, taps, k, blocks * LANES)
    raw = widen(m.weight(op.weight, kind, parities * blocks * taps * k * LANES), kind)
    if kind == Type.BF16:
        raw = raw.reshape(-1, k // 2, LANES, 2).swapaxes(2, 3)
    w = raw.reshape(parities, blocks, taps, k, LANES)
    return w.transpose(0, 2, 3, 1, 4).reshape(parities, taps, k, blocks * LANES)


def few_bits_of(m, op, kind, shape):
    """int4 is rounded to the type of activations; int8 is exact in it, and scaled afterwards."""
    sources = [padded(t.c) for t in (op.a, op.b) if t.h]
    assert op.weight % 64 == 0
    if kind == Type.I8:
        assert op.scales % 64 == 0
        data = m.weights[op.weight : op.scales + 4 * math.prod(shape[:3])]
        return few_bits(data, kind, shape, sources)
    groups = sum(-(-count // 32) for count in sources)
    size = math.prod(shape) // 2 + shape[0] * shape[1] * shape[3] * groups * 2 * LANES
    found = few_bits(m.weights[op.weight : op.weight + size], kind, shape, sources)
    return widen(narrow(found, Type(op.a.type)), Type(op.a.type))


def matmul(m, op):
    blocks = padded(op.out.c) // LANES * (2 if op.geglu else 1)
    last = (op.out.h - 1) * op.stride - op.pad + op.side - 1  # the last row that is read
    a = (
        m.read_around(op.a, op.band, op.upsample or last >= op.a.h)
        if op.side == 3
        else m.read(op.a)
    )
    sources = [a, m.read(op.b)] if op.b.h else [a]
    if op.narrow:
        assert op.weight_type == Type.I8
        sources = [int8_pixels(source) for source in sources]
    a = np.concatenate(sources, axis=-1)
    side = 2 if op.upsample else op.side
    w = matrices(m, op, side * side, a.shape[-1], blocks)
    if op.upsample:
        sums = doubled(a, w, op)
    else:
        if op.side == 3 and not op.pad:
            a = a[1:, 1:]
        windows = sliding_window_view(a, (side, side), axis=(0, 1))[:: op.stride, :: op.stride]
        windows = windows[: op.out.h, : op.out.w]
        sums = np.einsum("yxkij,ijkn->yxn", windows, w[0].reshape(side, side, *w.shape[2:]),
                         optimize=True)  # fmt: skip
    sums = sums + m.vector(op.bias, blocks * LANES)
    if op.geglu:
        pairs = sums.reshape(*sums.shape[:2], -1, 2, LANES)
        sums = (pairs[..., 0, :] * activate(pairs[..., 1, :], Act.GELU)).reshape(
            *sums.shape[:2], -1
        )
    if op.add.h:
        assert op.add.type == Type.F32
        sums = sums + m.read(op.add)
    if not op.late:
        sums = activate(sums, op.act)
    if op.c.h:
        sums = sums + m.read(op.c)
    m.write(op, activate(sums, op.act) if op.late else sums)


def doubled(a, w, op):
    """A 3x3 convolution of the doubled image as four 2x2 ones; `a` has its border."""
    sums = np.empty((op.out.h, op.out.w, w.shape[-1]))
    for parity in range(4):
        y, x = divmod(parity, 2)
        windows = sliding_window_view(a, (2, 2), axis=(0, 1))[y : y + op.a.h, x : x + op.a.w]
        filters = w[parity].reshape(2, 2, *w.shape[2:])
        sums[y::2, x::2] = np.einsum("yxkij,ijkn->yxn", windows, filters, optimize=True)
    return sums


def group_norm(m, op):
    sources = [m.read(t)[..., : t.c] for t in (op.a, op.b) if t.h]
    x = np.concatenate(sources, axis=-1)
    h, w, c = x.shape
    groups = x.reshape(h * w, op.groups, c // op.groups)
    mean, variance = groups.mean((0, 2), keepdims=True), groups.var((0, 2), keepdims=True)
    x = ((groups - mean) / np.sqrt(variance + op.x)).reshape(h, w, c)
    gamma, beta = (m.vector(offset, padded(c))[:c] for offset in (op.weight, op.bias))
    m.write(op, activate(x * gamma + beta, op.act))


def moments(m, op):
    """Sums of differences from the first pixel of the image."""
    x = m.read(op.a)
    totals, shift = m.sums(op.out)
    if not op.size:
        totals[:], shift[:] = 0, x[0, 0]
    totals += [(x - shift).sum((0, 1)), ((x - shift) ** 2).sum((0, 1))]


def affine(m, op):
    """A band of a group norm; `size` is the pixels of the image."""
    c = op.a.c
    totals, shift = (part[..., :c].astype(np.float64) for part in m.sums(op.b))
    mean = shift + totals[0] / op.size
    square = totals[1] / op.size - (mean - shift) ** 2 + mean**2
    by_group = [v.reshape(op.groups, -1).mean(1).repeat(c // op.groups) for v in (mean, square)]
    x = (m.read(op.a)[..., :c] - by_group[0]) / np.sqrt(by_group[1] - by_group[0] ** 2 + op.x)
    gamma, beta = (m.vector(offset, padded(c))[:c] for offset in (op.weight, op.bias))
    m.write(op, activate(x * gamma + beta, op.act))


def layer_norm(m, op):
    c = op.a.c
    x = m.read(op.a)[..., :c]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + op.x)
    gamma, beta = (m.vector(offset, padded(c))[:c] for offset in (op.weight, op.bias))
    m.write(op, x * gamma + beta)


def attention(m, op):
    q, k, v = (
        m.read(t)[..., : t.c].reshape(t.h * t.w, op.heads, op.size) for t in (op.a, op.b, op.c)
    )
    scores = np.einsum("qhs,khs->hqk", q, k) * op.scale
    if op.causal:
        scores[:, ~np.tri(len(q), len(k), dtype=bool)] = -np.inf
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    out = np.einsum("hqk,khs->qhs", scores, v)
    m.write(op, out.reshape(op.out.h, op.out.w, -1))


def embedding(m, op):
    c = padded(op.out.c)
    table = m.vector(op.weight, op.size * c).reshape(-1, c)
    positions = m.vector(op.bias, op.out.w * c).reshape(-1, c)
    ids = m.dense(op.a).reshape(-1)
    m.write(op, (table[ids] + positions)[None])


def sinusoid(m, op):
    numbers = m.dense(op.a).astype(np.float64).reshape(-1)
    half = op.out.c // 2
    angles = numbers[:, None] * np.exp(-np.log(10000) * np.arange(half) / (half - op.x))
    waves = [np.sin(angles), np.cos(angles)] if op.flip else [np.cos(angles), np.sin(angles)]
    m.write(op, np.concatenate(waves, axis=-1)[None])


def unary(m, op):
    m.write(op, activate(m.read(op.a), op.act))


def add(m, op):
    m.write(op, activate(m.read(op.a) + m.read(op.b), op.act))


def load(m, op):
    planes = m.planes(op.a).astype(np.float64)
    m.write(op, activate(planes, op.act).transpose(1, 2, 0) * op.x)


def store(m, op):
    values = m.read(op.a)[..., : op.a.c] * op.x + op.y
    m.planes(op.out)[:] = values.transpose(2, 0, 1)


def pick(m, op):
    ids = m.dense(op.b).reshape(-1)
    row = ids.argmax() if op.size < 0 else (ids == op.size).argmax()
    m.write(op, m.read(op.a)[:, row : row + 1])


RUN = {
    Kind.MATMUL: matmul,
    Kind.GROUP_NORM: group_norm,
    Kind.LAYER_NORM: layer_norm,
    Kind.ATTENTION: attention,
    Kind.EMBEDDING: embedding,
    Kind.SINUSOID: sinusoid,
    Kind.UNARY: unary,
    Kind.ADD: add,
    Kind.LOAD: load,
    Kind.STORE: store,
    Kind.PICK: pick,
    Kind.MOMENTS: moments,
    Kind.AFFINE: affine,
}
