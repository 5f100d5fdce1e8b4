"""What fewer bits did to the pictures: figures by picture, and a sheet for the eye."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .. import parity
from ..bundle import Bundle
from ..runtime.memory import MIB
from ..runtime.pipeline import Pipeline

PROMPTS = (  # none of them is one of calibrate.PROMPTS
    "a red heart",
    "a slice of pizza",
    "a rocket",
    "a house with a garden",
    "a blue bird on a branch",
    "a cup of coffee",
    "a portrait of a young woman",
    "a mountain lake in the morning",
)
SEEDS = (0, 1)
ROWS = 8  # of a sheet
SIDE = 512  # pixels of a picture on it, at most
GAP, LINE = 8, 20
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
WINDOW, SIGMA = 11, 1.5
AMPLIFIED = 8
PAGE, PLOT = (680, 400), (70, 40, 630, 350)  # pixels: of a plot, and of what is inside its axes
GRID, CURVE, CHOSEN = "#dddddd", "#2277bb", "#cc2222"


@dataclass(frozen=True)
class Drawn:
    """A picture, (height, width, 3) in 0..1, before and after."""

    prompt: str
    seed: int
    before: np.ndarray
    after: np.ndarray

    @property
    def psnr(self) -> float:
        """In dB, to the range of 1."""
        return parity.psnr(self.before, self.after, peak=1.0)

    @property
    def ssim(self) -> float:
        """Of luma."""
        return ssim(self.before @ LUMA, self.after @ LUMA)


def draw(
    source: Bundle,
    made: Bundle,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = SEEDS,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    progress: Callable[[str], None] = lambda prompt: None,
) -> list[Drawn]:
    """Every prompt with every seed by both bundles."""
    pipes = [Pipeline(bundle, resident=True) for bundle in (source, made)]
    found = []
    for prompt in prompts:
        progress(prompt)
        for seed in seeds:
            pictures = []
            for pipe in pipes:
                *_, last = pipe.steps(prompt, seed=seed, steps=steps, size=size)
                pictures.append(pipe.decode_array(last.latents))
            found.append(Drawn(prompt, seed, *pictures))
    return found


def figures(drawn: Sequence[Drawn]) -> dict[str, object]:
    """For the manifest: by picture, the means and the worst."""
    rows = [
        {"prompt": d.prompt, "seed": d.seed, "psnr": round(d.psnr, 2), "ssim": round(d.ssim, 4)}
        for d in drawn
    ]
    psnr, similar = [d.psnr for d in drawn], [d.ssim for d in drawn]
    return {
        "pictures": rows,
        "mean_psnr": round(float(np.mean(psnr)), 2),
        "worst_psnr": round(min(psnr), 2),
        "mean_ssim": round(float(np.mean(similar)), 4),
        "worst_ssim": round(min(similar), 4),
    }


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two images in 0..1, (height, width), 11 pixels or more each way.

    Wang et al. 2004: a Gaussian window of 11 pixels, sigma 1.5, where it fits.
    """
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()

    def mean(x: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            x = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis) @ weights
        return x

    a, b = a.astype(np.float64), b.astype(np.float64)
    low, mid = 0.01**2, 0.03**2
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    both = mean(a * b) - mean_a * mean_b
    index = (2 * mean_a * mean_b + low) * (2 * both + mid)
    index /= (mean_a**2 + mean_b**2 + low) * (var_a + var_b + mid)
    return float(index.mean())


def sheet(drawn: Sequence[Drawn]) -> Image.Image:
    """Rows of the original, what became of it, and their difference, amplified."""
    shown = _spread(drawn, ROWS)
    height, width = shown[0].before.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    across, down = 3 * w + 4 * GAP, len(shown) * (h + LINE + GAP) + LINE + GAP
    page = Image.new("RGB", (across, down), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column, title in enumerate(("original", "quantized", f"difference x {AMPLIFIED}")):
        pen.text((GAP + column * (w + GAP), 4), title, "black", font)
    for row, d in enumerate(shown):
        top = LINE + row * (h + LINE + GAP)
        difference = 0.5 + AMPLIFIED / 2 * (d.after - d.before)
        for column, picture in enumerate((d.before, d.after, difference)):
            pixels = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
            image = Image.fromarray(pixels).resize((w, h), Image.Resampling.LANCZOS)
            page.paste(image, (GAP + column * (w + GAP), top))
        figure = f"{d.psnr:.1f} dB, SSIM {d.ssim:.3f}"
        label = _cut(pen, font, f"{d.prompt}, seed {d.seed}", across - pen.textlength(figure, font))
        pen.text((GAP, top + h + 2), label, "black", font)
        right = across - GAP - pen.textlength(figure, font)
        pen.text((right, top + h + 2), figure, "black", font)
    return page


def frontier(
    curve: Sequence[Mapping[str, float]],
    uniform: Mapping[str, Mapping[str, float]],
    chosen: float,
) -> Image.Image:
    """Size against quality: the best of every size, recipes of one form, and the bytes chosen.

    Points are those of `mixed.frontier` and `mixed.uniform_points`.
    """
    every = [*curve, *uniform.values()]
    sizes, dbs = [p["bytes"] / MIB for p in every], [p["psnr"] for p in every]
    left, top, right, bottom = PLOT
    low, high = (pick(dbs) for pick in (min, max))

    def place(mib: float, db: float) -> tuple[float, float]:
        x = left + (right - left) * math.log(mib / min(sizes)) / math.log(max(sizes) / min(sizes))
        return x, bottom - (bottom - top) * (db - low) / max(high - low, 1e-9)

    page = Image.new("RGB", PAGE, "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for db in range(10 * math.ceil(low / 10), math.floor(high) + 1, 10):
        y = place(min(sizes), db)[1]
        pen.line((left, y, right, y), GRID)
        pen.text((left - 8, y), f"{db} dB", "black", font, "rm")
    for mib in np.geomspace(min(sizes), max(sizes), 5):
        x = place(mib, low)[0]
        pen.line((x, bottom, x, bottom + 5), "black")
        pen.text((x, bottom + 8), f"{mib:,.3g} MiB", "black", font, "mt")
    pen.line([place(p["bytes"] / MIB, p["psnr"]) for p in curve], CURVE, 2)
    for form, point in uniform.items():
        x, y = place(point["bytes"] / MIB, point["psnr"])
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), "black")
        pen.text((x + 8, y - 6), f"{form} for all", "black", font, "lb")
    at = np.interp(chosen, [p["bytes"] for p in curve], [p["psnr"] for p in curve])
    x, y = place(chosen / MIB, float(at))
    pen.ellipse((x - 6, y - 6, x + 6, y + 6), CHOSEN)
    pen.text((x - 10, y - 8), f"chosen: {chosen / MIB:,.1f} MiB", CHOSEN, font, "rb")
    pen.text((left, 12), "weights against the picture's expected PSNR", "black", font)
    return page


def _spread(drawn: Sequence[Drawn], most: int) -> list[Drawn]:
    """So many at most: the worst, and others between it and the best."""
    ordered = sorted(drawn, key=lambda d: d.psnr)
    places = np.linspace(0, len(ordered) - 1, min(most, len(ordered))).round().astype(int)
    return [ordered[i] for i in places]


def _cut(pen: ImageDraw.ImageDraw, font: Any, text: str, room: float) -> str:
    text = "".join(c if " " <= c <= "~" else "?" for c in text)  # what the font has
    while len(text) > 1 and pen.textlength(text, font) > room - 3 * GAP:
        text = text[:-2] + "-"
    return text
