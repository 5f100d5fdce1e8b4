"""The pipeline draws: the same bytes however it is held in memory, and says what is wrong."""

import hashlib
import warnings

import numpy as np
import pytest
from PIL import Image

import ferrotype
from ferrotype.runtime import pipeline as pipelines
from ferrotype.runtime.pipeline import EMBEDDED_ONNX, Pipeline, PipelineError, PromptWarning

PROMPT = "a red apple on a sky blue background"


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(resident=True)


def pixels(image):
    return np.asarray(image, np.float32) / 255


def test_it_draws_a_red_apple_on_sky_blue(pipe):
    image = pixels(pipe.generate(PROMPT))
    assert image.shape == (128, 128, 3)
    corner, middle = image[:12, -12:].mean((0, 1)), image[54:74, 54:74].mean((0, 1))
    assert corner[2] > corner[0] + 0.15, "the sky is blue"
    assert middle[0] > middle[1] + 0.4, "the apple is red"


def test_staged_and_resident_give_the_same_bytes(pipe):
    staged = Pipeline.load()
    assert staged.generate(PROMPT, seed=5).tobytes() == pipe.generate(PROMPT, seed=5).tobytes()
    assert not staged._engines, "all memory is given back"


def test_only_one_component_is_loaded_at_a_time():
    staged = Pipeline.load()
    run = staged.steps(PROMPT, steps=2)
    next(run)
    assert list(staged._engines) == ["unet"]
    staged.decode(next(run))
    assert list(staged._engines) == ["vae_decoder"]
    staged.release()
    assert not staged._engines


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_thread_count_gives_the_same_bytes(pipe, threads):
    image = Pipeline.load(threads=threads).generate(PROMPT)
    if pipe.manifest.target == "native":
        assert image.tobytes() == pipe.generate(PROMPT).tobytes()
    else:  # onnxruntime cuts its sums by the threads
        assert np.abs(pixels(image) - pixels(pipe.generate(PROMPT))).max() <= 2 / 255


def test_the_same_seed_is_the_same_picture_and_another_is_not(pipe):
    hashes = [hashlib.sha256(pipe.generate(PROMPT, seed=s).tobytes()).digest() for s in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_steps_is_a_generator_that_the_caller_owns(pipe):
    run = pipe.steps(PROMPT, steps=8)
    seen = []
    for step in run:
        seen.append((step.index, step.total, step.latents.shape))
        if step.index == 3:
            break
    run.close()
    assert seen == [(i, 8, (1, 4, 16, 16)) for i in (1, 2, 3)]
    assert next(run, None) is None, "cancelled"


def test_nothing_is_loaded_before_the_first_step():
    staged = Pipeline.load()
    run = staged.steps(PROMPT)
    assert not staged._engines
    next(run)
    assert staged._engines


@pytest.mark.parametrize("size", [(64, 64), (136, 72), (96, 200), (128, 128), (256, 256)], ids=str)
def test_every_multiple_of_eight_is_a_size_for_onnx(size):
    pipe = Pipeline.load(EMBEDDED_ONNX)
    assert pipe.generate(PROMPT, steps=1, size=size).size == size


def test_image_to_image_keeps_more_at_low_strength(pipe):
    start = pipe.generate("a pizza", seed=3)
    near = pipe.generate("a pizza", image=start, strength=0.25, steps=8)
    far = pipe.generate(PROMPT, image=start, strength=1.0, steps=8)
    distance = [np.abs(pixels(x) - pixels(start)).mean() for x in (near, far)]
    assert distance[0] < 0.05 < distance[1]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"])
def test_image_to_image_takes_any_picture(pipe, mode):
    image = Image.new(mode, (33, 57))
    assert pipe.generate(PROMPT, image=image, steps=2, strength=0.5).size == (128, 128)


def test_transparency_becomes_white(pipe):
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert np.asarray(pipelines._fit(clear, (64, 64))).min() == 255


def test_guidance_zero_and_one_are_one_pass(pipe, monkeypatch):
    calls = []
    original = Pipeline._run
    monkeypatch.setattr(
        Pipeline,
        "_run",
        lambda self, name, *rest: calls.append(name) or original(self, name, *rest),
    )
    pictures = []
    for guidance, passes in [(0, 2), (1, 2), (3, 4)]:
        calls.clear()
        pictures.append(pipe.generate(PROMPT, steps=2, guidance=guidance).tobytes())
        assert calls.count("unet") == passes
    assert pictures[0] == pictures[1] != pictures[2]


def test_guidance_is_the_formula(pipe):
    """One step of a sampler whose result is the denoised: linear in the network's answer."""

    def denoised(guidance, prompt, negative=""):
        run = pipe.steps(prompt, steps=1, guidance=guidance, negative=negative)
        return next(run).denoised

    conditional, unconditional = denoised(1, PROMPT), denoised(1, "a pizza")
    guided = denoised(3, PROMPT, "a pizza")
    expected = unconditional + 3 * (conditional - unconditional)
    np.testing.assert_allclose(guided, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 51}, "51"),
        ({"seed": -1}, "seed -1 is outside"),
        ({"seed": 2**64}, "outside 0"),
        ({"seed": 1.5}, "whole number"),
        ({"size": (100, 128)}, "100 is no multiple of"),
        ({"size": (0, 0)}, "outside 64"),
        ({"size": (4096, 4096)}, "outside 64..2048"),
        ({"guidance": -1}, "guidance is -1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"sampler": "magic"}, "ddim"),
        ({"spacing": "even"}, "leading, trailing"),
        ({"rng": "dice"}, "torch"),
        ({"negative": "blur"}, "set guidance above 1"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 0}, "strength"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 0.01}, "strength"),
        ({"eta": 2.0}, "eta"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_clear_line_before_anything_runs(pipe, arguments, message):
    with pytest.raises(ValueError) as caught:
        pipe.steps(PROMPT, **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("threads", [0, -1, 65])
def test_threads_out_of_range(threads):
    with pytest.raises(ValueError, match="threads is"):
        Pipeline.load(threads=threads)


def test_a_long_prompt_says_what_a_unet_of_fixed_length_does_not_read(monkeypatch):
    monkeypatch.setattr(Pipeline, "_reads_chunks", False)
    pipe = Pipeline.load()
    with pytest.warns(PromptWarning, match="reads 32 tokens.*'a red apple.* the end'"):
        pipe.encode(" ".join(["a red apple"] * 12) + " the end")


def test_a_prompt_that_fits_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pipeline.load().encode("a red apple")


@pytest.mark.parametrize("prompt", ["", "🍎🐧", "x" * 10_000, "a\x00b\nc", "\ud83c", "‮ﬁ"])
def test_any_text_is_a_prompt(pipe, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        states = pipe.encode(prompt).states
    assert states.shape == (1, 32 * min(pipe.chunks(prompt), 32), 192)


def test_a_prompt_is_encoded_once(pipe):
    assert pipe.encode("a violin") is pipe.encode("a violin")
    for i in range(2 * pipelines.CACHED_PROMPTS):
        pipe.encode(f"number {i}")
    assert len(pipe._texts) == pipelines.CACHED_PROMPTS


def test_nan_from_a_network_is_an_error_never_a_black_picture(pipe, monkeypatch):
    original = Pipeline._run

    def broken(self, name, *rest):
        factor = np.nan if name == component else 1
        return {output: factor * value for output, value in original(self, name, *rest).items()}

    monkeypatch.setattr(Pipeline, "_run", broken)
    for component in ("unet", "vae_decoder"):  # read by broken()
        with pytest.raises(PipelineError, match=f"the {component} returned NaN"):
            pipe.generate(PROMPT)


def test_previews_resemble_the_picture(pipe):
    *_, step = pipe.steps(PROMPT)
    picture = pixels(pipe.decode(step))
    exact, guess = pixels(pipe.preview(step, decode=True)), pixels(pipe.preview(step))
    assert np.abs(exact - picture).max() <= 2 / 255, "the last denoised is the result"
    assert guess.shape == picture.shape
    assert np.abs(guess - picture).mean() < 0.08


def test_embedded_guidance_is_an_input_of_the_unet(pipe, monkeypatch):
    """A latent consistency U-Net gets sinusoids of guidance - 1, and no second pass."""
    from diffusers import LatentConsistencyModelPipeline

    component = pipe.bundle.component("unet")
    monkeypatch.setattr(Pipeline, "_embeds_guidance", True)
    monkeypatch.setitem(component.config, "time_cond_proj_dim", 256)
    seen = []

    def run(self, name, inputs):
        if name == "text_encoder":
            return {"last_hidden_state": np.zeros((1, 32, 192), np.float32)}
        seen.append(inputs["timestep_cond"])
        return {"out_sample": inputs["sample"]}

    monkeypatch.setattr(Pipeline, "_run", run)
    monkeypatch.setattr(Pipeline, "plan", lambda *_: None)  # the weights lack that input
    list(pipe.steps("anything else", guidance=8.0, steps=3))
    assert len(seen) == 3
    import torch

    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = embed(None, torch.tensor([7.0]), embedding_dim=256).numpy()
    np.testing.assert_allclose(seen[0], expected, atol=2e-3)  # theirs is float32 throughout
    with pytest.raises(ValueError, match=r"no effect at guidance 8 .* model: leave it out$"):
        pipe.steps(PROMPT, guidance=8.0, negative="blur")


def test_load_is_the_short_name():
    assert ferrotype.load().generate("a pizza", steps=1).size == (128, 128)


def test_another_sampler_comes_with_its_own_spacing_and_noise(pipe):
    recipe = pipe.recipe(sampler="tcd")
    assert (recipe.spacing, recipe.eta) == ("lcm", 0.3)
    recipe = pipe.recipe(sampler="ddim", eta=0.5)
    assert (recipe.spacing, recipe.eta) == ("trailing", 0.5)
    assert pipe.recipe(sampler="lcm") == pipe.manifest.recipe
