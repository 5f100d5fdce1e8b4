"""The recipe of the embedded model: data, training that survives a kill, export and judgement."""

import ferrotype.convert  # noqa: F401  first: takes the root off the path, where our kernels/ is

# isort: split
import copy
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTokenizer

from ferrotype.convert import convert
from ferrotype.convert.checkpoint import open_checkpoint
from ferrotype.models.emoji import (
    config,
    data,
    diffusion,
    distillation,
    evaluate,
    export,
    fast,
    latents,
    networks,
    resume,
    tiny_vae,
    tokenizer,
    training,
    vae,
)

TABLE = {
    "left_out": ["flag"],
    "left_out_names": ["small .*"],
    "left_out_aliases": ["rude"],
    "deleted": [" sign$"],
    "renamed": {"automobile": "red car"},
    "also": {"red car": ["car", "dog"]},
    "kinds": {"animal-bird": "bird", "animal-": "animal"},
}
TWO_STEPS = config.Training(steps=2, batch=2, rate=1e-3, ema=0.5, warmup=1)
TINY = replace(
    config.SMOKE,
    variants=8,
    vae=TWO_STEPS,
    diffusion=TWO_STEPS,
    distillation=TWO_STEPS,
    tiny_vae=TWO_STEPS,
)


def record(name, unified, subcategory="object", short_names=()):
    return {
        "name": name,
        "short_name": name.lower(),
        "unified": unified,
        "subcategory": subcategory,
        "short_names": list(short_names),
    }


@pytest.fixture(scope="module")
def shapes():
    """Twelve things of random colours and outlines."""
    rng = np.random.default_rng()
    y, x = np.mgrid[-1 : 1 : data.STORED * 1j, -1 : 1 : data.STORED * 1j]
    pictures = []
    for i in range(12):
        inside = np.hypot(x * (1 + i % 3), y * (1 + i % 4)) < 0.6 + 0.03 * i
        inside = inside & ~(np.hypot(x, y) < 0.02 * i)
        colour = rng.integers(0, 256, 3)
        pictures.append(np.stack([*(inside * c for c in colour), inside * 255]).astype(np.uint8))
    things = [data.Emoji((f"thing {chr(97 + i)}",), "thing", f"{i}") for i in range(12)]
    return torch.from_numpy(np.stack(pictures)), things


# ---- names and captions --------------------------------------------------------------------------


def test_names_are_plain_and_unique():
    records = [
        record("AUTOMOBILE", "1F697", short_names=["automobile", "rude", "x9"]),
        record("DOG", "1F415", "animal-mammal", ["dog2", "hound"]),
        record("Stop SIGN", "1F6D1-FE0F"),
        record("DOG", "1F999"),  # a second thing of that name
        record("ROOSTER", "1F413", "animal-bird", ["hound"]),
        record("small thing", "1F5FF"),
        record("BANNER", "1F3F3", "flag"),
        record("CHAIR", "1F6CB"),  # without a picture
    ]
    files = {"1f697", "1f415", "1f6d1", "1f999", "1f413", "1f5ff", "1f3f3"}
    found = data.emoji_list(records, files, TABLE)
    assert [t.names for t in found] == [
        ("red car", "automobile", "car"),
        ("dog",),
        ("stop",),
        ("rooster",),
    ]
    assert [t.kind for t in found] == ["", "animal", "", "bird"]
    assert found[2].file == "1f6d1"


def test_who_is_there_as_man_and_woman_is_not_there_as_neither():
    known = {"1f9d1-200d-1f33e", "1f468-200d-1f33e", "1f3c3", "1f3c3-200d-2640", "1f9d1-200d-1f384"}
    neutral = {code for code in known if data.is_neutral(code, known)}
    assert neutral == {"1f9d1-200d-1f33e", "1f3c3"}


def test_captions_name_the_thing_and_its_background():
    rng = random.Random()
    for _ in range(300):
        colour = rng.choice(data.COLOUR_NAMES)
        said = data.caption(["zebra face", "zebra"], "", colour, rng)
        assert "zebra" in said
        assert colour in said or colour == "white"
    assert data.on_colour("a cat", "orange") == "a cat on an orange background"
    assert data.on_colour("cats", "blue", "{}, {} background") == "cats, blue background"
    assert [data.with_article(w) for w in ("owl", "jeans", "glass")] == [
        "an owl",
        "jeans",
        "a glass",
    ]


def test_four_colours_are_withheld_from_each_thing():
    withheld = np.array([[not data.shown(t, c) for c in range(11)] for t in range(30)])
    assert (withheld.sum(1) == 4).all()
    assert not withheld[:, 0].any()
    assert (withheld[:, 1:].sum(0) == 12).all()  # each colour from as many things
    for thing in range(30):
        assert set(latents.colours_of(thing, 16)) == set(data.shown_colours(thing))


# ---- pictures ------------------------------------------------------------------------------------


def test_a_picture_keeps_its_alpha(tmp_path):
    rgba = np.zeros((320, 320, 4), np.uint8)
    rgba[:, :160] = (200, 100, 50, 128)
    rgba[:, 160:, :3] = 255  # invisible white must not shine through
    Image.fromarray(rgba, "RGBA").save(tmp_path / "x.webp", lossless=True, exact=True)
    plane = data.read_picture(tmp_path / "x.webp")
    assert plane.shape == (4, data.STORED, data.STORED)
    assert plane[:, 80, 20].tolist() == [100, 50, 25, 128]
    assert plane[:, 80, 140].tolist() == [0, 0, 0, 0]


def test_compositing_is_alpha_blending(shapes):
    rgba, _ = shapes
    rgba = rgba.clone()
    rgba[:, :, ::2] //= 2  # half transparent lines
    colour = torch.randint(len(data.COLOURS), (len(rgba),))
    at = data.Placement.centred(colour, scale=1.0)
    made = data.composite(rgba, at, data.STORED).numpy()
    palette = np.array(list(data.COLOURS.values()))[colour]
    alpha = rgba[:, 3:].numpy() / 255
    blended = rgba[:, :3].numpy() + (1 - alpha) * palette[:, :, None, None]
    np.testing.assert_allclose((made + 1) * 127.5, blended, atol=5e-3)


def test_placement_moves_and_scales(shapes):
    rgba = shapes[0][:1]
    colour, half = torch.zeros(1, dtype=torch.long), torch.tensor([0.5])
    at = replace(data.Placement.centred(colour, 0.5), dx=half, dy=-half)  # to the upper right
    dark = (data.composite(rgba, at, 128)[0] < 0.99).any(0)
    ys, xs = torch.nonzero(dark, as_tuple=True)
    assert xs.float().mean() == pytest.approx(95.5, abs=2)
    assert ys.float().mean() == pytest.approx(31.5, abs=2)
    assert xs.max() - xs.min() == pytest.approx(0.6 * 64, abs=4)


def test_what_looks_alike_is_taken_once(shapes):
    rgba = shapes[0]
    again = torch.cat([rgba, rgba[3:5].float().mul(0.99).byte(), rgba[5:6].flip(1)])
    kept = data.distinct(again)
    assert set(kept) & {12, 13} == set()


# ---- the tokenizer -------------------------------------------------------------------------------


def test_the_tokenizer_is_one_of_clip(tmp_path):
    texts = ["a red apple on a sky blue background", "an emoji of jeans"] * 4
    size = 600
    tokens, merges = tokenizer.vocabulary(tokenizer.learn_merges(texts, size), size)
    assert len(set(tokens)) == size
    tokenizer.write(tmp_path / "tokenizer", tokens, merges)
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = theirs(texts[0]).input_ids
    assert ids[0] == size - 2
    assert ids[-1] == size - 1
    assert len(ids) == 10  # every word of the texts is one token
    unknown = "Zażółć 🦊 x_1!"
    assert theirs.decode(theirs(unknown).input_ids[1:-1]).replace(" ", "") == "zażółć🦊x_1!"
    rows = tokenizer.token_ids(theirs, texts)
    assert rows.shape == (8, networks.TOKENS)
    assert (rows[:, 12:] == size - 1).all()


# ---- training ------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """A parameter of each kind that the optimizer treats in its own way."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 16)
        self.conv = torch.nn.Conv2d(16, 32, 3)
        self.wide = torch.nn.Linear(16, 40)
        self.norm = torch.nn.LayerNorm(40)

    def forward(self, ids):
        x = self.embedding(ids)
        y = self.conv(x[..., None, None].expand(-1, -1, 3, 3)).flatten(1)
        return self.norm(self.wide(x)).sum(1) + y.mean(1)


class Killed(Exception):
    pass


def run(folder, steps, kill_after=None):
    torch.manual_seed(0)
    net, calls = Net(), 0

    def loss(rng):
        nonlocal calls
        calls += 1
        if calls - 1 == kill_after:
            raise Killed
        ids = torch.randint(20, (8,), generator=rng)
        return {"loss": (net(ids).float() - ids / 10).square().mean()}

    length = config.Training(steps=steps, batch=8, rate=0.01, ema=0.9, warmup=2)
    training.train(folder, "net", {"net": net}, length, loss, save_every=0)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    run(whole, 9)
    for kill_after in (3, 2):
        with pytest.raises(Killed):
            run(parts, 9, kill_after)
    assert training.Progress.of(parts, "net").steps == 5
    run(parts, 9)
    ours, theirs = (torch.load(f / "net.state", weights_only=True) for f in (parts, whole))
    assert ours["optimizer"]["step"] == theirs["optimizer"]["step"] == 9
    for kind in ("masters", "averages", "first", "second"):
        pairs = zip(ours["optimizer"][kind], theirs["optimizer"][kind], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), kind
    assert torch.equal(ours["rng"], theirs["rng"])
    assert ours["means"] == theirs["means"]
    assert (parts / "net.safetensors").read_bytes() == (whole / "net.safetensors").read_bytes()


def test_training_learns_and_averages(tmp_path):
    run(tmp_path, 2)
    first = training.Progress.of(tmp_path, "net").means["loss"]
    (tmp_path / "net.state").unlink()
    run(tmp_path, 150)
    assert training.Progress.of(tmp_path, "net").means["loss"] < 0.6 * first


def test_muon_takes_matrices_and_makes_them_nearly_orthogonal():
    optimizer = training.Optimizer({"net": Net()}, TWO_STEPS)
    names = list(optimizer.parameters)
    assert {names[i] for i in optimizer.muon} == {"net.conv.weight", "net.wide.weight"}
    singular = torch.linalg.svdvals(training.orthogonalized(torch.randn(2, 16, 64)))
    assert singular.min() > 0.5
    assert singular.max() < 1.3


def test_the_rate_rises_stays_and_falls():
    length = config.Training(steps=100, batch=1, rate=2.0, ema=0.9, warmup=10, cooldown=0.5)
    rates = [training.rate_at(length, step) for step in (0, 9, 49, 75, 99)]
    assert rates == pytest.approx([0.2, 2.0, 2.0, 1.0, 0.04])


def test_a_recipe_can_be_changed_by_a_file(tmp_path):
    path = tmp_path / "recipe.json"
    assert config.changed(config.FULL, path) == config.FULL
    path.write_text('{"vae": {"steps": 7}}')
    assert config.changed(config.FULL, path).vae == replace(config.FULL.vae, steps=7)
    path.write_text('{"vae": {"stops": 7}}')
    with pytest.raises(SystemExit, match="stops"):
        config.changed(config.FULL, path)


# ---- faster training -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [networks.make_vae, networks.make_unet])
def test_acceleration_does_not_change_what_is_computed(make):
    model = make(config.SMOKE).eval()
    inputs = [torch.randn(2, 3, 64, 64)]
    if make is networks.make_unet:
        inputs = [torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 32, 32)]
    faster = fast.accelerate(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(
            faster(*inputs).sample, model(*inputs).sample, rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("act", [False, True])
def test_fused_normalization(act):
    if fast.kernel() is None:
        pytest.skip("no C++ compiler")
    norm = torch.nn.GroupNorm(4, 32)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    reference = copy.deepcopy(norm)
    x = (2 * torch.randn(3, 32, 9, 7) + 1).bfloat16().contiguous(memory_format=torch.channels_last)
    dy = torch.randn_like(x)
    x32 = x.float().requires_grad_()
    x.requires_grad_()
    y = fast.group_norm(norm, x, act)
    expected = F.group_norm(x32, 4, reference.weight, reference.bias)
    expected = F.silu(expected) if act else expected
    y.backward(dy)
    expected.backward(dy.float())
    pairs = [
        (y, expected),
        (x.grad, x32.grad),
        (norm.weight.grad, reference.weight.grad),
        (norm.bias.grad, reference.bias.grad),
    ]
    for ours, theirs in pairs:
        assert (ours.float() - theirs).norm() < 0.005 * theirs.norm()


# ---- sampling ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' scheduler, numpy 2
def test_the_teacher_solves_as_diffusers_does():
    drift = torch.randn(4, 4)

    def velocity(x, t):
        return torch.einsum("nchw,cd->ndhw", x, drift) * 0.3 + t[:, None, None, None] / 1000

    x, t = torch.randn(2, 4, 5, 5), torch.tensor([999, 999])
    steps = distillation.SOLVER_STEPS
    scheduler = DPMSolverMultistepScheduler(
        **export.SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(timesteps=[999 * (steps - i) // steps for i in range(steps)])
    theirs = x
    for now in scheduler.timesteps:
        theirs = scheduler.step(velocity(theirs, now.expand(2)), now, theirs).prev_sample
    torch.testing.assert_close(distillation.solve(velocity, x, t), theirs, atol=1e-4, rtol=1e-4)


def test_the_student_is_taught_at_the_steps_that_are_used():
    scheduler = export.lcm_scheduler()
    scheduler.set_timesteps(len(distillation.USED))
    assert scheduler.timesteps.tolist() == list(distillation.USED)
    grid = set(range(19, 1000, 20))
    drawn = distillation.draw_times(4000, torch.Generator().manual_seed(1))
    assert set(drawn.tolist()) == grid
    at_use = torch.isin(drawn, torch.tensor(distillation.USED)).float().mean()
    assert at_use == pytest.approx(0.4 + 0.6 * 4 / 50, abs=0.04)


def test_noising_follows_the_schedule_of_the_scheduler():
    scheduler = export.lcm_scheduler()
    t = torch.tensor([0, 500, 999])
    x, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    signal, deviation = latents.signal_and_noise(t)
    torch.testing.assert_close(signal * x + deviation * noise, scheduler.add_noise(x, noise, t))


# ---- all of it -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory, shapes):
    """A folder after all stages at the tiniest size, on the synthetic pictures."""
    folder = tmp_path_factory.mktemp("work")
    data.save_data(folder, *shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "kernel", lambda: None)  # compiling it takes longer than all of this
        for stage in (tokenizer, vae, latents, diffusion, distillation, tiny_vae, export):
            stage.main(folder, TINY)
    return folder


def test_checkpoints_are_of_stable_diffusion(work):
    checkpoint = open_checkpoint(work / "emoji-sd")
    assert set(checkpoint.configs) == {"text_encoder", "unet", "vae"}
    assert checkpoint.scheduler["_class_name"] == "LCMScheduler"
    scheduler = DPMSolverMultistepScheduler.from_pretrained(work / "emoji-sd-base" / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    keys = json.loads((work / "emoji-sd" / "vae" / "config.json").read_text())
    assert keys["scaling_factor"] == latents.Latents.load(work).scale


def test_checkpoints_hold_the_averaged_weights(work):
    for folder, stage in (("emoji-sd", "distillation"), ("emoji-sd-base", "diffusion")):
        unet = UNet2DConditionModel.from_pretrained(work / folder / "unet")
        expected = networks.make_unet(TINY)
        networks.load_weights(work, stage, unet=expected)
        for ours, theirs in zip(unet.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.float(), theirs, atol=1e-3, rtol=1e-3)
    tiny = AutoencoderTiny.from_pretrained(work / "emoji-sd-tiny")
    assert tiny.decode(torch.randn(1, 4, 8, 8)).sample.shape == (1, 3, 64, 64)


def test_diffusers_draws_what_we_sample(work):
    """The same noise through its pipeline and through ours: text encoder, U-Net, scheduler, VAE."""
    pipe = StableDiffusionPipeline.from_pretrained(work / "emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    given = {"height": 64, "width": 64, "guidance_scale": 1.0, "output_type": "latent"}
    rng = torch.Generator().manual_seed(5)
    theirs = pipe("thing a", num_inference_steps=4, generator=rng, **given).images
    text_encoder = pipe.text_encoder
    context = text_encoder(tokenizer.token_ids(tokenizer.load(work), ["thing a"]))[0]
    unet, cast = pipe.unet, distillation.bf16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "bf16", lambda x: x)
        assert distillation.bf16 is not cast
        ours = distillation.sample(unet, context, torch.Generator().manual_seed(5), 8)
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_a_finished_stage_does_not_train_on(work):
    before = (work / "vae.safetensors").read_bytes()
    vae.main(work, TINY)
    assert (work / "vae.safetensors").read_bytes() == before


def test_checkpoints_can_be_trained_on(work, shapes, tmp_path, monkeypatch):
    """Without the folder they were trained in: weights, progress, and latents of their scale."""
    rows = {
        "vae": "loss 0.5, psnr 20",
        "diffusion": "loss 0.25, v 0.75",
        "distillation": "loss 0.1",
        "tiny_vae": "loss 0.2",
    }
    table = "\n".join(f"| {name} | 1,002 | 64 | 2.67 | {told} |" for name, told in rows.items())
    (tmp_path / "emoji.md").write_text(table)
    monkeypatch.setattr(resume, "CHECKPOINTS", work)
    monkeypatch.setattr(resume, "RESULTS", tmp_path / "emoji.md")
    monkeypatch.setattr(fast, "kernel", lambda: None)
    again = tmp_path / "again"
    again.mkdir()
    data.save_data(again, *shapes)
    resume.main(again, TINY)
    for name in rows:
        before, after = (networks.load_file(f / f"{name}.safetensors") for f in (work, again))
        assert before.keys() == after.keys()
        for key, value in before.items():
            torch.testing.assert_close(after[key], value, atol=1e-3, rtol=1e-3)
    assert latents.Latents.load(again).scale == latents.Latents.load(work).scale
    done = training.Progress.of(again, "diffusion")
    assert (done.steps, done.core_seconds) == (1002, 2.67 * 3600)
    assert done.means == {"loss": 0.25, "v": 0.75}
    diffusion.main(again, replace(TINY, diffusion=replace(TWO_STEPS, steps=1003)))
    assert training.Progress.of(again, "diffusion").steps == 1003
    kept = (again / "diffusion.safetensors").read_bytes()
    resume.main(again, TINY)
    assert (again / "diffusion.safetensors").read_bytes() == kept


def test_the_judge_knows_the_data_set_and_its_colours(work, shapes):
    known = data.Data.load(work)
    judge = evaluate.Judge(networks.make_vae(TINY).eval(), known, 64)
    things, colours = list(range(12)), [t % 10 for t in range(12)]
    asked = evaluate.Asked(things, colours, [""] * 12)
    at = data.Placement.drawn(torch.tensor(colours), torch.Generator().manual_seed(0), spread=0.05)
    pictures = data.composite(known.rgba, at, 64)
    found = evaluate.judged(judge, pictures, asked)
    assert found["right"] >= 90
    assert found["background"] == 100
    wrong = evaluate.Asked(things[1:] + things[:1], colours[1:] + colours[:1], [""] * 12)
    found = evaluate.judged(judge, pictures, wrong)
    assert found["right"] < 30  # a network that never learned takes some for their neighbours
    assert found["background"] == 0


def test_evaluation_reports_what_it_found(work):
    rows = evaluate.evaluate(work, TINY)
    assert rows["all"]["not finite"] == 0
    assert rows["all"]["size"] == pytest.approx(export.weights_size(work / "emoji-sd") / 1e6)
    tables = evaluate.result_tables(rows, work, TINY)
    assert "| vae | 2 | 2 |" in tables
    evaluate.write_card(work, data.Data.load(work), tables)
    card = (work / "emoji-sd" / "README.md").read_text()
    assert tables in card
    assert open_checkpoint(work / "emoji-sd").license == "mit"
    assert (work / "emoji-sd" / "samples" / "prompts.png").exists()


def test_a_bundle_is_judged_in_the_same_way(work):
    made = convert(work / "emoji-sd", work / "emoji.ferro", "native").folder
    found = evaluate.evaluate_bundle(work, TINY, made)
    assert set(found) == {"NAME"}  # nothing there has a second one
    assert 0 <= found["NAME"]["right"] <= 100
    assert found["NAME"]["background"] <= 100


def test_prompts_ask_for_shown_and_for_withheld_colours(shapes):
    known = data.Data(shapes[0], [list(t.names) for t in shapes[1]], [t.kind for t in shapes[1]])
    for seen in (True, False):
        asked = evaluate.ask(known, range(12), evaluate.one_colour(seen))
        assert [data.shown(t, c) for t, c in zip(asked.things, asked.colours, strict=True)] == [
            seen
        ] * 12
        assert asked.prompts[0].endswith(f"{data.COLOUR_NAMES[asked.colours[0]]} background")
    assert evaluate.ask(known, [3], lambda thing: None).prompts == ["a thing d"]


def test_second_names_are_asked_for_where_there_are_some():
    known = data.Data(torch.zeros(3, 4, 8, 8), [["fox face", "fox"], ["bus"], ["egg", "ovum"]], [])
    second = evaluate.ask_second(known, range(3))
    assert (second.things, second.prompts) == ([0, 2], ["a fox", "an ovum"])
    assert second.colours == [0, 0]
