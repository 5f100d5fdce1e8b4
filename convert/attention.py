"""Attention as Apple devices like it: one batched product, or per head in channels-first layout."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .modules import quiet

QUERIES = 512  # rows of scores at a time in the split form; larger blocks leave the Neural Engine


def original(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float):
    """(batch, tokens, channels) each; all heads in one product, for GPUs."""
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    if abs(scale * q.shape[-1] ** 0.5 - 1) > 1e-6:
        q = q * (scale * q.shape[-1] ** 0.5)  # Core ML's operator has no scale of its own
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def split_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float):
    """(batch, channels, 1, tokens) each; head by head and QUERIES rows at a time.

    The last block of queries is as short as it comes out, so that every size is complete.
    https://machinelearning.apple.com/research/neural-engine-transformers
    """
    q = q * scale  # before the product: scores of the unscaled one may pass fp16's limit
    k, size = k.transpose(1, 3), q.shape[1] // heads
    outputs = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        blocks = [
            _one_head(q[:, own, :, first : first + QUERIES], k[..., own], v[:, own])
            for first in range(0, q.shape[3], QUERIES)
        ]
        outputs.append(torch.cat(blocks, 3) if len(blocks) > 1 else blocks[0])
    return torch.cat(outputs, 1) if heads > 1 else outputs[0]


def _one_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.einsum("bchq,bkhc->bkhq", q, k).softmax(1)
    return torch.einsum("bkhq,bchk->bchq", weights, v)


def use_split_einsum(module: torch.nn.Module) -> None:
    """Give every attention layer and transformer below `module` its channels-first form."""
    with quiet():
        from diffusers.models.attention_processor import Attention
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for layer in module.modules():
        if isinstance(layer, Transformer2DModel):
            layer.forward = partial(_transformer, layer)
            _as_convolutions(layer)
        elif isinstance(layer, Attention) and layer.group_norm is not None:  # the VAE's
            layer.forward = partial(_vae_attention, layer)
            _as_convolutions(layer)


def _as_convolutions(module: torch.nn.Module) -> None:
    """Linear weights as those of 1x1 convolutions, which is what the Neural Engine is built for."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(layer.weight[:, :, None, None], requires_grad=False)


def _transformer(t: Any, hidden_states, encoder_hidden_states=None, **_):
    """diffusers' Transformer2DModel with tokens last: (batch, channels, 1, tokens) throughout."""
    x = _apply(t.proj_in, t.norm(hidden_states)).flatten(2).unsqueeze(2)
    context = encoder_hidden_states.transpose(1, 2).unsqueeze(2)
    for block in t.transformer_blocks:
        normed = _layer_norm(block.norm1, x)
        x = x + _attend(block.attn1, normed, normed)
        x = x + _attend(block.attn2, _layer_norm(block.norm2, x), context)
        x = x + _feed_forward(block.ff, _layer_norm(block.norm3, x))
    x = x.reshape(hidden_states.shape[0], -1, *hidden_states.shape[2:])
    return (_apply(t.proj_out, x) + hidden_states,)


def _vae_attention(attn: Any, hidden_states, *_, **__):
    x = attn.group_norm(hidden_states.flatten(2)).unsqueeze(2)
    x = _attend(attn, x, x).reshape(hidden_states.shape)
    return (x + hidden_states) / attn.rescale_output_factor


def _attend(attn: Any, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    q, k, v = _apply(attn.to_q, x), _apply(attn.to_k, context), _apply(attn.to_v, context)
    return _apply(attn.to_out[0], split_einsum(q, k, v, attn.heads, attn.scale))


def _feed_forward(ff: Any, x: torch.Tensor) -> torch.Tensor:
    value, gate = _apply(ff.net[0].proj, x).chunk(2, 1)
    return _apply(ff.net[2], value * F.gelu(gate))


def _apply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear layer over axis 1, its weights already those of a convolution."""
    return F.conv2d(x, layer.weight, layer.bias)


def _layer_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Over axis 1 without moving it."""
    x = x - x.mean(1, keepdim=True)
    variance = x.square().mean(1, keepdim=True)
    x = x * (variance + norm.eps).rsqrt()
    return x * norm.weight[None, :, None, None] + norm.bias[None, :, None, None]
