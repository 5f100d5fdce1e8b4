"""What fewer bits do to the memory of a U-Net on onnxruntime: Stable Diffusion 1.5 shapes.

    python benchmarks/onnx_few_bits.py --folder graphs --check   # writes results/onnx_few_bits.md

One step of each in a process of its own, watched from outside.  The folder keeps the random
checkpoint and the graphs (10 GB); making them takes some minutes each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ferrotype.benchmarks import measure, peer_workers
from ferrotype.runtime.engines.onnx import OnnxEngine

SIZE = (512, 512)
FORMS = ("fp32", "fp16", "w8", "w4")
FRUGAL = "fp16, expanded when used"  # the other way to run fp16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep the checkpoint and the graphs here")
    parser.add_argument("--check", action="store_true", help="exit with 1 if memory does not fall")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.step:
        print(step(chosen.folder, chosen.step))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            compare(chosen.folder or Path(temporary), chosen.check)


def compare(folder: Path, check: bool) -> None:
    folder.mkdir(exist_ok=True)
    for form in FORMS:
        if not (place(folder, form) / peer_workers.INTERFACE).exists():
            peer_workers.prepare(peer_workers.PEERS[f"onnx-{form}"], folder, SIZE, ("unet",))
    rows, peaks = [], {}
    for form in (*FORMS[:2], FRUGAL, *FORMS[2:]):
        found = measure.run(sys.executable, __file__, "--folder", str(folder), "--step", form)
        disk = sum(f.stat().st_size for f in place(folder, form).iterdir()) / 2**20
        peaks[form] = found.peak
        rows.append(
            f"| {form} | {disk:,.0f} | {found.peak:,.0f} | {found.anonymous:,.0f} "
            f"| {found.peak / peaks['fp32']:.2f}x | {float(found.stdout):.1f} |"
        )
    lines = [
        "# Fewer bits on onnxruntime: the memory of a U-Net",
        "",
        "`python benchmarks/onnx_few_bits.py --check`",
        "",
        f"{measure.describe()}.",
        "",
        "Stable Diffusion 1.5 shapes, random weights, one step at 512x512, arithmetic in fp32;",
        "peaks of the whole process, the interpreter among it.  The seconds are of a single run.",
        "",
        "| weights | on disk MiB | peak resident MiB | of it anonymous | to fp32 | step s |",
        "|---|---:|---:|---:|---:|---:|",
        *rows,
        "",
    ]
    (measure.RESULTS / "onnx_few_bits.md").write_text("\n".join(lines))
    print("\n".join(lines))
    falling = [peaks[form] for form in ("fp32", "w8", "w4")]
    if check and falling != sorted(falling, reverse=True):
        sys.exit("the peak does not fall with the bytes on disk")


def place(folder: Path, form: str) -> Path:
    return peer_workers.onnx_graph(folder, "unet", "fp16" if form == FRUGAL else form)


def step(folder: Path, form: str) -> float:
    """Run the U-Net once in this process; seconds."""
    weights = "fp16" if form == FRUGAL else form
    engine = OnnxEngine(
        peer_workers.onnx_bundle(folder, "unet", weights), "unet", 2, form == FRUGAL
    )
    inputs = peer_workers.inputs("unet", SIZE)
    began = time.perf_counter()
    found = engine(inputs)["out_sample"]
    assert np.isfinite(found).all()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
