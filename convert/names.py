"""What tensors are called: the original naming of Stable Diffusion and diffusers' names, as tables.

A table maps original modules to diffusers' ones; what lies inside a module that has a row keeps its
path.  Original is what LDM (Stable Diffusion 1 and 2), SGM (SDXL) and OpenCLIP wrote, without the
prefix of the component.  Names of LoRA files flatten the same paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Table = dict[str, str]  # original module, or whole name -> diffusers'

UNET: Table = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embedding.cond_proj": "time_embedding.cond_proj",  # of LCM, which has no original
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
UNET_RESNET: Table = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ATTENTION: Table = {
    name: name for name in ("norm", "proj_in", "transformer_blocks", "proj_out")
}
MIDDLE: Table = {
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
VAE: Table = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
}
VAE_HALF: Table = {  # below encoder or decoder
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "norm_out": "conv_norm_out",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
}
VAE_RESNET: Table = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
OPEN_CLIP: Table = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",  # transposed
}
OPEN_CLIP_LAYER: Table = {  # {} stands for each of FUSED, whose rows follow one another
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.in_proj_weight": "self_attn.{}_proj.weight",
    "attn.in_proj_bias": "self_attn.{}_proj.bias",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
SECOND_CLIP: Table = {"text_model.text_projection": "text_projection.weight"}  # transposed as well
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
FUSED = ("q", "k", "v")
TRANSPOSED = "text_projection.weight"  # OpenCLIP multiplies by it from the other side
CLIP: Table = {  # has diffusers' names already
    "text_model": "text_model",
    "embeddings": "text_model.embeddings",  # some files of SD 1 lack the prefix
    "encoder": "text_model.encoder",
    "final_layer_norm": "text_model.final_layer_norm",
}
# Original names of TAESD's two files are positions; the decoder's first is the clamping of latents.
TAESD_HALVES = {"encoder": 0, "decoder": 1}  # -> by how much they are ahead of diffusers'


def unet(config: Mapping[str, Any]) -> Table:
    """The table of a U-Net with this config of diffusers': its levels, resnets and attention."""
    table = dict(UNET)
    for original, name in MIDDLE.items():
        table |= _attention(original, name) if "attentions" in name else _resnet(original, name)
    levels = len(config["block_out_channels"])
    layers = config.get("layers_per_block", 2)
    resnets = list(layers) if isinstance(layers, (list, tuple)) else [layers] * levels
    block = 1  # input_blocks.0 is conv_in
    for level, count in enumerate(resnets):
        for i in range(count):
            table |= _pair(f"input_blocks.{block}", f"down_blocks.{level}", i)
            block += 1
        if level < levels - 1:
            table[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    block = 0
    for level, count in enumerate(reversed(resnets)):
        for i in range(count + 1):
            table |= _pair(f"output_blocks.{block}", f"up_blocks.{level}", i)
            block += 1
        if level < levels - 1:  # follows the attention, if there is any
            place = 2 if config["up_block_types"][level].startswith("CrossAttn") else 1
            upsampler = f"up_blocks.{level}.upsamplers.0.conv"
            table[f"output_blocks.{block - 1}.{place}.conv"] = upsampler
    return table


def vae(config: Mapping[str, Any]) -> Table:
    """The table of an AutoencoderKL with this config; the original counts the decoder's levels up.

    Matrices of its attention are convolutions of one pixel in the original.
    """
    table = dict(VAE)
    levels, count = len(config["block_out_channels"]), config.get("layers_per_block", 1)
    for half in ("encoder", "decoder"):
        table |= _inside(half, half, VAE_HALF)
        for i in range(2):
            resnet = f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}"
            table |= _inside(*resnet, VAE_RESNET)
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for i in range(count):
            new = f"encoder.down_blocks.{level}.resnets.{i}"
            table |= _inside(f"{down}.block.{i}", new, VAE_RESNET)
        for i in range(count + 1):
            new = f"decoder.up_blocks.{level}.resnets.{i}"
            table |= _inside(f"{up}.block.{i}", new, VAE_RESNET)
        if level < levels - 1:
            table[f"{down}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
            table[f"{up}.upsample.conv"] = f"decoder.up_blocks.{level}.upsamplers.0.conv"
    return table


def open_clip(layers: int) -> Table:
    """The table of OpenCLIP's text model with so many layers."""
    table = dict(OPEN_CLIP)
    for i in range(layers):
        old, new = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        table |= _inside(old, new, OPEN_CLIP_LAYER)
    return table


def taesd(half: str, layers: int) -> Table:
    """The table of one of TAESD's files, the encoder's or the decoder's, with so many layers."""
    ahead = TAESD_HALVES[half]
    return {str(i + ahead): f"{half}.layers.{i}" for i in range(layers)}


def rename(table: Mapping[str, str], name: str) -> str | None:
    """The other name of a tensor or a module, or None if no row of the table has it."""
    head, rest = name, ""
    while head not in table:
        head, dot, leaf = head.rpartition(".")
        if not dot:
            return None
        rest = f".{leaf}{rest}"
    return table[head] + rest


def inverse(table: Mapping[str, str]) -> Table:
    """The table from diffusers' names to the original ones; of two that became one, the first."""
    swapped: Table = {}
    for original, name in table.items():
        swapped.setdefault(name, original)
    return swapped


def new_attention_name(name: str) -> str:
    """Today's name of a tensor of an autoencoder; until 2022 its attention had others."""
    *path, layer, kind = name.split(".")
    return ".".join([*path, OLD_ATTENTION.get(layer, layer), kind])


def parts(name: str) -> Iterator[tuple[str, int | None]]:
    """Names that a fused one stands for, each with its place; of any other, itself and None."""
    if "{}" not in name:
        yield name, None
    else:
        for i, part in enumerate(FUSED):
            yield name.format(part), i


def _pair(original: str, block: str, index: int) -> Table:
    """A resnet and the attention that may follow it."""
    return _resnet(f"{original}.0", f"{block}.resnets.{index}") | _attention(
        f"{original}.1", f"{block}.attentions.{index}"
    )


def _resnet(original: str, name: str) -> Table:
    return _inside(original, name, UNET_RESNET)


def _attention(original: str, name: str) -> Table:
    return _inside(original, name, UNET_ATTENTION)


def _inside(original: str, name: str, table: Mapping[str, str]) -> Table:
    return {f"{original}.{old}": f"{name}.{new}" for old, new in table.items()}
