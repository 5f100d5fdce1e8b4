"""Interoperability: Optimum and Ferrotype draw the same picture from each other's files.

    python benchmarks/interop.py         # about 8 minutes, 2 GB of disk; writes results/interop.md

Both ways: our bundles open in Optimum's pipelines, and folders that `optimum-cli` exports become
bundles.  Optimum wants older packages than conversion does, so it gets a virtual environment of its
own and runs as another process; nothing of ferrotype is in it.  Both sides, and diffusers with the
checkpoint, draw a prompt from a seed, and the float pictures are compared.  The exit code is 1 if
one is below its floor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ferrotype.benchmarks import measure
from ferrotype.benchmarks.checkpoints import EMOJI, TINY_XL, write_checkpoint
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
FORMS = {  # what a bundle is converted to -> options of convert
    "fp32": ("--weights", "fp32"),
    "fp16 weights": ("--weights", "fp16"),
    "fp16 throughout": ("--weights", "fp16", "--activations", "fp16"),
}
SD, XL = "Stable Diffusion 1", "SDXL"
EXPORTS = (  # of what Optimum exports to what, options of optimum-cli
    (SD, "fp32", ()),
    (SD, "fp16", ("--dtype", "fp16", "--device", "cpu")),
    (XL, "fp32", ()),
)
# Of diffusers' DDIM, what the configurations of other schedulers do not say; ours never clips.
DDIM = {"timestep_spacing": "trailing", "clip_sample": False}
PROMPT = "a red apple on a sky blue background"
SEED = 7


@dataclass(frozen=True)
class Call:
    """What all sides are asked for; from an image with DDIM, else with the model's sampler."""

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


@dataclass(frozen=True)
class Pair:
    """What Optimum opens, the bundle that we open, and the checkpoint that both were made of."""

    label: str
    theirs: Path
    bundle: Path
    checkpoint: Path


OPTIMUM = """
import json
import sys
from importlib.metadata import version

import diffusers
import numpy as np
import torch
from optimum.onnxruntime import ORTPipelineForImage2Image, ORTPipelineForText2Image
from PIL import Image


def draw(folder, prompt, seed, image, ddim, guidance, size, steps, strength, io_binding):
    kind = ORTPipelineForText2Image if strength is None else ORTPipelineForImage2Image
    pipe = kind.from_pretrained(
        folder, provider="CPUExecutionProvider", use_io_binding=io_binding, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    options = {"width": size[0], "height": size[1]}
    if strength is not None:
        config = pipe.scheduler.config
        pipe.scheduler = diffusers.DDIMScheduler.from_config(config, **ddim)
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
        help="of Stable Diffusion 1; default: the embedded model's, beside the checkout",
    )
    chosen = parser.parse_args()
    if not chosen.checkpoint.is_dir():
        parser.error(f"no checkpoint in {chosen.checkpoint}: name one with --checkpoint")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = environment((chosen.env or folder / "env").absolute())
        checkpoints = {SD: chosen.checkpoint.absolute(), XL: random_xl(folder / "xl")}
        given = [Pair("emoji-onnx.ferro", EMBEDDED_ONNX, EMBEDDED_ONNX, EMOJI)]
        pairs = [*given, *converted(checkpoints, folder)]
        ours, versions, passed = compare(python, pairs, folder / "ours")
        theirs, _, same = compare(python, exported(python, checkpoints, folder), folder / "theirs")
    report = "\n".join([*head(versions), *ours, *MIDDLE, *theirs, ""])
    print(report)
    (measure.RESULTS / "interop.md").write_text(report)
    sys.exit(not (passed and same))


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with the pinned packages."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "-qq", *PINS], check=True)
    return python


def random_xl(folder: Path) -> Path:
    """A tiny random SDXL, in fp32."""
    import torch

    return write_checkpoint(folder, TINY_XL, torch.float32)


def converted(checkpoints: dict[str, Path], folder: Path) -> list[Pair]:
    """A fresh bundle of every checkpoint at every precision, which Optimum opens as it is."""
    pairs: list[Pair] = []
    for name, checkpoint in checkpoints.items():
        for form, options in FORMS.items():
            bundle = folder / f"ours-{len(pairs)}.ferro"
            run = ("convert", str(checkpoint), "-o", str(bundle), *options)
            measure.run(*measure.ferrotype(*run))
            pairs.append(Pair(f"{name}, {form}", bundle, bundle, checkpoint))
    return pairs


def exported(python: Path, checkpoints: dict[str, Path], folder: Path) -> list[Pair]:
    """What `optimum-cli` exports of every checkpoint, and the bundles made of it.

    One that was compared with the original; one that was not, which Optimum opens in turn.
    """
    pairs: list[Pair] = []
    for name, form, options in EXPORTS:
        checkpoint, out = checkpoints[name], folder / f"export-{len(pairs)}"
        export(python, checkpoint, out, options)
        for label, more in ("compared", ("--original", str(checkpoint))), ("not compared", ()):
            bundle = out.with_suffix(f".{len(pairs)}.ferro")
            measure.run(*measure.ferrotype("convert", str(out), "-o", str(bundle), *more))
            pairs.append(Pair(f"{name}, {form}, {label}", out, bundle, checkpoint))
        pairs.append(Pair(f"{name}, {form}, and back", bundle, bundle, checkpoint))
    return pairs


def export(python: Path, checkpoint: Path, out: Path, options: tuple[str, ...]) -> None:
    """Optimum's export; its own check ends with an error for any fp16, after all was written."""
    command = python.parent / "optimum-cli"
    task = ("--task", "text-to-image", "--model", str(checkpoint))
    done = subprocess.run(
        [command, "export", "onnx", *task, *options, out],
        env=OFFLINE,
        capture_output=True,
        text=True,
    )
    if done.returncode and SAVED not in done.stderr:
        sys.exit(f"optimum-cli failed:\n{done.stderr[-2000:]}")


SAVED = "An error occurred during validation, but the model was saved nonetheless"
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"}


def compare(
    python: Path, pairs: list[Pair], folder: Path
) -> tuple[list[str], dict[str, str], bool]:
    """Draw on all sides: the lines of the table, Optimum's versions, and whether all is well."""
    folder.mkdir()
    image = folder / "start.png"
    Pipeline.load().generate("a penguin", seed=SEED).save(image)
    places = {
        (i, c): folder / f"{i}-{j}.npy" for i in range(len(pairs)) for j, c in enumerate(CALLS)
    }
    theirs = optimum(
        python,
        {
            str(out): {
                "folder": str(pairs[i].theirs),
                "prompt": PROMPT,
                "seed": SEED,
                "image": str(image),
                "ddim": DDIM,
                **asdict(CALLS[name]),
            }
            for (i, name), out in places.items()
        },
    )
    rows, passed = [], True
    for (i, name), out in places.items():
        pipe, call = Pipeline.load(pairs[i].bundle), CALLS[name]
        floor = FLOORS[pipe.manifest.precision.activations]
        if error := theirs["errors"].get(str(out)):
            found, verdict = ["", ""], f"no: `{error}`"
        else:
            picture = np.load(out)
            sides = ours(pipe, call, image), original(pairs[i].checkpoint, call, image)
            decibels = [psnr(picture, side, peak=1.0) for side in sides]
            found = [f"{db:.1f}" for db in decibels]
            verdict = "same picture" if min(decibels) >= floor else "no: it differs"
        passed &= verdict == "same picture"
        rows.append(
            f"| {pairs[i].label} | {name} | {' | '.join(found)} | {floor:.0f} | {verdict} |"
        )
    return rows, theirs["versions"], passed


def optimum(python: Path, calls: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Draw with Optimum: the errors by picture, and the versions that it ran with."""
    packages = [pin.split("==")[0] for pin in PINS]
    run = subprocess.run(
        [python, "-W", "ignore", "-c", OPTIMUM],
        input=json.dumps({"calls": calls, "packages": packages}),
        stdout=subprocess.PIPE,
        env=OFFLINE,
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


def original(checkpoint: Path, call: Call, image: Path) -> np.ndarray:
    """The same call of diffusers' own pipeline, of this environment, in fp32."""
    import diffusers
    import torch

    kinds = diffusers.AutoPipelineForText2Image, diffusers.AutoPipelineForImage2Image
    options: dict[str, Any] = {"width": call.size[0], "height": call.size[1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = kinds[call.strength is not None].from_pretrained(
            checkpoint, torch_dtype=torch.float32, local_files_only=True
        )
        pipe.set_progress_bar_config(disable=True)
        if call.strength is not None:
            config = pipe.scheduler.config
            ddim = diffusers.DDIMScheduler.from_config(config, **DDIM)
            pipe.scheduler = ddim
            options = {"image": Image.open(image), "strength": call.strength}
        return pipe(
            PROMPT,
            num_inference_steps=call.steps,
            guidance_scale=call.guidance,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type="np",
            **options,
        ).images[0]


COLUMNS = (
    "| call | to ours, dB | to diffusers, dB | floor | verdict |",
    "|---|---|---:|---:|---:|---|",
)
MIDDLE = [
    "",
    "## Optimum's folders become our bundles",
    "",
    "`optimum-cli export onnx`, then `ferrotype convert FOLDER`, with `--original CHECKPOINT`",
    "where it says compared.  Optimum draws from its own folder, we from the bundle; *and back* is",
    "Optimum with the bundle made of its folder.",
    "",
    f"| export {COLUMNS[0]}",
    COLUMNS[1],
]


def head(versions: dict[str, str]) -> list[str]:
    theirs = ", ".join(f"{name} {number}" for name, number in versions.items())
    return [
        "# Optimum and Ferrotype draw the same pictures",
        "",
        f"`python benchmarks/interop.py` on {measure.describe('torch', 'diffusers')}.",
        "",
        f"Optimum in an environment of its own: {theirs}.",
        "",
        "PSNR between the float pictures of Optimum's pipelines and ours, and diffusers' with the",
        "checkpoint in fp32, from the same prompt and seed; peak 1.  Stable Diffusion 1 is the",
        "trained model of the embedded bundle, SDXL a tiny random one.  128x128 with 4 steps of",
        "the model's own sampler unless it says otherwise; from an image it is 8 steps of DDIM at",
        "strength 0.5.  IO binding, here on the CPU, is Optimum's default on CUDA.",
        "",
        "## Our bundles open in Optimum's pipelines",
        "",
        f"| bundle {COLUMNS[0]}",
        COLUMNS[1],
    ]


if __name__ == "__main__":
    main()
