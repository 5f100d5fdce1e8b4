"""A converted checkpoint draws what diffusers draws; what is below the floor is never written."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from ferrotype import bundle, parity
from ferrotype.benchmarks.checkpoints import (
    EMOJI_BASE,
    EMOJI_TINY,
    TINY,
    TINY_SD2,
    write_checkpoint,
)
from ferrotype.convert import ConvertError, convert, probes, stages, tokenizer
from ferrotype.convert import onnx as onnx_export
from ferrotype.convert.checkpoint import open_checkpoint
from ferrotype.convert.recipe import from_checkpoint
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX, Pipeline

PROMPT = "a red apple on a sky blue background"
PRECISIONS = {
    "fp32": ("fp32", "fp32", 45),
    "w16": ("fp16", "fp32", 45),
    "fp16": ("fp16", "fp16", 35),
}


@pytest.fixture(scope="session")
def bundles(trained, tmp_path_factory):
    """The emoji checkpoint in every precision; the embedded ONNX bundle is one of them."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {"w16": EMBEDDED_ONNX}
    for name in ("fp32", "fp16"):
        weights, activations, _ = PRECISIONS[name]
        made[name] = folder / f"{name}.ferro"
        convert(trained, made[name], weights=weights, activations=activations)
    return made


@pytest.fixture(scope="session")
def base_bundle(trained, tmp_path_factory):
    """The undistilled U-Net and its DPM-Solver schedule, converted in fp32."""
    folder = tmp_path_factory.mktemp("base")
    checkpoint = folder / "emoji-base"
    shutil.copytree(trained, checkpoint, ignore=shutil.ignore_patterns("unet", "scheduler"))
    shutil.copytree(EMOJI_BASE, checkpoint, dirs_exist_ok=True)
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    convert(checkpoint, folder / "base.ferro", weights="fp32")
    return checkpoint, folder / "base.ferro"


@pytest.fixture(scope="session")
def diffusers_pipe(trained):
    return from_diffusers("StableDiffusionPipeline", trained)


def from_diffusers(kind, folder, scheduler=None):
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(diffusers, kind)
        pipe = kind.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    if scheduler:
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        keep = {
            k: v for k, v in config.items() if k.startswith(("beta", "num_train", "prediction"))
        }
        keep |= {"timestep_spacing": "trailing", "steps_offset": 1, "clip_sample": False}
        pipe.scheduler = getattr(diffusers, scheduler).from_config(keep)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def original(pipe, seed, **options):
    """A picture as diffusers draws it: float32 in [0, 1]."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(prompt=PROMPT, generator=generator, output_type="np", **options).images[0]


def ours(path, seed, **options):
    pipe = Pipeline.load(path)
    *_, last = pipe.steps(PROMPT, seed=seed, **options)
    return pipe.decode_array(last.latents)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("seed", [0, 1234])
def test_lcm_in_four_steps_matches_diffusers(bundles, diffusers_pipe, precision, seed):
    expected = original(diffusers_pipe, seed, num_inference_steps=4, guidance_scale=1.0)
    found = ours(bundles[precision], seed)
    assert parity.psnr(expected, found, peak=1.0) >= PRECISIONS[precision][2]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_dpmpp_2m_in_twenty_steps_matches_diffusers(trained, bundles, precision):
    pipe = from_diffusers("StableDiffusionPipeline", trained, "DPMSolverMultistepScheduler")
    expected = original(pipe, 7, num_inference_steps=20, guidance_scale=1.0)
    found = ours(bundles[precision], 7, sampler="dpmpp_2m", steps=20)
    assert parity.psnr(expected, found, peak=1.0) >= PRECISIONS[precision][2]


def test_the_undistilled_model_with_guidance_and_a_negative_prompt(base_bundle):
    checkpoint, path = base_bundle
    pipe = from_diffusers("StableDiffusionPipeline", checkpoint)
    options = {"num_inference_steps": 20, "guidance_scale": 3.0, "negative_prompt": "a pizza"}
    expected = original(pipe, 5, **options)
    found = ours(path, 5, steps=20, guidance=3.0, negative="a pizza")
    assert parity.psnr(expected, found, peak=1.0) >= 45
    assert bundle.load(path).manifest.recipe.sampler == "dpmpp_2m"
    Image.fromarray((found * 255).round().astype(np.uint8)).save(path.parent / "base.png")


def test_the_trained_tiny_autoencoder_draws_the_same_picture(trained, plain, tmp_path):
    tiny = EMOJI_TINY / "diffusion_pytorch_model.safetensors"
    made = convert(open_checkpoint(trained, vae=[tiny]), tmp_path / "tiny.ferro", "native")
    assert made.component("vae_decoder").config["_class_name"] == "AutoencoderTiny"
    pictures = [ours(folder, 3, steps=4) for folder in (plain, made.folder)]
    assert parity.psnr(*pictures, peak=1.0) >= 25
    start = Pipeline.load(plain).generate("a pizza", seed=3)
    again = [ours(folder, 3, image=start, strength=0.3) for folder in (plain, made.folder)]
    assert parity.psnr(*again, peak=1.0) >= 20  # its encoder as well


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_image_to_image_matches_diffusers(trained, bundles, strength):
    start = Pipeline.load().generate("a pizza", seed=3)
    pipe = from_diffusers("StableDiffusionImg2ImgPipeline", trained, "DDIMScheduler")
    options = {"num_inference_steps": 10, "guidance_scale": 1.0, "strength": strength}
    expected = original(pipe, 11, image=start, **options)
    found = ours(bundles["fp32"], 11, image=start, strength=strength, steps=10, sampler="ddim")
    assert parity.psnr(expected, found, peak=1.0) >= 45


def test_image_to_image_with_lcm_matches_diffusers(trained, bundles):
    """Its own pipeline shortens the lattice by the strength, so the timesteps are handed over."""
    start = Pipeline.load().generate("a pizza", seed=3)
    pipe = from_diffusers("StableDiffusionImg2ImgPipeline", trained)
    pipe.scheduler.set_timesteps(4, strength=0.5)
    timesteps = pipe.scheduler.timesteps.tolist()
    options = {"timesteps": timesteps, "guidance_scale": 1.0, "strength": 1.0}
    expected = original(pipe, 11, image=start, **options)
    found = ours(bundles["fp32"], 11, image=start, strength=0.5, steps=4)
    assert parity.psnr(expected, found, peak=1.0) >= 45


def test_other_sizes_match_diffusers(bundles, diffusers_pipe):
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 200, "width": 136}
    expected = original(diffusers_pipe, 2, **options)
    found = ours(bundles["fp32"], 2, size=(136, 200))
    assert parity.psnr(expected, found, peak=1.0) >= 45


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_report_is_in_the_bundle(bundles, precision):
    opened = bundle.load(bundles[precision])
    assert bundle.verify(opened) == []
    report = opened.manifest.parity
    floors = parity.floors(*PRECISIONS[precision][:2])
    assert report["floors"] == floors
    for outputs in report["components"].values():
        for result in outputs.values():
            assert result["psnr"] >= floors["component"]
            assert result["nan"] == result["inf"] == 0
    assert report["picture"]["psnr"] >= floors["picture"]
    assert (
        report["census"].keys() == report["components"].keys() == opened.manifest.components.keys()
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graphs_are_valid_and_laid_out_as_the_ecosystem_documents(bundles, precision):
    """What Optimum's ORTStableDiffusionPipeline opens: folders, names, ranks, configurations."""
    folder = bundles[precision]
    names = {
        "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
    }
    for component, (inputs, outputs) in names.items():
        path = folder / component / "model.onnx"
        onnx.checker.check_model(str(path), full_check=False)
        graph = onnx.load(path, load_external_data=False).graph
        assert [i.name for i in graph.input] == inputs
        assert [o.name for o in graph.output] == outputs
        assert isinstance(json.loads((folder / component / "config.json").read_text()), dict)
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / "tokenizer" / name).stat().st_size > 100
    assert (folder / "scheduler" / "scheduler_config.json").is_file()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_the_same_input_gives_the_same_bytes(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "tiny", TINY)
    told = []
    one = convert(checkpoint, tmp_path / "one.ferro", progress=told.append)
    two = convert(checkpoint, tmp_path / "two.ferro")
    assert without_memory(one.manifest) == without_memory(two.manifest)
    assert one.manifest.components["unet"].memory.keys() == {
        size + frugal for size in ("32x32", "64x64", "128x128") for frugal in ("", " frugal")
    }
    assert len(told) == stages()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.ferro", "tiny", "two.ferro"]


def without_memory(manifest):
    """A manifest but for what was measured, which differs by a few pages each time."""
    parts = {n: dataclasses.replace(c, memory={}) for n, c in manifest.components.items()}
    return dataclasses.replace(manifest, components=parts)


VARIANTS = {  # name -> configurations, changes to the U-Net, the scheduler, sampler and guidance
    "embedded guidance": (TINY, {"time_cond_proj_dim": 32}, {}, ("lcm", 8.0)),
    "2.x with v-prediction": (
        TINY_SD2, {}, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        ("ddim", 7.5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_architecture_convert_and_match(tmp_path, name):
    base, unet, scheduler, expected = VARIANTS[name]
    configs = {**base, "unet": base["unet"] | unet, "scheduler": base["scheduler"] | scheduler}
    made = convert(write_checkpoint(tmp_path / "tiny", configs), tmp_path / "out.ferro")
    recipe = made.manifest.recipe
    assert (recipe.sampler, recipe.guidance) == expected
    assert made.manifest.parity["picture"]["psnr"] >= 45


def test_a_fixed_size_draws_only_that(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "tiny", TINY)
    made = convert(checkpoint, tmp_path / "fixed.ferro", sizes=[(72, 40)])
    assert made.manifest.components["unet"].inputs["sample"].shape == ("batch", 4, 5, 9)
    pipe = Pipeline(made)
    assert pipe.generate("a red apple").size == (72, 40)
    with pytest.raises(ValueError, match="draws only 72x40"):
        pipe.steps("a red apple", size=(64, 64))


def test_below_the_floor_it_fails_names_the_layer_and_leaves_nothing(tmp_path, monkeypatch):
    """A weight that is damaged on the way into the file is found and located."""
    checkpoint = write_checkpoint(tmp_path / "tiny", TINY)
    export = onnx_export.export

    def damaging(name, module, config, folder, *rest, **options):
        made = export(name, module, config, folder, *rest, **options)
        if name == "unet":
            damage(folder, "mid_block.resnets.0.conv1.weight")
        return made

    monkeypatch.setattr(onnx_export, "export", damaging)
    with pytest.raises(parity.ParityError) as caught:
        convert(checkpoint, tmp_path / "bad.ferro", weights="fp32")
    message = str(caught.value)
    assert "unet out_sample: PSNR" in message
    assert "the floor is 80 dB" in message
    assert "mid_block.resnets.0.conv1" in message
    assert "\n" not in message
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def damage(folder, suffix):
    """Scale one stored weight of model.onnx.data by 1.5."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    [tensor] = [t for t in graph.initializer if t.name.endswith(suffix)]
    where = {entry.key: entry.value for entry in tensor.external_data}
    start, count = int(where["offset"]), int(where["length"])
    data = np.memmap(folder / "model.onnx.data", np.uint8, "r+")
    data[start : start + count].view(np.float32)[:] *= 1.5
    data.flush()


def test_interrupting_leaves_nothing(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "tiny", TINY)

    def stop(stage):
        if stage == "export unet":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "out.ferro", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_fp16_that_would_overflow_is_kept_in_fp32_and_said(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "tiny", TINY)
    monkeypatch.setattr(parity, "FP16_MAX", 0.5)
    made = convert(checkpoint, tmp_path / "out.ferro", activations="fp16").manifest
    assert {part.activations for part in made.components.values()} == {"fp32"}
    dtypes = {
        t.dtype for p in made.components.values() for t in (*p.inputs.values(), *p.outputs.values())
    }
    assert "float16" not in dtypes
    for name in made.components:
        told = [n for n in made.parity["notes"] if n.startswith(f"{name}: layer ")]
        assert len(told) == 1
        assert "fp16 ends at 0: this component is kept in fp32" in told[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "abacus"}, "target 'abacus' is not one of onnx"),
        ({"weights": "fp32", "activations": "fp16"}, "no floor for fp32 weights with fp16"),
        ({"weights": "w3"}, "weights for onnx: fp32, fp16, w8, w4 (t, c, bN, not a), or a recipe"),
        ({"weights": "p6"}, "weights p6: an ONNX bundle has fp32, fp16, w8, w4 ("),
        ({"sizes": [(100, 96)]}, "100 is no multiple of 8"),
        ({"sizes": [(64, 64), (0, 96)]}, "0 is no multiple of 8"),
    ],
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(tmp_path, options, message):
    checkpoint = write_checkpoint(tmp_path / "tiny", TINY)
    with pytest.raises(ConvertError) as caught:
        convert(checkpoint, tmp_path / "out.ferro", **options)
    assert message in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"_class_name": "DDIMScheduler"}, ("ddim", 20, 7.5, "leading")),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
         ("euler", 20, 7.5, "trailing")),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
         ("dpmpp_2m_karras", 20, 7.5, "leading")),
        ({"_class_name": "LCMScheduler"}, ("lcm", 4, 1.0, "lcm")),
        ({"_class_name": "TCDScheduler"}, ("tcd", 4, 1.0, "lcm")),
        ({"_class_name": "PNDMScheduler"}, ("dpmpp_2m", 20, 7.5, "leading")),
    ],
)  # fmt: skip
def test_the_scheduler_becomes_the_recipe(tmp_path, scheduler, expected):
    recipe, notes = from_checkpoint(checkpoint_with(scheduler, tmp_path / "tiny"))
    assert (recipe.sampler, recipe.steps, recipe.guidance, recipe.spacing) == expected
    stand_in = any("is not offered" in note for note in notes)
    assert stand_in == (scheduler["_class_name"] == "PNDMScheduler"), "a stand-in is told"


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample is True"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding is True"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow"}, "prediction_type 'flow'"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "odd"}, "beta_schedule 'odd'"),
    ],
)
def test_a_schedule_that_no_table_expresses_is_refused(tmp_path, scheduler, message):
    with pytest.raises(ConvertError) as caught:
        from_checkpoint(checkpoint_with(scheduler, tmp_path / "tiny"))
    assert message in str(caught.value)


def checkpoint_with(scheduler, folder):
    return dataclasses.replace(open_checkpoint(write_checkpoint(folder, TINY)), scheduler=scheduler)


def test_the_reference_is_short_but_of_the_recipe(tmp_path):
    assert 1 <= probes.MAX_STEPS <= 20
    report = bundle.load(EMBEDDED).manifest.parity["picture"]
    assert (report["sampler"], report["steps"], report["guidance"]) == ("lcm", 4, 1.0)


def test_the_tokenizer_is_written_in_both_forms_with_the_graphs_length(tmp_path):
    """Other tools pad to model_max_length; the checkpoint's may be missing or another."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "tiny", TINY))
    given = checkpoint.tokenizers["tokenizer"]
    for name in ("tokenizer_config.json", "vocab.json", "merges.txt"):
        (given / name).unlink()
    spec = tokenizer.write_tokenizer(checkpoint, tmp_path)
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == spec.max_length == 77
    ids = tokenizer.original_ids(tokenizer.original(given), PROMPT, 77)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the old form alone
        (given / name).unlink(missing_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(tmp_path / "tokenizer" / name, given / name)
    again = tokenizer.original_ids(tokenizer.original(given), PROMPT, 77)
    assert np.array_equal(again, ids)
