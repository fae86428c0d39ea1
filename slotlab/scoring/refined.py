"""Masks of a run refined along the frames' edges, for every score that wants them."""

from __future__ import annotations

import time

import torch
from jaxtyping import UInt8
from torch import Tensor

from featcache.store.reading import Split
from slotlab.masks.labels import fine_labels
from slotlab.scoring.follow import Followed
from slotlab.scoring.tables import labelled_frames
from slotlab.words import Refinement


class Refined:
    """The slot of each pixel after ``method``, in one pass of one run over a split, whichever scores ask for it.

    The last video's are kept; ``seconds`` and ``frames`` count what was refined.
    """

    def __init__(self, split: Split, method: Refinement) -> None:
        self.method, self.seconds, self.frames = method, 0.0, 0
        self._split = split
        self._last: tuple[int, Tensor] | None = None

    def slots(self, followed: Followed) -> UInt8[Tensor, "T H W"]:
        """At the size of the store's frames, on the host; 0 in frames without labels, which no score reads.

        ``UsageError`` if the method's package is not installed.
        """
        if self._last is None or self._last[0] != followed.video:
            self._last = followed.video, self._refined(followed)
        return self._last[1]

    def _refined(self, followed: Followed) -> Tensor:
        assert followed.truth is not None
        labelled = labelled_frames(followed.truth)
        slots = torch.zeros((len(followed), *self._split.spec.frame_size), dtype=torch.uint8)
        pictures = self._split.video(followed.video)[labelled.numpy()]
        masks = followed.shown.masks_on_grid
        began = time.perf_counter()
        slots[labelled] = torch.from_numpy(fine_labels(masks[labelled.to(masks.device)], pictures, self.method))
        self.seconds += time.perf_counter() - began  # with what the device had to do
        self.frames += int(labelled.sum())
        return slots
