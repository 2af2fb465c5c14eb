"""Small figures as inline SVG: curves, bars and intervals that need no script; colours come from the page's classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from schoolhouse.data.show import Html, tag

Point = tuple[float, float]
Format = Callable[[float], str]

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 390, 12, 184
"""The drawing area inside the figure; what is left of it is for the numbers of the axes."""
MOST_POINTS = 1000
"""Points drawn of one curve; more than these are drawn as the lowest and highest of each stretch."""
MOST_READINGS = 100
"""Places along a figure at which its values can be read by pointing."""
LOG_RATIO = 50
"""From this ratio of largest to smallest value on, a positive quantity is drawn on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: its name, its (x, y) points in order of x, and how it is drawn."""

    name: str
    points: tuple[Point, ...]
    look: Literal["main", "raw", "second"] = "main"


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values laid over a stretch of the figure."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies in the figure."""
        low, high, value = (math.log(part) if self.log else part for part in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the range."""
        return _log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def downsample(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points, in order: the lowest and the highest of each of equally many, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    buckets, kept = most // 2, []
    for index in range(buckets):
        bucket = points[index * len(points) // buckets : (index + 1) * len(points) // buckets]
        extremes = {min(bucket, key=_height), max(bucket, key=_height)}
        kept += sorted(extremes, key=lambda point: point[0])
    return kept


def smooth(points: Sequence[Point], span: float) -> list[Point]:
    """An exponential mean that forgets over `span` points, without a bias to the beginning (Kingma & Ba, 2015)."""
    decay, total, weight, means = math.exp(-1 / span), 0.0, 0.0, []
    for x, y in points:
        total, weight = decay * total + (1 - decay) * y, decay * weight + (1 - decay)
        means.append((x, total / weight))
    return means


def finite(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that can be drawn."""
    return tuple(point for point in points if math.isfinite(point[0]) and math.isfinite(point[1]))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about `about` of them, from `low` to `high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def compact(value: float) -> str:
    """A number in few characters: 12,345 is 12.3k, 0.00001 is 1e-5."""
    size = float(f"{abs(value):.3g}")  # as it will be written: 999.6 million is 1G
    if size and (size < 1e-3 or size >= 1e12):
        return exponent(value)
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            scale = 1e3 if letter == "k" else factor
            return f"{value / scale:.3g}{letter}"
    return f"{value:.4g}"


def exponent(value: float) -> str:
    """A small number by its power of ten: 0.0005 is 5e-4."""
    mantissa, power = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(power)}" if value else "0"


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def whole_percent(share: float) -> str:
    """A share as a percentage with as many digits as it needs: for the ticks of an axis."""
    return f"{round(100 * share, 6):g} %"


@dataclass(frozen=True, slots=True)
class Frame:
    """What figures that are read side by side share: the range of steps, and steps marked by a vertical line."""

    first: float
    last: float
    marks: tuple[float, ...] = ()


def curves(label: str, series: Sequence[Series], frame: Frame, form: Format = compact,
           bounds: tuple[float, float] | None = None) -> Html:  # fmt: skip
    """Curves over steps; `bounds` fixes the range of a linear y axis."""
    x_axis = Axis(frame.first, frame.last if frame.last > frame.first else frame.first + 1, LEFT, RIGHT)
    y_axis = _y_axis(series, bounds)
    lines = [_mark(x_axis, step) for step in frame.marks if x_axis.low <= step <= x_axis.high]
    drawn = [_curve(one, x_axis, y_axis) for one in sorted(series, key=lambda one: one.look != "raw")]
    grid = _grid(y_axis, whole_percent if form is percent else form)
    parts = (grid, _steps(x_axis), *lines, *drawn, *_readings(series, x_axis, y_axis, form))
    return _figure(label, *parts)


def bars(label: str, edges: Sequence[float], counts: Sequence[float], noun: str) -> Html:
    """A histogram: a bar for each count between two edges; pointing at it gives its figures."""
    y_axis = Axis(0, max([1, *counts]) * 1.05, BOTTOM, TOP)
    width = (RIGHT - LEFT) / max(1, len(counts))
    parts = [_grid(y_axis, compact), tag("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis")]
    for index, ((low, high), count) in enumerate(zip(itertools.pairwise(edges), counts, strict=False)):
        left, top = LEFT + index * width, y_axis.at(count)
        bar, gap = tag("title", f"{low:,g} to {high:,g} tokens: {count:,g} {noun}"), min(1.0, width / 4)
        parts += [
            tag("rect", x=_r(left + gap / 2), y=_r(top), width=_r(width - gap), height=_r(BOTTOM - top), class_="bar"),
            tag("rect", bar, x=_r(left), y=TOP, width=_r(width), height=BOTTOM - TOP, class_="read"),
        ]
    every = max(1, math.ceil(len(edges) / 7))
    parts += [
        tag("text", compact(edge), x=_r(LEFT + index * width), y=BOTTOM + 16, class_="tick middle")
        for index, edge in list(enumerate(edges))[::every]
    ]
    return _figure(label, *parts, _x_name("tokens in an example"))


def intervals(label: str, rows: Sequence[tuple[str, float, float, float]]) -> Html:
    """Shares with their intervals, one a line: (name, low, share, high), on an axis from 0 to 100 %."""
    axis, height = Axis(0, 1, 92, 384), 30 * len(rows)
    parts: list[Html] = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = _r(axis.at(share))
        parts.append(tag("line", x1=x, x2=x, y1=4, y2=height + 6, class_="grid"))
        parts.append(tag("text", whole_percent(share), x=x, y=height + 21, class_="tick middle"))
    for index, (name, low, share, high) in enumerate(rows):
        y, look = 20 + 30 * index, "after" if index else "before"
        note = tag("title", f"{name}: {percent(share)}, 95 % interval {percent(low)} to {percent(high)}")
        parts += [
            tag("text", name, x=84, y=y + 4, class_="tick end"),
            tag("line", x1=_r(axis.at(low)), x2=_r(axis.at(high)), y1=y, y2=y, class_=f"whisker {look}"),
            tag("circle", note, cx=_r(axis.at(share)), cy=y, r=5.5, class_=f"dot {look}"),
        ]
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height + 28}", role="img", aria_label=label, class_="plot")


def _figure(label: str, *parts: Html) -> Html:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="plot")


def _height(point: Point) -> float:
    return point[1]


def _r(value: float) -> str:
    """A coordinate with one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def _y_axis(series: Sequence[Series], bounds: tuple[float, float] | None) -> Axis:
    """The range of all values with some air; logarithmic where they differ by more than `LOG_RATIO`."""
    ys = [y for one in series for _, y in one.points] or [0.0]
    low, high = bounds or (min(ys), max(ys))
    if bounds is None and low > 0 and high / low > LOG_RATIO:
        return Axis(low / 1.2, high * 1.2, BOTTOM, TOP, log=True)
    air = (high - low) * 0.06 or abs(high) * 0.5 or 1.0
    floor = 0.0 if low >= 0 and low < 0.35 * high else low - air
    return Axis(floor if bounds is None else low, high + air, BOTTOM, TOP)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in the range, with 2 and 5 times them where they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1, 3) if len(powers) <= 4 else (1,)
    values = [float(f"{factor}e{power}") for power in powers for factor in factors]
    return [value for value in values if low <= value <= high]


def _grid(axis: Axis, form: Format) -> Html:
    """Horizontal lines with their values."""
    parts = []
    for value in axis.ticks():
        y = axis.at(value)
        parts.append(tag("line", x1=LEFT, x2=RIGHT, y1=_r(y), y2=_r(y), class_="grid"))
        parts.append(tag("text", form(value), x=LEFT - 7, y=_r(y + 4), class_="tick end"))
    scale = tag("text", "logarithmic", x=LEFT, y=BOTTOM + 32, class_="tick") if axis.log else None
    return tag("g", *parts, scale)


def _steps(axis: Axis) -> Html:
    """The horizontal axis: whole steps."""
    parts = [tag("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis")]
    for step in axis.ticks():
        if step == int(step):
            x = _r(axis.at(step))
            parts.append(tag("line", x1=x, x2=x, y1=BOTTOM, y2=BOTTOM + 4, class_="axis"))
            parts.append(tag("text", compact(step), x=x, y=BOTTOM + 16, class_="tick middle"))
    return tag("g", *parts, _x_name("step"))


def _x_name(name: str) -> Html:
    return tag("text", name, x=RIGHT, y=BOTTOM + 32, class_="tick end")


def _mark(axis: Axis, step: float) -> Html:
    x = _r(axis.at(step))
    return tag("line", x1=x, x2=x, y1=TOP, y2=BOTTOM, class_="mark")


def _curve(series: Series, x_axis: Axis, y_axis: Axis) -> Html:
    """A line through the points; few points are dotted too."""
    places = [(_r(x_axis.at(x)), _r(y_axis.at(y))) for x, y in downsample(series.points)]
    line = tag("polyline", points=" ".join(f"{x},{y}" for x, y in places), class_=f"curve {series.look}")
    dotted = len(places) <= 40 and series.look != "raw"
    dots = [tag("circle", cx=x, cy=y, r=2.6, class_=f"point {series.look}") for x, y in places] if dotted else []
    return tag("g", line, *dots)


def _readings(series: Sequence[Series], x_axis: Axis, y_axis: Axis, form: Format) -> list[Html]:
    """Invisible columns side by side that say, when pointed at, what every curve is there."""
    places = _reading_places(series)
    middles = ((x_axis.at(left) + x_axis.at(right)) / 2 for left, right in itertools.pairwise(places))
    borders = [x_axis.start, *middles, RIGHT]
    values = [dict(one.points) for one in series]
    found = []
    for x, (left, right) in zip(places, itertools.pairwise(borders), strict=False):
        here = [(one.name, by_step[x]) for one, by_step in zip(series, values, strict=True) if x in by_step]
        note = tag("title", "\n".join([f"step {x:,g}", *(f"{name} {form(y)}" for name, y in here)]))
        spots = " ".join(_r(y_axis.at(y)) for _, y in here)
        found.append(tag(
            "rect", note, x=_r(left), y=TOP, width=_r(max(right - left, 0.1)), height=BOTTOM - TOP, class_="read",
            data_x=_r(x_axis.at(x)), data_y=spots,
        ))  # fmt: skip
    return found


def _reading_places(series: Sequence[Series]) -> list[float]:
    """Steps spread evenly over the figure, at most `MOST_READINGS` in all, the sparse curves' first."""
    chosen: set[float] = set()
    for one in sorted(series, key=lambda one: len(one.points)):
        xs, room = [x for x, _ in one.points], MOST_READINGS - len(chosen)
        every = max(1, math.ceil(len(xs) / room)) if room > 0 else len(xs) + 1
        chosen.update(xs[::every] if room > 0 else ())
    return sorted(chosen)
