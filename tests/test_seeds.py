"""Noise: torch's bits with and without torch, NumPy's streams, and the arithmetic below them."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrotype.runtime import seeds

SHAPES = [(1,), (7,), (15,), (16,), (), (17,), (31,), (3,), (33,), (0,), (1000,), (2, 5),
          (1, 4, 64, 64), (1,), (1, 4, 5, 7), (2, 4, 8, 8)]  # fmt: skip

# torch.randn(17) after manual_seed(42), then torch.randn(3), as hexadecimal float32.
STORED = """
0x1.ed4a520000000p+0 -0x1.46db0a0000000p-3 -0x1.fd55c80000000p-2 0x1.c223b00000000p-2
-0x1.8429c40000000p-1 0x1.140ca00000000p+0 0x1.9a02880000000p-1 0x1.ae3d260000000p+0
0x1.6c668a0000000p-2 0x1.4be25e0000000p+0 0x1.388f100000000p-1 0x1.55b1600000000p+0
-0x1.da5dda0000000p-3 0x1.5618000000000p-5 -0x1.019cf40000000p-2 0x1.b83f600000000p-1
-0x1.3d29040000000p-2 -0x1.245a080000000p-1 -0x1.f32c2c0000000p-1 0x1.7da1b40000000p-3
"""


def vectorised(torch):
    """torch on x86-64 with AVX2; elsewhere it rounds otherwise (docs/samplers.md)."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1, 2**32, 123456789012345, 2**64 - 1])
def test_torch_bit_for_bit_over_successive_draws(seed):
    torch = pytest.importorskip("torch")
    if not vectorised(torch):
        pytest.skip("this torch is not the vectorised one")
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = seeds.TorchNoise(seed)
    for shape in SHAPES:
        expected, found = torch.randn(shape, generator=generator).numpy(), noise(shape)
        assert (found.shape, found.dtype) == (expected.shape, np.float32)
        assert found.tobytes() == expected.tobytes(), shape


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 70), min_size=1, max_size=6))
def test_torch_bit_for_bit_for_any_seed_and_sizes(seed, sizes):
    torch = pytest.importorskip("torch")
    if not vectorised(torch):
        pytest.skip("this torch is not the vectorised one")
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = seeds.TorchNoise(seed)
    for size in sizes:
        assert noise((size,)).tobytes() == torch.randn(size, generator=generator).numpy().tobytes()


def test_torch_bit_for_bit_over_a_million_values():
    torch = pytest.importorskip("torch")
    if not vectorised(torch):
        pytest.skip("this torch is not the vectorised one")
    expected = torch.randn(1 << 20, generator=torch.Generator("cpu").manual_seed(5)).numpy()
    assert seeds.TorchNoise(5)((1 << 20,)).tobytes() == expected.tobytes()


def test_stored_values_need_no_torch():
    noise = seeds.TorchNoise(42)
    found = [*noise((17,)), *noise((3,))]
    assert [float(v).hex() for v in found] == STORED.split()
    assert seeds.SEEDS["torch"](42)((17,)).tolist() == seeds.TorchNoise(42)((17,)).tolist()


def test_numpy_streams():
    legacy, noise = np.random.RandomState(9), seeds.numpy_noise(9)
    current, pcg64 = np.random.default_rng(9), seeds.pcg64_noise(9)
    for shape in [(3,), (1, 4, 8, 8), (2,)]:
        assert (noise(shape) == legacy.randn(*shape).astype(np.float32)).all()
        assert (pcg64(shape) == current.standard_normal(shape, np.float32)).all()
        assert noise(shape).dtype == pcg64(shape).dtype == np.float32
        legacy.randn(*shape)
        current.standard_normal(shape, np.float32)


def test_draws_are_standard_normal_and_seeds_differ():
    values = seeds.TorchNoise(1)((100_000,))
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert (values != seeds.TorchNoise(2)((100_000,))).mean() > 0.99
    # torch, too, uses only the low 32 bits of a seed
    assert (values == seeds.TorchNoise(2**32 + 1)((100_000,))).all()


@pytest.mark.parametrize("name", seeds.SEEDS)
@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", None, True])
def test_seeds_out_of_range(name, seed):
    with pytest.raises(ValueError, match=r"outside 0 to|whole number"):
        seeds.SEEDS[name](seed)


def test_legacy_numpy_has_32_bits():
    with pytest.raises(ValueError, match="4294967296 is outside 0 to 4294967295"):
        seeds.numpy_noise(2**32)


floats = st.floats(-1000, 1000, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6)


def nearest_float32(exact):
    """The float32 nearest to a Fraction, half to even, by comparing neighbours exactly."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(end)) for end in (-np.inf, np.inf)]
    return min([guess, *around], key=lambda v: (abs(Fraction(float(v)) - exact), v.view("i4") & 1))


@settings(max_examples=500, deadline=None)
@given(floats, floats, floats)
def test_fma_rounds_once(a, b, c):
    check_fma(a, b, c)


@settings(max_examples=300, deadline=None)
@given(st.integers(2**23, 2**24 - 1), st.integers(-30, -8), st.booleans())
def test_fma_rounds_once_next_to_midpoints(mantissa, tiny, down):
    """c is a float, the product lies a hair beside half its last digit."""
    half, hair = np.float32(0.5), np.float32(2.0**tiny)
    product = (1 - hair if down else 1 + hair) * half  # one float32 for tiny >= -23
    check_fma(float(product), 1.0, float(mantissa))
    check_fma(float(np.float32(1 + 2.0**-23)), float(np.float32(0.5 - 2.0**-24)), float(mantissa))
    check_fma(float(np.float32(1 - 2.0**-24)), float(np.float32(0.5 + 2.0**-24)), float(mantissa))


def check_fma(a, b, c):
    x, y, z = (np.array([v], np.float32) for v in (a, b, c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    found = seeds._fma(x, y, z)[0]
    assert found.dtype == np.float32
    assert found == nearest_float32(exact), (a, b, c)


def test_log_and_sincos_are_accurate():
    u = np.arange(1, 2**14, dtype=np.float32) / np.float32(2**14)
    assert np.abs(seeds._log(u) - np.log(u.astype(np.float64))).max() < 1e-6
    theta = u * np.float32(2 * math.pi)
    for found, function in zip(seeds._sincos(theta), (np.sin, np.cos), strict=True):
        assert np.abs(found - function(theta.astype(np.float64))).max() < 2e-7
