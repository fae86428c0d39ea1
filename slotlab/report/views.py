"""Chooses the videos of the gallery and packs each run's masks of them while the run is followed.

Masks stay soft and on the model's grid, so that the page upsamples them and takes the largest as the evaluation does.
Arrays are deflated (raw deflate, which browsers inflate themselves) and encoded in base64.
"""

from __future__ import annotations

import base64
import zlib
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.store.reading import Split
from slotlab.pictures.still import Still
from slotlab.report.options import PageOptions
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.follow import Followed
from slotlab.scoring.metrics import SCORES, scores_in
from slotlab.scoring.scores import mean

FINE_GRID = 48  # grids of this side or more use 8-bit masks, as upsampling needs less; smaller ones 16-bit


@dataclass(frozen=True)
class Choice:
    """A video of the gallery, and the reason for its choice."""

    video: int
    why: str  # "worst", "best" or ""


@dataclass(frozen=True)
class View:
    """One run's masks of a video."""

    packed: Mapping[str, Any]  # for the page; its masks are (T, K, rows, columns) of 8 or 16 bits
    still: Still

    @classmethod
    def of(cls, followed: Followed, most_frames: int) -> View:
        kept = frame_indices(len(followed), most_frames)
        masks = followed.masks[torch.from_numpy(kept)].float()  # (T, K, rows, columns)
        bits = 8 if max(followed.output.grid) >= FINE_GRID else 16
        codes, ranges = quantised(masks, bits)
        scores = scores_in("headline") if followed.truth is not None else ()
        found = {
            "slots": masks.shape[1],
            "grid": list(followed.output.grid),
            "bits": bits,
            "masks": packed(codes),
            "ranges": ranges,
            "matches": followed.objects[torch.from_numpy(kept)].tolist(),
            "mass": [[round(float(v), 4) for v in frame] for frame in masks.mean((-2, -1))],
            "by_frame": {score.key: rounded(followed.score(score).numpy()[kept]) for score in scores},
        }
        return cls(found, Still.of(followed))


class Views:
    """Chooses the gallery's videos and keeps their views, never more than the gallery shows.

    Half of the videos are the worst by a score, worst first, and half the best; without scores they are spread evenly
    over the split. If ``chosen`` is given (by an evaluation, or for an earlier run), those videos are used.
    """

    def __init__(self, split: Split, options: PageOptions, chosen: Sequence[Choice] | None = None) -> None:
        self._split, self._options, self._chosen = split, options, chosen
        self._score = next(score for score in SCORES if score.key == options.rank)
        self._ranked: list[tuple[float, int]] = []  # goodness and video, in rising order
        self._views: dict[int, View] = {}

    def rank(self, evaluation: Evaluation) -> None:
        """Choose by known scores, unless the videos are chosen already."""
        if self._chosen is not None:
            return
        for video, name in self._split.names.items():
            self._place(video, evaluation.by_video.get(name, {}).get(self._score.key))
        self._chosen = self.choices()

    def add(self, followed: Followed) -> None:
        if self._chosen is None and followed.truth is not None:
            self._place(followed.video, mean(followed.score(self._score)))
        wanted = {choice.video for choice in self.choices()}
        if followed.video in wanted:
            self._views[followed.video] = View.of(followed, self._options.frames)
        self._views = {video: view for video, view in self._views.items() if video in wanted}

    def choices(self) -> tuple[Choice, ...]:
        """The choices so far."""
        if self._chosen is not None:
            return tuple(self._chosen)
        most = self._options.videos
        if not self._ranked:
            videos = self._split.videos
            spread = np.linspace(0, len(videos) - 1, min(most, len(videos))).round().astype(int)
            return tuple(Choice(videos[i], "") for i in spread)
        count = min(most, len(self._ranked))
        worst, best = self._ranked[: -(-count // 2)], self._ranked[::-1][: count // 2]
        return tuple([Choice(video, "worst") for _, video in worst] + [Choice(video, "best") for _, video in best])

    def result(self) -> dict[int, View]:
        """The views by video."""
        return self._views

    def _place(self, video: int, value: float | None) -> None:
        if value is not None:
            insort(self._ranked, (self._score.order(value), video))


def footage_key(split: Split) -> str:
    """A key that is equal for splits with the same videos and frame size: their runs share the gallery's frames."""
    return f"{split.name}/{split.spec.content}/{split.spec.frame_size}/{split.spec.lengths}"


def frame_indices(frames: int, most: int) -> npt.NDArray[np.int64]:
    """Indices of every ``n``-th frame, ``most`` of them at most."""
    return np.arange(0, frames, max(1, -(-frames // most)))


def quantised(masks: Tensor, bits: int) -> tuple[npt.NDArray[Any], list[list[float]]]:
    """Masks (T, ...) as unsigned integers of 8 or 16 bits (little-endian), and each frame's least and largest value.

    A frame's codes span its range, so that masks that hardly differ (of a softmax that is still flat) keep their
    order too. Upsampling commutes with this map, so the largest slot of a pixel is the same as by the values.
    """
    flat = masks.flatten(1).double()
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    share = (flat - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    codes: npt.NDArray[Any] = (share * (2**bits - 1)).round().numpy().reshape(masks.shape)
    return codes.astype("u1" if bits == 8 else "<u2"), torch.cat([low, high], 1).tolist()


def packed(values: npt.NDArray[Any]) -> str:
    """The bytes of an array in C order, deflated, in base64."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return base64.b64encode(deflate.compress(np.ascontiguousarray(values).tobytes()) + deflate.flush()).decode()


def rounded(values: npt.NDArray[np.float64]) -> list[float | None]:
    """Values for JSON, with four digits; None for NaN."""
    return [None if np.isnan(v) else round(float(v), 4) for v in values]
