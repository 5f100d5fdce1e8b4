"""Random native bundles of an exact architecture, without torch and without conversion.

Latency and memory do not depend on the values.  Weights are drawn in the order of the file and
scaled so that signals keep their size; padding is zero, as a conversion leaves it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import bundle as bundles
from .._version import __version__
from ..bundle import TEXT_ENCODERS, Bundle, Component, Manifest, Precision, Recipe, Sizes, Source
from ..bundle import Tokenizer as TokenizerSpec
from ..kernels import LANES, Type
from ..quantize import recipe as recipes
from ..quantize.native import choose, layout, write_index
from ..runtime import models
from ..runtime.engines.native import WEIGHTS, narrow
from ..runtime.program import GROUP, TYPES, Packed, padded
from . import checkpoints

BLOCK = 1 << 20  # random numbers; every tensor takes them from a place of its own
PAD, PAD_2 = "<|endoftext|>", "!"
RECIPE = Recipe("lcm", 4, 1.0, spacing="lcm")
MODELS = {"sd15": checkpoints.SD15, "sdxl": checkpoints.SDXL, "tiny": checkpoints.TINY}

Configs = Mapping[str, Mapping[str, Any]]


def write(
    folder: Path,
    configs: Configs,
    weights: str = "bf16",
    activations: str = "bf16",
    size: tuple[int, int] = (512, 512),
    recipe: Recipe = RECIPE,
    tokenizer: Path = checkpoints.TOKENIZER / "tokenizer.json",
    seed: int = 0,
) -> Bundle:
    """Write a bundle to a new folder; `configs` are by component as in checkpoints, vae for both.

    `size` is the default of its pictures, `tokenizer` a file whose ids are in the vocabulary.  With
    a text_encoder_2 it is one of SDXL.
    """
    block = np.random.default_rng(seed).standard_normal(BLOCK, np.float32)
    parts = {
        name: _config(name, configs["vae" if name.startswith("vae_") else name], tokenizer)
        for name in models.COMPONENTS
        if name in configs or name.startswith("vae_")
    }
    with bundles.staging(folder) as staged:
        components = {
            name: _component(
                staged, name, config, "text_encoder_2" in configs, (weights, activations), block
            )
            for name, config in parts.items()
        }
        names = {TEXT_ENCODERS[n]: c for n, c in parts.items() if n in TEXT_ENCODERS}
        tokenizers = {
            name: TokenizerSpec(
                name, config["max_position_embeddings"], PAD if name == "tokenizer" else PAD_2
            )
            for name, config in names.items()
        }
        for name in tokenizers:
            (staged / name).mkdir()
            shutil.copyfile(tokenizer, staged / name / "tokenizer.json")
        latents = parts["vae_decoder"].get("latent_channels", 4)
        levels = [len(parts[n]["block_out_channels"]) - 1 for n in ("unet", "vae_decoder")]
        manifest = Manifest(
            format=bundles.FORMAT,
            tool=f"ferrotype {__version__}",
            model="random",
            family="sdxl" if "text_encoder_2" in configs else "sd",
            target="native",
            licence="none",
            source=Source("random", "0" * 64),
            precision=Precision(weights, activations),
            sizes=Sizes(size, 2 ** sum(levels), min(64, *size)),
            recipe=recipe,
            preview=((0.1, 0.2, 0.3),) * (latents + 1),
            tokenizers=tokenizers,
            components=components,
            parity={},
        )
        return bundles.save(staged, folder, manifest)


def forms(
    component: str, packed: Sequence[Packed], weights: str, activations: str
) -> tuple[str, dict[str, Type]]:
    """What most matrices are stored as, and those in few bits, by name: where nothing is padded."""
    if weights in TYPES:
        return weights, {}
    chosen, _ = choose(component, packed, recipes.Recipe.uniform(weights))
    whole = {r.name for r in packed if r.is_matrix and _kept(r, Type.F32) is None}
    few_bits = {name: kind for name, kind in chosen.items() if name in whole}
    if weights == "w4":  # groups of one size
        few_bits = {r.name: Type.I4 for r in packed if r.name in few_bits and _even(r)}
    return recipes.UNQUANTIZED[activations], few_bits


def _even(request: Packed) -> bool:
    return all(padded(count) % GROUP == 0 for count in request.inputs)


def write_weights(
    folder: Path,
    packed: Sequence[Packed],
    weights: str,
    few_bits: Mapping[str, Type] | None = None,
    block: np.ndarray | None = None,
) -> None:
    """weights.bin and weights.json of random tensors; matrices are `weights` or `few_bits`."""
    if block is None:
        block = np.random.default_rng(0).standard_normal(BLOCK, np.float32)
    places = layout(packed, TYPES[weights], few_bits)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / WEIGHTS).open("wb") as file:
        for request in packed:
            file.write(bytes(places[request.name].offset - file.tell()))
            if request.name in (few_bits or {}):
                _draw_few_bits(file, request, places[request.name].type)
            else:
                _draw(file, request, TYPES[weights], block)
        size = file.tell()
    write_index(folder, packed, places, size)


# --- components ---------------------------------------------------------------------------------


def _config(name: str, config: Mapping[str, Any], tokenizer: Path) -> dict[str, Any]:
    """With what a checkpoint's own config.json would hold beside it."""
    defaults: dict[str, Any] = {}
    if name in TEXT_ENCODERS:
        ids = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
        defaults = {"eos_token_id": ids[PAD]}
    elif name.startswith("vae_"):
        defaults = {"latent_channels": 4, "scaling_factor": 1.0}
        if config.get("_class_name") == models.TINY:
            defaults["block_out_channels"] = list(config["decoder_block_out_channels"])
    return {**defaults, **config}


def _component(
    staged: Path,
    name: str,
    config: dict[str, Any],
    is_xl: bool,
    precision: tuple[str, str],
    block: np.ndarray,
) -> Component:
    inputs, outputs = models.interface(name, config, is_xl if name in TEXT_ENCODERS else None)
    if name in TEXT_ENCODERS and not is_xl:
        del outputs["pooler_output"]
    packed, (weights, activations) = models.weights(name, config, outputs), precision
    write_weights(staged / name, packed, *forms(name, packed, weights, activations), block)
    return Component(name, config, inputs, outputs)


# --- numbers ------------------------------------------------------------------------------------


def _draw(file: Any, request: Packed, weights: Type, block: np.ndarray) -> None:
    """Write one tensor: scales of norms near one, biases small, matrices by what they add up."""
    start = zlib.crc32(request.name.encode()) % (len(block) // 2)
    kind, shape = request.type(weights), request.shape(weights)
    count = math.prod(shape)
    source = block[start : start + count] if 2 * count < len(block) else np.roll(block, -start)
    if request.form in ("vector", "geglu_vector"):
        is_scale = request.sources[0].endswith("weight")
        source = source[:count] * np.float32(0.05) + np.float32(is_scale)
        file.write((source * _kept(request, weights)).astype(np.float32).data)
        return
    taps = {"matmul": request.side**2, "geglu": 1, "upsample": 4, "table": 1}[request.form]
    deep = 1 if request.form == "table" else taps * sum(request.inputs)
    piece = narrow(source * np.float32(1 / math.sqrt(deep)), kind)
    kept = _kept(request, weights)
    if kept is None:  # nothing is padded
        for first in range(0, count, len(piece)):
            file.write(piece[: count - first].data)
    else:
        file.write((np.resize(piece, shape) * kept.astype(piece.dtype)).data)


def _draw_few_bits(file: Any, request: Packed, kind: Type) -> None:
    """Whole numbers, and scales of which every sum keeps its size; nothing is padded."""
    rng = np.random.default_rng(zlib.crc32(request.name.encode()))
    taps = 4 if request.form == "upsample" else request.side**2
    shape, scale = request.shape(kind), 1 / math.sqrt(taps * sum(request.inputs))
    if kind is Type.I4:
        values = rng.integers(0, 256, shape, np.uint8)
        group = GROUP * (LANES // 2) + 2 * LANES
        scales = np.full(LANES, scale / 4.6, "<f2").view(np.uint8)
        assert shape[-1] % group == 0, f"{request.name} has groups of several sizes"
        values.reshape(*shape[:-1], -1, group)[..., : 2 * LANES] = scales
        file.write(values.data)
        return
    file.write(rng.integers(-127, 128, shape, np.int8).data)
    size, start = request.bytes(kind)
    file.write(bytes(start - math.prod(shape)))
    file.write(np.full((size - start) // 4, scale / 73, "<f4").data)


def _kept(request: Packed, weights: Type) -> Any:
    """One where a packed tensor holds numbers and zero where it is padded; None: nothing is."""
    gated = request.form.startswith("geglu")
    outputs = request.outputs // 2 if gated else request.outputs
    rows = np.arange(padded(outputs)) < outputs
    if gated:
        rows = np.repeat(rows.reshape(-1, 1, LANES), 2, axis=1).reshape(-1)
    if not request.inputs:
        return rows
    columns = np.concatenate([np.arange(padded(n)) < n for n in request.inputs])
    if rows.all() and columns.all():
        return None
    if request.form == "table":
        return np.tile(columns, (request.outputs, 1))
    if weights is Type.BF16:  # (blocks, taps, pairs of inputs, outputs, 2)
        inside = columns.reshape(-1, 1, 2) & rows.reshape(-1, 1, 1, LANES, 1)
    else:
        inside = columns.reshape(-1, 1) & rows.reshape(-1, 1, 1, LANES)
    return np.broadcast_to(inside, request.shape(weights))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", default="bf16", choices=(*TYPES, "w8", "w4"))
    parser.add_argument("--activations", default="bf16", choices=(*TYPES, "int8"))
    given = parser.parse_args()
    began = time.perf_counter()
    made = write(given.folder, MODELS[given.model], given.weights, given.activations)
    total = sum(file.bytes for file in made.manifest.files.values())
    print(f"{given.folder}: {total:,} bytes in {time.perf_counter() - began:.0f} s")
