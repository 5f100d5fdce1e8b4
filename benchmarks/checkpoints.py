"""Random checkpoints of an exact architecture, in diffusers layout: for benchmarks and tests.

Latency and memory do not depend on the values.  Weights are drawn one tensor at a time, scaled so
that signals keep their size.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
EMOJI = ROOT.parent / "shared" / "models" / "emoji-sd"  # the trained one, beside the checkout
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


def write_checkpoint(
    folder: Path, configs: dict[str, dict[str, Any]], dtype: torch.dtype = torch.float16
) -> Path:
    """Write a random checkpoint of these configs to a new folder; with the embedded tokenizer."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for name, (kind, stem) in KINDS.items():
        module = _on_meta(kind, configs[name])
        target = folder / name
        module.save_config(target) if kind != "CLIPTextModel" else module.config.save_pretrained(
            target
        )
        prefix = "text_model." if kind == "CLIPTextModel" else ""
        state = module.state_dict()
        bare = {k.removeprefix(prefix): v for k, v in state.items()}
        tensors = {prefix + k: _draw(k, v.shape).to(dtype) for k, v in bare.items()}
        save_file(tensors, target / f"{stem}.safetensors")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
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
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return folder


KINDS = {
    "text_encoder": ("CLIPTextModel", "model"),
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
}


def _on_meta(kind: str, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        if kind == "CLIPTextModel":
            import transformers

            ends = {"bos_token_id": 2046, "eos_token_id": 2047, "pad_token_id": 2047}
            return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config, **ends))
        import diffusers

        return getattr(diffusers, kind).from_config(config)


def _draw(name: str, shape: torch.Size) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:  # the scale of a norm
        return torch.ones(shape)
    return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
