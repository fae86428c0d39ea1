"""References for scores: the ceiling that a patch grid sets, and the floors of segments found without training.

Both yield contingency tables through :func:`slotlab.scoring.tables.mask_tables`, the same path as a model's masks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.store.kept import Kept
from featcache.store.reading import Split
from slotlab.models.kmeans import kmeans
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.models.segments import MOST_PATCHES, SHRINKAGE, normalised_cuts, soft_segments
from slotlab.runs.loaded import LoadedRun
from slotlab.scoring.collapse import effective_slots, kept_slots
from slotlab.scoring.digest import scoring_code
from slotlab.scoring.intervals import Float
from slotlab.scoring.metrics import SCORES
from slotlab.scoring.scores import Means, Values, in_order
from slotlab.scoring.tables import UNKNOWN, count_labels, ground_truth, labelled_frames, mask_tables, stacked
from slotlab.words import Floors


@dataclass(frozen=True)
class Floor:
    """A way to segment a frame by its tokens alone.

    ``masks`` turns tokens (F, N, D), raw or whitened, into masks (F, K, N) that sum to one; it also takes the grid, the
    number of clusters where a number is needed, and random draws.
    """

    title: str
    whitened: bool
    masks: Callable[[Tensor, tuple[int, int], int, Draws], Tensor]
    most_patches: int | None = None  # of the largest grid that it is measured on
    usual: bool = True  # whether it is measured without being asked for


def _kmeans(tokens: Tensor, grid: tuple[int, int], clusters: int, draws: Draws) -> Tensor:
    # The best of several restarts, because a floor should not be low by bad luck.
    labels = kmeans(tokens, clusters, rounds=8, draws=draws, restarts=4).labels
    return F.one_hot(labels, clusters).mT.float()


def _segments(tokens: Tensor, grid: tuple[int, int], clusters: int, draws: Draws) -> Tensor:
    return soft_segments(tokens, grid)


def _cuts(tokens: Tensor, grid: tuple[int, int], clusters: int, draws: Draws) -> Tensor:
    labels = normalised_cuts(tokens, grid)
    return F.one_hot(labels, int(labels.max()) + 1).mT.float()


FLOORS = {
    "kmeans_raw": Floor("floor: k-means, raw tokens", False, _kmeans),
    "kmeans_whitened": Floor("floor: k-means, whitened tokens", True, _kmeans),
    "tfs": Floor("floor: training-free segments", True, _segments, MOST_PATCHES),
    "ncut": Floor("floor: normalised cuts", True, _cuts, MOST_PATCHES, usual=False),
}


def floor_title(name: str) -> str:
    """The title of a floor's row, also of one that another version measured."""
    return FLOORS[name].title if name in FLOORS else f"floor: {name.replace('_', ' ')}"


def floors_asked(asked: Floors, grid: tuple[int, int]) -> list[str]:
    """The names of the floors to measure on a grid."""
    patches = grid[0] * grid[1]
    fitting = {name: of for name, of in FLOORS.items() if of.most_patches is None or patches <= of.most_patches}
    return [name for name, of in fitting.items() if of.usual or asked == "all"]


@dataclass(frozen=True)
class References:
    """A ceiling and floors for the scores of a run."""

    ceiling: Values  # scores of the ground truth, averaged to the grid
    kept_slots: float | None  # kept_slots of the ceiling; None: an earlier version did not record it
    floors: Mapping[str, Values]  # by their names in FLOORS; over frames only, as they do not track
    statistics: str | None = None  # split that whitens floors; None: an earlier version did not record it

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
    """The split whose moments whiten the floors' tokens: the run's training split, else the scored split."""
    return loaded.training_split() or split


def references_key(split: Split, loaded: LoadedRun) -> tuple[Hashable, ...]:
    """Everything that :func:`references` depends on; runs with equal keys have the same references."""
    statistics = statistics_split(split, loaded).path.resolve()
    return (split.path.resolve(), statistics, loaded.inputs, loaded.model.slots)


def references(
    split: Split, loaded: LoadedRun, known: KnownReferences | None = None, asked: Floors = "usual"
) -> References:
    """The grid's ceiling, and the floors asked for; k-means takes as many clusters as the model has slots.

    They take longer than the scores, so ``known`` keeps them for other runs with the same key, and the split's folder
    for other evaluations of what it holds, by the same code.
    """
    known = {} if known is None else known
    key, floors = references_key(split, loaded), floors_asked(asked, loaded.model.grid)
    if key not in known or not set(floors) <= known[key].floors.keys():
        known[key] = _kept(split, loaded, floors) or _measured(split, loaded, floors)
    return known[key]


def _kept(split: Split, loaded: LoadedRun, floors: list[str]) -> References | None:
    """What an earlier evaluation measured of the same values by the same code, if that has the floors."""
    file, key = _place(split, loaded)
    raw = file.get(key)
    if raw is None or not set(floors) <= raw["floor"].keys():
        return None
    chosen = {name: raw["floor"][name] for name in floors}
    return References.from_dict(raw | {"floor": chosen, "floor_statistics": str(statistics_split(split, loaded).path)})


def _place(split: Split, loaded: LoadedRun) -> tuple[Kept, str]:
    """The file that keeps them, and the key in it: all that they depend on, by content."""
    inputs, statistics = loaded.inputs, statistics_split(split, loaded)
    read = (inputs.tap, inputs.dim, *loaded.model.grid, loaded.model.slots, *(score.key for score in SCORES))
    version = f"{scoring_code()} {split.digest}"
    return Kept(split.path, "references", version), " ".join(map(str, (*read, statistics.digest)))


def _measured(split: Split, loaded: LoadedRun, floors: list[str]) -> References:
    statistics = statistics_split(split, loaded)
    moments = loaded.inputs.moments(statistics)
    whiten = Normaliser.from_moments("whiten", moments, SHRINKAGE, center="channel")
    labels, grid = count_labels(split), loaded.model.grid
    clusters = min(loaded.model.slots, grid[0] * grid[1])
    ceiling, found = Means(), {name: Means() for name in floors}
    effective: list[Float] = []
    for video in split.videos:
        truth = ground_truth(split, video)
        labelled = labelled_frames(truth)
        if not labelled.any():
            continue
        truth, raw = truth[labelled], loaded.inputs.tokens(split, video)[labelled]
        whitened = whiten(raw)
        ceiling.add_video(grid_reference(truth, grid, labels), video)
        effective.append(effective_slots(_shares(truth, grid, labels_in(truth))).numpy())
        for name, scores in found.items():
            tokens = whitened if FLOORS[name].whitened else raw
            scores.add_video(floor_tables(name, tokens, grid, clusters, truth, labels, seed=video), video)
    values = {name: scores.summary().values for name, scores in found.items()}
    measured = References(
        ceiling.summary().values,
        kept_slots(effective),
        {name: {score.key: of[score.key] for score in SCORES} for name, of in values.items()},
        str(statistics.path),
    )
    file, key = _place(split, loaded)
    file.add(key, measured.as_dict())
    return measured


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
        there = labels_in(truth)  # few of a split's labels, whose masks are upsampled: the others are empty
        table = truth.new_zeros((len(truth), n_true, n_true), dtype=torch.int64)
        table[:, :, there] = mask_tables(_shares(truth, grid, there), truth, n_true)
        tables.append(table)
    return torch.cat(tables)


def labels_in(segmentations: Tensor) -> Tensor:
    """The labels of known pixels (labels,), in rising order, and always the background's."""
    found = torch.unique(segmentations)
    return torch.cat([found.new_zeros(1), found[found > 0]]).long()


def grid_masks(segmentations: Tensor, grid: tuple[int, int], n_true: int) -> Tensor:
    """Each label's share of each patch's known pixels, (F, n_true, rows, columns); 0 where a patch has none.

    segmentations (F, H, W) integer labels below n_true, or ``UNKNOWN``.
    """
    return _shares(segmentations, grid, torch.arange(n_true))


def _shares(segmentations: Tensor, grid: tuple[int, int], labels: Tensor) -> Tensor:
    """:func:`grid_masks` of some labels (labels,), among them all that there are."""
    height, width = segmentations.shape[1:]
    rows = area_weights(height, grid[0], segmentations.device)  # (h, H)
    columns = area_weights(width, grid[1], segmentations.device)  # (w, W)
    ids = labels.to(segmentations.device).view(1, -1, 1, 1)
    onehot = segmentations.unsqueeze(1) == ids  # (F, n_true, H, W)
    shares = rows @ (onehot.float() @ columns.T)
    partly = (segmentations == UNKNOWN).flatten(1).any(1)  # in other frames the shares of a patch sum to one
    shares[partly] = (shares[partly] / shares[partly].sum(1, keepdim=True)).nan_to_num_(0.0)
    return shares


_FRAMES_CLUSTERED = 64  # frames at once


def floor_tables(
    name: str,
    tokens: Tensor,
    grid: tuple[int, int],
    clusters: int,
    segmentations: Tensor,
    n_true: int,
    *,
    seed: int = 0,
) -> Tensor:
    """Tables (F, n_true, K) int64 of one of ``FLOORS``, with no training at all.

    tokens (F, N, D), raw or whitened as the floor wants them, N = rows * columns of the grid; segmentations (F, H, W).
    Its masks are treated like a model's. A frame's draws depend on ``seed`` and on its position in the call.
    """
    draws = Draws(seed)
    tables = []
    for start in range(0, len(tokens), _FRAMES_CLUSTERED):
        frames = slice(start, start + _FRAMES_CLUSTERED)
        masks = FLOORS[name].masks(tokens[frames], grid, clusters, draws)  # (f, K, N)
        tables.append(mask_tables(masks.reshape(*masks.shape[:2], *grid), segmentations[frames], n_true))
    return stacked(tables)


def area_weights(pixels: int, patches: int, device: torch.device) -> Tensor:
    """(patches, pixels) float32: the share of each patch that each pixel covers; rows sum to 1."""
    edges = torch.arange(patches + 1, dtype=torch.float64, device=device) * (pixels / patches)
    start = torch.arange(pixels, dtype=torch.float64, device=device)
    overlap = torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)
    return (overlap.clamp_min_(0) * (patches / pixels)).float()
