"""Weighted and long prompts and clip skip give the embeddings that torch, diffusers, compel give.

Weights and chunks are AUTOMATIC1111's and of diffusers' long prompt weighting pipeline: the
reference here is the formula in torch, from spans written down by hand.
"""

import dataclasses
import gc
import warnings

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrotype import cli
from ferrotype.runtime import plan as plans
from ferrotype.runtime import prompts
from ferrotype.runtime.engines.native import NativeEngine
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX, Pipeline, PromptWarning
from ferrotype.runtime.prompts import Span, parse
from ferrotype.runtime.tokenizer import Tokenizer

LONG = ", ".join(f"{n} red apples on {n + 1} blue plates" for n in range(15))  # 3 chunks

# --- the syntax ---------------------------------------------------------------------------------

WRITTEN = [  # prompt, sections of (text, weight); the first eight are A1111's own examples
    ("normal text", [[("normal text", 1)]]),
    ("an (important) word", [[("an ", 1), ("important", 1.1), (" word", 1)]]),
    ("(unbalanced", [[("unbalanced", 1.1)]]),
    (r"\(literal\]", [[("(literal]", 1)]]),
    ("(unnecessary)(parens)", [[("unnecessaryparens", 1.1)]]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [[("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55),
          (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)]],
    ),
    ("(hi:-2.5)", [[("hi", -2.5)]]),
    ("[[less]]", [[("less", 1 / 1.21)]]),
    ("unopened) and]", [[("unopened) and]", 1)]]),
    ("a :1.2) b", [[("a :1.2) b", 1)]]),
    ("(ratio 3: two)", [[("ratio 3: two", 1.1)]]),
    ("(not a number:1.2.3)", [[("not a number:1.2.3", 1.1)]]),
    ("(blanks : 1.5 )", [[("blanks ", 1.5)]]),
    ("(.5:.5)(5:5.)", [[(".5", 0.5), ("5", 5)]]),
    (r"a \\ b \x \(", [[("a \\ b x (", 1)]]),
    ("ends in \\", [[("ends in ", 1)]]),
    ("[round (inside] it)", [[("round ", 1 / 1.1), ("inside", 1), (" it", 1.1)]]),
    ("one BREAK two", [[("one ", 1)], [(" two", 1)]]),
    ("(one BREAK two:1.2) BREAKs", [[("one ", 1.2)], [(" two", 1.2), (" BREAKs", 1)]]),
    (r"\BREAK", [[("BREAK", 1)]]),
    ("", [[]]),
    ("()", [[]]),
    ("(:1.2)", [[]]),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "sections"), WRITTEN, ids=[p for p, _ in WRITTEN])
def test_brackets_are_read_as_users_expect(prompt, sections):
    found = parse(prompt)
    assert [[text for text, _ in s] for s in found] == [[text for text, _ in s] for s in sections]
    weights = [w for section in found for _, w in section]
    expected = [w for section in sections for _, w in section]
    assert weights == pytest.approx(expected)


@settings(deadline=None)
@given(st.text())
def test_an_escaped_prompt_is_that_text(text):
    assert parse(prompts.escape(text)) == [[Span(text, 1.0)] if text else []]


@settings(deadline=None)
@given(st.text("ab ()[]:1.\\BREAK"))
def test_any_text_is_read_or_its_weight_refused(text):
    try:
        found = parse(text)
    except ValueError as error:
        refused = str(error)
        found = [[Span("", 0.0)]]
    else:
        refused = ""
    assert len(found) >= 1
    assert refused.startswith("weight ") or not refused
    assert all(abs(weight) <= 100 for section in found for _, weight in section)
    assert len("".join(t for section in found for t, _ in section)) <= len(text)


@pytest.mark.parametrize(
    "prompt", ["(word:101)", "(word:-1000)", "(" * 60 + "word", f"(a:{9**400})"]
)
def test_a_weight_beyond_reason_is_refused_before_anything_is_loaded(prompt):
    pipe = Pipeline.load()
    with pytest.raises(ValueError, match=r"in the prompt: it must be from -100 to 100"):
        pipe.steps(prompt)
    assert not pipe._engines
    with pytest.raises(ValueError, match="weight"):
        pipe.steps("a pizza", negative=prompt, guidance=3)


def test_weights_multiply_and_the_mean_is_restored_where_it_means_something():
    rng = np.random.default_rng()
    states = rng.standard_normal((1, 9, 40)).astype(np.float32)
    states[:, :, 0] += 20 * np.sign(rng.standard_normal())  # as CLIP's one large channel
    assert prompts.weigh(states, np.ones((1, 9), np.float32), restore=True) is states
    weights = np.ones((1, 9), np.float32)
    weights[0, 2:5] = 1.5, 0.5, 2
    product = states * weights[..., None]
    np.testing.assert_array_equal(prompts.weigh(states, weights, restore=False), product)
    restored = prompts.weigh(states, weights, restore=True)
    assert restored.mean() == pytest.approx(states.mean(), rel=1e-5)
    np.testing.assert_allclose(restored, product * (states.mean() / product.mean()), rtol=1e-5)
    even = states - states.mean(axis=-1, keepdims=True)  # a norm's output: its mean is rounding
    np.testing.assert_array_equal(
        prompts.weigh(even, weights, restore=True), even * weights[..., None]
    )


# --- the embeddings -----------------------------------------------------------------------------

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from ferrotype.benchmarks.checkpoints import TINY, TINY_XL, write_checkpoint  # noqa: E402
from ferrotype.convert import OptionError, convert  # noqa: E402

DEEP = {"num_hidden_layers": 4}
CONFIGS = {
    "sd": TINY | {"text_encoder": TINY["text_encoder"] | DEEP},
    "sdxl": TINY_XL | {
        "text_encoder": TINY_XL["text_encoder"] | DEEP,
        "text_encoder_2": TINY_XL["text_encoder_2"] | DEEP,
    },
}  # fmt: skip
SKIPS = {"sd": 1, "sdxl": 2, "onnx": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints and pipelines of bundles made with clip skip: name -> (folder, Pipeline)."""
    gc.disable()  # the exporter's many small objects make collecting a third of its time
    folder = tmp_path_factory.mktemp("prompts")
    checkpoints = {n: write_checkpoint(folder / n, c, torch.float32) for n, c in CONFIGS.items()}
    shift_mean(checkpoints["sd"] / "text_encoder" / "model.safetensors")
    bundles = {}
    for name, skip in SKIPS.items():
        checkpoint = checkpoints["sdxl" if name == "sdxl" else "sd"]
        target = "onnx" if name == "onnx" else "native"
        bundle = convert(
            checkpoint, folder / f"{name}.ferro", target, "fp32", "fp32", [(64, 64)],
            clip_skip=skip,
        )  # fmt: skip
        bundles[name] = checkpoint, Pipeline(bundle, resident=True)
    gc.enable()
    return bundles


def shift_mean(path):
    """Make the states' mean differ from zero, as that of a trained encoder does."""
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("final_layer_norm.bias"))
    tensors[name] = tensors[name] + np.random.default_rng().uniform(0.2, 0.5)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)


@pytest.fixture(scope="module")
def diffusers_pipes(made):
    import diffusers

    kinds = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipes = {
            name: kind.from_pretrained(
                made[name][0], local_files_only=True, safety_checker=None, feature_extractor=None,
                **({"requires_safety_checker": False} if name == "sd" else {}),
            )
            for name, kind in kinds.items()
        }  # fmt: skip
    for pipe in pipes.values():
        for name in ("tokenizer", "tokenizer_2"):
            if hasattr(pipe, name):  # the embedded model's, which reads fewer
                getattr(pipe, name).model_max_length = 77
    encoder = pipes["sd"].text_encoder
    if not hasattr(encoder, "text_model"):  # transformers 5 dropped what diffusers asks for
        object.__setattr__(encoder, "text_model", encoder)
    return pipes


def framed(tokenizer, tokens):
    """A chunk: start, tokens, end, and padding up to what the text encoder reads."""
    ids = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (77 - len(ids))


@torch.no_grad()
def states_of(encoder, ids, skip, xl):
    """What the U-Net reads, as diffusers takes it: normed for SD, not for SDXL; and the pooled."""
    out = encoder(torch.tensor([ids]), output_hidden_states=True)
    hidden = out.hidden_states[-(skip + 1 + xl)]
    if xl:
        return hidden, getattr(out, "text_embeds", None)
    clip = getattr(encoder, "text_model", encoder)
    return clip.final_layer_norm(hidden), None


def weighted(pipe, spans, skip, xl, chunks=None, breaks=()):
    """The formula: chunks of 75 tokens, states times weights, but for SDXL the mean restored."""
    encoders = [(pipe.tokenizer, pipe.text_encoder)]
    encoders += [(pipe.tokenizer_2, pipe.text_encoder_2)] if xl else []
    columns, pooled = [], None
    for tokenizer, encoder in encoders:
        tokens, weights = [], []
        for i, (text, weight) in enumerate(spans):
            if i in breaks:
                fill = -len(tokens) % 75
                tokens += [tokenizer.eos_token_id] * fill
                weights += [1.0] * fill
            ids = tokenizer(text).input_ids[1:-1]
            tokens += ids
            weights += [weight] * len(ids)
        count = max(1, -(-len(tokens) // 75), chunks or 1)
        parts, scales = [], []
        for at in range(0, 75 * count, 75):
            states, first = states_of(encoder, framed(tokenizer, tokens[at : at + 75]), skip, xl)
            pooled = first if at == 0 else pooled
            parts.append(states)
            scale = [1.0, *weights[at : at + 75]]
            scales += scale + [1.0] * (77 - len(scale))
        states = torch.cat(parts, dim=1)
        scaled = states * torch.tensor(scales)[None, :, None]
        columns.append(scaled if xl else scaled * (states.mean() / scaled.mean()))
    return torch.cat(columns, dim=-1).numpy(), pooled


def agree(found, expected, limit=2e-5):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


CASES = {  # prompt, its spans
    "plain": ("a red apple", [("a red apple", 1)]),
    "weights": (
        "a (red:1.4) apple, [[blue]] (plate)",
        [("a ", 1), ("red", 1.4), (" apple, ", 1), ("blue", 1 / 1.21), (" ", 1), ("plate", 1.1)],
    ),
    "negative weight": ("(red:-0.5) apple", [("red", -0.5), (" apple", 1)]),
    "long": (LONG, [(LONG, 1)]),
    "long and weights": (f"(a pizza:1.7), {LONG}, (the end)",
                         [("a pizza", 1.7), (f", {LONG}, ", 1), ("the end", 1.1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", ["sd", "onnx", "sdxl"])
@pytest.mark.parametrize("case", CASES)
def test_embeddings_are_those_of_the_formula(made, diffusers_pipes, name, case):
    prompt, spans = CASES[case]
    xl = name == "sdxl"
    theirs = diffusers_pipes["sdxl" if xl else "sd"]
    states, pooled = weighted(theirs, spans, SKIPS[name], xl)
    found = made[name][1].encode(prompt)
    assert found.states.shape[1] == 77 * (3 if "long" in case else 1)
    agree(found.states, states)
    if xl:
        agree(found.pooled, pooled.numpy())


def test_break_fills_a_chunk_and_begins_another(made, diffusers_pipes):
    """Filled with end tokens, as the padding of this tokenizer is."""
    states, _ = weighted(
        diffusers_pipes["sd"], [("a (red", 1), (" apple", 1.1), (" on a plate", 1.1)], 1, False,
        breaks=(2,),
    )  # fmt: skip
    found = made["sd"][1].encode(r"a \(red( apple BREAK on a plate)")
    agree(found.states, states)


def test_a_prompt_beside_a_longer_one_is_filled_up_with_empty_chunks(made, diffusers_pipes):
    spans = [("a ", 1), ("red", 1.3), (" apple", 1)]
    states, _ = weighted(diffusers_pipes["sd"], spans, 1, False, chunks=3)
    agree(made["sd"][1].encode("a (red:1.3) apple", 3).states, states)


@pytest.mark.parametrize("name", ["sd", "onnx", "sdxl"])
def test_clip_skip_is_diffusers_clip_skip(made, diffusers_pipes, name):
    xl = name == "sdxl"
    theirs = diffusers_pipes["sdxl" if xl else "sd"]
    with torch.no_grad():
        options = {
            "device": "cpu",
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }
        encoded = theirs.encode_prompt("a red apple", clip_skip=SKIPS[name], **options)
        without = theirs.encode_prompt("a red apple", **options)
    found = made[name][1].encode("a red apple")
    agree(found.states, encoded[0].numpy())
    if xl:
        agree(found.pooled, encoded[2].numpy())
    assert np.abs(found.states - without[0].numpy()).max() > 0.01


def test_layers_that_are_skipped_are_not_in_the_bundle(made):
    parts = {n: made[n][1].manifest.components["text_encoder"] for n in ("sd", "onnx")}
    assert [part.config["num_hidden_layers"] for part in parts.values()] == [3, 3]
    index = made["sd"][1].bundle.path("text_encoder/weights.json").read_text()
    assert ".layers.2." in index
    assert ".layers.3." not in index
    assert made["sd"][1].manifest.options == {"clip_skip": "1"}
    second = made["sdxl"][1].manifest.components["text_encoder_2"]
    assert set(second.outputs) == {"hidden_states.1", "text_embeds"}


@pytest.mark.parametrize(("name", "skip"), [("sd", 4), ("sdxl", 3), ("sd", -1)])
def test_skipping_too_many_layers_is_refused(made, tmp_path, name, skip):
    limit = 2 if name == "sdxl" else 3
    with pytest.raises(OptionError, match=f"has 4 layers, it must be 0 to {limit}"):
        convert(made[name][0], tmp_path / "x.ferro", "native", clip_skip=skip)


def test_pictures_of_long_weighted_prompts_are_diffusers(made, diffusers_pipes):
    """Two passes, a short negative prompt beside a long one, through the whole pipeline."""
    theirs = diffusers_pipes["sd"]
    spans = [("a pizza", 1.7), (f", {LONG}", 1)]
    positive, _ = weighted(theirs, spans, 1, False)
    negative, _ = weighted(theirs, [("blurry", 1.2)], 1, False, chunks=3)
    import diffusers

    theirs.scheduler = diffusers.DDIMScheduler.from_config(
        theirs.scheduler.config, timestep_spacing="trailing", clip_sample=False,
        set_alpha_to_one=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    with torch.no_grad():
        latents = theirs(
            prompt_embeds=torch.from_numpy(positive),
            negative_prompt_embeds=torch.from_numpy(negative),
            num_inference_steps=3, guidance_scale=4.0, output_type="latent", height=64, width=64,
            generator=torch.Generator("cpu").manual_seed(5),
        ).images.numpy()  # fmt: skip
    for name in ("sd", "onnx"):
        *_, last = made[name][1].steps(
            f"(a pizza:1.7), {LONG}", negative="(blurry:1.2)", steps=3, guidance=4.0, seed=5,
            sampler="ddim", force=True,
        )  # fmt: skip
        agree(last.latents, latents, 1e-4)


def test_compel_agrees_on_plain_and_long_prompts(made, diffusers_pipes):
    """Its weights are another convention; without any, and cut like ours, its states are ours."""
    compel = pytest.importorskip("compel")
    from compel.embeddings_provider import SplitLongTextMode

    pipe = diffusers_pipes["sd"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        kind = compel.ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NORMALIZED  # clip skip 1
        other = compel.Compel(
            pipe.tokenizer, pipe.text_encoder, truncate_long_prompts=False,
            returned_embeddings_type=kind, split_long_text_mode=SplitLongTextMode.BRUTAL,
        )  # fmt: skip
        plain = LONG.replace(",", "")
        expected = [other(text).numpy() for text in ("a red apple", plain)]
    assert expected[1].shape[1] > 77
    for text, states in zip(("a red apple", plain), expected, strict=True):
        agree(made["sd"][1].encode(text).states, states)


# --- tokens, limits and memory ------------------------------------------------------------------


def test_chunks_hold_transformers_tokens_and_their_weights(made, diffusers_pipes):
    tokenizer = diffusers_pipes["sd"].tokenizer
    ours = Tokenizer(made["sd"][1].bundle)
    whole = tokenizer(LONG).input_ids[1:-1]
    found = ours.chunks(LONG, 99)
    rows = [framed(tokenizer, whole[at : at + 75]) for at in range(0, len(whole), 75)]
    assert found.ids.tolist() == rows
    assert len(rows) == 3
    assert not found.dropped
    assert (found.weights == 1).all()
    plain = tokenizer(
        "a (red:2)", padding="max_length", truncation=True, max_length=77
    ).input_ids  # fmt: skip
    assert ours("a (red:2)").ids.tolist() == [plain], "as it is"
    assert ours.chunks("a (red:2)", 1).weights[0, :4].tolist() == [1, 1, 2, 1]
    assert len(ours.chunks("BREAK a BREAK BREAK b BREAK", 99).ids) == 4, (
        "empty ones count, not last"
    )


def test_what_is_beyond_the_last_chunk_is_told(made):
    ours = Tokenizer(made["sd"][1].bundle)
    assert ours.chunks(f"{LONG} the (very) end", 3).dropped == ""
    assert ours.chunks("a BREAK b (c) d BREAK e", 1).dropped.split() == ["b", "c", "d", "e"]
    cut = ours.chunks(f"{LONG} the (very) end", 2)
    assert cut.ids.shape == (2, 77)
    assert cut.dropped.endswith("the very end")
    with pytest.warns(PromptWarning, match="reads 2464 tokens.*'z'"):
        states = made["sd"][1].encode("z " * 2401).states
    assert states.shape == (1, 32 * 77, 32)


@pytest.mark.parametrize("bundle", [EMBEDDED, EMBEDDED_ONNX], ids=["native", "onnx"])
def test_a_long_prompt_is_in_the_plan(bundle):
    """And a budget that does only for short prompts refuses it, before anything is loaded."""
    long = "a red apple " * 300
    pipe = Pipeline.load(bundle)
    pipe.steps("a red apple")
    short = pipe.planned
    pipe.steps(long)
    stages = {s.component: (s.runs, s.peak) for s in pipe.planned.stages}
    assert stages["text_encoder"][0] == 30
    assert stages["unet"][1] > short.stage("unet").peak
    assert pipe.planned.stage("unet").arena > short.stage("unet").arena
    pipe.steps("a red apple", guidance=2, negative=long)
    assert pipe.planned.stage("text_encoder").runs == 60
    tight = Pipeline.load(bundle, memory=smallest(bundle, "a red apple"))
    tight.steps("a red apple")
    with pytest.raises(plans.Refusal):
        tight.steps(long)
    assert not tight._engines
    exact = Pipeline.load(bundle, memory=smallest(bundle, long))
    *_, last = exact.steps(long, steps=1)
    assert np.isfinite(last.latents).all()


def smallest(bundle, prompt):
    with pytest.raises(plans.Refusal) as caught:
        Pipeline.load(bundle, memory=1 << 20).steps(prompt)
    first = caught.value.smallest
    try:
        Pipeline.load(bundle, memory=first).steps(prompt)
    except plans.Refusal as refusal:  # the first was of one chunk
        return refusal.smallest
    return first


def test_the_native_plan_is_what_the_engine_lays_out(made):
    _, pipe = made["sd"]
    pipe.steps(LONG, steps=2)
    engine = NativeEngine(pipe.bundle, "unet", threads=pipe.planned.threads)
    shapes = {"sample": (1, 4, 8, 8), "timestep": (), "encoder_hidden_states": (1, 231, 32)}
    assert pipe.planned.stage("unet").arena == engine.layout(shapes).arena_bytes


def test_a_unet_of_fixed_length_reads_one_chunk(made):
    """As Core ML's and TensorRT's: the rest is told, and nothing is planned for it."""
    _, pipe = made["sd"]
    unet = pipe.manifest.components["unet"]
    context = dataclasses.replace(unet.inputs["encoder_hidden_states"], shape=(1, 77, 32))
    fixed = dataclasses.replace(unet, inputs=unet.inputs | {"encoder_hidden_states": context})
    parts = pipe.manifest.components | {"unet": fixed}
    bundle = dataclasses.replace(
        pipe.bundle, manifest=dataclasses.replace(pipe.manifest, components=parts)
    )
    other = Pipeline(bundle)
    assert other.chunks(LONG, "a BREAK b") == 1
    with pytest.warns(PromptWarning, match="reads 77 tokens"):
        *_, last = other.steps(f"(a pizza:1.3), {LONG}", steps=1)
    assert last.latents.shape == (1, 4, 8, 8)


def test_the_command_line_plans_a_prompt_and_draws_it(tmp_path):
    run = CliRunner().invoke
    plain = run(cli.main, ["plan", "--json"])
    long = run(cli.main, ["plan", "--json", "--prompt", "a red apple " * 30])
    assert plain.exit_code == long.exit_code == 0
    assert '"runs": 3' in long.stdout
    assert '"runs": 3' not in plain.stdout
    picture = tmp_path / "a.png"
    drawn = run(cli.main, ["generate", "a (red:1.2) apple", "-o", str(picture), "--steps", "1"])
    assert drawn.exit_code == 0, drawn.stderr
    refused = run(cli.main, ["generate", "a (red:1e3:200) apple", "-o", str(picture), "-f"])
    assert refused.exit_code == 2
    assert "must be from -100 to 100" in refused.stderr
