"""Fewer bits and what they cost: pictures of the trained checkpoint against those of fp32.

    python benchmarks/quantization.py --check      # writes results/quantization.md

Every row draws 32 prompts with 2 seeds, 4 LCM steps, none of them seen by calibration, and compares
with fp32 of the same seed.  onnxruntime's own quantizers are given the graphs of the same model
and the same calibration pictures.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from ferrotype import bundle as bundles
from ferrotype import parity
from ferrotype.benchmarks import measure
from ferrotype.benchmarks.checkpoints import EMOJI
from ferrotype.benchmarks.peer_workers import ENVIRONMENTS, environment
from ferrotype.bundle import Bundle
from ferrotype.quantize import mixed, native
from ferrotype.quantize.apply import quantize_bundle
from ferrotype.quantize.calibrate import PROMPTS as CALIBRATION
from ferrotype.quantize.calibrate import Statistics, calibrate
from ferrotype.quantize.recipe import Form, Recipe
from ferrotype.quantize.weights import Integers
from ferrotype.runtime.pipeline import Pipeline

PROMPTS = (
    "a red heart", "a slice of pizza", "a black cat face", "a rocket", "a green frog face",
    "a blue whale", "a christmas tree", "a soccer ball", "a yellow star", "a house with garden",
    "a bicycle", "an airplane", "a wrapped gift", "a cup of coffee", "a sunflower", "a snowman",
    "an orange fruit", "a pair of scissors", "a brown bear face", "a fire truck", "a full moon",
    "a strawberry", "a guitar", "a thumbs up", "a crying face", "a laughing face", "a mushroom",
    "a cactus", "a rainbow", "a penguin", "a light bulb", "a key",
)  # fmt: skip
SEEDS = (0, 1)
BITS = 4.5  # mean, of the mixed bundle that has a bar
BARS = {"w8": 38.0, "w8, int8": 30.0, "w4": 26.0, "mixed": 30.0}  # mean PSNR in dB
NNCF = "nncf==3.4.0"
KINDS = ["MatMul", "Gemm", "Conv"]  # that onnxruntime is asked to quantize
COMPONENTS = ("text_encoder", "unet", "vae_decoder")


@dataclass
class Row:
    """One way to store and compute the model."""

    name: str
    bits: str
    bytes: int  # of what a picture reads
    psnr: list[float]

    def line(self) -> str:
        mean, worst = np.mean(self.psnr), np.min(self.psnr)
        tenth = np.percentile(self.psnr, 10)
        return (
            f"| {self.name} | {self.bits} | {self.bytes / 2**20:.1f} | {mean:.1f} | {tenth:.1f} "
            f"| {worst:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep the converted bundles here")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        whole = converted(folder, "native")
        original = drawn(Pipeline(whole, resident=True))
        ours, notes, missed = measure_ours(whole, original, folder)
        print(HEAD, *(row.line() for row in ours), sep="\n", file=sys.stderr)
        graphs = converted(folder, "onnx")
        theirs = measure_onnxruntime(graphs, original, folder)
        theirs += measure_nncf(graphs, original, folder)
    report = write_report(ours, theirs, notes)
    (measure.RESULTS / "quantization.md").write_text(report)
    print(report)
    if chosen.check and missed:
        sys.exit("\n".join(["missed:", *missed]))


def converted(folder: Path, target: str) -> Bundle:
    """The trained checkpoint in fp32, whole."""
    out = folder / f"emoji-{target}-fp32.ferro"
    if not out.exists():
        options = ("--target", target, "--weights", "fp32", "--activations", "fp32")
        command = measure.ferrotype("convert", str(EMOJI), *options, "-o", str(out))
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return bundles.load(out)


def drawn(pipe: Pipeline) -> list[np.ndarray]:
    pictures = []
    for prompt in PROMPTS:
        for seed in SEEDS:
            *_, last = pipe.steps(prompt, seed=seed)
            pictures.append(pipe.decode_array(last.latents))
    return pictures


def compared(original: Sequence[np.ndarray], pipe: Pipeline) -> list[float]:
    return [parity.psnr(a, b, peak=1.0) for a, b in zip(original, drawn(pipe), strict=True)]


# --- ours ---------------------------------------------------------------------------------------


def measure_ours(
    whole: Bundle, original: Sequence[np.ndarray], folder: Path
) -> tuple[list[Row], list[str], list[str]]:
    began = time.perf_counter()
    statistics = calibrate(whole, CALIBRATION)
    calibrated = time.perf_counter() - began
    rows: dict[str, Row] = {}

    def add(name: str, bits: str, recipe: Recipe, activations: str, how: Statistics | None) -> Row:
        made = quantize_bundle(whole, folder / "q.ferro", recipe, activations, how, force=True)
        psnr = compared(original, Pipeline(made, resident=True))
        rows[name] = Row(name, bits, read_bytes(made), psnr)
        return rows[name]

    for form, activations, label in (
        ("w8", "bf16", "w8"), ("w8", "int8", "w8, int8"), ("w4", "bf16", "w4"),
    ):  # fmt: skip
        bits = {"w8": "8", "w4": "4"}[form]
        recipe = Recipe.uniform(form)
        with plain_rounding():
            add(f"{label}: to the nearest, full range", bits, recipe, activations, None)
        add(f"{label}: least squared error", bits, recipe, activations, None)
        add(label, bits, recipe, activations, statistics)
    began = time.perf_counter()
    table = mixed.measure(whole, statistics, "bf16")
    searched = time.perf_counter() - began
    budgets = {"mixed": budget_of(table, BITS)}
    budgets |= {
        f"mixed, of the size of {form}": table.bytes_of([*mixed.uniform(table, form)])
        for form in ("w4", "w8")
    }
    for name, budget in budgets.items():
        chosen = mixed.within(table, budget)
        bits = f"{table.bits_of(chosen):.2f}"
        add(name, bits, mixed.recipe_of(table, chosen), "bf16", statistics)
    notes = [
        f"Calibration took {calibrated:.0f} s, measuring every matrix in every form "
        f"{searched:.0f} s.",
        f"The parts of fp32 that are read have {read_bytes(whole) / 2**20:.1f} MiB.",
    ]
    return list(rows.values()), notes, list(judge(rows))


def read_bytes(bundle: Bundle) -> int:
    return sum(bundle.bytes_of(name) for name in COMPONENTS)


def budget_of(table: mixed.Table, bits: float) -> int:
    """The largest size whose choice has so many bits at most."""
    low = table.bytes_of([min(c.forms, key=lambda f: c.forms[f][0]) for c in table.choices])
    high = 2 * low
    while high - low > low / 1000:
        middle = (low + high) // 2
        if table.bits_of(mixed.within(table, middle)) <= bits:
            low = middle
        else:
            high = middle
    return low


def judge(rows: dict[str, Row]) -> Iterator[str]:
    """The bars that are missed, a line each."""
    mean = {name: float(np.mean(row.psnr)) for name, row in rows.items()}
    for name, bar in BARS.items():
        if mean[name] < bar:
            yield f"{name}: {mean[name]:.1f} dB, the bar is {bar:g}"
    for name in ("w8", "w8, int8", "w4"):
        plain = mean[f"{name}: to the nearest, full range"]
        if mean[name] <= plain:
            yield f"{name}: {mean[name]:.1f} dB, plain rounding has {plain:.1f}"
    for form in ("w4", "w8"):
        if mean[f"mixed, of the size of {form}"] < mean[form]:
            yield f"mixed, of the size of {form}, is worse than {form}"


@contextmanager
def plain_rounding() -> Iterator[None]:
    """Scales from the largest magnitude and nothing else, as most tools do it."""

    def quantize(rows: np.ndarray, form: Form, importance: Any = None) -> Integers:
        top = 2 ** (form.bits - 1) - 1
        by = rows.reshape(len(rows), -1)
        scale = np.abs(by).max(1, keepdims=True) / top
        scale = np.where(scale == 0, 1, scale).astype(np.float16)
        values = np.clip(np.rint(by / scale.astype(np.float32)), -top, top).astype(np.int8)
        return Integers(values, scale, None, form.bits, form.group)

    with mock.patch.object(native, "quantize", quantize):
        yield


# --- onnxruntime's ------------------------------------------------------------------------------


def measure_onnxruntime(bundle: Bundle, original: Sequence[np.ndarray], folder: Path) -> list[Row]:
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    runs = recorded(bundle)

    def dynamic(component: str, source: Path, target: Path) -> None:
        quantize_dynamic(source, target, KINDS, per_channel=True, weight_type=QuantType.QInt8)

    def static(component: str, source: Path, target: Path) -> None:
        quantize_static(
            source,
            target,
            Reader(runs[component]),
            op_types_to_quantize=KINDS,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )

    def nbits(bits: int) -> Callable[[str, Path, Path], None]:
        def made(component: str, source: Path, target: Path) -> None:
            import onnx
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

            model = onnx.load(source)
            quantizer = MatMulNBitsQuantizer(model, block_size=32, bits=bits, is_symmetric=True)
            quantizer.process()
            quantizer.model.save_model_to_file(str(target), True)

        return made

    ways: dict[str, tuple[str, Callable[[str, Path, Path], None]]] = {
        "onnxruntime, dynamic W8A8 per channel": ("8", dynamic),
        "onnxruntime, static W8A8 per channel (QDQ)": ("8", static),
        "onnxruntime, MatMulNBits 8 (convolutions stay fp32)": ("8, 32", nbits(8)),
        "onnxruntime, MatMulNBits 4, g32 (convolutions stay fp32)": ("4, 32", nbits(4)),
    }
    rows = []
    logging.getLogger().setLevel(logging.ERROR)  # a line for every norm
    for name, (bits, way) in ways.items():
        try:
            sessions, size = quantized_sessions(bundle, folder, way)
        except Exception as error:  # theirs, of any kind: the table says so
            rows.append(Row(f"{name}: fails, {str(error).splitlines()[0][-120:]}", bits, 0, [0.0]))
            continue
        pipe = Pipeline(bundle, resident=True, opener=partial(_session, sessions))
        rows.append(Row(name, bits, size, compared(original, pipe)))
    return rows


def _session(sessions: dict[str, Session], _: Bundle, name: str) -> Session:
    return sessions[name]


def quantized_sessions(
    bundle: Bundle, folder: Path, way: Callable[[str, Path, Path], None]
) -> tuple[dict[str, Session], int]:
    """The components as onnxruntime's quantizer leaves them, and their bytes."""
    sessions, size = {}, 0
    for component in COMPONENTS:
        target = folder / f"{component}.q.onnx"
        for old in folder.glob(f"{target.name}*"):
            old.unlink()
        way(component, bundle.path(component) / "model.onnx", target)
        size += sum(made.stat().st_size for made in folder.glob(f"{target.name}*"))
        sessions[component] = Session(bundle, component, target)
    return sessions, size


def recorded(bundle: Bundle) -> dict[str, list[dict[str, np.ndarray]]]:
    """What every component is given while the calibration prompts are drawn."""
    from ferrotype.runtime.engines import open_engine

    runs: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in COMPONENTS}

    def opened(bundle: Bundle, name: str) -> Any:
        engine = open_engine(bundle, name)

        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            runs[name].append({k: np.array(v) for k, v in inputs.items()})
            return engine(inputs)

        return run

    pipe = Pipeline(bundle, resident=True, opener=opened)
    for prompt in CALIBRATION:
        *_, last = pipe.steps(prompt)
        pipe.decode_array(last.latents)
    return runs


class Session:
    """A graph on onnxruntime as it comes."""

    def __init__(self, bundle: Bundle, component: str, path: Path) -> None:
        import onnxruntime as ort

        self._session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._kinds = {
            i.name: np.int64 if "int64" in i.type else np.float32
            for i in self._session.get_inputs()
        }

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        feeds = {name: np.asarray(inputs[name], kind) for name, kind in self._kinds.items()}
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(None, feeds), strict=True))


class Reader:
    """Recorded inputs in the way that onnxruntime's calibration asks for them."""

    def __init__(self, runs: list[dict[str, np.ndarray]]) -> None:
        self._left = iter(runs)

    def get_next(self) -> dict[str, np.ndarray] | None:
        run = next(self._left, None)
        if run is None:
            return None
        return {
            k: np.asarray(v, np.int64 if k == "input_ids" else np.float32) for k, v in run.items()
        }


# --- OpenVINO's ---------------------------------------------------------------------------------


def measure_nncf(bundle: Bundle, original: Sequence[np.ndarray], folder: Path) -> list[Row]:
    ways = {
        "w8": ("NNCF, INT8_SYM weights", "8"),
        "w4": ("NNCF, INT4_SYM weights, g32 (convolutions stay int8)", "4, 8"),
        "w8a8": ("NNCF, W8A8", "8"),
    }
    asked = {"calibration": CALIBRATION, "prompts": PROMPTS, "seeds": SEEDS}
    worker = Path(__file__).with_name("nncf_worker.py")
    rows = []
    try:
        python = environment(folder, "nncf", ENVIRONMENTS["nncf"])
    except subprocess.CalledProcessError as error:
        return [Row(f"NNCF: cannot be installed, {error}", "", 0, [0.0])]
    for way, (name, bits) in ways.items():
        out = folder / f"nncf-{way}.npz"
        done = subprocess.run(
            [python, worker, bundle.folder, way, out],
            input=json.dumps(asked),
            text=True,
            capture_output=True,
        )
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1][-120:]
            rows.append(Row(f"{name}: fails, {why}", bits, 0, [0.0]))
            continue
        told = json.loads(done.stdout.strip().splitlines()[-1])
        with np.load(out) as found:
            pairs = zip(original, (found[key] for key in found.files), strict=True)
            psnr = [parity.psnr(a, b, peak=1.0) for a, b in pairs]
        rows.append(Row(name, bits, told["bytes"], psnr))
    return rows


# --- the report ---------------------------------------------------------------------------------


HEAD = """| form | bits | MiB | mean dB | 10th percentile | worst |
|---|---|---:|---:|---:|---:|"""


def write_report(ours: Sequence[Row], theirs: Sequence[Row], notes: Sequence[str]) -> str:
    return f"""# Fewer bits

`python benchmarks/quantization.py --check`

{measure.describe()}

The trained emoji model, {len(PROMPTS)} prompts by {len(SEEDS)} seeds, 4 LCM steps: PSNR of the
picture to that in fp32.  MiB are of what a picture reads: text encoder, U-Net, decoder.  Bits are
of the numbers that are stored, without scales; in our bundles the first and the last convolution
and the time embedding are bf16 unless mixed.  {" ".join(notes)}

## Native bundles

{HEAD}
{chr(10).join(row.line() for row in ours)}

## Others' quantizers, on the same model in ONNX

With the same calibration pictures; onnxruntime was asked for {", ".join(KINDS)}.

{HEAD}
{chr(10).join(row.line() for row in theirs)}
"""


if __name__ == "__main__":
    main()
