"""Scores of how well masks follow the outlines of objects: the boundary F measure, and bleeding.

Both use hard masks (argmax) at the frame's resolution, and each object's own slot
(:func:`slotlab.scoring.metrics.matched_slots`):

- **boundary F** (Martin, Fowlkes & Malik 2004, as DAVIS defines it, Perazzi et al. 2016): the harmonic mean of two
  shares, of the slot's outline that lies within a tolerance of the object's outline, and of the object's outline that
  lies within it of the slot's. The tolerance is 0.8 % of the frame's diagonal, rounded up: 3 px at 256x256. An object
  without a slot scores 0.
- **bleeding**: the share of the slot's mask that lies outside its object; not defined for an object without a slot.

Where the truth of pixels is not known, an outline runs between neighbours of known truth alone, in the object's mask as
in the slot's. The boundary F of an object whose outline is not known anywhere is not defined.

Small objects bleed most, because they are as small as a patch. Both scores are therefore also given for three classes
of area, thirds of the split's visible objects, whose bounds do not depend on the run.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import KDTree
from torch import Tensor

from slotlab.scoring.metrics import matched_slots
from slotlab.scoring.scores import mean
from slotlab.scoring.tables import UNKNOWN, contingency

TOLERANCE = 0.008  # of the frame's diagonal
CLASSES = ("small", "medium", "large")

Pixels = npt.NDArray[np.int64]  # (pixels, 2): row and column


def tolerance_px(size: tuple[int, int]) -> int:
    """The distance in whole pixels within which two outlines agree, for frames of ``size`` (H, W)."""
    return math.ceil(TOLERANCE * math.hypot(*size))


def bleeding(table: Tensor, slots: Tensor) -> Tensor:
    """Share of each object's slot that lies outside the object, (B, objects) float64 in [0, 1].

    table (B, objects + 1, K) pixel counts, slots (B, objects) as from
    :func:`slotlab.scoring.metrics.matched_slots`. NaN for objects without a slot.
    """
    counts = table.double()
    own = slots.clamp_min(0).unsqueeze(-1)
    inside = counts[:, 1:].gather(-1, own).squeeze(-1)
    held = counts.sum(1, keepdim=True).expand(-1, own.shape[1], -1).gather(-1, own).squeeze(-1)
    return torch.where(slots >= 0, 1 - inside / held, torch.nan)


def boundary_f(labels: Tensor, segmentations: Tensor, slots: Tensor, tolerance: int) -> Tensor:
    """F measure of the outlines of each object and its slot, (B, objects) float64 in [0, 1].

    labels (B, H, W) slot of each pixel, segmentations (B, H, W) object of each pixel (0 background, or ``UNKNOWN``),
    slots (B, objects); tolerance in pixels. NaN for objects that are absent or whose outline is not known, 0 for
    objects without a slot.
    """
    scores = torch.where(slots >= 0, 0.0, torch.nan).double()
    for frame in range(len(labels)):
        truth, found, own = segmentations[frame], labels[frame], slots[frame].tolist()
        known = truth != UNKNOWN
        for number, pixels in enumerate(truth[known].bincount().tolist()):
            if number and pixels:
                slot = own[number - 1]
                scores[frame, number - 1] = _outline_f(found == slot, truth == number, known, tolerance)
    return scores


def _outline_f(found: Tensor, true: Tensor, known: Tensor, tolerance: int) -> float:
    """Boundary F of a mask and an object's (H, W) bool, by outlines between known pixels (H, W) bool."""
    one, other = (outline(mask, known).nonzero().cpu().numpy() for mask in (found, true))  # (pixels, 2) each
    if not len(other) and outline(true).any():
        return math.nan
    if not found.any():
        return 0.0
    precision, recall = _share_near(one, other, tolerance), _share_near(other, one, tolerance)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def outline(masks: Tensor, known: Tensor | None = None) -> Tensor:
    """Boundary pixels (..., H, W) bool of masks: those that differ from their right, lower or diagonal neighbour.

    Both must be ``known`` (..., H, W) bool, by default all are. The border of the frame is not a boundary.
    """
    known = torch.ones_like(masks) if known is None else known
    edge = torch.zeros_like(masks)
    for down, right in ((0, 1), (1, 0), (1, 1)):
        height, width = masks.shape[-2] - down, masks.shape[-1] - right
        here, there = (..., slice(height), slice(width)), (..., slice(down, None), slice(right, None))
        edge[here] |= (masks[here] ^ masks[there]) & known[here] & known[there]
    return edge


def _share_near(pixels: Pixels, others: Pixels, radius: int) -> float:
    """Share of pixels within ``radius`` (Euclidean) of one of the others; 1 if there are no pixels, as in DAVIS."""
    return float((KDTree(others).query(pixels)[0] <= radius).mean()) if len(pixels) else 1.0


class BoundaryScores:
    """Collects frames and gives the boundary scores of a split."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.tolerance = tolerance_px(size)
        self._areas: list[Tensor] = []  # (B, objects) each: each object's number of pixels
        self._f: list[Tensor] = []
        self._bleeding: list[Tensor] = []

    def add(self, labels: Tensor, segmentations: Tensor, slots: int, n_true: int) -> Tensor:
        """Add frames: the slot (below ``slots``) and the object (below ``n_true``) of each pixel, both (B, H, W).

        The object may be ``UNKNOWN``. Returns their contingency tables (B, n_true, slots) int64.
        """
        table = contingency(labels.flatten(1), segmentations.flatten(1), slots, n_true)
        own = matched_slots(table)
        self._areas.append(table[:, 1:].sum(-1).cpu())
        self._f.append(boundary_f(labels, segmentations, own, self.tolerance).cpu())
        self._bleeding.append(bleeding(table, own).cpu())
        return table

    def mean_f(self) -> float | None:
        """Boundary F, averaged over each frame's objects, then over frames; None if there are no objects."""
        return mean(torch.cat(self._f).nanmean(-1))

    def summary(self) -> dict[str, Any]:
        """Scores of all objects and by area, JSON-able; None where there is nothing to score.

        The boundary F is averaged over each frame's objects and then over frames, as mBO is; bleeding, and all of
        ``by_area``, over objects. ``area_px`` are the smallest and largest areas of a class.
        """
        areas, f, bleeds = (torch.cat(parts).flatten() for parts in (self._areas, self._f, self._bleeding))
        visible = areas > 0
        classes = {}
        if visible.any():
            bounds = areas[visible].double().quantile(torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
            which = torch.bucketize(areas.double(), bounds)
            for index, name in enumerate(CLASSES):
                chosen = visible & (which == index)
                if chosen.any():
                    classes[name] = {
                        "area_px": [int(areas[chosen].min()), int(areas[chosen].max())],
                        "objects": int(chosen.sum()),
                        "boundary_f": mean(f[chosen]),
                        "bleeding": mean(bleeds[chosen]),
                    }
        return {
            "boundary_f": self.mean_f(),
            "bleeding": mean(bleeds),
            "objects": int(visible.sum()),
            "without_slot": int((visible & bleeds.isnan()).sum()),
            "by_area": classes,
        }
