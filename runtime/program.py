"""The builder of graphs: ops over symbolic tensors, and requests for weights.  docs/engine.md.

A graph function of `runtime.models` makes ops with a `Net`.  Nothing has a place yet: `plan` puts
tensors into an arena, and the weights file says where weights are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import FerrotypeError
from ..kernels import LANES, Act, Kind, Op, Tensor, Type

TYPES = {"fp32": Type.F32, "bf16": Type.BF16, "fp16": Type.F16}  # as manifests name them
FEW_BITS = {"int8": Type.I8, "int4": Type.I4}  # of matrices alone
STORED = {**TYPES, **FEW_BITS}
INT8 = "int8"  # activations that are rounded to it where they meet weights of int8
GROUP = 32  # inputs of int4 that share a scale
NARROW_KEYS = 256  # where making int8 of an attention costs less than its products save
LINE = 64  # bytes: alignment of every tensor
SLICE = 32  # channels: a slice of a 16-bit tensor starts at a multiple of LINE


class GraphError(FerrotypeError):
    """A network or an input that the native engine cannot run."""


def padded(channels: int) -> int:
    """Channels as they are stored."""
    return round_up(channels, LANES)


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def activation_type(name: str) -> Type | None:
    """What tensors between layers are stored in; None for a name that is not known."""
    return Type.BF16 if name == INT8 else TYPES.get(name)


def int4_bytes(inputs: int) -> int:
    """Of a tap of a block of outputs: fp16 scales by group, and two values in a byte."""
    return -(-inputs // GROUP) * 2 * LANES + inputs * LANES // 2


def check_fields(where: str, config: Mapping[str, Any], allowed: Mapping[str, Sequence]) -> None:
    """Refuse a config field whose value is none of those allowed; a missing one is the default."""
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            only = " or ".join(repr(value) for value in values)
            raise GraphError(
                f"{where}: {name} is {config[name]!r}; the native engine supports only {only}"
            )


# --- weights ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A tensor of a weights file, as a graph asks for it and conversion packs it.

    `sources` are tensors of the checkpoint, joined along the outputs, of which there are `outputs`
    in all: of a table, its rows.  `inputs` are the channels of every source of activations, side by
    side, each padded to a multiple of LANES.
    """

    name: str
    form: str  # matmul | upsample | geglu | vector | geglu_vector | table
    sources: tuple[str, ...]
    outputs: int
    inputs: tuple[int, ...] = ()
    side: int = 1

    @property
    def is_matrix(self) -> bool:
        """Whether it has the type of weights; all others are float32."""
        return self.form in ("matmul", "upsample", "geglu")

    @property
    def source_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those that its sources, joined, may have in a checkpoint: usually one.

        A linear layer is a convolution of one pixel, and may be stored as either.
        """
        inputs = sum(self.inputs)
        if self.form in ("vector", "geglu_vector"):
            return ((self.outputs,),)
        if self.form == "table":
            return ((self.outputs, inputs),)
        filters = (self.outputs, inputs, self.side, self.side)
        return ((self.outputs, inputs), filters) if self.side == 1 else (filters,)

    def shape(self, weights: Type) -> tuple[int, ...]:
        """In the file; the inputs of bfloat16 matrices are in pairs, of int8 in fours.

        Of int4 the last axis is bytes: of every group of inputs, scales and then values.
        """
        inputs = sum(map(padded, self.inputs))
        if self.form == "table":
            return (self.outputs, inputs)
        # of GEGLU, values and gates are padded apart
        gated = self.form.startswith("geglu")
        outputs = 2 * padded(self.outputs // 2) if gated else padded(self.outputs)
        if not self.is_matrix:
            return (outputs,)
        together = {Type.BF16: 2, Type.I8: 4}.get(weights)
        tap: tuple[int, ...] = (inputs, LANES)
        if together:
            tap = (inputs // together, LANES, together)
        elif weights == Type.I4:
            tap = (sum(int4_bytes(padded(count)) for count in self.inputs),)
        if self.form == "upsample":
            return (4, outputs // LANES, 4, *tap)
        return (outputs // LANES, self.side**2, *tap)

    def scales(self, weights: Type) -> tuple[int, ...]:
        """The shape of int8's scales, which follow the matrix at a multiple of LINE; else ()."""
        if weights != Type.I8 or not self.is_matrix:
            return ()
        shape = self.shape(weights)
        return (*shape[: 2 if self.form == "upsample" else 1], LANES)

    def bytes(self, weights: Type) -> tuple[int, int]:
        """Of the tensor in the file where matrices are `weights`; and where its scales start."""
        kind = self.type(weights)
        matrix = math.prod(self.shape(weights)) * (1 if kind == Type.I4 else kind.bytes)
        if not self.scales(weights):
            return matrix, matrix
        start = round_up(matrix, LINE)
        return start + 4 * math.prod(self.scales(weights)), start

    def type(self, weights: Type) -> Type:
        """Of its elements, where matrices are `weights`."""
        return weights if self.is_matrix else Type.F32


@dataclass(frozen=True)
class Weight:
    """Where a packed tensor is in a weights file, with the scales of int8 behind it.

    `narrow`: what it is multiplied with is rounded to int8 as well.
    """

    type: Type
    offset: int
    bytes: int
    scales: int | None = None
    narrow: bool = False


# --- activations --------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Storage:
    """A tensor that will have a place in the arena: h x w pixels of c channels.

    Tokens are the pixels of one row.  A planar one is c planes of h x w, as arrays come and go.
    """

    h: int
    w: int
    c: int
    type: Type
    planar: bool = False
    border: bool = False  # of zeros, one pixel wide: a reader looks over the edge
    upon: Storage | None = None  # whose place it takes, row by row
    pin: int | None = None  # the byte of the arena where it starts, if it matters

    @property
    def pixel(self) -> int:
        """Elements from one pixel to the next."""
        return 1 if self.planar else padded(self.c)

    @property
    def row(self) -> int:
        """Elements from one row to the next."""
        return self.pixel * (self.w + 2 * self.border)

    @property
    def lead(self) -> int:
        """Bytes of border before the first pixel, rounded so that this is aligned."""
        return round_up((self.row + self.pixel) * self.type.bytes, LINE) if self.border else 0

    @property
    def bytes(self) -> int:
        """Bytes in the arena, border and rounding included."""
        if self.planar:
            return round_up(self.c * self.h * self.w * self.type.bytes, LINE)
        below = (self.w + 1) * self.pixel if self.border else 0
        return round_up(self.lead + (self.h * self.row + below) * self.type.bytes, LINE)

    def like(self, other: Storage) -> bool:
        """Whether both lie in memory alike."""
        fields = ("h", "w", "c", "type", "planar", "border")
        return all(getattr(self, name) == getattr(other, name) for name in fields)


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """Some channels of a tensor, `c` from `first` on: all of them, or a slice.

    `joined` is another view: all pixels, padding included, as the channels of one.  `rows`, if
    given, are those from `top` on, alone.
    """

    storage: Storage
    c: int
    first: int = 0
    joined: bool = False
    top: int = 0
    rows: int | None = None

    @property
    def h(self) -> int:
        return 1 if self.joined else self.storage.h if self.rows is None else self.rows

    @property
    def w(self) -> int:
        return 1 if self.joined else self.storage.w

    def tensor(self) -> Tensor:
        """For the engine; its offset counts from the start of the storage."""
        s = self.storage
        return Tensor(
            offset=s.lead + (self.top * s.row + self.first) * s.type.bytes,
            type=s.type,
            h=self.h,
            w=self.w,
            c=self.c,
            pixel=self.c if self.joined else s.pixel,
            row=self.c if self.joined else s.row,
            border=s.border,
        )


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """An op.  `settings` are the numbers of ferrotype.h's ft_op, by name.

    `band` and `before`: which rows of an image it makes, and how many have been added up; a band
    shares the rest with the others.
    """

    name: str
    kind: Kind
    out: Value
    a: Value
    b: Value | None = None
    c: Value | None = None
    add: Value | None = None
    weight: Packed | None = None
    bias: Packed | None = None
    act: Act = Act.NONE
    settings: Mapping[str, float] = field(default_factory=dict)
    band: int = 0
    before: int = 0

    @property
    def reads(self) -> tuple[Value, ...]:
        return tuple(v for v in (self.a, self.b, self.c, self.add) if v is not None)

    def lower(self, weights: Mapping[str, Weight]) -> Op:
        """For the engine; tensors have offsets within their storage, and scratch is missing."""
        op = Op(kind=self.kind, act=self.act, band=self.band, size=self.before)
        for name in ("out", "a", "b", "c", "add"):
            if value := getattr(self, name):
                tensor = value.tensor()
                if self.kind in (Kind.LOAD, Kind.STORE) and value.storage.planar:
                    tensor.pixel = value.storage.h * value.storage.w  # from plane to plane
                setattr(op, name, tensor)
        if self.weight:
            place = weights[self.weight.name]
            op.weight, op.weight_type, op.narrow = place.offset, place.type, place.narrow
            if place.scales is not None:
                op.scales = place.scales
        if self.bias:
            op.bias = weights[self.bias.name].offset
        for name, number in self.settings.items():
            setattr(op, name, number)
        return op


@dataclass(frozen=True)
class Input:
    """An array that comes in, as `shape`; what is stored is `shift` more."""

    name: str
    shape: tuple[int, ...]
    value: Value
    shift: float = 0.0


@dataclass(frozen=True)
class Output:
    """An array that goes out, as `shape`; channels that the graph does not compute are `fill`."""

    name: str
    shape: tuple[int, ...]
    value: Value
    fill: float = 0.0


@dataclass(frozen=True)
class Graph:
    """All that a network computes for inputs of one size."""

    nodes: tuple[Node, ...]
    packed: tuple[Packed, ...]  # in the order of execution
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]

    def narrowed(self) -> Graph:
        """The same with long self-attentions in products of int8."""
        nodes = (
            replace(node, settings={**node.settings, "narrow": 1})
            if node.kind is Kind.ATTENTION and node.reads[1].h * node.reads[1].w >= NARROW_KEYS
            else node
            for node in self.nodes
        )
        return replace(self, nodes=tuple(nodes))


# --- the builder --------------------------------------------------------------------------------


class Net:
    """Collects ops.  Methods return the op's output, of the type of activations if not said.

    `name` is that of a layer of the checkpoint: weights are `<name>.weight` and `<name>.bias`.
    """

    def __init__(self, type: Type) -> None:
        self.type = type
        self._nodes: list[Node] = []
        self._packed: dict[str, Packed] = {}
        self._inputs: list[Input] = []
        self._outputs: list[Output] = []

    def graph(self) -> Graph:
        """All ops so far."""
        self._widen()
        return Graph(
            tuple(self._nodes),
            tuple(self._packed.values()),
            tuple(self._inputs),
            tuple(self._outputs),
        )

    # --- what comes in and goes out -------------------------------------------------------------

    def image_input(self, name: str, c: int, h: int, w: int, shift: float = 0.0) -> Value:
        """Planar float32, (1, c, h, w)."""
        return self._input(name, (1, c, h, w), Storage(h, w, c, Type.F32, planar=True), shift)

    def token_input(self, name: str, tokens: int, c: int) -> Value:
        """Tokens of the type of activations, (1, tokens, c)."""
        return self._input(name, (1, tokens, c), Storage(1, tokens, c, self.type))

    def vector_input(self, name: str, c: int) -> Value:
        """Float32, (1, c)."""
        return self._input(name, (1, c), Storage(1, 1, c, Type.F32))

    def number_input(self, name: str, shape: tuple[int, ...], type: Type = Type.F32) -> Value:
        """Plain numbers, or ids."""
        return self._input(name, shape, Storage(1, math.prod(shape), 1, type, planar=True))

    def image_output(
        self, name: str, x: Value, channels: int | None = None, fill: float = 0.0
    ) -> None:
        """Planar float32, (1, channels, h, w)."""
        shape = (1, channels or x.c, x.h, x.w)
        self._outputs.append(Output(name, shape, x, fill))

    def token_output(self, name: str, x: Value) -> None:
        """(1, tokens, c)."""
        self._outputs.append(Output(name, (1, x.w, x.c), x))

    def vector_output(self, name: str, x: Value) -> None:
        """(1, c)."""
        self._outputs.append(Output(name, (1, x.c), x))

    def _input(
        self, name: str, shape: tuple[int, ...], storage: Storage, shift: float = 0.0
    ) -> Value:
        value = Value(storage, storage.c)
        self._inputs.append(Input(name, shape, value, shift))
        return value

    # --- ops ------------------------------------------------------------------------------------

    def load(self, x: Value, act: Act = Act.NONE, scale: float = 1.0) -> Value:
        """Channels-last of a planar image: act(x) * scale."""
        return self._op("load", Kind.LOAD, self._new(x.h, x.w, x.c), x, act=act, x=scale)

    def store(self, x: Value, scale: float = 1.0, shift: float = 0.0) -> Value:
        """Planar float32 of an image: x * scale + shift."""
        out = Value(Storage(x.h, x.w, x.c, Type.F32, planar=True), x.c)
        return self._op("store", Kind.STORE, out, x, x=scale, y=shift)

    def conv(
        self,
        name: str,
        x: Value,
        outputs: int,
        *,
        stride: int = 1,
        pad: int = 1,
        upsample: bool = False,
        bias: bool = True,
        act: Act = Act.NONE,
        add: Value | None = None,
        residual: Value | None = None,
        late: bool = False,
        type: Type | None = None,
    ) -> Value:
        """3x3: act(conv(x) + bias + add) + residual; `late`: act after the residual.

        Pad 0 is asymmetric, a row and a column of zeros below and to the right only.  With
        `upsample`, x is doubled first (nearest).
        """
        x.storage.border = True
        h, w = ((n + 2 * pad - 3 + (1 - pad)) // stride + 1 for n in (x.h, x.w))
        if upsample:
            h, w = 2 * x.h, 2 * x.w
        form = "upsample" if upsample else "matmul"
        return self._op(
            name,
            Kind.MATMUL,
            self._new(h, w, outputs, type),
            x,
            c=residual,
            add=add,
            weight=self._ask(f"{name}.weight", form, (f"{name}.weight",), outputs, (x.c,), 3),
            bias=self._vector(f"{name}.bias", outputs) if bias else None,
            act=act,
            side=3,
            stride=stride,
            pad=pad,
            upsample=upsample,
            late=late,
            winograd=stride == 1 and not upsample,
        )

    def linear(
        self,
        name: str,
        x: Value,
        outputs: int,
        *,
        b: Value | None = None,
        inputs: tuple[int, ...] | None = None,
        parts: tuple[str, ...] = (),
        bias: bool = True,
        act: Act = Act.NONE,
        residual: Value | None = None,
        late: bool = False,
        type: Type | None = None,
    ) -> Value:
        """act(x | b times weight + bias) + residual for every pixel.

        `late`: act after the residual.  `inputs`: the pieces of the weight's, where padding is
        between them in x or b.  `parts`: layers whose outputs lie side by side, `name` is of all.
        """
        layers = parts or (name,)
        inputs = inputs or tuple(v.c for v in (x, b) if v is not None)
        weights = tuple(f"{layer}.weight" for layer in layers)
        biases = tuple(f"{layer}.bias" for layer in layers)
        return self._op(
            name,
            Kind.MATMUL,
            self._new(x.h, x.w, outputs, type or x.storage.type),
            x,
            b=b,
            c=residual,
            weight=self._ask(f"{name}.weight", "matmul", weights, outputs, inputs),
            bias=self._ask(f"{name}.bias", "vector", biases, outputs) if bias else None,
            act=act,
            side=1,
            stride=1,
            late=late,
        )

    def geglu(self, name: str, x: Value, outputs: int) -> Value:
        """value * gelu(gate), both of `outputs` channels from one linear layer."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        return self._op(
            name,
            Kind.MATMUL,
            self._new(x.h, x.w, outputs),
            x,
            weight=self._ask(weight, "geglu", (weight,), 2 * outputs, (x.c,)),
            bias=self._ask(bias, "geglu_vector", (bias,), 2 * outputs),
            side=1,
            stride=1,
            geglu=1,
        )

    def project(
        self, prefix: str, x: Value, parts: tuple[str, ...], outputs: int, bias: bool
    ) -> tuple[Value, ...]:
        """Linear layers of x with `outputs` each: slices of one product where they are aligned."""
        layers = tuple(f"{prefix}.{part}" for part in parts)
        if len(layers) == 1 or outputs % SLICE:
            return tuple(self.linear(layer, x, outputs, bias=bias) for layer in layers)
        name = f"{prefix}.{'_'.join(parts)}"
        joined = self.linear(name, x, len(layers) * outputs, parts=layers, bias=bias)
        return tuple(Value(joined.storage, outputs, i * outputs) for i in range(len(layers)))

    def group_norm(
        self,
        name: str,
        x: Value,
        groups: int,
        eps: float,
        act: Act = Act.NONE,
        b: Value | None = None,
    ) -> Value:
        """act(group_norm(x | b)), which has the channels of both."""
        channels = x.c + (b.c if b else 0)
        if channels % groups:
            raise GraphError(f"{name}: {channels} channels are not divisible by {groups} groups")
        if b and x.c % LANES:
            raise GraphError(f"{name}: {x.c} channels before a skip are no multiple of {LANES}")
        return self._norm(name, Kind.GROUP_NORM, channels, x, b, act, eps, groups)

    def layer_norm(self, name: str, x: Value, eps: float) -> Value:
        """Over the channels of each pixel."""
        return self._norm(name, Kind.LAYER_NORM, x.c, x, None, Act.NONE, eps)

    def attention(
        self, name: str, q: Value, k: Value, v: Value, heads: int, causal: bool = False
    ) -> Value:
        """softmax(q k^T / sqrt(size)) v by heads; all pixels are one sequence."""
        if q.c % heads:
            raise GraphError(f"{name}: {q.c} channels are not divisible by {heads} heads")
        size = q.c // heads
        return self._op(
            name,
            Kind.ATTENTION,
            self._new(q.h, q.w, q.c),
            q,
            b=k,
            c=v,
            heads=heads,
            size=size,
            causal=causal,
            scale=size**-0.5,
        )

    def embedding(
        self, name: str, ids: Value, rows: int, c: int, table: str, positions: str, length: int
    ) -> Value:
        """The row of `table` of every id, plus the row of `positions` of its place."""
        weight = self._ask(f"{table}.weight", "table", (f"{table}.weight",), rows, (c,))
        position = f"{positions}.weight"
        bias = self._ask(position, "table", (position,), length, (c,))
        out = self._new(1, ids.w, c)
        return self._op(name, Kind.EMBEDDING, out, ids, weight=weight, bias=bias, size=rows)

    def sinusoid(self, name: str, numbers: Value, c: int, flip: bool, shift: float) -> Value:
        """c cosines and sines of every number, in float32; `flip`: sines first."""
        out = self._new(1, numbers.w, c, Type.F32)
        return self._op(name, Kind.SINUSOID, out, numbers, flip=flip, x=shift)

    def pick(self, name: str, x: Value, ids: Value, id: int) -> Value:
        """The token of x where the first `id` is among ids; -1: the largest."""
        return self._op(name, Kind.PICK, self._new(1, 1, x.c), x, b=ids, size=id)

    def join(self, x: Value) -> Value:
        """All pixels of x, padding included, as the channels of one: no op."""
        s = x.storage
        return Value(s, s.h * s.w * s.pixel, joined=True)

    # --- inside ---------------------------------------------------------------------------------

    def _widen(self) -> None:
        """Give a border to what a norm reads last and returns with one: it can work in place."""
        last = {v.storage: node for node in self._nodes for v in node.reads}
        kept = {output.value.storage for output in self._outputs}
        for node in reversed(self._nodes):
            a, out = node.a.storage, node.out.storage
            if node.kind is Kind.GROUP_NORM and not node.b and out.border:
                a.border = a.border or (last[a] is node and a not in kept)

    def _new(self, h: int, w: int, c: int, type: Type | None = None) -> Value:
        return Value(Storage(h, w, c, self.type if type is None else type), c)

    def _norm(
        self,
        name: str,
        kind: Kind,
        channels: int,
        x: Value,
        b: Value | None,
        act: Act,
        eps: float,
        groups: int = 0,
    ) -> Value:
        gamma, beta = (self._vector(f"{name}.{part}", channels) for part in ("weight", "bias"))
        out = self._new(x.h, x.w, channels)
        return self._op(
            name, kind, out, x, b=b, weight=gamma, bias=beta, act=act, x=eps, groups=groups
        )

    def _vector(self, name: str, outputs: int) -> Packed:
        return self._ask(name, "vector", (name,), outputs)

    def _ask(
        self,
        name: str,
        form: str,
        sources: tuple[str, ...],
        outputs: int,
        inputs: tuple[int, ...] = (),
        side: int = 1,
    ) -> Packed:
        if name in self._packed:
            raise AssertionError(f"{name} is asked for twice")
        self._packed[name] = Packed(name, form, sources, outputs, inputs, side)
        return self._packed[name]

    def _op(
        self,
        name: str,
        kind: Kind,
        out: Value,
        a: Value,
        *,
        b: Value | None = None,
        c: Value | None = None,
        add: Value | None = None,
        weight: Packed | None = None,
        bias: Packed | None = None,
        act: Act = Act.NONE,
        **settings: float,
    ) -> Value:
        self._nodes.append(Node(name, kind, out, a, b, c, add, weight, bias, act, settings))
        return out
