"""Weights of an ONNX graph in integers: DequantizeLinear before the operator that reads them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..quantize.recipe import Form, Recipe
from ..quantize.weights import Integers, fits, quantize
from .checkpoint import ConvertError

WEIGHT = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}  # which input of the operator it is
OPSET = 21  # int4 and blocks begin there
MICROSOFT = "com.microsoft"


def compress(
    graph: ir.Graph,
    component: str,
    recipe: Recipe,
    quantized: dict[str, str],
    kept: dict[str, tuple[Form, str]],
    plain: bool = True,
) -> None:
    """Replace the weights that the recipe chooses by integers and the nodes that undo them.

    Fills `quantized`, name -> form, and `kept`, name -> form and why.  Not `plain`, it takes the
    layouts and operators that onnxruntime is fast with.  Raises ConvertError for weights that no
    scale fits.
    """
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
            kept[value.name] = recipe.unquantized if form.quantizes else form, misfit
            continue
        quantized[value.name] = str(form)
        made = _integers(f"{component}/{value.name}", array, form)
        if not plain and _only_looked_up(value) and _has_lookup(made):
            _replace_table(graph, value, made)
            continue
        if not plain and turned and made.bits == 8 and _only_multiplied(value):
            for reader, _ in value.uses():
                _take_output_channels_first(graph, reader)
            turned = False
        _replace(graph, value, made, turned, plain)


def _is_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    floating = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    return value.is_initializer() and tensor.dtype in floating and len(tensor.shape) > 1


def _integers(name: str, array: np.ndarray, form: Form) -> Integers:
    try:
        made = quantize(array, form)
    except ValueError as error:
        raise ConvertError(f"{name}: {error}") from None
    assert isinstance(made, Integers)  # palettes were refused before
    return made


def _only_multiplied(value: ir.Value) -> bool:
    return all(
        n.op_type in ("MatMul", "Gemm") and index == 1 and not n.attributes.get_int("transB", 0)
        for n, index in value.uses()
    )


def _take_output_channels_first(graph: ir.Graph, reader: ir.Node) -> None:
    """Scales per row: onnxruntime dequantizes int8 fifteen times as fast as with one per column."""
    if reader.op_type == "MatMul":
        reader.op_type, reader.domain = "FusedMatMul", MICROSOFT
        reader.name = reader.name.replace("/MatMul", "/FusedMatMul")
        graph.opset_imports[MICROSOFT] = 1
    reader.attributes["transB"] = ir.AttrInt64("transB", 1)


def _replace(graph: ir.Graph, value: ir.Value, made: Integers, turned: bool, plain: bool) -> None:
    """The initializer becomes integers; its readers read what DequantizeLinear makes of them."""
    name, dtype, shape = value.name, value.const_value.dtype, made.values.shape
    values, scale, attributes = _layout(made, plain)
    reshaped = values.shape != shape
    if turned:
        values, scale = values.T, scale.T
        attributes = {k: 1 - n if k == "axis" else n for k, n in attributes.items()}
    readers = list(value.uses())
    _store(value, values, made.bits)
    scales = _initializer(graph, f"{name}.scale", scale.astype(dtype.numpy()))
    nodes = [ir.node("DequantizeLinear", [value, scales], attributes)]
    if reshaped:
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


def _layout(made: Integers, plain: bool) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Values, scales and attributes as DequantizeLinear takes them, output channels first.

    A block is some input channels with all their taps, so filters become rows: the operator would
    want a scale for every tap, and TensorRT takes blocks only along the last two dimensions.
    onnxruntime is faster with a row for each block, but for matrices of int4 hosts have kernels.
    """
    rows = made.values.reshape(len(made.values), -1)
    if made.block and not plain and (made.bits == 8 or made.values.ndim > 2):
        return made.values.reshape(made.scale.size, -1), made.scale.reshape(-1), {"axis": 0}
    if made.block:
        scale = made.scale.reshape(len(rows), -1)
        return rows, scale, {"axis": 1, "block_size": rows.shape[1] // scale.shape[1]}
    if made.scale.size == 1:
        return made.values, made.scale.reshape(()), {}
    return made.values, made.scale.reshape(-1), {"axis": 0}


# --- tables -------------------------------------------------------------------------------------


def _only_looked_up(value: ir.Value) -> bool:
    return all(
        node.op_type == "Gather" and index == 0 and node.attributes.get_int("axis", 0) == 0
        for node, index in value.uses()
    )


def _has_lookup(made: Integers) -> bool:
    """Gather takes int8; for int4 there is an operator that takes some sizes of blocks."""
    return made.bits == 8 or (made.block >= 16 and made.block & (made.block - 1) == 0)


def _replace_table(graph: ir.Graph, value: ir.Value, made: Integers) -> None:
    """Only the rows that are looked up are dequantized: a whole vocabulary would be held else."""
    dtype, (count, width) = value.const_value.dtype, made.values.shape
    scale = np.broadcast_to(made.scale, (count, made.scale.shape[1])).astype(dtype.numpy())
    readers = [node for node, _ in value.uses()]
    _store(value, made.values, made.bits)
    scales = _initializer(graph, f"{value.name}.scale", scale)
    block = width // scale.shape[1]
    for reader in readers:
        if made.bits == 4:
            inputs = [value, reader.inputs[1], scales]
            how = {"gather_axis": 0, "quantize_axis": 1, "block_size": block}
            nodes = [ir.node("GatherBlockQuantized", inputs, how, domain=MICROSOFT)]
            graph.opset_imports[MICROSOFT] = 1
        else:
            picked = [ir.node("Gather", [table, reader.inputs[1]]) for table in (value, scales)]
            found = [node.outputs[0] for node in picked]
            how = {"axis": -1, "block_size": block}
            nodes = [*picked, ir.node("DequantizeLinear", found, how)]
        _take_the_place_of(graph, reader, nodes)


def _take_the_place_of(graph: ir.Graph, reader: ir.Node, nodes: list[ir.Node]) -> None:
    """The last node returns what the reader did, under its name; the others get names from it."""
    old, new = reader.outputs[0], nodes[-1].outputs[0]
    layer = reader.name.rpartition("/")[0]
    for i, node in enumerate(nodes):
        node.name = f"{layer}/{node.op_type}" + ("_2" if i == 1 else "")
        node.outputs[0].name = f"{old.name}.{i}"
    new.dtype, new.shape = old.dtype, old.shape
    graph.insert_before(reader, nodes)
    ir.convenience.replace_all_uses_with(old, new)
    graph.remove(reader, safe=True)
    new.name = old.name


# --- initializers -------------------------------------------------------------------------------


def _store(value: ir.Value, values: np.ndarray, bits: int) -> None:
    integer = ml_dtypes.int4 if bits == 4 else np.int8
    value.const_value = ir.Tensor(np.ascontiguousarray(values).astype(integer), name=value.name)
    value.dtype, value.shape = value.const_value.dtype, ir.Shape(values.shape)


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, const_value=tensor)
    value.dtype, value.shape = tensor.dtype, tensor.shape
    graph.initializers[name] = value
    return value
