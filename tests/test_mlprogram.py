"""The reader of ML Programs: its operations, its decompression, and what it refuses."""

import importlib.util
import json
import math
import shutil
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not importlib.util.find_spec("coremltools"):
    pytest.skip("coremltools is not installed", allow_module_level=True)

from ferrotype.convert import mlprogram, modules  # noqa: E402
from ferrotype.convert.checkpoint import ConvertError  # noqa: E402
from ferrotype.convert.coremltools_fixes import coremltools  # noqa: E402
from ferrotype.convert.mlops import CONSTANTS, OPS  # noqa: E402
from ferrotype.convert.mlprogram import Program, functions  # noqa: E402

ct = coremltools()
mb = ct.converters.mil.Builder
RNG = np.random.default_rng(0)
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
MODEL = "Data/com.apple.CoreML/model.mlmodel"


def f(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def i(*shape, high=5):
    return RNG.integers(-high, high, shape).astype(np.int32)


def save(model, path, target="iOS18", precision="FLOAT32", **options):
    """Convert to a package, quietly: the library leaves temporary folders to the collector."""
    with modules.quiet():
        ct.convert(
            model,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=getattr(ct.precision, precision),
            skip_model_load=True,
            **options,
        ).save(str(path))
    return path


def program(function, inputs, target="iOS18", prog=None, name="main"):
    """An MIL program of a function of named variables, which stand for arrays or placeholders."""
    mil = ct.converters.mil.mil
    kinds = {"f": mil.types.fp32, "i": mil.types.int32}
    inputs = {
        key: mb.TensorSpec(x.shape, kinds[x.dtype.kind]) if isinstance(x, np.ndarray) else x
        for key, x in inputs.items()
    }
    prog = prog or mil.Program()
    with mil.Function(inputs, opset_version=getattr(ct.target, target)) as main:
        outputs = function(**main.inputs)
        main.set_outputs(outputs if isinstance(outputs, list) else [outputs])
    prog.add_function(name, main)
    return prog


# What every operation computes: (operation, inputs, constant parameters, expected by numpy)


def conv_by_numpy(x, w, b, stride, pads, dilation, groups):
    """Convolution as a sum over the positions in the kernel, in float64."""
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *pads])
    kernel = w.shape[2:]
    sizes = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    out = np.zeros((x.shape[0], w.shape[0], *sizes))
    ins, outs = w.shape[1], w.shape[0] // groups
    for at in np.ndindex(*kernel):
        cut = tuple(
            slice(a * d, a * d + (n - 1) * s + 1, s)
            for a, d, n, s in zip(at, dilation, sizes, stride, strict=True)
        )
        for g in range(groups):
            part = x[(slice(None), slice(g * ins, (g + 1) * ins), *cut)]
            mine = slice(g * outs, (g + 1) * outs)
            out[:, mine] += np.einsum("nc...,oc->no...", part, w[(mine, slice(None), *at)])
    return out if b is None else out + b.reshape(-1, *[1] * len(kernel))


def erf(x):
    return np.vectorize(math.erf)(x)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, axes, epsilon):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def unary_cases():
    real = {
        "abs": np.abs,
        "ceil": np.ceil,
        "cos": np.cos,
        "erf": erf,
        "exp": np.exp,
        "exp2": np.exp2,
        "floor": np.floor,
        "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
        "identity": lambda x: x,
        "relu": lambda x: np.maximum(x, 0),
        "round": np.round,
        "sigmoid": sigmoid,
        "sign": np.sign,
        "silu": lambda x: x * sigmoid(x),
        "sin": np.sin,
        "square": np.square,
        "tanh": np.tanh,
    }
    for name, function in real.items():
        x = f(3, 5, 7)
        yield name, {"x": x}, {}, function(x.astype(np.float64))
    for name, function in {
        "inverse": lambda x: 1 / (x + 0.125),
        "log": lambda x: np.log(x + 0.125),
        "rsqrt": lambda x: (x + 0.125) ** -0.5,
    }.items():
        x = np.abs(f(5, 7))
        yield name, {"x": x}, {"epsilon": np.float32(0.125)}, function(x.astype(np.float64))
    x = np.abs(f(5, 7))
    yield "sqrt", {"x": x}, {}, np.sqrt(x)
    yield "logical_not", {"x": x > 0.5}, {}, x <= 0.5
    x = f(3, 5)
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    yield "gelu", {"x": x}, {"mode": "TANH_APPROXIMATION"}, tanh
    yield "gelu", {"x": x}, {"mode": "SIGMOID_APPROXIMATION"}, x * sigmoid(1.702 * x)
    low, high = np.float32(-0.5), np.float32(0.25)
    yield "clip", {"x": x}, {"alpha": low, "beta": high}, np.clip(x, low, high)
    whole = 10 * f(4, 5)
    yield "cast", {"x": whole}, {"dtype": "int32"}, np.trunc(whole).astype(np.int32)
    whole = i(4, 5)
    yield "cast", {"x": whole}, {"dtype": "bool"}, whole != 0
    yield "cast", {"x": whole}, {"dtype": "fp32"}, whole.astype(np.float32)


def binary_cases():
    arithmetic = {
        "add": np.add,
        "maximum": np.maximum,
        "minimum": np.minimum,
        "mul": np.multiply,
        "sub": np.subtract,
    }
    compare = {
        "equal": np.equal,
        "greater": np.greater,
        "greater_equal": np.greater_equal,
        "less": np.less,
        "less_equal": np.less_equal,
        "not_equal": np.not_equal,
    }
    for name, function in (arithmetic | compare).items():
        x, y = f(3, 1, 7), f(5, 1)
        yield name, {"x": x, "y": y}, {}, function(x.astype(np.float64), y)
        x, y = i(3, 5), i(3, 5)
        yield name, {"x": x, "y": y}, {}, function(x, y)
    for name, function in {"logical_and": np.logical_and, "logical_or": np.logical_or}.items():
        x, y = f(3, 5) > 0, f(3, 5) > 0
        yield name, {"x": x, "y": y}, {}, function(x, y)
    for name, function in {"floor_div": np.floor_divide, "mod": np.mod}.items():
        x, y = i(3, 5, high=20), np.array([3, -3, 4, -7, 1], np.int32)
        yield name, {"x": x, "y": y}, {}, function(x, y)
        x, y = x.astype(np.float32), y.astype(np.float32)  # exact, so that no floor is in doubt
        yield name, {"x": x, "y": y}, {}, function(x, y)
    x, y = f(3, 5), np.abs(f(5)) + 0.5
    yield "real_div", {"x": x, "y": y}, {}, x.astype(np.float64) / y
    x = np.abs(x) + 0.5
    yield "pow", {"x": x, "y": y}, {}, x.astype(np.float64) ** y


def reduction_cases():
    for name, function in {
        "reduce_l2_norm": lambda x, **k: np.sqrt((x**2).sum(**k)),
        "reduce_max": np.max,
        "reduce_mean": np.mean,
        "reduce_min": np.min,
        "reduce_sum": np.sum,
        "reduce_sum_square": lambda x, **k: (x**2).sum(**k),
    }.items():
        x = f(3, 5, 7)
        expected = function(x.astype(np.float64), axis=(0, 2), keepdims=False)
        yield name, {"x": x}, {"axes": [-1, 0]}, expected
        yield name, {"x": x}, {"keep_dims": True}, function(x, axis=None, keepdims=True)
    for name, function in {"reduce_argmax": np.argmax, "reduce_argmin": np.argmin}.items():
        x = RNG.permutation(105).astype(np.float32).reshape(3, 5, 7)
        expected = function(x, axis=1, keepdims=True).astype(np.int32)
        yield name, {"x": x}, {"axis": -2, "keep_dims": True}, expected
    x = f(3, 5, 7)
    yield "softmax", {"x": x}, {"axis": 1}, softmax(x.astype(np.float64), 1)
    g, b = f(5, 7), f(5, 7)
    expected = norm(x.astype(np.float64), (1, 2), 0.01) * g + b
    constants = {"axes": [1, -1], "gamma": g, "beta": b, "epsilon": np.float32(0.01)}
    yield "layer_norm", {"x": x}, constants, expected
    yield "layer_norm", {"x": x}, {"axes": [1]}, norm(x.astype(np.float64), (1,), 1e-5)
    x, g, b = f(2, 3, 5, 7), f(3), f(3)
    whole = norm(x.astype(np.float64), (2, 3), 0.01) * g[:, None, None] + b[:, None, None]
    scale = {"gamma": g, "beta": b, "epsilon": np.float32(0.01)}
    yield "instance_norm", {"x": x}, scale, whole
    m, v = f(3), np.abs(f(3))
    whole = (x - m[:, None, None]) / np.sqrt(v + 0.01)[:, None, None]
    whole = whole * g[:, None, None] + b[:, None, None]
    yield "batch_norm", {"x": x}, {"mean": m, "variance": v, **scale}, whole


def product_cases():
    for n, stride, pad_type, pads, dilation, groups in [
        ((9, 8), (1, 1), "valid", [(0, 0), (0, 0)], (1, 1), 1),
        ((9, 8), (2, 1), "custom", [(1, 1), (1, 1)], (1, 1), 1),
        ((9, 8), (2, 2), "custom", [(0, 1), (2, 0)], (1, 2), 2),
        ((9, 8), (2, 2), "same", [(1, 1), (0, 1)], (1, 1), 4),
        ((9, 8), (2, 2), "same_lower", [(1, 1), (1, 0)], (1, 1), 1),
        ((11,), (2,), "custom", [(3, 1)], (2,), 2),
    ]:
        x, w, b = f(2, 4, *n), f(8, 4 // groups, *[3] * len(n)), f(8)
        constants = {"weight": w, "bias": b, "strides": stride, "pad_type": pad_type}
        if pad_type == "custom":
            constants["pad"] = [p for pair in pads for p in pair]
        constants |= {"dilations": dilation, "groups": groups}
        yield "conv", {"x": x}, constants, conv_by_numpy(x, w, b, stride, pads, dilation, groups)
    x, w, b = f(2, 5, 7), f(3, 7), f(3)
    yield "linear", {"x": x}, {"weight": w, "bias": b}, x.astype(np.float64) @ w.T + b
    yield "linear", {"x": x}, {"weight": w}, x.astype(np.float64) @ w.T
    a, b = f(2, 5, 7), f(3, 1, 4, 5)
    expected = np.swapaxes(a, -1, -2).astype(np.float64) @ np.swapaxes(b, -1, -2)
    yield "matmul", {"x": a, "y": b}, {"transpose_x": True, "transpose_y": True}, expected
    b = f(7, 4)
    yield "matmul", {"x": a, "y": b}, {}, a.astype(np.float64) @ b
    a, b = f(2, 3, 5, 7), f(2, 7, 5, 4)
    for equation, x, y in [("nchw,nwhu->nchu", a, b), ("chw,whu->chu", a[0], b[0])]:
        expected = np.einsum(equation, x.astype(np.float64), y)
        yield "einsum", {"values": [x, y]}, {"equation": equation}, expected
    q, k, v, mask = f(2, 3, 5, 8), f(2, 3, 7, 8), f(2, 3, 7, 6), f(5, 7)
    named, scores = {"query": q, "key": k, "value": v}, q @ np.swapaxes(k, -1, -2) / math.sqrt(8)
    op = "scaled_dot_product_attention"
    yield op, named, {}, softmax(scores, -1) @ v
    yield op, {**named, "attn_mask": mask}, {}, softmax(scores + mask, -1) @ v
    keep = np.tril(np.ones((5, 7), bool))
    yield op, {**named, "attn_mask": keep}, {}, softmax(np.where(keep, scores, -np.inf), -1) @ v


def shape_cases():
    x = f(2, 3, 5, 7)
    yield "reshape", {"x": x}, {"shape": [0, -1, 1, 7]}, x.reshape(2, 15, 1, 7)
    yield "reshape", {"x": x}, {"shape": [6, 0, -1]}, x.reshape(6, 5, 7)  # from the right
    yield "transpose", {"x": x}, {"perm": [0, -1, 1, 2]}, x.transpose(0, 3, 1, 2)
    yield "expand_dims", {"x": x[0]}, {"axes": [-1, 0]}, x[0][None, ..., None]
    yield "squeeze", {"x": x[:, :1, :, :1]}, {"axes": [-1]}, x[:, :1, :, 0]
    yield "squeeze", {"x": x[:, :1, :, :1]}, {}, x[:, 0, :, 0]
    yield "concat", {"values": [x, x[:, 1:]]}, {"axis": -3}, np.concatenate([x, x[:, 1:]], 1)
    both = np.stack([x, 2 * x], 2).reshape(2, 6, 5, 7)
    yield "concat", {"values": [x, 2 * x]}, {"axis": 1, "interleave": True}, both
    yield "stack", {"values": [x, x + 1]}, {"axis": -1}, np.stack([x, x + 1], -1)
    yield "split", {"x": x}, {"axis": 1, "num_splits": 3}, np.split(x, 3, 1)
    yield "split", {"x": x}, {"axis": -1, "split_sizes": [2, 1, 4]}, np.split(x, [2, 3], -1)
    yield "tile", {"x": x}, {"reps": [1, 2, 1, 3]}, np.tile(x, (1, 2, 1, 3))
    yield "shape", {"x": x}, {}, np.array(x.shape, np.int32)
    yield "fill", {}, {"shape": [2, 3], "value": np.float32(1.5)}, np.full((2, 3), 1.5)
    span = {"start": np.int32(2), "end": np.int32(11), "step": np.int32(3)}
    yield "range_1d", {}, span, np.arange(2, 11, 3, np.int32)
    cond = x > 0
    yield "select", {"cond": cond, "a": x, "b": x[:1] * 2}, {}, np.where(cond, x, x[:1] * 2)
    for mode in ("constant", "reflect", "replicate"):
        value = {"constant_val": np.float32(1.5)} if mode == "constant" else {}
        name = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}[mode]
        wide = [(0, 0), (0, 0), (1, 3), (0, 2)]
        expected = np.pad(x, wide, name, **({"constant_values": 1.5} if value else {}))
        yield "pad", {"x": x}, {"pad": [1, 3, 0, 2], "mode": mode, **value}, expected


def index_cases():
    x = f(4, 6, 5)
    cut = {"begin": [1, -2, 0], "end": [3, 0, 4], "stride": [1, -1, 3]}
    yield "slice_by_index", {"x": x}, cut, x[1:3, -2:0:-1, 0:4:3]
    masks = {"begin_mask": [True, False, False], "end_mask": [False, True, False]}
    masks["squeeze_mask"] = [False, False, True]
    cut = {"begin": [1, -3, -2], "end": [-1, 1, 0]}
    yield "slice_by_index", {"x": x}, cut | masks, x[:-1, -3:, -2]
    yield "slice_by_size", {"x": x}, {"begin": [1, -2, 0], "size": [2, 1, -1]}, x[1:3, -2:-1]
    at = np.array([[3, 0, 1], [2, 2, 0]], np.int32)
    yield "gather", {"x": x, "indices": at}, {"axis": 1}, np.take(x, at, 1)
    rows = np.array([[3, 0, 1], [2, 2, 0], [1, 4, 4], [0, 0, 1]], np.int32)
    expected = np.stack([np.take(a, r, 0) for a, r in zip(x, rows, strict=True)])
    yield "gather", {"x": x, "indices": rows}, {"axis": 1, "batch_dims": 1}, expected
    yield "gather_nd", {"x": x, "indices": at[:, :2]}, {}, x[at[:, 0], at[:, 1]]
    expected = np.stack([a[r[0], r[1]] for a, r in zip(x, rows, strict=True)])
    batched = {"x": x, "indices": rows[:, :2]}
    yield "gather_nd", batched, {"batch_dims": 1}, expected
    along = RNG.integers(0, 6, (4, 2, 5)).astype(np.int32)
    expected = np.take_along_axis(x, along, 1)
    yield "gather_along_axis", {"x": x, "indices": along}, {"axis": 1}, expected
    y = f(2, 3, 5, 7)
    sizes = {"scale_factor_height": 2, "scale_factor_width": 3}
    yield "upsample_nearest_neighbor", {"x": y}, sizes, y.repeat(2, 2).repeat(3, 3)
    sizes = {"scale_factor_height": np.float32(9 / 5), "scale_factor_width": np.float32(13 / 7)}
    up = y[:, :, np.arange(9) * 5 // 9][..., np.arange(13) * 7 // 13]
    yield "upsample_nearest_neighbor", {"x": y}, sizes, up
    sizes = {"target_size_height": 9, "target_size_width": 13}
    yield "resize_nearest_neighbor", {"x": y}, sizes, up
    for dtype, low, high in [("int8", -128, 127), ("uint8", 0, 255)]:
        kind = np.dtype(dtype).type
        scale, zero = np.array([0.25, 0.5, 0.01], np.float32), np.array([3, 5, 100], kind)
        grid = [1, -1, 1]
        q = np.round(y[0] / scale.reshape(grid)[..., None][0]) + zero[:, None, None].astype(float)
        levels = np.clip(q, low, high).astype(kind)
        constants = {"scale": scale, "zero_point": zero, "axis": 0}
        yield "quantize", {"input": y[0]}, {**constants, "output_dtype": dtype}, levels
        expected = (levels.astype(float) - zero[:, None, None]) * scale[:, None, None]
        yield "dequantize", {"input": levels}, constants, expected
    whole = np.clip(np.round(y / np.float32(0.5)), -128, 127).astype(np.int8)
    constants = {"scale": np.float32(0.5)}
    yield "quantize", {"input": y}, {**constants, "output_dtype": "int8"}, whole
    yield "dequantize", {"input": whole}, constants, whole * 0.5


CASES = [
    (op, inputs, constants, expected if isinstance(expected, list) else [expected])
    for cases in (
        unary_cases,
        binary_cases,
        reduction_cases,
        product_cases,
        shape_cases,
        index_cases,
    )
    for op, inputs, constants, expected in cases()
]
NAMES = [f"{n}-{op}" for n, (op, *_) in enumerate(CASES)]
STEPS = {  # a rounded input may be a step of the result
    "cast", "ceil", "dequantize", "equal", "floor", "floor_div", "mod", "not_equal",
    "quantize", "round",
}  # fmt: skip
FOLDED = {"shape", "fill", "range_1d"}  # constants by the time that a package is saved
SINCE = {"scaled_dot_product_attention": "iOS18", "quantize": "iOS17", "dequantize": "iOS17"}
SINCE_CASE = {  # what an operation of iOS 16 cannot do yet
    n: "iOS17"
    for n, (op, inputs, constants, _) in enumerate(CASES)
    if op == "reshape" and len(constants["shape"]) != inputs["x"].ndim
}


def tensor(value):
    if isinstance(value, list) and isinstance(value[0], np.ndarray):
        return [tensor(v) for v in value]
    return value if isinstance(value, str) else torch.as_tensor(np.asarray(value))


def check(found, expected, tolerance, label=""):
    assert found.shape == np.shape(expected), label
    if np.asarray(expected).dtype.kind in "biu":
        np.testing.assert_array_equal(found, expected, label)
    else:
        limit = tolerance * max(1, np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=limit, err_msg=label)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_an_operation_computes_its_formula(case):
    op, inputs, constants, expected = case
    found = OPS[op](**{name: tensor(value) for name, value in (inputs | constants).items()})
    found = found if isinstance(found, tuple) else (found,)
    for mine, theirs in zip(found, expected, strict=True):
        check(mine.numpy(), theirs, 2e-6)


def test_every_operation_has_a_case():
    assert {op for op, *_ in CASES} == set(OPS)


def applicable(target, number):
    since = SINCE_CASE.get(number, SINCE.get(CASES[number][0], "iOS16"))
    return since <= target


def flat(inputs, number):
    """Inputs of a case under names that are its own; lists are taken apart."""
    for name, value in inputs.items():
        for n, array in enumerate(value if isinstance(value, list) else [value]):
            yield f"c{number}_{name}_{n}", array


def all_cases(target):
    """One program of all cases: every input is its own, every output is c<case>_<output>."""
    chosen = [n for n in range(len(CASES)) if applicable(target, n)]
    feeds = dict(pair for n in chosen for pair in flat(CASES[n][1], n))

    def build(**values):
        return [out for n in chosen for out in build_case(n, values)]

    arrays = {k: v if v.dtype == np.float32 else v.astype(np.int32) for k, v in feeds.items()}
    return program(build, arrays, target), arrays


def build_case(number, values):
    op, inputs, constants, _ = CASES[number]
    arguments = dict(constants)
    for name, value in inputs.items():
        vars_ = [
            mb.cast(x=values[key], dtype=str(a.dtype)) if a.dtype.itemsize == 1 else values[key]
            for key, a in flat({name: value}, number)
        ]
        arguments[name] = vars_ if isinstance(value, list) else vars_[0]
    made = getattr(mb, op)(**arguments)
    for n, out in enumerate(made if isinstance(made, (list, tuple)) else [made]):
        kind = ct.converters.mil.mil.types.builtin_to_string(out.dtype)
        if kind in ("bool", "int8", "uint8"):
            out = mb.cast(x=out, dtype="int32")
        yield mb.identity(x=out, name=f"c{number}_{n}")


@pytest.fixture(scope="module", params=["iOS16-FLOAT16", "iOS17-FLOAT16", "iOS18-FLOAT32"])
def saved(request, tmp_path_factory):
    target, precision = request.param.split("-")
    built, feeds = all_cases(target)
    path = tmp_path_factory.mktemp("cases") / "cases.mlpackage"
    read = Program(save(built, path, target, precision))
    return target, precision, read, read(feeds)


def test_saved_operations_compute_their_formulas(saved):
    target, precision, _, found = saved
    for number, (op, _, _, expected) in enumerate(CASES):
        if applicable(target, number) and not (precision == "FLOAT16" and op in STEPS):
            for n, theirs in enumerate(expected):
                tolerance = 4e-3 if precision == "FLOAT16" else 2e-6
                check(found[f"c{number}_{n}"], theirs, tolerance, NAMES[number])


def test_the_saved_programs_hold_the_operations(saved):
    target, _, read, _ = saved
    held = {op.type for op in read._operations}
    wanted = {op for n, (op, *_) in enumerate(CASES) if applicable(target, n)}
    assert wanted - FOLDED - held == set()


def test_results_of_fp16_are_rounded(saved):
    _, precision, _, found = saved
    number = NAMES.index(next(name for name in NAMES if name.endswith("-tanh")))
    value = found[f"c{number}_0"]
    assert (value == value.astype(np.float16)).all() == (precision == "FLOAT16")


# Types and shapes


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    path = tmp_path_factory.mktemp("overflow") / "x.mlpackage"
    made = program(lambda x: mb.mul(x=mb.mul(x=x, y=300.0), y=x, name="y"), {"x": f(3)})
    return Program(save(made, path, "iOS16", "FLOAT16"))


def test_fp16_overflows_as_the_device_would(overflowing):
    x = {"x": np.array([1.0, 1.001, 300.0], np.float32)}
    seen = {}
    out = overflowing(x, watch=lambda op, name, value: seen.update({op: value.numpy()}))["y"]
    np.testing.assert_array_equal(out, [300.0, np.float16(300.25 * 1.0009765625), np.inf])
    assert next(op for op, value in seen.items() if np.isinf(value).any()) == "mul_0_cast_fp16"


def test_without_emulation_fp16_is_float32(overflowing):
    out = overflowing({"x": np.array([1.0, 1.001, 300.0], np.float32)}, emulate_fp16=False)["y"]
    np.testing.assert_allclose(out, [300.0, 300 * 1.001**2, 27e6], rtol=1e-6)


def test_shapes_may_be_known_only_when_it_runs(tmp_path):
    n, m = (ct.converters.mil.mil.get_new_symbol() for _ in range(2))

    def net(x):  # (n, m, 4) -> (m, 4n) by a computed shape
        rows, columns = (mb.gather(x=mb.shape(x=x), indices=[k]) for k in (0, 1))
        shape = mb.concat(values=[columns, mb.mul(x=rows, y=4)], axis=0)
        return mb.reshape(x=x, shape=shape, name="y")

    made = program(net, {"x": mb.TensorSpec((n, m, 4))})
    sizes = ct.Shape((ct.RangeDim(1, 8, default=2), ct.RangeDim(1, 8, default=3), 4))
    path = save(made, tmp_path / "x.mlpackage", inputs=[ct.TensorType(name="x", shape=sizes)])
    read, x = Program(path), f(5, 7, 4)
    assert read.inputs == {"x": ("float32", (2, 3, 4))}
    assert read.outputs == {"y": ("float32", (-1, -1))}
    assert {op.type for op in read._operations} >= {"shape", "concat", "reshape"}
    np.testing.assert_array_equal(read({"x": x})["y"], x.reshape(7, 20))


def test_unsigned_16_bit_wraps():
    found = OPS["cast"](torch.tensor([-1, 65537, 49407]), "uint16")
    assert found.tolist() == [65535, 1, 49407]


def test_inputs_and_outputs_may_be_fp16(tmp_path):
    half = mb.TensorSpec((3,), ct.converters.mil.mil.types.fp16)
    made = program(lambda x: mb.mul(x=x, y=np.float16(3), name="y"), {"x": half}, "iOS16")
    read = Program(save(made, tmp_path / "x.mlpackage", "iOS16", "FLOAT16"))
    assert read.inputs == {"x": ("float16", (3,))}
    assert read.outputs == {"y": ("float16", (3,))}
    x = np.array([0.1, 1.0, 40000.0], np.float32)
    np.testing.assert_array_equal(read({"x": x})["y"], [np.float16(0.1) * np.float16(3), 3, np.inf])
    np.testing.assert_array_equal(read({"x": x}, emulate_fp16=False)["y"], 3 * x)


def test_a_package_of_two_functions(tmp_path):
    made = ct.utils.MultiFunctionDescriptor()
    for name, factor in (("double", 2.0), ("triple", 3.0)):
        one = program(lambda x, factor=factor: mb.mul(x=x, y=factor, name="y"), {"x": f(3)})
        made.add_function(str(save(one, tmp_path / f"{name}.mlpackage")), "main", name)
    made.default_function_name = "triple"
    with modules.quiet():
        ct.utils.save_multifunction(made, str(tmp_path / "both.mlpackage"))
    path, x = tmp_path / "both.mlpackage", f(3)
    assert functions(path) == ["double", "triple"]
    np.testing.assert_array_equal(Program(path)({"x": x})["y"], 3 * x)
    np.testing.assert_array_equal(Program(path, "double")({"x": x})["y"], 2 * x)
    with pytest.raises(ConvertError, match="no function 'main'; choose one of double, triple"):
        Program(path, "main")


def test_a_value_is_freed_after_its_last_use(tmp_path):
    def chain(x):
        for _ in range(12):
            x = mb.add(x=mb.sin(x=x), y=mb.cos(x=x))
        return mb.identity(x=x, name="y")

    read, alive, most = Program(save(program(chain, {"x": f(8)}), tmp_path / "x.mlpackage")), [], 0

    def watch(_op, _name, value):
        nonlocal most
        alive.append(weakref.ref(value))
        most = max(most, sum(reference() is not None for reference in alive))

    read({"x": f(8)}, watch=watch)
    assert len(alive) == 37
    assert most <= 4


# Compressed weights


def small(target):
    weight = 0.1 * f(64, 32, 3, 3), 0.1 * f(48, 64)

    def net(x):
        x = mb.conv(x=x, weight=weight[0], pad_type="same", name="conv")
        return mb.linear(x=mb.reduce_mean(x=x, axes=[2, 3]), weight=weight[1], name="y")

    return program(net, {"x": f(1, 32, 5, 7)}, target)


def palette(nbits, **options):
    return "palettize_weights", {"mode": "uniform", "nbits": nbits, **options}


GROUPS = {"granularity": "per_grouped_channel", "group_size": 16}
COMPRESSED = {  # how -> (target, function and options of the optimizer, operation)
    "2 bit": ("iOS16", *palette(2), "lut_to_dense"),
    "4 bit": ("iOS16", *palette(4), "lut_to_dense"),
    "6 bit": ("iOS16", *palette(6), "lut_to_dense"),
    "8 bit": ("iOS16", *palette(8), "lut_to_dense"),
    "3 bit, iOS 18": ("iOS18", *palette(3), "lut_to_dense"),
    "4 bit per group": ("iOS18", *palette(4, **GROUPS), "lut_to_dense"),
    "6 bit per group": ("iOS18", *palette(6, **GROUPS), "lut_to_dense"),
    "vectors": ("iOS18", *palette(4, mode="kmeans", cluster_dim=2), "lut_to_dense"),
    "int8": ("iOS16", "linear_quantize_weights", {"dtype": "int8"}, "affine_dequantize"),
    "int8 with zero": (
        "iOS16", "linear_quantize_weights", {"dtype": "int8", "mode": "linear"},
        "affine_dequantize",
    ),
    "int8, iOS 18": (
        "iOS18", "linear_quantize_weights", {"dtype": "int8"}, "blockwise_shift_scale",
    ),
    "int4 per block": (
        "iOS18", "linear_quantize_weights",
        {"dtype": "int4", "granularity": "per_block", "block_size": 16},
        "blockwise_shift_scale",
    ),
    "uint4 per block": (
        "iOS18", "linear_quantize_weights",
        {"dtype": "uint4", "mode": "linear", "granularity": "per_block", "block_size": 16},
        "blockwise_shift_scale",
    ),
    "sparse": ("iOS16", "prune_weights", {"target_sparsity": 0.7}, "sparse_to_dense"),
    "sparse, iOS 18": ("iOS18", "prune_weights", {"target_sparsity": 0.7}, "sparse_to_dense"),
}  # fmt: skip
CONFIGS = {
    "palettize_weights": "OpPalettizerConfig",
    "linear_quantize_weights": "OpLinearQuantizerConfig",
    "prune_weights": "OpMagnitudePrunerConfig",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    targets = ("iOS16", "iOS18")
    return {t: save(small(t), folder / f"{t}.mlpackage", t, "FLOAT16") for t in targets}


@pytest.mark.parametrize("how", COMPRESSED)
def test_compressed_weights_are_those_of_the_library(how, dense, tmp_path):
    target, function, options, op = COMPRESSED[how]
    with modules.quiet():
        import coremltools.optimize.coreml as cto

        config = getattr(cto, CONFIGS[function])(weight_threshold=256, **options)
        config = cto.OptimizationConfig(global_config=config)
        model = ct.models.MLModel(str(dense[target]), skip_model_load=True)
        model = getattr(cto, function)(model, config)
        model.save(str(tmp_path / "small.mlpackage"))
        cto.decompress_weights(model).save(str(tmp_path / "large.mlpackage"))
    read, large = Program(tmp_path / "small.mlpackage"), Program(tmp_path / "large.mlpackage")
    found = {
        name: read.constant(name)
        for name, each in read._constants.items()
        if each.type == "constexpr_" + op
    }
    theirs = materialized(tmp_path / "small.mlpackage")
    assert len(found) == 2
    assert found.keys() == theirs.keys()
    for name, value in found.items():
        assert value.dtype == np.float16
        np.testing.assert_array_equal(value, theirs[name])
    x = {"x": f(1, 32, 5, 7)}
    np.testing.assert_array_equal(read(x)["y"], large(x)["y"])


def materialized(path):
    """Weights as the library decompresses them itself."""
    from coremltools.converters.mil.frontend.milproto.load import load

    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    read = load(spec, spec.specificationVersion, model.weights_dir)
    ops = [op for op in read.functions["main"].operations if op.op_type.startswith("constexpr_")]
    return {op.outputs[0].name: op.materialized_val_inference() for op in ops}


def test_every_constant_is_tested():
    tested = {"constexpr_" + op for *_, op in COMPRESSED.values()}
    assert tested | {"const", "constexpr_cast"} == set(CONSTANTS)


def test_vectors_of_a_palette_lie_along_their_axis():
    # the example of Apple's documentation: two centroids of three values
    indices = np.array([[[0, 0], [1, 0]], [[1, 1], [0, 0]]], np.uint8)
    lut = np.array([["a0", "a1", "a2"], ["b0", "b1", "b2"]]).reshape(1, 1, 1, 2, 3)
    found = CONSTANTS["constexpr_lut_to_dense"](indices, lut, vector_axis=np.int32(1))
    columns = [["a0", "a0"], ["a1", "a1"], ["a2", "a2"], ["b0", "a0"], ["b1", "a1"], ["b2", "a2"]]
    np.testing.assert_array_equal(found[0], columns)
    found = CONSTANTS["constexpr_lut_to_dense"](indices, lut, vector_axis=np.int32(-1))
    np.testing.assert_array_equal(found[0, 1], ["b0", "b1", "b2", "a0", "a1", "a2"])


def test_a_constant_cast_is_exact():
    found = CONSTANTS["constexpr_cast"](np.float16([0.1, np.inf]), "fp32")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32([np.float16(0.1), np.inf]))


# Whole components


class Outputs(torch.nn.Module):
    """A module under one of its methods, as tensors in and tensors out."""

    def __init__(self, module, run):
        super().__init__()
        self.module, self.run = module, run

    def forward(self, *args):
        return self.run(self.module, *args)


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 100, "eos_token_id": 99}
    ids = torch.randint(0, 98, (1, 77), dtype=torch.int32)
    ids[:, 9:] = 99
    return CLIPTextModel(CLIPTextConfig(**config)), lambda m, x: tuple(m(x).values()), [ids]


def unet():
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    feeds = [torch.randn(1, 4, 9, 7), torch.tensor([501.25]), torch.randn(1, 7, 32)]
    return module, lambda m, *x: m(*x, return_dict=False)[0], feeds


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def vae_decoder():
    return vae(), lambda m, x: m.decode(x, return_dict=False)[0], [torch.randn(1, 4, 5, 7)]


def vae_encoder():
    return vae(), lambda m, x: m.quant_conv(m.encoder(x)), [torch.randn(1, 3, 10, 14)]


@pytest.mark.parametrize("component", [text_encoder, unet, vae_decoder, vae_encoder])
def test_a_component_computes_what_torch_does(component, tmp_path):
    torch.manual_seed(0)
    with modules.quiet(), torch.no_grad():
        module, run, feeds = component()
        module = Outputs(module.eval(), run)
        expected = module(*feeds)
        captured = torch.export.export(module, tuple(feeds)).run_decompositions({})
    expected = expected if isinstance(expected, tuple) else (expected,)
    for target, precision, limit in [("iOS16", "FLOAT16", 1e-2), ("iOS18", "FLOAT32", 1e-5)]:
        read = Program(save(captured, tmp_path / f"{target}.mlpackage", target, precision))
        found = read({n: x.numpy() for n, x in zip(read.inputs, feeds, strict=True)})
        for mine, theirs in zip(found.values(), expected, strict=True):
            error = np.abs(mine - theirs.numpy()).max() / theirs.abs().max().item()
            assert error < limit
            assert error > (1e-5 if precision == "FLOAT16" else 0)


# What is refused


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return save(small("iOS18"), tmp_path_factory.mktemp("sound") / "x.mlpackage")


@pytest.fixture
def broken(sound, tmp_path):
    """A copy of a package, to break."""
    return shutil.copytree(sound, tmp_path / "broken.mlpackage")


def refused(path, match):
    with pytest.raises(ConvertError, match=match) as caught:
        Program(path)
    assert "\n" not in str(caught.value)


def edit(path, change):
    """Change the description of a model on disk."""
    model = ct.proto.Model_pb2.Model.FromString((path / MODEL).read_bytes())
    function = model.mlProgram.functions["main"]
    change(function.block_specializations[function.opset].operations)
    (path / MODEL).write_bytes(model.SerializeToString())


def operation(operations, kind):
    return next(op for op in operations if op.type == kind)


def stored(operations):
    """The first constant whose value is in the weights file."""
    values = (op.attributes["val"] for op in operations if op.type == "const")
    return next(v for v in values if v.WhichOneof("value") == "blobFileValue")


def test_unknown_operations_are_all_named(broken, monkeypatch):
    monkeypatch.delitem(mlprogram.TABLE, "conv")
    monkeypatch.delitem(mlprogram.TABLE, "linear")
    refused(broken, r"2 operations are not known to this reader: conv \(conv\), linear \(y\);")


def test_unknown_parameters_are_refused(broken):
    def change(operations):
        inputs = operation(operations, "conv").inputs
        inputs["spin"].CopyFrom(inputs["groups"])

    edit(broken, change)
    refused(broken, "the operation conv .*unexpected keyword argument 'spin'")


def test_a_value_must_exist_before_it_is_used(broken):
    def change(operations):
        operation(operations, "linear").inputs["x"].arguments[0].name = "nothing"

    edit(broken, change)
    refused(broken, "uses nothing before it exists")


def test_an_unknown_type_is_refused(broken):
    def change(operations):
        operation(operations, "conv").outputs[0].type.tensorType.dataType = 13

    edit(broken, change)
    refused(broken, "the operation conv .* is of type BFLOAT16, the types known are FLOAT16")


def test_weights_must_be_there(broken):
    (broken / WEIGHTS).unlink()
    refused(broken, "weights cannot be read: .*No such file")


@pytest.mark.parametrize("size", [0, 63, 5000, -1])
def test_weights_must_be_whole(broken, size):
    data = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(data[:size])
    refused(broken, "it is damaged, convert the model again")


@pytest.mark.parametrize("offset", [63, 1 << 20, (1 << 64) - 64])
def test_weights_must_be_where_the_model_says(broken, offset):
    def change(operations):
        stored(operations).blobFileValue.offset = offset

    edit(broken, change)
    refused(broken, rf"has no FLOAT32 of 73728 at {offset}; it is damaged")


@pytest.mark.parametrize("kind, size", [("FLOAT16", 36864), ("INT32", 73728)])
def test_weights_must_be_of_their_type(broken, kind, size):
    def change(operations):
        number = ct.proto.MIL_pb2.DataType.Value(kind)
        stored(operations).type.tensorType.dataType = number

    edit(broken, change)
    refused(broken, f"has no {kind} of {size} at")


def test_weights_must_be_of_the_known_version(broken):
    data = bytearray((broken / WEIGHTS).read_bytes())
    data[4] = 3
    (broken / WEIGHTS).write_bytes(data)
    refused(broken, "has the version .*, we read 2; it is damaged")


def test_a_constant_must_have_its_declared_shape(broken):
    def change(operations):
        weight = next(op for op in operations if op.attributes["val"].HasField("blobFileValue"))
        weight.outputs[0].type.tensorType.dimensions[0].constant.size = 63

    edit(broken, change)
    with pytest.raises(ConvertError, match=r"has the shape \(64, 32, 3, 3\), not the one declared"):
        Program(broken)({"x": f(1, 32, 5, 7)})


def test_weights_must_be_inside_the_package(broken):
    def change(operations):
        stored(operations).blobFileValue.fileName = "@model_path/../../../../x.bin"

    edit(broken, change)
    refused(broken, "points at .* which is outside")


def test_a_constant_must_fill_its_shape(broken):
    read = Program(broken)
    name = next(n for n in read._constants if "axes" in n)
    read._constants[name].attributes["val"].immediateValue.tensor.ints.values.append(1)
    with pytest.raises(ConvertError, match=r"a constant has 3 values, its shape is \(2,\)"):
        read({"x": f(1, 32, 5, 7)})


def test_a_result_must_have_its_declared_shape(broken):
    def change(operations):
        shape = operation(operations, "conv").outputs[0].type.tensorType
        shape.dimensions[2].constant.size = 6

    edit(broken, change)
    with pytest.raises(ConvertError, match=r"conv .* gives .*\[1, 64, 5, 7\], its type is"):
        Program(broken)({"x": f(1, 32, 5, 7)})


def test_an_index_outside_of_its_palette_is_refused():
    lut = np.zeros((1, 2, 16, 1), np.float16)
    with pytest.raises(IndexError):
        CONSTANTS["constexpr_lut_to_dense"](np.full((3, 4), 16, np.uint8), lut)
    with pytest.raises(ValueError, match=r"\[3, 5\] values cannot be in \[1, 2\] equal blocks"):
        CONSTANTS["constexpr_lut_to_dense"](np.zeros((3, 5), np.uint8), lut)


@pytest.mark.parametrize("op", ["gather", "gather_nd", "gather_along_axis"])
def test_indices_outside_are_refused(op):
    x, at = torch.ones(3), torch.tensor([3])
    with pytest.raises((IndexError, RuntimeError)):
        OPS[op](x, at)
    no = torch.tensor(False)
    assert OPS[op](x, -at).shape == ((1,) if op != "gather_nd" else ())
    with pytest.raises(IndexError, match="the index -3 is undefined since iOS 17"):
        OPS[op](x, -at, validate_indices=no)


def test_a_package_must_be_one(tmp_path, sound):
    refused(tmp_path / "nothing", "is not an .mlpackage folder")
    refused(sound / MODEL, "is not an .mlpackage folder")
    (tmp_path / "Manifest.json").write_text("[]")
    refused(tmp_path, "is not an .mlpackage folder")
    entry = {"a": {"path": "../../etc/hostname"}}
    manifest = {"rootModelIdentifier": "a", "itemInfoEntries": entry}
    (tmp_path / "Manifest.json").write_text(json.dumps(manifest))
    refused(tmp_path, "which is outside")


def test_a_model_must_be_readable(broken):
    data = (broken / MODEL).read_bytes()
    (broken / MODEL).write_bytes(data[: len(data) // 2])
    refused(broken, "is not a model: .*convert it again")


def test_a_neural_network_is_refused(broken):
    model = ct.proto.Model_pb2.Model(specificationVersion=4)
    model.neuralNetwork.SetInParent()
    (broken / MODEL).write_bytes(model.SerializeToString())
    refused(broken, "is of type neuralNetwork; convert to mlprogram, iOS 16 or later")


def test_images_are_refused(tmp_path):
    made = program(lambda x: mb.mul(x=x, y=3.0, name="y"), {"x": f(1, 3, 4, 4)})
    images = [ct.ImageType(name="x", shape=(1, 3, 4, 4))]
    path = save(made, tmp_path / "x.mlpackage", inputs=images)
    refused(path, "x is imageType in the description, only arrays")


def test_outputs_must_be_computed(broken):
    def change(operations):
        operation(operations, "linear").outputs[0].name = "z"

    edit(broken, change)
    refused(broken, "y is multiArrayType in the description, only arrays that the program has")


def test_inputs_must_fit(sound):
    read = Program(sound)
    with pytest.raises(ConvertError, match="takes x, it was given y"):
        read({"y": f(1, 32, 5, 7)})
    with pytest.raises(ConvertError, match=r"x is float32\[1, 32, 5, 6\], the program takes"):
        read({"x": f(1, 32, 5, 6)})
    with pytest.raises(ConvertError, match="x is complex64"):
        read({"x": f(1, 32, 5, 7).astype(np.complex64)})
