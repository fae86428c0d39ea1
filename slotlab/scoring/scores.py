"""Scores of a split, collected batch by batch from contingency tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from slotlab.scoring.metrics import SCORES, scores_in, visible
from slotlab.scoring.tables import stacked

Values = Mapping[str, float | None]  # by a score's key, with the suffix _video for whole videos; None: not defined


@dataclass(frozen=True)
class Summary:
    """Means over a split, or over some of its objects or frames."""

    frames: int
    videos: int
    values: Values
    labelled_frames: int | None = None  # of a split: frames with pixels of known truth, which are scored
    skipped_frames: int | None = None  # of a split: labelled frames without a visible object, which only ARI scores
    frames_ari: int | None = None  # of some objects: frames that show at least two of them, which FG-ARI scores

    def as_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {name: count for name, count in counts.items() if count is not None} | dict(self.values)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The summary of :meth:`as_dict`, by this version or an earlier one."""
        counts = {name: raw.get(name) for name in _COUNTS}
        return cls(values=in_order(raw), **counts)  # type: ignore[arg-type]  # frames and videos are always present


_COUNTS = ("frames", "frames_ari", "videos", "labelled_frames", "skipped_frames")


T = TypeVar("T")


def in_order(raw: Mapping[str, T]) -> dict[str, T]:
    """The values of an evaluation's JSON by the keys of ``SCORES``: first over frames, then of whole videos."""
    names = [f"{score.key}{suffix}" for suffix in ("", "_video") for score in SCORES]
    return {name: raw[name] for name in names if name in raw}


@dataclass
class Scores:
    """Collects the contingency tables of frames, and gives their scores per frame and per video.

    Per frame: the score of each frame, averaged over the frames that define it. Per video: the score of the
    sum of a video's tables, averaged over videos; it falls if a slot does not keep its object through the video.
    Frames without a pixel of known truth are counted, and otherwise left out.
    """

    _tables: list[Tensor] = field(default_factory=list)  # (B, n_true, n_pred) each, of labelled frames
    _videos: list[Tensor] = field(default_factory=list)  # (B,) each
    _added: list[Tensor] = field(default_factory=list)  # the videos of all frames

    def add(self, tables: Tensor, videos: Tensor) -> None:
        """Add tables of frames (B, n_true, n_pred), of the same n_true in each call, and their video ids (B,)."""
        if len(tables) != len(videos):
            raise ValueError(f"{len(tables)} tables but {len(videos)} video ids; give one per frame")
        tables, videos = tables.detach().cpu(), videos.detach().cpu().long()
        labelled = tables.sum((1, 2)) > 0
        self._tables.append(tables[labelled])
        self._videos.append(videos[labelled])
        self._added.append(videos)

    def add_video(self, tables: Tensor, video: int) -> None:
        """Add tables (T, n_true, n_pred) of one video's frames."""
        self.add(tables, torch.full((len(tables),), video))

    def frame_tables(self) -> tuple[Tensor, Tensor]:
        """The tables of labelled frames (F, n_true, n_pred) and their video ids (F,), in the order they were added.

        ``ValueError`` if there are none.
        """
        if not self._tables:
            raise ValueError("no frame has been scored; the split is empty")
        return stacked(self._tables), torch.cat(self._videos)

    def video_tables(self) -> tuple[Tensor, Tensor]:
        """The sums of each labelled video's tables (V, n_true, n_pred), and the videos' ids (V,) in rising order."""
        tables, videos = self.frame_tables()
        ids, position = torch.unique(videos, return_inverse=True)
        return tables.new_zeros((len(ids), *tables.shape[1:])).index_add_(0, position, tables), ids

    def frame_values(self, objects: Tensor | None = None) -> dict[str, Tensor]:
        """Scores of each frame by key, (F,) float64; NaN where one is not defined.

        objects (V, n_true - 1) bool keeps some objects only, as in :meth:`of_objects`, and leaves out scores that are
        not defined for some objects.
        """
        return _values(*self.frame_tables(), objects)

    def video_values(self, objects: Tensor | None = None) -> dict[str, Tensor]:
        """Scores of each video's summed table by key, (V,) float64, in rising order of video ids."""
        return _values(*self.video_tables(), objects)

    def summary(self) -> Summary:
        """Means over the split; None for a score that no frame defines."""
        tables, _ = self.frame_tables()
        added = torch.cat(self._added)
        skipped = int((visible(tables) == 0).sum())
        return Summary(
            len(added), len(set(added.tolist())), self._means(None), labelled_frames=len(tables), skipped_frames=skipped
        )

    def of_objects(self, objects: Tensor) -> Summary:
        """Means over some objects only, for example the metal ones; None where nothing was scored.

        Row v of objects (V, n_true - 1) bool selects objects of the video with id v; column k is ground-truth label
        k + 1. FG-ARI uses their pixels alone, in the ``frames_ari`` frames that show at least two of them. mBO and mIoU
        are means over the ``frames`` that show any; the matching for mIoU still includes all objects. The same holds
        for ``videos``.
        """
        seen, seen_in_videos = (
            visible(tables, objects.cpu()[videos]) for tables, videos in (self.frame_tables(), self.video_tables())
        )
        return Summary(
            int((seen > 0).sum()),
            int((seen_in_videos > 0).sum()),
            self._means(objects),
            frames_ari=int((seen > 1).sum()),
        )

    def _means(self, objects: Tensor | None) -> Values:
        frames, videos = self.frame_values(objects), self.video_values(objects)
        return {key: mean(values) for key, values in frames.items()} | {
            f"{key}_video": mean(values) for key, values in videos.items()
        }


def _values(tables: Tensor, videos: Tensor, objects: Tensor | None) -> dict[str, Tensor]:
    if objects is None:
        return {score.key: score.of_tables(tables) for score in SCORES}
    chosen = objects.cpu()[videos]  # (F, n_true - 1)
    return {score.key: score.of_tables(tables, chosen) for score in scores_in("parts")}


def mean(values: Tensor) -> float | None:
    """Mean of the values that are not NaN; None if all are."""
    found = float(values.nanmean())
    return None if math.isnan(found) else found
