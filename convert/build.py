"""Checkpoint to bundle: record the original, export, compare what was written, and only then save.

One component is in memory at a time, and each is exported right after it was recorded.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import bundle as bundles
from .. import parity
from .._version import __version__
from ..bundle import TEXT_ENCODERS, Bundle, Component, Manifest, Precision, Source
from ..quantize.recipe import Recipe as Weights
from ..runtime import check as checks
from ..runtime.engines import onnx_memory
from ..runtime.pipeline import Pipeline
from ..runtime.tokenizer import Tokenizer
from . import embedding, lora, modules, recipe, reference, tokenizer
from .checkpoint import Checkpoint, ConvertError, open_checkpoint, skip_layers, source_hash
from .ecosystem import write_ecosystem_files
from .modules import NORM_INPUT
from .options import (
    CoremlOptions,
    NativeOptions,
    OptimumOptions,
    Options,
    TensorrtOptions,
    picture_sizes,
)
from .probes import MAX_STEPS, OTHER_PROMPTS, PROMPT, SEED
from .reference import Reference, Run
from .targets import (
    Census,
    CoremlTarget,
    NativeTarget,
    OnnxTarget,
    OptimumTarget,
    Target,
    Task,
    TensorrtTarget,
    floors,
)

Progress = Callable[[str], None]
Size = tuple[int, int]
VAE_PARTS = ("vae_decoder", "vae_encoder")
WORST_LAYERS = 3  # of a component's census, named in the report


def build(
    source: str | os.PathLike | Checkpoint,
    out: str | os.PathLike,
    options: Options | None,
    weights: Weights,
    precision: Precision,
    sizes: tuple[Size, ...],
    name: str | None,
    licence: str | None,
    force: bool,
    progress: Progress,
    family: str | None = None,
    clip_skip: int = 0,
    loras: Sequence[tuple[str | os.PathLike, float]] = (),
    embeddings: Sequence[tuple[str | os.PathLike, str | None]] = (),
) -> Bundle:
    """Convert a checkpoint to a bundle; see `ferrotype.convert`.  Without options, to ONNX."""
    modules.return_freed_memory()
    with modules.quiet(), bundles.staging(out, force) as staged:
        opened = source if isinstance(source, Checkpoint) else open_checkpoint(Path(source))
        checkpoint = dataclasses.replace(
            opened, name=name or opened.name, license=licence or opened.license
        )
        for path, weight in loras:
            checkpoint = lora.merge(checkpoint, Path(path), weight)
        for path, token in embeddings:
            checkpoint = embedding.add(checkpoint, Path(path), token)
        checkpoint = skip_layers(checkpoint, clip_skip)
        job = _Job(checkpoint, staged, options, weights, precision, sizes, progress, family)
        bundle = Bundle(staged, job.manifest())
        report = job.check(bundle)
        components = job.measured(bundle)
        job.write_check()
        progress("hash")
        manifest = dataclasses.replace(bundle.manifest, components=components, parity=report)
        return bundles.save(staged, out, manifest, force)


class _Job:
    """The state of one conversion: what was recorded so far, and where the files go."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        staged: Path,
        options: Options | None,
        weights: Weights,
        precision: Precision,
        sizes: tuple[Size, ...],
        progress: Progress,
        family: str | None = None,
    ) -> None:
        self.floors = floors(weights, precision)
        self.sizes = picture_sizes(checkpoint, sizes, options)
        self.checkpoint, self.staged, self.precision = checkpoint, staged, precision
        self.options = options
        self.progress = progress
        self.recipe, notes = recipe.from_checkpoint(checkpoint, family)
        self.notes = [*checkpoint.notes, *notes]
        self.notes += [note for addition in checkpoint.additions for note in addition.notes]
        self.prompts = (PROMPT, *OTHER_PROMPTS, *_new_tokens(checkpoint))
        scale = checkpoint.vae_scale
        latents = tuple((w // scale, h // scale) for w, h in self.sizes.allowed or ())
        guided = self.recipe.guidance not in (0, 1)
        width, height = self.sizes.default
        default = (width // scale, height // scale)
        task = Task(checkpoint, precision, weights, latents or None, guided, default)
        self.target = _target(options, task)
        shortened = dataclasses.replace(self.recipe, steps=min(self.recipe.steps, MAX_STEPS))
        others = tuple(size for size in sizes if size != self.sizes.default)
        self.reference = Reference(shortened, self.sizes.default, others)

    # --- recording and exporting ----------------------------------------------------------------

    def manifest(self) -> Manifest:
        """Record and export every component into the staged folder."""
        self.encoders = [name for name in TEXT_ENCODERS if name in self.checkpoint.configs]
        self.tokens = {
            TEXT_ENCODERS[name]: tokenizer.write_tokenizer(self.checkpoint, self.staged, name)
            for name in self.encoders
        }
        components = {
            **{name: self._text_encoder(name) for name in self.encoders},
            "unet": self._unet(),
            **self._vae(),
        }
        write_ecosystem_files(self.checkpoint, self.staged)
        return Manifest(
            format=bundles.FORMAT,
            tool=f"ferrotype {__version__}",
            model=self.checkpoint.name,
            family=self.checkpoint.family,
            target=self.target.name,
            licence=self.checkpoint.license,
            source=Source(self.checkpoint.folder.resolve().name, source_hash(self.checkpoint)),
            precision=self.precision,
            sizes=self.sizes,
            recipe=self.recipe,
            preview=tuple(map(_three_digits, self.reference.preview)),
            tokenizers=self.tokens,
            components=components,
            parity={},
            options=self.target.options() | _told(self.checkpoint),
        )

    def _text_encoder(self, name: str) -> Component:
        self.progress(f"record {name}")
        module = getattr(modules, name)(self.checkpoint)
        kind = TEXT_ENCODERS[name]
        source = tokenizer.of(self.checkpoint, kind)
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
            name, module, self._config(name), self.staged / name, half, census
        )
        gc.collect()
        return component

    def _config(self, name: str) -> dict[str, Any]:
        return self.checkpoint.configs["vae" if name in VAE_PARTS else name]

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
            if not self._upcast(name):
                return True
            problem = "its configuration says that fp16 overflows (force_upcast)"
        self.notes.append(f"{name}: {problem}: this component is kept in fp32")
        return False

    def _upcast(self, name: str) -> bool:
        """Whether diffusers itself computes a part in fp32: only for SDXL does it look."""
        stated = name in VAE_PARTS and self._config(name).get("force_upcast")
        return bool(stated) and self.checkpoint.family == "sdxl"

    # --- checking -------------------------------------------------------------------------------

    def check(self, bundle: Bundle) -> dict[str, Any]:
        """Compare the written bundle with the recorded original; the report for the manifest.

        Raises ParityError below a floor.
        """
        self._check_tokenizer(bundle)
        components = {name: self._check_component(bundle, name) for name in self.reference.runs}
        recipe = self.reference.recipe
        return {
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
            **_merged(self.checkpoint),
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


def _target(options: Options | None, task: Task) -> Target:
    match options:
        case CoremlOptions():
            return CoremlTarget(task, options)
        case TensorrtOptions():
            return TensorrtTarget(task, options)
        case NativeOptions():
            return NativeTarget(task, options)
        case OptimumOptions():
            return OptimumTarget(task, options)
        case _:
            return OnnxTarget(task)


def _new_tokens(checkpoint: Checkpoint) -> list[str]:
    """A prompt for every embedding, so that its vectors are compared as well.

    Each alone: diffusers would also spell out a name that is part of another.
    """
    tokens = dict.fromkeys(token for added in checkpoint.tokens.values() for token in added)
    return [token for token in tokens if token.rpartition("_")[0] not in tokens]


def _merged(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The report's lines about files that are in the weights, if there are any."""
    lines = [f"{a.text}, sha256 {bundles.hash_file(a.path)}" for a in checkpoint.additions]
    return {"merged": lines} if lines else {}


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


def _told(checkpoint: Checkpoint) -> dict[str, str]:
    """What was asked of the checkpoint's networks, for the manifest."""
    return {"clip_skip": str(checkpoint.clip_skip)} if checkpoint.clip_skip else {}


def _three_digits(row: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(f"{value:.3g}") for value in row)
    return red, green, blue
