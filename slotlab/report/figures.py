"""The report's charts and masks as files: PNG to look at, SVG for papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from featcache.errors import UsageError
from featcache.scale.report import DASHES, STYLE
from slotlab.pictures import palette
from slotlab.report.charts import Chart, all_charts
from slotlab.report.gallery import footages
from slotlab.report.gather import Gathered

SECTIONS = {"training": "Training", "time": "Over the frames", "scale": "Features"}
COLUMNS = 3
LEGEND_COLUMNS = 3


def write_figures(gathered: Gathered, folder: Path, videos: int, rank: str) -> list[tuple[str, Path]]:
    """Draw every section's charts, and a sheet of the masks of each run, as PNG and SVG.

    Returns titles and PNG files. Raises ``UsageError`` where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for key, charts in all_charts(gathered).items():
            if charts:
                written.append((SECTIONS[key], draw_section(charts, folder / f"{key}.png")))
        for name, path in draw_masks(gathered, folder, videos, rank):
            written.append((name, path))
    except OSError as error:
        raise UsageError(f"--figures {folder}: cannot be written ({error}); name a folder that can") from error
    return written


def draw_section(charts: Sequence[Chart], path: Path) -> Path:
    """A grid of charts under one legend, as PNG at ``path`` and as SVG beside it."""
    columns = min(COLUMNS, len(charts))
    rows = -(-len(charts) // columns)
    style: dict[Any, Any] = {**STYLE, "svg.fonttype": "none"}  # text stays text
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6 * columns, 3.1 * rows + 0.4))
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
        FigureCanvasAgg(figure)  # no window, no global state
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, chart in zip(grid, charts, strict=False):
            draw_chart(axes, chart)
        for axes in grid[len(charts) :]:
            axes.set_axis_off()
        handles = {line.get_label(): line for axes in grid for line in axes.get_lines()}
        if len(handles) > 1:
            figure.legend(
                list(handles.values()),
                [str(label) for label in handles],
                loc="outside upper left",
                ncols=min(len(handles), LEGEND_COLUMNS),
            )
        figure.savefig(path, dpi=150)
        figure.savefig(path.with_suffix(".svg"))
    return path


def draw_chart(axes: Axes, chart: Chart) -> None:
    """One chart into matplotlib axes."""
    for line in chart.series:
        colour = palette.LINES[line.colour % len(palette.LINES)]
        dashes = DASHES[line.colour // len(palette.LINES) % len(DASHES)]
        axes.plot(line.x, line.y, color=colour, linestyle=dashes, linewidth=1.8, label=line.label)
        if line.low:
            axes.fill_between(
                line.x, np.asarray(line.low), np.asarray(line.high), color=colour, alpha=0.13, linewidth=0
            )
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x_label)
    axes.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log" if chart.log_y else "linear")
    if not chart.log_y:
        axes.set_ylim(chart.y_min, chart.y_max)


def draw_masks(gathered: Gathered, folder: Path, videos: int, rank: str) -> list[tuple[str, Path]]:
    """The gallery's videos on paper: frame, ground truth, slots and single slots at each video's middle."""
    from slotlab.pictures.sheet import draw_sheet

    written = []
    for footage in footages(gathered.runs, videos, rank):
        for position in footage.runs:
            run = gathered.runs[position]
            if run.loaded is not None and run.split.spec.masks and footage.choices:
                path = folder / f"masks-{run.name.replace('/', '-')}.png"
                chosen = [choice.video for choice in footage.choices]
                draw_sheet(run.loaded, run.split, path, chosen)
                draw_sheet(run.loaded, run.split, path.with_suffix(".svg"), chosen)
                written.append((f"Masks of {run.name}", path))
    return written
