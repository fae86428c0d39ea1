"""Charts as inline SVG, coloured by the page's custom properties so that they follow light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

from slotlab.report.charts import Chart, Series

WIDTH, HEIGHT = 380, 214
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34

Scale = Callable[[float], float]


def draw(chart: Chart) -> str:
    """One ``<svg>``; its points are in ``data-chart`` for the page's tooltips."""
    xs = [x for line in chart.series for x in line.x if math.isfinite(x) and (x > 0 or not chart.log_x)]
    ys = [y for line in chart.series for y in (*line.y, *line.low, *line.high)]
    ys = [y for y in ys if math.isfinite(y) and (y > 0 or not chart.log_y)]
    if not xs or not ys:
        return '<p class="empty">No values yet.</p>'
    x0, x1 = widen(min(xs), max(xs), chart.log_x)
    low = chart.y_min if chart.y_min is not None else min(ys)
    high = chart.y_max if chart.y_max is not None else max(ys)
    padding = 0.0 if chart.log_y else 0.06 * (high - low)
    y0, y1 = widen(
        low if chart.y_min is not None else low - padding, high if chart.y_max is not None else high + padding,
        chart.log_y,
    )  # fmt: skip
    x_of = scale(x0, x1, LEFT, WIDTH - RIGHT, chart.log_x)
    y_of = scale(y0, y1, HEIGHT - BOTTOM, TOP, chart.log_y)
    data = json.dumps(points(chart, x_of, y_of), separators=(",", ":"))
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(chart.summary)}" data-chart="{escape(data)}">'
    ]
    y_ticks, x_ticks = ticks(y0, y1, 5, chart.log_y), ticks(x0, x1, 6, chart.log_x)
    for value, label in zip(y_ticks, labels(y_ticks), strict=True):
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for value, label in zip(x_ticks, labels(x_ticks), strict=True):
        x = x_of(value)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="axis-label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(chart.x_label)}</text>"
    )
    for line in chart.series:
        parts.append(f'<g style="--c:var(--line-{line.colour % 7})" class="dash-{line.colour // 7 % 3}">')
        if line.low:
            parts.append(f'<path class="band" d="{band(line, x_of, y_of)}"/>')
        parts.append(f'<path class="line" d="{path(line.x, line.y, x_of, y_of)}"/>')
        known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y) and drawable(x, y, chart)]
        if known:
            parts.append(f'<circle class="end" cx="{x_of(known[-1][0]):.1f}" cy="{y_of(known[-1][1]):.1f}" r="2.6"/>')
        parts.append("</g>")
    parts.append('<g class="hover"></g></svg>')
    return "".join(parts)


def points(chart: Chart, x_of: Scale, y_of: Scale) -> dict[str, object]:
    """What the tooltip shows: for every line its name, and position and value of its points."""
    return {
        "x": chart.x_label,
        "box": [LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM],
        "lines": [
            {
                "label": line.label,
                "colour": line.colour % 7,
                "points": [
                    [round(x_of(x), 1), round(y_of(y), 1), float(f"{x:.6g}"), float(f"{y:.5g}")]
                    for x, y in zip(line.x, line.y, strict=True)
                    if math.isfinite(y) and drawable(x, y, chart)
                ],
            }
            for line in chart.series
        ],
    }


def drawable(x: float, y: float, chart: Chart) -> bool:
    """Whether a point has a place on the axes."""
    return (x > 0 or not chart.log_x) and (y > 0 or not chart.log_y)


def widen(low: float, high: float, log: bool) -> tuple[float, float]:
    """A range that is never empty."""
    if high > low:
        return low, high
    if log:
        return low / 1.5, high * 1.5
    return low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)


def scale(low: float, high: float, start: float, end: float, log: bool) -> Scale:
    """From values to pixels; what has no logarithm goes to the low end."""
    if log:
        a, b = math.log(low), math.log(high)
        return lambda v: start + (end - start) * ((math.log(max(v, low * 1e-3)) - a) / (b - a))
    return lambda v: start + (end - start) * (v - low) / (high - low)


def ticks(low: float, high: float, count: int, log: bool) -> list[float]:
    """Round values inside a range."""
    if log and high / low >= 10:
        decades = math.log10(high / low)
        factors = (1, 2, 5) if decades < 2.5 else (1,)
        every = max(1, math.ceil(decades / count))
        powers = [e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) if e % every == 0]
        return [f * 10.0**e for e in powers for f in factors if low <= f * 10.0**e <= high]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Ticks in as few digits as tell them apart."""
    gap = min((b - a for a, b in pairwise(values)), default=max(map(abs, values), default=0.0))
    for digits in range(1, 16):
        if all(abs(float(f"{value:.{digits}g}") - value) <= 1e-3 * gap for value in values):
            return [short(value, digits) for value in values]
    return [repr(value) for value in values]


def short(value: float, digits: int) -> str:
    """A number of so many digits, with k and M for thousands and millions."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.{digits}g}M"
    if size >= 1e4:
        return f"{value / 1e3:.{max(digits, 3)}g}k"
    if size < 1e-12:
        return "0"
    if size < 1e-3:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{float(f'{value:.{digits}g}'):.{max(digits, 6)}g}"


def path(x: Sequence[float], y: Sequence[float], x_of: Scale, y_of: Scale) -> str:
    """A polyline that breaks at NaN."""
    parts, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            parts.append(f"{pen}{x_of(a):.1f} {y_of(b):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def band(line: Series, x_of: Scale, y_of: Scale) -> str:
    """The closed outline between the low and the high line."""
    known = [(x, a, b) for x, a, b in zip(line.x, line.low, line.high, strict=True) if math.isfinite(a + b)]
    if not known:
        return ""
    there = "L".join(f"{x_of(x):.1f} {y_of(b):.1f}" for x, _, b in known)
    back = "L".join(f"{x_of(x):.1f} {y_of(a):.1f}" for x, a, _ in reversed(known))
    return f"M{there}L{back}Z"
