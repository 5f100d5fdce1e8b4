"""Checkpoints of torch are read as torch reads them, and nothing that they ask for happens."""

import collections
import os
import pickle

import numpy as np
import pytest

from ferrotype.benchmarks.checkpoints import SMALL, write_single
from ferrotype.convert.checkpoint import CheckpointError, open_checkpoint, tensors
from ferrotype.convert.pickles import open_pickle
from ferrotype.convert.storage import read
from ferrotype.tests import hostile
from ferrotype.tests.hostile import DATA, Evil, described

torch = pytest.importorskip("torch")


def saved(value, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(value, path)
    return path


def arrays(path):
    return {name: read(stored) for name, stored in open_pickle(path).items()}


def test_a_ckpt_is_the_same_checkpoint_as_its_safetensors(tmp_path):
    from safetensors.torch import load_file

    given = write_single(tmp_path / "model.safetensors", SMALL["sd1"])
    path = saved({"state_dict": load_file(given), "global_step": 470000}, tmp_path)
    one, other = open_checkpoint(given), open_checkpoint(path)
    assert one.configs == other.configs
    for component in one.configs:
        expected, found = dict(tensors(one, component)), dict(tensors(other, component))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_every_type_is_read(tmp_path, dtype):
    values = (torch.randn(3, 5) * 3).to(dtype)
    expected = values.float().numpy() if dtype.is_floating_point else values.numpy()
    assert np.array_equal(arrays(saved({"w": values}, tmp_path))["w"], expected)


def test_views_share_a_storage_and_keep_their_strides(tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = {
        "base": base, "row": base[1], "turned": base[0].T, "stepped": base[:, ::2, 1:],
        "scalar": base[2, 3, 4], "parameter": torch.nn.Parameter(base[2]),
        "ordered": base.permute(2, 0, 1),
    }  # fmt: skip
    found = arrays(saved(collections.OrderedDict(views), tmp_path))
    assert found.keys() == views.keys()
    assert all(np.array_equal(found[n], v.detach().numpy()) for n, v in views.items())
    cut = open_pickle(tmp_path / "model.ckpt")["turned"].rows(1, 3)
    assert np.array_equal(read(cut), base[0].T[1:3].numpy())


def test_training_state_beside_the_weights_is_passed_over(tmp_path):
    value = {
        "state_dict": {"w": torch.ones(2), "note": "text"},
        "epoch": np.int64(3),
        "loss": np.float32(0.5),
        "shape": torch.Size([1, 2]),
    }
    assert list(open_pickle(saved(value, tmp_path))) == ["w"]


# --- hostile ------------------------------------------------------------------------------------


def zipped(path, pickled, **entries):
    return hostile.write(path, hostile.zipped(pickled, **entries))


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "model.ckpt" in message
    return message


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("deep", [False, True])
def test_calls_of_a_pickle_are_refused_by_name_and_not_made(tmp_path, protocol, deep):
    trace = tmp_path / "trace"
    evil = Evil(os.system, f"touch {trace}")
    value = {"state_dict": [{"w": (1, evil)}]} if deep else evil
    message = refused(zipped(tmp_path / "model.ckpt", pickle.dumps(value, protocol)))
    assert "asks for 'posix.system', which no checkpoint needs; nothing" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    "call",
    [eval, exec, getattr, __import__, open, pickle.loads, os.popen, np.load],
    ids=lambda call: f"{call.__module__}.{call.__name__}",
)
def test_no_other_call_is_made_either(tmp_path, call):
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w')"
    value = Evil(call, *((trace, "w") if call is open else (code,)))
    assert "which no checkpoint needs" in refused(
        zipped(tmp_path / "model.ckpt", pickle.dumps(value))
    )
    assert not trace.exists()


def test_the_description_written_by_hand_is_read(tmp_path):
    path = zipped(tmp_path / "model.ckpt", described(), data_0=DATA)
    assert arrays(path)["w"].tolist() == [0, 1, 2, 3]


def test_a_pickle_cannot_change_where_a_tensor_is_read(tmp_path):
    """BUILD sets an object's attributes: of a description they would lead to another file."""
    secret = tmp_path / "secret"
    secret.write_bytes(DATA[::-1])
    for field, value in (("path", str(secret)), ("offset", 0), ("value", None)):
        state = pickle.dumps({field: value}, 2)[2:-1]
        pickled = described(more=state + b"b")
        path = zipped(tmp_path / "model.ckpt", pickled, data_0=DATA)
        assert arrays(path)["w"].tolist() == [0, 1, 2, 3]
        both = pickle.dumps((None, {field: value}), 2)[2:-1]
        path = zipped(tmp_path / "model.ckpt", described(more=both + b"b"), data_0=DATA)
        assert arrays(path)["w"].tolist() == [0, 1, 2, 3]
