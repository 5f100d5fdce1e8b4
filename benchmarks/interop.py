"""Interoperability: Optimum opens our bundles and draws the pictures that we draw.

    python benchmarks/interop.py         # about 5 minutes, 2 GB of disk; writes results/interop.md

Optimum wants older packages than conversion does, so it gets a virtual environment of its own and
runs as another process; nothing of ferrotype is in it.  Both sides draw a prompt from a seed, and
the float pictures are compared.  The exit code is 1 if one is below its floor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ferrotype.benchmarks import measure
from ferrotype.benchmarks.checkpoints import EMOJI
from ferrotype.parity import psnr
from ferrotype.runtime.pipeline import EMBEDDED_ONNX, Pipeline

PINS = (
    "torch==2.13.0",
    "optimum==2.1.0",
    "optimum-onnx==0.1.0",
    "transformers==4.57.6",
    "huggingface_hub==0.36.2",
    "diffusers==0.39.0",
    "onnx",
    "onnxruntime",
)
FLOORS = {"fp32": 45.0, "fp16": 35.0}  # dB, by activations
FRESH = {  # label -> options of convert
    "fp32 weights": ("--weights", "fp32"),
    "fp16 weights and activations": ("--weights", "fp16", "--activations", "fp16"),
}
PROMPT = "a red apple on a sky blue background"
SEED = 7


@dataclass(frozen=True)
class Call:
    """What both sides are asked for; from an image with DDIM, else with the bundle's LCM."""

    guidance: float = 1.0
    size: tuple[int, int] = (128, 128)
    steps: int = 4
    strength: float | None = None  # of the change to the start image, if there is one
    io_binding: bool = False  # what Optimum does by default on CUDA


CALLS = {
    "guidance 1": Call(),
    "guidance 3, a batch of 2": Call(guidance=3.0),
    "guidance 1, 192x128": Call(size=(192, 128)),
    "guidance 3, 192x128": Call(guidance=3.0, size=(192, 128)),
    "from an image, DDIM": Call(steps=8, strength=0.5),
    "guidance 3, IO binding": Call(guidance=3.0, io_binding=True),
}

OPTIMUM = """
import json
import sys
from importlib.metadata import version

import diffusers
import numpy as np
import torch
from optimum.onnxruntime import ORTStableDiffusionImg2ImgPipeline, ORTStableDiffusionPipeline
from PIL import Image


def draw(bundle, prompt, seed, image, guidance, size, steps, strength, io_binding):
    kind = ORTStableDiffusionPipeline if strength is None else ORTStableDiffusionImg2ImgPipeline
    pipe = kind.from_pretrained(
        bundle, provider="CPUExecutionProvider", use_io_binding=io_binding, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    options = {"width": size[0], "height": size[1]}
    if strength is not None:
        config = pipe.scheduler.config
        ddim = diffusers.DDIMScheduler.from_config(config, timestep_spacing="trailing")
        pipe.scheduler = ddim
        options = {"image": Image.open(image), "strength": strength}
    return pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
        **options,
    ).images[0]


errors = {}
job = json.load(sys.stdin)
for out, call in job["calls"].items():
    try:
        np.save(out, draw(**call))
    except Exception as error:
        errors[out] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps({"errors": errors, "versions": {p: version(p) for p in job["packages"]}}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, help="make Optimum's environment here, and keep it")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=EMOJI,
        help="converted at other precisions; default: the embedded model's, beside the checkout",
    )
    chosen = parser.parse_args()
    if not chosen.checkpoint.is_dir():
        parser.error(f"no checkpoint in {chosen.checkpoint}: name one with --checkpoint")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = environment((chosen.env or folder / "env").absolute())
        bundles = {"emoji-onnx.ferro": EMBEDDED_ONNX, **convert(chosen.checkpoint, folder)}
        rows, versions, passed = compare(python, bundles, folder)
    report = "\n".join([*head(versions), *rows, ""])
    print(report)
    (measure.RESULTS / "interop.md").write_text(report)
    sys.exit(not passed)


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with the pinned packages."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "-qq", *PINS], check=True)
    return python


def convert(checkpoint: Path, folder: Path) -> dict[str, Path]:
    """A fresh bundle of every precision that is not the embedded one's."""
    bundles = {label: folder / f"{label.replace(' ', '-')}.ferro" for label in FRESH}
    for label, bundle in bundles.items():
        options = ("convert", str(checkpoint), "-o", str(bundle), *FRESH[label])
        measure.run(*measure.ferrotype(*options))
    return bundles


def compare(
    python: Path, bundles: dict[str, Path], folder: Path
) -> tuple[list[str], dict[str, str], bool]:
    """Draw on both sides: the lines of the table, Optimum's versions, and whether all is well."""
    image = folder / "start.png"
    Pipeline.load().generate("a penguin", seed=SEED).save(image)
    pictures = {
        (bundle, call): folder / f"{i}-{j}.npy"
        for i, bundle in enumerate(bundles)
        for j, call in enumerate(CALLS)
    }
    theirs = optimum(
        python,
        {
            str(out): {
                "bundle": str(bundles[bundle]),
                "prompt": PROMPT,
                "seed": SEED,
                "image": str(image),
                **asdict(CALLS[call]),
            }
            for (bundle, call), out in pictures.items()
        },
    )
    rows, passed = [], True
    for (bundle, call), out in pictures.items():
        pipe = Pipeline.load(bundles[bundle])
        floor = FLOORS[pipe.manifest.precision.activations]
        if error := theirs["errors"].get(str(out)):
            found, verdict = "", f"no: `{error}`"
        else:
            db = psnr(np.load(out), ours(pipe, CALLS[call], image), peak=1.0)
            found, verdict = f"{db:.1f}", "same picture" if db >= floor else "no: it differs"
        passed &= verdict == "same picture"
        rows.append(f"| {bundle} | {call} | {found} | {floor:.0f} | {verdict} |")
    return rows, theirs["versions"], passed


def optimum(python: Path, calls: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Draw with Optimum: the errors by picture, and the versions that it ran with."""
    packages = [pin.split("==")[0] for pin in PINS]
    run = subprocess.run(
        [python, "-W", "ignore", "-c", OPTIMUM],
        input=json.dumps({"calls": calls, "packages": packages}),
        stdout=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"},
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def ours(pipe: Pipeline, call: Call, image: Path) -> np.ndarray:
    """The same call of our own pipeline: (height, width, 3) in [0, 1]."""
    start: dict[str, Any] = {}
    if call.strength is not None:
        start = {"sampler": "ddim", "image": Image.open(image), "strength": call.strength}
    *_, last = pipe.steps(
        PROMPT, seed=SEED, steps=call.steps, guidance=call.guidance, size=call.size, **start
    )
    return pipe.decode_array(last.latents)


def head(versions: dict[str, str]) -> list[str]:
    theirs = ", ".join(f"{name} {number}" for name, number in versions.items())
    return [
        "# Optimum opens our bundles",
        "",
        f"`python benchmarks/interop.py` on {measure.describe('torch', 'diffusers')}.",
        "",
        f"Optimum in an environment of its own: {theirs}.",
        "",
        "PSNR between the float pictures of Optimum's pipelines and of ours, from the same bundle,",
        "prompt and seed; peak 1.  128x128 with 4 steps of LCM unless it says otherwise; from an",
        "image it is 8 steps of DDIM at strength 0.5.  IO binding, here on the CPU, is Optimum's",
        "default on CUDA.",
        "",
        "| bundle | call | PSNR dB | floor | verdict |",
        "|---|---|---:|---:|---|",
    ]


if __name__ == "__main__":
    main()
