"""Weights pass through a window of memory: the same bytes, and no more of them than it says.

And a weights file that is cut short ends the run, not the process.
"""

import contextlib
import ctypes
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ferrotype import bundle as bundles
from ferrotype import kernels
from ferrotype.benchmarks import random_bundles
from ferrotype.benchmarks.checkpoints import TINY
from ferrotype.kernels import KernelError, Kind, Op, Program, Range, Tensor, Type
from ferrotype.runtime import models
from ferrotype.runtime.engines.native import WEIGHTS, Fit, NativeEngine
from ferrotype.runtime.pipeline import EMBEDDED
from ferrotype.runtime.window import schedule
from ferrotype.tests.random_networks import FEW_BITS
from ferrotype.tests.test_kernels import SEED, thread_count, threads_become

CAN = kernels.available() and kernels.can_stream()
pytestmark = pytest.mark.skipif(not CAN, reason="the native engine is not built, or cannot stream")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

PAGE, MIB = mmap.PAGESIZE, 1 << 20
# What Linux maps beside a page that is touched, at each end of a range, until that is dropped.
AROUND = 1 << 16


# --- programs over a file -----------------------------------------------------------------------


@dataclass
class Linears:
    """Linear layers of one vector, each with a result of its own; their weights are in a file."""

    program: Program
    arena: np.ndarray
    weights: np.ndarray
    extents: list[tuple[int, int]]  # of each op's weights: offset and bytes

    def run(self) -> bytes:
        """The results, from an arena that held others."""
        first = self.program.ops[0]
        results = self.arena[4 * first.a.row : first.scratch]
        results[:] = 0xFF
        self.program.run(self.arena, self.weights)
        return results.tobytes()

    def forget(self) -> None:
        """Let go of the weights' pages."""
        self.weights.base.obj.madvise(mmap.MADV_DONTNEED)


def linears(
    path: Path, sizes: Sequence[tuple[int, int, int]], rows: int = 1, threads: int = 2
) -> Linears:
    """`sizes`: of each op its outputs, inputs, and where in the file its weights start."""
    widest = max(inputs for _, inputs, _ in sizes)
    a = Tensor(0, Type.F32, 1, rows, widest, widest, widest * rows, 0)
    ops, place = [], 4 * a.row
    for outputs, inputs, offset in sizes:
        source = Tensor.from_buffer_copy(a)
        source.c = inputs
        out = Tensor(place, Type.F32, 1, rows, outputs, outputs, outputs * rows, 0)
        place += 4 * out.row
        ops.append(Op(kind=Kind.MATMUL, out=out, a=source, weight=offset, side=1, stride=1))
    scratch = place
    for op in ops:
        op.scratch = scratch
    room = scratch + max(kernels.scratch(op, threads) for op in ops)
    file_bytes = path.stat().st_size
    program = Program(ops, room, file_bytes, threads)
    arena = kernels.aligned(room)
    rng = np.random.default_rng(SEED)
    arena[: 4 * a.row].view(np.float32)[:] = rng.standard_normal(a.row, dtype=np.float32)
    extents = [(op.weight, kernels.weight_bytes(op)) for op in ops]
    return Linears(program, arena, mapped(path), extents)


def mapped(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def random_file(path: Path, size: int) -> Path:
    """Numbers of fp32; written piece by piece."""
    rng = np.random.default_rng([SEED, size])
    with path.open("wb") as file:
        while (left := size - file.tell()) > 0:
            values = rng.standard_normal(-(-min(left, MIB) // 4), dtype=np.float32)
            file.write(values.tobytes()[:left])
    return path


def floor_of(ranges: Sequence[Range], ops: int) -> int:
    """The most that one op needs at once."""
    return max(sum(r.bytes for r in ranges if r.first <= op <= r.last) for op in range(ops))


def resident(path: Path) -> int:
    """Bytes of a mapped file that count for this process."""
    found = 0
    for piece in Path("/proc/self/smaps").read_text().split("VmFlags:"):
        if str(path) in piece:
            found += int(piece.split("\nRss:")[1].split()[0]) * 1024
    return found


# --- the same bytes -----------------------------------------------------------------------------


def random_ranges(
    rng: np.random.Generator, extents: Sequence[tuple[int, int]], file_bytes: int
) -> list[Range]:
    """Around what each op reads, mostly: held too long, overlapping, whole pages or not."""
    ranges = []
    count = len(extents)
    for op, (offset, size) in enumerate(extents):
        if rng.random() < 0.1:  # comes when it is touched
            continue
        start, end = offset, offset + size
        match rng.integers(4):
            case 0:
                start, end = start // PAGE * PAGE, -(-end // PAGE) * PAGE
            case 1:
                start, end = start - int(rng.integers(5 * PAGE)), end + int(rng.integers(5 * PAGE))
            case 2:  # part of it
                start += int(rng.integers(size))
        start, end = max(0, start), min(end, file_bytes)
        first = max(0, op - int(rng.integers(3)))
        last = min(count - 1, op + int(rng.integers(4)))
        ranges.append(Range(start, end - start, first, last))
    for _ in range(rng.integers(3)):  # what nobody reads, or nothing
        first = int(rng.integers(count))
        start = int(rng.integers(file_bytes))
        size = int(rng.integers(0, min(file_bytes - start, 9 * PAGE) + 1))
        ranges.append(Range(start, size, first, int(rng.integers(first, count))))
    ranges.sort(key=lambda r: r.first)
    return ranges


@pytest.mark.parametrize("example", range(40))
def test_any_ranges_give_the_same_bytes(example, tmp_path):
    rng = np.random.default_rng([SEED, example])
    pages = int(rng.integers(40, 400))
    path = random_file(tmp_path / "weights.bin", pages * PAGE - int(rng.integers(PAGE)) // 4 * 4)
    file_bytes = path.stat().st_size
    sizes: list[tuple[int, int, int]] = []
    for _ in range(rng.integers(1, 40)):
        if sizes and rng.random() < 0.3:  # the same again
            sizes.append(sizes[rng.integers(len(sizes))])
            continue
        outputs, inputs = (16 * int(n) for n in rng.integers(1, 9, 2))
        last = (file_bytes - 4 * outputs * inputs) // 64
        sizes.append((outputs, inputs, 64 * int(rng.integers(last + 1))))
    made = linears(path, sizes, int(rng.integers(1, 9)), int(rng.integers(1, 4)))
    expected = made.run()
    ranges = random_ranges(rng, made.extents, file_bytes)
    floor = floor_of(ranges, len(sizes))
    for window in (floor, floor + int(rng.integers(1, 40 * PAGE)), 2**62):
        made.program.stream(ranges, window)
        for _ in range(3):
            assert made.run() == expected, f"KERNEL_SEED={SEED}, window {window}"
    if floor:
        with pytest.raises(KernelError, match="exceed the window"):
            made.program.stream(ranges, floor - 1)
        assert made.run() == expected


@pytest.fixture
def rows(tmp_path):
    """40 ops with 64 KiB each, and a range for each."""
    path = random_file(tmp_path / "weights.bin", 40 << 16)
    made = linears(path, [(128, 128, i << 16) for i in range(40)], threads=3)
    return path, made, [Range(i << 16, 1 << 16, i, i) for i in range(40)]


@pytest.mark.parametrize("window", [1 << 16, 3 << 16], ids=["floor", "three"])
def test_a_run_repeats(rows, window):
    _, made, ranges = rows
    expected = made.run()
    made.program.stream(ranges, window)
    assert all(made.run() == expected for _ in range(50))


@linux
def test_what_the_system_has_forgotten_is_read_again(rows):
    path, made, ranges = rows
    expected = made.run()
    made.program.stream(ranges, 1 << 17)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert made.run() == expected


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_the_embedded_components_stream_at_their_floor(component):
    stream_at_the_floor(bundles.load(EMBEDDED), component)


@pytest.mark.parametrize("weights, activations", FEW_BITS)
def test_weights_in_few_bits_stream_with_their_scales(weights, activations, tmp_path):
    unet = TINY["unet"] | {"block_out_channels": [32, 64], "attention_head_dim": 8}
    configs = TINY | {"unet": unet}
    bundle = random_bundles.write(tmp_path / "few", configs, weights, activations, (64, 64))
    index = (bundle.path("unet") / "weights.json").read_text()
    assert f'"int{weights[1:]}"' in index
    stream_at_the_floor(bundle, "unet")


def stream_at_the_floor(bundle, component):
    """The bytes of the mapped file in the smallest window, in one twice as large; none below."""
    spec = bundle.manifest.components[component]
    width, height = bundle.manifest.sizes.default
    side = 1 if component == "vae_encoder" else 8
    shapes = models.sizes(component, spec.config, (width // side, height // side))
    rng = np.random.default_rng(SEED)
    feed = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    if "input_ids" in feed:
        feed["input_ids"] = rng.integers(0, 99, shapes["input_ids"])
    plain = NativeEngine(bundle, component, 2)
    expected = plain(feed)
    files = plain._files
    floor = schedule(files.graph(shapes), files.places, files.bytes).floor
    for window in (floor, 2 * floor):
        found = NativeEngine(bundle, component, 2, fit=Fit(window=window))(feed)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
    with pytest.raises(KernelError, match="exceed the window"):
        NativeEngine(bundle, component, 2, fit=Fit(window=floor - 1)).program(shapes)


# --- no more than the window --------------------------------------------------------------------


def resident_now() -> int:
    """Bytes of all mapped files, at one moment: smaps is no snapshot."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("\nRssFile:")[1].split()[0]) * 1024


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """Samples of the files' resident bytes while the block runs, above those before."""
    before = resident_now()
    samples: list[int] = []
    done = threading.Event()

    def sample():
        while not done.is_set():
            samples.append(resident_now() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


@linux
@pytest.mark.parametrize("window", [1, 2, 5], ids="{} MiB".format)
@pytest.mark.parametrize("gap", [0, 3 * PAGE], ids=["aligned", "crooked"])
def test_resident_weights_stay_within_the_window(window, gap, tmp_path):
    """64 MiB of them; `gap`: pages of two ranges lie in one piece that the system maps at once."""
    count, step = 64, MIB + gap
    path = random_file(tmp_path / "weights.bin", count * step)
    made = linears(path, [(512, 512, i * step) for i in range(count)], rows=128)
    expected = made.run()
    assert resident(path) >= count * MIB  # otherwise
    made.forget()
    assert resident(path) == 0
    made.program.stream([Range(i * step, MIB, i, i) for i in range(count)], window * MIB)
    with watched() as samples:
        for _ in range(5):
            assert made.run() == expected
            assert resident(path) == 0
    assert len(samples) >= 20
    assert window * MIB / 2 <= max(samples) <= window * MIB + 2 * AROUND


@linux
def test_rows_of_a_table_come_without_their_neighbours(tmp_path):
    """Linux maps 64 KiB around a page, and 2 MiB around one of a file that was just written."""
    rows, channels, tokens, layers = 8192, 1024, 77, 12
    positions = 4 * rows * channels
    first = positions + 4 * tokens * channels
    path = random_file(tmp_path / "weights.bin", first + layers * MIB)
    made = linears(path, [(512, 512, first + i * MIB) for i in range(layers)], rows=128)
    place = made.program.arena_bytes
    ids = Tensor(place, Type.I32, 1, tokens, 1, 1, tokens, 0)
    out = Tensor(place + 64 * tokens, Type.F32, 1, tokens, channels, channels, channels * tokens, 0)
    embedding = Op(
        kind=Kind.EMBEDDING, out=out, a=ids, weight=0, bias=positions, size=rows, scratch=place
    )
    arena = kernels.aligned(out.offset + 4 * out.row)
    arena[ids.offset :].view(np.int32)[:tokens] = np.linspace(0, rows - 1, tokens)
    program = Program([embedding, *made.program.ops], arena.size, made.weights.size, 2)
    program.stream([Range(first + i * MIB, MIB, 1 + i, 1 + i) for i in range(layers)], MIB)
    made.forget()
    with watched() as samples:
        for _ in range(20):
            program.run(arena, made.weights)
            assert resident(path) == 0
    table, place = made.weights[:first].view(np.float32).reshape(-1, channels), arena[out.offset :]
    expected = table[np.linspace(0, rows - 1, tokens).astype(int)] + table[rows:]
    np.testing.assert_array_equal(place.view(np.float32).reshape(tokens, channels), expected)
    assert len(samples) >= 20
    assert MIB <= max(samples) <= MIB + 3 * tokens * PAGE + AROUND


@linux
def test_pages_between_ranges_are_dropped_with_them(tmp_path):
    """A range inside of another that is still used, and what lies in no range."""
    path = random_file(tmp_path / "weights.bin", 16 * MIB)
    made = linears(path, [(128, 128, 100 * PAGE + (i << 16)) for i in range(9)])
    expected = made.run()
    made.program.stream(
        [
            Range(90 * PAGE, 400 * PAGE, 0, 2),
            Range(200 * PAGE, 10 * PAGE, 1, 8),
            Range(300 * PAGE + 8, 10, 1, 7),
            Range(201 * PAGE, 100 * PAGE, 2, 5),
        ],
        MIB * 4,
    )
    assert made.run() == expected
    assert resident(path) == 0


# --- the life of a program ----------------------------------------------------------------------


def run_until(made: Linears, cancel: ctypes.c_int) -> int:
    """How many ops ran before `cancel` was seen."""
    return kernels.library().ft_program_run(
        made.program._handle,
        made.arena.ctypes.data,
        made.weights.ctypes.data,
        None,
        ctypes.byref(cancel),
    )


@pytest.mark.parametrize("window", [1 << 16, 1 << 20, 1 << 30])
def test_a_cancelled_run_drops_what_it_holds(rows, window):
    path, made, ranges = rows
    expected = made.run()
    made.program.stream(ranges, window)
    assert run_until(made, ctypes.c_int(1)) == 0
    made.forget()
    counts = set()
    for i in range(60):
        cancel = ctypes.c_int(0)
        timer = threading.Timer(1e-5 * i, setattr, (cancel, "value", 1))
        timer.start()
        counts.add(run_until(made, cancel))
        timer.join()
        assert resident(path) == 0
    assert all(0 <= count <= 40 for count in counts)
    assert made.run() == expected


@linux
def test_programs_that_stream_end_their_threads(rows):
    _, made, ranges = rows
    expected = made.run()
    before = thread_count()
    for i in range(300):
        made.program.stream(ranges, 1 << 16)  # ends the one before
        if i % 3 == 0:
            assert made.run() == expected
    assert threads_become(before + 1)
    for i in range(200):
        program = Program(made.program.ops, made.program.arena_bytes, made.program.weight_bytes, 1)
        program.stream(ranges, 1 << 20)
        if i % 4 == 0:
            program.run(made.arena, made.weights)
        del program
    assert threads_become(before + 1)


def test_programs_stream_the_same_file_side_by_side(rows):
    path, made, ranges = rows
    expected = made.run()
    sizes = [(128, 128, i << 16) for i in range(40)]
    wrong = []

    def work(window):
        own = linears(path, sizes, threads=2)
        own.weights = made.weights
        own.program.stream(ranges, window)
        wrong.extend(i for i in range(30) if own.run() != expected)

    workers = [threading.Thread(target=work, args=(n << 16,)) for n in (1, 2, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


REFUSED = {
    "ends past the weights": (Range(39 << 16, (1 << 16) + 1, 0, 0), Range((40 << 16) + 1, 0, 0, 0),
                              Range(64, 2**64 - 64, 0, 0), Range(2**64 - 1, 2, 0, 0)),
    "has no such ops": (Range(0, 64, 0, 40), Range(0, 64, 40, 40), Range(0, 64, 3, 2),
                        Range(0, 64, 2**64 - 1, 2**64 - 1)),
    "is out of order": (Range(0, 64, 0, 9),),
    "exceed the window": (Range(0, 1 << 16, 1, 3), Range(0, 1 << 21, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_ranges_that_cannot_be_are_refused(rows, why):
    _, made, _ = rows
    expected = made.run()
    for wrong in REFUSED[why]:
        with pytest.raises(KernelError, match=f"range 1 .*{why}"):
            made.program.stream([Range(0, 64, 1, 4), wrong], 1 << 16)
    assert made.run() == expected
    made.program.stream([], 0)
    assert made.run() == expected


# --- a file that is cut short -------------------------------------------------------------------

PRELUDE = """
import ctypes, mmap, os, signal, sys, threading, time
from pathlib import Path
from ferrotype import kernels
from ferrotype.benchmarks import random_bundles
from ferrotype.benchmarks.checkpoints import TINY
from ferrotype.kernels import KernelError, Program, Range
from ferrotype.tests.test_stream import linears

path = Path(sys.argv[1])
made = linears(path, [(128, 128, i << 16) for i in range(40)])
ranges = [Range(i << 16, 1 << 16, i, i) for i in range(40)]

def runs_until_it_fails(one=made, most=100_000):
    for i in range(most):
        try:
            one.run()
        except KernelError as error:
            return f"{i} runs, then: {error}"
    return "never"
"""


def process(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def weights(tmp_path):
    return random_file(tmp_path / "weights.bin", 40 << 16)


STREAM = {"mapped": "", "streamed": "made.program.stream(ranges, 1 << 17)\n"}
streamed = pytest.mark.parametrize("stream", STREAM)


@streamed
def test_a_file_cut_short_before_a_run_ends_it(stream, weights):
    done = process(
        weights,
        f"""
        kernels.guard()
        {STREAM[stream]}
        made.run()
        os.truncate(path, (20 << 16) + 100)
        print(runs_until_it_fails())
        print(runs_until_it_fails())
        """,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    if stream == "streamed":  # as soon as it cannot be brought, at every run
        assert all("0 runs, then: the weights end before op " in line for line in said)
    else:
        assert said[0] == "0 runs, then: the weights end before op 21 of 40 is done"


@streamed
def test_a_file_cut_short_in_the_middle_of_a_run_ends_it(stream, weights):
    done = process(
        weights,
        f"""
        kernels.guard()
        {STREAM[stream]}
        threading.Timer(0.1, os.truncate, (path, 100)).start()
        print(runs_until_it_fails())
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "runs, then: the weights end before op " in done.stdout


def test_every_program_that_reads_the_missing_page_ends(weights):
    done = process(
        weights,
        """
        kernels.guard()
        both = [linears(path, [(128, 128, i << 16) for i in range(40)]) for _ in range(2)]
        for one in both:
            one.weights = made.weights
        threading.Timer(0.1, os.truncate, (path, 4096)).start()
        said = []
        work = lambda one: said.append(runs_until_it_fails(one, 3000))
        threads = [threading.Thread(target=work, args=(one,)) for one in both]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(sum("the weights end" in line for line in said))
        """,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1  # the other may begin when zeros are there already


def test_without_the_guard_the_process_ends(weights):
    done = process(weights, "os.truncate(path, 100)\nmade.run()")
    assert done.returncode == -signal.SIGBUS


OTHER_FAULTS = {
    "another file": """
        other = path.with_name("other")
        other.write_bytes(bytes(8192))
        with other.open("rb") as file:
            map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        os.truncate(other, 0)
        map[5000]
        """,
    "the weights, but no run": "os.truncate(path, 0); made.weights[5000]",
    "a signal": "os.kill(os.getpid(), signal.SIGBUS); time.sleep(9)",
    "a signal during a run": """
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGBUS)).start()
        print(runs_until_it_fails())
        """,
}


@pytest.mark.parametrize("fault", OTHER_FAULTS)
def test_another_bus_error_ends_the_process(fault, weights):
    code = textwrap.dedent(OTHER_FAULTS[fault])
    done = process(weights, "kernels.guard()\nkernels.guard()\nmade.run()\n" + code)
    assert done.returncode == -signal.SIGBUS, done


@pytest.mark.parametrize("fault", OTHER_FAULTS)
def test_the_handler_before_is_asked(fault, weights):
    code = textwrap.dedent(OTHER_FAULTS[fault])
    begin = "import faulthandler; faulthandler.enable()\nkernels.guard()\nmade.run()\n"
    done = process(weights, begin + code)
    assert done.returncode == -signal.SIGBUS, done
    assert "Fatal Python error: Bus error" in done.stderr
    assert 'File "<string>"' in done.stderr


def test_faulthandler_does_not_see_what_the_guard_takes(weights):
    done = process(
        weights,
        """
        import faulthandler; faulthandler.enable()
        kernels.guard()
        os.truncate(path, 100)
        print(runs_until_it_fails())
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("0 runs, then: the weights end")


def test_a_handler_in_python_is_asked(weights):
    done = process(
        weights,
        """
        signal.signal(signal.SIGBUS, lambda *_: print("asked"))
        kernels.guard()
        os.kill(os.getpid(), signal.SIGBUS)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        """,
    )
    assert (done.returncode, done.stdout) == (0, "asked\n")


def test_a_signal_that_was_ignored_is_ignored(weights):
    done = process(
        weights,
        """
        signal.signal(signal.SIGBUS, signal.SIG_IGN)
        kernels.guard()
        os.kill(os.getpid(), signal.SIGBUS)
        print("alive")
        """,
    )
    assert (done.returncode, done.stdout) == (0, "alive\n")


@pytest.mark.parametrize("left", [5000, -1], ids=["most of it", "a byte"])
@pytest.mark.parametrize("window", [None, 1 << 30], ids=["mapped", "streamed"])
def test_an_engine_whose_file_was_cut_short_does_not_run_again(window, left, tmp_path):
    """Not even once it has its old size: the mapping may hold zeros."""
    import shutil

    folder = shutil.copytree(EMBEDDED, tmp_path / "emoji.ferro")
    path = folder / "unet" / WEIGHTS
    code = f"""
import os, sys
import numpy as np
from pathlib import Path
from ferrotype import bundle, kernels
from ferrotype.bundle import BundleError
from ferrotype.runtime import models
from ferrotype.runtime.engines.native import Fit, NativeEngine
path = Path({str(path)!r})
whole = path.read_bytes()
found = bundle.load(Path({str(folder)!r}))
kernels.guard()
engine = NativeEngine(found, "unet", 2, fit=Fit(window={window}))
shapes = models.sizes("unet", found.manifest.components["unet"].config, (8, 8))
feed = {{name: np.ones(shape, np.float32) for name, shape in shapes.items()}}
engine(feed)
os.truncate(path, {left} % len(whole))
for again in range(2):
    try:
        engine(feed)
    except BundleError as error:
        print(error)
    path.write_bytes(whole)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    assert "unet/weights.bin changed while it was read: " in first
