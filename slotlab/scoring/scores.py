"""Scores of a split, gathered batch by batch from contingency tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slotlab.scoring.metrics import adjusted_rand_index, mean_best_overlap, mean_iou


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
        """Scores of each frame by name, (F,) float64; NaN where one is not defined.

        objects (V, n_true - 1) bool keeps some objects only, as in :meth:`of_objects`, and leaves out ``ari``.
        """
        return _values(*self.frame_tables(), objects)

    def video_values(self, objects: Tensor | None = None) -> dict[str, Tensor]:
        """The same of the summed table of each video's frames, (V,), videos in rising order of their ids."""
        return _values(*self.video_tables(), objects)

    def summary(self) -> dict[str, float | int | None]:
        """Means over the split; None where no frame has a defined score.

        ``skipped_frames`` have no visible object, and no part in any score but ``ari``.
        """
        frames, videos = self.frame_values(), self.video_values()
        return {
            "frames": len(frames["ari"]),
            "videos": len(videos["ari"]),
            "skipped_frames": int(frames["fg_ari"].isnan().sum()),
            **{name: mean(values) for name, values in frames.items()},
            **{f"{name}_video": mean(values) for name, values in videos.items()},
        }

    def of_objects(self, objects: Tensor) -> dict[str, float | int | None]:
        """Means for some objects only, for example the metal ones; None where nothing was scored.

        objects (V, n_true - 1) bool; row v says which objects of the video with id v count, column k being
        ground-truth label k + 1. FG-ARI is taken over their pixels alone, in the ``frames_ari`` frames that
        show two of them or more: for one object it is 1 or 0 by a single stray pixel. mBO and mIoU are means
        over the ``frames`` that show any; mIoU's matching stays among all objects. So too for ``videos``.
        """
        frames, videos = self.frame_values(objects), self.video_values(objects)
        return {
            "frames": int((~frames["mbo"].isnan()).sum()),
            "frames_ari": int((~frames["fg_ari"].isnan()).sum()),
            "videos": int((~videos["mbo"].isnan()).sum()),
            **{name: mean(values) for name, values in frames.items()},
            **{f"{name}_video": mean(values) for name, values in videos.items()},
        }


def _values(tables: Tensor, videos: Tensor, objects: Tensor | None) -> dict[str, Tensor]:
    if objects is None:
        return {
            "fg_ari": adjusted_rand_index(tables, foreground=True),
            "ari": adjusted_rand_index(tables, foreground=False),
            "mbo": mean_best_overlap(tables),
            "miou": mean_iou(tables),
        }
    chosen = objects.cpu()[videos]  # (F, n_true - 1)
    visible = ((tables[:, 1:].sum(-1) > 0) & chosen).sum(-1)  # (F,)
    fg_ari = adjusted_rand_index(tables, foreground=True, objects=chosen)
    return {
        "fg_ari": torch.where(visible > 1, fg_ari, torch.nan),
        "mbo": mean_best_overlap(tables, chosen),
        "miou": mean_iou(tables, chosen),
    }


def mean(values: Tensor) -> float | None:
    """Over the values that are defined; None if none is."""
    found = float(values.nanmean())
    return None if math.isnan(found) else found
