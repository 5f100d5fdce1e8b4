"""Devices that are not here: what convert, plan and verify --on-device do, and how they refuse."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from ferrotype import bundle, cli
from ferrotype.benchmarks.checkpoints import TINY, TINY_XL, write_checkpoint
from ferrotype.convert import TensorrtOptions, convert, tensorrt
from ferrotype.parity import floors
from ferrotype.quantize.recipe import Recipe
from ferrotype.runtime import check
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX

THREE = "8.6,8.9,12.0"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The command line sets warnings and hooks for its process, which is ours here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with warnings.catch_warnings():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("targets") / "tiny", TINY)


@pytest.fixture(scope="module")
def for_gpus(checkpoint):
    """A tiny model for three GPUs, in int8."""
    out = checkpoint.parent / "gpu.ferro"
    options = TensorrtOptions(tuple(THREE.split(",")))
    return convert(checkpoint, out, "tensorrt", Recipe.uniform("w8"), options=options)


@pytest.fixture
def emoji_with_check(tmp_path):
    """A copy of the embedded ONNX bundle to break."""
    return shutil.copytree(EMBEDDED_ONNX, tmp_path / "copy.ferro")


def invoke(*args):
    return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="ferrotype")


def fails(code, *args):
    """The one line on stderr that a command ends with."""
    before = sorted(Path().rglob("*"))
    done = invoke(*args)
    assert done.exit_code == code, done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    assert line.isprintable()
    assert len(line) < 1000
    assert sorted(Path().rglob("*")) == before
    return line


# --- TensorRT -----------------------------------------------------------------------------------


def test_an_sdxl_is_built_for_three_gpus_by_one_command():
    write_checkpoint(Path("xl"), TINY_XL)
    args = ("--target", "tensorrt", "--compute-capability", THREE, "-o", "xl.ferro")
    done = invoke("convert", "xl", *args)
    assert done.exit_code == 0, done.output
    opened = bundle.load("xl.ferro")
    assert len(opened.manifest.components) == 5
    for name, part in opened.manifest.components.items():
        assert sorted(part.memory) == sorted(THREE.split(","))
        assert all(m.weights > 0 for m in part.memory.values())
        for engine in ("sm86", "sm89", "sm120"):
            assert (opened.folder / name / f"{engine}.engine").stat().st_size > 1000
        assert f"{name} on 12.0" in done.stdout
    assert opened.manifest.options["made_with"].startswith("tensorrt_rtx ")
    assert "no engine was run" in opened.manifest.parity["verdict"]
    assert opened.manifest.parity["picture"]["psnr"] >= floors("fp16", "fp16")["picture"]


def test_int8_is_reported_and_planned_by_device(for_gpus):
    manifest = for_gpus.manifest
    assert manifest.precision == bundle.Precision("w8", "fp16")
    assert manifest.parity["weights"]["text_encoder"]["w8"] >= 5
    assert manifest.parity["picture"]["psnr"] >= 35
    shown = invoke("plan", for_gpus.folder).stdout
    total = manifest.components["unet"].memory["8.9"].total
    assert re.search(rf"unet on 8\.9 +{total / 2**20:,.1f} MiB", shown)
    made = json.loads(invoke("plan", for_gpus.folder, "--json").stdout)
    assert made["device_bytes"]["unet"]["8.9"] == total
    assert "8.6, 8.9, 12.0" in invoke("inspect", for_gpus.folder).stdout


@pytest.mark.parametrize("command", [["generate", "a boat", "-b"], ["verify", "--on-device"]])
def test_without_a_gpu_every_command_says_so_in_one_line(for_gpus, command):
    assert "this bundle has engines for compute capability 8.6, 8.9" in fails(
        1, *command, for_gpus.folder
    )


def test_an_operator_that_the_builder_refuses_is_one_line_with_its_reason(checkpoint, monkeypatch):
    def sabotage(graph, **_):
        last = graph.node(len(graph) - 1)
        strange = ir.node("Nonsense", [last.outputs[0]], name="strange")
        strange.outputs[0].type, strange.outputs[0].shape = last.outputs[0].type, None
        graph.append(strange)
        graph.outputs[0] = strange.outputs[0]

    monkeypatch.setattr(tensorrt, "compress", sabotage)
    monkeypatch.setattr("onnx.checker.check_model", lambda *_, **__: None)
    args = ("--target", "tensorrt", "--weights", "w8", "-o", "out.ferro")
    line = fails(1, "convert", checkpoint, *args)
    assert "Nonsense" in line
    assert "text_encoder" in line
    assert "convert with other weights, or with --target onnx" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--compute-capability", "8.7"), "'8.7' is not one that tensorrt-rtx builds for (7.5"),
        (("--weights", "p6"), "TensorRT has no operator for palettes"),
        (("--weights", "w8a"), "Non-zero zero point is not supported"),
        (("--weights", "fp32", "--activations", "fp16"), "weights fp32 need activations fp32"),
        (("--weights", "missing.json"), "missing.json is not there"),
    ],
)
def test_what_tensorrt_has_not_is_one_line(checkpoint, args, message):
    found = fails(1, "convert", checkpoint, "--target", "tensorrt", "-o", "out.ferro", *args)
    assert message in found


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--chunks", "2"), "--chunks is an option of --target coreml, not of onnx"),
        (("--target", "coreml", "--weight-streaming"), "--weight-streaming is an option of --targ"),
        (("--target", "tensorrt", "--layout", "apple"), "--layout is an option of --target coreml"),
        (("--compute-capability", "8.6"), "is an option of --target tensorrt, not of onnx"),
        (("--target", "coreml", "--deployment", "ios15"), "'ios15' is not one of"),
    ],
)
def test_an_option_of_another_target_is_a_usage_error(args, message):
    assert message in fails(2, "convert", "sd", *args)


@pytest.mark.parametrize(
    ("target", "package"), [("coreml", "coremltools"), ("tensorrt", "tensorrt-rtx")]
)
def test_a_package_that_is_not_installed_is_named_at_once(checkpoint, monkeypatch, target, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = fails(1, "convert", checkpoint, "--target", target, "-o", "out.ferro")
    assert f"needs {package}: install the extra, pip install '.[{target}]'" in line


def test_a_recipe_s_file_is_read_and_its_faults_are_one_line(checkpoint):
    Path("mixed.json").write_text(
        json.dumps({
            "recipe": 1, "default": "w8", "rules": [{"match": "unet/mid_block.*", "weights": "w4"}],
        })
    )  # fmt: skip
    args = ("--target", "tensorrt", "--compute-capability", "8.6", "-o", "out.ferro")
    done = invoke("convert", checkpoint, *args, "--weights", "mixed.json")
    assert done.exit_code == 0, done.output
    manifest = bundle.load("out.ferro").manifest
    assert manifest.precision.weights == "mixed"
    assert manifest.parity["floors"] == floors("4-bit", "fp16")
    assert manifest.parity["weights"]["unet"]["w4"] > 0
    Path("bad.json").write_text('{"recipe": 1, "default": "w9"}')
    bad = fails(1, "convert", checkpoint, *args, "--weights", "bad.json", "-f")
    assert "bad.json is not a valid recipe: default" in bad


# --- the check that a bundle carries ------------------------------------------------------------


def test_a_bundle_is_checked_where_it_runs():
    done = invoke("verify", "--on-device")
    assert done.exit_code == 0, done.output
    assert "unet out_sample" in done.stdout
    assert "picture: lcm, 4 steps" in done.stdout
    found = json.loads(invoke("verify", "--on-device", "--json").stdout)
    assert found["problems"] == []
    assert found["on_device"]["picture"]["psnr"] >= 40
    assert (
        found["on_device"]["components"].keys() == bundle.load(EMBEDDED).manifest.components.keys()
    )


def relist(folder):
    """Make the manifest vouch for what is there now."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    listed = bundle.list_files(folder)
    raw["files"] = {n: {"bytes": f.bytes, "sha256": f.sha256} for n, f in listed.items()}
    path.write_text(json.dumps(raw))


def test_a_device_that_computes_something_else_is_found(emoji_with_check):
    path = emoji_with_check / "check" / "unet" / "0.out_sample.npy"
    np.save(path, np.load(path) * 1.5)
    relist(emoji_with_check)
    line = fails(1, "verify", "--on-device", emoji_with_check)
    assert "unet out_sample:" in line
    assert "floor 50 dB" in line


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("check/unet/0.sample.npy", lambda p: p.write_bytes(b"no"), "is not a recorded array"),
        (
            "check/unet/0.sample.npy",
            lambda p: np.save(p, np.ones(3)),
            "has the shape (3,), not that",
        ),
        (
            "check/unet/0.sample.npy",
            lambda p: np.save(p, np.array([{}])),
            "is not a recorded array",
        ),
        ("check/unet/1.out_sample.npy", lambda p: p.unlink(), "is not a recorded array"),
        ("check/picture.png", lambda p: p.unlink(), "carries no check: convert it again"),
        ("check/picture.png", lambda p: p.write_bytes(b"\x89PNG"), "picture.png"),
        ("check/unet", shutil.rmtree, "carries no check of unet"),
    ],
)
def test_a_damaged_check_is_one_line(emoji_with_check, name, damage, message):
    damage(emoji_with_check / name)
    relist(emoji_with_check)
    assert message in fails(1, "verify", "--on-device", emoji_with_check)


def test_a_check_is_compared_by_the_runs_of_the_original():
    opened = bundle.load(EMBEDDED_ONNX)
    report = check.compare(opened)
    assert list(check.problems(report)) == []
    report["components"]["unet"]["out_sample"]["psnr"] = 49.9
    report["picture"]["psnr"] = 39.9
    assert list(check.problems(report)) == [
        "unet out_sample: 49.9 dB, floor 50 dB",
        "the picture: 39.9 dB, floor 40 dB",
    ]
