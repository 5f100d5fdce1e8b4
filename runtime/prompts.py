"""Prompts as they are written for Stable Diffusion: weights in brackets, chunks without limit.

The syntax is AUTOMATIC1111's: (word:1.3) weighs 1.3, (word) 1.1, [word] 1/1.1, a backslash takes
the next character as it is, BREAK begins a new chunk.  Docs: docs/prompts.md.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array32 = npt.NDArray[np.float32]

MORE, LESS = 1.1, 1 / 1.1  # of a pair of parentheses, and of brackets, without a number
MAX_WEIGHT = 100.0  # beyond it is a slip, and in the end infinity
MAX_CHUNKS = 32
MEANT = 0.01  # the least of a mean that says something, to that of the magnitudes
MARK = re.compile(r"\\(.?)|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|\bBREAK\b", re.DOTALL)


class Span(NamedTuple):
    """A piece of a prompt, and what the states of its tokens are multiplied by."""

    text: str
    weight: float


def parse(prompt: str) -> list[list[Span]]:
    """The sections of a prompt between one BREAK and the next, at least one; each is its spans.

    What closes nothing is text, what nothing closes reaches to the end.  Raises ValueError for a
    weight beyond MAX_WEIGHT.
    """
    sections: list[list[list]] = [[]]  # of [text, weight]
    pieces: list[list] = []  # of all sections, in order
    opened: list[tuple[str, int]] = []  # brackets, and the first piece inside each

    def add(text: str) -> None:
        if text:
            pieces.append([text, 1.0])
            sections[-1].append(pieces[-1])

    def close(bracket: str, weight: float) -> bool:
        at = next((i for i, (b, _) in reversed([*enumerate(opened)]) if b == bracket), None)
        if at is None:
            return False
        for piece in pieces[opened.pop(at)[1] :]:
            piece[1] *= weight
        return True

    end = 0
    for mark in MARK.finditer(prompt):
        add(prompt[end : mark.start()])
        end, found = mark.end(), mark[0]
        if mark[1] is not None:
            add(mark[1])
        elif found in ("(", "["):
            opened.append((found, len(pieces)))
        elif found == "BREAK":
            sections.append([])
        elif mark[2] is not None:
            if not close("(", float(mark[2])):
                add(found)
        elif not close("(" if found == ")" else "[", MORE if found == ")" else LESS):
            add(found)
    add(prompt[end:])
    for bracket, weight in (("(", MORE), ("[", LESS)):
        while close(bracket, weight):
            pass
    return [_merged(section) for section in sections]


def _merged(section: list[list]) -> list[Span]:
    """Neighbours of one weight are one span: words are not cut where nothing differs."""
    spans: list[Span] = []
    for text, weight in section:
        if not abs(weight) <= MAX_WEIGHT:
            shown = text if len(text) <= 40 else text[:39] + "…"
            raise ValueError(
                f"weight {weight:g} of {shown!r} in the prompt: it must be from {-MAX_WEIGHT:g} to "
                f"{MAX_WEIGHT:g}"
            )
        if spans and spans[-1].weight == weight:
            spans[-1] = Span(spans[-1].text + text, weight)
        else:
            spans.append(Span(text, weight))
    return spans


def escape(text: str) -> str:
    """`text` as a prompt that means it literally, brackets, backslashes and BREAK included."""
    return re.sub(r"[\\()\[\]]|\bBREAK\b", lambda mark: "\\" + mark[0], text)


def weigh(states: Array32, weights: Array32, restore: bool) -> Array32:
    """States, (1, tokens, channels), times weights, (1, tokens).

    With `restore`, the mean over all tokens and channels is then made what it was; but not where it
    is next to nothing, as the ratio would be noise.  Weights of 1 leave every byte as it is.
    """
    if (weights == 1).all():
        return states
    scaled = states * weights[..., None]
    before, after = states.mean(dtype=np.float64), scaled.mean(dtype=np.float64)
    size = MEANT * np.abs(states).mean(dtype=np.float64)
    if not restore or min(abs(before), abs(after)) < size:
        return scaled
    return scaled * np.float32(before / after)
