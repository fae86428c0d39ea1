"""Scale reports of stores, and the rows of a table that compares them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.moments import Moments
from featcache.scale.quantities import OUTLIER_RATIO, ScaleReport, scale_report
from featcache.store.reading import FeatureStore

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class StoreReport:
    """The scale report of one tap of a store, with its origin."""

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
    """The report of every tap of a store, on ``split``, or else ``train``, or else the first split.

    ``recompute`` computes the statistics again from the stored features with dask (on the workers of ``client``, which
    must see the store under the same path), instead of reading those of the extraction. Raises ``DataError`` for a
    store that is missing, unfinished or damaged.
    """
    store = FeatureStore.open(path)
    part = store.split(split).require_complete()
    statistics: Callable[[str], Moments] = part.statistics
    if recompute:
        from featcache.scale.recompute import recomputed_statistics  # dask takes a second to import

        statistics = partial(recomputed_statistics, part, client=client)
    reports = []
    for tap in store.spec.taps:
        reports.append(StoreReport(str(path), part.name, store.spec.backbone, tap, scale_report(statistics(tap))))
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
    Row("largest |value|", lambda r: _number(r.abs_max), "float16 ends at 65504; int8 steps grow with it"),
    Row("token norm p1", lambda r: _number(r.token_norm.p1)),
    Row("token norm p50", lambda r: _number(r.token_norm.p50)),
    Row("token norm p99", lambda r: _number(r.token_norm.p99)),
    Row("token norm max", lambda r: _number(r.token_norm.max)),
    Row(
        "outlier tokens",
        lambda r: _percent(r.outlier_tokens),
        f"norm above {OUTLIER_RATIO:g} times the median: artefacts that attract a slot",
    ),
    Row("channel std min", lambda r: _number(r.channel_std.min)),
    Row("channel std p50", lambda r: _number(r.channel_std.p50)),
    Row(
        "channel std max",
        lambda r: _number(r.channel_std.max),
        "far above p50: that channel dominates the loss",
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
        "number of directions in use; far below the channels: whiten",
    ),
    Row(
        "mean predictor's MSE",
        lambda r: _number(r.mean_predictor_mse),
        "a decoder of raw features must get below this to have learnt anything",
    ),
    Row("variance between frames", lambda r: _percent(r.frame_variance.between)),
    Row(
        "variance within frames",
        lambda r: _percent(r.frame_variance.within),
        "the part that can distinguish objects within a frame",
    ),
)
