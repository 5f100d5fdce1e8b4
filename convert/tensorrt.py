"""The TensorRT target: graphs of plain operators, and the engines that are built from them.

Networks are strongly typed: what a tensor is stored and computed in is written in the graph.
Weights in int8 or int4 are DequantizeLinear before the operator that reads them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..bundle import BundleError, Memory
from ..quantize.recipe import Form, Recipe
from ..runtime.engines.tensorrt_builder import CAPABILITIES, Sizes, compile_engine, engine_name
from . import onnx
from .checkpoint import ConvertError
from .integers import compress

# GroupNormalization and int4 begin at 21. Attention begins at 23, but the compiler takes it only
# with sizes of heads that it has a kernel for, and fuses MatMul and Softmax by itself.
OPSET = 21
REFUSED = {  # why, in the parser's words or for want of an operator
    "palette": "TensorRT has no operator for palettes",
    "zero": "TensorRT says: Non-zero zero point is not supported",
}


@dataclass(frozen=True)
class Built:
    """An engine that was written, and what its builder reported about it."""

    capability: str
    file: str
    bytes: int
    memory: Memory  # on the device, beside the inputs and outputs
    seconds: float
    builder: str


def export(
    component: str,
    module: torch.nn.Module,
    config: dict,
    folder: Path,
    latent_size: tuple[int, int] | None = None,
    weights: str | Recipe = "fp16",
    activations: str = "fp16",
    tokens: int | None = None,
    batch: int | None = 1,
) -> dict[str, Any]:
    """Write the graph as `onnx.export` does, with operators that TensorRT has.

    `weights` is fp32, fp16, or a quantizing form or recipe; `tokens` is the length of the text. A
    `tokens`, `batch` or `latent_size` of None stays open: `build` then takes its range. Returns
    also `quantized`, name -> form, and `kept`, name -> why it was not. Raises ConvertError.
    """
    recipe = _recipe(weights)
    quantized: dict[str, str] = {}
    kept: dict[str, tuple[Form, str]] = {}
    fixed = {"sequence": tokens, "batch": batch}
    made = onnx.export(
        component,
        module,
        config,
        folder,
        latent_size,
        activations if recipe else str(weights),
        activations,
        OPSET,
        "plain",
        {name: size for name, size in fixed.items() if size is not None},
        partial(compress, component=component, recipe=recipe, quantized=quantized, kept=kept)
        if recipe
        else lambda graph: None,
    )
    return {**made, "quantized": quantized, "kept": {name: why for name, (_, why) in kept.items()}}


def build(
    model: Path,
    capability: str,
    sizes: Sizes | None = None,
    component: str = "",
    weight_streaming: bool = False,
) -> Built:
    """Build the engine for GPUs of one compute capability, beside the graph; no GPU is needed.

    `sizes` gives (least, usual, most) of every open dimension. Raises ConvertError in one line.
    """
    check_capability(capability)
    target = model.with_name(engine_name(capability))
    staged = target.with_suffix(".tmp")
    component = component or model.parent.name
    try:
        said = compile_engine(model, staged, capability, sizes or {}, weight_streaming)
        os.replace(staged, target)
    except BundleError as error:
        raise ConvertError(f"{component}, for {capability}: {error}") from None
    finally:
        staged.unlink(missing_ok=True)
    memory = Memory(said["weights"], said["activations"], said["scratch"])
    return Built(
        capability, target.name, target.stat().st_size, memory, said["seconds"], said["builder"]
    )


def check_capability(capability: str) -> None:
    """Raise ConvertError for a compute capability that engines cannot be built for."""
    if capability not in CAPABILITIES:
        raise ConvertError(
            f"compute capability {capability!r} is not one that tensorrt-rtx builds for "
            f"({', '.join(CAPABILITIES)}); others build their own engine with tensorrt, on the "
            "device"
        )


# --- weights in integers ------------------------------------------------------------------------


def _recipe(weights: str | Recipe) -> Recipe | None:
    """None where weights are stored as they are computed with; ConvertError for what cannot be."""
    if weights in ("fp32", "fp16"):
        return None
    try:
        recipe = Recipe.uniform(weights) if isinstance(weights, str) else weights
    except ValueError as error:
        raise ConvertError(str(error)) from None
    for form in (recipe.default, *(rule.form for rule in recipe.rules)):
        reason = "palette" if form.kind == "palette" else "" if form.symmetric else "zero"
        if reason:
            raise ConvertError(f"weights {form}: {REFUSED[reason]}; choose w8 or w4, or fp16")
    return recipe
