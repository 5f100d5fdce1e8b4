"""GGUF files of stable-diffusion.cpp: a header of metadata and of tensors, then aligned data.

Read only.  Format: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from . import ggml
from .errors import CheckpointError
from .storage import MAX_RANK, Stored, block

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # unless general.alignment says otherwise
MAX_TEXT = 1 << 16  # bytes of a name or a key
MAX_ENTRIES = 1 << 16  # of tensors, and of metadata
MAX_TEXTS = 1 << 19  # in arrays: vocabularies have a quarter million
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of values, by type
MAX_DEPTH = 8  # of arrays in arrays
TYPES = {  # number -> our name; a name that is not in KINDS is refused by it
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16",
}  # fmt: skip
KINDS = ("F32", "F16", "BF16", "F64", *ggml.LAYOUTS, "I8", "I16", "I32", "I64")


def open_gguf(path: Path) -> dict[str, Stored]:
    """The tensors of a GGUF file by name; raises CheckpointError for damage or an unknown type."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Header(path, data).tensors()
        except (ValueError, struct.error) as error:
            raise CheckpointError(f"{path}: not a valid GGUF header: {error}") from None


class _Header:
    """A cursor over the header; nothing is believed before it is known to lie inside the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, len(MAGIC)
        self.alignment = ALIGNMENT
        self.texts = 0

    def tensors(self) -> dict[str, Stored]:
        version = self.number("<I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}; known are {', '.join(map(str, VERSIONS))}")
        count, entries = self.number("<Q"), self.number("<Q")
        for _ in range(self.bounded(entries, 13, "entries of metadata", MAX_ENTRIES)):
            self.metadata()
        rows = [self.row() for _ in range(self.bounded(count, 24, "tensors", MAX_ENTRIES))]
        start = -(-self.position // self.alignment) * self.alignment
        found: dict[str, Stored] = {}
        position = 0
        for name, shape, dtype, offset in sorted(rows, key=lambda row: row[-1]):
            if name in found:
                raise ValueError(f"{name} occurs twice")
            stored = Stored(self.path, start + offset, dtype, shape)
            if offset < position or stored.offset + stored.bytes > len(self.data):
                raise ValueError(
                    f"{name} is at {offset:,} to {offset + stored.bytes:,}: that overlaps another, "
                    f"or the {len(self.data):,} bytes of the file"
                )
            found[name], position = stored, offset + stored.bytes
        return found

    def row(self) -> tuple[str, tuple[int, ...], str, int]:
        """Name, shape, type and offset; dimensions come with the fastest first."""
        name = self.string()
        rank = self.number("<I")
        if not rank <= MAX_RANK:
            raise ValueError(f"{name} has {rank:,} dimensions")
        shape = tuple(self.number("<Q") for _ in range(rank))[::-1]
        number, offset = self.number("<I"), self.number("<Q")
        dtype = TYPES.get(number, f"type {number}")
        if dtype not in KINDS:
            raise ValueError(f"{name} is {dtype}; supported are {', '.join(KINDS)}")
        if math.prod(shape) == 0:
            raise ValueError(f"{name} is empty")
        last, together = (shape or (1,))[-1], block(dtype)[0]
        if last % together:
            raise ValueError(f"{name} has rows of {last:,}, no multiple of {together}")
        return name, shape, dtype, offset

    def metadata(self) -> None:
        key, kind = self.string(), self.number("<I")
        if key == "general.alignment" and SIZES.get(kind) == 4:
            self.alignment = self.number("<I")
            if self.alignment < 1 or self.alignment & (self.alignment - 1):
                raise ValueError(f"general.alignment is {self.alignment}, no power of two")
        else:
            self.skip(kind, 0)

    def skip(self, kind: int, depth: int) -> None:
        if kind in SIZES:
            self.pass_by(SIZES[kind])
        elif kind == STRING:
            self.pass_by(self.number("<Q"))
        elif kind == ARRAY and depth < MAX_DEPTH:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in SIZES:
                self.pass_by(count * SIZES[inner])
            else:
                self.texts += self.bounded(count, 8, "values", MAX_TEXTS - self.texts)
                for _ in range(count):
                    self.skip(inner, depth + 1)
        else:
            raise ValueError(f"a value of the unknown type {kind}")

    def string(self) -> str:
        length = self.number("<Q")
        return self.take(self.bounded(length, 1, "bytes of a name", MAX_TEXT)).decode(
            "utf-8", "replace"
        )

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def bounded(self, count: int, size: int, what: str, limit: int) -> int:
        """A count, if so many things of at least this size can still follow."""
        if count * size > len(self.data) - self.position or count > limit:
            raise ValueError(
                f"{count:,} {what} in a file of {len(self.data):,} bytes, the limit is {limit:,}"
            )
        return count

    def take(self, count: int) -> bytes:
        self.pass_by(count)
        return self.data[self.position - count : self.position]

    def pass_by(self, count: int) -> None:
        if count > len(self.data) - self.position:
            raise ValueError(f"{count:,} bytes at {self.position:,} of {len(self.data):,}")
        self.position += count
