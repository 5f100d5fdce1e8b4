"""Stable Diffusion's autoencoder: diffusers' AutoencoderKL, decoder and encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...kernels import Type
from ..program import GraphError, Net, Value, check_fields
from .blocks import Norm, activation, attention, resnet

ONLY = {  # config field -> the values that are computed
    "act_fn": ("silu", "swish"),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
}
EPS = 1e-6


def decoder(net: Net, config: Mapping[str, Any], height: int, width: int) -> None:
    """latent_sample (1, 4, h, w), divided by the scaling factor -> sample (1, 3, 8 h, 8 w)."""
    norm, channels, layers = _check("vae_decoder", config)
    latents = config.get("latent_channels", 4)
    x = net.load(net.image_input("latent_sample", latents, height, width))
    if config.get("use_post_quant_conv", True):
        x = net.linear("post_quant_conv", x, latents)
    x = net.conv("decoder.conv_in", x, channels[-1])
    x = _mid(net, "decoder.mid_block", x, norm, config)
    for i, outputs in enumerate(reversed(channels)):
        for j in range(layers + 1):
            x = resnet(net, f"decoder.up_blocks.{i}.resnets.{j}", x, outputs, norm)
        if i < len(channels) - 1:
            name = f"decoder.up_blocks.{i}.upsamplers.0.conv"
            x = net.conv(name, x, outputs, upsample=True)
    x = net.group_norm("decoder.conv_norm_out", x, norm.groups, EPS, norm.act)
    x = net.conv("decoder.conv_out", x, config.get("out_channels", 3), type=Type.F32)
    net.image_output("sample", net.store(x))


def encoder(net: Net, config: Mapping[str, Any], height: int, width: int) -> None:
    """sample (1, 3, h, w) in -1..1 -> latent_parameters (1, 8, h/8, w/8): means, log variances."""
    norm, channels, layers = _check("vae_encoder", config)
    scale = 2 ** (len(channels) - 1)
    if height % scale or width % scale:
        raise GraphError(f"vae_encoder: {width}x{height} pixels are no multiples of {scale}")
    x = net.load(net.image_input("sample", config.get("in_channels", 3), height, width))
    x = net.conv("encoder.conv_in", x, channels[0])
    for i, outputs in enumerate(channels):
        for j in range(layers):
            x = resnet(net, f"encoder.down_blocks.{i}.resnets.{j}", x, outputs, norm)
        if i < len(channels) - 1:
            name = f"encoder.down_blocks.{i}.downsamplers.0.conv"
            x = net.conv(name, x, outputs, stride=2, pad=0)
    x = _mid(net, "encoder.mid_block", x, norm, config)
    x = net.group_norm("encoder.conv_norm_out", x, norm.groups, EPS, norm.act)
    parameters = 2 * config.get("latent_channels", 4)
    quantized = config.get("use_quant_conv", True)
    x = net.conv("encoder.conv_out", x, parameters, type=None if quantized else Type.F32)
    if quantized:
        x = net.linear("quant_conv", x, parameters, type=Type.F32)
    net.image_output("latent_parameters", net.store(x))


def _check(where: str, config: Mapping[str, Any]) -> tuple[Norm, list[int], int]:
    """How the norms are, the channels of each block, and the resnets in one."""
    check_fields(where, config, ONLY)
    channels = list(config.get("block_out_channels", (64,)))
    for kind in ("DownEncoderBlock2D", "UpDecoderBlock2D"):
        field = "down_block_types" if kind.startswith("Down") else "up_block_types"
        check_fields(
            where, {field: list(config.get(field, ()))}, {field: ([kind] * len(channels),)}
        )
    act = activation(where, config, "act_fn", "silu")
    norm = Norm(config.get("norm_num_groups", 32), EPS, act)
    return norm, channels, config.get("layers_per_block", 1)


def _mid(net: Net, name: str, x: Value, norm: Norm, config: Mapping[str, Any]) -> Value:
    """Two resnets around attention with one head, (h, w, c) -> (h, w, c)."""
    x = resnet(net, f"{name}.resnets.0", x, x.c, norm)
    if config.get("mid_block_add_attention", True):
        layer = f"{name}.attentions.0"
        y = net.group_norm(f"{layer}.group_norm", x, norm.groups, EPS)
        x = attention(net, layer, y, y, 1, residual=x, bias=True)
    return resnet(net, f"{name}.resnets.1", x, x.c, norm)
