"""Charts as inline SVG, drawn from numbers alone. Series differ in colour, marker and dash; colours are the page's.

Sizes are in the units of a drawing 460 wide, about a phone's pixels, so that its text can be read on one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from whisper_at_cli.extract.html import escape

WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 40
SERIES = 7  # colours before they repeat
DASHES = ("", "6 3", "2 3", "8 3 2 3")
HATCH = (
    '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line class="hatch" x1="0" y1="0" x2="0" y2="5"/></pattern></defs>'
)
LABEL_HEIGHT, LABEL_CHARACTER = 11, 5.6


@dataclass(frozen=True)
class Curve:
    """A line with a band from `low` to `high`, where it has one. Points without a value are left out."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    level: float | None = None  # a horizontal line of its own, as of clean speech

    @property
    def band(self) -> list[tuple[float, float]]:
        """Lower and upper end at each point."""
        return list(zip(self.low or self.y, self.high or self.y, strict=True))


@dataclass(frozen=True)
class Frame:
    """Axes: what lies where."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_label: str
    y_label: str

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Of a point, in the drawing."""
        (x0, x1), (y0, y1) = self.x, self.y
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def draw(self) -> str:
        parts = []
        for tick in self.y_ticks:
            _, y = self.at(self.x[0], tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
        bottom = HEIGHT - BOTTOM
        for tick in self.x_ticks:
            x, _ = self.at(tick, self.y[0])
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_number(tick)}</text>'
            )
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        label = f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(self.x_label)}</text>'
        height = (TOP + HEIGHT - BOTTOM) / 2
        turned = f'transform="rotate(-90 12 {height})"'
        parts += [
            label,
            f'<text class="label" x="12" y="{height}" text-anchor="middle" {turned}>{escape(self.y_label)}</text>',
        ]
        return "".join(parts)


def line_chart(
    curves: list[Curve], *, x_ticks: Sequence[float], x_label: str, y_label: str, about: str, falling_x: bool = False
) -> str:
    """Curves with their bands, in percent, with a legend. `falling_x`: the largest x is at the left."""
    low = min(ends[0] for curve in curves for ends in curve.band)
    high = max(ends[1] for curve in curves for ends in curve.band)
    levels = [curve.level for curve in curves if curve.level is not None]
    y_ticks = nice_ticks(min([low, *levels]), max([high, *levels]))
    every_x = [x for curve in curves for x in curve.x]
    margin = 0.04 * max(1.0, max(every_x) - min(every_x))
    ends = (min(every_x) - margin, max(every_x) + margin)
    frame = Frame(ends[::-1] if falling_x else ends, (y_ticks[0], y_ticks[-1]), x_ticks, y_ticks, x_label, y_label)
    drawn = "".join(_curve(frame, curve, number) for number, curve in enumerate(curves))
    return _svg(frame.draw() + drawn, about) + _legend([curve.name for curve in curves])


def _curve(frame: Frame, curve: Curve, number: int) -> str:
    colour = f"s{number % SERIES + 1}"
    points = [frame.at(x, y) for x, y in zip(curve.x, curve.y, strict=True)]
    upper = [frame.at(x, ends[1]) for x, ends in zip(curve.x, curve.band, strict=True)]
    lower = [frame.at(x, ends[0]) for x, ends in zip(curve.x, curve.band, strict=True)]
    parts = []
    wide = any(high > low for low, high in curve.band)
    if wide and len(points) > 1:
        parts.append(f'<polygon class="band {colour}" points="{_points(upper + lower[::-1])}"/>')
    elif wide:
        (x, y0), (_, y1) = upper[0], lower[0]
        parts.append(f'<line class="line {colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{y0:.1f}" y2="{y1:.1f}"/>')
    if curve.level is not None:
        _, y = frame.at(0, curve.level)
        parts.append(f'<line class="level {colour}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    dash = DASHES[number % len(DASHES)]
    parts.append(f'<polyline class="line {colour}" stroke-dasharray="{dash}" points="{_points(points)}"/>')
    for (px, py), x, y, (low, high) in zip(points, curve.x, curve.y, curve.band, strict=True):
        said = f"{curve.name}: {y:.1f} %" + (f" ({low:.1f} to {high:.1f})" if high > low else "") + f" at {_number(x)}"
        parts.append(f"<g>{_marker(px, py, number)}<title>{escape(said)}</title></g>")
    return "".join(parts)


def bar_chart(
    counts: dict[int, int], *, x_label: str, y_label: str, about: str, tied: dict[int, int] | None = None,
    intervals: dict[int, tuple[float, float]] | None = None,
) -> str:  # fmt: skip
    """A bar for each whole number from the first to the last. The part that is `tied` stands on top, hatched as in
    Figure 3; `intervals` are whiskers."""
    first, last = min(counts), max(counts)
    most = max([*counts.values(), *(high for _, high in (intervals or {}).values())])
    y_ticks = [tick for tick in nice_ticks(0, most) if tick == int(tick)]
    top = max(most * 1.08, y_ticks[-1])
    frame = Frame((first - 0.6, last + 0.6), (0, top), whole_ticks(first, last), y_ticks, x_label, y_label)
    parts = [HATCH] if any((tied or {}).values()) else []
    for number, count in counts.items():
        shared = (tied or {}).get(number, 0)
        said = f"{count} at {number}" + (f", {shared} of them as good in a higher layer" if shared else "")
        parts.append(_bar(frame, number, 0, count - shared, "bar s1", said))
        if shared:
            parts.append(_bar(frame, number, count - shared, count, "bar tied s1", said))
        if number in (intervals or {}):
            assert intervals is not None
            (x, low), (_, high) = (frame.at(number, end) for end in intervals[number])
            ends = f"{intervals[number][0]:g} to {intervals[number][1]:g}"
            parts.append(
                f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} '
                f'{high:.1f}h8"><title>{escape(f"{count} at {number}, 95 % interval {ends}")}</title></path>'
            )
        elif count and last - first < 16:
            x, y = frame.at(number, count)
            parts.append(f'<text class="value" x="{x:.1f}" y="{y - 4:.1f}" text-anchor="middle">{count}</text>')
    return _svg(frame.draw() + "".join(parts), about)


def _bar(frame: Frame, number: int, low: float, high: float, kind: str, said: str) -> str:
    (left, top), (right, bottom) = frame.at(number - 0.38, high), frame.at(number + 0.38, low)
    return (
        f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}">'
        f"<title>{escape(said)}</title></rect>"
    )


def scatter_chart(
    points: dict[str, tuple[float, float]], *, x_label: str, y_label: str, about: str,
    bars: dict[str, tuple[Sequence[float] | None, Sequence[float] | None]] | None = None,
) -> str:  # fmt: skip
    """A dot per name, as many names beside their dots as find room, and the line of least squares over all. `bars` are
    intervals across and up, where there are any."""
    xs, ys = [x for x, _ in points.values()], [y for _, y in points.values()]
    bars = bars or {}
    x_ticks, y_ticks = (
        nice_ticks(min(ends), max(ends))
        for ends in (
            [*values, *(end for pair in bars.values() for end in pair[side] or ())]
            for side, values in enumerate((xs, ys))
        )
    )
    frame = Frame((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), x_ticks, y_ticks, x_label, y_label)
    parts = [frame.draw()]
    fitted = fit_line(xs, ys)
    if fitted:
        slope, offset, _ = fitted
        line = [_clipped(frame, x, slope, offset) for x in (min(xs), max(xs))]
        parts.append(f'<polyline class="line s7" stroke-dasharray="6 3" points="{_points(line)}"/>')
    parts += [_cross(frame, points[name], *ends) for name, ends in bars.items()]
    placed = [(x - 4, y - 4, x + 4, y + 4) for x, y in (frame.at(*point) for point in points.values())]
    for name, point in points.items():
        x, y = frame.at(*point)
        said = f"{name}: {_number(round(point[0], 1))}, {_number(round(point[1], 1))}"
        parts.append(f'<circle class="dot s1" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(said)}</title></circle>')
        parts.append(_beside(x, y, name, placed))
    return _svg("".join(parts), about)


def _cross(frame: Frame, point: tuple[float, float], across: Sequence[float] | None, up: Sequence[float] | None) -> str:
    """The intervals of a dot."""
    lines = [((end, point[1]) for end in across or ()), ((point[0], end) for end in up or ())]
    return "".join(
        f'<polyline class="cross" points="{_points([frame.at(*end) for end in ends])}"/>'
        for ends in map(list, lines)
        if ends
    )


def _beside(x: float, y: float, name: str, placed: list[tuple[float, float, float, float]]) -> str:
    """The name at the first side of its dot where nothing is yet; nothing where there is no room."""
    length = LABEL_CHARACTER * len(name)
    for dx, dy, anchor in ((6, 3.5, "start"), (-6, 3.5, "end"), (0, -7, "middle"), (0, 14, "middle")):
        left = x + dx - {"start": 0, "middle": length / 2, "end": length}[anchor]
        box = (left, y + dy - LABEL_HEIGHT + 2, left + length, y + dy + 2)
        inside = box[0] > LEFT and box[2] < WIDTH and box[1] > 0 and box[3] < HEIGHT - BOTTOM
        own = (x - 4, y - 4, x + 4, y + 4)
        if inside and not any(_overlap(box, other) for other in placed if other != own):
            placed.append(box)
            return f'<text class="name" x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
    return ""


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _clipped(frame: Frame, x: float, slope: float, offset: float) -> tuple[float, float]:
    return frame.at(x, min(max(slope * x + offset, min(frame.y)), max(frame.y)))


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float] | None:
    """Slope and offset by least squares, and Pearson's r; None where the points leave one of them undefined."""
    n = len(xs)
    if n < 3:
        return None
    mean_x, mean_y = sum(xs) / n, sum(ys) / n
    sxx, syy = sum((x - mean_x) ** 2 for x in xs), sum((y - mean_y) ** 2 for y in ys)
    sxy = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    if not (sxx > 0 and syy > 0):
        return None
    return sxy / sxx, mean_y - sxy / sxx * mean_x, sxy / math.sqrt(sxx * syy)


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose the range."""
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough - 1e-12)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def whole_ticks(first: int, last: int) -> list[int]:
    """The first and then round whole numbers, at most nine."""
    if last - first < 9:
        return list(range(first, last + 1))
    step = next(step for step in (2, 4, 5, 8, 10, 20, 50, 100, 1000) if (last - first) // step < 9)
    return [first, *(number for number in range(step, last + 1, step) if number > first)]


def _marker(x: float, y: float, number: int) -> str:
    """A shape of its own for each of four series in a row."""
    shape, colour = number % 4, f'class="dot s{number % SERIES + 1}"'
    if shape == 0:
        return f'<circle {colour} cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
    if shape == 1:
        return f'<rect {colour} x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4"/>'
    corners = {2: ((0, -4.4), (4, 3), (-4, 3)), 3: ((0, -4.6), (4.6, 0), (0, 4.6), (-4.6, 0))}[shape]
    return f'<polygon {colour} points="{_points([(x + dx, y + dy) for dx, dy in corners])}"/>'


def _legend(names: list[str]) -> str:
    entries = "".join(
        f'<li><svg class="swatch" viewBox="0 0 30 12" aria-hidden="true"><polyline class="line s{n % SERIES + 1}" '
        f'stroke-dasharray="{DASHES[n % len(DASHES)]}" points="0,6 30,6"/>{_marker(15, 6, n)}</svg>{escape(name)}</li>'
        for n, name in enumerate(names)
    )
    return f'<ul class="legend">{entries}</ul>'


def _svg(content: str, about: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}">{content}</svg>'


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _number(value: float) -> str:
    """Short, with a true minus."""
    return f"{value:g}".replace("-", "−")
