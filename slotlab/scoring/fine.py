"""Scores of a run's masks at the frame's resolution: outlines, and what refinement and other binarisations change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slotlab.masks.binarise import parse_binarisation
from slotlab.masks.labels import masks_to_labels
from slotlab.masks.refine import Method, refine
from slotlab.models.base import on_grid
from slotlab.models.randomness import Draws
from slotlab.runs.loaded import LoadedRun
from slotlab.scoring.boundaries import BoundaryScores
from slotlab.scoring.metrics import adjusted_rand_index, object_iou, shown
from slotlab.scoring.references import grid_masks
from slotlab.scoring.scores import Scores, mean
from slotlab.scoring.tables import contingency, count_labels


class BinarisedScores:
    """Collects frames under one binarisation, which may give pixels to no slot.

    Only two scores have a meaning then: in FG-ARI such pixels are one group more, in mBO no object's best slot.
    """

    def __init__(self) -> None:
        self._tables: list[Tensor] = []  # (B, n_true, K + 1) each

    def add(self, labels: Tensor, segmentations: Tensor, slots: int, n_true: int) -> None:
        """labels (B, H, W) up to ``slots``, that being none; segmentations (B, H, W) below ``n_true``."""
        table = contingency(labels.flatten(1), segmentations.flatten(1), slots + 1, n_true)
        self._tables.append(table.cpu())

    def summary(self) -> dict[str, Any]:
        """FG-ARI and mBO, means over frames, and the share of pixels of none."""
        tables = torch.cat(self._tables)
        none = tables[..., -1].sum()
        return {
            "fg_ari": mean(adjusted_rand_index(tables, foreground=True)),
            "mbo": mean(object_iou(tables)[..., :-1].amax(-1).nanmean(-1)),
            "unassigned": float(none / tables.sum()),
        }


GAINS = {**shown("comparison"), "boundary_f": "boundary F"}  # key -> title of what refinement changes


def outline_scores(
    loaded: LoadedRun,
    split_name: str | None = None,
    method: Method | None = None,
    binarisations: Sequence[str] = (),
) -> dict[str, Any]:
    """``boundaries`` of a run's masks beside its grid's reference; where asked, ``refined`` and ``binarised``.

    The reference is the ground truth brought to the grid and back, as in :mod:`slotlab.scoring.references`.
    ``refined`` are the scores of the masks after ``method``, their ``gain`` over the plain ones, and the seconds that
    refinement took.
    Raises ``DataError`` when the split has no masks, ``UsageError`` for a method or a binarisation that is not known.
    """
    ways = [parse_binarisation(text) for text in binarisations]
    split = loaded.store[split_name or loaded.config.data.eval_split].require_complete()
    labels, size, grid, slots = count_labels(split), split.spec.frame_size, loaded.model.grid, loaded.model.slots
    plain, reference, refined = (BoundaryScores(size) for _ in range(3))
    plain_scores, refined_scores = Scores(), Scores()
    binarised = {way.name: BinarisedScores() for way in ways}
    seconds, frames = 0.0, 0
    for video in split.videos:
        truth = torch.from_numpy(split.segmentations(video))  # (T, H, W)
        ids = torch.full((len(truth),), video)
        masks = on_grid(loaded.segment(split, video).masks, grid)  # (T, K, h, w)
        on_host = masks.cpu()
        plain_scores.add(plain.add(masks_to_labels(on_host, size), truth, slots, labels), ids)
        reference.add(masks_to_labels(grid_masks(truth, grid, labels), size), truth, labels, labels)
        if method:
            pictures = torch.from_numpy(split.video(video))
            began = time.perf_counter()
            fine = refine(masks, pictures, method).cpu()  # waits for the device
            seconds += time.perf_counter() - began
            refined_scores.add(refined.add(masks_to_labels(fine, size), truth, slots, labels), ids)
        for way in ways:
            hard = way.label(on_host, size, Draws.of_step(loaded.config.seed, video))
            binarised[way.name].add(hard, truth, slots, labels)
        frames += len(truth)
    result: dict[str, Any] = {
        "boundaries": {"tolerance_px": plain.tolerance, **plain.summary(), "reference": reference.summary()}
    }
    if method:
        before = {**plain_scores.summary().values, "boundary_f": plain.mean_f()}
        after = {**refined_scores.summary().values, "boundary_f": refined.mean_f()}
        result["refined"] = {
            "method": method,
            **{key: after[key] for key in GAINS},
            "gain": {key: _difference(after[key], before[key]) for key in GAINS},
            "boundaries": refined.summary(),
            "seconds": seconds,
            "ms_per_frame": 1e3 * seconds / max(frames, 1),
        }
    if ways:
        result["binarised"] = {name: scores.summary() for name, scores in binarised.items()}
    return result


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
