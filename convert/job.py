"""What every conversion has, whatever runs the original: checkpoint, target, manifest."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import bundle as bundles
from .._version import __version__
from ..bundle import TEXT_ENCODERS, Component, Manifest, Source, Tokenizer
from . import embedding, lora, recipe, tokenizer
from .checkpoint import Checkpoint, open_checkpoint, skip_layers, source_hash
from .ecosystem import write_ecosystem_files
from .options import (
    CoremlOptions,
    NativeOptions,
    OptimumOptions,
    Options,
    Request,
    TensorrtOptions,
    picture_sizes,
)
from .probes import OTHER_PROMPTS, PROMPT
from .targets import (
    CoremlTarget,
    NativeTarget,
    OnnxTarget,
    OptimumTarget,
    Target,
    Task,
    TensorrtTarget,
    floors,
)

VAE_PARTS = ("vae_decoder", "vae_encoder")


def prepared(
    source: str | os.PathLike | Checkpoint,
    name: str | None,
    licence: str | None,
    clip_skip: int,
    loras: Sequence[tuple[str | os.PathLike, float]],
    embeddings: Sequence[tuple[str | os.PathLike, str | None]],
) -> Checkpoint:
    """The checkpoint with all that is merged into it."""
    opened = source if isinstance(source, Checkpoint) else open_checkpoint(Path(source))
    checkpoint = dataclasses.replace(
        opened, name=name or opened.name, license=licence or opened.license
    )
    for path, weight in loras:
        checkpoint = lora.merge(checkpoint, Path(path), weight)
    for path, token in embeddings:
        checkpoint = embedding.add(checkpoint, Path(path), token)
    return skip_layers(checkpoint, clip_skip)


class Job:
    """The state of one conversion into the folder `staged`."""

    def __init__(self, checkpoint: Checkpoint, staged: Path, asked: Request) -> None:
        self.checkpoint, self.staged, self.asked = checkpoint, staged, asked
        self.precision, self.options, self.progress = asked.precision, asked.options, asked.progress
        self.floors = floors(asked.weights, asked.precision)
        self.sizes = picture_sizes(checkpoint, asked.sizes, asked.options)
        self.recipe, notes = recipe.from_checkpoint(checkpoint, asked.family)
        self.notes = [*checkpoint.notes, *notes]
        self.notes += [note for addition in checkpoint.additions for note in addition.notes]
        self.prompts = (PROMPT, *OTHER_PROMPTS, *_new_tokens(checkpoint))
        self.encoders = [name for name in TEXT_ENCODERS if name in checkpoint.configs]
        scale = checkpoint.vae_scale
        latents = tuple((w // scale, h // scale) for w, h in self.sizes.allowed or ())
        width, height = self.sizes.default
        default = (width // scale, height // scale)
        guided = self.recipe.guidance not in (0, 1)
        self.target = _target(
            asked.options,
            Task(
                checkpoint, asked.precision, asked.weights, latents or None, guided, default,
                asked.written,
            ),
        )  # fmt: skip

    def config(self, name: str) -> dict[str, Any]:
        """The checkpoint's configuration of a component."""
        return self.checkpoint.configs["vae" if name in VAE_PARTS else name]

    def write_tokenizers(self) -> dict[str, Tokenizer]:
        """Write those of every text encoder."""
        return {
            TEXT_ENCODERS[name]: tokenizer.write_tokenizer(self.checkpoint, self.staged, name)
            for name in self.encoders
        }

    def assemble(
        self,
        tokens: dict[str, Tokenizer],
        components: dict[str, Component],
        preview: tuple[tuple[float, float, float], ...],
    ) -> Manifest:
        """The manifest without its report; writes also what other tools look for."""
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
            preview=preview,
            tokenizers=tokens,
            components=components,
            parity={},
            options=self.target.options() | _told(self.checkpoint),
        )

    def upcast(self, name: str) -> bool:
        """Whether diffusers itself computes a part in fp32: only for SDXL does it look."""
        stated = name in VAE_PARTS and self.config(name).get("force_upcast")
        return bool(stated) and self.checkpoint.family == "sdxl"

    def merged(self) -> dict[str, list[str]]:
        """The report's lines about files that are in the weights, if there are any."""
        added = self.checkpoint.additions
        lines = [f"{a.text}, sha256 {bundles.hash_file(a.path)}" for a in added]
        return {"merged": lines} if lines else {}


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


def _told(checkpoint: Checkpoint) -> dict[str, str]:
    """What was asked of the checkpoint's networks, for the manifest."""
    return {"clip_skip": str(checkpoint.clip_skip)} if checkpoint.clip_skip else {}
