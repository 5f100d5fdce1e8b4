"""PSNR, cosine and census are the formulas; floors stop what is below them."""

import math

import numpy as np
import pytest

from ferrotype import parity

rng = np.random.default_rng()


def test_psnr_is_the_formula():
    reference = rng.uniform(0, 1, (40, 50, 3))
    found = reference + rng.normal(0, 0.01, reference.shape)
    error = math.sqrt(np.mean((reference - found) ** 2))
    assert parity.psnr(reference, found, peak=1.0) == pytest.approx(-20 * math.log10(error))
    span = np.ptp(reference)
    assert parity.psnr(reference, found) == pytest.approx(20 * math.log10(span / error))


def test_psnr_of_equal_arrays_is_the_cap():
    x = rng.standard_normal(17)
    assert parity.psnr(x, x) == parity.PSNR_CAP


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_no_parity(value):
    x = rng.standard_normal(17)
    broken = x.copy()
    broken[3] = value
    result = parity.compare([x], [broken])
    assert result.psnr == 0.0
    assert result.census.nan + result.census.inf == 1
    assert math.isfinite(result.cosine)
    assert math.isfinite(result.max_error)


def test_census_counts_what_draws_black():
    x = np.array([1.0, np.nan, -70000.0, np.inf, -np.inf, np.nan], np.float32)
    assert parity.census(x) == parity.Census(nan=2, inf=2, max_abs=70000.0)
    assert parity.census(x).fp16_headroom == pytest.approx(65504 / 70000)
    assert parity.census(np.zeros(0)).max_abs == 0


def test_cosine():
    x = rng.standard_normal(100)
    assert parity.cosine(x, 3 * x) == pytest.approx(1)
    assert parity.cosine(x, -x) == pytest.approx(-1)
    assert parity.cosine(np.zeros(3), np.zeros(3)) == 1
    assert parity.cosine(np.zeros(3), np.ones(3)) == 0


def test_compare_takes_all_runs_as_one_signal():
    a, b = rng.standard_normal((2, 3, 7))
    noise = np.zeros(7)
    noise[0] = 0.1
    result = parity.compare([a[0], a[1]], [a[0], a[1] + noise])
    assert result.max_error == pytest.approx(0.1)
    assert result.psnr < parity.psnr(a[0], a[0])
    with pytest.raises(ValueError, match="shapes differ"):
        parity.compare([a[0]], [b[0][:5]])
    with pytest.raises(ValueError, match="1 runs"):
        parity.compare([a[0]], [])


def test_every_precision_has_floors_and_others_are_named():
    for precision in parity.FLOORS:
        assert parity.floors(*precision).keys() == {"component", "picture"}
    with pytest.raises(ValueError, match="fp32 weights with fp32 activations"):
        parity.floors("fp32", "fp16")


def test_below_the_floor_is_an_error():
    parity.check("unet", 45.0, 45.0)
    with pytest.raises(parity.ParityError, match=r"^unet: PSNR 44\.9 dB, the floor is 45 dB; x$"):
        parity.check("unet", 44.9, 45.0, "; x")
