"""The checkpoints, in the diffusers layout and fp16.

    python models/emoji/export.py WORK

WORK/emoji-sd         the few-step model: LCM U-Net, text encoder, VAE, tokenizer, LCMScheduler
WORK/emoji-sd-base    the undistilled U-Net and its scheduler (DPM-Solver++, for 20 guided steps);
                      the other parts are emoji-sd's
WORK/emoji-sd-tiny    the tiny autoencoder (AutoencoderTiny)

Each is written beside its place and then moved there.  They can be made while training still goes
on: what is exported are the averaged weights of each stage's last save.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from ferrotype.models.emoji import tokenizer as tokenizers
from ferrotype.models.emoji.config import Recipe, stage
from ferrotype.models.emoji.distillation import GRID
from ferrotype.models.emoji.latents import Latents
from ferrotype.models.emoji.networks import (
    BETAS,
    STEPS,
    load_weights,
    make_text_encoder,
    make_tiny_vae,
    make_unet,
    make_vae,
)

SCHEDULE = {
    "num_train_timesteps": STEPS,
    "beta_start": BETAS[0],
    "beta_end": BETAS[1],
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
}
MEGABYTE = 1_000_000


def lcm_scheduler() -> LCMScheduler:
    return LCMScheduler(
        **SCHEDULE, original_inference_steps=GRID, clip_sample=False, set_alpha_to_one=True
    )


def base_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing"
    )


def trained_unet(work: Path, recipe: Recipe, stage: str) -> torch.nn.Module:
    """The U-Net as a stage saved it last, fp16."""
    unet = make_unet(recipe)
    load_weights(work, stage, unet=unet)
    return unet.half()


def few_step_pipeline(work: Path, recipe: Recipe) -> StableDiffusionPipeline:
    """The pipeline of what the stages saved last, fp16."""
    vae, text_encoder = make_vae(recipe), make_text_encoder(recipe)
    load_weights(work, "vae", vae=vae)
    load_weights(work, "diffusion", text_encoder=text_encoder)
    vae.register_to_config(scaling_factor=Latents.load(work).scale)
    return StableDiffusionPipeline(
        unet=trained_unet(work, recipe, "distillation"),
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizers.load(work),
        scheduler=lcm_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path, tokenizer: Path) -> None:
    """Write the checkpoint as Stable Diffusion 1.x's are, whatever the version of transformers."""
    pipe.save_pretrained(folder, safe_serialization=True)
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)  # transformers 5 leaves out the start of the names
    start = "text_model."
    weights = {k if k.startswith(start) else start + k: v for k, v in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})
    path = folder / "text_encoder" / "config.json"
    # As the other parts are loaded when nothing is asked for; older and newer names of the field.
    config = json.loads(path.read_text()) | {"torch_dtype": "float32", "dtype": "float32"}
    path.write_text(json.dumps(config, indent=2))


def save_base(work: Path, recipe: Recipe, folder: Path) -> None:
    """Write the undistilled U-Net and its scheduler."""
    trained_unet(work, recipe, "diffusion").save_pretrained(folder / "unet")
    base_scheduler().save_pretrained(folder / "scheduler")


def replaced(folder: Path, write) -> None:
    """Let `write` fill a new folder, then put that in the place of the old one."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def weights_size(folder: Path) -> int:
    """Bytes of the weights in a checkpoint."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def main(work: Path, recipe: Recipe) -> None:
    tiny = make_tiny_vae()
    load_weights(work, "tiny_vae", vae=tiny)
    few = few_step_pipeline(work, recipe)
    made = {
        "emoji-sd": lambda folder: save_pipeline(few, folder, work / "tokenizer"),
        "emoji-sd-base": lambda folder: save_base(work, recipe, folder),
        "emoji-sd-tiny": lambda folder: tiny.half().save_pretrained(folder),
    }
    for name, write in made.items():
        replaced(work / name, write)
        print(f"{work / name}: {weights_size(work / name) / MEGABYTE:.1f} MB of weights")


if __name__ == "__main__":
    main(*stage())
