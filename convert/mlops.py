"""The operations of Core ML's programs, by Apple's description of them (the MIL Ops reference).

Parameters have MIL's names. Constants are decompressed in NumPy, the rest runs in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..quantize.weights import unpack as unpack_bits

KINDS: dict[str, tuple[int, int, type, torch.dtype]] = {
    # MIL's name -> bits, code in the weights file, numpy dtype, torch dtype; fp16 runs as float32
    "FLOAT16": (16, 1, np.float16, torch.float32),
    "FLOAT32": (32, 2, np.float32, torch.float32),
    "BOOL": (8, 0, np.bool_, torch.bool),  # never in a weights file
    "UINT1": (1, 9, np.uint8, torch.uint8),
    "UINT2": (2, 10, np.uint8, torch.uint8),
    "UINT3": (3, 12, np.uint8, torch.uint8),
    "UINT4": (4, 11, np.uint8, torch.uint8),
    "UINT6": (6, 13, np.uint8, torch.uint8),
    "INT4": (4, 8, np.int8, torch.int8),
    "UINT8": (8, 3, np.uint8, torch.uint8),
    "INT8": (8, 4, np.int8, torch.int8),
    "UINT16": (16, 7, np.uint16, torch.int32),
    "INT16": (16, 6, np.int16, torch.int16),
    "UINT32": (32, 15, np.uint32, torch.int64),
    "INT32": (32, 14, np.int32, torch.int32),
}
WIDER = {np.dtype("f2"): "f4", np.dtype("u2"): "i4", np.dtype("u4"): "i8"}
CASTS = {  # the names that cast and quantize know
    "fp16": "FLOAT16",
    "fp32": "FLOAT32",
    "bool": "BOOL",
    **{kind.lower(): kind for kind in ("UINT8", "INT8", "UINT16", "INT16", "INT32")},
}


def to_kind(value: torch.Tensor, kind: str) -> torch.Tensor:
    return value.int() & 0xFFFF if kind == "UINT16" else value.to(KINDS[kind][3])


def to_tensor(value: np.ndarray | str) -> Any:
    if isinstance(value, str):
        return value
    return torch.from_numpy(np.array(value, WIDER.get(value.dtype, value.dtype)))


# Constants, in numpy


def unpack(raw: np.ndarray, kind: str, count: int) -> np.ndarray:
    """The values of packed bytes; those of less than a byte begin at its least significant bit."""
    bits, _, dtype, _ = KINDS[kind]
    if bits >= 8:
        return raw[: count * bits // 8].view(dtype)
    count = min(count, 8 * raw.size // bits)  # of a damaged file fewer, which the caller finds
    values = unpack_bits(raw[: math.ceil(count * bits / 8)], bits, count)
    return values if kind != "INT4" else ((values ^ 8).astype(np.int8) - 8).astype(np.int8)


def _blocks(parts: tuple[int, ...], shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """An index that repeats an array of `parts` in equal blocks up to `shape`."""
    if any(n % p for p, n in zip(parts, shape, strict=True)):
        raise ValueError(f"{list(shape)} values cannot be in {list(parts)} equal blocks")
    return np.ix_(*(np.arange(n) // (n // p) for p, n in zip(parts, shape, strict=True)))


def constexpr_lut_to_dense(indices, lut, shape=None, vector_axis=None):
    if shape is not None:  # iOS 16: packed indices into one table
        kind = f"UINT{len(lut).bit_length() - 1}"
        return lut[unpack(indices, kind, math.prod(shape))].reshape(shape)
    dense = lut[(*_blocks(lut.shape[:-2], indices.shape), indices)]  # (*indices, vector)
    if vector_axis is None:
        return dense[..., 0]
    axis = int(vector_axis) % indices.ndim
    sizes = [n * lut.shape[-1] if i == axis else n for i, n in enumerate(indices.shape)]
    return np.moveaxis(dense, -1, axis + 1).reshape(sizes)


def constexpr_affine_dequantize(quantized_data, zero_point, scale, axis):
    def along(x):  # a scalar, or a vector along the axis
        return np.expand_dims(x, [i for i in range(data.ndim) if i != int(axis) % data.ndim])

    data = quantized_data.astype(np.float32)
    zero, factor = (x.astype(np.float32) for x in (zero_point, scale))
    zero, factor = (along(x) if x.ndim else x for x in (zero, factor))
    return ((data - zero) * factor).astype(scale.dtype)


def constexpr_blockwise_shift_scale(data, scale, offset=None):
    index, values = _blocks(scale.shape, data.shape), data.astype(np.float32)
    if offset is not None:
        values -= offset.astype(np.float32)[index]
    return (values * scale.astype(np.float32)[index]).astype(scale.dtype)


def constexpr_sparse_to_dense(nonzero_data, mask, shape=None):
    if shape is not None:  # iOS 16: a packed mask
        mask = unpack(mask, "UINT1", math.prod(shape)).reshape(shape)
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


def constexpr_cast(source_val, output_dtype):
    return source_val.astype(KINDS[CASTS[output_dtype]][2])


# Operations, in torch: their parameters have MIL's names, numbers come as tensors


def _ints(x: torch.Tensor) -> list[int]:
    return [int(value) for value in x.flatten().tolist()]


def _axes(x: torch.Tensor, axes: torch.Tensor | None) -> list[int]:
    return list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in _ints(axes)]


def _unary(function: Callable) -> Callable:
    return lambda x: function(x)


def _binary(function: Callable) -> Callable:
    return lambda x, y: function(x, y)


def _reduce(function: Callable) -> Callable:
    return lambda x, axes=None, keep_dims=False: function(x, _axes(x, axes), bool(keep_dims))


def _argument(function: Callable) -> Callable:
    return lambda x, axis=-1, keep_dims=False, output_dtype="int32": function(
        x, int(axis), bool(keep_dims)
    )


def conv(x, weight, bias=None, strides=None, pad_type="valid", pad=None, dilations=None, groups=1):
    ones = torch.ones(x.ndim - 2)
    stride, dilation = (_ints(ones if v is None else v) for v in (strides, dilations))
    before, after = _padding(pad_type, pad, x.shape[2:], weight.shape[2:], stride, dilation)
    if before != after:  # torch pads both sides alike
        x = F.pad(x, [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair])
        before = [0] * len(before)
    function = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    return function(x, weight, bias, stride, before, dilation, int(groups))


def _padding(pad_type, pad, sizes, kernel, stride, dilation):
    if pad_type in ("same", "same_lower"):  # out = ceil(in / stride); the odd one goes after
        each = zip(sizes, kernel, stride, dilation, strict=True)
        needs = [max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n) for n, k, s, d in each]
        less, more = [n // 2 for n in needs], [n - n // 2 for n in needs]
        return (less, more) if pad_type == "same" else (more, less)
    both = _ints(pad) if pad_type == "custom" else [0] * 2 * len(sizes)
    return both[::2], both[1::2]


def matmul(x, y, transpose_x=False, transpose_y=False):
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def gelu(x, mode="EXACT"):
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


def layer_norm(x, axes=None, gamma=None, beta=None, epsilon=1e-5):
    axes = _axes(x, axes)
    shape = [n if i in axes else 1 for i, n in enumerate(x.shape)]
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + float(epsilon))
    x = x if gamma is None else x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


def reshape(x, shape):
    sizes, missing = _ints(shape), x.ndim - shape.numel()  # 0 is the size counted from the right
    same = [x.shape[i + missing] if i + missing >= 0 else 1 for i in range(len(sizes))]
    return x.reshape([n or old for n, old in zip(sizes, same, strict=True)])


def expand_dims(x, axes):
    for axis in sorted(axis % (x.ndim + axes.numel()) for axis in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


def concat(values, axis, interleave=False):
    if interleave:
        axis = int(axis) % values[0].ndim
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)
    return torch.cat([torch.atleast_1d(value) for value in values], int(axis))


def split(x, axis, num_splits=None, split_sizes=None):
    if split_sizes is None:
        count, rest = divmod(x.shape[int(axis)], int(num_splits))
        if rest:
            raise ValueError(f"{x.shape[int(axis)]} cannot be split into {int(num_splits)}")
        return x.split(count, int(axis))
    return x.split(_ints(split_sizes), int(axis))


def slice_by_index(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    no, squeezed = [0] * x.ndim, []
    masks = (no if mask is None else _ints(mask) for mask in (begin_mask, end_mask, squeeze_mask))
    steps = [1] * x.ndim if stride is None else _ints(stride)
    for axis, (first, last, step, from_start, to_end, single) in enumerate(
        zip(_ints(begin), _ints(end), steps, *masks, strict=True)
    ):
        start, stop = (None if from_start else first), (None if to_end else last)
        every = range(x.shape[axis])
        index = [every[start or 0]] if single else every[start:stop:step]
        x = x.index_select(axis, torch.tensor(index, dtype=torch.long)) if index != every else x
        squeezed += [axis] if single else []
    return x.squeeze(squeezed) if squeezed else x


def slice_by_size(x, begin, size):
    for axis, (start, count) in enumerate(zip(_ints(begin), _ints(size), strict=True)):
        start = start % x.shape[axis] if start < 0 else start
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


def _index(indices, validate_indices):
    if validate_indices is not None and indices.numel() and int(indices.min()) < 0:
        raise IndexError(f"the index {int(indices.min())} is undefined since iOS 17")
    return indices.long()


def gather(x, indices, axis=0, batch_dims=0, validate_indices=None):
    axis, batch_dims = int(axis) % x.ndim, int(batch_dims)
    if batch_dims:
        rows = zip(x, indices, strict=True)
        rest = axis - 1, batch_dims - 1, validate_indices
        return torch.stack([gather(values, index, *rest) for values, index in rows])
    return x[(*[slice(None)] * axis, _index(indices, validate_indices))]


def gather_nd(x, indices, batch_dims=0, validate_indices=None):
    if int(batch_dims):
        rows, rest = zip(x, indices, strict=True), (int(batch_dims) - 1, validate_indices)
        return torch.stack([gather_nd(values, index, *rest) for values, index in rows])
    return x[_index(indices, validate_indices).unbind(-1)]


def gather_along_axis(x, indices, axis=0, validate_indices=None):
    indices = _index(indices, validate_indices)
    wrapped = torch.where(indices < 0, indices + x.shape[int(axis)], indices)
    return x.gather(int(axis), wrapped)


def pad(x, pad, mode="constant", constant_val=0.0):
    before, after = _ints(pad)[::2], _ints(pad)[1::2]  # of the last dimensions, in their order
    if mode == "constant":
        both = [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
        return F.pad(x, both, value=float(constant_val))
    if mode not in ("reflect", "replicate"):
        raise ValueError(f"the mode is {mode!r}, only constant, reflect and replicate are known")
    for axis, (start, end) in enumerate(zip(before, after, strict=True), x.ndim - len(before)):
        last = x.shape[axis] - 1
        index = torch.arange(-start, last + 1 + end)
        edge = index.clamp(0, last) if mode == "replicate" else last - (last - index.abs()).abs()
        x = x.index_select(axis, edge)
    return x


def upsample_nearest_neighbor(x, scale_factor_height=1, scale_factor_width=1):
    height, width = x.shape[-2] * scale_factor_height, x.shape[-1] * scale_factor_width
    return resize_nearest_neighbor(x, height, width)


def resize_nearest_neighbor(x, target_size_height, target_size_width):
    flat = x.reshape(1, -1, *x.shape[-2:])
    y = F.interpolate(flat, (int(target_size_height), int(target_size_width)), mode="nearest")
    return y.reshape(*x.shape[:-2], *y.shape[-2:])


def quantize(input, scale, output_dtype, zero_point=None, axis=None):
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    scale, zero_point = (_along(v, input, axis) for v in (scale, zero_point))
    kind = KINDS[CASTS[output_dtype]][3]
    levels = torch.round(input / scale) + zero_point
    return levels.clamp(torch.iinfo(kind).min, torch.iinfo(kind).max).to(kind)


def dequantize(input, scale, zero_point=None, axis=None):
    levels = input.float()
    if zero_point is not None:
        levels = levels - _along(zero_point, input, axis).float()
    return levels * _along(scale, input, axis)


def _along(value, x, axis):
    """A scalar, or a vector as it is broadcast along one axis of x."""
    if not value.ndim:
        return value
    return value.reshape([-1 if i == int(axis) % x.ndim else 1 for i in range(x.ndim)])


CONSTANTS: dict[str, Callable] = {
    "const": lambda val: val,
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_cast": constexpr_cast,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "constexpr_sparse_to_dense": constexpr_sparse_to_dense,
}
OPS: dict[str, Callable] = {
    **{name: _unary(getattr(torch, name)) for name in (
        "abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "logical_not", "relu", "round",
        "sigmoid", "sign", "sin", "sqrt", "square", "tanh",
    )},
    **{name: _binary(getattr(torch, function)) for name, function in {
        "add": "add", "equal": "eq", "floor_div": "floor_divide", "greater": "gt",
        "greater_equal": "ge", "less": "lt", "less_equal": "le", "logical_and": "logical_and",
        "logical_or": "logical_or", "maximum": "maximum", "minimum": "minimum",
        "mod": "remainder", "mul": "mul", "not_equal": "ne", "pow": "pow",
        "real_div": "true_divide", "sub": "sub",
    }.items()},
    **{"reduce_" + name: _reduce(function) for name, function in {
        "max": torch.amax, "mean": torch.mean, "min": torch.amin, "sum": torch.sum,
        "l2_norm": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
        "sum_square": lambda x, axes, keep: x.square().sum(axes, keep),
    }.items()},
    "reduce_argmax": _argument(torch.argmax),
    "reduce_argmin": _argument(torch.argmin),
    "batch_norm": lambda x, mean, variance, gamma=None, beta=None, epsilon=1e-5: F.batch_norm(
        x, mean, variance, gamma, beta, eps=float(epsilon)
    ),
    "cast": lambda x, dtype: to_kind(x, CASTS[dtype]),
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "concat": concat,
    "conv": conv,
    "dequantize": dequantize,
    "einsum": lambda values, equation: torch.einsum(equation, *values),
    "expand_dims": expand_dims,
    "fill": lambda shape, value=0.0: torch.as_tensor(value).expand(_ints(shape)),
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "gelu": gelu,
    "identity": lambda x: x,
    "instance_norm": lambda x, gamma=None, beta=None, epsilon=1e-5: F.instance_norm(
        x, weight=gamma, bias=beta, eps=float(epsilon)
    ),
    "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
    "layer_norm": layer_norm,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "log": lambda x, epsilon=1e-45: torch.log(x + epsilon),
    "matmul": matmul,
    "pad": pad,
    "quantize": quantize,
    "range_1d": lambda start, end, step: torch.arange(start.item(), end.item(), step.item()),
    "reshape": reshape,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "rsqrt": lambda x, epsilon=1e-12: torch.rsqrt(x + epsilon),
    "scaled_dot_product_attention": lambda query, key, value, attn_mask=None: (
        F.scaled_dot_product_attention(query, key, value, attn_mask)
    ),
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "shape": lambda x: torch.tensor(x.shape, dtype=torch.int32),
    "silu": lambda x: F.silu(x),
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "softmax": lambda x, axis=-1: torch.softmax(x, int(axis)),
    "split": split,
    "squeeze": lambda x, axes=None: x.squeeze(_axes(x, axes)),
    "stack": lambda values, axis: torch.stack(values, int(axis)),
    "tile": lambda x, reps: x.tile(_ints(reps)),
    "transpose": lambda x, perm: x.permute(_ints(perm)),
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}  # fmt: skip
TABLE = CONSTANTS | OPS
