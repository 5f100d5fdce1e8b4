"""Files made to harm are refused in one line; random damage is read, or refused likewise."""

import json
import random
import shutil
import struct
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ferrotype.benchmarks.checkpoints import TINY_XL, write_checkpoint
from ferrotype.convert import modules
from ferrotype.convert.checkpoint import CheckpointError, open_checkpoint, summary, tensors
from ferrotype.convert.errors import ConvertError
from ferrotype.convert.recipe import from_checkpoint
from ferrotype.convert.single import open_file
from ferrotype.convert.storage import read
from ferrotype.errors import FerrotypeError
from ferrotype.runtime import models
from ferrotype.tests import hostile
from ferrotype.tests.hostile import MILLION

torch = pytest.importorskip("torch")
CORPUS = hostile.corpus()
MUTATIONS = 300  # of every kind of file


def line(path, call=open_checkpoint):
    with pytest.raises(CheckpointError) as caught:
        call(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1200
    assert path.name in message
    return message


@pytest.mark.parametrize("case", CORPUS, ids=" ".join)
def test_a_hostile_file_is_refused_in_one_line(tmp_path, case):
    file, _ = case
    content, said = CORPUS[case]
    assert said in line(hostile.write(tmp_path / file, content))


@contextmanager
def soundly(seed):
    """What is inside succeeds, or raises an error of ours in one line."""
    try:
        yield
    except FerrotypeError as error:
        if not str(error).isprintable():
            raise AssertionError(f"seed {seed}") from error
    except Exception as error:
        raise AssertionError(f"seed {seed}") from error


# --- mutations ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Small sound files of every kind, as bytes by their names."""
    folder = tmp_path_factory.mktemp("seeds")
    values = {"a": torch.randn(4, 8), "b": torch.randn(4).half(), "c": torch.arange(5)}
    save_file({n: v.numpy() for n, v in values.items()}, folder / "x.safetensors", {"k": "v"})
    for protocol in (2, 4):
        state = {"state_dict": values, "epoch": 3, "rest": [1.5, None, (1, 2)]}
        torch.save(state, folder / f"x{protocol}.ckpt", pickle_protocol=protocol)
    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(values["a"])})
    torch.save({"string_to_param": held, "name": "<cat>"}, folder / "x.pt")
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    rows = hostile.row(b"a", (32, 2), 2), hostile.row(b"b", (2, 2), 1, 64)
    word = hostile.metadata(b"word", 8, hostile.text(b"x"))
    words = hostile.metadata(b"words", 9, struct.pack("<IQQ", 8, 1, 0))
    made["x.gguf"] = hostile.gguf(*rows, entries=[word], data=bytes(96))
    made["y.gguf"] = hostile.gguf(*rows, entries=[word, words], data=bytes(96))
    return made


@pytest.mark.parametrize(
    "name", ["x.safetensors", "x2.ckpt", "x4.ckpt", "x.pt", "x.gguf", "y.gguf"]
)
def test_a_damaged_file_is_read_or_refused(seeds, tmp_path, name):
    start = random.randrange(1 << 30)
    for seed in range(start, start + MUTATIONS):
        path = tmp_path / name
        path.write_bytes(hostile.mutated(random.Random(seed), seeds[name]))
        with soundly(seed):
            for stored in open_file(path).values():
                assert read(stored).shape == stored.shape


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "xl", TINY_XL)


def test_spoiled_configurations_are_read_or_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "xl")
    files = [p for p in folder.rglob("*config.json") if "tokenizer" not in p.parent.name]
    files.append(folder / "model_index.json")
    start = random.randrange(1 << 30)
    for seed in range(start, start + 60):
        rng = random.Random(seed)
        path = rng.choice(files)
        whole = path.read_text()
        path.write_text(json.dumps(hostile.spoiled(rng, json.loads(whole))))
        with soundly(seed):
            made = open_checkpoint(folder)
            summary(made)
            from_checkpoint(made)
            for component, config in made.configs.items():
                if component != "vae":
                    models.weights(component, config)
                getattr(modules, component)(made)
        path.write_text(whole)


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("unet", {"layers_per_block": 10**9}, "layers_per_block is 1000000000; it must be a whole"),
        ("unet", {"layers_per_block": 128}, "2 levels of up to 128 layers and 2 transformers each"),
        ("unet", {"block_out_channels": [16] * 3000}, "it must be a list of 1 to 16"),
        ("unet", {"transformer_layers_per_block": [[[1]]]}, "is [[[1]]]; it must be"),
        ("unet", {"norm_eps": float("nan")}, "norm_eps is nan; it must be a number from 1e-12"),
        ("vae", {"scaling_factor": 0}, "scaling_factor is 0; it must be"),
        ("vae", {"block_out_channels": "wide"}, "block_out_channels is 'wide'"),
        ("text_encoder", {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("text_encoder_2", {"hidden_act": "\n"}, r"makes no network: KeyError: '\n'"),
        ("scheduler", {"beta_start": "small"}, "beta_start is 'small'"),
        ("scheduler", {"_class_name": []}, "_class_name is []"),
    ],
)
def test_a_field_that_cannot_be_meant_is_named(tiny, tmp_path, file, fields, said):
    folder = shutil.copytree(tiny, tmp_path / "xl")
    name = "scheduler_config.json" if file == "scheduler" else "config.json"
    path = folder / file / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ConvertError) as caught:
        getattr(modules, file.replace("scheduler", "unet"))(open_checkpoint(folder))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_of_gigabytes_is_not_read(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "xl")
    hostile.sparse(b"{", 1 << 32)(folder / "unet" / "config.json")
    with pytest.raises(CheckpointError, match="4,294,967,296 bytes, the limit is 8,388,608"):
        open_checkpoint(folder)
    (folder / "unet" / "config.json").write_text("{" + '"a": [' * MILLION)
    with pytest.raises(CheckpointError, match="1,000,001 objects and lists, the limit"):
        open_checkpoint(folder)


def test_numbers_that_are_none_in_the_last_tensor_are_named(tiny, tmp_path):
    path = tmp_path / "xl" / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(tiny, tmp_path / "xl")
    arrays = load_file(path)
    name = sorted(arrays)[-1]
    arrays[name] = np.full_like(arrays[name], np.nan)
    save_file(arrays, path)
    with pytest.raises(CheckpointError, match=f"{name} has {arrays[name].size} NaN or Inf"):
        dict(tensors(open_checkpoint(tmp_path / "xl"), "vae"))
