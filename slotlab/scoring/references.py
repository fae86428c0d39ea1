"""References for scores: the ceiling that a patch grid sets, and the floors of clustering without training.

Both yield contingency tables through :func:`slotlab.scoring.tables.mask_tables`, the same path as a model's masks.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.store.reading import Split
from slotlab.models.kmeans import kmeans
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.runs.loaded import LoadedRun
from slotlab.scoring.collapse import effective_slots, kept_slots
from slotlab.scoring.metrics import SCORES
from slotlab.scoring.scores import Scores, Values, in_order
from slotlab.scoring.tables import UNKNOWN, count_labels, ground_truth, labelled_frames, mask_tables

FLOORS = {"kmeans_raw": "floor: k-means, raw tokens", "kmeans_whitened": "floor: k-means, whitened tokens"}


@dataclass(frozen=True)
class References:
    """A ceiling and floors for the scores of a run."""

    ceiling: Values  # scores of the ground truth, averaged to the grid
    kept_slots: float | None  # kept_slots of the ceiling; None: an earlier version did not record it
    floors: Mapping[str, Values]  # k-means by its tokens; over frames only, as it does not track
    statistics: str | None = None  # split that whitens a floor; None: an earlier version did not record it

    def as_dict(self) -> dict[str, Any]:
        kept = {} if self.kept_slots is None else {"kept_slots": self.kept_slots}
        floors = {name: dict(values) for name, values in self.floors.items()}
        told = {} if self.statistics is None else {"floor_statistics": self.statistics}
        return {"reference": dict(self.ceiling) | kept, "floor": floors} | told

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The references of :meth:`as_dict`, by this version or an earlier one."""
        ceiling, floors = raw.get("reference", {}), raw.get("floor", {})
        kept, told = ceiling.get("kept_slots"), raw.get("floor_statistics")
        return cls(in_order(ceiling), kept, {name: in_order(values) for name, values in floors.items()}, told)


KnownReferences = dict[tuple[Hashable, ...], References]  # by references_key


def statistics_split(split: Split, loaded: LoadedRun) -> Split:
    """The split whose moments whiten the floor's tokens: the run's training split, else the scored split."""
    return loaded.training_split() or split


def references_key(split: Split, loaded: LoadedRun) -> tuple[Hashable, ...]:
    """Everything that :func:`references` depends on; runs with equal keys have the same references."""
    statistics = statistics_split(split, loaded).path.resolve()
    return (split.path.resolve(), statistics, loaded.inputs, loaded.model.slots)


def references(split: Split, loaded: LoadedRun, known: KnownReferences | None = None) -> References:
    """The grid's ceiling, and the floors of k-means on each frame's tokens with as many clusters as slots.

    They take longer than the scores, so ``known`` keeps them for other runs with the same key.
    """
    known = {} if known is None else known
    key = references_key(split, loaded)
    if key not in known:
        known[key] = _measured(split, loaded)
    return known[key]


def _measured(split: Split, loaded: LoadedRun) -> References:
    statistics = statistics_split(split, loaded)
    moments = loaded.inputs.moments(statistics)
    whiten = Normaliser.from_moments("whiten", moments, shrinkage=0.1, center="channel")
    labels, grid = count_labels(split), loaded.model.grid
    clusters = min(loaded.model.slots, grid[0] * grid[1])
    ceiling, raw, whitened = Scores(), Scores(), Scores()
    effective: list[Tensor] = []
    for video in split.videos:
        truth = ground_truth(split, video)
        labelled = labelled_frames(truth)
        if not labelled.any():
            continue
        truth, tokens = truth[labelled], loaded.inputs.tokens(split, video)[labelled]
        ceiling.add_video(grid_reference(truth, grid, labels), video)
        effective.append(effective_slots(grid_masks(truth, grid, labels)))
        raw.add_video(kmeans_floor(tokens, grid, clusters, truth, labels, seed=video), video)
        whitened.add_video(kmeans_floor(whiten(tokens), grid, clusters, truth, labels, seed=video), video)
    floors = {"kmeans_raw": raw, "kmeans_whitened": whitened}
    return References(
        ceiling.summary().values,
        kept_slots(effective),
        {name: {score.key: scores.summary().values[score.key] for score in SCORES} for name, scores in floors.items()},
        str(statistics.path),
    )


_FRAMES_CLUSTERED = 64  # frames at once

_FRAMES_A_CHUNK = 8  # one-hot ground truth is (frames, n_true, H, W) floats: 23 MB at 256x256 and 11 labels


def grid_reference(segmentations: Tensor, grid: tuple[int, int], n_true: int) -> Tensor:
    """Tables (F, n_true, n_true) int64 of the ground truth, averaged to the patch grid and upsampled again.

    segmentations (F, H, W) integer labels below n_true or ``UNKNOWN``, grid (rows, columns). Each object's mask is
    averaged over the known area of each patch (exact also where patches and pixels do not line up), then upsampled and
    turned into labels like a model's masks. A perfect model with that grid and no finer decoder would score this.
    """
    tables = []
    for start in range(0, len(segmentations), _FRAMES_A_CHUNK):
        truth = segmentations[start : start + _FRAMES_A_CHUNK]
        tables.append(mask_tables(grid_masks(truth, grid, n_true), truth, n_true))
    return torch.cat(tables)


def grid_masks(segmentations: Tensor, grid: tuple[int, int], n_true: int) -> Tensor:
    """Each label's share of each patch's known pixels, (F, n_true, rows, columns); 0 where a patch has none.

    segmentations (F, H, W) integer labels below n_true, or ``UNKNOWN``.
    """
    height, width = segmentations.shape[1:]
    rows = area_weights(height, grid[0], segmentations.device)  # (h, H)
    columns = area_weights(width, grid[1], segmentations.device)  # (w, W)
    ids = torch.arange(n_true, device=segmentations.device).view(1, -1, 1, 1)
    onehot = segmentations.unsqueeze(1) == ids  # (F, n_true, H, W)
    shares = rows @ (onehot.float() @ columns.T)
    partly = (segmentations == UNKNOWN).flatten(1).any(1)  # in other frames the shares of a patch sum to one
    shares[partly] = (shares[partly] / shares[partly].sum(1, keepdim=True)).nan_to_num_(0.0)
    return shares


def kmeans_floor(
    tokens: Tensor,
    grid: tuple[int, int],
    k: int,
    segmentations: Tensor,
    n_true: int,
    *,
    rounds: int = 8,
    restarts: int = 4,
    seed: int = 0,
) -> Tensor:
    """Tables (F, n_true, k) int64 of k-means on each frame's patch tokens, with no training at all.

    tokens (F, N, D), raw or normalised, N = rows * columns of the grid; segmentations (F, H, W). The labels,
    one-hot on the grid, are treated like a model's masks. The best of several restarts counts, because a floor should
    not be low by bad luck. A frame's draws depend on ``seed`` and on its position in the call.
    """
    draws = Draws(seed)
    tables = []
    for start in range(0, len(tokens), _FRAMES_CLUSTERED):
        frames = slice(start, start + _FRAMES_CLUSTERED)
        labels = kmeans(tokens[frames], k, rounds, draws, restarts).labels  # (f, N)
        masks = F.one_hot(labels, k).transpose(1, 2).reshape(-1, k, *grid).float()  # (f, k, h, w)
        tables.append(mask_tables(masks, segmentations[frames], n_true))
    return torch.cat(tables)


def area_weights(pixels: int, patches: int, device: torch.device) -> Tensor:
    """(patches, pixels) float32: the share of each patch that each pixel covers; rows sum to 1."""
    edges = torch.arange(patches + 1, dtype=torch.float64, device=device) * (pixels / patches)
    start = torch.arange(pixels, dtype=torch.float64, device=device)
    overlap = torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)
    return (overlap.clamp_min_(0) * (patches / pixels)).float()
