"""Conversion in bounded memory: full-size single files to native and ONNX bundles, beside Optimum.

    python benchmarks/convert.py                       # an hour or so, 40 GB of disk
    python benchmarks/convert.py --only native --folder /big --check

Random weights in fp16, one file in the original naming.  Every conversion is a process of its own,
watched from outside.  Native ones are checked by our engine (`--check engine`), as where torch is
not installed.  Optimum gets an environment of its own (see interop.py) and the same weights as a
folder, which it needs.  Writes results/convert.md, with --folder also what was run before; with
--check the exit code is 1 if a native conversion takes 600 MB or more above the interpreter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ferrotype.benchmarks import measure
from ferrotype.benchmarks.checkpoints import (
    SD15,
    SDXL,
    SMALL,
    TINY,
    write_checkpoint,
    write_single,
)
from ferrotype.benchmarks.interop import environment
from ferrotype.bundle import MANIFEST, TEXT_ENCODERS

MODELS: dict[str, dict[str, Any]] = {"sd15": SD15, "sdxl": SDXL}
LIMIT = 600e6  # bytes above the interpreter
MIB = 2**20
CASES = {  # case -> model, what is run
    "native sd15": ("sd15", "native"),
    "native sdxl": ("sdxl", "native"),
    "onnx sd15": ("sd15", "onnx"),
    "optimum sd15": ("sd15", "optimum"),
    "onnx sdxl": ("sdxl", "onnx"),
    "optimum sdxl": ("sdxl", "optimum"),
}
# Compared as a picture of this size: torch takes ten minutes for SDXL's own.
SMALLER = {"sdxl": ("--size", "512x512")}
MOST = 0.9  # of the machine's memory: what takes more is stopped, and said to be
STAGES = """
import json, sys, time
from ferrotype.convert import convert
stages, began = [], time.perf_counter()
def progress(name):
    stages.append((name, time.perf_counter() - began))
convert(sys.argv[1], sys.argv[2], "native", check="engine", progress=progress)
progress("end")
print(json.dumps(stages))
"""


@dataclass
class Case:
    """Seconds, bytes at the peak, bytes written; what the stages took, and the worst figures."""

    seconds: float = 0.0
    peak: float = 0.0
    size: int = 0
    stages: dict[str, float] | None = None
    psnr: float = 0.0
    picture: float = 0.0
    failed: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=sorted({k for _, k in CASES.values()}), action="append")
    parser.add_argument("--models", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--folder", type=Path, help="where to keep checkpoints and figures")
    parser.add_argument("--env", type=Path, help="make Optimum's environment here, and keep it")
    parser.add_argument("--tiny", action="store_true", help="small networks; writes no results")
    parser.add_argument("--check", action="store_true", help="exit code 1 above the limit")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        for name, (model, kind) in CASES.items():
            if kind in (chosen.only or [kind]) and model in (chosen.models or [model]):
                env = (chosen.env or folder / "env").absolute()
                case = run(folder, model, kind, env, chosen.tiny)
                (folder / f"{name}.json").write_text(json.dumps(asdict(case)))
        paths = {name: folder / f"{name}.json" for name in CASES}
        found = {n: Case(**json.loads(p.read_text())) for n, p in paths.items() if p.exists()}
        text = report(found, interpreter(), copying(folder, chosen.tiny))
    print(text)
    if {name for name in CASES if name.startswith("native")} <= found.keys() and not chosen.tiny:
        (measure.RESULTS / "convert.md").write_text(text)
    over = [n for n, c in found.items() if n.startswith("native") and above(c) >= LIMIT]
    if chosen.check and (over or not any(name.startswith("native") for name in found)):
        sys.exit(f"above {LIMIT / 1e6:.0f} MB: {', '.join(over) or 'nothing was run'}")


# --- one conversion -----------------------------------------------------------------------------


def run(folder: Path, model: str, kind: str, env: Path, tiny: bool) -> Case:
    """Convert once, in a process of its own; what was written is removed."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        out = Path(temporary) / "out"
        if kind == "native":
            command: tuple[str, ...] = (sys.executable, "-c", STAGES)
            source = single(folder, model, tiny)
        elif kind == "onnx":
            size = () if tiny else SMALLER.get(model, ())
            command = measure.ferrotype("convert", "--json", *size, "-o", str(out))
            source = single(folder, model, tiny)
        else:
            command = (str(environment(env).with_name("optimum-cli")), "export", "onnx")
            command += ("--task", "text-to-image", "--model")
            source = whole(folder, model, tiny)
        last = (str(source),) if kind == "onnx" else (str(source), str(out))
        case, printed = watched(*command, *last)
        if not case.failed:
            case.size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
        if not case.failed and kind != "optimum":
            told = json.loads((out / MANIFEST).read_text())["parity"]
            outputs = [o["psnr"] for c in told["components"].values() for o in c.values()]
            case.psnr, case.picture = min(outputs), told["picture"]["psnr"]
        if kind == "native" and not case.failed:
            case.stages = spans(json.loads(printed.splitlines()[-1]))
        return case


def watched(*command: str) -> tuple[Case, str]:
    """Run a command, stopped at MOST of the machine's memory; its figures and what it printed."""
    most = MOST * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    began, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        while process.poll() is None:
            peak = max(peak, MIB * measure.status(process.pid).get("VmHWM", 0.0))
            if peak > most:
                process.kill()
            time.sleep(0.02)
        seconds, said = time.perf_counter() - began, process.stderr.read().strip()
        printed.seek(0)
        text = printed.read()
    failed = ""
    if process.returncode:
        failed = said.splitlines()[-1] if said else f"exit code {process.returncode}"
        if process.returncode < 0:  # by us, or by a system without memory
            killed = signal.Signals(-process.returncode).name
            failed = f"{killed} at {peak / 1e6:,.0f} MB, before its end"
    return Case(seconds, peak, failed=failed), text


def spans(stages: list[tuple[str, float]]) -> dict[str, float]:
    """Seconds of reading, writing and checking, from the times at which stages began."""
    kinds = {"read": 0.0, "write": 0.0, "check": 0.0, "hash": 0.0}
    for (name, start), (_, end) in pairwise(stages):
        kind = name.split()[0]
        kinds[kind if kind in kinds else "check"] += end - start
    return kinds


def single(folder: Path, model: str, tiny: bool) -> Path:
    """The checkpoint as one file."""
    path = folder / f"{model}{'-tiny' if tiny else ''}.safetensors"
    if not path.exists():
        configs = small(model) if tiny else MODELS[model]
        _whole(path, partial(write_single, configs=configs))
    return path


def small(model: str) -> dict[str, Any]:
    """Networks of few channels that CLIP's own tokenizer fits."""
    configs = SMALL[{"sd15": "sd1", "sdxl": "sdxl"}[model]]
    return {
        name: config | {"vocab_size": 49408} if name in TEXT_ENCODERS else config
        for name, config in configs.items()
    }


def whole(folder: Path, model: str, tiny: bool) -> Path:
    """The checkpoint as a folder."""
    path = folder / f"{model}{'-tiny' if tiny else ''}"
    if not path.exists():
        _whole(path, partial(write_checkpoint, configs=TINY if tiny else MODELS[model]))
    return path


def _whole(path: Path, make: Callable[[Path], object]) -> None:
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)
    # In a process of its own: what it takes would be missing to what is measured.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        apart.submit(make, part).result()
    part.rename(path)


def interpreter() -> float:
    """Bytes that Python takes before anything is imported."""
    return MIB * measure.run(sys.executable, "-c", "import time; time.sleep(0.2)").peak


def above(case: Case) -> float:
    """Bytes at the peak above the interpreter."""
    return case.peak - interpreter()


def copying(folder: Path, tiny: bool) -> float:
    """Bytes a second of copying the smaller file, to the disk: what no conversion can beat."""
    source, target = single(folder, "sd15", tiny), folder / "copied.tmp"
    began = time.perf_counter()
    with source.open("rb") as given, target.open("wb") as out:
        shutil.copyfileobj(given, out, 1 << 24)
        out.flush()
        os.fsync(out.fileno())
    seconds = time.perf_counter() - began
    size = target.stat().st_size
    target.unlink()
    return size / seconds


# --- the report ---------------------------------------------------------------------------------


def report(found: dict[str, Case], python: float, copied: float) -> str:
    """The cases as tables of Markdown."""
    lines = [
        "# Conversion in bounded memory",
        "",
        f"`python benchmarks/convert.py`, {measure.describe('torch', 'diffusers', 'onnx')}.",
        "",
        "Random fp16 weights at full size in one file; every conversion is a process of its own",
        "and ran once, not all at this commit, on a machine that others used as well.  Peaks are",
        "the kernel's high-water mark of resident memory, mapped files",
        f"included, above the {python / 1e6:.0f} MB of a bare interpreter.",
        "",
        "| conversion | peak above the interpreter | seconds | written | worst output | picture |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in CASES:
        case = found.get(name, Case(failed="not run"))
        if case.failed:
            lines.append(f"| {name} | {case.failed} | {case.seconds:,.0f} | - | - | - |")
            continue
        checked = [f"{v:.1f} dB" if v else "not compared" for v in (case.psnr, case.picture)]
        lines.append(
            f"| {name} | {(case.peak - python) / 1e6:,.0f} MB | {case.seconds:,.0f} "
            f"| {case.size / 1e6:,.0f} MB | {' | '.join(checked)} |"
        )
    lines += [
        "",
        "## Native, by stage",
        "",
        "*Read* packs the checkpoint unrounded, as the original of the check; *write* packs it",
        "again in bf16.  Each reads every weight and writes it.  *Check* draws with both.  Copying",
        f"a file of 2 GB on this disk ran at {copied / 1e6:,.0f} MB/s in the same run.",
        "",
        "| conversion | read | write | MB/s of writing | check | hash |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, case in found.items():
        if case.stages:
            spent = case.stages
            lines.append(
                f"| {name} | {spent['read']:.1f} s | {spent['write']:.1f} s "
                f"| {case.size / 1e6 / spent['write']:,.0f} | {spent['check']:.1f} s "
                f"| {spent['hash']:.1f} s |"
            )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
