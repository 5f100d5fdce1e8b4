"""What a run takes, before it starts: a plan that fits the budget, or a refusal.

A plan says of every stage how its weights are in memory (kept, loaded for the stage, or streamed
through a window), how its activations are laid out, and how many bytes that is.  It is computed
from the manifest and the index of the weights; none of the weights is read.  Docs: docs/memory.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import kernels
from ..bundle import TEXT_ENCODERS, Bundle, BundleError, Tokenizer
from ..errors import FerrotypeError
from ..kernels import Kind, Type
from . import models, tiles
from .bands import Bands, choices
from .engines.native import Files, Fit, open_files, usable_threads
from .engines.onnx import expands
from .engines.onnx_memory import memory as onnx_memory
from .layout import Layout
from .memory import MIB, format_bytes, trim
from .program import Graph, GraphError, Node, Weight
from .window import Schedule, schedule

FORMAT = 1
ROWS = (32, 16)  # of an image in bands: no slower than whole, and nearly the least
# Beside weights and activations, each measured (docs/memory.md): the engine's threads and the
# objects of a run; what a tokenizer's tables take per byte of its file, while they are built.
HOST = 12 * MIB + (1 << 19)
PER_OP = 800  # bytes of what describes an op
# What Python keeps of the memory in which plans were made: bytes per op of the longest program that
# was tried, and per tensor of the largest index.
LEFT_BY_OP, LEFT_BY_TENSOR = 1500, 2600
PER_THREAD = 160 << 10
TOKENIZER = 10
# Bytes per pixel of arrays and the picture; those before the encoder runs are gone when it does.
PIXEL, BEFORE = {"vae_decoder": 20, "vae_encoder": 20}, {"vae_encoder": 52}
LATENT = 12  # arrays of latents that a sampler holds
# Bytes per value of the states of a prompt's further chunks: of two prompts, the pieces they are
# joined from, and what an engine makes of them.
TEXT = 24
# Rough speeds, as parts of what the multiply-accumulate loop reaches (results/native_ops.md).
LINEAR, WINOGRAD, DOUBLED, ATTENTION, NARROW = 0.85, 1.7, 2.05, 0.6, 1.6
FLOPS = 4e11  # where nobody measured
ONNX = 2e11  # FLOP/s of onnxruntime in fp32 (results/native.md)
BYTES = 8e9  # per second, of ops that only move data
FAULTS = 1.6e10  # per second, of weights whose pages are mapped again


@dataclass(frozen=True)
class Run:
    """What is to be drawn.  `size` is (width, height) in pixels; guidance is two `passes`.

    `image`: it starts from a picture.  `repeats`: more will follow, so what fits stays loaded.
    `streams`: whether the system that runs it can stream weights, if that is not this one.
    `chunks`: of the longest prompt, each as long as what the text encoder reads at once.
    """

    size: tuple[int, int]
    steps: int
    passes: int = 1
    image: bool = False
    repeats: bool = False
    streams: bool | None = None
    chunks: int = 1


@dataclass(frozen=True)
class Stage:
    """A component's turn.  Bytes are those in memory at once."""

    component: str
    mode: str  # resident | staged | streamed
    runs: int
    weights: int
    arena: int
    host: int
    seconds: float  # of all runs, roughly
    rows: int = 0  # of an image at a time; 0: all
    keep: int = 0
    window: int = 0  # bytes of the weights, if they are streamed; tables are read beside it
    tile: int = 0  # pixels of its side; 0: none
    ops: int = 0  # of the native engine's program
    apart: int = 0  # bytes of these that are never in memory together
    left: int = 0  # of host: what the making of the plan leaves
    frugal: bool = False  # the onnx target: weights are not expanded when it loads

    @property
    def peak(self) -> int:
        """What the stage takes by itself."""
        return self.weights + self.arena + self.host - self.apart

    @property
    def fit(self) -> Fit:
        """For the native engine."""
        bands = Bands(self.rows, self.keep) if self.rows else None
        return Fit(bands, self.window if self.mode == "streamed" else None)

    @property
    def note(self) -> str:
        """How it is made to fit, in words."""
        parts = [f"bands of {self.rows} rows"] if self.rows else []
        parts += [f"tiles of {self.tile} pixels: the picture changes"] if self.tile else []
        parts += ["weights expanded as they are used"] if self.frugal else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Plan:
    """Stages in the order of a run, and the most that is in memory at any time.

    All bytes are above what the interpreter with its libraries takes before a bundle is opened.
    """

    target: str
    size: tuple[int, int]
    steps: int
    threads: int
    isa: str | None
    budget: int | None
    stages: tuple[Stage, ...]
    format: int = FORMAT

    @property
    def residency(self) -> str:
        """The sparest mode of any stage."""
        modes = {stage.mode for stage in self.stages}
        return next(mode for mode in ("streamed", "staged", "resident") if mode in modes)

    @property
    def resident(self) -> int:
        """Bytes of the weights that stay."""
        return sum(s.weights for s in self.stages if s.mode == "resident")

    def during(self, stage: Stage) -> int:
        """Bytes in memory at a stage, with all that others left there."""
        others = self.resident - (stage.weights if stage.mode == "resident" else 0)
        return stage.peak + others

    @property
    def peak(self) -> int:
        return max(map(self.during, self.stages))

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def stage(self, component: str) -> Stage | None:
        """The component's; None if it has none in this run."""
        return next((s for s in self.stages if s.component == component), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "peak": self.peak,
            "residency": self.residency,
            "seconds": round(self.seconds, 3),
        }


class Refusal(FerrotypeError):
    """Nothing fits the budget.  `stage` needs `needed` bytes, `smallest` is what would do."""

    def __init__(self, message: str, stage: str, needed: int, smallest: int) -> None:
        super().__init__(message)
        self.stage, self.needed, self.smallest = stage, needed, smallest


def make(
    bundle: Bundle,
    run: Run,
    budget: int | None = None,
    threads: int | None = None,
    isa: str | None = None,
    tiles: bool = False,
    flops: float = FLOPS,
) -> Plan:
    """The fastest plan whose peak is within `budget` bytes.

    `tiles` lets the autoencoder work in overlapping tiles where nothing else fits, the one thing
    that changes the picture.  `flops`: what this machine multiplies in a second.  Raises Refusal.
    """
    case = _Case(bundle, run, threads or usable_threads(), isa, tiles, flops)
    stages = _choose_all(case, budget)
    if budget is not None and _peak(stages) > budget:
        raise _refusal(case, stages, budget)
    trim()  # what the layouts took that were tried
    target = bundle.manifest.target
    plan = Plan(target, run.size, run.steps, case.threads, isa, budget, stages)
    return _all_resident(plan) if run.repeats else plan


def components(bundle: Bundle, run: Run) -> list[tuple[str, int]]:
    """What a run loads, in order, and how often each runs."""
    texts = 1 if bundle.manifest.recipe.zero_negative else run.passes
    names = [name for name in TEXT_ENCODERS if name in bundle.manifest.components]
    counts = {
        **dict.fromkeys(names, texts * run.chunks),
        "vae_encoder": int(run.image),
        "unet": run.passes * run.steps,
        "vae_decoder": 1,
    }
    return [(name, count) for name, count in counts.items() if count]


def _choose_all(case: _Case, budget: int | None) -> tuple[Stage, ...]:
    """A stage for each component; all plans are made before the first of them runs."""
    left = 0
    while True:
        stages = tuple(
            _choose(case.offers(name, runs), budget, left)
            for name, runs in components(case.bundle, case.run)
        )
        if left == (left := max(left, *(stage.left for stage in stages))):
            return stages


def _choose(offers: Iterator[Stage], budget: int | None, left: int) -> Stage:
    """The first that fits, else the smallest."""
    least: Stage | None = None
    for offer in offers:
        left = max(left, offer.left)
        stage = dataclasses.replace(offer, host=offer.host + left, left=left)
        if budget is None or stage.peak <= budget:
            return stage
        if least is None or stage.peak < least.peak:
            least = stage
    assert least
    return least


def _peak(stages: tuple[Stage, ...]) -> int:
    return max(stage.peak for stage in stages)


def _refusal(case: _Case, stages: tuple[Stage, ...], budget: int) -> Refusal:
    """With the smallest budget that would do: nothing fits a byte less."""
    while _peak(less := _choose_all(case, _peak(stages) - 1)) < _peak(stages):
        stages = less
    worst = max(stages, key=lambda stage: stage.peak)
    needed, (width, height) = format_bytes(worst.peak, up=True), case.run.size
    moves = [f"--memory {needed.replace(' ', '')}", "a smaller --size"]
    if worst.component == "vae_decoder" and not case.tiles:
        moves.append("--tiles")
    return Refusal(
        f"{worst.component} needs at least {needed} for {width}x{height}, the budget is "
        f"{format_bytes(budget)}: try {' or '.join(moves)}",
        worst.component,
        worst.peak,
        worst.peak,
    )


def _all_resident(plan: Plan) -> Plan:
    """The plan with everything kept, if that fits."""
    if plan.residency != "staged":
        return plan
    stages = tuple(dataclasses.replace(stage, mode="resident") for stage in plan.stages)
    kept = dataclasses.replace(plan, stages=stages)
    return kept if plan.budget is None or kept.peak <= plan.budget else plan


# --- what each component could do ---------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    bundle: Bundle
    run: Run
    threads: int
    isa: str | None
    tiles: bool
    flops: float

    def offers(self, component: str, runs: int) -> Iterator[Stage]:
        """Ways to run a component, fastest first."""
        pixels = self.run.size[0] * self.run.size[1]
        before = self.held + BEFORE.get(component, 0) * pixels  # nothing is loaded then
        for stage in self._ways(component, runs):
            yield dataclasses.replace(stage, host=stage.host + max(0, before - stage.peak))

    def _ways(self, component: str, runs: int) -> Iterator[Stage]:
        match self.bundle.manifest.target:
            case "native":
                yield from self._native(component, runs, self.run.size)
            case "onnx":
                yield from self._onnx(component, runs, self.run.size)
            case _:
                yield self._device(component, runs)
        if component == "vae_decoder" and self.tiles:
            yield from self._tiled(component, runs)

    @property
    def held(self) -> int:
        """Bytes of what is there in every stage: latents, and what drives the engine."""
        decoder = self.bundle.component("vae_decoder").config
        side = 2 ** (len(decoder["block_out_channels"]) - 1)
        latents = 4 * decoder["latent_channels"] * self.run.size[0] * self.run.size[1] // side**2
        return HOST + PER_THREAD * self.threads + LATENT * latents + TEXT * self.more_text

    @property
    def more_text(self) -> int:
        """Values of a prompt's states beyond the first chunk, which is in HOST."""
        if self.run.chunks == 1:
            return 0
        tokens = (self.run.chunks - 1) * _tokenizer(self.bundle, "text_encoder").max_length
        width = self.bundle.component("unet").inputs["encoder_hidden_states"].shape[-1]
        return tokens * int(width)

    def host(self, component: str, size: tuple[int, int]) -> int:
        """Bytes of arrays, and of what drives the engine."""
        if component in TEXT_ENCODERS:
            files = self.bundle.manifest.files
            path = _tokenizer(self.bundle, component).path
            file = files.get(f"{path}/tokenizer.json")
            return self.held + int(TOKENIZER * (file.bytes if file else 0))
        return self.held + PIXEL.get(component, 0) * size[0] * size[1]

    def _native(self, component: str, runs: int, size: tuple[int, int]) -> Iterator[Stage]:
        files = open_files(self.bundle, component)
        shapes = shapes_of(self.bundle, component, size, self.run.chunks)
        for bands in ways(files, shapes):
            cost = _cost(files, shapes, bands, self.threads, self.isa)
            seconds = runs * (cost.flops / self.flops + cost.bytes / BYTES)
            again = cost.weights / FAULTS
            left = LEFT_BY_OP * cost.ops + LEFT_BY_TENSOR * len(files.places)
            stage = Stage(
                component, "staged", runs, cost.weights + cost.rows, cost.arena,
                self.host(component, size) + PER_OP * cost.ops, seconds + again,
                bands.rows if bands else 0, bands.keep if bands else 0, ops=cost.ops,
                left=left,
            )  # fmt: skip
            yield stage
            pixels = PIXEL.get(component, 0) * size[0] * size[1]  # there when weights are gone
            streams = kernels.can_stream() if self.run.streams is None else self.run.streams
            for window, apart in cost.windows if streams else ():
                yield dataclasses.replace(
                    stage,
                    mode="streamed",
                    weights=window + cost.rows,
                    window=window,
                    apart=apart + min(window - apart, pixels)
                    if Fit(window=window).fresh(component)
                    else 0,
                    seconds=seconds + runs * again,
                )

    def _onnx(self, component: str, runs: int, size: tuple[int, int]) -> Iterator[Stage]:
        seconds, more = _onnx_text(self.bundle, component, size, self.run.chunks)
        seconds *= runs
        for frugal in (False, True) if expands(self.bundle, component) else (False,):
            taken = onnx_memory(self.bundle, component, size, frugal)
            text = (self.run.chunks - 1) * taken.activations if more is None else more
            beside = taken.activations + taken.scratch + text
            yield Stage(
                component, "staged", runs, taken.weights, beside,
                self.host(component, size), seconds, frugal=frugal,
            )  # fmt: skip

    def _device(self, component: str, runs: int) -> Stage:
        """What its compiler said, where it said anything: the largest of the devices."""
        part = self.bundle.component(component)
        said = max(part.memory.values(), key=lambda memory: memory.total, default=None)
        weights = said.weights if said else self.bundle.bytes_of(part.path)
        beside = said.activations + said.scratch if said else 0
        return Stage(
            component, "staged", runs, weights, beside, self.host(component, self.run.size), 0.0
        )

    def _tiled(self, component: str, runs: int) -> Iterator[Stage]:
        """The autoencoder in overlapping tiles, largest first."""
        for side in tiles.SIDES:
            if max(self.run.size) <= side:
                continue
            size = min(side, self.run.size[0]), min(side, self.run.size[1])
            count = tiles.count(self.run.size, side)
            offers = self._native if self.bundle.manifest.target == "native" else self._onnx
            beside = tiles.PIXEL * self.run.size[0] * self.run.size[1]
            for stage in offers(component, runs, size):
                yield dataclasses.replace(
                    stage, tile=side, host=stage.host + beside, seconds=count * stage.seconds
                )


def _tokenizer(bundle: Bundle, encoder: str) -> Tokenizer:
    name = TEXT_ENCODERS[encoder]
    if name not in bundle.manifest.tokenizers:
        raise BundleError(f"{bundle.folder} has no {name}")
    return bundle.manifest.tokenizers[name]


def shapes_of(
    bundle: Bundle, component: str, size: tuple[int, int], chunks: int = 1
) -> models.Shapes:
    """Of a component's inputs, for a picture of this size and a prompt of so many chunks."""
    config = bundle.component(component).config
    decoder = bundle.component("vae_decoder").config
    side = 1 if component == "vae_encoder" else 2 ** (len(decoder["block_out_channels"]) - 1)
    text = chunks * _tokenizer(bundle, "text_encoder").max_length
    return models.sizes(component, config, (size[0] // side, size[1] // side), text)


# --- what a component costs ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Cost:
    ops: int
    arena: int
    weights: int  # bytes of the file that are read, but for tables
    rows: int  # bytes of tables that come into memory
    # that weights can pass through, largest first; bytes of each, and of it and the arena, that are
    # not in memory at the same time, where the arena begins anew
    windows: tuple[tuple[int, int], ...]
    flops: float  # of the multiply-accumulate loop, in whose time they are done
    bytes: float  # moved by ops that do not multiply


def ways(files: Files, shapes: models.Shapes) -> Iterator[Bands | None]:
    """Ways to cut a component's images, fastest first."""
    yield None
    if files.component not in ("vae_decoder", "vae_encoder"):
        return
    for keep in reversed(choices(files.graph(shapes))):
        for rows in ROWS:
            yield Bands(rows, keep)


_costs: dict[tuple, _Cost] = {}


def _cost(
    files: Files, shapes: models.Shapes, bands: Bands | None, threads: int, isa: str | None
) -> _Cost:
    """Kept by what it depends on: the same component is asked for again with every budget."""
    key = (files.folder, files.bytes, tuple(sorted(shapes.items())), bands, threads, isa)
    if key not in _costs:
        while len(_costs) >= 256:
            del _costs[next(iter(_costs))]
        _costs[key] = _work_out(files, shapes, bands, threads, isa)
    return _costs[key]


def _work_out(
    files: Files, shapes: models.Shapes, bands: Bands | None, threads: int, isa: str | None
) -> _Cost:
    graph, layout = files.prepare(shapes, bands, threads, isa)
    passing = schedule(graph, files.places, files.bytes)
    weights = weights_but_tables(graph, files)
    work = [_work(node, files.places, isa) for node in graph.nodes]
    return _Cost(
        len(graph.nodes),
        layout.arena_bytes,
        weights,
        passing.rows,
        tuple(
            (w, w + layout.arena_bytes - _together(layout, passing, w))
            for w in passing.windows(weights)
        ),
        sum(flops for flops, _ in work),
        sum(moved for _, moved in work),
    )


def weights_but_tables(graph: Graph, files: Files) -> int:
    """Bytes of a component's file that are read whole: of tables only some rows are."""
    tables = {p.name for n in graph.nodes for p in (n.weight, n.bias) if p and p.form == "table"}
    return files.bytes - sum(files.places[name].bytes for name in tables)


def _together(layout: Layout, passing: Schedule, window: int) -> int:
    """The most of arena and window at any op: the one fills up while the other runs empty."""
    pairs = zip(layout.touched, passing.left, strict=True)
    return max(touched + min(window, left) for touched, left in pairs)


def _work(node: Node, places: Mapping[str, Weight], isa: str | None) -> tuple[float, float]:
    """FLOP of the bare loop that take as long as the op, and bytes if it does not multiply."""
    flops = _flops(node)
    if not flops:
        return 0.0, 2.0 * node.out.h * node.out.w * node.out.c * node.out.storage.type.bytes
    if node.kind is Kind.ATTENTION:
        return flops / ATTENTION, 0.0
    doubled = DOUBLED / LINEAR if node.settings.get("upsample") else 1.0
    if node.weight and places[node.weight.name].narrow:
        return flops / (NARROW * doubled), 0.0
    if node.settings.get("upsample"):
        return flops / DOUBLED, 0.0
    fewer = node.settings.get("winograd") and kernels.uses_winograd(node.lower(places), isa)
    return flops / (WINOGRAD if fewer else LINEAR), 0.0


def _flops(node: Node) -> float:
    """Of the products, counted by the direct method."""
    pixels = node.out.h * node.out.w
    if node.kind is Kind.ATTENTION and node.b:
        return 4.0 * pixels * node.b.h * node.b.w * node.a.c
    if node.kind is not Kind.MATMUL or not node.weight:
        return 0.0
    inputs = sum(node.weight.inputs) * node.weight.side**2
    return 2.0 * pixels * node.weight.outputs * inputs


def _onnx_text(
    bundle: Bundle, component: str, size: tuple[int, int], chunks: int
) -> tuple[float, int | None]:
    """Seconds of one run by onnxruntime, and bytes that it takes beyond what was measured.

    Measured was one chunk of text; each more has keys and values in every layer that attends to it,
    and the operator copies of them: up to 1.9 times as much was seen, twice is counted.  None for a
    network that our own graphs do not know.
    """
    config, outputs = bundle.component(component).config, bundle.component(component).outputs
    try:
        shapes = shapes_of(bundle, component, size, chunks)
        graph = models.build(component, config, shapes, Type.F32, outputs)
    except GraphError:
        return 0.0, None if component == "unet" else 0
    seconds = sum(map(_flops, graph.nodes)) / ONNX
    if component != "unet":
        return seconds, 0
    _, tokens, _ = shapes["encoder_hidden_states"]
    reads = (n for n in graph.nodes if n.kind is Kind.ATTENTION and n.b and n.b.w == tokens)
    more = tokens - tokens // chunks
    return seconds, sum(4 * Type.F32.bytes * more * node.a.c for node in reads)
