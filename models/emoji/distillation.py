"""The few-step U-Net: a latent consistency model of the trained one, with its guidance folded in.

    python models/emoji/distillation.py WORK

From a noised latent at a step of the LCM grid the teacher draws to the end with a few steps of
DPM-Solver++ 2M, guided; the student is to give that end point at once.  Luo et al. 2023 take one
step of the teacher and the student's own guess from there.  On a CPU, where a backward pass is
dear, whole trajectories give more per hour, and need no moving target.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ferrotype.models.emoji import tokenizer as tokenizers
from ferrotype.models.emoji.config import Recipe, stage
from ferrotype.models.emoji.data import Data
from ferrotype.models.emoji.diffusion import PROMPTS, load_decoder
from ferrotype.models.emoji.fast import accelerate
from ferrotype.models.emoji.latents import Latents, signal_and_noise
from ferrotype.models.emoji.networks import (
    STEPS,
    bf16,
    decode,
    load_weights,
    make_text_encoder,
    make_unet,
)
from ferrotype.models.emoji.training import train

GUIDANCE = 2.5
GRID = 50  # steps that the student is taught at; LCMScheduler's original_inference_steps
USED = (999, 759, 499, 259)  # those that 4 steps use, and 1 and 2: taught more often
USED_SHARE = 0.4
SOLVER_STEPS = 5
HUBER = 1e-3  # squared width of the loss's round bottom


@torch.no_grad()
def solve(velocity, x: torch.Tensor, t: torch.Tensor, steps: int = SOLVER_STEPS) -> torch.Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022) from x at t (n,) to the end -> the clean latents.

    `velocity(x, t)` is the guided prediction; the steps are equal in t.
    """
    previous, h_before = x, torch.ones(len(t), 1, 1, 1)
    for i in range(steps):
        now, later = (t * (steps - i)) // steps, (t * (steps - i - 1)) // steps
        signal, noise = signal_and_noise(now)
        clean = signal * x - noise * velocity(x, now)
        next_signal, next_noise = signal_and_noise(later)
        h = (next_signal / next_noise).log() - (signal / noise).log()
        ahead = clean if i == 0 else clean + h / (2 * h_before) * (clean - previous)
        x = next_noise / noise * x - next_signal * torch.expm1(-h) * ahead
        previous, h_before = clean, h
    return clean


@torch.no_grad()
def sample(unet, context: torch.Tensor, rng: torch.Generator, size: int, times=USED):
    """LCM sampling: a guess of the clean latent, noised again for the next step."""
    clean = None
    for t in torch.tensor(times):
        signal, noise = signal_and_noise(t[None])
        fresh = torch.randn(len(context), 4, size, size, generator=rng)
        x = fresh if clean is None else signal * clean + noise * fresh
        clean = signal * x - noise * unet(bf16(x), t, context).sample.float()
    return clean


def draw_times(n: int, rng: torch.Generator) -> torch.Tensor:
    """Steps of the grid, 19, 39 ... 999, and oftener those in use."""
    u = torch.rand(2, n, generator=rng)
    anywhere = ((u[0] * GRID).long() + 1) * (STEPS // GRID) - 1
    in_use = torch.tensor(USED)[(u[0] * len(USED)).long()]
    return torch.where(u[1] < USED_SHARE, in_use, anywhere)


def main(work: Path, recipe: Recipe) -> None:
    data, latents, tokenizer = Data.load(work), Latents.load(work), tokenizers.load(work)
    teacher, student, text_encoder = make_unet(recipe), make_unet(recipe), make_text_encoder(recipe)
    load_weights(work, "diffusion", unet=teacher, text_encoder=text_encoder)
    student.load_state_dict(teacher.state_dict())
    teacher, student = accelerate(teacher).bfloat16().requires_grad_(False), accelerate(student)
    text_encoder = text_encoder.bfloat16().requires_grad_(False)
    vae = load_decoder(work, recipe)
    unsaid = text_encoder(tokenizers.token_ids(tokenizer, [""]))[0]
    shown = text_encoder(tokenizers.token_ids(tokenizer, list(PROMPTS)))[0]

    def loss(rng: torch.Generator) -> dict[str, torch.Tensor]:
        n = recipe.distillation.batch
        batch, t = latents.draw(n, rng, data, tokenizer, 0.0), draw_times(n, rng)
        context = text_encoder(batch.tokens)[0]
        both = torch.cat([context, unsaid.expand(n, -1, -1)])

        def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            v = teacher(bf16(torch.cat([x, x])), torch.cat([t, t]), both).sample.float()
            return v[n:] + GUIDANCE * (v[:n] - v[n:])

        signal, noise = signal_and_noise(t)
        x = signal * batch.latents + noise * batch.noise
        target = solve(guided, x, t)
        error = signal * x - noise * student(bf16(x), t, context).sample.float() - target
        return {"loss": ((error.square() + HUBER).sqrt() - HUBER**0.5).mean()}

    def preview() -> torch.Tensor:
        rng = torch.Generator().manual_seed(0)
        clean = [
            sample(student, shown, rng, recipe.latent_size, times) for times in (USED[:1], USED)
        ]
        return decode(vae, torch.cat(clean) / latents.scale)

    train(work, "distillation", {"unet": student}, recipe.distillation, loss, preview)


if __name__ == "__main__":
    main(*stage())
