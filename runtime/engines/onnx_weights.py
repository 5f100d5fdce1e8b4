"""Weights of an ONNX graph, lent to onnxruntime from our own read-only mapping of their file.

onnxruntime's own mapping is private and writable, which counts as data.  Which weights there are
stands in the graph: this reads the table of initializers in model.onnx and nothing else.  What is
not plainly sound is not lent; onnxruntime then reads it by itself, or refuses it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# TensorProto's numbers of types.
DTYPES = {1: "<f4", 10: "<f2", 11: "<f8", 3: "|i1", 2: "|u1", 6: "<i4", 7: "<i8"}
INT4 = 22  # two to a byte
# Numbers of the fields in onnx.proto.
GRAPH, NODE, INITIALIZER, ATTRIBUTE = 7, 1, 5, 5
SUBGRAPHS = (6, 11)  # of an attribute
DIMS, DATA_TYPE, NAME, EXTERNAL_DATA = 1, 2, 8, 13
KEY, VALUE = 1, 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types

Field = tuple[int, Any]  # its number; an int, or a memoryview of bytes


class External(NamedTuple):
    """A weight beside the graph: where it is, and what the graph says it is."""

    name: str
    file: str
    offset: int
    bytes: int
    dtype: np.dtype
    shape: tuple[int, ...]
    packed: bool = False  # two values to a byte


def lend(options: Any, model: Path) -> list[Any]:
    """Add the weights of a model.onnx to session options; the result must outlive the session."""
    maps: dict[str, np.ndarray] = {}
    kept: list[Any] = []
    for weight in externals(model):
        if weight.file not in maps:
            maps[weight.file] = _map(model.parent / weight.file)
        data = maps[weight.file][weight.offset : weight.offset + weight.bytes]
        if len(data) == weight.bytes:
            kept.append(_value(data, weight))
            options.add_initializer(weight.name, kept[-1][1])
    return kept


def _value(data: np.ndarray, weight: External) -> tuple[np.ndarray, Any]:
    from onnxruntime import OrtValue

    if not weight.packed:
        array = data.view(weight.dtype).reshape(weight.shape)
        return array, OrtValue.ortvalue_from_numpy(array)
    # It takes the shape from the array and reads two values from each byte: never the second half.
    strides = [math.prod(weight.shape[i + 1 :]) for i in range(len(weight.shape))]
    array = np.lib.stride_tricks.as_strided(data, weight.shape, strides, writeable=False)
    return array, OrtValue.ortvalue_from_numpy_with_onnx_type(array, INT4)


def externals(model: Path) -> list[External]:
    """The weights that a graph keeps in files beside it, as far as they are plainly described.

    None at all where two weights could have one name: in a subgraph, or by mistake.
    """
    try:
        graph = [f for n, body in _fields(_map(model).data) if n == GRAPH for f in _fields(body)]
        if any(_has_subgraph(body) for n, body in graph if n == NODE):
            return []
        tensors = [list(_fields(body)) for n, body in graph if n == INITIALIZER]
        names = [_text(tensor, NAME) for tensor in tensors]
        if len(set(names)) < len(names):
            return []
        found = [_external(n, t) for n, t in zip(names, tensors, strict=True)]
    except (ValueError, TypeError):  # no sound graph: onnxruntime says what is wrong with it
        return []
    return [weight for weight in found if weight]


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, mapped; none if it is a link, empty or not there."""
    try:
        return np.empty(0, np.uint8) if path.is_symlink() else np.memmap(path, np.uint8, "r")
    except (OSError, ValueError):
        return np.empty(0, np.uint8)


def _external(name: str, tensor: list[Field]) -> External | None:
    entries = [list(_fields(body)) for n, body in tensor if n == EXTERNAL_DATA]
    where = {_text(entry, KEY): _text(entry, VALUE) for entry in entries}
    shape = tuple(size for n, body in tensor if n == DIMS for size in _numbers(body))
    number = _last(tensor, DATA_TYPE, 0)
    packed = number == INT4
    kind = "|u1" if packed else DTYPES.get(number)
    file, offset, length = (where.get(key, "") for key in ("location", "offset", "length"))
    if not kind or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", file, re.ASCII):
        return None
    dtype = np.dtype(kind)
    size, start = math.prod(shape) * dtype.itemsize, _decimal(offset)
    size = (size + 1) // 2 if packed else size
    if size == 0 or start is None or start % dtype.itemsize or _decimal(length) != size:
        return None
    return External(name, file, start, size, dtype, shape, packed)


def _decimal(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,18}", text, re.ASCII) else None


def _has_subgraph(node: memoryview) -> bool:
    attributes = (body for n, body in _fields(node) if n == ATTRIBUTE)
    return any(n in SUBGRAPHS for attribute in attributes for n, _ in _fields(attribute))


# --- protobuf -----------------------------------------------------------------------------------


def _fields(message: memoryview) -> Iterator[Field]:
    """The fields of a message in order; ValueError or TypeError if it is none."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == BYTES:
            size, at = _varint(message, at)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > end:
            raise ValueError("the message ends early")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at a place, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("a number does not end")


def _numbers(body: Any) -> Iterator[int]:
    """A repeated number, packed or not."""
    if isinstance(body, int):
        yield body
        return
    at = 0
    while at < len(body):
        value, at = _varint(body, at)
        yield value


def _last(fields: list[Field], number: int, default: Any) -> Any:
    """Of a field that is given more than once the last counts."""
    return next((value for n, value in reversed(fields) if n == number), default)


def _text(fields: list[Field], number: int) -> str:
    value = _last(fields, number, b"")
    if isinstance(value, int):  # bytes() of it would take that much memory
        raise TypeError(f"field {number} is a number")
    return bytes(value).decode("utf-8")
