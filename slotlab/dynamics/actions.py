"""Actions of a store's videos: a vector a frame, which leads to the next one; from HDF5 or NumPy's archives.

HDF5: ``actions`` or ``action`` at the top or in groups named as splits are, either (videos, frames, A) in the order of
the store's videos, or (frames, A) with ``ep_len`` and ``ep_offset``, as stable-worldmodel keeps episodes. ``npz``:
(frames, A) as ``SPLIT/NAME`` of each video.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.errors import DataError, UsageError
from featcache.sources.hdf5 import SUFFIXES
from featcache.sources.hdf5_file import Group, opened
from featcache.sources.splits import split_folders
from featcache.store.reading import FeatureStore, Split

NAMES = ("actions", "action")
MOST = float(np.finfo(np.float16).max)  # they are stored beside the slots, as half floats

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Actions:
    """The actions of every video of a store."""

    size: int  # A, numbers of an action
    of: Mapping[str, Mapping[int, Tensor]]  # split -> video -> (T, A) float32

    @property
    def digest(self) -> str:
        """A short hash of all values."""
        data = b"".join(of[video].numpy().tobytes() for of in self.of.values() for video in sorted(of))
        return f"{google_crc32c.value(data):08x}"


def read_actions(path: Path, store: FeatureStore) -> Actions:
    """The actions in a file, of all videos of a store.

    ``UsageError`` for another kind of file, ``DataError`` where it lacks a video, has another number of frames or of
    numbers, or a value that is not finite or beyond half floats.
    """
    if path.suffix.lower() in SUFFIXES:
        top = opened(path)
        groups = split_folders((name for name in top if isinstance(top[name], Group)), str(path))
        if not groups and len(store.splits) > 1:
            raise DataError(f"{path}: has no groups named {', '.join(store.splits)}, which {store.path} has as splits")
        of = {split: _rows(path, top[groups[split]] if split in groups else top) for split in store.splits}
    elif path.suffix.lower() == ".npz":
        of = {split: _named(path, store[split]) for split in store.splits}
    else:
        raise UsageError(f"--actions {path}: name an HDF5 file ({', '.join(SUFFIXES)}) or one of NumPy (.npz)")
    found: dict[str, dict[int, Tensor]] = {split: {} for split in store.splits}
    for split, read in of.items():
        spec = store[split].spec
        for video in store[split].videos:
            where = f"{path}: actions of {split} {store[split].names[video]}"
            values = np.asarray(read(video), np.float32)
            if values.ndim != 2 or len(values) != spec.lengths[video]:
                raise DataError(f"{where}: are of shape {values.shape}; need ({spec.lengths[video]}, numbers)")
            if not np.isfinite(values).all() or np.abs(values).max(initial=0) > MOST:
                raise DataError(f"{where}: hold a number that is not finite, or beyond {MOST:g}; scale them")
            found[split][video] = torch.from_numpy(values.copy())
    sizes = {values.shape[1] for videos in found.values() for values in videos.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise DataError(f"{path}: actions must all have the same number of numbers; they have {sorted(sizes)}")
    return Actions(sizes.pop(), found)


def _rows(path: Path, group: Group) -> Callable[[int], Array]:
    """The reader of one group's actions, by the number of the video."""
    name = next((name for name in NAMES if name in group), None)
    if name is None:
        raise DataError(f"{path}: {group.name} has no {' or '.join(NAMES)}; it has: {', '.join(group) or 'nothing'}")
    values = group[name]
    starts = lengths = None
    if values.ndim == 2:
        lengths = np.asarray(group["ep_len"])
        starts = np.asarray(group["ep_offset"])

    def read(video: int) -> Array:
        if video >= (len(values) if lengths is None else len(lengths)):
            raise DataError(f"{path}: {group.name}/{name} ends before video {video}; the store has more videos")
        if starts is None or lengths is None:
            return np.asarray(values[video])
        return np.asarray(values[int(starts[video]) : int(starts[video] + lengths[video])])

    return read


def _named(path: Path, split: Split) -> Callable[[int], Array]:
    """The reader of one split's actions in an archive, by the number of the video."""
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); write it again with numpy.savez") from error

    def read(video: int) -> Array:
        key = f"{split.name}/{split.names[video]}"
        if key not in archive:
            raise DataError(f"{path}: has no {key}; it needs the actions of every video as SPLIT/NAME")
        return np.asarray(archive[key])

    return read
