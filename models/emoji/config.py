"""What the recipe makes and how long it works at it, at full size and for a smoke test."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

THREADS = 2


@dataclass(frozen=True)
class Training:
    """One stage's length and speed; a rate falls to zero over the last `cooldown` of the steps."""

    steps: int
    batch: int
    rate: float
    ema: float
    warmup: int = 50
    cooldown: float = 0.3
    decay: float = 0.01


@dataclass(frozen=True)
class Recipe:
    """Sizes of the networks and lengths of the stages."""

    things: int  # how many emoji; 0 for all
    size: int  # pixels
    vae_channels: tuple[int, ...]
    unet_channels: tuple[int, ...]
    text_width: int
    text_layers: int
    vocabulary: int
    variants: int  # pictures of one thing that the U-Net learns from
    vae: Training
    diffusion: Training
    distillation: Training
    tiny_vae: Training

    @property
    def latent_size(self) -> int:
        return self.size // 8


FULL = Recipe(
    things=0,
    size=128,
    vae_channels=(32, 32, 64, 128),
    unet_channels=(64, 128, 192),
    text_width=192,
    text_layers=3,
    vocabulary=2048,
    variants=16,
    vae=Training(steps=2_800, batch=12, rate=2e-3, ema=0.998),
    diffusion=Training(steps=9_200, batch=64, rate=2e-3, ema=0.999, cooldown=0.4),
    distillation=Training(steps=600, batch=48, rate=5e-4, ema=0.99, decay=0.0),
    tiny_vae=Training(steps=1_500, batch=8, rate=2e-3, ema=0.998),
)
SHORT = Training(steps=8, batch=4, rate=1e-3, ema=0.9, warmup=2)
SMOKE = Recipe(
    things=24,
    size=64,
    vae_channels=(16, 16, 16, 32),
    unet_channels=(16, 32, 32),
    text_width=32,
    text_layers=1,
    vocabulary=600,
    variants=8,
    vae=SHORT,
    diffusion=SHORT,
    distillation=SHORT,
    tiny_vae=SHORT,
)


def arguments() -> argparse.ArgumentParser:
    """What every stage takes on its command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path, help="folder for data and state")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it all runs")
    return parser


def stage() -> tuple[Path, Recipe]:
    """The arguments of a stage run as a program: the working folder and the recipe."""
    given = arguments().parse_args()
    return given.work, begin(given.work, given.smoke)


def begin(work: Path, smoke: bool) -> Recipe:
    """The recipe for a stage that begins here; makes the folder.

    WORK/recipe.json, {"vae": {"steps": 20000}, ...}, changes figures of the stages' training.
    """
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)
    return changed(SMOKE if smoke else FULL, work / "recipe.json")


def changed(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with what the file at `path` says, if it is there."""
    changes = json.loads(path.read_text()) if path.exists() else {}
    try:
        trainings = {
            name: replace(getattr(recipe, name), **values) for name, values in changes.items()
        }
        return replace(recipe, **trainings)
    except (AttributeError, TypeError) as error:
        raise SystemExit(f"{path}: {error}") from error
