"""Results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from featcache.scale.report import ROWS, StoreReport
from slotlab.scoring.fine import GAINS

# More columns than this are hard to read in a terminal; further stores go to a second table.
STORES_A_TABLE = 4


def render(reports: Sequence[StoreReport]) -> RenderableType:
    """Tables with a column a store and a row a quantity, then what the quantities are good for."""
    parts: list[RenderableType] = []
    for start in range(0, len(reports), STORES_A_TABLE):
        parts += [_table(reports[start : start + STORES_A_TABLE]), Text()]
    legend = Table.grid(padding=(0, 2))
    legend.add_column(style="bold", no_wrap=True)
    legend.add_column(style="dim")
    for row in ROWS:
        if row.why:
            legend.add_row(row.name, row.why)
    parts.append(legend)
    spread = _spread(reports)
    if spread >= 1.5:
        parts += [
            Text(),
            Text(
                f"std differs {spread:.1f}-fold and raw MSE {spread**2:.0f}-fold between these stores: "
                "compare losses and share hyper-parameters only on standardised or whitened features.",
                style="yellow",
            ),
        ]
    return Group(*parts)


def _spread(reports: Sequence[StoreReport]) -> float:
    stds = [report.scale.std for report in reports if report.scale.std > 0]
    return max(stds) / min(stds) if stds else 1.0


def _table(reports: Sequence[StoreReport]) -> Table:
    table = Table(title="Feature scale", title_style="bold", header_style="bold")
    table.add_column("", no_wrap=True)
    for report in reports:
        label = Text(Path(report.path).name, style="bold cyan")
        label.append(f"\n{report.split} / {report.tap}\n{report.backbone}", style="not bold dim")
        table.add_column(label, justify="right", overflow="fold")
    for row in ROWS:
        table.add_row(row.name, *(row.show(report.scale) for report in reports))
    return table


def number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def interval(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.3f}–{bounds[1]:.3f}"


def scores_table(result: Mapping[str, Any]) -> Table:
    """The evaluation of one run, with its ceiling and floors as rows beside it."""
    keys = ("fg_ari", "mbo", "miou", "ari")
    table = Table(title=f"{result['run']} on {result['split']}", title_justify="left")
    table.add_column("masks")
    for key in keys:
        table.add_column({"fg_ari": "FG-ARI", "mbo": "mBO", "miou": "mIoU", "ari": "ARI"}[key], justify="right")

    def add(name: str, values: Mapping[str, Any], style: str | None = None) -> None:
        table.add_row(name, *(number(values.get(key)) for key in keys), style=style)

    add("this run, per frame", result, "bold")
    sure = result["confidence"]
    table.add_row(f"  {sure['level']:.0%} interval", *(interval(sure.get(key)) for key in keys))
    films = result["frames"] > result["videos"]  # else single images, whose scores are those of their frames
    if films:
        add("this run, per video", {key: result.get(f"{key}_video") for key in keys})
    other = "attention" if result["published_masks"] == "decoder" else "decoder"
    if any(result[other][key] != result[key] for key in keys):
        add(f"  of the {other}", result[other])
    for name, values in (result["by_material"] | result["by_size"]).items():
        add(f"  {name} objects", values)
    for count, values in result["by_objects"].items():
        if count != "0":
            add(f"  {count} in sight", values)
    add("ceiling of the patch grid", result["reference"], "dim")
    if films:
        add("  per video", {key: result["reference"].get(f"{key}_video") for key in keys}, "dim")
    add("floor: k-means, raw tokens", result["floor"]["kmeans_raw"], "dim")
    add("floor: k-means, whitened", result["floor"]["kmeans_whitened"], "dim")
    seen = f"{result['frames']} frames of {result['videos']} videos" if films else f"{result['frames']} images"
    table.caption = (
        f"{seen}, {result['skipped_frames']} without objects skipped; "
        f"{result['effective_slots']:.1f} effective slots, mask similarity {result['mask_similarity']:.2f}"
    )
    return table


def paired_table(compared: Mapping[str, Any]) -> Table:
    """Whether two runs differ, score by score."""
    table = Table(title=f"{compared['run']} against {compared['against']} on {compared['split']}", title_justify="left")
    for title in ("score", "this run", "the other", "difference", "interval", "p", "ahead"):
        table.add_column(title, justify="left" if title == "score" else "right")
    for name, of in compared["scores"].items():
        bounds = "–" if of["low"] is None else f"{of['low']:+.3f} to {of['high']:+.3f}"
        ahead = f"{of['ahead']} of {of['videos']}"
        means = (number(of["run"]), number(of["against"]), f"{of['difference']:+.3f}")
        table.add_row(name.replace("_", " "), *means, bounds, f"{of['p']:.2g}", ahead)
    table.caption, table.caption_justify = f"{compared['test']}; {compared['interval']}", "left"
    return table


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> Table:
    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(number(cell) for cell in row))
    return table


def outlines_table(result: Mapping[str, Any]) -> Table:
    """What :func:`outline_scores` found, a column a kind of mask."""
    boundaries, refined = result["boundaries"], result.get("refined")
    kinds = {"this run": boundaries}
    if refined:
        kinds["refined"] = refined["boundaries"]
    kinds["grid's reference"] = boundaries["reference"]
    rows = []
    for key, title in (("boundary_f", "boundary F"), ("bleeding", "bleeding")):
        rows.append((title, *(found[key] for found in kinds.values())))
        for size, of in boundaries["by_area"].items():
            low, high = of["area_px"]
            values = (found["by_area"].get(size, {}).get(key) for found in kinds.values())
            rows.append((f"  {size}, {low}–{high} px", *values))
    return plain_table(("outlines", *kinds), rows, f"within {boundaries['tolerance_px']} px")


def gains_table(result: Mapping[str, Any]) -> Table:
    """Scores of refined and of otherwise binarised masks beside the plain ones."""
    plain = {**result, "boundary_f": result["boundaries"]["boundary_f"]}
    rows: list[tuple[Any, ...]] = [("this run", *(plain[key] for key in GAINS), None)]
    if refined := result.get("refined"):
        name = f"refined, {refined['method']}, {refined['ms_per_frame']:.0f} ms a frame"
        rows.append((name, *(refined[key] for key in GAINS), None))
        rows.append(("  gain", *(None if g is None else f"{g:+.3f}" for g in refined["gain"].values()), None))
    for name, scores in result.get("binarised", {}).items():
        rows.append((name, scores["fg_ari"], scores["mbo"], None, None, scores["unassigned"]))
    return plain_table(("masks", "FG-ARI", "mBO", "mIoU", "boundary F", "unassigned"), rows)


def experiment_table(table: Mapping[str, Any]) -> Table:
    """What :func:`slotlab.experiments.table.build_table` made: a row a cell, its spread below its mean."""
    from slotlab.experiments.table import COLUMNS, SPREAD, row_of

    shown = Table(title=f"{table['out']} on {table['split']}", title_justify="left")
    shown.add_column("cell", overflow="fold", min_width=12)
    for title in ("runs", *COLUMNS.values()):
        shown.add_column(title, justify="right")
    for cell in table["cells"]:
        name, *values = row_of(table, cell)
        shown.add_row(name, *(value.replace(" (", "\n").removesuffix(")") for value in values))
    shown.caption, shown.caption_justify = SPREAD.replace("(", "and ").replace(")", ""), "left"
    return shown
