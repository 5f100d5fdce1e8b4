"""The checkpoint's scheduler as a recipe, and the recipe as diffusers' scheduler."""

from __future__ import annotations

from typing import Any

from ..bundle import Recipe
from ..runtime.samplers import ETA
from .checkpoint import Checkpoint, CheckpointError

# diffusers' class -> our sampler, steps and guidance when the checkpoint says nothing better.
SAMPLER_OF = {
    "DDIMScheduler": ("ddim", 20, 7.5),
    "EulerDiscreteScheduler": ("euler", 20, 7.5),
    "EulerAncestralDiscreteScheduler": ("euler_a", 20, 7.5),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", 20, 7.5),
    "UniPCMultistepScheduler": ("unipc", 20, 7.5),
    "LCMScheduler": ("lcm", 4, 1.0),
    "TCDScheduler": ("tcd", 4, 1.0),
}
STAND_IN = ("dpmpp_2m", 20, 7.5)  # for a scheduler that we do not offer, said in a note
LCM_EMBEDDED_GUIDANCE = 8.0  # what LCM_Dreamshaper and its kin were distilled for
# Options of a scheduler that change the result and that a table of coefficients cannot express.
UNSUPPORTED = {
    "thresholding": False,
    "clip_sample": False,
    "trained_betas": None,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
}


def from_checkpoint(checkpoint: Checkpoint) -> tuple[Recipe, list[str]]:
    """The recipe that a checkpoint's scheduler configuration states, and notes on what differs.

    Raises CheckpointError for an option that no sampler table can express.
    """
    config = checkpoint.scheduler
    name = config.get("_class_name", "")
    sampler, steps, guidance = SAMPLER_OF.get(name, STAND_IN)
    notes = _notes(config, name, sampler)
    for option, neutral in UNSUPPORTED.items():
        if config.get(option, neutral) != neutral:
            raise CheckpointError(
                f"scheduler: {option} is {config[option]!r}, ferrotype samples only with "
                f"{neutral!r}; change it in scheduler_config.json if the model allows"
            )
    if sampler == "dpmpp_2m" and config.get("use_karras_sigmas"):
        sampler = "dpmpp_2m_karras"
    if sampler == "lcm" and checkpoint.configs["unet"].get("time_cond_proj_dim"):
        guidance = LCM_EMBEDDED_GUIDANCE
    consistency = sampler in ("lcm", "tcd")
    try:
        recipe = Recipe(
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            prediction_type=config.get("prediction_type", "epsilon"),
            spacing="lcm" if consistency else config.get("timestep_spacing", "leading"),
            train_steps=config.get("num_train_timesteps", 1000),
            beta_start=config.get("beta_start", 0.00085),
            beta_end=config.get("beta_end", 0.012),
            beta_schedule=config.get("beta_schedule", "scaled_linear"),
            zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
            steps_offset=config.get("steps_offset", 0),
            set_alpha_to_one=config.get("set_alpha_to_one", True),
            original_steps=config.get("original_inference_steps", 50),
            timestep_scaling=config.get("timestep_scaling", 10.0),
            eta=ETA.get(sampler, 0.0),
            zero_negative=checkpoint.family == "sdxl"
            and bool(checkpoint.model_index.get("force_zeros_for_empty_prompt", True)),
        )
    except ValueError as error:
        raise CheckpointError(f"scheduler_config.json: {error}") from None
    return recipe, notes


def _notes(config: dict[str, Any], name: str, sampler: str) -> list[str]:
    notes = []
    if name not in SAMPLER_OF:
        notes.append(f"{name or 'an unnamed scheduler'} is not offered: the recipe uses {sampler}")
    if config.get("solver_order", 2) != 2:
        notes.append(f"solver_order {config['solver_order']}: {sampler} is of order 2")
    if config.get("algorithm_type", "dpmsolver++") != "dpmsolver++":
        notes.append(f"algorithm_type {config['algorithm_type']}: {sampler} is dpmsolver++")
    return notes


def to_scheduler(recipe: Recipe) -> Any:
    """diffusers' scheduler for a recipe, its timesteps set: the independent side of a check."""
    import diffusers

    name = next(k for k, v in SAMPLER_OF.items() if v[0] == recipe.sampler.removesuffix("_karras"))
    options: dict[str, Any] = {
        "num_train_timesteps": recipe.train_steps,
        "beta_start": recipe.beta_start,
        "beta_end": recipe.beta_end,
        "beta_schedule": recipe.beta_schedule,
        "prediction_type": recipe.prediction_type,
        "rescale_betas_zero_snr": recipe.zero_terminal_snr,
        "steps_offset": recipe.steps_offset,
    }
    match recipe.sampler:
        case "ddim" | "lcm" | "tcd":
            options |= {"set_alpha_to_one": recipe.set_alpha_to_one, "clip_sample": False}
        case "dpmpp_2m_karras":
            options["use_karras_sigmas"] = True
    if recipe.spacing != "lcm":
        options["timestep_spacing"] = recipe.spacing
    if recipe.sampler == "lcm":
        options["timestep_scaling"] = recipe.timestep_scaling
    scheduler = getattr(diffusers, name)(**options)
    if recipe.spacing == "lcm":
        scheduler.set_timesteps(recipe.steps, original_inference_steps=recipe.original_steps)
    else:
        scheduler.set_timesteps(recipe.steps)
    return scheduler
