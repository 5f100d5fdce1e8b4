"""Budgets kept: predicted and measured peaks, and what a budget costs in time.

    python benchmarks/memory.py --folder bundles --check     # writes results/memory.md

Every run is a fresh process that imports the runtime, notes its memory, plans, and draws.  The
kernel's own high-water mark is the measured peak, file pages included.  RLIMIT_DATA, which counts
anonymous memory and not mapped files, is set to what the plan says of it, so that an allocation
beyond the plan ends the run.  Rounds are interleaved; the picture's bytes must be the same in all.

The folder keeps random bundles of the exact architectures (8 GB), made in a few minutes; an ONNX
bundle of the same model is measured if it is there: sd15-onnx.ferro, and sd15-onnx-fp16.ferro with
`--weights fp16`, of the checkpoint that checkpoints.py writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ferrotype.benchmarks import measure
from ferrotype.runtime import memory, plan
from ferrotype.runtime.bench.worker import settle
from ferrotype.runtime.memory import GIB, MIB, format_bytes
from ferrotype.runtime.pipeline import Pipeline

STEPS = 4
PROMPT = "a red apple on a sky blue background"
BUDGETS = (256 * MIB, 512 * MIB, 1 * GIB, 2 * GIB, 4 * GIB)
STACK = 1 * MIB  # of each thread, in place of the usual 8: RLIMIT_DATA counts them whole
SLOWER, ERROR = 1.5, 0.03  # the bars
PUBLISHED = """
## What others publish, or were measured at elsewhere

| system | what | memory | time | machine |
|---|---|---:|---:|---|
| OnnxStream | SD 1.5 U-Net, fp16, 512x512, one pass | 133 MB | 18.2 s | i7-8750H, 8 threads |
| OnnxStream | SD 1.5 VAE decode, fp32, 512x512 | 1,000 MB | 20.9 s | i7-8750H, 8 threads |
| OnnxStream | whole SD 1.5 and SDXL pictures | under 300 MB | - | Raspberry Pi Zero 2 |
| stable-diffusion.cpp f16 | SD 1.5, 512x512, 4 steps | 2,352 MiB | 138.8 s | 2 Xeon cores, AMX |
| stable-diffusion.cpp q4_0 | SD 1.5, 512x512, 4 steps | 1,806 MiB | 238.7 s | 2 Xeon cores, AMX |
| OpenVINO 2026.4 bf16 | SD 1.5, 512x512, 4 steps | 4,568 MiB | 5.5 s | 2 Xeon cores, AMX |
| onnxruntime 1.31 fp32 | SD 1.5, 512x512, 4 steps | 7,083 MiB | 27.1 s | 2 Xeon cores, AMX |

OnnxStream's figures are those of its README.  The last four are peaks of whole processes that were
measured on another machine than ours: their times are not to be divided by those above.
"""


@dataclass(frozen=True)
class Case:
    """A bundle to draw with, at a size, in budgets; None is without a limit."""

    title: str
    bundle: str
    size: tuple[int, int]
    budgets: tuple[int | None, ...]
    steps: int = STEPS


CASES = (
    Case("Stable Diffusion 1.5, native bf16, 512x512", "sd15", (512, 512), (None, *BUDGETS)),
    Case("SDXL base, native bf16, 1024x1024", "sdxl", (1024, 1024), (None, 512 * MIB)),
    Case("Stable Diffusion 1.5, ONNX, fp32, 512x512", "sd15-onnx", (512, 512), (None, 4 * GIB)),
    Case("The same with fp16 weights", "sd15-onnx-fp16", (512, 512), (None, 2 * GIB)),
)


def main() -> None:
    chosen = arguments()
    if chosen.worker:
        print(json.dumps(work(chosen)))
        return
    target = measure.RESULTS / "memory.md"
    sections, missed = read_sections(target) if chosen.only else {}, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.folder or Path(temporary)).absolute()
        for case in CASES:
            if not chosen.only or case.bundle in chosen.only:
                rows, wrong = measure_case(case, prepare(folder, case), chosen)
                sections[case.title] = "\n".join(rows)
                missed += wrong
                kept = [sections[c.title].rstrip("\n") for c in CASES if c.title in sections]
                target.write_text("\n".join([*head(chosen), *(k + "\n" for k in kept), PUBLISHED]))
    print(target.read_text())
    if chosen.check and missed:
        sys.exit("\n".join(["missed:", *missed]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, help="keep the bundles there")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--threads", type=int, default=2, help="default: %(default)s")
    add("--only", action="append", choices=[case.bundle for case in CASES])
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    add("--worker", help=argparse.SUPPRESS)
    add("--budget", type=int, help=argparse.SUPPRESS)
    add("--size", help=argparse.SUPPRESS)
    add("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    return parser.parse_args()


def read_sections(path: Path) -> dict[str, str]:
    """The tables of an earlier run by title: those that are not measured anew stay."""
    text = path.read_text() if path.exists() else ""
    parts = text.split("\n## ")[1:-1]  # behind them is what others publish
    return {part.split("\n", 1)[0]: f"## {part}" for part in parts}


def head(chosen: argparse.Namespace) -> list[str]:
    return [
        "# Memory: promised and measured",
        "",
        f"`python benchmarks/memory.py --check`, {chosen.threads} threads, {STEPS} steps, random",
        "weights, files in the page cache; above each table where and when.",
        "",
        "MiB above the process as it was before the bundle was opened; that alone is in the last",
        "column.  Predicted is the plan's peak, measured the kernel's high-water mark, of the",
        "highest round.  Anonymous memory was limited to the plan's by RLIMIT_DATA.  Times are",
        "medians of whole pictures, to that without a budget in the same rounds.  All pictures of",
        "a table must have the same bytes.",
        "",
    ]


def prepare(folder: Path, case: Case) -> Path | None:
    """The bundle, made if it is a native one that is not there."""
    path = folder / f"{case.bundle}.ferro"
    if path.exists() or "onnx" in case.bundle:
        return path if path.exists() else None
    from ferrotype.benchmarks import checkpoints, random_bundles

    folder.mkdir(parents=True, exist_ok=True)
    configs = checkpoints.SDXL if case.bundle == "sdxl" else checkpoints.SD15
    random_bundles.write(path, configs, size=case.size)
    return path


# --- one table ----------------------------------------------------------------------------------


def measure_case(
    case: Case, bundle: Path | None, chosen: argparse.Namespace
) -> tuple[list[str], list[str]]:
    """The rows of a case, and the bars that it missed."""
    title = [f"## {case.title}", "", f"{chosen.rounds} rounds on {measure.describe()}.", ""]
    if bundle is None:
        return [*title, f"Not measured: {case.bundle}.ferro is not in the folder.", ""], []
    smallest = ask(case, bundle, 1, chosen)["smallest"]
    budgets = [*case.budgets, smallest]
    found: dict[int | None, list[dict[str, Any]]] = {budget: [] for budget in budgets}
    for round_ in range(chosen.rounds):
        for budget in budgets if round_ % 2 == 0 else budgets[::-1]:
            found[budget].append(ask(case, bundle, budget, chosen))
            print(case.bundle, budget, found[budget][-1], file=sys.stderr, flush=True)
    seconds = {b: median(run["seconds"] for run in runs) for b, runs in found.items()}
    rows = [
        "| budget | weights | predicted | measured | differ | time | spread | process before |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    rows += [row(budget, found[budget], seconds, smallest) for budget in budgets]
    hashes = {run["picture"] for runs in found.values() for run in runs}
    return [*title, *rows, ""], missed(case, found, seconds, hashes, smallest)


def row(
    budget: int | None,
    runs: list[dict[str, Any]],
    seconds: dict[int | None, float],
    smallest: int,
) -> str:
    times = [run["seconds"] for run in runs]
    predicted, measured = runs[0]["predicted"], max(run["measured"] for run in runs)
    name = "none" if budget is None else format_bytes(budget, up=True)
    name += " (the smallest)" if budget == smallest else ""
    return (
        f"| {name} | {runs[0]['residency']} | {predicted / MIB:,.1f} | {measured / MIB:,.1f} "
        f"| {measured / predicted - 1:+.1%} | {seconds[budget] / seconds[None]:.2f}x "
        f"| {min(times):.1f}..{max(times):.1f} s | {runs[0]['before'] / MIB:.0f} |"
    )


def missed(
    case: Case,
    found: dict[int | None, list[dict[str, Any]]],
    seconds: dict[int | None, float],
    hashes: set[str],
    smallest: int,
) -> list[str]:
    wrong = [] if len(hashes) == 1 else [f"{case.title}: the pictures differ"]
    for budget, runs in found.items():
        where = f"{case.title}, {'no budget' if budget is None else format_bytes(budget)}"
        top = max(run["measured"] for run in runs)
        if budget is not None and top > budget:
            wrong.append(f"{where}: measured {format_bytes(top)}")
        if abs(top / runs[0]["predicted"] - 1) > ERROR and budget != smallest:
            wrong.append(f"{where}: predicted {format_bytes(runs[0]['predicted'])}")
        if seconds[budget] > SLOWER * seconds[None] and budget != smallest:
            wrong.append(f"{where}: {seconds[budget] / seconds[None]:.2f}x the time")
    return wrong


def ask(case: Case, bundle: Path, budget: int | None, chosen: argparse.Namespace) -> dict[str, Any]:
    """One run in a fresh process."""
    options = ["--worker", str(bundle), "--size", "{}x{}".format(*case.size)]
    options += ["--steps", str(case.steps), "--threads", str(chosen.threads)]
    options += [] if budget is None else ["--budget", str(budget)]
    done = subprocess.run(
        [sys.executable, __file__, *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, (STACK, STACK)),
    )
    return json.loads(done.stdout)


# --- one run ------------------------------------------------------------------------------------


def work(chosen: argparse.Namespace) -> dict[str, Any]:
    """Draw in a budget; what was predicted and measured, above the process as it was before."""
    width, height = map(int, chosen.size.split("x"))
    settle()
    memory.reset_peak()
    before = resident()
    try:
        pipe = Pipeline.load(chosen.worker, threads=chosen.threads, memory=chosen.budget)
        run = pipe.steps(PROMPT, steps=chosen.steps, size=(width, height))
    except plan.Refusal as refusal:
        return {"smallest": refusal.smallest}
    made = pipe.planned
    assert made
    if made.target == "native":
        limit_anonymous(made)
    start = time.perf_counter()
    *_, last = run
    picture = pipe.decode(last)
    seconds = time.perf_counter() - start
    return {
        "before": before,
        "predicted": made.peak,
        "measured": peak() - before,
        "residency": made.residency,
        "seconds": seconds,
        "picture": hashlib.sha256(picture.tobytes()).hexdigest(),
    }


def resident() -> int:
    return int(measure.status()["VmRSS"] * MIB)


def peak() -> int:
    return int(measure.status()["VmHWM"] * MIB)


def limit_anonymous(made: plan.Plan) -> None:
    """Let no more be allocated than the plan says, and the threads' stacks."""
    planned = max(stage.arena + stage.host for stage in made.stages)
    now = int(measure.status()["VmData"] * MIB)
    most = now + planned + (made.threads + 3) * STACK
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


if __name__ == "__main__":
    main()
