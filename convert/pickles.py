"""Checkpoints that torch pickled, read without executing anything of them.

Since torch 1.6 such a file is a zip archive: `data.pkl` tells shapes and names, and every storage
is an entry of its own, uncompressed, so it can be mapped in place.  A pickle is a program; here
its only calls make a description of a tensor, an ordered dict or a placeholder.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .errors import CheckpointError
from .storage import Stored, block

MAX_PICKLE = 4 << 20  # bytes of data.pkl: a few hundred for every tensor
MAX_RANK = 8
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# Globals of published checkpoints that have nothing to do with weights: training state.
PLACEHOLDERS = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("torch", "device"),
    ("torch", "Size"),
}
T = TypeVar("T")
NEXT_MOVE = "nothing of it was executed; get it as safetensors"


def open_pickle(path: Path) -> dict[str, Stored]:
    """The tensors of a zipped checkpoint by name; raises CheckpointError, and executes nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(path, archive)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of torch: {error}") from None
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        seen = ", ".join(list(entries)[:5]) or "nothing"
        raise CheckpointError(f"{path}: a zip archive without data.pkl (it holds {seen})")
    root = pickles[0].removesuffix("data.pkl")
    _check_byte_order(path, entries.get(f"{root}byteorder"))
    value = _load(path, root, entries)
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path} holds no dict of tensors; it is no checkpoint")
    return {
        name: found.value.stored
        for name, found in value.items()
        if isinstance(name, str) and isinstance(found, Opaque) and isinstance(found.value, Tensor)
    }


class Entry(NamedTuple):
    """An uncompressed entry of the archive: where its bytes are."""

    offset: int
    size: int


class Storage(NamedTuple):
    """A storage of torch's, of so many values."""

    entry: Entry
    dtype: str
    values: int


class Tensor(NamedTuple):
    """A tensor that was described; that it lies within its storage is known."""

    stored: Stored


class Name(NamedTuple):
    """A global that stands for itself."""

    module: str
    name: str


class Opaque:
    """What a pickle gets to see of a value of ours: it can be passed on, and called if it can be.

    Operations that set an object's state, and so could change where a tensor is read from, end
    here and do nothing.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *arguments: Any) -> Any:
        return self.value(*arguments) if callable(self.value) else self

    def __setstate__(self, state: object) -> None:
        pass


def _entries(path: Path, archive: zipfile.ZipFile) -> dict[str, Entry]:
    size = path.stat().st_size
    entries: dict[str, Entry] = {}
    with path.open("rb") as file:
        for info in archive.infolist():
            if info.filename in entries:
                raise ValueError(f"{info.filename} occurs twice")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ValueError(f"{info.filename} is compressed, which torch never does")
            file.seek(info.header_offset)
            head = file.read(30)  # the entry's own header says how long it is
            if head[:4] != b"PK\x03\x04" or len(head) < 30:
                raise ValueError(f"{info.filename} is not where the directory says")
            names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            start = info.header_offset + 30 + names
            if start + info.file_size > size:
                raise ValueError(f"{info.filename} ends outside the file of {size:,} bytes")
            entries[info.filename] = Entry(start, info.file_size)
    return entries


def _check_byte_order(path: Path, entry: Entry | None) -> None:
    if entry is not None and (order := _bytes(path, entry, 16)) != b"little":
        raise CheckpointError(f"{path}: the byte order is {order!r}; only 'little' is supported")


def _bytes(path: Path, entry: Entry, limit: int) -> bytes:
    if entry.size > limit:
        raise CheckpointError(f"{path}: an entry of {entry.size:,} bytes, the limit is {limit:,}")
    with path.open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.size)


def _load(path: Path, root: str, entries: dict[str, Entry]) -> Any:
    data = _bytes(path, entries[f"{root}data.pkl"], MAX_PICKLE)
    try:
        return _Reader(path, data, root, entries).load()
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle raises whatever its operations meet
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: the pickle is damaged: {message}; {NEXT_MOVE}") from None


class _Reader(pickle._Unpickler):  # type: ignore[name-defined,misc,unused-ignore]
    """The unpickler in Python: that in C reserves as much memory as a hostile file asks for."""

    def __init__(self, path: Path, data: bytes, root: str, entries: dict[str, Entry]) -> None:
        super().__init__(io.BytesIO(data), encoding="latin-1")
        self.path, self.root, self.entries = path, root, entries

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor":
                return Opaque(self.tensor)
            case "torch._utils", "_rebuild_parameter":
                return Opaque(_first)
            case "torch" | "torch.storage", _ if name in STORAGES:
                return Opaque(Name(module, name))
        if (module, name) in PLACEHOLDERS:
            return Opaque(Name(module, name))
        raise CheckpointError(
            f"{self.path}: the pickle asks for {f'{module}.{name}'[:100]!r}, which no checkpoint "
            f"needs; {NEXT_MOVE}"
        )

    def persistent_load(self, pid: Any) -> Opaque:
        kind, named, key, _, count = pid
        storage = _inside(named, Name)
        dtype = STORAGES.get(storage.name) if storage else None
        if kind != "storage" or dtype is None or type(count) is not int:
            raise ValueError("an unknown kind of storage")
        entry = self.entries.get(f"{self.root}data/{key}")
        if entry is None:
            raise ValueError(f"the storage {str(key)[:40]} is missing")
        if not 0 <= count * block(dtype)[1] <= entry.size:
            raise ValueError(f"a storage of {count:,} {dtype} in {entry.size:,} bytes")
        return Opaque(Storage(entry, dtype, count))

    def tensor(self, given: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Opaque:
        """A description in place of the tensor; it stays within its storage."""
        storage = _inside(given, Storage)
        numbers = (offset, *shape, *strides)
        if storage is None or len(shape) != len(strides):
            raise ValueError("a tensor without a storage or without strides")
        if len(shape) > MAX_RANK or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor whose shape, strides or offset are no whole numbers")
        if 0 in shape:
            raise ValueError("a tensor is empty")
        if math.prod(shape) > storage.values:
            raise ValueError(f"a tensor of {math.prod(shape):,} values in {storage.values:,}")
        plain = _plain_strides(shape)
        start = storage.entry.offset + offset * block(storage.dtype)[1]
        stored = Stored(
            self.path,
            start,
            storage.dtype,
            tuple(shape),
            None if tuple(strides) == plain else tuple(strides),
        )
        if offset + stored.span > storage.values:
            raise ValueError(
                f"a tensor from {offset:,} to {offset + stored.span:,} of {storage.values:,} values"
            )
        return Opaque(Tensor(stored))


def _inside(given: Any, kind: type[T]) -> T | None:
    """What is inside an opaque value, if it is of this kind."""
    return given.value if isinstance(given, Opaque) and isinstance(given.value, kind) else None


def _first(value: Any, *_: Any) -> Any:
    return value


def _plain_strides(shape: Any) -> tuple[int, ...]:
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * size)
    return tuple(reversed(steps)) if shape else ()
