"""Full size: a random Stable Diffusion 1.5 checkpoint is converted and draws 512x512 in 4 steps.

    python benchmarks/sd15.py            # about 10 minutes, 10 GB of disk; writes results/sd15.md

Time and peak memory of each are measured from outside the process.  What each stage allocates, and
that no full attention score matrix is among it, shows benchmarks/stages.py.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ferrotype.benchmarks import measure
from ferrotype.benchmarks.checkpoints import SD15, write_checkpoint

PROMPT = "a lighthouse on a cliff at dawn"
VARIANTS = {  # label -> options of convert
    "fp16 weights": ("--weights", "fp16"),
    "fp32 weights": ("--weights", "fp32"),
    "fp16 weights and activations": ("--weights", "fp16", "--activations", "fp16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to keep the checkpoint and bundles")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="default: all")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        checkpoint = folder / "sd15-random"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, SD15)
        rows = [row(folder, checkpoint, v) for v in chosen.variant or VARIANTS]
    report = "\n".join([*HEAD, *rows, ""])
    print(report)
    (measure.RESULTS / "sd15.md").write_text(report)


def row(folder: Path, checkpoint: Path, label: str) -> str:
    """Convert and draw once; a line of the table."""
    bundle = folder / f"{label.replace(' ', '-')}.ferro"
    options = (str(checkpoint), "-o", str(bundle), *VARIANTS[label], "--force")
    made = measure.run(*measure.ferrotype("convert", *options))
    out = folder / "sd15.png"
    drawn = measure.run(
        *measure.ferrotype("generate", PROMPT, "-b", str(bundle), "-o", str(out), "--force")
    )
    size = sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file()) / 2**20
    return (
        f"| {label} | {size:,.0f} | {made.seconds:.0f} | {made.peak:,.0f} "
        f"| {drawn.seconds:.1f} | {drawn.peak:,.0f} | {drawn.anonymous:,.0f} |"
    )


HEAD = [
    "# Stable Diffusion 1.5, full size, random weights",
    "",
    f"`python benchmarks/sd15.py` on {measure.describe('torch', 'diffusers')}.",
    "",
    "Conversion includes the check: the original's and the bundle's 4 LCM steps at 512x512. A",
    "drawing is a fresh process: load, text encoder, 4 U-Net steps, VAE decoder, PNG.  Times are",
    "of one run on a shared machine; memory is what counts here.",
    "",
    "| bundle | disk MiB | convert s | convert peak MiB | draw s | draw peak MiB | anonymous MiB |",
    "|---|---:|---:|---:|---:|---:|---:|",
]

if __name__ == "__main__":
    main()
