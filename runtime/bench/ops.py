"""Ops of the native engine as a profile sees them: names, arithmetic, bytes, and the ceiling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ... import kernels
from ...kernels import Kind, Op, Type

if TYPE_CHECKING:
    from .worker import OpRun


def name(op: Op) -> str:
    """Kind and shape."""
    match Kind(op.kind):
        case Kind.MATMUL if op.side == 1:
            what = "linear, GEGLU" if op.geglu else "linear"
            inputs = f"{op.a.c}+{op.b.c}" if op.b.h else f"{op.a.c}"
            return f"{what} {op.out.h * op.out.w} x {inputs} -> {op.out.c}"
        case Kind.MATMUL:
            how = ", doubled before" if op.upsample else ", stride 2" if op.stride == 2 else ""
            return f"conv 3x3{how} {op.out.w}x{op.out.h} {op.a.c} -> {op.out.c}"
        case Kind.ATTENTION:
            tokens = f"{op.a.h * op.a.w} x {op.b.h * op.b.w}"
            return f"attention {tokens}, {op.heads} heads of {op.size}"
        case kind:
            return f"{kind.name.lower().replace('_', ' ')} {op.out.w}x{op.out.h}, {op.out.c}"


def flop(op: Op) -> float:
    """Of the direct method; norms and the like count as none."""
    pixels = op.out.h * op.out.w
    if op.kind == Kind.MATMUL:
        outputs = op.out.c * (2 if op.geglu else 1)
        return 2.0 * pixels * outputs * (op.a.c + op.b.c) * op.side**2
    if op.kind == Kind.ATTENTION:
        return 4.0 * pixels * op.b.h * op.b.w * op.a.c
    return 0.0


def moved(op: Op) -> float:
    """Bytes that are read and written at least."""
    tensors = (op.out, op.a, op.b, op.c)
    size = sum(t.h * t.w * t.c * Type(t.type).bytes for t in tensors)
    if op.kind == Kind.EMBEDDING:  # a row of the table for each token, not the table
        return 2.0 * size
    return float(size + (kernels.weight_bytes(op) if op.weight != kernels.NO_WEIGHT else 0))


def arithmetic(op: Op) -> Type:
    """What it multiplies: int8 where pixels are rounded to it, else what activations are."""
    return Type.I8 if op.narrow else Type(op.a.type)


def ceilings(isa: str, threads: int, seconds: float = 0.2) -> dict[str, float]:
    """FLOP/s by type of bare multiply-accumulates, measured now; types that `isa` has none for are
    computed as float32 and have its figure."""
    found = {k.name: kernels.ceiling(isa, k, threads, seconds) for k in CEILINGS}
    return {name: rate or found[Type.F32.name] for name, rate in found.items()}


CEILINGS = (Type.F32, Type.BF16, Type.I8)


def as_row(run: OpRun, began: float) -> list[Any]:
    """[component, layer, name, arithmetic, start, seconds, FLOP, bytes], for JSON."""
    op = run.op
    kind = arithmetic(op).name if flop(op) else ""
    return [
        *(run.component, run.layer, name(op), kind),
        *(run.start - began, run.seconds, flop(op), moved(op)),
    ]
