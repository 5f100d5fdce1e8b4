"""Native conversion without torch: the same bytes, checked by the engine, in little memory."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from ferrotype import kernels, parity
from ferrotype.benchmarks.checkpoints import (
    SMALL,
    TINY,
    TINY_XL,
    write_checkpoint,
    write_single,
)
from ferrotype.bundle import MANIFEST, TEXT_ENCODERS
from ferrotype.cli import main
from ferrotype.convert import ConvertError, OptionError, convert, native, rounding, streamed
from ferrotype.convert.checkpoint import open_checkpoint, skip_layers
from ferrotype.convert.recorded import Recorder
from ferrotype.runtime.pipeline import Pipeline

DEEP_XL = TINY_XL | {"text_encoder_2": TINY_XL["text_encoder_2"] | {"num_hidden_layers": 3}}
needs_engine = pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")
pytestmark = needs_engine
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors")
WITHOUT = f"""
import sys
sys.modules |= dict.fromkeys({HEAVY})  # as if they were not installed
from ferrotype.cli import main
main()
"""


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A tiny Stable Diffusion 1 as one file in fp16."""
    return write_single(tmp_path_factory.mktemp("single") / "tiny.safetensors", SMALL["sd1"])


def weights(bundle):
    return {p.parent.name: p.read_bytes() for p in sorted(bundle.folder.rglob("weights.bin"))}


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_it_needs_nothing_but_ferrotype(single, sd, tmp_path):
    out = tmp_path / "tiny.ferro"
    command = [sys.executable, "-c", WITHOUT, "convert", single, "--target", "native", "-o", out]
    command += ["--tokenizer", sd / "tokenizer"]
    done = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["parity"]
    assert report["original"] == "engine"
    assert report["components"].keys() == report["census"].keys()
    assert any("--check diffusers" in note for note in report["notes"])
    assert Pipeline.load(out).generate("a fish", steps=1, size=(64, 64)).size == (64, 64)


@pytest.mark.parametrize("form", ["bf16", "w8", "fp32", "w4"])
def test_both_checks_make_the_same_bytes(sd, tmp_path, form):
    options = {"target": "native", "weights": form}
    there = convert(sd, tmp_path / "a.ferro", **options)
    here = convert(sd, tmp_path / "b.ferro", check="engine", **options)
    assert there.manifest.parity["original"] == "diffusers"
    assert weights(here) == weights(there)
    names = {f"{name}/{file}" for name in TEXT_ENCODERS.values() for file in ("tokenizer.json",)}
    for name, file in here.manifest.files.items():
        if not name.startswith("check/") and name != MANIFEST:
            assert there.manifest.files[name] == file, name
    assert names & here.manifest.files.keys()
    for field in ("components", "recipe", "sizes", "tokenizers", "source"):
        assert getattr(here.manifest, field) == getattr(there.manifest, field)
    near = np.abs(np.subtract(here.manifest.preview, there.manifest.preview))
    assert near.max() < 0.1  # fitted to pictures of other numbers of steps


def test_the_original_is_exact(single, sd, tmp_path):
    """Stored as it is, nothing is lost; the report would show it."""
    opened = open_checkpoint(single, sd / "tokenizer")
    made = convert(opened, tmp_path / "a.ferro", "native", "fp16", "fp32", check="engine")
    psnr = {n: min(o["psnr"] for o in c.values()) for n, c in report(made)["components"].items()}
    assert psnr["text_encoder"] == psnr["vae_encoder"] == parity.PSNR_CAP
    assert psnr["unet"] > 80  # filters of doubled images are sums, rounded to fp16
    made = convert(sd, tmp_path / "b.ferro", "native", "fp32", "fp32", check="engine")
    assert report(made)["picture"]["psnr"] == parity.PSNR_CAP


def report(bundle):
    return json.loads((bundle.folder / MANIFEST).read_text())["parity"]


def test_a_damaged_tensor_fails_the_check(sd, tmp_path, monkeypatch):
    plain = rounding.to_bf16

    def damaged(name, array):
        broken = name.startswith("mid_block.resnets.0.conv1")
        return plain(name, array * np.float32(-1) if broken else array)

    monkeypatch.setattr(native, "to_bf16", damaged)
    with pytest.raises(parity.ParityError, match=r"unet out_sample.*--check diffusers names the"):
        convert(sd, tmp_path / "a.ferro", "native", check="engine")
    assert not list(tmp_path.iterdir())


def test_weights_of_no_number_are_refused(sd, tmp_path):
    folder = write_checkpoint(tmp_path / "nan", TINY)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, path)
    with pytest.raises(ConvertError, match=r"conv_in.weight has 1 NaN or Inf"):
        convert(folder, tmp_path / "a.ferro", "native", check="engine")
    assert [p.name for p in tmp_path.iterdir()] == ["nan"]


def test_an_original_that_overflows_is_damaged(tmp_path):
    import torch

    folder = write_checkpoint(tmp_path / "loud", TINY, torch.float32)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.weight"] *= np.float32(3e38)
    save_file(tensors, path)
    with pytest.raises(ConvertError, match=r"vae_decoder returns .* in sample: the checkpoint is"):
        convert(folder, tmp_path / "a.ferro", "native", check="engine")


def test_what_fp16_cannot_hold_is_kept_in_fp32(tmp_path):
    folder = write_checkpoint(tmp_path / "loud", TINY)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    loud = tensors["decoder.conv_in.weight"].astype(np.float32) * 1e5
    tensors["decoder.conv_in.weight"] = loud.clip(-6e4, 6e4).astype(np.float16)
    save_file(tensors, path)
    made = convert(folder, tmp_path / "a.ferro", "native", "fp16", "fp16", check="engine")
    kept = {name: part.activations for name, part in made.manifest.components.items()}
    assert kept == {n: "fp32" if n == "vae_decoder" else "" for n in kept}
    assert any("vae_decoder" in note and "fp32" in note for note in report(made)["notes"])
    assert Pipeline(made).generate("a fish", steps=1, size=(64, 64)).size == (64, 64)


def test_sdxl_with_clip_skip(tmp_path):
    xl = write_checkpoint(tmp_path / "deep", DEEP_XL)
    made = convert(xl, tmp_path / "xl.ferro", "native", check="engine", clip_skip=1)
    there = convert(xl, tmp_path / "there.ferro", "native", clip_skip=1)
    assert made.manifest.components == there.manifest.components
    assert weights(made) == weights(there)


def test_the_picture_shrinks_until_it_fits(plain, monkeypatch):
    from ferrotype.bundle import load

    bundle = load(plain)
    assert streamed._size(bundle) == ((128, 128), streamed.BUDGET)
    monkeypatch.setattr(streamed, "BUDGET", 3 << 20)
    size, budget = streamed._size(bundle)
    assert budget is None or max(size) < 128
    monkeypatch.setattr(streamed, "BUDGET", 1)
    assert streamed._size(bundle)[1] is None
    monkeypatch.setattr(streamed, "BUDGET", 320 << 20)
    monkeypatch.setattr(streamed, "LARGEST", 64)
    assert streamed._size(bundle) == ((64, 64), streamed.BUDGET)


def test_a_recorder_keeps_the_first_and_the_last_call(plain):
    from ferrotype.bundle import load

    seen = Recorder(load(plain), steps=3, size=(64, 64))
    seen.draw()
    assert {len(runs) for runs in seen.recorded.values()} == {2}
    (first, _), (last, out) = seen.recorded["unet"]
    assert first["timestep"] > last["timestep"]
    assert np.array_equal(seen.repeat("unet", last)["out_sample"], out["out_sample"])


@pytest.mark.parametrize("family", [TINY, DEEP_XL], ids=["sd", "xl"])
@pytest.mark.parametrize("size", [None, (6, 4)])
@pytest.mark.parametrize("skip", [0, 1])
def test_interfaces_are_those_of_the_exported_graphs(tmp_path, family, size, skip):
    from ferrotype.convert import modules, onnx

    found = skip_layers(open_checkpoint(write_checkpoint(tmp_path / "c", family)), skip)
    for name in [*found.tokenizers, "unet", "vae_decoder", "vae_encoder"]:
        name = {v: k for k, v in TEXT_ENCODERS.items()}.get(name, name)
        module = modules.vae(found) if "vae" in name else getattr(modules, name)(found)
        expected = onnx.interface(name, SimpleNamespace(config=module.config), size)
        for ours, theirs in zip(native.interface(found, name, size), expected, strict=True):
            assert {n: (t.dtype, list(t.shape)) for n, t in ours.items()} == {
                n: (t["dtype"], [1 if d == "batch" else d for d in t["shape"]])
                for n, t in theirs.items()
            }


def test_the_command_says_what_does_not_go_together(sd, tmp_path):
    done = run("convert", sd, "--check", "engine", "-o", tmp_path / "a.ferro")
    assert done.exit_code == 2
    assert "--check engine is for the native target, not for onnx" in done.output
    with pytest.raises(OptionError, match="check 'torch' is not one of diffusers, engine"):
        convert(sd, tmp_path / "a.ferro", "native", check="torch")
