"""The C library beside the Python runtime, on the same native bundle: time per stage, memory, size.

    python benchmarks/embed_c.py       # two minutes with its build; writes results/embed-c.md

Each round starts a fresh process for each host in turn; a process draws some pictures, and every
picture loads, runs and releases each component.  The first picture of a process is left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import ferrotype
from ferrotype import bundle as bundles
from ferrotype.benchmarks import measure
from ferrotype.runtime.compiled import compile_programs
from ferrotype.runtime.pipeline import EMBEDDED

SOURCE = Path(ferrotype.__file__).parent / "embed" / "c"
THREADS, PICTURES = 2, 5
PYTHON = """
import sys, time
began = time.perf_counter()
from ferrotype.runtime.pipeline import Pipeline
pipe = Pipeline.load(sys.argv[1], threads=int(sys.argv[2]))
print(1e3 * (time.perf_counter() - began))
for seed in range(int(sys.argv[3])):
    pipe = Pipeline.load(sys.argv[1], threads=int(sys.argv[2]))
    times = [time.perf_counter()]
    pipe.encode("a red apple on a sky blue background")
    times.append(time.perf_counter())
    *_, last = pipe.steps("a red apple on a sky blue background", seed=seed)
    times.append(time.perf_counter())
    pipe.decode(last)
    pipe.release()
    times.append(time.perf_counter())
    print(*(1e3 * (b - a) for a, b in zip(times, times[1:])))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        library, timer = build(Path(folder))
        programs = Path(folder) / "emoji.ferroc"
        programs.write_bytes(compile_programs(bundles.load(EMBEDDED)))
        shared = (str(THREADS), str(PICTURES))
        commands = {
            "Python": (sys.executable, "-c", PYTHON, str(EMBEDDED), *shared),
            "C": (str(timer), str(EMBEDDED), str(programs), *shared),
        }
        found: dict[str, list[list[float]]] = {host: [] for host in commands}
        for i in range(rounds):
            for host in commands if i % 2 else reversed(commands):
                found[host].append(one(commands[host]))
        sizes = {"libferro.a, stripped": stripped(library), "programs": programs.stat().st_size}
    report = "\n".join([*head(rounds), *times(found), "", *files(sizes), ""])
    (measure.RESULTS / "embed-c.md").write_text(report)
    print(report)


def build(folder: Path) -> tuple[Path, Path]:
    """The library by CMake, and the timer."""
    for command in (("-S", SOURCE, "-B", folder / "build"), ("--build", folder / "build")):
        subprocess.run(["cmake", *command], check=True, capture_output=True)
    library, timer = folder / "build" / "libferro.a", folder / "timer"
    source = Path(__file__).with_name("embed_timer.c")
    subprocess.run(["cc", "-O1", f"-I{SOURCE}", "-c", source, "-o", folder / "t.o"], check=True)
    subprocess.run(["c++", folder / "t.o", library, "-pthread", "-o", timer], check=True)
    return library, timer


def one(command: tuple[str, ...]) -> list[float]:
    """Of one process: ms to open, median ms of each stage, MiB at its peak."""
    done = measure.run(*command)
    (opened,), *pictures = [list(map(float, line.split())) for line in done.stdout.splitlines()]
    return [opened, *(median(stage) for stage in zip(*pictures[1:], strict=True)), done.peak]


def stripped(library: Path) -> int:
    subprocess.run(["strip", "--strip-unneeded", library], check=True)
    return library.stat().st_size


def head(rounds: int) -> list[str]:
    return [
        "# The C library",
        "",
        "`python benchmarks/embed_c.py`",
        "",
        f"{measure.describe()}; {THREADS} threads.",
        "",
        f"The embedded native bundle, 128x128, 4 steps. Medians of {rounds} processes of each",
        f"host in turn, {PICTURES - 1} pictures each after a first one; each loads and releases",
        "every component.",
        "",
    ]


def times(found: dict[str, list[list[float]]]) -> list[str]:
    rows = [
        "| | ready | text encoder | U-Net, 4 steps | decoder | memory of the process |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for host, samples in found.items():
        *spans, peak = (median(column) for column in zip(*samples, strict=True))
        rows.append(f"| {host} | {' | '.join(f'{ms:.0f} ms' for ms in spans)} | {peak:.0f} MiB |")
    return rows


def files(sizes: dict[str, int]) -> list[str]:
    rows = [f"| {name} | {size / 1024:,.0f} |" for name, size in sizes.items()]
    return ["Python is ready when it has imported and opened the bundle.", "", "| file | KiB |",
            "|---|---:|", *rows]  # fmt: skip


if __name__ == "__main__":
    main()
