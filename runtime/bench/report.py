"""Results as one page that needs nothing else: no network, no scripts, light and dark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from . import charts, tables, verdict
from .results import Result, Variant, dumps
from .run import machine_text
from .statistics import median, median_interval
from .svg import Canvas, variables

WIDE, NARROW = 880, 340  # pixels of a plot at a desk and on a phone
STYLE = Path(__file__).with_name("report.css")
# Nothing is fetched and nothing is run, whatever a result from elsewhere holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MOST_TIMELINES = 12  # of memory, on one page


def page(results: Sequence[Result]) -> str:
    """HTML of results, the first first."""
    title = "Latency" if len(results) > 1 else f"Latency on {results[0].machine.name}"
    parts = [f"<header><h1>{escape(title)}</h1>{_lead(results)}</header>"]
    if len(results) > 1:
        parts.append(_section("devices", "All of them", _plot(charts.stages(results, WIDE),
                              charts.stages(results, NARROW))))  # fmt: skip
        parts.append(_plots(results, ("sizes", "frontier")))
        parts += [_result(result, whole=False) for result in results]
    else:
        parts.append(_result(results[0], whole=True))
    style = variables() + STYLE.read_text(encoding="utf-8")
    data = json.dumps([json.loads(dumps(result)) for result in results], separators=(",", ":"))
    data = data.replace("<", "\\u003c").replace("&", "\\u0026")
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n"
        f"<main>{''.join(parts)}</main>\n"
        f'<script type="application/json" id="results">{data}</script>\n</html>\n'
    )


def picture(results: Sequence[Result], plot: str | None) -> str:
    """One plot as SVG, which follows light and dark by itself.

    Raises ValueError for a plot that there is not, or that has nothing to show.
    """
    drawn = {name: _draw(name, results, WIDE) for name in charts.PLOTS}
    known = {name: canvas for name, canvas in drawn.items() if canvas is not None}
    name = plot or "stages"
    if name not in known:
        raise ValueError(f"there is no plot {name[:40]!r} of these results, only: "
                         f"{', '.join(known)}")  # fmt: skip
    return known[name].svg(alone=True) + "\n"


def _draw(name: str, results: Sequence[Result], width: int) -> Canvas | None:
    if name in charts.SINGLE and len(results) != 1:
        return None
    return charts.PLOTS[name][1](results, width)


# --- sections -----------------------------------------------------------------------------------


def _lead(results: Sequence[Result]) -> str:
    """What was found, in words, for those who read no further."""
    if len(results) > 1:
        machines = list(dict.fromkeys(r.machine.name for r in results))
        said = [f"{len(results)} results of {', '.join(machines)}"]
        first, *others = results
        said += [v.text for r in others if r.machine.name != first.machine.name
                 for v in verdict.compare(first, r) if v.word != verdict.UNKNOWN]  # fmt: skip
    else:
        said = list(tables.sentences(results[0]))
    return f'<ul class="lead">{"".join(f"<li>{escape(text)}</li>" for text in said)}</ul>'


def _result(result: Result, whole: bool) -> str:
    """A result's plots and tables; `whole`: it has the page for itself."""
    head = "" if whole else (
        f'<h2 class="device">{escape(result.machine.name)} '
        f'<small>{result.created[:10]}, {result.id[:8]}</small></h2>'
        + "".join(f"<p>{escape(text)}</p>" for text in tables.sentences(result))
    )  # fmt: skip
    notes = "".join(f"<li>{escape(text)}</li>" for text in verdict.warnings(result))
    warned = f"<aside><h3>While it was measured</h3><ul>{notes}</ul></aside>" if notes else ""
    first = ("stages", "ratios", "work", "sizes") if whole else ("ratios", "work")
    parts = [head, warned, _plots([result], first), _figures(result)]
    parts += [_plots([result], ("rounds",)), _memory(result)]
    parts += [_plots([result], ("frontier",))] if whole else []
    parts.append(_profiles(result))
    return f"<article>{''.join(parts)}{_about(result)}</article>"


def _plots(results: Sequence[Result], names: Sequence[str]) -> str:
    found = ""
    for name in names:
        body = _plot(_draw(name, results, WIDE), _draw(name, results, NARROW))
        if body:
            found += _section(name, charts.PLOTS[name][0], body)
    return found


def _section(name: str, title: str, body: str) -> str:
    return f'<section class="{name}"><h3>{escape(title)}</h3>{body}</section>'


def _plot(wide: Canvas | None, narrow: Canvas | None) -> str:
    """The same plot for a desk and for a phone; a style shows one."""
    if wide is None or narrow is None:
        return ""
    return f'<div class="wide">{wide.svg()}</div><div class="narrow">{narrow.svg()}</div>'


def _memory(result: Result) -> str:
    body = ""
    shown = [v for v in result.variants if v.timeline and v.timeline.samples][:MOST_TIMELINES]
    for variant in shown:
        plot = _plot(*(charts.memory([result], width, variant.name) for width in (WIDE, NARROW)))
        name = f"<h4>{escape(variant.name)}</h4>" if len(shown) > 1 else ""
        body += name + plot
    table = tables.memory(result)
    if table.rows:
        body += _table(table)
    return _section("memory", "Memory of one picture", body) if body else ""


def _figures(result: Result) -> str:
    """Every stage of every variant, with its interval; what was measured is in the cells."""
    columns = ("", "median", tables.interval_title(result), "fastest", "90th of 100", "runs")
    rows = []
    for variant in result.measured:
        if len(result.measured) > 1:
            rows.append(_heading(variant.name, len(columns)))
        rows.append(_figure_row(result, variant, "picture", variant.totals))
        for stage in tables.stages_of(result):
            times = tables.stage_times(variant, stage)
            if times:
                rows.append(_figure_row(result, variant, stage, times))
        if known := tables.energies(variant):
            rows.append(_energy_row(result, known))
    body = _grid(columns, "".join(rows), 1)
    return _section("figures", "Every figure", body)


def _figure_row(result: Result, variant: Variant, stage: str, times: Sequence[float]) -> str:
    ordered = sorted(times)
    middle = median_interval(times, result.protocol.confidence)
    high = ordered[round(0.9 * (len(ordered) - 1))]
    cells = [
        f"<td class=t>{escape(tables.stage_title(stage))}</td>",
        _seconds(median(times)),
        f"<td>{tables.bounds(middle)}</td>",
        *(_seconds(value) for value in (ordered[0], high)),
        f"<td>{len(times)}</td>",
    ]
    about = f'data-variant="{escape(variant.name)}" data-stage="{escape(stage)}"'
    strong = " class=whole" if stage == "picture" else ""
    return f"<tr{strong} {about}>{''.join(cells)}</tr>"


def _energy_row(result: Result, joules: Sequence[float]) -> str:
    """Of a picture."""
    ordered = sorted(joules)
    middle = median_interval(joules, result.protocol.confidence)
    wide = f"{middle.low:,.3g} to {middle.high:,.3g} J" if middle.low else "-"
    high = ordered[round(0.9 * (len(ordered) - 1))]
    values = (f"{middle.middle:,.3g} J", wide, f"{ordered[0]:,.3g} J", f"{high:,.3g} J")
    cells = "".join(f"<td>{text}</td>" for text in (*values, len(joules)))
    return f"<tr><td class=t>energy</td>{cells}</tr>"


def _seconds(value: float) -> str:
    return f'<td data-seconds="{value:.9g}">{tables.duration(value)}</td>'


def _profiles(result: Result) -> str:
    """Ops of every variant that was profiled; all but the first are folded up."""
    body = ""
    for variant in result.variants:
        if variant.profile:
            table = _table(tables.profile(variant.profile))
            shown = "" if body else " open"
            name = escape(variant.name)
            body += f"<details{shown}><summary>{name}</summary>{table}</details>"
    return _section("profile", "Op by op", body) if body else ""


def _table(table: tables.Table) -> str:
    """A table; rows of the same name, where the first column has no title, under that name."""
    grouped = table.head[0] == "" and table.texts > 1
    rows, before = "", ""
    for row in table.rows:
        if grouped and row[0] != before:
            before = row[0]
            rows += _heading(before, len(table.head) - 1)
        cells = row[1:] if grouped else row
        rows += "".join(f"<td{_left(i, table.texts - grouped)}>{escape(text)}</td>"
                        for i, text in enumerate(cells)).join(("<tr>", "</tr>"))  # fmt: skip
    head = table.head[1:] if grouped else table.head
    return _grid(head, rows, table.texts - grouped)


def _grid(head: Sequence[str], rows: str, texts: int) -> str:
    titles = "".join(f"<th{_left(i, texts)}>{escape(text)}</th>" for i, text in enumerate(head))
    return (f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody>'
            "</table></div>")  # fmt: skip


def _heading(text: str, columns: int) -> str:
    return f"<tr class=head><th class=t colspan={columns}>{escape(text)}</th></tr>"


def _left(index: int, texts: int) -> str:
    return " class=t" if index < texts else ""


def _about(result: Result) -> str:
    """What it was measured on and how, for those who want to do it again."""
    rows = [
        ("machine", machine_text(result.machine)),
        ("how", tables.how(result)),
        ("meanwhile", tables.conditions(result)),
        ("when", f"{result.created.replace('T', ' ').rstrip('Z')} UTC"),
        *([("command", result.command)] if result.command else []),
        ("result", f"{result.id}, {result.tool}"),
    ]
    for variant in result.variants:
        rows.append((variant.name, _what(variant)))
    text = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows)
    return _section("about", "What was measured, and how", f"<dl>{text}</dl>")


def _what(variant: Variant) -> str:
    """Model, engine and settings in a line."""
    parts = [variant.model, f"on {variant.engine}"]
    if variant.weights:
        parts.append(f"{variant.weights} weights, {variant.activations} activations")
    if variant.bundle_bytes:
        parts.append(tables.mib(variant.bundle_bytes))
    parts += [f"{k} {_setting(k, v)}" for k, v in variant.settings.items()]
    if variant.starts:
        parts.append(f"a fresh process ready after {tables.duration(median(variant.starts))}")
    if variant.firsts:
        parts.append(f"its first picture in {tables.duration(median(variant.firsts))}")
    if variant.bundle_sha256:
        parts.append(f"sha256 {variant.bundle_sha256[:12]}…")
    return ", ".join(parts)


def _setting(name: str, value: object) -> str:
    if name == "memory" and isinstance(value, int):
        return tables.mib(value)
    return {True: "yes", False: "no"}.get(value, str(value)) if type(value) is bool else str(value)
