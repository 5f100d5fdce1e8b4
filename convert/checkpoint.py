"""A Stable Diffusion checkpoint, a folder or one file: what it holds, read without torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..bundle import TEXT_ENCODERS, TIME_IDS, hash_file
from . import schema, single
from .errors import CheckpointError, ConvertError, OptionError
from .families import PREDICTIONS, USUAL_SCALING
from .names import new_attention_name
from .storage import Stored, check_containers, read, read_header

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConvertError",
    "OptionError",
    "Tensors",
    "check_unet",
    "new_attention_name",
    "open_checkpoint",
    "read_header",
    "source_hash",
    "summary",
    "tensors",
]

COMPONENTS = {  # component -> its class in model_index.json, the stem of its weights file
    "text_encoder": ("CLIPTextModel", "model"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "model"),
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
}
MAX_JSON = 8 << 20  # bytes of a configuration or an index of shards
PICKLED = {"model": "pytorch_model"}  # stem of a safetensors file -> of the same pickled
XL_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    *XL_PIPELINES,
)
VOCABULARY = Path(__file__).parent / "clip_merges.txt.gz"  # CLIP's; its notice is beside it
SHOWN = {  # field of a config -> what a listing calls it
    "text": {"hidden_size": "width", "num_hidden_layers": "layers", "hidden_act": "activation"},
    "unet": {
        "block_out_channels": "channels", "transformer_layers_per_block": "transformers",
        "cross_attention_dim": "text", "mid_block_type": "middle", "time_cond_proj_dim": "guidance",
    },
    "vae": {"_class_name": "kind", "block_out_channels": "channels", "scaling_factor": "scaling"},
}  # fmt: skip
BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
UNUSED_BY_UNET = {  # config field -> the only value that the exported graph computes
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "cross_attention_norm": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "attention_type": "default",
    "dual_cross_attention": False,
    "center_input_sample": False,
}
UNUSED_BY_VAE = {"latents_mean": None, "latents_std": None, "shift_factor": None}


class Patch(Protocol):
    """What is merged into one tensor when it is read."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a tensor of this shape gets."""

    def __call__(self, values: np.ndarray, base: np.ndarray) -> np.ndarray:
        """`values` with the patch, as float32 or float64, in new memory.

        `base` is what the checkpoint has, before the first patch.
        """


@dataclass(frozen=True)
class Addition:
    """A file that is merged into the checkpoint: what it is and how, and what to know of it."""

    path: Path
    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose parts are all there; no weights have been read yet."""

    folder: Path  # or the file
    name: str
    family: str  # sd1 | sd2 | sd | sdxl
    license: str  # of the model card's front matter, or "unknown"
    configs: dict[str, dict]  # by component: text_encoder(_2), unet, vae
    weights: dict[str, tuple[Path, ...]]  # by component; several files when sharded
    scheduler: dict
    model_index: dict
    tokenizers: dict[str, Path]  # by name, tokenizer and tokenizer_2: folders, or VOCABULARY
    # What tokenizers pad with, if told; the tensors of single files.
    pads: dict[str, str] = dataclasses.field(default_factory=dict)
    stored: dict[str, dict[str, Stored]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what was assumed, for the report
    # What is merged, by component and tensor; the tokens added, by tokenizer; from which files.
    patches: dict[str, dict[str, tuple[Patch, ...]]] = dataclasses.field(default_factory=dict)
    tokens: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    additions: tuple[Addition, ...] = ()
    clip_skip: int = 0  # last layers of the text encoders that are left out

    @property
    def vae_scale(self) -> int:
        """Pixels per latent along one side: 8 for every Stable Diffusion."""
        config = self.configs["vae"]
        return 2 ** (len(config["block_out_channels"]) - 1)


def open_checkpoint(
    path: Path | str,
    tokenizer: Path | None = None,
    prediction: str | None = None,
    vae: Sequence[Path] = (),
) -> Checkpoint:
    """Look at a checkpoint, a folder in the diffusers layout or a file in the original naming.

    `tokenizer` is the folder of another one, for every text encoder.  `prediction`, epsilon or
    v_prediction, is what the U-Net predicts if the checkpoint does not tell or is wrong.  `vae` is
    a file with another autoencoder, or TAESD's two.
    Raises CheckpointError when a part is missing or unsupported, or when it cannot tell what it is.
    """
    path = Path(path)
    if prediction is not None and prediction not in PREDICTIONS:
        raise OptionError(f"prediction {prediction!r} is not one of {', '.join(PREDICTIONS)}")
    try:
        made = _open_file(path, prediction) if path.is_file() else _open_folder(path)
        if vae:
            made = _with_vae(made, tuple(map(Path, vae)))
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from None
    if prediction is not None:
        scheduler = made.scheduler | {"prediction_type": prediction}
        made = dataclasses.replace(made, scheduler=scheduler)
    if tokenizer is not None:
        _check_tokenizer(Path(tokenizer))
        tokenizers = dict.fromkeys(made.tokenizers, Path(tokenizer))
        made = dataclasses.replace(made, tokenizers=tokenizers)
    return made


def _open_folder(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not there; give a folder in the diffusers layout, or a file: "
            "safetensors, ckpt or gguf"
        )
    if not (folder / "model_index.json").is_file():
        seen = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} has no model_index.json (it holds {seen}); "
            "give the top folder of a checkpoint in the diffusers layout, or a single file"
        )
    index = _read_json(folder / "model_index.json")
    names = _components(folder, index)
    made = _of_folder(folder, index, {name: name for name in names})
    for tokenizer in made.tokenizers.values():
        _check_tokenizer(tokenizer)
    weights = {name: _weights(folder / name, stem) for name, (_, stem) in names.items()}
    return dataclasses.replace(made, weights=weights)


def _of_folder(folder: Path, index: dict, places: Mapping[str, str]) -> Checkpoint:
    """What a folder's JSON says, without weights; `places` are of the components' configs."""
    configs = {name: _read_json(folder / p / "config.json") for name, p in places.items()}
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    for part, config in (*configs.items(), ("scheduler", scheduler)):
        schema.check(part, config)
    xl = index["_class_name"] in XL_PIPELINES
    _check_configs(configs, xl)
    family = single.FAMILY_OF.get(configs["unet"].get("cross_attention_dim", 0), "sd")
    return Checkpoint(
        folder=folder,
        name=folder.resolve().name,
        family="sdxl" if xl else family,
        license=_license(folder / "README.md"),
        configs=configs,
        weights={},
        scheduler=scheduler,
        model_index=index,
        tokenizers={t: folder / t for encoder, t in TEXT_ENCODERS.items() if encoder in places},
    )


def _open_file(path: Path, prediction: str | None) -> Checkpoint:
    """A single file: what it does not say is known of its family."""
    found = single.read_single(path, prediction)
    xl = found.family == "sdxl"
    _check_configs(found.configs, xl)
    if "time_cond_proj_dim" in found.configs["unet"] and not xl:
        pipeline = "LatentConsistencyModelPipeline"
    else:
        pipeline = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    index: dict = {"_class_name": pipeline}
    for name in found.configs:
        library = "transformers" if name in TEXT_ENCODERS else "diffusers"
        index[name] = [library, COMPONENTS[name][0]]
        if name in TEXT_ENCODERS:
            index[TEXT_ENCODERS[name]] = ["transformers", "CLIPTokenizer"]
    index["scheduler"] = ["diffusers", found.scheduler["_class_name"]]
    if xl:
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index["requires_safety_checker"] = False
    return Checkpoint(
        folder=path,
        name=path.resolve().stem,
        family=found.family,
        license="unknown",
        configs=found.configs,
        weights=dict.fromkeys(found.configs, (path,)),
        scheduler=found.scheduler,
        model_index=index,
        tokenizers=dict.fromkeys(found.pads, VOCABULARY),
        pads=found.pads,
        stored=found.stored,
        notes=tuple(found.notes),
    )


def _with_vae(checkpoint: Checkpoint, paths: tuple[Path, ...]) -> Checkpoint:
    """The checkpoint with another autoencoder, whose latents must have as many channels."""
    scaling = checkpoint.configs["vae"].get("scaling_factor", USUAL_SCALING)
    config, stored = single.read_vae(paths, scaling)
    unet = checkpoint.configs["unet"].get("in_channels", 4)
    if config["latent_channels"] != unet:
        raise CheckpointError(
            f"{paths[0]}: an autoencoder of {config['latent_channels']} latent channels, the U-Net "
            f"has {unet}"
        )
    kind = config["_class_name"]
    return dataclasses.replace(
        checkpoint,
        configs=checkpoint.configs | {"vae": config},
        weights=checkpoint.weights | {"vae": paths},
        stored=checkpoint.stored | {"vae": stored},
        model_index=checkpoint.model_index | {"vae": ["diffusers", kind]},
    )


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / f).is_file() for f in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{folder} has neither tokenizer.json nor vocab.json; copy it there")


def skip_layers(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """The checkpoint without the last `count` layers of its text encoders, as diffusers counts.

    SDXL's second one keeps them, as its pooled state is read after all: `hidden_layer` says what
    else is.  Raises OptionError if too few layers would be left.
    """
    configs = dict(checkpoint.configs)
    for name in TEXT_ENCODERS.keys() & configs.keys():
        layers = configs[name].get("num_hidden_layers", 12)
        left = layers - count - (checkpoint.family == "sdxl")  # which never reads the last one
        if count < 0 or left < 1:
            raise OptionError(f"clip skip {count}: {name} has {layers} layers, it must be 0 to "
                              f"{layers - 1 - (checkpoint.family == 'sdxl')}")  # fmt: skip
        if count and name == "text_encoder":
            configs[name] = configs[name] | {"num_hidden_layers": layers - count}
    return dataclasses.replace(checkpoint, configs=configs, clip_skip=count)


def hidden_layer(config: Any) -> int:
    """Before which of its layers the states of a text encoder of SDXL's are read.

    `config` is transformers' CLIPTextConfig.
    """
    return config.num_hidden_layers - 1 - getattr(config, "clip_skip", 0)


def is_skipped(checkpoint: Checkpoint, component: str, name: str) -> bool:
    """Whether a tensor is of a text encoder's layers that `skip_layers` left out."""
    if component != "text_encoder" or not checkpoint.clip_skip:
        return False
    first = checkpoint.configs[component]["num_hidden_layers"]
    found = re.match(r"(?:text_model\.)?encoder\.layers\.(\d+)\.", name)
    return found is not None and first <= int(found[1]) < first + checkpoint.clip_skip


def is_exported(folder: Path) -> bool:
    """Whether a folder holds what Optimum exported: graphs, and no weights to convert."""
    graphs = any((folder / name / "model.onnx").is_file() for name in ("text_encoder", "unet"))
    weights = any((folder / "unet").glob("*.safetensors*"))
    return graphs and not weights and (folder / "model_index.json").is_file()


def open_exported(folder: Path) -> Checkpoint:
    """Look at a folder that Optimum exported: as a checkpoint, without weights.

    Raises CheckpointError when a part is missing or unsupported; graphs are not looked at.
    """
    index = _read_json(folder / "model_index.json")
    names = _components(folder, index)
    places = {name: "vae_decoder" if name == "vae" else name for name in names}
    return _of_folder(folder, index, places)


def check_unet(config: dict) -> None:
    """Refuse a U-Net whose extra inputs or layers the exported graphs would leave out."""
    for field, value in UNUSED_BY_UNET.items():
        if config.get(field, value) != value:
            raise CheckpointError(
                f"unet: {field} is {config[field]!r}; only {value!r} is supported"
            )
    if config.get("mid_block_type", MIDDLES[0]) not in MIDDLES:
        raise CheckpointError(
            f"unet: mid_block_type is {config['mid_block_type']!r}; only "
            f"{', '.join(map(repr, MIDDLES))} are supported"
        )
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise CheckpointError(
            f"unet: addition_embed_type is {config['addition_embed_type']!r}; "
            "only None and 'text_time' are supported"
        )
    for block in (*config.get("down_block_types", ()), *config.get("up_block_types", ())):
        if block not in BLOCKS:
            raise CheckpointError(
                f"unet: {block} is not supported; supported are {', '.join(BLOCKS)}"
            )
    if config.get("in_channels", 4) != 4:
        raise CheckpointError(
            f"unet: {config['in_channels']} input channels (9 is inpainting, 8 edits by "
            "instruction); only text-to-image U-Nets with 4 are supported"
        )


def tensors(checkpoint: Checkpoint, component: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) one at a time, floats as float32; NaN or Inf raises CheckpointError."""
    yield from Tensors(checkpoint, component).items()


class Tensors(Mapping[str, np.ndarray]):
    """A component's tensors by name, in the order of the files; each is read when asked for.

    Floats come as float32, with the checkpoint's patches; with `halves`, what the file has in fp16
    and nothing is merged into comes as that.  Raises CheckpointError for NaN or Inf.
    """

    def __init__(self, checkpoint: Checkpoint, component: str, halves: bool = False) -> None:
        self._halves = halves
        self._patches = checkpoint.patches.get(component, {})
        self._where: dict[str, Stored] = dict(checkpoint.stored.get(component, {}))
        if self._where:
            return
        for path in checkpoint.weights[component]:
            for name, stored in single.open_file(path).items():
                if name in self._where:
                    raise CheckpointError(
                        f"{name} is both in {self._where[name].path} and in {path.name}; "
                        "the shards do not belong together"
                    )
                self._where[name] = stored

    def __getitem__(self, name: str) -> np.ndarray:
        stored = self._where[name]
        if not stored.is_float and not name.endswith("position_ids"):
            raise CheckpointError(f"{stored.path}: {name} is {stored.dtype}; weights are floats")
        patches = self._patches.get(name, ())
        values = base = read_finite(name, stored, self._halves and not patches)
        for patch in patches:
            values = patch(values, base)
        return values.astype(np.float32, copy=False) if values.dtype == np.float64 else values

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        shape = self._where[name].shape
        for patch in self._patches.get(name, ()):
            shape = patch.shape(shape)
        return shape

    def stored(self, name: str) -> Stored:
        """Where a tensor lies, without its patches."""
        return self._where[name]


def read_finite(name: str, stored: Stored, halves: bool = False) -> np.ndarray:
    """The tensor in memory, floats as float32, or fp16 as it is if `halves`.

    Raises CheckpointError for NaN or Inf.
    """
    values = read(stored, halves)
    if values.dtype == np.float16:  # as numbers, numpy tests them one by one
        exponents = values.view(np.uint16) & 0x7C00
        finite = exponents != 0x7C00
    else:
        finite = np.isfinite(values)
    if not finite.all():
        bad = int(values.size - finite.sum())
        raise CheckpointError(
            f"{stored.path}: {name} has {bad:,} NaN or Inf of {values.size:,} values; "
            "the file is damaged, fetch it again"
        )
    return values


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint is, its scheduler, and of every component what it holds, for a listing."""
    components = {}
    for name, config in checkpoint.configs.items():
        lazy = Tensors(checkpoint, name)
        entries = [lazy.stored(n) for n in lazy]
        components[name] = {
            "tensors": len(entries),
            "parameters": sum(math.prod(e.shape) for e in entries if e.is_float),
            "types": sorted({e.dtype for e in entries if e.is_float}),
            "bytes": sum(e.bytes for e in entries),
            "shape": _shape_text(name, config),
        }
    return {
        "model": checkpoint.name,
        "family": checkpoint.family,
        "licence": checkpoint.license,
        "pipeline": checkpoint.model_index["_class_name"],
        "scheduler": checkpoint.scheduler.get("_class_name", "unknown"),
        "prediction": checkpoint.scheduler.get("prediction_type", "epsilon"),
        "components": components,
        "notes": list(checkpoint.notes),
    }


def _shape_text(component: str, config: dict) -> str:
    """The fields of a config that tell families apart."""
    shown = SHOWN["text" if component in TEXT_ENCODERS else component]
    told = {said: config[key] for key, said in shown.items() if key in config}
    return ", ".join(f"{said} {v}" for said, v in told.items() if v is not None or said == "middle")


def source_hash(checkpoint: Checkpoint) -> str:
    """sha256 over the names and contents of every file that a conversion reads, in sorted order.

    Merged files follow, in the order of merging, each with how it was merged.
    """
    folder = checkpoint.folder
    paths = {path for files in checkpoint.weights.values() for path in files}
    if folder.is_dir():
        paths |= {folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"}
        paths |= {
            folder / name / "config.json"
            for name, files in checkpoint.weights.items()
            if files[0].is_relative_to(folder)
        }
    for tokenizer in checkpoint.tokenizers.values():
        if tokenizer.is_dir():  # the one that comes with this package is part of the tool
            paths |= {path for path in tokenizer.iterdir() if path.is_file()}
    total = hashlib.sha256()
    for name, path in sorted((_name_below(folder, path), path) for path in paths):
        total.update(f"{name}\0{hash_file(path)}\n".encode())
    for addition in checkpoint.additions:
        total.update(f"{addition.text}\0{hash_file(addition.path)}\n".encode())
    return total.hexdigest()


def _name_below(folder: Path, path: Path) -> str:
    """What a file is called in the checkpoint, or alone if it came from elsewhere."""
    inside = folder.is_dir() and path.is_relative_to(folder)
    return path.relative_to(folder).as_posix() if inside else path.name


def _components(folder: Path, index: dict) -> dict[str, tuple[str, str]]:
    """The rows of COMPONENTS that a checkpoint of this pipeline has."""
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise CheckpointError(
            f"{folder}: {pipeline} is not supported; supported are {', '.join(PIPELINES)}"
        )
    names = dict(COMPONENTS)
    if pipeline not in XL_PIPELINES:
        del names["text_encoder_2"]
    for name, (expected, _) in names.items():
        entry = index.get(name)
        found = entry[-1] if isinstance(entry, list) and entry else entry
        if found is None and name == "text_encoder" and "text_encoder_2" in names:
            raise CheckpointError(
                f"{folder} has no first text encoder: that is the SDXL refiner, which is not "
                "supported; give the base model"
            )
        if found != expected:
            raise CheckpointError(f"{folder}: {name} is {found}; only {expected} is supported")
    return names


def _check_configs(configs: dict[str, dict], xl: bool) -> None:
    """Refuse what would be left out, and a U-Net that is not of this pipeline."""
    unet, vae = configs["unet"], configs["vae"]
    check_unet(unet)
    for field, value in UNUSED_BY_VAE.items():
        if vae.get(field, value) != value:
            raise CheckpointError(f"vae: {field} is {vae[field]!r}; only {value!r} is supported")
    if xl != (unet.get("addition_embed_type") == "text_time"):
        raise CheckpointError(
            f"unet: addition_embed_type is {unet.get('addition_embed_type')!r}; SDXL has "
            "'text_time' and no other pipeline has: model_index.json is another model's"
        )
    if xl:
        pooled = configs["text_encoder_2"].get("projection_dim", 512)  # CLIP's default
        each = unet.get("addition_time_embed_dim") or 0
        expected = pooled + TIME_IDS * each
        if each < 1 or unet.get("projection_class_embeddings_input_dim") != expected:
            raise CheckpointError(
                f"unet: projection_class_embeddings_input_dim is "
                f"{unet.get('projection_class_embeddings_input_dim')}; only SDXL base's "
                f"{TIME_IDS} time ids of {each} and text_embeds of {pooled}, {expected} in all, "
                "are supported (the refiner has 5 time ids)"
            )


def _weights(folder: Path, stem: str) -> tuple[Path, ...]:
    for variant in ("", ".fp16"):
        single = folder / f"{stem}{variant}.safetensors"
        if single.is_file():
            return (single,)
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            return _shards(index)
    for variant in ("", ".fp16"):
        pickled = folder / f"{PICKLED.get(stem, stem)}{variant}.bin"
        if pickled.is_file():
            return (pickled,)
    seen = sorted(p.name for p in folder.iterdir())
    raise CheckpointError(f"{folder} has no {stem}.safetensors; it holds {', '.join(seen[:8])}")


def _shards(index: Path) -> tuple[Path, ...]:
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index} has no weight_map; fetch the checkpoint again")
    names = sorted({str(name) for name in table.values()})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(f"{index} lists {name!r}, which is not a file beside it")
    return tuple(index.parent / name for name in names)


def _read_json(path: Path) -> dict:
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise ValueError(f"it has {size:,} bytes, the limit is {MAX_JSON:,}")
        text = path.read_bytes()
        check_containers(text)
        value = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _license(card: Path) -> str:
    front = card.read_text(errors="replace").split("\n---", 1)[0] if card.is_file() else ""
    found = re.search(r"^license:\s*(\S+)", front, re.M) if front.startswith("---") else None
    return found[1] if found else "unknown"
