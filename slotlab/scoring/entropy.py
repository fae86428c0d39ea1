"""How undecided soft masks are: their entropy over the slots, where, on which materials, and with how many spare slots.

After the study of Menserve/Object-centric-representation (commit 6a307c5, ``scripts/uncertainty_analysis.py``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from featcache.store.reading import Split
from slotlab.scoring.follow import Followed
from slotlab.scoring.groups import objects_by
from slotlab.scoring.intervals import Bootstrap
from slotlab.scoring.metrics import visible
from slotlab.scoring.scores import mean
from slotlab.scoring.tables import UNKNOWN, labelled_frames


def entropy_maps(masks: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K h w"]:
    """Each slot's part in the entropy of each place over the slots: ``-m_k ln m_k / ln K``; masks sum to one over K.

    Their sum over the slots is the entropy, from 0 (one slot has the place) to 1 (all have equal shares).
    """
    parts: Tensor = torch.special.entr(masks.float())
    return parts / math.log(max(2, masks.shape[1]))


class EntropyScorer:
    """Collects the entropy of a run's masks, upsampled to the ground truth's pixels, over labelled frames."""

    def __init__(self, split: Split, labels: int) -> None:
        self._materials = dict(objects_by(split, labels, "material"))
        self._frames: dict[str, list[float]] = defaultdict(list)  # of each frame, NaN where it has no such pixels
        self._spare: list[int] = []
        self._videos: list[int] = []

    def add(self, followed: Followed) -> None:
        """Add the labelled frames of one video."""
        assert followed.truth is not None
        parts = {name: objects[followed.video] for name, objects in self._materials.items()}
        seen = visible(followed.tables())  # (T,) objects
        slots = followed.masks.shape[1]
        for t in labelled_frames(followed.truth).nonzero().flatten().tolist():
            truth = followed.truth[t].long()  # (H, W)
            fine = F.interpolate(followed.masks[t : t + 1].float(), truth.shape, mode="bilinear")
            entropy = entropy_maps(fine)[0].sum(0)  # (H, W)
            self._frames["all"].append(_mean(entropy, truth != UNKNOWN))
            self._frames["background"].append(_mean(entropy, truth == 0))
            self._frames["objects"].append(_mean(entropy, truth > 0))
            for name, objects in parts.items():
                # (labels,): whether a label is an object of the material; the last is looked up for UNKNOWN
                chosen = torch.cat([objects.new_zeros(1), objects, objects.new_zeros(1)])
                self._frames[name].append(_mean(entropy, chosen[truth]))
            self._spare.append(slots - 1 - int(seen[t]))
            self._videos.append(followed.video)

    def result(self) -> dict[str, Any]:
        """Means over frames with intervals over videos: of all pixels, by material, by spare slots. JSON-able.

        Spare slots are those that a frame has beyond one for each visible object and one for the background.
        ``per_spare_slot`` is the slope of a frame's entropy over them, None if all frames have as many.
        """
        videos, spare = torch.tensor(self._videos), torch.tensor(self._spare)
        values = {name: torch.tensor(of, dtype=torch.float64) for name, of in self._frames.items()}
        whole = values["all"]
        counts = sorted(set(self._spare))
        by_spare = {str(n): torch.where(spare == n, whole, torch.nan) for n in counts}
        intervals = Bootstrap().intervals(values | by_spare, videos)

        def told(name: str, of: Tensor) -> dict[str, Any]:
            return {"mean": mean(of), "interval": intervals[name], "frames": int((~of.isnan()).sum())}

        away = spare.double() - spare.double().mean()
        slope = None if len(counts) < 2 else float((away * whole).sum() / away.square().sum())
        named = ("all", "background", "objects")
        return {
            "unit": "ln K",
            **{name: told(name, values[name]) for name in named if name in values},
            "by_material": {name: told(name, of) for name, of in values.items() if name not in named},
            "by_spare_slots": {name: told(name, of) for name, of in by_spare.items()},
            "per_spare_slot": slope,
        }


def _mean(values: Tensor, where: Tensor) -> float:
    """The mean where it says; NaN if nowhere."""
    return float(values[where].mean()) if bool(where.any()) else math.nan
