"""Noise schedules and spacings: published values, and diffusers' arrays."""

import numpy as np
import pytest

from ferrotype import bundle
from ferrotype.bundle import Recipe
from ferrotype.runtime import schedules

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def timesteps(steps, spacing, strength=None, **options):
    recipe = Recipe("ddim", steps, 1.0, spacing=spacing, **options)
    return schedules.timesteps(recipe, strength).tolist()


def test_stable_diffusion_values():
    cumprod = schedules.alphas_cumprod(Recipe("ddim", 1, 1.0))
    assert cumprod.dtype == np.float64
    assert cumprod.shape == (1000,)
    expected = {999: 0.00466010, 759: 0.05221293, 499: 0.27766965, 259: 0.65897553, 249: 0.67543241}
    for t, value in expected.items():
        assert cumprod[t] == pytest.approx(value, rel=2e-6)
    levels = schedules.sigmas(cumprod)
    for t, value in {999: 14.614641, 759: 4.260557, 499: 1.612886, 249: 0.693205}.items():
        assert levels[t] == pytest.approx(value, rel=2e-6)


@pytest.mark.parametrize(
    ("spacing", "steps", "expected"),
    [
        ("trailing", 1, [999]),
        ("trailing", 3, [999, 666, 332]),
        ("trailing", 8, [999, 874, 749, 624, 499, 374, 249, 124]),  # 875 - 1, 625 - 1, ...
        ("trailing", 16, [999, 937, 874, 811, 749, 687, 624, 561, 499, 437, 374, 311, 249, 187,
                          124, 61]),  # 937.5 and 812.5 round to even
        ("leading", 4, [751, 501, 251, 1]),
        ("linspace", 1, [0]),
        ("linspace", 3, [999, 500, 0]),  # 499.5 rounds to even
        ("lcm", 1, [999]),
        ("lcm", 4, [999, 759, 499, 259]),
        ("lcm", 6, [999, 839, 679, 499, 339, 179]),
        ("lcm", 8, [999, 879, 759, 639, 499, 379, 259, 139]),
    ],
)  # fmt: skip
def test_spacings(spacing, steps, expected):
    assert timesteps(steps, spacing) == expected


@pytest.mark.parametrize(
    ("spacing", "steps", "strength", "expected"),
    [
        ("leading", 4, 0.5, [251, 1]),
        ("leading", 4, 0.99, [501, 251, 1]),
        ("leading", 4, 1.0, [751, 501, 251, 1]),
        ("trailing", 10, 0.29, [199, 99]),
        ("lcm", 4, 0.5, [499, 379, 259, 139]),  # the lattice of 25 points, not its tail
        ("lcm", 29, 0.59, [20 * i - 1 for i in range(29, 0, -1)]),  # int(29.499...)
    ],
)
def test_strength(spacing, steps, strength, expected):
    assert timesteps(steps, spacing, strength) == expected


def test_trailing_always_has_as_many_as_asked_for():
    for steps in range(1, 1001):  # numpy's arange has one more for 61, 103, 121 and 59 others
        assert len(timesteps(steps, "trailing")) == steps


def test_log_snr_solvers_leave_the_last_point_out():
    recipe = Recipe("unipc", 4, 1.0)
    assert schedules.timesteps(recipe, open_end=True).tolist() == [801, 601, 401, 201]
    linspace = Recipe("unipc", 4, 1.0, spacing="linspace")
    assert schedules.timesteps(linspace, open_end=True).tolist() == [999, 749, 500, 250]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", schedules.BETAS)
def test_schedules_match_diffusers(name, zero):
    diffusers = pytest.importorskip("diffusers")
    recipe = Recipe("ddim", 4, 1.0, beta_schedule=name, zero_terminal_snr=zero)
    found = schedules.alphas_cumprod(recipe)
    expected = diffusers.DDIMScheduler(
        1000, 0.00085, 0.012, name, rescale_betas_zero_snr=zero
    ).alphas_cumprod.numpy()
    assert np.abs(found - expected).max() < 1e-6
    assert (found[-1] == 0) == (expected[-1] == 0) == zero
    assert (np.diff(found) < 0).all()
    assert np.isfinite(schedules.sigmas(found)).all()
    if zero:
        assert schedules.sigmas(found)[-1] == np.sqrt(2.0**24 - 1)


def test_karras_ends_at_both_ends_and_timesteps_invert():
    levels = schedules.sigmas(schedules.alphas_cumprod(Recipe("ddim", 4, 1.0)))
    sigma = schedules.karras(levels, 10)
    assert sigma[[0, -1]] == pytest.approx(levels[[-1, 0]])
    steps = np.diff(sigma ** (1 / 7))
    assert steps == pytest.approx(np.full(9, steps[0]))
    assert schedules.timestep_of(levels, levels) == pytest.approx(np.arange(1000))


def test_manifest_and_tables_know_the_same_names():
    assert sorted(bundle.SPACINGS) == sorted(schedules.SPACINGS)
    assert sorted(bundle.BETA_SCHEDULES) == sorted(schedules.BETAS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_offset": 400}, "from 1150 to 400"),
        ({"steps_offset": -1}, "from 749 to -1"),
        ({"beta_start": 0.5, "beta_end": 0.4}, "must rise"),
        ({"original_steps": 2000, "spacing": "lcm"}, "original_steps is 2000, the most is 1000"),
        ({"original_steps": 0, "spacing": "lcm"}, "original_steps must be a whole number from 1"),
        ({"steps": 601, "train_steps": 600}, "steps is 601, the most is 600"),
        ({"steps": 2.5}, "steps must be a whole number from 1, found 2.5"),
    ],
)
def test_errors(options, message):
    recipe = Recipe(**{"sampler": "ddim", "steps": 4, "guidance": 1.0} | options)
    with pytest.raises(ValueError, match=message):
        schedules.timesteps(recipe), schedules.alphas_cumprod(recipe)
