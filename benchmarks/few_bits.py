"""What fewer bits do to time and memory: Stable Diffusion 1.5 shapes on our own engine.

    python benchmarks/few_bits.py --folder bundles --check     # writes results/few_bits.md

U-Net steps of all bundles in turn, in one process, every other round in the opposite order; then a
picture of each in a fresh process, with the kernel's high-water mark.  The folder keeps random
bundles of the exact architecture (8 GB), which are made in a minute.

--openvino: also OpenVINO with weights and activations in int8 by its quantizer, NNCF (10 GB more,
and some ten minutes to make).  onnx_few_bits.py has the memory of a U-Net on onnxruntime.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from ferrotype import bundle as bundles
from ferrotype import kernels
from ferrotype.benchmarks import measure
from ferrotype.benchmarks.native_ops import flop
from ferrotype.benchmarks.peer_workers import NATIVE, PEERS, Worker, native_bundle
from ferrotype.benchmarks.peer_workers import prepare as prepare_peer
from ferrotype.bundle import Bundle
from ferrotype.kernels import Kind, Op, Type
from ferrotype.runtime import memory, models
from ferrotype.runtime.engines.native import NativeEngine
from ferrotype.runtime.memory import MIB
from ferrotype.runtime.pipeline import Pipeline

SIZE = (512, 512)
STEPS = 1  # of the picture whose memory is measured
READ = ("text_encoder", "unet", "vae_decoder")
NARROW = "w8, int8"


@dataclass(frozen=True)
class Match:
    """Bundles in turn on an instruction set, the first being what the others are held against."""

    isa: str
    names: tuple[str, ...]
    limits: dict[str, float]


MATCHES = (
    Match("", ("bf16", "w8", "w8, int8", "w4"), {"w8, int8": 0.75, "w4": 1.1}),
    Match("avx512vnni", ("fp32", "w8, int8"), {"w8, int8": 0.6}),
    Match("avx2", ("fp32", "w8, int8"), {"w8, int8": 0.6}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep the bundles here")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s, and a warm-up")
    parser.add_argument("--openvino", action="store_true", help="beside OpenVINO's W8A8 as well")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        print(json.dumps(draw(chosen.worker)))
        return
    lines, missed = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        made = {name: bundles.load(native_bundle(folder, name, SIZE)) for name in NATIVE}
        for match in MATCHES:
            if match.isa and match.isa not in kernels.isas():
                lines += [f"## {match.isa}", "", "This machine does not run it.", ""]
                continue
            rows, below = compare(match, made, chosen.rounds)
            lines += [*rows, ""]
            missed += below
        if chosen.openvino:
            rows, below = beside_openvino(made, folder, chosen.rounds)
            lines += [*rows, ""]
            missed += below
        lines += measure_memory(made)
    options = ["--openvino"] if chosen.openvino else []
    report = "\n".join([*head(chosen.rounds, options), *lines])
    (measure.RESULTS / "few_bits.md").write_text(report)
    print(report)
    if chosen.check and missed:
        sys.exit("\n".join(["missed:", *missed]))


def head(rounds: int, options: Sequence[str]) -> list[str]:
    return [
        "# Fewer bits: time and memory",
        "",
        f"`python benchmarks/few_bits.py {' '.join(options)}`",
        "",
        f"{measure.describe()}; 2 threads.",
        "",
        "Stable Diffusion 1.5 shapes, random weights, 512x512.  Times are medians of "
        f"{rounds} rounds in which all take turns; fp32 is arithmetic, its weights are fp16.",
        "",
    ]


def compare(match: Match, made: dict[str, Bundle], rounds: int) -> tuple[list[str], list[str]]:
    """U-Net steps in turn: the lines of the table, and the bars that are missed."""
    isa = match.isa or None
    engines = {name: NativeEngine(made[name], "unet", 2, isa) for name in match.names}
    inputs = unet_inputs(made[match.names[0]])
    times = in_turn({n: partial(timed, engine, inputs) for n, engine in engines.items()}, rounds)
    first = match.names[0]
    found = isa or kernels.isas()[0]
    rates = {kind: kernels.ceiling(found, kind, 2) / 1e9 for kind in (Type.F32, Type.BF16, Type.I8)}
    told = ", ".join(f"{kind.name} {rate:,.0f}" for kind, rate in rates.items() if rate)
    lines = [
        f"## A U-Net step, {found}", "",
        f"Ceilings of bare multiply-accumulates in GFLOP/s: {told}.", "",
    ]  # fmt: skip
    rows, missed = table(times, first, match.limits)
    if NARROW in match.limits:
        ratio = median(pairwise(times[NARROW], times[first]))
        rows += ["", floor(engines[NARROW], inputs, found, ratio, first)]
    del engines
    gc.collect()
    return lines + rows, [f"{found}: {line}" for line in missed]


def floor(
    engine: NativeEngine, inputs: dict[str, np.ndarray], isa: str, ratio: float, first: str
) -> str:
    """What the ratio would be if parts of our step took no time: a bar below is out of reach."""
    program = engine.program({name: value.shape for name, value in inputs.items()})
    runs = np.zeros((3, len(program.ops)), np.uint64)
    for run in runs:
        engine(inputs, run)
    seconds = np.median(runs, 0) / 1e9
    attention = sum(seconds[i] for i, op in enumerate(program.ops) if op.kind == Kind.ATTENTION)
    rates = {kind: kernels.ceiling(isa, kind, 2) for kind in (Type.F32, Type.BF16, Type.I8)}
    products = sum(
        multiplied(op, isa) / rates[Type.I8 if op.narrow else op.a.type]
        for op in program.ops
        if op.kind in (Kind.MATMUL, Kind.ATTENTION)
    )
    free, least = (ratio * part / seconds.sum() for part in (seconds.sum() - attention, products))
    return (
        f"{NARROW}, to {first}: {free:.2f}x if attention took no time, {least:.2f}x if every "
        "product ran at the ceiling and nothing else took time."
    )


def multiplied(op: Op, isa: str) -> float:
    """FLOP of the products that are made: of 36, Winograd and a doubled image need 16."""
    fewer = op.upsample or (op.kind == Kind.MATMUL and kernels.uses_winograd(op, isa))
    return flop(op) * (16 / 36 if fewer else 1)


def beside_openvino(
    made: dict[str, Bundle], folder: Path, rounds: int
) -> tuple[list[str], list[str]]:
    """U-Net steps of ours and of OpenVINO's in turn, each engine of theirs in its own process."""
    theirs = {name: PEERS[name] for name in ("openvino-bf16", "openvino-w8a8")}
    for peer in theirs.values():
        prepare_peer(peer, folder, SIZE, ("unet",))
    with ExitStack() as stack:
        workers = {n: stack.enter_context(Worker(p, folder, 2)) for n, p in theirs.items()}
        for worker in workers.values():
            worker.load("unet", SIZE)
        facts = {name: worker.check_kernels("unet") for name, worker in workers.items()}
        inputs = unet_inputs(made["bf16"])
        ours = {n: NativeEngine(made[n], "unet", 2) for n in ("bf16", "w8, int8")}
        runs: dict[str, Callable[[], float]] = {
            n: partial(timed, engine, inputs) for n, engine in ours.items()
        }
        runs |= {n: partial(asked, worker) for n, worker in workers.items()}
        times = in_turn(runs, rounds)
    rows, missed = table(times, "openvino-w8a8", {NARROW: 0.55})
    ratio = median(pairwise(times[NARROW], times["openvino-w8a8"]))
    rows += ["", floor(ours[NARROW], inputs, kernels.isas()[0], ratio, "openvino-w8a8")]
    used = [
        f"- {name}: " + ", ".join(f"{count} {kernel}" for kernel, count in fact["kernels"].items())
        for name, fact in facts.items()
    ]
    return ["## Beside OpenVINO and NNCF", "", *rows, "", "Kernels:", "", *used], missed


def in_turn(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round but the first, every other in the opposite order."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name in runs if i % 2 else reversed(runs):
            times[name].append(runs[name]())
    return {name: found[1:] for name, found in times.items()}


def timed(engine: NativeEngine, inputs: dict[str, np.ndarray]) -> float:
    began = time.perf_counter()
    engine(inputs)
    return time.perf_counter() - began


def asked(worker: Worker) -> float:
    return worker.run("unet")[0] / 1000


def table(
    times: dict[str, list[float]], first: str, limits: dict[str, float]
) -> tuple[list[str], list[str]]:
    """The rows, and what is missed."""
    lines = [f"| weights, activations | to {first} | spread | bar |", "|---|---:|---:|---:|"]
    missed = []
    for name, found in times.items():
        ratio = median(pairwise(found, times[first]))
        limit = limits.get(name)
        spread = f"{min(found):.2f}..{max(found):.2f} s"
        lines.append(f"| {name} | {ratio:.2f}x | {spread} | {limit or ''} |")
        if limit and ratio > limit:
            missed.append(f"{name} takes {ratio:.2f}x of {first}, the bar is {limit}")
    return lines, missed


def pairwise(ours: Sequence[float], theirs: Sequence[float]) -> Iterator[float]:
    """Ratios within a round, so that what slows down a whole round does not count."""
    return (a / b for a, b in zip(ours, theirs, strict=True))


def unet_inputs(bundle: Bundle) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    spec = bundle.component("unet")
    shapes = models.sizes("unet", spec.config, (SIZE[0] // 8, SIZE[1] // 8), 77)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


# --- memory -------------------------------------------------------------------------------------


def measure_memory(made: dict[str, Bundle]) -> list[str]:
    lines = [
        "## Memory of a picture", "",
        "MiB; peaks are above the process as it was before the bundle was opened.", "",
        "| weights, activations | on disk | predicted peak | measured | to bf16 |",
        "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    first = 0.0
    for name, bundle in made.items():
        command = [sys.executable, __file__, "--worker", str(bundle.folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        first = first or found["measured"]
        disk = sum(bundle.bytes_of(part) for part in READ)
        lines.append(
            f"| {name} | {disk / MIB:,.0f} | {found['predicted'] / MIB:,.0f} "
            f"| {found['measured'] / MIB:,.0f} | {found['measured'] / first:.2f}x |"
        )
    return [*lines, ""]


def draw(folder: Path) -> dict[str, int]:
    """One picture in this process: what the plan says it takes, and what it took."""
    memory.trim()
    before = memory.read()
    assert before, "this system does not tell what a process takes"
    memory.reset_peak()
    pipe = Pipeline.load(folder, threads=2)
    *_, last = pipe.steps("a red apple", steps=STEPS, size=SIZE)
    pipe.decode(last.latents)
    after = memory.read()
    assert after
    assert after.peak
    assert before.resident
    assert pipe.planned
    return {"predicted": pipe.planned.peak, "measured": after.peak - before.resident}


if __name__ == "__main__":
    main()
