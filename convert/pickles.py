"""Checkpoints that torch pickled, read without executing anything of them.

Since torch 1.6 such a file is a zip archive: `data.pkl` tells shapes and names, and every storage
is an entry of its own, uncompressed, so it can be mapped in place.  A pickle is a program; here
its only calls make a description of a tensor, an ordered dict or a placeholder.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from .errors import CheckpointError
from .garbage import uncollected
from .storage import MAX_NUMBER, MAX_RANK, Stored, block

MAX_PICKLE = 2 << 20  # bytes of data.pkl: a few hundred for every tensor
MAX_DIRECTORY = 2 << 20  # bytes of the archive's list of entries: less than a hundred for each
MAX_TENSORS = 20_000
MAX_ARGUMENTS = 16  # of a call; torch has 7 at most
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
    ("__builtin__", "set"),
    ("_codecs", "encode"),
    ("builtins", "set"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("torch", "device"),
    ("torch", "Size"),
}
# Operations of protocols 0 to 4 that torch writes; others make sets, arrays of any size or objects
# with named arguments, or fetch from a registry.
OPERATIONS = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP,
    pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE,
    pickle.GET, pickle.BINGET, pickle.LONG_BINGET,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1,
    pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.FLOAT, pickle.BINFLOAT,
    pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE,
    pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES,
    pickle.TUPLE, pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.LIST, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS,
    pickle.DICT, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS,
    pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD,
    pickle.PERSID, pickle.BINPERSID,
)  # fmt: skip
BASE: Any = pickle._Unpickler  # type: ignore[attr-defined,unused-ignore]
T = TypeVar("T")
NEXT_MOVE = "nothing of it was executed; get it as safetensors"


def is_zip(path: Path) -> bool:
    """Whether a file begins as a zip archive does."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def open_pickle(path: Path) -> dict[str, Stored]:
    """The tensors of a zipped checkpoint by name; raises CheckpointError, and executes nothing.

    Of a textual inversion by A1111's web UI they are those that its tokens stand for.
    """
    value = _top(path)
    for inner in ("state_dict", "string_to_param"):
        found = value.get(inner)
        found = found.named if isinstance(found, Parameters) else found
        if isinstance(found, dict):
            value = found
            break
    return {
        name: found.value.stored
        for name, found in value.items()
        if isinstance(name, str) and isinstance(found, Opaque) and isinstance(found.value, Tensor)
    }


def read_text(path: Path, name: str) -> str | None:
    """What a zipped checkpoint says under a name beside its tensors, if that is text."""
    value = _top(path).get(name)
    return value if isinstance(value, str) else None


def _top(path: Path) -> dict[Any, Any]:
    """What the pickle describes, if that is a dict."""
    entries = _entries(path)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        seen = ", ".join(list(entries)[:5]) or "nothing"
        raise CheckpointError(f"{path}: a zip archive without data.pkl (it holds {seen})")
    root = pickles[0].removesuffix("data.pkl")
    _check_byte_order(path, entries.get(f"{root}byteorder"))
    value = _load(path, root, entries)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no dict of tensors; it is no checkpoint")
    return value


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
    """What a pickle sees of a value of ours: it can be passed on, and called if it can be."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *arguments: Any) -> Any:
        return self.value(*arguments) if callable(self.value) else self


KEYS = (str, int, Opaque)  # of dicts; callbacks' state has classes


class Parameters:
    """A ParameterDict of torch's: of its state the parameters, by name."""

    named: Any = None


class _Directory(io.BufferedReader):
    """A file of which zipfile reads no more at once than an archive's list of entries may take."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise ValueError(f"its list of entries claims {size:,} bytes")
        return super().read(size)


def _entries(path: Path) -> dict[str, Entry]:
    """Where every entry of an archive lies; none is read."""
    size = path.stat().st_size
    entries: dict[str, Entry] = {}
    try:
        with _Directory(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.filename in entries:
                    raise ValueError(f"{info.filename} occurs twice")
                entries[info.filename] = _entry(file, info, size)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        raise CheckpointError(f"{path}: not a checkpoint of torch: {error}") from None
    return entries


def _entry(file: io.BufferedReader, info: zipfile.ZipInfo, size: int) -> Entry:
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
    return Entry(start, info.file_size)


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
        with uncollected():  # of millions of lists half of the time is looking for cycles
            return _Reader(path, data, root, entries).load()
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle raises whatever its operations meet
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, KeyError):
            message = f"an operation or a reference that is not known, {message}"
        raise CheckpointError(f"{path}: the pickle is damaged: {message}; {NEXT_MOVE}") from None


class _Reader(BASE):
    """The unpickler in Python: that in C reserves as much memory as a hostile file asks for."""

    dispatch: ClassVar[dict[int, Any]] = {op[0]: BASE.dispatch[op[0]] for op in OPERATIONS}

    def __init__(self, path: Path, data: bytes, root: str, entries: dict[str, Entry]) -> None:
        super().__init__(io.BytesIO(data), encoding="latin-1")
        self.path, self.root, self.entries = path, root, entries
        self.tensors = 0

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return Opaque(_empty)
            case "torch.nn.modules.container", "ParameterDict":
                return Opaque(Parameters)
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

    # --- operations that could call, hash or set what a file chose

    def load_reduce(self) -> None:
        arguments, call = self.stack.pop(), self.stack.pop()
        if type(call) is not Opaque or type(arguments) is not tuple:
            raise ValueError("a call of what cannot be called")
        if len(arguments) > MAX_ARGUMENTS:
            raise ValueError(f"a call with {len(arguments):,} arguments")
        self.stack.append(call(*arguments))

    def load_build(self) -> None:
        """The state of an object: of a ParameterDict it is kept, of all others nobody needs it."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Parameters and type(state) is dict:
            target.named = state.get("_parameters")

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        """Keys are plain: to hash tuples in tuples may take for ever, or all of the stack."""
        target = self.stack[-1]
        if type(target) is not dict or any(type(key) not in KEYS for key in items[::2]):
            raise ValueError("items with keys that are neither text nor numbers, or of no dict")
        target.update(zip(items[::2], items[1::2], strict=True))

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }

    # --- what a file may ask for

    def persistent_load(self, pid: Any) -> Opaque:
        kind, named, key, _, count = pid
        storage = _inside(named, Name)
        dtype = STORAGES.get(storage.name) if storage else None
        if kind != "storage" or dtype is None or type(count) is not int or type(key) is not str:
            raise ValueError("an unknown kind of storage")
        entry = self.entries.get(f"{self.root}data/{key}")
        if entry is None:
            raise ValueError(f"the storage {key[:40]} is missing")
        if not 0 <= count * block(dtype)[1] <= entry.size:
            raise ValueError(f"a storage of {count:,} {dtype} in {entry.size:,} bytes")
        return Opaque(Storage(entry, dtype, count))

    def tensor(self, given: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Opaque:
        """A description in place of the tensor; it stays within its storage."""
        self.tensors += 1
        if self.tensors > MAX_TENSORS:
            raise ValueError(f"it describes more than {MAX_TENSORS:,} tensors")
        storage = _inside(given, Storage)
        if storage is None or type(shape) is not tuple or type(strides) is not tuple:
            raise ValueError("a tensor without a storage, a shape or strides")
        if len(shape) != len(strides) or len(shape) > MAX_RANK:
            raise ValueError(f"a tensor of {len(shape):,} dimensions with {len(strides):,} strides")
        numbers = (offset, *shape, *strides)
        if any(type(n) is not int or not 0 <= n <= MAX_NUMBER for n in numbers):
            raise ValueError("a tensor whose shape, strides or offset are no whole numbers")
        if 0 in shape:
            raise ValueError("a tensor is empty")
        if math.prod(shape) > storage.values:
            raise ValueError(f"a tensor of {math.prod(shape):,} values in {storage.values:,}")
        start = storage.entry.offset + offset * block(storage.dtype)[1]
        plain = strides == _plain_strides(shape)
        stored = Stored(self.path, start, storage.dtype, shape, None if plain else strides)
        if offset + stored.span > storage.values:
            raise ValueError(
                f"a tensor from {offset:,} to {offset + stored.span:,} of {storage.values:,} values"
            )
        return Opaque(Tensor(stored))


def _empty() -> dict[Any, Any]:
    """An ordered dict is written without arguments; its items follow."""
    return {}


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
