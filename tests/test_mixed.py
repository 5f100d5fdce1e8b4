"""Rounding that makes up for itself, what it is calibrated with, and the choice of forms."""

import itertools
import json

import numpy as np
import pytest

from ferrotype import bundle as bundles
from ferrotype import kernels
from ferrotype.bundle import Sizes
from ferrotype.quantize import calibrate, mixed, native, report
from ferrotype.quantize.apply import quantize_bundle
from ferrotype.quantize.mixed import Choice, Table
from ferrotype.quantize.recipe import Recipe, RecipeError
from ferrotype.quantize.rounding import Rounder
from ferrotype.runtime.memory import parse_bytes
from ferrotype.runtime.pipeline import EMBEDDED, Pipeline

engine = pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")


@pytest.fixture
def rng():
    return np.random.default_rng()


def correlated(rng, inputs, pixels=400):
    mix = rng.standard_normal((inputs, inputs)) * rng.uniform(0.05, 2, inputs)
    return (rng.standard_normal((pixels, inputs)) @ mix).astype(np.float32)


# --- rounding -----------------------------------------------------------------------------------


def by_hand(rows, scales, second, low, high):
    """GPTQ one input at a time, in float64, with the inverse made anew by elimination."""
    energy = np.diag(second)
    order = np.argsort(-energy, kind="stable")
    matrix = second[np.ix_(order, order)].astype(np.float64)
    matrix[np.diag_indices_from(matrix)] += 0.01 * energy.mean()
    inverse = np.linalg.inv(matrix)
    left, found = rows[:, order].astype(np.float64), np.zeros(rows.shape)
    for i in range(len(order)):
        scale = scales[:, order[i]]
        whole = np.clip(np.rint(left[:, i] / scale), low, high)
        found[:, order[i]] = whole
        error = (left[:, i] - whole * scale) / inverse[i, i]
        left -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return found


@pytest.mark.parametrize("inputs", [1, 2, 16, 63, 64, 65, 150])
def test_rounding_is_gptq(rng, inputs):
    x = correlated(rng, inputs)
    second = (x.T.astype(np.float64)) @ x
    rows = rng.standard_normal((9, inputs)).astype(np.float32)
    scales = rng.uniform(0.1, 0.3, (9, 1)).astype(np.float32).repeat(inputs, 1)
    found = Rounder(second)(rows, scales, -8, 7)
    expected = by_hand(rows, scales, second, -8, 7)
    # a value in the middle between two may go either way, and the others after it
    assert (found == expected).all(1).mean() > 0.5
    assert loss(rows, found * scales, x) == pytest.approx(loss(rows, expected * scales, x), rel=0.1)


def loss(rows, found, x):
    return np.square((rows - found) @ x.T.astype(np.float64)).sum()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rounding_loses_less_of_what_occurs(rng, form):
    x = correlated(rng, 48)
    panel = rng.standard_normal((2, 9, 48, 16)).astype(np.float32)
    rounder = Rounder(x.T.astype(np.float64) @ x)

    def lost(rounder):
        if form == "int8":
            values, scales = native.to_int8(panel, rounder)
            found = values * scales[:, None, None]
        else:
            values, scales = native.to_int4(panel, 32, (48,), rounder)
            found = values * scales.astype(np.float32).repeat([32, 16], 2)
        assert values.min() >= (-127 if form == "int8" else -8)
        assert values.max() <= (127 if form == "int8" else 7)
        rows = (panel - found).transpose(0, 1, 3, 2).reshape(-1, 48)
        return np.square(rows @ x.T).sum()

    assert lost(rounder) < 0.8 * lost(None)


def test_inputs_that_are_always_zero_are_rounded_to_the_nearest(rng):
    x = correlated(rng, 20)
    x[:, 5] = 0
    rows = rng.standard_normal((4, 20)).astype(np.float32)
    found = Rounder(x.T.astype(np.float64) @ x)(rows, np.full((4, 20), 0.2, np.float32), -127, 127)
    assert np.array_equal(found[:, 5], np.rint(rows[:, 5] / np.float32(0.2)))
    nothing = Rounder(np.zeros((20, 20)))(rows, np.full((4, 20), 0.2, np.float32), -127, 127)
    assert np.array_equal(nothing, np.rint(rows / np.float32(0.2)))


def test_groups_of_int4_begin_anew_with_a_source(rng):
    assert native.group_sizes((48, 16, 64), 32) == [32, 16, 16, 32, 32]
    panel = rng.standard_normal((1, 1, 64, 16)).astype(np.float32)
    panel[:, :, 48:] *= 100
    values, scales = native.to_int4(panel, 32, (48, 16))
    assert scales.shape == (1, 1, 3, 16)
    apart, _ = native.to_int4(panel[:, :, :48], 32)
    assert np.array_equal(values[:, :, :48], apart)


# --- calibrating --------------------------------------------------------------------------------


@engine
def test_second_moments_are_of_what_layers_read():
    """The first convolution of the U-Net reads the latents, which are known."""
    bundle = bundles.load(EMBEDDED)
    found = calibrate.calibrate(bundle, ["a red heart"], [3])
    moments = found["unet/conv_in.weight"]
    pipe = Pipeline(bundle)
    seen = []
    pipe._unet = lambda inputs, text: (
        seen.append(inputs["sample"]) or Pipeline._unet(pipe, inputs, text)
    )
    for _ in pipe.steps("a red heart", seed=3):
        pass
    pixels = np.concatenate([s[0].reshape(4, -1).T for s in seen])
    expected = pixels.T @ pixels
    assert moments.count == len(pixels)
    assert np.allclose(moments.second[:4, :4], expected, rtol=0.02, atol=0.02 * expected.max())
    assert not moments.second[4:].any(), "padding"
    assert len(moments.ranges) == len(seen)
    assert moments.ranges == pytest.approx([np.abs(s).max() for s in seen], rel=0.01)
    components = {name.split("/")[0] for name in found}
    assert components == set(bundle.manifest.components)


def test_calibrating_with_nothing_is_refused():
    bundle = bundles.load(EMBEDDED)
    for prompts, seeds in (([], [0]), (["a"], [])):
        with pytest.raises(calibrate.CalibrationError, match="nothing to calibrate with"):
            calibrate.calibrate(bundle, prompts, seeds)
        with pytest.raises(calibrate.CalibrationError, match="nothing to measure with"):
            mixed.measure(bundle, {}, None, prompts, seeds)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (Sizes((128, 128), 32), (128, 128)),
        (Sizes((512, 768), 64), (192, 256)),
        (Sizes((1024, 1024), 32, 512), (512, 512)),
        (Sizes((512, 512), 64, 64, 2048, ((512, 512), (384, 512))), (384, 512)),
    ],
)
def test_measuring_pictures_are_small(sizes, expected):
    assert calibrate.small(sizes) == expected
    sizes.check(expected)


# --- choosing -----------------------------------------------------------------------------------


def table(rng, count, forms=3):
    choices = []
    for i in range(count):
        sizes = sorted(rng.integers(10, 1000, forms).tolist())
        errors = sorted(rng.uniform(0, 1e-4, forms).tolist(), reverse=True)
        names = ("w4", "w8", "fp16")[:forms]
        pairs = zip(names, zip(sizes, errors, strict=True), strict=True)
        choices.append(Choice("unet", (f"layer{i}.weight",), 4096, dict(pairs)))
    return Table("m", "bf16", 500, tuple(choices))


def test_the_choice_is_the_best_of_all(rng):
    for _ in range(20):
        one = table(rng, 6)
        combinations = [*itertools.product(*(c.forms for c in one.choices))]
        sizes = [one.bytes_of(c) for c in combinations]
        quality = [one.psnr_of(c) for c in combinations]
        budget = int(rng.integers(min(sizes), max(sizes) + 1))
        chosen = mixed.within(one, budget)
        best = max(q for q, s in zip(quality, sizes, strict=True) if s <= budget)
        assert one.bytes_of(chosen) <= budget
        assert one.psnr_of(chosen) == pytest.approx(best, abs=1e-9), "sizes are small: exact"
        floor = rng.uniform(min(quality), max(quality))
        met = mixed.at_least(one, floor)
        assert one.psnr_of(met) >= floor
        least = min(s for q, s in zip(quality, sizes, strict=True) if q >= floor)
        assert one.bytes_of(met) <= 1.05 * least + 20


def test_what_cannot_be_met_says_what_can(rng):
    one = table(rng, 4)
    sizes = [one.bytes_of(c) for c in itertools.product(*(c.forms for c in one.choices))]
    with pytest.raises(RecipeError, match="cannot be met: the least is") as refused:
        mixed.within(one, min(sizes) - 1)
    offered = parse_bytes(str(refused.value).rpartition("is ")[2])
    assert one.bytes_of(mixed.within(one, offered)) <= offered
    assert one.bytes_of(mixed.within(one, min(sizes))) == min(sizes)
    best = one.psnr_of([min(c.forms, key=lambda f: c.forms[f][1]) for c in one.choices])
    with pytest.raises(RecipeError, match=f"cannot be met: the best is {best:.1f} dB"):
        mixed.at_least(one, best + 1)


def test_the_frontier_is_the_best_of_every_size(rng):
    one = table(rng, 40)
    curve = mixed.frontier(one)
    sizes, quality = [p["bytes"] for p in curve], [p["psnr"] for p in curve]
    assert sizes == sorted(set(sizes))
    assert quality == sorted(quality)
    least, most = (sum(pick(b for b, _ in c.forms.values()) for c in one.choices)
                   for pick in (min, max))  # fmt: skip
    assert sizes[0] <= 1.01 * (one.rest + least)
    assert sizes[-1] <= one.rest + most
    best = one.psnr_of([min(c.forms, key=lambda f: c.forms[f][1]) for c in one.choices])
    assert quality[-1] == pytest.approx(best, abs=0.5)
    for form, point in mixed.uniform_points(one).items():
        forms = [*mixed.uniform(one, form)]
        assert point["bytes"] == one.bytes_of(forms)
        reached = [q for s, q in zip(sizes, quality, strict=True) if s >= point["bytes"]]
        assert not reached or max(reached) >= point["psnr"]
    plot = report.frontier(curve, mixed.uniform_points(one), sizes[5])
    red = [x for x in range(plot.width) for y in range(plot.height)
           if plot.getpixel((x, y)) == (0xCC, 0x22, 0x22)]  # fmt: skip
    assert red, "what was chosen is marked"


def test_a_table_comes_back_as_it_was(rng):
    one = table(rng, 3)
    assert Table.loads(one.dump()) == one
    for text in ("", "[]", "{}", "null", one.dump().replace("rest", "best")):
        with pytest.raises(ValueError, match="not a table of sensitivities"):
            Table.loads(text)


def test_a_recipe_says_what_was_chosen(rng):
    one = table(rng, 9)
    chosen = ["w4", "w8", "w4", "fp16", "w4", "w4", "w8", "w4", "w4"]
    made = Recipe.loads(mixed.recipe_of(one, chosen).dump())
    assert made.model == "m"
    found = [str(made.choose(c.component, c.sources[0], (c.values, 2))[0]) for c in one.choices]
    assert found == chosen


# --- measuring ----------------------------------------------------------------------------------


@engine
def test_a_mixed_bundle_is_as_large_and_as_good_as_the_table_says(plain, tmp_path):
    source = bundles.load(plain)
    only = "a red heart"
    statistics = calibrate.calibrate(source, [only], [0])
    one = mixed.measure(source, statistics, None, [only], steps=1)
    assert all(c.forms["fp16"][1] == 0 for c in one.choices)
    worse = sum(c.forms["w4"][1] > c.forms["w8"][1] for c in one.choices if "w4" in c.forms)
    assert worse > 0.9 * sum("w4" in c.forms for c in one.choices)
    uniform = [*mixed.uniform(one, "w4")]
    chosen = mixed.within(one, one.bytes_of(uniform))
    assert one.psnr_of(chosen) > one.psnr_of(uniform)
    recipe = mixed.recipe_of(one, chosen)
    made = quantize_bundle(source, tmp_path / "m.ferro", recipe, None, statistics)
    size = sum(f.bytes for n, f in made.manifest.files.items() if n.endswith("weights.bin"))
    assert abs(size - one.bytes_of(chosen)) < 0.02 * size
    assert made.manifest.precision.weights == "mixed"

    def drawn(bundle):
        pipe = Pipeline(bundle)
        *_, last = pipe.steps(only, steps=1)
        return pipe.decode_array(last.latents)

    error = np.mean((drawn(made) - drawn(source)) ** 2)
    assert -10 * np.log10(error) == pytest.approx(one.psnr_of(chosen), abs=8)
    stored = json.loads((tmp_path / "m.ferro" / "unet" / "weights.json").read_text())["tensors"]
    names = {"w4": "int4", "w8": "int8", "fp16": "bf16"}
    for choice, form in zip(one.choices, chosen, strict=True):
        if choice.component == "unet":
            (found,) = (v for k, v in stored.items() if k == name_of(stored, choice))
            assert found["type"] == names[form]


def name_of(stored, choice):
    """The packed tensor of a choice: joined ones are called after their sources."""
    first = choice.sources[0]
    return first if first in stored else next(k for k in stored if k.startswith(first[:-7]))
