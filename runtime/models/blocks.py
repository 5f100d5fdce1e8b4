"""Blocks that the U-Net and the autoencoder share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...kernels import Act
from ..program import GraphError, Net, Value

ACTS = {
    "silu": Act.SILU,
    "swish": Act.SILU,
    "gelu": Act.GELU,
    "relu": Act.RELU,
    "quick_gelu": Act.QUICK_GELU,
}


class Norm(NamedTuple):
    """How a network's group norms are: each is followed by `act` where that is fused."""

    groups: int
    eps: float
    act: Act


def activation(where: str, config: Mapping[str, Any], name: str, default: str) -> Act:
    """The activation function that a config field names."""
    value = config.get(name, default)
    if value not in ACTS:
        raise GraphError(
            f"{where}: {name} is {value!r}; the native engine has only {', '.join(ACTS)}"
        )
    return ACTS[value]


def per_block(where: str, config: Mapping[str, Any], name: str, default: Any, count: int) -> list:
    """A config field that is one value for all blocks, or a list with one for each."""
    value = config.get(name, default)
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise GraphError(f"{where}: {name} has {len(values)} values for {count} blocks")
    return values


def resnet(
    net: Net,
    name: str,
    x: Value,
    outputs: int,
    norm: Norm,
    time: Value | None = None,
    skip: Value | None = None,
) -> Value:
    """(h, w, c | skip's) -> (h, w, outputs).

    The shortcut comes first: x and skip need not be kept for it, and norm1 may work in place.
    """
    shortcut = x
    if x.c + (skip.c if skip else 0) != outputs:
        shortcut = net.linear(f"{name}.conv_shortcut", x, outputs, b=skip)
    elif skip:
        raise GraphError(f"{name}: a skip connection without conv_shortcut is not supported")
    y = net.group_norm(f"{name}.norm1", x, norm.groups, norm.eps, norm.act, skip)
    added = net.linear(f"{name}.time_emb_proj", time, outputs) if time else None
    y = net.conv(f"{name}.conv1", y, outputs, add=added)
    y = net.group_norm(f"{name}.norm2", y, norm.groups, norm.eps, norm.act)
    return net.conv(f"{name}.conv2", y, outputs, residual=shortcut)


def attention(
    net: Net,
    name: str,
    x: Value,
    context: Value,
    heads: int,
    residual: Value,
    bias: bool = False,
) -> Value:
    """residual + attention of x (h, w, c) to the pixels or tokens of `context`."""
    if context is x:
        q, k, v = net.project(name, x, ("to_q", "to_k", "to_v"), x.c, bias)
    else:
        (q,) = net.project(name, x, ("to_q",), x.c, bias)
        k, v = net.project(name, context, ("to_k", "to_v"), x.c, bias)
    y = net.attention(name, q, k, v, heads)
    return net.linear(f"{name}.to_out.0", y, x.c, residual=residual)
