"""Bundles with settings as subjects of a measurement, each drawing in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from ...bundle import Bundle
from ..memory import parse_bytes
from .protocol import Picture, RunnerError, Subject
from .results import MAX_TEXT, Quality, StageMemory, Timeline
from .worker import Settings, command

PATIENCE = 5.0  # seconds for a process to end by itself
LAST_WORDS = 4000  # letters of its standard error that are kept


class Process:
    """A worker that is asked in lines of JSON.  Raises RunnerError for what it cannot do.

    By default it is one of `worker.py`; `argv` starts another that answers in the same way, with
    `environment` beside this process's own.  One that answers no question within `patience`
    seconds is ended.
    """

    def __init__(
        self,
        argv: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        patience: float | None = None,
    ) -> None:
        # A group of its own: the terminal's interrupt is for the process that measures.
        apart: dict[str, Any] = (
            {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
            if sys.platform == "win32"
            else {"start_new_session": True}
        )
        self._process = process = subprocess.Popen(
            argv or command(sys.path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
            **apart,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._requests, self._answers = process.stdin, process.stdout
        self._words, self._busy, self._patience, self._late = "", False, patience, False
        # Read all the time, so that it never waits for room.
        self._listener = threading.Thread(target=self._listen, args=(process.stderr,), daemon=True)
        self._listener.start()
        self.pid: int | None = process.pid
        self.facts: dict[str, Any] = {}

    @classmethod
    def open(cls, settings: Settings) -> Process:
        """One that is ready to draw."""
        process = cls()
        try:
            process.facts = process.ask(open=settings.to_json())
        except BaseException:
            process.close()
            raise
        return process

    def ready(self) -> None:
        """It always is."""

    def picture(self, seed: int) -> Picture:
        found = self.ask(picture=seed)
        return Picture(found["seconds"], {k: tuple(v) for k, v in found["stages"].items()})

    def ask(self, **request: Any) -> Any:
        """The answer to one request."""
        self._busy = True
        watch = threading.Timer(self._patience or 0, self._lose_patience)
        if self._patience:
            watch.start()
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            line = self._answers.readline()
        except OSError:  # it is gone, and with it the pipe
            line = ""
        finally:
            watch.cancel()
        if not line:
            raise RunnerError(self._epitaph())
        self._busy = False
        found = json.loads(line)
        if isinstance(found, dict) and "error" in found:
            raise RunnerError(found["error"], found.get("usage", False))
        return found

    def close(self) -> None:
        """End it, at once if it is busy with what nobody waits for any more or if interrupted."""
        if self._busy:
            self._process.kill()
        with contextlib.suppress(OSError):
            self._requests.close()  # the end of its input
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._answers.close()
            self._listener.join(PATIENCE)

    def _lose_patience(self) -> None:
        self._late = True
        self._process.kill()

    def _listen(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self._words = (self._words + line)[-LAST_WORDS:]

    def _epitaph(self) -> str:
        code = self._process.wait()
        self._listener.join(PATIENCE)
        lines = self._words.strip().splitlines()
        if self._late:
            return f"it gave no answer within {self._patience:,.0f} s"
        why = f": {lines[-1][:MAX_TEXT]}" if lines else ""
        if code == -9:
            return "its process was killed, as the system does where memory runs out: try a " \
                   "smaller size, or --memory"  # fmt: skip
        return f"its process ended with {code}{why}"


def subject(name: str, settings: Settings) -> Subject:
    """To be measured by `protocol.measure`."""
    return Subject(name, lambda: Process.open(settings), settings.threads)


# --- what is known of it beside its times -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a bundle says of itself and its plan, and the memory of one picture."""

    engine: str
    model: str
    weights: str
    activations: str
    bundle_sha256: str
    bundle_bytes: int
    settings: dict[str, Any]
    predicted_peak: int
    memory: tuple[StageMemory, ...]
    timeline: Timeline | None
    quality: Quality | None


def examine(settings: Settings) -> Facts:
    """Draw one picture and note its memory.  Raises RunnerError."""
    process = Process()
    try:
        facts = process.ask(examine=settings.to_json())
    finally:
        process.close()
    memory = facts["memory"]
    predicted = facts["predicted"]
    stages = memory.get("stages", {})
    return Facts(
        **{name: facts[name] for name in (
            "engine", "model", "weights", "activations", "bundle_sha256", "bundle_bytes",
            "predicted_peak",
        )},
        settings=described(settings, facts),
        memory=tuple(
            StageMemory(name, predicted.get(name), **stages.get(name, {}))
            for name in {**predicted, **stages}
        ),
        timeline=_timeline(memory.get("timeline")),
        quality=facts["quality"] and Quality(**facts["quality"]),
    )  # fmt: skip


def _timeline(raw: Any) -> Timeline | None:
    if raw is None:
        return None
    stages = tuple((str(name), start, end) for name, start, end in raw["stages"])
    return Timeline(stages, tuple((t, a, f) for t, a, f in raw["samples"]))


def described(settings: Settings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a result has them: what was chosen, by whoever chose it."""
    width, height = settings.size
    found = {
        "size": f"{width}x{height}",
        "steps": facts["steps"],
        "threads": settings.threads,
        "isa": facts["isa"],
        "memory": settings.memory,
        "residency": facts["residency"],
        "guidance": settings.guidance,
        "sampler": settings.sampler,
    }
    return {name: value for name, value in found.items() if value is not None}


# --- settings that vary -------------------------------------------------------------------------

VARY = (
    "threads=1,2  size=256,512  steps=2,4  isa=avx2,avx512  memory=256MiB,1GiB  resident=no,yes  "
    "guidance=1,7  sampler=lcm,euler  precision=own,w8"
)


def _size(text: str) -> tuple[int, int]:
    width, x, height = text.partition("x")
    if not (width.isdecimal() and (height.isdecimal() if x else True) and len(text) < 12):
        raise ValueError(f"{text[:40]!r} is not a size: write 512 or 512x768")
    return int(width), int(height or width)


def _whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) <= 1000:
        raise ValueError(f"{text[:40]!r} is not a whole number from 1 to 1000")
    return int(text)


def _switch(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"{text[:40]!r} is neither yes nor no")
    return text == "yes"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a number") from None


READ: dict[str, Callable[[str], Any]] = {
    "threads": _whole, "size": _size, "steps": _whole, "isa": str, "memory": parse_bytes,
    "resident": _switch, "guidance": _number, "sampler": str, "precision": str,
}  # fmt: skip


def parse_vary(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What "threads=1,2" asks for: by setting, values by how they are written.

    Raises ValueError for a setting that is none, or named twice.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in READ:
            raise ValueError(f"{name[:40]!r} is no setting that varies; those are: {VARY}")
        if name in found:
            raise ValueError(f"{name} is given twice: put all values in one list")
        parts = [part.strip() for part in values.split(",")]
        if not all(parts):
            raise ValueError(f"{text[:60]!r} has an empty value: write {name}=A,B")
        found[name] = {part: READ[name](part) for part in parts}
    return found


def cross(
    bundles: Sequence[tuple[str, Bundle]], vary: Mapping[str, Mapping[str, Any]], base: Settings
) -> dict[str, Settings]:
    """Every bundle with every combination of settings, by a name that tells them apart."""
    combinations = [
        dict(zip(vary, values, strict=True))
        for values in product(*(v.items() for v in vary.values()))
    ]
    found: dict[str, Settings] = {}
    for label, bundle in bundles:
        for chosen in combinations:
            texts = [f"{name}={text}" for name, (text, _) in chosen.items()]
            shown = [label] if len(bundles) > 1 or not texts else []
            values = {name: value for name, (_, value) in chosen.items()}
            asked = values.get("size", base.size)
            size = asked if all(asked) else bundle.manifest.sizes.default
            name = unique(" ".join([*shown, *texts]), found)
            found[name] = dataclasses.replace(
                base, bundle=bundle.folder, **{**values, "size": bundle.manifest.sizes.check(size)}
            )
    return found


def unique(name: str, taken: Mapping[str, Any]) -> str:
    """The name, or with a number if it is taken: the same twice may well be compared."""
    if name not in taken:
        return name
    return next(n for i in range(2, len(taken) + 3) if (n := f"{name} #{i}") not in taken)
