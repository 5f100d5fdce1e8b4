"""The checkpoint's scheduler as a recipe, and the recipe as diffusers' scheduler."""

from __future__ import annotations

from typing import Any

from ..bundle import Recipe
from ..runtime import recipes
from ..runtime.samplers import ETA
from .checkpoint import Checkpoint, CheckpointError, OptionError

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
# What shows in a checkpoint which family it is of: class and spacing of its scheduler, whether it
# is of SDXL; those of 512 pixels, as the originals are.  The first row that fits is taken.
SHOWN = (
    ("LCMScheduler", None, None, None, "lcm-lora"),
    ("TCDScheduler", None, None, None, "tcd"),
    ("EulerAncestralDiscreteScheduler", "trailing", "sdxl", 64, "sdxl-turbo"),
    ("EulerDiscreteScheduler", "trailing", "sd2", 64, "sd-turbo"),
)


def from_checkpoint(checkpoint: Checkpoint, name: str | None = None) -> tuple[Recipe, list[str]]:
    """The recipe that a checkpoint's scheduler configuration states, and notes on what differs.

    `name` is one of runtime.recipes.NAMES, None what the checkpoint shows.  Raises OptionError for
    a recipe that such a checkpoint has not, CheckpointError for an option of the scheduler that no
    sampler table can express.
    """
    recipe, notes = _of_scheduler(checkpoint)
    shown = _shown(checkpoint)
    xl = None if checkpoint.family == "sd" else checkpoint.family == "sdxl"
    try:
        made = recipes.apply(name or shown, recipe, _embeds_guidance(checkpoint), xl)
    except ValueError as error:
        raise OptionError(str(error)) from None
    if name is not None:
        return made, [] if made.allowed_steps else notes
    if made.allowed_steps:
        title = recipes.FAMILIES[shown].title
        return made, [f"taken for {title} by its scheduler or U-Net; if it is not, --recipe base"]
    if (recipe.sampler, recipe.spacing) == ("euler", "trailing"):
        notes.append("Euler with trailing timesteps: if it draws in few steps, give its --recipe")
    return made, notes


def _shown(checkpoint: Checkpoint) -> str:
    """The family that a checkpoint shows itself to be of."""
    if _embeds_guidance(checkpoint):
        return recipes.LCM
    config = checkpoint.scheduler
    found = (
        config.get("_class_name"),
        config.get("timestep_spacing", "leading"),
        checkpoint.family,
        checkpoint.configs["unet"].get("sample_size"),
    )
    for *wanted, name in SHOWN:
        if all(w in (None, f) for w, f in zip(wanted, found, strict=True)):
            return name if config.get("prediction_type", "epsilon") == "epsilon" else recipes.BASE
    return recipes.BASE


def _embeds_guidance(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.configs["unet"].get("time_cond_proj_dim"))


def _of_scheduler(checkpoint: Checkpoint) -> tuple[Recipe, list[str]]:
    """A recipe without a family."""
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
    if _embeds_guidance(checkpoint):
        guidance = recipes.FAMILIES[recipes.LCM].guidance
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
    if recipe.sampler in ("lcm", "tcd"):  # told at the next step instead, TCD takes no lattice
        options["original_inference_steps"] = recipe.original_steps
    if recipe.sampler == "lcm":
        options["timestep_scaling"] = recipe.timestep_scaling
    scheduler = getattr(diffusers, name)(**options)
    if recipe.timesteps:
        scheduler.set_timesteps(timesteps=[int(t) for t in recipe.timesteps])
    else:
        scheduler.set_timesteps(recipe.steps)
    return scheduler
