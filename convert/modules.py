"""The torch modules of a checkpoint, in float32 and ready to run."""

from __future__ import annotations

import ctypes
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..runtime.models import TINY
from .checkpoint import Checkpoint, CheckpointError, is_skipped, new_attention_name, tensors
from .probes import NORM_INPUT

M_MMAP_THRESHOLD = -3  # of malloc.h
NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)


def text_encoder(checkpoint: Checkpoint) -> torch.nn.Module:
    """Build the CLIP text model; SDXL's returns its hidden states, of which one is read."""
    module = _clip("CLIPTextModel", checkpoint.configs["text_encoder"], checkpoint.family == "sdxl")
    # transformers 5 dropped the prefix that every checkpoint carries
    prefixed = next(iter(module.state_dict())).startswith("text_model.")
    return _fill(module, checkpoint, "text_encoder", _clip_name(prefixed))


def text_encoder_2(checkpoint: Checkpoint) -> torch.nn.Module:
    """Build SDXL's second text encoder, whose pooled state is projected."""
    config = checkpoint.configs["text_encoder_2"]
    module = _clip("CLIPTextModelWithProjection", config, True)
    module.config.clip_skip = checkpoint.clip_skip  # its last layers stay, for the pooled state
    return _fill(module, checkpoint, "text_encoder_2", str)


def unet(checkpoint: Checkpoint) -> torch.nn.Module:
    """Build the U-Net."""
    return _fill(_diffusers_module(checkpoint, "unet"), checkpoint, "unet", str)


def vae(checkpoint: Checkpoint) -> torch.nn.Module:
    """Build the autoencoder."""
    return _fill(_diffusers_module(checkpoint, "vae"), checkpoint, "vae", new_attention_name)


@contextmanager
def census(module: torch.nn.Module) -> Iterator[dict[str, tuple[float, int, int]]]:
    """Collect layer -> (largest finite magnitude, NaN count, Inf count) of all that runs inside.

    Of norms also what goes in, which may be a sum that no layer returns: "layer (input)".
    """
    seen: dict[str, tuple[float, int, int]] = {}

    def watch(name: str) -> Callable:
        def hook(layer, inputs, output):
            if isinstance(layer, NORMS) and not name.endswith(NORM_INPUT):
                watch(name + NORM_INPUT)(None, (), inputs[0])
            if not isinstance(output, torch.Tensor):
                return
            top, nans, infs = seen.get(name, (0.0, 0, 0))
            low, high = (float(edge) for edge in output.detach().aminmax())
            if math.isfinite(low) and math.isfinite(high):  # one look at the values is enough
                seen[name] = max(top, -low, high), nans, infs
                return
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


def return_freed_memory() -> None:
    """Have glibc give back every freed block of a mebibyte or more.

    By default its threshold grows, and torch's aligned blocks then leave holes that are not used
    again: gigabytes after some full-size layers.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)


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


def _clip(kind: str, config: dict, hidden_states: bool) -> torch.nn.Module:
    with quiet():
        import transformers

        options = _clean(config) | {"output_hidden_states": hidden_states}
        with torch.device("meta"), _built(kind):
            return getattr(transformers, kind)(transformers.CLIPTextConfig(**options))


def _diffusers_module(checkpoint: Checkpoint, component: str) -> torch.nn.Module:
    with quiet():
        import diffusers

        config = checkpoint.configs[component]
        kinds = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
        kind = TINY if config.get("_class_name") == TINY else kinds[component]
        with torch.device("meta"), _built(component):  # only shapes: the weights are in the files
            return getattr(diffusers, kind).from_config(_clean(config))


@contextmanager
def _built(what: str) -> Iterator[None]:
    """What a library raises for a configuration that makes no network, in one line."""
    try:
        yield
    except Exception as error:  # of any kind: configurations are not checked there
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"{what}: its config.json makes no network: {line}") from None


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
        # 0, 1, 2 ...: old files carry it, the modules compute it
        if name.endswith("position_ids") or is_skipped(checkpoint, component, key):
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
