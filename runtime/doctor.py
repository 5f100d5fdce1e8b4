"""Whether a bundle will run on a device that is not here, and what to convert if it will not.

What a device allows is data, devices.json, every figure with its source; whether a bundle fits is
the planner's word alone; what would leave the accelerator is a rule with a source each.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import kernels
from ..bundle import Bundle, Memory, strict_json
from ..errors import FerrotypeError
from . import recipes
from .memory import format_bytes

PATH = Path(__file__).with_name("devices.json")
FORMAT = 1
FITS, STAGED, STREAMED = "fits", "fits only staged", "fits only streamed"
CHUNKED, TOO_LARGE, NO_ENGINE = "fits only in chunks", "does not fit", "does not run"
BY_RESIDENCY = {"resident": FITS, "staged": STAGED, "streamed": STREAMED}
ENTITLEMENT = "com.apple.developer.kernel.increased-memory-limit"
MEANING = {  # of a limit
    "kill": "beyond it the system ends the app",
    "soft": "beyond it Android 17 swaps the app out and ends it when that is full; before, it ends "
    "apps whenever memory is short",
    "share": "what the system and its desktop leave, not a limit that it enforces",
}
FORMS = {  # what convert takes as --weights, from the most bits to the least, by target
    "coreml": {"fp16": 16, "p8": 8, "p6": 6, "p4": 4},
    "tensorrt": {"fp16": 16, "w8": 8, "w4": 4},
}
FEW_BITS = 6  # Apple advises no fewer for palettes (the README of coreml_piece_bits)
MOST_CHUNKS = 16  # that convert cuts a U-Net into
CHUNKS = (1, 2, 4, 8)  # that are tried
CUT = 1.05  # pieces are equal within 5 %
FRACTIONS = (3 / 4, 1 / 2, 1 / 4)  # of the size, tried where nothing else fits
NOT_STREAMING = ("windows",)  # our engine maps weights as POSIX systems do
OURS = "ferrotype"  # the source of what is so by our own engines

# --- devices ------------------------------------------------------------------------------------

WORDS: dict[str, tuple[str, ...]] = {
    "kind": ("phone", "tablet", "laptop", "desktop", "handheld", "board"),
    "host": ("app", "python"),  # what the engine runs in
    "os": ("ios", "macos", "android", "linux", "windows"),
    "limit_kind": tuple(MEANING),
    "accelerator": ("none", "neural-engine", "nvidia", "unsupported"),
}
FIGURES: dict[str, type] = {
    "memory": int, "limit": int, "entitled": int, "gpu_memory": int, "gpu_limit": int,
    "cores": int, "isa": str, "oldest": str, "newest": str, "capability": str,
}  # fmt: skip
FACTS: dict[str, type] = {
    "baseline_app": int, "baseline_python": int, "baseline_onnxruntime": int, "baseline_cuda": int,
    "coreml_piece_bytes": int, "coreml_piece_bits": int, "coreml_compressed_in_memory": int,
    "coreml_new_forms": int, "neural_engine_type": str, "neural_engine_attention": str,
    "rtx_capabilities": list, "rtx_integer_products": list,
}  # fmt: skip
TABLES = ("confidence", "sources", "facts")
TARGETS = ("native", "onnx", "coreml", "tensorrt")


class DeviceError(FerrotypeError):
    """devices.json is not what it must be.  The message says where."""


@dataclass(frozen=True)
class Figure:
    """A figure with where it is from: `confidence` is a word of devices.json."""

    value: Any
    confidence: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class Device:
    """What a device has and allows; `limit` is what one app may use of `memory`.

    `entitled` is the limit of an app with Apple's entitlement; `gpu_limit` that on a GPU with
    memory of its own.  `oldest` and `newest` are the systems that it was sold with and that it
    takes, by their numbers.
    """

    id: str
    name: str
    kind: str
    host: str
    os: str
    targets: tuple[str, ...]
    memory: Figure
    limit: Figure
    limit_kind: str
    cores: Figure
    isa: Figure
    accelerator: str
    aliases: tuple[str, ...] = ()
    notes: tuple[Figure, ...] = ()
    entitled: Figure | None = None
    gpu_memory: Figure | None = None
    gpu_limit: Figure | None = None
    oldest: Figure | None = None
    newest: Figure | None = None
    capability: Figure | None = None

    def __post_init__(self) -> None:
        where = f"device {self.id}"
        for name in ("limit", "entitled"):
            figure = getattr(self, name) or self.limit
            within = self.limit.value <= figure.value <= self.memory.value
            _require(within, f"{where}: {name} is not between its limit and its memory")
        if self.gpu_limit and self.gpu_memory:
            within = self.gpu_limit.value <= self.gpu_memory.value
            _require(within, f"{where}: gpu_limit is more than gpu_memory")
        for system in filter(None, (self.oldest, self.newest)):
            _require(system.value.isdigit(), f"{where}: {system.value!r} is no system's number")
        if "tensorrt" in self.targets:
            _require(self.capability, f"{where}: tensorrt without a compute capability")
        if "coreml" in self.targets:
            _require(self.oldest and self.newest, f"{where}: coreml without oldest and newest")


@dataclass(frozen=True)
class Data:
    """All of devices.json: what is so for every device, and the devices by name."""

    facts: Mapping[str, Figure]
    devices: Mapping[str, Device]

    def find(self, name: str) -> Device:
        """The device of that name; a ValueError suggests names that are close."""
        names = {alias: d for d in self.devices.values() for alias in (d.id, *d.aliases)}
        asked = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        if asked in names:
            return names[asked]
        near = difflib.get_close_matches(asked, names, 4, 0.5)
        hint = f"perhaps {', '.join(near)}; " if near else ""
        raise ValueError(f"no device {name[:60]!r}: {hint}--list shows all")


@functools.cache
def devices() -> Data:
    """The devices that come with this package."""
    return loads(PATH.read_text(encoding="utf-8"), PATH.name)


def loads(text: str, where: str) -> Data:
    """Parse a file of devices; every fault is a DeviceError that names the field."""
    try:
        raw = _fields(strict_json(text), "", {"format", *TABLES, "devices"})
        _require(raw["format"] == FORMAT, f"format is {raw['format']!r}, this reads {FORMAT}")
        for name in TABLES:
            _require(isinstance(raw[name], dict), f"{name} is no object")
        read = functools.partial(_figure, sources=raw["sources"], words=raw["confidence"])
        facts = _fields(raw["facts"], "facts", set(FACTS))
        found = [_device(entry, read) for entry in _list(raw["devices"], "devices", dict)]
        names = [name for d in found for name in (d.id, *d.aliases)]
        twice = sorted({name for name in names if names.count(name) > 1})
        _require(not twice, f"devices: {', '.join(twice)} is there twice")
        return Data(
            {name: read(facts[name], f"facts.{name}", kind) for name, kind in FACTS.items()},
            {device.id: device for device in found},
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise DeviceError(f"{where} is not valid: {error}; install ferrotype again") from None


def _device(raw: dict, read: Any) -> Device:
    names = {field.name for field in dataclasses.fields(Device)}
    required = {f.name for f in dataclasses.fields(Device) if f.default is dataclasses.MISSING}
    where = f"device {str(raw.get('id', ''))[:40]!r}"
    _fields(raw, where, required, names)
    aliases = tuple(_list(raw.get("aliases", []), f"{where}: aliases", str))
    for name in (raw["id"], *aliases):
        plain = isinstance(name, str) and re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name)
        _require(plain, f"{where}: {str(name)[:40]!r} is no name")
    _require(isinstance(raw["name"], str), f"{where}: name is no text")
    for name, known in WORDS.items():
        _require(raw[name] in known, f"{where}: {name} {raw[name]!r} is not {', '.join(known)}")
    targets = _list(raw["targets"], f"{where}: targets", str)
    _require(set(targets) <= set(TARGETS), f"{where}: targets are not of {', '.join(TARGETS)}")
    notes = _list(raw.get("notes", []), f"{where}: notes", dict)
    figures = {
        name: read(raw[name], f"{where}: {name}", kind)
        for name, kind in FIGURES.items()
        if name in raw
    }
    return Device(
        **{name: raw[name] for name in ("id", "name", *WORDS)},
        targets=tuple(targets),
        aliases=aliases,
        notes=tuple(read(n, f"{where}: notes", str) for n in notes),
        **figures,
    )


def _figure(raw: Any, where: str, kind: type, sources: dict, words: dict) -> Figure:
    _fields(raw, where, {"value", "confidence", "source"}, {"note"})
    value = raw["value"]
    sound = type(value) is kind and (value if type(value) is int else 1) > 0
    _require(sound, f"{where} is {str(value)[:40]!r}, not a {kind.__name__} above 0")
    _require(raw["confidence"] in words, f"{where}: confidence is not one of {', '.join(words)}")
    _require(raw["source"] in sources, f"{where}: {str(raw['source'])[:40]!r} is no source")
    return Figure(value, raw["confidence"], sources[raw["source"]], raw.get("note", ""))


def _fields(raw: Any, where: str, required: set[str], optional: Collection[str] = ()) -> dict:
    where = where or "it"
    _require(isinstance(raw, dict), f"{where} is no object")
    missing, unknown = required - raw.keys(), raw.keys() - required - set(optional)
    _require(not missing, f"{where} has no {min(missing, default='')}")
    _require(not unknown, f"{where} has the unknown field {min(unknown, default='')[:40]!r}")
    return raw


def _list(raw: Any, where: str, kind: type) -> list:
    fine = isinstance(raw, list) and all(type(entry) is kind for entry in raw)
    _require(fine, f"{where} is no list of {kind.__name__}")
    return raw


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)


# --- a diagnosis --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What a stage of the plan holds, in bytes."""

    component: str
    mode: str
    weights: int
    arena: int
    peak: int
    runs: int
    note: str  # how it was made to fit


@dataclass(frozen=True)
class Off:
    """What would not run on the accelerator, and why."""

    component: str
    reason: str
    source: str
    by_converting: bool = True  # whether another conversion mends it


@dataclass(frozen=True)
class Instead:
    """What to convert; `verdict` is the planner's from this bundle's weights, empty if unknown."""

    command: str
    why: str
    verdict: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found; all bytes are whole, `smallest` is the least budget that would do."""

    device: str
    name: str
    model: str
    target: str
    weights: str
    size: tuple[int, int]
    steps: int
    verdict: str
    limit: Figure
    limit_kind: str
    baseline: int
    budget: int
    peak: int | None = None
    refused: str = ""
    smallest: int | None = None
    stages: tuple[Held, ...] = ()
    off: tuple[Off, ...] = ()
    notes: tuple[str, ...] = ()
    instead: tuple[Instead, ...] = ()

    @property
    def fits(self) -> bool:
        return self.verdict not in (TOO_LARGE, NO_ENGINE)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "fits": self.fits}


@dataclass(frozen=True)
class _Case:
    """The question: a bundle, a device and a run, and who answers."""

    bundle: Bundle
    device: Device
    run: Any
    planner: Any
    facts: Mapping[str, Figure]
    tiles: bool = False

    @property
    def target(self) -> str:
        return self.bundle.manifest.target

    def limit(self, target: str) -> Figure:
        gpu = self.device.gpu_limit if target == "tensorrt" else None
        return gpu or self.device.limit

    def baseline(self, target: str) -> int:
        """What the process has before a bundle is opened."""
        device = self.device
        names = ["baseline_app" if device.host == "app" else "baseline_python"]
        if target == "onnx" and device.host == "python":
            names = ["baseline_onnxruntime"]
        elif target == "tensorrt":
            names = ["baseline_cuda"] if device.gpu_limit else [*names, "baseline_cuda"]
        return sum(self.facts[name].value for name in names)


@dataclass(frozen=True)
class _Outcome:
    verdict: str
    plan: Any = None
    refused: str = ""
    smallest: int | None = None


def examine(
    bundle: Bundle, device: Device, run: Any, planner: Any = None, data: Data | None = None
) -> Diagnosis:
    """Judge a run of a bundle on a device.

    `planner` has `make` and `Refusal` as runtime.plan has them, which is the default.
    """
    case = _Case(bundle, device, run, planner or _planner(), (data or devices()).facts)
    manifest, limit = bundle.manifest, case.limit(case.target)
    outcome = _outcome(case)
    off = tuple(_off(case)) if outcome.verdict != NO_ENGINE else ()
    plan = outcome.plan
    return Diagnosis(
        device=device.id,
        name=device.name,
        model=manifest.model,
        target=case.target,
        weights=manifest.precision.weights,
        size=run.size,
        steps=run.steps,
        verdict=outcome.verdict,
        limit=limit,
        limit_kind="share" if limit is device.gpu_limit else device.limit_kind,
        baseline=case.baseline(case.target),
        budget=limit.value - case.baseline(case.target),
        peak=plan.peak if plan else None,
        refused=outcome.refused,
        smallest=outcome.smallest,
        stages=tuple(_held(stage) for stage in plan.stages) if plan else (),
        off=off,
        notes=tuple(_notes(case, outcome)),
        instead=tuple(_instead(case, outcome, off)),
    )


def new_run(bundle: Bundle, size: tuple[int, int] | None, steps: int | None) -> Any:
    """The run that the bundle's recipe makes.

    ValueError for a size that it does not draw, RecipeRefusal for steps that it does not take.

    An app draws again, so a plan keeps what it can: one that loads in turns is the second best.
    """
    manifest = bundle.manifest
    size = manifest.sizes.check(size or manifest.sizes.default)
    embedded = "timestep_cond" in bundle.component("unet").inputs
    passes = 1 if manifest.recipe.guidance in (0, 1) or embedded else 2
    steps = steps or manifest.recipe.steps
    recipes.check(dataclasses.replace(manifest.recipe, steps=steps), manifest.recipe, otherwise="")
    return _planner().Run(size=size, steps=steps, passes=passes, repeats=True)


def _planner() -> Any:
    from . import plan

    return plan


def _held(stage: Any) -> Held:
    return Held(*(getattr(stage, field.name) for field in dataclasses.fields(Held)))


# --- does it fit --------------------------------------------------------------------------------


def _outcome(case: _Case) -> _Outcome:
    if case.target not in case.device.targets or _too_old(case):
        return _Outcome(NO_ENGINE)
    return _judge(case, _for_device(case), case.limit(case.target).value)


def _judge(case: _Case, bundle: Bundle, limit: int) -> _Outcome:
    """The planner's word on a bundle within a limit; where the whole is refused, on its pieces."""
    budget = max(1, limit - case.baseline(bundle.manifest.target))
    pieces = _piece_by_piece(bundle)
    outcome = _plan(case, bundle, budget)
    if outcome.verdict != TOO_LARGE or pieces is None:
        return outcome
    outcome = _plan(case, pieces, budget)
    return outcome if outcome.plan is None else _Outcome(CHUNKED, outcome.plan)


def _plan(case: _Case, bundle: Bundle, budget: int) -> _Outcome:
    run = dataclasses.replace(case.run, streams=case.device.os not in NOT_STREAMING)
    try:
        plan = _make(case, bundle, budget, run)
    except case.planner.Refusal as refusal:
        return _Outcome(TOO_LARGE, refused=refusal.stage, smallest=refusal.smallest)
    return _Outcome(BY_RESIDENCY[plan.residency], plan)


def _make(case: _Case, bundle: Bundle, budget: int | None, run: Any) -> Any:
    threads = min(case.device.cores.value, 64)
    return case.planner.make(bundle, run, budget, threads, _isa(case.device), case.tiles)


def _isa(device: Device) -> str | None:
    """The device's instruction set, if this build knows it: else the best one here is planned."""
    name = device.isa.value
    known = kernels.isas(supported=False) if kernels.available() else []
    return name if name in known else None


def _for_device(case: _Case) -> Bundle:
    """The bundle with the figures of this device alone, or the largest if it has none of them."""
    bundle, capability = case.bundle, _capability(case.device)
    if case.target != "tensorrt":
        return bundle
    chosen = {
        name: part.memory.get(capability) or max(part.memory.values(), key=lambda m: m.total)
        for name, part in bundle.manifest.components.items()
        if part.memory
    }
    return _with_memory(bundle, chosen, capability)


def _with_memory(bundle: Bundle, memory: Mapping[str, Memory], key: str) -> Bundle:
    parts = {
        name: dataclasses.replace(part, memory={key: memory[name]}) if name in memory else part
        for name, part in bundle.manifest.components.items()
    }
    return Bundle(bundle.folder, dataclasses.replace(bundle.manifest, components=parts))


def _piece_by_piece(bundle: Bundle) -> Bundle | None:
    """The bundle as a host sees it that holds one piece of a network at a time."""
    cut = {n: p for n, p in bundle.manifest.components.items() if len(p.parts) > 1}
    if bundle.manifest.target != "coreml" or not cut:
        return None
    largest = {name: Memory(max(_pieces(bundle, name)), 0, 0) for name in cut}
    return _with_memory(bundle, largest, "one piece")


def _pieces(bundle: Bundle, name: str) -> list[int]:
    """Bytes of each piece of a component."""
    part = bundle.component(name)
    places = [f"{part.path}/{piece}" for piece in part.parts] or [part.path]
    return [bundle.bytes_of(place) for place in places]


def _too_old(case: _Case) -> bool:
    newest = case.device.newest
    return case.target == "coreml" and newest is not None and _deployment(case) > int(newest.value)


def _deployment(case: _Case) -> int:
    """The oldest system of the bundle, in the numbers of the device: iOS 17 has macOS 14's."""
    text = case.bundle.manifest.options.get("deployment", "")
    match = re.fullmatch(r"(ios|macos)([0-9]{1,3})", text)
    if not match:
        return 0
    number = int(match[2])
    if match[1] == case.device.os or number >= 26:  # from there on all have one number
        return number
    return number - 3 if case.device.os == "macos" else number + 3


def _ios(case: _Case, number: int) -> int:
    """A system of the device as the iOS of its generation."""
    return number + 3 if case.device.os == "macos" and number < 26 else number


def _needed(case: _Case) -> str:
    """The oldest system of the bundle by its name on the device."""
    return f"{'macOS' if case.device.os == 'macos' else 'iOS'} {_deployment(case)}"


def _system(case: _Case, ios: int) -> str:
    """An iOS by the name that the device's system of its generation has."""
    return f"macOS {ios - 3}" if case.device.os == "macos" else f"iOS {ios}"


def _capability(device: Device) -> str:
    return device.capability.value if device.capability else ""


def _bits(weights: str) -> int | None:
    """Bits of a form of weights by its name; None for a mixture."""
    match = re.fullmatch(r"(?:fp|bf)(16|32)|[pw]([2468])\w*", weights)
    return int(match[1] or match[2]) if match else None


# --- what would leave the accelerator -----------------------------------------------------------


def _off(case: _Case) -> Iterator[Off]:
    """Rules, each with its source; they say what is known, not what would be measured there."""
    accelerator = case.device.accelerator
    if case.target in ("native", "onnx"):
        if accelerator == "unsupported":
            yield Off("all", "ferrotype has no engine for this device's accelerator", OURS, False)
        elif accelerator != "none" and {"coreml", "tensorrt"} & set(case.device.targets):
            yield Off("all", f"the target {case.target} computes on the CPU", OURS)
    elif case.target == "coreml":
        yield from _off_neural_engine(case)
    else:
        yield from _off_gpu(case)


def _off_neural_engine(case: _Case) -> Iterator[Off]:
    manifest, facts = case.bundle.manifest, case.facts
    new, system = facts["coreml_new_forms"], _ios(case, _deployment(case))
    if re.fullmatch(r"p\dg\d+|w4\w*|w8b\w*", _weights(case)) and system < new.value:
        text = f"{_weights(case)} needs {_system(case, new.value)}, the bundle names an older one"
        yield Off("all", text, new.source)
    if _units(case) == "cpu_only":
        yield Off("all", "the bundle asks for the CPU alone", OURS)
    if not _on_neural_engine(case):
        return
    attention, kind = facts["neural_engine_attention"], facts["neural_engine_type"]
    if manifest.options.get("attention", attention.value) != attention.value:
        yield Off("all", "attention is laid out for the GPU (original)", attention.source)
    asked = manifest.precision.activations == "fp32"
    for name in manifest.components if asked else _overflowing(case.bundle):
        why = "" if asked else ", for fp16 overflows in it: only another VAE or U-Net would not"
        text = f"it computes in fp32, the Neural Engine in {kind.value}{why}"
        yield Off(name, text, kind.source, asked)
    limit, few = facts["coreml_piece_bytes"], facts["coreml_piece_bits"].value
    if case.device.os == "ios" and (_bits(_weights(case)) or 16) > few:
        for name in manifest.components:
            size = max(_pieces(case.bundle, name))
            if size > limit.value:
                text = f"{format_bytes(size)} in one piece, a phone's Neural Engine takes "
                yield Off(name, text + format_bytes(limit.value), limit.source)


def _units(case: _Case) -> str:
    return case.bundle.manifest.options.get("compute_units", "all")


def _on_neural_engine(case: _Case) -> bool:
    return case.target == "coreml" and _units(case) in ("all", "cpu_and_ne")


def _overflowing(bundle: Bundle) -> list[str]:
    """Components that the conversion kept in fp32."""
    return [name for name, part in bundle.manifest.components.items() if part.activations]


def _off_gpu(case: _Case) -> Iterator[Off]:
    from .engines.tensorrt import capabilities

    capability, facts = _capability(case.device), case.facts
    if capability in facts["rtx_capabilities"].value:
        for name in case.bundle.manifest.components:
            have = capabilities(case.bundle, name)
            if capability not in have:
                text = f"no engine for {capability} in the bundle, only {', '.join(have) or 'none'}"
                yield Off(name, text, OURS)
        products, bits = facts["rtx_integer_products"], _bits(_weights(case))
        if capability not in products.value and bits and bits < 16:
            text = f"{capability} multiplies no integer weights: they are spread to fp16 first"
            yield Off("all", text, products.source)


def _weights(case: _Case) -> str:
    return case.bundle.manifest.precision.weights


# --- notes --------------------------------------------------------------------------------------


def _notes(case: _Case, outcome: _Outcome) -> Iterator[str]:
    device = case.device
    if case.target not in device.targets:
        yield f"it runs the targets {', '.join(device.targets)}, not {case.target}"
    elif outcome.verdict == NO_ENGINE:
        newest = device.newest.value if device.newest else ""
        yield f"the bundle is for {_needed(case)} and later, it ends at {newest}"
    else:
        yield from _notes_of_the_plan(case, outcome)
        yield from _notes_of_apple(case, outcome)
    if outcome.verdict == TOO_LARGE:
        yield from _in_tiles(case)
        yield from _smaller(case)
    for note in device.notes:
        yield f"{note.value} ({note.confidence})"


def _notes_of_the_plan(case: _Case, outcome: _Outcome) -> Iterator[str]:
    parts, capability = case.bundle.manifest.components, _capability(case.device)
    if case.target in ("coreml", "tensorrt"):
        silent = [name for name, part in parts.items() if not part.memory]
        if silent:
            yield f"activations of {', '.join(silent)} are the runtime's own and not counted"
    if case.target == "onnx" and outcome.plan:
        yield "onnxruntime's share was measured on the machine that converted the bundle"
    if case.target == "tensorrt":
        if any(part.memory and capability not in part.memory for part in parts.values()):
            yield f"the bundle has no figures for {capability}: its largest are taken"
        if capability not in case.facts["rtx_capabilities"].value:
            yield f"tensorrt, installed there, builds the engines for {capability} at first use"
    if case.target == "native" and _isa(case.device) is None:
        yield f"scratch is planned for this machine's kernels; {case.device.isa.value} has its own"
    if case.target == "native" and case.device.os in NOT_STREAMING and not outcome.plan:
        yield f"weights cannot be streamed on {case.device.os.capitalize()}"
    if outcome.verdict == CHUNKED:
        yield "the app must hold one piece of the U-Net at a time"


def _notes_of_apple(case: _Case, outcome: _Outcome) -> Iterator[str]:
    device, facts = case.device, case.facts
    if device.entitled and outcome.verdict != FITS:
        more = _judge(case, _for_device(case), device.entitled.value).verdict
        size = format_bytes(device.entitled.value)
        yield f"with {ENTITLEMENT} ({size}, {device.entitled.confidence}) it {more}"
    if case.target != "coreml":
        return
    if device.oldest and _deployment(case) > int(device.oldest.value):
        yield f"it needs an update to {_needed(case)}: it was sold with {device.oldest.value}"
    if _on_neural_engine(case) and device.os == "ios":
        free = f"{format_bytes(device.memory.value)} must have that free as well"
        yield f"the Neural Engine holds most of it outside the app: the device's {free}"
    jit, expanded = facts["coreml_compressed_in_memory"].value, _what_if(case, "coreml", 16, 1)
    system = _ios(case, int(device.oldest.value) if device.oldest else jit)
    early = max(system, _ios(case, _deployment(case))) < jit
    if expanded and (_bits(_weights(case)) or 16) < 16 and (early or not _on_neural_engine(case)):
        when = f"before {_system(case, jit)}" if early else "off the Neural Engine"
        found = _judge(case, expanded, device.limit.value).verdict
        yield f"{when} weights may be expanded when loaded: then it {found}"


def _in_tiles(case: _Case) -> Iterator[str]:
    limit, tiled = case.limit(case.target).value, dataclasses.replace(case, tiles=True)
    if case.target in ("native", "onnx"):
        verdict = _judge(tiled, case.bundle, limit).verdict
        if verdict != TOO_LARGE:
            yield f"with --tiles, which change the picture a little, it {verdict}"


def _smaller(case: _Case) -> Iterator[str]:
    """The largest of some smaller pictures that fits, where the bundle draws other sizes."""
    sizes, limit = case.bundle.manifest.sizes, case.limit(case.target).value
    for fraction in FRACTIONS if sizes.allowed is None else ():
        unit = sizes.multiple
        width, height = (
            max(sizes.minimum, int(side * fraction) // unit * unit) for side in case.run.size
        )
        run = dataclasses.replace(case.run, size=(width, height))
        try:
            sizes.check(run.size)
        except ValueError:
            continue
        smaller = dataclasses.replace(case, run=run)
        verdict = _judge(smaller, _for_device(case), limit).verdict
        if verdict != TOO_LARGE:
            yield f"at {width}x{height} it {verdict}"
            return


# --- what to convert ----------------------------------------------------------------------------


def _instead(case: _Case, outcome: _Outcome, off: tuple[Off, ...]) -> Iterator[Instead]:
    """A command that does better on this device than the bundle, if there is one."""
    mended = any(part.by_converting for part in off)
    if outcome.verdict not in (TOO_LARGE, NO_ENGINE) and not mended:
        return
    target = next((t for t in ("coreml", "tensorrt") if t in case.device.targets), "native")
    if target == "native":
        if case.target != "native":
            yield Instead(_command(case, "native"), "our engine for CPUs, which can stream", "")
        return
    if _bits(_weights(case)) is None:
        form = "p6" if target == "coreml" else "w8"
        yield Instead(_command(case, target, form), "the usual form for this device", "")
        return
    found = _first_that_fits(case, target)
    if found:
        form, chunks, verdict = found
        same = (target, form, chunks) == (case.target, _weights(case), _chunks(case.bundle))
        if not same or mended:
            lossy = "; 4 bits are seen in pictures" if FORMS[target][form] < FEW_BITS else ""
            why = f"by this bundle's own weights it {verdict}{lossy}"
            yield Instead(_command(case, target, form, chunks), why, verdict)


def _first_that_fits(case: _Case, target: str) -> tuple[str, int, str] | None:
    """Form, chunks and verdict: the most bits that fit whole, else the most that fit at all."""
    limit, best = case.limit(target).value, None
    for form, held in _tries(case, target):
        bits = FORMS[target][form]
        if best and (held > 1 or bits < FEW_BITS):
            return best
        bundle = _what_if(case, target, bits, held)
        verdict = _judge(case, bundle, limit).verdict if bundle else TOO_LARGE
        if verdict != TOO_LARGE and (not best or verdict == FITS):
            chunks = max(held, _least_chunks(case, target, bits))
            best = form, chunks, CHUNKED if held > 1 else verdict
            if verdict == FITS or held > 1:
                return best
    return best


def _tries(case: _Case, target: str) -> Iterator[tuple[str, int]]:
    """Forms, and into how many pieces to cut of which one is held at a time."""
    if target == "coreml":
        plain = [form for form, bits in FORMS[target].items() if bits >= FEW_BITS]
        lossy = [form for form in FORMS[target] if form not in plain]
        yield from ((form, 1) for form in plain)
        yield from ((plain[-1], n) for n in CHUNKS[1:])
        yield from ((form, n) for form in lossy for n in CHUNKS)
    else:
        for form, bits in FORMS[target].items():
            if _multiplies(case, bits):
                yield form, 1


def _multiplies(case: _Case, bits: int) -> bool:
    capability, facts = _capability(case.device), case.facts
    known = capability in facts["rtx_capabilities"].value
    return bits >= 16 or not known or capability in facts["rtx_integer_products"].value


def _least_chunks(case: _Case, target: str, bits: int) -> int:
    """The fewest pieces of a U-Net of so many bits that the Neural Engine of a phone takes."""
    limit, few = case.facts["coreml_piece_bytes"].value, case.facts["coreml_piece_bits"].value
    if target != "coreml" or case.device.os != "ios" or bits <= few:
        return 1
    weights = _weight_bytes(case.bundle, "unet") * bits / (_bits(_weights(case)) or bits)
    return 1 if weights <= limit else min(MOST_CHUNKS, math.ceil(CUT * weights / limit))


def _what_if(case: _Case, target: str, bits: int, chunks: int) -> Bundle | None:
    """This bundle with weights of so many bits, as the planner would see it; None if unknown."""
    now = _bits(_weights(case))
    if now is None:
        return None
    memory = {}
    for name, part in _for_device(case).manifest.components.items():
        weights = _weight_bytes(case.bundle, name) * bits / now
        pieces = chunks if name == "unet" else 1
        known = next(iter(part.memory.values()), None) if target == case.target else None
        held = (known.activations, known.scratch) if known else (0, 0)
        memory[name] = Memory(int(weights / pieces * (CUT if pieces > 1 else 1)), *held)
    bundle = _with_memory(case.bundle, memory, _capability(case.device) or "estimated")
    parts = {n: dataclasses.replace(p, parts=()) for n, p in bundle.manifest.components.items()}
    changed = dataclasses.replace(bundle.manifest, target=target, components=parts)
    return Bundle(bundle.folder, changed)


def _weight_bytes(bundle: Bundle, name: str) -> int:
    part, target = bundle.component(name), bundle.manifest.target
    if part.memory and target != "onnx":  # which may expand them when it loads
        return max(memory.weights for memory in part.memory.values())
    if target == "tensorrt":  # the engines beside it hold them once more
        return bundle.bytes_of(f"{part.path}/model.onnx.data")
    return bundle.bytes_of(part.path)


def _chunks(bundle: Bundle) -> int:
    return max(1, len(bundle.component("unet").parts))


def _command(case: _Case, target: str, form: str = "", chunks: int = 1) -> str:
    words = ["ferrotype convert CHECKPOINT --target", target]
    if form:
        words += ["--weights", form]
    if target == "coreml":
        words += ["--deployment", "macos14" if case.device.os == "macos" else "ios17"]
        words += ["--chunks", str(chunks)] if chunks > 1 else []
    elif target == "tensorrt" and _capability(case.device) in case.facts["rtx_capabilities"].value:
        words += ["--compute-capability", _capability(case.device)]
    width, height = case.run.size
    if target != "native" and case.run.size != case.bundle.manifest.sizes.default:
        words += ["--size", f"{width}x{height}"]
    return " ".join(words)


# --- as text ------------------------------------------------------------------------------------


def rows(found: Diagnosis) -> Iterator[tuple[str, ...]]:
    """A diagnosis as lines of cells, for people."""
    width, height = found.size
    yield "device", found.name
    made = f"{found.model} ({found.target}, {found.weights})"
    yield "bundle", f"{made}, {width}x{height}, {found.steps} steps"
    yield "verdict", found.verdict
    known = ", ".join(filter(None, (found.limit.confidence, found.limit.note)))
    yield "an app may use", f"{format_bytes(found.limit.value)} ({known})"
    yield "", MEANING[found.limit_kind]
    yield "", f"less {format_bytes(found.baseline)} that it has anyway"
    if found.peak is not None:
        yield "the plan's peak", format_bytes(found.peak, up=True)
    if found.smallest is not None:
        least = format_bytes(found.smallest + found.baseline, up=True)
        yield "refused", f"{found.refused}; it would fit where an app may use {least}"
    for stage in found.stages:
        beside = format_bytes(stage.peak - stage.weights)
        held = f"{format_bytes(stage.weights)} of weights, {beside} beside them"
        more = f", {stage.note}" if stage.note else ""
        yield f"  {stage.component}", f"{stage.mode}: {held}, run {stage.runs} x{more}"
    for part in found.off:
        yield "off the accelerator", f"{part.component}: {part.reason}"
    for other in found.instead:
        yield "instead", other.command
        yield "", other.why
    for note in found.notes:
        yield "note", note


def table(data: Data) -> list[tuple[str, ...]]:
    """Every device: name, memory, what an app may use and how that is known, targets."""
    head = ("device", "name", "memory", "an app may use", "known", "targets")
    lines: list[tuple[str, ...]] = [head]
    for device in data.devices.values():
        limit = format_bytes(device.limit.value)
        if device.entitled:
            limit += f" ({format_bytes(device.entitled.value)} entitled)"
        if device.gpu_limit:
            limit += f", GPU {format_bytes(device.gpu_limit.value)}"
        known, targets = device.limit.confidence, ", ".join(device.targets)
        lines.append(
            (device.id, device.name, format_bytes(device.memory.value), limit, known, targets)
        )
    return lines
