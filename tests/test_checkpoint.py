"""A checkpoint folder is read whole and checked, or refused in one line that says why."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from ferrotype.convert.checkpoint import (
    CheckpointError,
    open_checkpoint,
    read_header,
    source_hash,
    tensors,
)
from ferrotype.tests.hostile import entry, safetensors

torch = pytest.importorskip("torch")

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "vocab_size": 100,
    "eos_token_id": 2,
}
UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
VAE = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
CONFIGS = {"text_encoder": TEXT, "unet": UNET, "vae": VAE}
STEMS = {"text_encoder": "model", "unet": "diffusion_pytorch_model"}
STEMS["vae"] = STEMS["unet"]


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """A complete random checkpoint, as diffusers writes it, with the old `text_model.` names."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    models = {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
        "unet": UNet2DConditionModel(**UNET),
        "vae": AutoencoderKL(**VAE),
    }
    index = {"_class_name": "StableDiffusionPipeline"}
    for name, model in models.items():
        (folder / name).mkdir()
        weights = {key: value.numpy() for key, value in model.state_dict().items()}
        if name == "text_encoder":
            weights = {f"text_model.{k.removeprefix('text_model.')}": w for k, w in weights.items()}
            weights["text_model.embeddings.position_ids"] = np.arange(77)[None]
        save_file(weights, folder / name / f"{STEMS[name]}.safetensors")
        write(folder / name / "config.json", CONFIGS[name])
        index[name] = ["library", type(model).__name__]
    write(folder / "model_index.json", index)
    write(folder / "scheduler" / "scheduler_config.json", {"_class_name": "LCMScheduler"})
    write(folder / "tokenizer" / "vocab.json", {"a": 0})
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def edit(path, **fields):
    write(path, json.loads(path.read_text()) | fields)


def weights_file(folder, name="unet"):
    return folder / name / f"{STEMS[name]}.safetensors"


def load(folder, name="unet"):
    return dict(tensors(open_checkpoint(folder), name))


# --- what it reads ------------------------------------------------------------------------------


def test_a_checkpoint_is_described_before_any_weight_is_read(folder):
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.name, checkpoint.family, checkpoint.license) == ("copy", "sd", "unknown")
    assert checkpoint.configs["unet"] == UNET
    assert checkpoint.weights["unet"] == (weights_file(folder),)
    assert checkpoint.vae_scale == 2


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (192, "sd")])
def test_the_family_is_told_by_the_width_of_the_text_encoder(folder, width, family):
    edit(folder / "unet/config.json", cross_attention_dim=width)
    assert open_checkpoint(folder).family == family


@pytest.mark.parametrize(
    ("card", "found"),
    [("---\nlicense: mit\n---\n# x", "mit"), ("# x\nlicense: mit\n", "unknown")],
)
def test_the_licence_comes_from_the_front_matter_alone(folder, card, found):
    (folder / "README.md").write_text(card)
    assert open_checkpoint(folder).license == found


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_float_is_read_as_float32(folder, dtype):
    save_file({"w": np.array([[0.5, -2]], dtype)}, weights_file(folder))
    (array,) = load(folder).values()
    assert array.dtype == np.float32
    assert array.tolist() == [[0.5, -2]]


def test_bfloat16_is_read_exactly(folder):
    import safetensors.torch

    values = torch.tensor([1.5, -3.0e38, 1e-38]).bfloat16()
    safetensors.torch.save_file({"w": values}, weights_file(folder))
    assert load(folder)["w"].tolist() == values.tolist()


def test_shards_and_the_fp16_variant_hold_the_same_tensors(folder):
    path, whole = weights_file(folder), load(folder)
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert load(folder).keys() == whole.keys()
    path.with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    names = sorted(whole)
    table = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(table.values()):
        save_file({n: whole[n] for n in names if table[n] == part}, path.parent / part)
    write(path.with_name(path.name + ".index.json"), {"weight_map": table})
    assert len(open_checkpoint(folder).weights["unet"]) == 2
    assert {n: w.tolist() for n, w in load(folder).items()} == {
        n: w.tolist() for n, w in whole.items()
    }


def test_the_source_hash_changes_with_any_file_that_is_used(folder):
    before = source_hash(open_checkpoint(folder))
    (folder / "notes.txt").write_text("not used")
    assert source_hash(open_checkpoint(folder)) == before
    for path in ("unet/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"):
        edit(folder / path, more=1)
        after = source_hash(open_checkpoint(folder))
        assert after != before
        before = after
    data = bytearray(weights_file(folder).read_bytes())
    data[-1] ^= 1
    weights_file(folder).write_bytes(data)
    assert source_hash(open_checkpoint(folder)) != before


# --- what it refuses ----------------------------------------------------------------------------


def test_what_is_no_checkpoint_is_told_by_what_it_holds(tmp_path):
    with pytest.raises(CheckpointError, match="is not there; give a folder"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "v1-5.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"no model_index.json \(it holds v1-5.ckpt\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "path", ["unet/config.json", "scheduler/scheduler_config.json", "vae", "tokenizer/vocab.json"]
)
def test_a_missing_part_is_named(folder, path):
    (shutil.rmtree if (folder / path).is_dir() else type(folder).unlink)(folder / path)
    with pytest.raises(CheckpointError, match=path.split("/")[0]):
        open_checkpoint(folder)


def test_pickled_weights_of_a_folder_are_read_and_never_executed(folder):
    path, whole = weights_file(folder), load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no diffusion_pytorch_model\.safetensors"):
        open_checkpoint(folder)
    state = {name: torch.from_numpy(array) for name, array in whole.items()}
    torch.save(state, path.with_suffix(".bin"))
    assert {n: w.tolist() for n, w in load(folder).items()} == {
        n: w.tolist() for n, w in whole.items()
    }
    torch.save(state, path.with_suffix(".bin"), _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"saved by torch before 1\.6"):
        load(folder)


def test_weights_are_floats(folder):
    save_file({"w": np.ones((2, 2), np.int64)}, weights_file(folder))
    with pytest.raises(CheckpointError, match="w is I64; weights are floats"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "StableDiffusion3P"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline"},
            "text_encoder_2 is None; only CLIPTextModelWithProjection",
        ),
        ("model_index.json", {"_class_name": None}, "None is not supported"),
        ("model_index.json", {"unet": ["diffusers", "SD3Transformer2DModel"]}, "SD3Transformer"),
        ("model_index.json", {"vae": 3}, "vae is 3"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "SDXL has 'text_time' and no"),
        ("vae/config.json", {"latents_std": [1.0]}, "vae: latents_std is .1.0.; only None"),
        ("unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds is 1000"),
        ("unet/config.json", {"in_channels": 9}, "9 input channels .9 is inpainting"),
        ("unet/config.json", {"down_block_types": ["KDownBlock2D"]}, "KDownBlock2D"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder, file, fields, said):
    edit(folder / file, **fields)
    with pytest.raises(CheckpointError, match=said) as refusal:
        open_checkpoint(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", "\xff", "[" * 100_000], ids=["cut", "list", "x", "deep"]
)
def test_json_that_is_no_object_is_refused(folder, text):
    (folder / "unet/config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config.json (is not JSON|holds a list)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "absent", 3])
def test_an_index_lists_only_files_beside_it(folder, name):
    path = weights_file(folder)
    path.unlink()
    write(path.with_name(path.name + ".index.json"), {"weight_map": {"w": name}})
    with pytest.raises(CheckpointError, match="which is not a file beside it"):
        open_checkpoint(folder)


def test_the_hostile_header_without_the_fault_is_accepted(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(
        safetensors({"a": entry(), "b": entry(8, 12, (2,), "F16"), "__metadata__": {}}, b"." * 12)
    )
    assert read_header(path)[0].keys() == {"a", "b"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_a_number_is_named(folder, value):
    save_file({"fine": np.ones(3), "broken": np.array([1, value, 3])}, weights_file(folder))
    with pytest.raises(CheckpointError, match="broken has 1 NaN or Inf of 3"):
        load(folder)


# --- the modules made from it -------------------------------------------------------------------


def test_the_modules_have_the_checkpoints_weights(folder):
    from ferrotype.convert import modules

    checkpoint = open_checkpoint(folder)
    for make in (modules.text_encoder, modules.unet, modules.vae):
        module = make(checkpoint)
        files = dict(tensors(checkpoint, make.__name__))
        state = {k.removeprefix("text_model."): v for k, v in module.state_dict().items()}
        found = {k.removeprefix("text_model."): v for k, v in files.items()}
        found.pop("embeddings.position_ids", None)
        assert state.keys() == found.keys()
        assert all(np.array_equal(state[k], found[k]) for k in state)
        assert not any(p.requires_grad or p.is_meta for p in module.parameters())
        assert not any(b.is_meta for b in module.buffers())
        assert not module.training


def test_the_autoencoders_of_old_checkpoints_are_renamed(folder):
    from ferrotype.convert import modules

    expected = modules.vae(open_checkpoint(folder)).state_dict()
    path, old = weights_file(folder, "vae"), {}
    for name, array in load(folder, "vae").items():
        new = name
        for layer, was in (("q", "query"), ("k", "key"), ("v", "value"), ("out.0", "proj_attn")):
            new = new.replace(f".to_{layer}.", f".{was}.")
        old[new] = array[:, :, None, None] if new != name and array.ndim == 2 else array
    assert old.keys() != expected.keys()
    save_file(old, path)
    state = modules.vae(open_checkpoint(folder)).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("conv_in.bias"), r"1 missing weights \(conv_in.bias\)"),
        (lambda w: w.update(extra=np.ones(1)), r"1 unexpected weights \(extra\)"),
        (lambda w: w.update({"conv_in.bias": np.ones(9)}), r"conv_in.bias is \(9,\), .* \(8,\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_of_another_model_are_refused_by_name(folder, change, said):
    from ferrotype.convert import modules

    weights = load(folder)
    change(weights)
    save_file(weights, weights_file(folder))
    with pytest.raises(CheckpointError, match=said):
        modules.unet(open_checkpoint(folder))


def test_the_census_finds_the_layer_that_overflows(folder):
    from ferrotype.convert import modules

    net = modules.unet(open_checkpoint(folder))
    inputs = torch.ones(1, 4, 8, 8), torch.tensor(1.0), torch.ones(1, 3, 16)
    with modules.census(net) as fine:
        net(*inputs)
    assert {(nans, infs) for _, nans, infs in fine.values()} == {(0, 0)}
    net.conv_out.bias[1] = torch.inf
    net.conv_out.bias[2] = torch.nan
    with modules.census(net) as broken:
        net(*inputs)
    assert broken["conv_out"][1:] == (64, 64)
    assert 0 < broken["conv_out"][0] < 100
    assert not any(m._forward_hooks for m in net.modules())
