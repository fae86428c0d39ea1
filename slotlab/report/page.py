"""Renders the page: one HTML file that holds everything and loads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from featcache.text import printable
from slotlab.pictures import palette
from slotlab.pictures.chart import page_svg
from slotlab.report import charts, gallery, tables
from slotlab.report.gather import Gathered, Logged, RunData
from slotlab.report.options import PageOptions
from slotlab.report.provenance import environment, provenance
from slotlab.scoring.metrics import Score, scores_in, title_of
from slotlab.scoring.references import floor_title

NAMED_RUNS = 3  # most runs that a default title names


@dataclass(frozen=True)
class Rung:
    """A run between its floors and its ceiling, by one score."""

    name: str
    colour: int
    value: float
    ceiling: float | None
    floors: tuple[tuple[str, float], ...]
    score: Score

    @property
    def floor(self) -> float:
        """The best floor."""
        return max((value for _, value in self.floors), key=self.score.order)

    @property
    def share(self) -> float | None:
        """The run's share of the way from the best floor to the ceiling; None if it is not defined."""
        if self.ceiling is None or not self.floors:
            return None
        order = self.score.order
        whole = order(self.ceiling) - order(self.floor)
        return (order(self.value) - order(self.floor)) / whole if whole > 0 else None


def ladder(runs: Sequence[RunData], score: Score) -> list[Rung]:
    """Every scored run by one score."""
    rungs = []
    for n, run in enumerate(runs):
        if run.evaluation and (found := run.evaluation.values.get(score.key)) is not None:
            references = run.evaluation.references
            floors = [(floor_title(name), values.get(score.key)) for name, values in references.floors.items()]
            known = tuple((name, value) for name, value in floors if value is not None)
            rungs.append(Rung(run.name, n, found, references.ceiling.get(score.key), known, score))
    return rungs


def environment_of_templates() -> Environment:
    """Jinja with the page's filters."""
    env = Environment(
        loader=PackageLoader("slotlab.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals["line_colours"] = len(palette.LINES)
    env.filters["svg"] = lambda chart: Markup(page_svg(chart))
    env.filters["script_json"] = script_json
    env.filters["percent"] = lambda value: f"{100 * value:.2f}%"
    return env


def script_json(value: Any) -> Markup:
    """JSON that is safe inside a ``<script>``."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026"))


def render(gathered: Gathered, options: PageOptions) -> str:
    """The page as one string of HTML."""
    runs = gathered.runs
    cards = gallery.pack(runs, options.frames)
    scores = gallery.scores_of(runs)
    context: dict[str, Any] = {
        "title": options.title or default_title(runs),
        "options": options,
        "runs": runs,
        "coverage": coverage(runs),
        "cards": cards,
        "ranked_by": title_of(options.rank),
        "scores": scores,
        "data": {
            "cards": cards,
            "palette": colours(),
            "runs": [run.name for run in runs],
            "scores": list(scores.items()),
        },
        "provenance": [provenance(run) for run in runs],
        "environment": environment(),
        "light": palette.LIGHT,
        "dark": palette.DARK,
        **sections(gathered),
    }
    return printable(environment_of_templates().get_template("page.html.j2").render(context), lines=True)


def render_training(runs: Sequence[Logged]) -> str:
    """HTML of the part of the page that changes with every logged row."""
    template = environment_of_templates().get_template("training.html.j2")
    return printable(template.render(runs=runs, training=charts.training_charts(runs)), lines=True)


def sections(gathered: Gathered) -> Mapping[str, Any]:
    """Tables and charts of the page by section."""
    runs = gathered.runs
    drawn = charts.all_charts(gathered)
    return {
        "state": tables.state,
        "describe": tables.description,
        "summary": tables.summary(runs),
        "ladders": {score.title: rungs for score in scores_in("headline") if (rungs := ladder(runs, score))},
        "groups": tables.groups(runs),
        "paired_table": tables.paired_runs(runs),
        "masks_table": tables.masks_of(runs),
        "videos_table": tables.videos(runs),
        "prediction_tables": tables.predictions(runs),
        "prediction_names": [label for label, _ in charts.prediction_lines(runs)],
        "scale_table": tables.scale(gathered.scales),
        "config_table": tables.configuration(runs),
        "training": drawn["training"],
        "predictions": drawn["predictions"],
        "time": drawn["time"],
        "scale": drawn["scale"],
    }


def colours() -> dict[str, Any]:
    """The colours that the page's canvases draw with, and the width of stripes."""
    return {
        "objects": [palette.rgb(c) for c in palette.OBJECTS],
        "others": [palette.rgb(c) for c in palette.OTHERS],
        "ignored": [palette.rgb(c) for c in palette.IGNORED],
        "stripe": palette.STRIPE,
        "confidence": [palette.rgb(c) for c in palette.CONFIDENCE],
    }


def default_title(runs: Sequence[RunData]) -> str:
    """The title of a report without a given one: the names, or the number, of its runs."""
    return ", ".join(run.name for run in runs) if len(runs) <= NAMED_RUNS else f"{len(runs)} runs"


def coverage(runs: Sequence[RunData]) -> str:
    """The splits, and numbers of videos and frames, of the runs, in one line."""
    seen = dict.fromkeys((r.split.name, len(r.split.videos), r.split.frames) for r in runs)
    return "; ".join(f"split {name}, {videos} videos, {frames} frames" for name, videos, frames in seen)
