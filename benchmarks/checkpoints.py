"""Random checkpoints of an exact architecture, as a folder or one file: for benchmarks and tests.

Latency and memory do not depend on the values.  Weights are drawn one tensor at a time, scaled so
that signals keep their size; the folder and the file of one family have the same.

    python -m ferrotype.benchmarks.checkpoints sd15|sdxl FILE.safetensors   # 2 GB, 7 GB
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferrotype.convert import names

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "models" / "emoji-sd"  # the trained one; models/emoji says how
EMOJI_BASE = ROOT / "models" / "emoji-sd-base"  # its U-Net before distillation, for many steps
EMOJI_TINY = ROOT / "models" / "emoji-sd-tiny"  # its tiny autoencoder
TOKENIZER = ROOT / "models" / "emoji.ferro" / "tokenizer"

SD15: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "projection_dim": 768,
    },
    "unet": {
        "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": {
        "sample_size": 512, "latent_channels": 4, "scaling_factor": 0.18215,
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "scheduler": {"_class_name": "LCMScheduler", "beta_schedule": "scaled_linear",
                  "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
                  "set_alpha_to_one": False, "clip_sample": False},
}  # fmt: skip

TINY: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    },
    "unet": {
        "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 2, "norm_num_groups": 8,
        "block_out_channels": [16, 32], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae": {
        "sample_size": 64, "latent_channels": 4, "norm_num_groups": 4,
        "block_out_channels": [8, 8, 16, 16], "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "scheduler": SD15["scheduler"],
}  # fmt: skip


TINY_SD2 = TINY | {  # as 2.1 at 768 pixels: predicts v
    "unet": TINY["unet"] | {"use_linear_projection": True, "attention_head_dim": [1, 2]},
    "scheduler": {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear",
                  "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
                  "set_alpha_to_one": False, "clip_sample": False,
                  "prediction_type": "v_prediction"},
}  # fmt: skip

SDXL: dict[str, dict[str, Any]] = {  # base 1.0
    "text_encoder": SD15["text_encoder"] | {"eos_token_id": 2},
    "text_encoder_2": {
        "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120,
        "num_hidden_layers": 32, "num_attention_heads": 20, "max_position_embeddings": 77,
        "hidden_act": "gelu", "projection_dim": 1280, "eos_token_id": 2,
    },
    "unet": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    },
    "vae": SD15["vae"] | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "scheduler": {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear",
                  "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
                  "timestep_spacing": "leading", "prediction_type": "epsilon"},
}  # fmt: skip

TINY_XL: dict[str, dict[str, Any]] = {
    "text_encoder": TINY["text_encoder"] | {"num_hidden_layers": 3, "eos_token_id": 2},
    "text_encoder_2": TINY["text_encoder"] | {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "gelu",
        "projection_dim": 40, "eos_token_id": 2,
    },
    "unet": TINY["unet"] | {
        "cross_attention_dim": 80, "attention_head_dim": [2, 4], "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2], "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 88,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "vae": TINY["vae"] | {"scaling_factor": 0.13025, "force_upcast": True},
    "scheduler": SDXL["scheduler"],
}  # fmt: skip


# For single files: what these do not tell, heads and the groups of norms, is as published.
_SMALL_TEXT = TINY["text_encoder"] | {"hidden_size": 64, "num_attention_heads": 1}
_SMALL_VAE = TINY["vae"] | {"block_out_channels": [32, 32, 64, 64], "norm_num_groups": 32}
_SMALL_UNET = TINY["unet"] | {
    "cross_attention_dim": 64, "attention_head_dim": 8, "norm_num_groups": 32,
    "block_out_channels": [32, 64],
}  # fmt: skip
_SMALL_TEXT_2 = _SMALL_TEXT | {
    "hidden_size": 128, "num_attention_heads": 2, "hidden_act": "gelu", "projection_dim": 96,
}  # fmt: skip
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": TINY | {"text_encoder": _SMALL_TEXT, "unet": _SMALL_UNET, "vae": _SMALL_VAE},
    "sd2": TINY_SD2 | {
        "text_encoder": _SMALL_TEXT | {"hidden_act": "gelu"},
        "unet": _SMALL_UNET | {"use_linear_projection": True, "attention_head_dim": [1, 1]},
        "vae": _SMALL_VAE,
    },
    "sdxl": TINY_XL | {
        "text_encoder": _SMALL_TEXT, "text_encoder_2": _SMALL_TEXT_2,
        "unet": TINY_XL["unet"] | {
            "cross_attention_dim": 192, "attention_head_dim": [1, 1], "norm_num_groups": 32,
            "block_out_channels": [32, 64], "projection_class_embeddings_input_dim": 144,
        },
        "vae": _SMALL_VAE | {"scaling_factor": 0.13025},
    },
}  # fmt: skip
SMALL |= {
    "ssd-1b": SMALL["sdxl"] | {  # fewer layers, and no attention in the middle
        "unet": SMALL["sdxl"]["unet"] | {
            "block_out_channels": [32, 64, 128], "attention_head_dim": [1, 1, 2],
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "layers_per_block": 2, "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [2, 2], [3, 3]],
            "reverse_transformer_layers_per_block": [[3, 3, 4], [2, 1, 1], 1],
        },
    },
    "bk-sdm": SMALL["sd1"] | {  # no middle at all
        "unet": _SMALL_UNET | {
            "mid_block_type": None,
            "block_out_channels": [32, 32, 64],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        },
    },
    "lcm": SMALL["sd1"] | {"unet": _SMALL_UNET | {"time_cond_proj_dim": 16}},
}  # fmt: skip


def write_checkpoint(
    folder: Path, configs: dict[str, dict[str, Any]], dtype: torch.dtype | None = None
) -> Path:
    """Write a random checkpoint of these configs to a new folder; with the embedded tokenizer.

    With a text_encoder_2 it is one of SDXL.  In fp16 if no `dtype` is given.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    kinds = {name: kind for name, kind in KINDS.items() if name in configs}
    for name, (kind, stem) in kinds.items():
        module = _on_meta(kind, configs[name])
        target = folder / name
        save = module.config.save_pretrained if kind.startswith("CLIP") else module.save_config
        save(target)
        prefix = "text_model." if kind == "CLIPTextModel" else ""
        state = module.state_dict()
        bare = {k.removeprefix(prefix): v for k, v in state.items()}
        tensors = {
            prefix + k: _draw(k, v.shape).to(dtype or torch.float16) for k, v in bare.items()
        }
        save_file(tensors, target / f"{stem}.safetensors")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    if "text_encoder_2" in configs:
        _write_tokenizer_2(folder)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(configs["scheduler"]))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", configs["scheduler"]["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    if "text_encoder_2" in configs:
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
        del index["safety_checker"], index["requires_safety_checker"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return folder


def write_single(
    path: Path, configs: dict[str, dict[str, Any]], dtype: torch.dtype | None = None
) -> Path:
    """Write the same checkpoint as one file in the original naming, tensor by tensor.

    Whether a text encoder is CLIP's or OpenCLIP's is told by its activation.
    """
    import torch

    dtype = dtype or torch.float16
    rows = list(_single_rows(configs))
    header: dict[str, Any] = {}
    position = 0
    for _, original, whole, _, _, _ in rows:
        if original not in header:
            end = position + math.prod(whole) * dtype.itemsize
            name = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
            header[original] = {
                "dtype": name, "shape": list(whole), "data_offsets": [position, end]
            }  # fmt: skip
            position = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    torch.manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for bare, original, _, place, turned, shape in rows:
            values = _draw(bare, shape).to(dtype)
            values = (values.T if turned else values).contiguous()
            start = header[original]["data_offsets"][0] + (place or 0) * values.nbytes
            file.seek(8 + len(text) + start)
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
    return path


Row = tuple[str, str, tuple[int, ...], "int | None", bool, "torch.Size"]


def _single_rows(configs: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """Every tensor in the order in which it is drawn.

    What it is drawn by, its name in the file and the shape there, its third of that, whether it is
    turned, its own shape.
    """
    xl = "text_encoder_2" in configs
    for component, (kind, _) in KINDS.items():
        if component not in configs:
            continue
        module = _on_meta(kind, configs[component])
        prefix, table = _original(component, configs[component], xl)
        fused = {n: (o, i) for o, new in table.items() for n, i in names.parts(new)}
        inverse = {n: o for n, (o, _) in fused.items()}
        for name, tensor in module.state_dict().items():
            full = name
            if component == "text_encoder":
                name = name.removeprefix("text_model.")
                full = f"text_model.{name}"
            original = names.rename(inverse, full)
            assert original is not None, full
            place = fused[full][1] if full in fused else None
            turned = original == "text_projection"
            whole = tuple(tensor.shape)
            if place is not None:
                whole = (len(names.FUSED) * whole[0], *whole[1:])
            elif turned:
                whole = whole[::-1]
            elif component == "vae" and ".attentions." in full and len(whole) == 2:
                whole = (*whole, 1, 1)
            yield name, prefix + original, whole, place, turned, tensor.shape


def _original(component: str, config: dict[str, Any], xl: bool) -> tuple[str, names.Table]:
    """What the original names begin with, and their table."""
    if component == "unet":
        return "model.diffusion_model.", names.unet({"layers_per_block": 2, **config})
    if component == "vae":
        return "first_stage_model.", names.vae(config)
    place = {"text_encoder": 0, "text_encoder_2": 1}[component]
    prefix = f"conditioner.embedders.{place}." if xl else "cond_stage_model."
    if config["hidden_act"] == "gelu":
        return f"{prefix}model.", names.open_clip(config["num_hidden_layers"])
    return f"{prefix}transformer.", {"text_model": "text_model"}


KINDS = {
    "text_encoder": ("CLIPTextModel", "model"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "model"),
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
}


def _write_tokenizer_2(folder: Path) -> None:
    """OpenCLIP's: the same, but it pads with "!", which makes that a token of its own.

    Both state the length that the text encoders read: diffusers pads to it.
    """
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    for name in ("tokenizer", "tokenizer_2"):
        pad = "!" if name == "tokenizer_2" else "<|endoftext|>"
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            path = folder / name / file
            length = {"model_max_length": 77} if file == "tokenizer_config.json" else {}
            fields = json.loads(path.read_text()) | {"pad_token": pad} | length
            path.write_text(json.dumps(fields, indent=1))


def _on_meta(kind: str, config: dict[str, Any]) -> Any:
    import torch

    with torch.device("meta"):
        if kind.startswith("CLIP"):
            import transformers

            ends = {"bos_token_id": 2046, "eos_token_id": 2047, "pad_token_id": 2047}
            return getattr(transformers, kind)(transformers.CLIPTextConfig(**ends | config))
        import diffusers

        return getattr(diffusers, kind).from_config(config)


def _draw(name: str, shape: torch.Size) -> torch.Tensor:
    import torch

    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:  # the scale of a norm
        return torch.ones(shape)
    return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))


if __name__ == "__main__":
    family, target = sys.argv[1:]
    print(write_single(Path(target), {"sd15": SD15, "sdxl": SDXL}[family]))
