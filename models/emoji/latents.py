"""What the U-Net learns from: every thing on the colours it may be shown on, through the VAE.

python models/emoji/latents.py WORK    # writes WORK/latents.pt
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from ferrotype.models.emoji import tokenizer as tokenizers
from ferrotype.models.emoji.config import Recipe, stage
from ferrotype.models.emoji.data import Data, Placement, batches, composite, shown_colours
from ferrotype.models.emoji.fast import accelerate
from ferrotype.models.emoji.networks import ALPHAS, STEPS, encode, load_weights, make_vae

ON_WHITE = 0.25  # of the pictures of one thing


def colours_of(thing: int, count: int) -> list[int]:
    """The background of each of a thing's pictures: some white, then its other colours in turn."""
    white, *others = shown_colours(thing)
    whites = round(count * ON_WHITE)
    return [white] * whites + [others[i % len(others)] for i in range(count - whites)]


def main(work: Path, recipe: Recipe, scale: float | None = None) -> None:
    """Write WORK/latents.pt; a `scale` that a U-Net has learned with is kept."""
    if (work / "latents.pt").exists():
        return
    data = Data.load(work)
    vae = make_vae(recipe)
    load_weights(work, "vae", vae=vae)
    vae = accelerate(vae).bfloat16().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    colours = torch.tensor([colours_of(thing, recipe.variants) for thing in range(len(data))])
    things = torch.arange(len(data)).repeat_interleave(recipe.variants)
    parts = []
    for part in batches(len(things), 32):
        at = Placement.drawn(colours.flatten()[part], rng)
        parts.append(encode(vae, composite(data.rgba[things[part]], at, recipe.size)).half())
    latents = torch.cat(parts).unflatten(0, colours.shape)
    scale = scale or round(1 / latents.float().std().item(), 4)
    torch.save({"latents": latents, "colours": colours, "scale": scale}, work / "latents.tmp")
    (work / "latents.tmp").rename(work / "latents.pt")
    print(f"{len(things)} latents, scaling factor {scale}")


@dataclass(frozen=True)
class Batch:
    """What one step of training takes, all but the text already noised."""

    latents: torch.Tensor  # (n, 4, h, w), standard deviation 1
    tokens: torch.Tensor  # (n, 32)
    noise: torch.Tensor


@dataclass(frozen=True)
class Latents:
    """What the stage wrote: fp16 latents, their background colours, and 1 / their deviation."""

    latents: torch.Tensor  # (things, variants, 4, h, w)
    colours: torch.Tensor  # (things, variants)
    scale: float

    @classmethod
    def load(cls, work: Path) -> Latents:
        return cls(**torch.load(work / "latents.pt", weights_only=True))

    def draw(self, n: int, rng: torch.Generator, data: Data, tokenizer, unsaid: float) -> Batch:
        """Random pictures with captions, which are empty for the share `unsaid` of them."""
        things = torch.randint(len(self.latents), (n,), generator=rng)
        variants = torch.randint(self.latents.shape[1], (n,), generator=rng)
        words = random.Random(int(torch.randint(2**62, (), generator=rng)))
        captions = [
            "" if words.random() < unsaid else data.caption(thing, colour, words)
            for thing, colour in zip(
                things.tolist(), self.colours[things, variants].tolist(), strict=True
            )
        ]
        x = self.latents[things, variants].float() * self.scale
        noise = torch.randn(x.shape, generator=rng)
        return Batch(x, tokenizers.token_ids(tokenizer, captions), noise)


def signal_and_noise(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(alpha_t) and sqrt(1 - alpha_t) of the time steps (n,), as (n, 1, 1, 1)."""
    alpha = ALPHAS[t][:, None, None, None]
    return alpha.sqrt(), (1 - alpha).sqrt()


def spread_times(n: int, rng: torch.Generator) -> torch.Tensor:
    """One random time step in each n-th of them: less noise in the loss than n independent ones."""
    return ((torch.arange(n) + torch.rand(n, generator=rng)) / n * STEPS).long()


if __name__ == "__main__":
    main(*stage())
