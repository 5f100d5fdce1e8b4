"""Builds of the native engine that Python cannot load, and cases sent through them.

Little-endian files, as kernels_runner.cpp reads and writes them.  Cases: how many (u32), then of
each threads, whether scratch lies before the tensors (u32 both), bytes of arena and of weights
(u64 both), the ft_op, the arena and the weights.  Results: status, bytes of the message (u32 both),
the message, and the arena if the op ran.
"""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import ferrotype
from ferrotype.kernels import Op

KERNELS = Path(ferrotype.__file__).parent / "kernels"
RUNNER = Path(__file__).parent / "kernels_runner.cpp"
DONE, REFUSED, CONTRADICTION = 0, 1, 2
TOO_LONG = 600  # seconds


@dataclass(frozen=True)
class Build:
    """A compiler and its flags, and what runs the result."""

    compilers: tuple[str, ...]  # the first that is installed
    flags: tuple[str, ...]
    link: tuple[str, ...] = ()
    emulator: tuple[str, ...] = ()
    packages: str = "g++"  # of Debian

    def missing(self) -> str:
        if self.emulator and platform.machine() == "aarch64":
            return "this machine runs arm64 code by itself"
        if not any(map(shutil.which, self.compilers)):
            return f"no {' or '.join(self.compilers)} (Debian: {self.packages})"
        if self.emulator and not shutil.which(self.emulator[0]):
            return f"no {self.emulator[0]} (Debian: {self.packages})"
        return ""


SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ARM = {
    "compilers": ("aarch64-linux-gnu-g++",),
    "packages": "g++-aarch64-linux-gnu qemu-user",
}
BUILDS = {
    # With the instructions of AMX in plain code, as few machines have them.
    "sanitized": Build(("g++",), ("-O1", "-g", "-DFERROTYPE_EMULATE_AMX", *SANITIZERS), SANITIZERS),
    "arm64": Build(
        flags=("-O2",), link=("-static",), emulator=("qemu-aarch64", "-cpu", "max"), **ARM
    ),
}


class Runner:
    """A compiled kernels_runner.cpp.  Skips the test where a tool that it takes is not here."""

    def __init__(self, build: Build, folder: Path) -> None:
        if why := build.missing():
            pytest.skip(why)
        self.build, self.folder = build, folder
        self.program = folder / "runner"
        compiler = next(filter(None, map(shutil.which, build.compilers)))
        sources = [*sorted(KERNELS.glob("*.cpp")), RUNNER]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: self._compile(compiler, source), sources))
        call(compiler, "-pthread", *build.link, *objects, "-o", self.program)
        size, *lines = self("isas").splitlines()
        assert int(size) == len(bytes(Op())), "ft_op differs between C++ and Python"
        self.isas = {name: supported == "1" for name, supported in map(str.split, lines)}

    def _compile(self, compiler: str, source: Path) -> Path:
        made = self.folder / f"{source.stem}.o"
        flags = ("-std=c++17", "-pthread", "-Wall", "-Wextra", "-Wshadow", *self.build.flags)
        call(compiler, *flags, f"-I{KERNELS}", "-c", source, "-o", made)
        return made

    def __call__(self, *arguments: object, stdin: str = "", cpu: str | None = None) -> str:
        emulator = list(self.build.emulator)
        if cpu:
            emulator[-1] = cpu
        return call(*emulator, self.program, *arguments, stdin=stdin)

    def run(
        self,
        isa: str,
        cases: Sequence[tuple[Op, np.ndarray, np.ndarray]],
        threads: int,
        cpu: str | None = None,
    ) -> Iterator[tuple[int, str, np.ndarray]]:
        """Of each (op, arena, weights): status, message, and the arena as the op left it."""
        source, results = self.folder / "cases", self.folder / "results"
        with source.open("wb") as file:
            file.write(struct.pack("<I", len(cases)))
            for i, (op, arena, weights) in enumerate(cases):
                file.write(struct.pack("<IIQQ", threads, i % 2, arena.size, weights.size))
                file.write(bytes(op) + arena.tobytes() + weights.tobytes())
        self("run", isa, source, results, cpu=cpu)
        with results.open("rb") as file:
            for _, arena, _ in cases:
                status, length = struct.unpack("<II", file.read(8))
                message = file.read(length).decode()
                after = file.read(arena.size) if status == DONE else b""
                yield status, message, np.frombuffer(after, np.uint8)


def call(*command: object, stdin: str = "") -> str:
    """Run a command to its end; what it prints.  Fails with its last words."""
    done = subprocess.run(
        [str(part) for part in command],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TOO_LONG,
        check=False,
    )
    assert done.returncode == 0, (
        f"{command[0]} ended with {done.returncode}:\n{done.stderr[-6000:]}"
    )
    return done.stdout
