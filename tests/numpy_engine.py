"""What the ops of ferrotype.h compute, in NumPy and float64, on the same arena and packed weights.

The oracle of whole graphs.  It reads strides, borders and offsets as the engine does, and it fills
with NaN whatever must not be read: the arena before a run, and each op's scratch.
"""

import math

import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from ferrotype.kernels import LANES, NO_WEIGHT, Act, Kind, Type

DTYPES = {Type.F32: np.float32, Type.BF16: np.uint16, Type.F16: np.float16, Type.I32: np.int32}
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

    def read(self, t, border=False):
        """(h, w, padded channels); that padding and border are zero is checked."""
        values = widen(self.view(t), Type(t.type))
        assert not values[..., t.c :].any(), "padding is not zero"
        if not t.border:
            return values
        inner = values[1:-1, 1:-1]
        if border:
            edge = values.copy()
            edge[1:-1, 1:-1] = 0
            assert not edge.any(), "border is not zero"
            return values
        return inner

    def write(self, t, values):
        """(h, w, c), rounded to the tensor's type; padding and border become zero."""
        view = self.view(t)
        view[:] = 0
        inner = view[1:-1, 1:-1] if t.border else view
        inner[..., : t.c] = narrow(values[..., : t.c], Type(t.type))

    def dense(self, t, planar):
        count = t.h * t.w * t.c
        kind = Type(t.type)
        flat = self.arena[t.offset : t.offset + count * kind.bytes].view(DTYPES[kind])
        assert (t.pixel, t.row) == ((1, t.w) if planar else (t.c, t.c * t.w))
        return flat.reshape((t.c, t.h, t.w) if planar else (t.h, t.w, t.c))

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


def matrices(m, op, taps, k, blocks):
    """(taps, k, outputs) of packed weights."""
    kind = Type(op.weight_type)
    parities = 4 if op.upsample else 1
    raw = widen(m.weight(op.weight, kind, parities * blocks * taps * k * LANES), kind)
    if kind == Type.BF16:
        raw = raw.reshape(-1, k // 2, LANES, 2).swapaxes(2, 3)
    w = raw.reshape(parities, blocks, taps, k, LANES)
    return w.transpose(0, 2, 3, 1, 4).reshape(parities, taps, k, blocks * LANES)


def matmul(m, op):
    blocks = padded(op.out.c) // LANES * (2 if op.geglu else 1)
    a = m.read(op.a, border=op.side == 3)
    if op.b.h:
        a = np.concatenate([a, m.read(op.b)], axis=-1)
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
    m.write(op.out, activate(sums, op.act) if op.late else sums)


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
    m.write(op.out, activate(x * gamma + beta, op.act))


def layer_norm(m, op):
    c = op.a.c
    x = m.read(op.a)[..., :c]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + op.x)
    gamma, beta = (m.vector(offset, padded(c))[:c] for offset in (op.weight, op.bias))
    m.write(op.out, x * gamma + beta)


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
    m.write(op.out, out.reshape(op.out.h, op.out.w, -1))


def embedding(m, op):
    c = padded(op.out.c)
    table = m.vector(op.weight, op.size * c).reshape(-1, c)
    positions = m.vector(op.bias, op.out.w * c).reshape(-1, c)
    ids = m.dense(op.a, planar=False).reshape(-1)
    m.write(op.out, (table[ids] + positions)[None])


def sinusoid(m, op):
    numbers = m.dense(op.a, planar=False).astype(np.float64).reshape(-1)
    half = op.out.c // 2
    angles = numbers[:, None] * np.exp(-np.log(10000) * np.arange(half) / (half - op.x))
    waves = [np.sin(angles), np.cos(angles)] if op.flip else [np.cos(angles), np.sin(angles)]
    m.write(op.out, np.concatenate(waves, axis=-1)[None])


def unary(m, op):
    m.write(op.out, activate(m.read(op.a), op.act))


def add(m, op):
    m.write(op.out, activate(m.read(op.a) + m.read(op.b), op.act))


def load(m, op):
    planes = m.dense(op.a, planar=True).astype(np.float64)
    m.write(op.out, activate(planes, op.act).transpose(1, 2, 0) * op.x)


def store(m, op):
    values = m.read(op.a)[..., : op.a.c] * op.x + op.y
    m.dense(op.out, planar=True)[:] = values.transpose(2, 0, 1)


def pick(m, op):
    ids = m.dense(op.b, planar=False).reshape(-1)
    row = ids.argmax() if op.size < 0 else (ids == op.size).argmax()
    m.write(op.out, m.read(op.a)[:, row : row + 1])


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
}
