"""The scale report of several stores, side by side: a table for the terminal and a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from featcache.errors import UsageError
from featcache.moments import Moments
from featcache.scale.quantities import OUTLIER_RATIO, ScaleReport, scale_report
from featcache.store.reading import FeatureStore

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class StoreReport:
    """The scale report of one tap of one store, and where it comes from."""

    path: str
    split: str
    backbone: str
    tap: str
    scale: ScaleReport

    def as_dict(self) -> dict[str, Any]:
        """One entry of ``slotlab stats --json``."""
        place = {"path": self.path, "split": self.split, "backbone": self.backbone, "tap": self.tap}
        return place | self.scale.as_dict()


def store_reports(
    path: str | Path, split: str | None = None, recompute: bool = False, client: Client | None = None
) -> list[StoreReport]:
    """The report of every tap of a store: of ``split``, else of ``train``, else of the first there is.

    ``recompute`` reduces the stored features again, block by block with dask (on the workers of ``client``, which
    must see the store under the same path), instead of reading what the extraction gathered. Raises ``DataError``
    for a store that is missing, unfinished or damaged.
    """
    store = FeatureStore.open(path)
    name = split or ("train" if "train" in store.splits or not store.splits else store.splits[0])
    part = store[name].require_complete()
    statistics: Callable[[str], Moments] = part.statistics
    if recompute:
        from featcache.scale.recompute import recomputed_statistics  # dask takes a second to import

        statistics = partial(recomputed_statistics, part, client=client)
    reports = []
    for tap in store.spec.taps:
        reports.append(StoreReport(str(path), name, store.spec.backbone, tap, scale_report(statistics(tap))))
    return reports


@dataclass(frozen=True)
class Row:
    """One quantity of the table; ``why`` is its line in the legend."""

    name: str
    show: Callable[[ScaleReport], str]
    why: str = ""


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _percent(value: float) -> str:
    return f"{value:.2%}" if 0 < value < 0.01 else f"{value:.1%}"


ROWS = (
    Row("frames", lambda r: str(r.frames)),
    Row("patches by channels", lambda r: f"{r.patches} by {r.dim}"),
    Row("mean", lambda r: _number(r.mean)),
    Row("std", lambda r: _number(r.std), "the scale a loss sees: an MSE grows with its square"),
    Row("largest |value|", lambda r: _number(r.abs_max), "float16 ends at 65504, int8 steps widen with it"),
    Row("token norm p1", lambda r: _number(r.token_norm.p1)),
    Row("token norm p50", lambda r: _number(r.token_norm.p50)),
    Row("token norm p99", lambda r: _number(r.token_norm.p99)),
    Row("token norm max", lambda r: _number(r.token_norm.max)),
    Row(
        "outlier tokens",
        lambda r: _percent(r.outlier_tokens),
        f"norm above {OUTLIER_RATIO:g} times the median: artefacts that draw a slot to themselves",
    ),
    Row("channel std min", lambda r: _number(r.channel_std.min)),
    Row("channel std p50", lambda r: _number(r.channel_std.p50)),
    Row(
        "channel std max",
        lambda r: _number(r.channel_std.max),
        "far above p50: that channel rules the loss",
    ),
    Row("variance in top channel", lambda r: _percent(r.variance_share.top1)),
    Row(
        "variance in top 10",
        lambda r: _percent(r.variance_share.top10),
        "high: standardise the channels",
    ),
    Row(
        "effective rank",
        lambda r: f"{r.effective_rank:.0f} of {r.dim}",
        "directions in use; far below the channels: whiten",
    ),
    Row(
        "mean predictor's MSE",
        lambda r: _number(r.mean_predictor_mse),
        "a decoder on raw features that is not below this has learnt nothing",
    ),
    Row("variance between frames", lambda r: _percent(r.frame_variance.between)),
    Row(
        "variance within frames",
        lambda r: _percent(r.frame_variance.within),
        "the part that can tell objects of one frame apart",
    ),
)

# Okabe & Ito's palette without its yellow, which is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

DASHES = ("-", "--", ":")

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}


def plot_scale(reports: Sequence[StoreReport], path: str | Path) -> None:
    """Draw channel stds, token norms and spectra of all stores into one figure (png, pdf, svg by suffix).

    Raises ``UsageError`` when the suffix is no picture format or the file cannot be written.
    """
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(14.5, 5.2))
        figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.1, wspace=0.04)
        FigureCanvasAgg(figure)  # no window, no global state
        channels, norms, spectrum = figure.subplots(1, 3)
        _draw_channels(channels, reports)
        _draw_norms(norms, reports)
        _draw_spectrum(spectrum, reports)
        figure.legend(
            [Line2D([], [], **_line(i)) for i in range(len(reports))],
            [_label(report) for report in reports],
            loc="outside upper left",
            ncols=min(len(reports), 3),
        )
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{path}: cannot draw there ({reason}); name a .png in a folder that exists") from error


def _label(report: StoreReport) -> str:
    scale = f"std {_number(report.scale.std)}, {report.scale.dim}-d"
    return f"{Path(report.path).name} · {report.split} · {report.tap} ({scale})"


def _line(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "linewidth": 1.9,
    }


def _draw_channels(axes: Axes, reports: Sequence[StoreReport]) -> None:
    # Log-spaced bins shared by all stores: a shift along the axis is a ratio of scales.
    stds = [report.scale.curves.channel_std for report in reports]
    positive = np.concatenate([std[std > 0] for std in stds])
    low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    bins = np.geomspace(low / 1.1, high * 1.1, 41).tolist()
    for i, std in enumerate(stds):
        share = np.full(len(std), 100 / len(std))
        line = _line(i)
        axes.hist(std, bins, weights=share, histtype="stepfilled", alpha=0.15, color=line["color"])
        axes.hist(
            std,
            bins,
            weights=share,
            histtype="step",
            edgecolor=line["color"],
            linestyle=line["linestyle"],
            linewidth=line["linewidth"],
        )
    axes.set(xscale="log", xlabel="standard deviation of a channel", ylabel="channels (%)")
    axes.set_title("Channels: which ones carry the scale")
    _plain_ticks(axes, "x")


def _draw_norms(axes: Axes, reports: Sequence[StoreReport]) -> None:
    for i, report in enumerate(reports):
        curves = report.scale.curves
        axes.plot(100 * curves.norm_levels, curves.norm_quantiles, **_line(i))
        axes.plot(50, report.scale.token_norm.p50, "o", color=_line(i)["color"], markersize=5)
    axes.set(yscale="log", xlabel="tokens (%) with a smaller norm", ylabel="token norm", xlim=(0, 101))
    axes.set_title("Token norms: a final step means outliers")
    _plain_ticks(axes, "y")


def _draw_spectrum(axes: Axes, reports: Sequence[StoreReport]) -> None:
    # The share of the total, so that only the shape is compared; the first panel has the scales.
    smallest = 1.0
    for i, report in enumerate(reports):
        values = report.scale.curves.eigenvalues
        share = 100 * values / max(values.sum(), np.finfo(float).tiny)
        rank = np.arange(1, len(share) + 1)
        axes.plot(rank, np.where(share > 0, share, np.nan), **_line(i))
        near = int(np.clip(round(report.scale.effective_rank), 1, len(share))) - 1
        axes.plot(rank[near], share[near], "o", color=_line(i)["color"], markersize=6)
        smallest = min(smallest, share[near])
    axes.set(xscale="log", yscale="log", xlabel="principal direction", ylabel="variance (%)")
    # Directions that rounding alone fills would stretch the axis over many decades.
    axes.set_ylim(bottom=max(smallest / 100, axes.get_ylim()[0]))
    axes.set_title("Spectrum: dots mark the effective rank")
    _plain_ticks(axes, "x")
    _plain_ticks(axes, "y")


def _plain_ticks(axes: Axes, which: str) -> None:
    """Numbers such as 0.2 and 50 on a log axis instead of powers of ten."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
