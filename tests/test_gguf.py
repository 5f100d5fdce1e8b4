"""GGUF files of stable-diffusion.cpp: every type against the gguf package, damage against bytes."""

import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

from ferrotype.benchmarks.checkpoints import SMALL, write_single
from ferrotype.convert.checkpoint import CheckpointError, open_checkpoint, read_finite, tensors
from ferrotype.convert.gguf import KINDS, TYPES, open_gguf
from ferrotype.convert.storage import block, read

gguf = pytest.importorskip("gguf")
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_QUANTS = {  # which the gguf package cannot write -> bytes of their fp16 factors in a block
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
PLAIN = {
    "F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8, "I16": np.int16,
    "I32": np.int32, "I64": np.int64,
}  # fmt: skip


def written(path, arrays, kinds=None, alignment=None):
    """A file by the gguf package; `kinds` are those that are quantized, by name."""
    writer = gguf.GGUFWriter(path, "sd")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_array("some.words", ["a", "b"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_bool("some.bool", True)
    for name, array in arrays.items():
        kind = (kinds or {}).get(name)
        if kind:
            kind = gguf.GGMLQuantizationType[kind]
            array = gguf.quants.quantize(array.astype(np.float32), kind)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [*QUANTIZED, "BF16"])
def test_quantized_types_are_expanded_as_ggml_does(tmp_path, kind):
    values = np.random.default_rng().normal(size=(6, 4, 64)).astype(np.float32)
    values[0, 0, :32] = 0  # a block without a scale
    path = written(tmp_path / "x.gguf", {"w": values}, {"w": kind})
    ggml = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(values, ggml), ggml)
    stored = open_gguf(path)["w"]
    assert (stored.dtype, stored.shape) == (kind, values.shape)
    found = read(stored)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - values).max() < 0.6
    np.testing.assert_array_equal(read(stored.rows(2, 5)), found[2:5])
    matrix = open_gguf(written(tmp_path / "m.gguf", {"w": values[:, 0]}, {"w": kind}))["w"]
    np.testing.assert_array_equal(read(matrix.transposed()), found[:, 0].T)


def random_blocks(kind, *shape):
    """Blocks of arbitrary bits whose factors are finite: (*shape, bytes of a row)."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng()
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // values, size), np.uint8)
    for place in K_QUANTS[kind]:
        factors = rng.normal(size=blocks.shape[:-1]).astype("<f2")
        blocks[..., place : place + 2] = factors[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_are_expanded_as_ggml_does_to_the_bit(tmp_path, kind):
    rows = random_blocks(kind, 6, 512)
    ggml = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "sd")
    writer.add_tensor("w", rows, raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = open_gguf(tmp_path / "x.gguf")["w"]
    assert (stored.dtype, stored.shape) == (kind, (6, 512))
    expected = gguf.quants.dequantize(rows, ggml)
    np.testing.assert_array_equal(read(stored), expected)
    np.testing.assert_array_equal(read(stored.rows(2, 5)), expected[2:5])
    np.testing.assert_array_equal(read(stored.transposed()), expected.T)


def test_q8_k_is_a_factor_and_whole_numbers(tmp_path):
    """ggml's own intermediate: a float32, 256 int8, and sums that nobody needs."""
    rng = np.random.default_rng()
    factors = rng.normal(size=(3, 2, 1)).astype("<f4")
    numbers = rng.integers(-128, 128, (3, 2, 256), np.int8)
    sums = np.full((3, 2, 32), 255, np.uint8)
    blocks = np.concatenate([factors.view(np.uint8), numbers.view(np.uint8), sums], axis=2)
    path = tmp_path / "x.gguf"
    path.write_bytes(file(row(shape=(512, 3), kind=15), data=blocks.tobytes()))
    np.testing.assert_array_equal(read(open_gguf(path)["w"]), (factors * numbers).reshape(3, 512))


@pytest.mark.parametrize("kind", [*QUANTIZED, *K_QUANTS, "Q8_K", "F64"])
def test_factors_that_are_no_numbers_are_told_without_a_warning(tmp_path, kind):
    number = {name: n for n, name in TYPES.items()}[kind]
    values, size = block(kind)
    data = np.full(size, 0xFF, np.uint8) if kind != "F64" else np.array([1e300])
    path = tmp_path / "x.gguf"
    path.write_bytes(file(row(shape=(values,), kind=number), data=data.tobytes()))
    with pytest.raises(CheckpointError, match=r"w has [0-9]+ NaN or Inf of"):
        read_finite("w", open_gguf(path)["w"])


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_types_are_read(tmp_path, kind):
    values = np.random.default_rng().integers(-99, 99, (3, 5)).astype(PLAIN[kind])
    path = written(tmp_path / "x.gguf", {"w": values, "v": values[0]}, alignment=128)
    found = open_gguf(path)
    assert {n: s.dtype for n, s in found.items()} == {"w": kind, "v": kind}
    np.testing.assert_array_equal(read(found["w"]), values)
    np.testing.assert_array_equal(read(found["v"]), values[0])


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_file_of_stable_diffusion_cpp_is_the_same_checkpoint(tmp_path, family):
    """Their converter keeps the original names, and quantizes what has whole blocks in a row."""
    given = write_single(tmp_path / "model.safetensors", SMALL[family])
    arrays = load_file(given)
    wide = [n for n, a in arrays.items() if a.ndim == 2 and a.shape[1] % 32 == 0]
    kinds = {name: QUANTIZED[i % len(QUANTIZED)] for i, name in enumerate(sorted(wide))}
    one = open_checkpoint(given)
    for chosen, bound in ({}, 0.0), (kinds, 0.2):
        other = open_checkpoint(written(tmp_path / "model.gguf", arrays, chosen))
        assert other.configs == one.configs
        for component in one.configs:
            expected, found = dict(tensors(one, component)), dict(tensors(other, component))
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert found[name].shape == value.shape
                assert np.linalg.norm(found[name] - value) <= bound * np.linalg.norm(value), name


# --- damage -------------------------------------------------------------------------------------


def text(value):
    return struct.pack("<Q", len(value)) + value


def row(name=b"w", shape=(4,), kind=0, offset=0):
    dims = b"".join(struct.pack("<Q", n) for n in shape)
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def file(*rows, version=3, count=None, entries=(), entry_count=None, data=bytes(32), pad=True):
    count = len(rows) if count is None else count
    entry_count = len(entries) if entry_count is None else entry_count
    head = b"GGUF" + struct.pack("<IQQ", version, count, entry_count)
    head += b"".join(entries) + b"".join(rows)
    return head + bytes(-len(head) % 32 if pad else 0) + data


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def test_the_file_written_by_hand_is_read(tmp_path):
    (tmp_path / "x.gguf").write_bytes(file(row(), row(b"v", (2, 2), 1, 16), version=2))
    found = open_gguf(tmp_path / "x.gguf")
    assert {n: (s.dtype, s.shape) for n, s in found.items()} == {
        "w": ("F32", (4,)), "v": ("F16", (2, 2)),
    }  # fmt: skip


DAMAGED = {
    "version": (file(row(), version=1), "version 1; known are 2, 3"),
    "big-endian": (file(row(), version=3 << 24), "version 50,331,648|version 50331648"),
    "cut": (file(row())[:30], "1 tensors in a file of 30 bytes"),
    "cut in a row": (file(row())[:50], "bytes at 49 of 50|bytes at"),
    "data cut": (file(row(), data=bytes(15)), "w is at 0 to 16"),
    "far outside": (file(row(offset=1 << 60)), "overlaps another, or the"),
    "overlap": (file(row(), row(b"v", offset=8)), "v is at 8 to 24"),
    "twice": (file(row(), row(offset=16)), "w occurs twice"),
    "exabytes": (file(row(shape=(1 << 61, 4))), "w is at 0 to"),
    "more tensors than bytes": (file(row(), count=1 << 60), "tensors in a file of"),
    "more entries than bytes": (file(row(), entry_count=1 << 60), "976 entries of metadata in a"),
    "a name of exabytes": (file(struct.pack("<Q", 1 << 62)), "bytes of a name in a file of"),
    "rank": (file(row(shape=(1,) * 9)), "w has 9 dimensions"),
    "empty": (file(row(shape=(4, 0))), "w is empty"),
    "few bits by a codebook": (file(row(shape=(256,), kind=23)), "w is IQ4_XS; supported are F32"),
    "half a superblock": (file(row(shape=(128,), kind=12)), "rows of 128, no multiple of 256"),
    "unknown type": (file(row(kind=99)), "w is type 99"),
    "half a block": (file(row(shape=(40,), kind=8)), "rows of 40, no multiple of 32"),
    "alignment": (
        file(row(), entries=[entry(b"general.alignment", 4, struct.pack("<I", 0))]),
        "general.alignment is 0, no power of two",
    ),
    "unknown value": (file(row(), entries=[entry(b"k", 77, b"")]), "unknown type 77"),
    "arrays without end": (
        file(row(), entries=[entry(b"k", 9, struct.pack("<IQ", 9, 1) * 50)]),
        "a value of the unknown type 9",
    ),
    "a long array": (
        file(row(), entries=[entry(b"k", 9, struct.pack("<IQ", 8, 1 << 50))]),
        "values in a file of",
    ),
}


@pytest.mark.parametrize("data, said", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_by_its_header(tmp_path, data, said):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert "x.gguf" in str(caught.value)


def test_every_supported_type_was_tried():
    assert {*QUANTIZED, *K_QUANTS, "Q8_K", *PLAIN, "BF16"} == set(KINDS)
