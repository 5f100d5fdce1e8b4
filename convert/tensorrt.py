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

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from ..bundle import BundleError, Memory
from ..quantize.recipe import Form, Recipe
from ..quantize.weights import Integers, fits, quantize
from ..runtime.engines.tensorrt_builder import CAPABILITIES, Sizes, compile_engine, engine_name
from . import onnx
from .checkpoint import ConvertError

# GroupNormalization and int4 begin at 21. Attention begins at 23, but the compiler takes it only
# with sizes of heads that it has a kernel for, and fuses MatMul and Softmax by itself.
OPSET = 21
WEIGHT = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}  # which input of the operator it is
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
    kept: dict[str, str] = {}
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
        partial(_quantize, component=component, recipe=recipe, quantized=quantized, kept=kept),
    )
    return {**made, "quantized": quantized, "kept": kept}


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


def _quantize(
    graph: ir.Graph,
    component: str,
    recipe: Recipe | None,
    quantized: dict[str, str],
    kept: dict[str, str],
) -> None:
    """Replace the weights that the recipe chooses by integers and the nodes that undo them."""
    if recipe is None:
        return
    for node in list(graph):
        value = node.inputs[WEIGHT[node.op_type]] if node.op_type in WEIGHT else None
        if value is None or not _is_weight(value) or value.name in kept:
            continue
        # as in the checkpoint: output channels first
        turned = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
        )
        array = value.const_value.numpy()
        array = array.T if turned else array
        form, why = recipe.choose(component, value.name, array.shape)
        misfit = fits(array.shape, form) if form.quantizes else why
        if misfit:
            kept[value.name] = misfit
            continue
        quantized[value.name] = str(form)
        _replace(graph, value, _integers(array, form), turned)


def _is_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    floating = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    return value.is_initializer() and tensor.dtype in floating and len(tensor.shape) > 1


def _integers(array: np.ndarray, form: Form) -> Integers:
    made = quantize(array, form)
    assert isinstance(made, Integers)  # palettes were refused before
    return made


def _replace(graph: ir.Graph, value: ir.Value, made: Integers, turned: bool) -> None:
    """The initializer becomes integers; its readers read what DequantizeLinear makes of them."""
    name, dtype, shape = value.name, value.const_value.dtype, made.values.shape
    values, scale, attributes = _layout(made)
    if turned:
        values, scale = values.T, scale.T
        attributes = {k: 1 - n if k == "axis" else n for k, n in attributes.items()}
    integer = ml_dtypes.int4 if made.bits == 4 else np.int8
    readers = list(value.uses())
    value.const_value = ir.Tensor(np.ascontiguousarray(values).astype(integer), name=name)
    value.dtype, value.shape = value.const_value.dtype, ir.Shape(values.shape)
    scales = _initializer(graph, f"{name}.scale", scale.astype(dtype.numpy()))
    nodes = [ir.node("DequantizeLinear", [value, scales], attributes)]
    if values.ndim < len(shape):
        whole = _initializer(graph, f"{name}.shape", np.array(shape, np.int64))
        nodes.append(ir.node("Reshape", [nodes[0].outputs[0], whole]))
    for node in nodes:
        node.name, out = f"{name}/{node.op_type}", node.outputs[0]
        out.name, out.dtype = f"{name}.{node.op_type}", dtype
    nodes[0].outputs[0].shape, nodes[-1].outputs[0].shape = value.shape, ir.Shape(shape)
    if turned:
        nodes[-1].outputs[0].shape = value.shape
    for reader, index in readers:
        reader.replace_input_with(index, nodes[-1].outputs[0])
    graph.insert_before(graph[0], nodes)


def _layout(made: Integers) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Values, scales and attributes as DequantizeLinear takes them, output channels first.

    TensorRT takes blocks only along the last two dimensions, so filters become rows.
    """
    rows = made.values.reshape(len(made.values), -1)
    if made.block:
        scale = made.scale.reshape(len(rows), -1)
        return rows, scale, {"axis": 1, "block_size": rows.shape[1] // scale.shape[1]}
    if made.scale.size == 1:
        return made.values, made.scale.reshape(()), {}
    return made.values, made.scale.reshape(-1), {"axis": 0}


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, const_value=tensor)
    value.dtype, value.shape = tensor.dtype, tensor.shape
    graph.initializers[name] = value
    return value
