"""The budget is a promise: kept as measured, with the same picture, or a refusal that helps.

The process has drawn before, so the libraries' pages are there already: what HOST says of them is
taken off the plan's peak before a measured one is compared.  A few runs are fresh processes, where
all of it counts.
"""

import contextlib
import dataclasses
import gc
import itertools
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ferrotype import bundle as bundles
from ferrotype import kernels
from ferrotype.benchmarks import random_bundles
from ferrotype.benchmarks.checkpoints import TINY, TINY_XL
from ferrotype.runtime import memory, tiles
from ferrotype.runtime import plan as plans
from ferrotype.runtime.engines import native
from ferrotype.runtime.memory import KIB, MIB
from ferrotype.runtime.pipeline import EMBEDDED, Pipeline
from ferrotype.runtime.plan import Refusal, Run
from ferrotype.tests.random_networks import FEW_BITS, MORE, PRECISIONS, configs, few

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="the native engine is not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak"),
]

SLACK = 128 * KIB * native.usable_threads()  # the kernel counts by core, and adds up in batches
WARM = 8 * MIB  # of HOST, what a process that drew before has already
PROMPT = "a red apple on a sky blue background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def emoji():
    return bundles.load(EMBEDDED)


@pytest.fixture(scope="module")
def wide(folder):
    """A model whose weights and images are megabytes."""
    unet = TINY["unet"] | {"block_out_channels": [64, 128], "attention_head_dim": 8}
    vae = TINY["vae"] | {"block_out_channels": [32, 32, 64, 64]}
    return random_bundles.write(folder / "wide", TINY | {"unet": unet, "vae": vae}, size=(128, 128))


@pytest.fixture(scope="module", autouse=True)
def _warm(emoji):
    """Libraries, threads and caches of the first run."""
    pipe = Pipeline(emoji)
    pipe.generate(PROMPT, steps=1, size=(64, 64))
    pipe.generate(PROMPT, steps=1, image=Image.new("RGB", (64, 64)), size=(64, 64), strength=1.0)


def draw(pipe, **arguments):
    """The picture's bytes."""
    *_, last = pipe.steps(PROMPT, **arguments)
    picture = pipe.decode(last)
    pipe.release()
    return picture.tobytes()


@contextlib.contextmanager
def measured():
    """What follows as bytes over what the process has now, in a list of one."""
    gc.collect()
    memory.trim()
    before, found = memory.read().resident, []
    if not memory.reset_peak():
        pytest.skip("the kernel does not let the peak begin anew")
    yield found
    found.append(memory.read().peak - before)


def smallest(bundle, run, threads=None, **more):
    with pytest.raises(Refusal) as caught:
        plans.make(bundle, run, 1, threads, **more)
    return caught.value.smallest


# --- the promise --------------------------------------------------------------------------------


@st.composite
def models(draw):
    return draw(configs()), draw(st.sampled_from([*PRECISIONS, *FEW_BITS]))


@few(max_examples=4 * MORE)
@given(
    model=models(),
    sides=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    steps=st.integers(1, 3),
    guided=st.booleans(),
    pictured=st.booleans(),
    threads=st.integers(1, 4),
    part=st.floats(0, 1),
)
def test_a_run_keeps_its_budget_or_is_refused(
    folder, model, sides, steps, guided, pictured, threads, part
):
    """Any model, size, budget: the smallest budget that a refusal names, and one in between."""
    shutil.rmtree(folder / "random", ignore_errors=True)
    bundle = random_bundles.write(folder / "random", model[0], *model[1], size=(128, 128))
    multiple = bundle.manifest.sizes.multiple
    size = tuple(max(64, multiple * -(-32 * side // multiple)) for side in sides)
    arguments = {"steps": steps, "size": size, "guidance": 3.0 if guided else 1.0}
    if pictured:
        arguments |= {"image": Image.linear_gradient("L"), "strength": 1.0}
    whole = draw(Pipeline(bundle, threads), **arguments)

    run = Run(size, steps, 2 if guided else 1, pictured)
    top = plans.make(bundle, run, None, threads).peak
    least = smallest(bundle, run, threads)
    assert least <= top
    for budget in (least, int(least + part * (top - least))):
        pipe = Pipeline(bundle, threads, budget=budget)
        with measured() as found:
            assert draw(pipe, **arguments) == whole
        plan = pipe.planned
        assert plan.peak <= budget
        assert found[0] <= plan.peak - WARM + SLACK, plan
    with pytest.raises(Refusal):
        plans.make(bundle, run, least - 1, threads)
    with pytest.raises(Refusal):
        Pipeline(bundle, threads, budget=least - 1).steps(PROMPT, **arguments)


WORKER = """
import gc, hashlib, json, sys
from ferrotype.runtime import memory
from ferrotype.runtime.pipeline import Pipeline
folder, budget, threads, size, limited = json.loads(sys.argv[1])
gc.collect(); memory.trim(); memory.reset_peak()
before = memory.read().resident
pipe = Pipeline.load(folder, threads=threads, memory=budget)
run = pipe.steps("a red apple", steps=2, size=tuple(size))
if limited:
    import re, resource
    planned = max(stage.arena + stage.host for stage in pipe.planned.stages)
    with open("/proc/self/status") as file:
        now = int(re.search(r"VmData:\\s+([0-9]+)", file.read())[1]) << 10
    most = now + planned + (threads + 3) * (1 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
*_, last = run
picture = pipe.decode(last)
found = memory.read().peak - before
print(json.dumps([pipe.planned.peak, found, hashlib.sha256(picture.tobytes()).hexdigest()]))
"""


def fresh(bundle, budget, threads=2, size=(256, 256), limited=False):
    """Predicted and measured peak, and the picture's hash, of a process that does only this.

    Stacks of its threads are of 1 MiB in place of 8: RLIMIT_DATA counts them whole.
    """
    given = json.dumps([str(bundle.folder), budget, threads, size, limited])
    command = ["sh", "-c", 'ulimit -s 1024; exec "$@"', "sh", sys.executable, "-c", WORKER, given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("model", "threads"), [("emoji", 1), ("wide", 4)])
def test_a_fresh_process_keeps_it_too(request, model, threads):
    """With the pages of the libraries that it touches for the first time."""
    bundle = request.getfixturevalue(model)
    least = smallest(bundle, Run((256, 256), 2), threads)
    pictures = set()
    for budget in (None, least):
        predicted, found, picture = fresh(bundle, budget, threads)
        assert found <= predicted + SLACK
        assert budget is None or found <= budget + SLACK
        assert predicted - found < 6 * MIB
        pictures.add(picture)
    assert len(pictures) == 1


def test_no_more_is_allocated_than_planned(emoji):
    """RLIMIT_DATA ends a process that asks for more anonymous memory, touched or not."""
    run = Run((512, 512), 2)
    free = fresh(emoji, None, size=run.size)[2]
    assert fresh(emoji, smallest(emoji, run, 2), size=run.size, limited=True)[2] == free


def test_nothing_large_is_allocated_beside_the_arena(wide):
    """While an engine runs: the array that it returns and the one that it was given, cast."""
    size = (256, 320)
    pipe = Pipeline(wide, 2)
    draw(pipe, steps=1, size=size)
    pipe._texts.clear()
    engine = Pipeline._run
    most = {}

    def watched(self, component, inputs, stage=None):
        engine(self, component, inputs, stage)  # loads it, and makes the program
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        outputs = engine(self, component, inputs, stage)
        most[component] = tracemalloc.get_traced_memory()[1] - before
        both = sum(array.size for array in (*inputs.values(), *outputs.values()))
        assert most[component] <= 4 * both + 64 * KIB, component
        return outputs

    tracemalloc.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pipeline, "_run", watched)
            draw(pipe, steps=1, size=size)
            draw(pipe, steps=1, size=size, image=Image.new("RGB", size), strength=1.0)
    finally:
        tracemalloc.stop()
    assert most.keys() == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}


# --- more than one picture ----------------------------------------------------------------------


def in_budget(bundle, run, use, threads=2):
    """The result of `use` without a budget, and within the smallest for a run."""
    whole = use(Pipeline(bundle, threads))
    budget = smallest(bundle, run, threads)
    pipe = Pipeline(bundle, threads, budget=budget)
    with measured() as found:
        assert use(pipe) == whole
    assert found[0] <= budget - WARM + SLACK
    return pipe


def test_one_picture_after_the_other(wide):
    """What the first leaves is gone before the tokenizer of the second is loaded."""

    def use(pipe):
        pictures = []
        for seed, prompt in enumerate(["a pizza", "a violin", "a pizza"]):
            *_, last = pipe.steps(prompt, steps=1, size=(256, 256), seed=seed)
            pictures.append(pipe.decode(last).tobytes())
        return pictures

    in_budget(wide, Run((256, 256), 1), use)


def test_a_large_tokenizer_after_a_picture(folder):
    """As Stable Diffusion's: its tables take more than a small decoder."""
    vocabulary = json.loads((EMBEDDED / "tokenizer" / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    for i in range(40_000):
        words[f"filling{i}</w>"] = len(words)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(vocabulary))
    text = TINY["text_encoder"] | {"vocab_size": len(words)}
    model = TINY | {"text_encoder": text}
    bundle = random_bundles.write(folder / "large", model, size=(128, 128), tokenizer=path)

    def use(pipe):
        pictures = []
        for prompt in ("a pizza", "a violin"):
            *_, last = pipe.steps(prompt, negative="blue", steps=1, size=(384, 384), guidance=2.0)
            pictures.append(pipe.decode(last).tobytes())
        return pictures

    in_budget(bundle, Run((384, 384), 1, 2), use)


def test_another_size_in_between(wide):
    def use(pipe):
        large = pipe.steps(PROMPT, steps=2, size=(256, 256))
        small = pipe.steps(PROMPT, steps=2, size=(64, 128))
        last, pictures = {}, []
        for a, b in zip(large, small, strict=True):  # in turn
            last = {"large": a, "small": b}
            pictures.append(pipe.decode(b).tobytes())
        return [*pictures, pipe.decode(last["large"]).tobytes()]

    in_budget(wide, Run((256, 256), 2), use)


def test_a_preview_is_decoded_within_the_budget(wide):
    def use(pipe):
        pictures = []
        for step in pipe.steps(PROMPT, steps=3, size=(192, 256)):
            pictures += [pipe.preview(step, decode=True).tobytes(), pipe.preview(step).tobytes()]
        return pictures

    in_budget(wide, Run((192, 256), 3), use)


def test_generators_take_turns_each_with_its_own_plan(wide):
    """Made one after the other, then stepped: the plan of the later is not that of the first."""
    pipe = Pipeline(wide, 2, budget=smallest(wide, Run((256, 256), 2), 2))
    first = pipe.steps(PROMPT, steps=2, size=(256, 256))
    second = pipe.steps("a pizza", steps=2, size=(64, 64))
    for step in (next(first), next(first)):
        assert pipe.planned.size == (256, 256), step.index
    next(second)
    assert pipe.planned.size == (64, 64)


def test_what_fits_stays_for_the_next_picture(wide):
    run = Run((128, 128), 2, repeats=True)
    plan = plans.make(wide, run)
    assert plan.residency == "resident"
    assert {stage.mode for stage in plan.stages} == {"resident"}
    assert plan.resident == sum(stage.weights for stage in plan.stages)
    assert plan.peak == max(plan.during(stage) for stage in plan.stages)
    assert plan.peak > plans.make(wide, dataclasses.replace(run, repeats=False)).peak

    pipe = Pipeline(wide, 2, resident=True, budget=plan.peak)
    whole = draw(Pipeline(wide, 2), steps=2, size=(128, 128))
    with measured() as found:
        for _ in range(2):
            *_, last = pipe.steps(PROMPT, steps=2, size=(128, 128))
            assert pipe.decode(last).tobytes() == whole
        assert pipe._engines.keys() == {"text_encoder", "unet", "vae_decoder"}
    assert found[0] <= plan.peak - WARM + SLACK


def test_where_not_all_fits_nothing_stays(wide):
    run = Run((128, 128), 2, repeats=True)
    staged = plans.make(wide, dataclasses.replace(run, repeats=False))
    assert plans.make(wide, run, staged.peak).residency == "staged"
    pipe = Pipeline(wide, 2, resident=True, budget=staged.peak)
    draw(pipe, steps=1, size=(128, 128))
    *_, last = pipe.steps(PROMPT, steps=1, size=(128, 128))
    pipe.decode(last)
    assert list(pipe._engines) == ["vae_decoder"]


def test_the_picture_to_begin_with_has_its_stage(wide):
    assert plans.make(wide, Run((128, 128), 1)).stage("vae_encoder") is None
    plan = plans.make(wide, Run((128, 128), 1, image=True))
    assert [s.component for s in plan.stages][1] == "vae_encoder"
    picture = Image.effect_noise((300, 200), 80)

    def use(pipe):
        return draw(pipe, image=picture, steps=4, strength=0.5, size=(256, 192))

    pipe = in_budget(wide, Run((256, 192), 4, image=True), use)
    assert pipe.planned.stage("vae_encoder").runs == 1


# --- the plan itself ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xl(folder):
    return random_bundles.write(folder / "xl", TINY_XL, size=(128, 128))


def test_a_plan_says_what_runs_how_often(wide, xl):
    def runs(bundle, *run):
        return {s.component: s.runs for s in plans.make(bundle, Run((128, 128), *run)).stages}

    assert runs(wide, 4) == {"text_encoder": 1, "unet": 4, "vae_decoder": 1}
    assert runs(wide, 4, 2) == {"text_encoder": 2, "unet": 8, "vae_decoder": 1}
    assert list(runs(xl, 3, 2, True).items()) == [
        ("text_encoder", 2), ("text_encoder_2", 2), ("vae_encoder", 1), ("unet", 6),
        ("vae_decoder", 1),
    ]  # fmt: skip


def test_equal_inputs_give_equal_plans(wide, monkeypatch):
    run = Run((256, 192), 3, 2, True)
    budget = smallest(wide, run, 2)
    first = plans.make(wide, run, budget, 2)
    assert plans.make(wide, run, budget, 2) == first
    monkeypatch.setattr(plans, "_costs", {})
    assert plans.make(wide, run, budget, 2) == first, "not kept: worked out anew"
    assert plans.make(wide, run, budget, 2).to_dict() == first.to_dict()
    copied = bundles.Bundle(Path(shutil.copytree(wide.folder, wide.folder / "copy")), wide.manifest)
    shutil.rmtree(wide.folder / "copy" / "unet" / "check", ignore_errors=True)
    try:
        assert plans.make(copied, run, budget, 2) == first
    finally:
        shutil.rmtree(wide.folder / "copy")


def test_a_run_is_laid_out_as_planned(wide):
    """The arena that the engine takes is the plan's, however often either is made."""
    for budget in (None, smallest(wide, Run((256, 192), 1), 2)):
        arenas = set()
        for _ in range(3):
            pipe = Pipeline(wide, 2, budget=budget)
            draw(pipe, steps=1, size=(256, 192))
            stage = pipe.planned.stage("vae_decoder")
            engine = native.NativeEngine(wide, "vae_decoder", 2, fit=stage.fit)
            layout = engine.layout({"latent_sample": (1, 4, 24, 32)})
            arenas |= {layout.arena_bytes, stage.arena}
        assert len(arenas) == 1


def test_a_plan_reads_no_weights(wide, tmp_path):
    """Sparse files of the same size do, and nobody may open them."""
    copy = Path(shutil.copytree(wide.folder, tmp_path / "copy"))
    for path in copy.rglob("weights.bin"):
        size = path.stat().st_size
        path.unlink()
        with path.open("wb") as file:
            file.truncate(size)
    run = Run((128, 128), 1)
    opened = []
    hook = [opened.append]
    sys.addaudithook(lambda event, args: hook and event == "open" and hook[0](str(args[0])))
    made = plans.make(bundles.load(copy), run)
    hook.clear()
    assert any(name.endswith("weights.json") for name in opened)
    assert not [name for name in opened if name.endswith("weights.bin")]
    assert made == plans.make(wide, run)


def test_a_plan_as_json(wide):
    made = plans.make(wide, Run((128, 192), 2), 300 * MIB, 2)
    data = json.loads(json.dumps(made.to_dict()))
    assert data["format"] == 1
    assert data["budget"] == 300 * MIB
    assert (data["size"], data["steps"], data["threads"]) == ([128, 192], 2, 2)
    assert data["peak"] == made.peak
    assert data["residency"] == made.residency == "staged"
    fields = {field.name for field in dataclasses.fields(plans.Stage)}
    assert all(stage.keys() == fields for stage in data["stages"])
    stages = [plans.Stage(**stage) for stage in data["stages"]]
    assert tuple(stages) == made.stages
    assert max(s["weights"] + s["arena"] + s["host"] - s["apart"] for s in data["stages"]) == (
        made.peak
    )


def test_less_memory_is_slower_never_faster(wide):
    run = Run((256, 256), 4)
    least, top = smallest(wide, run, 2), plans.make(wide, run, None, 2).peak
    made = [plans.make(wide, run, int(budget), 2) for budget in np.linspace(least, top, 40).round()]
    seconds, modes = [p.seconds for p in made], [p.residency for p in made]
    assert made[-1] == dataclasses.replace(plans.make(wide, run, None, 2), budget=top)
    assert all(p.peak <= p.budget for p in made)
    assert seconds[0] > seconds[-1]
    slower = sum(1 for a, b in itertools.pairwise(seconds) if b > 1.02 * a)
    assert not slower
    assert modes[-1] == "staged"
    assert "streamed" in modes


def test_a_budget_beyond_all_changes_nothing(wide):
    run = Run((128, 128), 2)
    free = plans.make(wide, run)
    assert plans.make(wide, run, free.peak).stages == free.stages
    assert plans.make(wide, run, 1 << 50).stages == free.stages


def test_a_refusal_names_the_stage_and_what_would_do(wide):
    for run in (Run((256, 256), 1), Run((64, 64), 1), Run((64, 256), 2, 2, True)):
        with pytest.raises(Refusal) as caught:
            plans.make(wide, run, 10 * MIB, 2)
        refusal, text = caught.value, str(caught.value)
        width, height = run.size
        assert text.startswith(f"{refusal.stage} needs at least ")
        assert f"for {width}x{height}, the budget is 10 MiB: try --memory " in text
        assert "\n" not in text
        written = memory.parse_bytes(text.split("--memory ")[1].split(" ")[0])
        assert written >= refusal.smallest
        made = plans.make(wide, run, written, 2)
        assert made.peak <= written
        assert plans.make(wide, run, refusal.smallest, 2).peak == refusal.smallest
        with pytest.raises(Refusal):
            plans.make(wide, run, refusal.smallest - 1, 2)


@few(max_examples=6 * MORE)
@given(
    sides=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    passes=st.integers(1, 2),
    image=st.booleans(),
    repeats=st.booleans(),
    tiled=st.booleans(),
    threads=st.integers(1, 8),
    isa=st.sampled_from([None, *(kernels.isas() if kernels.available() else [])]),
)
def test_the_smallest_budget_works_and_a_byte_less_does_not(
    wide, sides, passes, image, repeats, tiled, threads, isa
):
    run = Run((32 * sides[0], 32 * sides[1]), 2, passes, image, repeats)
    least = smallest(wide, run, threads, isa=isa, tiles=tiled)
    assert plans.make(wide, run, least, threads, isa, tiled).peak <= least
    with pytest.raises(Refusal) as caught:
        plans.make(wide, run, least - 1, threads, isa, tiled)
    assert caught.value.smallest == least


def test_an_instruction_set_of_its_own_is_planned_for(wide):
    """Scratch differs: a plan for one is not for another."""
    run = Run((256, 256), 1)
    for isa in kernels.isas():
        made = plans.make(wide, run, None, 2, isa)
        engine = native.NativeEngine(wide, "vae_decoder", 2, isa)
        layout = engine.layout({"latent_sample": (1, 4, 32, 32)})
        assert made.stage("vae_decoder").arena == layout.arena_bytes


# --- tiles --------------------------------------------------------------------------------------


@st.composite
def tilings(draw):
    scale = draw(st.sampled_from([2, 4, 8]))
    side = scale * draw(st.sampled_from([8, 16]))
    return scale, side, draw(st.integers(1, 3 * side // scale)), draw(st.integers(1, 40))


@few(max_examples=25 * MORE)
@given(tiling=tilings())
def test_tiles_of_a_pixelwise_map_are_exact(tiling):
    """What needs no neighbours is the same in a tile."""
    scale, side, h, w = tiling
    latents = np.random.default_rng(0).standard_normal((1, 4, h, w), np.float32)

    def run(piece):
        assert max(piece.shape[2:]) <= side // scale
        bright = (2 * piece[:, :3] - piece[:, 3:]).repeat(scale, 2).repeat(scale, 3)
        return bright.astype(np.float32)

    found = tiles.decode(latents, side, scale, run)
    assert found.shape == (1, 3, scale * h, scale * w)
    np.testing.assert_allclose(found, run_whole(latents, scale), rtol=1e-5, atol=1e-5)


def run_whole(latents, scale):
    return (2 * latents[:, :3] - latents[:, 3:]).repeat(scale, 2).repeat(scale, 3)


@given(length=st.integers(1, 400), tile=st.integers(4, 128))
def test_tiles_cover_a_side_and_overlap(length, tile):
    first = tiles.starts(length, tile)
    assert first[0] == 0
    assert first == sorted(set(first))
    assert first[-1] + tile == max(length, tile)
    assert all(b - a <= tile - tile // tiles.OVERLAP for a, b in itertools.pairwise(first))


def psnr(a, b):
    a, b = (np.asarray(image, np.float64) for image in (a, b))
    return 10 * np.log10(255**2 / ((a - b) ** 2).mean())


def test_tiles_fit_where_nothing_else_does_and_say_so(emoji):
    """The embedded model at 256x256 in tiles of 128 pixels: 24 to 34 dB, as measured."""
    run = Run((256, 256), 2)
    with pytest.raises(Refusal, match="--tiles"):
        plans.make(emoji, run, 1, 2)
    least = smallest(emoji, run, 2)
    budget = smallest(emoji, run, 2, tiles=True)
    assert budget < least
    assert plans.make(emoji, run, least, 2, tiles=True).stage("vae_decoder").tile == 0, (
        "last of all"
    )
    decoder = plans.make(emoji, run, budget, 2, tiles=True).stage("vae_decoder")
    assert decoder.tile == 128
    assert decoder.note.endswith("tiles of 128 pixels: the picture changes")

    whole = Pipeline(emoji, 2).generate(PROMPT, steps=2, size=(256, 256))
    pipe = Pipeline(emoji, 2, budget=budget, tiles=True)
    with measured() as found:
        picture = pipe.generate(PROMPT, steps=2, size=(256, 256))
    assert found[0] <= budget - WARM + SLACK
    assert 22 < psnr(picture, whole) < 40


@pytest.mark.parametrize("size", [(64, 320), (320, 64), (192, 160)], ids=str)
def test_tiles_of_long_pictures(wide, size):
    """One side may be shorter than a tile."""
    budget = smallest(wide, Run(size, 1), 2, tiles=True)
    assert budget <= smallest(wide, Run(size, 1), 2)
    stages = [
        stage
        for stage in plans._Case(wide, Run(size, 1), 2, None, True, 1e11).offers("vae_decoder", 1)
        if stage.tile
    ]
    assert {stage.tile for stage in stages} == {n for n in tiles.SIDES if n < max(size)}
    whole = draw(Pipeline(wide, 2), steps=1, size=size)
    small = draw(Pipeline(wide, 2, budget=budget, tiles=True), steps=1, size=size)
    assert len(small) == len(whole)
