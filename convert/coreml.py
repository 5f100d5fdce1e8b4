"""A component as Core ML packages: captured by torch.export, translated by coremltools, then cut.

What is compressed and cut is the translated program, and what is checked is the package on disk.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..bundle import Bundle
from ..parity import psnr
from ..quantize.recipe import Form, Recipe
from ..quantize.weights import fits
from ..runtime.engines.coreml import CoremlEngine, Part, function_name, package_name
from . import attention, mil, onnx
from .blame import torch_outputs, worst_of
from .checkpoint import ConvertError
from .coremltools_fixes import coremltools, validated_once
from .garbage import uncollected
from .mlprogram import Program
from .modules import quiet
from .options import CoremlOptions
from .rounding import to_half
from .wrappers import wrap

PACKAGES = {
    "text_encoder": "TextEncoder",
    "text_encoder_2": "TextEncoder2",
    "unet": "Unet",
    "vae_decoder": "VAEDecoder",
    "vae_encoder": "VAEEncoder",
}
SPATIAL = ("unet", "vae_decoder", "vae_encoder")
SQUARE_SAFE = 64.0  # a magnitude at a norm whose square fp16 still holds, sixteen times over
LEAST_EPS = 2.0**-24  # fp16's least number
# Between the time step and its sinusoids nothing is rounded to fp16, which ends at whole numbers.
ON_THE_WAY = {"mul", "expand_dims", "reshape", "concat", "cast", "slice_by_index", "transpose"}
Size = tuple[int, int]


@dataclass
class Made:
    """What an export wrote: its interface, packages in the order they run, and the weights."""

    inputs: dict[str, dict]
    outputs: dict[str, dict]
    parts: list[str]
    forms: Counter[str] = field(default_factory=Counter)  # name of a form -> weights
    kept: Counter[str] = field(default_factory=Counter)  # reason why not compressed -> weights
    seen: list[str] = field(default_factory=list)  # component/weight, as recipes name them
    underflow: dict[str, int] = field(default_factory=dict)


def export(
    component: str,
    module: torch.nn.Module,
    config: dict,
    folder: Path,
    sizes: Sequence[Size],
    tokens: int,
    half: bool,
    recipe: Recipe,
    options: CoremlOptions,
    batch: int = 1,
    peaks: dict[str, float] | None = None,
) -> Made:
    """Write the component's packages and config.json to `folder`.

    `sizes` are those of the latents, (width, height) each; several become functions of one package
    that share their weights.  `tokens` is the length of the text.  `peaks` are the magnitudes seen
    at the inputs of norms: with `half`, a norm whose square would overflow is scaled.  Raises
    ConvertError.
    """
    sizes = sizes if component in SPATIAL else sizes[:1]
    _check_sizes(sizes, options)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    made = Made(*_interface(component, module, sizes, tokens), _parts(component, options))
    if half:
        for name, weight in module.named_parameters():
            to_half(name, weight.numpy(), made.underflow)
    wrapper = _wrapper(component, module, options, peaks if half else None)
    for size in sizes:
        inputs, outputs = _interface(component, module, [size], tokens)
        program, names = _translate(component, wrapper, inputs, outputs, half, options, batch)
        choose = _Chooser(component, recipe, half, options, names)
        mil.compress(program, choose, options.ios)
        made.forms, made.kept, made.seen = choose.forms, choose.kept, choose.seen
        function = None
        if len(sizes) > 1:
            shape = next(t["shape"] for t in inputs.values() if len(t["shape"]) == 4)
            function = function_name(shape[3], shape[2])
        _write(program, folder, made.parts, function, options.ios)
    if len(sizes) > 1:
        for part in made.parts:
            mil.join(folder, part)
    return made


def _check_sizes(sizes: Sequence[Size], options: CoremlOptions) -> None:
    if len(sizes) > 1 and options.ios < 18:
        raise ConvertError(
            f"{len(sizes)} sizes are functions of one package, which {options.deployment} cannot "
            "open: give one --size, or --deployment ios18 or macos15"
        )


def _parts(component: str, options: CoremlOptions) -> list[str]:
    name = PACKAGES[component]
    if component != "unet" or options.chunks == 1:
        return [f"{name}.mlpackage"]
    return [f"{name}Chunk{i + 1}.mlpackage" for i in range(options.chunks)]


def _write(program: Any, folder: Path, parts: list[str], function: str | None, ios: int) -> None:
    """Save a program as its parts; those of one function of several wait in a folder of its own."""
    place = folder / function if function else folder
    place.mkdir(exist_ok=True)
    if len(parts) == 1:
        mil.save(program, place / parts[0], ios)
        return
    whole = place / "whole.mlpackage"
    mil.save(program, whole, ios)
    mil.cut(whole, [place / part for part in parts], ios)
    shutil.rmtree(whole)


def _interface(
    component: str, module: torch.nn.Module, sizes: Sequence[Size], tokens: int
) -> tuple[dict, dict]:
    """Inputs and outputs by our names: batch 1, sizes open only if there are several."""
    size = sizes[0] if len(sizes) == 1 or component not in SPATIAL else None
    fixed = {"batch": 1, "sequence": tokens}
    inputs, outputs = onnx.interface(component, module, size)
    for tensor in (*inputs.values(), *outputs.values()):
        tensor["shape"] = [fixed.get(n, n) for n in tensor["shape"]]
    return inputs, outputs


# --- capture and translation --------------------------------------------------------------------


class Interface(torch.nn.Module):
    """The component with the inputs of its package, in order: Apple's differ in shape and type."""

    def __init__(self, inner: torch.nn.Module, names: list[str], apple: bool) -> None:
        super().__init__()
        self.inner, self.names, self.apple = inner, names, apple

    def forward(self, *values):
        feed = dict(zip(self.names, values, strict=True))
        if self.apple and "encoder_hidden_states" in feed:  # (batch, channels, 1, tokens)
            states = feed["encoder_hidden_states"]
            feed["encoder_hidden_states"] = states.squeeze(2).transpose(1, 2)
        if "input_ids" in feed:  # Apple's are floats
            feed["input_ids"] = feed["input_ids"].to(torch.int32)
        return self.inner(**feed)


def _wrapper(
    component: str,
    module: torch.nn.Module,
    options: CoremlOptions,
    peaks: dict[str, float] | None,
) -> torch.nn.Module:
    wrapper = wrap(component, module, attention="original")
    if options.attention == "split-einsum":
        attention.use_split_einsum(wrapper)
    for name, norm in wrapper.module.named_modules():
        shift = _shift((peaks or {}).get(name, 0.0))
        if shift and isinstance(norm, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            _scale_norm(norm, shift)
    return wrapper


def _shift(peak: float) -> int:
    """By which power of two the input of a norm is made smaller."""
    return max(0, math.ceil(math.log2(peak / SQUARE_SAFE))) if peak > 0 else 0


def _scale_norm(norm: Any, shift: int) -> None:
    """Norms forget the scale of their input, so a smaller one gives the same with a smaller eps."""
    scale = 2.0**-shift
    eps = max(norm.eps * scale**2, LEAST_EPS)
    if isinstance(norm, torch.nn.GroupNorm):
        norm.forward = lambda x: F.group_norm(
            x * scale, norm.num_groups, norm.weight, norm.bias, eps
        )
    else:
        norm.forward = lambda x: F.layer_norm(
            x * scale, norm.normalized_shape, norm.weight, norm.bias, eps
        )


def _translate(
    component: str,
    wrapper: torch.nn.Module,
    inputs: dict,
    outputs: dict,
    half: bool,
    options: CoremlOptions,
    batch: int,
) -> tuple[Any, dict[str, str]]:
    """The component as a program of Core ML's, and the checkpoint's names of its constants."""
    ct, apple = coremltools(), options.layout == "apple"
    shapes = {n: _package_shape(n, t["shape"], apple, batch) for n, t in inputs.items()}
    arguments = tuple(
        torch.ones(shape, dtype=torch.float32 if apple or name != "input_ids" else torch.int32)
        for name, shape in shapes.items()
    )
    typed = zip(shapes.items(), arguments, strict=True)
    float_type = np.float16 if apple and half and component == "unet" else np.float32
    feeds = [
        ct.TensorType(
            package_name(component, name, options.layout),
            shape=shape,
            dtype=np.int32 if value.dtype == torch.int32 else float_type,
        )
        for (name, shape), value in typed
    ]
    results = [
        ct.TensorType(package_name(component, name, options.layout), dtype=np.float32)
        for name in outputs
    ]
    with quiet(), torch.no_grad(), mil.silent(), uncollected(), validated_once():
        captured = torch.export.export(
            Interface(wrapper, list(inputs), apple), arguments, strict=False
        ).run_decompositions({})
        program = ct.convert(
            captured,
            inputs=feeds,
            outputs=results,
            convert_to="milinternal",
            minimum_deployment_target=getattr(ct.target, f"iOS{options.ios}"),
            compute_precision=ct.transform.FP16ComputePrecision(_may_be_half)
            if half
            else ct.precision.FLOAT32,
        )
    program.validate()
    names = captured.graph_signature.inputs_to_parameters
    return program, {k: v.removeprefix("inner.module.") for k, v in names.items()}


def _package_shape(name: str, shape: list[int], apple: bool, batch: int) -> list[int]:
    if name == "timestep":
        return [batch]
    if apple and name == "encoder_hidden_states":
        return [batch, shape[2], 1, shape[1]]
    return [batch, *shape[1:]]


def _may_be_half(op: Any) -> bool:
    return not _leads_to_sinusoids(op, 6)


def _leads_to_sinusoids(op: Any, depth: int) -> bool:
    if op.op_type in ("sin", "cos"):
        return True
    if depth == 0 or op.op_type not in ON_THE_WAY:
        return False
    return any(_leads_to_sinusoids(c, depth - 1) for v in op.outputs for c in v.child_ops)


# --- which weight gets which form ---------------------------------------------------------------


class _Chooser:
    """Asks the recipe for every weight by the checkpoint's name, and keeps count."""

    def __init__(
        self,
        component: str,
        recipe: Recipe,
        half: bool,
        options: CoremlOptions,
        names: dict[str, str],
    ) -> None:
        self.component, self.recipe, self.options, self.names = component, recipe, options, names
        self.plain = "fp16" if half else "fp32"
        self.forms: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.seen: list[str] = []

    def __call__(self, constant: str, shape: tuple[int, ...]) -> Form | None:
        """The form of a constant that is compressed; None for one that stays as it is."""
        name = self._name(constant)
        self.seen.append(f"{self.component}/{name}")
        form, reason = self.recipe.choose(self.component, name, shape)
        problem = None
        if form.quantizes:
            self._check_system(form, name)
            problem = fits(shape, form)
        if problem or not form.quantizes:
            self.forms[self.plain] += 1
            if self.recipe.least_bits:
                self.kept[problem or reason] += 1
            return None
        self.forms[str(form)] += 1
        return form

    def _check_system(self, form: Form, name: str) -> None:
        old = self.options.ios < 18
        if old and (
            form.granularity in ("grouped", "block") or (form.kind, form.bits) == ("int", 4)
        ):
            raise ConvertError(
                f"{form} for {self.component}/{name} needs --deployment ios18 or macos15; "
                f"{self.options.deployment} reads p2, p4, p6, p8 and w8"
            )

    def _name(self, constant: str) -> str:
        """The checkpoint's name of a constant."""
        stem = constant.removesuffix("_to_fp16")
        return self.names.get(stem, stem)


# --- where it was lost --------------------------------------------------------------------------


def worst_layer(
    bundle: Bundle, component: str, module: torch.nn.Module, inputs: dict[str, np.ndarray]
) -> tuple[str, float]:
    """Run the written packages beside the original: the layer that loses most, and its PSNR."""
    found: dict[str, np.ndarray] = {}

    def open_watched(package: Path, function: str | None) -> Part:
        program = Program(package, function)
        layers = program.layers()

        def watch(_: str, output: str, value: torch.Tensor) -> None:
            if output in layers:
                found[layers[output]] = value[:1].numpy().copy()

        return lambda values: program({n: values[n] for n in program.inputs}, watch=watch)

    CoremlEngine(bundle, component, open_watched)(inputs)
    expected = torch_outputs(component, module, inputs)
    named = {_plain(layer): layer for layer in expected}
    pairs = [
        (named[layer], psnr(expected[named[layer]], _as(value, expected[named[layer]].shape)))
        for layer, value in found.items()
        if layer in named and value.size == expected[named[layer]].size
    ]
    return worst_of(pairs)


def _plain(layer: str) -> str:
    return layer.replace(".", "_")


def _as(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A layer's result in torch's order: split-einsum keeps tokens last."""
    if value.ndim == 4 and len(shape) == 3:
        value = value.squeeze(2).transpose(0, 2, 1)
    return value.reshape(shape)
