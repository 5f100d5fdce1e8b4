"""Results as a run would make them, of times that are drawn."""

import secrets
from dataclasses import replace

import numpy as np

from ferrotype.runtime.bench.results import (
    Machine,
    OpTime,
    Protocol,
    Quality,
    Result,
    Sample,
    StageMemory,
    Timeline,
    Variant,
)

PARTS = {"load": 0.1, "text_encoder": 0.05, "unet": 0.5, "vae_decoder": 0.3, "other": 0.05}
STEPS = 4


def rng():
    """Fresh; a failure names its seed."""
    seed = secrets.randbits(32)
    print("seed", seed)
    return np.random.default_rng(seed)


def samples(generator, seconds, rounds=30, noise=0.05, factor=lambda part: 1.0, **more):
    """Pictures of about `seconds`, times `factor` of how far the run is, with a tail upwards."""
    found = []
    for index in range(rounds):
        spread = np.exp(noise * generator.standard_normal()) + noise * generator.exponential() / 2
        total = float(seconds * spread * factor(index / max(1, rounds - 1)))
        stages = {name: (part * total,) for name, part in PARTS.items()}
        shares = generator.dirichlet(np.full(STEPS, 200))
        stages["unet"] = tuple(float(PARTS["unet"] * total * share) for share in shares)
        values = {key: value(index / max(1, rounds - 1)) for key, value in more.items()}
        found.append(Sample(index, float(index), total, stages, **values))
    return tuple(found)


def variant(name, taken, **more):
    """A native bundle's."""
    about = {
        "weights": "bf16", "activations": "bf16", "bundle_sha256": "ab" * 32,
        "bundle_bytes": 30 << 20,
        "settings": {"size": "512x512", "steps": STEPS, "threads": 2},
        "starts": (0.3, 0.31), "predicted_peak": 40 << 20,
        "memory": (StageMemory("unet", 40 << 20, 38 << 20, 20 << 20, 18 << 20),
                   StageMemory("vae_decoder", 30 << 20, 29 << 20, 25 << 20, 4 << 20)),
        "timeline": Timeline(
            (("unet", 0.1, 0.7), ("vae_decoder", 0.7, 1.0)),
            ((0.0, 0, 0), (0.2, 10 << 20, 9 << 20), (0.5, 20 << 20, 18 << 20),
             (0.9, 25 << 20, 4 << 20)),
        ),
    }  # fmt: skip
    return Variant(name, "native", "a model", taken, **{**about, **more})


def result(*variants, machine="a laptop", **more):
    """Of variants that took turns."""
    here = Machine(machine, "A Processor", "Linux 6.1 x86_64", 8, ("avx2",), 16 << 30)
    rounds = max(len(v.samples) for v in variants)
    how = Protocol(rounds, 1, 0.95, "seconds", 60.0, 5, 0.02, 60.0, 0)
    found = Result(secrets.token_hex(8), "2026-01-02T03:04:05Z", "ferrotype 1.0", here, how,
                   tuple(variants), "ferrotype bench a b")  # fmt: skip
    return replace(found, **more)


def full(generator):
    """A result with everything that a report can show."""
    ops = (
        OpTime("unet", "conv 3x3 64x64 320 -> 320", 4, 0.2, 2e11, 3e7, 2e12),
        OpTime("vae_decoder", "group norm 512x512, 128", 2, 0.1, 0.0, 5e8),
    )
    small = {"weights": "w8", "bundle_sha256": "cd" * 32, "bundle_bytes": 15 << 20}
    return result(
        variant("bf16", samples(generator, 1.0), quality=Quality(60.0, 50.0), profile=ops),
        variant("w8", samples(generator, 0.8), quality=Quality(45.0, 36.5), **small),
        variant(
            "w8 small", samples(generator, 0.2),
            **small | {"settings": {"size": "256x256", "steps": STEPS, "threads": 2}},
        ),
    )  # fmt: skip
