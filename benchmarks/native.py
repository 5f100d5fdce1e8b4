"""Our CPU engine against its peers: Stable Diffusion 1.5, one run of each in turn, round by round.

    python benchmarks/native.py --folder sd15    # writes results/native.md
    python benchmarks/native.py --folder sd15 --isa avx2 --check

The folder keeps what is loaded: a random checkpoint, OpenVINO's own environment and graphs, and our
bundles; making them takes a quarter of an hour and 8 GB of memory once.  A round takes the same
stage of every peer, and every other round in the opposite order.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ferrotype.benchmarks import measure
from ferrotype.benchmarks.peer_workers import (
    COMPONENTS,
    PEERS,
    Peer,
    Size,
    Worker,
    prepare,
)
from ferrotype.runtime.bench.protocol import RunnerError

STEPS = 4  # of a picture
USUAL = ("openvino-bf16", "native-bf16", "torch-bf16")  # the one to beat, ours, others
AVX2 = ("openvino-fp32-avx2", "native-fp32")  # the same for --isa avx2: the ordinary laptop
TITLES = {"text_encoder": "text encoder", "unet": "U-Net step", "vae_decoder": "VAE decode"}
TOTAL = "four-step total"
PAUSE = 0.2  # s, for the threads of the peer before to stop spinning
PICTURES = 3  # fresh processes per peer


@dataclass(frozen=True)
class Bar:
    """Ours must be at most `limit` times the peer's, each by the name of a figure."""

    ours: str
    theirs: str
    limit: float


BARS = (
    Bar("U-Net step", "U-Net step", 0.6),
    Bar("VAE decode", "VAE decode", 0.75),
    Bar(TOTAL, TOTAL, 0.65),
    Bar("load", "compile", 0.1),
    Bar("peak", "peak", 0.5),
)
AVX2_BARS = tuple(Bar(stage, stage, 1.0) for stage in (*TITLES.values(), TOTAL))

Samples = dict[str, list[float]]  # peer -> milliseconds of each round
Figures = dict[str, float]  # of one peer, by name


@dataclass(frozen=True)
class Picture:
    """A fresh process that loaded every component and drew one picture: seconds and MiB."""

    load: float
    compile: float
    seconds: float
    peak: float


def main() -> None:
    chosen = arguments()
    peers = choose(chosen)
    lines, missed = [*head(chosen), ""], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.folder or Path(temporary)).absolute()
        folder.mkdir(exist_ok=True)
        for size in chosen.size or [(512, 512), (256, 256)]:
            rows, figures = compare(peers, folder, size, chosen)
            bars, below = judge(figures, chosen.isa)
            lines += ["## {}x{}".format(*size), "", *rows, *bars]
            missed += ["{}x{}: {}".format(*size, line) for line in below]
    report = "\n".join(lines)
    print(report)
    target = f"native-{chosen.isa}.md" if chosen.isa else "native.md"
    (measure.RESULTS / target).write_text(report)
    if chosen.check and missed:
        sys.exit("\n".join(["missed:", *missed]))


def choose(chosen: argparse.Namespace) -> dict[str, Peer]:
    """The peers that were asked for; ours with the instruction set."""
    names = list(chosen.peer or (AVX2 if chosen.isa == "avx2" else USUAL))
    names += ["onnxruntime-fp32"] if chosen.onnxruntime else []
    peers = {name: PEERS[name] for name in names}
    if chosen.isa:
        isa = {"FERROTYPE_ISA": chosen.isa}
        ours = [name for name, peer in peers.items() if peer.kind == "native"]
        peers |= {name: replace(peers[name], environment=isa) for name in ours}
    return peers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", type=parse_size, action="append", help="default: 512x512 and 256x256")
    usual, avx2 = ", ".join(USUAL), ", ".join(AVX2)
    add("--peer", choices=PEERS, action="append", help=f"default: {usual}; with avx2: {avx2}")
    add(
        "--onnxruntime",
        action="store_true",
        help="also onnxruntime-fp32; its graphs take some minutes",
    )
    add("--rounds", type=int, default=7, help="default: %(default)s, and one to warm up")
    add("--threads", type=int, default=2, help="default: %(default)s")
    add("--folder", type=Path, help="keep the checkpoint and what the peers load here")
    add("--isa", help="of ours: avx2, avx512 ...; avx2 is held against OpenVINO with AVX2 in fp32")
    add("--check", action="store_true", help="exit with 1 and name the bars that are missed")
    chosen = parser.parse_args()
    needed = (AVX2 if chosen.isa == "avx2" else USUAL)[:2]
    if chosen.check and chosen.peer and not set(needed) <= set(chosen.peer):
        parser.error(f"--check compares {' and '.join(needed)}: name both with --peer")
    return chosen


def parse_size(text: str) -> Size:
    width, height = map(int, text.split("x"))
    return width, height


def head(chosen: argparse.Namespace) -> list[str]:
    given = " ".join("FOLDER" if Path(a) == chosen.folder else a for a in sys.argv[1:])
    return [
        "# The native engine and its peers",
        "",
        f"`python benchmarks/native.py {given}` on {measure.describe('torch')};",
        f"{chosen.threads} threads.",
        "",
        "Stable Diffusion 1.5, random weights, batch 1, no guidance, warm page cache.  One run of",
        "each peer in turn, every other round in the opposite order, after one to warm up;",
        f"{chosen.rounds} rounds a stage.  The {TOTAL} is arithmetic: a round's",
        f"text encoder, {STEPS} times its U-Net step and its VAE decode.  Loads, pictures and",
        f"peaks are of {PICTURES} fresh processes per peer that load every component and draw one",
        "picture: medians, of peak memory the highest.  Load is until a component could run.",
    ]


# --- measuring ----------------------------------------------------------------------------------


def compare(
    peers: dict[str, Peer], folder: Path, size: Size, chosen: argparse.Namespace
) -> tuple[list[str], dict[str, Figures]]:
    """The lines of a size's tables, and every peer's figures."""
    for peer in peers.values():
        prepare(peer, folder, size)
    load = f"Load average of the machine before: {os.getloadavg()[0]:.1f}."
    stages: dict[str, Samples] = {}
    facts: dict[str, dict[str, Any]] = {}  # stage, peer -> what it says of itself
    for component, title in TITLES.items():
        with ExitStack() as stack:
            workers = {
                name: stack.enter_context(Worker(peer, folder, chosen.threads))
                for name, peer in peers.items()
            }
            for name, worker in workers.items():
                worker.load(component, size)
                facts[f"{title}, {name}"] = worker.check_kernels(component)
            stages[title] = interleave(workers, component, chosen.rounds)
    stages[TOTAL] = {name: totals([stages[t][name] for t in TITLES.values()]) for name in peers}
    pictures = draw_all(peers, folder, size, chosen.threads)
    tables = [*stage_table(stages), "", *picture_table(pictures), "", *fact_lines(facts), ""]
    return [load, "", *tables], figures_of(stages, pictures)


def interleave(workers: dict[str, Worker], component: str, rounds: int) -> Samples:
    """One run of each peer a round, in alternating order; the first round warms up."""
    samples: Samples = {name: [] for name in workers}
    for round in range(rounds + 1):
        order = list(workers) if round % 2 else list(reversed(workers))
        for name in order:
            time.sleep(PAUSE)
            found = workers[name].run(component)
            samples[name] += found if round else []
    return samples


def totals(stages: list[list[float]]) -> list[float]:
    """What a picture of each round takes: text encoder, steps, VAE decode."""
    return [text + STEPS * step + decode for text, step, decode in zip(*stages, strict=True)]


def draw_all(
    peers: dict[str, Peer], folder: Path, size: Size, threads: int
) -> dict[str, list[Picture]]:
    """Pictures of every peer, each by a fresh process, also taken in turn."""
    pictures: dict[str, list[Picture]] = {name: [] for name in peers}
    for _ in range(PICTURES):
        for name, peer in peers.items():
            with Worker(peer, folder, threads) as worker:
                pictures[name].append(draw(worker, size))
    return pictures


def draw(worker: Worker, size: Size) -> Picture:
    """Load every component and run each as often as a picture needs it."""
    start, loads = time.perf_counter(), []
    for component in COMPONENTS:
        loads.append(worker.load(component, size))
        if worker.peer.streams:
            run_stage(worker, component)
            worker.ask(drop=component)
    if not worker.peer.streams:
        for component in COMPONENTS:
            run_stage(worker, component)
    seconds = time.perf_counter() - start
    load, compile = (sum(each[key] for each in loads) for key in ("seconds", "compile_seconds"))
    return Picture(load, compile, seconds, worker.ask(memory=True)["peak"])


def run_stage(worker: Worker, component: str) -> None:
    worker.run(component, STEPS if component == "unet" else 1)


def figures_of(
    stages: dict[str, Samples], pictures: dict[str, list[Picture]]
) -> dict[str, Figures]:
    """Every peer's figures by name: stages in milliseconds, loads in seconds, the peak in MiB."""
    figures: dict[str, Figures] = {}
    for name, drawn in pictures.items():
        figures[name] = {stage: median(samples[name]) for stage, samples in stages.items()}
        figures[name] |= {
            "load": median(p.load for p in drawn),
            "compile": median(p.compile for p in drawn),
            "peak": max(p.peak for p in drawn),
        }
    return figures


# --- the report ---------------------------------------------------------------------------------


def stage_table(stages: dict[str, Samples]) -> list[str]:
    first = next(iter(stages[TOTAL]))
    rows = [
        f"| stage | peer | median ms | min..max | to {first} | best to best |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for stage, samples in stages.items():
        base, best = median(samples[first]), min(samples[first])
        for name, found in samples.items():
            middle = median(found)
            rows.append(
                f"| {stage} | {name} | {middle:,.0f} | {min(found):,.0f}..{max(found):,.0f} "
                f"| {middle / base:.2f}x | {min(found) / best:.2f}x |"
            )
    return rows


def picture_table(pictures: dict[str, list[Picture]]) -> list[str]:
    rows = [
        "| fresh process | load s | of it compiling s | load and picture s | peak RSS MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, drawn in pictures.items():
        rows.append(
            f"| {name} | {median(p.load for p in drawn):.2f} "
            f"| {median(p.compile for p in drawn):.2f} | {median(p.seconds for p in drawn):.1f} "
            f"| {max(p.peak for p in drawn):,.0f} |"
        )
    return rows


def fact_lines(facts: dict[str, dict[str, Any]]) -> list[str]:
    """The precision and the matrix kernels that the peers say they use, where they say it."""
    lines = []
    for name, found in facts.items():
        if found:
            kernels = ", ".join(f"{count} {kernel}" for kernel, count in found["kernels"].items())
            lines.append(f"- {name}: {found['precision']}; {kernels}")
    return lines


def judge(figures: dict[str, Figures], isa: str | None) -> tuple[list[str], list[str]]:
    """The lines about the bars, and those that are missed; none without ours or their peer."""
    bars, names = (AVX2_BARS, AVX2) if isa == "avx2" else (BARS, USUAL)
    name, ours = names[:2]
    if ours not in figures or name not in figures:
        return [], []
    rows, missed = [f"| bar, to {name} | found | at most | |", "|---|---:|---:|---|"], []
    for bar in bars:
        ratio = figures[ours][bar.ours] / figures[name][bar.theirs]
        what = bar.ours if bar.ours == bar.theirs else f"{bar.ours} to its {bar.theirs}"
        verdict = "met" if ratio <= bar.limit else "missed"
        rows.append(f"| {what} | {ratio:.2f}x | {bar.limit:.2f}x | {verdict} |")
        if verdict == "missed":
            missed.append(f"{what} {ratio:.2f}x, at most {bar.limit:.2f}x")
    return [*rows, ""], missed


if __name__ == "__main__":
    try:
        main()
    except RunnerError as error:
        sys.exit(str(error))
