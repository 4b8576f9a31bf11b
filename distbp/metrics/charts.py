"""Charts as inline SVG: lines, stacked areas, and strips whose colour is a value.

A chart is drawn for a width of 400 units and shown at 340 to 640 pixels, so that its letters keep a size that
can be read both on a telephone and on a wide screen.  Legends are HTML beside the drawing, which wraps by
itself.  A curve has at most `MOST_POINTS` points: the means of runs of neighbours, with a pale band from the
least to the greatest of each run.  Colours are variables of the page, for light and dark.

Nothing here knows what a run is.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from distbp.metrics.words import compact, figure

__all__ = ["Curve", "Point", "chart", "decimated", "stacked", "strip", "ticks"]

MOST_POINTS = 240
MOST_CELLS = 120

_WIDTH, _HEIGHT = 400.0, 230.0
_TOP, _BOTTOM, _RIGHT = 10.0, 38.0, 12.0
_LETTER = 6.3
"""Width of a digit at the size of the labels."""

_LOG_FROM = 30.0
"""Greatest by least value from which an axis is logarithmic."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A named row of points, in the order of x."""

    name: str
    points: Sequence[Point]
    color: int = 0


@dataclass(frozen=True)
class _Axis:
    """Maps values to places on the drawing."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return where a value lies."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return self.first + (at - low) / (high - low) * (self.last - self.first)

    def data(self, letter: str) -> str:
        """Return the axis as attributes, from which the page finds the value at a place."""
        return f' data-{letter}="{self.low!r} {self.high!r} {self.first:g} {self.last:g} {int(self.log)}"'


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_last: float,
    x_label: str,
    unit: str = "",
    zero: bool = False,
    linear: bool = False,
    note: str = "",
) -> str:
    """Return a figure with the curves that have points; empty if none has.

    The horizontal axis goes from 0 to `x_last`, so that charts of one run can be compared by eye.  `unit`
    stands behind the title; `zero` makes the vertical axis begin at zero, `linear` keeps it from being
    logarithmic where values differ much.
    """
    finite = [_finite(curve) for curve in curves]
    lost = sum(len(curve.points) for curve in curves) - sum(len(curve.points) for curve in finite)
    shown = [curve for curve in finite if curve.points]
    if not shown:
        return ""
    values = [y for curve in shown for _, y in curve.points]
    log = not (zero or linear) and min(values) > 0 and max(values) / min(values) > _LOG_FROM
    marks = _log_ticks(min(values), max(values)) if log else ticks(*_span(values, zero))
    left = _room(marks)
    low, high = min([*marks, *values]), max([*marks, *values])
    y_axis = _Axis(low, high, _HEIGHT - _BOTTOM, _TOP, log)
    x_axis = _x_axis(x_last, left)
    drawn = "".join(_draw(curve, x_axis, y_axis) for curve in shown)
    frame = _frame(x_axis, y_axis, marks, x_label)
    what = "value that is not finite is" if lost == 1 else "values that are not finite are"
    lost_note = f"{lost} {what} left out" if lost else ""
    legend = "".join(_legend(curve.name, curve.color, figure(curve.points[-1][1])) for curve in shown)
    return _figure(
        title,
        unit,
        legend,
        frame + drawn,
        x_axis.data("x") + y_axis.data("y"),
        "; ".join(filter(None, (note, lost_note))),
    )


def stacked(title: str, curves: Sequence[Curve], *, x_last: float, x_label: str, unit: str = "") -> str:
    """Return a figure in which curves with the same x lie upon each other; empty without two points."""
    if not curves or len(curves[0].points) < 2:
        return ""
    rows = [[point for point, *_ in decimated(curve.points)] for curve in curves]
    levels: list[list[Point]] = [[(x, 0.0) for x, _ in rows[0]]]
    for row in rows:
        levels.append([(x, below + max(0.0, y)) for (x, y), (_, below) in zip(row, levels[-1], strict=True)])
    marks = ticks(0.0, max(y for _, y in levels[-1]) or 1.0)
    left = _room(marks)
    y_axis = _Axis(0.0, max(marks[-1], *(y for _, y in levels[-1])), _HEIGHT - _BOTTOM, _TOP)
    x_axis = _x_axis(x_last, left)
    drawn = ""
    for number, curve in enumerate(curves):
        outline = [*levels[number + 1], *reversed(levels[number])]
        drawn += f'<path class="area c{curve.color}" d="{_path(outline, x_axis, y_axis)}Z"/>'
    means = [sum(y for _, y in curve.points) / len(curve.points) for curve in curves]
    legend = "".join(
        _legend(curve.name, curve.color, figure(mean)) for curve, mean in zip(curves, means, strict=True)
    )
    return _figure(title, unit, legend, drawn + _frame(x_axis, y_axis, marks, x_label), "", "")


def strip(values: Sequence[float | None], low: float, high: float) -> str:
    """Return a row of cells, dark where a value is near `low`, bright near `high`, both logarithms."""
    step = max(1, -(-len(values) // MOST_CELLS))
    cells = [_middle(values[start : start + step]) for start in range(0, len(values), step)]
    drawn = ""
    for number, value in enumerate(cells):
        if value is None:
            continue
        position = (value - low) / (high - low) if high > low else 0.5
        drawn += f'<rect x="{number}" width="1.05" height="1" fill="{_color(position)}"/>'
    return (
        f'<svg class="strip" viewBox="0 0 {max(1, len(cells))} 1" preserveAspectRatio="none" '
        f'aria-hidden="true">{drawn}</svg>'
    )


def scale_bar() -> str:
    """Return the colours of `strip` from low to high."""
    stops = ", ".join(_color(place / 4) for place in range(5))
    return f'<span class="scale" style="background:linear-gradient(90deg, {stops})"></span>'


def decimated(points: Sequence[Point], most: int = MOST_POINTS) -> list[tuple[Point, float, float]]:
    """Return at most `most` points, means of runs of neighbours, each with the least and greatest y."""
    step = -(-len(points) // most) if len(points) > most else 1
    found = []
    for start in range(0, len(points), step):
        run = points[start : start + step]
        values = [y for _, y in run]
        mean = (sum(x for x, _ in run) / len(run), sum(values) / len(values))
        found.append((mean, min(values), max(values)))
    return found


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers, 1, 2 or 5 times a power of ten apart, that enclose low and high."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 5, 10) if factor * power >= raw), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12 - math.floor(math.log10(step))) for number in range(first, last + 1)]


def _span(values: Sequence[float], zero: bool) -> Point:
    """Return the range of a linear axis."""
    low, high = min(values), max(values)
    if zero:
        return min(0.0, low), max(high, 0.0)
    room = max(abs(low), abs(high)) * 0.01 or 1.0
    if high - low < room:  # A curve that hardly moves shall look like one.
        return low - room, high + room
    return low, high


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten that enclose low and high, not too many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, -(-(last - first) // 5))
    last = first + -(-(last - first) // step) * step
    return [10.0**power for power in range(first, last + 1, step)]


def _room(marks: Sequence[float]) -> float:
    """Return how far right the drawing begins, beside the labels of its marks; an M is wider than a digit."""
    labels = [compact(mark) for mark in marks]
    return 10 + _LETTER * max(len(label) + 0.7 * label.endswith(("M", "G")) for label in labels)


def _x_axis(last: float, left: float) -> _Axis:
    """Return the axis of steps."""
    return _Axis(0.0, max(1.0, last), left, _WIDTH - _RIGHT)


def _finite(curve: Curve) -> Curve:
    """Return the curve without values that are not finite."""
    return Curve(curve.name, [point for point in curve.points if math.isfinite(point[1])], curve.color)


def _draw(curve: Curve, x_axis: _Axis, y_axis: _Axis) -> str:
    """Return the line of a curve, with its band or its points."""
    found = decimated(curve.points)
    line = [point for point, _, _ in found]
    drawn = ""
    if len(curve.points) > MOST_POINTS:
        upper = [(x, high) for (x, _), _, high in found]
        lower = [(x, low) for (x, _), low, _ in reversed(found)]
        drawn += f'<path class="band c{curve.color}" d="{_path(upper + lower, x_axis, y_axis)}Z"/>'
    name = html.escape(curve.name, quote=True)
    drawn += f'<path class="line c{curve.color}" data-name="{name}" d="{_path(line, x_axis, y_axis)}"/>'
    if len(line) <= 30:
        drawn += "".join(
            f'<circle class="c{curve.color}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="2.2"/>'
            for x, y in line
        )
    return drawn


def _path(points: Sequence[Point], x_axis: _Axis, y_axis: _Axis) -> str:
    """Return the points as the data of a path."""
    return "M" + "L".join(f"{x_axis(x):.1f} {y_axis(y):.1f}" for x, y in points)


def _frame(x_axis: _Axis, y_axis: _Axis, marks: Sequence[float], x_label: str) -> str:
    """Return grid lines, labels of both axes, and the name of the horizontal one."""
    left, right, bottom = x_axis.first, x_axis.last, _HEIGHT - _BOTTOM
    drawn = ""
    for mark in marks:
        y = y_axis(mark)
        drawn += f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        drawn += f'<text x="{left - 5:.1f}" y="{y + 3.8:.1f}" text-anchor="end">{compact(mark)}</text>'
    edge = 0.0
    for mark in ticks(x_axis.low, x_axis.high, 5):
        if mark > x_axis.high or mark != round(mark):  # There is no half of a step.
            continue
        x, label = x_axis(mark), compact(mark)
        half = len(label) * _LETTER / 2
        drawn += f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}"/>'
        if x - half < edge or x + half > _WIDTH:
            continue
        edge = x + half + 6
        drawn += f'<text x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{label}</text>'
    middle = (left + right) / 2
    drawn += (
        f'<text class="name" x="{middle:.1f}" y="{_HEIGHT - 5:.1f}" text-anchor="middle">{x_label}</text>'
    )
    return drawn


def _legend(name: str, color: int, value: str) -> str:
    """Return one entry of a legend."""
    return f'<span class="key"><i class="c{color}"></i>{html.escape(name)} <b>{value}</b></span> '


def _figure(title: str, unit: str, legend: str, drawing: str, axes: str, note: str) -> str:
    """Return a figure: title, legend, drawing, and where the page shows the values under a pointer."""
    behind = f" <small>{html.escape(unit)}</small>" if unit else ""
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    label = html.escape(title, quote=True)
    return (
        f'<figure class="chart"><figcaption><strong>{html.escape(title)}</strong>{behind}'
        f'<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{label}"{axes}>{drawing}</svg>'
        f"<output></output>{below}</figure>"
    )


def _middle(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that there are."""
    there = [value for value in values if value is not None and math.isfinite(value)]
    return sum(there) / len(there) if there else None


_COLORS = ((48, 18, 89), (62, 73, 137), (38, 130, 142), (90, 200, 100), (250, 220, 60))


def _color(position: float) -> str:
    """Return a colour from dark violet (0) over green to yellow (1), whose lightness rises evenly."""
    place = min(max(position, 0.0), 1.0) * (len(_COLORS) - 1)
    index = min(int(place), len(_COLORS) - 2)
    parts = zip(_COLORS[index], _COLORS[index + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in parts)
    return f"#{red:02x}{green:02x}{blue:02x}"
