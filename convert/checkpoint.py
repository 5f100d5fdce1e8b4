"""A Stable Diffusion checkpoint in the diffusers layout: what it holds, read without torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle import TEXT_ENCODERS, TIME_IDS, hash_file
from ..errors import FerrotypeError

COMPONENTS = {  # component -> its class in model_index.json, the stem of its weights file
    "text_encoder": ("CLIPTextModel", "model"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "model"),
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
}
XL_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    *XL_PIPELINES,
)
FAMILIES = {768: "sd1", 1024: "sd2"}  # by the width of the text encoder's output
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
MAX_HEADER = 100_000_000  # the safetensors library's own limit
BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
UNUSED_BY_UNET = {  # config field -> the only value that the exported graph computes
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "cross_attention_norm": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "attention_type": "default",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "dual_cross_attention": False,
    "center_input_sample": False,
}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
UNUSED_BY_VAE = {"latents_mean": None, "latents_std": None, "shift_factor": None}


class ConvertError(FerrotypeError):
    """The checkpoint or an option does not work; the message says what to do."""


class OptionError(ConvertError):
    """Options that do not go together."""


class CheckpointError(ConvertError):
    """The checkpoint is damaged, incomplete or of a kind that is not supported."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose parts are all there; no weights have been read yet."""

    folder: Path
    name: str
    family: str  # sd1 | sd2 | sd | sdxl
    license: str  # of the model card's front matter, or "unknown"
    configs: dict[str, dict]  # by component: text_encoder(_2), unet, vae
    weights: dict[str, tuple[Path, ...]]  # by component; several files when sharded
    scheduler: dict
    model_index: dict
    tokenizers: dict[str, Path]  # by name: tokenizer, tokenizer_2

    @property
    def vae_scale(self) -> int:
        """Pixels per latent along one side: 8 for every Stable Diffusion."""
        return 2 ** (len(self.configs["vae"]["block_out_channels"]) - 1)


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Look at a checkpoint folder; raises CheckpointError when a part is missing or unsupported."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give a checkpoint in the diffusers layout"
        )
    if not (folder / "model_index.json").is_file():
        seen = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} has no model_index.json (it holds {seen}); "
            "give the top folder of a checkpoint in the diffusers layout"
        )
    index = _read_json(folder / "model_index.json")
    names = _components(folder, index)
    configs = {name: _read_json(folder / name / "config.json") for name in names}
    xl = index["_class_name"] in XL_PIPELINES
    _check_configs(configs, xl)
    tokenizers = {t: folder / t for encoder, t in TEXT_ENCODERS.items() if encoder in names}
    for tokenizer in tokenizers.values():
        if not any((tokenizer / f).is_file() for f in ("tokenizer.json", "vocab.json")):
            raise CheckpointError(
                f"{tokenizer} has neither tokenizer.json nor vocab.json; copy it there"
            )
    family = FAMILIES.get(configs["unet"].get("cross_attention_dim", 0), "sd")
    return Checkpoint(
        folder=folder,
        name=folder.resolve().name,
        family="sdxl" if xl else family,
        license=_license(folder / "README.md"),
        configs=configs,
        weights={name: _weights(folder / name, stem) for name, (_, stem) in names.items()},
        scheduler=_read_json(folder / "scheduler" / "scheduler_config.json"),
        model_index=index,
        tokenizers=tokenizers,
    )


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
    configs = {name: _read_json(folder / p / "config.json") for name, p in places.items()}
    xl = index["_class_name"] in XL_PIPELINES
    _check_configs(configs, xl)
    family = FAMILIES.get(configs["unet"].get("cross_attention_dim", 0), "sd")
    return Checkpoint(
        folder=folder,
        name=folder.resolve().name,
        family="sdxl" if xl else family,
        license=_license(folder / "README.md"),
        configs=configs,
        weights={},
        scheduler=_read_json(folder / "scheduler" / "scheduler_config.json"),
        model_index=index,
        tokenizers={t: folder / t for encoder, t in TEXT_ENCODERS.items() if encoder in names},
    )


def check_unet(config: dict) -> None:
    """Refuse a U-Net whose extra inputs or layers the exported graphs would leave out."""
    for field, value in UNUSED_BY_UNET.items():
        if config.get(field, value) != value:
            raise CheckpointError(
                f"unet: {field} is {config[field]!r}; only {value!r} is supported"
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

    Floats come as float32.  Raises CheckpointError for NaN or Inf.
    """

    def __init__(self, checkpoint: Checkpoint, component: str) -> None:
        self._where: dict[str, tuple[Path, int, dict]] = {}
        for path in checkpoint.weights[component]:
            header, start = read_header(path)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                if name in self._where:
                    raise CheckpointError(
                        f"{name} is both in {self._where[name][0]} and in {path.name}; "
                        "the shards do not belong together"
                    )
                self._where[name] = path, start + entry["data_offsets"][0], entry

    def __getitem__(self, name: str) -> np.ndarray:
        path, offset, entry = self._where[name]
        shape = tuple(entry["shape"])
        # mapped anew for each, so that pages of one do not stay while the next is read
        raw = np.memmap(path, DTYPES[entry["dtype"]], "r", offset, shape)
        array = _to_float32(np.asarray(raw), entry["dtype"])
        finite = np.isfinite(array)
        if not finite.all():
            bad = int(array.size - finite.sum())
            raise CheckpointError(
                f"{path}: {name} has {bad:,} NaN or Inf of {array.size:,} values; "
                "the checkpoint is damaged, fetch it again"
            )
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._where[name][2]["shape"])


def new_attention_name(name: str) -> str:
    """Today's name of a tensor of an autoencoder; until 2022 its attention had others."""
    *path, layer, kind = name.split(".")
    return ".".join([*path, OLD_ATTENTION.get(layer, layer), kind])


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """Read and check a safetensors header: its entries by name, and where the data starts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path}: the header claims {length:,} bytes, the file has {size:,}; fetch it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        _check_entries(header, size - 8 - length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors header: {error}") from error
    return header, 8 + length


def source_hash(checkpoint: Checkpoint) -> str:
    """sha256 over the names and contents of every file that a conversion reads, in sorted order."""
    folder = checkpoint.folder
    paths = [folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"]
    paths += [folder / name / "config.json" for name in checkpoint.configs]
    paths += [path for files in checkpoint.weights.values() for path in files]
    for tokenizer in checkpoint.tokenizers.values():
        paths += [path for path in tokenizer.iterdir() if path.is_file()]
    total = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in paths):
        total.update(f"{name}\0{hash_file(path)}\n".encode())
    return total.hexdigest()


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
    seen = sorted(p.name for p in folder.iterdir())
    pickled = [name for name in seen if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
    if pickled:
        raise CheckpointError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when read; "
            "convert them to safetensors"
        )
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
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _check_entries(header: dict, data_bytes: int) -> None:
    """The tensors must cover the data exactly: no overlap, no hole, nothing outside."""
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is {entry['dtype']}; supported are {', '.join(DTYPES)}")
        if any(type(n) is not int or n < 0 for n in (first, last, *entry["shape"])):
            raise ValueError(f"{name} has a shape or an offset that is not a whole number")
        size = math.prod(entry["shape"]) * np.dtype(DTYPES[entry["dtype"]]).itemsize
        if size == 0:
            raise ValueError(f"{name} is empty")
        if first != position or last - first != size:
            raise ValueError(
                f"{name} is at {first:,} to {last:,}, expected {position:,} to {position + size:,}"
            )
        position = last
    if position != data_bytes:
        raise ValueError(f"the tensors need {position:,} bytes, the file has {data_bytes:,}")


def _to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        bits = raw.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return np.array(raw, np.float32 if dtype.startswith("F") else None)


def _license(card: Path) -> str:
    front = card.read_text(errors="replace").split("\n---", 1)[0] if card.is_file() else ""
    found = re.search(r"^license:\s*(\S+)", front, re.M) if front.startswith("---") else None
    return found[1] if found else "unknown"
