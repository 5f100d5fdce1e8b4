"""What every conversion is checked with: prompts, a seed, a picture of all colours."""

from __future__ import annotations

import numpy as np

PROMPT = "a red apple on a sky blue background"
OTHER_PROMPTS = ("", "a photograph of an old fisherman's boat, sunset, 35 mm")
SEED = 0
MAX_STEPS = 8  # of the end-to-end run: every noise level of a long recipe is seldom worth minutes
NORM_INPUT = " (input)"  # added to the name of a norm for what goes into it
PATCHES = 6  # a side of the picture of all colours

Pair = tuple[np.ndarray, np.ndarray]


def colour_field(width: int, height: int) -> np.ndarray:
    """A smooth picture of every colour, (1, 3, height, width) in [-1, 1]; always the same."""
    rows = np.random.RandomState(0).uniform(-1, 1, (3, PATCHES, PATCHES))
    for size in (width, height):  # between the patches' centres, along the last axis and then back
        places = (np.arange(size) + 0.5) * PATCHES / size - 0.5
        lower = np.clip(np.floor(places).astype(int), 0, PATCHES - 2)
        share = np.clip(places - lower, 0, 1)
        rows = (1 - share) * rows[..., lower] + share * rows[..., lower + 1]
        rows = rows.swapaxes(1, 2)
    return rows[None].astype(np.float32)


def fit_preview(pairs: list[Pair], scale: int) -> np.ndarray:
    """The least-squares map from a latent to the mean colour of its pixels: (channels + 1, 3).

    A pair is latents, (1, channels, height, width), and their picture, `scale` times as large.
    """
    designs, colours = [], []
    for latents, image in pairs:
        channels, height, width = latents.shape[1:]
        flat = latents.reshape(channels, -1).T
        designs.append(np.column_stack([flat, np.ones(len(flat))]))
        blocks = image.reshape(3, height, scale, width, scale).mean((2, 4), np.float64)
        colours.append(blocks.reshape(3, -1).T)
    return np.linalg.lstsq(np.concatenate(designs), np.concatenate(colours), rcond=None)[0]
