"""Curves over the frame index, which show whether a video model drifts.

Every quantity has one value per frame; :func:`over_videos` averages them into curves. NaN means "not defined here": no
visible object, or no earlier frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from slotlab.scoring.collapse import by_frame
from slotlab.scoring.follow import Followed
from slotlab.scoring.metrics import scores_in

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quantity:
    """One curve: its key, its title, and its caption."""

    name: str
    title: str
    why: str
    unit_interval: bool = True  # values lie in [0, 1]


# Quantities that need ground truth.
SCORED = (
    *(Quantity(score.key, score.title, "of each frame alone") for score in scores_in("headline")),
    Quantity("switches", "Identity switches", "share of objects whose slot differs from the frame before"),
)
UNSCORED = (
    Quantity(
        "slot_persistence",
        "Slot similarity, frame to frame",
        "mean cosine of each slot with itself one frame before, without empty slots",
    ),
    Quantity("slot_similarity", "Slot similarity, slot to slot", "mean cosine of two slots of a frame; 1: collapsed"),
    Quantity("mask_similarity", "Mask similarity, slot to slot", "mean cosine of two masks of a frame; 1: collapsed"),
    Quantity("largest_activation", "Largest activation", "each slot's largest mask value, averaged; 1/K: flat masks"),
    Quantity("effective_slots", "Effective slots", "exp of the entropy of the slots' shares of the frame", False),
    Quantity("logit_std", "Spread of the logits", "std over the slots of each patch; 0: flat attention", False),
)
QUANTITIES = SCORED + UNSCORED


Trace = Mapping[str, Float]  # one video's values by quantity, (T,) each


@dataclass(frozen=True)
class Curve:
    """A quantity at each frame index, over the videos that define it there; NaN if none does."""

    mean: Float  # (T,)
    low: Float  # lower quartile
    high: Float  # upper quartile
    videos: npt.NDArray[np.int64]


def trace(followed: Followed) -> Trace:
    """Every quantity at each frame of one video; those that need ground truth only if there is some."""
    values = {name: found.double().numpy() for name, found in by_frame(followed.shown).items()}
    values["slot_persistence"] = slot_persistence(followed.output.slots.cpu()).numpy()
    if followed.truth is not None:
        values |= {score.key: followed.score(score).numpy() for score in scores_in("headline")}
        values["switches"] = identity_switches(followed.slots).numpy()
    return values


def slot_persistence(slots: Tensor) -> Tensor:
    """Mean cosine of each slot with the same slot one frame before, (T,) float64; NaN at the first frame.

    slots (T, K, D). A slot that is zero in either frame is unused, and left out.
    """
    unit = F.normalize(slots.double(), dim=-1)
    cosine = (unit[1:] * unit[:-1]).sum(-1)  # (T - 1, K)
    used = (unit[1:].norm(dim=-1) > 0) & (unit[:-1].norm(dim=-1) > 0)
    first = cosine.new_full((min(1, len(slots)),), torch.nan)
    return torch.cat([first, torch.where(used, cosine, torch.nan).nanmean(-1)])


def identity_switches(slots: Tensor) -> Tensor:
    """Share of objects whose slot differs from the frame before, (T,); NaN where no object has a slot in both.

    slots (T, objects) is the slot of each object, -1 for none. (The switches of MOTA, Bernardin & Stiefelhagen 2008,
    counted between neighbouring frames only.)
    """
    both = (slots[1:] >= 0) & (slots[:-1] >= 0)
    changed = (slots[1:] != slots[:-1]) & both
    share = changed.sum(1) / both.sum(1).double()  # 0 / 0 is NaN
    return torch.cat([share.new_full((min(1, len(slots)),), torch.nan), share])


def over_videos(traces: Sequence[Trace]) -> dict[str, Curve]:
    """Mean and quartiles of every quantity at each frame index, over videos of any lengths."""
    curves: dict[str, Curve] = {}
    names = [q.name for q in QUANTITIES if traces and all(q.name in item for item in traces)]
    for name in names:
        longest = max(len(item[name]) for item in traces)
        table = np.full((len(traces), longest), np.nan)  # (videos, T)
        for row, item in zip(table, traces, strict=True):
            row[: len(item[name])] = item[name]
        defined = ~np.isnan(table)
        mean, low, high = (np.full(longest, np.nan) for _ in range(3))
        for t in np.nonzero(defined.any(0))[0]:
            column = table[defined[:, t], t]
            mean[t], (low[t], high[t]) = column.mean(), np.quantile(column, (0.25, 0.75))
        curves[name] = Curve(mean, low, high, defined.sum(0))
    return curves
