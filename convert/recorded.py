"""A bundle that draws a picture while every call of its networks is watched and kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import parity
from ..bundle import Bundle
from ..runtime import check as checks
from ..runtime.engines import Arrays, Engine
from ..runtime.pipeline import Pipeline
from ..runtime.plan import Stage
from .checkpoint import ConvertError
from .probes import MAX_STEPS, OTHER_PROMPTS, PROMPT, SEED, colour_field, fit_preview

FLAT = 1 / 255  # standard deviation of a picture in which nobody sees anything


class Recorder(Pipeline):
    """Draws the fixed picture; what every component took and returned is counted.

    The first and the last call of each are kept in `recorded`.  `prompts` are encoded first.  The
    picture has the bundle's usual size, or `size`, and at most so many `steps`.  `blame` ends the
    sentence about NaN or Inf.
    """

    def __init__(
        self,
        bundle: Bundle,
        opener: Callable[[Bundle, str], Engine] | None = None,
        size: tuple[int, int] | None = None,
        prompts: tuple[str, ...] = (PROMPT, *OTHER_PROMPTS),
        steps: int = MAX_STEPS,
        blame: str = "",
        **options: Any,
    ) -> None:
        super().__init__(bundle, opener=opener, **options)
        self.size = size or bundle.manifest.sizes.default
        self.recorded: dict[str, checks.Runs] = {}
        self.census: dict[str, dict[str, parity.Census]] = {}
        self.picture: np.ndarray = np.empty(0)
        self.preview_rows: tuple[tuple[float, float, float], ...] = ()
        self.step_count = min(bundle.manifest.recipe.steps, steps)
        self._prompts, self._blame = prompts, blame

    def draw(self) -> None:
        """Draw the fixed picture, then encode and decode it and one of all colours.

        Raises ConvertError for NaN or Inf, and for a picture in which nothing is to be seen.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the length of our own prompts
            # Planned first: what runs apart is then planned for this size as well.
            run = self.steps(PROMPT, seed=SEED, steps=self.step_count, size=self.size, force=True)
            for prompt in self._prompts:
                self.encode(prompt)
            *_, last = run
        self.picture = self.decode_array(last.latents)
        if self.picture.std() < FLAT:
            raise ConvertError(
                f"{PROMPT!r} is drawn as one flat colour: {self.bundle.manifest.model} is damaged, "
                "or computes in a type in which it overflows"
            )
        self.preview_rows = self._fitted(last.latents)
        self.close()

    def close(self) -> None:
        """Give back the memory of components and of what they compute in."""
        self._make_room()

    def repeat(self, component: str, inputs: Arrays) -> Arrays:
        """Run one component on inputs that another bundle's took."""
        return super()._run(component, inputs, self._stage(component, self.size))

    def _fitted(self, latents: np.ndarray) -> tuple[tuple[float, float, float], ...]:
        """The preview of this autoencoder."""
        factor = np.float32(self.bundle.component("vae_decoder").config["scaling_factor"])
        drawn = (self.picture * 2 - 1).transpose(2, 0, 1)[None]
        colours = colour_field(drawn.shape[3], drawn.shape[2])
        stage = self._stage("vae_encoder", self.size)
        mean, _ = (
            np.split(self._run("vae_encoder", {"sample": x}, stage)["latent_parameters"], 2, 1)[0]
            for x in (colours, drawn)
        )
        stage = self._stage("vae_decoder", self.size)
        self._run("vae_decoder", {"latent_sample": mean}, stage)
        scale = drawn.shape[3] // latents.shape[3]
        rows = fit_preview([(mean * factor, colours), (latents, drawn)], scale)
        return tuple((float(f"{r:.3g}"), float(f"{g:.3g}"), float(f"{b:.3g}")) for r, g, b in rows)

    def _run(self, component: str, inputs: Arrays, stage: Stage | None = None) -> Arrays:
        outputs = super()._run(component, inputs, stage)
        seen = self.census.setdefault(component, {})
        for name, value in outputs.items():
            found = parity.census(value)
            if found.nan or found.inf:
                raise ConvertError(
                    f"{component} returns {found.nan} NaN and {found.inf} Inf in {name}"
                    f"{self._blame}"
                )
            largest = max(found.max_abs, seen[name].max_abs if name in seen else 0.0)
            seen[name] = parity.Census(0, 0, largest)
        runs = self.recorded.setdefault(component, [])
        runs[1:] = [(_copies(inputs), _copies(outputs))] if runs else []
        runs[:1] = runs[:1] or [(_copies(inputs), _copies(outputs))]
        return outputs

    def shown(self) -> dict[str, Any]:
        """What was drawn, for a parity report."""
        recipe = self.bundle.manifest.recipe
        return {
            "prompt": PROMPT,
            "seed": SEED,
            "size": list(self.size),
            "sampler": recipe.sampler,
            "steps": self.step_count,
            "guidance": recipe.guidance,
        }


def _copies(arrays: Arrays) -> Arrays:
    return {name: np.array(value) for name, value in arrays.items()}
