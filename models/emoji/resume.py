"""WORK as it was when the checkpoints beside this folder were made, to train them on.

    python models/emoji/data.py WORK
    python models/emoji/resume.py WORK

Takes the tokenizer and the weights from `emoji-sd`, `emoji-sd-base` and `emoji-sd-tiny` and how far
each stage had come from benchmarks/results/emoji.md; then `run.py WORK` goes on from there, with
more steps in WORK/recipe.json.  What a checkpoint does not keep, the optimizer's averages and the
random numbers drawn, begins anew.  Nothing that is in WORK already is replaced.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from ferrotype.models.emoji import latents
from ferrotype.models.emoji.config import Recipe, stage
from ferrotype.models.emoji.networks import (
    make_text_encoder,
    make_tiny_vae,
    make_unet,
    make_vae,
)
from ferrotype.models.emoji.training import Optimizer, Progress, save_state

CHECKPOINTS = Path(__file__).parent.parent
RESULTS = CHECKPOINTS.parent / "benchmarks" / "results" / "emoji.md"
ROW = r"^\| {} \| ([\d,]+) \| [\d,]+ \| ([\d.]+) \| (.*) \|$"


def told(name: str, results: str) -> Progress:
    """What the table of stages says of one."""
    found = re.search(ROW.format(name), results, re.MULTILINE)
    if not found:
        raise SystemExit(f"{RESULTS} has no row of the stage {name}")
    steps, hours, figures = found.groups()
    means = dict(figure.split(" ") for figure in figures.split(", "))
    return Progress(
        int(steps.replace(",", "")),
        3600 * float(hours),
        {key: float(value) for key, value in means.items()},
    )


def filled(module: torch.nn.Module, folder: str) -> torch.nn.Module:
    """The module with a checkpoint's weights."""
    (path,) = (CHECKPOINTS / folder).glob("*.safetensors")
    ours, weights = module.state_dict(), load_file(path)
    bare = {key.removeprefix("text_model."): value for key, value in weights.items()}
    module.load_state_dict(weights if weights.keys() == ours.keys() else bare)
    return module


def main(work: Path, recipe: Recipe) -> None:
    if not (work / "tokenizer").exists():
        shutil.copytree(CHECKPOINTS / "emoji-sd" / "tokenizer", work / "tokenizer")
    trained = {
        "vae": {"vae": filled(make_vae(recipe), "emoji-sd/vae")},
        "diffusion": {
            "unet": filled(make_unet(recipe), "emoji-sd-base/unet"),
            "text_encoder": filled(make_text_encoder(recipe), "emoji-sd/text_encoder"),
        },
        "distillation": {"unet": filled(make_unet(recipe), "emoji-sd/unet")},
        "tiny_vae": {"vae": filled(make_tiny_vae(), "emoji-sd-tiny")},
    }
    for name, modules in trained.items():
        if (work / f"{name}.state").exists():
            continue
        done = told(name, RESULTS.read_text())
        optimizer = Optimizer(modules, getattr(recipe, name))
        optimizer.step_number = done.steps
        rng = torch.Generator().manual_seed(done.steps)
        save_state(work, name, optimizer, rng, done)
        print(f"{name} as it was after {done.steps:,} steps")
    config = json.loads((CHECKPOINTS / "emoji-sd" / "vae" / "config.json").read_text())
    latents.main(work, recipe, config["scaling_factor"])


if __name__ == "__main__":
    main(*stage())
