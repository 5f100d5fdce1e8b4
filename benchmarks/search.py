"""How long the search for mixed precision takes with Stable Diffusion 1.5's shapes.

    python benchmarks/search.py --folder bundles --check       # up to an hour; results/search.md

As `ferrotype quantize --size-budget` does it: calibration, every matrix in every form, the choice.
The weights are random, so that the time is all that is told.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from ferrotype import bundle as bundles
from ferrotype.benchmarks import checkpoints, measure, random_bundles
from ferrotype.quantize import calibrate, mixed

LIMIT = 3600.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep the bundle here")
    parser.add_argument("--check", action="store_true", help="exit with 1 if it takes an hour")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (chosen.folder or Path(temporary)) / "sd15-fp16-fp32.ferro"
        if not place.exists():
            random_bundles.write(place, checkpoints.SD15, "fp16", "fp32", (512, 512))
        bundle = bundles.load(place)
        stages = {}
        began, used = time.perf_counter(), time.process_time()

        def note(stage: str) -> None:
            stages[stage] = time.perf_counter() - began, (time.process_time() - used) / 2
            print(f"{stage}: {stages[stage][0]:,.0f} s", file=sys.stderr)

        statistics = calibrate.calibrate(bundle)
        note("calibration")
        table = mixed.measure(
            bundle, statistics, "bf16", calibrate.PROMPTS[:1], progress=_tell(began)
        )
        note("every matrix in every form")
        chosen_forms = mixed.within(table, table.bytes_of([*mixed.uniform(table, "w4")]))
        mixed.frontier(table)
        note("the choice, and the frontier")
        assert len(chosen_forms) == len(table.choices)
    lines = [
        "# The search for mixed precision",
        "",
        "`python benchmarks/search.py --check`",
        "",
        f"{measure.describe()}; 2 threads.",
        "",
        f"Stable Diffusion 1.5 shapes, random weights, {len(table.choices)} matrices; up to then:",
        "",
        "| | seconds | of the processor's, over 2 cores |",
        "|---|---:|---:|",
        *(f"| {name} | {wall:,.0f} | {cpu:,.0f} |" for name, (wall, cpu) in stages.items()),
        "",
    ]
    (measure.RESULTS / "search.md").write_text("\n".join(lines))
    print("\n".join(lines))
    if chosen.check and stages["the choice, and the frontier"][0] > LIMIT:
        sys.exit("the search took more than an hour")


def _tell(began: float):
    def tell(done: int, total: int) -> None:
        if done % 20 == 0:
            seconds = time.perf_counter() - began
            print(f"{done} of {total} matrices after {seconds:,.0f} s", file=sys.stderr)

    return tell


if __name__ == "__main__":
    main()
