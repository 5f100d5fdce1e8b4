"""The training loop of every stage: optimizer, averaged weights, a state that survives a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from ferrotype.models.emoji.config import Training

SAVE_EVERY = 120  # s
ADAM = (0.9, 0.98)
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Muon
CLIP = 1.0  # norm of the whole gradient


def rate_at(training: Training, step: int) -> float:
    """Rises over the warm-up, stays, and falls linearly over the cool-down."""
    left = (training.steps - step) / (training.cooldown * training.steps)
    return training.rate * min(1.0, (step + 1) / training.warmup, left)


def orthogonalized(x: torch.Tensor) -> torch.Tensor:
    """(n, r, c) with r <= c: each matrix's singular values brought near 1 (Newton-Schulz, bf16)."""
    a, b, c = NEWTON_SCHULZ
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.float()


class Optimizer:
    """bf16 parameters with fp32 masters and their moving average.

    Muon (Jordan et al. 2024) for matrices and convolutions, Adam for the rest; Muon's update is
    scaled to the root mean square of Adam's, so that both share one rate.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], training: Training):
        self.training, self.step_number = training, 0
        named = {f"{m}.{n}": p for m, mod in modules.items() for n, p in mod.named_parameters()}
        self.parameters = {n: p for n, p in named.items() if p.requires_grad}
        embeddings = {
            p
            for module in modules.values()
            for layer in module.modules()
            if isinstance(layer, torch.nn.Embedding)
            for p in layer.parameters()
        }
        ours = list(self.parameters.values())
        self.masters = [p.detach().float().clone() for p in ours]
        self.averages = [m.clone() for m in self.masters]
        self.first = [torch.zeros_like(m) for m in self.masters]
        by_muon = [
            p.dim() >= 2 and p not in embeddings and min(p.flatten(1).shape) >= 16 for p in ours
        ]
        self.muon = [i for i, yes in enumerate(by_muon) if yes]
        self.adam = [i for i, yes in enumerate(by_muon) if not yes]
        self.second = [torch.zeros_like(self.masters[i]) for i in self.adam]
        for p in ours:
            p.data = p.data.to(
                torch.bfloat16,
                memory_format=torch.channels_last if p.dim() == 4 else torch.preserve_format,
            )

    @torch.no_grad()
    def step(self) -> None:
        rate = rate_at(self.training, self.step_number)
        self.step_number += 1
        ours = list(self.parameters.values())
        gradients = [p.grad.float() for p in ours]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, float((CLIP / (norm + 1e-6)).clamp(max=1)))
        self._adam_step([gradients[i] for i in self.adam], rate)
        self._muon_step([gradients[i] for i in self.muon], rate)
        for p, master in zip(ours, self.masters, strict=True):
            p.copy_(master)
            p.grad = None
        n = self.step_number
        torch._foreach_lerp_(self.averages, self.masters, 1 - min(self.training.ema, n / (10 + n)))

    def _adam_step(self, gradients: list[torch.Tensor], rate: float) -> None:
        first = [self.first[i] for i in self.adam]
        torch._foreach_lerp_(first, gradients, 1 - ADAM[0])
        torch._foreach_mul_(self.second, ADAM[1])
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - ADAM[1])
        n = self.step_number
        scale = torch._foreach_sqrt(torch._foreach_div(self.second, 1 - ADAM[1] ** n))
        torch._foreach_add_(scale, 1e-8)
        masters = [self.masters[i] for i in self.adam]
        torch._foreach_addcdiv_(masters, first, scale, -rate / (1 - ADAM[0] ** n))

    def _muon_step(self, gradients: list[torch.Tensor], rate: float) -> None:
        first = [self.first[i] for i in self.muon]
        torch._foreach_lerp_(first, gradients, 1 - MOMENTUM)
        updates = torch._foreach_lerp(gradients, first, MOMENTUM)
        by_shape: dict[tuple, list[tuple[int, torch.Tensor, bool]]] = {}
        for i, update in zip(self.muon, updates, strict=True):
            matrix = update.flatten(1)
            tall = matrix.shape[0] > matrix.shape[1]
            matrix = matrix.T if tall else matrix
            by_shape.setdefault(tuple(matrix.shape), []).append((i, matrix, tall))
        for (_, columns), group in by_shape.items():  # equal shapes go through as one stack
            news = orthogonalized(torch.stack([matrix for _, matrix, _ in group]))
            for (i, _, tall), new in zip(group, news, strict=True):
                new = (new.T if tall else new).reshape(self.masters[i].shape)
                self.masters[i].mul_(1 - rate * self.training.decay)
                self.masters[i].add_(new, alpha=-0.2 * rate * columns**0.5)

    @torch.no_grad()
    def use(self, averaged: bool) -> None:
        """Put the averaged weights into the modules, or the latest back."""
        chosen = self.averages if averaged else self.masters
        for p, value in zip(self.parameters.values(), chosen, strict=True):
            p.copy_(value)

    def averaged(self) -> dict[str, torch.Tensor]:
        """The averaged weights, fp32, by MODULE.PARAMETER."""
        return {
            n: a.clone().contiguous() for n, a in zip(self.parameters, self.averages, strict=True)
        }

    def state(self) -> dict:
        return {
            "step": self.step_number,
            **{k: getattr(self, k) for k in ("masters", "averages", "first", "second")},
        }

    @torch.no_grad()
    def load(self, state: dict) -> None:
        self.step_number = state["step"]
        for kind in ("masters", "averages", "first", "second"):
            for ours, saved in zip(getattr(self, kind), state[kind], strict=True):
                ours.copy_(saved)
        self.use(averaged=False)


@dataclass(frozen=True)
class Progress:
    """How far a stage has come: steps, seconds of one core, running means of its figures."""

    steps: int
    core_seconds: float
    means: dict[str, float]

    @classmethod
    def of(cls, work: Path, name: str) -> Progress:
        state = torch.load(work / f"{name}.state", weights_only=True, mmap=True)
        return cls(state["optimizer"]["step"], state["core_seconds"], state["means"])


Loss = Callable[[torch.Generator], dict[str, torch.Tensor]]


def train(
    work: Path,
    name: str,
    modules: Mapping[str, torch.nn.Module],
    training: Training,
    loss: Loss,
    preview: Callable[[], torch.Tensor | None] = lambda: None,
    save_every: float = SAVE_EVERY,
) -> None:
    """Train until training.steps are done, from the saved state if there is one.

    `loss` draws its batch from the generator it is given, and from nothing else, and returns what
    is to be printed; "loss" of it is minimized.  So a run that was killed goes on as if it had not
    been.  Writes WORK/NAME.state, WORK/NAME.safetensors (averaged weights), and WORK/NAME.png of
    what `preview` draws with them.
    """
    optimizer, rng = Optimizer(modules, training), torch.Generator().manual_seed(0)
    means: dict[str, float] = {}
    spent = 0.0
    state_file = work / f"{name}.state"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        optimizer.load(state["optimizer"])
        rng.set_state(state["rng"])
        means, spent = state["means"], state["core_seconds"]
    start, first_step, saved_at = time.monotonic(), optimizer.step_number, time.monotonic()
    while optimizer.step_number < training.steps:
        figures = loss(rng)
        figures["loss"].backward()
        optimizer.step()
        step = optimizer.step_number
        for key, value in figures.items():
            value = float(value.detach())
            means[key] = means.get(key, value) * 0.98 + 0.02 * value
        if step % 50 == 0 or step == training.steps:
            speed = (step - first_step) / (time.monotonic() - start)
            told = " ".join(f"{key} {value:.4f}" for key, value in means.items())
            left = (training.steps - step) / speed / 60
            print(
                f"{name} {step}/{training.steps} {told} ({speed:.2f}/s, {left:.0f} min)", flush=True
            )
        if time.monotonic() - saved_at >= save_every or step == training.steps:
            save_state(
                work, name, optimizer, rng, Progress(step, spent + time.process_time(), means)
            )
            _save_preview(work, name, optimizer, preview)
            saved_at = time.monotonic()


def save_state(
    work: Path, name: str, optimizer: Optimizer, rng: torch.Generator, progress: Progress
) -> None:
    """Write WORK/NAME.state, from which `train` goes on, and the averaged weights beside it."""
    rest = {"means": progress.means, "core_seconds": progress.core_seconds}
    state = {"optimizer": optimizer.state(), "rng": rng.get_state(), **rest}
    torch.save(state, work / f"{name}.state.tmp")
    save_file(optimizer.averaged(), work / f"{name}.safetensors.tmp")
    for suffix in ("state", "safetensors"):
        (work / f"{name}.{suffix}.tmp").rename(work / f"{name}.{suffix}")


def _save_preview(work: Path, name: str, optimizer: Optimizer, preview) -> None:
    optimizer.use(averaged=True)
    with torch.no_grad():
        pictures = preview()
    optimizer.use(averaged=False)
    if pictures is not None:
        save_sheet(pictures, work / f"{name}.png")


def save_sheet(pictures: torch.Tensor, path: Path, columns: int = 12) -> None:
    """Write pictures (n, 3, h, w) in [-1, 1] as one PNG, row by row."""
    n, _, height, width = pictures.shape
    rows = -(-n // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    pixels = (
        ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    )
    for i, picture in enumerate(pixels):
        y, x = i // columns * height, i % columns * width
        sheet[y : y + height, x : x + width] = picture
    temporary = path.with_suffix(".tmp")
    Image.fromarray(sheet).save(temporary, format="png")
    temporary.rename(path)
