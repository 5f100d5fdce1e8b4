"""A picture decoded in tiles that fade into each other: less memory, not quite the same.

What a tile does not see, its group norms and its attention do not know: docs/memory.md says how far
that changes a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array32 = npt.NDArray[np.float32]

SIDES = (512, 256, 128)  # pixels
OVERLAP = 4  # a tile shares this part of its side with the next: diffusers' quarter
PIXEL = 28  # bytes per pixel of the picture while it is put together


def starts(length: int, tile: int) -> list[int]:
    """Where tiles start so that they cover `length`; the last ends with it."""
    if length <= tile:
        return [0]
    step = tile - tile // OVERLAP
    count = math.ceil((length - tile) / step) + 1
    return [min(i * step, length - tile) for i in range(count)]


def count(size: tuple[int, int], side: int) -> int:
    """Tiles of a picture."""
    return len(starts(size[0], side)) * len(starts(size[1], side))


def decode(latents: Array32, side: int, scale: int, run: Callable[[Array32], Array32]) -> Array32:
    """The picture, (1, 3, scale h, scale w), of latents (1, c, h, w) in tiles of `side` pixels.

    `run` decodes one tile.  Weights of neighbours fade linearly over what they share.
    """
    _, _, h, w = latents.shape
    tile = side // scale
    picture = np.zeros((1, 3, scale * h, scale * w), np.float32)
    total = np.zeros((scale * h, scale * w), np.float32)
    for y in starts(h, tile):
        for x in starts(w, tile):
            piece = run(latents[:, :, y : y + tile, x : x + tile])
            height, width = piece.shape[2:]
            fade = np.outer(_fade(height, side), _fade(width, side))
            rows = slice(scale * y, scale * y + height)
            columns = slice(scale * x, scale * x + width)
            picture[:, :, rows, columns] += piece * fade
            total[rows, columns] += fade
    picture /= total
    return picture


def _fade(length: int, side: int) -> Array32:
    """Weights along a side: up over what is shared, level, and down again; nowhere zero."""
    shared = side // OVERLAP
    place = np.arange(length)
    return np.minimum((np.minimum(place, place[::-1]) + 1) / (shared + 1), 1).astype(np.float32)
