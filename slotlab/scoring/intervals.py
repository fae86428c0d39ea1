"""Confidence intervals of means over videos, by a bootstrap that draws whole videos with replacement."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LEVEL = 0.95

RESAMPLES = 10_000

SEED = 0

_DRAWS_AT_ONCE = 2**24  # counts held at once, in float64

Float = npt.NDArray[np.float64]

Interval = list[float]  # low, high

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Bootstrap:
    """Intervals of means over frames, by drawing whole videos with replacement. The seed is fixed."""

    level: float = LEVEL
    resamples: int = RESAMPLES
    seed: int = SEED

    def intervals(self, values: Mapping[Name, Tensor], videos: Tensor) -> dict[Name, Interval | None]:
        """Percentile interval of the mean of each of ``values`` (F,), without NaN; videos (F,) are the frames' ids.

        None where fewer than two videos have a value: the spread between videos is then unknown.
        """
        if not values:
            return {}
        ids, position = torch.unique(videos, return_inverse=True)
        columns = torch.stack(list(values.values()), dim=1).double()  # (F, scores)
        defined = ~columns.isnan()
        zeros = columns.new_zeros(len(ids), len(values))
        sums = zeros.index_add(0, position, columns.nan_to_num(0.0)).numpy()  # (V, scores)
        counts = zeros.index_add(0, position, defined.double()).numpy()
        means = self._means(sums, counts)  # (resamples, scores)
        found: dict[Name, Interval | None] = {}
        for index, name in enumerate(values):
            enough = int((counts[:, index] > 0).sum()) > 1
            found[name] = self._interval(means[:, index]) if enough else None
        return found

    def of_mean(self, values: Float) -> Interval | None:
        """Interval of the mean of one value per video, (V,) without NaN."""
        column = torch.from_numpy(values)
        return self.intervals({"mean": column}, torch.arange(len(column)))["mean"]

    def _means(self, sums: Float, counts: Float) -> Float:
        """Mean over all frames of each resample, (resamples, scores), from each video's sums and counts (V, scores)."""
        rng, videos = np.random.default_rng(self.seed), len(sums)
        parts = []
        step = max(1, _DRAWS_AT_ONCE // videos)
        for start in range(0, self.resamples, step):
            draws = rng.multinomial(videos, np.full(videos, 1 / videos), min(step, self.resamples - start))
            times = draws.astype(np.float64)  # (resamples, V): how often each video was drawn
            with np.errstate(invalid="ignore"):  # a resample may miss all videos with a value
                parts.append(times @ sums / (times @ counts))
        return np.concatenate(parts)

    def _interval(self, means: Float) -> Interval:
        tail = (1 - self.level) / 2
        return [float(bound) for bound in np.nanquantile(means, [tail, 1 - tail])]
