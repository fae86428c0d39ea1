"""One HDF5 file with ``video`` (N, T, H, W, 3) or ``image`` (N, H, W, 3), uint8, and optionally ``mask``.

The arrays lie at the top, or in groups named train, validation (val, valid), test. Masks are numbers
(N[, T], H, W[, 1]), or one-hot over K objects (N[, T], K, H, W[, 1]) with the background first, as public
object-centric data sets keep them.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.sources.fingerprint import digest, file_digest
from featcache.sources.masks import MaskPage, settle, unlabelled_instances
from featcache.sources.place import Layout
from featcache.sources.reading import Reading
from featcache.sources.splits import check_index, check_split, split_folders
from featcache.sources.video import Size, Source, Video

logger = logging.getLogger(__name__)

SUFFIXES = (".h5", ".hdf5", ".hdf")
FRAMES = ("video", "videos", "image", "images")
LINES = 8  # frames of a row, and lines of a frame, that its fingerprint reads
MASKS = ("mask", "masks", "segmentations")
_IS_HELD = f"errno = {errno.EAGAIN}"  # as HDF5 puts it


class Hdf5Source(Source):
    """Random access by row. The file is opened at each call, so that threads and processes share no handle."""

    def __init__(self, path: Path, reading: Reading | None = None, location: str | None = None) -> None:
        self.location = location or str(path)
        self.path = path
        self.reading = reading or Reading()
        self._groups: dict[str, tuple[str, str | None]] = {}  # split -> paths of frames and masks in the file
        self._lengths: dict[str, tuple[int, ...]] = {}
        self._sizes: dict[str, Size] = {}
        self._remarked = False
        with opened(self.path) as file:
            named = split_folders((k for k in file if isinstance(file[k], h5py.Group)), self.location)
            for split, group in named.items() or (("train", "/"),):
                self._add(split, file[group])

    def splits(self) -> tuple[str, ...]:
        return tuple(self._groups)

    def lengths(self, split: str) -> Sequence[int]:
        check_split(self.location, split, self._groups)
        return self._lengths[split]

    def fingerprints(self, split: str) -> Sequence[str]:
        """Of some lines of pixels of each row, so that a row keeps its fingerprint when others come and go."""
        check_split(self.location, split, self._groups)
        how = self.reading.of_masks()
        with opened(self.path) as file:
            arrays = [file[name] for name in self._groups[split] if name]
            return tuple(digest((how, *(_sample(a, index) for a in arrays))) for index in range(self.videos(split)))

    def fingerprint(self, split: str) -> str:
        check_split(self.location, split, self._groups)
        how = (masks,) if (masks := self.reading.of_masks()) else ()
        return digest((*how, split, *(name or "" for name in self._groups[split]), file_digest(self.path)))

    def size(self, split: str, index: int) -> Size:
        return self._sizes[split]

    def read(self, split: str, index: int) -> Video:
        check_split(self.location, split, self._groups)
        check_index(self.location, split, index, len(self._lengths[split]))
        frames_path, masks_path = self._groups[split]
        with opened(self.path) as file:
            frames = file[frames_path][index]
            masks = file[masks_path][index] if masks_path else None
        frames = frames.reshape(-1, *frames.shape[-3:])
        name = f"{split}_{index:05d}"
        if masks is None:
            return Video(name, frames)
        found = settle(_mask_pages(masks, frames.shape, f"{self.path}: {masks_path} row {index}"), self.reading)
        if found.remark and not self._remarked:
            self._remarked = True
            logger.warning("%s", found.remark)
        return Video(name, frames, found.numbers, unlabelled_instances(found.numbers), found.ignore)

    def _add(self, split: str, group: h5py.Group) -> None:
        frames = next((group[k] for k in FRAMES if isinstance(group.get(k), h5py.Dataset)), None)
        masks = next((group[k] for k in MASKS if isinstance(group.get(k), h5py.Dataset)), None)
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
        self._groups[split] = (frames.name, masks.name if masks is not None else None)
        self._sizes[split] = frames.shape[-3:-1]
        self._lengths[split] = (1 if frames.ndim == 4 else frames.shape[1],) * len(frames)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An HDF5 file for reading. ``DataError`` in one line where it is damaged, or another program writes to it."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        said = str(error).strip("\"'")
        if "unable to lock file" in said:
            what = "another program has it open for writing" if _IS_HELD in said else "its file system has no locks"
            raise DataError(
                f"{path}: {what}; close it there, or where none has it open (NFS, often), set "
                "HDF5_USE_FILE_LOCKING=FALSE in the environment"
            ) from error
        if "already open for write" in said:
            raise DataError(
                f"{path}: a program writes to it, or did until it was killed; close it there, or clear the mark "
                "(h5clear -s FILE)"
            ) from error
        raise DataError(f"{path}: {said}; copy or write this file again") from error


def _sample(array: Any, index: int) -> bytes:
    """Evenly spaced lines of pixels of one row, the last of each axis among them; nothing of a damaged row."""
    axes = array.shape[1 : -2 if array.shape[-1] in (1, 3) else -1]
    steps = [-(-length // LINES) for length in axes]
    lines = (slice((length - 1) % step, None, step) for length, step in zip(axes, steps, strict=True))
    try:
        return bytes(array[index, *lines].tobytes())
    except (OSError, RuntimeError):
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
