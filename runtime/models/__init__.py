"""Networks as graphs for the native engine, built from a checkpoint's config.  docs/engine.md.

The graph is the one source of truth: conversion packs what `weights` lists, and the engine looks
that up by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...bundle import TEXT_ENCODERS, TIME_IDS, Tensor
from ...kernels import Type
from ..program import Graph, GraphError, Net, Packed
from . import clip, taesd, unet, vae

Shapes = Mapping[str, tuple[int, ...]]
TINY = "AutoencoderTiny"
COMPONENTS = (*TEXT_ENCODERS, "unet", "vae_decoder", "vae_encoder")


def weights(
    component: str, config: Mapping[str, Any], outputs: Collection[str] | None = None
) -> list[Packed]:
    """What a component reads of its weights file, in the order of execution.

    `outputs`: those of a text encoder, if not all that `interface` names.  Raises GraphError for a
    config that is not supported.
    """
    side = 1 if component in TEXT_ENCODERS else 2 ** _levels(component, config)  # any size will do
    shapes = sizes(component, config, (side, side))
    return list(build(component, config, shapes, Type.F32, outputs).packed)


def build(
    component: str,
    config: Mapping[str, Any],
    shapes: Shapes,
    type: Type,
    outputs: Collection[str] | None = None,
) -> Graph:
    """The graph of a component for inputs of these shapes, computed in activations of `type`.

    `shapes` are by input as `sizes` gives them; batches are of one.  Raises GraphError.
    """
    net = Net(type)
    if component in TEXT_ENCODERS:
        found = interface(component, config)[1] if outputs is None else outputs
        clip.text_encoder(net, config, found)
    elif component == "unet":
        (_, _, height, width), (_, tokens, _) = (
            _shape(component, shapes, name, rank)
            for name, rank in (("sample", 4), ("encoder_hidden_states", 3))
        )
        unet.unet(net, config, height, width, tokens)
    elif component in ("vae_decoder", "vae_encoder"):
        family: Any = taesd if config.get("_class_name") == TINY else vae
        decodes = component == "vae_decoder"
        name = "latent_sample" if decodes else "sample"
        _, _, height, width = _shape(component, shapes, name, 4)
        (family.decoder if decodes else family.encoder)(net, config, height, width)
    else:
        raise GraphError(f"{component} is not a component; those are {', '.join(COMPONENTS)}")
    graph = net.graph()
    for tensor in graph.inputs:
        if tensor.name in shapes and tuple(shapes[tensor.name]) != tensor.shape:
            raise GraphError(
                f"{component}: {tensor.name} has the shape {tuple(shapes[tensor.name])}, the "
                f"network reads {tensor.shape}"
            )
    return graph


def sizes(
    component: str, config: Mapping[str, Any], size: tuple[int, int], tokens: int = 77
) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs; `size` is (width, height) in pixels for vae_encoder, else in latents.

    `tokens` are those of the text that a U-Net reads.
    """
    names = {"batch": 1, "width": size[0], "height": size[1], "sequence": tokens}
    inputs, _ = interface(component, config)
    return {
        name: tuple(names[n] if isinstance(n, str) else n for n in tensor.shape)
        for name, tensor in inputs.items()
    }


def interface(
    component: str, config: Mapping[str, Any], hidden_states: bool | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs as the ONNX target names them; the native engine's batches are of one.

    `hidden_states`: a text encoder returns the states before its last layer, as both of SDXL's do;
    if not said, text_encoder_2 does.
    """
    if component in TEXT_ENCODERS:
        penultimate = component == "text_encoder_2" if hidden_states is None else hidden_states
        return _text_interface(component, config, penultimate)
    if component == "unet":
        return _unet_interface(config)
    decodes, scale = component == "vae_decoder", 2 ** _levels(component, config)
    latents = config.get("latent_channels", 4)
    if decodes:
        image = (1, config.get("out_channels", 3), f"{scale} * height", f"{scale} * width")
        latent = _real(1, latents, "height", "width")
        return {"latent_sample": latent}, {"sample": _real(*image)}
    parameters = _real(1, 2 * latents, f"height // {scale}", f"width // {scale}")
    image = (1, config.get("in_channels", 3), "height", "width")
    return {"sample": _real(*image)}, {"latent_parameters": parameters}


def _text_interface(
    component: str, config: Mapping[str, Any], penultimate: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tokens, channels = config.get("max_position_embeddings", 77), config.get("hidden_size", 512)
    states = _real(1, tokens, channels)
    if penultimate:
        outputs = {f"hidden_states.{config.get('num_hidden_layers', 12) - 1}": states}
    else:
        outputs = {"last_hidden_state": states, "pooler_output": _real(1, channels)}
    if component == "text_encoder_2":
        outputs["text_embeds"] = _real(1, config.get("projection_dim", 512))
    return {"input_ids": Tensor("int64", (1, tokens))}, outputs


def _unet_interface(config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    inputs = {
        "sample": _real(1, config.get("in_channels", 4), "height", "width"),
        "timestep": _real(),
        "encoder_hidden_states": _real(1, "sequence", unet.context_width(config)),
    }
    if config.get("addition_embed_type") == "text_time":
        inputs["text_embeds"] = _real(1, unet.pooled_width(config))
        inputs["time_ids"] = _real(1, TIME_IDS)
    if config.get("time_cond_proj_dim") is not None:
        inputs["timestep_cond"] = _real(1, config["time_cond_proj_dim"])
    return inputs, {"out_sample": _real(1, config.get("out_channels", 4), "height", "width")}


def _real(*shape: int | str) -> Tensor:
    return Tensor("float32", shape)


def _levels(component: str, config: Mapping[str, Any]) -> int:
    """How often a network halves or doubles its image."""
    default: tuple = (64,)
    if component == "unet":
        return len(unet.block_channels(config)) - 1
    if config.get("_class_name") == TINY:
        half = "decoder" if component == "vae_decoder" else "encoder"
        return len(config.get(f"{half}_block_out_channels", default * 4)) - 1
    return len(config.get("block_out_channels", default)) - 1


def _shape(component: str, shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    shape = tuple(shapes.get(name, ()))
    if len(shape) != rank or shape[0] != 1 or 0 in shape:
        raise GraphError(
            f"{component}: {name} has the shape {shape}; the native engine reads {rank} dimensions "
            "and batches of one"
        )
    return shape
