"""Results as JSON, in the store, and for other programs; nothing that is kept is ever lost."""

import copy
import csv
import dataclasses
import io
import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ferrotype.errors import FerrotypeError
from ferrotype.runtime.bench import export, results
from ferrotype.runtime.bench.results import ResultError
from ferrotype.runtime.bench.store import Store, StoreError
from ferrotype.tests.bench_results import full, result, rng, samples, variant


@pytest.fixture
def found():
    return full(rng())


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "data" / "bench.sqlite")


def same(a, b):
    return results.dumps(a) == results.dumps(b)


# --- JSON ---------------------------------------------------------------------------------------


def test_a_result_is_read_back_as_it_was(found):
    again = results.loads(results.dumps(found))
    assert same(again, found)
    assert [v.name for v in again.variants] == ["bf16", "w8", "w8 small"]
    for ours, theirs in zip(again.variants, found.variants, strict=True):
        assert ours.totals == pytest.approx(theirs.totals, rel=1e-8)
        assert (ours.memory, ours.timeline, ours.quality) == (
            theirs.memory, theirs.timeline, theirs.quality,
        )  # fmt: skip


def test_the_least_that_another_program_writes_is_read():
    """What docs/bench.md says that an app must write, and nothing else."""
    document = (Path(results.__file__).parents[2] / "docs" / "bench.md").read_text()
    read = results.loads(document.split("```json")[1].split("```")[0])
    assert read.variants[0].unet_steps == [[1.0, 1.0]]
    assert same(results.loads(results.dumps(read)), read)


def test_every_field_is_documented():
    document = (Path(results.__file__).parents[2] / "docs" / "bench.md").read_text()
    rows = document.split("## The JSON, version 1")[1].split("The least that is read")[0]
    kinds = (
        results.Result, results.Machine, results.Protocol, results.Variant, results.Sample,
        results.StageMemory, results.Timeline, results.Quality, results.OpTime,
    )  # fmt: skip
    for kind in kinds:
        for entry in dataclasses.fields(kind):
            assert f"`{entry.name}`" in rows, f"{kind.__name__}.{entry.name}"
            missing = entry.default is entry.default_factory is dataclasses.MISSING
            if missing and kind not in (results.Timeline, results.Quality):
                assert f"`{entry.name}`*" in rows, f"{kind.__name__}.{entry.name} must be there"


def broken(raw, *path, value):
    """The raw result with one entry replaced, or removed if `value` is ...."""
    raw = copy.deepcopy(raw)
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(raw)


SAMPLE = ("variants", 0, "samples", 0)


@pytest.mark.parametrize(
    "path, value, told",
    [
        (("format",), "ferrotype-bundle", "this reads ferrotype-bench 1"),
        (("version",), 2, "ferrotype-bench 2, this reads"),
        (("version",), True, "this reads"),
        (("id",), "../../x", "id is not"),
        (("created",), "yesterday", "created is not"),
        (("machine",), ..., "machine: missing"),
        (("machine", "cores"), 0, "cores is 0"),
        (("machine", "cores"), "8", "machine.cores"),
        (("machine", "name"), "a\x1b[2J", "printable"),
        (("machine", "name"), "x" * 301, "at most 300"),
        (("protocol", "stopped"), "whenever", "stopped is"),
        (("protocol", "confidence"), 1.0, "confidence is 1"),
        (("variants",), [], "there are no variants"),
        (("variants", 1, "name"), "bf16", "the same name"),
        (("variants", 0, "bundle_sha256"), "AB", "no hash"),
        (("variants", 0, "settings", "size"), [1, 2], "neither text nor a number"),
        (("variants", 0, "unknown"), 1, "unknown: not a field"),
        ((*SAMPLE, "seconds"), 0, "seconds is 0"),
        ((*SAMPLE, "seconds"), -1.5, "seconds is -1.5"),
        ((*SAMPLE, "seconds"), "1", "variants[0].samples[0].seconds"),
        ((*SAMPLE, "stages", "unet"), [-1], "are no times"),
        ((*SAMPLE, "stages", "unet"), 1, "unet"),
        ((*SAMPLE, "start"), 1e300, "start is"),
        ((*SAMPLE, "joules"), -1, "joules is -1"),
        (("variants", 0, "timeline", "samples"), [[0, 1]], "3 values expected"),
    ],
)
def test_what_does_not_fit_is_named(found, path, value, told):
    raw = json.loads(results.dumps(found))
    with pytest.raises(ResultError) as error:
        results.loads(broken(raw, *path, value=value), "phone.json")
    assert told in str(error.value)
    assert str(error.value).startswith("phone.json is not a benchmark's: ")
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "{", "null", '{"format": NaN}', "[" * 9999])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ResultError, match="is not a benchmark's"):
        results.loads(text)


def test_files_are_looked_at_before_they_are_read(tmp_path):
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(results.MAX_BYTES + 1)
    with pytest.raises(ResultError, match="has 67,108,865 bytes"):
        results.load(huge)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match="no UTF-8"):
        results.load(tmp_path / "binary.json")
    with pytest.raises(ResultError, match="cannot be read"):
        results.load(tmp_path / "missing.json")


# --- the store ----------------------------------------------------------------------------------


def test_results_are_kept_and_found(store, found):
    store.check()
    store.put(found)
    other = replace(found, id="ffff" * 4, created="2027-01-01T00:00:00Z")
    store.put(other)
    assert [r.id for r in store.all()] == [found.id, other.id]
    assert same(store.last(), other)
    assert same(store.find(found.id[:8]), found)
    assert same(store.find(found.id[:8].upper()), found)


def test_a_run_that_goes_on_replaces_what_it_kept_before(store, found):
    store.put(replace(found, variants=found.variants[:1]))
    store.put(found)
    assert [len(r.variants) for r in store.all()] == [3]


def test_imports_are_added_once_and_replace_nothing(store, found):
    assert store.add(found)
    assert not store.add(found)
    with pytest.raises(StoreError, match="another result of the id"):
        store.add(replace(found, command="another"))
    assert [r.command for r in store.all()] == [found.command]


@pytest.mark.parametrize("prefix", ["", "xyz", "0123456789", "%", "*", "' or 1=1 --"])
def test_an_unknown_id_is_told(store, found, prefix):
    store.put(replace(found, id="ab" * 8))
    with pytest.raises(StoreError, match="neither a file nor the id of a result"):
        store.find(prefix)


def test_an_ambiguous_id_is_told(store, found):
    for id in ("abc0" * 4, "abc1" * 4):
        store.put(replace(found, id=id))
    with pytest.raises(StoreError, match="several results"):
        store.find("abc")


def test_an_empty_store_is_not_made_by_looking(store):
    assert store.all() == []
    with pytest.raises(StoreError, match="has no results: measure with"):
        store.last()
    assert not store.path.exists()


@pytest.mark.parametrize("damage", ["text", "cut", "zeros"])
def test_a_broken_database_is_told_and_left_as_it_is(store, found, damage):
    store.put(found)
    whole = store.path.read_bytes()
    hurt = {
        "text": b"this is no database, it is a diary of some length\n" * 100,
        "cut": whole[: len(whole) // 2],
        "zeros": whole[:100] + bytes(len(whole) - 100),
    }[damage]
    store.path.write_bytes(hurt)
    for call in (store.check, store.all, lambda: store.put(found)):
        with pytest.raises(StoreError) as error:
            call()
        assert str(store.path) in str(error.value)
        assert "--store" in str(error.value)
        assert "\n" not in str(error.value)
    assert store.path.read_bytes() == hurt


def test_another_programs_database_is_left_alone(store):
    store.path.parent.mkdir()
    with sqlite3.connect(store.path) as connection:
        connection.execute("create table photos (name text)")
    connection.close()
    before = store.path.read_bytes()
    with pytest.raises(StoreError, match="a database of something else"):
        store.check()
    assert store.path.read_bytes() == before


def test_a_newer_store_is_left_alone(store, found):
    store.put(found)
    connection = sqlite3.connect(store.path)
    connection.execute("pragma user_version = 2")
    connection.close()
    with pytest.raises(StoreError, match="of version 2, this ferrotype reads 1"):
        store.all()


@pytest.mark.parametrize("place", ["/proc/ferrotype/bench.sqlite", "/dev/null/bench.sqlite"])
def test_a_place_where_nothing_can_be_written(place):
    with pytest.raises(StoreError, match="pass --store"):
        Store(Path(place)).check()


FULL = """
import resource, sys
from pathlib import Path
from ferrotype.runtime.bench import results
from ferrotype.runtime.bench.store import Store, StoreError
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    store = Store(Path(sys.argv[1]))
    store.put(results.load(Path(sys.argv[2]))) if sys.argv[4] == "put" else store.check()
except StoreError as error:
    print(error)
"""


@pytest.mark.parametrize("verb", ["put", "check"])
def test_a_full_disk_keeps_what_was_there(store, found, tmp_path, verb):
    """A file may not grow, as on a disk without room; SQLite is told while it writes."""
    store.put(found)
    size = store.path.stat().st_size
    large = result(*(variant(f"v{i}", samples(rng(), 1.0, 400)) for i in range(9)), id="ee" * 8)
    (tmp_path / "large.json").write_text(results.dumps(large))
    command = [sys.executable, "-c", FULL, str(store.path), str(tmp_path / "large.json")]
    done = subprocess.run(
        [*command, str(size + 4096), verb], capture_output=True, text=True, check=True
    )
    assert "make room" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    assert [r.id for r in store.all()] == [found.id]
    assert same(store.last(), found)
    store.put(large)  # with room again
    assert len(store.all()) == 2


def test_checking_leaves_nothing_behind(store, found):
    store.put(found)
    before = store.path.stat().st_size
    store.check()
    assert store.path.stat().st_size == before
    assert os.listdir(store.path.parent) == [store.path.name]


# --- other programs -----------------------------------------------------------------------------


def expected_rows(found):
    """Every time of a result by (variant, round, stage, index)."""
    rows = {}
    for v in found.variants:
        for s in v.samples:
            rows[v.name, s.round, "total", 0] = s.seconds
            for stage, times in s.stages.items():
                for index, seconds in enumerate(times):
                    rows[v.name, s.round, stage, index] = seconds
    return rows


def test_csv_has_every_time_once(found):
    rows = list(csv.DictReader(io.StringIO(export.encode([found], ".csv").decode())))
    read = {
        (r["variant"], int(r["round"]), r["stage"], int(r["index"])): float(r["seconds"])
        for r in rows
    }
    assert read == expected_rows(found)
    assert len(rows) == len(read)
    assert {r["machine"] for r in rows} == {"a laptop"}
    assert {r["setting_size"] for r in rows} == {"512x512", "256x256"}


def test_csv_holds_no_formulas(found):
    evil = replace(found, variants=(replace(found.variants[0], name="=HYPERLINK(1)"),))
    rows = list(csv.DictReader(io.StringIO(export.encode([evil], ".csv").decode())))
    assert {r["variant"] for r in rows} == {"'=HYPERLINK(1)"}


def test_parquet_has_every_time_once(found):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = parquet.read_table(io.BytesIO(export.encode([found], ".parquet"))).to_pylist()
    read = {(r["variant"], r["round"], r["stage"], r["index"]): r["seconds"] for r in table}
    assert read == expected_rows(found)


def test_parquet_without_pyarrow_says_what_to_do(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FerrotypeError, match=r"pip install 'ferrotype\[bench\]', or name"):
        export.encode([found], ".parquet")


def test_json_is_of_one_result(found):
    assert same(results.loads(export.encode([found], ".json").decode()), found)
    with pytest.raises(ValueError, match="these are 2"):
        export.encode([found, found], ".json")
    with pytest.raises(ValueError, match="is no kind of table"):
        export.encode([found], ".xlsx")
