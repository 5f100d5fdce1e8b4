"""The networks, all of Stable Diffusion 1.x's own classes, and the noise schedule they share."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from ferrotype.models.emoji.config import Recipe

TOKENS = 32
STEPS = 1000
BETAS = (0.00085, 0.012)  # "scaled_linear"
ALPHAS = torch.cumprod(  # \bar{\alpha}_t of the DDPM paper
    1 - torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, STEPS, dtype=torch.float64) ** 2, 0
).float()


def make_vae(recipe: Recipe) -> AutoencoderKL:
    blocks = len(recipe.vae_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=recipe.size,
    )


def make_unet(recipe: Recipe) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=recipe.latent_size,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=recipe.unet_channels,
        layers_per_block=1,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=4,  # the number of heads: Stable Diffusion's configs name it so
        norm_num_groups=16,
    )


def make_text_encoder(recipe: Recipe) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            projection_dim=recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=max(1, recipe.text_width // 64),
            max_position_embeddings=TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=recipe.vocabulary - 2,
            eos_token_id=recipe.vocabulary - 1,
            pad_token_id=recipe.vocabulary - 1,
            attn_implementation="eager",
        )
    )


def make_tiny_vae() -> AutoencoderTiny:
    """TAESD's architecture, as much narrower than the VAE as TAESD is than Stable Diffusion's."""
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(16, 16, 16, 16),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(3, 3, 3, 1),
    )


def load_weights(work: Path, name: str, **modules: torch.nn.Module) -> None:
    """Fill the modules from a stage's WORK/NAME.safetensors, whose keys are MODULE.PARAMETER."""
    weights = load_file(work / f"{name}.safetensors")
    for part, module in modules.items():
        start = f"{part}."
        module.load_state_dict(
            {k[len(start) :]: v for k, v in weights.items() if k.startswith(start)}
        )


def bf16(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 4:
        return x.to(torch.bfloat16, memory_format=torch.channels_last)
    return x.bfloat16()


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents in the VAE's own scale -> pictures in [-1, 1], a few at a time."""
    dtype = next(vae.parameters()).dtype
    parts = [vae.decode(z.to(dtype)).sample.float() for z in latents.split(16)]
    return torch.cat(parts).clamp(-1, 1)


def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] -> the means of their latents, in the VAE's own scale."""
    dtype = next(vae.parameters()).dtype
    parts = [vae.encode(x.to(dtype)).latent_dist.mode().float() for x in pictures.split(16)]
    return torch.cat(parts)
