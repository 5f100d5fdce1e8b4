"""Which layer lost it: every layer of an exported graph beside the same layer in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F

from ..bundle import Bundle
from ..kernels import Act
from ..parity import psnr
from ..runtime.engines.ops import Ops
from ..runtime.program import Node
from .wrappers import wrap

ROUNDING = 100.0  # dB; how far above this a layer is says nothing about damage
REAL = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)

ACTIVATIONS: dict[Act, Callable[[torch.Tensor], torch.Tensor]] = {
    Act.NONE: lambda x: x,
    Act.SILU: F.silu,
    Act.GELU: F.gelu,
    Act.QUICK_GELU: lambda x: x * torch.sigmoid(1.702 * x),
    Act.RELU: F.relu,
    Act.TANH3: lambda x: 3 * torch.tanh(x / 3),
}


def blame(
    component: str, module: torch.nn.Module, folder: Path, inputs: dict[str, np.ndarray]
) -> list[tuple[str, float]]:
    """Compare every layer that has weights on the same inputs: (layer, PSNR) as they are executed.

    Layers that the exporter folded into constants are left out. All outputs are held in memory.
    """
    expected = torch_outputs(component, module, inputs)
    found = _graph_outputs(folder, list(expected), inputs)
    return [(layer, psnr(expected[layer], value)) for layer, value in found.items()]


def worst(
    component: str, module: torch.nn.Module, folder: Path, inputs: dict[str, np.ndarray]
) -> tuple[str, float]:
    """The layer of a graph that loses most, and its PSNR."""
    return worst_of(blame(component, module, folder, inputs))


def native_worst(
    component: str, module: torch.nn.Module, bundle: Bundle, inputs: dict[str, np.ndarray]
) -> tuple[str, float]:
    """The layer of the native engine that loses most, and its PSNR.

    The residual that an op adds is taken from the engine: what is compared is its own product.
    """
    expected = {_bare(n): v for n, v in torch_outputs(component, module, inputs).items()}
    layers = []
    ops = Ops(bundle, component)
    for node, done in ops.run(inputs):
        if not done:
            residual, added = ops.read(node.c), ops.read(node.add)
            continue
        found = ops.read(node.out)
        names = [s.removesuffix(".weight") for s in node.weight.sources] if node.weight else []
        outputs = [expected[_bare(name)] for name in names if _bare(name) in expected]
        if (
            found is None or not outputs or len(outputs) < len(names)
        ):  # it has no weights, or they are a table
            continue
        joined = np.concatenate([_by_pixel(o, len(found)) for o in outputs], axis=-1)
        whole = _finished(node, torch.from_numpy(joined), residual, added)
        layers.append((names[0], psnr(whole.numpy(), found)))
    return worst_of(layers)


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")


def _by_pixel(output: np.ndarray, pixels: int) -> np.ndarray:
    """What a layer of torch returned as (pixels, channels)."""
    channels_last = output.ndim < 3 or (output.ndim == 3 and output.shape[1] == pixels)
    rows = output if channels_last else np.moveaxis(output, 1, -1)
    return rows.reshape(pixels, -1)


def _finished(
    node: Node, x: torch.Tensor, residual: np.ndarray | None, added: np.ndarray | None
) -> torch.Tensor:
    """A layer's output with what the engine's op does to it at once."""
    act = ACTIVATIONS[node.act]
    if node.settings.get("geglu"):
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)
    if added is not None:
        x = x + torch.from_numpy(added)
    if residual is None:
        return act(x)
    rest = torch.from_numpy(residual)
    return act(x + rest) if node.settings.get("late") else act(x) + rest


def worst_of(layers: list[tuple[str, float]]) -> tuple[str, float]:
    """Of layers in order, the one that loses most against the worst before it, and its PSNR."""
    lowest, falls = ROUNDING, []
    for layer, value in layers:
        falls.append((lowest - value, layer, value))
        lowest = min(lowest, value)
    _, layer, value = max(falls, key=lambda fall: fall[0], default=(0.0, "unknown", lowest))
    return layer, value


def torch_outputs(
    component: str, module: torch.nn.Module, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What every layer with weights returns, by its name and in the order of execution."""
    wrapper = wrap(component, module)
    outputs: dict[str, np.ndarray] = {}

    def watch(name: str):
        def hook(_module, _inputs, output):
            outputs[name] = output.numpy().copy()

        return hook

    for name, layer in wrapper.module.named_modules():
        if not any(layer.children()) and any(True for _ in layer.parameters()):
            layer.register_forward_hook(watch(name))
    values = (torch.from_numpy(np.asarray(value)) for value in inputs.values())
    with torch.no_grad():
        wrapper(*(v.float() if v.is_floating_point() else v for v in values))
    return outputs


def _graph_outputs(
    folder: Path, layers: list[str], inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Run a copy of the graph, held in memory, whose outputs are those of the layers."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    values = [*model.graph.value_info, *model.graph.output]
    real = {v.name for v in values if v.type.tensor_type.elem_type in REAL}  # the rest are sizes
    nodes = [node for node in model.graph.node if node.output[0] in real]
    last = {node.name.rpartition("/")[0]: node.output[0] for node in nodes}
    layers = [layer for layer in layers if layer in last]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=last[layer]) for layer in layers)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    feeds = {i.name: inputs[i.name].astype(kinds[i.type]) for i in session.get_inputs()}
    outputs = session.run(None, feeds)
    return {layer: np.asarray(v, np.float32) for layer, v in zip(layers, outputs, strict=True)}
