"""One HDF5 file with ``video`` (N, T, H, W, 3) or ``image`` (N, H, W, 3), uint8, and optionally ``mask``.

The arrays lie at the top, or in groups named train, validation (val, valid), test. Masks are numbers
(N[, T], H, W[, 1]), or one-hot over K objects (N[, T], K, H, W[, 1]) with the background first, as public
object-centric data sets keep them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.sources.fingerprint import digest, file_digest
from featcache.sources.hdf5_file import Dataset, Group, opened
from featcache.sources.masks import MaskPage, settle, unlabelled_instances
from featcache.sources.place import Layout
from featcache.sources.reading import Reading
from featcache.sources.splits import check_index, check_split, split_folders
from featcache.sources.video import Size, Source, Video
from featcache.text import printable

logger = logging.getLogger(__name__)

SUFFIXES = (".h5", ".hdf5", ".hdf")
FRAMES = ("video", "videos", "image", "images")
LINES = 8  # frames of a row, and lines of a frame, that its fingerprint reads
MASKS = ("mask", "masks", "segmentations")


class Hdf5Source(Source):
    """Random access by row."""

    def __init__(self, path: Path, reading: Reading | None = None, location: str | None = None) -> None:
        self.location = location or str(path)
        self.path = path
        self.reading = reading or Reading()
        self._arrays: dict[str, tuple[Dataset, Dataset | None]] = {}  # split -> frames and masks
        self._lengths: dict[str, tuple[int, ...]] = {}
        self._sizes: dict[str, Size] = {}
        self._remarked = False
        file = opened(self.path)
        named = split_folders((k for k in file if isinstance(file[k], Group)), self.location)
        for split, group in named.items() or (("train", ""),):
            self._add(split, file[group] if group else file)

    def splits(self) -> tuple[str, ...]:
        return tuple(self._arrays)

    def lengths(self, split: str) -> Sequence[int]:
        check_split(self.location, split, self._arrays)
        return self._lengths[split]

    def fingerprints(self, split: str) -> Sequence[str]:
        """Of some lines of pixels of each row, so that a row keeps its fingerprint when others come and go."""
        check_split(self.location, split, self._arrays)
        how = self.reading.of_masks()
        arrays = [array for array in self._arrays[split] if array is not None]
        return tuple(digest((how, *(_sample(a, index) for a in arrays))) for index in range(self.videos(split)))

    def fingerprint(self, split: str) -> str:
        check_split(self.location, split, self._arrays)
        how = (masks,) if (masks := self.reading.of_masks()) else ()
        return digest(
            (*how, split, *("" if a is None else a.name for a in self._arrays[split]), file_digest(self.path))
        )

    def size(self, split: str, index: int) -> Size:
        return self._sizes[split]

    def read(self, split: str, index: int) -> Video:
        check_split(self.location, split, self._arrays)
        check_index(self.location, split, index, len(self._lengths[split]))
        of_frames, of_masks = self._arrays[split]
        frames = of_frames[index]
        frames = frames.reshape(-1, *frames.shape[-3:])
        name = f"{split}_{index:05d}"
        if of_masks is None:
            return Video(name, frames)
        found = settle(
            _mask_pages(of_masks[index], frames.shape, f"{self.path}: {of_masks.name} row {index}"), self.reading
        )
        if found.remark and not self._remarked:
            self._remarked = True
            logger.warning("%s", printable(found.remark))
        return Video(name, frames, found.numbers, unlabelled_instances(found.numbers), found.ignore)

    def _add(self, split: str, group: Group) -> None:
        frames, masks = (
            next((array for name in names if isinstance(array := group.get(name), Dataset)), None)
            for names in (FRAMES, MASKS)
        )
        if frames is None:
            raise DataError(
                f"{self.path}: {group.name} holds {', '.join(group) or 'nothing'}; name the frames video or image"
            )
        where = f"{self.path}: {frames.name}"
        if frames.dtype != np.uint8 or frames.ndim not in (4, 5) or frames.shape[-1] != 3:
            raise DataError(
                f"{where} is {frames.dtype} {frames.shape}; save it as uint8 (N, T, H, W, 3) or (N, H, W, 3)"
            )
        if 0 in frames.shape:
            raise DataError(f"{where} is empty {frames.shape}; write the videos into it")
        if masks is not None and not _layout(masks.shape, frames.shape):
            raise DataError(
                f"{self.path}: {masks.name} {masks.shape} does not match {frames.name} {frames.shape}; "
                f"save it as {frames.shape[:-1]}"
            )
        self._arrays[split] = frames, masks
        self._sizes[split] = frames.shape[-3], frames.shape[-2]
        self._lengths[split] = (1 if frames.ndim == 4 else frames.shape[1],) * len(frames)


def _sample(array: Dataset, index: int) -> bytes:
    """Evenly spaced lines of pixels of one row, the last of each axis among them; nothing of a damaged row."""
    axes = array.shape[1 : -2 if array.shape[-1] in (1, 3) else -1]
    steps = [-(-length // LINES) for length in axes]
    lines = (slice((length - 1) % step, None, step) for length, step in zip(axes, steps, strict=True))
    try:
        return bytes(array[index, *lines].tobytes())
    except DataError:
        return b""


def _layout(masks: tuple[int, ...], frames: tuple[int, ...]) -> str:
    """``numbers`` or ``one-hot`` if masks of that shape fit frames (..., H, W, 3); else empty."""
    *lead, height, width, _ = frames
    shape = masks[:-1] if masks[-1] == 1 and masks[-3:-1] == (height, width) else masks
    if shape == (*lead, height, width):
        return "numbers"
    return "one-hot" if shape == (*lead, *shape[len(lead) : len(lead) + 1], height, width) else ""


def _mask_pages(masks: npt.NDArray[Any], frames: tuple[int, ...], where: str) -> list[MaskPage]:
    """Masks of one row, in either layout -> object numbers (H, W) for each frame."""
    steps, height, width, _ = frames
    if masks.size == steps * height * width:
        return [MaskPage(mask, where) for mask in masks.reshape(steps, height, width)]
    onehot = masks.reshape(steps, -1, height, width)
    if not ((onehot != 0).sum(axis=1) == 1).all():
        raise DataError(f"{where}: one-hot masks must name exactly one object a pixel; save object numbers 0..255")
    return [MaskPage(mask, where) for mask in onehot.argmax(axis=1)]


LAYOUT = Layout(
    "hdf5",
    "HDF5",
    lambda path: path.is_file() and path.suffix.lower() in SUFFIXES,
    lambda place, reading: Hdf5Source(place.path, reading, place.location),
)
