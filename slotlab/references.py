"""What a score is to be read against: the ceiling that a patch grid sets, and the floor of clustering alone.

Both give contingency tables through :func:`slotlab.metrics.mask_tables`, the same path as a model's masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slotlab.draws import Draws
from slotlab.kmeans import kmeans
from slotlab.metrics import mask_tables

_FRAMES_CLUSTERED = 64  # at once
_FRAMES_A_CHUNK = 8  # one-hot ground truth is (frames, n_true, H, W) floats: 23 MB at 256x256 and 11 labels


def grid_reference(segmentations: Tensor, grid: tuple[int, int], n_true: int) -> Tensor:
    """Tables (F, n_true, n_true) int64 of the ground truth brought to the patch grid and back.

    segmentations (F, H, W) integer labels below n_true, grid (rows, columns). Each object's mask is averaged
    over the area of each patch (exact also where patches and pixels do not line up), then upsampled and
    decided like a model's masks: what a perfect model with that grid and no finer decoder would reach.
    """
    tables = []
    for start in range(0, len(segmentations), _FRAMES_A_CHUNK):
        truth = segmentations[start : start + _FRAMES_A_CHUNK]
        tables.append(mask_tables(grid_masks(truth, grid, n_true), truth, n_true))
    return torch.cat(tables)


def grid_masks(segmentations: Tensor, grid: tuple[int, int], n_true: int) -> Tensor:
    """Each label's share of each patch: (F, H, W) integer labels below n_true to (F, n_true, rows, columns)."""
    height, width = segmentations.shape[1:]
    rows = _area_weights(height, grid[0], segmentations.device)  # (h, H)
    columns = _area_weights(width, grid[1], segmentations.device)  # (w, W)
    ids = torch.arange(n_true, device=segmentations.device).view(1, -1, 1, 1)
    onehot = segmentations.unsqueeze(1) == ids  # (F, n_true, H, W)
    return rows @ (onehot.float() @ columns.T)


def kmeans_floor(
    tokens: Tensor,
    grid: tuple[int, int],
    k: int,
    segmentations: Tensor,
    n_true: int,
    *,
    rounds: int = 8,
    restarts: int = 4,
    seed: int = 0,
) -> Tensor:
    """Tables (F, n_true, k) int64 of k-means on each frame's patch tokens, with no training at all.

    tokens (F, N, D), raw or normalised, N = rows * columns of the grid; segmentations (F, H, W). The labels,
    one-hot on the grid, go the way of a model's masks. The best of several restarts is kept, because a floor
    should not be low by bad luck. A frame's draws depend on ``seed`` and on its place in the call.
    """
    draws = Draws(seed)
    tables = []
    for start in range(0, len(tokens), _FRAMES_CLUSTERED):
        frames = slice(start, start + _FRAMES_CLUSTERED)
        labels = kmeans(tokens[frames], k, rounds, draws, restarts).labels  # (f, N)
        masks = F.one_hot(labels, k).transpose(1, 2).reshape(-1, k, *grid).float()  # (f, k, h, w)
        tables.append(mask_tables(masks, segmentations[frames], n_true))
    return torch.cat(tables)


def _area_weights(pixels: int, patches: int, device: torch.device) -> Tensor:
    """(patches, pixels) float32: the share of each patch that each pixel covers; rows sum to 1."""
    edges = torch.arange(patches + 1, dtype=torch.float64, device=device) * (pixels / patches)
    start = torch.arange(pixels, dtype=torch.float64, device=device)
    overlap = torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)
    return (overlap.clamp_min_(0) * (patches / pixels)).float()
