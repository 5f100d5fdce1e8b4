"""Samplers as tables: step i is a row of numbers, and one loop of a few lines runs every row.

    denoised = a*x + b*model(scale*x, timestep)
    x = cx*x + c0*denoised + c1*previous + c2*before + cn*noise

A table is computed in float64 and rounded once to float32.  Format and loop: docs/samplers.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..bundle import Recipe
from . import schedules
from .schedules import Array

FORMAT = "ferrotype-sampler"
VERSION = 1
FLOAT32_MAX = float(np.finfo(np.float32).max)
KEYS = {"format", "version", "sampler", "start_image", "start_noise", "columns", "rows"}

Array32 = npt.NDArray[np.float32]
Model = Callable[[Array32, float], Array32]  # (scaled x, timestep) -> model output
Noise = Callable[[tuple[int, ...]], Array32]  # a draw from runtime.seeds


class Row(NamedTuple):
    """One step; every number is exactly a float32."""

    timestep: float  # fed to the network; fractional for Euler with linspace
    scale: float  # of the network's input
    a: float  # denoised = a*x + b*output, which is all that a prediction type is
    b: float
    cx: float  # the new x from x,
    c0: float  # from this step's denoised,
    c1: float  # the step's before
    c2: float  # and the one's before that,
    cn: float  # and from new noise


@dataclass(frozen=True)
class Table:
    sampler: str
    start_image: float  # first x = start_image*latents + start_noise*noise; 0 without an image
    start_noise: float
    rows: tuple[Row, ...]


class Step(NamedTuple):
    index: int  # type: ignore[assignment]  # 1 to total; hides tuple.index, which nobody needs
    total: int
    latents: Array32
    denoised: Array32  # the network's present idea of the result, for a preview


def table(recipe: Recipe, strength: float | None = None) -> Table:
    """The rows of a recipe; `strength` in (0, 1] is for a start from an image, None from noise."""
    sampler = schedules.choose("sampler", recipe.sampler, SAMPLERS)
    schedules.choose("prediction type", recipe.prediction_type, PREDICTIONS)
    if not 0 <= recipe.eta <= 1:
        raise ValueError(f"eta is {recipe.eta}: it must be from 0 to 1")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}: it must be above 0 and at most 1")
    plan = sampler(recipe, strength)
    columns = np.stack(np.broadcast_arrays(*plan.columns), axis=1)
    if not np.isfinite(columns).all():
        raise ValueError(
            f"{recipe.sampler} with {recipe.prediction_type} prediction has no finite steps from "
            f"timestep {columns[0, 0]:g}: at zero SNR only v_prediction or sample works"
        )
    rows = (Row(*row) for row in (columns.astype(np.float32) + 0).tolist())  # + 0: no -0
    first = plan.text_start if strength is None else plan.image_start
    image, noise = np.array(first, np.float32).tolist()
    return Table(recipe.sampler, image, noise, tuple(rows))


def start(table: Table, noise: Array32, image: Array32 | None = None) -> Array32:
    """The first x from a draw of noise and, for a table made with a strength, image latents."""
    if table.start_image and image is None:
        raise ValueError("this table starts from an image: give its latents, or no strength")
    return _sum((table.start_image, image), (table.start_noise, noise))


def sample(model: Model, x: Array32, table: Table, noise: Noise) -> Iterator[Step]:
    """Run the table from x: float32 throughout, one Step after each row."""
    previous = before = None
    for index, row in enumerate(table.rows, 1):
        output = model(_sum((row.scale, x)), row.timestep)
        denoised = _sum((row.a, x), (row.b, output))
        fresh = noise(x.shape) if row.cn else None
        x = _sum(
            (row.cx, x), (row.c0, denoised), (row.c1, previous), (row.c2, before), (row.cn, fresh)
        )
        yield Step(index, len(table.rows), x, denoised)
        previous, before = denoised, previous


def _sum(*terms: tuple[float, Array32 | None]) -> Array32:
    """Products added left to right in float32; one with a zero coefficient does not exist."""
    first, *rest = (np.float32(c) * np.asarray(v, np.float32) for c, v in terms if c)
    for term in rest:
        first = first + term
    return first


class Plan(NamedTuple):
    """What a sampler returns: a Table before rounding; columns in the order of Row."""

    columns: tuple[Array | npt.NDArray[np.int_] | float, ...]
    text_start: tuple[float, float]
    image_start: tuple[float, float]


# (a, b) of denoised = a*x + b*output, where x = alpha*clean + sigma*noise, alpha^2 + sigma^2 = 1
PREDICTIONS: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v_prediction": lambda alpha, sigma: (alpha, -sigma),
    "sample": lambda alpha, sigma: (0 * alpha, 1 + 0 * alpha),
}


def ddim(recipe: Recipe, strength: float | None) -> Plan:
    """DDIM (Song et al. 2021), with eta."""
    cumprod = schedules.alphas_cumprod(recipe)
    t = schedules.timesteps(recipe, strength).astype(int)
    if recipe.timesteps or recipe.spacing == "lcm":
        after = np.append(t[1:], -1)
    else:
        after = t - recipe.train_steps // recipe.steps  # near, not equal to, the next timestep
    end = 1.0 if recipe.set_alpha_to_one else cumprod[0]
    now, target = cumprod[t], np.where(after < 0, end, cumprod[after])
    cn = recipe.eta * np.sqrt((1 - target) / (1 - now) * (1 - now / target))
    cx = np.sqrt(np.maximum(1 - target - cn**2, 0) / (1 - now))
    return _variance_preserving(recipe, t, now, cx, np.sqrt(target) - cx * np.sqrt(now), cn=cn)


def lcm(recipe: Recipe, strength: float | None) -> Plan:
    """Latent consistency model (Luo et al. 2023): denoise, then back to the next noise level."""
    cumprod = schedules.alphas_cumprod(recipe)
    t = _consistency_timesteps(recipe, strength)
    target = np.append(cumprod[t[1:]], 1)
    plan = _variance_preserving(recipe, t, cumprod[t], 0, np.sqrt(target), cn=np.sqrt(1 - target))
    # The boundary condition: at t = 0 the model's answer would be x itself.
    scaled = t * recipe.timestep_scaling
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
    _, scale, a, b, *rest = plan.columns
    return plan._replace(columns=(t, scale, out * a + skip, out * b, *rest))


def tcd(recipe: Recipe, strength: float | None) -> Plan:
    """Trajectory consistency (Zheng et al. 2024): eta is gamma, the noise put back at a step."""
    cumprod = schedules.alphas_cumprod(recipe)
    t = _consistency_timesteps(recipe, strength)
    after = np.append(t[1:], 0)
    # In float32 as diffusers, because the floor of a product that is nearly whole is an index.
    s = np.floor(np.float32(1 - recipe.eta) * after.astype(np.float32)).astype(int)
    now, there, target = cumprod[t], cumprod[s], cumprod[after]
    back = np.sqrt(target / there)
    cx = back * np.sqrt((1 - there) / (1 - now))
    c0 = back * np.sqrt(there) - cx * np.sqrt(now)
    return _variance_preserving(recipe, t, now, cx, c0, cn=np.sqrt(1 - target / there))


def euler(recipe: Recipe, strength: float | None) -> Plan:
    """Euler's method on the ODE in x = clean + sigma*noise (Karras et al. 2022)."""
    t, sigma = _euler_levels(recipe, strength)
    cx = sigma[1:] / sigma[:-1]
    return _variance_exploding(recipe, t, sigma, cx, 1 - cx)


def euler_a(recipe: Recipe, strength: float | None) -> Plan:
    """Ancestral Euler: to a level below the target, then noise back up to it."""
    t, sigma = _euler_levels(recipe, strength)
    cn = sigma[1:] * np.sqrt(1 - (sigma[1:] / sigma[:-1]) ** 2)
    cx = np.sqrt(sigma[1:] ** 2 - cn**2) / sigma[:-1]
    return _variance_exploding(recipe, t, sigma, cx, 1 - cx, cn)


def dpmpp_2m(recipe: Recipe, strength: float | None) -> Plan:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022); first order in the first and the last step."""
    t = schedules.timesteps(recipe, strength, open_end=True)
    levels = schedules.sigmas(schedules.alphas_cumprod(recipe))
    return _dpmpp_2m(recipe, t, np.append(levels[t.astype(int)], 0))


def dpmpp_2m_karras(recipe: Recipe, strength: float | None) -> Plan:
    """DPM-Solver++(2M) on the sigmas of Karras et al., whatever the spacing."""
    if recipe.timesteps:
        raise ValueError("dpmpp_2m_karras places its own timesteps: leave recipe.timesteps empty")
    schedules.require_steps("steps", recipe.steps, recipe.train_steps)
    levels = schedules.sigmas(schedules.alphas_cumprod(recipe))
    sigma = schedules.tail(schedules.karras(levels, recipe.steps), strength)
    t = schedules.timestep_of(sigma, levels).round()
    return _dpmpp_2m(recipe, t, np.append(sigma, 0))


def _dpmpp_2m(recipe: Recipe, t: Array, sigma: Array) -> Plan:
    alpha, s, h = _log_snr(sigma)
    cx = s[1:] / s[:-1]
    whole = alpha[1:] - cx * alpha[:-1]
    half = np.zeros_like(h)  # the share of the extrapolation from the previous denoised
    half[1:-1] = h[1:-1] / h[:-2] / 2
    c0, c1 = whole * (1 + half), -whole * half
    return _variance_preserving(recipe, t, alpha[:-1] ** 2, cx, c0, c1, sigma=s[:-1])


def unipc(recipe: Recipe, strength: float | None) -> Plan:
    """UniPC of order 2, bh2 (Zhao et al. 2023).

    Its corrector replaces the last prediction made by a better one once `denoised` is known.  Both
    carry the same x over, so correcting means adding the difference of their weights to x.
    """
    t = schedules.timesteps(recipe, strength, open_end=True)
    levels = schedules.sigmas(schedules.alphas_cumprod(recipe))
    alpha, s, h = _log_snr(np.append(levels[t.astype(int)], 0))
    cx = s[1:] / s[:-1]
    c = np.zeros((3, len(t)))  # weights of this, the previous and the denoised before
    steps = len(t)
    predictor = np.zeros(2)
    for i in range(steps):
        if i > 0:
            r = -h[i - 2] / h[i - 1] if i > 1 else None
            c[:, i] = _unipc_corrector(h[i - 1], r) * _whole(alpha, cx, i - 1)
            c[1:, i] -= predictor
        w = -0.5 * h[i] / h[i - 1] if 0 < i < steps - 1 else 0.0
        predictor = np.array([1 - w, w]) * _whole(alpha, cx, i)
        c[:, i] = cx[i] * c[:, i] + [*predictor, 0]
    return _variance_preserving(recipe, t, alpha[:-1] ** 2, cx, c[0], c[1], c[2], sigma=s[:-1])


def _whole(alpha: Array, cx: Array, i: int) -> float:
    return alpha[i + 1] - cx[i] * alpha[i]


def _unipc_corrector(h: float, r: float | None) -> Array:
    """Weights of the denoised at the end, the start and before the start of a step of length h."""
    if r is None:
        return np.array([0.5, 0.5, 0.0])
    b = math.expm1(-h)
    b1 = (b / -h - 1) / b
    b2 = ((b / -h - 1) / -h - 0.5) * 2 / b
    before = (b1 - b2) / (1 - r)
    end = b1 - before
    return np.array([end, 1 - end - before / r, before / r])


SAMPLERS: dict[str, Callable[[Recipe, float | None], Plan]] = {
    "ddim": ddim,
    "euler": euler,
    "euler_a": euler_a,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_karras": dpmpp_2m_karras,
    "unipc": unipc,
    "lcm": lcm,
    "tcd": tcd,
}


ETA = {"tcd": 0.3}  # what a sampler is run with where nothing else is said; 0 for the others


def _consistency_timesteps(recipe: Recipe, strength: float | None) -> npt.NDArray[np.int_]:
    if recipe.spacing == "leading" and not recipe.timesteps:
        raise ValueError(
            f"{recipe.sampler} has to start at the noisiest timestep, leading does not: "
            "set spacing to lcm (its lattice) or trailing"
        )
    return schedules.timesteps(recipe, strength).astype(int)


def _euler_levels(recipe: Recipe, strength: float | None) -> tuple[Array, Array]:
    """Timesteps, fractional with linspace, and their sigmas, interpolated, with a final 0."""
    t = schedules.timesteps(recipe, strength, whole=False)
    levels = schedules.sigmas(schedules.alphas_cumprod(recipe))
    return t, np.append(np.interp(t, np.arange(len(levels)), levels), 0)


def _log_snr(sigma: Array) -> tuple[Array, Array, Array]:
    """alpha, sigma (their squares sum to 1), and the steps in log(alpha/sigma), last infinite."""
    alpha = 1 / np.sqrt(sigma**2 + 1)
    h = np.append(np.log(sigma[:-2] / sigma[1:-1]), np.inf)
    return alpha, sigma * alpha, h


def _variance_preserving(
    recipe: Recipe,
    t: Array | npt.NDArray[np.int_],
    cumprod: Array,
    cx: Array | float,
    c0: Array,
    c1: Array | float = 0.0,
    c2: Array | float = 0.0,
    cn: Array | float = 0.0,
    sigma: Array | None = None,
) -> Plan:
    alpha = np.sqrt(cumprod)
    sigma = np.sqrt(1 - cumprod) if sigma is None else sigma
    with np.errstate(divide="ignore"):  # table() refuses what is not finite
        a, b = PREDICTIONS[recipe.prediction_type](alpha, sigma)
    return Plan((t, 1.0, a, b, cx, c0, c1, c2, cn), (0.0, 1.0), (alpha[0], sigma[0]))


def _variance_exploding(
    recipe: Recipe, t: Array, sigma: Array, cx: Array, c0: Array, cn: Array | float = 0.0
) -> Plan:
    scale = 1 / np.sqrt(sigma[:-1] ** 2 + 1)
    a, b = PREDICTIONS[recipe.prediction_type](scale, sigma[:-1] * scale)
    noise = sigma[0] if recipe.spacing != "leading" else math.hypot(sigma[0], 1)
    columns = (t, scale, a * scale, b, cx, c0, 0.0, 0.0, cn)
    return Plan(columns, (0.0, noise), (1.0, sigma[0]))


def to_json(table: Table) -> str:
    """The table as a JSON text of one line per row; docs/samplers.md is the schema."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "sampler": table.sampler,
        "start_image": _shortest(table.start_image),
        "start_noise": _shortest(table.start_noise),
        "columns": Row._fields,
    }
    rows = ",\n".join("  " + json.dumps([_shortest(value) for value in row]) for row in table.rows)
    lines = [f' "{key}": {json.dumps(value)},\n' for key, value in head.items()]
    return "{\n" + "".join(lines) + ' "rows": [\n' + rows + "\n ]\n}\n"


def from_json(text: str) -> Table:
    """The exact table that to_json wrote; anything else is a ValueError that says what is wrong."""
    try:
        raw = json.loads(text)
        found = raw["format"], raw["version"]
        if found != (FORMAT, VERSION):  # first: a newer version may have keys we do not know
            raise ValueError(f"it is {found}, we read {(FORMAT, VERSION)}; make it again")
        if unknown := ", ".join(raw.keys() - KEYS):
            raise ValueError(f"unknown key {unknown}")
        if tuple(raw["columns"]) != Row._fields:
            raise ValueError(f"columns are {raw['columns']}, not {list(Row._fields)}")
        rows = tuple(Row(*(_float32(value) for value in row)) for row in raw["rows"])
        if not rows:
            raise ValueError("it has no rows")
        image, noise = _float32(raw["start_image"]), _float32(raw["start_noise"])
        return Table(str(raw["sampler"]), image, noise, rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a sampler table: {error}") from error


def format_table(table: Table) -> str:
    """The table as aligned text, without the columns that are zero throughout."""
    kept = [i for i, column in enumerate(zip(*table.rows, strict=True)) if i == 0 or any(column)]
    lines = [[Row._fields[i] for i in kept]]
    lines += [[f"{row[i]:.7g}" for i in kept] for row in table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    image, noise = table.start_image, table.start_noise
    head = f"{table.sampler}: x = {f'{image:.7g}*image + ' if image else ''}{noise:.7g}*noise"
    body = ("  ".join(map(str.rjust, line, widths)) for line in lines)
    return "\n".join([head, *body])


def _shortest(value: float) -> float:
    """The double with the fewest digits that rounds to the same float32."""
    short = float(str(np.float32(value)))
    return short if np.float32(short) == np.float32(value) else value


def _float32(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    if not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"{value!r} is not a finite float32")
    return float(np.float32(value))
