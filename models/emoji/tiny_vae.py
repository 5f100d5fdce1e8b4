"""A tiny autoencoder (TAESD's architecture) that does what the VAE does, in less time and memory.

    python models/emoji/tiny_vae.py WORK

Unlike the VAE's its latents are in the U-Net's scale, as TAESD's are.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ferrotype.models.emoji.config import Recipe, stage
from ferrotype.models.emoji.data import Data
from ferrotype.models.emoji.diffusion import load_decoder
from ferrotype.models.emoji.latents import Latents
from ferrotype.models.emoji.networks import bf16, decode, encode, make_tiny_vae
from ferrotype.models.emoji.training import train
from ferrotype.models.emoji.vae import batch, psnr, reconstruction

NOISE = 0.1  # at most, of the latents' deviation: the U-Net's latents are not exact either
ENCODER_WEIGHT = 0.3


def main(work: Path, recipe: Recipe) -> None:
    data, scale = Data.load(work), Latents.load(work).scale
    torch.manual_seed(0)
    tiny = make_tiny_vae().to(memory_format=torch.channels_last)
    vae = load_decoder(work, recipe)

    @torch.no_grad()
    def draw(n: int, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Pictures, latents in the U-Net's scale, these a little noised, and the VAE's picture."""
        x = batch(data, n, recipe.size, rng)
        z = encode(vae, x) * scale
        share = NOISE * torch.rand(n, 1, 1, 1, generator=rng)
        noised = z + share * torch.randn(z.shape, generator=rng)
        return x, z, noised, decode(vae, noised / scale)

    *_, examples, expected = draw(24, torch.Generator().manual_seed(1))

    def loss(rng: torch.Generator) -> dict[str, torch.Tensor]:
        x, z, noised, decoded = draw(recipe.tiny_vae.batch, rng)
        y = tiny.decoder(bf16(noised)).float()
        apart = (tiny.encoder(bf16(x)).float() - z).abs().mean()
        both = reconstruction(y, decoded) + ENCODER_WEIGHT * apart
        return {"loss": both, "psnr": psnr(y.detach(), decoded).mean(), "latents": apart.detach()}

    def preview() -> torch.Tensor:
        y = torch.cat([tiny.decoder(bf16(z)).float() for z in examples.split(8)])
        print(f"  {psnr(y, expected).mean():.2f} dB to the VAE's decoder", flush=True)
        return torch.cat([expected[:12], y[:12], expected[12:], y[12:]])

    train(work, "tiny_vae", {"vae": tiny}, recipe.tiny_vae, loss, preview)


if __name__ == "__main__":
    main(*stage())
