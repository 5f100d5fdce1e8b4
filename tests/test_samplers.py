"""Tables against diffusers' schedulers over whole trajectories, and the table as plain data."""

import json
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrotype.bundle import Recipe
from ferrotype.runtime import samplers, schedules
from ferrotype.runtime.seeds import TorchNoise

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# diffusers hands torch tensors to np.array, which numpy 2.4 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (1, 4, 5, 7)
RELATIVE = 1e-4  # diffusers computes its schedules in float32, we in float64
CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_karras": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
LATTICE = ("lcm", "tcd")
FEW = (1, 2, 3, 4, 8, 14, 15, 50)

rng = np.random.default_rng(0)
MIX = rng.standard_normal((4, 4)).astype(np.float32) * np.float32(0.7)
SHIFT = rng.standard_normal((4, 1)).astype(np.float32)


def network(x, timestep):
    """A fixed nonlinear function of x and t with outputs of the size of noise."""
    wave = np.float32(math.sin(timestep / 150))
    flat = MIX @ x.reshape(4, -1) + SHIFT * wave
    return np.float32(1.5) * np.tanh(flat).reshape(x.shape)


def spacings(sampler):
    if sampler == "dpmpp_2m_karras":
        return ("leading",)  # it places its own timesteps
    return ("lcm",) if sampler in LATTICE else ("leading", "trailing", "linspace")


def scheduler(recipe):
    options = {
        "num_train_timesteps": recipe.train_steps,
        "beta_start": recipe.beta_start,
        "beta_end": recipe.beta_end,
        "beta_schedule": recipe.beta_schedule,
        "prediction_type": recipe.prediction_type,
        "rescale_betas_zero_snr": recipe.zero_terminal_snr,
        "steps_offset": recipe.steps_offset,
    }
    if recipe.spacing != "lcm":
        options["timestep_spacing"] = recipe.spacing
    if recipe.sampler in LATTICE:
        options["original_inference_steps"] = recipe.original_steps
        options["timestep_scaling"] = recipe.timestep_scaling
    if recipe.sampler in ("ddim", *LATTICE):
        options |= {"clip_sample": False, "set_alpha_to_one": recipe.set_alpha_to_one}
    if recipe.sampler == "dpmpp_2m_karras":
        options["use_karras_sigmas"] = True
    return getattr(diffusers, CLASSES[recipe.sampler])(**options)


def theirs(recipe, strength, image):
    """The latents after each step, as StableDiffusion(Img2Img)Pipeline would compute them."""
    s = scheduler(recipe)
    generator = torch.Generator("cpu").manual_seed(7)
    shortened = {"strength": strength} if recipe.spacing == "lcm" and strength else {}
    if recipe.timesteps:
        s.set_timesteps(timesteps=list(recipe.timesteps))
    else:
        s.set_timesteps(recipe.steps, **shortened)
    timesteps, begin = s.timesteps, 0
    if strength and not shortened:
        begin = max(recipe.steps - min(int(recipe.steps * strength), recipe.steps), 0)
        timesteps = timesteps[begin:]
    if hasattr(s, "set_begin_index"):
        # Text-to-image pipelines leave it unset; then a first timestep that occurs twice (Karras)
        # makes diffusers skip a step and fail at the end, which is not worth reproducing.
        s.set_begin_index(begin)
    x = torch.randn(SHAPE, generator=generator)
    x = s.add_noise(image, x, timesteps[:1]) if strength else x * s.init_noise_sigma
    extra = {"eta": recipe.eta} if recipe.sampler in ("ddim", "tcd") else {}
    if recipe.sampler in ("ddim", "tcd", "euler_a", "lcm"):
        extra["generator"] = generator
    trace = [x.numpy()]
    for t in timesteps:
        output = torch.from_numpy(network(s.scale_model_input(x, t).numpy(), float(t)))
        x = s.step(output, t, x, **extra).prev_sample
        trace.append(x.numpy())
    return timesteps.numpy(), trace


def ours(recipe, strength, image, table, net):
    noise = TorchNoise(7)
    x = samplers.start(table, noise(SHAPE), image.numpy() if strength else None)
    return [x, *(step.latents for step in samplers.sample(net, x, table, noise))]


def check(recipe, strength=None, allowed_shift=0.0):
    image = torch.from_numpy(np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32))
    timesteps, expected = theirs(recipe, strength, image)
    table = samplers.table(recipe, strength)
    shift = np.abs([row.timestep for row in table.rows] - timesteps.astype(np.float32))
    assert shift.max() <= allowed_shift, recipe
    rows = zip(table.rows, timesteps.tolist(), strict=True)
    table = replace(table, rows=tuple(row._replace(timestep=t) for row, t in rows))
    found = ours(recipe, strength, image, table, network)
    assert len(found) == len(expected)
    # Near t = 0 float32 keeps few digits of 1 - alpha_cumprod: those of diffusers are the fewer.
    relative = max(RELATIVE, 2**-24 / (1 - schedules.alphas_cumprod(recipe)[0]))
    before = 0.0
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == np.float32
        size = np.abs(b).max()
        # Euler's x is up to 20,000 times the result; diffusers subtracts numbers of that size.
        error, limit = np.abs(a - b).max(), relative * size + 2**-22 * before
        assert error < limit, f"{error:.2g} after step {i} of {recipe}, strength {strength}"
        before = max(before, size)
    return shift


CASES = [
    (sampler, prediction, spacing)
    for sampler in samplers.SAMPLERS
    for prediction in PREDICTIONS
    for spacing in spacings(sampler)
    if (sampler, prediction) != ("euler_a", "sample")  # diffusers: NotImplementedError; see below
]


# In float32 diffusers rounds 575.4998 and 341.4997 up: one timestep is 1 higher than ours.
KARRAS_HALVES = {18: [7], 35: [14], 43: [23]}


@pytest.mark.parametrize(("sampler", "prediction", "spacing"), CASES)
def test_every_step_count_matches_diffusers(sampler, prediction, spacing):
    for steps in range(1, 51):
        recipe = Recipe(sampler, steps, 1, prediction, spacing, eta=0.3 * (sampler == "tcd"))
        halves = KARRAS_HALVES.get(steps, []) if sampler == "dpmpp_2m_karras" else []
        shift = check(recipe, allowed_shift=1 if halves else 0)
        assert np.flatnonzero(shift).tolist() == halves


OPTIONS = [  # and the samplers or the spacing that heed them
    ({"zero_terminal_snr": True}, samplers.SAMPLERS),
    ({"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}, samplers.SAMPLERS),
    ({"beta_schedule": "squaredcos_cap_v2"}, samplers.SAMPLERS),
    ({"train_steps": 600}, samplers.SAMPLERS),
    ({"steps_offset": 0}, "leading"),
    ({"set_alpha_to_one": True}, ("ddim",)),
    ({"eta": 0.5, "set_alpha_to_one": True}, ("ddim",)),
    ({"eta": 0.5}, ("ddim", "tcd")),
    ({"eta": 1.0}, ("ddim", "tcd")),
    ({"original_steps": 100, "timestep_scaling": 0.002}, LATTICE),
]
OPTION_CASES = [
    (*case, option)
    for option, heeded in OPTIONS
    for case in CASES
    if case[0] in heeded or case[2] == heeded
]


# Found by trying 1 to 50 steps.
NEGATIVE = [("euler_a", "squaredcos_cap_v2", *at) for at in (("trailing", 3), ("linspace", 4))]


def impossible(recipe):
    """Why there is nothing to compare with: what diffusers gives is not a number."""
    from_top = recipe.spacing == "trailing" or (recipe.spacing == "linspace" and recipe.steps > 1)
    divides = recipe.sampler in LATTICE or (recipe.sampler == "ddim" and from_top)
    if recipe.zero_terminal_snr and recipe.prediction_type == "epsilon" and divides:
        return "divides by alpha_cumprod 0"
    if (recipe.sampler, recipe.beta_schedule, recipe.spacing, recipe.steps) in NEGATIVE:
        return "sigma_down^2 rounds below 0 in float32"
    return None


@pytest.mark.parametrize(("sampler", "prediction", "spacing", "option"), OPTION_CASES, ids=str)
def test_options_match_diffusers(sampler, prediction, spacing, option):
    for steps in (1, 2, 3, 4, 15):
        recipe = Recipe(sampler, steps, 1, prediction, spacing, **option)
        if reason := impossible(recipe):
            with np.errstate(invalid="ignore"):
                _, trace = theirs(recipe, None, None)
            assert not np.isfinite(trace[-1]).all()
            if reason.startswith("divides"):
                with pytest.raises(ValueError, match="no finite steps"):
                    samplers.table(recipe)
            else:
                samplers.table(recipe)  # which checks that it is finite
            continue
        # With the cosine schedule diffusers cuts Karras timesteps off instead of rounding them.
        cut = sampler == "dpmpp_2m_karras" and option.get("beta_schedule") == "squaredcos_cap_v2"
        check(recipe, allowed_shift=1 if cut else 0)


@pytest.mark.parametrize("strength", [0.3, 0.58, 0.75, 0.99, 1.0])
@pytest.mark.parametrize(("sampler", "prediction", "spacing"), CASES)
def test_image_starts_match_diffusers(sampler, prediction, spacing, strength):
    for steps in (4, 11):
        if spacing == "lcm" and steps > int(50 * strength):
            continue  # both refuse: test_errors
        check(Recipe(sampler, steps, 1, prediction, spacing, eta=0.5), strength)


def test_euler_a_does_the_maths_that_diffusers_has_not():
    """Its `sample` prediction raises NotImplementedError: compare with its epsilon prediction."""
    for steps in FEW:
        recipe = Recipe("euler_a", steps, 1, "sample", "trailing")
        with pytest.raises(NotImplementedError):
            theirs(recipe, None, None)
        epsilon = replace(recipe, prediction_type="epsilon")
        sigmas = {row.timestep: -row.b for row in samplers.table(epsilon).rows}

        def denoised(x, t, sigmas=sigmas):
            """The network's epsilon as a clean sample; it sees x divided by hypot(sigma, 1)."""
            sigma = np.float32(sigmas[t])
            return x * np.hypot(sigma, np.float32(1)) - sigma * network(x, t)

        _, expected = theirs(epsilon, None, None)
        found = ours(recipe, None, None, samplers.table(recipe), denoised)
        assert np.abs(found[-1] - expected[-1]).max() < RELATIVE * np.abs(expected[-1]).max()


@pytest.mark.parametrize("sampler", ["lcm", "tcd", "euler", "dpmpp_2m"])
def test_listed_timesteps_match_diffusers(sampler):
    spacing = "lcm" if sampler in LATTICE else "trailing"
    for listed in [(800,), (999, 759, 499, 259)]:
        check(Recipe(sampler, len(listed), 1, spacing=spacing, timesteps=listed, eta=0.2))


def test_diffusers_has_a_step_too_many_with_trailing():
    """61 of 1000 (and 61 other counts): its arange yields a last timestep -1; ours are 61."""
    s = scheduler(Recipe("ddim", 61, 1, spacing="trailing"))
    s.set_timesteps(61)
    assert s.timesteps.tolist()[60:] == [15, -1] or len(s.timesteps) == 62
    table = samplers.table(Recipe("ddim", 61, 1, spacing="trailing"))
    assert [row.timestep for row in table.rows] == s.timesteps.tolist()[:61]


# --- without diffusers: the table as data ---------------------------------------------------------

recipes = st.builds(
    Recipe,
    sampler=st.sampled_from(sorted(samplers.SAMPLERS)),
    steps=st.integers(1, 50),
    guidance=st.just(1.0),
    prediction_type=st.sampled_from(PREDICTIONS),
    spacing=st.sampled_from(["trailing", "linspace", "lcm"]),
    beta_schedule=st.sampled_from(sorted(schedules.BETAS)),
    set_alpha_to_one=st.booleans(),
    eta=st.floats(0, 1),
)


@settings(max_examples=150, deadline=None)
@given(recipes, st.sampled_from([None, 1.0]))
def test_tables_are_finite_float32_and_survive_json(recipe, strength):
    table = samplers.table(recipe, strength)
    assert table == samplers.table(recipe, strength)
    numbers = [table.start_image, table.start_noise, *(v for row in table.rows for v in row)]
    assert all(math.isfinite(v) and float(np.float32(v)) == v for v in numbers)
    assert table.rows[-1].cn == 0 or recipe.sampler == "ddim"
    assert samplers.from_json(samplers.to_json(table)) == table
    assert samplers.to_json(samplers.from_json(samplers.to_json(table))) == samplers.to_json(table)


@settings(max_examples=60, deadline=None)
@given(recipes.filter(lambda r: r.sampler not in ("ddim", "tcd")))
def test_a_network_that_knows_the_answer_is_believed(recipe):
    """Whatever the steps, a constant clean sample is where every sampler that ends at 0 ends."""
    if (recipe.sampler, recipe.spacing) == ("lcm", "linspace"):
        return  # its last timestep is 0, where LCM's boundary condition returns x
    table = samplers.table(replace(recipe, prediction_type="sample"))
    answer = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    noise = TorchNoise(3)
    x = samplers.start(table, noise(SHAPE))
    *_, last = samplers.sample(lambda x, t: answer, x, table, noise)
    # LCM's boundary condition keeps a little of x at small t.
    assert np.abs(last.latents - answer).max() < (1e-3 if recipe.sampler == "lcm" else 2e-4)
    assert (last.index, last.total) == (recipe.steps, recipe.steps)


TINY = Recipe(
    "euler_a",
    2,
    1,
    "epsilon",
    "trailing",
    2,
    beta_start=0.36,
    beta_end=0.75,
    beta_schedule="linear",
)
# By hand: alphas_cumprod .64 and .16, so sigma .75 and sqrt(5.25); start_noise is the larger.
# up = .75 sqrt(1 - .5625/5.25) = .75 * 5/sqrt(28), down = .75^2/sqrt(5.25),
# so cx = down/sqrt(5.25) = 3/28.
TINY_JSON = """{
 "format": "ferrotype-sampler",
 "version": 1,
 "sampler": "euler_a",
 "start_image": 0.0,
 "start_noise": 2.291288,
 "columns": ["timestep", "scale", "a", "b", "cx", "c0", "c1", "c2", "cn"],
 "rows": [
  [1.0, 0.4, 1.0, -2.291288, 0.10714286, 0.89285713, 0.0, 0.0, 0.7086834],
  [0.0, 0.8, 1.0, -0.75, 0.0, 1.0, 0.0, 0.0, 0.0]
 ]
}
"""
TINY_TEXT = """euler_a: x = 2.291288*noise
timestep  scale  a          b         cx         c0         cn
       1    0.4  1  -2.291288  0.1071429  0.8928571  0.7086834
       0    0.8  1      -0.75          0          1          0"""


def test_json_and_text_of_a_table_checked_by_hand():
    table = samplers.table(TINY)
    assert samplers.to_json(table) == TINY_JSON
    assert samplers.format_table(table) == TINY_TEXT
    assert samplers.from_json(TINY_JSON) == table


def float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def host(text, model, noise, image=None):
    """The loop of docs/samplers.md in plain Python; `noise()` draws one list of floats."""

    def total(*terms):
        terms = [[float32(float32(c) * v) for v in values] for c, values in terms if c]
        while len(terms) > 1:
            terms[:2] = [[float32(p + q) for p, q in zip(*terms[:2], strict=True)]]
        return terms[0]

    table = json.loads(text)
    x = total((table["start_image"], image), (table["start_noise"], noise()))
    previous = before = None
    for timestep, scale, a, b, cx, c0, c1, c2, cn in table["rows"]:
        denoised = total((a, x), (b, model(total((scale, x)), timestep)))
        fresh = noise() if cn else None
        x = total((cx, x), (c0, denoised), (c1, previous), (c2, before), (cn, fresh))
        previous, before = denoised, previous
    return x


@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_host_without_numpy_gets_the_same_bits(sampler, strength):
    recipe = Recipe(sampler, 5, 1, "v_prediction", "lcm", eta=0.4)
    table = samplers.table(recipe, strength)
    noise, image = TorchNoise(11), TorchNoise(12)((20,))
    x = samplers.start(table, noise((20,)), image)
    quarter = np.float32(0.25)
    *_, last = samplers.sample(lambda x, t: (x - quarter) * x * quarter, x, table, noise)

    def model(x, timestep):
        return [float32(float32(float32(v - 0.25) * v) * 0.25) for v in x]

    noise = TorchNoise(11)
    found = host(samplers.to_json(table), model, lambda: noise((20,)).tolist(), image.tolist())
    assert np.array(found, np.float32).tobytes() == last.latents.tobytes()


def test_noise_is_drawn_only_where_it_is_used_and_the_caller_may_stop():
    table = samplers.table(Recipe("lcm", 4, 1, spacing="lcm"))
    draws = []
    noise = lambda shape: draws.append(shape) or np.zeros(shape, np.float32)  # noqa: E731
    steps = samplers.sample(network, np.ones(SHAPE, np.float32), table, noise)
    assert draws == []
    assert next(steps).index == 1
    steps.close()
    assert draws == [SHAPE]
    list(samplers.sample(network, np.ones(SHAPE, np.float32), table, noise))
    assert len(draws) == 1 + 3


def test_a_float64_model_output_does_not_promote_the_latents():
    table = samplers.table(Recipe("unipc", 4, 1, spacing="trailing"))
    x = np.ones(SHAPE, np.float32)
    for step in samplers.sample(lambda x, t: x.astype(np.float64), x, table, np.zeros):
        assert step.latents.dtype == step.denoised.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "strength", "message"),
    [
        ({"sampler": "plms"}, None, "unknown sampler 'plms': choose from ddim, euler"),
        ({"spacing": "even"}, None, "spacing"),
        ({"prediction_type": "flow"}, None, "prediction"),
        ({"beta_schedule": "sigmoid"}, None, "beta"),
        ({"steps": 0}, None, "steps"),
        ({"steps": 51}, None, "51 steps need as many points of the lcm lattice"),
        ({"steps": 1001, "spacing": "trailing"}, None, "steps"),
        ({"steps": 1000, "spacing": "leading"}, None, "from 1000 to 1 in 1000 steps"),
        ({"eta": math.nan}, None, "eta is nan"),
        ({"eta": 1.5}, None, "eta is 1.5"),
        ({}, 0.0, "strength is 0.0"),
        ({}, 1.01, "strength is 1.01"),
        ({}, math.nan, "strength is nan"),
        ({}, 0.06, "strength 0.06 leaves 3 of 50"),
        ({"spacing": "trailing"}, 0.2, "leaves none of 4 steps: use at least 0.25"),
        ({"sampler": "lcm", "spacing": "leading"}, None, "set spacing to lcm"),
        ({"sampler": "dpmpp_2m_karras", "timesteps": (1, 0)}, None, "leave recipe.timesteps empty"),
        ({"timesteps": (800,)}, None, "1 timesteps are listed for 4 steps"),
        ({"timesteps": (9, 8, 7, 7)}, None, "must fall strictly"),
        ({"timesteps": (9, 8, 7.5, 7)}, None, "ddim needs whole timesteps"),
    ],
)
def test_errors_are_one_line_with_value_and_limit(change, strength, message):
    with pytest.raises(ValueError, match=message) as error:
        samplers.table(
            Recipe(**{"sampler": "ddim", "steps": 4, "guidance": 1.0, "spacing": "lcm"} | change),
            strength,
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 2', "make it again"),
        ('"format": "ferrotype-sampler"', '"format": "x"', "make it again"),
        ('"scale", "a"', '"a", "scale"', "columns"),
        ("0.7086834", "NaN", "finite"),
        ("0.7086834", "1e60", "finite"),
        ("0.7086834", '"0"', "not a number"),
        ("0.7086834", "true", "not a number"),
        (", 0.7086834", "", "not a sampler table"),
        ('"rows"', '"row"', "unknown key row"),
        ('"rows": [', '"rows": [], "x": [', "unknown key x"),
        ('"start_noise"', '"start_image"', "start_noise"),
        ("{", "", "not a sampler table"),
    ],
)
def test_damaged_json_is_refused(old, new, message):
    with pytest.raises(ValueError, match=message):
        samplers.from_json(TINY_JSON.replace(old, new))


def test_a_table_for_an_image_asks_for_it():
    with pytest.raises(ValueError, match="give its latents"):
        samplers.start(samplers.table(Recipe("ddim", 4, 1), 0.5), np.zeros(SHAPE, np.float32))
