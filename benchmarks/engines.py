"""Every network of Stable Diffusion 1.5 as TensorRT engines for three GPUs: what the builder says.

    python benchmarks/engines.py

Random weights, 512x512; no GPU is needed, and none is used.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from ferrotype.benchmarks.checkpoints import SD15, write_checkpoint
from ferrotype.benchmarks.measure import RESULTS, describe
from ferrotype.convert import modules, tensorrt
from ferrotype.convert.checkpoint import ConvertError, open_checkpoint

CAPABILITIES = ("8.6", "8.9", "12.0")
COMPONENTS = {
    "text_encoder": modules.text_encoder,
    "vae_decoder": modules.vae,
    "vae_encoder": modules.vae,
    "unet": modules.unet,
}
MIB = 2**20


def main() -> None:
    rows = [
        "| component | weights | GPU | build s | weights MiB | working MiB | engine MiB |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as place:
        checkpoint = open_checkpoint(write_checkpoint(Path(place) / "sd15", SD15))
        for name, load in COMPONENTS.items():
            module: Any = load(checkpoint)
            for weights in ("fp16", "w8"):
                rows += build(name, module, weights, Path(place) / f"{name}-{weights}")
            print("\n".join(rows), flush=True)
    text = f"""# TensorRT engines at full size

`python benchmarks/engines.py` on {describe()}.

Stable Diffusion 1.5, random weights, 512x512, batch 1, activations in fp16: every network, parsed
and compiled by tensorrt-rtx for three GPUs on a machine without one.  Seconds are single runs on
a shared machine; working memory is activations and scratch.  No engine was run.

"""
    (RESULTS / "engines.md").write_text(text + "\n".join(rows) + "\n")


def build(name: str, module: Any, weights: str, folder: Path) -> list[str]:
    """Export a component and build its engines: a row each, or the builder's reason."""
    tensorrt.export(name, module, {}, folder, (64, 64), weights, "fp16", 77)
    rows = []
    for capability in CAPABILITIES:
        start = time.perf_counter()
        try:
            made = tensorrt.build(folder / "model.onnx", capability, component=name)
        except ConvertError as error:
            rows.append(f"| {name} | {weights} | {capability} | refused: {error} | | | |")
            continue
        worked = (made.memory.activations + made.memory.scratch) / MIB
        rows.append(
            f"| {name} | {weights} | {capability} | {time.perf_counter() - start:.0f} "
            f"| {made.memory.weights / MIB:,.0f} | {worked:,.0f} | {made.bytes / MIB:,.0f} |"
        )
        (folder / made.file).unlink()
    return rows


if __name__ == "__main__":
    main()
