"""Weights for the native engine: packed as the page draws it, written once, read whole."""

import hashlib
import itertools
import json
import struct
import sys
import tracemalloc
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from ferrotype import bundle, cli, kernels, parity
from ferrotype.convert import (
    NATIVE,
    ConvertError,
    CoremlOptions,
    OptionError,
    convert,
    native,
    stages,
)
from ferrotype.convert.checkpoint import CheckpointError, Tensors
from ferrotype.convert.rounding import to_bf16
from ferrotype.quantize.recipe import Recipe
from ferrotype.runtime import pipeline
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX, Pipeline
from ferrotype.runtime.program import Packed

NO_ENGINE = pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")
ISAS = kernels.isas() if kernels.available() else []
RNG = np.random.default_rng(0)
TYPES = ("fp32", "bf16", "fp16")
# What the layouts are at: one block and more, whole and not; odd inputs; one source and several.
MATRICES = {
    "linear": Packed("w", "matmul", ("w",), 16, (16,)),
    "narrow": Packed("w", "matmul", ("w",), 3, (1,)),
    "wide": Packed("w", "matmul", ("w",), 17, (33,)),
    "more than a panel": Packed("w", "matmul", ("w",), 150, (5,)),
    "two sources": Packed("w", "matmul", ("w",), 20, (7, 18)),
    "seven sources": Packed("w", "matmul", ("w",), 5, (20, 8, 8, 8, 8, 8, 8)),
    "filter": Packed("w", "matmul", ("w",), 18, (5,), 3),
    "joined": Packed("w", "matmul", ("q", "k", "v"), 33, (6,)),
    "geglu": Packed("w", "geglu", ("w",), 2 * 20, (9,)),
    "upsample": Packed("w", "upsample", ("w",), 19, (3,), 3),
}


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    """The command line sets warnings and hooks for its process, which is ours here."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.delenv("FERROTYPE_ISA", raising=False)
    yield
    kernels.library.cache_clear()


def invoke(*args):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="ferrotype")


def fails(code, *args):
    """The one line on stderr that a command ends with."""
    done = invoke(*args)
    assert done.exit_code == code, done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    return line


def sources(request, scale=1.0):
    """Random tensors for a request, by the names of its sources."""
    each = request.outputs // len(request.sources)
    shape = {
        "vector": (each,),
        "geglu_vector": (each,),
        "table": (each, *request.inputs),
    }.get(request.form, (each, sum(request.inputs)))
    if request.side == 3:
        shape = (*shape, 3, 3)
    return {n: (scale * RNG.standard_normal(shape)).astype(np.float32) for n in request.sources}


# --- the layout, by loops that follow the page --------------------------------------------------


def number(value, kind):
    """The bytes of one value; bfloat16 by the definition of rounding to nearest, ties to even."""
    if kind != "bf16":
        return struct.pack({"fp32": "<f", "fp16": "<e"}[kind], value)
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    low, high = bits & 0xFFFF, bits >> 16
    return struct.pack("<H", high + (low > 0x8000 or (low == 0x8000 and high & 1)))


def up(n):
    return (n + 15) // 16 * 16


def matrix_bytes(weight, request, kind):
    """[block][tap][k][16], or [block][tap][k / 2][16][2] with bfloat16."""
    half = request.outputs // 2
    if request.form == "geglu":
        rows = [(first, n, half) for n in range(0, up(half), 16) for first in (0, half)]
    else:
        rows = [(0, n, request.outputs) for n in range(0, up(request.outputs), 16)]
    columns = []  # of the checkpoint's, for every k; None: zeros
    for i, count in enumerate(request.inputs):
        first = sum(request.inputs[:i])
        columns += [first + k if k < count else None for k in range(up(count))]
    if kind == "bf16":
        pairs = range(0, len(columns), 2)
        order = [(n, k + j) for k in pairs for n in range(16) for j in (0, 1)]
    else:
        order = [(n, k) for k in range(len(columns)) for n in range(16)]
    side = weight.shape[-1]
    out = b""
    for (first, start, limit), y, x in itertools.product(rows, range(side), range(side)):
        for n, k in order:
            stored = start + n < limit and columns[k] is not None
            value = weight[first + start + n, columns[k], y, x] if stored else 0
            out += number(float(value), kind)
    return out


def doubled(weight):
    """The four 2x2 filters of a 3x3 filter after nearest doubling, by where each tap reads."""
    for py, px in itertools.product((0, 1), (0, 1)):
        small = np.zeros((*weight.shape[:2], 2, 2))
        for y, x in itertools.product(range(3), range(3)):
            # output row 2 * i + py reads doubled rows 2 * i + py + y - 1: source row that // 2
            sy, sx = (py + y - 1) // 2 + 1 - py, (px + x - 1) // 2 + 1 - px
            small[:, :, sy, sx] += weight[:, :, y, x]
        yield small.astype(np.float32)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_is_packed_as_the_page_draws_it(name, kind):
    request = MATRICES[name]
    arrays = sources(request)
    whole = np.concatenate([arrays[source] for source in request.sources])
    weight = whole if whole.ndim == 4 else whole[:, :, None, None]
    if request.form == "upsample":
        expected = b"".join(matrix_bytes(w, request, kind) for w in doubled(weight))
    else:
        expected = matrix_bytes(weight, request, kind)
    found = native.pack(request, list(arrays.values()), kind)
    assert found.dtype == np.uint8
    assert found.tobytes() == expected
    shape = request.shape(native.TYPES[kind])
    assert len(expected) == np.prod(shape) * native.TYPES[kind].bytes


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_no_matrix_stays_in_fp32(kind):
    vector = np.arange(1, 20, dtype=np.float32)
    found = native.pack(Packed("b", "vector", ("b",), 19), [vector], kind).view("<f4")
    assert found.tolist() == [*range(1, 20), *[0] * 13]
    found = native.pack(Packed("b", "vector", ("q", "k"), 19), [vector[:9], vector[9:]], kind)
    assert found.view("<f4").tolist() == [*range(1, 20), *[0] * 13]
    gates = native.pack(Packed("b", "geglu_vector", ("b",), 6), [vector[:6]], kind).view("<f4")
    assert gates.tolist() == [1, 2, 3, *[0] * 13, 4, 5, 6, *[0] * 13]
    table = RNG.standard_normal((150, 5)).astype(np.float32)
    found = native.pack(Packed("t", "table", ("t",), 150, (5,)), [table], kind).view("<f4")
    assert np.array_equal(found.reshape(150, 16)[:, :5], table)
    assert not found.reshape(150, 16)[:, 5:].any()


def test_a_1x1_convolution_is_a_linear_layer():
    request = MATRICES["wide"]
    array = sources(request)["w"]
    linear = native.pack(request, [array], "bf16")
    assert np.array_equal(native.pack(request, [array[:, :, None, None]], "bf16"), linear)


def test_a_doubled_filter_convolves_as_the_original():
    """Independent of how the sums are written: nearest doubling and 3x3 against the four 2x2."""
    weight, image = RNG.standard_normal((1, 1, 3, 3)), RNG.standard_normal((5, 6))
    big = np.pad(image.repeat(2, 0).repeat(2, 1), 1)
    expected = sum(
        big[y : y + 10, x : x + 12] * weight[0, 0, y, x] for y in (0, 1, 2) for x in (0, 1, 2)
    )
    request = Packed("w", "upsample", ("w",), 1, (1,), 3)
    packed = native.pack(request, [weight.astype(np.float32)], "fp32").view("<f4")
    filters = packed.reshape(2, 2, 2, 2, 16, 16)[..., 0, 0]  # [py][px][ty][tx]
    small = np.pad(image, 1)
    for (
        py,
        px,
    ) in itertools.product((0, 1), (0, 1)):
        found = sum(
            small[py + y : py + y + 5, px + x : px + x + 6] * filters[py, px, y, x]
            for y in (0, 1)
            for x in (0, 1)
        )
        assert np.allclose(found, expected[py::2, px::2], atol=1e-5)


def test_bfloat16_rounds_to_nearest_even():
    cases = {
        0x3F800000: 0x3F80, 0x3F808000: 0x3F80, 0x3F808001: 0x3F81, 0x3F818000: 0x3F82,
        0x80000000: 0x8000, 0x00000001: 0x0000, 0x7F7F7FFF: 0x7F7F, 0xBF80C000: 0xBF81,
    }  # fmt: skip
    values = np.array(list(cases), np.uint32).view(np.float32)
    assert to_bf16("w", values).tolist() == list(cases.values())


@pytest.mark.parametrize(
    ("kind", "value", "limit"), [("fp16", 65520, "65504"), ("bf16", 3.4e38, "3.39e38")]
)
def test_a_weight_that_the_type_cannot_hold_is_refused(kind, value, limit):
    array = np.full((16, 16), value, np.float32)
    with pytest.raises(ConvertError, match=f"w reaches .* ends at {limit}; use weights fp32"):
        native.pack(MATRICES["linear"], [array], kind)


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(CheckpointError, match=r"w: w is \(16, 17\), the layer needs"):
        native.pack(MATRICES["linear"], [np.zeros((16, 17), np.float32)], "fp32")


# --- the file -----------------------------------------------------------------------------------


def checkpoint_of(folder, tensors, component="unet", family="sd1", **config):
    """What `native.write` reads of a checkpoint."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"{component}.safetensors")
    return SimpleNamespace(
        weights={component: (folder / f"{component}.safetensors",)},
        stored={},
        patches={},
        clip_skip=0,
        family=family,
        configs={component: config},
    )


def requests_of(names):
    return [Packed(n, "matmul", (n,), 20, (24,)) for n in names]


def written(folder, weights="bf16", **changes):
    """A file of three tensors: the folder, the requests, the tensors."""
    requests = [
        Packed("conv.weight", "matmul", ("conv.weight",), 20, (24,), 3),
        Packed("conv.bias", "vector", ("conv.bias",), 20),
        Packed("up.weight", "upsample", ("up.weight",), 20, (20,), 3),
        Packed("qk.weight", "matmul", ("q.weight", "k.weight"), 32, (20,)),
    ]
    rng = np.random.default_rng(1)
    arrays = {
        "conv.weight": rng.standard_normal((20, 24, 3, 3), dtype=np.float32),
        "conv.bias": rng.standard_normal(20, dtype=np.float32),
        "up.weight": rng.standard_normal((20, 20, 3, 3), dtype=np.float32),
        "q.weight": rng.standard_normal((16, 20), dtype=np.float32),
        "k.weight": rng.standard_normal((16, 20), dtype=np.float32),
    } | changes
    checkpoint = checkpoint_of(
        folder / "checkpoint", {k: v for k, v in arrays.items() if v is not None}
    )
    native.write(checkpoint, "unet", requests, folder / "unet", weights)
    return checkpoint, requests, arrays


@pytest.mark.parametrize("kind", TYPES)
def test_the_file_holds_every_tensor_where_the_index_says(tmp_path, kind):
    _, requests, arrays = written(tmp_path, kind)
    data = (tmp_path / "unet" / "weights.bin").read_bytes()
    index = json.loads((tmp_path / "unet" / "weights.json").read_text())
    assert (index["format"], index["bytes"]) == (1, len(data))
    assert list(index["tensors"]) == [request.name for request in requests]
    end = 0
    for request in requests:
        entry = index["tensors"][request.name]
        assert entry["form"] == request.form
        assert entry["type"] == ("fp32" if request.form == "vector" else kind)
        assert entry["shape"] == list(request.shape(native.TYPES[kind]))
        start, size = entry["offset"], entry["bytes"]
        assert start % (64 if request.form == "vector" else 4096) == 0
        assert start >= end, "in the order of execution"
        assert not any(data[end:start])
        end = start + size
        packed = native.pack(request, [arrays[name] for name in request.sources], kind)
        assert data[start:end] == packed.tobytes()
    assert len(data) == end


HASHES = {
    "fp32": "b02496429d606564",
    "bf16": "ea8c306866937baf",
    "fp16": "db96ef2e68162894",
}


@pytest.mark.parametrize("kind", TYPES)
def test_the_same_checkpoint_gives_the_same_bytes_on_every_machine(tmp_path, kind):
    # of whole numbers and halves, which every generator and every sum agree on
    def values(*shape):
        return (np.arange(np.prod(shape)) % 251 / 32 - 3).astype(np.float32).reshape(shape)

    written(
        tmp_path,
        kind,
        **{
            "conv.weight": values(20, 24, 3, 3),
            "conv.bias": values(20),
            "up.weight": values(20, 20, 3, 3) / 3,
            "q.weight": values(16, 20),
            "k.weight": values(16, 20) / 7,
        },
    )
    parts = [(tmp_path / "unet" / name).read_bytes() for name in ("weights.bin", "weights.json")]
    assert hashlib.sha256(b"".join(parts)).hexdigest()[:16] == HASHES[kind]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q.weight": None}, r"1 weights are missing \(q.weight\)"),
        (
            {"extra": np.ones(3), "more": np.ones(3)},
            r"2 weights are read by no layer \(extra, more\)",
        ),
        ({"conv.bias": np.array([np.nan] * 20)}, "conv.bias has 20 NaN or Inf of 20"),
        ({"conv.bias": np.ones(21)}, r"conv.bias is \(21,\), the layer needs \(20,\)"),
    ],
    ids=["missing", "unread", "nan", "shape"],
)
def test_a_checkpoint_that_does_not_fit_the_graph_is_refused(tmp_path, change, said):
    with pytest.raises(CheckpointError, match=said) as refusal:
        written(tmp_path, **change)
    assert "\n" not in str(refusal.value)


def test_ids_of_positions_are_not_missed(tmp_path):
    written(tmp_path, **{"embeddings.position_ids": np.arange(77)[None]})


def test_values_that_fp16_rounds_to_zero_are_counted(tmp_path):
    checkpoint = checkpoint_of(tmp_path, {"w": np.full((100, 100), 1e-9, np.float32)})
    request = Packed("w", "matmul", ("w",), 100, (100,))
    assert native.write(checkpoint, "unet", [request], tmp_path / "a", "fp16") == {"w": 10_000}
    assert native.write(checkpoint, "unet", [request], tmp_path / "b", "bf16") == {}


def test_the_halves_of_an_autoencoder_come_from_one_file_old_names_included(tmp_path):
    rng = np.random.default_rng(2)
    names = ("decoder.mid_block.attentions.0.query.weight", "post_quant_conv.weight")
    names += ("encoder.mid_block.attentions.0.proj_attn.weight", "quant_conv.weight")
    arrays = {name: rng.standard_normal((20, 24, 1, 1), dtype=np.float32) for name in names}
    checkpoint = checkpoint_of(tmp_path, arrays, "vae")
    decoder = requests_of(["decoder.mid_block.attentions.0.to_q.weight", "post_quant_conv.weight"])
    encoder = requests_of(["encoder.mid_block.attentions.0.to_out.0.weight", "quant_conv.weight"])
    for component, requests in (("vae_decoder", decoder), ("vae_encoder", encoder)):
        native.write(checkpoint, component, requests, tmp_path / component, "fp32")
        data = (tmp_path / component / "weights.bin").read_bytes()
        first = native.pack(requests[0], [arrays[names[2 * (component == "vae_encoder")]]], "fp32")
        assert data.startswith(first.tobytes())
    with pytest.raises(CheckpointError, match=r"1 weights are read by no layer \(post_quant"):
        native.write(checkpoint, "vae_decoder", decoder[:1], tmp_path / "x", "fp32")


@pytest.mark.parametrize("prefixes", [("", "text_model."), ("text_model.", ""), ("", "")])
def test_a_prefix_of_clip_does_not_matter(tmp_path, prefixes):
    stored, asked = prefixes
    array = np.ones((20, 24), np.float32)
    checkpoint = checkpoint_of(tmp_path, {f"{stored}a.weight": array}, "text_encoder")
    native.write(
        checkpoint, "text_encoder", requests_of([f"{asked}a.weight"]), tmp_path / "t", "fp32"
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_only_sdxl_leaves_out_the_first_encoder_s_last_layer(tmp_path, family):
    array = np.ones((20, 24), np.float32)
    names = [f"text_model.encoder.layers.{i}.fc1.weight" for i in (0, 1, 11)]
    names.append("text_model.final_layer_norm.weight")
    arrays = dict.fromkeys(names, array)
    checkpoint = checkpoint_of(tmp_path, arrays, "text_encoder", family, num_hidden_layers=12)
    rest = requests_of(names[:2])
    if family == "sdxl":
        native.write(checkpoint, "text_encoder", rest, tmp_path / "t", "fp32")
        rest = rest[:1]
    with pytest.raises(CheckpointError, match="read by no layer"):
        native.write(checkpoint, "text_encoder", rest, tmp_path / "t", "fp32")


@pytest.mark.parametrize("kind", TYPES)
def test_memory_stays_near_the_largest_tensor(tmp_path, kind):
    """Several of them, so that holding two at once would show."""
    big = np.ones((1024, 256, 3, 3), np.float32)
    names = ["a", "b", "c"]
    checkpoint = checkpoint_of(tmp_path, dict.fromkeys(names, big))
    requests = [Packed(n, "matmul", (n,), 1024, (256,), 3) for n in names]
    tracemalloc.start()
    native.write(checkpoint, "unet", requests, tmp_path / "unet", kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * big.nbytes


def test_tensors_are_read_one_by_one_and_by_name(tmp_path):
    arrays = {"b": np.arange(6.0).reshape(2, 3), "a": np.ones(3, np.float16)}
    tensors = Tensors(checkpoint_of(tmp_path, arrays), "unet")
    assert set(tensors) == {"a", "b"}
    assert len(tensors) == 2
    assert np.array_equal(tensors["b"], arrays["b"])
    assert tensors["b"].dtype == tensors["a"].dtype == np.float32
    with pytest.raises(KeyError):
        tensors["c"]


def test_packing_needs_no_torch():
    source = Path(native.__file__).read_text()
    assert "torch" not in source.replace("Neither torch", "")


# --- the target ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random checkpoint of Stable Diffusion 1's shape."""
    pytest.importorskip("torch")
    from ferrotype.benchmarks.checkpoints import TINY, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("native") / "tiny", TINY)


@pytest.fixture(scope="module")
def made(tiny):
    """It converted without being told how."""
    return convert(tiny, tiny.parent / "tiny.ferro", "native")


@NO_ENGINE
def test_a_native_bundle_says_what_it_is(made):
    manifest = made.manifest
    assert manifest.target == "native"
    assert manifest.precision == bundle.Precision("bf16", "bf16")
    assert manifest.sizes == bundle.Sizes((64, 64), 16, 32, 2048)
    assert manifest.parity["floors"] == parity.floors("bf16", "bf16")
    assert bundle.verify(made) == []
    for name, part in manifest.components.items():
        assert {n for n in manifest.files if n.startswith(f"{name}/")} == {
            f"{name}/weights.bin", f"{name}/weights.json",
        }  # fmt: skip
        stored = manifest.files[f"{name}/weights.bin"].bytes
        one, four = part.memory["1 thread"], part.memory["4 threads"]
        assert one.weights == four.weights == stored
        assert 0 < one.activations == four.activations
        assert 0 < one.scratch <= four.scratch
        shapes = [t.shape for t in (*part.inputs.values(), *part.outputs.values())]
        assert {shape[0] for shape in shapes if shape} == {1}
    inputs = manifest.components["unet"].inputs
    assert {name: t.dtype for name, t in inputs.items()} == dict.fromkeys(
        ("sample", "timestep", "encoder_hidden_states"), "float32"
    )


@NO_ENGINE
def test_the_memory_stated_is_what_the_engine_takes(made):
    from ferrotype.runtime import models
    from ferrotype.runtime.engines.native import NativeEngine

    for name, part in made.manifest.components.items():
        side = 64 if name == "vae_encoder" else 8
        engine = NativeEngine(made, name, threads=4)
        planned = engine.layout(models.sizes(name, part.config, (side, side)))
        assert planned.arena_bytes + engine.weight_bytes == part.memory["4 threads"].total


@NO_ENGINE
@pytest.mark.parametrize("pair", NATIVE, ids="-".join)
def test_every_pair_of_precisions_is_above_its_floor(tiny, tmp_path, pair):
    made = convert(tiny, tmp_path / "a.ferro", "native", *pair)
    assert made.manifest.precision == bundle.Precision(*pair)
    report = made.manifest.parity
    assert report["picture"]["psnr"] >= (
        60 if pair[0] == "fp32" else parity.FLOORS[pair]["picture"]
    )
    types = json.loads((made.folder / "unet" / "weights.json").read_text())["tensors"]
    found = {entry["type"] for entry in types.values() if entry["form"] == "matmul"}
    assert found == {pair[0]}


@NO_ENGINE
def test_the_same_checkpoint_gives_the_same_bundle(tiny, made, tmp_path):
    again = convert(tiny, tmp_path / "again.ferro", "native")
    weights = {n: f for n, f in made.manifest.files.items() if "/weights." in n}
    assert weights.items() <= again.manifest.files.items()
    assert again.sha256 == made.sha256


@NO_ENGINE
def test_an_sdxl_converts_and_its_stages_are_counted(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from ferrotype.benchmarks.checkpoints import TINY_XL, write_checkpoint

    totals, told = [], []

    class Watched(cli.Progress):
        def __init__(self, label, total):
            super().__init__(label, total)
            totals.append(total)

        def stage(self, label):
            told.append(label)

    monkeypatch.setattr(cli, "Progress", Watched)
    write_checkpoint(tmp_path / "xl", TINY_XL)
    done = invoke("convert", tmp_path / "xl", "--target", "native", "-o", tmp_path / "xl.ferro")
    assert done.exit_code == 0, done.output
    assert totals == [len(told)] == [stages(2)]
    manifest = bundle.load(tmp_path / "xl.ferro").manifest
    assert set(manifest.components["text_encoder"].outputs) == {"hidden_states.2"}
    assert manifest.parity["picture"]["psnr"] >= 32


@NO_ENGINE
@pytest.mark.parametrize("suffix", ["conv2.weight", "norm2.weight"])
def test_below_the_floor_it_fails_and_names_the_layer(tiny, tmp_path, monkeypatch, suffix):
    write = native.write

    def damaging(checkpoint, component, requests, folder, *types):
        lost = write(checkpoint, component, requests, folder, *types)
        if component == "unet":
            index = json.loads((folder / "weights.json").read_text())
            entry = index["tensors"][f"mid_block.resnets.0.{suffix}"]
            data = np.memmap(folder / "weights.bin", np.uint8, "r+")
            data[entry["offset"] :][: entry["bytes"]].view("<f4")[:] *= 1.5
            data.flush()
        return lost

    monkeypatch.setattr(native, "write", damaging)
    with pytest.raises(parity.ParityError) as caught:
        convert(tiny, tmp_path / "bad.ferro", "native", "fp32")
    message = str(caught.value)
    assert "unet out_sample: PSNR" in message
    assert f"lost in layer mid_block.resnets.0.{suffix.removesuffix('.weight')} (" in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


@NO_ENGINE
def test_fixed_sizes_draw_only_those(tiny, tmp_path):
    made = convert(tiny, tmp_path / "fixed.ferro", "native", sizes=[(80, 48)])
    assert made.manifest.components["unet"].inputs["sample"].shape == (1, 4, 6, 10)
    assert made.manifest.components["vae_decoder"].outputs["sample"].shape == (1, 3, 48, 80)
    assert Pipeline(made).generate("a red apple").size == (80, 48)
    with pytest.raises(ValueError, match="draws only 80x48"):
        Pipeline(made).steps("a red apple", size=(64, 64))
    both = convert(tiny, tmp_path / "both.ferro", "native", sizes=[(80, 48), (32, 64)])
    assert both.manifest.components["unet"].inputs["sample"].shape == (1, 4, "height", "width")


@NO_ENGINE
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "bf16", "activations": "fp16"}, OptionError, "weights bf16 with activations"),
        (
            {"weights": "fp32", "activations": "bf16"},
            OptionError,
            "the native target has bf16 with",
        ),
        ({"weights": "p6"}, OptionError, "weights p6 with activations bf16: the native"),
        ({"weights": Recipe.uniform("fp16")}, OptionError, "the recipe quantizes nothing"),
        ({"sizes": [(72, 64)]}, ConvertError, "size 72x64: 72 is no multiple of 16"),
        ({"options": CoremlOptions()}, ConvertError, "CoremlOptions are not for the target native"),
    ],
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(tiny, tmp_path, options, error, message):
    with pytest.raises(error) as caught:
        convert(tiny, tmp_path / "out.ferro", "native", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["onnx", "coreml", "tensorrt"])
def test_the_other_targets_have_no_bfloat16(tiny, tmp_path, target):
    with pytest.raises(ConvertError, match=f"weights for {target}: .*no form .bf16"):
        convert(tiny, tmp_path / "out.ferro", target, "bf16")
    with pytest.raises(ConvertError, match=f"activations 'bf16': {target} computes in fp32 or"):
        convert(tiny, tmp_path / "out.ferro", target, activations="bf16")


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ((None, None), ("bf16", "bf16")),
        (("fp32", None), ("fp32", "fp32")),
        (("fp16", None), ("fp16", "fp16")),
        ((None, "fp16"), ("fp16", "fp16")),
        ((None, "fp32"), ("bf16", "fp32")),
        (("fp16", "fp32"), ("fp16", "fp32")),
    ],
)
def test_what_is_not_told_follows_what_is(given, chosen):
    from ferrotype.convert import _precision

    assert _precision("native", *given)[1] == bundle.Precision(*chosen)


@NO_ENGINE
def test_fp16_that_would_overflow_is_kept_in_fp32_and_bf16_needs_not(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "FP16_MAX", 0.5)
    half = convert(tiny, tmp_path / "half.ferro", "native", "fp16").manifest
    assert {part.activations for part in half.components.values()} == {"fp32"}
    assert any("kept in fp32" in note for note in half.parity["notes"])
    other = convert(tiny, tmp_path / "out.ferro", "native", "bf16").manifest
    assert {part.activations for part in other.components.values()} == {""}


def test_without_the_engine_converting_says_what_is_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_path", lambda: None)
    kernels.library.cache_clear()
    done = invoke("convert", tiny, "--target", "native", "-o", tmp_path / "out.ferro")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: the native engine is not built: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- the command line ---------------------------------------------------------------------------


@NO_ENGINE
def test_every_command_takes_a_native_bundle(made, tmp_path):
    shown = invoke("inspect", made.folder).stdout
    assert "native, bf16 weights, bf16 inside" in shown
    assert "multiples of 16 from 32 to 2048" in shown
    planned = invoke("plan", made.folder)
    assert planned.exit_code == 0, planned.output
    assert all(name in planned.stdout for name in ("text_encoder", "unet", "vae_decoder"))
    verified = invoke("verify", made.folder, "--on-device")
    assert verified.exit_code == 0, verified.output
    assert "unet out_sample" in verified.stdout
    drawn = invoke("generate", "a fox", "-b", made.folder, "-o", tmp_path / "a.png")
    assert drawn.exit_code == 0, drawn.output
    again = invoke("generate", "a fox", "-b", made.folder, "-o", tmp_path / "b.png", "--threads", 3)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    line = fails(2, "generate", "a fox", "-b", made.folder, "--size", "72")
    assert "72 is no multiple of 16, try" in line


@NO_ENGINE
@pytest.mark.parametrize("isa", [None, *ISAS])
def test_an_instruction_set_can_be_asked_for(made, monkeypatch, isa):
    seen = []
    program = kernels.Program.__init__

    def watched(self, ops, arena, weights, threads, isa=None):
        program(self, ops, arena, weights, threads, isa)
        seen.append(self.isa)

    monkeypatch.setattr(kernels.Program, "__init__", watched)
    if isa:
        monkeypatch.setenv("FERROTYPE_ISA", isa)
    done = invoke("verify", made.folder, "--on-device", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["problems"] == []
    assert set(seen) == {isa or ISAS[0]}


@NO_ENGINE
@pytest.mark.parametrize("command", [["generate", "a", "-b"], ["verify", "--on-device"]])
def test_an_unknown_instruction_set_is_a_usage_error(made, monkeypatch, command):
    monkeypatch.setenv("FERROTYPE_ISA", "mmx")
    line = fails(2, *command, made.folder)
    assert "FERROTYPE_ISA=mmx is no instruction set" in line
    assert line.endswith(", ".join(ISAS))


@NO_ENGINE
def test_an_instruction_set_of_other_machines_is_a_usage_error(made, monkeypatch):
    real = kernels.isas
    monkeypatch.setattr(
        kernels, "isas", lambda supported=True: real(supported) + ["vnni"] * (not supported)
    )
    monkeypatch.setenv("FERROTYPE_ISA", "vnni")
    line = fails(2, "generate", "a", "-b", made.folder)
    assert "FERROTYPE_ISA=vnni: this machine has it not; it runs " in line


def test_a_pair_that_does_not_go_together_is_a_usage_error(tiny):
    args = ("--target", "native", "--weights", "fp16", "--activations", "bf16")
    line = fails(2, "convert", tiny, *args)
    assert "bf16 with bf16, bf16 with fp32, fp32 with fp32, fp16 with fp16" in line


# --- the embedded bundle ------------------------------------------------------------------------


def test_the_native_bundle_is_the_default_where_the_engine_is_built(monkeypatch, recwarn):
    monkeypatch.setattr(kernels, "available", lambda: True)
    assert pipeline.embedded() == EMBEDDED
    assert not recwarn


def test_without_the_engine_the_onnx_bundle_draws_and_a_line_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "available", lambda: False)
    with pytest.warns(pipeline.EngineWarning, match="no C\\+\\+17 compiler was there when"):
        assert pipeline.embedded() == EMBEDDED_ONNX
    done = invoke("generate", "a pizza", "-n", 1, "-o", tmp_path / "a.png")
    assert done.exit_code == 0, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("note: the native engine is not built")
    assert bundle.load(EMBEDDED_ONNX).manifest.target == "onnx"


@pytest.mark.parametrize("folder", [EMBEDDED, EMBEDDED_ONNX])
def test_both_embedded_bundles_are_sound(folder):
    assert bundle.verify(bundle.load(folder)) == []
