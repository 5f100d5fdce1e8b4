"""From a checkpoint to a bundle: the only part that may import torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle import Precision
from ..quantize.recipe import UNQUANTIZED, Recipe
from .checkpoint import ConvertError, OptionError, is_exported, open_exported
from .options import CoremlOptions, NativeOptions, OptimumOptions, Options, Request, TensorrtOptions

if TYPE_CHECKING:
    from ..bundle import Bundle
    from .checkpoint import Checkpoint

__all__ = [
    "TARGETS",
    "ConvertError",
    "CoremlOptions",
    "NativeOptions",
    "OptionError",
    "TensorrtOptions",
    "convert",
    "stages",
]

# Python started inside a checkout looks there for every module, and transformers would take our
# folder `kernels` for the package of that name.  A package's own folder is no place to import from.
_OWN = Path(__file__).resolve().parent.parent
sys.path[:] = [place for place in sys.path if Path(place).resolve() != _OWN]

# What each target stores weights in and computes in when it is not told.
TARGETS = {
    "onnx": ("fp16", "fp32"),
    "native": ("bf16", "bf16"),
    "coreml": ("fp16", "fp16"),
    "tensorrt": ("fp16", "fp16"),
}
CHECKS = ("diffusers", "engine")
# Weights and activations that the native engine has kernels for.
NATIVE = (
    ("bf16", "bf16"),
    ("bf16", "fp32"),
    ("fp32", "fp32"),
    ("fp16", "fp16"),
    ("fp16", "fp32"),
)
FORMS = {  # what each can, for the message
    "onnx": "fp32, fp16, w8, w4 (t, c, bN, not a), or a recipe's file",
    "native": "fp32, bf16, fp16, w8, w4, or a recipe's file",
    "coreml": "fp32, fp16, p8, p6, p4, p2, w8, w4 and their kin, or a recipe's file",
    "tensorrt": "fp32, fp16, w8, w4, or a recipe's file",
}


def convert(
    checkpoint: str | os.PathLike | Checkpoint,
    out: str | os.PathLike,
    target: str = "onnx",
    weights: str | Recipe | None = None,
    activations: str | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    options: Options | None = None,
    name: str | None = None,
    licence: str | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
    recipe: str | None = None,
    clip_skip: int = 0,
    loras: Sequence[tuple[str | os.PathLike, float]] = (),
    embeddings: Sequence[tuple[str | os.PathLike, str | None]] = (),
    original: str | os.PathLike | None = None,
    check: str | None = None,
    written: Callable[[int, int], None] = lambda done, total: None,
) -> Bundle:
    """Convert a checkpoint to a bundle at `out`, which exists only once it was compared.

    It is a folder in the diffusers layout, a single file, or what `open_checkpoint` returned.

    `weights` is a form by name, as docs/quantize.md lists, or a recipe; `activations` is what the
    networks compute in, fp16 or fp32, or natively bf16 or int8.  `sizes`, (width, height)
    each, are the only ones that can be drawn, the first by default; without any, ONNX takes every
    multiple of 8, native every one that the U-Net halves evenly, and the others the checkpoint's
    own.  `options` are the target's.  `recipe` says how a few-step model is sampled, by a name of
    docs/samplers.md; by default what the checkpoint shows.  `clip_skip` last layers of every text
    encoder are left out, counted as diffusers does.  `name` and `licence` are those of the
    checkpoint's folder and model card if not given.  `progress` is told the name of every stage as
    it begins, `stages()` in all.  `loras` are files and how much each counts, merged in that order;
    `embeddings` are files of textual inversion and their tokens, None for the file's own.  A folder
    that Optimum exported becomes an ONNX bundle of its graphs, compared with the checkpoint
    `original` if that is given.  `check` says what the result is compared with: "diffusers", or for
    the native target "engine", our own engine on the checkpoint's unrounded weights, which needs no
    torch and little memory; by default diffusers where it is installed.  `written` is told how many
    bytes of a native component are written, of how many.
    Raises ConvertError for a checkpoint or an option that does not work, ParityError for a result
    below its floor, BundleError if `out` cannot be written; nothing is left behind then.
    """
    if target not in TARGETS:
        raise ConvertError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    every = tuple((width, height) for width, height in sizes)
    if isinstance(checkpoint, str | os.PathLike) and is_exported(Path(checkpoint)):
        if target != "onnx" or weights is not None or activations is not None:
            raise OptionError(
                f"{checkpoint} holds graphs that Optimum exported: they become an ONNX bundle as "
                "they are; for another target or precision convert the checkpoint itself"
            )
        if recipe or clip_skip or loras or embeddings:
            raise OptionError(
                f"{checkpoint} holds graphs that Optimum exported: a recipe, clip skip, LoRA and "
                "embeddings are for checkpoints"
            )
        return _import(checkpoint, out, every, name, licence, force, progress, original)
    if original is not None:
        raise OptionError(f"an original is for folders that Optimum exported, {checkpoint} is none")
    stored, precision = _precision(target, weights, activations)
    asked = Request(_options(target, options), stored, precision, every, recipe, progress, written)
    try:
        if checked_with(target, check) == "engine":
            from .streamed import build
        else:
            from .build import build
    except ModuleNotFoundError as error:
        raise _needs(error) from None
    return build(checkpoint, out, asked, name, licence, force, clip_skip, loras, embeddings)


def checked_with(target: str, check: str | None = None) -> str:
    """What a conversion is compared with, diffusers or engine; raises OptionError."""
    if check not in (None, *CHECKS):
        raise OptionError(f"check {check!r} is not one of {', '.join(CHECKS)}")
    if target != "native":
        if check == "engine":
            raise OptionError(f"--check engine is for the native target, not for {target}")
        return "diffusers"
    if check is None:
        there = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))
        return "diffusers" if there else "engine"
    return check


def _import(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    sizes: tuple[tuple[int, int], ...],
    name: str | None,
    licence: str | None,
    force: bool,
    progress: Callable[[str], None],
    original: str | os.PathLike | None,
) -> Bundle:
    """A bundle of graphs that Optimum exported, compared with the original if it is there."""
    try:
        from . import optimum

        if original is not None:
            from .build import build
    except ModuleNotFoundError as error:
        raise _needs(error) from None
    exported = open_exported(Path(folder))
    if original is None:
        exported = dataclasses.replace(
            exported, name=name or exported.name, license=licence or exported.license
        )
        return optimum.build(exported, out, sizes, force, progress)
    graphs = optimum.inspect(exported)
    precision, sizes = optimum.precision_of(graphs), optimum.fixed_sizes(exported, graphs, sizes)
    options, recipe = OptimumOptions(graphs), Recipe.uniform("fp32")  # which nothing reads
    asked = Request(options, recipe, precision, sizes, progress=progress)
    return build(original, out, asked, name, licence, force)


def _needs(error: ModuleNotFoundError) -> ConvertError:
    return ConvertError(
        f"converting needs {error.name}: install the extra, pip install '.[convert]' in a clone"
    )


def stages(encoders: int = 1, exported: bool = False, check: str = "diffusers") -> int:
    """How many stages `progress` is told of, for a checkpoint with so many text encoders.

    `exported`: for a folder of Optimum's that is not compared.  `check` as `checked_with` returns.
    """
    if exported:
        return 6 + encoders
    return 12 + 3 * encoders if check == "engine" else 10 + 3 * encoders


def _precision(
    target: str, weights: str | Recipe | None, activations: str | None
) -> tuple[Recipe, Precision]:
    """The recipe, and what the manifest says of it."""
    if target == "native":
        return _native_precision(weights, activations)
    stored, computed = TARGETS[target]
    activations = activations or ("fp32" if weights == "fp32" else computed)
    try:
        recipe = Recipe.uniform(weights or stored) if not isinstance(weights, Recipe) else weights
    except ValueError as error:
        raise ConvertError(f"weights for {target}: {FORMS[target]}; {error}") from None
    if activations not in ("fp32", "fp16"):
        raise ConvertError(f"activations {activations!r}: {target} computes in fp32 or fp16")
    if target == "onnx":
        _check_onnx(recipe, activations)
    if target != "onnx" and not recipe.least_bits and str(recipe.default) != activations:
        raise ConvertError(
            f"{target} stores what it does not compress in the type it computes in: "
            f"weights {recipe.default} need activations {recipe.default}, not {activations}"
        )
    named = "mixed" if recipe.rules else str(recipe.default)
    return recipe, Precision(named, activations)


def _check_onnx(recipe: Recipe, activations: str) -> None:
    """Raise ConvertError for what no graph can say, or would not do."""
    forms = [recipe.default, *(rule.form for rule in recipe.rules)]
    for form in forms:
        if form.kind == "palette" or not form.symmetric:
            raise ConvertError(f"weights {form}: an ONNX bundle has {FORMS['onnx']}")
    if recipe.rules and not recipe.least_bits:
        raise ConvertError("the recipe quantizes nothing: give --weights fp16 or fp32 instead")
    if activations == "fp16" and recipe.least_bits and any(f.kind == "fp32" for f in forms):
        raise ConvertError("activations fp16 need the recipe's weights fp32 to be fp16 as well")


def _native_precision(
    weights: str | Recipe | None, activations: str | None
) -> tuple[Recipe, Precision]:
    """One of NATIVE; what is not told is as what is, so that nothing is lost between them."""
    stored, computed = TARGETS["native"]
    if isinstance(weights, Recipe) or weights in ("w8", "w4"):
        return _native_few_bits(weights, activations or computed)
    if activations == "int8":
        raise OptionError("activations int8 need weights w8, or a recipe that has some")
    if weights is None:
        weights = activations if activations in ("bf16", "fp16") else stored
    pair = weights, activations or (weights if weights in dict(NATIVE) else computed)
    if pair not in NATIVE:
        known = ", ".join(f"{w} with {a}" for w, a in NATIVE)
        raise OptionError(
            f"weights {pair[0]} with activations {pair[1]}: the native target has {known}; "
            f"w8, w4 or a recipe with {', '.join(UNQUANTIZED)}"
        )
    # A recipe cannot say bf16, and nothing reads this one: what is stored is in the precision.
    return Recipe.uniform("fp32"), Precision(*pair)


def _native_few_bits(weights: str | Recipe, activations: str) -> tuple[Recipe, Precision]:
    """A recipe as it is, or one form for all that is worth it."""
    from ..quantize.native import check_forms

    if activations not in UNQUANTIZED:
        known = ", ".join(UNQUANTIZED)
        raise OptionError(f"activations {activations!r}: the native target computes in {known}")
    recipe = weights if isinstance(weights, Recipe) else Recipe.uniform(weights)
    if not recipe.least_bits:
        raise OptionError(
            f"the recipe quantizes nothing: give --weights {UNQUANTIZED[activations]} instead"
        )
    check_forms(recipe)
    return recipe, Precision("mixed" if recipe.rules else str(recipe.default), activations)


def _options(target: str, options: Options | None) -> Options | None:
    kinds: dict[str, type] = {
        "native": NativeOptions,
        "coreml": CoremlOptions,
        "tensorrt": TensorrtOptions,
    }
    kind = kinds.get(target)
    if options is not None and type(options) is not kind:
        raise ConvertError(f"{type(options).__name__} are not for the target {target}")
    return options if options is not None or kind is None else kind()
