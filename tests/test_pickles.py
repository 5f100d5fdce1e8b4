"""Checkpoints of torch are read as torch reads them, and nothing that they ask for happens."""

import collections
import os
import pickle
import zipfile

import numpy as np
import pytest

from ferrotype.benchmarks.checkpoints import SMALL, write_single
from ferrotype.convert.checkpoint import CheckpointError, open_checkpoint, tensors
from ferrotype.convert.pickles import open_pickle
from ferrotype.convert.storage import read

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


class Evil:
    """Unpickled by a loader that executes, it makes a file."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def zipped(path, pickled, **entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in entries.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", data)
    return path


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


def described(storage=(b"FloatStorage", 4), offset=0, shape=(4,), strides=(1,), key=b"0", more=b""):
    """A pickle of {"w": tensor}, opcode by opcode; `more` runs while the tensor is on the stack."""

    def number(value):
        return pickle.dumps(value, 2)[2:-1]

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    kind, count = storage
    pid = b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\n" + b"X\x01\x00\x00\x00" + key
    pid += b"X\x03\x00\x00\x00cpu" + number(count) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + number(offset)
    call += numbers(shape) + numbers(strides) + b"\x89" + b"ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}(X\x01\x00\x00\x00w" + call + more + b"u."


DATA = np.arange(4, dtype="<f4").tobytes()


def test_the_description_written_by_hand_is_read(tmp_path):
    path = zipped(tmp_path / "model.ckpt", described(), data_0=DATA)
    assert arrays(path)["w"].tolist() == [0, 1, 2, 3]


OUTSIDE = {
    "behind the storage": (described(shape=(5,)), "a tensor of 5 values in 4"),
    "offset": (described(offset=1), "a tensor from 1 to 5 of 4 values"),
    "stride": (described(shape=(2, 2), strides=(3, 1)), "a tensor from 0 to 5 of 4 values"),
    "repeated without end": (described(shape=(1 << 40,), strides=(0,)), "values in 4"),
    "negative offset": (described(offset=-1), "no whole numbers"),
    "negative stride": (described(strides=(-1,)), "no whole numbers"),
    "negative shape": (described(shape=(-4,)), "no whole numbers"),
    "huge": (described(shape=(1 << 62, 1 << 62), strides=(1, 1)), "values in 4"),
    "ranks differ": (described(shape=(2, 2)), "without strides"),
    "empty": (described(shape=(0,)), "a tensor is empty"),
    "too many dimensions": (described(shape=(1,) * 99, strides=(1,) * 99), "no whole numbers"),
    "larger than its entry": (
        described(storage=(b"FloatStorage", 5)), "a storage of 5 F32 in 16 bytes",
    ),
    "negative size": (described(storage=(b"FloatStorage", -1)), "a storage of -1 F32"),
    "missing": (described(key=b"1"), "the storage 1 is missing"),
    "unknown type": (described(storage=(b"ComplexFloatStorage", 4)), "asks for 'torch.Complex"),
    "cut short": (described()[:-4], "the pickle is damaged"),
    "no opcodes": (b"\xff\xfe", "the pickle is damaged"),
    "nothing": (b"", "the pickle is damaged"),
    "a memo of gigabytes": (b"\x80\x02Nr\xff\xff\xff\x7f.", "holds no dict of tensors"),
    "text of exabytes": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f", "the pickle is damaged"),
    "bytes of exabytes": (b"\x80\x05\x96" + b"\xff" * 6 + b"\x00\x00", "the pickle is damaged"),
    "deep": (b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".", "holds no dict of tensors"),
    "a list": (b"\x80\x02].", "holds no dict of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("pickled, said", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_a_tensor_outside_its_storage_and_other_damage_is_refused(tmp_path, pickled, said):
    message = refused(zipped(tmp_path / "model.ckpt", pickled, data_0=DATA))
    assert said in message


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


def test_archives_that_are_no_checkpoint_are_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "a zip archive without data.pkl (it holds readme.txt)" in refused(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    assert "is compressed" in refused(path)
    zipped(path, bytes(5 << 20))
    assert "an entry of 5,242,880 bytes, the limit is 2,097,152" in refused(path)
    zipped(path, described(), data_0=DATA, byteorder="big")
    assert "the byte order is b'big'" in refused(path)
    whole = zipped(path, described(), data_0=DATA).read_bytes()
    path.write_bytes(whole[:100])
    assert "not a checkpoint of torch" in refused(path)
    moved = whole.replace(b"PK\x03\x04", b"PK\x09\x09").replace(b"PK\x09\x09", b"PK\x03\x04", 1)
    path.write_bytes(moved)
    assert "is not where the directory says" in refused(path)
    path.write_bytes(whole[:4] + b"\0" * 200)
    assert "not a checkpoint of torch" in refused(path)
