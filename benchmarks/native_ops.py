"""Where the native engine's time goes: every op against the ceiling, sizes, threads.

    python benchmarks/native_ops.py --folder sd15    # writes results/native_ops.md

Stable Diffusion 1.5 in bf16, random weights, the bundle that native.py makes in the same folder.
The ceiling is a plain loop of the same multiply-accumulate instruction without memory, measured
right before and after each table; an op is counted with the arithmetic of the direct method, so
that what needs less (Winograd, the doubled image of an upsampling convolution) can be above it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from ferrotype import kernels
from ferrotype.benchmarks import measure
from ferrotype.benchmarks.peer_workers import COMPONENTS, PEERS, Size, bundle, inputs, prepare
from ferrotype.bundle import load
from ferrotype.kernels import Kind, Op, Type
from ferrotype.runtime.bench.ops import flop, moved, name
from ferrotype.runtime.engines import Arrays
from ferrotype.runtime.engines.native import NativeEngine

PEER = "native-bf16"
SIZES = ((256, 256), (384, 384), (512, 512), (768, 768))
LOW = 0.6  # of the ceiling: below, the table says why
LEAST_SHARE = 0.002  # of the component's time, for a line of its own


@dataclass
class Ready:
    """A component that can run at one size, with the time of each op."""

    engine: NativeEngine
    feed: Arrays
    ops: list[Op]
    arena: int  # bytes

    def times(self) -> np.ndarray:
        """Nanoseconds by op, of one run."""
        found = np.zeros(len(self.ops), np.uint64)
        self.engine(self.feed, found)
        return found.astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep the checkpoint and the bundle here")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.folder or Path(temporary)).absolute()
        folder.mkdir(exist_ok=True)
        prepare(PEERS[PEER], folder, (512, 512))
        lines = [*head(chosen.rounds), ""]
        for component in COMPONENTS:
            lines += op_table(folder, component, chosen.rounds)
        lines += ["## Threads and sizes", "", *size_table(folder, chosen.rounds)]
    report = "\n".join(lines) + "\n"
    print(report)
    (measure.RESULTS / "native_ops.md").write_text(report)


def head(rounds: int) -> list[str]:
    return [
        "# The native engine, op by op",
        "",
        f"`python benchmarks/native_ops.py` on {measure.describe()};",
        f"instruction set {kernels.isas()[0]}; medians of {rounds} runs after one to warm up; load",
        f"average of the machine before: {os.getloadavg()[0]:.1f}.",
    ]


def ready(folder: Path, component: str, size: Size, threads: int) -> Ready:
    """The component of our bundle with random inputs."""
    engine = NativeEngine(load(bundle(folder, "bf16")), component, threads)
    feed = inputs(component, size)
    plan = engine.layout({name: array.shape for name, array in feed.items()})
    return Ready(engine, feed, list(plan.ops), plan.arena_bytes)


# --- by op --------------------------------------------------------------------------------------


def op_table(folder: Path, component: str, rounds: int) -> list[str]:
    """Lines by kind and shape of op at 512x512 on 2 threads, slowest first."""
    component_ready = ready(folder, component, (512, 512), 2)
    before = ceiling(2)
    component_ready.times()
    times = np.median([component_ready.times() for _ in range(rounds)], axis=0)
    top = (before + ceiling(2)) / 2
    groups: dict[str, list[tuple[Op, float]]] = defaultdict(list)
    for op, time in zip(component_ready.ops, times, strict=True):
        groups[name(op)].append((op, float(time)))
    rows = [
        f"## {component}: {times.sum() / 1e6:,.0f} ms, "
        f"{sum(map(flop, component_ready.ops)) / times.sum():,.0f} GFLOP/s of {top:,.0f}",
        "",
        "| op | times | ms | GFLOP/s | of the ceiling | GB/s | below 60 % because |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    rest = 0.0
    for label, found in sorted(groups.items(), key=lambda item: -sum(t for _, t in item[1])):
        time = sum(t for _, t in found)
        if time < LEAST_SHARE * times.sum():
            rest += time
            continue
        rate = sum(flop(op) for op, _ in found) / time
        bandwidth = sum(moved(op) for op, _ in found) / time
        why = reason(found[0][0]) if rate < LOW * top else ""
        rows.append(
            f"| {label} | {len(found)} | {time / 1e6:.1f} | {rate:,.0f} | {rate / top:.0%} "
            f"| {bandwidth:.0f} | {why} |"
        )
    return [*rows, f"| the others | | {rest / 1e6:.1f} | | | | |", ""]


def ceiling(threads: int) -> float:
    """GFLOP/s of bf16 products without memory."""
    return kernels.ceiling(kernels.isas()[0], Type.BF16, threads) / 1e9


def reason(op: Op) -> str:
    """What keeps an op from the ceiling."""
    pixels = op.out.h * op.out.w
    if op.kind == Kind.ATTENTION:
        if op.b.h * op.b.w < 256:
            return "few keys: the softmax and the packing of queries are as long as the products"
        return f"exponentials; heads of {op.size} are summed in {-(-op.size // 16) * 16} lanes"
    if op.kind != Kind.MATMUL:
        return "reads and writes, no products"
    if op.out.c < kernels.LANES:
        return f"{op.out.c} outputs are computed as {kernels.LANES}"
    if op.a.c < kernels.LANES:
        return f"{op.a.c} inputs are padded to {kernels.LANES}"
    if pixels < 16:
        return "each weight is used once: memory bandwidth"
    return "short sums: the epilogue is a large part"


# --- by size and threads ------------------------------------------------------------------------


def size_table(folder: Path, rounds: int) -> list[str]:
    """Times at several sizes; per megapixel with and without attention; 1 thread to 2."""
    rows = [
        "| size | stage | 1 thread ms | 2 threads ms | 1 to 2 threads | without attention, ms "
        "per 10,000 pixels | arena MiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for size in SIZES:
        for component in COMPONENTS[1:]:
            one, two, gain, rest, arena = scaling(folder, component, size, rounds)
            per_pixel = rest / (size[0] * size[1]) * 1e4
            rows.append(
                f"| {size[0]}x{size[1]} | {component} | {one:,.0f} | {two:,.0f} | {gain:.2f}x "
                f"| {per_pixel:.1f} | {arena:,.1f} |"
            )
    return rows


def scaling(
    folder: Path, component: str, size: Size, rounds: int
) -> tuple[float, float, float, float, float]:
    """Milliseconds on 1 and on 2 threads, interleaved; the gain; without attention; MiB."""
    both = [ready(folder, component, size, threads) for threads in (1, 2)]
    samples = list(interleaved(both, rounds))
    one, two = (median(float(s[i].sum()) for s in samples) / 1e6 for i in (0, 1))
    gain = median(float(s[0].sum() / s[1].sum()) for s in samples)
    others = np.array([op.kind != Kind.ATTENTION for op in both[1].ops])
    rest = median(float(s[1][others].sum()) for s in samples) / 1e6
    return one, two, gain, rest, both[1].arena / 2**20


def interleaved(both: list[Ready], rounds: int) -> Iterator[list[np.ndarray]]:
    """Times of each in turn; the first round warms up."""
    for index in range(rounds + 1):
        found = [each.times() for each in both]
        if index:
            yield found


if __name__ == "__main__":
    main()
