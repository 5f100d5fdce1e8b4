"""What every layer reads while pictures are drawn: second moments and ranges, step by step.

A native bundle draws as it does for a user, few steps from noise; between its ops the inputs of
matrix products are added up.  No data set is needed but prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..bundle import Bundle, Sizes
from ..errors import FerrotypeError
from ..kernels import Kind
from ..runtime.engines import Arrays
from ..runtime.engines.ops import Ops
from ..runtime.pipeline import Pipeline
from ..runtime.program import Node, padded
from ..runtime.seeds import SEEDS

SIDE, STEPS = 256, 4  # of the pictures that are measured with, at most, if nobody says otherwise
MAX_PIXELS = 4096  # of an op's input that are added up in a run: evenly spread
PROMPTS = (
    "a red apple on a sky blue background",
    "a photo of a cat",
    "a castle on a hill at sunset",
    "a portrait of an old man with a hat",
    "a yellow car in the street",
    "a bowl of soup, close up",
    "a green tree in the snow",
    "a smiling robot",
)


class CalibrationError(FerrotypeError):
    """Nothing to calibrate with, or a bundle that cannot be watched."""


@dataclass
class Moments:
    """Of the inputs of one matrix, padded as the engine pads them, over all runs."""

    second: np.ndarray  # (inputs, inputs) float64: sum of x x^T
    count: int = 0  # pixels that it is the sum of
    ranges: list[float] = field(default_factory=list)  # largest magnitude, by run of a picture

    def add(self, x: np.ndarray, step: int) -> None:
        """Add (pixels, inputs)."""
        if len(x) > MAX_PIXELS:
            x = x[np.linspace(0, len(x) - 1, MAX_PIXELS).astype(int)]
        self.second += x.T @ x
        self.count += len(x)
        self.ranges += [0.0] * (step + 1 - len(self.ranges))
        self.ranges[step] = max(self.ranges[step], float(np.abs(x).max()))


Statistics = dict[str, Moments]  # by component/name of the packed matrix


def calibrate(
    bundle: Bundle,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (0,),
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    progress: Callable[[str], None] = lambda prompt: None,
) -> Statistics:
    """Draw every prompt with every seed and add up what each matrix reads.

    `size` and `steps` are `small` and `few` if not given.  The picture goes back through the
    encoder, so that it is calibrated as well.  Raises CalibrationError without prompts or seeds, or
    if `bundle` is not a native one.
    """
    if not prompts or not seeds:
        raise CalibrationError("nothing to calibrate with: give at least one prompt and one seed")
    if bundle.manifest.target != "native":
        raise CalibrationError(
            f"{bundle.folder} is made for {bundle.manifest.target}: only native bundles can be "
            "watched while they draw"
        )
    found: Statistics = {}
    engines: dict[str, _Watched] = {}

    def opened(bundle: Bundle, name: str) -> _Watched:
        engines[name] = _Watched(bundle, name, found)
        return engines[name]

    size, steps = size or small(bundle.manifest.sizes), steps or few(bundle)
    pipe = Pipeline(bundle, resident=True, opener=opened)
    for prompt in prompts:
        progress(prompt)
        for seed in seeds:
            for engine in engines.values():
                engine.step = 0
            *_, last = pipe.steps(prompt, seed=seed, size=size, steps=steps)
            picture = pipe.decode(last.latents)
            if "vae_encoder" in bundle.manifest.components:
                pipe.encode_image(picture, picture.size, SEEDS["torch"](seed))
    return found


def small(sizes: Sizes) -> tuple[int, int]:
    """The default size, or the same shape with sides up to SIDE if that can be drawn."""
    if sizes.allowed is not None:
        return min(sizes.allowed, key=math.prod)
    scale = min(1.0, SIDE / max(sizes.default))
    width, height = (
        max(-(-sizes.minimum // sizes.multiple), round(scale * side / sizes.multiple))
        * sizes.multiple
        for side in sizes.default
    )
    return width, height


def few(bundle: Bundle) -> int:
    """The recipe's steps, up to STEPS; half of them where pictures are larger than SIDE."""
    large = max(bundle.manifest.sizes.default) > SIDE
    return min(STEPS // 2 if large else STEPS, bundle.manifest.recipe.steps)


class _Watched:
    """An engine whose matrices' inputs are added up; `step` counts the runs of a picture."""

    def __init__(self, bundle: Bundle, component: str, found: Statistics) -> None:
        self._ops, self._component, self._found = Ops(bundle, component), component, found
        self.step = 0

    def __call__(self, inputs: Arrays) -> Arrays:
        for node, done in self._ops.run(inputs):
            if node.kind is Kind.MATMUL and node.weight and not done:
                self._add(node)
        self.step += 1
        return self._ops.outputs()

    def _add(self, node: Node) -> None:
        assert node.weight
        sources = [self._ops.read(value) for value in (node.a, node.b) if value is not None]
        parts = [
            np.pad(x, ((0, 0), (0, padded(x.shape[1]) - x.shape[1])))
            for x in sources
            if x is not None
        ]
        x = np.concatenate(parts, 1)
        name = f"{self._component}/{node.weight.name}"
        if name not in self._found:
            self._found[name] = Moments(np.zeros((x.shape[1], x.shape[1])))
        self._found[name].add(x, self.step)
