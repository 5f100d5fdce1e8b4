"""embed/c built with the system's compiler, and called through ctypes as an app calls it."""

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import ferrotype
from ferrotype import kernels
from ferrotype.tests.kernels_builds import KERNELS, call

SOURCE = Path(ferrotype.__file__).parent / "embed" / "c"
PARTS = ("ferro", "programs", "sampler", "seeds", "sha256", "stage", "tokenizer", "unicode")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wshadow")
(OK, ARGUMENT, FILE, FORMAT, BUDGET, MEMORY, PROMPT, NUMBERS, CANCELLED) = range(9)
STAGES = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")


class Options(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_size_t),
        ("threads", ctypes.c_uint32),
        ("verify", ctypes.c_int),
        ("isa", ctypes.c_char_p),
        ("budget", ctypes.c_uint64),
    )


class Progress(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_uint32) for n in ("stage", "step", "steps", "width", "height", "channels")),
        ("latents", ctypes.POINTER(ctypes.c_float)),
        ("denoised", ctypes.POINTER(ctypes.c_float)),
    )


CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Progress))


class Request(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_size_t),
        ("prompt", ctypes.c_char_p),
        ("negative", ctypes.c_char_p),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("width", "height", "steps")),
        ("sampler", ctypes.c_char_p),
        ("guidance", ctypes.c_double),
        ("progress", CALLBACK),
        ("user", ctypes.c_void_p),
    )


class StagePlan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("used", "streamed", "rows")),
        *((name, ctypes.c_uint64) for name in ("weights", "arena", "other", "peak")),
    )


class Plan(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_size_t),
        ("peak", ctypes.c_uint64),
        ("smallest", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("width", "height", "steps", "chunks", "threads")),
        ("stages", StagePlan * len(STAGES)),
    )


class HostError(Exception):
    """A status other than FERRO_OK, and its message."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def compile_objects(folder, compiler="g++", flags=()):
    """The library's objects, without the engine's."""

    def one(name):
        made = folder / f"{name}.o"
        call(compiler, *FLAGS, *flags, f"-I{KERNELS}", "-c", SOURCE / f"{name}.cpp", "-o", made)
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, PARTS))


def build(folder):
    """A shared library upon the engine that Python uses, and the example linked with it."""
    if not kernels.available():
        pytest.skip("the native engine is not built")
    if not shutil.which("g++"):
        pytest.skip("no g++")
    objects, engine = compile_objects(folder), kernels._path()
    library, program = folder / "libferro.so", folder / "example"
    link = (engine, f"-Wl,-rpath,{engine.parent}", "-pthread")
    call("g++", "-shared", *objects, *link, "-o", library)
    call("gcc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{SOURCE}", "-c",
         SOURCE / "example.c", "-o", folder / "example.o")  # fmt: skip
    call("g++", folder / "example.o", *objects, *link, "-o", program)
    return load(library), program


def load(path):
    library = ctypes.CDLL(str(path))
    library.ferro_message.restype = ctypes.c_char_p
    for name in ("ferro_close", "ferro_cancel", "ferro_message", "ferro_chunk_tokens"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    return library


def noise(library, seed, count):
    values = np.empty(count, np.float32)
    status = library.ferro_noise(ctypes.c_uint64(seed), _at(values), ctypes.c_size_t(count))
    if status:
        raise HostError(status, "")
    return values


class Host:
    """A handle.  Raises HostError."""

    def __init__(self, library, bundle, programs, **options):
        self._library, self._handle = library, ctypes.c_void_p()
        given, message = Options(), ctypes.create_string_buffer(512)
        library.ferro_options_init(ctypes.byref(given))
        for name, value in options.items():
            setattr(given, name, value.encode() if isinstance(value, str) else value)
        status = library.ferro_open(
            str(bundle).encode(), str(programs).encode(), ctypes.byref(given),
            ctypes.byref(self._handle), message, ctypes.c_size_t(len(message)),
        )  # fmt: skip
        if status:
            assert not self._handle
            raise HostError(status, message.value.decode())

    def __del__(self):
        self._library.ferro_close(self._handle)

    def cancel(self):
        self._library.ferro_cancel(self._handle)

    def request(self, prompt="", **fields):
        asked = Request()
        self._library.ferro_request_init(ctypes.byref(asked))
        width, height = fields.pop("size", (0, 0))
        for name, value in {"prompt": prompt, "width": width, "height": height, **fields}.items():
            setattr(asked, name, value.encode() if isinstance(value, str) else value)
        return asked

    def plan(self, prompt="", check=True, **fields):
        made = Plan()
        self._library.ferro_plan_init(ctypes.byref(made))
        asked = self.request(prompt, **fields)
        status = self._library.ferro_make_plan(
            self._handle, ctypes.byref(asked), ctypes.byref(made)
        )
        if check:
            self._check(status)
        return made

    def generate(self, prompt="", room=0, **fields):
        """The picture, (height, width, 3); `room`: bytes less than it takes."""
        asked = self.request(prompt, **fields)
        made = self.plan(prompt, False, **fields)
        rgb = np.zeros((made.height or 256, made.width or 256, 3), np.uint8)
        size = ctypes.c_size_t(rgb.nbytes - room)
        self._check(self._library.ferro_generate(self._handle, ctypes.byref(asked), _at(rgb), size))
        return rgb

    def preview(self, progress):
        """From a callback."""
        rgb = np.zeros((progress.contents.height, progress.contents.width, 3), np.uint8)
        size = ctypes.c_size_t(rgb.nbytes)
        assert self._library.ferro_preview(self._handle, progress, _at(rgb), size) == OK
        return rgb

    def tokenize(self, prompt, most, stage=0):
        """Ids and weights by chunk, and whether something was dropped."""
        length = self._library.ferro_chunk_tokens(self._handle)
        ids = np.zeros((most, length), np.int32)
        weights = np.zeros((most, length), np.float32)
        chunks, dropped = ctypes.c_uint32(), ctypes.c_int()
        text = prompt if isinstance(prompt, bytes) else prompt.encode()
        self._check(self._library.ferro_tokenize(
            self._handle, stage, text, most, _at(ids), _at(weights), ctypes.byref(chunks),
            ctypes.byref(dropped),
        ))  # fmt: skip
        return ids[: chunks.value], weights[: chunks.value], bool(dropped.value)

    def _check(self, status):
        if status:
            raise HostError(status, self._library.ferro_message(self._handle).decode())


def _at(array):
    return array.ctypes.data_as(ctypes.c_void_p)
