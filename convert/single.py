"""A checkpoint in one file: what it is, told by its tensors, and where each of diffusers' lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle import TEXT_ENCODERS
from ..runtime import models
from ..runtime.program import GraphError, Packed
from . import families, names
from .errors import CheckpointError
from .gguf import MAGIC, open_gguf
from .pickles import NEXT_MOVE, open_pickle
from .storage import Stored, open_safetensors

MAX_NAME = 512
PARTS = (  # component, what its names begin with, how they are built
    ("unet", "model.diffusion_model.", "unet"),
    ("vae", "first_stage_model.", "vae"),
    ("vae", "vae.", "vae"),  # of stable-diffusion.cpp
    ("text_encoder", "cond_stage_model.transformer.", "clip"),
    ("text_encoder", "cond_stage_model.model.", "open_clip"),
    ("text_encoder", "conditioner.embedders.0.transformer.", "clip"),
    ("text_encoder_2", "conditioner.embedders.1.model.", "open_clip"),
    ("text_encoder_2", "cond_stage_model.1.transformer.", "clip"),  # of stable-diffusion.cpp
)
# What files of other kinds hold: a piece of a name, and what it tells.  The first that fits counts.
OTHERS = (
    (".lora_down.", "a LoRA: it changes a checkpoint and is none"),
    (".lora_A.", "a LoRA: it changes a checkpoint and is none"),
    (".hada_w1_a", "a LoHa: it changes a checkpoint and is none"),
    (".lokr_w1", "a LoKr: it changes a checkpoint and is none"),
    ("control_model.", "a ControlNet"),
    ("controlnet_cond_embedding.", "a ControlNet"),
    ("motion_modules.", "AnimateDiff"),
    ("conditioner.embedders.0.model.", "SDXL's refiner"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "FLUX"),
    ("single_transformer_blocks.", "FLUX"),
    ("clip_txt_mapper.", "Stable Cascade"),
    ("edm_mean", "Playground 2.5, which was trained with another noise"),
    ("edm_vpred.", "a model that was trained with EDM's noise"),
    ("label_emb.weight", "an upscaler, which reads a noise level"),
)
INPUTS = {  # channels that a U-Net reads -> what it is then
    5: "a depth model",
    7: "an upscaler",
    8: "a model that edits by instruction",
    9: "an inpainting model",
}
IGNORED = (  # what whole files hold beside weights that are used
    "model_ema.", "denoiser.", "loss.", "alphas_cumprod", "betas", "sqrt_", "log_one_minus_",
    "embedding_manager.", "posterior_", "lvlb_weights", "logvar", "scale_factor", "global_step",
    *families.MARKS,
)  # fmt: skip
IGNORED_INSIDE = ("loss.", "model_ema.")  # of a component, likewise
IGNORED_ENDS = ("position_ids", "logit_scale", "attn_mask", "text_projection.bias")
SUPPORTED = "supported are Stable Diffusion 1.x, 2.x and SDXL base, and models of their shape"
FAMILY_OF = {768: "sd1", 1024: "sd2"}  # by the width of the text encoder's output
VAE_PARTS = ("vae_decoder", "vae_encoder")


@dataclass
class Single:
    """What was found in a file; its tensors by component and diffusers' name."""

    family: str  # sd1 | sd2 | sd | sdxl
    configs: dict[str, dict[str, Any]]
    stored: dict[str, dict[str, Stored]]
    scheduler: dict[str, Any]
    pads: dict[str, str]  # by tokenizer: what OpenAI's and OpenCLIP's fill up with
    notes: list[str] = field(default_factory=list)


def open_file(path: Path) -> dict[str, Stored]:
    """The tensors of a file of any kind, told by its first bytes; CheckpointError if by none."""
    with path.open("rb") as file:
        head = file.read(262)
    if not head:
        raise CheckpointError(f"{path} is empty; fetch it again")
    if head.startswith(MAGIC):
        found = open_gguf(path)
    elif head.startswith(b"PK\x03\x04"):
        found = open_pickle(path)
    elif head[8:9] == b"{":  # before it the header's length, which may begin like a pickle
        found = open_safetensors(path)
    elif head.startswith(b"\x80") or head[257:] == b"ustar":
        raise CheckpointError(
            f"{path} was saved by torch before 1.6 or is a bare pickle, which can run code when "
            f"read; {NEXT_MOVE}"
        )
    elif path.suffix == ".safetensors":
        found = open_safetensors(path)
    else:
        raise CheckpointError(
            f"{path} is neither safetensors nor GGUF nor a zipped checkpoint of torch; it begins "
            f"with {head[:8]!r}"
        )
    for name in found:
        if len(name) > MAX_NAME:
            raise CheckpointError(f"{path}: a name of {len(name):,} characters")
        if not name.isprintable():
            raise CheckpointError(f"{path}: the name {name!r} cannot be printed")
    return found


def read_single(path: Path, prediction: str | None) -> Single:
    """Recognise a checkpoint by its tensors; raises CheckpointError that says what it saw."""
    found = open_file(path)
    if not found:
        raise CheckpointError(f"{path} holds no tensors")
    try:
        return _recognise(found, prediction)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_vae(paths: Sequence[Path], scaling: float) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The config and the tensors of an autoencoder in a file, or of TAESD's two in theirs."""
    found: dict[str, Stored] = {}
    for path in paths:
        for name, stored in _taesd_names(open_file(path)).items():
            if name in found:
                raise CheckpointError(f"{path}: {name} was in {found[name].path} already")
            found[name] = stored
    try:
        return _read_vae(found, scaling)
    except CheckpointError as error:
        raise CheckpointError(f"{', '.join(map(str, paths))}: {error}") from None


# --- recognising --------------------------------------------------------------------------------


def _recognise(found: Mapping[str, Stored], prediction: str | None) -> Single:
    _refuse_others(found)
    parts, left = _split(found)
    configs: dict[str, dict[str, Any]] = {}
    stored: dict[str, dict[str, Stored]] = {}
    pads = {}
    for component, (kind, tensors) in parts.items():
        shapes = {name: s.shape for name, s in tensors.items()}
        config, table = READERS[kind](shapes, component == "text_encoder_2")
        configs[component] = config
        stored[component], more = _renamed(tensors, table, kind)
        left += [f"{component}: {name}" for name in more if not _is_unused(config, kind, name)]
        if component in TEXT_ENCODERS:
            is_open = kind == "open_clip" or config["hidden_act"] == "gelu"
            pads[TEXT_ENCODERS[component]] = "!" if is_open else "<|endoftext|>"
    family = _family(configs)
    if left:
        raise CheckpointError(
            f"{len(left)} tensors belong to no part of {_NAMES[family]} ({', '.join(left[:5])}); "
            "are two models mixed in it?"
        )
    for component, tensors in stored.items():
        _check_complete(component, configs[component], tensors)
    notes = []
    chosen = prediction or _prediction(found, family)
    if prediction is None and family in families.ASSUMED:
        notes.append(
            f"prediction_type {chosen} is assumed: no file of 2.x tells; give --prediction epsilon "
            "for 2.0-base, 2.1-base and SD-Turbo"
        )
    if any(name.startswith("model_ema.") for name in found):
        notes.append("the averaged weights (model_ema) are left out, as in most other tools")
    configs["unet"]["sample_size"] = families.SIDE.get(
        family, families.SIDE.get(chosen, families.USUAL_SIDE)
    )
    configs["vae"]["scaling_factor"] = families.SCALING.get(family, families.USUAL_SCALING)
    configs["vae"]["sample_size"] = configs["unet"]["sample_size"] * 8
    consistency = "time_cond_proj_dim" in configs["unet"]
    scheduler = families.scheduler(family, chosen, "ztsnr" in found, consistency)
    return Single(family, configs, stored, scheduler, pads, notes)


def _refuse_others(found: Mapping[str, Stored]) -> None:
    """By name, whatever is known to be something else."""
    for piece, what in OTHERS:
        if any(piece in name for name in found):
            if "refiner" in what and any("conditioner.embedders.1." in name for name in found):
                continue
            raise CheckpointError(f"this is {what}, which is not supported; {SUPPORTED}")
    first = found.get("model.diffusion_model.input_blocks.0.0.weight")
    if first is not None and len(first.shape) == 4 and first.shape[1] in INPUTS:
        raise CheckpointError(
            f"this is {INPUTS[first.shape[1]]} (its U-Net reads {first.shape[1]} channels), which "
            "is not supported; only text-to-image U-Nets with 4 are"
        )


def _split(
    found: Mapping[str, Stored],
) -> tuple[dict[str, tuple[str, dict[str, Stored]]], list[str]]:
    """The components, each with how its names are built, and what is in none."""
    parts: dict[str, tuple[str, dict[str, Stored]]] = {}
    taken: set[str] = set()
    for component, prefix, kind in PARTS:
        inside = {n.removeprefix(prefix): s for n, s in found.items() if n.startswith(prefix)}
        if inside and component in parts:
            raise CheckpointError(
                f"{component} is in it twice, the second time as {prefix}*: two models are mixed"
            )
        if inside:
            parts[component] = kind, inside
            taken.update(prefix + name for name in inside)
    for component in ("unet", "text_encoder", "vae"):
        if component not in parts:
            raise CheckpointError(f"it has no {component}: {_seen(found)}; {SUPPORTED}")
    ordered = {n: parts[n] for n in (*TEXT_ENCODERS, "unet", "vae") if n in parts}
    left = [n for n in found if n not in taken and not n.startswith(IGNORED)]
    return ordered, [n for n in left if not n.endswith(IGNORED_ENDS)]


def _seen(found: Mapping[str, Stored]) -> str:
    """What names begin with, the most frequent first."""
    kinds = Counter(".".join(name.split(".")[:2]) for name in found)
    told = ", ".join(f"{kind}.* ({count:,})" for kind, count in kinds.most_common(5))
    return f"of {len(found):,} tensors it saw {told}"


_NAMES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sd": "Stable Diffusion"}
_NAMES["sdxl"] = "SDXL"


def _family(configs: Mapping[str, dict[str, Any]]) -> str:
    """By the text encoders, whose widths the U-Net has to read; completes its config."""
    unet = configs["unet"]
    widths = [configs[name]["hidden_size"] for name in TEXT_ENCODERS if name in configs]
    if unet["cross_attention_dim"] != sum(widths):
        raise CheckpointError(
            f"the U-Net reads text of {unet['cross_attention_dim']:,} channels, the text encoders "
            f"give {' + '.join(f'{w:,}' for w in widths)}: two models are mixed"
        )
    added = "addition_embed_type" in unet
    if len(widths) == 2 and added:
        families.add_pooled(unet, configs["text_encoder_2"]["projection_dim"])
        return "sdxl"
    if added:
        raise CheckpointError(
            "the U-Net reads a pooled text, and there is one text encoder: that is unCLIP or the "
            "refiner, which are not supported"
        )
    if len(widths) == 2:
        raise CheckpointError(
            "it has SDXL's two text encoders and another model's U-Net: two models are mixed"
        )
    return FAMILY_OF.get(widths[0], "sd")


def _prediction(found: Mapping[str, Stored], family: str) -> str:
    if "v_pred" in found:
        return "v_prediction"
    return families.ASSUMED.get(family, "epsilon")


# --- tensors ------------------------------------------------------------------------------------

Reader = Callable[[families.Shapes, bool], tuple[dict[str, Any], names.Table]]


def _read_unet(shapes: families.Shapes, _: bool) -> tuple[dict[str, Any], names.Table]:
    config = families.unet(shapes)
    return config, names.unet(config)


def _read_ldm_vae(shapes: families.Shapes, _: bool) -> tuple[dict[str, Any], names.Table]:
    config = families.vae(shapes)
    return config, names.vae(config)


def _read_clip(shapes: families.Shapes, second: bool) -> tuple[dict[str, Any], names.Table]:
    return families.clip(shapes, second), names.CLIP | (names.SECOND_CLIP if second else {})


def _read_open_clip(shapes: families.Shapes, second: bool) -> tuple[dict[str, Any], names.Table]:
    config = families.open_clip(shapes, second)
    table = names.open_clip(config["num_hidden_layers"])
    if not second:
        del table["text_projection"]
    return config, table


READERS: dict[str, Reader] = {
    "unet": _read_unet,
    "vae": _read_ldm_vae,
    "clip": _read_clip,
    "open_clip": _read_open_clip,
}


def _renamed(
    tensors: Mapping[str, Stored], table: names.Table, kind: str
) -> tuple[dict[str, Stored], list[str]]:
    """The tensors by diffusers' names, cut and turned as those want it; and what has none."""
    found: dict[str, Stored] = {}
    left = []
    for name, stored in tensors.items():
        new = names.rename(table, name)
        if new is None:
            left.append(name)
            continue
        for target, place in names.parts(new):
            if target in found:
                raise CheckpointError(f"{target} is in it twice, once as {name}")
            found[target] = _fitted(stored, name, target, place, kind)
    return found, left


def _fitted(stored: Stored, name: str, target: str, place: int | None, kind: str) -> Stored:
    if not stored.is_float and not name.endswith(IGNORED_ENDS):
        raise CheckpointError(f"{name} is {stored.dtype}; weights must be floats")
    if place is not None:
        count, rest = divmod((stored.shape or (0,))[0], len(names.FUSED))
        if rest:
            raise CheckpointError(f"{name} is {stored.shape}: its rows are no three parts")
        return stored.rows(place * count, (place + 1) * count)
    if target == names.TRANSPOSED and len(stored.shape) == 2:
        return stored.transposed()
    if kind == "vae" and ".attentions." in target and stored.shape[2:] == (1, 1):
        return stored.as_matrix()
    return stored


def _is_unused(config: Mapping[str, Any], kind: str, name: str) -> bool:
    """Whether a tensor of a component is one that nobody reads."""
    if name.endswith(IGNORED_ENDS) or name.startswith(IGNORED_INSIDE):
        return True
    if kind != "open_clip":
        return False
    last = f"transformer.resblocks.{config['num_hidden_layers']}."
    return name.startswith(last) or name == "text_projection"


def _check_complete(component: str, config: dict[str, Any], stored: Mapping[str, Stored]) -> None:
    """Every tensor that the networks read is there in its shape, and no other."""
    try:
        requests = [
            request
            for part in (VAE_PARTS if component == "vae" else (component,))
            for request in models.weights(part, config)
        ]
    except GraphError as error:
        raise CheckpointError(str(error)) from None
    expected = {source for request in requests for source in request.sources}
    missing = sorted(expected - stored.keys())
    extra = sorted(n for n in stored.keys() - expected if not n.endswith(IGNORED_ENDS))
    for problem, those in (("missing", missing), ("read by no layer", extra)):
        if those:
            raise CheckpointError(
                f"{component}: {len(those)} tensors are {problem} ({', '.join(those[:5])}); the "
                "checkpoint is incomplete or mixed"
            )
    for request in requests:
        _check_shape(component, request, [stored[name].shape for name in request.sources])


def _check_shape(component: str, request: Packed, shapes: Sequence[tuple[int, ...]]) -> None:
    together = (sum(shape[0] if shape else 0 for shape in shapes), *shapes[0][1:])
    same = len({shape[1:] for shape in shapes}) == 1
    if not same or together not in request.source_shapes:
        seen = ", ".join(f"{n} {s}" for n, s in zip(request.sources, shapes, strict=True))
        raise CheckpointError(
            f"{component}: {seen}; the layer needs {request.source_shapes[0]}: the checkpoint is "
            "damaged or mixed"
        )


# --- autoencoders of their own ------------------------------------------------------------------


def _taesd_names(found: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors of TAESD's original files by diffusers' names; those of others as they are."""
    if not all(name.partition(".")[0].isdecimal() for name in found):
        return found
    half = "decoder" if "0.weight" not in found else "encoder"
    layers = 1 + max((int(n.partition(".")[0][:4]) for n in found), default=0)
    table = names.taesd(half, layers)
    return {names.rename(table, name) or name: stored for name, stored in found.items()}


def _read_vae(
    found: Mapping[str, Stored], scaling: float
) -> tuple[dict[str, Any], dict[str, Stored]]:
    prefixes = [prefix for component, prefix, _ in PARTS if component == "vae"]
    for prefix in prefixes:  # a whole checkpoint, or an autoencoder cut out of one
        if inside := {n.removeprefix(prefix): s for n, s in found.items() if n.startswith(prefix)}:
            found = inside
    if any(".layers." in name for name in found):
        return _read_taesd(found)
    if any(name.startswith("decoder.up_blocks.") for name in found):
        found = _original_vae(found)
    if "decoder.conv_in.weight" not in found or "encoder.conv_in.weight" not in found:
        raise CheckpointError(f"no autoencoder, or half of one: {_seen(found)}")
    config, table = _read_ldm_vae({name: s.shape for name, s in found.items()}, False)
    stored, left = _renamed(found, table, "vae")
    if left := [name for name in left if not _is_unused(config, "vae", name)]:
        raise CheckpointError(
            f"{len(left)} tensors belong to no autoencoder ({', '.join(left[:5])})"
        )
    _check_complete("vae", config, stored)
    return config | {"scaling_factor": scaling}, stored


def _original_vae(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """An autoencoder with diffusers' names by the original ones, which the config is read from."""
    levels = 1 + max(int(n.split(".")[2]) for n in found if n.startswith("decoder.up_blocks."))
    blocks = 1 + max(int(n.split(".")[4]) for n in found if ".down_blocks.0.resnets." in n)
    config = {"block_out_channels": [0] * levels, "layers_per_block": blocks}
    table = names.inverse(names.vae(config))
    return {names.rename(table, names.new_attention_name(n)) or n: s for n, s in found.items()}


def _read_taesd(found: Mapping[str, Stored]) -> tuple[dict[str, Any], dict[str, Stored]]:
    for half in ("decoder", "encoder"):
        if not any(name.startswith(f"{half}.layers.") for name in found):
            raise CheckpointError(
                f"TAESD without its {half}: give both files, --vae ENCODER --vae DECODER"
            )
    config = families.taesd({name: s.shape for name, s in found.items()})
    _check_complete("vae", config, found)
    return config, dict(found)
