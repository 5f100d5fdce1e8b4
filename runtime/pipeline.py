"""The pipeline: a bundle, a prompt and a seed become latents, step by step, and then a picture."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from .. import bundle as bundles
from .. import kernels
from ..bundle import TEXT_ENCODERS, Bundle, Recipe
from ..errors import FerrotypeError
from . import memory, prompts, recipes, samplers, schedules, tiles
from . import plan as plans
from .engines import Arrays, Engine, open_engine
from .engines.native import Arena
from .memory import parse_bytes
from .plan import Plan, Run, Stage
from .samplers import Step, Table
from .seeds import SEEDS, Noise
from .tokenizer import Tokenizer, Tokens

Array32 = npt.NDArray[np.float32]

EMBEDDED = Path(__file__).parent.parent / "models" / "emoji.ferro"  # for the native engine
EMBEDDED_ONNX = EMBEDDED.with_name("emoji-onnx.ferro")  # the same model for onnxruntime
MAX_GUIDANCE = 50.0
ROWS = 64  # of a picture that are turned into bytes at once
CACHED_PROMPTS = 64  # embeddings are a few hundred KiB; encoding again would load the text encoder
# What a sampler is run on when the recipe was made for another one.
SPACING = {"lcm": "lcm", "tcd": "lcm"}


class Text(NamedTuple):
    """What the U-Net is told of a prompt."""

    states: Array32  # (1, tokens, channels), of all text encoders side by side
    pooled: Array32 | None  # (1, channels), if a second text encoder returns it


class PipelineError(FerrotypeError):
    """A network returned something that is no picture."""


class PromptWarning(UserWarning):
    """A part of the prompt is not used."""


class EngineWarning(UserWarning):
    """Something slower draws, because the native engine is not there."""


def embedded() -> Path:
    """The bundle that draws if none is named: the native one where its engine was built.

    Else the ONNX one, with an EngineWarning that says what is missing.
    """
    if kernels.available():
        return EMBEDDED
    warnings.warn(
        "the native engine is not built, because no C++17 compiler was there when ferrotype was "
        "installed: onnxruntime draws instead, slower; install g++ or clang, then ferrotype again",
        EngineWarning,
        stacklevel=2,
    )
    return EMBEDDED_ONNX


class Pipeline:
    """Draws with a bundle.

    `budget` is in bytes, above what the interpreter takes: what does not fit is refused before
    anything is loaded, by plan.Refusal.  One component is in memory at a time, unless
    `resident`: then each stays once loaded, if all fit.  The picture is the same.  `tiles` lets the
    autoencoder work in tiles where nothing else fits, which changes it a little.  `isa` is the
    instruction set that the native engine is to use, by name, if not the best that runs here.
    `opener` loads a component; by default the engine of the bundle's target.  `watch` is told the
    component before each of its runs.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        resident: bool = False,
        opener: Callable[[Bundle, str], Engine] | None = None,
        isa: str | None = None,
        budget: int | None = None,
        tiles: bool = False,
        watch: Callable[[str], object] = lambda component: None,
    ) -> None:
        if threads is not None and not 1 <= threads <= 64:
            raise ValueError(f"threads is {threads}: it must be 1 to 64")
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.budget = budget
        self._threads, self._isa, self._opener, self._tiles = threads, isa, opener, tiles
        self._resident, self._watch = resident, watch
        self._arena = Arena()
        self._engines: dict[str, tuple[Stage | None, Engine]] = {}
        self._texts: dict[tuple[str, int], Text] = {}
        self._tokens: dict[str, dict[str, Tokens]] = {}
        self.planned: Plan | None = None  # of the run before, for what is asked for apart

    @classmethod
    def load(
        cls,
        path: str | os.PathLike | None = None,
        threads: int | None = None,
        resident: bool = False,
        isa: str | None = None,
        memory: int | str | None = None,
        tiles: bool = False,
        watch: Callable[[str], object] = lambda component: None,
    ) -> Pipeline:
        """Open the bundle at `path`, or the embedded one; no weights are read yet.

        `memory` is the budget: bytes, or text like "512MiB".  Raises BundleError for anything that
        is no sound bundle, ValueError for what is no amount of memory.
        """
        budget = parse_bytes(memory) if isinstance(memory, str) else memory
        bundle = bundles.load(embedded() if path is None else path)
        return cls(bundle, threads, resident, isa=isa, budget=budget, tiles=tiles, watch=watch)

    # --- what a run will do ---------------------------------------------------------------------

    def recipe(
        self,
        steps: int | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        force: bool = False,
    ) -> Recipe:
        """The bundle's recipe with what the caller changes.

        Raises ValueError for a value that no sampler takes, recipes.RecipeRefusal for one that the
        model was not distilled for, unless `force`.
        """
        recipe = own = self.manifest.recipe
        if guidance is not None and not 0 <= guidance <= MAX_GUIDANCE:
            raise ValueError(f"guidance is {guidance}: it must be from 0 to {MAX_GUIDANCE:g}")
        if sampler is not None and sampler != recipe.sampler:
            schedules.choose("sampler", sampler, samplers.SAMPLERS)
            recipe = dataclasses.replace(
                recipe,
                sampler=sampler,
                spacing=SPACING.get(sampler, "trailing"),
                eta=samplers.ETA.get(sampler, 0.0),
                timesteps=(),
            )
        recipe = dataclasses.replace(
            recipe,
            steps=recipe.steps if steps is None else steps,
            guidance=recipe.guidance if guidance is None else guidance,
            spacing=recipe.spacing if spacing is None else spacing,
            eta=recipe.eta if eta is None else eta,
        )
        if not force:
            recipes.check(recipe, own)
        elif own.name and (recipe.steps, recipe.spacing) != (own.steps, own.spacing):
            recipe = dataclasses.replace(recipe, timesteps=())  # those were of its own steps
        return recipe

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels that one latent stands for: 8 in every Stable Diffusion."""
        return 2 ** (len(self.bundle.component("vae_decoder").config["block_out_channels"]) - 1)

    def plan(
        self,
        table: Table,
        guidance: float,
        size: tuple[int, int] | None = None,
        flops: float = plans.FLOPS,
        chunks: int = 1,
    ) -> Plan:
        """How a run fits the budget: what is loaded, and the most that is in memory.

        `chunks` are those of the prompts.  `flops`: what the machine multiplies in a second, for
        rough times.  Raises plan.Refusal.
        """
        size = size or self.manifest.sizes.default
        passes = 2 if self._two_passes(guidance) else 1
        image = bool(table.start_image)
        run = Run(size, len(table.rows), passes, image, self._resident, chunks=chunks)
        return plans.make(
            self.bundle, run, self.budget, self._threads, self._isa, self._tiles, flops
        )

    # --- the stages -----------------------------------------------------------------------------

    def chunks(self, *texts: str) -> int:
        """How many chunks the longest of these prompts takes; 1 where the U-Net reads no more.

        Raises ValueError for a weight out of range.
        """
        for text in texts:
            prompts.parse(text)
        return max(1 if self._is_short(text) else self._chunks_of(text) for text in texts)

    def encode(self, prompt: str, chunks: int | None = None) -> Text:
        """What the text encoders say of a prompt, with its weights; kept for the next call.

        `chunks` are at least as many as it takes, for one beside a longer one.  Warns with
        PromptWarning where the end of the prompt is not read.
        """
        key = prompt, self.chunks(prompt) if chunks is None else chunks
        if key not in self._texts:
            tokens = self._tokens_of(prompt)
            self._make_room()
            parts = [self._encode(name, t.padded(key[1])) for name, t in tokens.items()]
            states = np.concatenate([states for states, _ in parts], axis=-1)
            _keep(self._texts, key, Text(states, parts[-1][1]))
        return self._texts[key]

    def _encode(self, encoder: str, tokens: Tokens) -> tuple[Array32, Array32 | None]:
        """Weighted states of all chunks in a row, and the pooled ones of the first."""
        outputs = [self._run(encoder, {"input_ids": row[None]}) for row in tokens.ids]
        name = bundles.states_of(outputs[0])
        states = np.concatenate([out[name] for out in outputs], axis=1)
        normed = name == "last_hidden_state"  # what SDXL reads is not, and its mean means nothing
        weighted = prompts.weigh(states, tokens.weights.reshape(1, -1), restore=normed)
        return weighted, outputs[0].get("text_embeds")

    def _tokens_of(self, prompt: str) -> dict[str, Tokens]:
        """A prompt's tokens by text encoder, all in the same number of chunks; kept."""
        if prompt not in self._tokens:
            self._make_room()
            most = prompts.MAX_CHUNKS if self._reads_chunks else 1
            found = {
                name: Tokenizer(self.bundle, TEXT_ENCODERS[name]).chunks(prompt, most)
                for name in self._text_encoders
            }
            memory.trim()  # the tokenizers' tables are tens of megabytes
            for told in dict.fromkeys((t.dropped, t.ids.size) for t in found.values() if t.dropped):
                warnings.warn(_dropped(*told), PromptWarning, 3)
            count = max(len(tokens.ids) for tokens in found.values())
            _keep(self._tokens, prompt, {n: tokens.padded(count) for n, tokens in found.items()})
        return self._tokens[prompt]

    def _chunks_of(self, prompt: str) -> int:
        return max(len(tokens.ids) for tokens in self._tokens_of(prompt).values())

    def _is_short(self, prompt: str) -> bool:
        """Whether it is one chunk for certain: every token is of one character or more."""
        room = min((t.max_length for t in self.manifest.tokenizers.values()), default=0) - 2
        short = prompt.isascii() and len(prompt) <= room and "BREAK" not in prompt
        return short or not self._reads_chunks

    @property
    def _reads_chunks(self) -> bool:
        """Whether the U-Net takes text of any length."""
        context = self.bundle.component("unet").inputs.get("encoder_hidden_states")
        return context is not None and isinstance(context.shape[1], str)

    def steps(
        self,
        prompt: str,
        *,
        negative: str = "",
        steps: int | None = None,
        seed: int = 0,
        sampler: str | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        image: Image.Image | None = None,
        strength: float = 0.6,
        spacing: str | None = None,
        eta: float | None = None,
        rng: str = "torch",
        force: bool = False,
    ) -> Iterator[Step]:
        """Denoise, yielding a Step after each; its `latents` are (1, 4, height/8, width/8).

        `size` is (width, height).  With `image`, start from it: `strength` 1 forgets it, near 0
        keeps it.  Whoever iterates owns progress, preview and cancelling: closing ends the run.
        Arguments are checked here, before the first step: ValueError says what would work, also
        where the bundle's recipe does not allow them, unless `force`.
        """
        recipe = self.recipe(steps, sampler, guidance, spacing, eta, force)
        size = self.manifest.sizes.check(size or self.manifest.sizes.default)
        table = samplers.table(recipe, None if image is None else strength)
        noise = schedules.choose("rng", rng, SEEDS)(seed)
        if negative and not self._two_passes(recipe.guidance):
            raise ValueError(
                f"a negative prompt has no effect at guidance {recipe.guidance:g} with this model: "
                "leave it out" + ("" if self._embeds_guidance else " or set guidance above 1")
            )
        if not self._opener:  # engines of others have no plan; before tokenizers take their room
            self.planned = self.plan(table, recipe.guidance, size)
        chunks = self.chunks(prompt, negative)
        if chunks > 1 and not self._opener:
            self.planned = self.plan(table, recipe.guidance, size, chunks=chunks)
        plan, guidance = self.planned, recipe.guidance
        return self._denoise(plan, prompt, negative, chunks, guidance, table, noise, size, image)

    def _denoise(
        self,
        plan: Plan | None,
        prompt: str,
        negative: str,
        chunks: int,
        guidance: float,
        table: Table,
        noise: Noise,
        size: tuple[int, int],
        image: Image.Image | None,
    ) -> Iterator[Step]:
        self.planned = plan
        text = self.encode(prompt, chunks)
        negative_text = None
        if self._two_passes(guidance):
            zeros = self.manifest.recipe.zero_negative and not negative
            negative_text = _zeros_like(text) if zeros else self.encode(negative, chunks)
        latents = None if image is None else self.encode_image(image, size, noise)
        side = self.pixels_per_latent
        channels = self.bundle.component("vae_decoder").config["latent_channels"]
        fresh = noise((1, channels, size[1] // side, size[0] // side))
        extra = {}
        if self._embeds_guidance:
            extra["timestep_cond"] = self._guidance_embedding(guidance)
        if "time_ids" in self._unet_inputs:
            width, height = size  # as if trained on pictures of this size, and nothing cropped
            extra["time_ids"] = np.array([[height, width, 0, 0, height, width]], np.float32)

        def predict(x: Array32, timestep: float) -> Array32:
            self.planned = plan  # another run may have begun meanwhile
            inputs = {"sample": x, "timestep": np.array(timestep, np.float32), **extra}
            conditional = self._unet(inputs, text)
            if negative_text is None:
                return conditional
            unconditional = self._unet(inputs, negative_text)
            return unconditional + np.float32(guidance) * (conditional - unconditional)

        start = samplers.start(table, fresh, latents)
        for step in samplers.sample(predict, start, table, noise):
            if not np.isfinite(step.latents).all():
                raise PipelineError(
                    f"the unet returned NaN or Inf at step {step.index} of {step.total}: "
                    "the bundle's precision overflows; convert with --activations fp32"
                )
            yield step

    def decode(self, latents: Array32 | Step) -> Image.Image:
        """The picture of latents, or of a Step's."""
        sample = self._decoded(latents.latents if isinstance(latents, Step) else latents)
        picture = np.empty((*sample.shape[2:], 3), np.uint8)
        for first in range(0, len(picture), ROWS):  # a few at a time: no copies of the whole
            rows = slice(first, first + ROWS)
            picture[rows] = (_to_pixels(sample[:, :, rows]) * 255).round()
        return Image.fromarray(picture)

    def decode_array(self, latents: Array32) -> Array32:
        """The picture of latents as float32 in [0, 1]: (height, width, 3)."""
        return _to_pixels(self._decoded(latents))

    def _decoded(self, latents: Array32) -> Array32:
        """(1, 3, height, width) in about [-1, 1]."""
        config = self.bundle.component("vae_decoder").config
        scaled = latents / np.float32(config["scaling_factor"])
        side = self.pixels_per_latent
        stage = self._stage("vae_decoder", (side * latents.shape[3], side * latents.shape[2]))

        def run(piece: Array32) -> Array32:
            return self._run("vae_decoder", {"latent_sample": piece}, stage)["sample"]

        tile = stage.tile if stage else 0
        sample = tiles.decode(scaled, tile, side, run) if tile else run(scaled)
        if not all(np.isfinite(plane).all() for plane in sample[0]):
            raise PipelineError(
                "the vae_decoder returned NaN or Inf, which would be a black picture: "
                "convert with --activations fp32"
            )
        return sample

    def encode_image(self, image: Image.Image, size: tuple[int, int], noise: Noise) -> Array32:
        """Latents of a picture, scaled and cropped to `size`; draws once from `noise`."""
        self._make_room()
        pixels = np.asarray(_fit(image, size), np.float32) / 127.5 - 1
        sample = pixels.transpose(2, 0, 1)[None]
        stage = self._stage("vae_encoder", size)
        parameters = self._run("vae_encoder", {"sample": sample}, stage)["latent_parameters"]
        mean, log_variance = np.split(parameters, 2, axis=1)
        std = np.exp(np.float32(0.5) * log_variance.clip(-30, 20))
        factor = self.bundle.component("vae_decoder").config["scaling_factor"]
        return (mean + std * noise(mean.shape)) * np.float32(factor)

    def preview(self, step: Step, decode: bool = False) -> Image.Image:
        """What the picture will be, seen from a step: a linear guess at once, or decoded."""
        if decode:
            return self.decode(step.denoised)
        weights = np.array(self.manifest.preview, np.float32)
        rgb = np.einsum("bchw,ck->bkhw", step.denoised, weights[:-1])
        small = _to_pixels(rgb + weights[-1][None, :, None, None])
        picture = Image.fromarray((small * 255).round().astype(np.uint8))
        side = self.pixels_per_latent
        return picture.resize(
            (picture.width * side, picture.height * side), Image.Resampling.BICUBIC
        )

    def generate(
        self,
        prompt: str,
        *,
        negative: str = "",
        steps: int | None = None,
        seed: int = 0,
        sampler: str | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        image: Image.Image | None = None,
        strength: float = 0.6,
        force: bool = False,
    ) -> Image.Image:
        """The short way: every step, then the picture.  Arguments as in `steps`."""
        *_, last = self.steps(
            prompt,
            negative=negative,
            steps=steps,
            seed=seed,
            sampler=sampler,
            guidance=guidance,
            size=size,
            image=image,
            strength=strength,
            force=force,
        )
        picture = self.decode(last)
        if not self._resident:
            self.release()
        return picture

    def release(self) -> None:
        """Give back the memory of every loaded component."""
        self._engines.clear()

    def _make_room(self) -> None:
        """For what needs some before a component runs: a plan counts nothing beside it."""
        if not self._resident:
            self.release()
        self._arena.release()

    # --- components -----------------------------------------------------------------------------

    def _run(self, component: str, inputs: Arrays, stage: Stage | None = None) -> Arrays:
        stage = stage or self._stage(component)
        opened = self._engines.get(component)
        if opened is None or opened[0] != stage:
            if not self._resident or (stage and stage.mode != "resident"):
                self.release()  # before the next is loaded, so that two are never in memory
            self._engines.pop(component, None)
            self._engines[component] = stage, self._load(component, stage)
        self._watch(component)
        return self._engines[component][1](inputs)

    def _load(self, component: str, stage: Stage | None) -> Engine:
        if self._opener:
            return self._opener(self.bundle, component)
        return open_engine(self.bundle, component, self._threads, self._isa, stage, self._arena)

    def _stage(self, component: str, size: tuple[int, int] | None = None) -> Stage | None:
        """How the plan of the run has a component; for what is asked for apart, a plan of its own.

        Engines of others have none.
        """
        if self._opener:
            return None
        now = self.planned
        size = size or (now.size if now else self.manifest.sizes.default)
        stage = now.stage(component) if now and now.size == size else None
        if stage is None:
            run = Run(size, 1, image=component == "vae_encoder", repeats=self._resident)
            self.planned = plans.make(
                self.bundle, run, self.budget, self._threads, self._isa, self._tiles
            )
            stage = self.planned.stage(component)
        return stage

    def _unet(self, inputs: Arrays, text: Text) -> Array32:
        inputs = {**inputs, "encoder_hidden_states": text.states}
        if text.pooled is not None and "text_embeds" in self._unet_inputs:
            inputs["text_embeds"] = text.pooled
        return self._run("unet", inputs)["out_sample"]

    @property
    def _unet_inputs(self) -> Container[str]:
        return self.bundle.component("unet").inputs

    @property
    def _text_encoders(self) -> list[str]:
        second = [n for n in ("text_encoder_2",) if n in self.manifest.components]
        return ["text_encoder", *second]

    @property
    def _embeds_guidance(self) -> bool:
        """Whether the U-Net takes the guidance scale as an input (distilled latent consistency)."""
        return "timestep_cond" in self._unet_inputs

    def _two_passes(self, guidance: float) -> bool:
        return guidance not in (0, 1) and not self._embeds_guidance

    def guidance_frequencies(self) -> npt.NDArray[np.float64]:
        """Those of the sinusoids of the guidance scale: (time_cond_proj_dim / 2,)."""
        half = self.bundle.component("unet").config["time_cond_proj_dim"] // 2
        return np.exp(np.arange(half) * -(math.log(10000) / (half - 1)))

    def _guidance_embedding(self, guidance: float) -> Array32:
        """Sinusoids of the guidance scale, as latent consistency models were trained with.

        Luo et al. 2023; (1, time_cond_proj_dim).
        """
        angles = 1000 * (guidance - 1) * self.guidance_frequencies()
        return np.concatenate([np.sin(angles), np.cos(angles)]).astype(np.float32)[None]


def _keep(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Add to a cache of prompts; the oldest goes."""
    while len(cache) >= CACHED_PROMPTS:
        del cache[next(iter(cache))]
    cache[key] = value


def _zeros_like(text: Text) -> Text:
    pooled = None if text.pooled is None else np.zeros_like(text.pooled)
    return Text(np.zeros_like(text.states), pooled)


def _to_pixels(sample: Array32) -> Array32:
    """(1, 3, height, width) in [-1, 1] to (height, width, 3) in [0, 1]."""
    return (sample[0].transpose(1, 2, 0) / 2 + np.float32(0.5)).clip(0, 1)


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Upright, on white where transparent, scaled and cropped around the middle to `size`."""
    image = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    return ImageOps.fit(flat, size, Image.Resampling.LANCZOS)


def _dropped(text: str, limit: int) -> str:
    shown = text if len(text) <= 40 else text[:39] + "…"
    return f"the text encoder reads {limit} tokens, so the end of the prompt is unused: {shown!r}"
