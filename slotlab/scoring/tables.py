"""Contingency tables of slots and objects, from masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import DataError
from featcache.store.reading import Split
from slotlab.masks.labels import label_chunks

UNKNOWN = -1  # the label of pixels whose truth is not known: they are in no table


def require_truth(split: Split) -> Split:
    """Return the split. ``DataError`` if its source had no masks, or none of its frames."""
    if not split.has_truth:
        lacking = "no pixel of its masks has a known truth" if split.spec.masks else "its source had no masks"
        raise DataError(
            f"{split.path}: {lacking}, so there is nothing to score against; look at the slots "
            "with slotlab report or slotlab masks"
        )
    return split


def ground_truth(split: Split, video: int) -> Tensor:
    """Labels (T, H, W) int16 of a video's pixels: 0 background, k for instance k - 1, or ``UNKNOWN``."""
    numbers = split.segmentations(video).astype(np.int16)
    numbers[split.ignored(video)] = UNKNOWN
    return torch.from_numpy(numbers)


def labelled_frames(truth: Tensor) -> Tensor:
    """Frames with a pixel of known truth, (T,) bool, of labels (T, H, W)."""
    return (truth != UNKNOWN).flatten(1).any(1)


def count_labels(split: Split) -> int:
    """Number of ground-truth labels in a split, background included."""
    labels = split.manifest.most_instances() + 1
    if labels == 1:  # a source with masks but without instance tables
        labels = max(int(split.segmentations(video).max()) for video in split.videos) + 1
    return labels


def mask_tables(masks: Tensor, segmentations: Tensor, n_true: int) -> Tensor:
    """Contingency tables of soft masks against ground truth, at the ground truth's resolution.

    masks (B, K, h, w) float, segmentations (B, H, W) integer labels below n_true, 0 being background and ``UNKNOWN``
    not counted; returns (B, n_true, K) int64 pixel counts. The result equals ``contingency(masks_to_labels(...))``,
    without holding the labels of more than one chunk. Raises ValueError as those two do.
    """
    if len(masks) != len(segmentations):
        raise ValueError(f"{len(masks)} masks but {len(segmentations)} segmentations; give one per frame")
    slots = masks.shape[1]
    tables = masks.new_zeros((len(masks), n_true, slots), dtype=torch.int64)
    for frames, labels in label_chunks(masks, (segmentations.shape[1], segmentations.shape[2])):
        truth = segmentations[frames].to(masks.device)
        tables[frames] = contingency(labels.flatten(1), truth.flatten(1), slots, n_true)
    return tables


def stacked(tables: Sequence[Tensor]) -> Tensor:
    """Tables (B, n_true, K) of several batches as one (F, n_true, K): those with fewer slots get empty ones."""
    most = max(table.shape[-1] for table in tables)
    return torch.cat([F.pad(table, (0, most - table.shape[-1])) for table in tables])


def contingency(pred: Tensor, true: Tensor, n_pred: int, n_true: int) -> Tensor:
    """Number of pixels of each ground-truth object in each predicted slot.

    pred, true (B, P) integer labels in [0, n_pred) and [0, n_true), true 0 being background and ``UNKNOWN`` not
    counted; returns (B, n_true, n_pred) int64. Raises ValueError if shapes differ or a label is out of range.
    """
    if pred.shape != true.shape or pred.ndim != 2:
        raise ValueError(f"labels must both be (B, P), not {tuple(pred.shape)} and {tuple(true.shape)}")
    _check_range("predicted", pred, 0, n_pred)
    _check_range("ground-truth", true, UNKNOWN, n_true)
    rows = n_true - UNKNOWN  # the first is that of unknown pixels
    batch = torch.arange(len(pred), device=pred.device).unsqueeze(1)  # (B, 1)
    cell = (true.long() + (batch * rows - UNKNOWN)).mul_(n_pred).add_(pred)  # (B, P), index into the flat table
    counts = torch.bincount(cell.flatten(), minlength=len(pred) * rows * n_pred)
    return counts.view(len(pred), rows, n_pred)[:, -UNKNOWN:]


def _check_range(what: str, labels: Tensor, least: int, count: int) -> None:
    if labels.numel() == 0:
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < least or high >= count:
        raise ValueError(f"{what} labels run from {low} to {high}, outside 0..{count - 1}")
