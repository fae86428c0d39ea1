"""Writes the report's charts and masks to files: PNG to look at, SVG for papers."""

from __future__ import annotations

from pathlib import Path

from featcache.text import file_name
from slotlab.pictures.chart import save
from slotlab.report.charts import all_charts
from slotlab.report.gallery import footages
from slotlab.report.gather import Gathered

SECTIONS = {"training": "Training", "predictions": "Predictions", "time": "Over the frames", "scale": "Features"}


def write_figures(gathered: Gathered, folder: Path) -> list[tuple[str, Path]]:
    """Draw every section's charts, and a sheet of the masks of each run, as PNG and SVG.

    Returns titles and PNG files. ``DataError`` if they cannot be written.
    """
    written = []
    for key, charts in all_charts(gathered).items():
        if charts:
            path = folder / f"{key}.png"
            save(charts, path, path.with_suffix(".svg"))
            written.append((SECTIONS[key], path))
    return written + draw_masks(gathered, folder)


def draw_masks(gathered: Gathered, folder: Path) -> list[tuple[str, Path]]:
    """Draw a sheet of each run: frame, ground truth, slots and single slots at the middle of the gallery's videos."""
    from slotlab.pictures.sheet import draw_sheet

    written = []
    for footage in footages(gathered.runs):
        for position in footage.runs:
            run = gathered.runs[position]
            if run.split.has_truth and footage.choices:
                path = folder / f"masks-{file_name(run.name.replace('/', '-'))}.png"
                stills = [run.views[choice.video].still for choice in footage.choices]
                draw_sheet(run.split, stills, path)
                draw_sheet(run.split, stills, path.with_suffix(".svg"))
                written.append((f"Masks of {run.name}", path))
    return written
