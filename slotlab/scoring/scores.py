"""Scores of a split, collected batch by batch from contingency tables."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
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


@dataclass(frozen=True)
class Part:
    """Scores of some objects by key: of each frame (F,) and video (V,), NaN where not defined, and their means."""

    frames: Mapping[str, Tensor]
    videos: Mapping[str, Tensor]
    summary: Summary


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
    _loose: int = 0  # number of tensors at the end of each list that are of one call
    _summed: tuple[Tensor, Tensor] | None = None  # video_tables of what was added

    def add(self, tables: Tensor, videos: Tensor) -> None:
        """Add tables of frames (B, n_true, n_pred), of the same n_true in each call, and their video ids (B,)."""
        if len(tables) != len(videos):
            raise ValueError(f"{len(tables)} tables but {len(videos)} video ids; give one per frame")
        tables, videos = tables.detach().cpu(), videos.detach().cpu().long()
        labelled = tables.sum((1, 2)) > 0
        self._tables.append(tables[labelled])
        self._videos.append(videos[labelled])
        self._added.append(videos)
        self._summed = None
        self._loose += 1
        if self._loose == _JOINED:
            self._join(_JOINED)

    def _join(self, last: int) -> None:
        """Make one tensor of the last ones: a tensor for each image of a large split takes more than its values."""
        self._tables[-last:] = [stacked(self._tables[-last:])]
        self._videos[-last:] = [torch.cat(self._videos[-last:])]
        self._added[-last:] = [torch.cat(self._added[-last:])]
        self._loose = 0

    def add_video(self, tables: Tensor, video: int) -> None:
        """Add tables (T, n_true, n_pred) of one video's frames."""
        self.add(tables, torch.full((len(tables),), video))

    def __len__(self) -> int:
        """Number of frames."""
        return sum(map(len, self._added))

    def frame_tables(self) -> tuple[Tensor, Tensor]:
        """The tables of labelled frames (F, n_true, n_pred) and their video ids (F,), in the order they were added.

        ``ValueError`` if there are none.
        """
        if not self._tables:
            raise ValueError("no frame has been scored; the split is empty")
        if len(self._tables) > 1:
            self._join(len(self._tables))
        return self._tables[0], self._videos[0]

    def video_tables(self) -> tuple[Tensor, Tensor]:
        """The sums of each labelled video's tables (V, n_true, n_pred), and the videos' ids (V,) in rising order."""
        if self._summed is None:
            tables, videos = self.frame_tables()
            ids, position = torch.unique(videos, return_inverse=True)
            if torch.equal(ids, videos):  # images: each is its own sum, and a copy would double what is held
                self._summed = tables, ids
            else:
                self._summed = tables.new_zeros((len(ids), *tables.shape[1:])).index_add_(0, position, tables), ids
        return self._summed

    def frame_values(self, objects: Tensor | None = None) -> dict[str, Tensor]:
        """Scores of each frame by key, (F,) float64; NaN where one is not defined.

        objects (V, n_true - 1) bool keeps some objects only, as in :meth:`of_objects`, and leaves out scores that are
        not defined for some objects.
        """
        tables, videos = self.frame_tables()
        return _compared(_values(tables, videos, objects), shows_several(tables))

    def video_values(self, objects: Tensor | None = None) -> dict[str, Tensor]:
        """Scores of each video's summed table by key, (V,) float64, in rising order of video ids."""
        tables, videos = self.video_tables()
        return _compared(_values(tables, videos, objects), shows_several(tables))

    def summary(self) -> Summary:
        """Means over the split; None for a score that no frame defines."""
        tables, _ = self.frame_tables()
        added = torch.cat(self._added)
        skipped = int((visible(tables) == 0).sum())
        means = _means(self.frame_values(), self.video_values())
        return Summary(len(added), len(set(added.tolist())), means, labelled_frames=len(tables), skipped_frames=skipped)

    def of_objects(self, objects: Tensor) -> Summary:
        """Means over some objects only, for example the metal ones; None where nothing was scored.

        Row v of objects (V, n_true - 1) bool selects objects of the video with id v; column k is ground-truth label
        k + 1. FG-ARI uses their pixels alone, in the ``frames_ari`` frames that show at least two of them. mBO and mIoU
        are means over the ``frames`` that show any; the matching for mIoU still includes all objects. The same holds
        for ``videos``.
        """
        return self.part(objects).summary

    def part(self, objects: Tensor) -> Part:
        """Scores of some objects only, as in :meth:`of_objects`."""
        frames, videos = self.frame_values(objects), self.video_values(objects)
        seen, seen_in_videos = (
            visible(tables, objects.cpu()[videos]) for tables, videos in (self.frame_tables(), self.video_tables())
        )
        shown, shown_in_videos = int((seen > 0).sum()), int((seen_in_videos > 0).sum())
        means = _means(frames, videos)
        return Part(frames, videos, Summary(shown, shown_in_videos, means, frames_ari=int((seen > 1).sum())))


_JOINED = 256
_SCORED = 4096  # tables at once: scores make several of their size in float64


class Means:
    """The summary of :class:`Scores` for tables that nothing else needs: those of a few hundred videos are held."""

    def __init__(self) -> None:
        self._held, self._videos = Scores(), 0
        self._frames: dict[str, list[Tensor]] = defaultdict(list)
        self._whole: dict[str, list[Tensor]] = defaultdict(list)
        self._several = [False, False]  # whether a frame, a video shows two objects
        self._counts = np.zeros(3, np.int64)  # frames, labelled ones, skipped ones

    def add_video(self, tables: Tensor, video: int) -> None:
        """Add tables (T, n_true, n_pred) of all frames of one video."""
        self._held.add_video(tables, video)
        self._videos += 1
        if self._videos % _JOINED == 0:
            self._reduce()

    def summary(self) -> Summary:
        """Means over the split. ``ValueError`` if nothing was added."""
        if self._held or not self._videos:
            self._reduce()
        values = [
            _compared({key: torch.cat(of) for key, of in kind.items()}, several)
            for kind, several in zip((self._frames, self._whole), self._several, strict=True)
        ]
        frames, labelled, skipped = self._counts.tolist()
        return Summary(frames, self._videos, _means(*values), labelled_frames=labelled, skipped_frames=skipped)

    def _reduce(self) -> None:
        tables, _ = self._held.frame_tables()
        for kind, (kept, of) in enumerate(
            ((self._frames, self._held.frame_tables()), (self._whole, self._held.video_tables()))
        ):
            for key, values in _values(*of, None).items():
                kept[key].append(values)
            self._several[kind] |= shows_several(of[0])
        counts = len(self._held), len(tables), int((visible(tables) == 0).sum())
        self._counts += counts
        self._held = Scores()


def shows_several(tables: Tensor) -> bool:
    """Whether any of the tables (B, n_true, K) has two visible objects."""
    return bool((visible(tables) > 1).any())


def _compared(values: dict[str, Tensor], several: bool) -> dict[str, Tensor]:
    """The values, NaN for scores that compare objects if there are never two: an FG-ARI would be 1, or 0 if split."""
    if several:
        return values
    return values | {score.key: values[score.key].fill_(torch.nan) for score in SCORES if score.compares}


def _values(tables: Tensor, videos: Tensor, objects: Tensor | None) -> dict[str, Tensor]:
    if objects is None:
        chunks = torch.split(tables, _SCORED)
        return {score.key: torch.cat([score.of_tables(chunk) for chunk in chunks]) for score in SCORES}
    chosen = objects.cpu()[videos]  # (F, n_true - 1)
    rows = visible(tables, chosen).nonzero().flatten()  # elsewhere no score of objects is defined
    found = {score.key: torch.full((len(tables),), torch.nan, dtype=torch.float64) for score in scores_in("parts")}
    for score in scores_in("parts"):
        found[score.key][rows] = score.of_tables(tables[rows], chosen[rows])
    return found


def _means(frames: Mapping[str, Tensor], videos: Mapping[str, Tensor]) -> Values:
    """Means over frames and, with the suffix ``_video``, over videos."""
    of_videos = {f"{key}_video": mean(values) for key, values in videos.items()}
    return {key: mean(values) for key, values in frames.items()} | of_videos


def mean(values: Tensor) -> float | None:
    """Mean of the values that are not NaN; None if all are."""
    found = float(values.nanmean())
    return None if math.isnan(found) else found
