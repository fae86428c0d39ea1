"""Scores of a split, gathered batch by batch from contingency tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from slotlab.scoring.metrics import SCORES, scores_in, visible

Values = Mapping[str, float | None]  # by a score's key, with _video behind it for whole videos; None: not defined


@dataclass(frozen=True)
class Summary:
    """Means over a split, or over some of its objects or frames."""

    frames: int
    videos: int
    values: Values
    skipped_frames: int | None = None  # of a split: those without a visible object, which ARI alone takes
    frames_ari: int | None = None  # of some objects: those that show two of them or more, which FG-ARI takes

    def as_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {name: count for name, count in counts.items() if count is not None} | dict(self.values)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Of :meth:`as_dict`, by this version or one before."""
        counts = {name: raw.get(name) for name in _COUNTS}
        return cls(values=in_order(raw), **counts)  # type: ignore[arg-type]  # frames and videos are always there


_COUNTS = ("frames", "frames_ari", "videos", "skipped_frames")


T = TypeVar("T")


def in_order(raw: Mapping[str, T]) -> dict[str, T]:
    """What a part of an evaluation's JSON holds by the keys of ``SCORES``: over frames first, then of whole videos."""
    names = [f"{score.key}{suffix}" for suffix in ("", "_video") for score in SCORES]
    return {name: raw[name] for name in names if name in raw}


@dataclass
class Scores:
    """Collects the tables of frames and yields per-frame and per-video scores.

    Per frame: the score of each frame, averaged over the frames where it is defined. Per video: the score of
    the summed table of each video's frames, averaged over videos; a slot index must then mean the same thing
    in all of a video's frames, or the score falls.
    """

    _tables: list[Tensor] = field(default_factory=list)  # (B, n_true, n_pred) each
    _videos: list[Tensor] = field(default_factory=list)  # (B,) each

    def add(self, tables: Tensor, videos: Tensor) -> None:
        """Tables of frames (B, n_true, n_pred), the same sizes in each call, and their video ids (B,)."""
        if len(tables) != len(videos):
            raise ValueError(f"{len(tables)} tables but {len(videos)} video ids; give one each a frame")
        self._tables.append(tables.detach().cpu())
        self._videos.append(videos.detach().cpu().long())

    def add_video(self, tables: Tensor, video: int) -> None:
        """Tables (T, n_true, n_pred) of frames of one video."""
        self.add(tables, torch.full((len(tables),), video))

    def frame_tables(self) -> tuple[Tensor, Tensor]:
        """All frames' tables (F, n_true, n_pred) and their video ids (F,), in the order they were added."""
        if not self._tables:
            raise ValueError("no frame has been scored; the split is empty")
        return torch.cat(self._tables), torch.cat(self._videos)

    def video_tables(self) -> tuple[Tensor, Tensor]:
        """Tables of videos (V, n_true, n_pred), the sums of their frames', and their ids (V,), rising."""
        tables, videos = self.frame_tables()
        ids, position = torch.unique(videos, return_inverse=True)
        return tables.new_zeros((len(ids), *tables.shape[1:])).index_add_(0, position, tables), ids

    def frame_values(self, objects: Tensor | None = None) -> dict[str, Tensor]:
        """Scores of each frame by key, (F,) float64; NaN where one is not defined.

        objects (V, n_true - 1) bool keeps some objects only, as in :meth:`of_objects`, and leaves out the scores that
        have no place for parts.
        """
        return _values(*self.frame_tables(), objects)

    def video_values(self, objects: Tensor | None = None) -> dict[str, Tensor]:
        """The same of the summed table of each video's frames, (V,), videos in rising order of their ids."""
        return _values(*self.video_tables(), objects)

    def summary(self) -> Summary:
        """Means over the split; None where no frame has a defined score."""
        (tables, _), (_, ids) = self.frame_tables(), self.video_tables()
        skipped = int((visible(tables) == 0).sum())
        return Summary(len(tables), len(ids), self._means(None), skipped_frames=skipped)

    def of_objects(self, objects: Tensor) -> Summary:
        """Means for some objects only, for example the metal ones; None where nothing was scored.

        objects (V, n_true - 1) bool; row v says which objects of the video with id v count, column k being
        ground-truth label k + 1. FG-ARI is taken over their pixels alone, in the ``frames_ari`` frames that
        show two of them or more. mBO and mIoU are means over the ``frames`` that show any; mIoU's matching stays among
        all objects. So too for ``videos``.
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
    """Over the values that are defined; None if none is."""
    found = float(values.nanmean())
    return None if math.isnan(found) else found
