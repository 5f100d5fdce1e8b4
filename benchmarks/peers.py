"""Our engines and their peers on the same work, by the protocol of `ferrotype bench`.

    python benchmarks/peers.py --folder peers            # hours; writes results/peers.md and .json
    python benchmarks/peers.py --folder peers --prepare  # only makes what they load
    python benchmarks/peers.py --folder peers --quick    # 256x256, within 20 minutes
    python benchmarks/peers.py --tiny                    # a few seconds, says nothing of speed

Stable Diffusion 1.5 shapes, random weights, without guidance.  Every peer is a process of its own,
where versions clash with an environment of its own, and keeps its components loaded from picture to
picture while there is memory for all; whoever is ended to make room loads and warms up again before
its next turn, outside of the clock.  The folder keeps what is loaded (30 GB); without one it is
made anew.  What cannot be made or run is named with the reason.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ferrotype.benchmarks import checkpoints, measure, peer_workers
from ferrotype.benchmarks.peer_workers import PEERS, Configs, Peer, Size, Worker, prepare
from ferrotype.runtime.bench import machine, results, run, tables, verdict
from ferrotype.runtime.bench import protocol as protocols
from ferrotype.runtime.bench.protocol import Limits, Outcome, Picture, RunnerError, Subject
from ferrotype.runtime.bench.results import Machine, Result, StageMemory, Variant
from ferrotype.runtime.bench.statistics import median, median_interval
from ferrotype.runtime.engines.native import usable_threads
from ferrotype.runtime.memory import MIB

USUAL = (  # in the order of preparation, the quickest first; the others are held against the first
    "native-bf16", "native-fp32", "native-w8", "native-w8-int8", "native-w4",
    "torch-bf16", "torch-fp32", "openvino-bf16", "onnxruntime-fp32", "onnx-fp32", "onnx-fp16",
    "onnx-w8", "onnx-w4", "stable-diffusion.cpp-f16", "openvino-w8a8",
)  # fmt: skip
KINDS = {  # a peer's engine in the result; the others are called as they are
    "onnx": "ferrotype onnx", "native": "ferrotype native", "cpp": "stable-diffusion.cpp",
}  # fmt: skip
MODEL = "sd15, random"
TAKEN = 16  # MiB that a peer may lose between its turns, before it warms up again
ROOM = {  # by kind: GiB that must be free before it loads Stable Diffusion 1.5
    "native": 2, "onnx": 5, "openvino": 5, "torch": 8, "onnxruntime": 8, "cpp": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much is measured: pictures, and when to stop."""

    size: Size
    steps: int
    limits: Limits
    patience: float  # seconds for one answer of a peer
    configs: Configs = field(default_factory=lambda: checkpoints.SD15)
    room: float = 1.0  # part of ROOM
    prepare: float | None = None  # seconds to make what is not there; None: as long as it takes
    total: float | None = None  # seconds of everything together, but for the last round
    flags: tuple[str, ...] = ()  # that choose it


FULL = Scale((512, 512), 4, Limits(rounds=20, seconds=4 * 3600, each=1800), 1800)
# One process each: there is no time for loading again.
QUICK = Scale(
    (256, 256), 2, Limits(rounds=13, restart=1000, each=90), 150, prepare=300, total=960,
    flags=("--quick",),
)  # fmt: skip
TINY = Scale(
    (64, 64), 2, Limits(rounds=2, seconds=60, restart=1000), 120, checkpoints.TINY, room=0.01,
    flags=("--tiny",),
)  # fmt: skip


def main() -> None:
    chosen = arguments()
    scale = TINY if chosen.tiny else QUICK if chosen.quick else FULL
    if chosen.prepare_one:
        prepare(PEERS[chosen.prepare_one], chosen.folder, scale.size, configs=scale.configs)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        names = chosen.peer or USUAL
        if chosen.prepare:
            _, missing = prepare_all(names, folder, scale, None)
            sys.exit("\n".join(f"{n}: {why}" for n, why in missing.items()) or None)
        output = chosen.output or (folder if chosen.tiny else measure.RESULTS) / "peers"
        result = compare(names, folder, scale, chosen.threads, command(chosen), output)
    print(report(result))
    if result.protocol.stopped == "interrupted":
        sys.exit(130)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, help="keep the checkpoint, environments and what peers load here")
    add("--peer", choices=PEERS, action="append", help=f"default: {', '.join(USUAL)}")
    add("--threads", type=int, default=usable_threads(), help="default: %(default)s")
    add("--quick", action="store_true", help="256x256, 2 steps, within 20 minutes")
    add("--tiny", action="store_true", help="random networks of some kilobytes: does it work?")
    add("--prepare", action="store_true", help="only make what the peers load, however long")
    add("--output", type=Path, help="default: results/peers here; with --tiny none")
    add("--prepare-one", choices=PEERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def command(chosen: argparse.Namespace) -> str:
    """What repeats it, without the paths of this machine."""
    flags = [f"--{name}" for name in ("quick", "tiny") if getattr(chosen, name)]
    named = [f"--peer {name}" for name in chosen.peer or ()]
    return " ".join(["python benchmarks/peers.py --folder FOLDER", *flags, *named])


def compare(
    names: Sequence[str], folder: Path, scale: Scale, threads: int, command: str, output: Path
) -> Result:
    """Prepare, measure and write OUTPUT.json and OUTPUT.md, after every round anew."""
    began = time.monotonic()
    here, identity, created = machine.describe(), secrets.token_hex(8), run.now()
    ready, missing = prepare_all(names, folder, scale, scale.prepare)
    room = Room()
    turns = {n: Turn(PEERS[n], folder, scale, threads, room) for n in ready}
    head = Head(identity, created, here, command, scale, threads)

    def told(outcome: Outcome) -> Result:
        found = head.result(names, turns, missing, outcome)
        write(found, output)
        print(f"{outcome.rounds} rounds, {outcome.elapsed:.0f} s", file=sys.stderr, flush=True)
        return found

    limits = scale.limits
    if scale.total:
        left = max(60.0, scale.total - (time.monotonic() - began))
        limits = replace(limits, seconds=left)
    if not turns:
        raise SystemExit("\n".join(f"{name}: {why}" for name, why in missing.items()))
    subjects = [Subject(name, turn.open, threads) for name, turn in turns.items()]
    return told(protocols.measure(subjects, limits, told))


# --- preparation --------------------------------------------------------------------------------


def prepare_all(
    names: Sequence[str], folder: Path, scale: Scale, seconds: float | None
) -> tuple[list[str], dict[str, str]]:
    """Make what each loads in a process of its own: who can run, and why the others cannot."""
    ends = None if seconds is None else time.monotonic() + seconds
    ready, missing = [], {}
    for name in names:
        print(f"preparing {name}", file=sys.stderr, flush=True)
        argv = [sys.executable, __file__, "--folder", str(folder), *scale.flags]
        argv += ["--prepare-one", name]
        left = None if ends is None else max(5.0, ends - time.monotonic())
        if why := _failure(argv, left):
            missing[name] = why
        else:
            ready.append(name)
    return ready, missing


def _failure(argv: Sequence[str], seconds: float | None) -> str:
    """Run a command with all that it starts for at most so long; the reason if it failed."""
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, words = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return "there was no time to make what it loads: run --prepare with the same --folder first"
    lines = words.strip().splitlines() or [f"it ended with {process.returncode}"]
    return "".join(c for c in lines[-1] if c.isprintable())[:250] if process.returncode else ""


# --- turns --------------------------------------------------------------------------------------


class Room:
    """Processes that are there at once: as many as the memory holds."""

    def __init__(self, free: Callable[[], float] | None = None) -> None:
        self._free = free or available
        self._inside: list[Turn] = []  # whoever drew last comes last

    def enter(self, turn: Turn) -> None:
        """End whoever drew longest ago until there is room."""
        while self._inside and self._free() < turn.needed:
            self._inside[0].close()
        self._inside.append(turn)

    def drew(self, turn: Turn) -> None:
        self._inside.remove(turn)
        self._inside.append(turn)

    def leave(self, turn: Turn) -> None:
        if turn in self._inside:
            self._inside.remove(turn)


def available() -> int:
    """Bytes that a new process could have; all of the memory where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return machine.memory_bytes() or 1 << 62
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def resident(pid: int) -> float:
    """MiB of a process that are in memory; 0 where the system does not tell."""
    return measure.status(pid).get("VmRSS", 0.0)


class Turn:
    """A peer's runner: there when it draws, and in between while nobody needs the room."""

    def __init__(self, peer: Peer, folder: Path, scale: Scale, threads: int, room: Room) -> None:
        self.peer = peer
        self.needed = scale.room * ROOM[peer.kind] * 2**30  # bytes
        self.peak = 0.0  # MiB above the process with its libraries
        self.pid: int | None = None
        self._resident = 0.0  # MiB after its last picture
        self._scale, self._room = scale, room
        self._start: Callable[[], Worker] = partial(Worker, peer, folder, threads, scale.patience)
        self._worker: Worker | None = None

    def open(self) -> Turn:
        """Load, whoever has to make room for it."""
        self._room.enter(self)
        try:
            self._worker = self._start()
            self.pid = self._worker.pid
            size, steps = self._scale.size, self._scale.steps
            self._worker.ask(open={"size": size, "steps": steps})
        except BaseException:
            self.close()
            raise
        return self

    def ready(self) -> None:
        """Warm, as it was after its last picture.

        While others draw, the system may take pages of mapped files back: reading them again is
        the price of the company, not of the peer.
        """
        if self._worker is None:
            self.open().picture(0)
        elif self._worker.pid and resident(self._worker.pid) < self._resident - TAKEN:
            self._draw(0)

    def picture(self, seed: int) -> Picture:
        if self._worker is None:
            self.ready()
        return self._draw(seed)

    def _draw(self, seed: int) -> Picture:
        assert self._worker
        found = self._worker.picture(seed)
        self._resident = resident(self._worker.pid or 0)
        self._room.drew(self)
        memory = self._worker.ask(memory=True)
        self.peak = max(self.peak, memory["peak"] - memory["before"])
        return found

    def close(self) -> None:
        """The process ends; it may come back."""
        self._room.leave(self)
        worker, self._worker, self.pid = self._worker, None, None
        if worker:
            worker.close()


# --- results ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What is known before anything is measured."""

    identity: str
    created: str
    machine: Machine
    command: str
    scale: Scale
    threads: int

    def result(
        self,
        names: Sequence[str],
        turns: Mapping[str, Turn],
        missing: Mapping[str, str],
        outcome: Outcome,
    ) -> Result:
        """Everything so far, those that are missing among it."""
        variants = [self._variant(name, turns.get(name), missing.get(name), outcome)
                    for name in names]  # fmt: skip
        return Result(
            self.identity, self.created, "benchmarks/peers.py", self.machine, outcome.describe(),
            tuple(variants), self.command,
        )  # fmt: skip

    def _variant(
        self, name: str, turn: Turn | None, missing: str | None, outcome: Outcome
    ) -> Variant:
        peer, (width, height) = PEERS[name], self.scale.size
        weights, activations = _precision(peer)
        why = missing or outcome.errors.get(name)
        return Variant(
            name,
            KINDS.get(peer.kind, peer.kind),
            MODEL,
            tuple(outcome.samples.get(name, ())),
            weights,
            activations,
            settings={
                "size": f"{width}x{height}", "steps": self.scale.steps, "threads": self.threads,
                "residency": "loaded",
            },
            starts=tuple(outcome.starts.get(name, ())),
            firsts=tuple(outcome.firsts.get(name, ())),
            memory=(StageMemory("picture", peak=int(turn.peak * MIB)),)
            if turn and turn.peak
            else (),
            error=why and "".join(c if c.isprintable() else " " for c in why)[:300],
        )  # fmt: skip


def _precision(peer: Peer) -> tuple[str, str]:
    """Weights and activations."""
    if peer.kind == "native":
        return peer_workers.NATIVE[peer.precision]
    if peer.precision == peer_workers.W8A8:
        return "w8", "int8"
    if peer.kind == "onnx":
        return peer.precision, "fp32"
    if peer.kind == "openvino":
        return "fp16", peer.precision
    return peer.precision, peer.precision


def write(result: Result, output: Path) -> None:
    """Both files, each renamed when it is whole."""
    for suffix, text in ((".json", results.dumps(result)), (".md", report(result))):
        part = output.with_suffix(suffix + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(output.with_suffix(suffix))


def report(result: Result) -> str:
    """Markdown: the table, what it says in words, and who is missing."""
    lines = ["# Our engines and their peers", "", f"`{result.command}`", ""]
    lines += [f"{run.machine_text(result.machine)}.", ""]
    known = result.measured
    if known:
        about = known[0].settings
        lines += [
            f"Stable Diffusion 1.5 shapes, random weights, {about['size']}, {about['steps']} "
            f"steps without guidance, {about['threads']} threads: {tables.how(result)}.  "
            "Components stay loaded; the picture is text encoder, steps and VAE decoder.  Ready "
            "after is from the start of the process, its libraries included, with files in the "
            "page cache or not; the peak is resident and above the process with its libraries.",
            "",
            f"{tables.conditions(result)}.",
            "",
            table(result).markdown(),
            "",
            *(f"- {text}" for text in tables.sentences(result)),
            *(f"- note: {text}" for text in verdict.warnings(_measured(result))),
            "",
        ]
    if missing := [v for v in result.variants if not v.samples]:
        lines += ["## Not measured", ""]
        lines += [f"- {v.name}: {v.error or 'it had no turn yet'}" for v in missing]
        lines += [""]
    return "\n".join(lines)


def _measured(result: Result) -> Result:
    return replace(result, variants=result.measured)


def table(result: Result) -> tables.Table:
    """A row per peer that was measured: stages, load, memory, and how it compares."""
    found = {one.other: one for one in verdict.verdicts(result)}
    rows = []
    for v in result.measured:
        total = median_interval(v.totals, result.protocol.confidence)
        parts = (tables.stage_times(v, stage) for stage in peer_workers.COMPONENTS)
        rows.append((
            v.name, v.weights, v.activations, str(len(v.samples)),
            *(tables.duration(median(part)) for part in parts),
            tables.duration(total.middle), tables.bounds(total),
            tables.duration(median(v.starts)), tables.mib(v.peak),
            verdict.times(found[v.name].ratio) if v.name in found else "1.00x",
        ))  # fmt: skip
    head = (
        "", "weights", "activations", "pictures", "text encoder", "U-Net step", "VAE",
        "picture", tables.interval_title(result), "ready after", "peak", "to the first",
    )  # fmt: skip
    return tables.Table(head, tuple(rows), texts=3)


if __name__ == "__main__":
    try:
        main()
    except RunnerError as error:
        sys.exit(str(error))
