"""The scores of CLEVRTex's evaluator (Karazija et al. 2021), of contingency tables with the background in row 0.

It matches masks and true segments, background included, one to one for the largest total IoU; both lists are filled up
with empty ones to one length. A pair counts if either of it has a pixel.

Where ours is right instead (ool/clevrtex_eval.py of karazijal/clevrtex fe982ab): its mean segmentation covering loops
over ``range(max)`` and so leaves out the last segment and the last mask; an image without objects has an ARI-FG of 1
there, and none here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Masks and true segments of one image, matched: row k is true segment k, the background first."""

    iou: Tensor  # (M,) float64
    dice: Tensor  # (M,) float64
    true: Tensor  # (M,) bool: the segment has a pixel
    either: Tensor  # (M,) bool: the segment or its mask has one


def pairs(table: Tensor) -> Pairs:
    """The pairs of one image's table (n_true, K) of pixel counts."""
    present = table.sum(1).nonzero().flatten()
    highest = int(present.max()) + 1 if len(present) else 0
    most = max(highest, table.shape[1])
    counts = torch.zeros(most, most, dtype=torch.float64)
    counts[:highest, : table.shape[1]] = table[:highest].double()
    true, found = counts.sum(1), counts.sum(0)  # (M,) pixels of each segment and each mask
    union = true[:, None] + found - counts
    iou = torch.where(union > 0, counts / union, 0.0)
    rows, columns = linear_sum_assignment(iou.numpy(), maximize=True)  # rows are 0, 1, ...
    both, of_masks = counts[rows, columns], found[columns]
    area = true + of_masks
    return Pairs(iou[rows, columns], torch.where(area > 0, 2 * both / area, 0.0), true > 0, (true > 0) | (of_masks > 0))


def _of_each(tables: Tensor, value: str) -> Tensor:
    return torch.tensor([getattr(_Means.of(pairs(table)), value) for table in tables.cpu()], dtype=torch.float64)


@dataclass(frozen=True)
class _Means:
    """The means over an image's pairs; NaN where there is none."""

    miou: float  # over all pairs
    miou_fg: float  # over those but the background's
    miou_true: float  # over the true segments
    dice: float
    dice_fg: float

    @classmethod
    def of(cls, found: Pairs) -> _Means:
        count = int(found.either.sum())

        def mean(values: Tensor, over: int) -> float:
            return float(values.sum()) / over if over > 0 else float("nan")

        return cls(
            mean(found.iou, count),
            mean(found.iou[1:], count - 1),
            mean(found.iou, int(found.true.sum())),
            mean(found.dice, count),
            mean(found.dice[1:], count - 1),
        )


def miou(tables: Tensor) -> Tensor:
    """mIoU over the pairs of each image, (B,) float64, of tables (B, n_true, K)."""
    return _of_each(tables, "miou")


def miou_fg(tables: Tensor) -> Tensor:
    """mIoU over the pairs of each image but that of the background, (B,) float64."""
    return _of_each(tables, "miou_fg")


def miou_true(tables: Tensor) -> Tensor:
    """mIoU over the true segments of each image, background included, (B,) float64."""
    return _of_each(tables, "miou_true")


def dice(tables: Tensor) -> Tensor:
    """Dice over the pairs of each image, (B,) float64."""
    return _of_each(tables, "dice")


def dice_fg(tables: Tensor) -> Tensor:
    """Dice over the pairs of each image but that of the background, (B,) float64."""
    return _of_each(tables, "dice_fg")


def covering(tables: Tensor) -> Tensor:
    """Mean segmentation covering (Engelcke et al. 2020), (B,) float64: the IoU of each true segment, background
    included, with the mask that fits it best, weighted by the segment's pixels."""
    counts = tables.double()
    true, found = counts.sum(2, keepdim=True), counts.sum(1, keepdim=True)
    union = true + found - counts
    best = torch.where(union > 0, counts / union, 0.0).amax(2)  # (B, n_true)
    weight = true.squeeze(2)
    return (weight * best).sum(1) / weight.sum(1)
