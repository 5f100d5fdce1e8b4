"""Core ML packages draw what the original draws: each is saved, read back and run without a Mac."""

import dataclasses
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from ferrotype import bundle as bundles
from ferrotype import parity
from ferrotype.benchmarks.checkpoints import TINY, TINY_SD2, TINY_XL, write_checkpoint
from ferrotype.bundle import BundleError
from ferrotype.convert import (
    ConvertError,
    CoremlOptions,
    attention,
    convert,
    coreml,
    coremltools_fixes,
    mil,
    modules,
    wrappers,
)
from ferrotype.convert.checkpoint import open_checkpoint
from ferrotype.convert.mlprogram import Program, functions, open_part
from ferrotype.quantize.recipe import Recipe
from ferrotype.runtime import check
from ferrotype.runtime.engines import coreml as engine
from ferrotype.runtime.engines import open_engine
from ferrotype.runtime.pipeline import Pipeline

PROMPT = "a red apple on a sky blue background"
MODELS = {"sd1": TINY, "sd2": TINY_SD2, "sdxl": TINY_XL}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Random checkpoints of each family."""
    folder = tmp_path_factory.mktemp("tiny")
    return {name: write_checkpoint(folder / name, configs) for name, configs in MODELS.items()}


@pytest.fixture(scope="session")
def unet(tiny):
    return modules.unet(open_checkpoint(tiny["sd1"]))


@pytest.fixture(scope="session")
def for_phones(trained, tmp_path_factory):
    """The trained model for the Neural Engine: fp16, split-einsum, two chunks."""
    out = tmp_path_factory.mktemp("coreml") / "emoji.ferro"
    return convert(trained, out, "coreml", options=CoremlOptions(chunks=2))


def write(component, module, folder, half=True, weights=None, size=(8, 8), tokens=77, **options):
    """A component as packages, with the names that were made."""
    recipe = weights if isinstance(weights, Recipe) else Recipe.uniform(weights or "fp16")
    peaks, batch = options.pop("peaks", None), options.pop("batch", 1)
    sizes = options.pop("sizes", [size])
    chosen = CoremlOptions(**options)
    shutil.rmtree(folder, ignore_errors=True)
    return coreml.export(
        component, module, {}, folder, sizes, tokens, half, recipe, chosen, batch, peaks
    )


def read(folder, made, inputs, function=None, **how):
    """What the packages of a component return, chunk by chunk."""
    values = dict(inputs)
    for part in made.parts:
        program = Program(folder / part, function)
        values |= program({name: values[name] for name in program.inputs}, **how)
    return values


def latents(size=(8, 8), seed=0, width=32, tokens=77):
    rng = np.random.default_rng(seed)
    shape = (1, 4, size[1], size[0])
    return {
        "sample": rng.standard_normal(shape).astype(np.float32),
        "timestep": np.array([499.0], np.float32),
        "encoder_hidden_states": rng.standard_normal((1, tokens, width)).astype(np.float32),
    }


def in_torch(unet, inputs):
    with torch.no_grad():
        values = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return unet(**values).sample.numpy()


# --- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 7, 511, 512, 513, 1025, 2304])
@pytest.mark.parametrize("heads, size", [(1, 5), (3, 8)])
def test_split_einsum_is_attention_at_every_length(tokens, heads, size):
    """2304 tokens is level 2 of a picture 768 wide, where a known converter loses the last 256."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (2, heads * size, 1, tokens)
    q = torch.randn(shape, generator=generator, dtype=torch.float64)
    k, v = torch.randn((2, *shape[:3], 77), generator=generator, dtype=torch.float64)
    found = attention.split_einsum(q, k, v, heads, 0.3)
    a, b, c = (y.squeeze(2).unflatten(1, (heads, size)).transpose(2, 3) for y in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(a, b, c, scale=0.3)
    expected = expected.transpose(2, 3).flatten(1, 2).unsqueeze(2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [8**-0.5, 0.3])
def test_original_attention_keeps_an_unusual_scale(scale):
    q, k, v = torch.randn((3, 2, 9, 24), dtype=torch.float64)
    found = attention.original(q, k, v, 3, scale)
    a, b, c = (y.unflatten(-1, (3, 8)).transpose(1, 2) for y in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(a, b, c, scale=scale)
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_channels_first_network_is_the_network(tiny, family):
    """Layer norms, linear layers and GEGLU with tokens last, at an odd size."""
    unet = modules.unet(open_checkpoint(tiny[family]))
    wrapper = wrappers.wrap("unet", unet, attention="original")
    attention.use_split_einsum(wrapper)
    width = unet.config.cross_attention_dim
    inputs = latents((9, 6), width=width)
    values = [torch.from_numpy(value) for value in inputs.values()]
    added = {}
    if family == "sdxl":
        pooled = unet.config.projection_class_embeddings_input_dim
        pooled -= 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.randn(1, 6).abs() * 500}
    with torch.no_grad():
        expected = unet(*values, added_cond_kwargs=added).sample
        torch.testing.assert_close(wrapper(*values, *added.values()), expected, rtol=0, atol=1e-4)


def test_a_picture_768_wide_is_complete_in_split_einsum(unet, tmp_path):
    made = write("unet", unet, tmp_path / "unet", half=False, weights="fp32", size=(96, 24))
    inputs = latents((96, 24))
    found = read(tmp_path / "unet", made, inputs)["out_sample"]
    assert found.shape == inputs["sample"].shape
    assert parity.psnr(in_torch(unet, inputs), found) >= 80


# --- whole conversions --------------------------------------------------------------------------


def test_fp16_draws_the_picture(for_phones):
    report = for_phones.manifest.parity
    assert report["picture"]["psnr"] >= 45
    assert for_phones.manifest.options["attention"] == "split-einsum"
    unet = for_phones.component("unet")
    assert unet.parts == ("UnetChunk1.mlpackage", "UnetChunk2.mlpackage")
    assert report["weights"]["unet"] == {"fp16": 98}
    assert bundles.verify(for_phones) == []


def test_8_bits_draw_the_picture_for_apples_runtime_on_ios_16(trained, tmp_path):
    options = CoremlOptions("ios16", layout="apple", attention="original", chunks=2)
    made = convert(trained, tmp_path / "w8.ferro", "coreml", "w8", options=options)
    report = made.manifest.parity
    assert report["picture"]["psnr"] >= 35
    assert report["weights"]["unet"]["w8"] > 80
    assert made.manifest.precision == bundles.Precision("w8", "fp16")
    unet = Program(made.folder / "unet" / "UnetChunk1.mlpackage")
    assert unet.inputs["sample"] == ("float16", (1, 4, 16, 16)), "guidance 1: no second pass"
    both = Program(made.folder / "unet" / "UnetChunk2.mlpackage")
    assert both.outputs == {"noise_pred": ("float32", (1, 4, 16, 16))}
    stored = sum(f.bytes for n, f in made.manifest.files.items() if "Chunk" in n)
    assert stored < 1.2 * 8.9e6, "what ships is compressed, chunks included"


def test_the_smallest_palette_has_a_floor_too(trained, tmp_path):
    made = convert(
        trained, tmp_path / "p4.ferro", "coreml", "p4g16", options=CoremlOptions("ios18")
    )
    floor = made.manifest.parity["floors"]["picture"]
    assert floor == parity.floors("4-bit", "fp16")["picture"]
    assert made.manifest.parity["picture"]["psnr"] >= floor
    assert "first convolution of the network" in made.manifest.parity["not_compressed"]["unet"]


def test_sdxl_with_two_encoders_in_apples_layout(tiny, tmp_path):
    options = CoremlOptions("ios17", layout="apple", chunks=2)
    made = convert(tiny["sdxl"], tmp_path / "xl.ferro", "coreml", options=options)
    assert made.manifest.parity["picture"]["psnr"] >= parity.floors("fp16", "fp16")["picture"]
    names = {name: part.parts for name, part in made.manifest.components.items()}
    assert names == {
        "text_encoder": ("TextEncoder.mlpackage",),
        "text_encoder_2": ("TextEncoder2.mlpackage",),
        "unet": ("UnetChunk1.mlpackage", "UnetChunk2.mlpackage"),
        "vae_decoder": ("VAEDecoder.mlpackage",),
        "vae_encoder": ("VAEEncoder.mlpackage",),
    }
    inputs, outputs = {}, {}
    for name, parts in names.items():
        for part in parts:
            program = Program(made.folder / name / part)
            inputs |= {(name, n): found for n, found in program.inputs.items()}
            outputs |= {(name, n): found for n, found in program.outputs.items()}
    assert inputs["text_encoder", "input_ids"] == ("float32", (1, 77))
    assert outputs["text_encoder", "hidden_embeds"][1] == (1, 77, 32)
    assert outputs["text_encoder_2", "pooled_outputs"][1] == (1, 40)
    assert inputs["unet", "sample"] == ("float16", (2, 4, 8, 8))
    assert inputs["unet", "timestep"] == ("float16", (2,))
    assert inputs["unet", "encoder_hidden_states"][1] == (2, 80, 1, 77)
    assert inputs["unet", "time_ids"][1] == (2, 6)
    assert inputs["unet", "text_embeds"][1] == (2, 40)
    assert outputs["unet", "noise_pred"] == ("float32", (2, 4, 8, 8))
    assert inputs["vae_decoder", "z"][1] == (1, 4, 8, 8)
    assert outputs["vae_decoder", "image"][1] == (1, 3, 64, 64)
    for name in ("vocab.json", "merges.txt"):
        assert (made.folder / "tokenizer" / name).is_file()


def test_a_damaged_weight_is_found_and_its_layer_named(tiny, tmp_path, monkeypatch):
    save = mil.save

    def damaging(program, package, ios):
        save(program, package, ios)
        if package.name == "Unet.mlpackage":
            damage(package, "mid_block_resnets_0_conv1_weight")

    monkeypatch.setattr(mil, "save", damaging)
    with pytest.raises(parity.ParityError) as caught:
        convert(tiny["sd1"], tmp_path / "bad.ferro", "coreml")
    assert "unet out_sample: PSNR" in str(caught.value)
    assert "mid_block.resnets.0.conv1" in str(caught.value)
    assert not list(tmp_path.iterdir())


def damage(package, layer):
    """Turn a weight that is stored as fp16 round: its first value is where its last was."""
    program = Program(package)
    [op] = [op for name, op in program._constants.items() if layer in name]
    size = 2 * np.prod(program.constant(op.outputs[0].name).shape)
    [weights] = package.rglob("weight.bin")
    data = np.memmap(weights, np.uint8, "r+")
    header = int(op.attributes["val"].blobFileValue.offset)
    start = int(data[header + 16 : header + 24].view("<u8")[0])
    data[start : start + size].view(np.uint16)[:] = (
        data[start : start + size].view("<u2")[::-1].copy()
    )
    data.flush()


def test_what_fp16_cannot_hold_is_kept_in_fp32_and_said(tiny, tmp_path, monkeypatch):
    def loud(module):
        seen = original(module)
        return seen if "decoder" not in dict(module.named_children()) else add_peak(seen)

    original = modules.census
    monkeypatch.setattr(modules, "census", loud)
    made = convert(tiny["sd1"], tmp_path / "loud.ferro", "coreml")
    [note] = [n for n in made.manifest.parity["notes"] if "kept in fp32" in n]
    assert note.startswith("vae_decoder: layer decoder.mid_block reaches 1e+05")
    assert made.manifest.parity["weights"]["vae_decoder"].keys() == {"fp32"}
    assert made.manifest.parity["weights"]["vae_encoder"].keys() == {"fp16"}


class add_peak:
    """A census of a VAE in which one layer of the decoder passes fp16's limit."""

    def __init__(self, inner):
        self.inner = inner

    def __enter__(self):
        self.seen = self.inner.__enter__()
        return self.seen

    def __exit__(self, *error):
        self.seen["decoder.mid_block"] = (1e5, 0, 0)
        return self.inner.__exit__(*error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "fp32", "activations": "fp16"}, "weights fp32 need activations fp32"),
        (
            {"weights": "w4"},
            "w4 for text_encoder/embeddings.token_embedding.weight needs --deploym",
        ),
        ({"weights": "p6g16"}, "needs --deployment ios18 or macos15; ios17 reads p2, p4, p6, p8"),
        ({"weights": "q5"}, 'no form "q5"; there is: fp32'),
        ({"sizes": [(64, 64), (64, 128)]}, "2 sizes are functions of one package, which ios17"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(tiny, tmp_path, options, message):
    with pytest.raises(ConvertError) as caught:
        convert(tiny["sd1"], tmp_path / "out.ferro", "coreml", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deployment": "ios15"}, "deployment 'ios15' is not one of ios16"),
        ({"compute_units": "tpu"}, "compute units 'tpu' is not one of all"),
        ({"attention": "flash"}, "attention 'flash' is not one of original, split-einsum"),
        ({"layout": "pear"}, "layout 'pear' is not one of ferrotype, apple"),
        ({"chunks": 0}, "chunks is 0: it must be 1 to 16"),
        ({"chunks": 3, "layout": "apple"}, "Apple's Swift runtime opens one U-Net or two pieces"),
    ],
)
def test_options_know_their_limits(options, message):
    with pytest.raises(ConvertError) as caught:
        CoremlOptions(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("deployment", "units", "form", "ios"),
    [
        ("ios16", "cpu_and_ne", "split-einsum", 16),
        ("ios18", "cpu_and_ne", "split-einsum", 18),
        ("macos13", "cpu_and_gpu", "original", 16),
        ("macos15", "cpu_and_gpu", "original", 18),
    ],
)
def test_the_device_chooses_units_and_attention(deployment, units, form, ios):
    chosen = CoremlOptions(deployment)
    assert (chosen.compute_units, chosen.attention, chosen.ios) == (units, form, ios)
    assert CoremlOptions(deployment, attention="original").attention == "original"


# --- fp16 ---------------------------------------------------------------------------------------


def test_norms_whose_squares_would_overflow_are_scaled(trained, tmp_path):
    """Latents that were not divided by the scaling factor: an activation of 280, squared 80,000."""
    vae = modules.vae(open_checkpoint(trained))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with modules.census(vae) as seen, torch.no_grad():
        expected = vae.decode(x).sample.numpy()
    peaks = {n.removesuffix(" (input)"): v[0] for n, v in seen.items() if n.endswith("(input)")}
    assert max(peaks.values()) > 256
    inputs, quality = {"latent_sample": x.numpy()}, []
    for known in (None, peaks):
        made = write("vae_decoder", vae, tmp_path / "vae", peaks=known, attention="original")
        quality.append(parity.psnr(expected, read(tmp_path / "vae", made, inputs)["sample"]))
    assert quality[0] < 30
    assert quality[1] > 60


def test_what_goes_into_norms_is_seen_and_handed_on(tiny, tmp_path, monkeypatch):
    seen = {}

    def stop(name, *arguments):
        seen[name] = arguments[-1]
        raise KeyboardInterrupt

    monkeypatch.setattr(coreml, "export", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny["sd1"], tmp_path / "out.ferro", "coreml")
    [(layer, peak)] = [p for p in seen["text_encoder"].items() if p[0].endswith("0.layer_norm1")]
    assert not layer.startswith(" ")
    assert peak > 0.1


def test_the_time_step_is_not_rounded_to_fp16(unet, tmp_path):
    made = write("unet", unet, tmp_path / "unet", attention="original")
    found, expected = {}, {}
    for step in (999.0, 999.25, 998.75):
        inputs = latents() | {"timestep": np.array([step], np.float32)}
        found[step] = read(tmp_path / "unet", made, inputs)["out_sample"]
        expected[step] = in_torch(unet, inputs)
        assert parity.psnr(expected[step], found[step]) > 55
    assert not np.array_equal(found[999.0], found[999.25])


@pytest.mark.parametrize("layout", ["ferrotype", "apple"])
def test_large_token_ids_survive(tmp_path, layout):
    """fp16 counts only to 2048, and Apple's token ids are floats."""
    configs = TINY | {"text_encoder": TINY["text_encoder"] | {"vocab_size": 49408}}
    text = modules.text_encoder(open_checkpoint(write_checkpoint(tmp_path / "clip", configs)))
    made = write("text_encoder", text, tmp_path / "out", deployment="ios17", layout=layout)
    ids = np.random.default_rng(0).integers(0, 49408, (1, 77))
    ids[0, :3] = 49407, 2049, 32769
    with torch.no_grad():
        expected = text(torch.from_numpy(ids)).last_hidden_state.numpy()
    given = {"input_ids": ids.astype(np.float32 if layout == "apple" else np.int32)}
    assert parity.psnr(expected, read(tmp_path / "out", made, given)["last_hidden_state"]) > 55


@pytest.mark.parametrize(("layout", "dtype"), [("ferrotype", np.int32), ("apple", np.float32)])
def test_the_engine_feeds_token_ids_exactly(for_phones, layout, dtype):
    manifest = dataclasses.replace(for_phones.manifest, options={"layout": layout})
    fed = {}

    def open_fake(package, function):
        return lambda values: fed.update(values) or {}

    one = engine.CoremlEngine(
        bundles.Bundle(for_phones.folder, manifest), "text_encoder", open_fake
    )
    with pytest.raises(BundleError, match="its packages return no last_hidden_state"):
        one({"input_ids": np.full((1, 32), 49407)})
    assert fed["input_ids"].dtype == dtype
    assert (fed["input_ids"] == 49407).all()


# --- pieces and functions -----------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["fp16", "p4"])
def test_pieces_return_what_the_whole_returns(quick, unet, tmp_path, weights):
    whole = write("unet", unet, tmp_path / "one", weights=weights, deployment="ios18")
    expected = read(tmp_path / "one", whole, latents())["out_sample"]
    for count in (2, 3, 4):
        folder = tmp_path / str(count)
        made = write("unet", unet, folder, weights=weights, deployment="ios18", chunks=count)
        assert len(made.parts) == count
        np.testing.assert_array_equal(read(folder, made, latents())["out_sample"], expected)
        sizes = [bytes_of(folder / part) for part in made.parts]
        assert sum(sizes) < 1.3 * bytes_of(tmp_path / "one" / whole.parts[0])
        assert max(sizes) < 2.2 * sum(sizes) / count


def bytes_of(package):
    return sum(path.stat().st_size for path in package.rglob("weight.bin"))


def test_more_pieces_than_there_is_to_cut_are_refused(tmp_path):
    ct = coremltools_fixes.coremltools()
    builder = ct.converters.mil.Builder

    @builder.program([builder.TensorSpec((1, 4))], opset_version=ct.target.iOS16)
    def program(x):
        return builder.relu(x=x)

    mil.save(program, tmp_path / "relu.mlpackage", 16)
    parts = [tmp_path / f"{i}.mlpackage" for i in range(9)]
    with pytest.raises(ConvertError, match="the network is too small for 9 chunks; ask for fewer"):
        mil.cut(tmp_path / "relu.mlpackage", parts, 16)


def test_sizes_are_functions_that_share_their_weights(tiny, unet, tmp_path):
    sizes, options = [(64, 64), (64, 96)], CoremlOptions("ios18", attention="original")
    one = write("unet", unet, tmp_path / "one", deployment="ios18", attention="original")
    both = convert(tiny["sd1"], tmp_path / "two.ferro", "coreml", sizes=sizes, options=options)
    package = both.folder / "unet" / "Unet.mlpackage"
    assert functions(package) == ["size_8x12", "size_8x8"]
    assert bytes_of(package) < 1.1 * bytes_of(tmp_path / "one" / one.parts[0])
    assert sorted(p.name for p in package.parent.iterdir()) == ["Unet.mlpackage", "config.json"]
    pipe = Pipeline(both, opener=lambda b, name: engine.CoremlEngine(b, name, open_part))
    assert pipe.generate("a boat", steps=1, size=(64, 96)).size == (64, 96)
    with pytest.raises(ValueError, match="draws only 64x64, 64x96"):
        pipe.steps("a boat", size=(96, 64))


@pytest.mark.parametrize("weights", ["fp16", "p6"])
def test_the_same_input_gives_the_same_bytes(quick, unet, tmp_path, weights):
    for name in ("one", "two"):
        write("unet", unet, tmp_path / name, weights=weights, deployment="ios18", chunks=2)
    one, two = (bundles.list_files(tmp_path / name) for name in ("one", "two"))
    assert one == two


# --- fewer bits ---------------------------------------------------------------------------------


FORMS = [("p2", "ios16"), ("p4", "ios17"), ("p6", "ios16"), ("p8", "ios18"), ("p4g8", "ios18"),
         ("w8", "ios16"), ("w8t", "ios17"), ("w8", "ios18"), ("w8a", "ios16"), ("w8a", "ios18"),
         ("w4", "ios18"), ("w4c", "ios18"), ("w4b16a", "ios18")]  # fmt: skip
QUALITY = {"2": 3, "4": 15, "6": 28, "8": 35}  # dB on a random U-Net


@pytest.mark.parametrize("half", [True, False], ids=["fp16", "fp32"])
@pytest.mark.parametrize("form, deployment", FORMS)
def test_every_form_is_stored_and_read(quick, unet, tmp_path, form, deployment, half):
    folder = tmp_path / "unet"
    made = write("unet", unet, folder, half, form, deployment=deployment, attention="original")
    found = read(folder, made, latents())["out_sample"]
    assert parity.psnr(in_torch(unet, latents()), found) >= QUALITY[form[1]]
    assert made.forms[form] >= 18
    options = {"deployment": deployment, "attention": "original"}
    plain = write("unet", unet, tmp_path / "plain", half, "fp16", **options)
    share = bytes_of(folder / made.parts[0]) / bytes_of(tmp_path / "plain" / plain.parts[0])
    assert share < 0.9


@pytest.fixture
def quick(program_of, monkeypatch):
    monkeypatch.setattr(coreml, "_translate", program_of)


@pytest.fixture(scope="module")
def program_of(tmp_path_factory):
    """coreml._translate, which takes seconds, once for each way; then from a saved package."""
    translate, known = coreml._translate, {}
    folder = tmp_path_factory.mktemp("programs")

    def again(component, wrapper, inputs, outputs, half, options, batch):
        key = (component, str(inputs), half, dataclasses.replace(options, chunks=1), batch)
        if key not in known:
            program, names = translate(component, wrapper, inputs, outputs, half, options, batch)
            known[key] = folder / f"{len(known)}.mlpackage", names
            mil.save(program, known[key][0], options.ios)
        package, names = known[key]
        return mil.load(package), names

    return again


def test_a_recipe_decides_by_name_and_a_rule_that_matches_nothing_is_an_error(tiny, unet, tmp_path):
    text = {
        "recipe": 1,
        "default": "w8",
        "rules": [
            {"match": "unet/mid_block.*", "weights": "p4"},
            {"match": "unet/*.attn2.*", "weights": "fp16"},
        ],
    }
    recipe = Recipe.loads(json.dumps(text))
    made = write("unet", unet, tmp_path / "unet", weights=recipe, attention="split-einsum")
    assert made.forms["p4"] >= 2
    assert made.forms["w8"] > made.forms["p4"]
    assert made.kept["rule 2: unet/*.attn2.*"] >= 4
    text["rules"].append({"match": "unet/middle.*", "weights": "p8"})
    with pytest.raises(Exception, match=r"the recipe's pattern 'unet/middle\.\*' is the first"):
        convert(tiny["sd1"], tmp_path / "out.ferro", "coreml", Recipe.loads(json.dumps(text)))


def test_sizes_that_do_not_divide_are_kept_with_the_reason(unet, tmp_path):
    made = write("unet", unet, tmp_path / "unet", weights="w4b24", deployment="ios18")
    assert any("do not divide into blocks of 24" in reason for reason in made.kept)


# --- on a Mac -----------------------------------------------------------------------------------


class FakeCoreml(types.ModuleType):
    """coremltools as it is on a Mac, as far as the engine calls it: our reader predicts."""

    def __init__(self):
        super().__init__("coremltools")
        self.calls = []
        real = coremltools_fixes.coremltools()
        self.ComputeUnit, self.utils = real.ComputeUnit, real.utils
        self.models = types.SimpleNamespace(
            CompiledMLModel=self.load, utils=types.SimpleNamespace(compile_model=self.compile)
        )
        self.compiled = {}

    def compile(self, path):
        self.calls.append(("compile", Path(path).name))
        folder = Path(self.place) / f"{len(self.calls)}.mlmodelc"
        folder.mkdir()
        (folder / "package").write_text(str(path))
        return str(folder)

    def load(self, path, unit, function_name=None):
        self.calls.append(("load", Path(path).name, unit.name, function_name))
        program = Program(Path((Path(path) / "package").read_text()), function_name)
        return types.SimpleNamespace(predict=program)


@pytest.fixture
def mac(monkeypatch, tmp_path):
    fake = FakeCoreml()
    fake.place = tmp_path
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "coremltools", fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake


def test_a_mac_compiles_once_and_draws_the_same_picture(for_phones, mac):
    opened = bundles.load(for_phones.folder)
    expected = Pipeline(opened, opener=lambda b, n: engine.CoremlEngine(b, n, open_part))
    found = Pipeline(opened)
    picture = found.generate(PROMPT, seed=3)
    assert picture.tobytes() == expected.generate(PROMPT, seed=3).tobytes()
    loads = [call for call in mac.calls if call[0] == "load"]
    assert loads[:3] == [
        ("load", "TextEncoder.mlmodelc", "CPU_AND_NE", None),
        ("load", "UnetChunk1.mlmodelc", "CPU_AND_NE", None),
        ("load", "UnetChunk2.mlmodelc", "CPU_AND_NE", None),
    ]
    count = len([call for call in mac.calls if call[0] == "compile"])
    assert count == 4
    Pipeline(opened).generate(PROMPT, seed=3)
    assert len([call for call in mac.calls if call[0] == "compile"]) == count, "compiled are kept"
    cache = engine.cache_folder(opened)
    assert not list(cache.rglob(".*")), "nothing unfinished is left"


def test_a_mac_verifies_on_the_device(for_phones, mac):
    report = check.compare(for_phones)
    assert list(check.problems(report)) == []
    assert report["picture"]["psnr"] >= 45
    assert report["components"].keys() == for_phones.manifest.components.keys()


def test_what_core_ml_refuses_is_one_line(for_phones, mac, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Error computing NN outputs.\nmore")

    mac.models.CompiledMLModel = refuse
    with pytest.raises(BundleError, match=r"^Core ML cannot load .*Error computing NN outputs\.$"):
        open_engine(for_phones, "unet")
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(BundleError, match=r"^a Core ML bundle needs coremltools: pip install"):
        open_engine(for_phones, "unet")


def test_elsewhere_it_says_so(for_phones):
    with pytest.raises(BundleError, match=r"runs on macOS and iOS, not on linux; convert with"):
        Pipeline(for_phones).generate(PROMPT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ()}, "the manifest names no packages of unet"),
        ({"parts": ("UnetChunk1.mlpackage",)}, "its packages return no out_sample"),
        ({"parts": ("UnetChunk3.mlpackage",)}, "UnetChunk3.mlpackage"),
    ],
)
def test_a_manifest_that_does_not_fit_is_one_line(for_phones, change, message):
    part = dataclasses.replace(for_phones.component("unet"), **change)
    parts = for_phones.manifest.components | {"unet": part}
    manifest = dataclasses.replace(for_phones.manifest, components=parts)
    opened = bundles.Bundle(for_phones.folder, manifest)
    inputs = latents((16, 16), width=192, tokens=32) | {"timestep": np.float32(5)}

    def run():
        engine.CoremlEngine(opened, "unet", open_part)(inputs)

    with pytest.raises((BundleError, ConvertError)) as caught:
        run()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- versions -----------------------------------------------------------------------------------


def translated(module, *inputs):
    ct = coremltools_fixes.coremltools()
    with modules.quiet(), mil.silent():
        captured = torch.export.export(module, inputs, strict=False).run_decompositions({})
        return ct.convert(captured, convert_to="milinternal")


def test_alias_is_still_unknown_to_coremltools(monkeypatch):
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    class Alias(torch.nn.Module):
        def forward(self, x):
            return torch.ops.aten.alias(x) + 1

    translated(Alias(), torch.ones(2))
    functions = dict(_TORCH_OPS_REGISTRY.name_to_func_mapping)
    del functions["alias"]
    monkeypatch.setattr(_TORCH_OPS_REGISTRY, "name_to_func_mapping", functions)
    with pytest.raises(Exception, match="alias"):
        translated(Alias(), torch.ones(2))


@pytest.mark.parametrize("value", [[1.0, -65504.0], [70000.0], [-7e4], [np.inf], [np.nan, 7e4], []])
def test_weights_that_overflow_are_found_as_coremltools_finds_them(value):
    kind = coremltools_fixes.coremltools().transform.FP16ComputePrecision
    stored = np.array(value, np.float32)
    const = types.SimpleNamespace(op_type="const", val=types.SimpleNamespace(val=stored))
    var = types.SimpleNamespace(op=const, val=stored, is_tensor_or_scalar_of=lambda dtype: True)
    op = types.SimpleNamespace(inputs={"weight": var, "others": [var]})
    [original] = [c.cell_contents for c in kind.fp16_overflow.__closure__]
    assert "fp16_overflow" in original.__qualname__, "there is nothing to mend any more"
    assert kind.fp16_overflow(op) == original(op)


def test_casts_of_one_element_arrays_still_fail_in_coremltools(monkeypatch):
    from coremltools.converters.mil.frontend.torch import ops

    assert ops._cast.__wrapped__ is not ops._cast
    value = types.SimpleNamespace(
        val=np.array([3]), shape=(1,), can_be_folded_to_const=lambda: True
    )
    context = types.SimpleNamespace(add=lambda *_: None)
    node = types.SimpleNamespace(name="n")
    monkeypatch.setattr(ops, "_get_inputs", lambda *_, **__: [value])
    with pytest.raises(TypeError, match="only 0-dimensional arrays"):
        ops._cast.__wrapped__(context, node, int, "int32")
