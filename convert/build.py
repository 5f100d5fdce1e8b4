"""Checkpoint to bundle: record the original, export, compare what was written, and only then save.

One component is in memory at a time, and each is exported right after it was recorded.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import bundle as bundles
from .. import parity
from ..bundle import TEXT_ENCODERS, Bundle, Component, Manifest
from ..runtime import check as checks
from ..runtime.engines import onnx_memory
from ..runtime.pipeline import Pipeline
from ..runtime.tokenizer import Tokenizer
from . import modules, reference, tokenizer
from .checkpoint import Checkpoint, ConvertError
from .job import VAE_PARTS, Job, prepared
from .options import OptimumOptions, Request
from .probes import MAX_STEPS, NORM_INPUT, PROMPT, SEED
from .reference import Reference, Run
from .targets import Census, OnnxTarget

WORST_LAYERS = 3  # of a component's census, named in the report


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
    """Convert a checkpoint to a bundle, compared with diffusers; see `ferrotype.convert`."""
    modules.return_freed_memory()
    with modules.quiet(), bundles.staging(out, force) as staged:
        checkpoint = prepared(source, name, licence, clip_skip, loras, embeddings)
        job = _Job(checkpoint, staged, asked)
        bundle = Bundle(staged, job.manifest())
        report = job.check(bundle)
        components = job.measured(bundle)
        job.write_check()
        asked.progress("hash")
        manifest = dataclasses.replace(bundle.manifest, components=components, parity=report)
        return bundles.save(staged, out, manifest, force)


class _Job(Job):
    """A conversion that diffusers, in fp32, is the original of."""

    def __init__(self, checkpoint: Checkpoint, staged: Path, asked: Request) -> None:
        super().__init__(checkpoint, staged, asked)
        shortened = dataclasses.replace(self.recipe, steps=min(self.recipe.steps, MAX_STEPS))
        others = tuple(size for size in asked.sizes if size != self.sizes.default)
        self.reference = Reference(shortened, self.sizes.default, others)

    # --- recording and exporting ----------------------------------------------------------------

    def manifest(self) -> Manifest:
        """Record and export every component into the staged folder."""
        self.tokens = self.write_tokenizers()
        components = {
            **{name: self._text_encoder(name) for name in self.encoders},
            "unet": self._unet(),
            **self._vae(),
        }
        return self.assemble(
            self.tokens, components, tuple(map(_three_digits, self.reference.preview))
        )

    def _text_encoder(self, name: str) -> Component:
        self.progress(f"record {name}")
        module = getattr(modules, name)(self.checkpoint)
        kind = TEXT_ENCODERS[name]
        source = tokenizer.theirs(self.checkpoint, kind)
        length = self.tokens[kind].max_length
        tokens = [tokenizer.original_ids(source, prompt, length) for prompt in self.prompts]
        with modules.census(module) as census:
            self.reference.runs[name] = reference.record_text(module, tokens)
        return self._export(name, module, census)

    def _unet(self) -> Component:
        self.progress("record unet")
        module = modules.unet(self.checkpoint)
        text = {"prompt": self._text(0), "negative": self._text(1)}
        if self.recipe.zero_negative:
            text["negative"] = {
                name: value if name == "time_ids" else np.zeros_like(value)
                for name, value in text["negative"].items()
            }
        scale = self.checkpoint.vae_scale
        with modules.census(module) as census:
            self.reference.runs["unet"] = reference.record_unet(module, self.reference, text, scale)
        return self._export("unet", module, census)

    def _text(self, prompt: int) -> reference.Arrays:
        outputs = [self.reference.runs[name][prompt].outputs for name in self.encoders]
        return reference.text_inputs(outputs, self.reference.size)

    def _vae(self) -> dict[str, Component]:
        self.progress("record vae")
        module = modules.vae(self.checkpoint)
        with modules.census(module) as census:
            self.reference.runs |= reference.record_vae(
                module, self.reference, self.checkpoint.vae_scale
            )
        return {name: self._export(name, module, census) for name in VAE_PARTS}

    def _export(self, name: str, module: Any, census: Census) -> Component:
        census = _of_component(name, census)
        half = self._check_census(name, census)
        self.reference.census[name] = census
        self.progress(f"export {name}")
        component = self.target.export(
            name, module, self.config(name), self.staged / name, half, census
        )
        gc.collect()
        return component

    def _check_census(self, name: str, census: Census) -> bool:
        """Whether the component can compute in fp16, if it should; refuses what is broken."""
        for layer, (_, nan, inf) in census.items():
            if nan or inf:
                raise ConvertError(
                    f"the original returns {nan} NaN and {inf} Inf in {name}, layer {layer}: "
                    "the checkpoint is damaged"
                )
        if self.precision.activations != "fp16" or isinstance(self.options, OptimumOptions):
            return False  # bf16 reaches as far as fp32, and what a graph computes in is decided
        layer, (largest, _, _) = max(census.items(), key=lambda item: item[1][0])
        problem = f"layer {layer} reaches {largest:.3g}, fp16 ends at {parity.FP16_MAX:.0f}"
        if largest < parity.FP16_MAX:
            if not self.upcast(name):
                return True
            problem = "its configuration says that fp16 overflows (force_upcast)"
        self.notes.append(f"{name}: {problem}: this component is kept in fp32")
        return False

    # --- checking -------------------------------------------------------------------------------

    def check(self, bundle: Bundle) -> dict[str, Any]:
        """Compare the written bundle with the recorded original; the report for the manifest.

        Raises ParityError below a floor.
        """
        self._check_tokenizer(bundle)
        components = {name: self._check_component(bundle, name) for name in self.reference.runs}
        recipe = self.reference.recipe
        return {
            "original": "diffusers",
            "floors": self.floors,
            "components": components,
            "picture": {
                "prompt": PROMPT,
                "seed": SEED,
                "size": list(self.reference.size),
                "sampler": recipe.sampler,
                "steps": recipe.steps,
                "guidance": recipe.guidance,
                **self._check_picture(bundle),
            },
            "census": {name: _worst(census) for name, census in self.reference.census.items()},
            **self.target.report(),
            **self.merged(),
            "notes": self.notes,
        }

    def measured(self, bundle: Bundle) -> dict[str, Component]:
        """The components, with the memory that only running them tells."""
        parts = bundle.manifest.components
        if not isinstance(self.target, OnnxTarget):
            return parts
        memory = onnx_memory.measured(bundle)
        if not memory:
            self.notes.append("memory was not measured: this system does not tell a process's peak")
        return {n: dataclasses.replace(p, memory=memory.get(n, {})) for n, p in parts.items()}

    def write_check(self) -> None:
        """The first and the last run of every component, for the device to repeat."""
        runs = {
            name: [(run.inputs, run.outputs) for run in recorded[:: max(1, len(recorded) - 1)][:2]]
            for name, recorded in self.reference.runs.items()
        }
        checks.save(self.staged, runs, self.reference.picture)

    def _check_tokenizer(self, bundle: Bundle) -> None:
        for name in self.encoders:
            encode = Tokenizer(bundle, TEXT_ENCODERS[name])
            for prompt, run in zip(self.prompts, self.reference.runs[name], strict=True):
                if not np.array_equal(encode(prompt).ids, run.inputs["input_ids"]):
                    raise ConvertError(
                        f"{TEXT_ENCODERS[name]}.json encodes {prompt!r} unlike transformers' "
                        "CLIPTokenizer: is it another model's?"
                    )

    def _check_component(self, bundle: Bundle, name: str) -> dict[str, Any]:
        self.progress(f"check {name}")
        engine = self.target.open(bundle, name)
        runs = self.reference.runs[name]
        found = [engine(run.inputs) for run in runs]
        report = {}
        for output in runs[0].outputs:
            result = parity.compare([r.outputs[output] for r in runs], [f[output] for f in found])
            if result.psnr < self.floors["component"]:
                hint = self._blame(bundle, name, runs[0])
                parity.check(f"{name} {output}", result.psnr, self.floors["component"], hint)
            report[output] = parity.as_json(result)
        return report

    def _blame(self, bundle: Bundle, name: str, run: Run) -> str:
        """Which layer lost it, found by running the original once more beside what was written."""
        make = modules.vae if name in VAE_PARTS else getattr(modules, name)
        return self.target.blame(bundle, name, make(self.checkpoint), run.inputs)

    def _check_picture(self, bundle: Bundle) -> dict[str, float]:
        self.progress("check the picture")
        pipe = Pipeline(bundle, opener=self.target.open)
        # As many as were recorded, even if the recipe has more.
        *_, last = pipe.steps(PROMPT, seed=SEED, steps=self.reference.recipe.steps, force=True)
        picture = pipe.decode_array(last.latents)
        found = parity.psnr(self.reference.picture, picture, peak=1.0)
        parity.check("the picture", found, self.floors["picture"])
        difference = float(np.abs(picture - self.reference.picture).max())
        return {"psnr": round(found, 2), "max_error": float(f"{difference:.3g}")}


def _of_component(name: str, census: dict) -> Census:
    """The layers of one half of the VAE; of any other component, all."""
    if name not in VAE_PARTS:
        return census
    other = "encoder" if name == "vae_decoder" else "decoder"
    mine = (other + ".", "quant_conv" if name == "vae_decoder" else "post_quant_conv")
    return {layer: seen for layer, seen in census.items() if not layer.startswith(mine)}


def _worst(census: Census) -> list[dict[str, Any]]:
    """The layers with the least room below fp16's limit."""
    layers = ((layer, seen) for layer, seen in census.items() if not layer.endswith(NORM_INPUT))
    ranked = sorted(layers, key=lambda item: -item[1][0])[:WORST_LAYERS]
    return [
        {
            "layer": layer,
            "max_abs": float(f"{largest:.4g}"),
            "fp16_headroom": float(f"{parity.FP16_MAX / max(largest, 1e-30):.3g}"),
        }
        for layer, (largest, _, _) in ranked
    ]


def _three_digits(row: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(f"{value:.3g}") for value in row)
    return red, green, blue
