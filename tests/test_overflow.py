"""A component whose layers pass fp16's limit is kept in fp32 and said to be, on every target."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file  # noqa: E402

from ferrotype import bundle, kernels, parity  # noqa: E402
from ferrotype.benchmarks.checkpoints import TINY, write_checkpoint  # noqa: E402
from ferrotype.convert import convert  # noqa: E402
from ferrotype.quantize.apply import quantize_bundle  # noqa: E402
from ferrotype.quantize.recipe import Recipe  # noqa: E402
from ferrotype.runtime.engines import open_engine  # noqa: E402
from ferrotype.runtime.pipeline import Pipeline  # noqa: E402

LOUD = "decoder.conv_in.weight"
native = pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")
TARGETS = ["onnx", pytest.param("native", marks=native)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Its decoder's first layer is so loud that all up to the next norm passes 65504."""
    folder = write_checkpoint(tmp_path_factory.mktemp("loud") / "checkpoint", TINY)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[LOUD] = (tensors[LOUD].astype(np.float32) * 1e5).clip(-6e4, 6e4).astype(np.float16)
    save_file(tensors, path)
    return folder


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    options = {"weights": "fp16", "activations": "fp16", "sizes": [(64, 64)]}
    names = ["onnx", *(["native"] if kernels.available() else [])]
    return {n: convert(checkpoint, folder / f"{n}.ferro", n, **options) for n in names}


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_kept_in_fp32_and_the_manifest_says_so(made, target):
    manifest = made[target].manifest
    kept = {name: part.activations for name, part in manifest.components.items()}
    assert kept.pop("vae_decoder") == "fp32"
    assert set(kept.values()) == {""}
    assert manifest.precision == bundle.Precision("fp16", "fp16")
    [note] = [n for n in manifest.parity["notes"] if "kept in fp32" in n]
    assert note.startswith("vae_decoder: layer decoder.")
    raw = json.loads((made[target].folder / "manifest.json").read_text())
    assert raw["components"]["vae_decoder"]["activations"] == "fp32"
    assert "activations" not in raw["components"]["unet"]
    if target == "onnx":
        types = {n: p.outputs for n, p in manifest.components.items()}
        assert types["vae_decoder"]["sample"].dtype == "float32"
        assert types["unet"]["out_sample"].dtype == "float16"


@pytest.mark.parametrize("target", TARGETS)
def test_the_decoder_agrees_with_diffusers(made, checkpoint, target):
    import diffusers

    vae = diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
    latents = np.random.default_rng().standard_normal((1, 4, 8, 8), np.float32) * 3
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(latents)).sample.numpy()
    found = open_engine(made[target], "vae_decoder")({"latent_sample": latents})["sample"]
    assert parity.psnr(expected, found) > 70
    assert Pipeline(made[target]).generate("a fish", steps=1).size == (64, 64)


@native
def test_quantizing_keeps_it_and_other_activations_do_not(made, tmp_path):
    recipe = Recipe.uniform("w8")
    kept = quantize_bundle(made["native"], tmp_path / "a.ferro", recipe)
    assert kept.activations("vae_decoder") == "fp32"
    assert kept.activations("unet") == "fp16"
    wide = quantize_bundle(made["native"], tmp_path / "b.ferro", recipe, "bf16")
    assert wide.activations("vae_decoder") == "bf16"
