"""Scores of a split, gathered batch by batch from contingency tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slotlab.metrics import adjusted_rand_index, mean_best_overlap, mean_iou


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

    def summary(self) -> dict[str, float | int | None]:
        """Means over the split; None where no frame has a defined score.

        ``skipped_frames`` have no visible object, and no part in any score but ``ari``.
        """
        frames, _ = self.frame_tables()
        by_video, _ = self.video_tables()
        fg_ari = adjusted_rand_index(frames, foreground=True)
        return {
            "frames": len(frames),
            "videos": len(by_video),
            "skipped_frames": int(fg_ari.isnan().sum()),
            "fg_ari": _mean(fg_ari),
            "ari": _mean(adjusted_rand_index(frames, foreground=False)),
            "mbo": _mean(mean_best_overlap(frames)),
            "miou": _mean(mean_iou(frames)),
            "fg_ari_video": _mean(adjusted_rand_index(by_video, foreground=True)),
            "ari_video": _mean(adjusted_rand_index(by_video, foreground=False)),
            "mbo_video": _mean(mean_best_overlap(by_video)),
            "miou_video": _mean(mean_iou(by_video)),
        }

    def of_objects(self, objects: Tensor) -> dict[str, float | int | None]:
        """Per-frame means for some objects only, for example the metal ones; None where nothing was scored.

        objects (V, n_true - 1) bool; row v says which objects of the video with id v count, column k being
        ground-truth label k + 1. FG-ARI is taken over their pixels alone, in the ``frames_ari`` frames that
        show two of them or more: for one object it is 1 or 0 by a single stray pixel. mBO and mIoU are means
        over the ``frames`` that show any; mIoU's matching stays among all objects.
        """
        tables, videos = self.frame_tables()
        chosen = objects.cpu()[videos]  # (F, n_true - 1)
        visible = ((tables[:, 1:].sum(-1) > 0) & chosen).sum(-1)  # (F,)
        return {
            "frames": int((visible > 0).sum()),
            "frames_ari": int((visible > 1).sum()),
            "fg_ari": _mean(adjusted_rand_index(tables, foreground=True, objects=chosen)[visible > 1]),
            "mbo": _mean(mean_best_overlap(tables, chosen)),
            "miou": _mean(mean_iou(tables, chosen)),
        }


def _mean(values: Tensor) -> float | None:
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean
