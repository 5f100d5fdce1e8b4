"""What the original does on realistic inputs: recorded in torch, component by component."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .. import bundle as bundles
from ..bundle import Recipe
from .checkpoint import hidden_layer
from .probes import SEED, colour_field, fit_preview
from .recipe import to_scheduler
from .wrappers import certain

Arrays = dict[str, np.ndarray]


@dataclass
class Run:
    """One call of a component by the names of its graph."""

    inputs: Arrays
    outputs: Arrays


@dataclass
class Reference:
    """The original's runs by component, and the picture that they add up to."""

    recipe: Recipe
    size: tuple[int, int]
    other_sizes: tuple[tuple[int, int], ...] = ()  # each network is called once at every one
    runs: dict[str, list[Run]] = field(default_factory=dict)
    census: dict[str, dict[str, tuple[float, int, int]]] = field(default_factory=dict)
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    picture: np.ndarray = field(default_factory=lambda: np.empty(0))  # (height, width, 3), 0 to 1
    preview: np.ndarray = field(default_factory=lambda: np.empty(0))  # (channels + 1, 3)


@torch.no_grad()
def record_text(module: torch.nn.Module, tokens: list[np.ndarray]) -> list[Run]:
    """Encode the token ids, (1, length) each; the prompt of the picture is the first."""
    runs = []
    for ids in tokens:
        out = module(input_ids=torch.from_numpy(ids))
        if module.config.output_hidden_states:  # SDXL: after every layer but the last
            layer = hidden_layer(module.config)
            outputs = {f"hidden_states.{layer}": out.hidden_states[layer]}
        else:
            outputs = {n: out[n] for n in ("last_hidden_state", "pooler_output")}
        if "text_embeds" in out:
            outputs["text_embeds"] = out.text_embeds
        arrays = {name: value.numpy() for name, value in outputs.items()}
        runs.append(Run({"input_ids": ids}, arrays))
    return runs


@torch.no_grad()
def record_unet(
    module: Any, reference: Reference, text: dict[str, Arrays], scale: int
) -> list[Run]:
    """Sample a picture's latents with diffusers' scheduler, keeping every call of the U-Net.

    `text` holds what the U-Net takes of the prompt and of the empty one: `prompt`, `negative`.
    """
    recipe = reference.recipe
    scheduler = to_scheduler(recipe)
    generator = torch.Generator("cpu").manual_seed(SEED)
    width, height = reference.size
    shape = (1, module.config.in_channels, height // scale, width // scale)
    x = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    embeds = module.config.time_cond_proj_dim is not None
    two_passes = recipe.guidance not in (0, 1) and not embeds
    extra = {"timestep_cond": _guidance_embedding(module, recipe.guidance)} if embeds else {}
    runs = []

    def predict(sample: torch.Tensor, timestep: torch.Tensor, text: Arrays) -> torch.Tensor:
        added = {name: torch.from_numpy(value) for name, value in text.items()}
        states = added.pop("encoder_hidden_states")
        out = module(sample, timestep, states, added_cond_kwargs=added, **extra).sample
        inputs = {
            "sample": sample.numpy(),
            "timestep": np.array(float(timestep), np.float32),
            **text,
            **{name: value.numpy() for name, value in extra.items()},
        }
        runs.append(Run(inputs, {"out_sample": out.numpy()}))
        return out

    for timestep in scheduler.timesteps:
        sample = scheduler.scale_model_input(x, timestep)
        out = predict(sample, timestep, text["prompt"])
        if two_passes:
            empty = predict(sample, timestep, text["negative"])
            out = empty + recipe.guidance * (out - empty)
        x = scheduler.step(out, timestep, x, **_step_options(scheduler, recipe, generator))[0]
    reference.latents = x
    for width, height in reference.other_sizes:
        noise = torch.randn((1, shape[1], height // scale, width // scale), generator=generator)
        predict(noise, scheduler.timesteps[0], text["prompt"])
    return runs


def text_inputs(outputs: list[Arrays], size: tuple[int, int]) -> Arrays:
    """What the U-Net takes of a prompt, from the outputs of its one text encoder or SDXL's two."""
    states = [out[bundles.states_of(out)] for out in outputs]
    inputs = {"encoder_hidden_states": np.concatenate(states, axis=-1)}
    if "text_embeds" in outputs[-1]:
        width, height = size
        inputs["text_embeds"] = outputs[-1]["text_embeds"]
        inputs["time_ids"] = np.array([[height, width, 0, 0, height, width]], np.float32)
    return inputs


@torch.no_grad()
def record_vae(module: Any, reference: Reference, scale: int) -> dict[str, list[Run]]:
    """Decode the sampled latents and encode pictures; fits the preview on the way."""
    factor = module.config.scaling_factor
    width, height = reference.size
    colours = torch.from_numpy(colour_field(width, height))
    decoded = module.decode(reference.latents / factor).sample
    encoder, decoder = [], []
    others = [torch.from_numpy(colour_field(*size)) for size in reference.other_sizes]
    for image in (colours, decoded.clamp(-1, 1), *others):
        encoded = module.encode(image)
        tiny = not hasattr(encoded, "latent_dist")  # TAESD's
        parameters = certain(encoded.latents) if tiny else encoded.latent_dist.parameters
        encoder.append(Run({"sample": image.numpy()}, {"latent_parameters": parameters.numpy()}))
    parameters = [torch.from_numpy(run.outputs["latent_parameters"]) for run in encoder]
    mean, _, *means = (values.chunk(2, dim=1)[0] for values in parameters)
    for latents in (reference.latents / factor, mean, *means):
        image = module.decode(latents).sample
        decoder.append(Run({"latent_sample": latents.numpy()}, {"sample": image.numpy()}))
    reference.picture = ((decoded[0] / 2 + 0.5).clamp(0, 1)).permute(1, 2, 0).numpy()
    pairs = [(mean * factor, colours), (reference.latents, decoded)]
    reference.preview = fit_preview([(x.numpy(), y.numpy()) for x, y in pairs], scale)
    return {"vae_decoder": decoder, "vae_encoder": encoder}


def _guidance_embedding(module: Any, guidance: float) -> torch.Tensor:
    from diffusers import LatentConsistencyModelPipeline

    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    width = module.config.time_cond_proj_dim
    return embed(None, torch.tensor([guidance - 1]), embedding_dim=width)  # uses nothing of self


def _step_options(scheduler: Any, recipe: Recipe, generator: torch.Generator) -> dict[str, Any]:
    taken = inspect.signature(scheduler.step).parameters
    options = {"eta": recipe.eta, "generator": generator}
    return {name: value for name, value in options.items() if name in taken}
