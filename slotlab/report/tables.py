"""The report's tables, written once for the page and for Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from featcache.errors import IncompatibleError
from featcache.scale.report import ROWS, StoreReport
from featcache.store.spec import flatten
from slotlab.report.charts import store_label
from slotlab.report.gather import RunData
from slotlab.scoring.groups import paired
from slotlab.scoring.over_frames import QUANTITIES

SCORES = {"fg_ari": "FG-ARI", "mbo": "mBO", "miou": "mIoU", "ari": "ARI"}
PART_SCORES = ("fg_ari", "mbo", "miou")
FLOORS = {"kmeans_raw": "floor: k-means, raw tokens", "kmeans_whitened": "floor: k-means, whitened tokens"}
GROUPS = {
    "by_material": "By material",
    "by_size": "By size",
    "by_objects": "By number of objects",
    "by_visibility": "By visibility",
}


@dataclass(frozen=True)
class Cell:
    """One entry: what is shown, and the number behind it."""

    text: str
    value: float | None = None
    detail: str = ""  # beside it, smaller: an interval
    best: bool = False  # of its column


@dataclass(frozen=True)
class Row:
    label: str
    cells: tuple[Cell, ...]
    kind: str = "run"  # run, reference or part
    colour: int | None = None  # of the run, in the palette of lines
    note: str = ""  # under the label


@dataclass(frozen=True)
class Table:
    key: str
    title: str
    columns: tuple[str, ...]  # of the cells; the label's is apart
    rows: tuple[Row, ...]
    label: str = ""
    note: str = ""
    numeric: bool = True


def number(value: Any, digits: int = 3) -> Cell:
    """A score; a dash where it is not defined."""
    if value is None:
        return Cell("–")
    return Cell(f"{value:.{digits}f}".replace("-", "−") if isinstance(value, float) else f"{value}", float(value))


def scored(values: Mapping[str, Any], key: str, confidence: Mapping[str, Any] | None) -> Cell:
    """A score with its confidence interval, where there is one."""
    interval = (confidence or {}).get(key)
    detail = f"{interval[0]:.3f}–{interval[1]:.3f}".replace("-", "−") if interval else ""
    return replace(number(values.get(key)), detail=detail)


def state(run: RunData) -> str:
    """How far a run has come."""
    steps = run.config.optim.steps
    if run.step is None:
        logged = run.rows[-1]["step"] if run.rows else 0
        return f"step {logged} of {steps}, no checkpoint yet"
    return f"{steps} steps" if run.finished else f"step {run.step} of {steps}"


def description(run: RunData) -> str:
    """Model and features of a run in a few words."""
    model = run.config.model.kind.replace("_", " ")
    slots = run.config.model.slots
    grid = "" if run.loaded is None else " · {}×{} grid".format(*run.loaded.model.grid)
    source = "frames" if run.tap == "video" else f"{run.store.spec.backbone}, {run.tap}"
    return f"{model}, {slots} slots · {source}{grid}"


def summary(runs: Sequence[RunData]) -> Table:
    """Every run, its ceiling and its floors."""
    films = any(found["frames"] > found["videos"] for run in runs if (found := run.evaluation))
    of_videos = {"fg_ari_video": "FG-ARI video", "mbo_video": "mBO video"} if films else {}  # not of single images
    columns = (*SCORES.values(), *of_videos.values(), "Effective slots", "Mask similarity")
    keys = (*SCORES, *of_videos)
    rows = []
    for n, run in enumerate(runs):
        found = run.evaluation or {}
        cells = [scored(found, key, found.get("confidence")) for key in keys]
        cells += [number(diagnostic(run, "effective_slots"), 1), number(diagnostic(run, "mask_similarity"))]
        rows.append(Row(run.name, tuple(cells), colour=n, note=f"{description(run)} · {state(run)}"))
    rows = mark_best(rows, len(keys))
    rows += [Row(label, cells_of(values, len(columns)), "reference") for label, values in references(runs)]
    level = [r.evaluation["confidence"]["level"] for r in runs if r.evaluation and r.evaluation.get("confidence")]
    note = (
        f"Means over frames, of the {published_masks(runs)} masks at the resolution of the ground truth"
        + ("; “video”: slots must keep their objects through a video." if films else ".")
        if any(run.evaluation for run in runs)
        else "Without ground-truth masks there is nothing to score against; diagnostics need none."
    )
    if level:
        note += f" Small: {level[0]:.0%} intervals, by a bootstrap over videos."
    return Table("summary", "Scores", columns, tuple(rows), "run", note)


def published_masks(runs: Sequence[RunData]) -> str:
    """Whose masks the scores are of."""
    kinds = {run.config.published_masks for run in runs if run.evaluation}
    return f"{kinds.pop()}’s" if len(kinds) == 1 else "published (decoder’s or attention’s, see configuration)"


def diagnostic(run: RunData, key: str) -> float | None:
    """Of the evaluation, or of the frames followed where there is no ground truth."""
    if run.evaluation is not None:
        return run.evaluation.get(key)
    values = [float(v) for item in run.traces.values() for v in item.values[key] if v == v]
    return sum(values) / len(values) if values else None


def references(runs: Sequence[RunData]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Ceiling and floors of the runs, equal ones once."""
    seen: set[str] = set()
    for run in runs:
        if run.evaluation is None:
            continue
        for label, values in references_of(run):
            text = label + json.dumps(values, sort_keys=True)
            if text not in seen:
                seen.add(text)
                several = any(label == other for r in runs if r is not run and r.evaluation
                              for other, v in references_of(r) if v != values)  # fmt: skip
                yield (f"{label} ({run.name})" if several else label), values


def references_of(run: RunData) -> list[tuple[str, Mapping[str, Any]]]:
    """Of one run: name and scores."""
    assert run.evaluation is not None
    floors = [
        (FLOORS.get(name, f"floor: {name.replace('_', ' ')}"), values)
        for name, values in (run.evaluation.get("floor") or {}).items()
    ]
    ceiling = run.evaluation.get("reference")
    return ([("ceiling of the mask grid", ceiling)] if ceiling else []) + floors


def cells_of(values: Mapping[str, Any], width: int) -> tuple[Cell, ...]:
    """Scores of a reference, padded to a table's width."""
    cells = [number(values.get(key)) for key in SCORES]
    return tuple(cells + [Cell("")] * (width - len(cells)))


def mark_best(rows: Sequence[Row], columns: int) -> list[Row]:
    """The largest value of each of the first ``columns`` columns, where several rows have one."""
    marked = [list(row.cells) for row in rows]
    for column in range(columns):
        values = [cells[column].value for cells in marked]
        known = [v for v in values if v is not None]
        if len(known) > 1 and max(known) > min(known):
            for cells in marked:
                cells[column] = replace(cells[column], best=cells[column].value == max(known))
    return [replace(row, cells=tuple(cells)) for row, cells in zip(rows, marked, strict=True)]


def groups(runs: Sequence[RunData]) -> list[Table]:
    """The scores of parts of the objects or frames: whatever ``by_...`` the evaluation has, videos apart."""
    keys: list[str] = []
    for run in runs:
        keys += [k for k, v in (run.evaluation or {}).items() if k.startswith("by_") and k not in keys and v]
    tables = []
    for key in keys:
        if key == "by_video":
            continue
        rows = []
        names = list(dict.fromkeys(n for r in runs for n in (r.evaluation or {}).get(key) or {}))
        for name in names:
            part = []
            for n, run in enumerate(runs):
                values = ((run.evaluation or {}).get(key) or {}).get(name)
                if isinstance(values, Mapping):
                    sure = (((run.evaluation or {}).get("confidence") or {}).get(key) or {}).get(name)
                    cells = (*(scored(values, s, sure) for s in PART_SCORES), number(values.get("frames")))
                    part.append(run_row(name, runs, n, cells))
            rows += mark_best(part, 3)
        title = GROUPS.get(key, key.replace("_", " ").capitalize())
        columns = (*(SCORES[s] for s in PART_SCORES), "frames")
        tables.append(Table(key, title, columns, tuple(rows), "in sight" if key == "by_objects" else "objects"))
    return tables


def run_row(label: str, runs: Sequence[RunData], position: int, cells: tuple[Cell, ...]) -> Row:
    """A row about something in one run, whose name and colour it has where there are several."""
    if len(runs) == 1:
        return Row(label, cells)
    return Row(f"{label} · {runs[position].name}", cells, colour=position)


def masks_of(runs: Sequence[RunData]) -> Table | None:
    """Decoder's masks and slot attention's side by side, where they differ."""
    rows = []
    for n, run in enumerate(runs):
        found = run.evaluation or {}
        if found and any(found["decoder"][key] != found["attention"][key] for key in SCORES):
            for label in ("decoder", "attention"):
                cells = tuple(number(found[label][key]) for key in SCORES)
                rows.append(run_row(label, runs, n, cells))
    note = "The same slots, by how they were formed (attention) and by how they are decoded."
    return Table("masks", "Two kinds of masks", tuple(SCORES.values()), tuple(rows), "masks", note) if rows else None


def paired_runs(runs: Sequence[RunData]) -> Table | None:
    """Every run against the first, video by video, where both were scored on the same videos."""
    first, rows = runs[0], []
    for n, run in enumerate(runs[1:], 1):
        if first.evaluation is None or run.evaluation is None:
            continue
        try:
            found = paired(run.evaluation, first.evaluation)["scores"]
        except IncompatibleError:
            continue  # other videos: nothing to pair
        for key in ("fg_ari", "mbo"):
            if key in found:
                item = found[key]
                low, high = item["low"], item["high"]
                interval = f"{signed(low)} to {signed(high)}" if low is not None else ""
                cells = (
                    Cell(signed(item["difference"]), item["difference"], interval),
                    Cell(f"{item['p']:.3f}" if item["p"] >= 0.001 else "< 0.001", item["p"]),
                    Cell(f"{item['ahead']} of {item['videos']}", item["ahead"]),
                )
                rows.append(Row(f"{SCORES[key]} · {run.name}", cells, colour=n))
    note = (
        f"Means over videos of the difference from {first.name}, with 95% bootstrap intervals over videos; p of "
        "Wilcoxon’s signed-rank test, two-sided. The sample are the videos: what another seed would give is not in it."
    )
    title = f"Against {first.name}"
    return Table("paired", title, ("difference", "p", "videos ahead"), tuple(rows), "score", note) if rows else None


def signed(value: float) -> str:
    """With its sign, a true minus."""
    return f"{value:+.3f}".replace("-", "−")


def videos(runs: Sequence[RunData]) -> Table | None:
    """FG-ARI and mBO of every video."""
    scored_runs = [(n, run) for n, run in enumerate(runs) if run.evaluation and run.evaluation.get("by_video")]
    if not scored_runs:
        return None
    ids = list(dict.fromkeys(i for _, run in scored_runs for i in run.evaluation["by_video"]))  # type: ignore[index]
    columns = tuple(f"{SCORES[key]} {run.name}" if len(scored_runs) > 1 else SCORES[key]
                    for _, run in scored_runs for key in ("fg_ari", "mbo"))  # fmt: skip
    rows = []
    for name in sorted(ids):
        values = [run.evaluation["by_video"].get(name, {}) for _, run in scored_runs]  # type: ignore[index]
        rows.append(Row(name, tuple(number(v.get(key)) for v in values for key in ("fg_ari", "mbo"))))
    return Table("videos", "Every video", columns, tuple(rows), "video")


def time_table(runs: Sequence[RunData]) -> Table | None:
    """First, last and mean value of the curves over the frames."""
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
    """What ``slotlab stats`` prints."""
    if not reports:
        return None
    rows = [Row(row.name, tuple(Cell(row.show(r.scale)) for r in reports), note=row.why) for row in ROWS]
    return Table("scale", "Feature scale", tuple(store_label(r) for r in reports), tuple(rows), "quantity")


def configuration(runs: Sequence[RunData]) -> Table:
    """Every key of the configurations; those that differ first."""
    flats = [flatten(run.config.model_dump()) for run in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    rows = []
    for key in keys:
        texts = [shown(flat[key]) if key in flat else "" for flat in flats]
        rows.append(Row(key, tuple(Cell(t) for t in texts), "differs" if len(set(texts)) > 1 else "run"))
    rows.sort(key=lambda row: row.kind != "differs")
    return Table("config", "Configuration", tuple(r.name for r in runs), tuple(rows), "key", numeric=False)


def shown(value: Any) -> str:
    """A configuration's value as TOML has it."""
    return "–" if value is None else json.dumps(value) if isinstance(value, list | bool) else str(value)
