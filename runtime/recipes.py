"""Few-step recipes as a table: how each distilled family of models wants to be sampled.

A row's values are those of its authors' model card; docs/samplers.md has them for people.  A
bundle's recipe carries the family's name and limits, and `check` holds a run to them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..bundle import Recipe
from ..errors import FerrotypeError

BASE = "base"  # was not distilled: any steps, any guidance
LCM = "lcm"  # the one family whose U-Net reads the guidance scale as an input
NONE = (1.0, 1.0)  # one pass, no classifier-free guidance; 0 means the same


class RecipeRefusal(FerrotypeError, ValueError):
    """What was asked for is not what the model was distilled for; `force` insists."""


@dataclass(frozen=True)
class Family:
    """How models of a family are sampled; `steps` and `guidance` are what nobody changed."""

    title: str
    sampler: str
    spacing: str
    steps: int
    allowed_steps: tuple[int, ...]
    guidance: float = 1.0
    guidance_range: tuple[float, float] = NONE
    prediction_type: str = ""  # empty: what the checkpoint says
    eta: float = 0.0
    timesteps: tuple[float, ...] = ()
    xl: bool | None = None  # of SDXL, of the others; None: of both


def _upto(last: int) -> tuple[int, ...]:
    return tuple(range(1, last + 1))


FAMILIES = {
    # Luo et al. 2023: guidance is an input, trained with a scale of 3 to 14
    LCM: Family("LCM", "lcm", "lcm", 4, _upto(8), 8.0, (1.0, 14.0)),
    "lcm-lora": Family("LCM-LoRA", "lcm", "lcm", 4, _upto(8), 1.0, (1.0, 2.0)),
    # Zheng et al. 2024: eta is gamma, more of it for more steps
    "tcd": Family("TCD", "tcd", "lcm", 4, _upto(20), 1.0, (1.0, 2.0), eta=0.3),
    # Sauer et al. 2023: their first step is at timestep 999
    "sd-turbo": Family("SD-Turbo", "euler", "trailing", 1, _upto(4), xl=False),
    "sdxl-turbo": Family("SDXL-Turbo", "euler_a", "trailing", 1, _upto(4), xl=True),
    # Lin et al. 2024: that of one step predicts the picture, not the noise
    "lightning-1": Family(
        "SDXL-Lightning", "euler", "trailing", 1, (1,), prediction_type="sample", xl=True
    ),
    **{
        f"lightning-{n}": Family("SDXL-Lightning", "euler", "trailing", n, (n,), xl=True)
        for n in (2, 4, 8)
    },
    # Ren et al. 2024: the one-step U-Net, one LoRA for all steps, one for each, those with CFG
    "hyper-1": Family("Hyper-SDXL", "lcm", "lcm", 1, (1,), timesteps=(800.0,), xl=True),
    "hyper-unified": Family("Hyper-SD", "tcd", "lcm", 4, _upto(8), eta=1.0),
    **{f"hyper-{n}": Family("Hyper-SD", "ddim", "trailing", n, (n,)) for n in (2, 4, 8)},
    **{
        f"hyper-cfg-{n}": Family("Hyper-SD with CFG", "ddim", "trailing", n, (n,), 5.0, (5.0, 8.0))
        for n in (8, 12)
    },
}
NAMES = (BASE, *FAMILIES)


def apply(name: str, recipe: Recipe, embedded: bool = False, xl: bool | None = None) -> Recipe:
    """The recipe of a family, with the noise schedule of `recipe`, a checkpoint's own.

    `embedded`: the U-Net takes the guidance scale; `xl`: it is of SDXL, None if that is not known.
    Raises ValueError for a family that such a checkpoint cannot be of.
    """
    if name == BASE:
        return dataclasses.replace(recipe, name=BASE)
    if name not in FAMILIES:
        raise ValueError(f"unknown recipe {name!r}: choose from {', '.join(NAMES)}")
    family = FAMILIES[name]
    if embedded != (name == LCM):
        if embedded:
            raise ValueError(f"recipe {name}: this U-Net reads the guidance scale, use {LCM}")
        raise ValueError(f"recipe {name}: this U-Net reads no guidance scale, use lcm-lora")
    if None not in (xl, family.xl) and xl != family.xl:
        kind, found = ("SDXL", "is not") if family.xl else ("Stable Diffusion 1 and 2", "is SDXL")
        raise ValueError(f"recipe {name}: it is for {kind}, this checkpoint {found}")
    return dataclasses.replace(
        recipe,
        sampler=family.sampler,
        steps=family.steps,
        guidance=family.guidance,
        spacing=family.spacing,
        prediction_type=family.prediction_type or recipe.prediction_type,
        eta=family.eta,
        timesteps=family.timesteps,
        name=name,
        allowed_steps=family.allowed_steps,
        guidance_range=family.guidance_range,
    )


def check(asked: Recipe, own: Recipe, otherwise: str = ", or --force to insist") -> None:
    """Raise RecipeRefusal unless `asked` keeps to what the bundle's `own` recipe allows.

    `otherwise` ends the line: what one can do but keep to it.
    """
    wrong, use = [], []
    for option in ("sampler", "spacing"):
        if own.allowed_steps and (found := getattr(asked, option)) != getattr(own, option):
            wrong.append(f"{option} {found}")
            use.append(f"--{option} {getattr(own, option)}")
    if own.allowed_steps and asked.steps not in own.allowed_steps:
        wrong.append(f"steps {asked.steps}")
        use.append(f"--steps {min(own.allowed_steps, key=lambda n: abs(n - asked.steps))}")
    if own.guidance_range is not None:
        low, high = own.guidance_range
        scale = asked.guidance or 1.0  # without guidance, either way
        if not low <= scale <= high:
            wrong.append(f"guidance {asked.guidance:g}")
            use.append(f"--guidance {min(max(scale, low), high):g}")
    if wrong:
        raise RecipeRefusal(
            f"{', '.join(wrong)}: this model was distilled for {limits(own)} ({own.name}): "
            f"use {' '.join(use)}{otherwise}"
        )


def limits(recipe: Recipe) -> str:
    """What a recipe allows, in words; empty if that is anything."""
    parts = []
    if recipe.allowed_steps:
        parts.append(f"{_steps(recipe.allowed_steps)} of {recipe.sampler}")
    if recipe.guidance_range == NONE:
        parts.append("no guidance")
    elif recipe.guidance_range:
        low, high = recipe.guidance_range
        parts.append(f"guidance {low:g} to {high:g}")
    return ", ".join(parts)


def _steps(allowed: tuple[int, ...]) -> str:
    first, last = min(allowed), max(allowed)
    if first == last:
        return "1 step" if last == 1 else f"{last} steps"
    if sorted(allowed) == list(range(first, last + 1)):
        return f"{first} to {last} steps"
    return f"{', '.join(map(str, allowed[:-1]))} or {allowed[-1]} steps"
