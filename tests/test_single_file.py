"""A checkpoint in one file is recognised by its tensors, and has those of the folder."""

import dataclasses
import json
import struct

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from ferrotype import kernels
from ferrotype.benchmarks.checkpoints import (
    SD15,
    SDXL,
    SMALL,
    TOKENIZER,
    _on_meta,
    _single_rows,
    write_checkpoint,
    write_single,
)
from ferrotype.bundle import TEXT_ENCODERS
from ferrotype.cli import main
from ferrotype.convert import convert, modules, native, tokenizer, wrappers
from ferrotype.convert.checkpoint import (
    CheckpointError,
    OptionError,
    Tensors,
    open_checkpoint,
    source_hash,
    summary,
    tensors,
)
from ferrotype.runtime import models

torch = pytest.importorskip("torch")
SEEN = {  # what no file tells: written as published, not as these small ones are
    "unet": {"sample_size"},
    "vae": {"sample_size"},
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Every small family as a folder and as a file, with the same values."""
    root = tmp_path_factory.mktemp("families")
    for family, configs in SMALL.items():
        write_checkpoint(root / family, configs)
        write_single(root / f"{family}.safetensors", configs)
    return root


@pytest.fixture
def sd1(files):
    """The tensors of a small Stable Diffusion 1 by original name, to change."""
    return load_file(files / "sd1.safetensors")


@pytest.fixture
def sdxl(files):
    return load_file(files / "sdxl.safetensors")


def reopened(tensors, tmp_path, **options):
    path = tmp_path / "changed.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
    return open_checkpoint(path, **options)


def refusal(tensors, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        reopened(tensors, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "changed.safetensors" in message
    return message


# --- the same as the folder ---------------------------------------------------------------------


@pytest.mark.parametrize("family", SMALL)
def test_a_file_has_the_tensors_and_the_configs_of_the_folder(files, family):
    folder, single = (open_checkpoint(files / name) for name in (family, f"{family}.safetensors"))
    assert single.family == folder.family
    assert single.configs.keys() == folder.configs.keys()
    for component in folder.configs:
        expected, found = (dict(tensors(c, component)) for c in (folder, single))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        for field, value in SMALL[family][component].items():
            if field not in SEEN.get(component, ()) and "layers_per_block" not in field:
                assert single.configs[component][field] == value, (component, field)


@pytest.mark.parametrize("family", SMALL)
def test_diffusers_builds_the_same_networks_from_the_configs(files, family):
    single = open_checkpoint(files / f"{family}.safetensors")
    for component, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        module = _on_meta(kind, single.configs[component])
        lazy = Tensors(single, component)
        expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
        assert {name: lazy.shape(name) for name in lazy} == expected


def sparse(path, configs):
    """A file of full size whose header is complete and whose data was never written."""
    header, position = {}, 0
    for _, name, shape, *_ in _single_rows(configs):
        if name not in header:
            end = position + 2 * int(np.prod(shape))
            header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, end]}
            position = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)


@pytest.mark.parametrize(
    ("configs", "family", "scheduler"),
    [(SD15, "sd1", "DPMSolverMultistepScheduler"), (SDXL, "sdxl", "EulerDiscreteScheduler")],
    ids=["sd15", "sdxl"],
)
def test_full_size_is_recognised_without_reading_a_weight(tmp_path, configs, family, scheduler):
    sparse(tmp_path / "full.safetensors", configs)
    made = open_checkpoint(tmp_path / "full.safetensors")
    assert (made.name, made.family, made.license) == ("full", family, "unknown")
    for component, config in made.configs.items():
        for field, value in configs[component].items():
            if field in ("eos_token_id", "force_upcast") or (component, field) == (
                "text_encoder", "projection_dim",
            ):  # fmt: skip
                continue
            found = config[field]
            if isinstance(found, list) and not isinstance(value, list):
                found = found[0]
            assert found == value, (component, field)
    assert made.scheduler["_class_name"] == scheduler
    assert (tmp_path / "full.safetensors").stat().st_blocks < 20_000  # of 512 bytes


def test_the_defaults_are_the_familys(files):
    for family, scaling, side in (("sd1", 0.18215, 64), ("sdxl", 0.13025, 128)):
        made = open_checkpoint(files / f"{family}.safetensors")
        assert made.configs["vae"]["scaling_factor"] == scaling
        assert made.configs["unet"]["sample_size"] == side
        assert made.scheduler["prediction_type"] == "epsilon"
        assert made.scheduler["steps_offset"] == 1
    lcm = open_checkpoint(files / "lcm.safetensors")
    assert lcm.scheduler["_class_name"] == "LCMScheduler"
    assert lcm.model_index["_class_name"] == "LatentConsistencyModelPipeline"


# --- what files of the kind have beside it ------------------------------------------------------


def test_what_nobody_reads_is_left_out(sd1, tmp_path):
    expected = set(Tensors(reopened(sd1, tmp_path), "unet"))
    extra = {
        "model_ema.decay": np.ones(1, np.float32),
        "model_ema.diffusion_modelinput_blocks00weight": np.ones((2, 2), np.float16),
        "alphas_cumprod": np.ones(1000, np.float32),
        "first_stage_model.loss.logvar": np.ones(1, np.float32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77)[None],
        "cond_stage_model.logit_scale": np.ones(1, np.float32),
    }
    made = reopened(sd1 | extra, tmp_path)
    assert set(Tensors(made, "unet")) == expected
    assert any("model_ema" in note for note in made.notes)


def test_text_encoders_without_the_usual_prefix_are_the_same(sd1, tmp_path):
    """Some files of Stable Diffusion 1 call them embeddings.* instead of text_model.embeddings.*"""
    expected = set(Tensors(reopened(sd1, tmp_path), "text_encoder"))
    bare = {name.replace("transformer.text_model.", "transformer."): a for name, a in sd1.items()}
    assert bare.keys() != sd1.keys()
    assert set(Tensors(reopened(bare, tmp_path), "text_encoder")) == expected


def test_the_second_encoder_may_have_the_names_of_stable_diffusion_cpp(files, sdxl, tmp_path):
    """It calls both encoders' tensors as transformers does, and leaves the projection turned."""
    old, new = "conditioner.embedders.1.model.", "cond_stage_model.1.transformer."
    expected = dict(tensors(open_checkpoint(files / "sdxl"), "text_encoder_2"))
    given = {f"{new}{n}": a for n, a in expected.items() if n != "text_projection.weight"}
    given[f"{new}text_model.text_projection"] = expected["text_projection.weight"].T
    for name, array in sdxl.items():
        if not name.startswith(old):
            first = name.replace("conditioner.embedders.0.", "cond_stage_model.")
            given[first] = array
    made = reopened(given, tmp_path)
    found = dict(tensors(made, "text_encoder_2"))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[n], expected[n]) for n in expected)
    assert made.configs["text_encoder_2"]["projection_dim"] == 96


def test_stable_diffusion_2_reads_the_states_before_open_clips_last_layer(files, tmp_path):
    given = load_file(files / "sd2.safetensors")
    prefix = "cond_stage_model.model.transformer.resblocks."
    layer = {n.removeprefix(f"{prefix}1."): a for n, a in given.items() if prefix + "1." in n}
    for i in range(2, 24):
        given |= {f"{prefix}{i}.{name}": array for name, array in layer.items()}
    given["cond_stage_model.model.text_projection"] = np.ones((64, 64), np.float16)
    made = reopened(given, tmp_path)
    assert made.configs["text_encoder"]["num_hidden_layers"] == 23
    assert made.configs["text_encoder"]["hidden_act"] == "gelu"
    assert not [n for n in Tensors(made, "text_encoder") if ".layers.23." in n or "projection" in n]


def test_what_the_unet_predicts_can_be_told(files, sdxl, tmp_path, monkeypatch):
    from ferrotype.convert import single

    path = files / "sd2.safetensors"
    assert open_checkpoint(path).scheduler["prediction_type"] == "epsilon"
    told = open_checkpoint(path, prediction="v_prediction")
    assert told.scheduler["prediction_type"] == "v_prediction"
    assert told.configs["unet"]["sample_size"] == 96
    folder = open_checkpoint(files / "sd2", prediction="epsilon")
    assert folder.scheduler["prediction_type"] == "epsilon"
    with pytest.raises(OptionError, match="prediction 'x0' is not one of epsilon, v_prediction"):
        open_checkpoint(path, prediction="x0")
    monkeypatch.setattr(single, "FAMILY_OF", {64: "sd2"})  # of full width, nothing else tells
    assumed = open_checkpoint(path)
    assert assumed.scheduler["prediction_type"] == "v_prediction"
    assert "--prediction epsilon" in assumed.notes[0]
    assert not open_checkpoint(path, prediction="epsilon").notes


def test_marks_of_v_prediction_and_zero_snr_are_read(sdxl, tmp_path):
    marks = {name: np.zeros(1, np.float32) for name in ("v_pred", "ztsnr")}
    scheduler = reopened(sdxl | marks, tmp_path).scheduler
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    assert scheduler["timestep_spacing"] == "trailing"


def test_the_source_hash_is_of_the_content(sd1, tmp_path):
    before = source_hash(reopened(sd1, tmp_path))
    assert source_hash(reopened(sd1, tmp_path)) == before
    sd1["model.diffusion_model.out.2.bias"] += np.float16(1)
    assert source_hash(reopened(sd1, tmp_path)) != before


def test_a_listing_says_what_was_seen(files):
    seen = summary(open_checkpoint(files / "ssd-1b.safetensors"))
    assert (seen["family"], seen["pipeline"]) == ("sdxl", "StableDiffusionXLPipeline")
    unet = seen["components"]["unet"]
    assert unet["types"] == ["F16"]
    assert unet["bytes"] == 2 * unet["parameters"]
    assert "middle UNetMidBlock2D" in unet["shape"]


# --- what it refuses ----------------------------------------------------------------------------


UNET = "model.diffusion_model."


def test_known_kinds_that_are_not_supported_are_named(sd1, sdxl, tmp_path):
    first = f"{UNET}input_blocks.0.0.weight"
    for channels, said in ((9, "an inpainting model"), (8, "edits by instruction"), (5, "depth")):
        wide = np.zeros((32, channels, 3, 3), np.float16)
        assert said in refusal(sd1 | {first: wide}, tmp_path)
    refiner = {
        n.replace("conditioner.embedders.1.", "conditioner.embedders.0."): a
        for n, a in sdxl.items()
        if "embedders.0." not in n
    }
    assert "SDXL's refiner" in refusal(refiner, tmp_path)
    some = np.ones((2, 2), np.float16)
    for name, said in (
        ("lora_unet_mid_block.lora_down.weight", "a LoRA"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        (f"{UNET}joint_blocks.0.x_block.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.weight", "FLUX"),
        ("edm_mean", "Playground 2.5"),
    ):
        assert said in refusal({name: some}, tmp_path)


def test_what_it_cannot_tell_it_lists(tmp_path):
    some = np.ones((2, 2), np.float16)
    message = refusal({"gpt.h.0.attn": some, "gpt.h.1.attn": some, "head.w": some}, tmp_path)
    assert "of 3 tensors it saw gpt.h.* (2), head.w.* (1)" in message
    assert "has no unet" in message


def test_two_families_in_one_file_are_refused(sd1, sdxl, tmp_path):
    def of(tensors, *prefixes):
        return {n: a for n, a in tensors.items() if n.startswith(prefixes)}

    text, texts = of(sd1, "cond_stage_model."), of(sdxl, "conditioner.")
    assert "is in it twice" in refusal(sdxl | text, tmp_path)
    vae = of(sd1, "first_stage_model.")
    assert "gives" not in refusal(of(sdxl, UNET) | text | vae, tmp_path)
    assert "two models are mixed" in refusal(of(sdxl, UNET) | text | vae, tmp_path)
    assert "two models are mixed" in refusal(of(sd1, UNET) | texts | vae, tmp_path)


def test_missing_and_extra_and_misshapen_tensors_are_named(sd1, tmp_path):
    name = f"{UNET}middle_block.0.in_layers.2.weight"
    less = {n: a for n, a in sd1.items() if n != name}
    assert "mid_block.resnets.0.conv1.weight" in refusal(less, tmp_path)
    more = sd1 | {f"{UNET}middle_block.0.in_layers.9.weight": sd1[name]}
    assert "middle_block.0.in_layers.9.weight" in refusal(more, tmp_path)
    outside = sd1 | {"something.else": sd1[name]}
    assert "something.else" in refusal(outside, tmp_path)
    other = sd1 | {name: sd1[name][:, :-1]}
    assert "mid_block.resnets.0.conv1.weight (64, 63, 3, 3)" in refusal(other, tmp_path)
    gap = {n.replace("resblocks", "x"): a for n, a in sd1.items() if "output_blocks.2." not in n}
    assert "output_blocks.2 is missing" in refusal(gap, tmp_path)
    whole = sd1 | {name: np.ones(sd1[name].shape, np.int32)}
    assert "I32; weights must be floats" in refusal(whole, tmp_path)
    flat = sd1 | {f"{UNET}input_blocks.0.0.weight": np.ones(3, np.float16)}
    assert "should have 4 dimensions" in refusal(flat, tmp_path)


def test_nan_is_named_when_the_tensor_is_read(sd1, tmp_path):
    name = f"{UNET}out.2.bias"
    sd1[name] = np.array([1, np.nan, 2, 3], np.float16)
    made = reopened(sd1, tmp_path)
    with pytest.raises(CheckpointError, match=r"conv_out\.bias has 1 NaN or Inf of 4"):
        dict(tensors(made, "unet"))


def test_names_are_short_and_can_be_printed(tmp_path):
    assert "a name of 99,999 characters" in refusal({"." * 99_999: np.ones(1)}, tmp_path)
    assert "cannot be printed" in refusal({"two\nlines\x1b[2J": np.ones(1)}, tmp_path)


# --- on the command line ------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_inspect_says_what_a_checkpoint_is(files, tmp_path):
    for path in (files / "lcm.safetensors", files / "lcm"):
        result = run("inspect", path)
        assert result.exit_code == 0, result.output
        assert "LCMScheduler" in result.output
        assert "guidance 16" in result.output
        seen = json.loads(run("inspect", path, "--json").output)
        assert seen["family"] == "sd"
        assert seen["components"].keys() == {"text_encoder", "unet", "vae"}
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    result = run("inspect", tmp_path / "model.gguf")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "not a valid GGUF header" in result.stderr


def test_convert_refuses_a_checkpoint_in_one_line_and_writes_nothing(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"\x80\x02N.")
    result = run("convert", path, "-o", tmp_path / "out.ferro")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "nothing of it was executed" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model.ckpt"]
    result = run("convert", path, "--prediction", "x0")
    assert result.exit_code == 2


# --- tokenizers ---------------------------------------------------------------------------------

IDS = {  # by OpenAI's own tokenizer
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "An old fisherman's boat, sunset, 35 mm!!": [
        550, 896, 25055, 568, 4440, 267, 3424, 267, 274, 276, 2848, 748,
    ],
    "naïve café 日本語 😀 don't we'll I'd": [
        1097, 35689, 563, 15304, 39121, 44353, 34002, 508, 7334, 847, 713, 649, 1342, 328, 1896,
    ],
    "3d render, 8k, (masterpiece:1.2)": [
        274, 323, 13024, 267, 279, 330, 267, 263, 12066, 281, 272, 269, 273, 264,
    ],
}  # fmt: skip


def test_the_vocabulary_that_comes_with_the_package_is_clips(tmp_path):
    sparse(tmp_path / "full.safetensors", SDXL)
    made = open_checkpoint(tmp_path / "full.safetensors")
    for encoder, pad in (("text_encoder", "<|endoftext|>"), ("text_encoder_2", "!")):
        spec = tokenizer.write_tokenizer(made, tmp_path, encoder)
        assert (spec.pad_token, spec.max_length) == (pad, 77)
        written = tokenizer.original(tmp_path / TEXT_ENCODERS[encoder])
        # transformers makes a token of its own of what pads, also within "!!"
        for prompt, ids in {p: ids for p, ids in IDS.items() if pad not in p}.items():
            (found,) = tokenizer.original_ids(written, prompt, 77)
            assert found[: len(ids) + 2].tolist() == [49406, *ids, 49407]
            assert set(found[len(ids) + 2 :].tolist()) == {0 if pad == "!" else 49407}


def test_another_tokenizer_can_be_given_and_must_fit(files):
    path = files / "sdxl.safetensors"
    with pytest.raises(Exception, match="49,408 tokens, text_encoder knows 2,048: give its own"):
        tokenizer.of(open_checkpoint(path), "tokenizer")
    given = open_checkpoint(path, tokenizer=TOKENIZER)
    assert tokenizer.of(given, "tokenizer").pad_token == "<|endoftext|>"
    assert tokenizer.of(given, "tokenizer_2").pad_token == "!"
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor vocab\.json"):
        open_checkpoint(path, tokenizer=files)


# --- other autoencoders -------------------------------------------------------------------------


def test_an_autoencoder_of_its_own_replaces_the_checkpoints(files, sd1, sdxl, tmp_path):
    cut = {n.removeprefix("first_stage_model."): a for n, a in sdxl.items() if "first_" in n}
    paths = {"bare": tmp_path / "bare.safetensors", "whole": files / "sdxl.safetensors"}
    save_file(cut, paths["bare"])
    paths["diffusers"] = files / "sdxl" / "vae" / "diffusion_pytorch_model.safetensors"
    expected = dict(tensors(open_checkpoint(files / "sdxl"), "vae"))
    for base in (files / "sd1.safetensors", files / "sd1"):
        for path in paths.values():
            made = open_checkpoint(base, vae=[path])
            found = dict(tensors(made, "vae"))
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[n], expected[n]) for n in expected)
            assert made.configs["vae"]["scaling_factor"] == 0.18215  # the latents are the base's
            assert source_hash(made) != source_hash(open_checkpoint(base))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    given = {}
    for name, array in load_file(paths["diffusers"]).items():
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        given[name] = array
    save_file(given, paths["bare"])
    renamed = dict(tensors(open_checkpoint(files / "sd1", vae=[paths["bare"]]), "vae"))
    assert renamed.keys() == expected.keys()
    half = {n: a for n, a in cut.items() if not n.startswith("decoder.")}
    save_file(half, paths["bare"])
    with pytest.raises(CheckpointError, match="no autoencoder, or half of one"):
        open_checkpoint(files / "sd1", vae=[paths["bare"]])


def taesd(tmp_path):
    """A small random TAESD in diffusers' file, and as the original's two."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(1)
    widths = [16] * 4
    module = AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        num_encoder_blocks=[1, 2, 2, 2], num_decoder_blocks=[2, 2, 2, 1],
    ).eval()  # fmt: skip
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    together = tmp_path / "taesd.safetensors"
    save_file(state, together)
    halves = []
    for half, ahead in (("encoder", 0), ("decoder", 1)):
        old = {}
        for name, array in state.items():
            side, _, number, rest = name.split(".", 3)
            if side == half:
                old[f"{int(number) + ahead}.{rest}"] = array
        halves.append(tmp_path / f"taesd_{half}.safetensors")
        save_file(old, halves[-1])
    return module, together, halves


def test_taesd_in_one_file_or_two_is_the_same_autoencoder(files, tmp_path):
    module, together, halves = taesd(tmp_path)
    for paths in ([together], halves, halves[::-1]):
        made = open_checkpoint(files / "sd1.safetensors", vae=paths)
        config = made.configs["vae"]
        assert (config["_class_name"], made.vae_scale) == ("AutoencoderTiny", 8)
        for field in ("num_encoder_blocks", "num_decoder_blocks", "encoder_block_out_channels"):
            assert config[field] == list(module.config[field])
        found, expected = dict(tensors(made, "vae")), module.state_dict()
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[n], expected[n].numpy()) for n in expected)
    with pytest.raises(CheckpointError, match="TAESD without its encoder: give both files"):
        open_checkpoint(files / "sd1.safetensors", vae=halves[1:])
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.0\.\w+ was in .* already"):
        open_checkpoint(files / "sd1.safetensors", vae=[halves[0], together])


# --- converted ----------------------------------------------------------------------------------


def packed(checkpoint, folder):
    """The native weights of every component, by its name."""
    found = {}
    for component in models.COMPONENTS:
        config = checkpoint.configs.get("vae" if component.startswith("vae") else component)
        if config is not None:
            requests = models.weights(component, config)
            native.write(checkpoint, component, requests, folder / component, "fp16")
            found[component] = (folder / component / "weights.bin").read_bytes()
    return found


@pytest.mark.parametrize("family", SMALL)
def test_both_are_packed_to_the_same_bytes(files, tmp_path, family):
    single = packed(open_checkpoint(files / f"{family}.safetensors"), tmp_path / "single")
    assert single == packed(open_checkpoint(files / family), tmp_path / "folder")
    assert len(single) == (5 if "text_encoder_2" in SMALL[family] else 4)


@pytest.mark.parametrize("family", ["ssd-1b", "bk-sdm", "lcm"])
def test_what_is_exported_of_a_unet_with_fewer_blocks_is_diffusers(files, family):
    module = modules.unet(open_checkpoint(files / f"{family}.safetensors"))
    shapes = models.sizes("unet", module.config, (8, 8), 5)
    inputs = {name: torch.rand(shape) for name, shape in shapes.items()}
    with torch.no_grad():
        found = wrappers.wrap("unet", module, attention="plain")(**inputs)
        extra = {n: inputs.pop(n) for n in ("text_embeds", "time_ids") if n in inputs}
        expected = module(**inputs, added_cond_kwargs=extra).sample
    assert torch.allclose(found, expected, atol=1e-5)


def test_what_is_exported_of_taesd_is_diffusers(files, tmp_path):
    tiny, together, _ = taesd(tmp_path)
    module = modules.vae(open_checkpoint(files / "sd1", vae=[together]))
    image, latents = torch.rand(1, 3, 32, 16) * 2 - 1, torch.randn(1, 4, 3, 5)
    with torch.no_grad():
        decoded = wrappers.wrap("vae_decoder", module)(latents)
        mean, variance = wrappers.wrap("vae_encoder", module)(image).chunk(2, dim=1)
        assert torch.allclose(decoded, tiny.decode(latents).sample, atol=1e-5)
        assert torch.allclose(mean, tiny.encode(image).latents, atol=1e-5)
    assert set(variance.flatten().tolist()) == {-30.0}  # nothing is drawn around it


@pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")
def test_a_file_with_taesd_becomes_a_bundle(files, tmp_path):
    _, together, _ = taesd(tmp_path)
    opened = open_checkpoint(files / "sd1.safetensors", tokenizer=TOKENIZER, vae=[together])
    opened = dataclasses.replace(opened, notes=("something was assumed",))
    made = convert(opened, tmp_path / "out.ferro", target="native", sizes=[(64, 64)])
    assert made.component("vae_decoder").config["_class_name"] == "AutoencoderTiny"
    assert (made.manifest.model, made.manifest.source.name) == ("sd1", "sd1.safetensors")
    assert "something was assumed" in made.manifest.parity["notes"]
    assert made.manifest.parity["picture"]["psnr"] >= 32
    index = json.loads((made.folder / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderTiny"]
    found = packed(opened, tmp_path / "packed")["vae_encoder"]
    assert len(found) == (made.folder / "vae_encoder" / "weights.bin").stat().st_size
