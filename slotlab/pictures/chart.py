"""Charts as data, and their drawing.

A chart is laid out once, as SVG elements. A page uses these with its custom properties as colours, so that charts
follow light and dark mode; a file uses the palette's colours. For PNG and PDF, matplotlib paints the same elements.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, tostring

from featcache.errors import UsageError
from featcache.store.durable import write_output
from featcache.text import printable
from slotlab.pictures import palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 380, 214
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34  # margins around the plot, for ticks and the axis title
DASHES = ("none", "6 4", "2 4")  # dash patterns of lines that share a colour
# Layout of files, which also show each chart's title.
COLUMNS, GAP, MARGIN = 3, 28, 14
TITLE, LINE = 18, 15  # heights of a title, and of a line of text below it
WHY_CHARACTERS = 58  # characters of such a line
DPI = 150

Paint = Callable[[str], str]  # the name of a colour -> an SVG colour
Position = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line, with an optional band around it."""

    colour: int  # position in the palette of lines
    label: str
    x: Sequence[float]
    y: Sequence[float]  # NaN breaks the line
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dot: float | None = None  # the point nearest this x is marked; default: the last point


@dataclass(frozen=True)
class Chart:
    """Lines over one x axis."""

    key: str
    title: str
    why: str
    x_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    y_min: float | None = None
    y_max: float | None = None

    @property
    def summary(self) -> str:
        """The chart in words, for a reader who cannot see it."""
        parts = []
        for line in self.series:
            known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
            if known:
                (x0, y0), (x1, y1) = known[0], known[-1]
                parts.append(f"{line.label}: from {y0:.3g} at {x0:g} to {y1:.3g} at {x1:g}")
        return f"{self.title} by {self.x_label}. " + "; ".join(parts)

    def points(self, line: Series) -> list[Position]:
        """The points of a line that the axes can show."""
        found = zip(line.x, line.y, strict=True)
        return [
            (x, y) for x, y in found if math.isfinite(y) and (x > 0 or not self.log_x) and (y > 0 or not self.log_y)
        ]


@dataclass(frozen=True)
class Axis:
    """A range of values, never empty, and the pixels it covers."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(cls, low: float, high: float, start: float, end: float, log: bool) -> Axis:
        """The axis over ``low`` to ``high``, widened if they are equal."""
        if high <= low:
            wider = (low / 1.5, high * 1.5) if log else (low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5))
            low, high = wider
        return cls(low, high, start, end, log)

    def __call__(self, value: float) -> float:
        """The pixel of a value; values without a logarithm go beyond the low end."""
        of = math.log if self.log else float
        value = max(value, self.low * 1e-3) if self.log else value
        return self.start + (self.end - self.start) * (of(value) - of(self.low)) / (of(self.high) - of(self.low))

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """Pixels and texts of at most about ``count`` round values."""
        values = ticks(self.low, self.high, count, self.log)
        return [(self(value), text) for value, text in zip(values, labels(values), strict=True)]


def axes(chart: Chart, left: float, top: float) -> tuple[Axis, Axis] | None:
    """The x and y axes of a chart whose upper left corner is at (left, top); None for a chart without values."""
    xs = [x for line in chart.series for x in line.x if math.isfinite(x) and (x > 0 or not chart.log_x)]
    ys = [y for line in chart.series for y in (*line.y, *line.low, *line.high)]
    ys = [y for y in ys if math.isfinite(y) and (y > 0 or not chart.log_y)]
    if not xs or not ys:
        return None
    low = chart.y_min if chart.y_min is not None else min(ys)
    high = chart.y_max if chart.y_max is not None else max(ys)
    padding = 0.0 if chart.log_y else 0.06 * (high - low)
    low -= padding if chart.y_min is None else 0
    high += padding if chart.y_max is None else 0
    return (
        Axis.over(min(xs), max(xs), left + LEFT, left + WIDTH - RIGHT, chart.log_x),
        Axis.over(low, high, top + HEIGHT - BOTTOM, top + TOP, chart.log_y),
    )


def draw(chart: Chart, paint: Paint, left: float = 0, top: float = 0) -> list[Element]:
    """The chart's grid, ticks and lines as ``path``, ``circle`` and ``text`` elements."""
    found = axes(chart, left, top)
    if found is None:
        return [_text("No values yet.", left + LEFT, top + HEIGHT / 2, paint("ink-3"))]
    x, y = found
    marks = []
    for at, text in y.ticks(5):
        marks.append(_path([[(x.start, at), (x.end, at)]], {"stroke": paint("rule")}))
        marks.append(_text(text, x.start - 7, at + 3.5, paint("ink-3"), "end"))
    marks += [_text(text, at, y.start + 15, paint("ink-3"), "middle") for at, text in x.ticks(6)]
    marks.append(_path([[(x.start, y.start), (x.end, y.start)]], {"stroke": paint("rule-2")}))
    marks.append(_text(chart.x_label, (x.start + x.end) / 2, y.start + 30, paint("ink-3"), "middle"))
    for line in chart.series:
        pen = _pen(line.colour, paint)
        band = [p for p in zip(line.x, line.low, line.high, strict=False) if math.isfinite(p[1] + p[2])]
        if band:
            outline = [(x(a), y(high)) for a, _, high in band] + [(x(a), y(low)) for a, low, _ in reversed(band)]
            marks.append(_path([outline], {"fill": pen["stroke"], "fill-opacity": "0.12"}))
        pieces: list[list[Position]] = [[]]
        for a, b in zip(line.x, line.y, strict=True):
            if math.isfinite(b):
                pieces[-1].append((x(a), y(b)))
            else:
                pieces.append([])
        marks.append(_path(pieces, pen))
        if known := chart.points(line):
            dot = known[-1][0] if line.dot is None else line.dot
            a, b = min(known, key=lambda point: abs(point[0] - dot))
            marks.append(Element("circle", cx=f"{x(a):.1f}", cy=f"{y(b):.1f}", r="2.6", fill=pen["stroke"]))
    return marks


def page_svg(chart: Chart) -> str:
    """One ``<svg>`` for a page; ``data-chart`` holds its points for the page's tooltips."""
    found = axes(chart, 0, 0)
    if found is None:
        return '<p class="empty">No values yet.</p>'
    x, y = found
    lines = [
        {
            "label": line.label,
            "colour": line.colour % len(palette.LINES),
            "points": [
                [round(x(a), 1), round(y(b), 1), float(f"{a:.6g}"), float(f"{b:.5g}")] for a, b in chart.points(line)
            ],
        }
        for line in chart.series
    ]
    data = {"x": chart.x_label, "box": [x.start, y.end, x.end, y.start], "lines": lines}
    svg = Element("svg", {"class": "chart", "viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "tabindex": "0"})
    svg.attrib |= {"aria-label": chart.summary, "data-chart": json.dumps(data, separators=(",", ":"))}
    svg.extend([*draw(chart, lambda name: f"var(--{name})"), Element("g", {"class": "hover"})])
    return tostring(svg, "unicode")


def save(charts: Sequence[Chart], *paths: Path) -> None:
    """Write charts to files, in rows of three below one legend; the suffix decides the format (SVG, PNG, PDF ...).

    ``UsageError`` for an unknown suffix, ``DataError`` for a file that cannot be written.
    """
    svg = sheet(charts)
    for path in paths:
        write_output(path, _file(svg, path))


def _file(svg: Element, path: Path) -> bytes | str:
    from slotlab.pictures.painted import painted

    kind = path.suffix.lower()[1:]
    if kind == "svg":
        return tostring(svg, "unicode")
    try:
        return painted(figure(svg), kind or "png", dpi=DPI)
    except ValueError as error:
        raise UsageError(f"{path}: cannot draw there ({str(error).splitlines()[0]}); name a .png") from error


def sheet(charts: Sequence[Chart]) -> Element:
    """The picture of :func:`save` as an ``<svg>`` for any program, with real text and the palette's colours."""
    paint = palette.LIGHT.__getitem__
    columns = min(COLUMNS, len(charts))
    width = 2 * MARGIN + columns * (WIDTH + GAP) - GAP
    marks, top = [], float(MARGIN)
    legend = {line.colour: line.label for chart in charts for line in chart.series}
    for n, (colour, label) in enumerate(legend.items()):
        left, middle = MARGIN + n % columns * (WIDTH + GAP), top + n // columns * TITLE + 5
        marks.append(_path([[(left, middle), (left + 24, middle)]], _pen(colour, paint)))
        marks.append(_text(label, left + 32, middle + 3.5, paint("ink-2")))
    top += -(-len(legend) // columns) * TITLE + TITLE
    for start in range(0, len(charts), columns):
        row = charts[start : start + columns]
        reasons = [textwrap.wrap(chart.why, WHY_CHARACTERS) for chart in row]
        head = TITLE + LINE * max(map(len, reasons))
        for n, (chart, why) in enumerate(zip(row, reasons, strict=True)):
            left = MARGIN + n * (WIDTH + GAP)
            title = _text(chart.title, left, top + 10, paint("ink"), size="12.5")
            title.set("font-weight", "bold")
            marks.append(title)
            marks += [_text(t, left, top + 10 + (i + 1) * LINE, paint("ink-3")) for i, t in enumerate(why)]
            marks += draw(chart, paint, left, top + head)
        top += head + HEIGHT + TITLE
    size = {"width": f"{width}", "height": f"{top:.0f}", "viewBox": f"0 0 {width} {top:.0f}"}
    svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": "DejaVu Sans, sans-serif", **size})
    svg.append(Element("rect", width="100%", height="100%", fill=paint("surface")))
    svg.extend(marks)
    return svg


def figure(svg: Element) -> Figure:
    """The ``<svg>`` of :func:`sheet` as a matplotlib figure; a pixel is a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, PathPatch
    from matplotlib.path import Path as Outline

    across, down = float(svg.attrib["width"]), float(svg.attrib["height"])
    painted = Figure(figsize=(across / 72, down / 72))
    FigureCanvasAgg(painted)  # no window, no global state
    plane = painted.add_axes((0, 0, 1, 1), xlim=(0, across), ylim=(down, 0))
    plane.set_axis_off()
    for mark in svg:
        kind, look = mark.tag, mark.attrib
        if kind == "text":
            plane.text(
                float(look["x"]),
                float(look["y"]),
                mark.text or "",
                color=look["fill"],
                size=float(look["font-size"]),
                weight=look.get("font-weight", "normal"),
                ha={"start": "left", "middle": "center", "end": "right"}[look["text-anchor"]],
                family="DejaVu Sans",
                parse_math=False,
            )
        elif kind == "circle":
            plane.add_patch(Circle((float(look["cx"]), float(look["cy"])), float(look["r"]), color=look["fill"], lw=0))
        elif kind == "path":
            steps = re.findall(r"([ML])(\S+) ([^MLZ]+)", look["d"])
            width, dash = float(look.get("stroke-width", "0")), look.get("stroke-dasharray", "none")
            plane.add_patch(
                PathPatch(
                    Outline(
                        [(float(x), float(y)) for _, x, y in steps], ["ML".index(code) + 1 for code, _, _ in steps]
                    ),
                    facecolor=look["fill"],
                    edgecolor=look.get("stroke", "none"),
                    linewidth=width,
                    linestyle="-" if dash == "none" else (0, [float(part) / width for part in dash.split()]),
                    alpha=float(look.get("fill-opacity", "1")),
                    joinstyle="round",
                    capstyle="round",
                )
            )
    return painted


def ticks(low: float, high: float, count: int, log: bool) -> list[float]:
    """At most about ``count`` round values in a range."""
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
    """Texts of tick values, with as few digits as keep them different."""
    gap = min((b - a for a, b in pairwise(values)), default=max(map(abs, values), default=0.0))
    for digits in range(1, 16):
        if all(abs(float(f"{value:.{digits}g}") - value) <= 1e-3 * gap for value in values):
            return [short(value, digits) for value in values]
    return [repr(value) for value in values]


def short(value: float, digits: int) -> str:
    """A number of ``digits`` digits, with k and M for thousands and millions."""
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


def _pen(colour: int, paint: Paint) -> dict[str, str]:
    """SVG attributes of a line: the colours in turn, then again with dashes."""
    turn, index = divmod(colour, len(palette.LINES))
    return {"stroke": paint(f"line-{index}"), "stroke-width": "1.9", "stroke-dasharray": DASHES[turn % len(DASHES)]}


def _path(pieces: Iterable[Sequence[Position]], look: Mapping[str, str]) -> Element:
    """A path through points, or with ``fill`` the areas that they enclose."""
    end = "Z" if "fill" in look else ""
    parts = ["M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in piece) + end for piece in pieces if piece]
    round_ends = {"stroke-linejoin": "round", "stroke-linecap": "round"}
    return Element("path", {"d": "".join(parts), "fill": "none", "stroke-width": "1", **round_ends, **look})


def _text(text: str, x: float, y: float, colour: str, anchor: str = "start", size: str = "10.5") -> Element:
    mark = Element("text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": colour, "font-size": size})
    mark.text = printable(text)
    return mark
