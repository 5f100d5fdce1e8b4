"""Files that attack a reader, each with a piece of the line that must refuse it; and mutations.

Tests and benchmarks/hostile.py share them.  Contents are bytes, or a function that writes a file
too large to hold.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Content = bytes | Callable[[Path], Any]
Corpus = dict[str, tuple[Content, str]]  # name -> content, what is said
MILLION = 1_000_000


def write(path: Path, content: Content) -> Path:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return path


def sparse(head: bytes, size: int) -> Callable[[Path], None]:
    """A file that begins like this and is as long as it says, without taking the room."""

    def write_head(path: Path) -> None:
        with path.open("wb") as file:
            file.write(head)
            file.truncate(size)

    return write_head


# --- safetensors --------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(first: Any = 0, last: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


NAMED = b'{"%s": ' + json.dumps(entry(dtype="F9")).encode() + b"}"
SAFETENSORS: Corpus = {
    "empty file": (b"", "is empty"),
    "longer than the file": (safetensors({}, length=10**6), "header claims 1,000,000 bytes"),
    "header of exabytes": (safetensors({}, length=2**64 - 1), "the header claims 18,446,744"),
    "header of a gigabyte": (sparse(struct.pack("<Q", 10**9) + b"{", 2 * 10**9), "1,000,000,000"),
    "not json": (safetensors(b"{"), "not a valid safetensors header"),
    "a list": (safetensors([]), "not a valid safetensors header"),
    "deep": (safetensors(b'{"a":' + b"[" * 100_000), "not a valid safetensors header"),
    "millions of lists": (
        safetensors(b'{"a": [' + b"[]," * MILLION + b"[]]}"), "1,000,003 objects and lists",
    ),
    "cut data": (safetensors({"a": entry()}, b"\0" * 7), "need 8 bytes, the file has 7"),
    "data left over": (safetensors({"a": entry()}, b"\0" * 9), "need 8 bytes, the file has 9"),
    "hole": (
        safetensors({"a": entry(), "b": entry(12, 20)}, b"\0" * 20), "b is at 12 to 20, expected 8",
    ),
    "overlap": (
        safetensors({"a": entry(), "b": entry(4, 12)}, b"\0" * 12), "b is at 4 to 12, expected 8",
    ),
    "size is not the shape's": (safetensors({"a": entry(shape=(3,))}), "expected 0 to 12"),
    "terabytes": (safetensors({"a": entry(0, 4 << 40, (1 << 40,))}), "the file has 8"),
    "negative": (safetensors({"a": entry(shape=(-1, -2))}), "not a whole number"),
    "fractional": (safetensors({"a": entry(shape=(2.0,))}), "not a whole number"),
    "numbers of thousands of digits": (
        safetensors({"a": entry(shape=(10**4000,) * 8)}), "not a whole number",
    ),
    "thousands of dimensions": (safetensors({"a": entry(shape=(1,) * 5000)}), "5,000 dimensions"),
    "no values": (safetensors({"a": entry(0, 0, (0, 2**60)), "b": entry()}), "a is empty"),
    "unknown type": (safetensors({"a": entry(dtype="F8_E4M3", shape=(8,))}), "a is F8_E4M3"),
    "a type that is a list": (safetensors({"a": entry(dtype=[])}), "safetensors header"),
    "type missing": (
        safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}), "not a valid safetensors",
    ),
    "three offsets": (
        safetensors({"a": entry() | {"data_offsets": [0, 4, 8]}}), "not a valid safetensors",
    ),
    "same name twice": (
        safetensors(b'{"a": %s, "a": {}}' % json.dumps(entry()).encode()), "a name occurs twice",
    ),
    "a name of two lines": (safetensors(NAMED % rb"two\nlines\u001b[2J"), r"two\nlines\x1b[2J is"),
    "a name of a megabyte": (safetensors(NAMED % (b"x" * (1 << 20))), "xxx ... "),
    "not for a terminal": (
        safetensors(b'{"\\u001b[2J": %s}' % json.dumps(entry()).encode()), "cannot be printed",
    ),
}  # fmt: skip

# --- pickles ------------------------------------------------------------------------------------


def zipped(pickled: bytes, **entries: Any) -> bytes:
    """An archive as torch writes it; in names _ stands for /."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in entries.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", data)
    return made.getvalue()


def described(
    storage: tuple[bytes, int] = (b"FloatStorage", 4),
    offset: int = 0,
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    key: bytes = b"0",
    more: bytes = b"",
) -> bytes:
    """A pickle of {"w": tensor}, opcode by opcode; `more` runs while the tensor is on the stack."""

    def number(value: int) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    kind, count = storage
    pid = b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\n" + b"X\x01\x00\x00\x00" + key
    pid += b"X\x03\x00\x00\x00cpu" + number(count) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + number(offset)
    call += numbers(shape) + numbers(strides) + b"\x89" + b"ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}(X\x01\x00\x00\x00w" + call + more + b"u."


class Evil:
    """Unpickled by a loader that executes, it calls what it was given."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


DATA = np.arange(4, dtype="<f4").tobytes()
DAMAGED, NO_DICT = "the pickle is damaged", "holds no dict of tensors"
PICKLES: Corpus = {  # data.pkl beside a storage of four floats
    "behind the storage": (described(shape=(5,)), "a tensor of 5 values in 4"),
    "offset": (described(offset=1), "a tensor from 1 to 5 of 4 values"),
    "stride": (described(shape=(2, 2), strides=(3, 1)), "a tensor from 0 to 5 of 4 values"),
    "repeated without end": (described(shape=(1 << 40,), strides=(0,)), "values in 4"),
    "negative offset": (described(offset=-1), "no whole numbers"),
    "negative stride": (described(strides=(-1,)), "no whole numbers"),
    "negative shape": (described(shape=(-4,)), "no whole numbers"),
    "huge": (described(shape=(1 << 61, 1 << 61), strides=(1, 1)), "values in 4"),
    "numbers of 2,000 bits": (described(shape=(1 << 2000,) * 8, strides=(1,) * 8), "no whole"),
    "ranks differ": (described(shape=(2, 2)), "2 dimensions with 1 strides"),
    "empty": (described(shape=(0,)), "a tensor is empty"),
    "too many dimensions": (described(shape=(1,) * 99, strides=(1,) * 99), "of 99 dimensions"),
    "larger than its entry": (
        described(storage=(b"FloatStorage", 5)), "a storage of 5 F32 in 16 bytes",
    ),
    "negative size": (described(storage=(b"FloatStorage", -1)), "a storage of -1 F32"),
    "missing": (described(key=b"1"), "the storage 1 is missing"),
    "unknown type": (described(storage=(b"ComplexFloatStorage", 4)), "asks for 'torch.Complex"),
    "cut short": (described()[:-4], DAMAGED),
    "no opcodes": (b"\xff\xfe", DAMAGED),
    "nothing": (b"", DAMAGED),
    "a memo of gigabytes": (b"\x80\x02Nr\xff\xff\xff\x7f.", NO_DICT),
    "text of exabytes": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f", DAMAGED),
    "bytes of exabytes": (b"\x80\x05\x96" + b"\xff" * 6 + b"\x00\x00", DAMAGED),
    "an array of 8 GB": (b"\x80\x05\x96" + struct.pack("<Q", 8 << 30) + b".", DAMAGED),
    "deep": (b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".", NO_DICT),
    "a list": (b"\x80\x02].", NO_DICT),
    "a key that overflows the stack": (b"\x80\x02})" + b"\x85" * MILLION + b"Ns.", "with keys"),
    "a key that takes for ever": (b"\x80\x02})" + b"2\x86" * 500 + b"Ns.", "with keys"),
    "a storage that takes for ever": (
        described().replace(b"X\x01\x00\x00\x000", b")" + b"2\x86" * 500), "an unknown kind",
    ),
    "millions of lists": (b"\x80\x02" + b"]" * (2 * MILLION) + b".", NO_DICT),
    "millions of sets": (b"\x80\x04" + b"\x8f" * (2 * MILLION) + b".", DAMAGED),
    "calls with a million arguments": (
        b"\x80\x02ctorch\nSize\nq\0(" + b"N" * MILLION + b"tq\1" + b"h\0h\1R0" * 9999 + b".",
        "a call with 1,000,000 arguments",
    ),
    "a call of a text": (b"\x80\x02X\x01\x00\x00\x00a)R.", "cannot be called"),
    "a registry's code": (b"\x80\x02\x82\x01.", DAMAGED),
    "methods hidden by attributes": (
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x03\x00\x00\x00getNsb.", "holds no tensors",
    ),
    "protocol 255": (b"\x80\xff}.", "unsupported pickle protocol: 255"),
    "runs a command": (pickle.dumps(Evil(exec, "raise SystemExit")), "asks for 'builtins.exec'"),
    "runs a command, by its old name": (
        b"cposix\nsystem\n(S'touch /tmp/x'\ntR.", "asks for 'posix.system', which no checkpoint",
    ),
    "imports a module": (b"\x80\x02cthis\nx\n.", "asks for 'this.x'"),
}  # fmt: skip


def compressed() -> bytes:
    """16 MiB of zeros in 16 KB."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    return made.getvalue()


def _many_entries() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for i in range(30_000):
            archive.writestr(f"archive/data/{i:060d}", b"")
    return made.getvalue()


def _directory_of(size: int) -> bytes:
    """An archive whose end claims a list of entries of so many bytes."""
    whole = bytearray(zipped(described(), data_0=DATA))
    end = whole.rindex(b"PK\5\6")
    whole[end + 12 : end + 16] = struct.pack("<I", size)
    return bytes(whole)


WHOLE = zipped(described(), data_0=DATA)
ARCHIVES: Corpus = {
    "no data.pkl": (WHOLE.replace(b"data.pkl", b"data.txt"), "a zip archive without data.pkl"),
    "a zip bomb": (compressed(), "is compressed"),
    "five megabytes of pickle": (
        zipped(bytes(5 << 20)), "an entry of 5,242,880 bytes, the limit is 2,097,152",
    ),
    "big-endian": (zipped(described(), data_0=DATA, byteorder="big"), "byte order is b'big'"),
    "cut": (WHOLE[:100], "not a checkpoint of torch"),
    "zeros": (WHOLE[:4] + bytes(200), "not a checkpoint of torch"),
    "an entry elsewhere": (
        WHOLE.replace(b"PK\3\4", b"PK\x09\x09").replace(b"PK\x09\x09", b"PK\3\4", 1),
        "is not where the directory says",
    ),
    "a list of 4 GB": (_directory_of(0xFFFFFFF0), "not a checkpoint of torch"),
    "30,000 entries": (lambda path: path.write_bytes(_many_entries()), "list of entries claims"),
    "out of the folder": (
        WHOLE.replace(b"archive/data.pkl", b"../../../etc.pkl"), "without data.pkl",
    ),
}  # fmt: skip

# --- GGUF ---------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def row(name: bytes = b"w", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's line in the header; dimensions with the fastest first."""
    dims = b"".join(struct.pack("<Q", n) for n in shape)
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def gguf(
    *rows: bytes,
    version: int = 3,
    count: int | None = None,
    entries: Any = (),
    entry_count: int | None = None,
    data: bytes = bytes(32),
) -> bytes:
    count = len(rows) if count is None else count
    entry_count = len(entries) if entry_count is None else entry_count
    head = b"GGUF" + struct.pack("<IQQ", version, count, entry_count)
    head += b"".join(entries) + b"".join(rows)
    return head + bytes(-len(head) % 32) + data


def metadata(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


LONG = gguf(struct.pack("<Q", 1 << 30), count=1)
GGUF: Corpus = {
    "version": (gguf(row(), version=1), "version 1; known are 2, 3"),
    "big-endian": (gguf(row(), version=3 << 24), "version 50331648"),
    "cut": (gguf(row())[:30], "1 tensors in a file of 30 bytes"),
    "cut in a row": (gguf(row())[:50], "bytes at"),
    "data cut": (gguf(row(), data=bytes(15)), "w is at 0 to 16"),
    "far outside": (gguf(row(offset=1 << 60)), "overlaps another, or the"),
    "overlap": (gguf(row(), row(b"v", offset=8)), "v is at 8 to 24"),
    "twice": (gguf(row(), row(offset=16)), "w occurs twice"),
    "exabytes": (gguf(row(shape=(1 << 61, 4))), "w is at 0 to"),
    "more tensors than bytes": (gguf(row(), count=1 << 60), "tensors in a file of"),
    "more entries than bytes": (gguf(row(), entry_count=1 << 60), "entries of metadata in a"),
    "a million tensors": (
        gguf(row() * 1000, count=100_000, data=bytes(MILLION * 5)), "the limit is 65,536",
    ),
    "a name of exabytes": (gguf(struct.pack("<Q", 1 << 62), count=1), "bytes of a name in a file"),
    "a name of a gigabyte": (sparse(LONG, 1 << 31), "1,073,741,824 bytes of a name"),
    "a name of two lines": (gguf(row(b"a\nb\x1b[2J", kind=99)), r"a\nb\x1b[2J is type 99"),
    "rank": (gguf(row(shape=(1,) * 9)), "w has 9 dimensions"),
    "empty": (gguf(row(shape=(4, 0))), "w is empty"),
    "few bits by a codebook": (gguf(row(shape=(256,), kind=23)), "w is IQ4_XS; supported are F32"),
    "half a superblock": (gguf(row(shape=(128,), kind=12)), "rows of 128, no multiple of 256"),
    "blocks of one number": (gguf(row(shape=(), kind=8)), "rows of 1, no multiple of 32"),
    "unknown type": (gguf(row(kind=99)), "w is type 99"),
    "half a block": (gguf(row(shape=(40,), kind=8)), "rows of 40, no multiple of 32"),
    "alignment": (
        gguf(row(), entries=[metadata(b"general.alignment", 4, bytes(4))]),
        "general.alignment is 0, no power of two",
    ),
    "unknown value": (gguf(row(), entries=[metadata(b"k", 77, b"")]), "unknown type 77"),
    "arrays without end": (
        gguf(row(), entries=[metadata(b"k", 9, struct.pack("<IQ", 9, 1) * 50)]),
        "a value of the unknown type 9",
    ),
    "a long array": (
        gguf(row(), entries=[metadata(b"k", 9, struct.pack("<IQ", 8, 1 << 50))]),
        "values in a file of",
    ),
    "a million texts": (
        gguf(entries=[metadata(b"k", 9, struct.pack("<IQ", 8, MILLION) + bytes(8 * MILLION))]),
        "1,000,000 values in a file of",
    ),
}  # fmt: skip

# --- of no known kind ---------------------------------------------------------------------------

OTHERS: Corpus = {
    "zero bytes": (b"", "is empty"),
    "a bare pickle": (b"\x80\x02}q\x00.", "saved by torch before 1.6 or is a bare pickle"),
    "a tar": (b"a" * 257 + b"ustar", "saved by torch before 1.6"),
    "a page": (b"<html>not found</html>", "neither safetensors nor GGUF"),
    "magic alone, GGUF": (b"GGUF", "not a valid GGUF header"),
    "magic alone, zip": (b"PK\3\4", "not a checkpoint of torch"),
}


def corpus() -> dict[tuple[str, str], tuple[Content, str]]:
    """Every file by its name, with the ending, and what it is."""
    kinds = {
        "x.safetensors": SAFETENSORS,
        "x.ckpt": {
            **{n: (zipped(c, data_0=DATA), said) for n, (c, said) in PICKLES.items()},
            **ARCHIVES,
        },
        "x.gguf": GGUF,
        "x.bin": OTHERS,
    }
    return {(file, n): case for file, cases in kinds.items() for n, case in cases.items()}


# --- mutations ----------------------------------------------------------------------------------

PIECES = (
    *(bytes([n]) for n in b"\x00\x7f\x80\xff[{}]\"-.9e\n\x1b(tRbsua2q\x81\x85\x86\x8f\x94\x96Q"),
    b"\xff" * 4, b"\xff" * 8, bytes(8), b"\xff" * 7 + b"\x7f", b"\0\0\0\x80", b"9" * 30,
)  # fmt: skip
NUMBERS = (0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
HEAD = 400  # bytes in which half of all changes are


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A file with a few bytes changed, put in, repeated, taken out or cut off."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not made:
            break
        end = len(made) if rng.random() < 0.5 else min(len(made), HEAD)
        at, size = rng.randrange(end), rng.choice((1, 4, 8, 40))
        match rng.randrange(7):
            case 0:
                made[at] ^= 1 << rng.randrange(8)
            case 1:
                made[at:at] = rng.choice(PIECES) * rng.choice((1, 1, 5))
            case 2:
                made[at : at + size] = rng.choice(PIECES)
            case 3:
                del made[at : at + size]
            case 4:
                start = rng.randrange(end)
                made[at:at] = made[start : start + size]
            case 5:
                made[at : at + 8] = rng.choice(NUMBERS).to_bytes(8, "little")
            case 6:
                del made[at:]
    return bytes(made)


JUNK = (
    None, True, -1, 0, 1, 2, 7, 10**9, 2**70, 1e308, 0.5, "", "0", "x" * 2000, "\n\x1b[2J", [], {},
    [[]], [1], [8, 16], [None], [10**9] * 3, [1] * 3000, {"a": 1},
)  # fmt: skip


def spoiled(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with a field or two replaced by what it cannot be, or without them."""
    made = dict(config)
    for field in rng.sample(sorted(made), min(len(made), rng.choice((1, 1, 2)))):
        value = made.pop(field)
        if isinstance(value, list) and value and rng.random() < 0.5:
            made[field] = [rng.choice(JUNK), *value[1:]]
        elif rng.random() < 0.9:
            made[field] = rng.choice(JUNK)
    return made
