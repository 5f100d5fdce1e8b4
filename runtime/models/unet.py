"""The U-Net of Stable Diffusion 1, 2 and XL: diffusers' UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...bundle import TIME_IDS
from ...kernels import Act, Type
from ..program import GraphError, Net, Value, check_fields
from .blocks import Norm, activation, attention, per_block, resnet

WHERE = "unet"
ONLY = {  # config field -> the values that are computed
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (0, 1),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
PLAIN = ("DownBlock2D", "UpBlock2D")
CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
ATTENTION_EPS = 1e-6  # of the group norm before a transformer
LAYER_EPS = 1e-5


@dataclass(frozen=True)
class Level:
    """One resolution, on the way down or up."""

    channels: int
    resnets: int
    heads: int
    depths: tuple[int, ...]  # transformer layers after each resnet; empty: there are none
    only_cross: bool


@dataclass(frozen=True)
class Shared:
    """What every block reads."""

    norm: Norm
    time: Value  # (1, 1, c) float32, after the activation
    context: Value  # (1, tokens, c)


def unet(net: Net, config: Mapping[str, Any], height: int, width: int, tokens: int) -> None:
    """sample (1, 4, h, w), timestep, encoder_hidden_states (1, tokens, c) -> out_sample, as sample.

    SDXL's also reads text_embeds and time_ids, a distilled one timestep_cond.
    """
    check_fields(WHERE, config, ONLY)
    down, up = _levels(config)
    step = 2 ** (len(down) - 1)
    if height % step or width % step:
        raise GraphError(f"{WHERE}: {width}x{height} latents are no multiples of {step}")
    norm = Norm(
        config.get("norm_num_groups", 32),
        config.get("norm_eps", 1e-5),
        activation(WHERE, config, "act_fn", "silu"),
    )
    sample = net.image_input("sample", config.get("in_channels", 4), height, width)
    timestep = net.number_input("timestep", ())
    context = net.token_input("encoder_hidden_states", tokens, context_width(config))
    time = _time_embedding(net, config, timestep, norm.act)
    shared = Shared(norm, time, context)

    x = net.conv("conv_in", net.load(sample), down[0].channels)
    skips = [x]
    for i, level in enumerate(down):
        x = _down(net, f"down_blocks.{i}", x, level, shared, skips)
        if i < len(down) - 1:
            name, pad = f"down_blocks.{i}.downsamplers.0.conv", config.get("downsample_padding", 1)
            x = net.conv(name, x, x.c, stride=2, pad=pad)
            skips.append(x)
    x = _mid(net, x, config, down[-1].heads, shared)
    for i, level in enumerate(up):
        x = _up(net, f"up_blocks.{i}", x, level, shared, skips)
        if i < len(up) - 1:
            x = net.conv(f"up_blocks.{i}.upsamplers.0.conv", x, x.c, upsample=True)
    x = net.group_norm("conv_norm_out", x, norm.groups, norm.eps, norm.act)
    x = net.conv("conv_out", x, config.get("out_channels", 4), type=Type.F32)
    net.image_output("out_sample", net.store(x))


# --- blocks -------------------------------------------------------------------------------------


def _down(net: Net, name: str, x: Value, level: Level, shared: Shared, skips: list[Value]) -> Value:
    """Resnets, each with its transformer; every result is also a skip connection."""
    for i in range(level.resnets):
        x = resnet(net, f"{name}.resnets.{i}", x, level.channels, shared.norm, shared.time)
        x = _transformer(net, f"{name}.attentions.{i}", x, level, i, shared)
        skips.append(x)
    return x


def _mid(net: Net, x: Value, config: Mapping[str, Any], heads: int, shared: Shared) -> Value:
    """Two resnets around a transformer; of smaller networks the first alone, or none of it."""
    kind = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if kind is None:
        return x
    if kind == "UNetMidBlock2D":
        return resnet(net, "mid_block.resnets.0", x, x.c, shared.norm, shared.time)
    layers = _depths(config)[-1]
    depth = layers[0] if isinstance(layers, (list, tuple)) else layers
    level = Level(x.c, 1, heads, (depth,), False)
    x = resnet(net, "mid_block.resnets.0", x, x.c, shared.norm, shared.time)
    x = _transformer(net, "mid_block.attentions.0", x, level, 0, shared)
    return resnet(net, "mid_block.resnets.1", x, x.c, shared.norm, shared.time)


def _up(net: Net, name: str, x: Value, level: Level, shared: Shared, skips: list[Value]) -> Value:
    """The same as down, beside the skip connections, the last one first."""
    for i in range(level.resnets):
        x = resnet(
            net, f"{name}.resnets.{i}", x, level.channels, shared.norm, shared.time, skips.pop()
        )
        x = _transformer(net, f"{name}.attentions.{i}", x, level, i, shared)
    return x


def _transformer(net: Net, name: str, x: Value, level: Level, index: int, shared: Shared) -> Value:
    """x + transformer layers over the pixels of x (h, w, c), if the level has any."""
    if not level.depths:
        return x
    y = net.group_norm(f"{name}.norm", x, shared.norm.groups, ATTENTION_EPS)
    y = net.linear(f"{name}.proj_in", y, x.c)
    for i in range(level.depths[index]):
        y = _layer(net, f"{name}.transformer_blocks.{i}", y, level, shared.context)
    return net.linear(f"{name}.proj_out", y, x.c, residual=x)


def _layer(net: Net, name: str, x: Value, level: Level, context: Value) -> Value:
    """Attention to the picture, attention to the text, and GEGLU; each is added to x (h, w, c)."""
    y = net.layer_norm(f"{name}.norm1", x, LAYER_EPS)
    around = context if level.only_cross else y
    x = attention(net, f"{name}.attn1", y, around, level.heads, residual=x)
    y = net.layer_norm(f"{name}.norm2", x, LAYER_EPS)
    x = attention(net, f"{name}.attn2", y, context, level.heads, residual=x)
    y = net.layer_norm(f"{name}.norm3", x, LAYER_EPS)
    y = net.geglu(f"{name}.ff.net.0.proj", y, 4 * x.c)
    return net.linear(f"{name}.ff.net.2", y, x.c, residual=x)


def _time_embedding(net: Net, config: Mapping[str, Any], timestep: Value, act: Act) -> Value:
    """What every resnet adds a projection of, with their activation applied: (1, 1, c) float32."""
    first = block_channels(config)[0]
    width = config.get("time_embedding_dim") or 4 * first
    flip, shift = not config.get("flip_sin_to_cos", True), config.get("freq_shift", 0)
    x = net.sinusoid("time_proj", timestep, first, flip, shift)
    if config.get("time_cond_proj_dim") is not None:
        guidance = net.vector_input("timestep_cond", config["time_cond_proj_dim"])
        x = net.linear("time_embedding.cond_proj", guidance, first, bias=False, residual=x)
    x = net.linear("time_embedding.linear_1", x, width, act=act)
    if config.get("addition_embed_type") is None:
        return net.linear("time_embedding.linear_2", x, width, act=act)
    x = net.linear("time_embedding.linear_2", x, width)
    each, pooled = config["addition_time_embed_dim"], pooled_width(config)
    text = net.vector_input("text_embeds", pooled)
    ids = net.number_input("time_ids", (1, TIME_IDS))
    waves = net.join(net.sinusoid("add_time_proj", ids, each, flip, shift))
    inputs = (pooled, *(each,) * TIME_IDS)
    name = "add_embedding"
    y = net.linear(f"{name}.linear_1", text, width, b=waves, inputs=inputs, act=Act.SILU)
    return net.linear(f"{name}.linear_2", y, width, residual=x, act=act, late=True)


# --- config -------------------------------------------------------------------------------------


def _levels(config: Mapping[str, Any]) -> tuple[list[Level], list[Level]]:
    """The resolutions on the way down, and on the way up from the lowest."""
    channels = block_channels(config)
    count = len(channels)
    kinds = {
        way: list(config.get(f"{way}_block_types", ()))
        or [CROSS[i]] * (count - 1) + [PLAIN[i]]  # diffusers' default
        for i, way in enumerate(("down", "up"))
    }
    if "up_block_types" not in config:
        kinds["up"].reverse()
    resnets = per_block(WHERE, config, "layers_per_block", 2, count)
    # SD 1's name for the number of heads, which everyone has kept
    field = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
    heads = per_block(WHERE, config, field, 8, count)
    only = per_block(WHERE, config, "only_cross_attention", False, count)
    depths = _depths(config)
    upward = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    down = [
        _level(kinds["down"][i], channels[i], resnets[i], heads[i], depths[i], only[i])
        for i in range(count)
    ]
    up = [
        _level(kinds["up"][i], channels[~i], resnets[~i] + 1, heads[~i], upward[i], only[~i])
        for i in range(count)
    ]
    return down, up


def _level(
    kind: str, channels: int, resnets: int, heads: int, depth: Any, only_cross: bool
) -> Level:
    if kind not in PLAIN + CROSS:
        raise GraphError(f"{WHERE}: no block {kind}, only {', '.join(PLAIN + CROSS)}")
    depths = tuple(depth) if isinstance(depth, (list, tuple)) else (depth,) * resnets
    return Level(channels, resnets, heads, depths if kind in CROSS else (), only_cross)


def _depths(config: Mapping[str, Any]) -> list:
    """Transformer layers by level; of one, a number or a list by resnet."""
    return per_block(WHERE, config, "transformer_layers_per_block", 1, len(block_channels(config)))


def block_channels(config: Mapping[str, Any]) -> list[int]:
    """By level, from the highest resolution down."""
    return list(config.get("block_out_channels", (320, 640, 1280, 1280)))


def context_width(config: Mapping[str, Any]) -> int:
    """Channels of the text."""
    widths = config.get("cross_attention_dim", 1280)
    found = set(widths) if isinstance(widths, (list, tuple)) else {widths}
    if len(found) != 1:
        raise GraphError(f"{WHERE}: cross_attention_dim is {widths}; only one width is supported")
    return found.pop()


def pooled_width(config: Mapping[str, Any]) -> int:
    """Channels of SDXL's pooled text."""
    both = config["projection_class_embeddings_input_dim"]
    return both - TIME_IDS * config["addition_time_embed_dim"]
