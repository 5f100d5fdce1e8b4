"""Weights of the native target in few bits: bytes as the page draws them, and bundles of them."""

import itertools
import json
import struct
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load_file

from ferrotype import bundle, kernels, parity
from ferrotype.bundle import BundleError
from ferrotype.convert import ConvertError, convert, native
from ferrotype.convert.checkpoint import CheckpointError
from ferrotype.kernels import Type
from ferrotype.quantize.apply import quantize_bundle
from ferrotype.quantize.native import choose, layout
from ferrotype.quantize.recipe import Form, Recipe, RecipeError, Rule, parse
from ferrotype.quantize.weights import quantize
from ferrotype.runtime import models
from ferrotype.runtime.engines.native import NativeEngine, read_index
from ferrotype.runtime.pipeline import Pipeline
from ferrotype.runtime.program import FEW_BITS, Packed
from ferrotype.tests import numpy_engine
from ferrotype.tests.test_native_convert import (
    MATRICES,
    checkpoint_of,
    doubled,
    fails,
    invoke,
    sources,
    up,
)

NO_ENGINE = pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")
ACTIVATIONS = {"bf16": "bf16", "fp32": "fp32", "fp16": "fp16", "int8": "bf16"}  # and what is kept
REQUESTS = MATRICES | {
    f"{inputs} inputs": Packed("w", "matmul", ("w",), 5, (inputs,))
    for inputs in (1, 15, 16, 17, 31, 32, 33, 48, 100)
}
REQUESTS |= {
    "two wide sources": Packed("w", "matmul", ("w",), 17, (33, 48)),
    "wide filter": Packed("w", "matmul", ("w",), 3, (33,), 3),
    "wide geglu": Packed("w", "geglu", ("w",), 2 * 17, (50,)),
    "wide upsample": Packed("w", "upsample", ("w",), 2, (40,), 3),
}


# --- the layout, by loops that follow the page --------------------------------------------------


def stored(request, arrays):
    """(blocks, 16, taps, k) of a matrix as it is stored, of `upsample` four of them."""
    whole = np.concatenate([arrays[source] for source in request.sources])
    weight = whole.reshape(*whole.shape[:2], request.side, request.side)
    for filters in doubled(weight) if request.form == "upsample" else [weight]:
        outputs, taps = len(filters), filters.shape[-1] ** 2
        parts = np.split(filters.reshape(outputs, -1, taps), np.cumsum(request.inputs)[:-1], 1)
        padded = [np.pad(p, ((0, 0), (0, -p.shape[1] % 16), (0, 0))) for p in parts]
        halves = np.split(np.concatenate(padded, 1), 2 if request.form == "geglu" else 1)
        blocks = [np.pad(h, ((0, -len(h) % 16), (0, 0), (0, 0))) for h in halves]
        blocks = [b.reshape(-1, 16, *b.shape[1:]) for b in blocks]
        yield np.stack(blocks, 1).reshape(-1, *blocks[0].shape[1:]).swapaxes(2, 3)


def int8_bytes(request, arrays):
    """[block][tap][k / 4][16][4]; then, at a multiple of 64, a scale for every output in fp32."""
    values = scales = b""
    for matrix in stored(request, arrays):
        blocks, lanes, taps, k = matrix.shape
        found = quantize(matrix.reshape(-1, taps * k), Form("int", 8, "channel"))
        q = found.values.reshape(matrix.shape)
        order = itertools.product(range(blocks), range(taps), range(0, k, 4), range(lanes))
        values += b"".join(q[block, n, tap, i : i + 4].tobytes() for block, tap, i, n in order)
        scales += b"".join(struct.pack("<f", scale) for scale in found.scale.reshape(-1))
    return values + bytes(-len(values) % 64) + scales


def int4_bytes(request, arrays):
    """[block][tap][group]: 16 scales in fp16, then [k / 8][16] words of eight, the first lowest."""
    out = b""
    for matrix in stored(request, arrays):
        for block, tap in itertools.product(range(len(matrix)), range(matrix.shape[2])):
            for group in groups(request):
                rows = matrix[block, :, tap, group]
                found = quantize(rows, Form("int", 4, "block", rows.shape[1]))
                out += b"".join(struct.pack("<e", scale) for scale in found.scale.reshape(-1))
                for i, n in itertools.product(range(0, rows.shape[1], 8), range(16)):
                    word = sum(
                        (int(q) & 15) << 4 * j for j, q in enumerate(found.values[n, i:][:8])
                    )
                    out += struct.pack("<I", word)
    return out


def groups(request):
    """Of 32 inputs, anew with every source, the last of 16 if no more is left."""
    start = 0
    for inputs in map(up, request.inputs):
        yield from (slice(start + i, start + min(i + 32, inputs)) for i in range(0, inputs, 32))
        start += inputs


BYTES = {"int8": int8_bytes, "int4": int4_bytes}


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("name", REQUESTS)
def test_a_matrix_is_packed_as_the_page_draws_it(name, kind):
    request = REQUESTS[name]
    arrays = sources(request)
    found = native.pack(request, list(arrays.values()), kind)
    assert found.dtype == np.uint8
    assert found.tobytes() == BYTES[kind](request, arrays)
    size, scales = request.bytes(FEW_BITS[kind])
    assert found.size == size
    assert scales % 64 == 0 or kind == "int4"
    assert scales + 4 * np.prod(request.scales(FEW_BITS[kind]) or 0) == size


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("name", REQUESTS)
def test_what_was_packed_is_what_quantize_rounds_to(name, kind):
    """The reader here is the oracle's of whole graphs."""
    request = REQUESTS[name]
    arrays = sources(request)
    data = native.pack(request, list(arrays.values()), kind)
    matrices = np.stack(list(stored(request, arrays)))
    found = numpy_engine.few_bits(data, FEW_BITS[kind], matrices.shape, [*map(up, request.inputs)])
    for own, matrix in zip(found, matrices, strict=True):
        if kind == "int8":
            form = Form("int", 8, "channel")
            rows = quantize(matrix.reshape(-1, np.prod(matrix.shape[2:])), form).dequantize()
            assert np.array_equal(own, rows.reshape(matrix.shape))
            continue
        for group in groups(request):
            rows = matrix[..., group]
            form = Form("int", 4, "block", rows.shape[-1])
            rounded = quantize(rows.reshape(-1, rows.shape[-1]), form).dequantize()
            assert np.array_equal(own[..., group], rounded.reshape(rows.shape))


def test_int8_by_hand():
    weight = np.array([[127, -1, 2], [64, 3, -127]], np.float32) / 4
    data = native.pack(Packed("w", "matmul", ("w",), 2, (3,)), [weight], "int8")
    one = bytes([127, 255, 2, 0]) + bytes([64, 3, 129, 0])  # input 3 is padding
    assert data[:256].tobytes() == one + bytes(256 - len(one))
    assert data[256:].view("<f4").tolist() == [0.25, 0.25, *[1.0] * 14]


def test_int4_by_hand():
    first = [7, -8, 1, 0, -1, 2, 3, -2, 4, 5]
    weight = np.array([[*first, *[0] * 22, -3 / 2, 1 / 2]], np.float32)
    data = native.pack(Packed("w", "matmul", ("w",), 1, (34,)), [weight], "int4")
    group, rest = data[: 32 + 256], data[32 + 256 :]  # of 32 inputs, and of 16
    assert group[:32].view("<f2").tolist() == [1.0] * 16
    words = group[32:].view("<u4").reshape(4, 16)
    assert [f"{word:08x}" for word in words[:, 0]] == ["e32f0187", "00000054", *["0" * 8] * 2]
    assert not words[:, 1:].any()
    assert rest[:32].view("<f2").tolist() == [0.5, *[1.0] * 15]
    words = rest[32:].view("<u4").reshape(2, 16)
    assert f"{words[0, 0]:08x}" == "0000001d"
    assert not words.reshape(-1)[1:].any()


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [("int8", 9e6, "w: a scale of 7.087e.04 is needed"), ("int4", 5e5, "w: a scale of 7.143e.04")],
)
def test_a_weight_that_no_scale_reaches_is_refused(kind, value, said):
    array = np.full((16, 16), value, np.float32)
    with pytest.raises(ConvertError, match=f"{said}.*fp16 ends at 65504; use weights fp32$"):
        native.pack(MATRICES["linear"], [array], kind)


# --- the file -----------------------------------------------------------------------------------

FILE = (
    Packed("conv.weight", "matmul", ("conv.weight",), 20, (40,), 3),
    Packed("conv.bias", "vector", ("conv.bias",), 20),
    Packed("ff.weight", "geglu", ("ff.weight",), 40, (20,)),
    Packed("up.weight", "upsample", ("up.weight",), 20, (20,), 3),
    Packed("skip.weight", "matmul", ("skip.weight",), 32, (20, 12)),
)
MIXED = {"conv.weight": Type.I8, "ff.weight": Type.I4, "up.weight": Type.I8}  # skip is bf16


@pytest.fixture
def written(tmp_path):
    """A folder with a file of all types, and the tensors."""
    arrays = {name: value for request in FILE for name, value in sources(request).items()}
    checkpoint = checkpoint_of(tmp_path / "checkpoint", arrays)
    native.write(checkpoint, "unet", FILE, tmp_path / "unet", "bf16", MIXED)
    return tmp_path / "unet", arrays


def test_a_file_of_mixed_types_holds_every_tensor_where_the_index_says(written):
    folder, arrays = written
    data = (folder / "weights.bin").read_bytes()
    places = layout(FILE, Type.BF16, MIXED)
    assert read_index(folder, FILE) == places
    assert list(places) == [request.name for request in FILE]
    end = 0
    for request in FILE:
        place = places[request.name]
        kind = {Type.I8: "int8", Type.I4: "int4"}.get(place.type, "bf16")
        packed = native.pack(request, [arrays[name] for name in request.sources], kind)
        assert place.offset % (64 if request.form == "vector" else 4096) == 0
        assert not any(data[end : place.offset])
        end = place.offset + place.bytes
        assert data[place.offset : end] == packed.tobytes()
        scales = None if kind != "int8" else end - 4 * np.prod(request.scales(Type.I8))
        assert place.scales == scales
    assert len(data) == end


def test_only_products_of_int8_are_narrow(written):
    places = read_index(written[0], FILE, narrow=True)
    assert {name for name, place in places.items() if place.narrow} == {"conv.weight", "up.weight"}


def changes(tensors):
    """Ways in which an index can be wrong, and what the message says."""
    conv, ff, bias = (tensors[name] for name in ("conv.weight", "ff.weight", "conv.bias"))
    return {
        "conv.weight is of no type of fp32, bf16, fp16, int8, int4": lambda: conv.update(type="w8"),
        "conv.weight is not of the shape (2, 9, 448)": lambda: conv.update(type="int4"),
        "ff.weight is not of the shape (4, 1, 8, 16, 4)": lambda: ff.update(type="int8"),
        "conv.weight is not of the shape (2, 9, 12, 16, 4)": lambda: conv.update(shape=[2, 9]),
        "conv.weight has not 13,952 bytes": lambda: conv.update(bytes=conv["bytes"] - 128),
        "ff.weight has not 1,152 bytes": lambda: ff.update(bytes=ff["bytes"] + 1),
        "conv.bias must be fp32": lambda: bias.update(type="int8"),
        "conv.bias overlaps another": lambda: bias.update(offset=conv["bytes"] - 64),
    }


@pytest.mark.parametrize("said", changes(dict.fromkeys(["conv.weight", "ff.weight", "conv.bias"])))
def test_an_index_that_does_not_fit_is_refused_in_a_line(written, said):
    path = written[0] / "weights.json"
    index = json.loads(path.read_text())
    changes(index["tensors"])[said]()
    path.write_text(json.dumps(index))
    with pytest.raises(BundleError) as caught:
        read_index(written[0], FILE)
    assert f"does not fit: {said}" in str(caught.value)
    assert str(caught.value).endswith("; convert the checkpoint again")
    assert "\n" not in str(caught.value)


def test_what_a_recipe_leaves_alone_has_a_reason():
    recipe = Recipe.loads(json.dumps({
        "recipe": 1, "default": "w4", "minimum": 700,
        "rules": [{"match": "unet/conv.*", "weights": "w8"}],
    }))  # fmt: skip
    chosen, kept = choose("unet", FILE, recipe)
    assert chosen == {"conv.weight": Type.I8, "ff.weight": Type.I4, "up.weight": Type.I4,
                      "skip.weight": Type.I4}  # fmt: skip
    assert kept == {}
    _, kept = choose("unet", FILE, Recipe.uniform("w8"))
    assert kept == dict.fromkeys(["ff.weight", "skip.weight"], "fewer than 2048 values")


def test_tensors_that_are_joined_take_the_most_bits_of_one_of_them():
    joined = Packed("qkv", "matmul", ("q.weight", "k.weight", "v.weight"), 96, (32,))

    def chosen(**forms):
        rules = tuple(Rule(f"unet/{name}.*", parse(form)) for name, form in forms.items())
        return choose("unet", [joined], Recipe(parse("w4"), rules))

    assert chosen() == ({"qkv": Type.I4}, {})
    for name in "qkv":
        assert chosen(**{name: "w8"})[0] == {"qkv": Type.I8}
        few_bits, kept = chosen(**{name: "fp16"})
        assert not few_bits
        assert "rule 1" in kept["qkv"]


@pytest.mark.parametrize("form", ["p6", "w8t", "w8a", "w4c", "w4b16"])
def test_a_form_that_the_engine_does_not_multiply_is_refused(form):
    with pytest.raises(RecipeError, match=f"weights {form}: the native target stores w8, w4, not"):
        choose("unet", FILE, Recipe(parse(form), minimum=0))


# --- the target ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random checkpoint of Stable Diffusion 1's shape."""
    pytest.importorskip("torch")
    from ferrotype.benchmarks.checkpoints import TINY, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("few") / "tiny", TINY)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A recipe's file of int8, int4 and what is plain."""
    path = tmp_path_factory.mktemp("recipe") / "mixed.json"
    rules = [
        {"match": "text_encoder/*", "weights": "fp16", "why": "plain"},
        {"match": "unet/*attn*", "weights": "w4"},
        {"match": "vae_encoder/encoder.conv_in.*", "weights": "w8"},
    ]
    path.write_text(json.dumps({"recipe": 1, "default": "w8", "minimum": 256, "rules": rules}))
    return path


@pytest.fixture(scope="module")
def converted(tiny, mixed):
    """A bundle of weights and activations, made once."""
    made = {}

    def find(weights, activations):
        if (weights, activations) not in made:
            form = Recipe.load(mixed) if weights == "mixed" else weights
            folder = tiny.parent / f"{weights}-{activations}.ferro"
            made[weights, activations] = convert(tiny, folder, "native", form, activations)
        return made[weights, activations]

    return find


def types(made, component):
    """How many matrices there are of every type."""
    index = json.loads((made.folder / component / "weights.json").read_text())["tensors"]
    entries = (e for e in index.values() if e["form"] in ("matmul", "geglu", "upsample"))
    return Counter(entry["type"] for entry in entries)


@NO_ENGINE
@pytest.mark.parametrize(
    ("weights", "activations"),
    [("w8", "bf16"), ("w8", "int8"), ("w4", "fp32"), ("w4", "fp16"), ("mixed", "int8")],
)
def test_every_precision_is_above_its_floor_and_counts_what_it_did(converted, weights, activations):
    made = converted(weights, activations)
    assert made.manifest.precision == bundle.Precision(weights, activations)
    told = made.manifest.parity
    bits = "8-bit" if weights == "w8" else "4-bit"
    assert told["floors"] == parity.FLOORS[bits, activations]
    plain = ACTIVATIONS[activations]
    few = {"w8": {"int8"}, "w4": {"int4"}, "mixed": {"int8", "int4"}}[weights]
    for component in made.manifest.components:
        found = types(made, component)
        assert told["weights"][component] == found
        assert sum(told["not_compressed"][component].values()) == found[plain]
    assert types(made, "unet").keys() == few | {plain}
    if weights == "mixed":
        assert types(made, "text_encoder").keys() == {plain}
    assert Pipeline(made).generate("a red apple", steps=1).size == (64, 64)


@NO_ENGINE
def test_the_command_line_gives_the_same_bundle(tiny, mixed, converted, tmp_path):
    made = tmp_path / "a.ferro"
    args = ["--target", "native", "--weights", mixed, "--activations", "int8", "-o", made]
    done = invoke("convert", tiny, *args)
    assert done.exit_code == 0, done.output
    assert "int4" in done.stdout
    assert bundle.load(made).sha256 == converted("mixed", "int8").sha256


@NO_ENGINE
def test_every_command_takes_a_bundle_in_few_bits(converted, tmp_path):
    made = converted("mixed", "int8").folder
    shown = invoke("inspect", made).stdout
    assert "native, mixed weights, int8 inside" in shown
    assert "not compressed" in shown
    planned = invoke("plan", made, "--threads", 2)
    assert planned.exit_code == 0, planned.output
    verified = invoke("verify", made, "--on-device")
    assert verified.exit_code == 0, verified.output
    pictures = []
    for threads in (1, 3):
        path = tmp_path / f"{threads}.png"
        drawn = invoke("generate", "a fox", "-b", made, "-o", path, "--threads", threads)
        assert drawn.exit_code == 0, drawn.output
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1]


@NO_ENGINE
def test_the_memory_stated_is_what_the_engine_takes(converted):
    """Pixels of int8 are scratch."""
    made = converted("w8", "int8")
    for name, part in made.manifest.components.items():
        side = 64 if name == "vae_encoder" else 8
        engine = NativeEngine(made, name, threads=4)
        planned = engine.layout(models.sizes(name, part.config, (side, side)))
        assert planned.arena_bytes + engine.weight_bytes == part.memory["4 threads"].total


@NO_ENGINE
def test_a_bundle_that_is_quantized_later_is_the_one_that_was_converted(tiny, converted, tmp_path):
    """Without statistics, and from weights of which nothing was lost."""
    whole = convert(tiny, tmp_path / "fp32.ferro", "native", "fp32")
    later = quantize_bundle(whole, tmp_path / "w8.ferro", Recipe.uniform("w8"), "int8")
    made = converted("w8", "int8")
    assert later.manifest.precision == made.manifest.precision
    assert later.manifest.components == made.manifest.components
    for name in made.manifest.components:
        for file in ("weights.bin", "weights.json"):
            assert later.manifest.files[f"{name}/{file}"] == made.manifest.files[f"{name}/{file}"]


def recipe_of(path, default, *rules):
    rules = [{"match": match, "weights": form} for match, form in rules]
    path.write_text(json.dumps({"recipe": 1, "default": default, "rules": rules}))
    return path


@NO_ENGINE
@pytest.mark.parametrize(
    ("code", "weights", "activations", "said"),
    [
        (2, "p6", None, "weights p6 with activations bf16: the native target has"),
        (2, "w8a", None, "w8, w4 or a recipe with bf16, fp32, fp16, int8"),
        (2, "bf16", "int8", "activations int8 need weights w8, or a recipe that has some"),
        (2, ("fp16",), "bf16", "the recipe quantizes nothing: give --weights bf16 instead"),
        (2, ("fp16",), "int8", "the recipe quantizes nothing: give --weights bf16 instead"),
        (
            1,
            ("w8", ("unet/*", "p6")),
            None,
            "weights p6: the native target stores w8, w4, not that",
        ),
        (1, ("w4b16",), None, "weights w4b16: the native target stores w8, w4, not that"),
        (1, ("w8", ("unet/conv_on.*", "w4")), None, "pattern 'unet/conv_on.*' is the first match"),
    ],
)
def test_a_wrong_precision_is_one_line_and_nothing_is_written(
    tiny, tmp_path, code, weights, activations, said
):
    if not isinstance(weights, str):
        weights = recipe_of(tmp_path / "recipe.json", *weights)
    out = tmp_path / "out"
    args = ["--target", "native", "--weights", weights, "-o", out / "a.ferro"]
    args += ["--activations", activations] if activations else []
    out.mkdir()
    assert said in fails(code, "convert", tiny, *args)
    assert not list(out.iterdir())


@NO_ENGINE
@pytest.mark.parametrize("weights", ["w8", "w4"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.nan, "mid_block.resnets.0.conv1.weight has 1 NaN or Inf of 9,216 values"),
        (np.inf, "mid_block.resnets.0.conv1.weight has 1 NaN or Inf of 9,216 values"),
        (1e8, "mid_block.resnets.0.conv1.weight: a scale of "),
    ],
)
def test_a_weight_that_cannot_be_quantized_is_one_line(tiny, tmp_path, weights, value, said):
    from ferrotype.convert.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(tiny)
    (path,) = checkpoint.weights["unet"]
    arrays = {n: array.astype(np.float32) for n, array in load_file(path).items()}
    arrays["mid_block.resnets.0.conv1.weight"][3, 5, 1, 1] = value
    broken = checkpoint_of(tmp_path, arrays)
    requests = models.weights("unet", checkpoint.configs["unet"])
    few_bits, _ = choose("unet", requests, Recipe.uniform(weights))
    with pytest.raises(CheckpointError) as caught:
        native.write(broken, "unet", requests, tmp_path / "unet", "bf16", few_bits)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
