"""SDXL base, with two text encoders, draws what diffusers draws; its relatives are refused."""

import dataclasses
import gc
import json
import re
import shutil
import warnings

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from PIL import Image  # noqa: E402

from ferrotype import bundle, kernels, parity  # noqa: E402
from ferrotype.benchmarks.checkpoints import (  # noqa: E402
    SDXL,
    TINY_XL,
    write_checkpoint,
)
from ferrotype.bundle import BundleError, states_of  # noqa: E402
from ferrotype.convert import convert, modules, stages, tokenizer  # noqa: E402
from ferrotype.convert.checkpoint import CheckpointError, open_checkpoint, source_hash  # noqa: E402
from ferrotype.convert.onnx import export  # noqa: E402
from ferrotype.convert.recipe import from_checkpoint  # noqa: E402
from ferrotype.runtime.engines import open_engine  # noqa: E402
from ferrotype.runtime.pipeline import Pipeline, PromptWarning  # noqa: E402
from ferrotype.runtime.tokenizer import Tokenizer  # noqa: E402

PROMPT = "a red apple on a sky blue background!"
STEPS = 4
MODELS = {"zeros": True, "encoded": False}  # what an empty negative prompt is


@pytest.fixture(scope="module", autouse=True)
def no_garbage_collection():
    """The exporter's many small objects make collecting a third of its time."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both kinds of checkpoint, and the bundles made of them: name -> (checkpoint, bundle)."""
    folder = tmp_path_factory.mktemp("xl")
    checkpoints = {name: folder / name for name in MODELS}
    write_checkpoint(checkpoints["zeros"], TINY_XL)
    shutil.copytree(checkpoints["zeros"], checkpoints["encoded"])
    edit(checkpoints["encoded"] / "model_index.json", force_zeros_for_empty_prompt=False)
    one = convert(checkpoints["zeros"], folder / "zeros.ferro")
    recipe, _ = from_checkpoint(open_checkpoint(checkpoints["encoded"]))
    other = dataclasses.replace(one.manifest, recipe=recipe)  # the networks are the same
    bundles = {"zeros": one, "encoded": bundle.Bundle(one.folder, other)}
    return {name: (checkpoints[name], bundles[name]) for name in MODELS}


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the checkpoint to break."""
    return shutil.copytree(made["zeros"][0], tmp_path / "copy")


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def original(folder, seed, kind="StableDiffusionXLPipeline", **options):
    """A picture as diffusers draws it: float32 in [0, 1]."""
    import diffusers

    generator = torch.Generator("cpu").manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(diffusers, kind)
        pipe = kind.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        steps = options.pop("steps", STEPS)
        options |= {"num_inference_steps": steps, "generator": generator, "output_type": "np"}
        return pipe(prompt=PROMPT, **options).images[0]


def ours(made, seed, steps=STEPS, **options):
    pipe = Pipeline(made)
    *_, last = pipe.steps(PROMPT, seed=seed, steps=steps, **options)
    return pipe.decode_array(last.latents)


CASES = {  # model, seed, (width, height), guidance, negative prompt
    "without guidance": ("zeros", 0, (64, 64), 1.0, ""),
    "without guidance, wide": ("encoded", 1234, (120, 72), 1.0, ""),
    "zeros": ("zeros", 1234, (64, 64), 5.0, ""),
    "zeros, tall": ("zeros", 0, (72, 136), 5.0, ""),
    "empty is encoded": ("encoded", 0, (64, 64), 5.0, ""),
    "a negative prompt": ("zeros", 0, (64, 64), 5.0, "a pizza"),
    "a negative prompt, tall": ("encoded", 1234, (72, 136), 5.0, "a pizza"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_draws_what_diffusers_draws(made, case):
    name, seed, (width, height), guidance, negative = CASES[case]
    checkpoint, opened = made[name]
    expected = original(
        checkpoint,
        seed,
        height=height,
        width=width,
        guidance_scale=guidance,
        negative_prompt=negative or None,
    )
    found = ours(opened, seed, size=(width, height), guidance=guidance, negative=negative)
    assert parity.psnr(expected, found, peak=1.0) >= 60


@pytest.fixture(scope="module")
def native(made, tmp_path_factory):
    """Both models for our own engine, in fp32."""
    if not kernels.available():
        pytest.skip("the native engine is not built")
    out = tmp_path_factory.mktemp("native") / "zeros.ferro"
    one = convert(made["zeros"][0], out, "native", "fp32")
    for name, outputs in one.manifest.parity["components"].items():
        assert all(output["psnr"] >= 80 for output in outputs.values()), name
    other = dataclasses.replace(one.manifest, recipe=made["encoded"][1].manifest.recipe)
    return {"zeros": one, "encoded": bundle.Bundle(one.folder, other)}


@pytest.mark.parametrize("case", [c for c in CASES if "wide" not in c])
def test_the_native_engine_draws_what_diffusers_draws(made, native, case):
    name, seed, (width, height), guidance, negative = CASES[case]
    width, height = (16 * round(side / 16) for side in (width, height))
    expected = original(
        made[name][0],
        seed,
        height=height,
        width=width,
        guidance_scale=guidance,
        negative_prompt=negative or None,
    )
    options = {"size": (width, height), "guidance": guidance, "negative": negative}
    assert parity.psnr(expected, ours(native[name], seed, **options), peak=1.0) >= 60


def test_from_a_picture_it_draws_what_diffusers_draws(made):
    checkpoint, opened = made["zeros"]
    start = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    options = {"image": start, "strength": 0.5}
    kind = "StableDiffusionXLImg2ImgPipeline"
    expected = original(checkpoint, 3, kind, guidance_scale=5.0, steps=8, **options)
    found = ours(opened, 3, steps=8, guidance=5.0, **options)
    assert parity.psnr(expected, found, peak=1.0) >= 60


# --- what the bundle holds ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_manifest_describes_both_encoders(made, name):
    manifest = made[name][1].manifest
    assert bundle.verify(made[name][1]) == []
    assert manifest.family == "sdxl"
    assert manifest.recipe.zero_negative == MODELS[name]
    assert {n: t.pad_token for n, t in manifest.tokenizers.items()} == {
        "tokenizer": "<|endoftext|>",
        "tokenizer_2": "!",
    }
    parts = manifest.components
    assert list(parts["text_encoder"].outputs) == ["hidden_states.2"]
    assert list(parts["text_encoder_2"].outputs) == ["hidden_states.1", "text_embeds"]
    assert list(parts["unet"].inputs) == [
        "sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"
    ]  # fmt: skip
    assert parts["unet"].inputs["time_ids"] == bundle.Tensor("float32", ("batch", 6))
    assert manifest.parity["components"].keys() == manifest.parity["census"].keys() == parts.keys()


def test_the_graphs_are_valid_and_compute_only_the_layers_that_are_read(made):
    opened = made["zeros"][1]
    for name in opened.manifest.components:
        onnx.checker.check_model(str(opened.path(name) / "model.onnx"), full_check=True)
    for name, layers, last in (("text_encoder", "01", False), ("text_encoder_2", "01", True)):
        graph = onnx.load(opened.path(name) / "model.onnx", load_external_data=False).graph
        names = " ".join(item.name for item in (*graph.node, *graph.initializer))
        assert set(re.findall(r"layers\.(\d)\.", names)) == set(layers)
        assert ("final_layer_norm" in names) == ("text_projection" in names) == last


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_the_graphs_return_every_state_for_optimums_pipelines(made, name):
    """They take hidden_states.i before every layer, and of what is left the first for pooled."""
    import onnxruntime

    checkpoint, opened = made["zeros"]
    module = getattr(modules, name)(open_checkpoint(checkpoint))
    ids = Tokenizer(opened, "tokenizer")(PROMPT).ids
    session = onnxruntime.InferenceSession(opened.path(name) / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"input_ids": ids}), strict=True))
    with torch.no_grad():
        expected = module(torch.from_numpy(ids)).hidden_states
    for i in range(module.config.num_hidden_layers):
        assert parity.psnr(expected[i].numpy(), found.pop(f"hidden_states.{i}")) > 80
    (left,) = found.values()
    assert left.shape == ((1, 40) if name == "text_encoder_2" else (1, 77, 32))
    assert len(opened.component(name).outputs) == (2 if name == "text_encoder_2" else 1)


def test_both_tokenizers_encode_as_transformers_does(made):
    """Padding with "!" makes it a token of its own: "apple!" is split there, unlike elsewhere."""
    checkpoint, opened = made["zeros"]
    ids = {}
    for kind in ("tokenizer", "tokenizer_2"):
        source, encode = tokenizer.original(checkpoint / kind), Tokenizer(opened, kind)
        for prompt in ("", PROMPT, "!", "what a fish!!! cried he, 3!x", "a fish " * 60):
            ids[kind, prompt] = encode(prompt).ids
            expected = tokenizer.original_ids(source, prompt, 77)
            assert np.array_equal(ids[kind, prompt], expected), (kind, prompt)
    assert (ids["tokenizer", ""][0, 2:] == 2047).all()
    assert (ids["tokenizer_2", ""][0, 2:] == 0).all()
    assert not np.array_equal(ids["tokenizer", "!"][0, :3], ids["tokenizer_2", "!"][0, :3])


def test_a_run_loads_what_it_says_and_keeps_both_texts(made, monkeypatch):
    opened, loaded = made["zeros"][1], []
    run = Pipeline._run
    monkeypatch.setattr(
        Pipeline, "_run", lambda self, n, *rest: loaded.append(n) or run(self, n, *rest)
    )
    pipe = Pipeline(opened)
    list(pipe.steps(PROMPT, steps=2, guidance=5.0))
    list(pipe.steps(PROMPT, steps=1, guidance=1.0))
    assert loaded == ["text_encoder", "text_encoder_2"] + ["unet"] * 5
    text = pipe.encode(PROMPT)
    assert (text.states.shape, text.pooled.shape) == ((1, 77, 80), (1, 40))
    from ferrotype.runtime import samplers

    table = samplers.table(pipe.recipe(steps=2), None)
    runs = [(stage.component, stage.runs) for stage in pipe.plan(table, 5.0).stages]
    assert runs == [("text_encoder", 1), ("text_encoder_2", 1), ("unet", 4), ("vae_decoder", 1)]
    runs = Pipeline(made["encoded"][1]).plan(table, 5.0).stages
    assert [stage.runs for stage in runs] == [2, 2, 4, 1]


def test_a_long_prompt_is_told_once(made, monkeypatch):
    monkeypatch.setattr(Pipeline, "_reads_chunks", False)  # as where the text's length is fixed
    with pytest.warns(PromptWarning) as told:
        Pipeline(made["zeros"][1]).encode("a red apple " * 30)
    assert len(told) == 1


# --- fp16 ---------------------------------------------------------------------------------------


def test_fp16_activations_convert_and_the_size_stays_float32(made, tmp_path):
    told = []
    options = {"weights": "fp16", "activations": "fp16", "sizes": [(64, 48)]}
    half = convert(made["encoded"][0], tmp_path / "half.ferro", progress=told.append, **options)
    assert len(told) == stages(2)
    parts = half.manifest.components
    assert parts["unet"].inputs["text_embeds"].dtype == "float16"
    assert parts["unet"].inputs["time_ids"].dtype == "float32"
    assert parts["text_encoder_2"].outputs["text_embeds"].dtype == "float16"
    expected = ours(made["encoded"][1], 0, size=(64, 48), guidance=5.0)
    assert parity.psnr(expected, ours(half, 0, guidance=5.0), peak=1.0) >= 35
    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.standard_normal((1, 4, 6, 8), np.float32),
        "timestep": np.array(501.25, np.float32),
        "encoder_hidden_states": rng.standard_normal((1, 77, 80), np.float32),
        "text_embeds": rng.standard_normal((1, 40), np.float32),
    }
    exact, close = open_engine(made["zeros"][1], "unet"), open_engine(half, "unet")
    one, other = (
        {**inputs, "time_ids": np.array([[h, 4095, 0, 0, h, 4095]], np.float32)}
        for h in (4093, 4094)  # one number in float16
    )
    for feed in (one, other):
        assert parity.psnr(exact(feed)["out_sample"], close(feed)["out_sample"]) > 50
    assert parity.psnr(close(one)["out_sample"], close(other)["out_sample"]) < 50


# --- what is refused ----------------------------------------------------------------------------


def refused(call, *args, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        call(*args)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_the_family_is_sdxl_and_both_encoders_are_hashed(folder):
    checkpoint = open_checkpoint(folder)
    assert checkpoint.family == "sdxl"
    assert list(checkpoint.configs) == ["text_encoder", "text_encoder_2", "unet", "vae"]
    before = source_hash(checkpoint)
    for path in ("text_encoder_2/config.json", "tokenizer_2/vocab.json"):
        edit(folder / path, more=1)
        after = source_hash(open_checkpoint(folder))
        assert after != before
        before = after
    weights = folder / "text_encoder_2" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert source_hash(open_checkpoint(folder)) != before


def test_the_image_pipeline_is_the_same_model(folder):
    edit(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    assert open_checkpoint(folder).family == "sdxl"


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        (
            "model_index.json",
            {
                "_class_name": "StableDiffusionXLImg2ImgPipeline",
                "text_encoder": [None, None],
                "tokenizer": [None, None],
                "requires_aesthetics_score": True,
            },
            "that is the SDXL refiner, which is not supported; give the base model",
        ),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLInpaintPipeline"},
            "StableDiffusionXLInpaintPipeline is not supported",
        ),
        (
            "model_index.json",
            {"text_encoder_2": ["transformers", "T5EncoderModel"]},
            "text_encoder_2 is T5EncoderModel; only CLIPTextModelWithProjection",
        ),
        (
            "unet/config.json",
            {"projection_class_embeddings_input_dim": 80},
            "88 in all, are supported (the refiner has 5 time ids)",
        ),
        ("unet/config.json", {"addition_embed_type": None}, "SDXL has 'text_time'"),
        ("unet/config.json", {"addition_embed_type": "image"}, "only None and 'text_time'"),
        ("unet/config.json", {"addition_time_embed_dim": None}, "time ids of 0"),
        ("unet/config.json", {"in_channels": 9}, "9 is inpainting"),
        ("vae/config.json", {"latents_mean": [0.1] * 4}, "vae: latents_mean is [0.1"),
    ],
)
def test_relatives_are_refused_by_name(folder, file, fields, said):
    edit(folder / file, **fields)
    assert said in refused(open_checkpoint, folder)


@pytest.mark.parametrize(
    "path", ["text_encoder_2/model.safetensors", "text_encoder_2/config.json", "tokenizer_2"]
)
def test_a_missing_part_of_the_second_encoder_is_named(folder, path):
    (shutil.rmtree if (folder / path).is_dir() else type(folder).unlink)(folder / path)
    assert path.split("/")[0] in refused(open_checkpoint, folder)


def test_weights_of_another_encoder_are_refused(folder):
    shutil.copyfile(*(folder / n / "model.safetensors" for n in ("text_encoder", "text_encoder_2")))
    said = refused(modules.text_encoder_2, open_checkpoint(folder))
    assert "text_encoder_2: 1 missing weights (text_projection.weight)" in said


def rewritten(made, **changes):
    """The text of a manifest with changes, each a function of one component's fields."""
    raw = json.loads((made["zeros"][1].folder / "manifest.json").read_text())
    for name, change in changes.items():
        change(raw["components"][name])
    return json.dumps(raw)


STATES = {"dtype": "float32", "shape": ["batch", 77, 48]}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("unet", lambda c: c["inputs"]["time_ids"].update(shape=["batch", 5]), "not of 6 numbers"),
        ("text_encoder_2", lambda c: c["outputs"].pop("text_embeds"), "no text_embeds of 2"),
        ("text_encoder_2", lambda c: c["outputs"].pop("hidden_states.1"), "hidden_states.K"),
        ("text_encoder_2", lambda c: c["outputs"].update(last_hidden_state=STATES), "one hidden_"),
        (
            "text_encoder",
            lambda c: c["outputs"]["hidden_states.2"].update(shape=[77, 32]),
            "no hidden_states.2 of 3 dimensions",
        ),
    ],
)
def test_a_manifest_that_no_host_could_draw_with_is_refused(made, name, change, said):
    assert said in refused(bundle.loads, rewritten(made, **{name: change}), kind=BundleError)


def test_a_unet_that_needs_pooled_text_needs_its_encoder(made):
    raw = json.loads(rewritten(made))
    del raw["components"]["text_encoder_2"]
    assert "no text_encoder_2, which the unet" in refused(
        bundle.loads, json.dumps(raw), kind=BundleError
    )


def test_the_states_are_the_only_output_that_is_named_so():
    assert states_of({"pooler_output": 1, "last_hidden_state": 2}) == "last_hidden_state"
    assert states_of(["text_embeds", "hidden_states.31"]) == "hidden_states.31"
    assert states_of(["hidden_states.31x", "text_embeds"]) == ""
    assert states_of(["hidden_states.0", "hidden_states.1"]) == ""


# --- full size ----------------------------------------------------------------------------------


def test_the_full_architecture_has_the_published_sizes():
    """Parameters of SDXL base 1.0, counted without memory."""
    import diffusers
    import transformers

    with torch.device("meta"), modules.quiet():
        unet = diffusers.UNet2DConditionModel.from_config(SDXL["unet"])
        config = transformers.CLIPTextConfig(**SDXL["text_encoder_2"])
        text = transformers.CLIPTextModelWithProjection(config)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(unet) == 2_567_463_684
    assert count(text) == 694_659_840


def test_a_unet_with_embedded_guidance_takes_it_last(tmp_path):
    """As LCM-SDXL's: text_embeds and time_ids, then timestep_cond."""
    import diffusers

    torch.manual_seed(0)
    with modules.quiet():
        config = TINY_XL["unet"] | {"time_cond_proj_dim": 6}
        unet = diffusers.UNet2DConditionModel(**config).eval().requires_grad_(False)
    said = export("unet", unet, {}, tmp_path)
    assert list(said["inputs"])[2:] == [
        "encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond"
    ]  # fmt: skip
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    sizes = {"batch": 3, "height": 5, "width": 7, "sequence": 9}
    rng = np.random.default_rng(0)
    feed = {
        name: np.asarray(rng.standard_normal([sizes.get(n, n) for n in t["shape"]]), np.float32)
        for name, t in said["inputs"].items()
    }
    feed["timestep"] = np.array(501.25, np.float32)
    feed["time_ids"] = np.asarray(rng.integers(0, 2000, (3, 6)), np.float32)
    x = {name: torch.from_numpy(value) for name, value in feed.items()}
    added = {name: x.pop(name) for name in ("text_embeds", "time_ids")}
    expected = unet(**x, added_cond_kwargs=added).sample.numpy()
    assert parity.psnr(expected, session.run(None, feed)[0]) > 100
