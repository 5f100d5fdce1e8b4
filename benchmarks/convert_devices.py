"""Full size: the U-Net of Stable Diffusion 1.5 converted once per target, read back and compared.

    python benchmarks/convert_devices.py              # about 40 minutes, 15 GB of disk
    python benchmarks/convert_devices.py --only coreml-p6-chunks --folder /tmp/cases

Random fp16 weights, 512x512.  Every case is a process of its own: the checkpoint is loaded, run
once in float32, converted, and what was saved runs on the same input.  The last case is a whole
conversion by the command.  results/convert_devices.md is written when every U-Net is there; with
--folder those of earlier runs count.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ferrotype import parity
from ferrotype.benchmarks import measure
from ferrotype.benchmarks.checkpoints import SD15, TINY, write_checkpoint
from ferrotype.convert import CoremlOptions, coreml, mil, modules, onnx, tensorrt
from ferrotype.convert.checkpoint import open_checkpoint
from ferrotype.convert.mlprogram import open_part
from ferrotype.convert.probes import NORM_INPUT
from ferrotype.convert.wrappers import wrap
from ferrotype.quantize.recipe import Recipe
from ferrotype.runtime.engines.coreml import package_name
from ferrotype.runtime.engines.onnx import MODEL, _session

MIB = 2**20
TOKENS = 77
PHONE = CoremlOptions("ios17", chunks=2)
COREML = {  # case -> weights, options
    "coreml-fp16": ("fp16", CoremlOptions("ios17")),
    "coreml-p6-chunks": ("p6", PHONE),
    "coreml-mac": ("fp16", CoremlOptions("macos15")),
}
TENSORRT = {  # case -> weights, compute capabilities
    "tensorrt-fp16": ("fp16", ("8.6", "8.9")),
    "tensorrt-w8": ("w8", ("8.9",)),
}
BUNDLE = "bundle"
CASES = (*COREML, *TENSORRT, BUNDLE)
STAGES = ("load", "record", "translate", "compress", "save", "cut", "build", "read", "run")
OURS = {  # functions of convert that are a stage, or a part of one
    "translate": ((coreml, "_translate"), (onnx, "_to_graph")),
    "compress": ((mil, "compress"), (tensorrt, "_quantize")),
    "save": ((mil, "save"), (onnx, "_write")),
    "cut": ((mil, "cut"),),
}
Arrays = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, action="append", help="default: all")
    parser.add_argument("--folder", type=Path, help="where to keep the checkpoint and the figures")
    parser.add_argument("--tiny", action="store_true", help="a small network; writes no results")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        if chosen.case:
            print(json.dumps(asdict(convert(folder / "checkpoint", chosen.case, Path(temporary)))))
            return
        if not (folder / "checkpoint").exists():
            write_checkpoint(folder / "checkpoint", TINY if chosen.tiny else SD15)
        for name in chosen.only or CASES:
            measured = whole(folder) if name == BUNDLE else case(folder, name)
            (folder / f"{name}.json").write_text(json.dumps(measured))
        cases = {name: folder / f"{name}.json" for name in CASES}
        found = {n: json.loads(path.read_text()) for n, path in cases.items() if path.exists()}
    text = report(found)
    print(text)
    if {*COREML, *TENSORRT} <= found.keys() and not chosen.tiny:
        (measure.RESULTS / "convert_devices.md").write_text(text)


def case(folder: Path, name: str) -> dict[str, Any]:
    """One case in a process of its own."""
    found = measure.run(sys.executable, __file__, "--folder", str(folder), "--case", name)
    *_, line = found.stdout.splitlines()
    return json.loads(line) | {"seconds": found.seconds, "peak": found.peak}


def whole(folder: Path) -> dict[str, Any]:
    """All components by the command, with its checks of each and of the picture: for phones."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "sd15.ferro"
        options = ("--target", "coreml", "--weights", "p6", "--chunks", "2", "-o", str(out))
        found = measure.run(*measure.ferrotype("convert", str(folder / "checkpoint"), *options))
        checked = json.loads((out / "manifest.json").read_text())["parity"]
        return {
            "seconds": found.seconds,
            "peak": found.peak,
            "size": _size(out),
            "parts": {p.stem: _size(p) for p in sorted(out.rglob("*.mlpackage"))},
            "psnr": {
                n: min(v["psnr"] for v in c.values()) for n, c in checked["components"].items()
            },
            "picture": checked["picture"]["psnr"],
        }


# --- one case -----------------------------------------------------------------------------------


@dataclass
class Stage:
    """Seconds, and the most resident memory meanwhile, in MiB."""

    seconds: float = 0.0
    peak: float = 0.0


class Clock:
    """Times stages; one inside another belongs to the outer."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self._busy = False

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._busy:
            yield
            return
        self._busy, start = True, time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins anew
        try:
            yield
        finally:
            stage = self.stages.setdefault(name, Stage())
            stage.seconds += time.perf_counter() - start
            stage.peak = max(stage.peak, measure.status()["VmHWM"])
            self._busy = False

    def watch(self, stage: str, module: Any, name: str) -> None:
        """Count what a function of a module takes as a stage, from now on."""
        function = getattr(module, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self(stage):
                return function(*arguments, **options)

        setattr(module, name, timed)


@dataclass
class Converted:
    """What a case made: sizes in bytes, and how close its output is to the original's."""

    stages: dict[str, Stage]
    parts: dict[str, int]
    forms: dict[str, int]  # name -> weights
    kept: dict[str, int]  # why not compressed -> weights
    psnr: float
    cosine: float
    engines: list[dict[str, Any]] = field(default_factory=list)


def convert(checkpoint: Path, name: str, out: Path) -> Converted:
    """The U-Net loaded, recorded, converted and compared."""
    clock = Clock()
    for stage, functions in OURS.items():
        for module, function in functions:
            clock.watch(stage, module, function)
    opened = open_checkpoint(checkpoint)
    with clock("load"):
        module = modules.unet(opened)
    config = opened.configs["unet"]
    inputs = _inputs(config)
    with clock("record"), modules.census(module) as seen:
        expected = _original(module, inputs)
    peaks = {n.removesuffix(NORM_INPUT): v[0] for n, v in seen.items() if n.endswith(NORM_INPUT)}
    make = _coreml if name in COREML else _tensorrt
    made = make(clock, name, module, config, out, peaks)
    del module
    gc.collect()
    found = _run_packages(clock, out, made, inputs) if name in COREML else _run(clock, out, inputs)
    made.psnr, made.cosine = parity.psnr(expected, found), parity.cosine(expected, found)
    return made


def _inputs(config: dict) -> Arrays:
    """One input as a drawing has it: noise, the middle of the schedule, states of a text."""
    rng, side = np.random.default_rng(0), config["sample_size"]
    return {
        "sample": rng.standard_normal((1, 4, side, side), np.float32),
        "timestep": np.array(499, np.float32),
        "encoder_hidden_states": rng.standard_normal(
            (1, TOKENS, config["cross_attention_dim"]), np.float32
        ),
    }


def _original(module: Any, inputs: Arrays) -> np.ndarray:
    import torch

    with torch.no_grad():
        return wrap("unet", module)(*map(torch.from_numpy, inputs.values())).numpy()


def _coreml(
    clock: Clock, name: str, module: Any, config: dict, out: Path, peaks: dict[str, float]
) -> Converted:
    weights, options = COREML[name]
    side = config["sample_size"]
    made = coreml.export(
        *("unet", module, config, out, [(side, side)], TOKENS, True),
        Recipe.uniform(weights),
        options,
        peaks=peaks,
    )
    parts = {part: _size(out / part) for part in made.parts}
    return Converted(clock.stages, parts, dict(made.forms), dict(made.kept), 0, 0)


def _tensorrt(
    clock: Clock, name: str, module: Any, config: dict, out: Path, peaks: dict[str, float]
) -> Converted:
    weights, capabilities = TENSORRT[name]
    side, built = config["sample_size"], []
    made = tensorrt.export("unet", module, config, out, (side, side), weights, tokens=TOKENS)
    for capability in capabilities:
        with clock("build"), _watching_children() as seen:
            engine = tensorrt.build(out / MODEL, capability, None, "unet")
        built.append(asdict(engine) | {"peak": seen[-1]})
    graph = {path.name: path.stat().st_size for path in sorted(out.glob(f"{MODEL}*"))}
    forms, kept = Counter(made["quantized"].values()), Counter(made["kept"].values())
    forms["fp16"] += len(made["kept"])
    return Converted(clock.stages, graph, dict(forms), dict(kept), 0, 0, built)


@contextmanager
def _watching_children() -> Iterator[list[float]]:
    """Collect the peak of a process that this one starts; the last is of its end."""
    seen, done = [0.0], threading.Event()
    starter = Path(f"/proc/self/task/{threading.get_native_id()}/children")

    def watch() -> None:
        while not done.wait(0.05):
            peaks = [measure.status(pid).get("VmHWM", 0.0) for pid in starter.read_text().split()]
            seen.extend(peak for peak in peaks if peak)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _run_packages(clock: Clock, out: Path, made: Converted, inputs: Arrays) -> np.ndarray:
    """What the saved packages return, one after the other, without a Mac."""
    values = {n: value.reshape(value.shape or 1) for n, value in inputs.items()}
    for part in made.parts:
        with clock("read"):
            run = open_part(out / part, None)
        with clock("run"):
            values |= run(values)
    return values[package_name("unet", "out_sample", "ferrotype")]


def _run(clock: Clock, out: Path, inputs: Arrays) -> np.ndarray:
    """What the graph that the builder was given returns by onnxruntime."""
    with clock("read"):
        session = _session(out / MODEL, None)
    half = {i.name for i in session.get_inputs() if i.type == "tensor(float16)"}
    with clock("run"):
        found = session.run(
            None, {n: value.astype("f2") if n in half else value for n, value in inputs.items()}
        )
    return np.asarray(found[0], np.float32)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# --- the report ---------------------------------------------------------------------------------


def report(found: dict[str, dict]) -> str:
    """All cases as tables of Markdown."""
    networks = {name: case for name, case in found.items() if name != BUNDLE}
    lines = [*HEAD, *_stages(networks), *_results(networks), *_engines(networks)]
    return "\n".join([*lines, *(_bundle(found[BUNDLE]) if BUNDLE in found else []), ""])


def _stages(cases: dict[str, dict]) -> list[str]:
    head = f"| case | {' | '.join(STAGES)} | all |"
    rule = f"|---|{'---:|' * (len(STAGES) + 1)}"
    seconds, peaks = [], []
    for name, case in cases.items():
        stages = [case["stages"].get(stage) for stage in STAGES]
        cells = [f"{s['seconds']:.1f}" if s else "-" for s in stages]
        seconds.append(f"| {name} | {' | '.join(cells)} | {case['seconds']:.0f} |")
        cells = [f"{s['peak']:,.0f}" if s else "-" for s in stages]
        peaks.append(f"| {name} | {' | '.join(cells)} | {case['peak']:,.0f} |")
    times = ["## Seconds", "", head, rule, *seconds]
    return [*times, "", "## Peak memory of the process, MiB", "", head, rule, *peaks, ""]


def _results(cases: dict[str, dict]) -> list[str]:
    lines = [
        "## What was written",
        "",
        "| case | size MiB | files MiB | PSNR dB | cosine | weights by form | not compressed |",
        "|---|---:|---|---:|---:|---|---|",
    ]
    for name, case in cases.items():
        parts = ", ".join(f"{part} {size / MIB:,.0f}" for part, size in case["parts"].items())
        forms, kept = _counts(case["forms"], "all fp16"), _counts(case["kept"])
        lines.append(
            f"| {name} | {sum(case['parts'].values()) / MIB:,.0f} | {parts} "
            f"| {case['psnr']:.1f} | {case['cosine']:.7f} | {forms} | {kept} |"
        )
    return [*lines, ""]


def _counts(counts: dict[str, int], none: str = "-") -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or none


def _engines(cases: dict[str, dict]) -> list[str]:
    lines = [
        "## Engines, by the builder's figures",
        "",
        "| case | capability | build s | builder's peak MiB | weights MiB | activations MiB "
        "| scratch MiB | engine MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, case in cases.items():
        for built in case["engines"]:
            memory = (built["memory"][k] / MIB for k in ("weights", "activations", "scratch"))
            lines.append(
                f"| {name} | {built['capability']} | {built['seconds']:.1f} "
                f"| {built['peak']:,.0f} | {' | '.join(f'{m:,.1f}' for m in memory)} "
                f"| {built['bytes'] / MIB:,.0f} |"
            )
    return [*lines, ""]


def _bundle(case: dict) -> list[str]:
    parts = ", ".join(f"{part} {size / MIB:,.0f}" for part, size in case["parts"].items())
    return [
        "## A whole conversion",
        "",
        "`ferrotype convert CHECKPOINT --target coreml --weights p6 --chunks 2`: all components,",
        f"each checked, and the picture.  {case['seconds']:.0f} s, {case['peak']:,.0f} MiB at the "
        f"peak; the bundle has {case['size'] / MIB:,.0f} MiB",
        f"({parts}).",
        f"PSNR: {', '.join(f'{name} {found:.1f}' for name, found in case['psnr'].items())} dB; "
        f"the picture {case['picture']:.1f} dB.",
    ]


HEAD = [
    "# Conversion at full size",
    "",
    "`python benchmarks/convert_devices.py` on "
    f"{measure.describe('torch', 'coremltools', 'tensorrt-rtx')}.",
    "",
    "The U-Net of Stable Diffusion 1.5, random weights, 512x512; each case once, in a process of",
    "its own, on a shared machine: times are single runs, memory is what counts here.  *load*",
    "reads the checkpoint into float32, *record* runs it in torch with every layer watched.  For",
    "Core ML *cut* reads the saved package and writes the pieces; *read* and *run* are our own",
    "reader, on the CPU.  For TensorRT they are onnxruntime's, of the graph that the builder was",
    "given; the builder's memory is that of its own process.  PSNR and cosine are to torch in",
    "float32.",
    "",
    "| case | deployment | weights | attention | chunks |",
    "|---|---|---|---|---:|",
    *(
        f"| {name} | {options.deployment} | {weights} | {options.attention} | {options.chunks} |"
        for name, (weights, options) in COREML.items()
    ),
    *(
        f"| {name} | compute capability {', '.join(capabilities)} | {weights} | original | 1 |"
        for name, (weights, capabilities) in TENSORRT.items()
    ),
    "",
]

if __name__ == "__main__":
    main()
