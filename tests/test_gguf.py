"""GGUF files of stable-diffusion.cpp: every type against the gguf package, damage against bytes."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from ferrotype.benchmarks.checkpoints import SMALL, write_single
from ferrotype.convert.checkpoint import CheckpointError, open_checkpoint, read_finite, tensors
from ferrotype.convert.gguf import KINDS, TYPES, open_gguf
from ferrotype.convert.storage import block, read
from ferrotype.tests.hostile import gguf as gguf_file
from ferrotype.tests.hostile import row

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
    path.write_bytes(gguf_file(row(shape=(512, 3), kind=15), data=blocks.tobytes()))
    np.testing.assert_array_equal(read(open_gguf(path)["w"]), (factors * numbers).reshape(3, 512))


@pytest.mark.parametrize("kind", [*QUANTIZED, *K_QUANTS, "Q8_K", "F64"])
def test_factors_that_are_no_numbers_are_told_without_a_warning(tmp_path, kind):
    number = {name: n for n, name in TYPES.items()}[kind]
    values, size = block(kind)
    data = np.full(size, 0xFF, np.uint8) if kind != "F64" else np.array([1e300])
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_file(row(shape=(values,), kind=number), data=data.tobytes()))
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


def test_the_file_written_by_hand_is_read(tmp_path):
    (tmp_path / "x.gguf").write_bytes(gguf_file(row(), row(b"v", (2, 2), 1, 16), version=2))
    found = open_gguf(tmp_path / "x.gguf")
    assert {n: (s.dtype, s.shape) for n, s in found.items()} == {
        "w": ("F32", (4,)), "v": ("F16", (2, 2)),
    }  # fmt: skip


def test_every_supported_type_was_tried():
    assert {*QUANTIZED, *K_QUANTS, "Q8_K", *PLAIN, "BF16"} == set(KINDS)
