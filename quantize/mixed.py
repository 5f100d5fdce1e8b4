"""Bits where they pay: what each layer's rounding costs the picture, and the best choice of all.

Every matrix alone is rounded to every form while all else stays as it was, and the same pictures
are drawn again: errors of single layers are nearly independent, so squares of them add up.  Then
the forms with the least sum within the bytes are found by dynamic programming.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import kernels, parity
from ..bundle import TEXT_ENCODERS, Bundle
from ..kernels import Type
from ..runtime import models
from ..runtime.engines import Arrays
from ..runtime.engines.native import (
    WEIGHTS,
    open_files,
    read_output,
    usable_threads,
    write_input,
)
from ..runtime.memory import format_bytes
from ..runtime.pipeline import Pipeline
from ..runtime.program import LINE, TYPES, Packed, Weight, round_up
from ..runtime.seeds import SEEDS
from . import native
from .apply import exception, written
from .calibrate import PROMPTS, CalibrationError, Statistics, few, small
from .recipe import UNQUANTIZED, Recipe, RecipeError, Rule, parse

UNITS = 1 << 13  # that the bytes are counted in
KEPT = "fp16"  # how a recipe says that a matrix stays as it is stored
DECODED = 16  # trials of a component whose picture is looked at, not only its latents
STEP = 0.002  # of the bytes, by which a search for a floor ends


@dataclass(frozen=True)
class Choice:
    """A matrix and what each form of it takes: bytes in the file, squared error of the picture."""

    component: str
    sources: tuple[str, ...]
    values: int
    forms: Mapping[str, tuple[int, float]]


@dataclass(frozen=True)
class Table:
    """What was measured: all matrices of a model, and the bytes of everything else."""

    model: str
    activations: str
    rest: int
    choices: tuple[Choice, ...]

    def bytes_of(self, chosen: Sequence[str]) -> int:
        """Of the weights' files, with these forms in the order of the choices."""
        pairs = zip(self.choices, chosen, strict=True)
        return self.rest + sum(choice.forms[form][0] for choice, form in pairs)

    def psnr_of(self, chosen: Sequence[str]) -> float:
        """What the errors add up to, in dB of the picture."""
        pairs = zip(self.choices, chosen, strict=True)
        return _psnr(sum(choice.forms[form][1] for choice, form in pairs))

    def bits_of(self, chosen: Sequence[str]) -> float:
        """Mean bits of the stored integers and floats, without scales."""
        bits = {"w4": 4, "w8": 8}
        kept = 32 if self.activations == "fp32" else 16
        pairs = list(zip(self.choices, chosen, strict=True))
        total = sum(choice.values * bits.get(form, kept) for choice, form in pairs)
        return total / sum(choice.values for choice, _ in pairs)

    def dump(self) -> str:
        """As JSON, to choose again without measuring."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def loads(cls, text: str) -> Table:
        """What dump wrote.  ValueError for anything else."""
        try:
            raw = json.loads(text)
            choices = tuple(
                Choice(
                    str(c["component"]),
                    tuple(map(str, c["sources"])),
                    int(c["values"]),
                    {str(f): (int(b), float(e)) for f, (b, e) in c["forms"].items()},
                )
                for c in raw["choices"]
            )
            return cls(str(raw["model"]), str(raw["activations"]), int(raw["rest"]), choices)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a table of sensitivities: {error}") from None


# --- choosing -----------------------------------------------------------------------------------


def within(table: Table, budget: int) -> list[str]:
    """The forms with the least error whose files take at most so many bytes.

    Raises RecipeError, which says the least that is possible.
    """
    room = budget - table.rest
    least = sum(min(b for b, _ in choice.forms.values()) for choice in table.choices)
    if room < least:
        raise RecipeError(
            f"a size of {format_bytes(budget)} cannot be met: the least is "
            f"{format_bytes(table.rest + least, up=True)}"
        )
    unit = max(1, room / UNITS)
    limit = int(room / unit)  # in units; sizes are rounded up to them
    best = np.zeros(limit + 1)  # least error by the units that were used at most
    back = []
    for choice in table.choices:
        trials = np.full((len(choice.forms), limit + 1), np.inf)
        for i, (size, error) in enumerate(choice.forms.values()):
            used = math.ceil(size / unit)
            if used <= limit:
                trials[i, used:] = best[: limit + 1 - used] + error
        back.append(trials.argmin(0))
        best = trials.min(0)
    if not np.isfinite(best[limit]):  # only because sizes were rounded up: what is least fits
        return [min(c.forms, key=lambda form: c.forms[form][0]) for c in table.choices]
    chosen, left = [], limit
    for choice, choices in zip(reversed(table.choices), reversed(back), strict=True):
        form = list(choice.forms)[choices[left]]
        chosen.append(form)
        left -= math.ceil(choice.forms[form][0] / unit)
    return chosen[::-1]


def frontier(table: Table, points: int = 24) -> list[dict[str, float]]:
    """The best of every size: bytes of the files, mean bits and dB, from the least to the most."""
    sizes = [[b for b, _ in choice.forms.values()] for choice in table.choices]
    low, high = (table.rest + sum(map(pick, sizes)) for pick in (min, max))
    found = []
    for size in np.geomspace(low * (1 + STEP), high, points):
        forms = within(table, math.ceil(size))
        found.append(_point(table, forms))
    return [p for i, p in enumerate(found) if p not in found[:i]]


def uniform_points(table: Table) -> dict[str, dict[str, float]]:
    """What recipes of one form come to, by form."""
    return {form: _point(table, [*uniform(table, form)]) for form in native.FORMS}


def _point(table: Table, forms: Sequence[str]) -> dict[str, float]:
    return {
        "bytes": table.bytes_of(forms),
        "bits": round(table.bits_of(forms), 3),
        "psnr": round(table.psnr_of(forms), 2),
    }


def at_least(table: Table, psnr: float) -> list[str]:
    """The forms with the fewest bytes whose errors add up to no less than so many dB.

    Raises RecipeError, which says the best that is possible.
    """
    finest = [min(c.forms, key=lambda form: c.forms[form][1]) for c in table.choices]
    if table.psnr_of(finest) < psnr:
        raise RecipeError(
            f"a picture of {psnr:g} dB cannot be met: the best is {table.psnr_of(finest):.1f} dB"
        )
    sizes = [[b for b, _ in choice.forms.values()] for choice in table.choices]
    low, high = (table.rest + sum(map(pick, sizes)) for pick in (min, max))
    found = finest
    while high - low > STEP * low:
        middle = (low + high) // 2
        trial = within(table, middle)
        if table.psnr_of(trial) >= psnr:
            found, high = trial, middle
        else:
            low = middle
    return found


def recipe_of(table: Table, chosen: Sequence[str], note: str = "") -> Recipe:
    """The choice as a recipe, its rules the exceptions from what most matrices take."""
    counts = {form: list(chosen).count(form) for form in ("w4", "w8")}
    default = max(counts, key=lambda form: counts[form])
    rules = []
    for choice, form in zip(table.choices, chosen, strict=True):
        plain = Recipe.uniform(default)
        for source in choice.sources:
            taken, _ = plain.choose(choice.component, source, (choice.values, 1))
            if str(taken) != form:
                why = f"{_psnr(choice.forms[default][1]):.0f} dB alone as {default}"
                rules.append(Rule(f"{choice.component}/{source}", parse(form), why))
    return Recipe(parse(default), tuple(rules), model=table.model, note=note)


def _psnr(error: float) -> float:
    return parity.PSNR_CAP if error <= 0 else min(parity.PSNR_CAP, -10 * math.log10(error))


# --- measuring ----------------------------------------------------------------------------------


def measure(
    bundle: Bundle,
    statistics: Statistics,
    activations: str | None = None,
    prompts: Sequence[str] = PROMPTS[:2],
    seeds: Sequence[int] = (0,),
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
    """Draw with every matrix in every form, one at a time; a native bundle of plain weights.

    `size` and `steps` as in calibrate.  Raises CalibrationError without prompts or seeds.
    """
    if not prompts or not seeds:
        raise CalibrationError("nothing to measure with: give at least one prompt and one seed")
    activations = activations or bundle.manifest.precision.activations
    size, steps = size or small(bundle.manifest.sizes), steps or few(bundle)
    lab = _Lab(bundle, [(p, s) for p in prompts for s in seeds], size, steps)
    requests = {
        name: models.weights(name, spec.config, spec.outputs)
        for name, spec in bundle.manifest.components.items()
    }
    total = sum(request.is_matrix for packed in requests.values() for request in packed)
    rest, choices = 0, []
    for component, packed in requests.items():
        engine = lab.engine(component)
        computed = exception(bundle, component, activations) or activations
        plain = TYPES[UNQUANTIZED[computed]]
        for request in packed:
            if not request.is_matrix:
                rest += round_up(request.bytes(Type.F32)[0], LINE)
                continue
            moments = statistics.get(f"{component}/{request.name}")
            forms = {KEPT: (_stored_bytes(request, plain), 0.0)}
            for name in _candidates(component, request):
                kind = native.FORMS[name]
                place = engine.place(request, kind, activations == "int8")
                data, _ = written(request, engine.files, engine.raw, place, moments)
                with engine.instead(request.name, place, data):
                    forms[name] = (_stored_bytes(request, kind), lab.error(component))
            choices.append(Choice(component, request.sources, _count(request), forms))
            progress(len(choices), total)
        lab.done(component)
    return Table(bundle.manifest.model, activations, rest, tuple(choices))


def _candidates(component: str, request: Packed) -> list[str]:
    """Forms that a rule may give the matrix: small ones are never quantized."""
    shape = (request.outputs, sum(request.inputs), request.side, request.side)
    rule = Rule("*", parse("w8"))
    form, _ = Recipe(parse("w8"), (rule,)).choose(component, request.sources[0], shape)
    return list(native.FORMS) if form.quantizes else []


def _stored_bytes(request: Packed, kind: Type) -> int:
    return round_up(request.bytes(kind)[0], native.PAGE)


def _count(request: Packed) -> int:
    return request.outputs * sum(request.inputs) * request.side**2


class _Lab:
    """The pictures of a bundle, and how far they move when a weight does."""

    def __init__(
        self,
        bundle: Bundle,
        runs: Sequence[tuple[str, int]],
        size: tuple[int, int] | None,
        steps: int | None,
    ) -> None:
        self.bundle, self._runs, self._size, self._steps = bundle, runs, size, steps
        self._engines: dict[str, _Variable] = {}
        self._pipe = self._fresh()
        self._latents, self._pictures = [], []
        # Squared error of the picture to that of its latents, by component: much the same whichever
        # layer it comes from, so that few pictures must be decoded.
        self._gains: dict[str, list[float]] = {}
        for prompt, seed in runs:
            self._latents.append(self._sampled(self._pipe, prompt, seed))
            self._pictures.append(self._pipe.decode_array(self._latents[-1]))
        self._encoded = self._encode() if "vae_encoder" in bundle.manifest.components else []

    def engine(self, component: str) -> _Variable:
        """The engine of a component, whose weights can be exchanged."""
        if component not in self._engines:
            self._engines[component] = _Variable(self.bundle, component)
        return self._engines[component]

    def done(self, component: str) -> None:
        """No more of its weights will be exchanged: what was made for that may go."""
        self._engines[component].shrink()

    def error(self, component: str) -> float:
        """Mean squared error of the pictures, as they are drawn now; 1 is black for white."""
        if component == "vae_encoder":  # it draws nothing from noise: its own error, alike
            pairs = zip(self._encoded, self._encode(), strict=True)
            spread = np.mean([np.var(p) for p in self._pictures])
            return float(np.mean([np.mean((a - b) ** 2) / np.var(a) for a, b in pairs]) * spread)
        if component == "vae_decoder":
            return self._decoded_error(self._latents)
        pipe = self._fresh() if component in TEXT_ENCODERS else self._pipe
        found = [self._sampled(pipe, prompt, seed) for prompt, seed in self._runs]
        error, gains = _mean_square(found, self._latents), self._gains.setdefault(component, [])
        if len(gains) >= DECODED or error == 0:
            return error * float(np.median(gains or [0.0]))
        decoded = self._decoded_error(found)
        gains.append(decoded / error)
        return decoded

    def _decoded_error(self, latents: Sequence[np.ndarray]) -> float:
        return _mean_square([self._pipe.decode_array(x) for x in latents], self._pictures)

    def _fresh(self) -> Pipeline:
        """One that knows no prompt yet."""
        return Pipeline(self.bundle, resident=True, opener=lambda _, name: self.engine(name))

    def _sampled(self, pipe: Pipeline, prompt: str, seed: int) -> np.ndarray:
        *_, last = pipe.steps(prompt, seed=seed, size=self._size, steps=self._steps)
        return last.latents

    def _encode(self) -> list[np.ndarray]:
        """Latents of the first picture, from the encoder."""
        picture = self._pipe.decode(self._latents[0])
        return [self._pipe.encode_image(picture, picture.size, SEEDS["torch"](0))]


def _mean_square(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    return float(np.mean([np.mean((a - b) ** 2) for a, b in zip(found, expected, strict=True)]))


class _Variable:
    """A native component in memory, one of whose weights can be another for a while."""

    def __init__(self, bundle: Bundle, component: str) -> None:
        self.files = open_files(bundle, component)
        self._plain = self.files
        self.raw = np.memmap(self.files.folder / WEIGHTS, np.uint8, "r")
        self._end = round_up(self.files.bytes, native.PAGE)
        self._weights: np.ndarray = self.raw
        self._programs: dict[tuple, Any] = {}

    def place(self, request: Packed, kind: Type, narrow: bool) -> Weight:
        """Where a matrix of another type would lie: behind all others."""
        size, scales = request.bytes(kind)
        quantized = bool(request.scales(kind))
        start = self._end + scales if quantized else None
        return Weight(kind, self._end, size, start, narrow and quantized)

    @contextmanager
    def instead(self, name: str, place: Weight, data: bytes) -> Iterator[None]:
        """Within it, the component has that weight."""
        if len(self._weights) < place.offset + len(data):
            room = kernels.aligned(place.offset + len(data))
            room[: len(self.raw)] = self.raw
            self._weights = room
        self._weights[place.offset : place.offset + len(data)] = np.frombuffer(data, np.uint8)
        places = {**self._plain.places, name: place}
        self.files, self._programs = dataclasses.replace(self._plain, places=places), {}
        try:
            yield
        finally:
            self.files, self._programs = self._plain, {}

    def shrink(self) -> None:
        """Give the copy of the weights back."""
        self._weights, self._programs = self.raw, {}

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run the network; arrays in, float32 arrays out."""
        shapes = {name: np.shape(value) for name, value in inputs.items()}
        key = tuple(sorted(shapes.items()))
        if key not in self._programs:
            threads = usable_threads()
            graph, placed = self.files.prepare(shapes, None, threads, None)
            program = kernels.Program(placed.ops, placed.arena_bytes, self._weights.nbytes, threads)
            arena = kernels.aligned(placed.arena_bytes)
            self._programs[key] = graph, placed.offsets, program, arena
        graph, offsets, program, arena = self._programs[key]
        for entry in graph.inputs:
            write_input(arena, offsets, entry, inputs[entry.name])
        program.run(arena, self._weights)
        return {o.name: read_output(arena, offsets, o) for o in graph.outputs}


def uniform(table: Table, form: str) -> Iterator[str]:
    """What every matrix takes with the recipe of one form, for comparison."""
    plain = Recipe.uniform(form)
    for choice in table.choices:
        taken, _ = plain.choose(choice.component, choice.sources[0], (choice.values, 1))
        yield str(taken) if str(taken) in choice.forms else KEPT
