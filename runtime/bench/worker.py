"""The process that draws while another measures: asked and answering in lines of JSON.

    {"open": {settings}}            facts of the bundle, and what its plan says
    {"picture": 3}                  seconds in all, and by stage
    {"examine": {settings}}         the same, and the memory of a picture, by stage and over time
    {"profile": 3}                  the same picture's ops: time, operations, bytes

A line that cannot be answered is answered with {"error": text}.  The end of the input ends it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import bundle as bundles
from ... import kernels
from ...bundle import Bundle
from ...errors import FerrotypeError
from .. import memory
from ..engines import Arrays, Engine
from ..engines.native import NativeEngine
from ..memory import Recording, Trace, TraceError
from ..pipeline import Pipeline
from ..plan import Plan, Stage

PROMPT = "a red apple on a sky blue background"
INTERVAL = 0.001  # seconds between samples of memory
POINTS = 400  # of a timeline that are kept


@dataclass(frozen=True)
class Settings:
    """A bundle and how it is to draw; what is None is the bundle's, or as the plan has it.

    `memory` is the budget in bytes; `resident` keeps components loaded from picture to picture.
    """

    bundle: Path
    threads: int
    size: tuple[int, int]
    steps: int | None = None
    isa: str | None = None
    memory: int | None = None
    resident: bool = False
    guidance: float | None = None
    sampler: str | None = None
    prompt: str = PROMPT

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "bundle": str(self.bundle)}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Settings:
        return cls(**{**raw, "bundle": Path(raw["bundle"]), "size": tuple(raw["size"])})

    @property
    def options(self) -> dict[str, Any]:
        """For Pipeline.steps."""
        return {k: getattr(self, k) for k in ("size", "steps", "guidance", "sampler")}


@dataclass(frozen=True)
class OpRun:
    """An op of one run of a component; times in seconds since the picture began."""

    component: str
    layer: str
    op: kernels.Op
    start: float
    seconds: float


class Watched(Pipeline):
    """A pipeline whose components are timed: how long each took to load and to run, in order."""

    def __init__(self, settings: Settings, bundle: Bundle, profile: bool = False) -> None:
        super().__init__(
            bundle, settings.threads, settings.resident, isa=settings.isa, budget=settings.memory
        )
        self.settings = settings
        self.spans: list[tuple[str, float, float]] = []  # stage, start, end by perf_counter
        self.ops: list[OpRun] = []
        self.told: Callable[[str], object] = lambda component: None  # when a component begins
        self._profile = profile

    def draw(self, seed: int) -> float:
        """One picture; its seconds."""
        self.spans.clear()
        self.ops.clear()
        self._texts.clear()  # so that the text is encoded for every picture
        began = time.perf_counter()
        *_, last = self.steps(self.settings.prompt, seed=seed, **self.settings.options)
        self.decode(last)
        if not self._resident:
            self.release()
        return time.perf_counter() - began

    def _load(self, component: str, stage: Stage | None) -> Engine:
        self.told(component)
        with self._span("load"):
            engine = super()._load(component, stage)
        return self._timed(component, engine)

    def _timed(self, component: str, engine: Engine) -> Engine:
        def run(inputs: Arrays) -> Arrays:
            self.told(component)
            if not isinstance(engine, NativeEngine):
                with self._span(component):
                    return engine(inputs)
            shapes = {name: array.shape for name, array in inputs.items()}
            with self._span("load"):  # its program, made once for a size
                program = engine.program(shapes)
            if not self._profile:
                with self._span(component):
                    return engine(inputs)
            return self._run_profiled(component, engine, program, inputs)

        return run

    def _run_profiled(
        self, component: str, engine: NativeEngine, program: kernels.Program, inputs: Arrays
    ) -> Arrays:
        import numpy as np

        times = np.zeros(len(program.ops), np.uint64)
        with self._span(component):
            outputs = engine(inputs, times)
        names = engine.layout({name: array.shape for name, array in inputs.items()}).names
        start = self.spans[-1][1]
        for layer, op, nanoseconds in zip(names, program.ops, times.tolist(), strict=True):
            self.ops.append(OpRun(component, layer, op, start, nanoseconds / 1e9))
            start += nanoseconds / 1e9
        return outputs

    @contextmanager
    def _span(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.spans.append((stage, began, time.perf_counter()))

    def stages(self, seconds: float) -> dict[str, list[float]]:
        """Seconds by stage of the last picture, with what was between them as `other`."""
        found: dict[str, list[float]] = {}
        for stage, began, ended in self.spans:
            found.setdefault(stage, []).append(ended - began)
        if "load" in found:  # of several components, in pieces
            found["load"] = [sum(found["load"])]
        found["other"] = [max(0.0, seconds - sum(map(sum, found.values())))]
        return found


class Worker:
    """One bundle with its settings, ready to draw.  Raises what Pipeline does."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        kernels.guard()
        self.bundle = bundles.load(settings.bundle)
        self._pipe: Watched | None = None

    def pipe(self, profile: bool = False) -> Watched:
        """A new pipeline for every picture, or one for all if components stay loaded."""
        if profile or not self.settings.resident:
            return Watched(self.settings, self.bundle, profile)
        if self._pipe is None:
            self._pipe = Watched(self.settings, self.bundle)
        return self._pipe

    def facts(self) -> dict[str, Any]:
        """What is about to draw, and what the plan says that it takes."""
        m, plan = self.bundle.manifest, self.plan()
        steps = self.settings.steps or m.recipe.steps
        return {
            "engine": m.target,
            "model": m.model,
            "weights": m.precision.weights,
            "activations": m.precision.activations,
            "bundle_sha256": self.bundle.sha256,
            "bundle_bytes": sum(f.bytes for f in m.files.values()),
            "isa": self.isa() if m.target == "native" else None,
            "steps": steps,
            "predicted_peak": plan.peak,
            "residency": plan.residency,
            "predicted": {s.component: plan.during(s) for s in plan.stages},
            "quality": quality(m.parity),
        }

    def plan(self) -> Plan:
        """Of a picture; raises plan.Refusal, or ValueError for what the bundle does not do."""
        pipe = self.pipe()
        steps = pipe.steps(self.settings.prompt, **self.settings.options)
        steps.close()  # type: ignore[attr-defined]  # a generator: nothing has run
        assert pipe.planned
        return pipe.planned

    def isa(self) -> str:
        return self.settings.isa or kernels.isas()[0]

    def picture(self, seed: int) -> dict[str, Any]:
        pipe = self.pipe()
        seconds = pipe.draw(seed)
        return {"seconds": seconds, "stages": pipe.stages(seconds)}

    def profile(self, seed: int) -> dict[str, Any]:
        """Ops of a picture of the native engine, each as [component, layer, op ...]."""
        from .ops import as_row

        pipe = self.pipe(profile=True)
        began = time.perf_counter()
        seconds = pipe.draw(seed)
        return {
            "seconds": seconds,
            "spans": [[name, a - began, b - began] for name, a, b in pipe.spans],
            "ops": [as_row(run, began) for run in pipe.ops],
        }


def examine(settings: Settings) -> dict[str, Any]:
    """Facts, and the memory of one picture above this process before anything was opened.

    It is not timed: sampling takes time, and peaks begin anew at every stage.
    """
    settle()
    try:
        with Trace(interval=INTERVAL) as trace:
            worker = Worker(settings)
            pipe = worker.pipe()
            pipe.told = trace.mark
            pipe.draw(0)
    except TraceError as error:
        return {**Worker(settings).facts(), "memory": {"missing": str(error)}}
    recording = trace.recording
    found = {"stages": stage_bytes(recording), "timeline": timeline(recording)}
    return {**worker.facts(), "memory": found}


def settle() -> None:
    """What any program with this runtime has in memory comes before a baseline: its libraries."""
    import PIL.PngImagePlugin  # noqa: F401
    import tokenizers  # noqa: F401

    if kernels.available():
        kernels.isas()
    gc.collect()
    memory.trim()


def stage_bytes(recording: Recording) -> dict[str, dict[str, int | None]]:
    """The most bytes of every component over the trace's beginning."""
    found: dict[str, dict[str, int | None]] = {}
    for label in dict.fromkeys(stage.label for stage in recording.marked):
        peaks = [s.peak for s in recording.marked if s.label == label]
        seen = [s for s in recording.samples if s.label == label]
        exact = [peak for peak in peaks if peak is not None]
        found[label] = {
            "peak": max(exact) if len(exact) == len(peaks) else None,
            "anonymous": max((s.anonymous for s in seen), default=None),
            "file": max((s.file for s in seen), default=None),
        }
    return found


def timeline(recording: Recording) -> dict[str, Any]:
    """A recording thinned to what a plot can show: of points in a row, the highest is kept."""
    samples = recording.samples
    group = -(-len(samples) // POINTS)
    kept = [
        max(samples[i : i + group], key=lambda s: s.anonymous + s.file)
        for i in range(0, len(samples), group)
    ]
    stages: list[list[Any]] = []
    for stage in recording.marked:
        if stages and stages[-1][0] == stage.label:
            stages[-1][2] = stage.end
        else:
            stages.append([stage.label, stage.start, stage.end])
    return {"stages": stages, "samples": [list(sample[:3]) for sample in kept]}


def quality(parity: dict[str, Any]) -> dict[str, Any] | None:
    """From a quantization's report, which is free-form to the format."""
    try:
        told = parity["quantized"]
        return {name: float(told[name]) for name in ("mean_psnr", "worst_psnr")}
    except (KeyError, TypeError, ValueError):
        return None


# --- the process --------------------------------------------------------------------------------


def answer(worker: Worker | None, request: dict[str, Any]) -> tuple[Worker | None, Any]:
    match request:
        case {"open": settings}:
            worker = Worker(Settings.from_json(settings))
            return worker, worker.facts()
        case {"picture": seed} if worker:
            return worker, worker.picture(seed)
        case {"examine": settings}:
            return worker, examine(Settings.from_json(settings))
        case {"profile": seed} if worker:
            return worker, worker.profile(seed)
    raise ValueError(f"no such request: {request}")


def main() -> None:
    """Serve standard input; what libraries print goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the other process's to stop
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        try:
            worker, found = answer(worker, json.loads(line))
        except MemoryError:
            found = {"error": "out of memory: try a smaller size"}
        except (FerrotypeError, ValueError, OSError) as error:
            found = {"error": str(error), "usage": isinstance(error, ValueError)}
        try:
            answers.write(json.dumps(found) + "\n")
            answers.flush()
        except BrokenPipeError:
            return


def command(path: Sequence[str]) -> list[str]:
    """What starts a worker with the modules of this process; no file beside it is imported."""
    places = [os.path.abspath(place) for place in path]
    code = f"import sys; sys.path[:] = {places!r}; from {__name__} import main; main()"
    return [sys.executable, "-c", code]
