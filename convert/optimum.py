"""A folder exported by Optimum (`optimum-cli export onnx`) as an ONNX bundle; needs no torch.

Every graph is checked before anything is written, and its weights move beside it, where they can be
mapped.  Without the original nothing can be compared: each component is run on the inputs of a
picture, what it returns is counted, and the report says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .. import bundle as bundles
from .. import parity
from .._version import __version__
from ..bundle import TEXT_ENCODERS, Bundle, Component, Manifest, Precision, Source, Tensor
from ..runtime import check as checks
from ..runtime.engines import onnx_memory
from ..runtime.engines.onnx import DTYPES, MODEL, OnnxEngine
from .checkpoint import Checkpoint, CheckpointError, ConvertError
from .ecosystem import write_ecosystem_files
from .onnx import interface, scrub, write
from .options import OptimumOptions, picture_sizes
from .recipe import from_checkpoint
from .recorded import Recorder
from .tokenizer import write_tokenizer

Progress = Callable[[str], None]
Size = tuple[int, int]
Interface = dict[str, dict[str, Any]]
STORED = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}
MAX_GRAPH = (1 << 31) - 1  # bytes of model.onnx: protobuf holds no more
OVERFLOWS = ": the export overflows or is damaged; export it in fp32"
ENDLESS = ("Loop", "Scan")
STATES = ("hidden_states.", "last_hidden_state")  # what such outputs' names begin with
NOTHING_COMPARED = (
    "nothing was compared: a folder of graphs has no original; name it with --original CHECKPOINT"
)


@dataclass(frozen=True)
class Graph:
    """A component's model.onnx: what it takes and returns of what a host needs, and its types.

    `latents` is the only size, (width, height), that it takes; None: any.
    """

    path: Path
    config: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    weights: str
    activations: str
    latents: Size | None


def build(
    exported: Checkpoint,
    out: str | os.PathLike,
    sizes: tuple[Size, ...],
    force: bool,
    progress: Progress,
) -> Bundle:
    """Write the bundle of an exported folder; see `ferrotype.convert`."""
    graphs = inspect(exported)
    precision = precision_of(graphs)
    made_for = picture_sizes(exported, fixed_sizes(exported, graphs, sizes), OptimumOptions(graphs))
    recipe, notes = from_checkpoint(exported)
    with bundles.staging(out, force) as staged:
        encoders = [name for name in TEXT_ENCODERS if name in graphs]
        tokenizers = {TEXT_ENCODERS[n]: write_tokenizer(exported, staged, n) for n in encoders}
        components = {}
        for name, graph in graphs.items():
            progress(f"import {name}")
            components[name] = import_graph(graph, staged / name, precision)
        write_ecosystem_files(exported, staged)
        manifest = Manifest(
            format=bundles.FORMAT,
            tool=f"ferrotype {__version__}",
            model=exported.name,
            family=exported.family,
            target="onnx",
            licence=exported.license,
            source=Source(exported.folder.resolve().name, _source_hash(exported, graphs)),
            precision=precision,
            sizes=made_for,
            recipe=recipe,
            preview=(),
            tokenizers=tokenizers,
            components=components,
            parity={},
            options=OPTIONS,
        )
        progress("draw")
        run = Recorder(Bundle(staged, manifest), opener=OnnxEngine, blame=OVERFLOWS)
        run.draw()
        checks.save(staged, run.recorded, run.picture)
        manifest = dataclasses.replace(manifest, preview=run.preview_rows)
        progress("measure")
        memory = onnx_memory.measured(Bundle(staged, manifest))
        parts = {n: dataclasses.replace(p, memory=memory.get(n, {})) for n, p in components.items()}
        report = _report(run, precision, [NOTHING_COMPARED, *notes])
        progress("hash")
        manifest = dataclasses.replace(manifest, components=parts, parity=report)
        return bundles.save(staged, out, manifest, force)


OPTIONS = {"graphs": "exported by Optimum"}


# --- looking at the graphs ----------------------------------------------------------------------


def inspect(exported: Checkpoint) -> dict[str, Graph]:
    """Look at every graph of an exported folder, one at a time; nothing is written.

    Raises CheckpointError for what is damaged, leaves the folder or does not fit its configuration.
    """
    vae = exported.configs["vae"]
    parts = {n: c for n, c in exported.configs.items() if n != "vae"}
    parts |= {"vae_decoder": vae, "vae_encoder": vae}
    tokens = exported.configs["text_encoder"].get("max_position_embeddings", 77)
    graphs = {}
    for name, config in parts.items():
        path = exported.folder / name / MODEL
        states = exported.family == "sdxl" and name in TEXT_ENCODERS
        module = SimpleNamespace(
            config=SimpleNamespace(**{**UNSTATED, **config, "output_hidden_states": states})
        )
        graphs[name] = _inspect(path, name, config, module, tokens)
    return graphs


# What a configuration may leave out, because it is without: of the U-Net.
UNSTATED = {"addition_embed_type": None, "time_cond_proj_dim": None}


def precision_of(graphs: dict[str, Graph]) -> Precision:
    """What the manifest says of all: the U-Net's."""
    return Precision(graphs["unet"].weights, graphs["unet"].activations)


def fixed_sizes(
    exported: Checkpoint, graphs: dict[str, Graph], asked: tuple[Size, ...]
) -> tuple[Size, ...]:
    """The picture sizes to draw: those asked for, or the only one that the graphs take."""
    scale = exported.vae_scale
    found = {name: graph.latents for name, graph in graphs.items() if graph.latents}
    sizes = {(scale * width, scale * height) for width, height in found.values()}
    if len(sizes) > 1:
        told = ", ".join(f"{n} {scale * w}x{scale * h}" for n, (w, h) in found.items())
        raise CheckpointError(f"{exported.folder}: graphs of several sizes: {told}; export again")
    if sizes and asked and set(asked) != sizes:
        [(width, height)] = sizes
        raise ConvertError(
            f"{exported.folder} was exported for pictures of {width}x{height} alone: export it "
            "again without --no-dynamic-axes for other sizes"
        )
    return asked or tuple(sizes)


def _inspect(
    path: Path, name: str, config: dict[str, Any], module: SimpleNamespace, tokens: int
) -> Graph:
    proto = _parse(path)
    try:
        inputs, outputs = interface(name, module)
        latents = _fixed_latents(path, proto, inputs, config)
        inputs, outputs = interface(name, module, latents)
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{path.parent / 'config.json'}: {error}") from None
    weights = {w.name for w in proto.graph.initializer}
    given = {v.name: v.type.tensor_type for v in proto.graph.input if v.name not in weights}
    returned = {v.name: v.type.tensor_type for v in proto.graph.output}
    _check_names(path, "takes", given, inputs, exact=True)
    _check_names(path, "returns", returned, outputs, exact=False)
    sizes = {"batch": 1, "sequence": tokens}
    shapes = {n: _shape(path, n, given[n], t["shape"], sizes) for n, t in inputs.items()}
    batch = next(iter(shapes.values()))[0]
    taken = {n: Tensor(_dtype(path, n, given[n]), shape) for n, shape in shapes.items()}
    found = {
        n: Tensor(_dtype(path, n, returned[n]), tuple(batch if d == "batch" else d for d in shape))
        for n, shape in ((n, t["shape"]) for n, t in outputs.items())
    }
    half = any(tensor.dtype == "float16" for tensor in found.values())
    activations = "fp16" if half else "fp32"
    return Graph(path, config, taken, found, _stored(path, proto), activations, latents)


def _parse(path: Path) -> onnx.ModelProto:
    """A graph whose weights, as far as they lie outside, are in its own folder."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: export the whole pipeline, with its task")
    if (size := path.stat().st_size) > MAX_GRAPH:
        raise CheckpointError(f"{path} has {size:,} bytes, a graph at most {MAX_GRAPH:,}")
    with _sound(path):
        proto = onnx.load(path, load_external_data=False)
        _check_external(proto, path)
        onnx.checker.check_model(str(path))
    for node in _nodes(proto):
        if node.op_type in ENDLESS:
            raise CheckpointError(
                f"{path}: {node.name or 'a node'} is a {node.op_type}, which may never end and "
                "which no export of a diffusion model has"
            )
    return proto


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """What libraries raise for a damaged graph, in one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # protobuf's and the checker's own errors share no base class
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path} is no sound ONNX graph: {line}") from None


def _check_external(proto: onnx.ModelProto, path: Path) -> None:
    """Raise CheckpointError for a tensor that would be read from elsewhere, or beyond a file."""
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_place(tensor, path)
    for tensor in _inner_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise CheckpointError(
                f"{path}: {tensor.name or 'a constant'} of a node lies outside the graph; only "
                "weights may: export again"
            )


def _check_place(tensor: onnx.TensorProto, path: Path) -> None:
    told = {entry.key: entry.value for entry in tensor.external_data}
    name, problem = told.get("location", ""), ""
    file = path.parent / name
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    wanted = math.prod(tensor.dims) * kind.itemsize
    start, length = told.get("offset", "0"), told.get("length", str(wanted))
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
        problem = "outside its own folder"
    elif file.is_symlink():
        problem = "through a link: copy the folder with the files themselves"
    elif not file.is_file():
        problem = "which is not there: copy the folder again"
    elif not all(re.fullmatch("[0-9]{1,18}", n, re.ASCII) for n in (start, length)):
        problem = f"at offset {start!r} with length {length!r}"
    elif int(length) != wanted or int(start) + wanted > file.stat().st_size:
        problem = (
            f"at {int(start):,} with {int(length):,} bytes: it has {wanted:,}, "
            f"the file {file.stat().st_size:,}"
        )
    if problem:
        raise CheckpointError(f"{path}: {tensor.name[:100]} is in {name[:100]!r}, {problem}")


def _inner_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Tensors in attributes of nodes, and everything in graphs within nodes."""
    for node in _nodes(proto):
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for graph in (attribute.g, *attribute.graphs):
                yield from graph.initializer


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """All nodes, also of functions and of graphs within nodes."""
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while nodes:
        node = nodes.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                nodes.extend(graph.node)


def _fixed_latents(
    path: Path, proto: onnx.ModelProto, inputs: Interface, config: dict[str, Any]
) -> Size | None:
    """The only size of latents, (width, height), that a graph takes; None if it takes any."""
    name = next((n for n in ("sample", "latent_sample") if n in inputs), None)
    value = next((v for v in proto.graph.input if v.name == name), None)
    if value is None or len(value.type.tensor_type.shape.dim) != 4:
        return None
    height, width = (d.dim_value for d in value.type.tensor_type.shape.dim[2:])
    if not height and not width:
        return None
    if not height or not width:
        raise CheckpointError(f"{path} fixes one side of {name}: export with both or none")
    pixels = 1
    if path.parent.name == "vae_encoder":
        pixels = 2 ** (len(config["block_out_channels"]) - 1)
    return width // pixels, height // pixels


def _check_names(path: Path, verb: str, found: Any, wanted: Any, exact: bool) -> None:
    missing = [name for name in wanted if name not in found]
    more = [name for name in found if name not in wanted] if exact else []
    if missing or more:
        raise CheckpointError(
            f"{path} {verb} {', '.join(found)[:200]}; a host needs it to be {', '.join(wanted)}"
        )


def _shape(
    path: Path, name: str, found: Any, wanted: list[int | str], sizes: dict[str, int]
) -> tuple[int | str, ...]:
    """What is wanted, with the sizes that a graph fixes; `sizes` are those that it may fix."""
    dims = [d.dim_value if d.HasField("dim_value") else "any" for d in found.shape.dim]
    if name == "timestep" and len(dims) == 1 and dims[0] in ("any", 1):
        return ()  # as older exports have it; import_graph makes it a number
    if len(dims) == len(wanted):
        pairs = list(zip(dims, wanted, strict=True))
        fits = [have == "any" or have == sizes.get(str(want), want) for have, want in pairs]
        if all(fits):
            return tuple(w if have == "any" or isinstance(w, int) else have for have, w in pairs)
    shown = ", ".join(str(sizes.get(str(d), d)) for d in wanted)
    raise CheckpointError(
        f"{path}: {name} is of ({', '.join(map(str, dims))}), expected is ({shown}); export with "
        "--batch_size 1, or without --no-dynamic-axes"
    )


def _dtype(path: Path, name: str, found: Any) -> str:
    try:
        kind = str(onnx.helper.tensor_dtype_to_np_dtype(found.elem_type))
    except (KeyError, TypeError, ValueError):
        kind = "of no known type"
    if kind not in DTYPES.values():
        raise CheckpointError(f"{path}: {name} is {kind}, known are {', '.join(DTYPES.values())}")
    return kind


def _stored(path: Path, proto: onnx.ModelProto) -> str:
    """What most of the weights are stored in."""
    counts: Counter[int] = Counter()
    for tensor in proto.graph.initializer:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        counts[tensor.data_type] += math.prod(tensor.dims) * kind.itemsize
    most = counts.most_common(1)[0][0] if counts else 0
    if most not in STORED:
        kind = onnx.TensorProto.DataType.Name(most)
        raise CheckpointError(
            f"{path} has weights of {kind.lower()}, only fp32 and fp16 are taken: export without "
            "quantizing, or convert the checkpoint with --weights"
        )
    return STORED[most]


# --- writing ------------------------------------------------------------------------------------


def import_graph(graph: Graph, folder: Path, precision: Precision) -> Component:
    """Write a graph with its weights beside it, without what nobody reads.

    All states of a text encoder of SDXL's stay: Optimum's own pipelines ask for every one.
    """
    with _sound(graph.path):
        model = ir.load(graph.path)
    outputs = model.graph.outputs
    kept = STATES if bundles.states_of(graph.outputs).startswith("hidden_states") else ()
    for value in [value for value in outputs if value.name not in graph.outputs]:
        if not str(value.name).startswith(kept):
            outputs.remove(value)
    if "timestep" in graph.inputs:
        _to_number(model.graph, "timestep")
    folder.mkdir()
    with _sound(graph.path):
        RemoveUnusedNodesPass()(model)
        scrub(model)
        write(model, folder)
    text = json.dumps(graph.config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    onnx.checker.check_model(str(folder / MODEL))
    own = graph.activations if graph.activations != precision.activations else ""
    return Component(folder.name, graph.config, graph.inputs, graph.outputs, activations=own)


def _to_number(graph: ir.Graph, name: str) -> None:
    """An input of one element becomes a number, as newer exports have it."""
    index, old = next((i, v) for i, v in enumerate(graph.inputs) if v.name == name)
    if old.shape is None or len(old.shape) == 0:
        return
    old.name = f"{name}/list"
    one = ir.Value(name=f"{name}/one", const_value=ir.tensor(np.array([1]), name=f"{name}/one"))
    graph.initializers.add(one)
    new = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(old.dtype))
    graph.inputs[index] = new
    node = ir.node("Reshape", [new, one], name=f"{name}/Reshape")
    ir.convenience.replace_all_uses_with(old, node.outputs[0])
    graph.insert_before(graph[0], node)


# --- running ------------------------------------------------------------------------------------


def _report(run: Recorder, precision: Precision, notes: list[str]) -> dict[str, Any]:
    """The parity report of a conversion that compared nothing."""
    return {
        "floors": parity.floors(precision.weights, precision.activations),
        "components": {
            name: {output: parity.census_as_json(seen) for output, seen in outputs.items()}
            for name, outputs in run.census.items()
        },
        "picture": run.shown(),
        "notes": notes,
    }


def _source_hash(exported: Checkpoint, graphs: dict[str, Graph]) -> str:
    """sha256 over the names and contents of all that may have been read, in sorted order."""
    folders = [exported.folder / name for name in (*graphs, *exported.tokenizers, "scheduler")]
    paths = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    paths.append(exported.folder / "model_index.json")
    total = hashlib.sha256()
    for name, path in sorted((p.relative_to(exported.folder).as_posix(), p) for p in paths):
        total.update(f"{name}\0{bundles.hash_file(path)}\n".encode())
    return total.hexdigest()
