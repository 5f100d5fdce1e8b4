"""Memory is measured as it is, said in words that are read back, and drawn against its budget."""

import ctypes
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ferrotype.errors import FerrotypeError
from ferrotype.runtime import memory, plot
from ferrotype.runtime.memory import (
    GIB,
    KIB,
    MIB,
    Recording,
    Trace,
    format_bytes,
    parse_bytes,
)
from ferrotype.runtime.plot import Span, draw, stretched, timeline

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts kinds of memory")
SLACK = 4 * MIB  # for what the interpreter does meanwhile, and the kernel's batches by core


def refused(call, *args):
    """The one line that a wrong argument is refused with."""
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250
    return str(caught.value)


# --- amounts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512MiB", 512 * MIB),
        ("1GiB", GIB),
        ("1.5 GB", 1_500_000_000),
        ("800M", 800 * MIB),
        ("300m", 300 * MIB),
        ("2g", 2 * GIB),
        ("64 kib", 64 * KIB),
        ("64KB", 64_000),
        ("4096 B", 4096),
        (" 0.5GiB ", GIB // 2),
        ("0001MiB", MIB),
        ("1048576GiB", 1 << 50),
    ],
)
def test_an_amount_is_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["4096", "0", "1.5", " 7 "])
def test_a_number_without_a_unit_is_refused_and_says_so(text):
    assert f"{text!r} has no unit: write KiB, MiB or GiB" in refused(parse_bytes, text)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "MiB", "2 gigs", "-1GiB", "+1GiB", "nan", "nanMiB", "inf GiB", "1e3MiB", "0x10MiB",
        "1,5GiB", "1.GiB", ".5GiB", "1.2.3MiB", "1 2MiB", "1TiB", "512Mi", "1_000MiB", "1MiB\n",
        "٣MiB", "1\tMiB", "9" * 40 + "MiB", "1" * 100_000, "1MiB" * 1000, "a\nb\x1b[2J",
    ],
)  # fmt: skip
def test_what_is_no_amount_is_refused_with_an_example(text):
    assert re.search("for example 512MiB", refused(parse_bytes, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0MiB", "'0MiB' is less than a byte"),
        ("0.0001KiB", "less than a byte"),
        ("1048577GiB", "more than 1048576 GiB"),
        ("9" * 18 + "G", "more than"),
    ],
)
def test_an_amount_that_nobody_means_is_refused(text, words):
    assert words in refused(parse_bytes, text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (256 * MIB, "256 MiB"),
        (1280 * MIB, "1.25 GiB"),
        (1000 * MIB, "1000 MiB"),
        (1024 * MIB - 1, "1 GiB"),
        (12_345_678, "11.8 MiB"),
        (100 * GIB, "100 GiB"),
        (-3 * MIB, "-3 MiB"),
    ],
)
def test_an_amount_is_written(count, text):
    assert format_bytes(count) == text


@given(st.integers(1, 1023), st.sampled_from([1, KIB, MIB, GIB]))
def test_whole_amounts_come_back(count, unit):
    assert parse_bytes(format_bytes(count * unit)) == count * unit


@given(st.integers(1, 1 << 50))
def test_any_amount_comes_back_to_half_a_percent_and_never_short_when_rounded_up(count):
    assert abs(parse_bytes(format_bytes(count)) - count) <= count / 200 + 1
    assert count <= parse_bytes(format_bytes(count, up=True)) <= count * 1.01 + 1


@given(st.text())
def test_any_text_is_an_amount_or_one_line(text):
    try:
        assert parse_bytes(text) > 0
    except ValueError as error:
        assert str(error).isprintable()  # noqa: PT017  # either is right


# --- this process -------------------------------------------------------------------------------

STATUS = b"""Name:\tpython
VmHWM:\t  300 kB
VmRSS:\t  200 kB
RssAnon:\t  100 kB
RssFile:\t   60 kB
RssShmem:\t   40 kB
"""


def test_kinds_of_memory_are_told_apart():
    reading = memory._reading(STATUS)
    assert reading == memory.Reading(100 * KIB, 60 * KIB, 40 * KIB, 300 * KIB)
    assert reading.resident == 200 * KIB


def test_what_the_system_does_not_say_is_none():
    reading = memory._reading(b"Name:\tpython\nVmRSS:\t  200 kB\n")
    assert reading == memory.Reading(None, None, None, None)
    assert reading.resident is None


def test_without_the_kernel_s_files_the_peak_is_all_that_is_known(monkeypatch):
    monkeypatch.setattr(memory, "_status", Path("/nowhere/status").read_bytes)
    reading = memory.read()
    assert reading.peak > MIB
    assert reading == memory.Reading(None, None, None, reading.peak)
    with pytest.raises(FerrotypeError, match="no trace: run it on Linux"), Trace():
        pass
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.read() is None


def test_a_peak_that_cannot_be_reset_is_no_error(monkeypatch):
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError()))
    assert memory.reset_peak() is False


# --- the machine --------------------------------------------------------------------------------


def machine(root, **files):
    """A system's files under a folder; __ in a name stands for a slash."""
    for name, text in {"proc__meminfo": "MemAvailable:   1000 kB\n", **files}.items():
        path = root / name.replace("__", "/").replace("memory_", "memory.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return memory._available_to_linux(root)


def v2(folder, **values):
    return {f"sys__fs__cgroup__{folder}memory_{k}": str(v) for k, v in values.items()}


def test_without_limits_it_is_what_linux_calls_available(tmp_path):
    assert machine(tmp_path) == 1000 * KIB


def test_a_limit_of_the_group_leaves_what_is_not_in_use(tmp_path):
    files = v2("job__", max=500_000, current=200_000, high="max", stat="anon 7\ninactive_file 9\n")
    assert machine(tmp_path, proc__self__cgroup="0::/job\n", **files) == 300_009


def test_the_tightest_of_all_groups_above_counts(tmp_path):
    inner = v2("a__b__", max="max", current=5)
    middle = v2("a__", max=900_000, high=400_000, current=100_000)
    outer = v2("", max=700_000, current=100_000)
    files = {**inner, **middle, **outer}
    assert machine(tmp_path, proc__self__cgroup="0::/a/b\n", **files) == 300_000


def test_a_group_over_its_limit_leaves_nothing(tmp_path):
    files = v2("", max=100, current=200)
    assert machine(tmp_path, proc__self__cgroup="0::/\n", **files) == 0


@pytest.mark.parametrize("group", ["/", "/docker/0123"])  # a container's path may be the host's
def test_the_first_version_of_control_groups_is_read(tmp_path, group):
    folder = "sys__fs__cgroup__memory__"
    files = {
        f"{folder}memory_limit_in_bytes": "600000\n",
        f"{folder}memory_usage_in_bytes": "100000\n",
        f"{folder}memory_stat": "inactive_file 5\ntotal_inactive_file 7\n",
    }
    lines = f"9:name=systemd:/\n4:cpu,memory:{group}\n0::/\n"
    assert machine(tmp_path, proc__self__cgroup=lines, **files) == 500_007
    files[f"{folder}memory_limit_in_bytes"] = "9223372036854771712\n"
    assert machine(tmp_path, proc__self__cgroup=lines, **files) == 1000 * KIB


@pytest.mark.parametrize("lines", ["", "junk\n", "::\n", "0::\n0::/\0\n", "4:memory:relative\n"])
def test_a_list_of_groups_that_says_nothing_is_no_limit(tmp_path, lines):
    assert machine(tmp_path, proc__self__cgroup=lines, **v2("job__", max=1)) == 1000 * KIB


@pytest.mark.parametrize("value", ["", "junk", "-5", "max"])
def test_a_limit_that_is_no_number_is_none(tmp_path, value):
    files = v2("", max=value, current=100)
    assert machine(tmp_path, proc__self__cgroup="0::/\n", **files) == 1000 * KIB


def test_nothing_is_known_of_a_machine_that_says_nothing(tmp_path, monkeypatch):
    assert memory._available_to_linux(tmp_path) is None
    monkeypatch.setattr(memory, "available", lambda: None)
    assert memory.default_budget() is None


def test_the_default_budget_leaves_a_quarter(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 400)
    assert memory.default_budget() == 300


def test_this_machine_has_memory():
    assert MIB < memory.available() < 1 << 50


def test_a_mac_counts_half_of_what_is_built_in(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "sysconf_names", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2})
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.get)
    assert memory.available() == 500 * 4096


@pytest.mark.parametrize("works", [True, False])
def test_windows_is_asked(monkeypatch, works):
    def answer(pointer):
        assert pointer._obj.length == 64
        pointer._obj.available = 123 * MIB
        return works

    monkeypatch.setattr(sys, "platform", "win32")
    kernel32 = SimpleNamespace(GlobalMemoryStatusEx=answer)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    assert memory.available() == (123 * MIB if works else None)


# --- a trace ------------------------------------------------------------------------------------

# Every stage waits until a sample has seen what it holds, so that no time matters.
ALLOCATES = """
import gc, mmap, sys, time
from ferrotype.runtime.memory import MIB, Trace

def seen(trace):
    for _ in range(2):  # the first may have been under way
        last = trace._rows[-3]
        while trace._rows[-3] == last:
            time.sleep(0.001)

with open(sys.argv[1], "rb") as file, Trace(plan={"peak": 1}, budget=5, interval=0.001) as trace:
    trace.mark("anonymous")
    data = bytearray(64 * MIB)
    seen(trace)
    trace.mark("short", step=1)
    bytearray(32 * MIB)
    del data
    trace.mark("mapped")
    view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    sum(view[i] for i in range(0, len(view), mmap.PAGESIZE))
    seen(trace)
    trace.mark("dropped")
    view.close()
    seen(trace)
print(trace.recording.to_json())
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The recording of a process that had 64 MiB, 96, and then 48 of a file."""
    path = tmp_path_factory.mktemp("mapped") / "file"
    path.write_bytes(os.urandom(MIB) * 48)
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATES, path], capture_output=True, text=True, check=True
    )
    return Recording.from_json(done.stdout)


def most(recording, label, kind):
    return max(getattr(s, kind) for s in recording.samples if s.label == label)


@LINUX
def test_a_trace_tells_anonymous_memory_from_files(recorded):
    for label, anonymous, file in [("anonymous", 64, 0), ("mapped", 0, 48), ("dropped", 0, 0)]:
        last = [s for s in recorded.samples if s.label == label][-1]
        assert abs(last.anonymous - anonymous * MIB) < SLACK
        assert abs(last.file - file * MIB) < SLACK


@LINUX
def test_the_kernel_s_peak_belongs_to_its_stage_even_if_no_sample_saw_it(recorded):
    wanted = {"anonymous": 64, "short": 96, "mapped": 48, "dropped": 48}
    assert [s.label for s in recorded.marked] == list(wanted)
    for stage in recorded.marked:
        assert abs(stage.peak - wanted[stage.label] * MIB) < SLACK
    assert recorded.exact
    assert abs(recorded.peak - 96 * MIB) < SLACK
    assert recorded.peak_anonymous <= recorded.peak


@LINUX
def test_stages_follow_each_other_from_beginning_to_end(recorded):
    stages = recorded.stages
    assert [s.name for s in stages] == ["", "anonymous", "short 1", "mapped", "dropped"]
    assert [s.start for s in stages] == [0.0, *(s.end for s in stages[:-1])]
    assert stages[-1].end == recorded.samples[-1].seconds
    for stage in recorded.marked:
        assert stage.start in [s.seconds for s in recorded.samples if s.label == stage.label]


@LINUX
def test_a_recording_says_what_it_ran_under(recorded):
    assert (recorded.plan, recorded.budget, recorded.interval) == ({"peak": 1}, 5, 0.001)
    assert recorded.machine["python"] == sys.version.split()[0]
    assert recorded.machine["cores"] >= 1
    assert recorded.machine["system"].startswith("Linux")
    assert all(count > MIB for count in recorded.baseline)


@LINUX
def test_a_recording_comes_back_from_its_json(recorded):
    text = recorded.to_json()
    assert Recording.from_json(text) == recorded
    assert Recording.from_json(text).to_json() == text


@LINUX
def test_plateaus_are_kept_by_their_ends():
    trace = Trace(interval=1000)
    with trace:
        for _ in range(3):
            for _ in range(50):
                with trace._lock:
                    trace._add(trace._rows[-3] + 1, 7, 8)
            trace.mark("next")
    assert len(trace.recording.samples) < 20


@LINUX
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_trace_ends_with_its_block_however_that_ends(error):
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    trace = Trace()

    def run():
        with trace:
            trace.mark("unet", 1)
            raise error

    with pytest.raises(error):
        run()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files
    assert [s.name for s in trace.recording.marked] == ["unet 1"]
    assert Recording.from_json(trace.recording.to_json()) == trace.recording


@LINUX
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["start", "reset"])
def test_a_trace_that_cannot_begin_leaves_nothing(monkeypatch, error, where):
    def fail(*_):
        raise error

    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    with monkeypatch.context() as patch:
        if where == "start":
            patch.setattr(threading.Thread, "start", fail)
        else:
            patch.setattr(memory, "reset_peak", fail)
        with pytest.raises(type(error)), Trace():
            pass
    assert len(os.listdir("/proc/self/fd")) == files
    assert threading.active_count() == threads


@LINUX
def test_ctrl_c_ends_a_process_with_a_trace():
    code = (
        "import time; from ferrotype.runtime.memory import Trace\n"
        "with Trace():\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert stderr.count("Traceback") == 1


@LINUX
def test_where_the_peak_cannot_be_reset_the_samples_are_all_there_is(monkeypatch):
    monkeypatch.setattr(memory, "reset_peak", lambda: False)
    with Trace() as trace:
        trace.mark("unet")
    assert [s.peak for s in trace.recording.stages] == [None, None]
    assert not trace.recording.exact
    assert trace.recording.peak >= 0
    assert Recording.from_json(trace.recording.to_json()) == trace.recording


@LINUX
def test_a_trace_can_be_looked_at_while_it_runs():
    with Trace() as trace:
        trace.mark("unet")
        assert [s.name for s in trace.recording.marked] == ["unet"]


@LINUX
@pytest.mark.parametrize("label", ["", "a\nb", "\x1b[2J"])
def test_a_label_is_printable_text(label):
    with Trace() as trace:
        assert "is no label" in refused(trace.mark, label)


@LINUX
@pytest.mark.parametrize("step", [-1, 1.5, True, "1"])
def test_a_step_is_a_whole_number(step):
    with Trace() as trace:
        assert "is not a whole number" in refused(trace.mark, "unet", step)


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf"), 1e9])
def test_an_interval_is_a_time(interval):
    assert "is not a number of seconds" in refused(Trace, None, None, interval)


@pytest.mark.parametrize("plan", [{"a": float("nan")}, {"a": {1, 2}}])
def test_a_plan_that_cannot_be_saved_fails_before_the_run(plan):
    with pytest.raises((ValueError, TypeError)):
        Trace(plan)


TINY = {
    "format": "ferrotype-memory-trace",
    "version": 1,
    "machine": {"system": "Linux", "python": "3.11", "cores": 2},
    "interval": 0.005,
    "baseline": [1000, 2000],
    "budget": 512 * MIB,
    "plan": {"peak": 3},
    "stages": [["", None, 0, 0.1, None], ["text", None, 0.1, 0.5, 99], ["unet", 1, 0.5, 1.5, 200]],
    "samples": [[0, 0, 0], [0.1, 5, 7], [0.6, -3, 190], [1.5, 0, 0]],
}


def test_a_trace_s_json_is_read():
    recording = Recording.from_json(json.dumps(TINY))
    assert [s.label for s in recording.samples] == ["", "text", "unet", "unet"]
    assert (recording.peak, recording.peak_anonymous, recording.exact) == (200, 5, False)
    assert recording.baseline == (1000, 2000)
    assert Recording.from_json(json.dumps({**TINY, "plan": None, "budget": None})).budget is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "png"}, "we read ('ferrotype-memory-trace', 1)"),
        ({"version": 2}, "we read"),
        ({"version": True}, "we read"),
        ({"extra": 1}, "key 'extra' is unknown"),
        ({"machine": []}, "machine is [], not an object"),
        ({"plan": 3}, "plan is 3, not an object"),
        ({"budget": 0}, "budget is 0"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"budget": True}, "budget is True"),
        ({"baseline": [1]}, "is no list of 2"),
        ({"baseline": 7}, "is no list of 2"),
        ({"baseline": [-1, 0]}, "baseline is -1"),
        ({"interval": "fast"}, "'fast' is not a number of seconds"),
        ({"interval": -1}, "-1 is not a number of seconds"),
        ({"samples": []}, "samples are [], not a list"),
        ({"samples": {}}, "samples are {}, not a list"),
        ({"samples": [[0, 0]]}, "is no list of 3"),
        ({"samples": [[0, 0.5, 0]]}, "anonymous is 0.5"),
        ({"samples": [[0, 0, "7"]]}, "file is '7'"),
        ({"samples": [[1, 0, 0], [0, 0, 0]]}, "run back in time"),
        ({"samples": [[-1, 0, 0]]}, "not a number of seconds"),
        ({"samples": [[0, 1 << 60, 0]]}, "not a whole number in its range"),
        ({"stages": None}, "stages are None"),
        ({"stages": [["", None, 0, 1]]}, "is no list of 5"),
        ({"stages": [["", None, 1, 0, None]]}, "ends before it starts"),
        ({"stages": [["a", None, 0, 1, None]]}, "empty label"),
        ({"stages": [["", None, 0, 1, None], ["", None, 1, 1, 0]]}, "empty label"),
        ({"stages": [["", None, 0, 1, None], ["a", None, 2, 3, 0]]}, "where the one before ends"),
        ({"stages": [["a\x1b", None, 0, 1, None]]}, "is no label"),
        ({"stages": [[7, None, 0, 1, None]]}, "is no label"),
        ({"stages": [["", -1, 0, 1, None]]}, "step is -1"),
        ({"stages": [["", None, 0, 1, 2.5]]}, "peak is 2.5"),
        ({"a\x1b" * 99: 1}, "is unknown"),
    ],
)
def test_a_damaged_trace_is_refused(change, words):
    message = refused(Recording.from_json, json.dumps({**TINY, **change}))
    assert message.startswith("not a memory trace: ")
    assert words in message


@pytest.mark.parametrize("key", TINY)
def test_a_trace_without_a_key_is_refused(key):
    text = json.dumps({k: v for k, v in TINY.items() if k != key})
    words = "we read" if key in ("format", "version") else f"key {key!r} is missing"
    assert words in refused(Recording.from_json, text)


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "7", '"text"', "{", "\x00", '{"a": NaN}', '{"a": 1e999}',
        '{"format": 1, "format": 1}', '{"a": ' + "9" * 5000 + "}", "[" * 100_000, "1" * 10_000,
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused(text):
    assert refused(Recording.from_json, text).startswith("not a memory trace: ")


def test_a_truncated_trace_is_refused():
    text = json.dumps(TINY)
    for end in range(len(text)):
        refused(Recording.from_json, text[:end])


# --- a timeline of text -------------------------------------------------------------------------


def spans():
    return [
        Span("text_encoder", 0, 0.1, 100 * MIB, 10 * MIB, 20 * MIB, mode="resident"),
        Span("unet", 0.1, 1, 150 * MIB, 100 * MIB, 20 * MIB, 1, "streamed"),
        Span("unet", 1, 1.5, 50 * MIB, 30 * MIB, 20 * MIB, 1, "streamed"),
        Span("unet", 1.5, 3, 150 * MIB, 100 * MIB, 20 * MIB, 2, "streamed"),
        Span("vae_decoder", 3, 15, 30 * MIB, 270 * MIB, 20 * MIB, mode="mapped"),
    ]


def test_a_timeline_has_a_row_per_stage():
    assert timeline(spans(), 640 * MIB, 70, "utf-8") == [
        "text_encoder  █████▌                     │  130 MiB  resident  ~100 ms",
        "unet x2       ███████████▍               │  270 MiB  streamed   ~2.9 s",
        "vae_decoder   █████████████▌             │  320 MiB  mapped      ~12 s",
    ]


def test_a_timeline_shows_what_is_over_the_budget():
    assert timeline(spans(), 160 * MIB, 60, "ascii") == [
        "text_encoder  ####  |       130 MiB        resident  ~100 ms",
        "unet x2       ######|###    270 MiB  over  streamed   ~2.9 s",
        "vae_decoder   ######|#####  320 MiB  over  mapped      ~12 s",
    ]


def test_without_a_budget_the_longest_bar_is_the_peak():
    rows = timeline([Span("unet", 0, 2, 6 * MIB, 2 * MIB, 0)], None, 40, "latin-1")
    assert rows == [f"unet  {'#' * 18}   8 MiB  ~2.0 s"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "cp437", "no-such-code"])
@pytest.mark.parametrize("budget", [None, 1, 200 * MIB, GIB])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_timeline_fits_its_width_and_encoding(width, budget, encoding):
    rows = timeline(spans(), budget, width, encoding)
    assert len(rows) == 3
    assert all(len(row) <= width and row.isprintable() for row in rows)
    if encoding != "no-such-code":
        "\n".join(rows).encode(encoding)


def test_the_encoding_is_that_of_stdout(monkeypatch):
    for encoding, block in (("utf-8", "█"), ("ascii", "#")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert block in timeline(spans(), GIB)[0]


@pytest.mark.parametrize("call", [lambda s: timeline(s, None), lambda s: draw(io.BytesIO(), s, 1)])
def test_spans_that_are_no_plan_are_refused(call):
    good = spans()
    assert "there are no spans" in refused(call, [])
    assert "unet starts before vae_decoder" in refused(call, [good[4], good[1]])
    assert "below zero" in refused(call, [Span("unet", 2, 1, 0, 0, 0)])
    assert "below zero" in refused(call, [Span("unet", 1, 2, 0, -1, 0)])


# --- times from a trace -------------------------------------------------------------------------


def recording(*stages, total=250 * MIB):
    """A recording of these stages: (label, step, end)."""
    made, start = [memory.Stage("", None, 0.0, 0.5, 0)], 0.5
    for label, step, end in stages:
        made.append(memory.Stage(label, step, start, end, total))
        start = end
    samples = [
        memory.Sample(0.0, 0, 0, ""),
        memory.Sample(0.5, total // 5, total - total // 5, stages[0][0]),
        memory.Sample(start, total // 5, total - total // 5, stages[-1][0]),
    ]
    return Recording(tuple(samples), tuple(made), (MIB, 2 * MIB), 0.005, None, None, {})


RUN = recording(
    ("text_encoder", None, 1), ("unet", 1, 15), ("unet", 2, 20), ("vae_decoder", None, 30)
)


def test_a_plan_takes_the_times_that_its_stages_took():
    found = stretched(spans(), RUN)
    assert [s.total for s in found] == [s.total for s in spans()]
    assert [s.start_seconds for s in found] == pytest.approx([0, 1, 10, 15, 20])
    assert [s.end_seconds for s in found] == pytest.approx([1, 10, 15, 20, 30])


def test_stages_of_no_planned_time_share_it():
    planned = [Span("unet", 0, 0, 1, 0, 0), Span("unet", 0, 0, 2, 0, 0)]
    found = stretched(planned, recording(("unet", None, 4)))
    assert [s.end_seconds for s in found] == pytest.approx([2, 4])


def test_marks_in_a_row_of_one_name_are_one_stage():
    run = recording(("unet", None, 2), ("unet", None, 4))
    assert stretched([Span("unet", 0, 1, 1, 0, 0)], run)[0].end_seconds == 4


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([("text_encoder", None, 1), ("unet", 1, 2)], "stage 3 is nothing there and unet 2 in"),
        ([("unet", 1, 2)], "stage 1 is unet 1 there and text_encoder in the plan"),
    ],
)
def test_a_trace_of_another_run_is_refused(stages, words):
    assert words in refused(stretched, spans(), recording(*stages))


# --- the picture --------------------------------------------------------------------------------


def drawn(*args, **options):
    stream = io.BytesIO()
    draw(stream, *args, **options)
    image = Image.open(stream)
    assert (image.format, image.size) == ("PNG", (1280, 960))
    return np.asarray(image.convert("RGB")).astype(int)


def rows_of(pixels, color, share=0.3):
    """The rows that hold so much of a colour: where a horizontal line runs."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return np.flatnonzero((abs(pixels - wanted).max(2) < 12).mean(1) > share)


def test_the_budget_is_a_red_line_over_the_plan_and_what_was_measured():
    pixels = drawn(spans(), 512 * MIB, RUN, "sd15.ferro, 512x512, 2 steps")
    budget = rows_of(pixels, plot.BUDGET)
    measured = rows_of(pixels, plot.TOTAL, 0.5)
    assert 1 <= len(budget) <= 8
    assert budget.max() < measured.min()  # rows count from the top
    for color in plot.PARTS.values():
        assert len(rows_of(pixels, color, 0.1)) > 5


def test_what_is_over_the_budget_is_red():
    red = len(rows_of(drawn(spans(), 200 * MIB), "#e7845f", 0.2))
    assert red > 20


def test_without_a_budget_or_far_below_it_there_is_no_line():
    for budget in (None, 64 * GIB):
        assert len(rows_of(drawn(spans(), budget, RUN), plot.BUDGET)) == 0


def test_a_recording_may_count_from_zero(monkeypatch):
    height = {
        whole: rows_of(drawn(spans(), 512 * MIB, run, whole=whole), plot.TOTAL, 0.5).min()
        for run in [memory.replace(RUN, baseline=(0, 100 * MIB))]
        for whole in (False, True)
    }
    assert height[True] < height[False] - 50


@pytest.mark.parametrize(
    "title", ["", "$x^2$ \\frac{", "雪の中の狐 🦊", "a\nb\x1b[2J", "x" * 500], ids=range(5)
)
def test_any_title_and_label_is_drawn(title):
    many = [Span(f"{title[:20]} {i}", i, i + 1, i * MIB, MIB, MIB) for i in range(30)]
    drawn(many, 40 * MIB, title=title)


def test_a_plan_of_nothing_is_drawn():
    drawn([Span("unet", 0, 0, 0, 0, 0)], None)


def test_the_same_plan_is_the_same_file():
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        draw(file, spans(), 512 * MIB, RUN, "title")
    assert files[0].getvalue() == files[1].getvalue()


def test_a_file_appears_whole_and_replaces_another_only_with_force(tmp_path):
    path = tmp_path / "plan.png"
    path.write_text("mine")
    with pytest.raises(FerrotypeError, match="exists: choose another name or pass --force"):
        draw(path, spans(), 512 * MIB)
    assert path.read_text() == "mine"
    draw(path, spans(), 512 * MIB, force=True)
    with Image.open(path) as image:
        assert image.size == (1280, 960)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.png"]


def test_a_reader_s_settings_are_neither_used_nor_changed():
    import matplotlib

    before = drawn(spans(), 512 * MIB)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        settings = dict(matplotlib.rcParams)
        assert (drawn(spans(), 512 * MIB) == before).all()
        assert dict(matplotlib.rcParams) == settings


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        FerrotypeError, match=r"^plots need matplotlib: pip install 'ferro.*plot\]'$"
    ):
        draw(tmp_path / "plan.png", spans(), 512 * MIB)
    assert list(tmp_path.iterdir()) == []


def test_neither_module_loads_numpy_or_matplotlib():
    code = (
        "import sys, ferrotype.runtime.memory, ferrotype.runtime.plot\n"
        "sys.exit(bool({'numpy', 'matplotlib', 'PIL'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
