"""Views of pictures: what stays the same in one that has no time.

Every frame of the training split comes N times: whole, then as N - 1 crops of a quarter to nine tenths of its area, up
to half as wide or as high again as the frame's proportions have it, half of them mirrored, each brought to the frame's
size. A model that learns from what two frames of a clip have in common so learns from photographs, too. (Random resized
crops: Szegedy et al., 2015, arXiv:1409.4842.)
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.errors import DataError, UsageError
from featcache.sources import images
from featcache.sources.fingerprint import digest
from featcache.sources.masks import counted
from featcache.sources.splits import check_index, check_split
from featcache.sources.video import Size, Source, Video
from featcache.sources.wrapped import Wrapped

SPLIT = "train"  # others are scored, and a score is of whole pictures
LEAST, MOST = 0.25, 0.9  # area of a crop
STRETCH = 0.4  # logarithm of a crop's width over its height, in shares of the frame's, at most

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Crop:
    """A part of a frame, in shares of its sides."""

    top: float
    left: float
    bottom: float
    right: float
    mirrored: bool = False

    @classmethod
    def drawn(cls, draws: np.random.Generator) -> Crop:
        side, stretch = draws.uniform(LEAST, MOST) ** 0.5, np.exp(draws.uniform(-STRETCH, STRETCH) / 2)
        height, width = min(1.0, side / stretch), min(1.0, side * stretch)
        top, left = draws.uniform(0, 1 - height), draws.uniform(0, 1 - width)
        return cls(top, left, top + height, left + width, bool(draws.random() < 0.5))

    def of_frame(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The crop of a frame (H, W, 3) at the frame's size, bicubic."""
        height, width = frame.shape[:2]
        box = (self.left * width, self.top * height, self.right * width, self.bottom * height)
        cut = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=box))
        return cut[:, ::-1] if self.mirrored else cut

    def places(self, size: Size) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Row (H, 1) and column (1, W) of a frame that lie under each pixel of its crop."""
        (height, width), ends = size, ((self.top, self.bottom), (self.left, self.right))
        rows, columns = (
            ((begin + (end - begin) * (np.arange(side) + 0.5) / side) * side).astype(np.intp)
            for side, (begin, end) in zip((height, width), ends, strict=True)
        )
        return rows[:, None], (columns[::-1] if self.mirrored else columns)[None]


WHOLE = Crop(0, 0, 1, 1)


class Views(Wrapped):
    """A source, each frame of whose training split comes ``views`` times; the other splits as they are.

    The crops are drawn by the video's name, so that they are the same whenever it is read.
    ``UsageError`` if there is no training split, ``DataError`` for views that are too many to be held.
    """

    def __init__(self, source: Source, views: int) -> None:
        super().__init__(source)
        if SPLIT not in source.splits():
            raise UsageError(
                f"{source.location}: views are of the split {SPLIT}, and there is none, but "
                f"{', '.join(source.splits())}; leave views={views} out"
            )
        self.views = views
        self._names: Sequence[str] = ()

    def lengths(self, split: str) -> Sequence[int]:
        known = self._source.lengths(split)
        return tuple(frames * self.views for frames in known) if split == SPLIT else known

    def fingerprints(self, split: str) -> Sequence[str]:
        known = self._source.fingerprints(split)
        return tuple(digest((each, f"views={self.views}")) for each in known) if split == SPLIT else known

    def fingerprint(self, split: str) -> str:
        known = self._source.fingerprint(split)
        return digest((known, f"views={self.views}")) if split == SPLIT else known

    def read_smaller(self, split: str, index: int, shrink: float) -> Video:
        check_split(self.location, split, self.splits())
        check_index(self.location, split, index, self.videos(split))
        if split != SPLIT:
            return self._source.read_smaller(split, index, shrink)
        self._names = self._names or self._source.names(split)
        draws = np.random.default_rng(zlib.crc32(self._names[index].encode("utf-8", "surrogateescape")))
        # A crop is enlarged, so that it needs more pixels than the frame does.
        video = self._source.read_smaller(split, index, max(1.0, shrink * LEAST**0.5))
        if video.frames.nbytes * self.views > images.MAX_BYTES:
            raise DataError(
                f"{self.where(split, index)}: {self.views} views of its {len(video.frames)} frames are over "
                f"{images.MAX_BYTES >> 30} GiB; have fewer, or scale them down (--frame-size 512)"
            )
        return seen(video, [[WHOLE, *(Crop.drawn(draws) for _ in range(self.views - 1))] for _ in video.frames])


def seen(video: Video, crops: Sequence[Sequence[Crop]]) -> Video:
    """A video of the crops of each frame, which follow each other, with their truth."""
    size = video.frames.shape[1:3]
    each = [(frame, crop) for frame, of_frame in enumerate(crops) for crop in of_frame]

    def cut(values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        return np.stack([values[frame][crop.places(size)] for frame, crop in each])

    masks = None if video.segmentations is None else cut(video.segmentations)
    return replace(
        video,
        frames=np.stack([crop.of_frame(video.frames[frame]) for frame, crop in each]),
        segmentations=masks,
        instances=video.instances if masks is None else counted(masks, video.instances),
        ignore=None if video.ignore is None else cut(video.ignore),
        labelled=None if video.labelled is None else video.labelled[[frame for frame, _ in each]],
    )
