"""The charts of a report, and of `slotlab stats --plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.moments import Float
from featcache.scale.report import StoreReport
from slotlab.config.schema import LOSS_NAMES
from slotlab.dynamics.measures import MEASURES, SKILL
from slotlab.pictures.chart import Chart, Series
from slotlab.scoring.metrics import score_of, title_of
from slotlab.scoring.over_frames import QUANTITIES

if TYPE_CHECKING:
    from slotlab.report.gather import Gathered, Logged, RunData

# Logged with the losses, but no losses: key -> title and caption.
OPTIMISATION = {
    "learning_rate": ("Learning rate", "the rate of Adam"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "samples_per_second": ("Samples a second", "training steps alone"),
    "wait_share": ("Waiting for data", "share of the time"),
}
UNDRAWN = ("step", "seconds", "warnings")
LOSSES = {"loss": ("Loss, total", "the weighted sum of its components"), **LOSS_NAMES}
MOST_POINTS = 400  # points of a line, about


def training_charts(runs: Sequence[Logged]) -> list[Chart]:
    """Charts of the total loss, each loss, looks at the masks and the optimiser, from metrics.jsonl."""
    keys: list[str] = []
    for run in runs:
        for row in run.rows:
            keys += [k for k, v in row.items() if k not in (*keys, *UNDRAWN) and isinstance(v, int | float)]
    # A single loss of weight one equals the total.
    redundant = {
        k for k in LOSSES if k != "loss" and all(row.get(k) in (None, row.get("loss")) for r in runs for row in r.rows)
    }
    order = {name: n for n, name in enumerate((*LOSSES, "", *OPTIMISATION))}
    keys = sorted((k for k in keys if k not in redundant), key=lambda k: order.get(k, order[""]))
    return [training_chart(key, runs) for key in keys]


def training_chart(key: str, runs: Sequence[Logged]) -> Chart:
    """The chart of one key of metrics.jsonl over the steps."""
    title, why = LOSSES.get(key) or OPTIMISATION.get(key) or look_name(key)
    series = []
    for n, run in enumerate(runs):
        points = thinned([(row["step"], row[key]) for row in run.rows if isinstance(row.get(key), int | float)])
        if points:
            series.append(Series(n, run.name, [p[0] for p in points], [p[1] for p in points]))
    return Chart(f"train-{key}", title, why, "step", tuple(series))


def look_name(key: str) -> tuple[str, str]:
    """Title and caption of a value that a look at the masks adds."""
    known = {q.name: q.title for q in QUANTITIES}
    name = key.removeprefix("eval_")
    title = title_of(name) if score_of(name) else known.get(name, name.replace("_", " ").capitalize())
    return title, "while training, on a few videos of the evaluation split" if name != key else ""


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """About ``MOST_POINTS`` points at most: means of neighbours, except the first and last point, which stay."""
    if len(points) <= MOST_POINTS:
        return points
    blocks = np.array_split(np.asarray(points[1:-1], float), MOST_POINTS - 2)
    return [points[0], *((float(b[:, 0].mean()), float(b[:, 1].mean())) for b in blocks), points[-1]]


def time_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Charts of every quantity over the frame index; empty if no video has two frames."""
    charts = []
    for q in QUANTITIES:
        series = []
        for n, run in enumerate(runs):
            curve = run.curves.get(q.name)
            if curve is not None and np.isfinite(curve.mean).sum() > 1:
                x = list(range(len(curve.mean)))
                series.append(Series(n, run.name, x, curve.mean.tolist(), curve.low.tolist(), curve.high.tolist()))
        if series:
            low = min(0.0, *(float(np.nanmin(s.low)) for s in series)) if q.unit_interval else 0.0
            high = 1.0 if q.unit_interval else None
            charts.append(Chart(f"time-{q.name}", q.title, q.why, "frame", tuple(series), y_min=low, y_max=high))
    return charts


def prediction_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Charts of every measure of predictions over the frames ahead: each run's, and the rows beside the first one's."""
    charts = []
    lines = prediction_lines(runs)
    for measure in (SKILL, *MEASURES):
        series = []
        for n, (label, row) in enumerate(lines):
            y = [np.nan if value is None else value for value in row.get(measure.key, {}).get("by_horizon", ())]
            if np.isfinite(y).any():
                series.append(Series(n, label, list(range(1, len(y) + 1)), y))
        if series:
            low = None if measure is SKILL else 0.0
            charts.append(
                Chart(f"ahead-{measure.key}", measure.title, measure.why, "frames ahead", tuple(series), y_min=low)
            )
    return charts


def prediction_lines(runs: Sequence[RunData]) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and values of each run's predictions, then of the rows beside those of the first run that has some."""
    known = [(run.name, run.rollout["rows"]) for run in runs if run.rollout]
    own = [(name if len(runs) > 1 else "world model", rows["rollout"]) for name, rows in known]
    beside = known[0][1] if known else {}
    return own + [(row["title"], row) for key, row in beside.items() if key != "rollout"]


def scale_charts(reports: Sequence[StoreReport]) -> list[Chart]:
    """Charts of channels' standard deviations, token norms and spectra, with a line for each store."""
    channels, norms, spectrum = [], [], []
    for n, report in enumerate(reports):
        curves, label = report.scale.curves, store_label(report)
        std = np.sort(curves.channel_std)
        rank = 100 * (np.arange(len(std)) + 0.5) / len(std)
        channels.append(Series(n, label, *sampled(rank, std), dot=50))
        norms.append(Series(n, label, *sampled(100 * curves.norm_levels, curves.norm_quantiles), dot=50))
        share = 100 * curves.eigenvalues / max(curves.eigenvalues.sum(), np.finfo(float).tiny)
        share = np.where(share > share[0] * 1e-6, share, np.nan)  # smaller values are rounding errors
        points = sampled(np.arange(1.0, len(share) + 1), share, log=True)
        spectrum.append(Series(n, label, *points, dot=report.scale.effective_rank))
    if not reports:
        return []
    return [
        Chart(
            "scale-channels",
            "Standard deviation of channels",
            "a long tail: few channels carry the scale; the dot is the median",
            "channels (%) below",
            tuple(channels),
            log_y=True,
        ),
        Chart(
            "scale-norms",
            "Token norms",
            "a step at the end shows outliers; the dot is the median",
            "tokens (%) below",
            tuple(norms),
            log_y=True,
        ),
        Chart(
            "scale-spectrum",
            "Spectrum, % of the variance",
            "steep: few directions dominate the loss, so whiten; the dot is the effective rank",
            "principal direction",
            tuple(spectrum),
            log_x=True,
            log_y=True,
        ),
    ]


def store_label(report: StoreReport) -> str:
    """A short name of a store and its tap."""
    return f"{report.path.rsplit('/', 1)[-1]} · {report.tap}"


def sampled(x: Float, y: Float, log: bool = False) -> tuple[list[float], list[float]]:
    """At most 120 of the points, evenly spaced along x (on its logarithm with ``log``), both ends included."""
    count, most = len(x), min(120, len(x))
    places = np.geomspace(1, count, most) - 1 if log else np.linspace(0, count - 1, most)
    kept = np.unique(places.round().astype(int))
    return x[kept].tolist(), y[kept].tolist()


def all_charts(gathered: Gathered) -> Mapping[str, list[Chart]]:
    """The charts of a report by section."""
    return {
        "training": training_charts(gathered.runs),
        "predictions": prediction_charts(gathered.runs),
        "time": time_charts(gathered.runs),
        "scale": scale_charts(gathered.scales),
    }
