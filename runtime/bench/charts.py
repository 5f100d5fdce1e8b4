"""The plots of a report: functions of results and a width in pixels; None: nothing to see.

Each plot says in its first line what it shows; figures are medians unless it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..memory import MIB
from . import verdict
from .results import Result, Variant
from .statistics import Interval, median, median_interval
from .svg import SERIES, SIZE, STAGE_COLORS, Canvas, shortened, steps, ticks, width_of
from .tables import (
    TITLES,
    bounds,
    duration,
    on_axis,
    stage_times,
    stage_title,
    stages_of,
)

ROW = 46  # pixels of a bar with its label
AXIS = 26


@dataclass(frozen=True)
class Bar:
    """A variant in a plot of bars, perhaps among those of other machines."""

    label: str
    result: Result
    variant: Variant


def bars_of(results: Sequence[Result]) -> list[Bar]:
    """Every variant with samples, named with its machine where there are several."""
    machines = {result.machine.name for result in results}
    found = []
    for result in results:
        for variant in result.measured:
            label = variant.name
            if len(results) > 1:
                where = result.machine.name if len(machines) > 1 else result.id[:8]
                label = f"{variant.name}, {where}"
            found.append(Bar(label, result, variant))
    return found


def stages(results: Sequence[Result], width: int) -> Canvas | None:
    """Where the time of a picture goes: a bar each, as long as its median, with the interval."""
    bars = bars_of(results)
    if not bars:
        return None
    canvas = Canvas(width, title="Latency by stage")
    names = list(dict.fromkeys(n for r in results for n in stages_of(r)))
    entries = [(STAGE_COLORS.get(n, "other"), "U-Net steps" if n == "unet" else TITLES.get(n, n))
               for n in names]  # fmt: skip
    y = canvas.legend(entries, 12) + 10
    totals = [median_interval(b.variant.totals, b.result.protocol.confidence) for b in bars]
    high = max(_end(t) for t in totals) * 1.02
    for bar, total in zip(bars, totals, strict=True):
        figure = duration(total.middle)
        canvas.text(0, y + 12, shortened(bar.label, width - width_of(figure) - 30))
        canvas.text(width, y + 12, figure, anchor="end", bold=True)
        _stacked(canvas, bar, total, names, y + 19, width / high)
        y += ROW
    text = on_axis(high)
    _scale(canvas, [(t, text(t)) for t in ticks(0, high, width // 150)], high, y, width)
    canvas.height = y + AXIS
    return canvas


def _end(total: Interval) -> float:
    return total.high if math.isfinite(total.high) else total.middle


def _stacked(
    canvas: Canvas, bar: Bar, total: Interval, names: Sequence[str], y: float, scale: float
) -> None:
    """The median of the picture, divided as pictures are on average."""
    variant, x, count = bar.variant, 0.0, len(bar.variant.samples)
    for name in names:
        parts = [s.stages.get(name, ()) for s in variant.samples]
        runs = max(map(len, parts), default=0)
        for i in range(runs):
            shares = [p[i] / s.seconds for p, s in zip(parts, variant.samples, strict=True)
                      if len(p) > i]  # fmt: skip
            wide = sum(shares) / count * total.middle * scale
            middle = median([p[i] for p in parts if len(p) > i])
            step = f" {i + 1}" if runs > 1 else ""
            about = f"{TITLES.get(name, name)}{step}: {duration(middle)}"
            gap = 1.0 if wide > 3 else 0.0
            canvas.bar(x, y, wide - gap, 16, STAGE_COLORS.get(name, "other"), about)
            x += wide
    if math.isfinite(total.high):
        left, right = total.low * scale, total.high * scale
        canvas.line(left, y + 8, right, y + 8, color="ink", width=1.5)
        for edge in (left, right):
            canvas.line(edge, y + 4, edge, y + 12, color="ink", width=1.5)


def _scale(
    canvas: Canvas, marks: Sequence[tuple[float, str]], high: float, y: float, width: float,
    left: float = 0.0,
) -> None:  # fmt: skip
    """Values along the bottom."""
    canvas.line(left, y, width, y)
    for value, text in marks:
        x = left + value / high * (width - left)
        canvas.line(x, y, x, y + 4, color="quiet")
        half = width_of(text, 12) / 2
        canvas.text(min(max(x, half), width - half), y + 18, text, anchor="middle",
                    color="quiet", size=12)  # fmt: skip


def ratios(results: Sequence[Result], width: int) -> Canvas | None:
    """Each against the first: time as a ratio with its interval; the line is the first's own."""
    found = [v for r in results for v in verdict.verdicts(r) if v.word != verdict.UNKNOWN]
    if not found:
        return None
    canvas = Canvas(width, title="Time to that of the first")
    low = min(0.9, *(v.ratio.low for v in found)) * 0.97
    high = max(1.1, *(v.ratio.high for v in found)) * 1.03
    span = math.log(high / low)

    def place(ratio: float) -> float:
        return math.log(ratio / low) / span * width

    y = 8.0
    for one in found:
        color = {"faster": "good", "slower": "bad"}.get(one.word, "quiet")
        figure = verdict.times(one.ratio)
        label = f"{one.other} to {one.base}"
        canvas.text(0, y + 10, shortened(label, width - width_of(figure) - 30))
        canvas.text(width, y + 10, figure, anchor="end", color=color, bold=True)
        canvas.line(place(one.ratio.low), y + 26, place(one.ratio.high), y + 26, color=color,
                    width=2.5)  # fmt: skip
        canvas.dot(place(one.ratio.middle), y + 26, 5, color, one.text)
        y += ROW
    canvas.line(place(1), 24, place(1), y - 6, color="quiet", dash="3 3")
    marks = [t for t in ticks(low, high, width // 110) if low < t < high]
    canvas.line(0, y - 6, width, y - 6)
    for tick in marks:
        text = f"{tick:g}x"
        x = min(max(place(tick), width_of(text, 12) / 2), width - width_of(text, 12) / 2)
        canvas.text(x, y + 10, text, anchor="middle", color="quiet", size=12)
    canvas.text(0, y + 30, "← faster", color="quiet", size=12)
    canvas.text(width, y + 30, "slower →", anchor="end", color="quiet", size=12)
    canvas.height = y + 36
    return canvas


@dataclass(frozen=True)
class Frame:
    """Where values are in a plot with two axes."""

    canvas: Canvas
    left: float
    top: float
    bottom: float
    xs: tuple[float, float]
    ys: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.xs
        return self.left + (value - low) / ((high - low) or 1) * (self.canvas.width - self.left)

    def y(self, value: float) -> float:
        low, high = self.ys
        return self.bottom - (value - low) / ((high - low) or 1) * (self.bottom - self.top)

    def rules(self, text: Callable[[float], str], count: int = 4) -> None:
        """Lines across, with their values at the left."""
        for tick in ticks(*self.ys, count):
            y = self.y(tick)
            self.canvas.line(self.left, y, self.canvas.width, y)
            self.canvas.text(self.left - 8, y + 4, text(tick), anchor="end", color="quiet",
                             size=12)  # fmt: skip

    def marks(self, text: Callable[[float], str], label: str = "") -> None:
        """Values along the bottom."""
        room = self.canvas.width - self.left
        for tick in ticks(*self.xs, max(2, int(room // 110))):
            wide = width_of(text(tick), 12) / 2
            x = min(self.x(tick), self.canvas.width - wide)
            self.canvas.text(x, self.bottom + 18, text(tick), anchor="middle", color="quiet",
                             size=12)  # fmt: skip
        if label:
            self.canvas.text(self.canvas.width, self.bottom + 36, label, anchor="end",
                             color="quiet", size=12)  # fmt: skip


def rounds(results: Sequence[Result], width: int) -> Canvas | None:
    """Every picture in the order of the run; below, how fast the machine itself was meanwhile."""
    [result] = results
    if max((len(v.samples) for v in result.measured), default=0) < 2:
        return None
    canvas = Canvas(width, title="Every picture of the run")
    entries = [(SERIES[i % len(SERIES)], shortened(v.name, width - 60))
               for i, v in enumerate(result.measured)]  # fmt: skip
    top = canvas.legend(entries, 12) + 8
    samples = [s for v in result.measured for s in v.samples]
    seconds = [s.seconds for s in samples]
    cut = _readable(seconds)
    frame = Frame(canvas, 62, top, top + 190, (0, max(s.start for s in samples) or 1), (0, cut))
    frame.rules(on_axis(frame.ys[1]))
    for i, variant in enumerate(result.measured):
        color = SERIES[i % len(SERIES)]
        points = [(frame.x(s.start), frame.y(min(s.seconds, cut))) for s in variant.samples]
        canvas.path(points, color=color, width=1, opacity=0.35)
        for (x, y), s in zip(points, variant.samples, strict=True):
            canvas.dot(x, y, 2.5, color, f"round {s.round + 1}: {duration(s.seconds)}")
    bottom = frame.bottom
    if sum(s.seconds > cut for s in samples):
        canvas.text(frame.left + 4, top + 10, f"highest: {duration(max(seconds))}", color="quiet",
                    size=12)  # fmt: skip
    speeds = [(s.start, s.speed) for s in samples if s.speed]
    if len(speeds) > 1:
        bottom = _speed(canvas, frame, sorted(speeds), frame.bottom + 16)
    last = Frame(canvas, frame.left, top, bottom, frame.xs, (0, 1))
    last.marks(lambda t: f"{t:g} s")
    canvas.height = bottom + AXIS
    return canvas


def _readable(seconds: Sequence[float]) -> float:
    """The top of the axis: a few pictures far above the others would press them to the bottom."""
    ordered = sorted(seconds)
    usual = ordered[round(0.98 * (len(ordered) - 1))]
    return min(ordered[-1], 1.6 * usual) * 1.05


def _speed(
    canvas: Canvas, above: Frame, speeds: Sequence[tuple[float, float]], top: float
) -> float:
    """The bare loop as a part of its median; where the panel ends."""
    middle = median([speed for _, speed in speeds])
    panel = Frame(canvas, above.left, top + 18, top + 62, above.xs, (0, 1.25))
    canvas.text(above.left, top + 8, "speed of a bare loop, to its median", color="quiet", size=12)
    for share in (0, 0.5, 1):
        y = panel.y(share)
        canvas.line(panel.left, y, canvas.width, y)
        canvas.text(panel.left - 8, y + 4, f"{share:.0%}", anchor="end", color="quiet", size=12)
    points = [(panel.x(t), panel.y(min(1.25, v / middle))) for t, v in speeds]
    canvas.path(points, color="quiet", width=1.25)
    return panel.bottom


def sizes(results: Sequence[Result], width: int) -> Canvas | None:
    """Latency by the picture's size, a line for each of what else was varied."""
    lines: dict[str, list[tuple[float, Interval, str]]] = {}
    names: dict[object, str] = {}
    for bar in bars_of(results):
        text = str(bar.variant.settings.get("size", ""))
        if pixels := _pixels(text):
            label = " ".join(p for p in bar.label.split() if not p.startswith("size="))
            name = names.setdefault(_but_for_size(bar), label or bar.variant.model)
            total = median_interval(bar.variant.totals, bar.result.protocol.confidence)
            lines.setdefault(name, []).append((pixels / 1e6, total, text))
    lines = {name: sorted(points, key=lambda p: p[0]) for name, points in lines.items()}
    if not any(len({x for x, _, _ in points}) > 1 for points in lines.values()):
        return None
    canvas = Canvas(width, title="Latency by size")
    entries = [(SERIES[i % 6], shortened(name, width - 60)) for i, name in enumerate(lines)]
    top = canvas.legend(entries, 12) + 8
    every = [p for points in lines.values() for p in points]
    high = max(_end(total) for _, total, _ in every) * 1.05
    frame = Frame(canvas, 62, top, top + 200, (0, max(x for x, _, _ in every) * 1.06), (0, high))
    frame.rules(on_axis(frame.ys[1]))
    for i, points in enumerate(lines.values()):
        color = SERIES[i % 6]
        canvas.path([(frame.x(x), frame.y(t.middle)) for x, t, _ in points], color=color)
        for x, total, text in points:
            if math.isfinite(total.high):
                canvas.line(frame.x(x), frame.y(total.low), frame.x(x), frame.y(total.high),
                            color=color)  # fmt: skip
            about = f"{text}: {duration(total.middle)} ({bounds(total)})"
            canvas.dot(frame.x(x), frame.y(total.middle), 4, color, about)
    frame.marks(lambda t: f"{t:g}", "megapixels")
    canvas.height = frame.bottom + 44
    return canvas


def _but_for_size(bar: Bar) -> tuple[object, ...]:
    """What bars have in common that differ in size alone."""
    v = bar.variant
    rest = sorted((k, str(value)) for k, value in v.settings.items() if k != "size")
    return bar.result.id, v.engine, v.model, v.weights, v.activations, v.bundle_sha256, *rest


def _pixels(text: str) -> int:
    width, x, height = text.partition("x")
    return int(width) * int(height) if x and width.isdecimal() and height.isdecimal() else 0


def memory(results: Sequence[Result], width: int, name: str = "") -> Canvas | None:
    """Memory while one picture was drawn: private pages, and above them those of mapped files.

    `name`: of a variant; else of the first that has a timeline.
    """
    found = [v for r in results for v in r.variants if v.timeline and v.timeline.samples]
    variant = next((v for v in found if name in ("", v.name)), None)
    if variant is None or variant.timeline is None:
        return None
    canvas = Canvas(width, title=f"Memory of {variant.name}")
    entries = [("unet", "anonymous"), ("load", "file-backed")]
    predicted = {m.stage: m.predicted for m in variant.memory if m.predicted is not None}
    entries += [("bad", "predicted, by stage")] if predicted else []
    top = canvas.legend(entries, 12) + 24
    line = variant.timeline
    seconds = max(line.samples[-1][0], *(end for _, _, end in line.stages), 1e-6)
    tops = [max(0, a) + max(0, f) for _, a, f in line.samples]
    peaks = [m.peak for m in variant.memory if m.peak is not None]
    high = max(*tops, *predicted.values(), *peaks, MIB) * 1.06
    frame = Frame(canvas, 70, top, top + 180, (0, seconds), (0, high / MIB))
    frame.rules(lambda mib: f"{mib:g} MiB" if mib else "0")
    _areas(canvas, frame, line.samples)
    _stage_marks(canvas, frame, line.stages, predicted, {m.stage: m.peak for m in variant.memory})
    frame.marks(on_axis(seconds))
    canvas.height = frame.bottom + AXIS
    return canvas


def _areas(canvas: Canvas, frame: Frame, samples: Sequence[tuple[float, int, int]]) -> None:
    floor = frame.y(0)
    below = [(frame.x(t), max(0, a) / MIB, max(0, f) / MIB) for t, a, f in samples]
    lower = steps([(x, frame.y(a)) for x, a, _ in below])
    upper = steps([(x, frame.y(a + f)) for x, a, f in below])
    for points, color, opacity in ((upper, "load", 0.45), (lower, "unet", 0.75)):
        area = [(points[0][0], floor), *points, (points[-1][0], floor)]
        canvas.path(area, color=color, fill=True, opacity=opacity)
    canvas.path(upper, color="ink", width=1.25)


def _stage_marks(
    canvas: Canvas, frame: Frame, stages: Sequence[tuple[str, float, float]],
    predicted: dict[str, int], peaks: dict[str, int | None],
) -> None:  # fmt: skip
    """Names above each stage, where they have room, what was predicted, and the exact peak."""
    taken: list[tuple[float, float]] = []
    for name, start, end in sorted(stages, key=lambda stage: stage[1] - stage[2]):  # longest first
        left, right = frame.x(start), frame.x(end)
        canvas.line(left, frame.top - 6, left, frame.bottom, color="rule")
        title = TITLES.get(name, name)
        first = min(left + 2, canvas.width - width_of(title, 12))
        last = first + width_of(title, 12) + 8
        if all(last <= a or b <= first for a, b in taken):
            canvas.text(first, frame.top - 9, title, color="quiet", size=12)
            taken.append((first, last))
        for bytes_, color, dash in ((predicted.get(name), "bad", "5 3"),
                                    (peaks.get(name), "ink", "1 2")):  # fmt: skip
            if bytes_ is not None:
                y = frame.y(bytes_ / MIB)
                canvas.line(left, y, right, y, color=color, width=1.5, dash=dash)


def frontier(results: Sequence[Result], width: int) -> Canvas | None:
    """Quality, size and speed of every bundle: up is nearer to the original, left is smaller.

    The line joins those that no other is better than in both; the original is at the right.
    """
    bars = bars_of(results)
    alike = [b for b in bars if verdict.work_of(b.variant) == verdict.work_of(bars[0].variant)]
    bars = _fastest([bar for bar in alike if bar.variant.bundle_bytes])
    points = [(b, (b.variant.bundle_bytes or 0) / MIB, b.variant.quality.mean_psnr)
              for b in bars if b.variant.quality]  # fmt: skip
    if len(points) < 2:
        return None
    models = {bar.variant.model for bar, _, _ in points}
    originals = [b for b in bars if not b.variant.quality and b.variant.model in models]
    canvas = Canvas(width, title="Quality, size and speed")
    sizes_ = [(b.variant.bundle_bytes or 0) / MIB for b in bars]
    ys = [y for _, _, y in points]
    pad = max(max(ys) - min(ys), 4) * 0.25
    frame = Frame(canvas, 56, 36, 260, (0, max(sizes_) * 1.12), (min(ys) - pad, max(ys) + pad))
    frame.rules(lambda db: f"{db:g} dB")
    frame.marks(lambda size: f"{size:g} MiB" if size else "0")
    taken = [_original(canvas, frame, bar) for bar in originals]
    best = [(x, y) for _, x, y in points
            if not any(a <= x and b >= y and (a, b) != (x, y) for _, a, b in points)]  # fmt: skip
    canvas.path([(frame.x(x), frame.y(y)) for x, y in sorted(best)], color="quiet", dash="4 3")
    taken += [(frame.x(x) - 8, frame.y(y) - 8, frame.x(x) + 8, frame.y(y) + 8)
              for _, x, y in points]  # fmt: skip
    for i, (bar, x, y) in enumerate(sorted(points, key=lambda p: -p[2])):
        about = f"{bar.label}: {duration(median(bar.variant.totals))}"
        told = f"{about}, {x:,.1f} MiB, {y:.1f} dB"
        canvas.dot(frame.x(x), frame.y(y), 6, SERIES[i % 6], told)
        taken.append(_beside(canvas, shortened(about, width * 0.5), frame.x(x), frame.y(y), taken))
    canvas.height = frame.bottom + AXIS
    return canvas


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _original(canvas: Canvas, frame: Frame, bar: Bar) -> Box:
    """A line at its size: it has no distance to itself."""
    x = frame.x((bar.variant.bundle_bytes or 0) / MIB)
    text = shortened(f"{bar.label}, the original: {duration(median(bar.variant.totals))}",
                     canvas.width - 60)  # fmt: skip
    canvas.line(x, frame.top - 8, x, frame.bottom, color="quiet", dash="2 3")
    right = min(canvas.width, x + width_of(text) / 2)
    canvas.text(right, frame.top - 16, text, anchor="end", color="quiet")
    return right - width_of(text), frame.top - 30, right, frame.top - 12


def _beside(canvas: Canvas, text: str, x: float, y: float, taken: Sequence[Box]) -> Box:
    """Write beside a dot, at the first side where nothing else is."""
    wide = width_of(text)
    places = [
        (x + 11, y + 4),
        (x - 11 - wide, y + 4),
        (x - wide / 2, y + 24),
        (x - wide / 2, y - 14),
    ]
    boxes = [(left, base - 11, left + wide, base + 3) for left, base in places]
    free = [box for box in boxes if box[0] >= 0 and box[2] <= canvas.width
            and not any(_overlap(box, other) for other in taken)]  # fmt: skip
    box = (free or boxes)[0]
    canvas.text(box[0], box[3] - 3, text)
    return box


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _fastest(bars: Sequence[Bar]) -> list[Bar]:
    """One of each bundle: other settings change neither quality nor size."""
    found: dict[object, Bar] = {}
    for bar in sorted(bars, key=lambda b: median(b.variant.totals)):
        found.setdefault(bar.variant.bundle_sha256 or bar.label, bar)
    return list(found.values())


def work(results: Sequence[Result], width: int) -> Canvas | None:
    """Stages that take longest, by variant: medians of one run of each."""
    [result] = results
    names = [n for n in stages_of(result) if n != "other"]
    if len(result.measured) < 2 or not names:
        return None
    canvas = Canvas(width, title="Each stage")
    y = canvas.legend([(SERIES[i % 6], shortened(v.name, width - 60))
                       for i, v in enumerate(result.measured)], 12) + 6  # fmt: skip
    for name in names:
        times = [(v, stage_times(v, name)) for v in result.measured]
        known = [(v, median(t)) for v, t in times if t]
        high = max((t for _, t in known), default=0.0)
        if not high:
            continue
        canvas.text(0, y + 14, stage_title(name), bold=True)
        y += 22
        for variant, seconds in known:
            index = result.measured.index(variant)
            figure = duration(seconds)
            room = width - width_of(figure, SIZE) - 14
            canvas.bar(0, y, seconds / high * room, 12, SERIES[index % 6], variant.name)
            canvas.text(seconds / high * room + 8, y + 11, figure, color="quiet", size=12)
            y += 17
        y += 8
    canvas.height = y
    return canvas


# By name, as `bench report --plot` takes them, with what each shows.
PLOTS: dict[str, tuple[str, Callable[[Sequence[Result], int], Canvas | None]]] = {
    "stages": ("Where the time goes", stages),
    "ratios": ("Compared with the first", ratios),
    "work": ("Stage by stage", work),
    "sizes": ("By size", sizes),
    "rounds": ("Every picture of the run", rounds),
    "memory": ("Memory", memory),
    "frontier": ("Quality, size and speed", frontier),
}
SINGLE = ("work", "rounds")  # plots of one result
