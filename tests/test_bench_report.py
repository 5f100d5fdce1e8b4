"""The page of a result, seen in a browser: its figures are the JSON's, it needs nothing else."""

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from ferrotype import cli
from ferrotype.runtime.bench import charts, report, results, svg, tables, trace, verdict
from ferrotype.runtime.bench.results import OpTime, Quality, Sample, StageMemory, Timeline
from ferrotype.runtime.bench.run import Profiled, op_times
from ferrotype.tests.bench_results import full, result, rng, samples, variant

DESK, PHONE = 1280, 390
EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def found():
    return full(rng())


def written(folder, text):
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def opened(found, browse, tmp_path):
    """The page at some width, in the light or in the dark."""
    path = written(tmp_path, report.page([found]))
    return lambda width=DESK, dark=False: browse(path, width, dark=dark)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_the_page_is_whole_and_asks_for_nothing(opened, width, dark, tmp_path):
    page = opened(width, dark)
    assert page.errors == []
    assert [a.split(":")[0] for a in page.requests] == ["file"]  # itself
    assert page.tab.evaluate("document.documentElement.scrollWidth") == width
    shown = page.tab.locator(".wide" if width == DESK else ".narrow")
    hidden = page.tab.locator(".narrow" if width == DESK else ".wide")
    assert shown.count() == hidden.count() >= 6
    assert all(shown.nth(i).is_visible() for i in range(shown.count()))
    assert not any(hidden.nth(i).is_visible() for i in range(hidden.count()))
    picture = page.picture(tmp_path / "page.png")
    assert mean_brightness(picture) < 90 if dark else mean_brightness(picture) > 200


def mean_brightness(path):
    from PIL import Image

    with Image.open(path) as picture:
        return float(np.asarray(picture.convert("L").resize((64, 64))).mean())


def test_letters_are_readable_on_a_phone(opened):
    """Plots are drawn at the width that they are shown at, so that no letter shrinks."""
    page = opened(PHONE)
    sizes = page.tab.evaluate("""
        [...document.querySelectorAll('.narrow svg')].map(s =>
            s.getBoundingClientRect().width / s.viewBox.baseVal.width)
    """)
    assert min(sizes) > 0.99
    smallest = page.tab.evaluate("""
        Math.min(...[...document.querySelectorAll('.narrow svg text')].map(t =>
            parseFloat(getComputedStyle(t).fontSize)))
    """)
    assert smallest >= 12


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_no_text_of_a_plot_leaves_it_or_lies_upon_another(opened, width):
    page = opened(width)
    problems = page.tab.evaluate("""
        [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width)
        .flatMap(svg => {
            const box = svg.getBoundingClientRect(), found = [];
            const texts = [...svg.querySelectorAll('text')].map(t =>
                [t.textContent, t.getBoundingClientRect()]);
            for (const [text, r] of texts)
                if (r.left < box.left - 24 || r.right > box.right + 24) found.push('out: ' + text);
            texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
                const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
                const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
                if (wide > 1 && high > 3) found.push(a + ' | ' + b);
            }));
            return found;
        })
    """)
    assert problems == []


def test_figures_are_those_of_the_json(opened, found):
    page = opened()
    data = json.loads(page.tab.inner_text("#results") or page.tab.text_content("#results"))
    assert data == [json.loads(results.dumps(found))]
    rows = page.tab.evaluate("""
        [...document.querySelectorAll('tr[data-stage]')].map(row => [
            row.dataset.variant, row.dataset.stage,
            [...row.querySelectorAll('[data-seconds]')].map(c =>
                [Number(c.dataset.seconds), c.textContent]),
            row.lastElementChild.textContent])
    """)
    seen = {(name, stage): (cells, count) for name, stage, cells, count in rows}
    assert len(seen) == len(rows)
    for v in data[0]["variants"]:
        expected = {"picture": [s["seconds"] for s in v["samples"]]}
        for stage in v["samples"][0]["stages"]:
            runs = [s["stages"][stage] for s in v["samples"]]
            expected[stage] = [t for run in runs for t in (run if stage == "unet" else [sum(run)])]
        for stage, times in expected.items():
            cells, count = seen.pop((v["name"], stage))
            middle, fastest, slow = (value for value, _ in cells)
            assert middle == pytest.approx(np.median(times), rel=1e-6)
            assert fastest == pytest.approx(min(times), rel=1e-6)
            assert min(times) <= middle <= slow <= max(times) * (1 + 1e-6)
            assert int(count) == len(times)
            assert all(as_seconds(text) == pytest.approx(value, rel=6e-3) for value, text in cells)
    assert not seen


def as_seconds(text):
    number, unit = text.split()
    return float(number.replace(",", "")) * {"s": 1, "ms": 1e-3, "us": 1e-6}[unit]


def test_bars_are_as_long_as_their_times(opened, found):
    """The stacked bars of the first plot, in pixels on the screen, against the samples."""
    page = opened()
    ends = page.tab.evaluate("""
        (() => {
            const rows = {};
            for (const r of document.querySelectorAll('.stages .wide svg rect')) {
                const box = r.getBoundingClientRect();
                if (!r.querySelector('title')) continue;
                const key = Math.round(box.top);
                rows[key] = Math.max(rows[key] || 0, r.x.baseVal.value + r.width.baseVal.value);
            }
            return Object.keys(rows).map(Number).sort((a, b) => a - b).map(k => rows[k]);
        })()
    """)
    medians = [np.median([s.seconds for s in v.samples]) for v in found.variants]
    assert np.array(ends) / ends[0] == pytest.approx(np.array(medians) / medians[0], rel=0.02)


def test_the_verdict_comes_first(opened, found):
    page = opened()
    said = page.tab.inner_text(".lead")
    [only] = verdict.verdicts(found)
    assert only.word == "faster"
    assert said.startswith(f"w8 is faster than bf16: {only.factor.middle:.2f}x (")


def test_what_went_wrong_is_told(browse, tmp_path):
    generator = rng()
    slower = samples(generator, 1.0, noise=0.02, factor=lambda part: 1 + part / 2)
    broken = result(variant("a", slower), variant("b", slower[:3], error="the bundle is gone"))
    page = browse(written(tmp_path, report.page([broken])), PHONE)
    told = page.tab.inner_text("aside")
    assert "times rose by" in told
    assert "b ended early: the bundle is gone" in told
    assert page.errors == []


def test_a_result_from_elsewhere_runs_nothing(browse, tmp_path):
    generator = rng()
    evil = result(
        variant(EVIL, samples(generator, 1.0), weights="</style>"),
        variant("b", samples(generator, 1.0), error=EVIL),
        machine=EVIL,
    )
    alone, several = report.page([evil]), report.page([evil, evil])
    for text in (alone, several):
        page = browse(written(tmp_path, text))
        assert page.errors == []
        assert page.tab.locator("img").count() == 0
        assert page.tab.locator("script").count() == 1  # the data, which is no program
        assert EVIL in page.tab.inner_text("h1" if text is alone else ".lead")


def test_several_devices_share_a_plot(browse, tmp_path):
    generator = rng()
    phone = result(variant("bf16", samples(generator, 3.0)), machine="a phone")
    laptop = full(generator)
    page = browse(written(tmp_path, report.page([laptop, phone])), PHONE)
    assert page.errors == []
    shown = page.tab.locator(".devices .narrow svg").text_content()
    assert "bf16, a phone" in shown
    assert "bf16, a laptop" in shown
    assert "bf16 on a phone is slower than bf16 on a laptop" in page.tab.inner_text("header")
    assert page.tab.evaluate("document.documentElement.scrollWidth") == PHONE


def test_little_is_enough_for_a_page(browse, tmp_path):
    """One picture of one stage, as an app may send it."""
    only = results.Variant("app", "native", "sd15", (Sample(0, 0.0, 2.0, {"unet": (2.0,)}),))
    page = browse(written(tmp_path, report.page([result(only)])), PHONE)
    assert page.errors == []
    assert "a picture in 2.00 s" in page.tab.inner_text(".lead")
    nothing = replace(only, samples=(), error="it does not fit")
    page = browse(written(tmp_path, report.page([result(nothing)])))
    assert "app ended early: it does not fit" in page.tab.inner_text("aside")


def test_what_the_system_shows_is_shown(browse, tmp_path):
    shown = {
        "joules": lambda part: 12.0, "mhz": lambda part: 3000 - 200 * part,
        "celsius": lambda part: 60 + 20 * part, "speed": lambda part: 2e11,
        "waited": lambda part: 0.01,
    }  # fmt: skip
    taken = result(variant("a", samples(rng(), 1.0, **shown)))
    taken = replace(taken, machine=replace(taken.machine, energy="RAPL"))
    page = browse(written(tmp_path, report.page([taken])))
    assert "energy\t12 J\t12 to 12 J" in page.tab.inner_text(".figures table")
    about = page.tab.inner_text(".about")
    for text in ("clock 2,900 MHz, at least 2,800", "at most 80 °C", "at 200 G operations/s",
                 "waited 1% of the time", "energy by RAPL"):  # fmt: skip
        assert text in about
    assert "12 J" in tables.summary(taken).markdown()


def test_a_table_is_turned_where_there_is_no_room(found):
    table = tables.summary(found)
    wide = cli.grid(table, 500)
    narrow = cli.grid(table, 80)
    assert wide == cli.grid(table)
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, wide.splitlines()))
    assert narrow.splitlines()[0].split() == ["bf16", "w8", "w8", "small"]
    figures = {text for row in table.rows for text in row[1:]}
    assert all(text in narrow for text in figures)


def test_odd_but_valid_results_make_a_page():
    """Whatever the schema lets through: nothing is divided by zero, nothing is no number."""
    generator = rng()
    backwards = Timeline((("a", 5.0, 1.0),), ((0.0, -1, 2**62),))

    def odd(index):
        def pick(*values):
            return values[generator.integers(len(values))]

        names = ("load", "unet", "vae_decoder", "other", "of another app")
        taken = tuple(
            Sample(
                pick(i, 7), pick(0.0, 1e-9, 0.5, 9e6), pick(1e-9, 0.5, 3.0, 9e6),
                {pick(*names): (pick(0.0, 1e-9, 2.0),) * pick(0, 1, 3) for _ in range(pick(0, 3))},
                pick(None, 0.0, 2600.0), pick(None, -3.5), pick(None, 0.0, 5.0),
                pick(None, 0.0, 1e9), pick(None, 1.0), pick(None, 1.0),
            )
            for i in range(pick(0, 1, 2, 12))
        )  # fmt: skip
        return variant(
            f"v{index}", taken,
            settings=pick({}, {"size": "0x0"}, {"size": "5x"}, {"size": 7}, {"size": "64x64"}),
            memory=pick((), (StageMemory("x", 2**62, -5, 0, None),)),
            timeline=pick(None, Timeline((), ()), backwards),
            quality=pick(None, Quality(0.0, -9e3), Quality(9e3, 1.0)),
            bundle_bytes=pick(None, 0, 2**40), bundle_sha256=None,
            profile=pick((), (OpTime("unet", "op", 0, 0.0, 5.0, 0.0, 0.0),)),
        )  # fmt: skip

    for _ in range(40):
        found = [result(*(odd(i) for i in range(1 + generator.integers(3)))) for _ in range(2)]
        again = [results.loads(results.dumps(one)) for one in found]
        for text in (report.page(again), report.page(again[:1]), tables.markdown(again)):
            assert not re.search(r"\bnan\b|\binf\b|Infinity", text, re.IGNORECASE)
        verdict.compare(*again)


# --- pictures and tables ------------------------------------------------------------------------


@pytest.mark.parametrize("plot", charts.PLOTS)
def test_every_plot_is_a_picture_by_itself(browse, tmp_path, found, plot):
    path = tmp_path / f"{plot}.svg"
    path.write_text(report.picture([found], plot))
    root = ET.parse(path).getroot()
    assert root.tag.endswith("svg")
    assert not re.search(r"NaN|inf|None", path.read_text())
    page = browse(path, dark=True)
    assert page.errors == []
    ground = page.tab.evaluate("getComputedStyle(document.querySelector('rect')).fill")
    assert ground == "rgb(21, 24, 28)"  # the dark's


def test_an_unknown_plot_is_a_usage_error(found):
    with pytest.raises(ValueError, match=r"no plot 'nonsense' .* only: stages, ratios"):
        report.picture([found], "nonsense")
    alone = result(variant("a", samples(rng(), 1.0)))
    with pytest.raises(ValueError, match="no plot 'ratios'"):
        report.picture([alone], "ratios")


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.9, 1.3, [0.9, 1, 1.1, 1.2, 1.3]), (0, 0, [0])],
)
def test_ticks_are_round(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0.00 us"), (12.34, "12.3 s"), (0.9999, "1.00 s"), (0.99949, "999 ms"),
        (0.00123, "1.23 ms"), (9.996e-3, "10.0 ms"), (4.5e-6, "4.50 us"), (1234, "1,234 s"),
        (math.inf, "-"),
    ],
)  # fmt: skip
def test_durations_have_three_digits(seconds, text):
    assert tables.duration(seconds) == text


def test_markdown_has_a_row_for_each_and_cells_that_stay_apart(found):
    strange = replace(found, variants=(replace(found.variants[0], name="a|b"), *found.variants[1:]))
    text = tables.markdown([strange])
    assert "| a\\|b | " in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows[:4]} == {
        len(re.findall(r"(?<!\\)\|", rows[0]))
    }
    assert "w8 is faster than" in text
    assert "1,000 GFLOP/s" not in text


# --- op by op -----------------------------------------------------------------------------------


PROFILED = Profiled(
    "a",
    0.5,
    (("load", 0.0, 0.1), ("unet", 0.1, 0.5)),
    (
        ("unet", "conv_in", "conv 3x3", "BF16", 0.1, 0.2, 4e9, 1e6),
        ("unet", "norm", "group norm", "", 0.3, 0.05, 0.0, 2e6),
        ("unet", "conv_out", "conv 3x3", "BF16", 0.35, 0.1, 2e9, 1e6),
    ),
    {"BF16": 4e10, "F32": 2e10},
)


def test_ops_of_a_kind_are_added_up():
    first, second = op_times(PROFILED)
    assert (first.op, first.count, first.seconds) == ("conv 3x3", 2, pytest.approx(0.3))
    assert (first.flop, first.bytes, first.ceiling) == (6e9, 2e6, 4e10)
    assert first.share == pytest.approx(6e9 / 0.3 / 4e10)
    assert second == OpTime("unet", "group norm", 1, 0.05, 0.0, 2e6)
    assert second.share is None
    shown = tables.profile([first, second]).rows
    assert shown[0][-2:] == ("20.0", "50%")
    assert shown[1][-2:] == ("-", "-")


def test_a_trace_is_what_perfetto_reads():
    """Complete events in microseconds, within their parents, rows named by metadata."""
    told = json.loads(trace.dumps([PROFILED, replace(PROFILED, label="b")]))
    events = told["traceEvents"]
    complete = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in events} == {1, 2}
    assert all({"name", "ph", "ts", "dur", "pid", "tid"} <= e.keys() for e in complete)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {
        (p, t): n
        for p, label in ((1, "a"), (2, "b"))
        for t, n in ((0, label), (1, "stages"), (2, "ops"))
    }
    unet = next(e for e in complete if e["name"] == "unet")
    ops = [e for e in complete if e["tid"] == 2 and e["pid"] == 1]
    assert [e["args"]["layer"] for e in ops] == ["conv_in", "norm", "conv_out"]
    assert all(unet["ts"] <= e["ts"] for e in ops)
    assert all(e["ts"] + e["dur"] <= unet["ts"] + unet["dur"] + 1 for e in ops)
    assert [e["ts"] for e in ops] == pytest.approx([0.1e6, 0.3e6, 0.35e6])
    assert [e["dur"] for e in ops] == pytest.approx([0.2e6, 0.05e6, 0.1e6])
    assert ops[0]["args"]["GFLOP/s"] == pytest.approx(20)
    assert ops[0]["args"]["share of the ceiling"] == pytest.approx(0.5)
