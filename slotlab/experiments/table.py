"""The table of an experiment, made from its folder alone."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.store.durable import write_output
from featcache.text import printable
from slotlab.experiments.outcome import Outcome, Scoring, scoring_of
from slotlab.experiments.plan import Cell, Run, read_plan
from slotlab.runs.folder import LOG, read_rows
from slotlab.scoring.paired import paired_scores
from slotlab.scoring.scores import Values

TRAINING = {"loss": "loss", "seconds": "seconds"}  # key -> title of columns, beside those of the scores
SPREAD = "mean (minimum–maximum) over seeds"


def build_table(out: Path) -> dict[str, Any]:
    """Every cell of the plan in ``out`` with its runs, scores and errors; JSON-able.

    Scores have mean, minimum, maximum, standard deviation (n - 1; None for one seed) and the value of each
    finished seed. ``loss`` is the mean of the last tenth of the logged rows, ``seconds`` the time of
    training. ``columns`` and ``tested`` name what the cells have, as their runs are scored. ``against_first`` tests the
    difference from the first cell over videos, each averaged over seeds
    (:func:`slotlab.scoring.paired.paired_scores`).
    """
    plan = read_plan(out)
    runs: dict[str, list[Run]] = {cell.name: [] for cell in plan.cells}
    for run in plan.runs(out):
        runs[run.cell.name].append(run)
    cells, first = [], None
    scorings = [scoring_of(cell.config) for cell in plan.cells]
    columns = {key: title for scoring in scorings for key, title in scoring.columns.items()} | TRAINING
    for cell in plan.cells:
        scoring = scoring_of(cell.config)
        outcomes = {run.seed: _outcome(run, scoring) for run in runs[cell.name] if run.finished}
        videos = _mean_by_video(outcomes.values(), scoring)
        cells.append(
            _cell(cell, runs[cell.name], outcomes, columns) | {"against_first": _tested(videos, first, scoring)}
        )
        first = first if cells[1:] else videos
    return {
        "out": str(out),
        "kind": plan.kind,
        "split": plan.split,
        "seeds": list(plan.seeds),
        "spread": "min and max over seeds",
        "test": "Wilcoxon signed-rank over videos, each averaged over seeds, against the first cell",
        "columns": columns,
        "tested": {key: title for scoring in scorings for key, title in scoring.tested.items()},
        "cells": cells,
    }


def _cell(
    cell: Cell, runs: Sequence[Run], outcomes: Mapping[int, Outcome], columns: Mapping[str, str]
) -> dict[str, Any]:
    values: dict[str, list[float]] = {key: [] for key in columns}
    listed = []
    for run in runs:
        state = "finished" if run.finished else "failed" if run.error else "unfinished"
        listed.append({"path": str(run.path), "seed": run.seed, "state": state, "error": run.error})
        if run.finished:
            found = {**outcomes[run.seed].values, **_training(run)}
            for key, of in values.items():
                if (value := found.get(key)) is not None:
                    of.append(value)
    any_one = next(iter(outcomes.values()), None)
    references = {"reference": None, "floor": None} | dict(any_one.references if any_one else {})
    return {
        "name": cell.name,
        "settings": dict(cell.settings),
        "cache": cell.cache,
        "finished": len(outcomes),
        "runs": listed,
        **{key: _spread(of) for key, of in values.items()},
        **references,
    }


def _outcome(run: Run, scoring: Scoring) -> Outcome:
    raw = run.result()
    assert raw is not None, "the run is finished"
    return scoring.read(raw, str(run.evaluation))


def _training(run: Run) -> dict[str, float | None]:
    rows = read_rows(run.path / LOG)
    last = rows[-max(1, len(rows) // 10) :]
    return {
        "loss": statistics.fmean(row["loss"] for row in last) if last else None,
        "seconds": rows[-1]["seconds"] if rows else None,
    }


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    return {
        "mean": statistics.fmean(values),
        "min": min(values),
        "max": max(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def _mean_by_video(outcomes: Iterable[Outcome], scoring: Scoring) -> dict[str, Values]:
    """Means over seeds by video and score, of defined values."""
    gathered: dict[str, dict[str, list[float]]] = {}
    for outcome in outcomes:
        for video, scores in outcome.by_video.items():
            of = gathered.setdefault(video, {name: [] for name in scoring.tested})
            for name, values in of.items():
                if (value := scores.get(name)) is not None:
                    values.append(value)
    return {
        video: {name: statistics.fmean(values) if values else None for name, values in of.items()}
        for video, of in gathered.items()
    }


def _tested(
    videos: Mapping[str, Values], first: Mapping[str, Values] | None, scoring: Scoring
) -> dict[str, Any] | None:
    if not first or not videos or videos.keys() != first.keys():
        return None
    return paired_scores(videos, first, scoring.lower_is_better) or None


# --- output -------------------------------------------------------------------------------------------------


def write_table(table: Mapping[str, Any], out: Path) -> None:
    """Write ``table.md`` and ``table.csv`` to ``out``."""
    write_output(out / "table.md", to_markdown(table))
    write_output(out / "table.csv", to_csv(table))


def to_markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown: mean and spread of each cell, differences from the first cell, and failures."""
    lines = [f"Split {table['split']}, seeds {', '.join(map(str, table['seeds']))}; {SPREAD}.", ""]
    lines += _pipe(("cell", "runs", *table["columns"].values()), (row_of(table, cell) for cell in table["cells"]))
    tested = [cell for cell in table["cells"] if cell["against_first"]]
    if tested:
        lines += [
            "",
            f"Difference from {table['cells'][0]['name']}, mean over videos [95 % interval], p. {table['test']}.",
            "",
        ]
        lines += _pipe(
            ("cell", *table["tested"].values()),
            (
                (cell["name"], *(_difference(cell["against_first"].get(name)) for name in table["tested"]))
                for cell in tested
            ),
        )
    if failed := failures(table):
        lines += ["", *(printable(f"- {run['path']}: {run['error']}") for run in failed)]
    return "\n".join(lines) + "\n"


def to_csv(table: Mapping[str, Any]) -> str:
    """The table as CSV: a row for each cell, a column for each setting and statistic."""
    settings = list(dict.fromkeys(key for cell in table["cells"] for key in cell["settings"]))
    columns, parts = table["columns"], ("mean", "min", "max", "std")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", *settings, "finished", *(f"{key}_{part}" for key in columns for part in parts), "error"])
    for cell in table["cells"]:
        errors = [run["error"] for run in cell["runs"] if run["error"]]
        writer.writerow(
            [
                cell["name"],
                *(cell["settings"].get(key, "") for key in settings),
                cell["finished"],
                *((cell[key] or {}).get(part) for key in columns for part in parts),
                errors[0] if errors else "",
            ]
        )
    return text.getvalue()


def failures(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [run for cell in table["cells"] for run in cell["runs"] if run["state"] == "failed"]


def row_of(table: Mapping[str, Any], cell: Mapping[str, Any]) -> list[str]:
    """The cell's name, its runs and a text for each column: the mean, and the spread in brackets."""
    failed = sum(run["state"] == "failed" for run in cell["runs"])
    runs = f"{cell['finished']}/{len(cell['runs'])}" + (f" ({failed} failed)" if failed else "")
    return [cell["name"], runs, *(_value(cell[key], key) for key in table["columns"])]


def _value(of: Mapping[str, Any] | None, key: str) -> str:
    if of is None:
        return "–"
    digits = 0 if key == "seconds" else 1 if key == "effective_slots" or key.startswith("centre_") else 3
    mean, low, high = (f"{of[part]:.{digits}f}" for part in ("mean", "min", "max"))
    return mean if len(of["values"]) == 1 else f"{mean} ({low}–{high})"


def _difference(of: Mapping[str, Any] | None) -> str:
    if of is None:
        return "–"
    interval = "" if of["low"] is None else f" [{of['low']:+.3f}, {of['high']:+.3f}]"
    return f"{of['difference']:+.3f}{interval}, p = {of['p']:.2g}"


def _pipe(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[printable(text).replace("|", "\\|") for text in row] for row in (titles, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(titles), *lines[1:]]
