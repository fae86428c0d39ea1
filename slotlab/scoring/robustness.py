"""Robustness of a run's slots when only the colours of the frames change.

Transformed frames (:mod:`slotlab.scoring.colour_changes`) pass the store's backbone and then the model, with the same
random draws as the original ones. The masks that the run publishes are compared:

- **mask stability**: mean IoU of the slots' hard masks before and after, slots matched one to one for the largest
  total IoU (Hungarian algorithm). Hard masks are what scores are made from: upsampled to the frame, then argmax,
  so that models of different grids are compared pixel by pixel. A frame's sum is divided by the larger of the two
  numbers of slots that hold a pixel, so that a slot that comes or goes counts as 0, and an unused one not at all. 1
  means the same partition.
- **mask correlation**: mean Pearson correlation of the soft masks on the model's grid, matched for the largest total
  correlation, and likewise divided by the larger number of masks that vary at all.
- **slot similarity**: mean cosine of the slot vectors that this second matching pairs, of masks that vary.
- **slot diversity**: 1 - mean cosine between two slots that a frame uses (see :func:`.collapse.slot_similarity`).

A model whose masks ignore the picture is perfectly stable, so read stability beside the scores. Each value is
a mean over a video's frames, then over videos; intervals are bootstrapped over the videos.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from featcache.stream.stream import VIDEO
from slotlab.masks.labels import masks_to_labels
from slotlab.models.base import Output
from slotlab.runs.loaded import LoadedRun
from slotlab.scoring.collapse import live_slots, slot_similarity
from slotlab.scoring.colour_changes import IDENTITY, transformations
from slotlab.scoring.intervals import LEVEL, Bootstrap
from slotlab.scoring.metrics import scores_in
from slotlab.scoring.tables import contingency, count_labels, ground_truth

MAX_VIDEOS = 8
FRAMES = 6
FLAT = 1e-6  # standard deviation of a mask below which it does not vary

Progress = Callable[[str, int, int], None]  # name, frames done, frames in all


def robustness(
    loaded: LoadedRun,
    split_name: str | None = None,
    *,
    max_videos: int = MAX_VIDEOS,
    frames: int = FRAMES,
    weights: str | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Stability of a run's masks and slots under each colour transformation; JSON-able.

    Uses the first ``frames`` frames of up to ``max_videos`` videos, spread evenly over the split, because each frame
    passes the backbone once for every transformation. ``before`` is the run on the stored features, so the row
    ``identity`` shows the effect of running the backbone again, and ``relative_error`` the difference between its
    features and the stored ones. ``weights`` are for :mod:`featcache.extraction.store_backbone`, which raises
    ``IncompatibleError`` if they are not the store's. Scores are None if the split has no masks.
    """
    split = loaded.split(split_name)
    read = loaded.inputs.from_frames(loaded.store, weights, next(loaded.model.parameters()).device)
    videos, changes = split.spread(max_videos), transformations()
    labels = count_labels(split) if split.has_truth else 0
    values: dict[str, list[dict[str, float]]] = defaultdict(list)  # transformation -> one row per video
    states, errors = [], []
    total = sum(min(frames, split.spec.lengths[video]) for video in videos) * len(changes)
    done = 0
    for video in videos:
        pixels = torch.from_numpy(split.video(video)[:frames])  # (T, H, W, 3)
        truth = ground_truth(split, video)[:frames] if labels else None
        stored = loaded.inputs.read(split, video)[:frames]
        before = View.of(loaded.segment_input(stored, video), split.spec.frame_size)
        states.append(before.state(truth, labels))
        for name, change in changes.items():
            features = read(change(pixels.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous().numpy()).cpu()
            if name == IDENTITY:
                errors.append(float((features.float() - stored.float()).norm() / stored.float().norm()))
            after = View.of(loaded.segment_input(features, video), split.spec.frame_size)
            state = after.state(truth, labels)
            changed = {f"{key}_change": state[key] - value for key, value in states[-1].items()}
            values[name].append(compare(before, after) | state | changed)
            done += len(pixels)
            progress("robustness", done, total)
    every = [rows for name, rows in values.items() if name != IDENTITY]
    mean_row = [
        {
            key: float(torch.tensor([rows[v][key] for rows in every], dtype=torch.float64).nanmean())
            for key in every[0][v]
        }
        for v in range(len(videos))
    ]
    return {
        "run": str(loaded.path),
        "cache": str(loaded.store.path),
        "split": split.name,
        "tap": loaded.tap,
        "backbone": None if loaded.tap == VIDEO else loaded.store.spec.backbone,
        "videos": len(videos),
        "videos_in_split": len(split.videos),
        "frames_a_video": frames,
        "interval": f"{LEVEL:.0%} percentile bootstrap over videos",
        "relative_error": float(np.mean(errors)),
        "before": summary(states),
        "transformations": {name: summary(rows) for name, rows in values.items()},
        "mean": summary(mean_row),  # over all transformations except the identity
    }


@dataclass(frozen=True)
class View:
    """The compared parts of a model's output on T frames, on the host."""

    masks: Tensor  # (T, K, N) soft, on the model's grid
    labels: Tensor  # (T, H W) the slot of each pixel
    slots: Tensor  # (T, K, S)

    @classmethod
    def of(cls, output: Output, size: tuple[int, int]) -> View:
        """The view of an output on frames of ``size`` (H, W) in pixels."""
        labels = masks_to_labels(output.masks_on_grid.cpu(), size)
        return cls(output.masks.cpu().double(), labels.flatten(1), output.slots.cpu().double())

    def state(self, truth: Tensor | None, n_true: int) -> dict[str, float]:
        """Slot diversity and headline scores, means over the frames; NaN where there is nothing to score."""
        alike = slot_similarity(self.slots, live_slots(self.masks))
        found = {"slot_diversity": float(1 - alike.mean())}
        if truth is not None:
            tables = contingency(self.labels, truth.flatten(1), self.masks.shape[1], n_true)
            found |= {score.key: float(score.of_tables(tables).nanmean()) for score in scores_in("headline")}
        return found


def compare(before: View, after: View) -> dict[str, float]:
    """Mask stability, mask correlation and slot similarity of two views of the same frames, means over the frames."""
    slots = before.masks.shape[1]
    correlation, cosine = matched_correlation(before, after)
    return {
        "mask_stability": float(matched_iou(before.labels, after.labels, slots).mean()),
        "mask_correlation": float(correlation.nanmean()),
        "slot_similarity": float(cosine.nanmean()),
    }


def matched_iou(before: Tensor, after: Tensor, slots: int) -> Tensor:
    """Mean IoU of matched slots in each frame, (T,) float64 in [0, 1], from labels (T, P) below ``slots``."""
    both = contingency(after, before, slots, slots).double()  # (T, K before, K after)
    held_before, held_after = both.sum(2), both.sum(1)  # pixels of each slot, (T, K)
    union = held_before.unsqueeze(2) + held_after.unsqueeze(1) - both
    iou = torch.where(union > 0, both / union, 0.0)
    used = torch.maximum((held_before > 0).sum(1), (held_after > 0).sum(1))
    return torch.stack([table[match(table)].sum() for table in iou]) / used


def matched_correlation(before: View, after: View) -> tuple[Tensor, Tensor]:
    """Mean Pearson correlation of matched soft masks, and mean cosine of their slots, (T,) float64 each.

    NaN in frames where no mask varies.
    """
    (one, varies_one), (other, varies_other) = (_standardised(view.masks) for view in (before, after))
    correlation = one @ other.transpose(1, 2)  # (T, K, K)
    used = torch.maximum(varies_one.sum(1), varies_other.sum(1))  # (T,)
    cosine = F.normalize(before.slots, dim=-1) @ F.normalize(after.slots, dim=-1).transpose(1, 2)
    both = varies_one.unsqueeze(2) & varies_other.unsqueeze(1)
    directed = (before.slots.norm(dim=-1) > 0).unsqueeze(2) & (after.slots.norm(dim=-1) > 0).unsqueeze(1)
    cosine = torch.where(both & directed, cosine, torch.nan)  # a slot at the origin has no direction
    pairs = [match(table) for table in correlation]
    matched = torch.stack([table[pair].sum() for table, pair in zip(correlation, pairs, strict=True)])
    return matched / used.where(used > 0, torch.nan), torch.stack(
        [table[pair].nanmean() for table, pair in zip(cosine, pairs, strict=True)]
    )


def match(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the one-to-one matching with the largest total of scores (K, K)."""
    rows, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


def _standardised(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (T, K, N) centred and scaled to norm 1 (0 for flat masks), and a mask (T, K) of those that vary."""
    centred = masks - masks.mean(-1, keepdim=True)
    varies = centred.square().mean(-1).sqrt() > FLAT
    return F.normalize(centred, dim=-1) * varies.unsqueeze(-1), varies


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """The mean over videos of each column, and its interval; None where no value is defined."""
    found = {}
    for key in rows[0]:
        column = np.array([row[key] for row in rows], np.float64)
        column = column[~np.isnan(column)]
        low, high = (Bootstrap().of_mean(column) if len(column) else None) or (None, None)
        found[key] = {"mean": float(column.mean()) if len(column) else None, "low": low, "high": high}
    return found
