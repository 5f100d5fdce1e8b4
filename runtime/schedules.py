"""Noise schedules and timestep spacings as diffusers defines them: float64 arrays from a Recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..bundle import Recipe

Array = npt.NDArray[np.floating]
T = TypeVar("T")

ZERO_SNR_ALPHA = 2.0**-24  # stands for alpha_cumprod 0 where a sampler divides by it (diffusers)
KARRAS_RHO = 7.0


def linear(start: float, end: float, count: int) -> Array:
    return np.linspace(start, end, count)


def scaled_linear(start: float, end: float, count: int) -> Array:
    return np.linspace(start**0.5, end**0.5, count) ** 2


def squaredcos_cap_v2(start: float, end: float, count: int) -> Array:
    """Improved DDPM's cosine schedule (Nichol and Dhariwal 2021), which has no start and end."""
    alpha_bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETAS: dict[str, Callable[[float, float, int], Array]] = {
    "scaled_linear": scaled_linear,
    "linear": linear,
    "squaredcos_cap_v2": squaredcos_cap_v2,
}


def alphas_cumprod(recipe: Recipe) -> Array:
    """The share of signal left at each training timestep: (train_steps,), falling."""
    betas = choose("beta schedule", recipe.beta_schedule, BETAS)
    require_steps("train_steps", recipe.train_steps)
    if not 0 < recipe.beta_start <= recipe.beta_end < 1:
        found = f"{recipe.beta_start} and {recipe.beta_end}"
        raise ValueError(f"beta_start and beta_end must rise between 0 and 1, found {found}")
    cumprod = np.cumprod(1 - betas(recipe.beta_start, recipe.beta_end, recipe.train_steps))
    return zero_terminal_snr(cumprod) if recipe.zero_terminal_snr else cumprod


def zero_terminal_snr(cumprod: Array) -> Array:
    """Shift and stretch so that the last timestep is pure noise (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(cumprod)
    if root[0] == root[-1]:
        raise ValueError("zero terminal SNR needs at least 2 train_steps")
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def sigmas(cumprod: Array) -> Array:
    """Noise per unit of signal at each training timestep: (train_steps,), rising, finite."""
    cumprod = np.where(cumprod == 0, ZERO_SNR_ALPHA, cumprod)
    return np.sqrt((1 - cumprod) / cumprod)


def leading(steps: int, recipe: Recipe) -> Array:
    return np.arange(steps)[::-1] * float(recipe.train_steps // steps) + recipe.steps_offset


def trailing(steps: int, recipe: Recipe) -> Array:
    # The slice drops the extra point that arange can produce when its float step is a hair short.
    points = np.arange(recipe.train_steps, 0, -recipe.train_steps / steps)[:steps]
    return points.round() - 1  # half to even


def linspace(steps: int, recipe: Recipe) -> Array:
    return np.linspace(0, recipe.train_steps - 1, steps)[::-1]


def lcm(steps: int, recipe: Recipe, strength: float = 1.0) -> Array:
    """Evenly from the lattice of LCM's distillation; a lower strength shortens the lattice."""
    require_steps("original_steps", recipe.original_steps, recipe.train_steps)
    points = int(recipe.original_steps * strength)
    if steps > points:
        raise ValueError(
            f"{steps} steps need as many points of the lcm lattice, strength {strength} leaves "
            f"{points} of {recipe.original_steps}: take fewer steps or a higher strength"
        )
    lattice = np.arange(1, points + 1)[::-1] * (recipe.train_steps // recipe.original_steps) - 1.0
    return lattice[np.floor(np.linspace(0, points, steps, endpoint=False)).astype(int)]


SPACINGS: dict[str, Callable[[int, Recipe], Array]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "lcm": lcm,
}


def timesteps(
    recipe: Recipe, strength: float | None = None, whole: bool = True, open_end: bool = False
) -> Array:
    """The timesteps to visit, falling: (steps,), or fewer when an image gives a strength below 1.

    `whole` rounds linspace half to even.  `open_end` (solvers in log-SNR) spaces one more point,
    by leading and linspace, and leaves it out, so that the last step does not start at the end.
    """
    spacing = choose("spacing", recipe.spacing, SPACINGS)
    require_steps("steps", recipe.steps, recipe.train_steps)
    if recipe.timesteps:
        t: Array = np.array(recipe.timesteps, np.float64)
        if len(t) != recipe.steps:
            raise ValueError(f"{len(t)} timesteps are listed for {recipe.steps} steps: make equal")
        if whole and (t != t.round()).any():
            raise ValueError(f"{recipe.sampler} needs whole timesteps, found {recipe.timesteps}")
    elif spacing is lcm:
        return lcm(recipe.steps, recipe, 1.0 if strength is None else strength)
    elif open_end and spacing in (leading, linspace):
        t = spacing(recipe.steps + 1, recipe)[:-1]
    else:
        t = spacing(recipe.steps, recipe)
    t = t.round() if whole else t
    if not (np.diff(t) < 0).all() or t[0] > recipe.train_steps - 1 or t[-1] < 0:
        raise ValueError(
            f"{recipe.spacing} timesteps run from {t[0]:g} to {t[-1]:g} in {recipe.steps} steps; "
            f"they must fall strictly, within 0 and {recipe.train_steps - 1}: take fewer steps"
        )
    return tail(t, strength)


def tail(t: Array, strength: float | None) -> Array:
    """The last share of the steps, for a start from an image (diffusers' get_timesteps)."""
    kept = len(t) if strength is None else int(len(t) * strength)
    if kept < 1:
        raise ValueError(
            f"strength {strength} leaves none of {len(t)} steps: "
            f"use at least {1 / len(t):.3g}, or more steps"
        )
    return t[len(t) - kept :]


def karras(sigma: Array, steps: int) -> Array:
    """Sigmas from the noisiest to the cleanest level, even in sigma^(1/7) (Karras et al. 2022)."""
    ramp = np.linspace(0, 1, steps)
    low, high = sigma[0] ** (1 / KARRAS_RHO), sigma[-1] ** (1 / KARRAS_RHO)
    return (high + ramp * (low - high)) ** KARRAS_RHO


def timestep_of(sigma: Array, levels: Array) -> Array:
    """Where `sigma` lies among the rising `levels`, linear in log sigma; fractional."""
    return np.interp(np.log(sigma), np.log(levels), np.arange(len(levels), dtype=np.float64))


def choose(what: str, name: str, table: dict[str, T]) -> T:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(table)}")
    return table[name]


def require_steps(what: str, value: int, limit: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{what} must be a whole number from 1, found {value!r}")
    if limit is not None and value > limit:
        raise ValueError(f"{what} is {value}, the most is {limit} (train_steps): take fewer")
