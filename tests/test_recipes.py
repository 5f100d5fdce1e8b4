"""Few-step recipes: every family's steps are those of its model card in diffusers, and are kept."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from ferrotype import bundle as bundles
from ferrotype import cli
from ferrotype.bundle import Recipe
from ferrotype.errors import FerrotypeError
from ferrotype.runtime import recipes, samplers
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX, Pipeline
from ferrotype.runtime.recipes import FAMILIES, RecipeRefusal
from ferrotype.runtime.seeds import TorchNoise

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from ferrotype.benchmarks.checkpoints import TINY, TINY_XL, write_checkpoint  # noqa: E402
from ferrotype.convert import OptionError, convert  # noqa: E402
from ferrotype.convert.checkpoint import CheckpointError, open_checkpoint  # noqa: E402
from ferrotype.convert.recipe import from_checkpoint, to_scheduler  # noqa: E402

# diffusers hands torch tensors to np.array, which numpy 2.4 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (1, 4, 6, 5)
COMMON = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "set_alpha_to_one": False, "clip_sample": False, "prediction_type": "epsilon",
    "num_train_timesteps": 1000, "trained_betas": None,
}  # fmt: skip
SD15 = COMMON | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
SDXL = COMMON | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
# The model cards: scheduler, what is changed of the base model's configuration, eta.
CARDS = {
    "lcm": ("LCMScheduler", {}, None),
    "lcm-lora": ("LCMScheduler", {}, None),
    "tcd": ("TCDScheduler", {}, 0.3),
    "sd-turbo": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, None),
    "sdxl-turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, None),
    "lightning-1": (
        "EulerDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "sample"},
        None,
    ),
    **{f"lightning-{n}": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, None)
       for n in (2, 4, 8)},
    "hyper-1": ("LCMScheduler", {}, None),
    "hyper-unified": ("TCDScheduler", {}, 1.0),
    **{f"hyper-{n}": ("DDIMScheduler", {"timestep_spacing": "trailing"}, 0.0)
       for n in (2, 4, 8, "cfg-8", "cfg-12")},
}  # fmt: skip
rng = np.random.default_rng()
MIX = rng.standard_normal((4, 4)).astype(np.float32) * np.float32(0.7)
SHIFT = rng.standard_normal((4, 1)).astype(np.float32)


def network(x, timestep):
    """A nonlinear function of x and t with outputs of the size of noise."""
    flat = MIX @ x.reshape(4, -1) + SHIFT * np.float32(math.cos(timestep / 130))
    return np.float32(1.5) * np.tanh(flat).reshape(x.shape)


def theirs(name, steps, base):
    """Timesteps and latents as diffusers' pipelines compute them, set up by the model card."""
    kind, changes, eta = CARDS[name]
    scheduler = getattr(diffusers, kind).from_config(base, **changes)
    if name == "hyper-1":
        scheduler.set_timesteps(timesteps=[800])
    else:
        scheduler.set_timesteps(steps)
    generator = torch.Generator("cpu").manual_seed(11)
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    extra = {} if eta is None else {"eta": eta}
    if kind != "EulerDiscreteScheduler":
        extra["generator"] = generator
    trace = []
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t).numpy(), float(t))
        x = scheduler.step(torch.from_numpy(output), t, x, **extra).prev_sample
        trace.append(x.numpy())
    return scheduler.timesteps.numpy(), trace


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Small ones of both kinds, and one whose U-Net reads the guidance scale."""
    folder = tmp_path_factory.mktemp("recipes")
    embedded = TINY | {"unet": TINY["unet"] | {"time_cond_proj_dim": 32}}
    kinds = {"sd": TINY, "sdxl": TINY_XL, "embedded": embedded}
    return {n: open_checkpoint(write_checkpoint(folder / n, c)) for n, c in kinds.items()}


def checkpoint_for(checkpoints, name, base=None):
    kind = "embedded" if name == "lcm" else "sdxl" if FAMILIES[name].xl else "sd"
    found = checkpoints[kind]
    return dataclasses.replace(found, scheduler=base) if base else found


@pytest.mark.parametrize("base", [SD15, SDXL], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_steps_as_its_model_card_says(checkpoints, name, base):
    recipe, _ = from_checkpoint(checkpoint_for(checkpoints, name, base), name)
    every = {1} if recipe.timesteps else {*range(1, 9), *recipe.allowed_steps}
    for steps in sorted(every):
        timesteps, expected = theirs(name, steps, base)
        table = samplers.table(dataclasses.replace(recipe, steps=steps))
        assert [row.timestep for row in table.rows] == timesteps.tolist()
        noise = TorchNoise(11)
        start = samplers.start(table, noise(SHAPE))
        found = [step.latents for step in samplers.sample(network, start, table, noise)]
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            assert np.abs(mine - other).max() < 1e-4 * max(1, np.abs(other).max()), steps


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_of_a_conversion_has_the_same_schedule(checkpoints, name):
    recipe, _ = from_checkpoint(checkpoint_for(checkpoints, name), name)
    scheduler, table = to_scheduler(recipe), samplers.table(recipe)
    assert scheduler.timesteps.tolist() == [row.timestep for row in table.rows]
    assert scheduler.config.prediction_type == recipe.prediction_type


def test_the_command_line_offers_every_recipe_and_the_page_says_all_of_it():
    assert cli.RECIPES == recipes.NAMES
    page = (EMBEDDED.parent.parent / "docs" / "samplers.md").read_text()
    page = page.split("## Few-step recipes")[1]
    for name, family in FAMILIES.items():
        allowed = recipes.limits(
            Recipe(family.sampler, 1, 1, allowed_steps=family.allowed_steps)
        ).split(" step")[0]
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        low, high = family.guidance_range
        guidance = "none" if high == 1 else f"{low:g} to {high:g}"
        for cell in (f"`{family.sampler}`", allowed, guidance):
            assert cell in row, (name, cell)


# --- which family a checkpoint is of ------------------------------------------------------------

TRAILING = {"timestep_spacing": "trailing"}
ANCESTRAL = SDXL | {"_class_name": "EulerAncestralDiscreteScheduler"}
SHOWN = [  # scheduler, U-Net's sample size, family of the checkpoint, the recipe's name
    (COMMON | {"_class_name": "LCMScheduler"}, 64, "sd1", "lcm-lora"),
    (COMMON | {"_class_name": "TCDScheduler"}, 128, "sdxl", "tcd"),
    (ANCESTRAL | TRAILING, 64, "sdxl", "sdxl-turbo"),
    (ANCESTRAL | TRAILING, 128, "sdxl", "base"),
    (ANCESTRAL, 64, "sdxl", "base"),
    (SDXL | TRAILING, 64, "sd2", "sd-turbo"),
    (SDXL | TRAILING | {"prediction_type": "v_prediction"}, 64, "sd2", "base"),
    (SDXL | TRAILING, 128, "sdxl", "base"),  # Lightning, of who knows how many steps
    (SDXL, 128, "sdxl", "base"),
    (SD15, 64, "sd1", "base"),
]  # fmt: skip


@pytest.mark.parametrize(("scheduler", "size", "family", "name"), SHOWN)
def test_the_family_shows_in_the_checkpoint(checkpoints, scheduler, size, family, name):
    given = checkpoints["sdxl" if family == "sdxl" else "sd"]
    unet = given.configs["unet"] | {"sample_size": size}
    given = dataclasses.replace(
        given, scheduler=scheduler, family=family, configs=given.configs | {"unet": unet}
    )
    recipe, notes = from_checkpoint(given)
    assert recipe.name == name
    assert bool(recipe.allowed_steps) == (name != "base")
    if name != "base":
        assert "--recipe base" in notes[0], "a mistake can be undone"
        again, _ = from_checkpoint(given, "base")
        assert (again.name, again.allowed_steps, again.guidance_range) == ("base", (), None)
    elif scheduler == SDXL | TRAILING and size == 128:
        assert "give its --recipe" in notes[0]


def test_embedded_guidance_is_a_latent_consistency_model_whatever_the_scheduler(checkpoints):
    given = dataclasses.replace(checkpoints["embedded"], scheduler=SD15)
    recipe, _ = from_checkpoint(given)
    assert (recipe.name, recipe.sampler, recipe.guidance) == ("lcm", "lcm", 8.0)
    assert from_checkpoint(given, "base")[0].guidance == 8.0


def test_the_noise_schedule_stays_the_checkpoints(checkpoints):
    scheduler = SDXL | {"beta_schedule": "linear", "prediction_type": "v_prediction"}
    given = dataclasses.replace(checkpoints["sdxl"], scheduler=scheduler)
    recipe, _ = from_checkpoint(given, "lightning-4")
    assert (recipe.beta_schedule, recipe.prediction_type) == ("linear", "v_prediction")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("sd", "lightning-4", "it is for SDXL, this checkpoint is not"),
        ("sdxl", "sd-turbo", "it is for Stable Diffusion 1 and 2, this checkpoint is SDXL"),
        ("sd", "lcm", "reads no guidance scale, use lcm-lora"),
        ("embedded", "tcd", "reads the guidance scale, use lcm"),
        ("sd", "lightning-3", "choose from base, lcm, lcm-lora"),
    ],
)
def test_a_recipe_of_another_kind_of_model_is_refused(checkpoints, kind, name, message):
    given = dataclasses.replace(
        checkpoints[kind], family="sdxl" if kind == "sdxl" else "sd1", scheduler=SDXL
    )
    with pytest.raises(OptionError) as caught:
        from_checkpoint(given, name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_that_no_table_expresses_is_refused_whatever_the_recipe(checkpoints):
    given = dataclasses.replace(checkpoints["sd"], scheduler=SDXL | {"clip_sample": True})
    with pytest.raises(CheckpointError, match="clip_sample"):
        from_checkpoint(given, "hyper-4")


def test_a_conversion_writes_the_recipe_and_is_checked_with_it(checkpoints, tmp_path):
    """The one that differs most: the network predicts the picture, one step from timestep 999."""
    made = convert(
        checkpoints["sdxl"].folder, tmp_path / "one.ferro", "native", recipe="lightning-1"
    )
    recipe = bundles.load(made.folder).manifest.recipe
    assert (recipe.name, recipe.allowed_steps, recipe.guidance_range) == (
        "lightning-1", (1,), (1.0, 1.0),
    )  # fmt: skip
    assert recipe.prediction_type == "sample"
    assert made.manifest.parity["picture"]["steps"] == 1
    with pytest.raises(RecipeRefusal, match=r"1 step of euler, no guidance \(lightning-1\)"):
        Pipeline(made).recipe(steps=4)


# --- the manifest -------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [EMBEDDED, EMBEDDED_ONNX], ids=["native", "onnx"])
def test_manifests_from_before_keep_their_bytes_and_their_identity(folder):
    """Without the new fields a manifest reads, and is written, as it was."""
    text = (folder / "manifest.json").read_text()
    manifest = bundles.loads(text)
    old = dataclasses.replace(manifest.recipe, name="", allowed_steps=(), guidance_range=None)
    written = bundles.dumps(dataclasses.replace(manifest, recipe=old))
    assert "allowed_steps" not in written
    assert "guidance_range" not in written
    assert bundles.dumps(bundles.loads(written)) == written
    assert bundles.dumps(manifest) == text


def test_new_fields_survive_the_manifest():
    manifest = bundles.load(EMBEDDED).manifest
    recipe = recipes.apply("hyper-cfg-12", manifest.recipe)
    again = bundles.loads(bundles.dumps(dataclasses.replace(manifest, recipe=recipe))).recipe
    assert again == recipe
    assert (again.allowed_steps, again.guidance_range) == ((12,), (5.0, 8.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allowed_steps": [4, 0]}, "allowed_steps has 0"),
        ({"allowed_steps": 4}, "list expected"),
        ({"guidance_range": [2, 1]}, "guidance_range 2"),
        ({"guidance_range": [1]}, "2 values expected"),
        ({"name": None}, "str expected"),
    ],
)
def test_a_wrong_limit_is_no_manifest(fields, message):
    raw = json.loads((EMBEDDED / "manifest.json").read_text())
    raw["recipe"] |= fields
    with pytest.raises(bundles.BundleError) as caught:
        bundles.loads(json.dumps(raw))
    assert message in str(caught.value)


# --- refusals -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_step(tmp_path_factory):
    """Embedded models that claim to be of a family: name -> folder."""
    folder = tmp_path_factory.mktemp("few")
    made = {}
    for name in ("lightning-4", "lcm-lora", "hyper-1", "hyper-cfg-8"):
        made[name] = folder / f"{name}.ferro"
        shutil.copytree(EMBEDDED_ONNX, made[name])
        manifest = bundles.load(made[name]).manifest
        recipe = recipes.apply(name, manifest.recipe, xl=True)
        text = bundles.dumps(dataclasses.replace(manifest, recipe=recipe))
        (made[name] / "manifest.json").write_text(text)
    return made


REFUSED = [  # family, what is asked for, how the refusal begins and what it says to do
    ("lightning-4", {"steps": 20, "guidance": 7.0}, "steps 20, guidance 7: this model was "
     "distilled for 4 steps of euler, no guidance (lightning-4): use --steps 4 --guidance 1, "
     "or --force to insist"),
    ("lightning-4", {"steps": 1}, "steps 1: this model was distilled for 4 steps"),
    ("lightning-4", {"sampler": "dpmpp_2m"}, "sampler dpmpp_2m: this model"),
    ("lightning-4", {"spacing": "leading"}, "spacing leading: this model"),
    ("lcm-lora", {"steps": 9}, "steps 9: this model was distilled for 1 to 8 steps of lcm, "
     "guidance 1 to 2 (lcm-lora): use --steps 8, or --force"),
    ("lcm-lora", {"guidance": 7.5}, "use --guidance 2, or --force"),
    ("hyper-1", {"steps": 2}, "1 step of lcm, no guidance (hyper-1): use --steps 1, or --force"),
    ("hyper-cfg-8", {"guidance": 0.0}, "guidance 0: this model was distilled for 8 steps of ddim, "
     "guidance 5 to 8 (hyper-cfg-8): use --guidance 5, or --force"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "asked", "message"), REFUSED)
def test_what_a_model_was_not_distilled_for_is_refused_before_anything_runs(
    few_step, name, asked, message
):
    pipe = Pipeline.load(few_step[name])
    with pytest.raises(RecipeRefusal) as caught:
        pipe.steps("a red apple", **asked)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FerrotypeError)
    pipe.steps("a red apple", force=True, **asked)
    assert not pipe._engines


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("lightning-4", {}),
        ("lightning-4", {"guidance": 0.0, "steps": 4, "sampler": "euler"}),
        ("lcm-lora", {"steps": 8, "guidance": 1.5}),
        ("hyper-1", {"steps": 1}),
        ("hyper-cfg-8", {"guidance": 7.5}),
    ],
)
def test_what_it_was_distilled_for_is_drawn(few_step, name, asked):
    pipe = Pipeline.load(few_step[name])
    *_, last = pipe.steps("a red apple", **asked)
    assert last.total == (1 if name == "hyper-1" else asked.get("steps", last.total))


def test_bundles_without_a_family_are_free():
    pipe = Pipeline.load(EMBEDDED_ONNX)
    assert not recipes.limits(dataclasses.replace(pipe.manifest.recipe, allowed_steps=()))
    free = dataclasses.replace(
        pipe.manifest.recipe, name="base", allowed_steps=(), guidance_range=None
    )
    recipes.check(dataclasses.replace(free, steps=50, guidance=12.0, sampler="ddim"), free)


def test_forced_steps_leave_listed_timesteps(few_step):
    """The one timestep of the one-step U-Net is not a schedule for four."""
    pipe = Pipeline.load(few_step["hyper-1"])
    assert pipe.recipe().timesteps == pipe.recipe(force=True).timesteps == (800.0,)
    recipe = pipe.recipe(steps=4, force=True)
    assert [row.timestep for row in samplers.table(recipe).rows] == [999, 759, 499, 259]


def test_the_command_line_refuses_and_force_insists(few_step, tmp_path):
    bundle, picture = str(few_step["lightning-4"]), str(tmp_path / "a.png")
    run = CliRunner().invoke
    asked = ["-b", bundle, "--steps", "2", "--guidance", "7"]
    refused = run(cli.main, ["generate", "a pizza", *asked, "-o", picture])
    assert refused.exit_code == 2
    assert "use --steps 4 --guidance 1, or --force to insist" in refused.stderr
    assert not (tmp_path / "a.png").exists()
    planned = run(cli.main, ["plan", bundle, "--steps", "2", "--guidance", "7"])
    assert planned.exit_code == 2
    assert "lightning-4" in planned.stderr
    forced = run(cli.main, ["generate", "a pizza", *asked, "-o", picture, "--force"])
    assert forced.exit_code == 0, forced.stderr
    assert "note: forced, steps 2, guidance 7: this model was distilled for" in forced.stderr
    assert (tmp_path / "a.png").exists()
    assert run(cli.main, ["plan", bundle, "--steps", "2", "--force"]).exit_code == 0
    shown = run(cli.main, ["inspect", bundle])
    assert "lightning-4: 4 steps of euler, no guidance" in shown.stdout
