"""The report's tables, for both the page and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featcache.errors import IncompatibleError
from featcache.scale.report import ROWS, StoreReport
from featcache.store.spec import flatten
from slotlab.dynamics.measures import HORIZONS, MEASURES
from slotlab.report.charts import prediction_lines, store_label
from slotlab.report.gather import RunData
from slotlab.scoring.groups import Intervals
from slotlab.scoring.metrics import score_of, shown, shown_of_videos
from slotlab.scoring.over_frames import QUANTITIES
from slotlab.scoring.paired import paired
from slotlab.scoring.references import floor_title
from slotlab.scoring.scores import Values

GROUPS = {"by_objects": "By number of objects"}  # other groups are named after their key


@dataclass(frozen=True)
class Cell:
    """One entry: its text, and its number."""

    text: str
    value: float | None = None
    detail: str = ""  # smaller text beside it: an interval
    best: bool = False  # the best of its column


@dataclass(frozen=True)
class Row:
    label: str
    cells: tuple[Cell, ...]
    kind: str = "run"  # run, reference or part
    colour: int | None = None  # the run's position in the palette of lines
    note: str = ""  # under the label


@dataclass(frozen=True)
class Table:
    key: str
    title: str
    columns: tuple[str, ...]  # titles of the cells, without the label's
    rows: tuple[Row, ...]
    label: str = ""
    note: str = ""
    numeric: bool = True


def number(value: Any, digits: int = 3) -> Cell:
    """A cell with a score; a dash if it is None."""
    if value is None:
        return Cell("–")
    return Cell(f"{value:.{digits}f}".replace("-", "−") if isinstance(value, float) else f"{value}", float(value))


def scored(values: Values, key: str, confidence: Intervals) -> Cell:
    """A cell with a score and its confidence interval, if there is one."""
    return replace(number(values.get(key)), detail=interval(confidence.get(key)))


def state(run: RunData) -> str:
    """The progress of a run in steps."""
    steps = run.config.optim.steps
    if run.step is None:
        logged = run.rows[-1]["step"] if run.rows else 0
        return f"step {logged} of {steps}, no checkpoint yet"
    return f"{steps} steps" if run.finished else f"step {run.step} of {steps}"


def description(run: RunData) -> str:
    """Model and features of a run in a few words."""
    model = run.config.model.kind.replace("_", " ")
    slots = "" if run.config.model.kind == "dense" else f", {run.config.model.slots} slots"
    grid = "" if run.loaded is None else " · {}×{} grid".format(*run.loaded.model.grid)
    source = "frames" if run.tap == "video" else f"{run.store.spec.backbone}, {run.tap}"
    return f"{model}{slots} · {source}{grid}"


def summary(runs: Sequence[RunData]) -> Table | None:
    """The table of all runs that are scored by their masks, with their ceiling and floors; None if there are none."""
    if all(run.config.model.scored_by == "rollout" for run in runs):
        return None
    films = any(run.evaluation.films for run in runs if run.evaluation)
    shown_scores = shown("summary") | (shown_of_videos("summary") if films else {})  # single images have none
    columns = (*shown_scores.values(), "Effective slots", "Mask similarity")
    rows = []
    for n, run in enumerate(runs):
        if run.config.model.scored_by == "rollout":
            continue
        values, sure = (run.evaluation.values, run.evaluation.groups.confidence.total) if run.evaluation else ({}, {})
        cells = [scored(values, key, sure) for key in shown_scores]
        cells += [number(diagnostic(run, "effective_slots"), 1), number(diagnostic(run, "mask_similarity"))]
        rows.append(Row(run.name, tuple(cells), colour=n, note=f"{description(run)} · {state(run)}"))
    rows = mark_best(rows, shown_scores)
    rows += [Row(label, cells_of(values, len(columns)), "reference") for label, values in references(runs)]
    levels = [run.evaluation.groups.confidence.level for run in runs if run.evaluation]
    note = (
        f"Means over frames for the {published_masks(runs)} masks, at the resolution of the ground truth"
        + ("; “video” scores need slots that keep their objects through a video." if films else ".")
        if any(run.evaluation for run in runs)
        else "There are no ground-truth masks, so there are no scores; diagnostics need none."
    )
    left_out = {run.evaluation.left_out for run in runs if run.evaluation} - {""}
    note += "".join(f" {words}." for words in sorted(left_out))
    statistics = {run.evaluation.references.statistics or "" for run in runs if run.evaluation} - {""}
    if statistics:
        note += f" The whitened floors use the statistics of {', '.join(sorted(statistics))}."
    if levels:
        note += f" In small print: {levels[0]:.0%} intervals by a bootstrap over videos."
    return Table("summary", "Scores", columns, tuple(rows), "run", note)


def published_masks(runs: Sequence[RunData]) -> str:
    """The owner of the scored masks, for a caption."""
    kinds = {run.config.published_masks for run in runs if run.evaluation}
    return f"{kinds.pop()}’s" if len(kinds) == 1 else "published (decoder’s or attention’s, see configuration)"


def diagnostic(run: RunData, key: str) -> float | None:
    """A diagnostic from the evaluation, or, without ground truth, from the run's curves."""
    if run.evaluation is not None:
        return run.evaluation.diagnostics.get(key)
    curve = run.curves.get(key)
    if curve is None or not curve.videos.any():
        return None
    seen = curve.videos > 0
    return float(np.average(curve.mean[seen], weights=curve.videos[seen]))


def references(runs: Sequence[RunData]) -> Iterator[tuple[str, Values]]:
    """Names and scores of the runs' ceilings and floors, equal ones once."""
    seen: set[str] = set()
    for run in runs:
        if run.evaluation is None:
            continue
        for label, values in references_of(run):
            text = label + json.dumps(dict(values), sort_keys=True)
            if text not in seen:
                seen.add(text)
                several = any(label == other for r in runs if r is not run and r.evaluation
                              for other, v in references_of(r) if v != values)  # fmt: skip
                yield (f"{label} ({run.name})" if several else label), values


def references_of(run: RunData) -> list[tuple[str, Values]]:
    """Names and scores of one run's ceiling and floors."""
    assert run.evaluation is not None
    found = run.evaluation.references
    floors = [(floor_title(name), values) for name, values in found.floors.items()]
    return ([("ceiling of the mask grid", found.ceiling)] if found.ceiling else []) + floors


def cells_of(values: Values, width: int) -> tuple[Cell, ...]:
    """Cells with the scores of a reference, padded to a table's width."""
    cells = [number(values.get(key)) for key in shown("summary")]
    return tuple(cells + [Cell("")] * (width - len(cells)))


def mark_best(rows: Sequence[Row], keys: Iterable[str]) -> list[Row]:
    """The rows with the best value of each score marked, if several differ; the first columns hold ``keys``."""
    marked = [list(row.cells) for row in rows]
    for column, key in enumerate(keys):
        score = score_of(key)
        values = [cells[column].value for cells in marked]
        known = [v for v in values if v is not None]
        if score is not None and len(known) > 1 and max(known) > min(known):
            best = max(known, key=score.order)
            for cells in marked:
                cells[column] = replace(cells[column], best=cells[column].value == best)
    return [replace(row, cells=tuple(cells)) for row, cells in zip(rows, marked, strict=True)]


def groups(runs: Sequence[RunData]) -> list[Table]:
    """Tables of the scores of groups of objects or frames, one for each kind of group."""
    found = [(n, run.evaluation.groups) for n, run in enumerate(runs) if run.evaluation]
    columns = shown("parts")
    tables = []
    for key in dict.fromkeys(key for _, of in found for key, parts in of.summaries.items() if parts):
        rows = []
        for name in dict.fromkeys(name for _, of in found for name in of.summaries.get(key, {})):
            part = []
            for n, of in found:
                if (summary := of.summaries.get(key, {}).get(name)) is not None:
                    sure = of.confidence.groups.get(key, {}).get(name, {})
                    cells = (*(scored(summary.values, score, sure) for score in columns), number(summary.frames))
                    part.append(run_row(name, runs, n, cells))
            rows += mark_best(part, columns)
        title = GROUPS.get(key, key.replace("_", " ").capitalize())
        label = "in sight" if key == "by_objects" else "objects"
        tables.append(Table(key, title, (*columns.values(), "frames"), tuple(rows), label))
    return tables


def run_row(label: str, runs: Sequence[RunData], position: int, cells: tuple[Cell, ...]) -> Row:
    """A row of one run; if there are several runs, it has the run's name and colour."""
    if len(runs) == 1:
        return Row(label, cells)
    return Row(f"{label} · {runs[position].name}", cells, colour=position)


def masks_of(runs: Sequence[RunData]) -> Table | None:
    """The table of both kinds of masks, decoder and attention; None if they do not differ."""
    rows, columns = [], shown("summary")
    for n, run in enumerate(runs):
        masks = run.evaluation.masks if run.evaluation else {}
        values = {label: tuple(of.values.get(key) for key in columns) for label, of in masks.items()}
        if len(set(values.values())) > 1:
            rows += [run_row(label, runs, n, tuple(map(number, of))) for label, of in values.items()]
    note = "The same slots with two kinds of masks: the attention that formed them, and the decoder’s."
    return Table("masks", "Two kinds of masks", tuple(columns.values()), tuple(rows), "masks", note) if rows else None


def paired_runs(runs: Sequence[RunData]) -> Table | None:
    """The table of every run against the first, for runs that were scored on the same videos; else None."""
    first, rows = runs[0], []
    for n, run in enumerate(runs[1:], 1):
        if first.evaluation is None or run.evaluation is None:
            continue
        try:
            found = paired(run.evaluation, first.evaluation)["scores"]
        except IncompatibleError:
            continue  # other videos: nothing to pair
        for key, title in shown("headline").items():
            if key in found:
                item = found[key]
                low, high = item["low"], item["high"]
                between = f"{signed(low)} to {signed(high)}" if low is not None else ""
                cells = (
                    Cell(signed(item["difference"]), item["difference"], between),
                    Cell(f"{item['p']:.3f}" if item["p"] >= 0.001 else "< 0.001", item["p"]),
                    Cell(f"{item['ahead']} of {item['videos']}", item["ahead"]),
                )
                rows.append(Row(f"{title} · {run.name}", cells, colour=n))
    note = (
        f"Means over videos of the difference from {first.name}, with 95% bootstrap intervals over videos; p of "
        "Wilcoxon’s two-sided signed-rank test. The videos are the sample: this says nothing about other seeds."
    )
    title = f"Against {first.name}"
    return Table("paired", title, ("difference", "p", "videos ahead"), tuple(rows), "score", note) if rows else None


def signed(value: float) -> str:
    """A number with its sign, and a true minus."""
    return f"{value:+.3f}".replace("-", "−")


def predictions(runs: Sequence[RunData]) -> list[Table]:
    """A table for each measure of predictions: each run's row, and those beside the first one's, by frames ahead."""
    lines, tables = prediction_lines(runs), []
    for measure in MEASURES:
        rows = []
        for n, (label, row) in enumerate(lines):
            if measure.key in row:
                values, sure = row[measure.key]["by_horizon"], row["confidence"][measure.key]
                cells = [
                    replace(number(values[h - 1], measure.digits), detail=interval(sure[str(h)], measure.digits))
                    for h in HORIZONS
                    if h <= len(values)
                ]
                rows.append(Row(label, (*cells, number(row[measure.key]["mean"], measure.digits)), colour=n))
        if rows:
            columns = (*(f"+{h}" for h in HORIZONS[: len(rows[0].cells) - 1]), "mean")
            tables.append(
                Table(f"ahead-{measure.key}", measure.title, columns, tuple(rows), "frames ahead", measure.why)
            )
    return tables


def interval(bounds: Sequence[float] | None, digits: int = 3) -> str:
    """The text of an interval; empty without one."""
    return "" if not bounds else f"{bounds[0]:.{digits}f}–{bounds[1]:.{digits}f}".replace("-", "−")


def videos(runs: Sequence[RunData]) -> Table | None:
    """The table of every video's scores; None without scores."""
    found = [(run.name, run.evaluation.by_video) for run in runs if run.evaluation and run.evaluation.by_video]
    if not found:
        return None
    scores = shown("headline")
    columns = tuple(f"{title} {run}" if len(found) > 1 else title for run, _ in found for title in scores.values())
    rows = [
        Row(name, tuple(number(of.get(name, {}).get(key)) for _, of in found for key in scores))
        for name in sorted({name for _, of in found for name in of})
    ]
    return Table("videos", "Every video", columns, tuple(rows), "video")


def time_table(runs: Sequence[RunData]) -> Table | None:
    """The table of the curves over the frames: first, last and mean values; None without curves."""
    rows = []
    for q in QUANTITIES:
        for n, run in enumerate(runs):
            curve = run.curves.get(q.name)
            if curve is None or len(curve.mean) < 2:
                continue
            known = curve.mean[curve.mean == curve.mean]
            if len(known):
                cells = (number(float(known[0])), number(float(known[-1])), number(float(known.mean())))
                rows.append(run_row(q.title, runs, n, cells))
    note = "Means over the videos at the first and the last frame where the quantity is defined, and over all frames."
    return Table("time", "Over the frames", ("first", "last", "mean"), tuple(rows), "quantity", note) if rows else None


def scale(reports: Sequence[StoreReport]) -> Table | None:
    """The table that ``slotlab stats`` prints; None without stores of features."""
    if not reports:
        return None
    rows = [Row(row.name, tuple(Cell(row.show(r.scale)) for r in reports), note=row.why) for row in ROWS]
    return Table("scale", "Feature scale", tuple(store_label(r) for r in reports), tuple(rows), "quantity")


def configuration(runs: Sequence[RunData]) -> Table:
    """The table of all configuration keys, differing ones first."""
    flats = [flatten(run.config.model_dump()) for run in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    rows = []
    for key in keys:
        texts = [as_toml(flat[key]) if key in flat else "" for flat in flats]
        rows.append(Row(key, tuple(Cell(t) for t in texts), "differs" if len(set(texts)) > 1 else "run"))
    rows.sort(key=lambda row: row.kind != "differs")
    return Table("config", "Configuration", tuple(r.name for r in runs), tuple(rows), "key", numeric=False)


def as_toml(value: Any) -> str:
    """A configuration's value in TOML; a dash for None."""
    return "–" if value is None else json.dumps(value) if isinstance(value, list | bool) else str(value)
