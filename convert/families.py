"""Configs of a single file's components: read off the shapes of its tensors, the rest published.

Names are the original ones, without the prefix of the component.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..bundle import TIME_IDS
from .errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

HEAD = 64  # channels of an attention head: of CLIP, and of U-Nets with linear projections
HEADS = 8  # of Stable Diffusion 1's U-Net at every level
OPEN_CLIP_WIDTH = 1024  # from here on it is OpenCLIP's, whatever its tensors are called
OPEN_CLIP_H_LAYERS = 24  # Stable Diffusion 2 reads the states before the last one
UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
}
VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "norm_num_groups": 32}
TAESD = {
    "_class_name": "AutoencoderTiny",
    "act_fn": "relu",
    "upsampling_scaling_factor": 2,
    "scaling_factor": 1.0,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
}
CLIP = {"model_type": "clip_text_model", "attention_dropout": 0.0, "layer_norm_eps": 1e-5}
SCALING = {"sdxl": 0.13025}  # by family: what latents are multiplied by
USUAL_SCALING = 0.18215
SIDE = {"sdxl": 128, "v_prediction": 96}  # latents of the sizes that were trained
USUAL_SIDE = 64
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
PREDICTIONS = ("epsilon", "v_prediction")
ASSUMED = {"sd2": "v_prediction"}  # where nothing in a file tells: 2.0, 2.1 and what came of them
MARKS = ("v_pred", "ztsnr")  # tensors that only say by being there how a model was trained


@dataclass(frozen=True)
class Block:
    """One of the U-Net's numbered blocks."""

    channels: int
    depth: int  # transformer layers


def unet(shapes: Shapes) -> dict[str, Any]:
    """The config of a U-Net, but for the size that it was trained at."""
    inputs = _shape(shapes, "input_blocks.0.0.weight", 4)[1]
    down = _levels(shapes, "input_blocks", 1, (".0.op.weight",), own=True)
    up = _levels(shapes, "output_blocks", 0, (".1.conv.weight", ".2.conv.weight"), own=False)
    if [len(level) + 1 for level in down] != [len(level) for level in reversed(up)]:
        raise CheckpointError(
            f"unet: blocks of {[len(level) for level in down]} on the way down and of "
            f"{[len(level) for level in up]} up do not belong together; some are missing"
        )
    channels = [level[0].channels for level in down]
    layers = [len(level) for level in down]
    transformers = [n for n in shapes if n.endswith("attn2.to_k.weight")]
    if not transformers:
        raise CheckpointError("unet: no layer reads the text; that is no Stable Diffusion")
    linear = len(_shape(shapes, transformers[0].split("transformer_blocks")[0] + "proj_in.weight"))
    return {
        **UNET,
        "in_channels": inputs,
        "out_channels": _shape(shapes, "out.2.weight", 4)[0],
        "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "cross_attention_dim": _shape(shapes, transformers[0], 2)[1],
        "use_linear_projection": linear == 2,
        "attention_head_dim": [max(1, c // HEAD) for c in channels] if linear == 2 else HEADS,
        **_attention(shapes, down, up),
        **_embeddings(shapes),
    }


def vae(shapes: Shapes) -> dict[str, Any]:
    """The config of an AutoencoderKL, but for its scaling factor."""
    levels = _numbers(shapes, "encoder.down")
    first = [_numbers(shapes, f"encoder.down.{i}.block") for i in levels]
    if len({len(blocks) for blocks in first}) != 1 or not first[0]:
        raise CheckpointError(f"vae: levels of {[len(b) for b in first]} blocks; some are missing")
    channels = [_shape(shapes, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in levels]
    return {
        **VAE,
        "in_channels": _shape(shapes, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(shapes, "decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(shapes, "decoder.conv_in.weight", 4)[1],
        "block_out_channels": channels,
        "layers_per_block": len(first[0]),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "mid_block_add_attention": "decoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip(shapes: Shapes, projected: bool) -> dict[str, Any]:
    """The config of a text encoder with transformers' names; `projected` as SDXL's second is."""
    prefix = "" if "embeddings.token_embedding.weight" in shapes else "text_model."
    layers = f"{prefix}encoder.layers"
    config = _text(
        shapes,
        f"{prefix}embeddings.token_embedding.weight",
        f"{prefix}embeddings.position_embedding.weight",
        f"{layers}.0.mlp.fc1.weight",
        len(_numbers(shapes, layers)),
    )
    config["hidden_act"] = "gelu" if config["hidden_size"] >= OPEN_CLIP_WIDTH else "quick_gelu"
    if projected:
        config["projection_dim"] = _shape(shapes, "text_model.text_projection", 2)[1]
    return config


def open_clip(shapes: Shapes, projected: bool) -> dict[str, Any]:
    """The config of a text encoder with OpenCLIP's names; `projected` as SDXL's second is."""
    layers = len(_numbers(shapes, "transformer.resblocks"))
    if not projected and layers == OPEN_CLIP_H_LAYERS:
        layers -= 1
    config = _text(
        shapes,
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.0.mlp.c_fc.weight",
        layers,
    )
    if projected:
        config["projection_dim"] = _shape(shapes, "text_projection", 2)[1]
    return config | {"hidden_act": "gelu"}


def taesd(shapes: Shapes) -> dict[str, Any]:
    """The config of TAESD from diffusers' names of it: a convolution, then blocks by resolution."""
    config: dict[str, Any] = dict(TAESD)
    for half in ("encoder", "decoder"):
        blocks, run = [], 0
        layers = _positions(shapes, f"{half}.layers")
        for i in layers:
            if f"{half}.layers.{i}.conv.0.weight" in shapes:
                run += 1
            elif run:
                blocks.append(run)
                run = 0
        # the encoder begins with a block of its own, the decoder ends with one after doubling
        channels = _shape(shapes, f"{half}.layers.{layers[0]}.weight", 4)[0]
        config[f"num_{half}_blocks"] = blocks
        config[f"{half}_block_out_channels"] = [channels] * len(blocks)
    config["block_out_channels"] = config["decoder_block_out_channels"]
    config["in_channels"] = _shape(shapes, "encoder.layers.0.weight", 4)[1]
    last = _positions(shapes, "decoder.layers")[-1]
    config["out_channels"] = _shape(shapes, f"decoder.layers.{last}.weight", 4)[0]
    config["latent_channels"] = _shape(shapes, "decoder.layers.0.weight", 4)[1]
    return config


def scheduler(family: str, prediction: str, zero_snr: bool, consistency: bool) -> dict[str, Any]:
    """The scheduler that a family is published with, or one of the same kind."""
    if consistency:
        name = "LCMScheduler"
    elif zero_snr:
        name = "DDIMScheduler"
    else:
        name = "EulerDiscreteScheduler" if family == "sdxl" else "DPMSolverMultistepScheduler"
    config = SCHEDULER | {"_class_name": name, "prediction_type": prediction}
    if zero_snr:  # the first step must be the last of training
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


# --- parts of it --------------------------------------------------------------------------------


def _levels(
    shapes: Shapes, side: str, first: int, ends: Iterable[str], own: bool
) -> list[list[Block]]:
    """The numbered blocks by resolution; what ends one is in its last block, or on its own."""
    levels: list[list[Block]] = [[]]
    for i in _numbers(shapes, side)[first:]:
        name = f"{side}.{i}"
        is_end = any(name + end in shapes for end in ends)
        if not (is_end and own):
            channels = _shape(shapes, f"{name}.0.out_layers.3.weight", 4)[0]
            depth = len(_numbers(shapes, f"{name}.1.transformer_blocks"))
            levels[-1].append(Block(channels, depth))
        if is_end:
            levels.append([])
    if not all(levels):
        raise CheckpointError(f"unet: {side} has a resolution without blocks; some are missing")
    return levels


def _attention(shapes: Shapes, down: list[list[Block]], up: list[list[Block]]) -> dict[str, Any]:
    """Which levels have transformers, and how deep they are."""
    downward, upward = ([_depth(level) for level in way] for way in (down, up))
    middle = len(_numbers(shapes, "middle_block.1.transformer_blocks"))
    kind: str | None = "UNetMidBlock2DCrossAttn"
    if not middle:
        kind = "UNetMidBlock2D" if "middle_block.0.in_layers.0.weight" in shapes else None
    if middle and not downward[-1]:
        downward[-1] = middle  # that is where diffusers looks for it
    elif middle and middle != downward[-1]:
        raise CheckpointError(
            f"unet: the middle is {middle} layers deep, the level before it {downward[-1]}; "
            "only equal ones are supported"
        )
    depths = [depth or 1 for depth in downward]
    mirrored = [depth or 1 for depth in reversed(upward)]
    config: dict[str, Any] = {
        "down_block_types": _types("Down", down),
        "up_block_types": _types("Up", up),
        "mid_block_type": kind,
        "transformer_layers_per_block": depths,
    }
    differ = any(u and u != d for u, d in zip(reversed(upward), depths, strict=True))
    if differ or any(isinstance(depth, list) for depth in depths):
        config["reverse_transformer_layers_per_block"] = mirrored[::-1]
    return config


def _types(way: str, levels: list[list[Block]]) -> list[str]:
    return [
        f"CrossAttn{way}Block2D" if any(block.depth for block in level) else f"{way}Block2D"
        for level in levels
    ]


def _depth(level: list[Block]) -> Any:
    """Transformer layers after each resnet of a level: one number, or a list if they differ."""
    depths = [block.depth for block in level]
    if len(set(depths)) == 1:
        return depths[0]
    if 0 in depths:
        raise CheckpointError(
            f"unet: a level with transformers of {depths} layers; all or none must have one"
        )
    return depths


def _embeddings(shapes: Shapes) -> dict[str, Any]:
    """What is added to the time's embedding."""
    config: dict[str, Any] = {}
    if "label_emb.0.0.weight" in shapes:
        config["addition_embed_type"] = "text_time"
        width = _shape(shapes, "label_emb.0.0.weight", 2)[1]
        config["projection_class_embeddings_input_dim"] = width
    if "time_embedding.cond_proj.weight" in shapes:
        config["time_cond_proj_dim"] = _shape(shapes, "time_embedding.cond_proj.weight", 2)[1]
    return config


def add_pooled(unet: dict[str, Any], pooled: int) -> None:
    """Tell SDXL's U-Net how wide the pooled text is: the rest is for the sizes."""
    width = unet["projection_class_embeddings_input_dim"] - pooled
    unet["addition_time_embed_dim"] = width // TIME_IDS


def _text(shapes: Shapes, tokens: str, positions: str, fc1: str, layers: int) -> dict[str, Any]:
    vocabulary, width = _shape(shapes, tokens, 2)
    return {
        **CLIP,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(shapes, fc1, 2)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": _shape(shapes, positions, 2)[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def _shape(shapes: Shapes, name: str, rank: int | None = None) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointError(f"{name} is missing; the checkpoint is incomplete")
    if rank is not None and len(shape) != rank:
        raise CheckpointError(f"{name} is {shape}; it should have {rank} dimensions")
    return shape


def _numbers(shapes: Shapes, prefix: str) -> list[int]:
    """The numbers that follow a prefix: 0, 1, 2 ... without a gap."""
    found = _positions(shapes, prefix)
    if found != list(range(len(found))):
        missing = next(i for i, number in enumerate(found) if i != number)
        raise CheckpointError(f"{prefix}.{missing} is missing; the checkpoint is incomplete")
    return found


def _positions(shapes: Shapes, prefix: str) -> list[int]:
    start = len(prefix) + 1
    following = {n[start:].partition(".")[0] for n in shapes if n.startswith(f"{prefix}.")}
    return sorted(int(text) for text in following if text.isdecimal() and len(text) < 5)
