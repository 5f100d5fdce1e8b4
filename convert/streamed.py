"""Checkpoint to native bundle without torch, a tensor at a time.

The original is our own engine on the weights as they are in the checkpoint, unrounded, computing in
fp32.  Both it and what was written run inside a budget, their weights streaming from the disk, so
that a conversion takes little more memory than its largest tensor.  What diffusers makes of the
same checkpoint is not seen: `build` compares with that.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import bundle as bundles
from .. import parity
from ..bundle import Bundle, Component, Manifest, Precision
from ..kernels import Type
from ..runtime import check as checks
from ..runtime import models
from ..runtime.plan import Refusal
from . import native, targets
from .checkpoint import Checkpoint, Tensors
from .job import VAE_PARTS, Job, prepared
from .options import Request
from .probes import PROMPT, SEED
from .recorded import Recorder

BUDGET = 320 << 20  # bytes that a run may take
LARGEST = 512  # side in pixels of the picture that is compared
STEPS = 4  # of it, at most
ORIGINAL = "original"
NOTE = (
    "compared with the checkpoint's own weights in fp32 on our engine; --check diffusers compares "
    "with diffusers"
)
DAMAGED = ": the checkpoint is damaged"


def build(
    source: str | os.PathLike | Checkpoint,
    out: str | os.PathLike,
    asked: Request,
    name: str | None,
    licence: str | None,
    force: bool,
    clip_skip: int = 0,
    loras: Sequence[tuple[str | os.PathLike, float]] = (),
    embeddings: Sequence[tuple[str | os.PathLike, str | None]] = (),
) -> Bundle:
    """Convert a checkpoint to a native bundle; see `ferrotype.convert`."""
    with bundles.staging(out, force) as staged:
        checkpoint = prepared(source, name, licence, clip_skip, loras, embeddings)
        job = _Job(checkpoint, staged, asked)
        original = job.record()
        bundle = Bundle(staged, job.manifest(original))
        report = job.check(bundle, original)
        checks.save(staged, original.recorded, original.picture)
        asked.progress("hash")
        manifest = dataclasses.replace(bundle.manifest, components=job.components, parity=report)
        return bundles.save(staged, out, manifest, force)


class _Job(Job):
    """A conversion that our engine, on exact weights, is the original of."""

    def __init__(self, checkpoint: Checkpoint, staged: Path, asked: Request) -> None:
        super().__init__(checkpoint, staged, asked)
        assert isinstance(self.target, targets.NativeTarget)
        self.packer = self.target
        self.tokens = self.write_tokenizers()
        self.components: dict[str, Component] = {}

    @property
    def names(self) -> list[str]:
        """The components, in the order of a run."""
        return [*self.encoders, "unet", *VAE_PARTS]

    # --- the original ---------------------------------------------------------------------------

    def record(self) -> Recorder:
        """What the original does; its weights are gone afterwards."""
        folder = self.staged / ORIGINAL
        folder.mkdir()
        for kind in self.tokens:
            shutil.copytree(self.staged / kind, folder / kind)
        for name in self.names:
            self.progress(f"read {name}")
            self.components[name] = self._exact(name, folder / name)
        self.plain = self.assemble(self.tokens, self.components, ())
        exact = Bundle(folder, dataclasses.replace(self.plain, precision=Precision("fp32", "fp32")))
        self.progress("draw the original")
        size, budget = _size(exact)
        run = Recorder(
            exact, size=size, prompts=self.prompts, steps=STEPS, budget=budget, blame=DAMAGED
        )
        run.draw()
        shutil.rmtree(folder)
        return run

    def _exact(self, name: str, folder: Path) -> Component:
        """A component with every weight as it is in the checkpoint."""
        component = native.folder_of(name)
        every = Tensors(self.checkpoint, component)
        halves = all(every.stored(n).dtype == "F16" for n in every if every.stored(n).is_float)
        half = halves and not self.checkpoint.patches.get(component)
        config, (_, outputs) = self.config(name), native.interface(self.checkpoint, name)
        requests = models.weights(name, config, outputs)
        # Filters of doubled images are sums, which fp16 would round.
        sums = {r.name: Type.F32 for r in requests if r.form == "upsample"}
        plain = "fp16" if half else "fp32"
        return self.packer.pack(name, config, folder, plain, sums, "fp32")[0]

    # --- what is written ------------------------------------------------------------------------

    def manifest(self, original: Recorder) -> Manifest:
        """Write every component, and the manifest without its report."""
        for name in self.names:
            self.progress(f"write {name}")
            half = self.precision.activations == "fp16" and not self.upcast(name)
            self.components[name] = self._export(name, half)
        return dataclasses.replace(
            self.plain, components=self.components, preview=original.preview_rows
        )

    def _export(self, name: str, half: bool) -> Component:
        return self.packer.export(name, None, self.config(name), self.staged / name, half, {})

    def check(self, bundle: Bundle, original: Recorder) -> dict[str, Any]:
        """Compare what was written with the original; the report for the manifest.

        A component that fp16 is not enough for is written again, to compute in fp32.  Raises
        ParityError below a floor.
        """
        components = {name: self._check_component(bundle, name, original) for name in self.names}
        manifest = dataclasses.replace(bundle.manifest, components=self.components)
        return {
            "original": "engine",
            "floors": self.floors,
            "components": components,
            "picture": self._check_picture(Bundle(bundle.folder, manifest), original),
            "census": {n: _worst(seen) for n, seen in original.census.items()},
            **self.target.report(),
            **self.merged(),
            "notes": [*self.notes, NOTE],
        }

    def _check_component(self, bundle: Bundle, name: str, original: Recorder) -> dict[str, Any]:
        self.progress(f"check {name}")
        floor, report = self.floors["component"], self._compare(bundle, name, original)
        worst = min(result["psnr"] for result in report.values())
        half = self.precision.activations == "fp16" and not self.components[name].activations
        if worst < floor and half:
            self.notes.append(f"{name}: {worst:.1f} dB in fp16: this component is kept in fp32")
            shutil.rmtree(self.staged / name)
            self.components[name] = self._export(name, half=False)
            report = self._compare(bundle, name, original)
        for output, result in report.items():
            hint = self.target.blame(bundle, name, None, {})
            parity.check(f"{name} {output}", result["psnr"], floor, hint)
        return report

    def _compare(self, bundle: Bundle, name: str, original: Recorder) -> dict[str, Any]:
        manifest = dataclasses.replace(bundle.manifest, components=self.components)
        made = Recorder(Bundle(bundle.folder, manifest), size=original.size, budget=original.budget)
        runs = original.recorded[name]
        found = [made.repeat(name, inputs) for inputs, _ in runs]
        made.close()
        return {
            output: parity.as_json(
                parity.compare([out[output] for _, out in runs], [out[output] for out in found])
            )
            for output in runs[0][1]
        }

    def _check_picture(self, bundle: Bundle, original: Recorder) -> dict[str, Any]:
        self.progress("check the picture")
        pipe = Recorder(bundle, size=original.size, budget=original.budget)
        count = original.step_count
        *_, last = pipe.steps(PROMPT, seed=SEED, steps=count, size=original.size, force=True)
        picture = pipe.decode_array(last.latents)
        pipe.close()
        found = parity.psnr(original.picture, picture, peak=1.0)
        parity.check("the picture", found, self.floors["picture"])
        difference = float(f"{np.abs(picture - original.picture).max():.3g}")
        return {**original.shown(), "psnr": round(found, 2), "max_error": difference}


def _size(bundle: Bundle) -> tuple[tuple[int, int], int | None]:
    """A picture's size, as near the usual one as the budget allows, and the budget, if it does."""
    sizes = bundle.manifest.sizes
    size, tried = sizes.default, Recorder(bundle, budget=BUDGET)
    while True:
        if max(size) <= LARGEST or sizes.allowed:
            try:
                tried.steps(PROMPT, size=size, steps=1, force=True)
                return size, BUDGET
            except Refusal:
                pass
        width, height = (
            max(sizes.multiple, n // 2 // sizes.multiple * sizes.multiple) for n in size
        )
        if sizes.allowed or min(width, height) < sizes.minimum:
            return size, None
        size = width, height


def _worst(seen: dict[str, parity.Census]) -> list[dict[str, Any]]:
    """The outputs of a component as a census has layers: without torch nobody looks inside."""
    return [
        {key: told[key] for key in ("layer", "max_abs", "fp16_headroom")}
        for output, found in sorted(seen.items(), key=lambda item: -item[1].max_abs)
        for told in ({"layer": output, **parity.census_as_json(found)},)
    ]
