"""Palettes against the exact optimum, integers against brute force, and every refusal's line."""

import json
import os
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrotype.quantize import weights
from ferrotype.quantize.recipe import GRANULARITIES, Form, Recipe, RecipeError, Rule, parse
from ferrotype.quantize.weights import Integers, Palette, error, fits, pack, quantize, unpack

NAMES = ["p8", "p6", "p4", "p2", "p6g2", "p4g1", "w8", "w8t", "w8b4", "w8a", "w8ta", "w8b4a"]
NAMES += ["w4b4", "w4b8", "w4c", "w4b4a", "w4ca"]
INTEGERS = [name for name in NAMES if name[0] == "w"]
NO_NAMES = ["", "p", "p1", "p3", "p16", "P6", "p6 ", " p6", "p6\n", "p6g", "p6g0", "p6g01"]
NO_NAMES += ["p6g-1", "p6g4097", "p6a", "w", "w2", "w4t", "w4b", "w4b1", "w4b0", "w8g4", "w4aa"]
NO_NAMES += ["w4ba", "w8at", "int8", "fp8", "bf16", "p６", "w4b" + "9" * 5000, "x" * 5000]
SHAPES = [(2, 8), (6, 8), (4, 8, 3, 3), (32, 8, 1, 1), (2, 24, 7), (2, 64, 33)]
EXAMPLE = (
    '{"recipe": 1, "default": "p6", "rules": ['
    '{"match": "unet/conv_in*", "weights": "fp16", "why": "first layer"}, '
    '{"match": "unet/*.attn2.*", "weights": "p8"}]}'
)


def realistic(shape, seed=None, outliers=True):
    """Weights of a network: normal with a spread of 0.02, a few far out; fresh at every run."""
    rng = np.random.default_rng(seed)
    array = 0.02 * rng.standard_normal(shape)
    if outliers:
        array.ravel()[rng.integers(0, array.size, 1 + array.size // 500)] *= 10
    return array.astype(np.float32)


def squared(array, quantized):
    return np.sum((array.astype(np.float64) - quantized.dequantize()) ** 2)


# --- the grammar --------------------------------------------------------------------------------


@st.composite
def forms(draw):
    (kind, bits), known = draw(st.sampled_from(sorted(GRANULARITIES.items())))
    granularity = draw(st.sampled_from(known))
    least = {"grouped": 1, "block": 2}.get(granularity)
    group = draw(st.integers(least, 4096)) if least else 0
    return Form(kind, bits, granularity, group, kind != "int" or draw(st.booleans()))


@given(forms())
def test_every_form_has_a_name_that_gives_it_back(form):
    assert parse(str(form)) == form


@pytest.mark.parametrize(
    "text, form",
    [
        ("fp16", Form("fp16", 16)),
        ("fp32", Form("fp32", 32)),
        ("p6", Form("palette", 6)),
        ("p4g16", Form("palette", 4, "grouped", 16)),
        ("w8", Form("int", 8, "channel")),
        ("w8t", Form("int", 8, "tensor")),
        ("w8b64", Form("int", 8, "block", 64)),
        ("w4", Form("int", 4, "block", 32)),
        ("w4b32", Form("int", 4, "block", 32)),
        ("w4c", Form("int", 4, "channel")),
        ("w4b32a", Form("int", 4, "block", 32, symmetric=False)),
    ],
)
def test_names_mean_what_the_page_says(text, form):
    assert parse(text) == form


def test_the_shortest_name_is_printed():
    assert [str(parse(t)) for t in ("w4b32", "w8c", "w4b32a")] == ["w4", "w8", "w4a"]


@pytest.mark.parametrize("text", NO_NAMES)
def test_other_names_are_refused_with_a_list(text):
    with pytest.raises(ValueError, match=r"^no form .*there is: fp32, fp16, p8") as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "fields, message",
    [
        (("ternary", 2), "kind 'ternary' is not one of palette, int, fp16, fp32"),
        (("palette", 3), "palette of 3 bits: there is 2, 4, 6, 8"),
        (("palette", True), "palette of True bits: there is 2, 4, 6, 8"),
        (("int", 2), "int of 2 bits: there is 4, 8"),
        (("fp16", 8), "fp16 of 8 bits: there is 16"),
        (("palette", 4, "block", 16), "palette of 4 bits per block: there is tensor, grouped"),
        (("int", 4, "tensor"), "int of 4 bits per tensor: there is channel, block"),
        (("int", 8, "channel", 4), "group is 4, per channel it is 0"),
        (("int", 4, "block"), "block by 0, not in 2..4096"),
        (("palette", 4, "grouped", 4.0), "grouped by 4.0, not in 1..4096"),
        (("palette", 4, "tensor", 0, False), "palette has no zero point"),
    ],
)
def test_a_form_checks_itself(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Form(*fields)


# --- recipes ------------------------------------------------------------------------------------

LINEAR = (640, 640)
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize(
    "component, name, shape, form, reason",
    [
        ("unet", "conv_in.weight", (320, 4, 3, 3), "fp16", "rule 1: unet/conv_in* (first layer)"),
        ("unet", f"{BLOCK}.attn2.to_q.weight", LINEAR, "p8", "rule 2: unet/*.attn2.*"),
        ("unet", f"{BLOCK}.attn1.to_q.weight", LINEAR, "p6", "default"),
        ("unet", f"{BLOCK}.attn2.to_out.0.bias", (640,), "fp16", "one-dimensional"),
        ("unet", "conv_out.weight", (4, 320, 3, 3), "fp16", "last convolution of the network"),
        ("unet", "time_embedding.linear_1.weight", (1280, 320), "fp16", "embedding of the time"),
        ("unet", "add_embedding.linear_2.weight", (1280, 320), "fp16", "embedding of the time"),
        ("unet", "mid_block.resnets.0.time_emb_proj.weight", (1280, 1280), "p6", "default"),
        ("vae_decoder", "decoder.conv_in.weight", (512, 4, 3, 3), "fp16", "first convolution"),
        ("vae_encoder", "encoder.conv_out.weight", (8, 512, 3, 3), "fp16", "last convolution"),
        ("vae_decoder", "post_quant_conv.weight", (4, 4, 1, 1), "fp16", "fewer than 2048 values"),
        ("vae_decoder", "decoder.mid_block.resnets.0.conv1.weight", (512, 512, 3, 3), "p6", "def"),
        ("text_encoder", "text_model.embeddings.position_embedding.weight", (77, 768), "fp16", "p"),
        ("text_encoder", "text_model.embeddings.token_embedding.weight", (49408, 768), "p6", "d"),
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.weight", (3072, 768), "p6", "def"),
        ("text_encoder", "logit_scale", (), "fp16", "one-dimensional: a norm or a bias"),
    ],
)
def test_what_a_tensor_gets_and_why(component, name, shape, form, reason):
    found, why = Recipe.loads(EXAMPLE).choose(component, name, shape)
    assert (str(found), why[: len(reason)]) == (form, reason)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 23, 24, 25, 1001])
def test_bits_are_packed_without_gaps(bits, count):
    values = np.random.default_rng(bits * count).integers(0, 1 << bits, count, dtype=np.uint8)
    single = np.unpackbits(values.reshape(-1, 1), axis=1, bitorder="little")[:, :bits]
    packed = np.packbits(single.reshape(-1), bitorder="little")
    np.testing.assert_array_equal(pack(values, bits), packed)
    np.testing.assert_array_equal(unpack(packed, bits, count), values)


@pytest.mark.parametrize("pattern", ["text_encoder/encoder.*", "text_encoder/text_model.encoder.*"])
@pytest.mark.parametrize("name", ["encoder.layers.0.mlp.fc1.weight", "text_model.encoder.x.weight"])
def test_clips_prefix_does_not_matter(pattern, name):
    recipe = Recipe(parse("p6"), (Rule(pattern, parse("p4")),))
    assert str(recipe.choose("text_encoder", name, (64, 64))[0]) == "p4"
    assert recipe.unused([f"text_encoder/{name}"]) == ()


def test_the_first_rule_wins_and_rules_override_the_sensitive_list():
    rules = Rule("unet/conv_in*", parse("w8")), Rule("unet/*", parse("p4"))
    recipe = Recipe(parse("p6"), rules)
    assert str(recipe.choose("unet", "conv_in.weight", (320, 4, 3, 3))[0]) == "w8"
    assert str(recipe.choose("unet", "conv_out.weight", (4, 320, 3, 3))[0]) == "p4"
    assert str(recipe.choose("vae_decoder", "x.weight", LINEAR)[0]) == "p6"


def test_small_tensors_are_not_quantized_even_by_a_rule_but_may_be_cast():
    rules = Rule("unet/a.*", parse("p4")), Rule("unet/b.*", parse("fp32"))
    recipe = Recipe(parse("p6"), rules, minimum=100)
    assert str(recipe.choose("unet", "a.weight", (9, 11))[0]) == "fp16"
    assert str(recipe.choose("unet", "a.weight", (10, 10))[0]) == "p4"
    assert str(recipe.choose("unet", "a.bias", (640,))[0]) == "fp16"
    assert str(recipe.choose("unet", "b.bias", (640,))[0]) == "fp32"


def test_uniform_recipes():
    assert str(Recipe.uniform("fp16").choose("unet", "n.bias", (4,))[0]) == "fp16"
    assert Recipe.uniform("fp32").choose("unet", "n.bias", (4,)) == (parse("fp32"), "default")
    mixed = Recipe(parse("fp32"), (Rule("unet/*", parse("p4")),))
    assert str(mixed.choose("unet", "n.bias", (4,))[0]) == "fp32"


def test_a_pattern_that_decides_nothing_is_found():
    rules = [Rule(m, parse("p4")) for m in ("unet/a*", "unet/A*", "unet/ab*", "vae/[bc]?", "*/x")]
    names = ["unet/abc", "vae/c1", "unet/b", "vae/x"]
    assert Recipe(parse("p6"), tuple(rules)).unused(iter(names)) == ("unet/A*", "unet/ab*")


texts = st.text(st.characters(exclude_categories=["C", "Zl", "Zp", "Zs"]), min_size=1, max_size=20)


@given(
    forms(),
    st.lists(st.builds(Rule, texts, forms(), texts | st.just("")), max_size=4),
    st.integers(0, 10**6),
    st.none() | texts,
    texts,
)
def test_a_recipe_round_trips(default, rules, minimum, model, note):
    recipe = Recipe(default, tuple(rules), minimum, model, note)
    assert Recipe.loads(recipe.dump()) == recipe
    assert Recipe.loads(recipe.dump()).dump() == recipe.dump()


def test_a_recipe_is_read_from_a_file(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(EXAMPLE)
    assert Recipe.load(path) == Recipe.load(str(path)) == Recipe.loads(EXAMPLE)


def test_the_page_shows_a_recipe_that_is_read():
    page = (weights.__file__.rsplit("quantize", 1)[0]) + "docs/quantize.md"
    with open(page, encoding="utf-8") as stream:
        example = stream.read().split("```json\n")[1].split("```")[0]
    assert [str(rule.form) for rule in Recipe.loads(example).rules] == ["fp16", "p8"]


def edited(**changes):
    raw = {"recipe": 1, "default": "p6", "rules": [{"match": "unet/*", "weights": "p4"}]}
    return json.dumps({**raw, **changes})


def rule(**changes):
    return edited(rules=[{"match": "unet/*", "weights": "p4", **changes}])


HOSTILE = {
    "": "Expecting value",
    "{": "Expecting property name",
    "[]": "recipe: dict expected, found []",
    "null": "recipe: dict expected, found null",
    "[" * 100_000: "nests too deeply",
    '{"a":' * 100_000: "nests too deeply",
    "\ufeff{}": "BOM",
    "{}": "recipe: missing",
    EXAMPLE + "}": "Extra data",
    '{"recipe": 1, "recipe": 1, "default": "p6"}': 'names the key "recipe" twice',
    '{"recipe": 1, "default": "p6", "rules": [{"match": "a", "match": "b"}]}': '"match" twice',
    '{"recipe": 1}': "default: missing",
    edited(recipe=2): "recipe: version 2, this ferrotype reads 1",
    edited(recipe=True): "recipe: int expected, found true",
    edited(recipe=1.0): "recipe: int expected, found 1.0",
    edited(recipe="1"): 'recipe: int expected, found "1"',
    edited(default=None): "default: str expected, found null",
    edited(default="p5"): 'default: no form "p5"; there is: fp32',
    edited(default=["p6"]): 'default: str expected, found ["p6"]',
    edited(rules={}): "rules: list expected, found {}",
    edited(rules=["unet/*"]): 'rules[0]: dict expected, found "unet/*"',
    edited(rules=[{"match": "unet/*"}]): "rules[0].weights: missing",
    edited(rules=[{"weights": "p4"}]): "rules[0].match: missing",
    edited(rules=[{"match": "a", "weights": "p4"}] * 1001): "rules: 1001 of them, at most 1000",
    rule(match=""): "rules[0].match: it is empty",
    rule(match=3): "rules[0].match: str expected, found 3",
    rule(match="a\nb"): 'rules[0].match: "a\\nb" is not one line of printable text',
    rule(match="\udc80"): "is not one line of printable text",
    rule(match="x" * 1001): "rules[0].match: 1001 characters, at most 1000",
    rule(weights="w4t"): 'rules[0].weights: no form "w4t": int of 4 bits per tensor',
    rule(weights=4): "rules[0].weights: str expected, found 4",
    rule(why=None): "rules[0].why: str expected, found null",
    rule(form="p4"): 'rules[0]."form": not a field; there is match, weights, why',
    edited(ruls=[]): '"ruls": not a field; there is default, minimum, model, note',
    edited(minimum=-1): "minimum: -1, it cannot be negative",
    edited(minimum=2.5): "minimum: int expected, found 2.5",
    edited(minimum=10**19): "does not fit 64 bits",
    edited(minimum=float("nan")): "NaN is not a finite number",
    edited(minimum=float("inf")): "Infinity is not a finite number",
    edited(minimum=0).replace("0}", "1e999}"): "1e999 is not a finite number",
    edited(minimum=0).replace("0}", "9" * 100_000 + "}"): "does not fit 64 bits",
    edited(model=7): "model: str expected, found 7",
    edited(note="\x1b[2J"): "note: ",
}


@pytest.mark.parametrize("text, message", HOSTILE.items(), ids=range(len(HOSTILE)))
def test_a_hostile_recipe_is_one_clear_line(text, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.loads(text, "r.json")
    line = str(caught.value)
    assert line.startswith("r.json is not a valid recipe: ")
    assert message in line
    assert line.isprintable()
    assert len(line) < 400


def test_files_that_are_no_recipe(tmp_path, monkeypatch):
    (tmp_path / "latin").write_bytes(b'{"note": "\xe9"}')
    (tmp_path / "large").write_bytes(b" " * ((1 << 20) + 1))
    (tmp_path / "shut").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "missing": "is not there",
        "": "is no file",
        "pipe": "is no file",
        "latin": "is not UTF-8 text: invalid continuation byte",
        "large": "has more than 1,048,576 bytes, which is the limit",
    }
    for name, message in cases.items():
        with pytest.raises(RecipeError, match=f"^{re.escape(str(tmp_path / name))} {message}$"):
            Recipe.load(tmp_path / name)

    def shut(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", shut)
    with pytest.raises(RecipeError, match=r"shut cannot be read: Permission denied$"):
        Recipe.load(tmp_path / "shut")


def test_a_pattern_of_many_stars_takes_no_time():
    recipe = Recipe(parse("p6"), (Rule("*a" * 400 + "b", parse("p4")),))
    start = time.perf_counter()
    assert recipe.choose("unet", "a" * 1000, (64, 64))[1] == "default"
    assert time.perf_counter() - start < 2


# --- palettes -----------------------------------------------------------------------------------


def exact_loss(values, size):
    """The least squared error of `size` fp16 values, by the O(k n^2) recursion written out."""
    values = np.sort(values.astype(np.float64))
    count = len(values)
    cost = np.triu(np.full((count + 1, count + 1), np.inf)).T  # [start, end]: no run ends earlier
    np.fill_diagonal(cost, 0.0)
    for i in range(count):
        for j in range(i + 1, count + 1):
            run = values[i:j]
            cost[i, j] = np.sum((run - float(np.float16(run.mean()))) ** 2)
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    for _ in range(size):
        best = (best[:, None] + cost).min(axis=0)
    return best[-1]


@pytest.mark.parametrize("bits, count", [(2, 300), (4, 300), (6, 150), (8, 280)])
def test_a_palette_is_the_optimum_on_small_arrays(bits, count):
    array = realistic(count).astype(np.float16).astype(np.float32)
    found = squared(array, quantize(array, Form("palette", bits)))
    optimum = exact_loss(array, 2**bits)
    assert found <= 1.01 * optimum + 1e-18
    assert found >= optimum * (1 - 1e-6) - 1e-18


def lloyd_from_quantiles(array, size):
    """What a plain library does: quantiles, then a hundred rounds, then fp16."""
    centers = np.quantile(array.astype(np.float64), (np.arange(size) + 0.5) / size)
    for _ in range(100):
        nearest = np.searchsorted((centers[1:] + centers[:-1]) / 2, array)
        counts = np.bincount(nearest, minlength=size)
        sums = np.bincount(nearest, array, minlength=size)
        centers = np.where(counts > 0, sums / np.maximum(counts, 1), centers)
    centers = centers.astype(np.float16).astype(np.float64)
    nearest = np.searchsorted((centers[1:] + centers[:-1]) / 2, array)
    return np.sum((array - centers[nearest]) ** 2)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("count", [600, 5000, 100_000])
def test_a_palette_is_never_worse_than_lloyd_from_quantiles(bits, count):
    array = realistic(count).astype(np.float16).astype(np.float32)
    found = squared(array, quantize(array, Form("palette", bits)))
    assert found <= lloyd_from_quantiles(array, 2**bits) * (1 + 1e-4)


@pytest.mark.parametrize("name", ["p2", "p4", "p6", "p8", "p4g2"])
def test_every_index_is_the_nearest_entry(name):
    array = realistic((6, 31, 3))
    found = quantize(array, parse(name))
    assert found.lut.dtype == np.float16
    assert found.indices.dtype == np.uint8
    assert (np.diff(found.lut.astype(np.float32)) >= 0).all()
    for row, lut, indices in zip(
        array.reshape(len(found.lut), -1),
        found.lut.astype(np.float32),
        found.indices.reshape(len(found.lut), -1),
        strict=True,
    ):
        distance = np.abs(row[:, None] - lut)
        taken = np.take_along_axis(distance, indices[:, None].astype(int), 1)[:, 0]
        np.testing.assert_allclose(taken, distance.min(axis=1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_few_distinct_values_are_exact(bits):
    values = realistic(2**bits).astype(np.float16).astype(np.float32)
    values[:3] = 0.0, -0.0, 65504
    array = np.random.default_rng().choice(values, (33, 31))
    found = quantize(array, Form("palette", bits))
    assert np.array_equal(found.dequantize(), array)
    assert error(array, found) == {"relative_rms": 0.0, "snr": 200.0}


def test_an_outlier_of_another_magnitude_does_not_blur_the_rest():
    array = np.concatenate([[-60000], realistic(290, outliers=False), [60000]]).astype(np.float32)
    rest = squared(array[1:-1], Rows(quantize(array, parse("p6")), slice(1, -1)))
    alone = squared(array[1:-1], quantize(array[1:-1], parse("p6")))
    assert rest < 1.4 * alone  # 62 entries instead of 64


class Rows:
    """Some of what a quantized array gives back."""

    def __init__(self, whole, part):
        self.whole, self.part = whole, part

    def dequantize(self):
        return self.whole.dequantize()[self.part]


def test_tables_of_groups_are_those_of_the_groups_alone():
    array = realistic((6, 5, 3, 3)) * np.float32([1, 1, 5, 5, 9, 9])[:, None, None, None]
    found = quantize(array, parse("p4g2"))
    assert (found.lut.shape, found.group) == ((3, 16), 2)
    for i in range(3):
        alone = quantize(array[2 * i : 2 * i + 2], parse("p4"))
        assert np.array_equal(alone.lut[0], found.lut[i])
        assert np.array_equal(alone.indices, found.indices[2 * i : 2 * i + 2])
    assert squared(array, found) < squared(array, quantize(array, parse("p4")))


def test_importance_draws_entries_to_what_matters():
    array = realistic((8, 40))
    importance = np.zeros((8, 40), np.float32)
    importance[:4] = 1  # the other rows are far off, and do not matter
    array[4:] += 1
    found = quantize(array, parse("p4"), importance)
    alone = squared(array[:4], quantize(array[:4], parse("p4")))
    assert squared(array[:4], Rows(found, slice(4))) == pytest.approx(alone, rel=1e-6)


# --- integers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_are_the_nearest_inside_the_range(name, shape):
    array, form = realistic(shape), parse(name)
    found = quantize(array, form)
    least, greatest = weights._limits(form)
    assert found.values.dtype == np.int8
    assert found.scale.dtype == np.float16
    assert least <= found.values.min() <= found.values.max() <= greatest
    assert (found.zero_point is None) == form.symmetric
    rows = array.reshape(found.scale.size, -1)
    values = found.values.reshape(rows.shape)
    back = found.dequantize().reshape(rows.shape)
    half = found.scale.reshape(-1, 1).astype(np.float32) / 2
    inside = (values > least) & (values < greatest)
    assert (np.abs(rows - back) <= half * 1.0001)[inside].all()


def brute_force(row, bits):
    """The least squared error over two thousand scales."""
    least, greatest = (-127, 127) if bits == 8 else (-8, 7)
    reach = float(np.abs(row).max())
    scales = (reach / np.linspace(greatest * 0.8, greatest * 5, 2000)).astype(np.float16)[:, None]
    scales = scales.astype(np.float64)
    return np.min(np.sum((np.clip(np.rint(row / scales), least, greatest) * scales - row) ** 2, 1))


@pytest.mark.parametrize("name, bits, slack", [("w8", 8, 1.1), ("w4c", 4, 1.05), ("w4", 4, 1.2)])
@pytest.mark.parametrize("outliers", [False, True])
def test_scales_are_near_those_of_brute_force(name, bits, slack, outliers):
    array = realistic((64, 32 if name == "w4" else 288), outliers=outliers)
    found = squared(array, quantize(array, parse(name)))
    assert found <= slack * sum(brute_force(row, bits) for row in array)


def test_scales_are_better_than_the_plain_ones():
    array = realistic((16, 512))
    for name, top in (("w4c", 7), ("w8", 127)):
        scale = np.abs(array).max(1, keepdims=True) / top
        plain = np.sum((np.rint(array / scale) * scale - array) ** 2)
        assert squared(array, quantize(array, parse(name))) <= plain * 1.001


def test_a_zero_point_pays_on_one_sided_weights():
    array = np.abs(realistic((16, 64), outliers=False))
    for name in ("w4", "w8"):
        with_zero = squared(array, quantize(array, parse(name + "a")))
        assert with_zero < 0.5 * squared(array, quantize(array, parse(name)))


def test_a_zero_point_does_not_keep_a_range_from_being_clipped():
    array = realistic((16, 512))
    plain = squared(array, quantize(array, parse("w4c")))
    assert squared(array, quantize(array, parse("w4ca"))) < 1.05 * plain


@pytest.mark.parametrize("most", range(1, 9))
@pytest.mark.parametrize("name, least", [("w4c", -1), ("w4ca", -1), ("w4ca", 0)])
def test_small_whole_multiples_of_a_scale_are_exact(name, least, most):
    rng = np.random.default_rng()
    scale = np.float16(rng.uniform(0.001, 0.01))
    whole = rng.integers(least * most, most, (8, 64))  # for -1: -8..7 at most
    whole[:, 0], whole[:, 1] = least * most, most - 1
    array = (whole * scale.astype(np.float32)).astype(np.float32)
    assert np.array_equal(quantize(array, parse(name)).dequantize(), array)


@pytest.mark.parametrize(
    "name, shape, scales",
    [
        ("w8t", (6, 8, 3, 3), (1, 1, 1, 1)),
        ("w8t", (7,), (1,)),
        ("w8t", (), ()),
        ("w8", (6, 8, 3, 3), (6, 1, 1, 1)),
        ("w8", (7,), (7,)),
        ("w4b4", (6, 8), (6, 2)),
        ("w4b4", (6, 8, 3, 3), (6, 2, 1, 1)),
        ("w4b4a", (6, 8, 3), (6, 2, 1)),
    ],
)
def test_scales_have_the_rank_of_the_weight(name, shape, scales):
    array = realistic(shape)
    found = quantize(array, parse(name))
    assert found.scale.shape == scales
    wide = found.scale.astype(np.float32)
    zero = np.zeros(scales) if found.zero_point is None else found.zero_point
    assert zero.shape == scales
    if len(shape) > 1 and scales[1] > 1:  # what a target does: repeat, then multiply
        wide, zero = (np.repeat(x, shape[1] // scales[1], axis=1) for x in (wide, zero))
    assert np.array_equal((found.values - zero) * wide, found.dequantize())


@pytest.mark.parametrize("name", INTEGERS)
def test_rows_of_zeros_stay_zero_beside_others(name):
    array = realistic((4, 8, 3))
    array[1] = 0
    array[3] = 0
    found = quantize(array, parse(name))
    assert not found.dequantize()[1].any()
    assert np.isfinite(found.scale).all()
    assert (found.scale > 0).all()
    if found.scale.size > 1:
        assert (found.scale[1] == 1).all()


def test_important_values_get_the_scale():
    array = realistic((1, 64), outliers=False)
    array[0, 0] = 1.0  # an outlier that does not matter
    importance = np.ones(64)
    importance[0] = 0
    found = quantize(array, parse("w4c"), importance)
    plain = quantize(array, parse("w4c"))
    assert squared(array[:, 1:], Rows(found, np.s_[:, 1:])) < 0.5 * squared(
        array[:, 1:], Rows(plain, np.s_[:, 1:])
    )


@pytest.mark.parametrize("name", INTEGERS)
def test_pieces_make_no_difference(name, monkeypatch):
    array = realistic((7, 8, 3))
    importance = np.abs(realistic((1, 8, 1)))
    whole = quantize(array, parse(name), importance)
    monkeypatch.setattr(weights, "CHUNK", 50)  # two rows of 24
    pieces = quantize(array, parse(name), importance)
    assert np.array_equal(whole.dequantize(), pieces.dequantize())


def test_what_matters_nowhere_is_quantized_as_if_it_did():
    array = realistic((4, 32))
    for name in ("w4", "w8", "p4g1"):
        found = quantize(array, parse(name), np.zeros((4, 1)))
        assert np.array_equal(found.dequantize(), quantize(array, parse(name)).dequantize())


# --- both ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(SHAPES), st.integers(0, 2**32), st.booleans())
def test_quantizing_what_was_dequantized_is_exact(name, shape, seed, shifted):
    array = realistic(shape, seed) + np.float32(0.03 * shifted)
    once = quantize(array, parse(name)).dequantize()
    assert once.dtype == np.float32
    assert once.shape == shape
    assert np.array_equal(quantize(once, parse(name)).dequantize(), once)


@pytest.mark.parametrize("name", ["p8", "p6", "p4", "p2", "p2g1", "w8", "w8t", "w8ta", "w4c"])
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (31, 1), (1, 33), (7, 31), (3, 33, 3, 3)])
def test_odd_shapes(name, shape):
    array = realistic(shape, outliers=False)
    found = quantize(array, parse(name))
    assert found.dequantize().shape == shape
    floor = {"8": 25, "6": 20, "4": 10, "2": 4}[name[1]]
    assert error(array, found)["snr"] > floor


@pytest.mark.parametrize("name", NAMES)
def test_equal_weights_give_equal_bits(name):
    array = realistic((4, 8, 3, 3))
    a, b = (quantize(x, parse(name)) for x in (array, np.asfortranarray(array)))
    assert all(np.array_equal(vars(a)[field], vars(b)[field]) for field in vars(a))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("p8", 1053 + 2 * 256),
        ("p6", 790 + 2 * 64),  # 1053 * 6 / 8 = 789.75
        ("p4", 527 + 2 * 16),
        ("p2", 264 + 2 * 4),
        ("p4g3", 527 + 2 * 16 * 3),
        ("w8", 1053 + 2 * 9),
        ("w8t", 1053 + 2),
        ("w8a", 1053 + 2 * 9 + 9),
        ("w8b3", 1053 + 2 * 9 * 13),
        ("w4c", 527 + 2 * 9),
        ("w4ca", 527 + 2 * 9 + 5),
        ("w4b3", 527 + 2 * 9 * 13),
        ("w4b3a", 527 + 2 * 9 * 13 + 59),
    ],
)
def test_bytes_are_those_of_the_formula(name, expected):
    assert quantize(realistic((9, 39, 3)), parse(name)).bytes == expected


def test_more_bits_and_finer_scales_lose_less():
    array = realistic((32, 64, 3, 3))
    snr = {name: error(array, quantize(array, parse(name)))["snr"] for name in NAMES}
    assert snr["p2"] < snr["p4"] < snr["p6"] < snr["p8"]
    assert snr["w4c"] < snr["w4b8"] < snr["w4b4"] < snr["w8"]
    assert snr["w8t"] < snr["w8"] < snr["w8b4"]


def test_error_is_what_it_says():
    array = realistic((8, 8))
    found = quantize(array, parse("p2"))
    noise = array - found.dequantize()
    relative = np.linalg.norm(noise.astype(float)) / np.linalg.norm(array.astype(float))
    assert error(array, found)["relative_rms"] == pytest.approx(relative)
    assert error(array, found)["snr"] == pytest.approx(-20 * np.log10(relative))
    zero = np.zeros((2, 2))
    assert error(zero, quantize(zero, parse("w8")))["snr"] == 200


def test_half_and_double_precision_weights_are_taken():
    array = realistic((8, 32)).astype(np.float16)
    for dtype in (np.float16, np.float64):
        found = quantize(array.astype(dtype), parse("w4"))
        assert np.array_equal(found.values, quantize(array, parse("w4")).values)


@pytest.mark.parametrize(
    "shape, name, reason",
    [
        ((320, 320), "w4b48", "320 input values do not divide into blocks of 48"),
        ((8, 4, 3, 3), "w4", "4 input values do not divide into blocks of 32"),
        ((320,), "w4", "1 dimensions have no input values to divide into blocks"),
        ((), "w8", "a single value has no output channels"),
        ((), "p4g2", "a single value does not divide into groups of 2"),
        ((7, 4), "p4g2", "7 output channels do not divide into groups of 2"),
        ((7, 4), "p4", None),
        ((8, 4), "p4g2", None),
        ((7, 96, 3, 3), "w4", None),
        ((7,), "w8", None),
        ((), "w8t", None),
        ((7,), "fp16", None),
    ],
)
def test_what_fits(shape, name, reason):
    assert fits(shape, parse(name)) == reason
    if reason:
        with pytest.raises(ValueError, match=f"^{parse(name)}: {reason}$"):
            quantize(np.ones(shape), parse(name))


BAD = np.ones((2, 32), np.float32)
BAD[0, :3] = np.nan, np.inf, -np.inf
HUGE = np.full((2, 32), 3e38)


@pytest.mark.parametrize(
    "array, name, importance, message",
    [
        (BAD, "p6", None, "3 of 64 weights are NaN or infinite"),
        (BAD, "w4", None, "3 of 64 weights are NaN or infinite"),
        (np.full((2, 2), 1e300), "w8", None, "4 of 4 weights are NaN or infinite"),
        (np.ones((0, 4)), "w8", None, "a weight of shape (0, 4) has no values"),
        (np.ones((4, 4)), "fp16", None, "fp16 is a plain cast: only palettes and integers"),
        (np.full((2, 2), 7e4), "p4", None, "a weight has magnitude 7e+04, a table in fp16 ends"),
        (HUGE, "w4", None, "a scale of 4.286e+37 is needed, fp16 ends at 65504"),
        (np.full((2, 2), 1e7), "w8a", None, None),
        (np.full((2, 2), -1e8), "w8a", None, "a scale of 3.922e+05 is needed, fp16 ends at 65504"),
        (np.ones((2, 2)), "w8", -np.ones(2), "importance holds a value that is negative"),
        (np.ones((2, 2)), "p4", np.full(2, np.nan), "importance holds a value that is negative"),
        (np.ones((2, 2)), "p4", np.ones(3), "importance of shape (3,) does not fit weights (2, 2)"),
    ],
)
def test_bad_weights_are_refused_in_one_line(array, name, importance, message):
    if message is None:
        quantize(array, parse(name), importance)
        return
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        quantize(array, parse(name), importance)
    assert "\n" not in str(caught.value)


def test_extreme_but_finite_weights_are_finite_again():
    for magnitude in (1e-30, 1e-7, 1e-4, 6e4):
        for name in NAMES:
            array = realistic((4, 8))
            array *= np.float32(magnitude) / np.abs(array).max()
            found = quantize(array, parse(name))
            assert isinstance(found, Palette | Integers)
            assert np.isfinite(found.dequantize()).all()
