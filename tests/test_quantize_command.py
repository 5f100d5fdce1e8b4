"""`ferrotype quantize`: a smaller bundle with figures and a sheet, or one line that says why."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ferrotype import bundle as bundles
from ferrotype import cli, kernels, parity
from ferrotype.quantize import calibrate, report
from ferrotype.runtime.bench import results
from ferrotype.runtime.pipeline import EMBEDDED_ONNX, Pipeline

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")
PLAIN = Path("plain.ferro")
FEW = ("a red heart", "a rocket")
HELD_OUT = report.PROMPTS


@pytest.fixture(autouse=True)
def quick(plain, tmp_path, monkeypatch):
    """A bundle to make smaller, and two pictures instead of sixteen."""
    monkeypatch.chdir(tmp_path)
    PLAIN.symlink_to(plain)
    monkeypatch.setattr(report, "PROMPTS", FEW)
    monkeypatch.setattr(report.draw, "__defaults__", (FEW, (0,), None, None, lambda prompt: None))
    (tmp_path / "prompts.txt").write_text("a blue whale\n\n")


def invoke(*args):
    return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="ferrotype")


def line_of(code, *args):
    """The one line with which a command fails."""
    done = invoke(*args)
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    assert "Traceback" not in done.output
    return line


QUANTIZE = ("quantize", PLAIN, "--prompts", "prompts.txt", "-o")


@pytest.mark.parametrize(
    ("weights", "activations", "floor"), [("w8", "bf16", 40), ("w8", "int8", 35), ("w4", None, 22)]
)
def test_a_bundle_becomes_smaller_and_says_what_that_cost(weights, activations, floor):
    more = ("--activations", activations) if activations else ()
    done = invoke(*QUANTIZE, "q.ferro", "--weights", weights, *more)
    assert done.exit_code == 0, done.output
    source, made = bundles.load(PLAIN), bundles.load("q.ferro")
    assert not bundles.verify(made)
    assert made.manifest.precision == bundles.Precision(weights, activations or "bf16")
    sizes = [cli.weight_bytes(bundle) for bundle in (source, made)]
    assert sizes[1] < {"w8": 0.62, "w4": 0.4}[weights] * sizes[0]
    told = made.manifest.parity["quantized"]
    assert [(p["prompt"], p["seed"]) for p in told["pictures"]] == [(p, 0) for p in FEW]
    for picture in told["pictures"]:
        before, after = (drawn(bundle, picture["prompt"]) for bundle in (source, made))
        assert picture["psnr"] == pytest.approx(parity.psnr(before, after, peak=1.0), abs=0.01)
    assert told["worst_psnr"] == min(p["psnr"] for p in told["pictures"])
    assert told["mean_psnr"] >= floor
    assert made.manifest.parity["quantized_from"] == source.sha256
    assert f"PSNR {told['mean_psnr']:.1f} dB" in done.stdout
    assert f"PSNR {told['mean_psnr']:.1f} dB" in invoke("inspect", "q.ferro").stdout
    with Image.open("q.ferro/check/quantized.png") as sheet:
        assert sheet.size == (3 * 128 + 4 * 8, 2 * (128 + 28) + 28)
    layers = made.manifest.parity["layers"]["unet"]
    forms = {form for _, form, _, _ in layers}
    assert forms == {"bf16", {"w8": "int8", "w4": "int4"}[weights]}


def drawn(bundle, prompt):
    pipe = Pipeline(bundle)
    *_, last = pipe.steps(prompt)
    return pipe.decode_array(last.latents)


def test_equal_input_gives_equal_bytes_and_a_recipe_can_be_used_again():
    done = invoke(*QUANTIZE, "a.ferro", "--weights", "w4", "--recipe-out", "r.json", "--json")
    assert json.loads(done.stdout)["parity"]["quantized"]["mean_psnr"] > 20
    assert invoke(*QUANTIZE, "b.ferro", "--weights", "r.json").exit_code == 0
    a, b = bundles.load("a.ferro"), bundles.load("b.ferro")
    assert a.manifest.files == b.manifest.files


def test_the_best_forms_within_a_size():
    whole = cli.weight_bytes(bundles.load(PLAIN))
    budget = int(0.45 * whole)
    done = invoke(
        *QUANTIZE,
        "m.ferro",
        "--size-budget",
        f"{budget // 1000}KB",
        "-n",
        1,
        "--recipe-out",
        "r.json",
    )
    assert done.exit_code == 0, done.output
    made = bundles.load("m.ferro")
    assert 0.9 * budget < cli.weight_bytes(made) <= budget
    assert made.manifest.precision.weights == "mixed"
    told = made.manifest.parity["quantized"]
    assert told["bytes"] == cli.weight_bytes(made)
    assert told["bytes_before"] == whole
    sizes = [point["bytes"] for point in told["frontier"]]
    assert min(sizes) < told["bytes"] < max(sizes)
    assert {"w8", "w4"} == told["uniform"].keys()
    with Image.open("m.ferro/check/frontier.png") as plot:
        assert plot.size == report.PAGE
    assert json.loads(Path("r.json").read_text())["model"] == made.manifest.model


def test_what_is_refused(tmp_path, monkeypatch):
    quantize, w8 = (*QUANTIZE, "q.ferro"), ("--weights", "w8")
    assert "give one of --weights" in line_of(2, *quantize)
    assert "give one of --weights" in line_of(2, *quantize, *w8, "--psnr-floor", 30)
    assert "there is: fp32" in line_of(2, *quantize, "--weights", "w5")
    assert "the native target stores w8, w4" in line_of(1, *quantize, "--weights", "p6")
    (tmp_path / "prompts.txt").write_text("\n \n")
    for more in ((), ("--no-calibration",)):
        assert "prompts.txt has no prompts" in line_of(2, *quantize, *w8, *more)
    (tmp_path / "prompts.txt").write_text("a blue whale")
    assert "whole numbers" in line_of(2, *quantize, *w8, "--seeds", "1,x")
    (tmp_path / "prompts.txt").write_text("a blue whale")
    (tmp_path / "q.ferro").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "calibrate", None)  # it is not come to that
        line_of(1, *quantize, *w8)
    (tmp_path / "q.ferro").rmdir()
    other = ("quantize", EMBEDDED_ONNX, "-o", "q.ferro", *w8)
    assert "made for onnx" in line_of(1, *other)
    assert "made for onnx" in line_of(1, *other, "--no-calibration")
    rules = [{"match": "unet/nothing*", "weights": "w4"}]
    for fields, text in (
        ({"model": "another"}, "the recipe was made for 'another'"),
        ({"rules": rules}, "'unet/nothing*' is the first match of no weight"),
    ):
        (tmp_path / "r.json").write_text(json.dumps({"recipe": 1, "default": "w8", **fields}))
        assert text in line_of(1, *quantize, "--weights", "r.json", "--no-calibration")
    checkpoint = tmp_path / "sd"
    checkpoint.mkdir()
    (checkpoint / "model_index.json").write_text("{}")
    assert "is a checkpoint: convert it first" in line_of(2, "quantize", "sd", "-o", "x", *w8)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {PLAIN.name, "prompts.txt", "r.json", "sd"}


def test_what_cannot_be_met_says_what_can(tmp_path):
    quick = (*QUANTIZE, "q.ferro", "-n", 1, "--no-calibration")
    assert "cannot be met: the least is" in line_of(1, *quick, "--size-budget", "1MB")
    assert "cannot be met: the best is" in line_of(1, *quick, "--psnr-floor", 300)


def test_a_bundle_of_few_bits_and_a_weight_that_is_not_finite_are_refused(tmp_path):
    assert invoke(*QUANTIZE, "q.ferro", "--weights", "w8", "--no-calibration").exit_code == 0
    again = ("quantize", "q.ferro", "-o", "r.ferro", "--weights", "w4", "--no-calibration")
    assert "has weights w8 already" in line_of(1, *again)
    broken = tmp_path / "broken.ferro"
    shutil.copytree(PLAIN, broken)
    index = json.loads((broken / "unet" / "weights.json").read_text())["tensors"]
    name, place = next((n, t) for n, t in index.items() if "mid_block" in n and t["bytes"] > 9000)
    with (broken / "unet" / "weights.bin").open("r+b") as file:
        file.seek(place["offset"] + 2 * 16)
        file.write(np.array([0x7FC0], "<u2").tobytes())
    line = line_of(1, "quantize", broken, "-o", "r.ferro", "--weights", "w8", "--no-calibration")
    assert name.split(".")[0] in line
    assert "NaN or infinite" in line
    assert not (tmp_path / "r.ferro").exists()


def test_a_command_that_is_stopped_leaves_nothing(tmp_path):
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from ferrotype.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *map(str, QUANTIZE), "q.ferro", "--weights", "w4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    for _ in range(600):
        if any(p.name.endswith(".tmp") for p in tmp_path.iterdir()):
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert {p.name for p in tmp_path.iterdir()} == {"prompts.txt", PLAIN.name}


# --- figures ------------------------------------------------------------------------------------


def test_ssim_is_that_of_the_formula():
    """One window, all of it by hand."""
    rng = np.random.default_rng()
    a, b = rng.uniform(0, 1, (2, 11, 11))
    g = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    w = np.outer(g, g) / np.outer(g, g).sum()
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb, cov = (w * a * a).sum() - ma**2, (w * b * b).sum() - mb**2, (w * a * b).sum() - ma * mb
    expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
    expected /= (ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)
    assert report.ssim(a, b) == pytest.approx(expected, abs=1e-12)
    assert report.ssim(a, a) == pytest.approx(1)
    wide = rng.uniform(0, 1, (40, 23))
    assert report.ssim(wide, wide[::-1]) < 0.2


def test_a_sheet_shows_the_worst_and_fits():
    rng = np.random.default_rng()
    before = rng.uniform(0, 1, (30, 1024, 3))
    many = [
        report.Drawn("é" * 300, i, before, np.clip(before + 0.01 * (i + 1), 0, 1))
        for i in range(12)
    ]
    page = report.sheet(many)
    assert page.size[0] == 3 * 512 + 4 * 8
    assert report._spread(many, 8)[0] is many[-1], "the worst"
    assert len(report._spread(many, 8)) == 8
    told = report.figures(many)
    assert told["worst_psnr"] == pytest.approx(many[-1].psnr, abs=0.01)
    assert told["worst_psnr"] < told["mean_psnr"]


def test_evaluation_does_not_see_what_calibration_saw():
    assert len(HELD_OUT) >= 8
    assert not set(calibrate.PROMPTS) & set(HELD_OUT)


def test_other_precisions_are_made_for_a_benchmark():
    quick = ("--rounds", 1, "--size", 64, "-n", 1, "--threads", 1, "--no-store", "--json")
    done = invoke("bench", PLAIN, "--vary", "precision=own,w8", *quick)
    assert done.exit_code == 0, done.output
    own, w8 = results.loads(done.stdout).variants
    assert (own.name, own.weights) == ("precision=own", "bf16")
    assert (w8.name, w8.weights) == ("precision=w8", "w8")
    assert w8.bundle_bytes < own.bundle_bytes
    assert "rounded without calibration" in done.stderr
