"""The embedded bundle beside the same model in bf16: size, time to the first picture and to others.

    python benchmarks/embedded.py --check       # a minute; writes results/embedded.md

Every sample is a fresh process that imports, loads and draws; the bundles take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from ferrotype import bundle as bundles
from ferrotype.benchmarks import measure
from ferrotype.benchmarks.checkpoints import EMOJI
from ferrotype.convert import convert
from ferrotype.runtime.pipeline import EMBEDDED

WORKER = """
import json, sys, time
began = time.perf_counter()
import ferrotype
pipe = ferrotype.load(sys.argv[1], threads=2)
times = [time.perf_counter()]
for seed in range(8):
    pipe.generate("a red apple on a sky blue background", seed=seed)
    times.append(time.perf_counter())
later = sorted(b - a for a, b in zip(times[1:], times[2:]))
print(json.dumps([times[0] - began, times[1] - times[0], later[len(later) // 2]]))
"""
COLUMNS = ("import and load", "first picture", "each after it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="exit with 1 if it is not faster")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain = convert(EMOJI, Path(folder) / "bf16.ferro", "native").folder
        places = {"bf16": plain, "embedded": EMBEDDED}
        found: dict[str, list[list[float]]] = {name: [] for name in places}
        for i in range(chosen.rounds):
            for name in places if i % 2 else reversed(places):
                found[name].append(run(places[name]))
        sizes = {
            name: sum(f.bytes for f in bundles.load(place).manifest.files.values())
            for name, place in places.items()
        }
    ratios = [
        median(ours[i] / theirs[i] for ours, theirs in zip(*reversed(found.values()), strict=True))
        for i in range(len(COLUMNS))
    ]
    report = "\n".join([*head(chosen.rounds), *rows(found, sizes, ratios), ""])
    (measure.RESULTS / "embedded.md").write_text(report)
    print(report)
    if chosen.check and max(ratios[1:]) >= 1:
        sys.exit("the embedded bundle does not draw faster than in bf16")


def run(place: Path) -> list[float]:
    """Seconds of a fresh process, by column."""
    command = [sys.executable, "-c", WORKER, str(place)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def head(rounds: int) -> list[str]:
    manifest = bundles.load(EMBEDDED).manifest
    told = manifest.parity.get("quantized", {})
    return [
        "# The embedded bundle",
        "",
        "`python benchmarks/embedded.py --check`",
        "",
        f"{measure.describe()}; 2 threads.",
        "",
        f"The trained emoji model, {manifest.recipe.steps} steps, medians of {rounds} fresh",
        "processes in turn.  Its report says, of pictures that were not calibrated with, against",
        f"fp32: PSNR {told.get('mean_psnr')} dB, at worst {told.get('worst_psnr')} dB; SSIM",
        f"{told.get('mean_ssim')}, at worst {told.get('worst_ssim')}.",
        "",
        f"| | MiB | {' | '.join(COLUMNS)} |",
        "|---|---:|---:|---:|---:|",
    ]


def rows(
    found: dict[str, list[list[float]]], sizes: dict[str, int], ratios: list[float]
) -> list[str]:
    lines = []
    for name, samples in found.items():
        cells = []
        for column in zip(*samples, strict=True):
            low, middle, high = (1000 * pick(column) for pick in (min, median, max))
            cells.append(f"{middle:.0f} ms ({low:.0f}..{high:.0f})")
        lines.append(f"| {name} | {sizes[name] / 2**20:.1f} | {' | '.join(cells)} |")
    share = sizes["embedded"] / sizes["bf16"]
    return [*lines, f"| ratio | {share:.2f}x | {' | '.join(f'{r:.2f}x' for r in ratios)} |"]


if __name__ == "__main__":
    main()
