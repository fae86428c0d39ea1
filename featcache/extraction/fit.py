"""How pictures of any proportions meet a backbone's input, and how masks of it are brought back.

The backbone resizes whole frames to its input. So what it is shown is settled before: all of a frame (``squash``), as
much as has the input's proportions (``crop``: the short side, from the centre), or all of it with a margin (``pad``).
Stored frames and masks are cut alike, and then cover what the tokens cover.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.backbones.backbone import input_size
from featcache.sources.masks import counted
from featcache.sources.video import Size, Video
from featcache.words import Fit

FIT, MARGIN = "fit", "margin"  # keys of a store's preprocessing; it has neither where whole frames are squashed


@dataclass(frozen=True)
class Window:
    """A rectangle in a picture of ``frame`` size, or around it: rows ``top`` to ``top + height``."""

    frame: Size
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def of(cls, fit: Fit, frame: Size, proportions: Size) -> Window:
        """What of a frame is shown to an input of those proportions (rows, columns)."""
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
        """(T, H, W, ...) of the frame -> (T, height, width, ...), with ``margin`` beyond its edges."""
        return _moved(images, self.size, (-self.top, -self.left), margin)

    def put_back(self, images: npt.NDArray[Any], outside: Any) -> npt.NDArray[Any]:
        """(T, height, width, ...) of the window -> (T, H, W, ...) of the frame, with ``outside`` where it is not."""
        return _moved(images, self.frame, (self.top, self.left), outside)

    def resized(self, size: Size) -> Window:
        """The same where the window's content was brought to ``size``."""
        y, x = size[0] / self.height, size[1] / self.width
        frame = max(1, round(self.frame[0] * y)), max(1, round(self.frame[1] * x))
        return Window(frame, round(self.top * y), round(self.left * x), *size)


def _moved(images: npt.NDArray[Any], size: Size, place: tuple[int, int], empty: Any) -> npt.NDArray[Any]:
    """A canvas (T, *size, ...) of ``empty`` with images (T, H, W, ...) laid at a place, as far as they lie on it."""
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
    """What of a frame a store's backbone is shown."""
    fit = fit_of(preprocessing)
    return Window.of(fit, frame, frame if fit == "squash" else input_size(preprocessing))


def fit_of(preprocessing: Mapping[str, Any]) -> Fit:
    fit: Fit = preprocessing.get(FIT, "squash")
    return fit


def fitting(fit: Fit, mean: tuple[float, ...]) -> dict[str, Any]:
    """What a store's preprocessing says of a fit. A margin has the colour that normalisation makes zero."""
    margin = {MARGIN: [round(255 * value) for value in mean]} if fit == "pad" else {}
    return {} if fit == "squash" else {FIT: fit, **margin}


def fitted(video: Video, preprocessing: Mapping[str, Any]) -> Video:
    """A video as its store's backbone is shown it. In a margin the truth is not known."""
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
