"""Where tensors lie in files, and reading one of them: mapped, bounded, as float32.

Files of safetensors are opened here; `pickles` and `gguf` open the other two kinds.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import ggml
from .errors import CheckpointError

DTYPES = {  # safetensors' names -> numpy's
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "<u1",
}
WHOLE = ("I64", "I32", "I16", "I8", "U8", "BOOL")
MAX_HEADER = 16 << 20  # bytes; the metadata of LoRA has megabytes, names and places far less
MAX_CONTAINERS = 500_000  # objects and lists in a header or an index: three for every tensor
MAX_RANK = 8
MAX_NUMBER = 1 << 62  # of a shape or a place; products of longer ones take their time


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; nothing of it was read.

    `strides` are in values, None if rows follow one another.  Types with blocks, GGUF's, have whole
    blocks in the last dimension.
    """

    path: Path
    offset: int  # bytes from the beginning of the file
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def is_float(self) -> bool:
        """Whether it can be a weight."""
        return self.dtype not in WHOLE

    @property
    def span(self) -> int:
        """Values from its first to its last in the file."""
        if self.strides is None:
            return math.prod(self.shape)
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        values, size = block(self.dtype)
        return self.span // values * size

    def rows(self, first: int, last: int) -> Stored:
        """Some of the rows, as a tensor of its own."""
        row = math.prod(self.shape[1:]) if self.strides is None else self.strides[0]
        values, size = block(self.dtype)
        shape = (last - first, *self.shape[1:])
        start = self.offset + first * row // values * size
        return dataclasses.replace(self, offset=start, shape=shape)

    def transposed(self) -> Stored:
        """A matrix with its two dimensions exchanged."""
        down, across = self.strides or (self.shape[1], 1)
        return dataclasses.replace(self, shape=self.shape[::-1], strides=(across, down))

    def as_matrix(self) -> Stored:
        """A convolution of one pixel without its last two dimensions."""
        strides = self.strides and self.strides[:2]
        return dataclasses.replace(self, shape=self.shape[:2], strides=strides)


def read(stored: Stored, halves: bool = False) -> np.ndarray:
    """The tensor in memory, floats as float32, or fp16 as it is if `halves`.

    It is mapped anew each time, so that pages of one do not stay while the next is read.
    """
    raw = np.memmap(stored.path, np.uint8, "r", stored.offset, (stored.bytes,))
    if halves and stored.dtype == "F16":
        values = np.array(raw.view("<f2"))
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # found and named by who reads them
            values = DECODERS[stored.dtype](np.asarray(raw))
    if stored.strides is not None:
        steps = [step * values.itemsize for step in stored.strides]
        values = np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, stored.shape, steps))
    return values.reshape(stored.shape)


def block(dtype: str) -> tuple[int, int]:
    """How many values lie together, and the bytes that they take."""
    return BLOCKS[dtype] if dtype in BLOCKS else (1, np.dtype(DTYPES[dtype]).itemsize)


# --- safetensors --------------------------------------------------------------------------------


def open_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file, in their order there; raises CheckpointError for a damaged header."""
    header, start = read_header(path)
    return {
        name: Stored(path, start + e["data_offsets"][0], e["dtype"], tuple(e["shape"]))
        for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """Read and check a safetensors header: its entries by name, and where the data starts."""
    header, _, start = _header(path)
    return header, start


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors header says of its file, in the words of who wrote it; often nothing."""
    metadata = _header(path)[1]
    if not isinstance(metadata, dict):
        return {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def _header(path: Path) -> tuple[dict[str, dict], object, int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path}: the header claims {length:,} bytes, the file has {size:,}; fetch it again"
            )
        text = file.read(length)
    try:
        check_containers(text)
        header = json.loads(text, object_pairs_hook=_no_duplicates)
        metadata = header.pop("__metadata__", None)
        _check_entries(header, size - 8 - length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors header: {error}") from error
    return header, metadata, 8 + length


def check_containers(text: bytes) -> None:
    """Raise ValueError for JSON of more objects and lists than take a moment to make."""
    if (count := text.count(b"{") + text.count(b"[")) > MAX_CONTAINERS:
        raise ValueError(f"it has {count:,} objects and lists, the limit is {MAX_CONTAINERS:,}")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _check_entries(header: dict, data_bytes: int) -> None:
    """The tensors must cover the data exactly: no overlap, no hole, nothing outside."""
    position = 0
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is {entry['dtype']}; supported are {', '.join(DTYPES)}")
        if len(entry["shape"]) > MAX_RANK:
            raise ValueError(f"{name} has {len(entry['shape']):,} dimensions")
        if any(
            type(n) is not int or not 0 <= n <= MAX_NUMBER for n in (first, last, *entry["shape"])
        ):
            raise ValueError(f"{name} has a shape or an offset that is not a whole number")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        size = math.prod(entry["shape"]) * np.dtype(DTYPES[entry["dtype"]]).itemsize
        if size == 0:
            raise ValueError(f"{name} is empty")
        if first != position or last - first != size:
            raise ValueError(
                f"{name} is at {first:,} to {last:,}, expected {position:,} to {position + size:,}"
            )
        position = last
    if position != data_bytes:
        raise ValueError(f"the tensors need {position:,} bytes, the file has {data_bytes:,}")


# --- types --------------------------------------------------------------------------------------


def _plain(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    target = np.float32 if dtype.startswith("F") else None
    return lambda raw: np.array(raw.view(DTYPES[dtype]), target)


def _from_bf16(raw: np.ndarray) -> np.ndarray:
    """The upper half of a float32."""
    bits = raw.view("<u2").astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


BLOCKS = {kind: (layout.values, layout.bytes) for kind, layout in ggml.LAYOUTS.items()}
DECODERS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    **{dtype: _plain(dtype) for dtype in DTYPES},
    "BF16": _from_bf16,
    **{kind: layout.decode for kind, layout in ggml.LAYOUTS.items()},
}
