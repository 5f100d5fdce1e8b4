"""README's figures are those of the results files."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ferrotype.benchmarks import readme
from ferrotype.benchmarks.measure import RESULTS, ROOT
from ferrotype.runtime.bench import results
from ferrotype.tests.bench_results import result, rng, samples, variant

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_section_is_what_would_be_written():
    """If not: `python benchmarks/readme.py`."""
    assert readme.replaced(TEXT) == TEXT


@pytest.mark.parametrize("path", readme.pictures(), ids=lambda path: path.name)
def test_its_pictures_are_what_would_be_written(path):
    assert path.read_text(encoding="utf-8") == readme.pictures()[path]


def test_a_changed_result_changes_the_section(tmp_path, monkeypatch):
    for path in RESULTS.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    native = tmp_path / "native.md"
    text = native.read_text()
    row = next(line for line in text.splitlines() if "U-Net step | native-bf16" in line)
    middle = row.split("|")[3]
    native.write_text(text.replace(row, row.replace(middle, " 9,876 ", 1)))
    before = readme.section((readme.engines,))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert "| 9.88 s |" in readme.engines()
    assert readme.section((readme.engines,)) != before


def test_peers_are_shown_with_who_is_missing(tmp_path, monkeypatch):
    generator = rng()
    settings = {"size": "512x512", "steps": 4, "threads": 2}
    more = {"settings": settings, "timeline": None}
    ours, theirs = (variant(n, samples(generator, s, 12), **more) for n, s in
                    (("ours", 1.0), ("theirs", 2.0)))  # fmt: skip
    absent = replace(ours, name="absent", samples=(), error="pip could not install it")
    found = replace(result(ours, theirs, absent), command="python benchmarks/peers.py --quick")
    monkeypatch.setattr(readme, "PEERS", tmp_path / "peers.json")
    readme.PEERS.write_text(results.dumps(found))
    text = readme.peers()
    [row] = [line for line in text.splitlines() if line.startswith("| theirs ")]
    assert re.search(r"[12]\.\d\dx \(", row)
    assert "absent (pip could not install it)" in text
    assert "`python benchmarks/peers.py --quick`" in text


def test_marks_that_are_missing_or_there_twice_are_told():
    for text in ("nothing", readme.BEGIN, TEXT + readme.BEGIN + readme.END):
        with pytest.raises(ValueError, match="must have one"):
            readme.replaced(text)


def test_links_lead_somewhere():
    found = re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXT)
    assert len(found) > 10
    assert [link for link in found if not Path(ROOT, link).exists()] == []


def test_every_table_says_how_to_have_it_again():
    body = TEXT.split(readme.BEGIN)[1].split(readme.END)[0]
    parts = body.split("### ")[1:]
    assert len(parts) == len(readme.PARTS)
    for part in parts:
        commands = re.findall(r"`python (benchmarks/\w+\.py)", part)
        assert commands
        assert all((ROOT / command).is_file() for command in commands)
