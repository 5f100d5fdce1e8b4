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

from .checkpoint import ConvertError
from .coremltools_fixes import coremltools
from .mlops import CONSTANTS, KINDS, OPS, TABLE, to_kind, to_tensor, unpack

BLOB = 0xDEADBEEF  # begins the 64 bytes that describe a weight
BLOB_VERSION = 2
KEEP = 256 << 20  # bytes of decompressed constants that are kept from one run to the next
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
        return _settle(f"the input {name}", declared, to_tensor(array), emulate_fp16)

    def _run(self, op: Any, values: dict[str, torch.Tensor]) -> tuple:
        arguments: dict[str, Any] = {}
        for key, argument in op.inputs.items():
            every = [
                to_tensor(self._decode(b.value)) if not b.name else self._value(b.name, values)
                for b in argument.arguments
            ]
            arguments[key] = every if key == "values" else every[0]
        results = _guarded(op, OPS[op.type], arguments)
        return results if isinstance(results, tuple) else (results,)

    def _value(self, name: str, values: dict[str, torch.Tensor]) -> torch.Tensor | str:
        if name in values:
            return values[name]
        if name not in self._kept:
            value = to_tensor(self.constant(name))
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
            array = unpack(self._blob(value), kind, math.prod(shape))
        elif field == "bytes":
            array = unpack(np.frombuffer(stored.bytes.values, np.uint8), kind, math.prod(shape))
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
    return value.half().float() if kind == "FLOAT16" and emulate_fp16 else to_kind(value, kind)


def open_part(package: Path, function: str | None) -> Callable:
    """A saved package as the Core ML engine calls it; it takes what it needs of the values."""
    program = Program(package, function)

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return program({name: values[name] for name in program.inputs})

    return run
