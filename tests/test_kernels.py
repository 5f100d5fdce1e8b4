"""Every op on every instruction set is right within its bound; a malformed one is refused."""

import ctypes
import functools
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from ferrotype import kernels
from ferrotype.kernels import LANES, NO_WEIGHT, Act, KernelError, Kind, Op, Program, Tensor, Type
from ferrotype.tests import kernels_cases as table
from ferrotype.tests.kernels_builds import BUILDS, DONE, KERNELS, REFUSED, Runner
from ferrotype.tests.kernels_cases import Case, padded

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")

SEED = int(os.environ.get("KERNEL_SEED") or secrets.randbits(32))  # new inputs at every run
HERE = kernels.isas(supported=False) if kernels.available() else []  # fastest first
# What the builds of kernels_builds.py run: instruction sets by build, and by processor emulated.
ELSEWHERE = [
    *(("sanitized", None, isa) for isa in HERE),
    ("arm64", "max", "neon-i8mm"),
    ("arm64", "max", "neon-bf16"),
    ("arm64", "max", "neon-dot"),
    ("arm64", "cortex-a72", "neon"),
    ("arm64", "cortex-a72", "scalar"),
]
U64, U32 = 2**64 - 1, 2**32 - 1
every_kind = pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())


@functools.cache
def cases(kind: Kind) -> list[Case]:
    with threadpool_limits(1):  # numpy's, whose products here are small
        return [table.make(name, SEED) for name in table.NAMES[kind]]


def in_memory(values: np.ndarray, size: int = 0) -> np.ndarray:
    """A copy at the start of a page, in as many bytes, the rest of them garbage."""
    room = kernels.aligned(max(size, values.size, 64))
    room[:] = 0xFF
    room[: values.size] = values
    return room


def prepared(case: Case, isa: str, threads: int) -> tuple[Program, np.ndarray]:
    """A program of one op and its arena, with scratch behind the tensors and a guard behind it."""
    start = -(-case.arena.size // 64) * 64
    end = start + kernels.scratch(case.op, threads, isa)
    program = Program([case.moved(0, start)], end, case.weights.size, threads, isa)
    return program, in_memory(case.arena, end + 4096)


def run(case: Case, isa: str, threads: int = 2) -> np.ndarray:
    program, arena = prepared(case, isa, threads)
    program.run(arena, in_memory(case.weights))
    assert (arena[program.arena_bytes :] == 0xFF).all(), f"{case}: writes past its scratch"
    return arena[: case.arena.size]


def need(isa: str) -> None:
    if isa not in kernels.isas():
        pytest.skip(f"this machine does not run {isa}")


def none_wrong(kind: Kind, verdict: Callable[[Case], object]) -> None:
    """Every case of a kind, however many fail; what each of the first few says."""
    wrong = []
    for case in cases(kind):
        try:
            verdict(case)
        except (AssertionError, KernelError) as error:
            wrong.append(str(error))
    assert not wrong, f"{len(wrong)} of {len(cases(kind))} cases:\n" + "\n".join(wrong[:10])


# --- right --------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", HERE)
@every_kind
def test_an_op_agrees_with_float64(kind, isa):
    need(isa)
    none_wrong(kind, lambda case: case.check(run(case, isa)))


@every_kind
def test_instruction_sets_agree_with_each_other(kind):
    """Each is within the bound of the truth, so any two are within twice that."""
    first, *others = kernels.isas()

    def verdict(case):
        expected = case.result(run(case, first))
        for isa in others:
            found = case.result(run(case, isa))
            near = np.isclose(found, expected, rtol=0, atol=2 * case.bound, equal_nan=True)
            assert near.all(), f"{case}: {isa}, not {first}"

    none_wrong(kind, verdict)


def test_int8_products_are_the_same_on_every_instruction_set():
    """Sums of integers are exact, and taps are added in one order; then comes the epilogue."""
    plain = [
        case for case in cases(Kind.MATMUL) if case.op.narrow and not (case.op.act or case.op.geglu)
    ]
    assert len(plain) > 100
    for case in plain:
        expected = run(case, "scalar")
        for isa in kernels.isas():
            assert np.array_equal(run(case, isa), expected), f"{case}: {isa}"


@pytest.mark.parametrize("kind", [Type.I8, Type.I4])
def test_weights_in_few_bits_are_the_same_on_every_instruction_set(kind):
    """Of one input that is 1, the sum is the weight itself."""
    for c in (1, 16, 17, 33, 100):
        for k in range(c):
            spec = table.MatMul(1, 1, (c,), 70, bias=False, out=Type.F32)
            case = spec.case(f"{c} {k}", SEED, (Type.F32, kind))
            a = case.op.a
            case.arena[a.offset : a.offset + 4 * c].view(np.float32)[:] = np.arange(c) == k
            expected = run(case, "scalar")
            for isa in kernels.isas():
                assert np.array_equal(run(case, isa), expected), f"{case}: {isa}"


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.F16])
def test_a_pixel_that_is_not_finite_spoils_its_own_results_alone(kind, isa):
    need(isa)
    for c in (3, 16, 40):
        spec = table.MatMul(1, 9, (c,), 32, bias=False, out=Type.F32)
        case = spec.case(str(c), SEED, (kind, Type.I8, True))
        a = case.op.a
        size = kind.bytes
        for pixel, value in ((1, np.nan), (3, np.inf), (5, -np.inf), (7, 1e-38 * (size > 2))):
            at = a.offset + (pixel * a.pixel + c - 1) * size
            row = a.offset + pixel * a.pixel * size
            case.arena[row : row + c * size] = 0
            bits = np.frombuffer(table.encode(np.array([value]), kind).tobytes(), np.uint8)
            case.arena[at : at + size] = bits
        found = case.result(run(case, isa))[0]
        for pixel in (1, 3, 5):
            assert np.isnan(found[pixel]).all()
        assert not found[7].any(), "too small for a scale"
        for pixel in (0, 2, 4, 6, 8):
            near = np.abs(found[pixel] - case.expected[0, pixel])
            assert (near <= case.bound[0, pixel]).all()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_attention_of_int8_passes_on_what_is_not_finite(value, isa):
    """A query spoils its own result, a value its channel, a key everything of its head."""
    need(isa)
    spec = table.Attention((1, 9), (1, 600), heads=2, size=8)
    for name, token, spoilt in (
        ("a", 3, np.s_[3, 8:]), ("b", 555, np.s_[:, 8:]), ("c", 555, np.s_[:, 12])
    ):  # fmt: skip
        case = spec.case(name, SEED, (Type.F32, Type.I8, True))
        t = getattr(case.op, name)
        at = t.offset + 4 * (token * t.pixel + 12)
        case.arena[at : at + 4].view(np.float32)[:] = value
        wrong = np.isnan(case.result(run(case, isa))[0])
        expected = np.zeros_like(wrong)
        expected[spoilt] = True
        assert np.array_equal(wrong, expected), name


@pytest.mark.parametrize("isa", HERE)
def test_attention_of_int8_takes_what_is_too_small_for_a_scale_as_zeros(isa):
    need(isa)
    case = table.Attention((1, 9), (1, 600), heads=2, size=8).case(
        "small", SEED, (Type.F32, Type.I8, True)
    )
    c = case.op.c
    for token in range(600):
        at = c.offset + 4 * (token * c.pixel + 12)
        case.arena[at : at + 4].view(np.float32)[:] = 1e-38
    found = case.result(run(case, isa))[0]
    assert not found[:, 12].any()
    others = np.arange(16) != 12
    near = np.abs(found - case.expected[0])[:, others]
    assert (near <= case.bound[0][:, others]).all()


@every_kind
def test_the_number_of_threads_does_not_show_in_the_bytes(kind):
    def verdict(case):
        for isa in kernels.isas():
            expected = run(case, isa, 1)
            for threads in (2, 3, 5):
                same = np.array_equal(run(case, isa, threads), expected)
                assert same, f"{case}: {isa}, {threads} threads"

    none_wrong(kind, verdict)


@every_kind
def test_a_program_runs_again_to_the_same_bytes(kind):
    """With the scratch that the first run left, and over its own result."""

    def verdict(case):
        program, arena = prepared(case, kernels.isas()[0], 3)
        weights = in_memory(case.weights)
        program.run(arena, weights)
        first = arena[: case.arena.size].copy()
        again = case.op.out.offset in (case.op.a.offset, case.op.c.offset)  # in place
        if again or case.op.kind == Kind.MOMENTS:  # which adds to what is there
            arena[: case.arena.size] = case.arena
        program.run(arena, weights)
        assert np.array_equal(arena[: case.arena.size], first), case

    none_wrong(kind, verdict)


def test_winograd_is_what_runs_where_it_is_asked_for():
    """It takes more scratch; and a large image goes through it in bands."""
    large = table.MatMul(64, 130, (64,), 64, side=3, border=(1, 1), winograd=1)
    case = large.case("bands", SEED, (Type.F32, Type.F32))
    direct = changed(case.op, "winograd", 0)
    assert kernels.uses_winograd(case.op)
    assert not kernels.uses_winograd(direct)
    assert kernels.scratch(case.op, 2) > 8 * kernels.scratch(direct, 2)
    expected = run(case, kernels.isas()[0], 3)
    for isa in kernels.isas():
        case.check(run(case, isa))
    assert np.array_equal(run(case, kernels.isas()[0], 1), expected)


@pytest.mark.parametrize(
    "size, types, winograd",
    [
        ((2, 2), (Type.F32, Type.F32), (False, True)),
        ((2, 2), (Type.F32, Type.F16), (False, True)),
        ((2, 2), (Type.BF16, Type.BF16), (False, True)),
        ((16, 16), (Type.F32, Type.F32), (True, True)),
        ((16, 16), (Type.F32, Type.BF16), (False, False)),
        ((16, 16), (Type.F16, Type.F16), (False, False)),
        ((3, 16), (Type.F32, Type.F32), (False, False)),
        ((2, 2), (Type.BF16, Type.I8, True), (False, True)),
        ((16, 16), (Type.BF16, Type.I8, True), (True, True)),
        ((16, 16), (Type.F32, Type.I8, True), (True, True)),
        ((16, 16), (Type.F16, Type.I8, True), (False, False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("isa", HERE)
def test_a_small_image_goes_through_winograd_only_where_that_is_insisted_on(
    isa, size, types, winograd
):
    need(isa)
    spec = table.MatMul(*size, (64,), 64, side=3, border=(1, 1))
    op = spec.case("", 0, types).op
    if isa == "amx" and (types[0] == Type.BF16 or len(types) == 3):  # its unit is faster
        winograd = (False, winograd[1])
    found = tuple(kernels.uses_winograd(changed(op, "winograd", n), isa) for n in (1, 2))
    assert found == winograd
    assert not kernels.uses_winograd(changed(op, "side", 2), isa)
    assert not kernels.uses_winograd(cases(Kind.ADD)[0].op, isa)


def test_a_program_of_many_ops_runs_them_in_order_and_times_each():
    tensor = {"type": Type.F32, "h": 1, "w": 1, "c": 16, "pixel": 16, "row": 16}
    places = [Tensor(offset=64 * i, **tensor) for i in range(5)]
    ops = [Op(kind=Kind.ADD, out=places[i + 2], a=places[i], b=places[i + 1]) for i in range(3)]
    arena, times = in_memory(np.zeros(0, np.uint8), 320), np.zeros(3, np.uint64)
    arena[:128].view(np.float32)[:] = 1
    Program(ops, 320, 0, 2).run(arena, in_memory(np.zeros(0, np.uint8)), times)
    assert arena.view(np.float32)[::16].tolist() == [1, 1, 2, 3, 5]
    assert times.all()


# --- right in other builds ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    """By name, a build of the engine; compiled once, skipped where tools are missing."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Runner(BUILDS[name], tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize("build, cpu, isa", ELSEWHERE)
@every_kind
def test_an_op_agrees_with_float64_in_other_builds(kind, build, cpu, isa, runner):
    one = runner(build)
    if not one.isas[isa]:
        pytest.skip(f"this machine does not run {isa}")
    found = one.run(isa, [(c.op, c.arena, c.weights) for c in cases(kind)], 2, cpu)
    results = {case.name: result for case, result in zip(cases(kind), found, strict=True)}

    def verdict(case):
        status, message, arena = results[case.name]
        assert status == DONE, f"{case}: {message}"
        case.check(arena)

    none_wrong(kind, verdict)


def test_an_arm_processor_without_bf16_gets_what_it_has(runner):
    arm = runner("arm64")
    lines = arm("isas", cpu="cortex-a72").splitlines()[1:]
    assert lines == ["neon-i8mm 0", "neon-bf16 0", "neon-dot 0", "neon 1", "scalar 1"]


# --- the table is complete ----------------------------------------------------------------------


def test_every_kind_and_option_of_an_op_is_in_the_table():
    assert all(table.NAMES[kind] for kind in Kind)
    ops = [case.op for kind in (Kind.MATMUL, Kind.ATTENTION) for case in cases(kind)]
    for flag in (
        *("side", "stride", "pad", "upsample", "geglu", "late", "winograd", "narrow"),
        "causal",
    ):
        assert {int(getattr(op, flag)) for op in ops} >= {0, 1}, flag
    assert {op.winograd for op in ops} == {0, 1, 2}
    for kind in (Kind.MATMUL, Kind.AFFINE, Kind.UNARY, Kind.ADD, Kind.LOAD):
        assert {case.op.band for case in cases(kind) if case.op.out.border} == {0, 1, 2, 3}, kind
    acts = {op.act for op in ops if op.kind == Kind.MATMUL}
    assert acts == {act.value for act in Act} - {Act.TANH3}
    assert {case.op.act for case in cases(Kind.UNARY)} == {act.value for act in Act}


def test_every_pair_of_types_that_a_set_multiplies_is_in_the_table():
    listed = set(table.PAIRS.values())
    for isa in kernels.isas():
        for a in (Type.F32, Type.BF16, Type.F16):
            for weight in (Type.F32, Type.BF16, Type.F16, Type.I8, Type.I4):
                op = table.MatMul(1, 3, (16,), 16).case("", 0, (a, weight)).op
                try:
                    kernels.scratch(op, 1, isa)
                    assert (a, weight) in listed, isa
                except KernelError:
                    assert (a, weight) not in listed, isa


@pytest.mark.parametrize("build", BUILDS)
def test_every_instruction_set_is_run_somewhere(build, runner):
    isas = runner(build).isas
    assert set(isas) == {isa for name, _, isa in ELSEWHERE if name == build}
    assert list(isas)[-1] == "scalar"
    assert isas.get("amx") == isas.get("avx512bf16"), "the emulation of AMX is not used"


def test_an_installation_compiles_every_source():
    tomllib = pytest.importorskip("tomllib")
    config = tomllib.loads((KERNELS.parent / "pyproject.toml").read_text())
    (module,) = config["tool"]["setuptools"]["ext-modules"]
    assert module["sources"] == sorted(f"kernels/{path.name}" for path in KERNELS.glob("*.cpp"))


# --- what a machine has -------------------------------------------------------------------------

FMA, OSXSAVE, AVX, F16C = 1 << 12, 1 << 27, 1 << 28, 1 << 29
AVX2, AVX512, ANY_512 = 1 << 5, 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31, 1 << 16
VNNI, AMX, AVX512_BF16 = 1 << 11, 1 << 22 | 1 << 24 | 1 << 25, 1 << 5
LEAF1 = FMA | OSXSAVE | AVX | F16C
YMM, ZMM, TILES = 0x7, 0xE7, 0x602E7
SAPPHIRE_RAPIDS = (0x20, LEAF1, 2, AVX2 | AVX512, VNNI, AMX, AVX512_BF16, TILES)
SERVER = (0x16, LEAF1, 0, AVX2 | AVX512)
UP_TO_BF16 = "avx2 avx512 avx512_vnni avx512_bf16"
MACHINES = {
    "a Pentium 4": ((5, 0, 0, 0, 0, 0, 0, 0), ""),
    "Sandy Bridge: AVX without AVX2": ((0xD, OSXSAVE | AVX, 0, 0, 0, 0, 0, YMM), ""),
    "Haswell": ((0xD, LEAF1, 0, AVX2, 0, 0, 0, YMM), "avx2"),
    "an OS that saves no AVX registers": ((0xD, LEAF1, 0, AVX2, 0, 0, 0, 0x3), ""),
    "an OS without XSAVE": ((0xD, LEAF1 & ~OSXSAVE, 0, AVX2, 0, 0, 0, YMM), ""),
    "AVX2 without F16C": ((0xD, LEAF1 & ~F16C, 0, AVX2, 0, 0, 0, YMM), ""),
    "AVX2 without FMA": ((0xD, LEAF1 & ~FMA, 0, AVX2, 0, 0, 0, YMM), ""),
    "Knights Landing: AVX512 without BW": ((0xD, LEAF1, 0, AVX2 | ANY_512, 0, 0, 0, ZMM), "avx2"),
    "Skylake server": ((*SERVER, 0, 0, 0, ZMM), "avx2 avx512"),
    "Cascade Lake": ((*SERVER, VNNI, 0, 0, ZMM), "avx2 avx512 avx512_vnni"),
    "an OS without AVX512": ((*SERVER, VNNI, 0, 0, YMM), "avx2"),
    "a leaf 7.1 that is not there": (
        (*SERVER, VNNI, 0, AVX512_BF16, ZMM),
        "avx2 avx512 avx512_vnni",
    ),
    "Zen 4": ((0x10, LEAF1, 1, AVX2 | AVX512, VNNI, 0, AVX512_BF16, 0x2E7), UP_TO_BF16),
    "bf16 without int8": ((0x10, LEAF1, 1, AVX2 | AVX512, 0, 0, AVX512_BF16, ZMM), "avx2 avx512"),
    "Sapphire Rapids": (SAPPHIRE_RAPIDS, f"{UP_TO_BF16} amx"),
    "an OS without tiles": ((*SAPPHIRE_RAPIDS[:7], 0x2E7), UP_TO_BF16),
    "an OS with half of the tiles": ((*SAPPHIRE_RAPIDS[:7], 0x202E7), UP_TO_BF16),
    **{
        f"tiles without {name}": (
            (*SAPPHIRE_RAPIDS[:5], AMX & ~(1 << bit), *SAPPHIRE_RAPIDS[6:]),
            UP_TO_BF16,
        )
        for name, bit in (("bf16", 22), ("tiles", 24), ("int8", 25))
    },
}


def test_what_a_processor_has_counts_only_if_the_system_saves_its_registers(runner):
    dumps = [" ".join(f"{value:x}" for value in dump) for dump, _ in MACHINES.values()]
    found = runner("sanitized")("cpu", stdin="\n".join(dumps)).splitlines()
    expected = {name: names for name, (_, names) in MACHINES.items()}
    assert dict(zip(expected, map(str.strip, found), strict=True)) == expected


def test_the_fastest_set_that_runs_here_is_the_default():
    case = cases(Kind.ADD)[0]
    program = Program([case.op], case.arena.size, case.weights.size, 1)
    assert program.isa == kernels.isas()[0]


# --- refused ------------------------------------------------------------------------------------


def why_not(op: Op, arena: int, weights: int, threads: int = 1) -> str:
    """The line with which an op is refused; nothing if it is not."""
    try:
        Program([op], arena, weights, threads, "scalar")
    except KernelError as error:
        message = str(error)
    else:
        return ""
    assert message.isprintable()
    assert 10 < len(message) < 200
    return message


def refused(op: Op, arena: int, weights: int) -> None:
    assert why_not(op, arena, weights).startswith("op 0 of 1 (kind ")


def changed(op: Op, path: str, value: int) -> Op:
    """A copy with one field set, as "a.offset" names it."""
    copy = Op.from_buffer_copy(op)
    *parts, last = path.split(".")
    setattr(functools.reduce(getattr, parts, copy), last, value)
    return copy


def tensors(op: Op) -> dict[str, Tensor]:
    named = {name: getattr(op, name) for name in ("out", "a", "b", "c", "add")}
    return {name: tensor for name, tensor in named.items() if tensor.h}


def is_planes(op: Op, name: str) -> bool:
    return (op.kind, name) in ((Kind.LOAD, "a"), (Kind.STORE, "out"))


def end_of(op: Op, name: str) -> int:
    """The byte after the last that a tensor may touch."""
    t = getattr(op, name)
    size = Type(t.type).bytes
    if is_planes(op, name):
        return t.offset + ((t.c - 1) * t.pixel + t.h * t.w) * size
    if t.type in (Type.U8, Type.I32) or t.pixel == 1:
        return t.offset + t.h * t.w * t.c * size
    rows, columns = t.h - 1 + t.border, t.w - 1 + t.border
    return t.offset + (rows * t.row + columns * t.pixel + padded(t.c)) * size


HUGE = (2**31 - 1, 2**31, U32, 2**20 + 1)


def broken_tensor(op: Op, name: str, arena: int):
    """(field, value) of which each alone spoils a tensor."""
    t = getattr(op, name)
    for offset in (arena, arena // 64 * 64 + 64, 2**32, 2**63, 2**64 - 64, U64 - 7):
        yield f"{name}.offset", offset
    if t.type != Type.U8:
        yield f"{name}.offset", t.offset + 1
    for kind in (5, 255, U32):
        yield f"{name}.type", kind
    for field in ("w", "c", "h"):
        for value in (0, *HUGE):
            yield f"{name}.{field}", value
    if is_planes(op, name):
        smallest = {"pixel": t.h * t.w, "row": t.w}
        yield f"{name}.row", t.w + 1
        if t.c > 1:
            yield f"{name}.pixel", U32
    else:
        pixel = padded(t.c) if t.type in table.FLOATS.values() and t.pixel > 1 else t.pixel
        smallest = {"pixel": pixel, "row": pixel * (t.w + 2 * t.border)}
    for field, least in smallest.items():
        for value in (0, least - 1):
            yield f"{name}.{field}", value
    for value in (2, U32):
        yield f"{name}.border", value


def broken_scalars(op: Op):
    """(field, value) beyond tensors of which each alone spoils an op."""
    for value in (0, max(Kind) + 1, 255, U32):
        yield "kind", value
    for value in (max(Act) + 1, U32):
        yield "act", value
    for value in (3, 4, U32):
        yield "weight_type", value
    for value in (-1, 4, 2**31 - 1, -(2**31)):
        yield "band", value
    known = {
        Kind.MATMUL: {"side": (0, 2, 5, -1, 2**31 - 1), "stride": (0, 3, -1), "pad": (2, -1)},
        Kind.GROUP_NORM: {"groups": (0, -1, -(2**31), op.out.c + 1, 2**31 - 1)},
        Kind.ATTENTION: {
            "heads": (0, -1, op.heads + 1, 2**31 - 1, -(2**31)),
            "size": (0, -1, op.size + 1, 2**31 - 1, -(2**31)),
        },
        Kind.EMBEDDING: {"size": (0, -1, 2**20, 2**31 - 1, -(2**31))},
        Kind.MOMENTS: {
            "size": (-1, -(2**31)),
            "out.offset": (op.out.offset + 4,),  # of numbers of 8 bytes
            "out.c": (op.out.c - 1, op.out.c + 1, op.out.c - 5 * LANES),
            "out.type": (Type.BF16, Type.I32),
            "act": (Act.SILU,),
        },
        Kind.AFFINE: {
            "size": (0, -1, -(2**31)),
            "groups": (0, -1, -(2**31), op.out.c + 1, 2**31 - 1),
            "b.offset": (op.b.offset + 4,),
            "b.c": (op.b.c - 1, op.b.c + 1, op.b.c - 5 * LANES),
            "b.type": (Type.BF16, Type.I32),
            "act": (Act.TANH3,),
        },
    }
    for field, values in known.get(op.kind, {}).items():
        yield from ((field, value) for value in values)


def broken_weights(op: Op, size: int):
    """Weights out of their file, missing where they are needed, there where nobody reads them."""
    never_without = (Kind.GROUP_NORM, Kind.AFFINE, Kind.LAYER_NORM, Kind.EMBEDDING)
    for name in ("weight", "bias"):
        for value in (size // 64 * 64 + 64, 2**32, 2**63, 2**64 - 64):
            yield name, value
        if getattr(op, name) == NO_WEIGHT:
            if op.kind != Kind.MATMUL:
                yield name, 0
        else:
            yield name, getattr(op, name) + 4
            if op.kind in never_without or (op.kind == Kind.MATMUL and name == "weight"):
                yield name, NO_WEIGHT


SLOTS = {  # beyond out and a, the tensors that an op of a kind may have
    Kind.MATMUL: {"b", "c", "add"},
    Kind.GROUP_NORM: {"b"},
    Kind.AFFINE: {"b"},
    Kind.ATTENTION: {"b", "c"},
    Kind.ADD: {"b"},
    Kind.PICK: {"b"},
}


def broken_slots(op: Op):
    """Copies with a tensor where the kind has none, or with half a tensor."""
    for name in {"b", "c", "add"} - SLOTS.get(Kind(op.kind), set()):
        copy = Op.from_buffer_copy(op)
        setattr(copy, name, op.a)
        yield copy
    for name in ("b", "c", "add"):
        if not getattr(op, name).h:
            yield changed(op, f"{name}.w", 1)
            yield changed(op, f"{name}.offset", 64)


@every_kind
def test_an_op_with_any_broken_field_is_refused(kind):
    def verdict(case):
        op, arena, weights = case.moved(0, 0), case.arena.size, case.weights.size
        room = arena + kernels.scratch(op, 1, "scalar")
        broken = [*broken_scalars(op), *broken_weights(op, weights)]
        for name in tensors(op):
            broken += broken_tensor(op, name, room)
        for path, value in broken:
            message = why_not(changed(op, path, value), room, weights)
            assert message, f"{case}: {path} of {value} was not refused"
        for copy in broken_slots(op):
            refused(copy, room, weights)

    none_wrong(kind, verdict)


@every_kind
def test_an_arena_and_weights_of_one_byte_less_are_refused(kind):
    def verdict(case):
        op, least = case.moved(0, 0), max(end_of(case.op, name) for name in tensors(case.op))
        scratch = kernels.scratch(op, 1, "scalar")
        if scratch < least:
            Program([op], least, case.weights.size, 1, "scalar")
            refused(op, least - 1, case.weights.size)
        op.scratch = -(-least // 64) * 64
        Program([op], op.scratch + scratch, case.weights.size, 1, "scalar")
        if scratch:
            refused(op, op.scratch + scratch - 64, case.weights.size)
            refused(changed(op, "scratch", op.scratch + 4), op.scratch + scratch + 64, 2**32)
            for value in (2**63, 2**64 - 64, op.scratch + scratch):
                refused(changed(op, "scratch", value), op.scratch + scratch, case.weights.size)
        if {op.weight, op.bias} != {NO_WEIGHT}:
            refused(op, op.scratch + scratch, case.weights.size - 1)

    none_wrong(kind, verdict)


# Fields that only together make sense, and what each spoils: from the table a case, and a change.
TOGETHER = [
    ("matmul-bf16-1x3x4to33", {"weight_type": Type.F16}),
    ("matmul-bf16-1x3x4to33", {"weight_type": Type.F32}),
    ("matmul-bf16-1x3x4to33", {"a.type": Type.I32}),
    ("matmul-bf16-1x3x4to33", {"out.type": Type.U8}),
    ("matmul-bf16-1x3x4to33", {"side": 3, "pad": 1}),
    ("matmul-bf16-1x3x4to33", {"pad": 1}),
    ("matmul-bf16-1x3x4to33", {"stride": 2}),
    ("matmul-bf16-1x3x4to33", {"upsample": 1}),
    ("matmul-bf16-1x3x4to33", {"act": Act.TANH3}),
    ("matmul-f32-8x8x65to3-k3s1p1-border11", {"a.border": 0}),
    ("matmul-f32-8x8x65to3-k3s1p1-border11", {"side": 1, "pad": 0, "stride": 2}),
    ("matmul-f32-8x8x65to3-k3s1p1-upsample-border11", {"a.border": 0}),
    ("matmul-f32-8x8x65to3-k3s1p1-upsample-border11", {"out.h": 15}),
    ("matmul-f32-8x8x65to3-k3s1p1-upsample-border11", {"upsample": 0}),
    ("matmul-f32-1x12x40to15-geglu", {"act": Act.SILU}),
    ("matmul-f32-1x12x40to15-geglu", {"late": 1}),
    ("matmul-f32-3x6x16+16to33", {"b.type": Type.BF16}),
    ("matmul-f32-3x6x16+16to33", {"b.w": 5}),
    ("matmul-f32-2x13x33to17-add", {"add.c": 16}),
    ("matmul-f32-2x13x33to17-add", {"add.type": Type.BF16}),
    ("matmul-f32-2x13x33to17-add", {"geglu": 1}),
    ("group_norm-f32-5x4x24by24", {"out.c": 23}),
    ("group_norm-f32-5x4x24by24", {"out.type": Type.BF16}),
    ("group_norm-f32-3x4x32+33by5-border01", {"a.c": 31, "b.c": 34}),
    ("moments-f32-5x6x24-border-wide", {"a.c": 33}),
    ("moments-f32-5x6x24-border-wide", {"out.h": 2}),
    ("moments-f32-5x6x24-border-wide", {"a.type": Type.I32}),
    ("moments-f32-5x6x24-border-wide", {"weight": 0}),
    ("affine-f32-1x3x1by1-rows0+1", {"a.c": 17, "out.c": 17}),
    ("affine-f32-1x3x1by1-rows0+1", {"out.w": 2}),
    ("affine-f32-1x3x1by1-rows0+1", {"out.type": Type.BF16}),
    ("layer_norm-f32-1x1x2", {"out.w": 2}),
    ("layer_norm-f32-1x1x2", {"act": Act.SILU}),
    ("attention-f32-100by77-8of40", {"causal": 1}),
    ("attention-f32-100by77-8of40", {"c.w": 76}),
    ("attention-f32-100by77-8of40", {"out.w": 99}),
    ("attention-f32-100by77-8of40", {"b.type": Type.F16}),
    ("attention-f32-100by77-8of40", {"narrow": 2}),
    ("embedding-f32-1of1x1", {"a.type": Type.F32}),
    ("sinusoid-f32-1x2-flip", {"out.c": 1}),
    ("sinusoid-f32-1x2-flip", {"x": 1.0}),
    ("add-f32-4x5x33-in-place", {"b.c": 32}),
    ("add-f32-4x5x33-in-place", {"b.type": Type.F16}),
    ("unary-f32-4x5x24-silu-in-place", {"out.w": 4}),
    ("load-f32-5x7x4-x1-none-b0", {"a.type": Type.BF16}),
    ("load-f32-5x7x4-x1-none-b0", {"a.pixel": 34}),
    ("load-f32-5x7x4-x1-none-b0", {"a.border": 1}),
    ("store-f32-5x7x4-x1-y0-b0", {"out.pixel": 34}),
    ("store-f32-5x7x4-x1-y0-b0", {"out.type": Type.F16}),
    ("bytes-f32-1x1-x0.5-y0.5-b0", {"out.type": Type.F32}),
    ("pick-f32-0of3x16-id7", {"b.w": 2}),
    ("pick-f32-0of3x16-id7", {"out.c": 15}),
]


@pytest.mark.parametrize("name, fields", TOGETHER)
def test_an_op_whose_parts_do_not_fit_is_refused(name, fields):
    case = table.make(name, SEED)
    op, room = case.moved(0, 0), case.arena.size + kernels.scratch(case.op, 1, "scalar")
    Program([op], room, case.weights.size, 1, "scalar")
    for path, value in fields.items():
        op = changed(op, path, value)
    refused(op, room, 2**32)


def test_an_image_that_overflows_every_product_is_refused():
    case = table.make("unary-f32-4x5x24-silu-in-place", SEED)
    for side in (2**16, 2**20, 2**31, U32):
        for channels in (16, 2**16, 2**20, U32 - 15):
            op = case.moved(0, 0)
            for t in (op.a, op.out):
                t.h = t.w = side
                t.c = t.pixel = channels
                t.row = U32
            refused(op, 2**40, 0)


@pytest.mark.parametrize("threads", [0, 65, 2**31, U32])
def test_threads_out_of_range_are_refused(threads):
    case = cases(Kind.ADD)[0]
    assert "1 to 64" in why_not(case.op, case.arena.size, case.weights.size, threads)


@pytest.mark.parametrize("isa", ["", "mmx", "AVX2", "scalar ", "s" * 5000])
def test_an_unknown_instruction_set_is_refused(isa):
    case = cases(Kind.ADD)[0]
    with pytest.raises(KernelError):
        Program([case.op], case.arena.size, case.weights.size, 1, isa)


def test_no_ops_are_refused():
    library, line = kernels.library(), ctypes.create_string_buffer(100)
    one = (Op * 1)(cases(Kind.ADD)[0].op)
    for ops, count in ((None, 0), (None, 1), (one, 0)):
        assert not library.ft_program_create(ops, count, 4096, 4096, 1, None, line, 100)
        assert line.value == b"the program has no ops"
    assert not library.ft_program_create(None, 0, 0, 0, 1, None, None, 0)
    assert library.ft_op_scratch(None, 1, None) == U64
    assert library.ft_op_weight_bytes(None) == U64


def test_a_message_is_cut_to_the_room_it_has():
    library, line = kernels.library(), ctypes.create_string_buffer(b"x" * 20)
    assert not library.ft_program_create(None, 0, 0, 0, 1, None, line, 8)
    assert line.raw == b"the pro\0" + b"x" * 12 + b"\0"


def test_a_later_op_is_refused_by_its_number():
    case = cases(Kind.ADD)[0]
    ops = [case.op, case.op, changed(case.op, "a.h", 0)]
    with pytest.raises(KernelError, match="op 2 of 3"):
        Program(ops, case.arena.size, case.weights.size, 1)


FUZZED = 600
VALUES = [0, 1, 2, 3, 4, 15, 16, 17, 64, 255, 2**16, 2**20, 2**31 - 1, 2**31, U32]
WIDE = [2**32, 2**63, 2**64 - 64, U64 - 7, U64]


def fields_of(structure) -> list[tuple[object, str, type]]:
    found = []
    for name, kind in structure._fields_:
        if issubclass(kind, ctypes.Structure):
            found += fields_of(getattr(structure, name))
        else:
            found.append((structure, name, kind))
    return found


def spoil(op: Op, rng: np.random.Generator) -> None:
    """Set a few fields to what they rarely are."""
    places = fields_of(op)
    for i in rng.integers(0, len(places), rng.integers(1, 4)):
        structure, name, kind = places[i]
        value = getattr(structure, name)
        if kind is ctypes.c_float:
            choices = [0.0, -1.0, float("nan"), float("inf"), 1e38, -1e38]
        else:
            choices = [*VALUES, value + 1, value - 1, 2 * value, value ^ 1 << int(rng.integers(32))]
            choices += [*WIDE, value + 64] if kind is ctypes.c_uint64 else []
        setattr(structure, name, choices[rng.integers(len(choices))])


@pytest.mark.parametrize("isa", HERE)
def test_random_ops_are_refused_or_stay_in_their_arena(isa, runner):
    one = runner("sanitized")
    if not one.isas[isa]:
        pytest.skip(f"this machine does not run {isa}")
    rng, fuzzed = np.random.default_rng([SEED, len(isa)]), []
    for kind in rng.permutation([*Kind, *[Kind.MATMUL] * 6] * (FUZZED // 18)).tolist():
        case = cases(Kind(kind))[rng.integers(len(cases(Kind(kind))))]
        op = case.moved(0, 0)
        spoil(op, rng)
        if case.arena.size < 1 << 18:
            fuzzed.append((op, case.arena, case.weights))
    results = list(one.run(isa, fuzzed, 2))
    counts = [sum(status == s for status, _, _ in results) for s in (DONE, REFUSED)]
    assert sum(counts) == len(results), f"KERNEL_SEED={SEED}"
    assert min(counts) > len(results) / 20, counts
    assert all(message.isprintable() for _, message, _ in results)


# --- threads ------------------------------------------------------------------------------------


def large(threads: int) -> tuple[Program, np.ndarray, np.ndarray]:
    case = table.make("matmul-f32-21x40x20to24", SEED)
    program, arena = prepared(case, kernels.isas()[0], threads)
    return program, arena, in_memory(case.weights)


def test_idle_threads_sleep():
    program, arena, weights = large(8)
    for _ in range(3):
        program.run(arena, weights)
        time.sleep(0.05)
        start = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - start < 0.03


def thread_count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def threads_become(count: int) -> bool:
    """Whether there are so many; threads that were joined may be listed a moment longer."""
    end = time.monotonic() + 2
    while thread_count() != count and time.monotonic() < end:
        time.sleep(0.001)
    return thread_count() == count


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_programs_end_their_threads():
    before = thread_count()
    for i in range(200):
        program, arena, weights = large(1 + i % 9)
        assert threads_become(before + i % 9)
        if i % 3:
            program.run(arena, weights)
        del program
    assert threads_become(before)


def test_programs_run_side_by_side():
    case = table.make("matmul-f32-21x40x20to24", SEED)
    expected = run(case, kernels.isas()[0], 1)
    wrong = []

    def work():
        for _ in range(20):
            if not np.array_equal(run(case, kernels.isas()[0], 3), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_cancelled_run_stops_between_ops():
    case = cases(Kind.ADD)[0]
    program = Program([case.op] * 3, case.arena.size, case.weights.size, 1)
    arena, weights = in_memory(case.arena), in_memory(case.weights)
    library = kernels.library()
    for cancel, count in ((0, 3), (1, 0)):
        flag = ctypes.byref(ctypes.c_int(cancel))
        ran = library.ft_program_run(
            program._handle, arena.ctypes.data, weights.ctypes.data, None, flag
        )
        assert ran == count


# --- the binding --------------------------------------------------------------------------------


def test_structures_are_those_of_the_library():
    assert kernels.library().ft_op_bytes() == ctypes.sizeof(Op)
    assert kernels.library().ft_abi() == kernels.ABI


def test_an_arena_that_is_small_or_crooked_is_refused():
    case = cases(Kind.ADD)[0]
    program = Program([case.op], case.arena.size, case.weights.size, 1)
    arena, weights = in_memory(case.arena), in_memory(case.weights)
    for bad in (arena[: case.arena.size - 1], arena[1:], in_memory(case.arena, 99999)[::2]):
        with pytest.raises(ValueError, match="the arena must be"):
            program.run(bad, weights)
    with pytest.raises(ValueError, match="the weights must be"):
        program.run(arena, weights[: case.weights.size - 1])
    with pytest.raises(ValueError, match="times must be"):
        program.run(arena, weights, np.zeros(1))


def test_weight_bytes_are_those_of_the_packed_weights():
    for case in cases(Kind.MATMUL):
        op = case.op
        if not op.upsample and not op.geglu:
            inputs = [padded(op.a.c)] * op.side**2 + ([padded(op.b.c)] if op.b.h else [])
            kind = Type(op.weight_type)
            block = sum(
                32 * -(-k // 32) + 8 * k if kind == Type.I4 else 16 * k * kind.bytes for k in inputs
            )
            assert kernels.weight_bytes(op) == padded(op.out.c) // 16 * block


@pytest.mark.parametrize("isa", HERE)
def test_a_ceiling_is_measured_for_what_a_set_multiplies(isa):
    need(isa)
    assert kernels.ceiling(isa, Type.F32, 1, 0.01) > 1e8
    assert kernels.ceiling("mmx", Type.F32, 1, 0.01) == 0
    assert kernels.ceiling(isa, Type.U8, 1, 0.01) == 0
