"""What each stage of a bundle allocates: every component alone in a process of its own.

    python benchmarks/stages.py sd15.ferro --size 512x512      # writes results/stages.md

Anonymous memory is what the process allocated, without the weights that are mapped from the
bundle's files.  A full attention score matrix of Stable Diffusion 1.5 at 512x512 would be
8 heads x 4096 x 4096 x 4 bytes = 512 MiB in one piece.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from ferrotype.benchmarks import measure
from ferrotype.bundle import Bundle, load
from ferrotype.runtime.engines import open_engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", default="512x512", help="WIDTHxHEIGHT (default: %(default)s)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    width, height = map(int, chosen.size.split("x"))
    bundle = load(chosen.bundle)
    if chosen.stage:
        print(run_stage(bundle, chosen.stage, width, height))
        return
    precision = bundle.manifest.precision
    lines = [
        f"# What each stage of {bundle.manifest.model} allocates at {chosen.size}",
        "",
        f"`python benchmarks/stages.py BUNDLE --size {chosen.size}` on {measure.describe()};",
        f"{precision.weights} weights, {precision.activations} activations.",
        "",
        "| stage | weights MiB | anonymous peak MiB | resident peak MiB | first run s |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, part in bundle.manifest.components.items():
        command = (sys.executable, __file__, str(chosen.bundle), "--size", chosen.size)
        found = measure.run(*command, "--stage", name)
        weights = bundle.bytes_of(part.path) / 2**20
        lines.append(
            f"| {name} | {weights:,.0f} | {found.anonymous:,.0f} | {found.peak:,.0f} "
            f"| {float(found.stdout):.1f} |"
        )
    report = "\n".join([*lines, ""])
    print(report)
    (measure.RESULTS / "stages.md").write_text(report)


def run_stage(bundle: Bundle, name: str, width: int, height: int) -> float:
    """Run a component once on random inputs of that picture size; the seconds it took."""
    small = name != "vae_encoder"  # which takes the picture, the others its latents
    sizes = {"batch": 1, "sequence": 77, "height": height // 8 if small else height}
    sizes["width"] = width // 8 if small else width
    engine, rng = open_engine(bundle, name), np.random.default_rng(0)
    inputs = {}
    for key, tensor in bundle.component(name).inputs.items():
        shape = [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
        inputs[key] = np.asarray(rng.uniform(0, 1, shape), np.float32)  # as token ids: all 0
    start = time.perf_counter()
    engine(inputs)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
