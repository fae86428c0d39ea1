"""Tables of results for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from featcache.scale.report import ROWS, StoreReport
from featcache.text import printable
from slotlab.dynamics.measures import HORIZONS, MEASURES
from slotlab.dynamics.rollout import Rollout
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.fine import GAINS
from slotlab.scoring.metrics import shown, title_of
from slotlab.scoring.references import floor_title
from slotlab.scoring.scores import Values

# More columns are hard to read in a terminal; further stores go to a second table.
STORES_A_TABLE = 4


def render(reports: Sequence[StoreReport]) -> RenderableType:
    """Tables with a column for each store and a row for each quantity, then a legend of the quantities."""
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
        label = Text(printable(Path(report.path).name), style="bold cyan")
        what = (f"{report.split} / {report.tap}", report.backbone)
        label.append("".join(f"\n{printable(line)}" for line in what), style="not bold dim")
        table.add_column(label, justify="right", overflow="fold")
    for row in ROWS:
        table.add_row(row.name, *(row.show(report.scale) for report in reports))
    return table


def number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else printable(str(value))


def interval(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.3f}–{bounds[1]:.3f}"


def scores_table(found: Evaluation) -> Table:
    """The table of one run's scores, with rows for its ceiling and floors."""
    columns = shown("summary")
    table = Table(title=printable(f"{found.run} on {found.split}"), title_justify="left")
    table.add_column("masks")
    for title in columns.values():
        table.add_column(title, justify="right")

    def add(name: str, values: Values, style: str | None = None, suffix: str = "") -> None:
        table.add_row(name, *(number(values.get(f"{key}{suffix}")) for key in columns), style=style)

    add("this run, per frame", found.values, "bold")
    sure = found.groups.confidence
    table.add_row(f"  {sure.level:.0%} interval", *(interval(sure.total.get(key)) for key in columns))
    if found.films:
        add("this run, per video", found.values, suffix="_video")
    for kind, of in found.masks.items():
        if kind != found.published_masks and any(of.values[key] != found.values[key] for key in columns):
            add(f"  of the {kind}", of.values)
    for key, parts in found.groups.summaries.items():
        for name, part in parts.items():
            if key != "by_objects":
                add(f"  {name} objects", part.values)
            elif name != "0":
                add(f"  {name} in sight", part.values)
    add("ceiling of the patch grid", found.references.ceiling, "dim")
    if found.films:
        add("  per video", found.references.ceiling, "dim", "_video")
    for name, values in found.references.floors.items():
        add(floor_title(name), values, "dim")
    counts = found.summary
    seen = f"{counts.frames} frames of {counts.videos} videos" if found.films else f"{counts.frames} images"
    table.caption = (
        f"{seen}, {counts.skipped_frames} without objects skipped; "
        f"{found.diagnostics['effective_slots']:.1f} effective slots, "
        f"mask similarity {found.diagnostics['mask_similarity']:.2f}"
    )
    if found.values["fg_ari"] is None:
        table.caption += "\nno frame shows two objects, so there is no FG-ARI"
    if found.left_out:
        table.caption += f"\n{found.left_out}"
    if found.references.statistics:
        table.caption += f"\nthe whitened floors use the statistics of {printable(found.references.statistics)}"
    return table


def paired_table(compared: Mapping[str, Any]) -> Table:
    """The table of the differences between two runs, score by score."""
    title = printable(f"{compared['run']} against {compared['against']} on {compared['split']}")
    table = Table(title=title, title_justify="left")
    for title in ("score", "this run", "the other", "difference", "interval", "p", "ahead"):
        table.add_column(title, justify="left" if title == "score" else "right")
    for name, of in compared["scores"].items():
        bounds = "–" if of["low"] is None else f"{of['low']:+.3f} to {of['high']:+.3f}"
        ahead = f"{of['ahead']} of {of['videos']}"
        means = (number(of["run"]), number(of["against"]), f"{of['difference']:+.3f}")
        table.add_row(title_of(name), *means, bounds, f"{of['p']:.2g}", ahead)
    table.caption, table.caption_justify = f"{compared['test']}; {compared['interval']}", "left"
    return table


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> Table:
    table = Table(title=printable(title) or None, title_justify="left")
    for column in columns:
        table.add_column(printable(column))
    for row in rows:
        table.add_row(*(number(cell) for cell in row))
    return table


def outlines_table(found: Evaluation) -> Table:
    """The table of outline scores, with a column for each kind of mask."""
    boundaries, refined = found.fine["boundaries"], found.fine.get("refined")
    kinds = {"this run": boundaries}
    if refined:
        kinds["refined"] = refined["boundaries"]
    kinds["grid's reference"] = boundaries["reference"]
    rows = []
    for key, title in (("boundary_f", "boundary F"), ("bleeding", "bleeding")):
        rows.append((title, *(of[key] for of in kinds.values())))
        for size, part in boundaries["by_area"].items():
            low, high = part["area_px"]
            values = (of["by_area"].get(size, {}).get(key) for of in kinds.values())
            rows.append((f"  {size}, {low}–{high} px", *values))
    return plain_table(("outlines", *kinds), rows, f"within {boundaries['tolerance_px']} px")


def entropy_table(found: Evaluation) -> Table:
    """The table of the masks' entropy: everywhere, by material, by spare slots."""
    entropy = found.fine["entropy"]
    parts = {name: entropy[name] for name in ("all", "background", "objects")}
    parts |= {f"  {name}": of for name, of in entropy["by_material"].items()}
    parts |= {f"{name} spare slots": of for name, of in entropy["by_spare_slots"].items()}
    rows = []
    for name, of in parts.items():
        bounds = None if of["interval"] is None else "{:.3f} to {:.3f}".format(*of["interval"])
        rows.append((name, of["mean"], bounds, of["frames"]))
    if (slope := entropy["per_spare_slot"]) is not None:
        rows.append(("for each spare slot", f"{slope:+.4f}", None, None))
    return plain_table(("entropy of the masks", "mean", "interval", "frames"), rows, f"in units of {entropy['unit']}")


def gains_table(found: Evaluation) -> Table:
    """The table of the scores of refined and otherwise binarised masks, beside those of the plain ones."""
    plain = {**found.values, "boundary_f": found.fine["boundaries"]["boundary_f"]}
    rows: list[tuple[Any, ...]] = [("this run", *(plain[key] for key in GAINS), None)]
    if refined := found.fine.get("refined"):
        name = f"refined, {refined['method']}, {refined['ms_per_frame']:.0f} ms a frame"
        rows.append((name, *(refined[key] for key in GAINS), None))
        gains = (refined["gain"][key] for key in GAINS)
        rows.append(("  gain", *(None if gain is None else f"{gain:+.3f}" for gain in gains), None))
    for name, scores in found.fine.get("binarised", {}).items():
        rows.append((name, *(scores.get(key) for key in GAINS), scores["unassigned"]))
    return plain_table(("masks", *GAINS.values(), "unassigned"), rows)


def experiment_table(table: Mapping[str, Any]) -> Table:
    """The table of :func:`slotlab.experiments.table.build_table`: a row for each cell, the spread below the mean."""
    from slotlab.experiments.table import SPREAD, row_of

    shown = Table(title=printable(f"{table['out']} on {table['split']}"), title_justify="left")
    shown.add_column("cell", overflow="fold", min_width=12)
    for title in ("runs", *table["columns"].values()):
        shown.add_column(title, justify="right")
    for cell in table["cells"]:
        name, *values = row_of(table, cell)
        shown.add_row(name, *(value.replace(" (", "\n").removesuffix(")") for value in values))
    shown.caption, shown.caption_justify = SPREAD.replace("(", "and ").replace(")", ""), "left"
    return shown


def rollout_tables(found: Rollout) -> list[Table]:
    """A table for each measure of a rollout: a row for each prediction, a column for each horizon in frames."""
    shown = []
    for measure in MEASURES:
        rows = []
        for row, of in found.rows.items():
            if measure.key not in of:
                continue
            values = found.means(row, measure.key)
            chosen = [*(values[h - 1] for h in HORIZONS if h <= len(values)), found.mean(row, measure.key)]
            rows.append((found.titles[row], *(None if v is None else f"{v:.{measure.digits}f}" for v in chosen)))
        if rows:
            columns = (measure.title, *(str(h) for h in HORIZONS if h <= found.steps), "mean")
            shown.append(plain_table(columns, rows))
    return shown
