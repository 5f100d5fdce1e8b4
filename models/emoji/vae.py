"""The autoencoder: pictures to 8 times smaller latents of 4 channels, and back.

python models/emoji/vae.py WORK
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from ferrotype.models.emoji.config import Recipe, stage
from ferrotype.models.emoji.data import COLOUR_NAMES, Data, Placement, composite
from ferrotype.models.emoji.fast import accelerate
from ferrotype.models.emoji.networks import bf16, decode, encode, make_vae
from ferrotype.models.emoji.training import train

KL_WEIGHT = 1e-3
LOG_VARIANCE = (-12.0, 6.0)
SCALES = (
    3  # at which the gradients of the pictures are compared, each half the size of the one before
)
MIRRORED = 0.2


def reconstruction(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Absolute error of the pixels, and of their differences at several scales, for sharp edges."""
    error = y - x
    total = error.abs().mean()
    for scale in range(SCALES):
        error = F.avg_pool2d(error, 2) if scale else error
        rows, columns = error.diff(dim=2), error.diff(dim=3)
        total = total + 0.5 * (rows.abs().mean() + columns.abs().mean())
    return total


def psnr(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dB of each picture (n, 3, h, w), both in [-1, 1]."""
    return -10 * ((y.clamp(-1, 1) - x).pow(2).mean((1, 2, 3)) / 4).log10()


def batch(data: Data, n: int, size: int, rng: torch.Generator) -> torch.Tensor:
    """Random things on random colours (a quarter on white), placed more freely than later."""
    things = torch.randint(len(data), (n,), generator=rng)
    u = torch.rand(2, n, generator=rng)
    colours = torch.randint(len(COLOUR_NAMES), (n,), generator=rng) * (u[0] > 0.25)
    pictures = composite(data.rgba[things], Placement.drawn(colours, rng, spread=2.0), size)
    return torch.where((u[1] < MIRRORED)[:, None, None, None], pictures.flip(3), pictures)


def main(work: Path, recipe: Recipe) -> None:
    data = Data.load(work)
    torch.manual_seed(0)
    vae = accelerate(make_vae(recipe))
    examples = batch(data, 24, recipe.size, torch.Generator().manual_seed(1))

    def loss(rng: torch.Generator) -> dict[str, torch.Tensor]:
        x = batch(data, recipe.vae.batch, recipe.size, rng)
        mean, log_variance = vae.quant_conv(vae.encoder(bf16(x))).float().chunk(2, 1)
        log_variance = log_variance.clamp(*LOG_VARIANCE)
        z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=rng)
        y = vae.decoder(vae.post_quant_conv(bf16(z))).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        both = reconstruction(y, x)
        with torch.no_grad():
            figures = {"psnr": psnr(y, x).mean(), "kl": kl.detach(), "deviation": mean.std()}
        return {"loss": both + KL_WEIGHT * kl, **figures}

    def preview() -> torch.Tensor:
        y = decode(vae, encode(vae, examples))
        print(f"  {psnr(y, examples).mean():.2f} dB with the averaged weights", flush=True)
        return torch.cat([examples[:12], y[:12], examples[12:], y[12:]])

    train(work, "vae", {"vae": vae}, recipe.vae, loss, preview)


if __name__ == "__main__":
    main(*stage())
