"""Writes the report's charts and masks to files: PNG to look at, SVG for papers."""

from __future__ import annotations

from pathlib import Path

from featcache.errors import UsageError
from slotlab.pictures.chart import save
from slotlab.report.charts import all_charts
from slotlab.report.gallery import footages
from slotlab.report.gather import Gathered

SECTIONS = {"training": "Training", "time": "Over the frames", "scale": "Features"}


def write_figures(gathered: Gathered, folder: Path) -> list[tuple[str, Path]]:
    """Draw every section's charts, and a sheet of the masks of each run, as PNG and SVG.

    Returns titles and PNG files. ``UsageError`` if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for key, charts in all_charts(gathered).items():
            if charts:
                path = folder / f"{key}.png"
                save(charts, path, path.with_suffix(".svg"))
                written.append((SECTIONS[key], path))
        for name, path in draw_masks(gathered, folder):
            written.append((name, path))
    except OSError as error:
        raise UsageError(f"--figures {folder}: cannot be written ({error}); name a folder that can") from error
    return written


def draw_masks(gathered: Gathered, folder: Path) -> list[tuple[str, Path]]:
    """Draw a sheet of each run: frame, ground truth, slots and single slots at the middle of the gallery's videos."""
    from slotlab.pictures.sheet import draw_sheet

    written = []
    for footage in footages(gathered.runs):
        for position in footage.runs:
            run = gathered.runs[position]
            if run.split.has_truth and footage.choices:
                path = folder / f"masks-{run.name.replace('/', '-')}.png"
                stills = [run.views[choice.video].still for choice in footage.choices]
                draw_sheet(run.split, stills, path)
                draw_sheet(run.split, stills, path.with_suffix(".svg"))
                written.append((f"Masks of {run.name}", path))
    return written
