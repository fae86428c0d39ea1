"""Fits pictures of any proportions to a backbone's input, and maps masks back.

The backbone resizes whatever it gets to its input. So frames are cut before: not at all (``squash``), to the largest
centred window with the input's proportions (``crop``), or to the smallest window around the frame with them (``pad``).
Stored frames and masks are cut in the same way, so that they cover the same picture as the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.backbones.registry import input_size
from featcache.sources.masks import counted
from featcache.sources.video import Size, Video
from featcache.words import Fit

FIT, MARGIN = "fit", "margin"  # keys of a store's preprocessing; it has neither if frames are squashed


@dataclass(frozen=True)
class Window:
    """A rectangle of rows ``top`` to ``top + height`` in a picture of size ``frame``, or around it."""

    frame: Size
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def of(cls, fit: Fit, frame: Size, proportions: Size) -> Window:
        """The window of a frame that an input with those proportions (rows, columns) gets."""
        rows, columns = frame
        wide = columns * proportions[0] > rows * proportions[1]
        if (fit == "crop" and wide) or (fit == "pad" and not wide):
            columns = max(1, round(rows * proportions[1] / proportions[0]))
        elif fit != "squash":
            rows = max(1, round(columns * proportions[0] / proportions[1]))
        return cls(frame, (frame[0] - rows) // 2, (frame[1] - columns) // 2, rows, columns)

    @property
    def size(self) -> Size:
        return self.height, self.width

    @property
    def is_frame(self) -> bool:
        return self.size == self.frame

    def cut(self, images: npt.NDArray[Any], margin: Any) -> npt.NDArray[Any]:
        """Cut images (T, H, W, ...) of the frame to (T, height, width, ...), with ``margin`` around the frame."""
        return _moved(images, self.size, (-self.top, -self.left), margin)

    def put_back(self, images: npt.NDArray[Any], outside: Any) -> npt.NDArray[Any]:
        """Put images (T, height, width, ...) of the window back into the frame (T, H, W, ...), on ``outside``."""
        return _moved(images, self.frame, (self.top, self.left), outside)

    def resized(self, size: Size) -> Window:
        """This window after its content was resized to ``size``."""
        y, x = size[0] / self.height, size[1] / self.width
        frame = max(1, round(self.frame[0] * y)), max(1, round(self.frame[1] * x))
        return Window(frame, round(self.top * y), round(self.left * x), *size)


def _moved(images: npt.NDArray[Any], size: Size, place: tuple[int, int], empty: Any) -> npt.NDArray[Any]:
    """A canvas (T, *size, ...) of ``empty`` with images (T, H, W, ...) at a place (row, column), clipped to it."""
    if images.shape[1:3] == size:
        return images
    canvas = np.empty((len(images), *size, *images.shape[3:]), images.dtype)
    canvas[...] = empty
    onto, from_ = [], []
    for side, length, start in zip(size, images.shape[1:3], place, strict=True):
        onto.append(slice(max(0, start), min(side, start + length)))
        from_.append(slice(max(0, -start), max(0, -start) + onto[-1].stop - onto[-1].start))
    canvas[:, onto[0], onto[1]] = images[:, from_[0], from_[1]]
    return canvas


def shown(preprocessing: Mapping[str, Any], frame: Size) -> Window:
    """The window of a frame that the backbone of a store gets."""
    fit = fit_of(preprocessing)
    return Window.of(fit, frame, frame if fit == "squash" else input_size(preprocessing))


def fit_of(preprocessing: Mapping[str, Any]) -> Fit:
    """The fit that a store's preprocessing records."""
    fit: Fit = preprocessing.get(FIT, "squash")
    return fit


def fitting(fit: Fit, mean: tuple[float, ...]) -> dict[str, Any]:
    """The entries of a fit in a store's preprocessing. A margin has the colour that normalisation maps to zero."""
    margin = {MARGIN: [round(255 * value) for value in mean]} if fit == "pad" else {}
    return {} if fit == "squash" else {FIT: fit, **margin}


def fitted(video: Video, preprocessing: Mapping[str, Any]) -> Video:
    """A video, cut as the backbone of its store gets it. The ground truth is unknown in a margin."""
    window = shown(preprocessing, video.frames.shape[1:3])
    if window.is_frame:
        return video
    frames = window.cut(video.frames, preprocessing.get(MARGIN, 0))
    if video.segmentations is None:
        return replace(video, frames=frames)
    masks = window.cut(video.segmentations, 0)
    known = np.zeros(video.segmentations.shape, bool) if video.ignore is None else video.ignore
    ignore = window.cut(known, True)
    return replace(
        video,
        frames=frames,
        segmentations=masks,
        instances=recounted(video, masks),
        ignore=ignore if ignore.any() or video.ignore is not None else None,
    )


def recounted(video: Video, masks: npt.NDArray[np.uint8]) -> tuple[Any, ...]:
    """The video's instances with the pixels that they have in other masks (T, H, W) of it."""
    return counted(masks, video.instances)
