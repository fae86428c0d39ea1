"""Segmentation scores of contingency tables, and ``SCORES``, the list of scores that tables and pages show.

A video's table is the sum of its frames' tables, so the same functions score frames and whole videos. All of them
work on a batch, on any device; counts are int64 and scores float64. NaN means "not defined here"; means over a split
leave such frames out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MATCHED_IOU = 0.1  # at a lower IoU a slot only grazes its matched object


def adjusted_rand_index(table: Tensor, foreground: bool, objects: Tensor | None = None) -> Tensor:
    """Adjusted Rand index (Hubert & Arabie 1985), (B,) float64, at most 1 and 0 in expectation for chance.

    table (B, n_true, n_pred). ``foreground`` leaves out the pixels whose ground truth is background (row 0);
    the prediction keeps all its slots (FG-ARI). ``objects`` (B, n_true - 1) bool keeps the pixels of some objects only,
    for a score by material, and needs ``foreground`` (else ``ValueError``).

    NaN if no pixel is left. Degenerate cases follow scikit-learn: one object in one slot scores 1, one
    object split among several slots 0. Values can be slightly below 0, and are not clipped.
    """
    counts = table.double()
    if objects is not None:
        if not foreground:
            raise ValueError("a score of some objects leaves the background out: pass foreground=True")
        counts = counts[:, 1:] * objects.unsqueeze(-1)
    elif foreground:
        counts = counts[:, 1:]
    # Ordered pairs of pixels in float64: the counts are exact up to 2**53, and their products, which would
    # wrap around in int64 beyond 2**31 pairs, are only rounded.
    total = counts.sum((1, 2))
    both = counts.square().sum((1, 2))
    same_true = counts.sum(2).square().sum(1)
    same_pred = counts.sum(1).square().sum(1)
    together = both - total  # same object, same slot
    split = same_true - both  # same object, different slots
    merged = same_pred - both  # different objects, same slot
    apart = total.square() - same_true - same_pred + both  # different objects, different slots
    above = 2 * (together * apart - split * merged)
    below = (together + split) * (split + apart) + (together + merged) * (merged + apart)
    score = torch.where((split == 0) & (merged == 0), 1.0, above / below)
    return torch.where(total > 0, score, torch.nan)


def foreground_ari(table: Tensor, objects: Tensor | None = None) -> Tensor:
    """FG-ARI, (B,) float64: :func:`adjusted_rand_index` without the background's pixels.

    ``objects`` (B, n_true - 1) bool keeps the pixels of some objects only. It is then NaN where fewer than two of them
    are visible: for one object a single stray pixel turns 1 into 0.
    """
    score = adjusted_rand_index(table, foreground=True, objects=objects)
    return score if objects is None else torch.where(visible(table, objects) > 1, score, torch.nan)


def whole_ari(table: Tensor, objects: Tensor | None = None) -> Tensor:
    """ARI of all pixels, background included, (B,) float64. ``ValueError`` for a subset of objects."""
    if objects is not None:
        raise ValueError("the ARI of all pixels has no part for some objects; take FG-ARI")
    return adjusted_rand_index(table, foreground=False)


def visible(table: Tensor, objects: Tensor | None = None) -> Tensor:
    """Number of visible objects, (B,) int64, or of those in ``objects``: they have a pixel in table (B, n_true, K)."""
    seen = table[:, 1:].sum(-1) > 0
    return (seen if objects is None else seen & objects).sum(-1)


def object_iou(table: Tensor) -> Tensor:
    """Intersection over union of each object with each slot, (B, n_true - 1, n_pred) float64.

    table (B, n_true, n_pred); background pixels that a slot covers count in its union. NaN where the object
    has no pixel.
    """
    counts = table.double()
    inter = counts[:, 1:]  # (B, objects, n_pred)
    true = inter.sum(2, keepdim=True)  # (B, objects, 1)
    iou = inter / (true + counts.sum(1, keepdim=True) - inter)
    return torch.where(true > 0, iou, torch.nan)


def best_overlap(table: Tensor) -> Tensor:
    """IoU of each object with the slot that fits it best, (B, n_true - 1) float64; NaN for absent objects."""
    return object_iou(table).amax(-1)


def mean_best_overlap(table: Tensor, objects: Tensor | None = None) -> Tensor:
    """mBO: mean over a frame's objects of each one's IoU with its best slot, (B,) float64.

    One slot may serve several objects; background is ignored. ``objects`` (B, n_true - 1) bool selects objects; NaN
    if none is present. (Pont-Tuset et al. 2017, as used by DINOSAUR.)
    """
    return _mean_over_objects(best_overlap(table), objects)


def matched_slots(table: Tensor, above: float = 0.0) -> Tensor:
    """The matched slot of each object, (B, n_true - 1) int64; -1 for an absent object or one without a slot.

    Objects and slots are matched one to one for the largest total IoU (Hungarian algorithm); a match counts only if its
    IoU exceeds ``above``.
    """
    matched = table.new_full((len(table), table.shape[1] - 1), -1, dtype=torch.int64, device="cpu")
    for frame, overlaps in enumerate(object_iou(table).nan_to_num(0.0).cpu().numpy()):
        # Rows of absent objects are all 0, so they take no slot from an object that is present.
        rows, columns = linear_sum_assignment(overlaps, maximize=True)
        touching = overlaps[rows, columns] > above
        matched[frame, rows[touching]] = torch.from_numpy(columns[touching])
    return matched.to(table.device)


def matched_iou(table: Tensor) -> Tensor:
    """IoU of each object with its own slot (:func:`matched_slots`), (B, n_true - 1) float64.

    An object left without a slot gets 0, an absent one NaN.
    """
    iou, slots = object_iou(table), matched_slots(table)
    own = iou.gather(-1, slots.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where((slots < 0) & ~own.isnan(), 0.0, own)  # NaN stays NaN


def mean_iou(table: Tensor, objects: Tensor | None = None) -> Tensor:
    """mIoU: mean over a frame's objects of :func:`matched_iou`, (B,) float64.

    The matching always includes all objects; ``objects`` (B, n_true - 1) bool only selects those to average. NaN if
    none of them is present.
    """
    return _mean_over_objects(matched_iou(table), objects)


def _mean_over_objects(values: Tensor, objects: Tensor | None) -> Tensor:
    if objects is not None:
        values = torch.where(objects, values, torch.nan)
    return values.nanmean(-1)


# -- the scores to show ------------------------------------------------------------------------------------

# summary: tables of whole runs. parts: tables of groups of objects or frames, so the score takes a subset of objects.
# comparison: tables of experiments, and of refined masks beside plain ones. headline: places with room for few scores
# (ladders, gallery, curves over the frames, looks while training, colour changes, tests between runs).
Place = Literal["summary", "parts", "comparison", "headline"]
EVERYWHERE: tuple[Place, ...] = ("summary", "parts", "comparison", "headline")


class OfTables(Protocol):
    """A score (B,) float64 of tables (B, n_true, K) int64, or of a selection of objects (B, n_true - 1) bool."""

    def __call__(self, table: Tensor, objects: Tensor | None = None, /) -> Tensor: ...


@dataclass(frozen=True)
class Score:
    """One metric. Evaluations hold it for frames, videos and groups; ``frames`` and ``videos`` say where it shows."""

    key: str  # name in JSON; with the suffix _video, of whole videos
    title: str
    of_tables: OfTables
    frames: tuple[Place, ...]  # places that show its mean over frames
    videos: tuple[Place, ...] = ()  # places that show its mean over whole videos
    higher_is_better: bool = True
    compares: bool = False  # objects with each other: not defined for a split without two in a frame, or in a video

    def order(self, value: float) -> float:
        """The value, negated if lower is better: a sort key."""
        return value if self.higher_is_better else -value


SCORES: tuple[Score, ...] = (
    Score("fg_ari", "FG-ARI", foreground_ari, EVERYWHERE, ("summary", "comparison", "headline"), compares=True),
    Score("mbo", "mBO", mean_best_overlap, EVERYWHERE, ("summary",)),
    Score("miou", "mIoU", mean_iou, ("summary", "parts", "comparison")),
    Score("ari", "ARI", whole_ari, ("summary",)),
)


def scores_in(place: Place) -> tuple[Score, ...]:
    """The scores that a place shows as means over frames."""
    return tuple(score for score in SCORES if place in score.frames)


def shown(place: Place) -> dict[str, str]:
    """Key -> title of :func:`scores_in` a place."""
    return {score.key: score.title for score in scores_in(place)}


def shown_of_videos(place: Place) -> dict[str, str]:
    """Key -> title of the scores that a place also shows as means over whole videos."""
    return {f"{score.key}_video": f"{score.title} video" for score in SCORES if place in score.videos}


def score_of(name: str) -> Score | None:
    """The score that a name in JSON refers to, such as ``fg_ari``, ``fg_ari_video``, ``fg_ari_metal``; None if none."""
    known = [score for score in SCORES if name == score.key or name.startswith(f"{score.key}_")]
    return max(known, key=lambda score: len(score.key), default=None)


def title_of(name: str) -> str:
    """The title of a name in JSON, such as ``FG-ARI``, ``FG-ARI video``, ``FG-ARI metal``."""
    score = score_of(name)
    return name.replace("_", " ") if score is None else f"{score.title} {name[len(score.key) + 1 :]}".strip()
