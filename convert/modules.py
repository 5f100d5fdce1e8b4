"""The torch modules of a checkpoint, and the form of them that is exported."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .checkpoint import Checkpoint, CheckpointError, ConvertError, check_unet, tensors

MASKED = -1e4  # finite in float16, and exp() of it is 0
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def text_encoder(checkpoint: Checkpoint) -> torch.nn.Module:
    """Build the CLIP text model."""
    with quiet():
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig(**_clean(checkpoint.configs["text_encoder"]))
        with torch.device("meta"):
            module = CLIPTextModel(config)
    # transformers 5 dropped the prefix that every checkpoint carries
    prefixed = next(iter(module.state_dict())).startswith("text_model.")
    return _fill(module, checkpoint, "text_encoder", _clip_name(prefixed))


def unet(checkpoint: Checkpoint) -> torch.nn.Module:
    """Build the U-Net."""
    return _fill(_diffusers_module(checkpoint, "unet"), checkpoint, "unet", str)


def vae(checkpoint: Checkpoint) -> torch.nn.Module:
    """Build the autoencoder."""
    return _fill(_diffusers_module(checkpoint, "vae"), checkpoint, "vae", _new_attention_name)


def wrap(
    component: str,
    module: torch.nn.Module,
    half: bool = False,
    lost: dict[str, int] | None = None,
) -> torch.nn.Module:
    """A twin of the module that takes and returns what the graph does; it also runs in torch."""
    if component == "unet":
        check_unet(module.config)
    with quiet():
        from diffusers.models.attention_processor import Attention

    twin = _twin(module, half, {} if lost is None else lost)
    for layer in twin.modules():
        if isinstance(layer, Attention):
            layer.forward = partial(_attention, layer)
    kinds: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
        "text_encoder": TextEncoder,
        "unet": UNet,
        "vae_decoder": VaeDecoder,
        "vae_encoder": VaeEncoder,
    }
    return kinds[component](twin).eval()


@contextmanager
def census(module: torch.nn.Module) -> Iterator[dict[str, tuple[float, int, int]]]:
    """Collect layer -> (largest finite magnitude, NaN count, Inf count) of all that runs inside."""
    seen: dict[str, tuple[float, int, int]] = {}

    def watch(name: str) -> Callable:
        def hook(_module, _inputs, output):
            if not isinstance(output, torch.Tensor):
                return
            top, nans, infs = seen.get(name, (0.0, 0, 0))
            finite = output.detach().nan_to_num(0.0, 0.0, 0.0).abs().amax().item()
            nans += int(output.isnan().sum())
            seen[name] = max(top, finite), nans, infs + int(output.isinf().sum())

        return hook

    leaves = [(n, m) for n, m in module.named_modules() if not any(m.children())]
    handles = [m.register_forward_hook(watch(name)) for name, m in leaves]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' advice (missing accelerate, torchvision, deprecations) off the screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def to_half(name: str, array: np.ndarray, lost: dict[str, int]) -> np.ndarray:
    """Round to float16; what becomes Inf is an error, what becomes 0 is counted in `lost`."""
    with np.errstate(over="ignore", under="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise ConvertError(
            f"{name} reaches {np.abs(array).max():.4g}, float16 ends at 65504; use weights fp32"
        )
    if zeros := int(((half == 0) & (array != 0)).sum()):
        lost[name] = zeros
    return half


def _diffusers_module(checkpoint: Checkpoint, component: str) -> torch.nn.Module:
    with quiet():
        import diffusers

        kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
        with torch.device("meta"):  # shapes only: the weights come from the files
            return kinds[component].from_config(_clean(checkpoint.configs[component]))


def _clean(config: dict) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _fill(
    module: torch.nn.Module, checkpoint: Checkpoint, component: str, rename: Callable[[str], str]
) -> torch.nn.Module:
    """Give the module the checkpoint's weights without ever holding two copies."""
    expected = module.state_dict()
    state = {}
    for key, array in tensors(checkpoint, component):
        name = rename(key)
        if name.endswith("position_ids"):  # 0, 1, 2 ...: old files carry it, the modules compute it
            continue
        state[name] = torch.from_numpy(_as_linear(array, expected.get(name)))
    _check_names(component, expected, state)
    module.load_state_dict(state, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            _set_positions(module, name, buffer.shape[-1])
    return module.eval().requires_grad_(False)


def _as_linear(array: np.ndarray, expected: torch.Tensor | None) -> np.ndarray:
    """Old autoencoders store attention projections as 1x1 convolutions."""
    if expected is not None and array.shape == (*expected.shape, 1, 1) and expected.ndim == 2:
        return array[:, :, 0, 0]
    return array


def _check_names(component: str, expected: dict, state: dict) -> None:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise CheckpointError(
                f"{component}: {len(names)} {problem} weights ({', '.join(names[:5])}); "
                "its config.json and its weights do not belong together"
            )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{component}: {name} is {tuple(tensor.shape)}, its config.json says "
                f"{tuple(expected[name].shape)}; they do not belong together"
            )


def _set_positions(module: torch.nn.Module, name: str, count: int) -> None:
    path, _, leaf = name.rpartition(".")
    if leaf != "position_ids":
        raise CheckpointError(f"{name} is not in the checkpoint and its value is not known")
    module.get_submodule(path).register_buffer(leaf, torch.arange(count)[None], persistent=False)


def _clip_name(prefixed: bool) -> Callable[[str], str]:
    prefix = "text_model." if prefixed else ""
    return lambda name: prefix + name.removeprefix("text_model.")


def _new_attention_name(name: str) -> str:
    *path, layer, kind = name.split(".")
    return ".".join([*path, OLD_ATTENTION.get(layer, layer), kind])


def _twin(module: torch.nn.Module, half: bool, lost: dict[str, int]) -> torch.nn.Module:
    """A copy that shares the weights, or has them in float16; the original is left as it was."""
    memo: dict[int, Any] = {}
    for name, weight in module.named_parameters():
        new = torch.from_numpy(to_half(name, weight.numpy(), lost)) if half else weight
        memo[id(weight)] = torch.nn.Parameter(new, requires_grad=False)
    return copy.deepcopy(module, memo)


class TextEncoder(torch.nn.Module):
    """CLIP's text model; its causal mask is a finite constant instead of minus infinity."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module
        length, dtype = module.config.max_position_embeddings, next(module.parameters()).dtype
        self.register_buffer("mask", torch.full((length, length), MASKED, dtype=dtype).triu(1))

    def forward(self, input_ids):  # (batch, 77) -> (batch, 77, hidden), (batch, hidden)
        clip = getattr(self.module, "text_model", self.module)  # transformers 4 has it one down
        x = clip.embeddings(input_ids=input_ids)
        for layer in clip.encoder.layers:
            x = x + self.attend(layer.self_attn, layer.layer_norm1(x))
            x = x + layer.mlp(layer.layer_norm2(x))
        x = clip.final_layer_norm(x)
        eos = self.module.config.eos_token_id
        # configs older than transformers 4.31 say 2; there the end token is the largest id
        at_end = input_ids.int() if eos == 2 else (input_ids == eos).int()
        return x, x[torch.arange(x.shape[0]), at_end.argmax(dim=-1)]

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
        net, context = self.module, encoder_hidden_states
        temb = net.time_embedding(net.get_time_embed(sample, timestep), timestep_cond)
        x = net.conv_in(sample)
        skips = [x]
        for block in net.down_blocks:
            x, more = block(x, temb, **_context(block, context))
            skips += more
        x = net.mid_block(x, temb, encoder_hidden_states=context)
        for block in net.up_blocks:
            skips, mine = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            # always sized like the next skip, so that odd sizes come back as they went down
            size = skips[-1].shape[2:] if skips else None
            x = block(x, tuple(mine), temb, upsample_size=size, **_context(block, context))
        return net.conv_out(net.conv_act(net.conv_norm_out(x)))


class VaeDecoder(torch.nn.Module):
    """Latents, already divided by the scaling factor, to an image in -1..1."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, latent_sample):
        vae = self.module
        x = vae.post_quant_conv(latent_sample) if vae.post_quant_conv else latent_sample
        return vae.decoder(x)


class VaeEncoder(torch.nn.Module):
    """An image in -1..1 to the mean and log variance of its latents, before scaling."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, sample):
        x = self.module.encoder(sample)
        return self.module.quant_conv(x) if self.module.quant_conv else x


def _context(block, context) -> dict:
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", 0) else {}


def _attention(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
    """diffusers' attention layer around one fused operator: the score matrix never exists."""
    x = hidden_states
    if x.ndim == 4:  # the VAE's: (batch, channels, height, width)
        x = x.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    context = x if encoder_hidden_states is None else encoder_hidden_states
    q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
    x = attn.to_out[0](_fused(q, k, v, attn.heads, attn.scale))
    if hidden_states.ndim == 4:
        x = x.transpose(1, 2).reshape(hidden_states.shape)
    if attn.residual_connection:
        x = x + hidden_states
    return x / attn.rescale_output_factor if attn.rescale_output_factor != 1 else x


def _fused(q, k, v, heads: int, scale: float):  # each (batch, tokens, heads * size)
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (q, k, v),
            {"num_heads": heads, "scale": scale},
            dtype=q.dtype,
            shape=q.shape,
            version=1,
        )
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
