"""The scores that protocols compute, and what each is computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slotlab.protocols import clevrtex
from slotlab.protocols.protocol import Void
from slotlab.scoring.metrics import foreground_ari, mean_best_overlap, mean_iou, visible, whole_ari

# Rows of the table that a score is computed from: background and objects; background and classes; or nothing and, as
# objects, the background and the objects.
Rows = Literal["objects", "classes", "all"]


def counted(counts: Tensor, void: Void, rows: Rows) -> Tensor:
    """The table (U, n_true, K) of counts (U, n_true + 1, K), whose first row are the pixels of unknown truth.

    Row 0 of the result is no object: its pixels are in the area of masks alone.
    """
    unknown, known = counts[:, :1], counts[:, 1:]
    if void == "background":
        known = torch.cat([known[:, :1] + unknown, known[:, 1:]], 1)
    if rows != "all":
        return known
    return torch.cat([unknown if void == "in predictions" else torch.zeros_like(unknown), known], 1)


def foreground_ari_of_many(table: Tensor) -> Tensor:
    """FG-ARI, (U,) float64; NaN where fewer than two objects are visible: one object scores 1, or 0 if it is split."""
    return torch.where(visible(table) > 1, foreground_ari(table), torch.nan)


@dataclass(frozen=True)
class TableScore:
    """A score (U,) float64 of the tables of units; NaN where it is not defined."""

    title: str
    of: Callable[[Tensor], Tensor]
    rows: Rows = "objects"


@dataclass(frozen=True)
class TrackScore:
    """A mean over the objects of all videos, of :mod:`slotlab.scoring.tracks`."""

    title: str
    of: Literal["j", "f", "j_and_f"]


@dataclass(frozen=True)
class DetectionScore:
    """A number that COCO's evaluator gives for all frames, of :mod:`slotlab.protocols.detections`."""

    title: str
    of: int  # its place in COCOeval.stats


Score = TableScore | TrackScore | DetectionScore

SCORES: dict[str, Score] = {
    "fg_ari": TableScore("FG-ARI", foreground_ari),
    "fg_ari_many": TableScore("FG-ARI, two objects or more", foreground_ari_of_many),
    "ari": TableScore("ARI", whole_ari),
    "mbo": TableScore("mBO", mean_best_overlap),
    "mbo_class": TableScore("mBO of classes", mean_best_overlap, "classes"),
    "mbo_all": TableScore("mBO with background", mean_best_overlap, "all"),
    "miou": TableScore("mIoU", mean_iou),
    "miou_all": TableScore("mIoU with background", mean_iou, "all"),
    "miou_pairs": TableScore("mIoU of pairs", clevrtex.miou),
    "miou_pairs_fg": TableScore("mIoU of pairs, foreground", clevrtex.miou_fg),
    "miou_true": TableScore("mIoU of true segments", clevrtex.miou_true),
    "msc": TableScore("mSC", clevrtex.covering),
    "dice": TableScore("Dice", clevrtex.dice),
    "dice_fg": TableScore("Dice, foreground", clevrtex.dice_fg),
    "j_and_f": TrackScore("J&F", "j_and_f"),
    "j": TrackScore("J", "j"),
    "f": TrackScore("F", "f"),
    "ap": DetectionScore("AP", 0),
    "ap50": DetectionScore("AP50", 1),
    "ar100": DetectionScore("AR100", 8),
}
