"""What is exported of a module: the inputs and outputs of its graph; attention as one operator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..bundle import TEXT_ENCODERS
from ..runtime.models import TINY
from ..runtime.models.taesd import LOG_VARIANCE
from .attention import original
from .checkpoint import check_unet, hidden_layer
from .modules import quiet
from .rounding import to_half

PENULTIMATE = "penultimate_state"
MASKED = -1e4  # finite in float16, and exp() of it is 0


def wrap(
    component: str,
    module: torch.nn.Module,
    half: bool = False,
    lost: dict[str, int] | None = None,
    attention: str = "fused",
    spare: bool = False,
) -> torch.nn.Module:
    """A twin of the module that takes and returns what the graph does; it also runs in torch.

    `attention` is "fused", onnxruntime's own operator, "plain", those of the ONNX standard, or
    "original", those of Core ML.  `spare`: it returns those of `spare_outputs` as well.
    """
    if component == "unet":
        check_unet(module.config)
    with quiet():
        from diffusers.models.attention_processor import Attention

    twin = _twin(module, half, {} if lost is None else lost)
    for layer in twin.modules():
        if isinstance(layer, Attention):
            layer.forward = partial(_attention, layer, ATTENTION[attention])
    kinds: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
        "text_encoder": partial(TextEncoder, spare=spare),
        "text_encoder_2": partial(TextEncoder, spare=spare),
        "unet": UNet if getattr(module.config, "addition_embed_type", None) is None else UNetXL,
        "vae_decoder": VaeDecoder,
        "vae_encoder": VaeEncoder,
    }
    return kinds[component](twin).eval()


def spare_outputs(component: str, config: Any) -> list[str]:
    """Outputs that only other tools look for, after those of the interface; usually none.

    Optimum's pipelines take the state before every layer of SDXL's text encoders, and tell by the
    dimensions of the rest whether that is the pooled state: so the first returns its last twice.
    """
    if component not in TEXT_ENCODERS or not config.output_hidden_states:
        return []
    layers, read = range(config.num_hidden_layers), hidden_layer(config)
    names = [f"hidden_states.{layer}" for layer in layers if layer != read]
    return names if component == "text_encoder_2" else [*names, PENULTIMATE]


def _twin(module: torch.nn.Module, half: bool, lost: dict[str, int]) -> torch.nn.Module:
    """A copy that shares the weights, or has them in float16; the original is left as it was."""
    memo: dict[int, Any] = {}
    for name, weight in module.named_parameters():
        new = torch.from_numpy(to_half(name, weight.numpy(), lost)) if half else weight
        memo[id(weight)] = torch.nn.Parameter(new, requires_grad=False)
    return copy.deepcopy(module, memo)


class TextEncoder(torch.nn.Module):
    """CLIP's text model; its causal mask is a finite constant instead of minus infinity.

    SDXL's two return the states before the last layer, and the second its pooled state projected;
    with `spare` also what `spare_outputs` lists.
    """

    def __init__(self, module: torch.nn.Module, spare: bool = False):
        super().__init__()
        self.module, self.spare = module, spare
        length, dtype = module.config.max_position_embeddings, next(module.parameters()).dtype
        self.register_buffer("mask", torch.full((length, length), MASKED, dtype=dtype).triu(1))

    def forward(self, input_ids):  # (batch, 77) -> (batch, 77, hidden), (batch, hidden)
        # transformers 4, and its model with a projection, have it one down
        clip = getattr(self.module, "text_model", self.module)
        projection = getattr(self.module, "text_projection", None)
        count, layers = hidden_layer(self.module.config), clip.encoder.layers
        first = self.module.config.output_hidden_states and projection is None
        states = [clip.embeddings(input_ids=input_ids)]
        for layer in layers[:count] if first else layers:
            states.append(self.run(layer, states[-1]))
        hidden = states[count]
        spare = (*states[:count], *states[count + 1 : len(layers)]) if self.spare else ()
        if first:
            return (hidden, *spare, hidden.clone()) if self.spare else (hidden,)
        x = clip.final_layer_norm(states[-1])
        eos = self.module.config.eos_token_id
        # configs older than transformers 4.31 say 2; there the end token is the largest id
        at_end = input_ids.int() if eos == 2 else (input_ids == eos).int()
        pooled = x[torch.arange(x.shape[0]), at_end.argmax(dim=-1)]
        return (x, pooled) if projection is None else (hidden, projection(pooled), *spare)

    def run(self, layer, x):
        x = x + self.attend(layer.self_attn, layer.layer_norm1(x))
        return x + layer.mlp(layer.layer_norm2(x))

    def attend(self, attention, x):
        def heads(y):
            return y.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)

        q, k, v = (heads(f(x)) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        scores = q @ k.transpose(-1, -2) * attention.scale + self.mask
        return attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class UNet(torch.nn.Module):
    """The U-Net without the branches on sizes that keep diffusers' forward from being exported."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, sample, timestep, encoder_hidden_states, timestep_cond=None):
        temb = self.embed(sample, timestep, timestep_cond)
        return self.run(sample, temb, encoder_hidden_states)

    def embed(self, sample, timestep, timestep_cond):
        net = self.module
        return net.time_embedding(net.get_time_embed(sample, timestep), timestep_cond)

    def run(self, sample, temb, context):
        net = self.module
        x = net.conv_in(sample)
        skips = [x]
        for block in net.down_blocks:
            x, more = block(x, temb, **_context(block, context))
            skips += more
        if net.mid_block is not None:
            x = net.mid_block(x, temb, **_context(net.mid_block, context))
        for block in net.up_blocks:
            skips, mine = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            # always sized like the next skip, so that odd sizes come back as they went down
            size = skips[-1].shape[2:] if skips else None
            x = block(x, tuple(mine), temb, upsample_size=size, **_context(block, context))
        return net.conv_out(net.conv_act(net.conv_norm_out(x)))


class UNetXL(UNet):
    """SDXL's U-Net: its time embedding also knows the pooled text and the picture's size."""

    def forward(  # type: ignore[override]
        self, sample, timestep, encoder_hidden_states, text_embeds, time_ids, timestep_cond=None
    ):  # text_embeds: (batch, 1280), time_ids: (batch, 6)
        net = self.module
        waves = net.add_time_proj(time_ids.flatten())  # in float32, whatever the weights are
        waves = waves.reshape(-1, time_ids.shape[1] * waves.shape[1]).to(text_embeds.dtype)
        added = net.add_embedding(torch.cat([text_embeds, waves], dim=-1))
        temb = self.embed(sample, timestep, timestep_cond) + added
        return self.run(sample, temb, encoder_hidden_states)


class VaeDecoder(torch.nn.Module):
    """Latents, already divided by the scaling factor, to an image in -1..1."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, latent_sample):
        vae = self.module
        quantize = getattr(vae, "post_quant_conv", None)  # TAESD has none
        return vae.decoder(quantize(latent_sample) if quantize else latent_sample)


class VaeEncoder(torch.nn.Module):
    """An image in -1..1 to the mean and log variance of its latents, before scaling."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, sample):
        x = self.module.encoder(sample)
        if type(self.module).__name__ == TINY:
            return certain(x)
        return self.module.quant_conv(x) if self.module.quant_conv else x


def certain(latents):
    """Latents that nothing is drawn around, as TAESD's: with the log variance of AutoencoderKL."""
    return torch.cat([latents, torch.full_like(latents, LOG_VARIANCE)], dim=1)


def _context(block, context) -> dict:
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", 0) else {}


def _attention(
    attn, operator, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
):
    """diffusers' attention layer around one operator of ATTENTION."""
    x = hidden_states
    if x.ndim == 4:  # the VAE's: (batch, channels, height, width)
        x = x.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    context = x if encoder_hidden_states is None else encoder_hidden_states
    q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
    x = attn.to_out[0](operator(q, k, v, attn.heads, attn.scale))
    if hidden_states.ndim == 4:
        x = x.transpose(1, 2).reshape(hidden_states.shape)
    if attn.residual_connection:
        x = x + hidden_states
    return x / attn.rescale_output_factor if attn.rescale_output_factor != 1 else x


def _fused(q, k, v, heads: int, scale: float):  # each (batch, tokens, heads * size)
    """One operator of onnxruntime's: the score matrix never exists."""
    if not torch.compiler.is_exporting():
        return _plain(q, k, v, heads, scale)
    return torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (q, k, v),
        {"num_heads": heads, "scale": scale},
        dtype=q.dtype,
        shape=q.shape,
        version=1,
    )


def _plain(q, k, v, heads: int, scale: float):  # each (batch, tokens, heads * size)
    """What the exporter makes of torch's own: Attention from opset 23, MatMul and Softmax below."""
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


ATTENTION: dict[str, Callable[..., torch.Tensor]] = {
    "fused": _fused,
    "plain": _plain,
    "original": original,
}
