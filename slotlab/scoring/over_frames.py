"""A run over the frames of its videos: where a video model drifts, it shows.

Every quantity has one value a frame; :func:`over_videos` reduces them to curves over the frame index. NaN means
"not defined here": no visible object, or no frame before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from slotlab.models.base import Output
from slotlab.scoring import metrics
from slotlab.scoring.collapse import by_frame
from slotlab.scoring.metrics import scores_in
from slotlab.scoring.tables import mask_tables

MATCHED_IOU = 0.1  # below it a slot only grazes the object that the matching gave it
Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quantity:
    """One curve: its key, its title, and what it tells."""

    name: str
    title: str
    why: str
    unit_interval: bool = True  # values lie in [0, 1]


# Those that need ground truth come first.
SCORED = (
    *(Quantity(score.key, score.title, "of each frame alone") for score in scores_in("headline")),
    Quantity("switches", "Identity switches", "share of objects whose slot is not the one of the frame before"),
)
UNSCORED = (
    Quantity(
        "slot_persistence",
        "Slot similarity, frame to frame",
        "mean cosine of each slot with itself one frame before; slots that are empty in either left out",
    ),
    Quantity("slot_similarity", "Slot similarity, slot to slot", "mean cosine of two slots of a frame; 1: collapsed"),
    Quantity("mask_similarity", "Mask similarity, slot to slot", "mean cosine of two masks of a frame; 1: collapsed"),
    Quantity("largest_activation", "Largest activation", "each slot's largest mask value, averaged; 1/K: flat masks"),
    Quantity("effective_slots", "Effective slots", "exp of the entropy of the slots' shares of a frame", False),
    Quantity("logit_std", "Spread of the logits", "of the attention, over the slots of each patch; 0: flat", False),
)
QUANTITIES = SCORED + UNSCORED


@dataclass(frozen=True)
class VideoTrace:
    """One video's frames, as a run sees them."""

    values: Mapping[str, Float]  # by quantity, (T,) each
    matches: npt.NDArray[np.int64]  # (T, K): the object (0 for label 1) that each slot stands for, -1 for none
    tables: Tensor | None  # (T, n_true, K) int64 contingency tables, with ground truth


@dataclass(frozen=True)
class Curve:
    """A quantity at each frame index, over the videos in which it is defined there; NaN where it is in none."""

    mean: Float  # (T,)
    low: Float  # lower quartile
    high: Float  # upper quartile
    videos: npt.NDArray[np.int64]


def trace(output: Output, grid: tuple[int, int], truth: Tensor | None = None, n_true: int = 0) -> VideoTrace:
    """Every quantity at every frame of one video.

    output of all frames of the video in order, its masks on ``grid`` (rows, columns); truth (T, H, W) integer
    labels below n_true, if there are any.
    """
    masks = output.masks.detach().float().cpu()  # (T, K, N)
    frames, slots = masks.shape[:2]
    values: dict[str, Float] = {name: found.double().numpy() for name, found in by_frame(output).items()}
    values["slot_persistence"] = slot_persistence(output.slots.detach().cpu()).numpy()
    matches = np.full((frames, slots), -1, np.int64)
    tables = None
    if truth is not None:
        tables = mask_tables(masks.reshape(frames, slots, *grid), truth, n_true)
        matches = match_slots(tables)
        values |= {score.key: score.of_tables(tables).numpy() for score in scores_in("headline")}
        values["switches"] = identity_switches(matches, n_true - 1)
    return VideoTrace(values, matches, tables)


def slot_persistence(slots: Tensor) -> Tensor:
    """Mean cosine of each slot with the same slot one frame before, (T,) float64; NaN at the first frame.

    slots (T, K, D). A slot that is the zero vector in either frame is not in use, and left out.
    """
    unit = F.normalize(slots.double(), dim=-1)
    cosine = (unit[1:] * unit[:-1]).sum(-1)  # (T - 1, K)
    used = (unit[1:].norm(dim=-1) > 0) & (unit[:-1].norm(dim=-1) > 0)
    first = cosine.new_full((min(1, len(slots)),), torch.nan)
    return torch.cat([first, torch.where(used, cosine, torch.nan).nanmean(-1)])


def match_slots(tables: Tensor) -> npt.NDArray[np.int64]:
    """The object (0 for label 1) that each slot stands for in each frame, -1 for none: (T, K).

    tables (T, n_true, K). One to one for the largest total IoU (Hungarian), above ``MATCHED_IOU``.
    """
    matches = np.full((tables.shape[0], tables.shape[2]), -1, np.int64)
    for frame, iou in enumerate(metrics.object_iou(tables).nan_to_num(0.0).cpu().numpy()):  # (objects, K)
        for item, slot in zip(*linear_sum_assignment(iou, maximize=True), strict=True):
            if iou[item, slot] > MATCHED_IOU:
                matches[frame, slot] = item
    return matches


def identity_switches(matches: npt.NDArray[np.int64], objects: int) -> Float:
    """Share of objects whose slot is another than in the frame before, (T,); NaN where none has a slot in both.

    matches (T, K) as :func:`match_slots` gives them. (The switches of MOTA, Bernardin & Stiefelhagen 2008,
    counted between neighbouring frames only.)
    """
    slot_of = np.full((len(matches), objects), -1, np.int64)  # (T, objects)
    frame, slot = np.nonzero(matches >= 0)
    slot_of[frame, matches[frame, slot]] = slot
    both = (slot_of[1:] >= 0) & (slot_of[:-1] >= 0)
    changed = ((slot_of[1:] != slot_of[:-1]) & both).sum(1)
    share = np.full(len(matches), np.nan)
    np.divide(changed, both.sum(1), out=share[1:], where=both.any(1))
    return share


def over_videos(traces: Sequence[VideoTrace]) -> dict[str, Curve]:
    """The mean and quartiles of every quantity at each frame index, over videos of any lengths."""
    curves: dict[str, Curve] = {}
    names = [q.name for q in QUANTITIES if traces and all(q.name in item.values for item in traces)]
    for name in names:
        longest = max(len(item.values[name]) for item in traces)
        table = np.full((len(traces), longest), np.nan)  # (videos, T)
        for row, item in zip(table, traces, strict=True):
            row[: len(item.values[name])] = item.values[name]
        defined = ~np.isnan(table)
        mean, low, high = (np.full(longest, np.nan) for _ in range(3))
        for t in np.nonzero(defined.any(0))[0]:
            column = table[defined[:, t], t]
            mean[t], (low[t], high[t]) = column.mean(), np.quantile(column, (0.25, 0.75))
        curves[name] = Curve(mean, low, high, defined.sum(0))
    return curves
