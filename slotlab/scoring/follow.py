"""A run's output on the videos of a split: the one pass behind scores, curves, looks while training and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from featcache.store.reading import Split
from slotlab.config.model import Masks
from slotlab.models.base import Output
from slotlab.runs.loaded import StoreModel
from slotlab.scoring.metrics import MATCHED_IOU, Score, matched_slots
from slotlab.scoring.tables import count_labels, ground_truth, labelled_frames, mask_tables


@dataclass(frozen=True)
class Followed:
    """A run's output on all frames of one video. Tables and matches are computed on first use, on the host."""

    video: int  # position in the split
    output: Output  # with the decoder's masks
    published: Masks  # the kind that the run publishes
    truth: Tensor | None = None  # `ground_truth` (T, H, W); None where the split has none
    labels: int = 0  # of the split's ground truth, background included
    _tables: dict[Masks, Tensor] = field(default_factory=dict, init=False)
    _scores: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.output.masks)

    @property
    def middle(self) -> int:
        """The middle frame; if its truth is not known, the labelled one nearest to it."""
        middle = len(self) // 2
        labelled = [] if self.truth is None else labelled_frames(self.truth).nonzero().flatten().tolist()
        return min(labelled, key=lambda t: abs(t - middle), default=middle)

    @cached_property
    def shown(self) -> Output:
        """The output with the masks that the run publishes."""
        return self.output.showing(self.published)

    @cached_property
    def masks(self) -> Tensor:
        """The published masks (T, K, rows, columns), on the host."""
        return self.shown.masks_on_grid.cpu()

    def tables(self, kind: Masks | None = None) -> Tensor:
        """Contingency tables (T, labels, K) int64 of one kind of masks, default the published ones. Needs ``truth``."""
        kind = kind or self.published
        if kind not in self._tables:
            if self.truth is None:
                raise ValueError("the split has no masks to make tables with")
            if kind != self.published and self._one_kind:
                return self.tables()
            masks = self.masks if kind == self.published else self.output.showing(kind).masks_on_grid.cpu()
            self._tables[kind] = mask_tables(masks, self.truth, self.labels)
        return self._tables[kind]

    @property
    def _one_kind(self) -> bool:
        """Whether the decoder's masks are the attention: both tensors then share their memory."""
        one, other = self.output.masks, self.output.attention
        return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()

    def score(self, score: Score) -> Tensor:
        """The score of each frame (T,) for the published masks; NaN where it is not defined. Needs ``truth``."""
        if score.key not in self._scores:
            self._scores[score.key] = score.of_tables(self.tables())
        return self._scores[score.key]

    @cached_property
    def slots(self) -> Tensor:
        """The slot of each object in each frame, (T, objects) int64; -1 for none. Needs ``truth``.

        Slots and objects are matched one to one for the largest total IoU; a match needs an IoU above ``MATCHED_IOU``.
        """
        return matched_slots(self.tables(), above=MATCHED_IOU)

    @cached_property
    def objects(self) -> Tensor:
        """The object of each slot in each frame, (T, K) int64: 0 for label 1, -1 for none or without truth."""
        objects = torch.full(self.shown.masks.shape[:2], -1)
        if self.truth is not None:
            frame, item = torch.nonzero(self.slots >= 0, as_tuple=True)
            objects[frame, self.slots[frame, item]] = item
        return objects


def follow(model: StoreModel, split: Split, videos: Iterable[int] | None = None) -> Iterator[Followed]:
    """The model's output on each video of a split (or on ``videos``), one at a time; earlier ones are not kept.

    ``DataError`` if the model's masks are not finite.
    """
    labels = count_labels(split) if split.has_truth else 0

    def one(video: int) -> Followed:
        truth = ground_truth(split, video) if split.has_truth else None
        output = model.output(model.inputs.read(split, video), video)
        return Followed(video, output, model.config.published_masks, truth, labels)

    yield from map(one, split.videos if videos is None else videos)
