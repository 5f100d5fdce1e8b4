"""Drawing plots as SVG: text, lines, bars, in colours that follow light and dark.

Pictures have a width in pixels and are shown at it: the page has each plot twice, for a desk and
for a phone, so that letters are of one size on both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

LETTER = 0.6  # mean width of a letter, as a part of the type's size
SIZE = 13  # of type, in pixels
# By name: in the light and in the dark.  Stages keep theirs in every plot.
COLORS = {
    "ground": ("#ffffff", "#15181c"), "ink": ("#1c2127", "#e7eaee"),
    "quiet": ("#5a6572", "#9aa5b1"), "rule": ("#e2e6ea", "#2c333b"),
    "load": ("#8b96a5", "#7b8796"), "text": ("#c8752a", "#e39a52"),
    "text2": ("#dcaa4a", "#d9b566"), "unet": ("#2c6fa3", "#5fa5d9"),
    "vae": ("#3f8f63", "#6fbf90"), "other": ("#c4cbd3", "#48515b"),
    "bad": ("#b3382c", "#f0897d"), "good": ("#2f7d4f", "#7acb98"),
    "a": ("#2c6fa3", "#5fa5d9"), "b": ("#c8752a", "#e39a52"), "c": ("#3f8f63", "#6fbf90"),
    "d": ("#8d5aa6", "#bd8fd4"), "e": ("#b0457a", "#e58bb6"), "f": ("#5a6572", "#9aa5b1"),
}  # fmt: skip
SERIES = ("a", "b", "c", "d", "e", "f")
STAGE_COLORS = {
    "load": "load", "text_encoder": "text", "text_encoder_2": "text2", "unet": "unet",
    "vae_encoder": "vae", "vae_decoder": "vae", "other": "other",
}  # fmt: skip
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"


def variables() -> str:
    """The colours as CSS, of an element that is the root of a page or of a picture."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLORS.items()) for i in (0, 1))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


class Canvas:
    """A picture of a width that grows downwards: `height` may be set until it is written."""

    def __init__(self, width: int, height: float = 0, title: str = "") -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", color: str = "ink",
        size: float = SIZE, bold: bool = False,
    ) -> None:  # fmt: skip
        """`y` is the line that letters stand on."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}"{weight} '
            f'fill="var(--{color})">{escape(text)}</text>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, *, color: str = "rule",
        width: float = 1, dash: str = "",
    ) -> None:  # fmt: skip
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke="var(--{color})" stroke-width="{width:g}"{dashed}/>'
        )

    def bar(
        self, x: float, y: float, width: float, height: float, color: str, about: str = "",
        *, opacity: float = 1.0,
    ) -> None:  # fmt: skip
        """With what is said where a mouse rests on it."""
        faint = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
        told = f"<title>{escape(about)}</title>" if about else ""
        self._parts.append(
            f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0):.2f}" height="{height:.1f}" '
            f'fill="var(--{color})"{faint}>{told}</rect>'
        )

    def dot(self, x: float, y: float, radius: float, color: str, about: str = "") -> None:
        told = f"<title>{escape(about)}</title>" if about else ""
        self._parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="var(--{color})">{told}'
            "</circle>"
        )

    def path(
        self, points: Sequence[tuple[float, float]], *, color: str, fill: bool = False,
        width: float = 1.5, dash: str = "", opacity: float = 1.0,
    ) -> None:  # fmt: skip
        """Points joined by lines, or the area that they enclose."""
        place = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        faint = f' opacity="{opacity:g}"' if opacity < 1 else ""
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        look = f'fill="var(--{color})"' if fill else (
            f'fill="none" stroke="var(--{color})" stroke-width="{width:g}" stroke-linejoin="round"'
        )  # fmt: skip
        self._parts.append(f'<path d="{place}{"Z" if fill else ""}" {look}{dashed}{faint}/>')

    def legend(self, entries: Sequence[tuple[str, str]], y: float) -> float:
        """Colours and what they stand for, in as many lines as they take; the y below."""
        x = 0.0
        for color, text in entries:
            wide = 18 + width_of(text) + 14
            if x and x + wide > self.width:
                x, y = 0.0, y + 20
            self.bar(x, y - 10, 11, 11, color)
            self.text(x + 17, y, text, color="quiet")
            x += wide
        return y + 14

    def svg(self, alone: bool = False) -> str:
        """The picture, for a page that has the colours; `alone`: as a file of its own."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" ' \
               f'height="{self.height:.0f}" viewBox="0 0 {self.width} {self.height:.0f}" ' \
               f'role="img" font-family="{FONT}">'  # fmt: skip
        name = f"<title>{escape(self.title)}</title>" if self.title else ""
        own = ""
        if alone:
            own = f"<style>{variables()}</style>"
            head = head.replace(
                f'viewBox="0 0 {self.width} {self.height:.0f}"',
                f'viewBox="-16 -12 {self.width + 32} {self.height + 24:.0f}"',
            )
            own += (f'<rect x="-16" y="-12" width="{self.width + 32}" '
                    f'height="{self.height + 24:.0f}" fill="var(--ground)"/>')  # fmt: skip
        return head + own + name + "".join(self._parts) + "</svg>"


def width_of(text: str, size: float = SIZE) -> float:
    """Roughly, in pixels."""
    return LETTER * size * len(text)


def shortened(text: str, room: float, size: float = SIZE) -> str:
    """The text, or as much of its beginning as has room."""
    most = max(3, int(room / (LETTER * size)))
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values from at or above `low` to at or below `high`, about so many."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    rough = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((f * power for f in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points as a line that keeps each height until the next begins."""
    found = [points[0]]
    for (_, y), (x, next_y) in pairwise(points):
        found += [(x, y), (x, next_y)]
    return found
