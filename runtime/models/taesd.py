"""The tiny autoencoder TAESD: diffusers' AutoencoderTiny, decoder and encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...kernels import Act, Type
from ..program import GraphError, Net, Value, check_fields
from .blocks import activation

ONLY = {  # config field -> the values that are computed
    "upsampling_scaling_factor": (2,),
    "upsample_fn": ("nearest",),
    "shift_factor": (None, 0),
}
LOG_VARIANCE = -30.0  # where AutoencoderKL clips it: nothing is drawn around the latents


def decoder(net: Net, config: Mapping[str, Any], height: int, width: int) -> None:
    """latent_sample (1, 4, h, w) -> sample (1, 3, 8 h, 8 w) in -1..1."""
    channels, blocks, act = _check("vae_decoder", config, "decoder", (3, 3, 3, 1))
    latents = net.image_input("latent_sample", config.get("latent_channels", 4), height, width)
    x = net.load(latents, Act.TANH3)
    x = net.conv("decoder.layers.0", x, channels, act=act)
    layer = 2  # the activation is a layer of its own
    for count in blocks[:-1]:
        for _ in range(count):
            x = _block(net, f"decoder.layers.{layer}", x, act)
            layer += 1
        x = net.conv(f"decoder.layers.{layer + 1}", x, channels, upsample=True, bias=False)
        layer += 2  # and so is doubling
    for _ in range(blocks[-1]):
        x = _block(net, f"decoder.layers.{layer}", x, act)
        layer += 1
    x = net.conv(f"decoder.layers.{layer}", x, config.get("out_channels", 3), type=Type.F32)
    net.image_output("sample", net.store(x, 2.0, -1.0))


def encoder(net: Net, config: Mapping[str, Any], height: int, width: int) -> None:
    """sample (1, 3, h, w) in -1..1 -> latent_parameters (1, 8, h/8, w/8).

    The latents, and beside them the log variance of what is certain.
    """
    channels, blocks, act = _check("vae_encoder", config, "encoder", (1, 3, 3, 3))
    # The network reads 0..1, and pads with that zero.
    sample = net.image_input("sample", config.get("in_channels", 3), height, width, shift=1.0)
    x = net.load(sample, scale=0.5)
    layer = 0
    for i, count in enumerate(blocks):
        stride = 2 if i else 1
        x = net.conv(f"encoder.layers.{layer}", x, channels, stride=stride, bias=i == 0)
        layer += 1
        for _ in range(count):
            x = _block(net, f"encoder.layers.{layer}", x, act)
            layer += 1
    latents = config.get("latent_channels", 4)
    x = net.conv(f"encoder.layers.{layer}", x, latents, type=Type.F32)
    net.image_output("latent_parameters", net.store(x), 2 * latents, LOG_VARIANCE)


def _check(
    where: str, config: Mapping[str, Any], half: str, default: tuple[int, ...]
) -> tuple[int, list[int], Act]:
    """The channels, the blocks of every resolution, and the activation."""
    check_fields(where, config, ONLY)
    blocks = list(config.get(f"num_{half}_blocks", default))
    name = f"{half}_block_out_channels"
    channels = list(config.get(name, (64,) * len(blocks)))
    if len(channels) != len(blocks) or len(set(channels)) != 1:
        raise GraphError(
            f"{where}: {name} is {channels}; the native engine needs one number of channels for "
            f"all {len(blocks)} resolutions"
        )
    return channels[0], blocks, activation(where, config, "act_fn", "relu")


def _block(net: Net, name: str, x: Value, act: Act) -> Value:
    """relu(x + three convolutions of x), (h, w, c) -> (h, w, c)."""
    y = net.conv(f"{name}.conv.0", x, x.c, act=act)
    y = net.conv(f"{name}.conv.2", y, x.c, act=act)
    return net.conv(f"{name}.conv.4", y, x.c, residual=x, act=Act.RELU, late=True)
