"""What differs between the targets: how a component is written, and what runs it for the check.

What torch and the exporters are needed for imports them there: the native target needs neither.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .. import kernels, parity
from ..bundle import Bundle, Component, Precision, Tensor
from ..kernels import Type
from ..quantize import native as packing
from ..quantize.recipe import UNQUANTIZED, Recipe
from ..runtime import models
from ..runtime.engines import Arrays, Engine
from ..runtime.engines.coreml import CoremlEngine
from ..runtime.engines.native import NativeEngine
from ..runtime.engines.onnx import OnnxEngine
from ..runtime.engines.tensorrt import VENDORS
from ..runtime.program import INT8, TYPES, activation_type
from . import native
from .checkpoint import Checkpoint, ConvertError
from .options import CoremlOptions, NativeOptions, OptimumOptions, TensorrtOptions
from .probes import NORM_INPUT

Size = tuple[int, int]
Census = dict[str, tuple[float, int, int]]


@dataclass(frozen=True)
class Task:
    """What every component of a conversion shares.

    `sizes` are those of the latents, the default first; None leaves them open, and then `default`
    is the one that is drawn if none is asked for.
    """

    checkpoint: Checkpoint
    precision: Precision
    recipe: Recipe
    sizes: tuple[Size, ...] | None
    guided: bool  # whether a step takes two passes
    default: Size
    written: Callable[[int, int], None] = lambda done, total: None  # bytes of a component, in all

    def exception(self, half: bool) -> str:
        """What a component computes in if not in the precision's activations."""
        return "fp32" if self.precision.activations == "fp16" and not half else ""

    @property
    def tokens(self) -> int:
        """The length of the text."""
        return self.checkpoint.configs["text_encoder"]["max_position_embeddings"]


class Target(Protocol):
    """One kind of device."""

    name: str

    def export(
        self, name: str, module: Any, config: dict, folder: Path, half: bool, census: Census
    ) -> Component:
        """Write a component to `folder`, which is below the bundle by its own name.

        `half`: it computes in fp16, if the precision says so and no layer reaches beyond.
        """

    def open(self, bundle: Bundle, name: str) -> Engine:
        """What runs a written component on this machine, from the bundle's files alone."""

    def blame(self, bundle: Bundle, name: str, module: Any, inputs: Arrays) -> str:
        """Where most is lost of a component that is below its floor: the rest of that sentence."""

    def options(self) -> dict[str, str]:
        """What the target was told, for the manifest."""

    def report(self) -> dict[str, Any]:
        """What became of the weights, for the parity report."""


class OnnxTarget:
    """Graphs for onnxruntime, checked by the engine that runs them later."""

    name = "onnx"

    def __init__(self, task: Task) -> None:
        self.task = task
        self.made: dict[str, Any] = {}

    def export(
        self, name: str, module: Any, config: dict, folder: Path, half: bool, census: Census
    ) -> Component:
        from . import onnx

        sizes, precision, recipe = self.task.sizes, self.task.precision, self.task.recipe
        made = onnx.export(
            name,
            module,
            config,
            folder,
            sizes[0] if sizes and len(sizes) == 1 else None,
            recipe if recipe.least_bits else precision.weights,
            "fp16" if half else "fp32",
            spare=True,
        )
        self.made[name] = made
        arrays = tensors(made["inputs"]), tensors(made["outputs"])
        return Component(folder.name, config, *arrays, activations=self.task.exception(half))

    def open(self, bundle: Bundle, name: str) -> Engine:
        return OnnxEngine(bundle, name)

    def blame(self, bundle: Bundle, name: str, module: Any, inputs: Arrays) -> str:
        from .blame import worst

        return _lost_in(*worst(name, module, bundle.path(name), inputs))

    def options(self) -> dict[str, str]:
        return {}

    def report(self) -> dict[str, Any]:
        told: dict[str, Any] = {"fp16_underflow": _lost_to_half(self.made)}
        if self.task.recipe.least_bits:
            self.task.recipe.check_used(_weights(self.made))
            stored = {
                name: Counter([*made["quantized"].values(), *(f for f, _ in made["kept"].values())])
                for name, made in self.made.items()
            }
            why = {n: Counter(w for _, w in made["kept"].values()) for n, made in self.made.items()}
            told["weights"] = {name: dict(forms) for name, forms in stored.items()}
            told["not_compressed"] = {name: dict(reasons) for name, reasons in why.items()}
        return told


class OptimumTarget(OnnxTarget):
    """Graphs that Optimum exported, in place of our own."""

    def __init__(self, task: Task, options: OptimumOptions) -> None:
        super().__init__(task)
        self.graphs = options.graphs

    def export(
        self, name: str, module: Any, config: dict, folder: Path, half: bool, census: Census
    ) -> Component:
        from . import optimum

        for field in ("max_position_embeddings", "hidden_size", "block_out_channels"):
            found, original = self.graphs[name].config.get(field), config.get(field)
            if found != original:
                raise ConvertError(
                    f"{name}: {field} is {found} in the export and {original} in the original: it "
                    "is another checkpoint's"
                )
        return optimum.import_graph(self.graphs[name], folder, self.task.precision)

    def blame(self, bundle: Bundle, name: str, module: Any, inputs: Arrays) -> str:
        return ": is it another checkpoint's export, or damaged?"  # its layers have other names

    def options(self) -> dict[str, str]:
        from . import optimum

        return optimum.OPTIONS

    def report(self) -> dict[str, Any]:
        return {}


class NativeTarget:
    """Weights packed for our own engine, checked by running it."""

    name = "native"

    def __init__(self, task: Task, options: NativeOptions) -> None:
        kernels.library()  # without the engine nothing could be checked: said before hours pass
        self.task, self.chosen = task, options
        self.underflow: Counter[str] = Counter()
        self.forms: dict[str, Counter[str]] = {}  # of matrices, by component
        self.kept: dict[str, Counter[str]] = {}  # why they are not quantized
        self.names: list[str] = []

    def export(
        self, name: str, module: Any, config: dict, folder: Path, half: bool, census: Census
    ) -> Component:
        task = self.task
        own = task.exception(half)
        plain, activations = task.precision.weights, own or task.precision.activations
        if task.recipe.least_bits:
            plain = UNQUANTIZED[activations]
        _, outputs = native.interface(task.checkpoint, name)
        requests = models.weights(name, config, outputs)
        few_bits, kept = packing.choose(name, requests, task.recipe)
        self.kept[name] = Counter(kept.values())
        places = packing.layout(requests, TYPES[plain], few_bits)
        matrices = [request for request in requests if request.is_matrix]
        self.names += [f"{name}/{source}" for r in matrices for source in r.sources]
        self.forms[name] = Counter(packing.NAMES[places[r.name].type] for r in matrices)
        made, lost = self.pack(name, config, folder, plain, few_bits, activations)
        self.underflow.update(lost)
        return dataclasses.replace(made, activations=own)

    def pack(
        self,
        name: str,
        config: dict,
        folder: Path,
        plain: str,
        few_bits: Mapping[str, Type],
        activations: str,
    ) -> tuple[Component, dict[str, int]]:
        """Write a component, and what it takes to run it; also what fp16 rounds to zero.

        Matrices are stored as `plain`, those in `few_bits` by name as that.
        """
        task = self.task
        size = task.sizes[0] if task.sizes and len(task.sizes) == 1 else None
        taken, outputs = native.interface(task.checkpoint, name, size)
        requests = models.weights(name, config, outputs)
        lost = native.write(task.checkpoint, name, requests, folder, plain, few_bits, task.written)
        places = packing.layout(requests, TYPES[plain], few_bits, activations == INT8)
        scale = task.checkpoint.vae_scale if name == "vae_encoder" else 1
        width, height = task.default
        shapes = models.sizes(name, config, (scale * width, scale * height), task.tokens)
        kind = activation_type(activations) or Type.F32
        memory = packing.memory(name, config, outputs, shapes, places, kind)
        return Component(folder.name, config, taken, outputs, memory=memory), lost

    def open(self, bundle: Bundle, name: str) -> Engine:
        return NativeEngine(bundle, name, isa=self.chosen.isa)

    def blame(self, bundle: Bundle, name: str, module: Any, inputs: Arrays) -> str:
        if module is None:  # without torch
            return "; --check diffusers names the layer"
        from .blame import native_worst

        return _lost_in(*native_worst(name, module, bundle, inputs))

    def options(self) -> dict[str, str]:
        return {}

    def report(self) -> dict[str, Any]:
        told: dict[str, Any] = {"fp16_underflow": self.underflow.total()}
        if self.task.recipe.least_bits:
            self.task.recipe.check_used(self.names)
            told["weights"] = {name: dict(forms) for name, forms in self.forms.items()}
            told["not_compressed"] = {name: dict(why) for name, why in self.kept.items()}
        return told


class CoremlTarget:
    """Core ML packages, checked by our own reader of what was saved."""

    name = "coreml"

    def __init__(self, task: Task, options: CoremlOptions) -> None:
        if not importlib.util.find_spec("coremltools"):
            raise needs("coremltools", "coreml")
        self.task, self.chosen = task, options
        self.made: dict[str, Any] = {}
        # Apple's runtime feeds two passes at once where there is guidance, and always for SDXL.
        two = task.guided or task.checkpoint.family == "sdxl"
        self.batch = 2 if options.layout == "apple" and two else 1

    def export(
        self, name: str, module: Any, config: dict, folder: Path, half: bool, census: Census
    ) -> Component:
        from . import coreml

        peaks = {
            layer.removesuffix(NORM_INPUT): top
            for layer, (top, _, _) in census.items()
            if layer.endswith(NORM_INPUT)
        }
        made = coreml.export(
            name,
            module,
            config,
            folder,
            self.task.sizes or (),
            self.task.tokens,
            half,
            self.task.recipe,
            self.chosen,
            self.batch if name == "unet" else 1,
            peaks,
        )
        self.made[name] = made
        inputs, outputs = tensors(made.inputs), tensors(made.outputs)
        own = self.task.exception(half)
        return Component(folder.name, config, inputs, outputs, tuple(made.parts), activations=own)

    def open(self, bundle: Bundle, name: str) -> Engine:
        from .mlprogram import open_part

        return CoremlEngine(bundle, name, open_part)

    def blame(self, bundle: Bundle, name: str, module: Any, inputs: Arrays) -> str:
        from .coreml import worst_layer

        return _lost_in(*worst_layer(bundle, name, module, inputs))

    def options(self) -> dict[str, str]:
        from .coremltools_fixes import coremltools

        chosen = self.chosen
        return {
            "deployment": chosen.deployment,
            "compute_units": chosen.compute_units,
            "attention": chosen.attention,
            "layout": chosen.layout,
            "batch": str(self.batch),
            "made_with": f"coremltools {coremltools().__version__}",
        }

    def report(self) -> dict[str, Any]:
        names = [name for made in self.made.values() for name in made.seen]
        self.task.recipe.check_used(names)
        return {
            "weights": {name: dict(made.forms) for name, made in self.made.items()},
            "not_compressed": {name: dict(made.kept) for name, made in self.made.items()},
            "fp16_underflow": sum(sum(m.underflow.values()) for m in self.made.values()),
        }


class TensorrtTarget:
    """Graphs of plain operators and engines built from them, checked by running the graphs."""

    name = "tensorrt"

    def __init__(self, task: Task, options: TensorrtOptions) -> None:
        from .tensorrt import check_capability

        for capability in options.capabilities:
            check_capability(capability)
        if not any(importlib.util.find_spec(name) for name in VENDORS):
            raise needs("tensorrt-rtx", "tensorrt")
        self.task, self.chosen = task, options
        self.made: dict[str, Any] = {}
        self.built: dict[str, list[Any]] = {}

    def export(
        self, name: str, module: Any, config: dict, folder: Path, half: bool, census: Census
    ) -> Component:
        from . import tensorrt

        task, activations = self.task, "fp16" if half else "fp32"
        sizes = task.sizes or ()
        made = tensorrt.export(
            name,
            module,
            config,
            folder,
            sizes[0] if len(sizes) == 1 else None,
            activations if task.recipe.least_bits is None else task.recipe,
            activations,
            task.tokens,
        )
        spans = _spans(sizes, task.checkpoint.vae_scale if name == "vae_encoder" else 1)
        self.made[name], self.built[name] = made, []
        gc.collect()  # the exported twin: the builder needs as much again
        for capability in self.chosen.capabilities:
            built = tensorrt.build(
                folder / "model.onnx", capability, spans, name, self.chosen.weight_streaming
            )
            self.built[name].append(built)
        memory = {built.capability: built.memory for built in self.built[name]}
        inputs, outputs = tensors(made["inputs"]), tensors(made["outputs"])
        own = task.exception(half)
        return Component(folder.name, config, inputs, outputs, memory=memory, activations=own)

    def open(self, bundle: Bundle, name: str) -> Engine:
        return OnnxEngine(bundle, name)

    def blame(self, bundle: Bundle, name: str, module: Any, inputs: Arrays) -> str:
        from .blame import worst

        return _lost_in(*worst(name, module, bundle.path(name), inputs))

    def options(self) -> dict[str, str]:
        builders = {built.builder for every in self.built.values() for built in every}
        return {
            "capabilities": ", ".join(self.chosen.capabilities),
            "made_with": ", ".join(sorted(builders)) or "no engine was built",
        }

    def report(self) -> dict[str, Any]:
        self.task.recipe.check_used(_weights(self.made))
        plain = "fp16" if self.task.precision.activations == "fp16" else "fp32"
        weights, kept = {}, {}
        for component, made in self.made.items():
            forms = Counter(made["quantized"].values())
            if made["kept"]:
                forms[plain] = len(made["kept"])
            weights[component] = dict(forms)
            kept[component] = dict(Counter(made["kept"].values()))
        return {
            "verdict": "parsed and compiled for each capability; the graph was run by "
            "onnxruntime; no engine was run",
            "weights": weights,
            "not_compressed": kept,
            "fp16_underflow": _lost_to_half(self.made),
        }


def _weights(made: dict[str, Any]) -> list[str]:
    """The weights that a recipe decided on, as component/name."""
    return [f"{n}/{weight}" for n, m in made.items() for weight in (*m["quantized"], *m["kept"])]


def _lost_to_half(made: dict[str, Any]) -> int:
    return sum(sum(m["fp16_underflow"].values()) for m in made.values())


def _lost_in(layer: str, psnr: float) -> str:
    return f"; it is lost in layer {layer} ({psnr:.1f} dB)"


def _spans(sizes: tuple[Size, ...], scale: int) -> dict[str, tuple[int, int, int]] | None:
    """Least, usual and most of height and width, where there are several sizes."""
    if len(sizes) < 2:
        return None
    widths, heights = zip(*sizes, strict=True)
    return {
        name: (scale * min(values), scale * values[0], scale * max(values))
        for name, values in (("width", widths), ("height", heights))
    }


def needs(package: str, extra: str) -> ConvertError:
    """The line for a package that is not installed."""
    return ConvertError(
        f"this target needs {package}: install the extra, pip install '.[{extra}]' in a clone"
    )


def tensors(made: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """The manifest's form of an export's interface."""
    return {name: Tensor(t["dtype"], tuple(t["shape"])) for name, t in made.items()}


def floors(recipe: Recipe, precision: Precision) -> dict[str, float]:
    """The named floors of a conversion; ConvertError lists the precisions that have some."""
    bits = recipe.least_bits
    weights = precision.weights if bits is None else f"{bits}-bit"
    try:
        return parity.floors(weights, precision.activations)
    except ValueError as error:
        raise ConvertError(str(error)) from None
