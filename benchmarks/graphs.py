"""Why our ONNX graphs are what they are: attention, opset, precision and session options measured.

    python benchmarks/graphs.py          # about 10 minutes; writes results/graphs.md

Attention is one layer of Stable Diffusion 1.5 at 512x512; the U-Net is its architecture with half
the channels (215 M parameters, random weights).  Times are medians of interleaved runs; memory is
that of a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from ferrotype.benchmarks import measure
from ferrotype.benchmarks.checkpoints import SD15, write_checkpoint

TOKENS, HEADS, SIZE = 4096, 8, 40
ROUNDS = 5
OPSETS = (18, 20, 22)
PRECISIONS = {  # label -> weights, activations
    "fp32": ("fp32", "fp32"),
    "fp16 weights": ("fp16", "fp32"),
    "fp16 weights and activations": ("fp16", "fp16"),
}
OURS, DEFAULT = "extended, not prepacked", "onnxruntime's default: all, prepacked"
Graphs = dict[str, tuple[Path, str]]  # label -> model, session options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probe", nargs=2, metavar=("MODEL", "SESSION"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.probe:
        probe(Path(chosen.probe[0]), chosen.probe[1])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report = [HEAD, *attention(folder), *unets(folder), ""]
    print("\n".join(report))
    (measure.RESULTS / "graphs.md").write_text("\n".join(report))


# --- attention ----------------------------------------------------------------------------------


def attention(folder: Path) -> list[str]:
    """One self-attention layer as three graphs."""
    forms = {
        "com.microsoft MultiHeadAttention (ours)": fused(),
        "Attention of opset 23": standard(),
        "MatMul, Softmax, MatMul (what the exporter writes)": decomposed(),
    }
    graphs: Graphs = {}
    for i, (name, model) in enumerate(forms.items()):
        graphs[name] = folder / f"attention{i}.onnx", OURS
        onnx.save(model, graphs[name][0])
    scores = HEADS * TOKENS * TOKENS * 4 / 2**20
    head = f"{TOKENS} tokens, {HEADS} heads of {SIZE}; a full score matrix has {scores:.0f} MiB"
    return ["## Attention", "", f"{head}.", "", *table(graphs)]


def interface() -> tuple[list[Any], list[Any]]:
    shape = [1, TOKENS, HEADS * SIZE]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "qkv"]
    return inputs, [helper.make_tensor_value_info("o", TensorProto.FLOAT, shape)]


def model_of(nodes: list[Any], opset: int, constants: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "attention", *interface(), constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def fused() -> onnx.ModelProto:
    options = {"domain": "com.microsoft", "num_heads": HEADS, "scale": SIZE**-0.5}
    node = helper.make_node("MultiHeadAttention", list("qkv"), ["o"], **options)
    return model_of([node], 20, [])


def standard() -> onnx.ModelProto:
    options = {"q_num_heads": HEADS, "kv_num_heads": HEADS, "scale": SIZE**-0.5}
    return model_of([helper.make_node("Attention", list("qkv"), ["o"], **options)], 23, [])


def decomposed() -> onnx.ModelProto:
    nodes = []
    for name, order in zip("qkv", ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True):
        nodes.append(helper.make_node("Reshape", [name, "split"], [f"{name}r"]))
        nodes.append(helper.make_node("Transpose", [f"{name}r"], [f"{name}t"], perm=order))
    nodes += [
        helper.make_node("Mul", ["qt", "scale"], ["qs"]),
        helper.make_node("MatMul", ["qs", "kt"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "vt"], ["h"]),
        helper.make_node("Transpose", ["h"], ["ht"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["ht", "join"], ["o"]),
    ]
    constants = [
        helper.make_tensor("split", TensorProto.INT64, [4], [1, -1, HEADS, SIZE]),
        helper.make_tensor("join", TensorProto.INT64, [3], [1, -1, HEADS * SIZE]),
        helper.make_tensor("scale", TensorProto.FLOAT, [], [SIZE**-0.5]),
    ]
    return model_of(nodes, 20, constants)


# --- the U-Net ----------------------------------------------------------------------------------


def unets(folder: Path) -> list[str]:
    """The same U-Net by opset, session options and precision."""
    from ferrotype.convert import modules
    from ferrotype.convert.checkpoint import open_checkpoint
    from ferrotype.convert.onnx import export

    half = {**SD15["unet"], "block_out_channels": [160, 320, 640, 640]}
    checkpoint = open_checkpoint(write_checkpoint(folder / "half", {**SD15, "unet": half}))
    module = modules.unet(checkpoint)
    opsets, precisions = {}, {}
    for opset in OPSETS:
        target = folder / f"opset{opset}"
        export("unet", module, half, target, opset=opset)
        opsets[f"opset {opset}"] = target / "model.onnx", OURS
    for i, (label, (weights, activations)) in enumerate(PRECISIONS.items()):
        target = folder / f"precision{i}"
        export("unet", module, half, target, weights=weights, activations=activations)
        precisions[label] = target / "model.onnx", OURS
    del module
    gc.collect()
    fp32 = precisions["fp32"][0]
    sessions = {f"{OURS} (ours)": (fp32, OURS), DEFAULT: (fp32, DEFAULT)}
    tables = {"Opset": opsets, "Session, fp32": sessions, "Precision": precisions}
    return [
        line
        for title, graphs in tables.items()
        for line in ["", f"## {title} of the U-Net", "", *table(graphs)]
    ]


# --- measuring ----------------------------------------------------------------------------------


def table(graphs: Graphs) -> list[str]:
    """Load, interleaved run times and memory of several graphs; the first is the baseline."""
    memory = {}
    for name, (path, session) in graphs.items():
        command = (sys.executable, __file__, "--probe", str(path), session)
        memory[name] = json.loads(measure.run(*command).stdout)
    sessions = {name: open_session(*graph) for name, graph in graphs.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for round in range(ROUNDS + 1):
        for name, opened in sessions.items():
            start = time.perf_counter()
            opened.run(None, feed(opened))
            if round:  # the first warms up
                times[name].append(time.perf_counter() - start)
    base = median(next(iter(times.values())))
    rows = [
        "| graph | load s | run ms | spread | to the first | private MiB | peak MiB over start |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, seconds in times.items():
        middle, m = median(seconds), memory[name]
        low, *_, high = quantiles(seconds, n=10)
        rows.append(
            f"| {name} | {m['load']:.2f} | {1e3 * middle:,.0f} | {(high - low) / middle:.0%} "
            f"| {middle / base:.2f}x | {m['anonymous']:,.0f} | {m['peak']:,.0f} |"
        )
    return rows


def probe(path: Path, session: str) -> None:
    """Load and run one graph in this process and print what it cost, as JSON."""
    before = measure.status()["VmHWM"]
    start = time.perf_counter()
    opened = open_session(path, session)
    load = time.perf_counter() - start
    opened.run(None, feed(opened))
    status = measure.status()
    peak = status["VmHWM"] - before
    print(json.dumps({"load": load, "anonymous": status["RssAnon"], "peak": peak}))


def open_session(path: Path, session: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    if session == OURS:
        options.add_session_config_entry("session.disable_prepacking", "1")
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.graph_optimization_level = level
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feed(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """Random inputs for the U-Net at 512x512 or the attention layer."""
    named = {"batch": 1, "height": 64, "width": 64, "sequence": 77}
    rng = np.random.default_rng(0)
    arrays = {}
    for given in session.get_inputs():
        shape = [named.get(n, n) for n in given.shape]
        dtype = np.float16 if given.type == "tensor(float16)" else np.float32
        arrays[given.name] = np.asarray(rng.standard_normal(shape), dtype)
    return arrays


HEAD = f"""# The graphs

`python benchmarks/graphs.py` on {measure.describe("torch", "onnx")}; 2 threads, {ROUNDS} rounds.
"""

if __name__ == "__main__":
    main()
