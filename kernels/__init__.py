"""The native CPU engine's binding: ferrotype.h by ctypes.  Docs: docs/engine.md."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FerrotypeError

ABI = 3
LANES = 16  # channels are stored, and outputs packed, in blocks of so many
NO_WEIGHT = 2**64 - 1
MESSAGE_BYTES = 512


class KernelError(FerrotypeError):
    """The native engine is missing, cannot run here, or refuses a program."""


class Type(IntEnum):
    """Of a tensor's elements."""

    F32 = 0
    BF16 = 1
    F16 = 2
    I32 = 3
    U8 = 4
    I8 = 5
    I4 = 6

    @property
    def bytes(self) -> int:
        """Of an element; I4 has two in a byte, and scales between them."""
        return (4, 2, 2, 4, 1, 1, 0)[self]


class Kind(IntEnum):
    """What an op computes; ferrotype.h describes each."""

    MATMUL = 1
    GROUP_NORM = 2
    LAYER_NORM = 3
    ATTENTION = 4
    EMBEDDING = 5
    SINUSOID = 6
    UNARY = 7
    ADD = 8
    LOAD = 9
    STORE = 10
    BYTES = 11
    PICK = 12
    MOMENTS = 13
    AFFINE = 14


class Act(IntEnum):
    """Activation functions."""

    NONE = 0
    SILU = 1
    GELU = 2
    QUICK_GELU = 3
    RELU = 4
    TANH3 = 5


class Tensor(ctypes.Structure):
    """ft_tensor."""

    _fields_ = (
        ("offset", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("type", "h", "w", "c", "pixel", "row", "border")),
    )


class Op(ctypes.Structure):
    """ft_op; weights default to none, everything else to zero."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("act", ctypes.c_uint32),
        *((name, Tensor) for name in ("out", "a", "b", "c", "add")),
        ("weight", ctypes.c_uint64),
        ("bias", ctypes.c_uint64),
        ("scales", ctypes.c_uint64),
        ("weight_type", ctypes.c_uint32),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("side", "stride", "pad", "upsample", "geglu", "late", "winograd", "narrow"),
                *("band", "groups", "heads", "size", "causal", "flip"),
            )
        ),
        *((name, ctypes.c_float) for name in ("scale", "x", "y")),
        ("scratch", ctypes.c_uint64),
    )

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{**dict.fromkeys(("weight", "bias", "scales"), NO_WEIGHT), **fields})


class Range(ctypes.Structure):
    """ft_range: bytes of the weights that ops first..last read."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("offset", "bytes", "first", "last"))


class Program:
    """Ops that were checked against an arena and weights of a size, and threads to run them.

    Raises KernelError if the engine refuses them, with its reason.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        arena_bytes: int,
        weight_bytes: int,
        threads: int,
        isa: str | None = None,
    ) -> None:
        self._handle = None
        self._library = library()
        self.ops = (Op * len(ops))(*ops)
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        name = None if isa is None else isa.encode()
        self._handle = self._library.ft_program_create(
            self.ops, len(ops), arena_bytes, weight_bytes, threads, name, message, MESSAGE_BYTES
        )
        if not self._handle:
            raise KernelError(message.value.decode(errors="replace"))
        self.arena_bytes, self.weight_bytes = arena_bytes, weight_bytes
        self.isa = self._library.ft_program_isa(self._handle).decode()

    def run(self, arena: np.ndarray, weights: np.ndarray, times: np.ndarray | None = None) -> None:
        """Run every op; `times`, uint64 by op, receives nanoseconds.

        Raises KernelError if the weights' file was cut short meanwhile.
        """
        for name, array, size in (
            ("arena", arena, self.arena_bytes),
            ("weights", weights, self.weight_bytes),
        ):
            if array.nbytes < size or not array.flags.c_contiguous or array.ctypes.data % 64:
                raise ValueError(f"the {name} must be {size:,} bytes in a row, at a multiple of 64")
        if times is not None and (times.dtype != np.uint64 or times.size < len(self.ops)):
            raise ValueError(f"times must be {len(self.ops)} numbers of uint64")
        pointer = None if times is None else times.ctypes.data
        count = self._library.ft_program_run(
            self._handle, arena.ctypes.data, weights.ctypes.data, pointer, None
        )
        if count < len(self.ops):
            raise KernelError(f"the weights end before op {count + 1} of {len(self.ops)} is done")

    def stream(self, ranges: Sequence[Range], window: int) -> None:
        """Let weights, mapped from a file, be in memory only around their use.

        At most `window` bytes of `ranges` at once, which are in the order of `first`.  Raises
        KernelError if they do not fit, or where the system cannot.
        """
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        array = (Range * len(ranges))(*ranges)
        if self._library.ft_program_stream(
            self._handle, array, len(ranges), window, message, MESSAGE_BYTES
        ):
            raise KernelError(message.value.decode(errors="replace"))

    def __del__(self) -> None:
        if self._handle:
            self._library.ft_program_free(self._handle)


def aligned(size: int) -> np.ndarray:
    """Bytes, not zeroed, that start at a page."""
    room = np.empty(size + 4096, np.uint8)
    start = -room.ctypes.data % 4096
    return room[start : start + size]


def isas(supported: bool = True) -> list[str]:
    """Instruction sets that this build has, fastest first: those that run here, or all."""
    names: list[str] = []
    while name := library().ft_isa_name(len(names)):
        names.append(name.decode())
    return [n for i, n in enumerate(names) if not supported or library().ft_isa_supported(i)]


def scratch(op: Op, threads: int, isa: str | None = None) -> int:
    """Bytes of scratch that an op needs.  Raises KernelError for a malformed op."""
    name = None if isa is None else isa.encode()
    return _size(library().ft_op_scratch(ctypes.byref(op), threads, name), op)


def weight_bytes(op: Op) -> int:
    """Bytes of packed weights that an op reads.  Raises KernelError for a malformed op."""
    return _size(library().ft_op_weight_bytes(ctypes.byref(op)), op)


def can_stream() -> bool:
    """Whether weights can pass through a window on this system."""
    return bool(library().ft_can_stream())


def guard() -> None:
    """End a run, not the process, if the file of mapped weights is cut short (SIGBUS).

    For the process as a whole: its handler for that signal is changed, and asked for the rest.
    """
    if available():
        library().ft_guard_install()


def uses_winograd(op: Op, isa: str | None = None) -> bool:
    """Whether a matmul is computed with fewer, less exact products there."""
    name = None if isa is None else isa.encode()
    return bool(library().ft_op_winograd(ctypes.byref(op), name))


def ceiling(isa: str, kind: Type, threads: int, seconds: float = 0.5) -> float:
    """FLOP/s of bare multiply-accumulates; 0 where the instruction set has none of its own."""
    return library().ft_ceiling(isa.encode(), kind, threads, seconds)


def available() -> bool:
    """Whether the engine was built when this package was installed."""
    return _path() is not None


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled engine.  Raises KernelError if it was not built or is of another version."""
    path = _path()
    if path is None:
        raise KernelError(
            "the native engine is not built: the machine that installed ferrotype had no C++17 "
            "compiler; install one (g++ or clang) and install ferrotype again"
        )
    found = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    if found.ft_abi() != ABI or found.ft_op_bytes() != ctypes.sizeof(Op):
        raise KernelError(f"{path.name} is of another version: install ferrotype again")
    return found


def _path() -> Path | None:
    names = ("_native*.so", "_native*.pyd", "_native*.dylib")
    return next((p for name in names for p in Path(__file__).parent.glob(name)), None)


def _size(value: int, op: Op) -> int:
    if value == NO_WEIGHT:
        raise KernelError(f"malformed op of kind {op.kind}")
    return value


_U32, _U64, _SIZE = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t
_TEXT, _POINTER = ctypes.c_char_p, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ft_abi": (_U32, ()),
    "ft_op_bytes": (_U32, ()),
    "ft_isa_name": (_TEXT, (_U32,)),
    "ft_isa_supported": (ctypes.c_int, (_U32,)),
    "ft_op_scratch": (_U64, (_POINTER, _U32, _TEXT)),
    "ft_op_winograd": (ctypes.c_int, (_POINTER, _TEXT)),
    "ft_op_weight_bytes": (_U64, (_POINTER,)),
    "ft_program_create": (
        _POINTER,
        (_POINTER, _SIZE, _SIZE, _SIZE, _U32, _TEXT, _TEXT, _SIZE),
    ),
    "ft_program_free": (None, (_POINTER,)),
    "ft_program_isa": (_TEXT, (_POINTER,)),
    "ft_program_run": (_SIZE, (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER)),
    "ft_can_stream": (ctypes.c_int, ()),
    "ft_program_stream": (
        ctypes.c_int,
        (_POINTER, _POINTER, _SIZE, _U64, _TEXT, _SIZE),
    ),
    "ft_guard_install": (ctypes.c_int, ()),
    "ft_ceiling": (ctypes.c_double, (_TEXT, _U32, _U32, ctypes.c_double)),
}
