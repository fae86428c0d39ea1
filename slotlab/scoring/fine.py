"""Scores of masks at the frame's resolution: outlines, and the effect of refinement and other binarisations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from featcache.store.reading import Split
from slotlab.masks.binarise import parse_binarisation
from slotlab.masks.labels import masks_to_labels
from slotlab.models.randomness import Draws
from slotlab.runs.loaded import StoreModel
from slotlab.scoring.boundaries import BoundaryScores
from slotlab.scoring.follow import Followed, follow
from slotlab.scoring.metrics import adjusted_rand_index, object_iou, shown
from slotlab.scoring.references import grid_masks
from slotlab.scoring.refined import Refined
from slotlab.scoring.scores import Scores, mean
from slotlab.scoring.tables import contingency, labelled_frames, require_truth
from slotlab.words import Refinement


class BinarisedScores:
    """Collects frames under one binarisation, which may leave pixels without a slot.

    Only two scores are meaningful then: FG-ARI counts such pixels as one more group, and mBO ignores that group.
    """

    def __init__(self) -> None:
        self._tables: list[Tensor] = []  # (B, n_true, K + 1) each

    def add(self, labels: Tensor, segmentations: Tensor, slots: int, n_true: int) -> None:
        """Add labels (B, H, W) from 0 to ``slots`` (no slot), and segmentations (B, H, W) below ``n_true``."""
        table = contingency(labels.flatten(1), segmentations.flatten(1), slots + 1, n_true)
        self._tables.append(table.cpu())

    def summary(self) -> dict[str, Any]:
        """FG-ARI and mBO, means over frames, and the share of pixels without a slot."""
        tables = torch.cat(self._tables)
        none = tables[..., -1].sum()
        return {
            "fg_ari": mean(adjusted_rand_index(tables, foreground=True)),
            "mbo": mean(object_iou(tables)[..., :-1].amax(-1).nanmean(-1)),
            "unassigned": float(none / tables.sum()),
        }


GAINS = {**shown("comparison"), "boundary_f": "boundary F"}  # key -> title of the scores of refined masks


class OutlineScorer:
    """Scores the outlines of a run's masks and of its grid's reference; if asked, also refined and binarised masks.

    The reference is the ground truth averaged to the grid and upsampled again, as in :mod:`slotlab.scoring.references`.
    ``refined`` are the scores of the refined masks, their ``gain`` over the plain ones, and the seconds that refinement
    took.
    """

    def __init__(
        self, model: StoreModel, split: Split, refined: Refined | None = None, binarisations: Sequence[str] = ()
    ) -> None:
        """``UsageError`` for an unknown binarisation."""
        self._split, self._edges, self._seed, self._slots = split, refined, model.config.seed, model.model.slots
        self._plain, self._reference, self._refined = (BoundaryScores(split.spec.frame_size) for _ in range(3))
        self._refined_scores, self._plain_scores = Scores(), Scores()
        self._binarised = {way: BinarisedScores() for way in map(parse_binarisation, binarisations)}

    def add(self, followed: Followed) -> None:
        """Add the labelled frames of one video. ``UsageError`` if the method's package is not installed."""
        assert followed.truth is not None
        labelled = labelled_frames(followed.truth)
        if not labelled.any():
            return
        truth, masks, slots = followed.truth[labelled], followed.masks[labelled], self._slots
        labels, video, size = followed.labels, followed.video, self._split.spec.frame_size
        plain = self._plain.add(masks_to_labels(masks, size), truth, slots, labels)
        self._plain_scores.add_video(plain, video)
        ideal = grid_masks(truth, followed.output.grid, labels)
        self._reference.add(masks_to_labels(ideal, size), truth, labels, labels)
        if self._edges:
            refined = self._refined.add(self._edges.slots(followed)[labelled], truth, slots, labels)
            self._refined_scores.add_video(refined, video)
        for way, scores in self._binarised.items():
            scores.add(way.label(masks, size, Draws.of_step(self._seed, video)), truth, slots, labels)

    def result(self) -> dict[str, Any]:
        """JSON-able."""
        boundaries = {"tolerance_px": self._plain.tolerance, **self._plain.summary()}
        result: dict[str, Any] = {"boundaries": boundaries | {"reference": self._reference.summary()}}
        if edges := self._edges:
            before = {**self._plain_scores.summary().values, "boundary_f": self._plain.mean_f()}
            after = {**self._refined_scores.summary().values, "boundary_f": self._refined.mean_f()}
            result["refined"] = {
                "method": edges.method,
                **{key: after[key] for key in GAINS},
                "gain": {key: _difference(after[key], before[key]) for key in GAINS},
                "boundaries": self._refined.summary(),
                "seconds": edges.seconds,
                "ms_per_frame": 1e3 * edges.seconds / max(edges.frames, 1),
            }
        if self._binarised:
            result["binarised"] = {way.name: scores.summary() for way, scores in self._binarised.items()}
        return result


def outline_scores(
    model: StoreModel,
    split_name: str | None = None,
    method: Refinement | None = None,
    binarisations: Sequence[str] = (),
) -> dict[str, Any]:
    """The result of :class:`OutlineScorer` on a split, JSON-able. ``DataError`` if it has no masks."""
    split = require_truth(model.split(split_name))
    scorer = OutlineScorer(model, split, Refined(split, method) if method else None, binarisations)
    for followed in follow(model, split):
        scorer.add(followed)
    return scorer.result()


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
