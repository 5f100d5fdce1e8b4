"""A plan of memory over time, as a picture or as rows of text, with what was measured upon it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import FerrotypeError
from .memory import MIB, format_bytes

if TYPE_CHECKING:
    from .memory import Recording
    from .plan import Plan

INCHES, DOTS_PER_INCH = (6.4, 4.8), 200  # large type on few pixels: it is read on phones too
PARTS = {"fixed": "#c9ccd1", "weights": "#a9cdee", "arena": "#f6d08b"}  # from the bottom up
NAMES = {"fixed": "fixed", "weights": "weights", "arena": "activations"}
LEGEND = {"fontsize": 9.5, "handlelength": 1.6, "columnspacing": 1.5}
EDGE, TOTAL, ANONYMOUS, BUDGET = "#7d8894", "#111111", "#0b7a4b", "#d62728"
FAR = 4  # a budget this many times the peak would flatten all else: it is named, not drawn
PLATE = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}  # behind letters
EIGHTHS = " ▏▎▍▌▋▊▉█"
COLUMNS = 78  # letters of the stages' names that fit side by side


@dataclass(frozen=True)
class Span:
    """What a plan holds in memory from a moment to another, in bytes."""

    label: str  # the stage; several spans in a row may share it
    start_seconds: float
    end_seconds: float
    weights: int
    arena: int  # activations
    fixed: int  # what is there all the time
    step: int | None = None
    mode: str = ""  # how weights are held: "mapped", "streamed" ...

    @property
    def total(self) -> int:
        return self.weights + self.arena + self.fixed

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds


def spans_of(plan: Plan, measured: Recording | None = None) -> list[Span]:
    """A plan over time: a span for every run of a component, as long as it is thought to take.

    With a recording, a span for each of its stages, as long as that took.
    """
    if measured is None:
        runs = [(s.component, s.seconds / s.runs) for s in plan.stages for _ in range(s.runs)]
        ends = list(accumulate((seconds for _, seconds in runs), initial=0.0))
        times = [(n, a, b) for (n, _), (a, b) in zip(runs, pairwise(ends), strict=True)]
    else:
        times = [(s.label, s.start, s.end) for s in measured.marked]
    return [_span(plan, *time) for time in times]


def _span(plan: Plan, component: str, start: float, end: float) -> Span:
    stage = plan.stage(component)
    if stage is None:
        raise ValueError(f"the trace is of another run: it has {component}, the plan has not")
    others = plan.during(stage) - stage.peak
    weights = stage.weights - stage.apart
    return Span(component, start, end, weights, stage.arena, stage.host + others, None, stage.mode)


# --- as text ------------------------------------------------------------------------------------


def timeline(
    spans: Sequence[Span], budget: int | None, width: int = 80, encoding: str | None = None
) -> list[str]:
    """One row of at most `width` columns per stage: a bar of its most bytes, up to the budget.

    Steps of a stage are one row.  Blocks where `encoding`, by default that of stdout, has them.
    """
    _check(spans)
    marks = _marks(encoding or getattr(sys.stdout, "encoding", None) or "ascii")
    groups = [list(group) for _, group in groupby(spans, key=lambda span: span.label)]
    names, *rest = zip(*(_cells(group, budget) for group in groups), strict=True)
    sides = (str.rjust, str.ljust, str.ljust, str.rjust)
    columns = [_aligned(c, side) for c, side in zip(rest, sides, strict=True) if any(c)]
    left = max(map(len, names))
    taken = left + 3 + sum(2 + len(column[0]) for column in columns)
    bars = _bars([max(s.total for s in group) for group in groups], budget, width - taken, marks)
    rows = zip([name.ljust(left) for name in names], bars, *columns, strict=True)
    return ["  ".join(row).rstrip() for row in rows]


def _bars(amounts: Sequence[int], budget: int | None, width: int, marks: str) -> list[str]:
    """Bars on one scale, with a line where the budget ends."""
    width = max(width, 10)
    scale = max([*amounts, budget or 0, 1])
    bars = [_bar(amount / scale, width, marks) for amount in amounts]
    end = width if budget is None else round(budget / scale * width)
    edge = " " if budget is None else "│" if marks == EIGHTHS else "|"
    return [bar[:end] + edge + bar[end:] for bar in bars]


def _aligned(column: Sequence[str], side: Callable[[str, int], str]) -> list[str]:
    return [side(text, max(map(len, column))) for text in column]


def _cells(group: Sequence[Span], budget: int | None) -> tuple[str, ...]:
    """Name, bytes, what is wrong, mode and time of a stage."""
    most = max(span.total for span in group)
    modes = "/".join(dict.fromkeys(span.mode for span in group if span.mode))
    over = "over" if budget and most > budget else ""
    time = _rough(sum(span.seconds for span in group))
    return _stage_name(group), format_bytes(most), over, modes, time


def _rough(seconds: float) -> str:
    if not seconds:  # nobody knows
        return ""
    if seconds < 1:
        return f"~{seconds * 1000:.0f} ms"
    return f"~{seconds:.1f} s" if seconds < 10 else f"~{seconds:,.0f} s"


def _bar(part: float, width: int, marks: str) -> str:
    """`part` of `width` columns, in steps of as many as there are marks."""
    fine = len(marks) - 1
    full, rest = divmod(round(part * width * fine), fine)
    return (marks[-1] * full + (marks[rest] if rest else "")).ljust(width)


def _marks(encoding: str) -> str:
    """What a bar is made of, from nothing to a full column."""
    try:
        f"{EIGHTHS}│".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return " #"
    return EIGHTHS


def _check(spans: Sequence[Span]) -> None:
    if not spans:
        raise ValueError("there are no spans: a plan has at least one stage")
    for span in spans:
        if span.seconds < 0 or min(span.weights, span.arena, span.fixed) < 0:
            raise ValueError(f"{span.label}: times and bytes of a span cannot run below zero")
    for before, after in pairwise(spans):
        if after.start_seconds < before.start_seconds:
            raise ValueError(f"{after.label} starts before {before.label}: put spans in order")


# --- times from a trace -------------------------------------------------------------------------


def stretched(spans: Sequence[Span], measured: Recording) -> list[Span]:
    """The spans with the times that their stages took; what was before the first is the first's.

    A stage of the recording matches the spans in a row of its label and step, in order.
    """
    groups = [list(group) for _, group in groupby(spans, key=_name)]
    stages = [list(group) for _, group in groupby(measured.marked, key=lambda stage: stage.name)]
    planned, found = [_name(g[0]) for g in groups], [g[0].name for g in stages]
    if planned != found:
        raise ValueError(f"the trace is of another run: {_first_difference(planned, found)}")
    result: list[Span] = []
    for group, stage in zip(groups, stages, strict=True):
        result += _fitted(group, stage[0].start if result else 0.0, stage[-1].end)
    return result


def _name(span: Span) -> str:
    return span.label if span.step is None else f"{span.label} {span.step}"


def _first_difference(planned: Sequence[str], found: Sequence[str]) -> str:
    pairs = zip_longest(planned, found, fillvalue="nothing")
    place, (a, b) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    return f"stage {place} is {b} there and {a} in the plan"


def _fitted(group: Sequence[Span], start: float, end: float) -> Iterator[Span]:
    """Spans in a row, one after the other from `start` to `end`, in proportion."""
    lengths = [max(span.seconds, 1e-9) for span in group]
    scale = (end - start) / sum(lengths)
    for span, length in zip(group, lengths, strict=True):
        yield replace(span, start_seconds=start, end_seconds=start + length * scale)
        start += length * scale


# --- as a picture -------------------------------------------------------------------------------


def draw(
    target: Path | BinaryIO,
    predicted: Sequence[Span],
    budget: int | None,
    measured: Recording | None = None,
    title: str = "",
    *,
    whole: bool = False,
    force: bool = False,
) -> None:
    """Write a PNG of 1280x960: the plan's parts over time, the budget, and what was measured.

    A recording counts from its baseline; `whole` adds that, for plans that count from zero.
    A path appears whole or not at all, and replaces a file only with `force`.
    """
    _check(predicted)
    spans = stretched(predicted, measured) if measured else list(predicted)
    with _clean_matplotlib():
        figure = _figure(spans, budget, measured, title, whole)
        if not isinstance(target, Path):
            figure.savefig(target, format="png", metadata={"Software": None})
            return
        from .pictures import new_file

        with new_file(target, force) as stream:
            figure.savefig(stream, format="png", metadata={"Software": None})


@contextmanager
def _clean_matplotlib() -> Iterator[None]:
    """Its own defaults, whatever the user's are; silent about letters that its font has not."""
    try:
        import matplotlib
    except ImportError:
        raise FerrotypeError("plots need matplotlib: pip install 'ferrotype[plot]'") from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 10, "text.parse_math": False})
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def _figure(
    spans: Sequence[Span], budget: int | None, measured: Recording | None, title: str, whole: bool
) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(INCHES, DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: it has a global state, and looks for a screen
    axes = figure.subplots()
    _draw_parts(axes, spans)
    peaks = [max(span.total for span in spans)]
    if measured:
        base = measured.baseline if whole else (0, 0)
        _draw_measured(axes, measured, *base)
        peaks.append(measured.peak + sum(base))
    _draw_budget(axes, spans, budget, max(peaks))
    _draw_stages(axes, spans)
    _draw_scales(axes, spans, measured)
    size = min(12.0, 700 / max(len(title), 1))
    figure.suptitle(_line(title), x=0.02, ha="left", fontsize=size, fontweight="bold")
    axes.set_title(_summary(peaks, budget), loc="left", fontsize=10, pad=24)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, **LEGEND)
    return figure


def _draw_parts(axes: Any, spans: Sequence[Span]) -> None:
    """Parts on top of each other, as steps; a span lasts until the next begins."""
    times = [span.start_seconds for span in spans] + [spans[-1].end_seconds]
    below = [0.0] * len(times)
    for part, color in PARTS.items():
        amounts = [getattr(span, part) / MIB for span in (*spans, spans[-1])]
        top = [a + b for a, b in zip(below, amounts, strict=True)]
        axes.fill_between(times, below, top, step="post", color=color, lw=0, label=NAMES[part])
        below = top
    axes.step(times, below, where="post", color=EDGE, lw=1.2, label="predicted")


def _draw_measured(axes: Any, measured: Recording, anonymous: int, file: int) -> None:
    """Both lines, and dotted each stage's peak by the kernel, which samples may miss."""
    times = [sample.seconds for sample in measured.samples]
    lower = [(sample.anonymous + anonymous) / MIB for sample in measured.samples]
    upper = [a + (s.file + file) / MIB for a, s in zip(lower, measured.samples, strict=True)]
    axes.plot(times, upper, color=TOTAL, lw=1.6, label="measured")
    axes.plot(times, lower, color=ANONYMOUS, lw=1.4, ls=(0, (3, 1.5)), label="of it anonymous")
    label: str | None = "its exact peak"  # once in the legend
    for stage in measured.marked:
        if stage.peak is not None:
            peak = (stage.peak + anonymous + file) / MIB
            axes.plot(
                [stage.start, stage.end], [peak] * 2, color=TOTAL, lw=0.9, ls=":", label=label
            )
            label = None


def _draw_budget(axes: Any, spans: Sequence[Span], budget: int | None, peak: int) -> None:
    top = max(peak, 1)
    if budget is None:
        pass
    elif budget > FAR * top:
        text = f"budget {format_bytes(budget)}, far above ↑"
        place = {"ha": "right", "va": "top", "transform": axes.transAxes}
        axes.text(0.99, 0.97, text, color=BUDGET, bbox=PLATE, **place)
    else:
        top = max(top, budget)
        line = budget / MIB
        axes.axhline(line, color=BUDGET, lw=1.8, ls=(0, (6, 3)), zorder=3)
        text = f"budget {format_bytes(budget)}"
        place = {"xy": (1, line), "xycoords": axes.get_yaxis_transform(), "xytext": (-4, 6)}
        axes.annotate(
            text, **place, textcoords="offset points", color=BUDGET, ha="right", bbox=PLATE
        )
        _draw_excess(axes, spans, line)
    axes.set_ylim(0, top / MIB * 1.1)


def _draw_excess(axes: Any, spans: Sequence[Span], line: float) -> None:
    """In red what does not fit."""
    for span, end in zip(spans, [*(s.start_seconds for s in spans[1:]), None], strict=False):
        if span.total / MIB > line:
            times = [span.start_seconds, span.end_seconds if end is None else end]
            axes.fill_between(times, line, span.total / MIB, color=BUDGET, alpha=0.45, lw=0)


def _draw_stages(axes: Any, spans: Sequence[Span]) -> None:
    """Names above the time that each stage takes, moved apart where they would touch."""
    groups = [list(group) for _, group in groupby(spans, key=lambda span: span.label)]
    start, end = spans[0].start_seconds, spans[-1].end_seconds
    length = max(end - start, 1e-9)
    middles = [(g[0].start_seconds + g[-1].end_seconds) / 2 for g in groups]
    names = [_stage_name(group) for group in groups]
    size = min(9.0, 9 * COLUMNS / sum(len(name) + 2 for name in names))
    widths = [(len(name) + 2) / COLUMNS * size / 9 for name in names]
    places = _apart([(m - start) / length for m in middles], widths)
    for name, middle, place in zip(names, middles, places, strict=True):
        axes.annotate(
            _line(name), (middle, 1), (place, 1.035), fontsize=size, ha="center", va="bottom",
            xycoords=axes.get_xaxis_transform(), textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": EDGE, "lw": 0.6, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    for before, after in pairwise(spans):
        if before.label != after.label:
            axes.axvline(after.start_seconds, color=EDGE, lw=0.9, zorder=2.5)
        elif before.step != after.step:
            axes.axvline(after.start_seconds, color="white", lw=0.6, zorder=1.5)


def _stage_name(group: Sequence[Span]) -> str:
    steps = len({span.step for span in group})
    return group[0].label + (f" x{steps}" if steps > 1 else "")


def _apart(middles: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Places near the middles, in 0 to 1, that leave everything its width."""
    places: list[float] = []
    edge = 0.0
    for middle, width in zip(middles, widths, strict=True):
        places.append(max(middle, edge + width / 2))
        edge = places[-1] + width / 2
    edge = 1.0
    for index in reversed(range(len(places))):
        places[index] = min(places[index], edge - widths[index] / 2)
        edge = places[index] - widths[index] / 2
    return places


def _draw_scales(axes: Any, spans: Sequence[Span], measured: Recording | None) -> None:
    start, end = spans[0].start_seconds, spans[-1].end_seconds
    axes.set_xlim(start, end if end > start else start + 1)
    axes.set_xlabel("seconds" if measured else "seconds, roughly")
    axes.set_ylabel("MiB")
    axes.locator_params(axis="y", integer=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color="#000000", alpha=0.08, lw=0.8)
    axes.set_axisbelow(False)
    axes.spines[["top", "right"]].set_visible(False)


def _summary(peaks: Sequence[int], budget: int | None) -> str:
    texts = [
        f"{format_bytes(p)} {w}" for p, w in zip(peaks, ("predicted", "measured"), strict=False)
    ]
    text = f"peak {', '.join(texts)}"
    if budget is None:
        return text
    what = "over the budget of" if max(peaks) > budget else "budget"
    return f"{text}; {what} {format_bytes(budget)}"


def _line(text: str) -> str:
    """`text` as one line of what can be printed."""
    return "".join(c if c.isprintable() else "?" for c in text)
