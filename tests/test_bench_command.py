"""`ferrotype bench`: real pictures of the embedded model, and one line for whatever goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ferrotype import cli, kernels
from ferrotype.kernels import Kind, Op, Tensor, Type
from ferrotype.runtime.bench import ops, results, subjects, verdict
from ferrotype.runtime.bench import run as runs
from ferrotype.runtime.bench.store import Store, StoreError
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX
from ferrotype.tests.bench_results import full, result, rng, samples, variant

native = pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")
COMMAND = (sys.executable, "-c", "from ferrotype.cli import main; main(prog_name='ferrotype')")
SMALL = ("--size", "64", "-n", "1", "--threads", "1")
FEW = ("--rounds", "3", *SMALL)
STORE = Path("bench.sqlite")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder with a store of its own, and restores the process."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(cli, "data_folder", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        yield
    signal.signal(signal.SIGTERM, handler)


def invoke(*args):
    return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="ferrotype")


def bench(*args):
    """What a run that works prints on stdout."""
    done = invoke("bench", *args)
    assert done.exit_code == 0, done.output
    return done.stdout


def line_of(code, *args):
    """The one line with which a command fails."""
    done = invoke("bench", *args)
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    assert "Traceback" not in done.output
    return line


def kept():
    return Store(STORE).all()


# --- what is measured ---------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [EMBEDDED, EMBEDDED_ONNX], ids=lambda folder: folder.name)
def test_a_picture_is_its_stages(folder):
    if folder is EMBEDDED and not kernels.available():
        pytest.skip("the native engine is not built")
    steps = 3
    found = results.loads(
        bench(folder, "--rounds", 3, "--size", 64, "-n", steps, "--threads", 1, "--json")
    )
    [only] = found.variants
    assert (
        only.engine == found.variants[0].engine == ("onnx" if "onnx" in folder.name else "native")
    )
    assert only.settings["size"] == "64x64"
    assert only.settings["steps"] == steps
    assert len(only.samples) == found.protocol.rounds == 3
    for sample in only.samples:
        assert sample.stages.keys() == {"load", "text_encoder", "unet", "vae_decoder", "other"}
        assert len(sample.stages["unet"]) == steps
        assert sum(map(sum, sample.stages.values())) == pytest.approx(sample.seconds, rel=0.01)
        assert min(t for times in sample.stages.values() for t in times) >= 0
    assert len(only.starts) == 1
    assert kept()[0].id == found.id


@native
@pytest.mark.skipif(sys.platform != "linux", reason="memory by kind is Linux's")
def test_memory_is_planned_measured_and_told_apart():
    found = results.loads(bench(EMBEDDED, "--rounds", 1, "--size", 256, "--json"))
    [only] = found.variants
    assert [m.stage for m in only.memory] == ["text_encoder", "unet", "vae_decoder"]
    for m in only.memory:
        assert 0 < m.peak <= m.predicted <= only.predicted_peak
        assert 0 < m.anonymous <= m.peak * 1.1
        assert 0 < m.file <= m.peak * 1.1
    # The decoder's activations at 256x256 are its own memory, the U-Net's weights are a file's.
    by_stage = {m.stage: m for m in only.memory}
    assert by_stage["vae_decoder"].anonymous > 8 << 20
    assert by_stage["unet"].file > by_stage["vae_decoder"].file
    seconds = [t for t, _, _ in only.timeline.samples]
    assert seconds == sorted(seconds)
    assert [name for name, _, _ in only.timeline.stages] == [m.stage for m in only.memory]


@native
def test_the_same_bundle_twice_takes_turns():
    found = results.loads(bench(EMBEDDED, EMBEDDED, *FEW, "--json"))
    assert [v.name for v in found.variants] == ["emoji", "emoji #2"]
    assert [len(v.samples) for v in found.variants] == [3, 3]
    starts = sorted((s.start, v.name) for v in found.variants for s in v.samples)
    rounds = [[name for _, name in starts[i : i + 2]] for i in (0, 2, 4)]
    assert all(sorted(names) == ["emoji", "emoji #2"] for names in rounds)


@native
def test_settings_are_crossed():
    vary = ("--vary", "threads=1,2", "size=64,96x64", "--rounds", "1", "-n", "1")
    found = results.loads(bench(EMBEDDED, *vary, "--json"))
    assert [(v.name, v.settings["size"], v.settings["threads"]) for v in found.variants] == [
        ("threads=1 size=64", "64x64", 1), ("threads=1 size=96x64", "96x64", 1),
        ("threads=2 size=64", "64x64", 2), ("threads=2 size=96x64", "96x64", 2),
    ]  # fmt: skip


@native
def test_a_resident_bundle_loads_once():
    found = results.loads(
        bench(EMBEDDED, "--vary", "resident=no,yes", "--rounds", 2, *SMALL, "--json")
    )
    by_name = {v.name: v for v in found.variants}
    assert by_name["resident=yes"].settings["residency"] == "resident"
    loads = {name: [sum(s.stages["load"]) for s in v.samples] for name, v in by_name.items()}
    assert min(loads["resident=yes"]) < min(loads["resident=no"])  # all that is left is a look-up
    for sample in by_name["resident=yes"].samples:
        assert sample.stages["text_encoder"][0] > 0  # the text is encoded every time


@native
def test_other_instruction_sets_are_asked_for_by_name():
    names = kernels.isas()[:2]
    found = results.loads(
        bench("--vary", f"isa={','.join(names)}", "--rounds", 1, *SMALL, "--json")
    )
    assert [v.settings["isa"] for v in found.variants] == names


@native
def test_the_table_for_a_person():
    done = invoke("bench", EMBEDDED, *FEW)
    assert done.exit_code == 0, done.output
    for part in ("emoji", "text encoder", "U-Net step", "95% interval", "predicted", "MiB",
                 "in 3 rounds, as many as it was given"):  # fmt: skip
        assert part in done.stdout
    assert "kept as" in done.stderr


# --- op by op -----------------------------------------------------------------------------------


@native
def test_a_profile_has_every_op_with_its_share_of_the_ceiling():
    done = invoke("bench", EMBEDDED, "--profile", "trace.json", *FEW, "-o", "out.json")
    assert done.exit_code == 0, done.output
    assert "of the ceiling" in done.stdout
    [only] = results.load(Path("out.json")).variants
    assert {entry.component for entry in only.profile} == {"text_encoder", "unet", "vae_decoder"}
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    complete = [e for e in events if e["ph"] == "X"]
    assert sum(entry.count for entry in only.profile) == len([e for e in complete if e["tid"] == 2])
    stages = dict.fromkeys(("text_encoder", "unet", "vae_decoder"), 0.0)
    for event in complete:
        if event["tid"] == 1 and event["name"] in stages:
            stages[event["name"]] += event["dur"] / 1e6
    for name, seconds in stages.items():
        inside = sum(entry.seconds for entry in only.profile if entry.component == name)
        assert 0 < inside <= seconds
    assert {entry.share is None for entry in only.profile} == {True, False}
    assert all(0 < entry.share < 20 for entry in only.profile if entry.share)


def tensor(h, w, c, border=0):
    return Tensor(0, Type.BF16, h, w, c, c, (w + 2 * border) * c, border)


@native
def test_operations_and_bytes_are_counted_by_hand():
    conv = Op(
        kind=Kind.MATMUL, side=3, stride=1, pad=1, out=tensor(8, 4, 32), a=tensor(8, 4, 16, 1),
        weight=0, weight_type=Type.BF16,
    )  # fmt: skip
    assert ops.flop(conv) == 2 * 8 * 4 * 32 * 16 * 9
    assert ops.moved(conv) == 2 * (8 * 4 * 32 + 8 * 4 * 16 + 32 * 16 * 9)
    assert ops.name(conv) == "conv 3x3 4x8 16 -> 32"
    attention = Op(
        kind=Kind.ATTENTION, heads=2, size=8, out=tensor(1, 10, 16), a=tensor(1, 10, 16),
        b=tensor(1, 7, 16), c=tensor(1, 7, 16),
    )  # fmt: skip
    assert ops.flop(attention) == 2 * 2 * 10 * 7 * 16  # scores, and the sum of values
    assert ops.name(attention) == "attention 10 x 7, 2 heads of 8"
    norm = Op(kind=Kind.GROUP_NORM, out=tensor(4, 4, 16), a=tensor(4, 4, 16), groups=4)
    assert ops.flop(norm) == 0
    assert ops.arithmetic(conv) == Type.BF16


def test_a_profile_of_another_engine_is_refused_before_it_is_measured(monkeypatch):
    monkeypatch.setattr(runs, "run", lambda *args: pytest.fail("it was measured"))
    line = line_of(1, EMBEDDED_ONNX, "--profile", "trace.json")
    assert "ops are timed by the native engine" in line


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, told",
    [
        (("--vary", "colour=red"), "'colour' is no setting that varies; those are: threads="),
        (("colour=red",), "'colour' is no setting that varies"),
        (("--vary", "threads=1", "threads=2"), "threads is given twice"),
        (("--vary", "threads=0"), "'0' is not a whole number from 1 to 1000"),
        (("--vary", "threads="), "has an empty value"),
        (("--vary", "threads=999"), "threads is 999: it must be 1 to 64"),
        (("--vary", "size=big"), "'big' is not a size"),
        (("--vary", "size=65"), "65"),
        (("--vary", "size=99999999"), "99999999"),
        (("--vary", "memory=1"), "has no unit"),
        (("--vary", "resident=maybe"), "neither yes nor no"),
        (("--vary", "sampler=nonsense"), "nonsense"),
        (("--vary", "isa=z80"), "isa=z80 is no instruction set that this build knows"),
        (("--interval", "0"), "not a percentage"),
    ],
)
@native
def test_wrong_arguments_are_usage_errors(args, told):
    assert told in line_of(2, EMBEDDED, *args)
    assert not list(Path().glob("*.html"))


@pytest.mark.parametrize("name", ["missing.ferro", "colour"])
def test_what_is_no_bundle(name):
    assert name in line_of(1, name)


@native
def test_what_does_not_fit_is_told_and_the_others_are_measured():
    done = invoke("bench", EMBEDDED, "--vary", "memory=1MiB,1GiB", *FEW, "--json")
    assert done.exit_code == 1
    small, large = results.loads(done.stdout).variants
    assert "the budget is 1 MiB" in small.error
    assert (len(small.samples), len(large.samples)) == (0, 3)
    assert "the budget is 1 MiB" in line_of(1, EMBEDDED, "--memory", "1MiB")


@pytest.fixture
def broken(monkeypatch):
    """A copy of the bundle; the fixture's value removes it after so many rounds."""
    copy = Path(shutil.copytree(EMBEDDED, "copy.ferro")).absolute()
    told = cli.BenchProgress.told

    def after(rounds):
        def remove(self, found):
            if found.protocol.rounds == rounds:
                shutil.rmtree(copy)
            told(self, found)

        monkeypatch.setattr(cli.BenchProgress, "told", remove)
        return copy

    return after


@native
def test_a_bundle_that_vanishes_keeps_what_was_measured(broken):
    copy = broken(2)
    done = invoke("bench", copy, EMBEDDED, "--rounds", 5, *SMALL, "--json")
    assert done.exit_code == 1
    gone, other = results.loads(done.stdout).variants
    assert len(gone.samples) == 2
    assert len(other.samples) == 5
    assert "copy.ferro" in gone.error
    assert "copy ended early" in done.stderr
    assert [len(v.samples) for v in kept()[0].variants] == [2, 5]


@native
def test_the_only_bundle_that_vanishes_ends_the_run(broken):
    copy = broken(2)
    done = invoke("bench", copy, "--rounds", 5, *SMALL)
    assert done.exit_code == 1
    assert "when nothing was left to measure" in done.stdout
    assert len(kept()[0].variants[0].samples) == 2


@native
def test_a_worker_that_is_killed_is_told(monkeypatch):
    """As the system does where memory runs out."""
    picture = subjects.Process.picture

    def kill(self, seed):
        if seed == 2:
            os.kill(self.pid, signal.SIGKILL)
        return picture(self, seed)

    monkeypatch.setattr(subjects.Process, "picture", kill)
    done = invoke("bench", EMBEDDED, "--rounds", 5, *SMALL)
    assert done.exit_code == 1
    assert "its process was killed, as the system does where memory runs out" in done.stderr
    assert len(kept()[0].variants[0].samples) == 2


@native
def test_an_interrupt_keeps_what_was_measured(tmp_path):
    """A terminal interrupts every process of its group: here as well."""
    command = [*COMMAND, "bench", str(EMBEDDED), "--store", str(STORE), "--seconds", "300",
               "--interval", "0.001%", *SMALL]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not kept() and time.monotonic() < deadline:  # the first that is kept meanwhile
        time.sleep(0.2)
    before = len(kept()[0].variants[0].samples)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "when it was interrupted" in out
    assert "interrupted after" in err
    assert "Traceback" not in err
    [found] = kept()
    assert len(found.variants[0].samples) >= before > 0
    assert found.protocol.stopped == "interrupted"
    assert workers
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@native
def test_an_interrupt_while_a_worker_ends_does_not_leave_it(monkeypatch):
    worker = subjects.Process()
    wait, interrupts = worker._process.wait, [KeyboardInterrupt]

    def interrupted(timeout=None):
        if interrupts:
            raise interrupts.pop()
        return wait(timeout)

    monkeypatch.setattr(worker._process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.close()
    assert worker._process.returncode is not None


def children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return text.split()


@pytest.mark.parametrize("place", ["/proc/a/bench.sqlite", "/dev/null/bench.sqlite"])
def test_a_store_that_cannot_be_written_is_told_before_anything_is_measured(monkeypatch, place):
    monkeypatch.setattr(runs, "run", lambda *args: pytest.fail("it was measured"))
    assert "--store" in line_of(1, EMBEDDED, "--store", place)


def test_a_broken_store_is_told_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(runs, "run", lambda *args: pytest.fail("it was measured"))
    STORE.write_bytes(b"no database" * 1000)
    assert "is damaged or no database" in line_of(1, EMBEDDED)
    assert STORE.read_bytes() == b"no database" * 1000


@native
def test_a_disk_that_fills_up_still_shows_the_result(monkeypatch):
    """Room was there before; when the result is to be kept, it is not."""

    def full_disk(self, result):
        raise StoreError("bench.sqlite cannot be written (database or disk is full): make room")

    monkeypatch.setattr(Store, "put", full_disk)
    done = invoke("bench", EMBEDDED, *FEW)
    assert done.exit_code == 1
    assert "emoji" in done.stdout  # what was measured
    assert done.stderr.strip().splitlines()[-1].startswith("Error: bench.sqlite cannot be written")


def test_files_that_are_there_are_not_replaced(monkeypatch):
    monkeypatch.setattr(runs, "run", lambda *args: pytest.fail("it was measured"))
    Path("out.json").write_text("mine")
    assert "out.json exists" in line_of(1, EMBEDDED, "-o", "out.json")
    assert Path("out.json").read_text() == "mine"


# --- what was measured --------------------------------------------------------------------------


def saved(found, name):
    Path(name).write_text(results.dumps(found))
    return name


@pytest.fixture
def two():
    """Files of a result, of the same work at twice the speed, and of a phone."""
    generator = rng()
    slow = result(variant("a", samples(generator, 1.0)))
    fast = result(variant("a", samples(generator, 0.5)))
    phone = result(variant("a", samples(generator, 4.0)), machine="a phone")
    return tuple(saved(f, f"{n}.json") for n, f in (("slow", slow), ("fast", fast), ("p", phone)))


def test_results_are_compared(two):
    slow, fast, phone = two
    assert "is faster than" in bench("compare", slow, fast)
    assert "a on a phone is slower than a on a laptop" in bench("compare", fast, phone)
    [told] = json.loads(bench("compare", slow, fast, "--json"))
    assert told["verdict"] == "faster"
    assert told["ratio"][0] == pytest.approx(0.5, rel=0.1)
    assert "no difference shown" in bench("compare", slow, slow)


def test_a_comparison_may_fail_a_build(two):
    slow, fast, _ = two
    assert invoke("bench", "compare", slow, fast, "--max-slower", "5%").exit_code == 0
    assert "more than 5%" in line_of(1, "compare", fast, slow, "--max-slower", "5%")


def test_results_without_common_work(two):
    other = saved(
        result(*(variant(n, samples(rng(), 1.0), settings={}) for n in "xy")), "other.json"
    )
    assert "have no work in common" in line_of(1, "compare", two[0], other)


def test_results_of_other_devices_are_imported_and_shown_together(two):
    slow, _, phone = two
    assert "kept as" in bench("import", slow, phone)
    assert "is there already" in bench("import", phone)
    listed = bench("list")
    assert "a phone" in listed
    assert "a laptop" in listed
    assert len(json.loads(bench("list", "--json"))) == 2
    assert bench("report", "--all").strip() == "bench.html"
    text = Path("bench.html").read_text()
    assert "2 results of" in text
    assert "a phone" in text


def test_nothing_is_imported_of_a_list_with_a_broken_file(two):
    Path("broken.json").write_text('{"format": "ferrotype-bench", "version": 1}')
    assert "broken.json is not a benchmark's: " in line_of(1, "import", two[0], "broken.json")
    assert not STORE.exists()


def test_a_result_is_named_by_the_beginning_of_its_id(two):
    bench("import", *two)
    found = kept()[0]
    bench("export", found.id[:6], "-o", "again.json")
    assert results.dumps(results.load(Path("again.json"))) == results.dumps(found)
    assert "neither a file nor the id" in line_of(1, "report", "nonsense")


@pytest.mark.parametrize("name", ["out.html", "out.md", "out.svg"])
def test_reports_of_every_kind(name):
    saved(full(rng()), "full.json")
    assert bench("report", "full.json", "-o", name).strip() == name
    assert "exists" in line_of(1, "report", "full.json", "-o", name)
    assert Path(name).stat().st_size > 500


def test_reports_that_cannot_be_made(two):
    assert "name it .html, .md or .svg" in line_of(2, "report", two[0], "-o", "out.pdf")
    told = line_of(2, "report", two[0], "-o", "out.svg", "--plot", "x")
    assert "only: stages" in told
    assert "has no results" in line_of(1, "report")
    assert "cannot be written" in line_of(1, "report", two[0], "-o", "/proc/out.html")
    assert not Path("out.svg").exists()


@pytest.mark.parametrize("name, start", [("out.csv", b"result,"), ("out.json", b"{")])
def test_exports(two, name, start):
    bench("export", two[0], "-o", name)
    assert Path(name).read_bytes().startswith(start)
    assert "is no kind of table" in line_of(2, "export", two[0], "-o", "out.xlsx")


def test_the_command_line_is_kept_without_places_of_this_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ferrotype", "bench", "/home/me/a b.ferro", "--seconds", "3"])
    assert cli.command_line() == "ferrotype bench 'a b.ferro' --seconds 3"


def test_a_worker_sees_the_same_modules(tmp_path):
    """Also where a folder of that name lies in the way."""
    (tmp_path / "ferrotype").mkdir()
    (tmp_path / "ferrotype" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    settings = subjects.Settings(EMBEDDED_ONNX, 1, (64, 64), steps=1)
    process = subjects.Process.open(settings)
    try:
        assert process.facts["engine"] == "onnx"
        assert np.isfinite(process.picture(0).seconds)
    finally:
        process.close()


def test_what_nobody_waits_for_is_not_drawn_to_its_end(monkeypatch):
    """A picture may take minutes: an interrupt in the middle of one ends the process at once."""
    process = subjects.Process.open(subjects.Settings(EMBEDDED_ONNX, 1, (64, 64), steps=1))
    os.kill(process.pid, signal.SIGSTOP)  # as busy as can be

    class Interrupted:
        close = process._answers.close

        def readline(self):
            raise KeyboardInterrupt

    answers, process._answers = process._answers, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        process.picture(0)
    killed = []
    kill = process._process.kill
    monkeypatch.setattr(process._process, "kill", lambda: (killed.append(True), kill()))
    process.close()
    assert killed == [True]
    assert answers.closed


def test_words_of_verdicts_are_those_of_the_documents():
    text = (Path(cli.__file__).parent / "docs" / "bench.md").read_text()
    for word in (verdict.FASTER, verdict.SLOWER, verdict.SAME):
        assert word in text
