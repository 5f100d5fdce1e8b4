"""Text encoder and U-Net, trained together from nothing: v-prediction, weighted by noise.

    python models/emoji/diffusion.py WORK

Salimans and Ho 2022 (v-prediction); Ho and Salimans 2022 (captions left out, for guidance).  The
weights are gamma / (gamma + SNR).  Those of Hang et al. 2023 (min-SNR) fall off like these where
there is little noise, but also where there is much: there the caption alone decides what is
drawn, and a model of few steps begins there.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch

from ferrotype.models.emoji import tokenizer as tokenizers
from ferrotype.models.emoji.config import Recipe, stage
from ferrotype.models.emoji.data import Data
from ferrotype.models.emoji.fast import accelerate
from ferrotype.models.emoji.latents import Latents, signal_and_noise, spread_times
from ferrotype.models.emoji.networks import (
    ALPHAS,
    STEPS,
    bf16,
    decode,
    load_weights,
    make_text_encoder,
    make_unet,
    make_vae,
)
from ferrotype.models.emoji.training import train

GAMMA = 5.0
UNSAID = 0.1  # share of empty captions
PROMPTS = (
    "a red apple on a sky blue background",
    "a cat",
    "a dog on a green background",
    "a red car",
    "a slice of pizza on a purple background",
    "a rocket on a black background",
    "a robot on an orange background",
    "a grinning face",
    "a sunflower, blue background",
    "a house on a yellow background",
    "a penguin on a pink background",
    "a guitar on a yellow background",
    "a woman firefighter",
    "a crying face on a gray background",
    "a hand with fingers splayed on a red background",
    "a tiger face on white",
    "a key on a gray background",
    "a violin on a blue background",
    "a steam locomotive",
    "a kitchen knife on a green background",
    "a snowman on a blue background",
    "a blue heart on a black background",
    "a mermaid on a pink background",
    "a compass on an orange background",
)


@torch.no_grad()
def sample(unet, context: torch.Tensor, rng: torch.Generator, size: int, steps=12, guidance=3.0):
    """DDIM with classifier-free guidance; context (2n, 32, width): prompts, then empty ones."""
    n = len(context) // 2
    x = torch.randn(n, 4, size, size, generator=rng)
    times = torch.linspace(STEPS - 1, 0, steps + 1).long()
    for now, later in pairwise(times):
        v = unet(bf16(torch.cat([x, x])), now, context).sample.float()
        said, unsaid = v.chunk(2)
        v = unsaid + guidance * (said - unsaid)
        signal, noise = signal_and_noise(now[None])
        clean, eps = signal * x - noise * v, signal * v + noise * x
        signal, noise = signal_and_noise(later[None])
        x = signal * clean + noise * eps
    return clean


def load_decoder(work: Path, recipe: Recipe) -> torch.nn.Module:
    """The trained VAE in bf16, to look at samples with."""
    vae = make_vae(recipe)
    load_weights(work, "vae", vae=vae)
    return accelerate(vae).bfloat16().requires_grad_(False)


def main(work: Path, recipe: Recipe) -> None:
    data, latents, tokenizer = Data.load(work), Latents.load(work), tokenizers.load(work)
    torch.manual_seed(0)
    unet, text_encoder = accelerate(make_unet(recipe)), make_text_encoder(recipe)
    vae = load_decoder(work, recipe)
    shown_tokens = tokenizers.token_ids(tokenizer, [*PROMPTS, *[""] * len(PROMPTS)])
    weights = GAMMA / (GAMMA + ALPHAS / (1 - ALPHAS))

    def loss(rng: torch.Generator) -> dict[str, torch.Tensor]:
        batch = latents.draw(recipe.diffusion.batch, rng, data, tokenizer, UNSAID)
        t = spread_times(recipe.diffusion.batch, rng)
        signal, noise = signal_and_noise(t)
        noised = bf16(signal * batch.latents + noise * batch.noise)
        v = unet(noised, t, text_encoder(batch.tokens)[0]).sample.float()
        error = (v - (signal * batch.noise - noise * batch.latents)).square().mean((1, 2, 3))
        return {"loss": (error * weights[t]).mean(), "v": error.detach().mean()}

    def preview() -> torch.Tensor:
        context = text_encoder(shown_tokens)[0].bfloat16()
        rng = torch.Generator().manual_seed(0)
        return decode(vae, sample(unet, context, rng, recipe.latent_size) / latents.scale)

    networks = {"unet": unet, "text_encoder": text_encoder}
    train(work, "diffusion", networks, recipe.diffusion, loss, preview)


if __name__ == "__main__":
    main(*stage())
