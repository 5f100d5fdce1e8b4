"""A component as an ONNX graph: exported through torch.onnx, cleaned, its weights beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from ..bundle import TEXT_ENCODERS, TIME_IDS
from ..quantize.recipe import Form, Recipe
from .checkpoint import ConvertError, hidden_layer
from .integers import OPSET, compress
from .rounding import to_half

if TYPE_CHECKING:
    import torch

COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")
# Any values do, as long as they differ: equal sizes would be taken for the same dimension.
EXAMPLE = {"batch": 2, "height": 72, "width": 56, "sequence": 11}
EXTERNAL = 1024  # bytes; smaller tensors stay in model.onnx
PAGE, LINE = 4096, 64  # tensors of 16 pages or more start on a page, others on a cache line


def export(
    component: str,
    module: torch.nn.Module,
    config: dict,
    folder: Path,
    latent_size: tuple[int, int] | None = None,
    weights: str | Recipe = "fp32",
    activations: str = "fp32",
    opset: int = 20,
    attention: str = "fused",
    fixed: dict[str, int] | None = None,
    edit: Callable[[ir.Graph], None] = lambda graph: None,
    spare: bool = False,
) -> dict[str, Any]:
    """Write model.onnx, model.onnx.data and config.json; return the inputs and outputs.

    `latent_size` is (width, height) in latents; None leaves them open. `weights` is fp32, fp16 or
    a recipe; `attention` is as in `wrappers.wrap`. `fixed` gives other dimensions a size, by name;
    `edit` changes the graph before it is written. `spare`: the graph returns also what only other
    tools read, `wrappers.spare_outputs`. Returns also `quantized`, name -> form, and
    `kept`, name -> what it is stored in and why. Raises ConvertError.
    """
    from .wrappers import spare_outputs, wrap

    plain = activations if isinstance(weights, Recipe) else weights
    _check_choices(component, plain, activations)
    lost: dict[str, int] = {}
    wrapper = wrap(component, module, activations == "fp16", lost, attention, spare)
    inputs, outputs = interface(component, module, latent_size, activations)
    inputs, outputs = _fix(inputs, fixed or {}), _fix(outputs, fixed or {})
    more = spare_outputs(component, module.config) if spare else []
    every = outputs | {name: next(iter(outputs.values())) for name in more}  # all are states
    model = _to_graph(wrapper, inputs, every, opset)
    _rename_dims(model.graph, inputs, every)
    _name_after_layers(model.graph)
    scrub(model)
    _check_finite(model.graph)
    quantized, kept = _store(model, component, weights, activations, lost)
    edit(model.graph)
    folder.mkdir(parents=True, exist_ok=True)
    write(model, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    onnx.checker.check_model(str(folder / "model.onnx"))
    return {
        "inputs": inputs,
        "outputs": outputs,
        "fp16_underflow": lost,
        "quantized": quantized,
        "kept": kept,
    }


def interface(
    component: str,
    module: torch.nn.Module,
    latent_size: tuple[int, int] | None = None,
    activations: str = "fp32",
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Inputs and outputs, name -> dtype and shape, named as the ecosystem does (optimum)."""
    config, real = module.config, {"fp32": "float32", "fp16": "float16"}[activations]
    width, height = latent_size or ("width", "height")
    if component in TEXT_ENCODERS:
        ids = ["batch", config.max_position_embeddings]
        states = _tensor(real, [*ids, config.hidden_size])
        if config.output_hidden_states:  # SDXL reads those before the last layer
            outputs = {f"hidden_states.{hidden_layer(config)}": states}
        else:
            outputs = {
                "last_hidden_state": states,
                "pooler_output": _tensor(real, ["batch", config.hidden_size]),
            }
        if component == "text_encoder_2":
            outputs["text_embeds"] = _tensor(real, ["batch", config.projection_dim])
        return {"input_ids": _tensor("int64", ids)}, outputs
    if component == "unet":
        latent = ["batch", config.in_channels, height, width]
        context = ["batch", "sequence", config.cross_attention_dim]
        inputs = {
            "sample": _tensor(real, latent),
            "timestep": _tensor("float32", []),  # float16 cannot tell 999 from 999.25
            "encoder_hidden_states": _tensor(real, context),
        }
        if config.addition_embed_type == "text_time":  # SDXL's pooled text and picture size
            both = config.projection_class_embeddings_input_dim
            pooled = both - TIME_IDS * config.addition_time_embed_dim
            inputs["text_embeds"] = _tensor(real, ["batch", pooled])
            inputs["time_ids"] = _tensor("float32", ["batch", TIME_IDS])  # as the timestep
        if config.time_cond_proj_dim is not None:  # LCM's embedded guidance scale
            inputs["timestep_cond"] = _tensor(real, ["batch", config.time_cond_proj_dim])
        return inputs, {"out_sample": _tensor(real, ["batch", config.out_channels, height, width])}
    scale = 2 ** (len(config.block_out_channels) - 1)
    full, small = _vae_sizes(component, scale, latent_size)
    if component == "vae_decoder":
        latent = ["batch", config.latent_channels, *small]
        image = ["batch", config.out_channels, *full]
        return {"latent_sample": _tensor(real, latent)}, {"sample": _tensor(real, image)}
    image = ["batch", config.in_channels, *full]
    parameters = ["batch", 2 * config.latent_channels, *small]
    return {"sample": _tensor(real, image)}, {"latent_parameters": _tensor(real, parameters)}


def _vae_sizes(
    component: str, scale: int, latent_size: tuple[int, int] | None
) -> tuple[list, list]:
    """Height and width of the image and of the latents; an output's in terms of the input's.

    Optimum computes the expressions before a run, and reads them only with the blanks.
    """
    if latent_size:
        width, height = latent_size
        return [scale * height, scale * width], [height, width]
    if component == "vae_decoder":
        return [f"{scale} * height", f"{scale} * width"], ["height", "width"]
    return ["height", "width"], [f"height // {scale}", f"width // {scale}"]


def _tensor(dtype: str, shape: list) -> dict:
    return {"dtype": dtype, "shape": shape}


def _fix(tensors: dict[str, dict], sizes: dict[str, int]) -> dict[str, dict]:
    return {
        name: _tensor(t["dtype"], [sizes.get(n, n) for n in t["shape"]])
        for name, t in tensors.items()
    }


def _check_choices(component: str, weights: str, activations: str) -> None:
    if component not in COMPONENTS:
        raise ConvertError(f"{component} is not a component; choose from {', '.join(COMPONENTS)}")
    for name, value in (("weights", weights), ("activations", activations)):
        if value not in ("fp32", "fp16"):
            raise ConvertError(f"{name} {value!r} is not known; choose fp32 or fp16")
    if (weights, activations) == ("fp32", "fp16"):
        raise ConvertError("activations fp16 need weights fp16 as well")


def _to_graph(wrapper: torch.nn.Module, inputs: dict, outputs: dict, opset: int) -> ir.Model:
    import torch

    from .modules import quiet

    arguments, dynamic = [], []
    for value in inputs.values():
        shape = [_example(n) for n in value["shape"]]
        arguments.append(torch.ones(shape, dtype=getattr(torch, value["dtype"])))
        axes = [i for i, n in enumerate(value["shape"]) if isinstance(n, str)]
        dynamic.append(dict.fromkeys(axes, torch.export.Dim.DYNAMIC))
    with quiet(), torch.no_grad():
        # in two steps: torch.onnx alone retries in strict mode and fails on the fused attention
        program = torch.export.export(
            wrapper, tuple(arguments), dynamic_shapes=tuple(dynamic), strict=False
        )
        exported = torch.onnx.export(
            program,
            (),
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    return exported.model


def _example(n: int | str) -> int:
    return n if isinstance(n, int) else EXAMPLE[n]


def _rename_dims(graph: ir.Graph, inputs: dict, outputs: dict) -> None:
    """The exporter's s53 becomes batch, and so on, in every shape of the graph."""
    names = {}
    for value in graph.inputs:
        for old, new in zip(value.shape, inputs[value.name]["shape"], strict=True):
            names[str(old)] = str(new)
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_renamed(n, names) for n in value.shape])
    for values, described in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value in values:
            value.shape = ir.Shape(described[value.name]["shape"])


def _renamed(n: Any, names: dict[str, str]) -> int | str | None:
    if isinstance(n, int) or n.value is None:
        return n if isinstance(n, int) else None
    return re.sub(r"\bs\d+\b", lambda m: names.get(m[0], m[0]), str(n.value))


def _name_after_layers(graph: ir.Graph) -> None:
    """Nodes become layer/Operator and weights keep the checkpoint's names: profilers show them."""
    for value in list(graph.initializers.values()):
        name = _source(value, graph)
        if name not in graph.initializers:
            value.name = name
    counts: dict[str, int] = {}
    for node in graph:
        name = f"{_layer(node)}/{node.op_type}".lstrip("/")
        counts[name] = counts.get(name, 0) + 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"


def _source(value: ir.Value, graph: ir.Graph) -> str:
    """The checkpoint's name of a weight, also after the exporter has transposed or reshaped it."""
    origin = value.metadata_props.get("pkg.onnxscript.optimizer.folded_from", "")
    weights = re.findall(r"'module\.([^']+)'", origin)
    return weights[0] if len(weights) == 1 else value.name.removeprefix("module.")


def _layer(node: ir.Node) -> str:
    scopes = re.findall(
        r"'module\.([^']+)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    )
    return scopes[-1] if scopes else ""


def scrub(model: ir.Model) -> None:
    """Drop the exporter's notes: they hold stack traces and this machine's paths."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values()]
    values += [value for node in graph for value in node.outputs]
    for item in [model, graph, *graph, *values]:
        item.metadata_props.clear()
        item.doc_string = None


def _check_finite(graph: ir.Graph) -> None:
    for name, value in graph.initializers.items():
        array = value.const_value.numpy()
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ConvertError(f"{name} is a constant with NaN or Inf, which cannot be quantised")


def _store(
    model: ir.Model, component: str, weights: str | Recipe, activations: str, lost: dict[str, int]
) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Put the weights into what they are stored in; returns `quantized` and `kept` of `export`."""
    graph, exact = model.graph, set()
    quantized: dict[str, str] = {}
    kept: dict[str, tuple[Form, str]] = {}
    if isinstance(weights, Recipe):
        model.opset_imports[""] = max(model.opset_imports[""], OPSET)
        compress(graph, component, weights, quantized, kept, plain=False)
        usual = weights.unquantized, ""
        exact = {name for name in graph.initializers if kept.get(name, usual)[0].kind == "fp32"}
    if activations == "fp32" and weights != "fp32":
        _store_as_half(graph, lost, exact)
    dtypes = {name: graph.initializers[name].dtype for name in kept}
    stored = {name: "fp16" if t == ir.DataType.FLOAT16 else "fp32" for name, t in dtypes.items()}
    return quantized, {name: (stored[name], why) for name, (_, why) in kept.items()}


def _store_as_half(graph: ir.Graph, lost: dict[str, int], exact: set[str]) -> None:
    """Matrices and filters but `exact` as float16 followed by a Cast.

    onnxruntime folds it while loading, or computes it when the weight is used.
    """
    first = graph[0]
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        matrix = sum(n > 1 for n in tensor.shape) > 1
        if tensor.dtype != ir.DataType.FLOAT or not matrix or tensor.nbytes < 2 * EXTERNAL:
            continue
        if name in exact:
            continue
        value.const_value = ir.LazyTensor(  # converted while writing: never two copies of all
            partial(_half_tensor, name, tensor, lost),
            dtype=ir.DataType.FLOAT16,
            shape=tensor.shape,
            name=name,
        )
        value.dtype = ir.DataType.FLOAT16
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}/Cast")
        full = cast.outputs[0]
        full.name, full.shape, full.dtype = f"{name}.float32", value.shape, ir.DataType.FLOAT
        ir.convenience.replace_all_uses_with(value, full)
        cast.replace_input_with(0, value)
        graph.insert_before(first, cast)


def _half_tensor(name: str, tensor: ir.TensorProtocol, lost: dict[str, int]) -> ir.Tensor:
    return ir.Tensor(to_half(name, tensor.numpy(), lost), name=name)


def write(model: ir.Model, folder: Path) -> None:
    """Every tensor of any size goes to model.onnx.data, where onnxruntime maps it into memory."""
    with (folder / "model.onnx.data").open("wb") as file:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor.nbytes < EXTERNAL:
                continue
            step = PAGE if tensor.nbytes >= 16 * PAGE else LINE
            offset = -(-file.tell() // step) * step
            file.write(bytes(offset - file.tell()))
            packed = tensor.dtype.bitwidth < 8  # two to a byte
            file.write(tensor.tobytes() if packed else np.ascontiguousarray(tensor.numpy()).data)
            value.const_value = ir.ExternalTensor(
                "model.onnx.data",
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=name,
                base_dir=folder,
            )
    ir.save(model, folder / "model.onnx")
