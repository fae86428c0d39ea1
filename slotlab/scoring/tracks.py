"""J, F and J&F of whole tracks, as DAVIS scores unsupervised video object segmentation.

A slot followed through a video is a track, an object of the ground truth another; a track is worth as much for an
object as the mean over the video's frames of its region overlap J and of its boundary F. Tracks and objects are matched
one to one for the largest total of (J + F) / 2, and what is reported is the mean over objects of their tracks' J and F
(Caelles et al. 2019, "The 2019 DAVIS Challenge on VOS: Unsupervised Multi-Object Segmentation"; Perazzi et al. 2016).

Differences from the published evaluator (davischallenge/davis2017-evaluation): none in the numbers. It ends the process
where a video has more than 20 tracks; here the 20 that cover most pixels count, and how many are left out is said.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linear_sum_assignment

from slotlab.scoring.boundaries import outline, tolerance_px

MOST_TRACKS = 20  # of a video, by the rules of DAVIS

Labels = npt.NDArray[np.integer]  # (T, H, W)
Masks = npt.NDArray[np.bool_]  # (N, H, W)
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TrackScores:
    """One video's objects, each with its track."""

    j: Values  # (objects,) mean over frames of the region overlap with the object's track
    f: Values  # (objects,) of the boundary F
    tracks: npt.NDArray[np.int64]  # (objects,) slot of each object's track; -1 for none
    left_out: int  # tracks beyond the most that count

    @property
    def j_and_f(self) -> Values:
        """(objects,) mean of J and F."""
        return (self.j + self.f) / 2


def track_scores(found: Labels, truth: Labels, ignored: npt.NDArray[np.bool_] | None = None) -> TrackScores:
    """J and F of each object's track, in [0, 1].

    found (T, H, W) holds the slot of each pixel, truth (T, H, W) its object, 0 for the background, ignored (T, H, W)
    the pixels whose truth is not known: they count neither as covered nor as missed. An object that is absent from a
    frame is met, J = F = 1, by a track that is absent, too. Raises ``ValueError`` for shapes that differ or a truth
    without objects.
    """
    if found.shape != truth.shape or (ignored is not None and ignored.shape != truth.shape):
        raise ValueError(f"labels {found.shape} and truth {truth.shape} differ")
    known = np.ones(truth.shape, bool) if ignored is None else ~ignored
    objects = np.setdiff1d(np.unique(truth[known]), [0])
    if not len(objects):
        raise ValueError("a video without objects has no tracks to score")
    slots, areas = np.unique(found[known], return_counts=True)
    kept = np.sort(slots.astype(np.int64)[np.argsort(-areas, kind="stable")[:MOST_TRACKS]])
    j, f = np.zeros((2, len(truth), len(kept), len(objects)))
    for frame in range(len(truth)):
        one = (found[frame] == kept[:, None, None]) & known[frame]
        other = (truth[frame] == objects[:, None, None]) & known[frame]
        j[frame], f[frame] = region_overlap(one, other), boundary_overlap(one, other)
    j, f = _padded(j.mean(0), f.mean(0), truth, objects, known)
    rows, columns = linear_sum_assignment((j + f) / 2, maximize=True)
    rows = rows[np.argsort(columns)]  # every object has a row: there are at least as many
    own = np.arange(len(objects))
    tracks = np.where(rows < len(kept), kept[np.minimum(rows, len(kept) - 1)], -1).astype(np.int64)
    return TrackScores(j[rows, own], f[rows, own], tracks, len(slots) - len(kept))


def _padded(
    j: Values, f: Values, truth: Labels, objects: Labels, known: npt.NDArray[np.bool_]
) -> tuple[Values, Values]:
    """With empty tracks for the objects in excess, which are right in the frames without their object."""
    missing = len(objects) - len(j)
    if missing <= 0:
        return j, f
    present = np.array([((truth == number) & known).any((1, 2)) for number in objects]).mean(1)
    empty = np.tile(1 - present, (missing, 1))
    return np.concatenate([j, empty]), np.concatenate([f, empty])


def region_overlap(one: Masks, other: Masks) -> Values:
    """Intersection over union of every mask of ``one`` (N, H, W) with every mask of ``other`` (M, H, W): (N, M).

    Two empty masks overlap fully.
    """
    flat, flat_other = (masks.reshape(len(masks), -1).astype(np.float64) for masks in (one, other))
    both = flat @ flat_other.T
    either = flat.sum(1)[:, None] + flat_other.sum(1) - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def boundary_overlap(one: Masks, other: Masks) -> Values:
    """Boundary F of every mask of ``one`` (N, H, W) with every mask of ``other`` (M, H, W): (N, M).

    A pixel of an outline is met by an outline within 0.8 % of the frame's diagonal, rounded up. Two masks without
    outlines agree, F = 1; one without disagrees with one that has some, F = 0.
    """
    tolerance = tolerance_px((one.shape[1], one.shape[2]))
    edges, near = zip(*(_outlines(masks, tolerance) for masks in (one, other)), strict=True)
    lengths = [outlines.sum(1) for outlines in edges]
    precision = (edges[0] @ near[1].T) / np.maximum(lengths[0], 1)[:, None]
    recall = (near[0] @ edges[1].T) / np.maximum(lengths[1], 1)
    total = precision + recall
    f = np.where(total > 0, 2 * precision * recall / np.maximum(total, 1e-300), 0.0)
    return np.where((lengths[0] == 0)[:, None] & (lengths[1] == 0), 1.0, f)


def _outlines(masks: Masks, tolerance: int) -> tuple[Values, Values]:
    """Outline pixels of each mask (N, H, W), and the pixels near them: (N, H * W) each, 0 or 1."""
    edge = outline(torch.from_numpy(masks)).numpy()
    near = np.zeros_like(masks)
    for place, line in enumerate(edge):
        if line.any():
            near[place] = distance_transform_edt(~line) <= tolerance
    return edge.reshape(len(edge), -1).astype(np.float64), near.reshape(len(near), -1).astype(np.float64)
