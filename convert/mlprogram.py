"""A saved Core ML ML Program, run in torch: what is on disk is compared, on any system.

Only the schema of the model file is taken from coremltools. Weights are read and decompressed
here, and every operation is written from Apple's description of it (the MIL Ops reference).
"""

from __future__ import annotations

import inspect
import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from .checkpoint import ConvertError
from .coremltools_fixes import coremltools

BLOB = 0xDEADBEEF  # begins the 64 bytes that describe a weight
BLOB_VERSION = 2
KEEP = 256 << 20  # bytes of decompressed constants that are kept from one run to the next
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
FAILURES = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, AttributeError)
Watch = Callable[[str, str, torch.Tensor], None]
Interface = dict[str, tuple[str, tuple[int, ...]]]


def functions(package: Path) -> list[str]:
    """Names of the functions in a package; raises ConvertError when it is not an ML Program."""
    return sorted(_spec(package)[0].mlProgram.functions)


class Program:
    """A saved ML Program: constants are decompressed when used, operations run in torch.

    `inputs` and `outputs` are name -> (numpy dtype, shape) as the model's description has them;
    of a flexible shape it is the default, and an unknown size of an output is -1.
    Raises ConvertError when the package is damaged or holds operations that are not known here.
    """

    def __init__(self, package: Path, function: str | None = None):
        self.package = Path(package)
        spec, self._folder = _spec(self.package)
        known, about = spec.mlProgram.functions, spec.description
        name = function or about.defaultFunctionName or "main"
        if name not in known:
            raise ConvertError(
                f"{package} has no function {name!r}; choose one of {', '.join(sorted(known))}"
            )
        about = next((f for f in about.functions if f.name == name), about)
        signature, block = known[name], known[name].block_specializations[known[name].opset]
        self._types = {i.name: i.type.tensorType for i in signature.inputs}
        types = {o.name: o.type.tensorType for op in block.operations for o in op.outputs}
        self.inputs = self._interface(about.input, self._types)
        self.outputs = self._interface(about.output, self._types | types)
        self._files: dict[str, np.ndarray] = {}
        self._kept: dict[str, torch.Tensor | str] = {}  # constants, for the next run
        self._room = KEEP
        self._constants = {o.name: op for op in block.operations if _fixed(op) for o in op.outputs}
        self._operations = [op for op in block.operations if not _fixed(op)]
        self._check(block.operations)
        self._unused = self._after_last_use()

    def __call__(
        self,
        inputs: dict[str, np.ndarray],
        emulate_fp16: bool = True,
        watch: Watch | None = None,
    ) -> dict[str, np.ndarray]:
        """Run the program; results of type fp16 are rounded to it, or not, if emulation is off.

        `watch` is told the operation, the output's name and the value of every float result.
        Raises ConvertError when inputs do not fit, or an operation cannot do what it is asked.
        """
        if inputs.keys() != self.inputs.keys():
            raise ConvertError(
                f"the program takes {', '.join(self.inputs)}, it was given {', '.join(inputs)}"
            )
        values = {name: self._feed(name, array, emulate_fp16) for name, array in inputs.items()}
        for op, unused in zip(self._operations, self._unused, strict=True):
            with torch.no_grad():
                for output, value in zip(op.outputs, self._run(op, values), strict=True):
                    value = _settle(_label(op), output.type.tensorType, value, emulate_fp16)
                    values[output.name] = value
                    if watch is not None and value.is_floating_point():
                        watch(_name(op), output.name, value)
            for name in unused:
                values.pop(name, None)
        found = {name: self._value(name, values) for name in self.outputs}
        return {name: cast(torch.Tensor, value).numpy().copy() for name, value in found.items()}

    def constant(self, name: str) -> np.ndarray | str:
        """A constant of the program by its name, decompressed, in the type that it is stored in."""
        op = self._constants[name]
        arguments = {k: self._decode(v) for k, v in op.attributes.items() if k != "name"}
        for key, argument in op.inputs.items():
            [binding] = argument.arguments
            stored = binding.WhichOneof("binding") == "value"
            arguments[key] = self._decode(binding.value) if stored else self.constant(binding.name)
        value = _guarded(op, CONSTANTS[op.type], arguments)
        if not isinstance(value, str) and not _fits(value.shape, op.outputs[0].type.tensorType):
            raise ConvertError(f"{_label(op)} has the shape {value.shape}, not the one declared")
        return value

    def layers(self) -> dict[str, str]:
        """For each output of an operation with weights, the layer that the weights' name tells."""
        found = {}
        for op in self._operations:
            names = [b.name for b in op.inputs["weight"].arguments] if "weight" in op.inputs else []
            layer = re.search(r"_module_(.+)_weight", names[0]) if names else None
            if layer:
                found[op.outputs[0].name] = layer[1]
        return found

    def _interface(self, features: Any, types: dict[str, Any]) -> Interface:
        interface = {}
        for feature in features:
            kind, array = feature.type.WhichOneof("Type"), feature.type.multiArrayType
            if kind != "multiArrayType" or feature.name not in types:
                raise ConvertError(
                    f"{self.package}: {feature.name} is {kind} in the description, only arrays "
                    "that the program has too are supported; convert with tensors in and out"
                )
            dtype = array.ArrayDataType.Name(array.dataType).lower().replace("double", "float64")
            interface[feature.name] = dtype, tuple(array.shape) or _sizes(types[feature.name])
        return interface

    def _check(self, operations: Any) -> None:
        """Refuse what could only fail later: unknown operations or names, weights not there."""
        unknown = [f"{op.type} ({_name(op)})" for op in operations if op.type not in TABLE]
        if unknown:
            raise ConvertError(
                f"{self.package}: {len(unknown)} operations are not known to this reader: "
                f"{', '.join(unknown)}; convert without them or add them to mlprogram.py"
            )
        defined = set(self._types)
        for op in operations:
            names = {b.name for b in _bindings(op) if b.WhichOneof("binding") == "name"}
            if missing := names - defined:
                raise self._damaged(f"{_label(op)} uses {', '.join(missing)} before it exists")
            self._check_operation(op)
            defined |= {output.name for output in op.outputs}

    def _check_operation(self, op: Any) -> None:
        keys = [*op.inputs, *(key for key in op.attributes if key != "name")]
        try:
            inspect.signature(TABLE[op.type]).bind(**dict.fromkeys(keys))
        except TypeError as error:
            raise ConvertError(f"{_label(op)}: {error}; it is not known to this reader") from error
        values = [b.value for b in _bindings(op) if b.WhichOneof("binding") == "value"]
        for value in (*values, *op.attributes.values()):
            if value.WhichOneof("value") == "blobFileValue":
                self._blob(value)
        for output in op.outputs:
            kind = _kind(output.type.tensorType)
            if kind not in KINDS and not (kind == "STRING" and op.type == "const"):
                raise ConvertError(
                    f"{_label(op)} is of type {kind}, the types known are {', '.join(KINDS)}"
                )

    def _after_last_use(self) -> list[list[str]]:
        """For each operation the values that no later one uses."""
        kept, unused = set(self.outputs), []
        for op in reversed(self._operations):
            used = {b.name for b in _bindings(op)} | {output.name for output in op.outputs}
            unused.append(sorted(used - kept))
            kept |= used
        return unused[::-1]

    def _feed(self, name: str, array: np.ndarray, emulate_fp16: bool) -> torch.Tensor:
        array = np.asarray(array)
        declared, (dtype, _) = self._types[name], self.inputs[name]
        if not _fits(array.shape, declared) or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise ConvertError(
                f"the input {name} is {array.dtype}{list(array.shape)}, "
                f"the program takes {dtype}{list(_sizes(declared))}"
            )
        return _settle(f"the input {name}", declared, _tensor(array), emulate_fp16)

    def _run(self, op: Any, values: dict[str, torch.Tensor]) -> tuple:
        arguments: dict[str, Any] = {}
        for key, argument in op.inputs.items():
            every = [
                _tensor(self._decode(b.value)) if not b.name else self._value(b.name, values)
                for b in argument.arguments
            ]
            arguments[key] = every if key == "values" else every[0]
        results = _guarded(op, OPS[op.type], arguments)
        return results if isinstance(results, tuple) else (results,)

    def _value(self, name: str, values: dict[str, torch.Tensor]) -> torch.Tensor | str:
        if name in values:
            return values[name]
        if name not in self._kept:
            value = _tensor(self.constant(name))
            size = 0 if isinstance(value, str) else value.nbytes
            if self._room < size:
                return value
            self._room -= size
            self._kept[name] = value
        return self._kept[name]

    def _decode(self, value: Any) -> np.ndarray | str:
        kind, shape = _kind(value.type.tensorType), _sizes(value.type.tensorType)
        stored = value.immediateValue.tensor
        field = stored.WhichOneof("value")
        if kind == "STRING":
            return stored.strings.values[0]
        if value.WhichOneof("value") == "blobFileValue":
            array = _unpack(self._blob(value), kind, math.prod(shape))
        elif field == "bytes":
            array = _unpack(np.frombuffer(stored.bytes.values, np.uint8), kind, math.prod(shape))
        else:
            array = np.array(getattr(stored, field).values if field else [], KINDS[kind][2])
        if array.size != math.prod(shape):
            raise self._damaged(f"a constant has {array.size} values, its shape is {shape}")
        return array.reshape(shape)

    def _blob(self, value: Any) -> np.ndarray:
        """The bytes of a weight, still on disk; what the file says that they are is checked."""
        name, offset = value.blobFileValue.fileName, value.blobFileValue.offset
        kind, data = _kind(value.type.tensorType), self._file(name)
        bits, code, *_ = KINDS[kind]
        size = math.ceil(math.prod(_sizes(value.type.tensorType)) * bits / 8)
        header = bytes(data[offset : offset + 24]).ljust(24, b"\0")
        mark, found, length, start = struct.unpack("<IIQQ", header)
        if (mark, found, length) != (BLOB, code, size) or start + length > data.size:
            raise self._damaged(f"{name} ({data.size:,} bytes) has no {kind} of {size} at {offset}")
        return data[start : start + length]

    def _file(self, name: str) -> np.ndarray:
        if name not in self._files:
            path = _inside(self.package, self._folder / name.removeprefix("@model_path/"))
            try:
                self._files[name] = data = np.memmap(path, np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise self._damaged(f"weights cannot be read: {error}") from error
            if (version := bytes(data[4:8])) != struct.pack("<I", BLOB_VERSION):
                raise self._damaged(f"{path} has the version {version!r}, we read {BLOB_VERSION}")
        return self._files[name]

    def _damaged(self, what: str) -> ConvertError:
        return ConvertError(f"{self.package}: {what}; it is damaged, convert the model again")


def _spec(package: Path) -> tuple[Any, Path]:
    """The model file of a package, parsed, and its folder."""
    manifest = Path(package) / "Manifest.json"
    try:
        root = json.loads(manifest.read_text())
        entry = root["itemInfoEntries"][root["rootModelIdentifier"]]["path"]
        path = _inside(Path(package), Path(package) / "Data" / entry)
        data = path.read_bytes()
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConvertError(f"{package} is not an .mlpackage folder: {error!r}") from error
    pb2 = coremltools().proto.Model_pb2
    try:
        spec = pb2.Model.FromString(data)
    except Exception as error:  # protobuf's own class; the package may be of another version
        raise ConvertError(f"{path} is not a model: {error}; convert it again") from error
    if (kind := spec.WhichOneof("Type")) != "mlProgram":
        raise ConvertError(f"{package} is of type {kind}; convert to mlprogram, iOS 16 or later")
    return spec, path.parent


def _inside(package: Path, path: Path) -> Path:
    if not path.resolve().is_relative_to(package.resolve()):
        raise ConvertError(f"{package} points at {path}, which is outside; do not trust it")
    return path


def _fixed(op: Any) -> bool:
    return op.type == "const" or op.type.startswith("constexpr_")


def _name(op: Any) -> str:
    given = op.attributes["name"].immediateValue.tensor.strings.values if op.attributes else ()
    return given[0] if given else op.outputs[0].name


def _label(op: Any) -> str:
    return f"the operation {_name(op)} ({op.type})"


def _bindings(op: Any) -> Iterator[Any]:
    return (binding for argument in op.inputs.values() for binding in argument.arguments)


def _kind(declared: Any) -> str:
    return coremltools().proto.MIL_pb2.DataType.Name(declared.dataType)


def _sizes(declared: Any) -> tuple[int, ...]:
    """A declared shape; -1 is a size that is known only when the program runs."""
    dims = declared.dimensions
    return tuple(d.constant.size if d.HasField("constant") else -1 for d in dims)


def _fits(shape: tuple[int, ...], declared: Any) -> bool:
    sizes = _sizes(declared)
    return len(shape) == len(sizes) and all(b in (a, -1) for a, b in zip(shape, sizes, strict=True))


def _guarded(op: Any, function: Callable, arguments: dict[str, Any]) -> Any:
    try:
        return function(**arguments)
    except FAILURES as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConvertError(f"{_label(op)} cannot be computed: {reason}") from error


def _settle(label: str, declared: Any, value: torch.Tensor, emulate_fp16: bool) -> torch.Tensor:
    """Give a value the declared type; raises ConvertError when it has not the declared shape."""
    kind = _kind(declared)
    real = KINDS[kind][3].is_floating_point
    if not _fits(tuple(value.shape), declared) or value.is_floating_point() != real:
        raise ConvertError(
            f"{label} gives {value.dtype}{list(value.shape)}, its type is "
            f"{kind}{list(_sizes(declared))}; the package contradicts itself"
        )
    return value.half().float() if kind == "FLOAT16" and emulate_fp16 else _to(value, kind)


def _to(value: torch.Tensor, kind: str) -> torch.Tensor:
    return value.int() & 0xFFFF if kind == "UINT16" else value.to(KINDS[kind][3])


def _tensor(value: np.ndarray | str) -> Any:
    if isinstance(value, str):
        return value
    return torch.from_numpy(np.array(value, WIDER.get(value.dtype, value.dtype)))


# Constants, in numpy


def _unpack(raw: np.ndarray, kind: str, count: int) -> np.ndarray:
    """The values of packed bytes; those of less than a byte begin at its least significant bit."""
    bits, _, dtype, _ = KINDS[kind]
    if bits >= 8:
        return raw[: count * bits // 8].view(dtype)
    single = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(-1, bits)
    values = np.packbits(single, axis=1, bitorder="little")[:, 0]
    return values if kind != "INT4" else ((values ^ 8).astype(np.int8) - 8).astype(np.int8)


def _blocks(parts: tuple[int, ...], shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """An index that repeats an array of `parts` in equal blocks up to `shape`."""
    if any(n % p for p, n in zip(parts, shape, strict=True)):
        raise ValueError(f"{list(shape)} values cannot be in {list(parts)} equal blocks")
    return np.ix_(*(np.arange(n) // (n // p) for p, n in zip(parts, shape, strict=True)))


def constexpr_lut_to_dense(indices, lut, shape=None, vector_axis=None):
    if shape is not None:  # iOS 16: packed indices into one table
        kind = f"UINT{len(lut).bit_length() - 1}"
        return lut[_unpack(indices, kind, math.prod(shape))].reshape(shape)
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
        mask = _unpack(mask, "UINT1", math.prod(shape)).reshape(shape)
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
    "cast": lambda x, dtype: _to(x, CASTS[dtype]),
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


def open_part(package: Path, function: str | None) -> Callable:
    """A saved package as the Core ML engine calls it; it takes what it needs of the values."""
    program = Program(package, function)

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return program({name: values[name] for name in program.inputs})

    return run
