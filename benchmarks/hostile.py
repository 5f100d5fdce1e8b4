"""Hostile files: each is refused in one line, in less than a second, within little memory.

    python benchmarks/hostile.py               # about 2 minutes; writes results/hostile.md
    python benchmarks/hostile.py --fuzz 300    # seconds of random damage besides

The files are those of tests/hostile.py, and checkpoints that are sound but for one thing.  Each
goes through `ferrotype convert` in a process of its own, which has imported what conversion needs:
what is measured is the file.  The exit code is 1 if one is not refused, takes longer or takes more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from ferrotype.benchmarks import measure
from ferrotype.benchmarks.checkpoints import (
    SMALL,
    TINY,
    TOKENIZER,
    write_checkpoint,
    write_single,
)
from ferrotype.cli import main as cli
from ferrotype.convert import build, checkpoint, embedding, lora, single, storage
from ferrotype.errors import FerrotypeError
from ferrotype.runtime.memory import reset_peak
from ferrotype.tests import hostile

SECONDS, MIB = 1.0, 256.0  # the most that a file may take
HANGS = 60.0  # seconds after which nobody waits any longer
assert build  # imported for its imports: torch, diffusers, transformers


@dataclass(frozen=True)
class Outcome:
    """What became of a file: the last line, seconds, and MiB above what the process had."""

    line: str
    refused: bool
    seconds: float
    mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fuzz", type=float, default=0, metavar="SECONDS", help="of random damage")
    parser.add_argument("--seed", type=int, help="of the damage; default: another every time")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # processes that are forked would wait for the others
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows, passed = table(files(folder))
        lines = [*head(), *rows]
        if chosen.fuzz:
            seed = random.randrange(1 << 30) if chosen.seed is None else chosen.seed
            told, sound = fuzz(folder, chosen.fuzz, seed)
            lines, passed = [*lines, "", *told], passed and sound
    report = "\n".join([*lines, ""])
    print(report)
    (measure.RESULTS / "hostile.md").write_text(report)
    sys.exit(not passed)


# --- the corpus ---------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, Path]:
    """Every file and folder to convert, by what it is."""
    made: dict[str, Path] = {}
    for (file, name), (content, _) in hostile.corpus().items():
        place = folder / f"{len(made)}"
        place.mkdir()
        made[f"{file.partition('.')[2]}: {name}"] = hostile.write(place / file, content)
    for name, path in checkpoints(folder).items():
        made[f"checkpoint: {name}"] = path
    return made


Tensors = dict[str, np.ndarray]
UNET = "model.diffusion_model."


def _without(tensors: Tensors, _: Tensors) -> Tensors:
    return {n: a for n, a in tensors.items() if n != f"{UNET}out.2.bias"}


def _with(name: str, value: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Tensors]:
    return lambda tensors, _: tensors | {name: value(tensors[f"{UNET}out.2.bias"])}


CHANGES: dict[str, Callable[[Tensors, Tensors], Tensors]] = {  # of Stable Diffusion 1, and SDXL
    "NaN in one tensor": _with(f"{UNET}out.2.bias", lambda a: a * np.float16(np.nan)),
    "Inf in one tensor": _with(f"{UNET}out.2.bias", lambda a: a + np.float16(np.inf)),
    "whole numbers for weights": _with(f"{UNET}out.2.bias", lambda a: a.astype(np.int32)),
    "another shape": _with(f"{UNET}out.2.bias", lambda a: np.ones(5, np.float16)),
    "a tensor missing": _without,
    "a tensor too many": _with(f"{UNET}middle_block.7.weight", lambda a: a),
    "two families mixed": lambda sd1, xl: (
        {n: a for n, a in xl.items() if n.startswith(UNET)}
        | {n: a for n, a in sd1.items() if not n.startswith(UNET)}
    ),
    "a text encoder twice": lambda sd1, xl: (
        xl | {n: a for n, a in sd1.items() if n.startswith("cond_stage_model.")}
    ),
    "no U-Net": lambda sd1, xl: {n: a for n, a in sd1.items() if not n.startswith(UNET)},
}
EDITS: dict[str, tuple[str, Any]] = {  # of a folder in diffusers layout: file, fields or a content
    "a billion layers": ("unet/config.json", {"layers_per_block": 10**9}),
    "a thousand levels": ("unet/config.json", {"block_out_channels": [8] * 1000}),
    "a width that is a text": ("text_encoder/config.json", {"hidden_size": "wide"}),
    "a schedule of infinite noise": ("scheduler/scheduler_config.json", {"beta_start": 1e999}),
    "a pipeline of another kind": ("model_index.json", {"_class_name": "FluxPipeline"}),
    "a configuration of 4 GB": ("unet/config.json", hostile.sparse(b"{", 1 << 32)),
    "a configuration that is deep": ("vae/config.json", b"[" * 200_000),
    "a million lists": ("vae/config.json", b'{"a": [' + b"[]," * 1_000_000 + b"[]]}"),
    "shards out of the folder": (
        "unet/diffusion_pytorch_model.safetensors.index.json",
        b'{"weight_map": {"w": "../../../etc/passwd"}}',
    ),
    "a tokenizer that is a list": ("tokenizer/tokenizer.json", b"[]"),
}


def checkpoints(folder: Path) -> dict[str, Path]:
    """Checkpoints that are sound but for one thing."""
    sd1, xl = (load_file(write_single(folder / f"{n}.st", SMALL[n])) for n in ("sd1", "sdxl"))
    made: dict[str, Path] = {}
    for name, change in CHANGES.items():
        made[name] = folder / f"{name}.safetensors"
        save_file({n: np.ascontiguousarray(a) for n, a in change(sd1, xl).items()}, made[name])
    tiny = write_checkpoint(folder / "tiny", TINY)
    for name, (file, content) in EDITS.items():
        made[name] = shutil.copytree(tiny, folder / name)
        path = made[name] / file
        if isinstance(content, dict):
            content = json.dumps(json.loads(path.read_text()) | content).encode()
        if path.name.endswith(".safetensors.index.json"):
            (path.parent / "diffusion_pytorch_model.safetensors").unlink()
        hostile.write(path, content)
    return made


# --- measuring ----------------------------------------------------------------------------------


def table(cases: dict[str, Path]) -> tuple[list[str], bool]:
    """The lines of the table, and whether every file was refused within the limits."""
    rows, passed = [], True
    for name, path in cases.items():
        found = apart(convert, path)
        line = found.line.replace(str(path.parent) + "/", "").replace("|", "\\|")
        good = found.refused and found.seconds < SECONDS and found.mib < MIB
        passed &= good
        verdict = "refused" if good else "**no**"
        shown = line if len(line) < 200 else f"{line[:120]} ... {line[-60:]}"
        rows.append(f"| {name} | {found.seconds:.2f} | {found.mib:.0f} | {verdict} | {shown} |")
    return rows, passed


def apart(call: Callable[[Path], str], path: Path) -> Outcome:
    """A call in a process of its own: a crash or a hang of it is an outcome too."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(call, path, there))
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(HANGS) else Outcome("no end", False, HANGS, 0.0)
    except EOFError:
        found = Outcome("the process crashed", False, 0.0, 0.0)
    process.kill()
    process.join()
    return found


def _measured(call: Callable[[Path], str], path: Path, there: Any) -> None:
    reset_peak()
    before, start = measure.status().get("VmRSS", 0.0), time.process_time()
    try:
        line, refused = call(path), False
    except FerrotypeError as error:
        line, refused = str(error), str(error).isprintable()
    except Exception as error:
        line, refused = "".join(traceback.format_exception_only(error)), False
    seconds = time.process_time() - start
    there.send(Outcome(line, refused, seconds, measure.status().get("VmHWM", 0.0) - before))


def convert(path: Path) -> str:
    """Convert on the command line; its refusal is raised again."""
    out = path.parent / "out.ferro"
    command = ["convert", str(path), "-o", str(out), "--target", "native"]
    more = ["--tokenizer", str(TOKENIZER)] if path.is_file() else []
    result = CliRunner().invoke(cli, command + more)
    if result.exit_code == 1 and isinstance(result.exception, SystemExit) and not out.exists():
        raise FerrotypeError(result.stderr.removesuffix("\n"))
    return repr(result.exception or result.output)


def head() -> list[str]:
    return [
        "# Hostile files",
        "",
        f"`python benchmarks/hostile.py` on {measure.describe('torch', 'safetensors')}.",
        "",
        "`ferrotype convert FILE --target native` in a process that has imported what it needs:",
        "seconds of its CPU until the refusal, and its peak of memory above what it had, in MiB.",
        f"Nothing may take {SECONDS:g} s or {MIB:g} MiB, or say more than one line.",
        "",
        "| file | s | MiB | verdict | line |",
        "|---|---:|---:|---|---|",
    ]


# --- random damage ------------------------------------------------------------------------------


def fuzz(folder: Path, seconds: float, first: int) -> tuple[list[str], bool]:
    """Damage sound files at random: what was found, and whether nothing but refusals was."""
    seeds, base = sound_files(folder), checkpoint.open_checkpoint(folder / "tiny")
    counts, found, slowest, most = dict.fromkeys(seeds, 0), [], 0.0, 0.0
    end, seed = time.monotonic() + seconds, first
    while time.monotonic() < end:
        rng = random.Random(seed)
        name = rng.choice(sorted(seeds))
        path = folder / f"damaged-{name}"
        path.write_bytes(hostile.mutated(rng, seeds[name]))
        outcome = _here(READERS[name], base, path)
        slowest, most = max(slowest, outcome.seconds), max(most, outcome.mib)
        if not outcome.refused:
            found.append(f"- seed {seed}, {name}: {outcome.line}")
        counts[name] += 1
        seed += 1
    told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return [
        "## Random damage",
        "",
        f"`--fuzz {seconds:g} --seed {first}`: {seed - first:,} files ({told}). The slowest took "
        f"{slowest:.2f} s, the largest {most:.0f} MiB; {len(found)} were neither read nor refused.",
        *found,
    ], not found and slowest < SECONDS and most < MIB


def _here(call: Callable[[checkpoint.Checkpoint, Path], None], base: Any, path: Path) -> Outcome:
    """A call in this process, for its cost; sound files are as good as refused ones."""
    reset_peak()
    before, start = measure.status().get("VmRSS", 0.0), time.process_time()
    line, good = "", True
    try:
        call(base, path)
    except FerrotypeError as error:
        line, good = repr(str(error)), str(error).isprintable()
    except Exception as error:
        line, good = traceback.format_exc(limit=-1).replace("\n", " ") + str(error), False
    seconds = time.process_time() - start
    return Outcome(line, good, seconds, measure.status().get("VmHWM", 0.0) - before)


def _read_all(base: checkpoint.Checkpoint, path: Path) -> None:
    for stored in single.open_file(path).values():
        storage.read(stored)
    checkpoint.open_checkpoint(path)


def _merge_all(base: checkpoint.Checkpoint, path: Path) -> None:
    tensors = checkpoint.Tensors(lora.merge(base, path), "unet")
    for name in tensors:
        tensors[name]


def _embed(base: checkpoint.Checkpoint, path: Path) -> None:
    embedding.add(base, path)


READERS = {
    "x.safetensors": _read_all,
    "x2.ckpt": _read_all,
    "x4.ckpt": _read_all,
    "x.gguf": _read_all,
    "lora.safetensors": _merge_all,
    "embedding.pt": _embed,
}


def sound_files(folder: Path) -> dict[str, bytes]:
    """A small file for every reader, as bytes."""
    folder = folder / "sound"
    folder.mkdir()
    values = {"a": torch.randn(4, 8), "b": torch.randn(4).half(), "c": torch.arange(5)}
    save_file({n: v.numpy() for n, v in values.items()}, folder / "x.safetensors", {"k": "v"})
    for protocol in (2, 4):
        state = {"state_dict": values, "epoch": 3, "rest": [1.5, None, (1, 2)]}
        torch.save(state, folder / f"x{protocol}.ckpt", pickle_protocol=protocol)
    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.randn(2, 32))})
    torch.save({"string_to_param": held, "name": "<cat>"}, folder / "embedding.pt")
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    width = TINY["unet"]["block_out_channels"][0]
    parts = {"lora_down.weight": (4, width), "lora_up.weight": (width, 4), "alpha": ()}
    arrays = {f"{layer}.{part}": np.ones(shape, np.float32) for part, shape in parts.items()}
    save_file(arrays, folder / "lora.safetensors")
    rows = hostile.row(b"a", (256, 2), 12), hostile.row(b"b", (2, 2), 1, 288)
    word = hostile.metadata(b"word", 8, hostile.text(b"x"))
    (folder / "x.gguf").write_bytes(hostile.gguf(*rows, entries=[word], data=bytes(320)))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


if __name__ == "__main__":
    main()
