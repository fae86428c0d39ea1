"""Feature stores as one HDF5 file, the format that most object-centric code reads.

The layout has one group per split (a file without such groups is one split, called train)::

    features/<tap>     (frame, patch, feature) float16; other stored forms have all their arrays, such as
    scales/<tap>       (frame, patch) float16 beside int8 features
    video              (frame, y, x, rgb) uint8
    segmentations      (frame, y, x) uint8, where the source had masks
    ignored            (frame, y, x) bool: pixels of the masks whose truth is not known
    video_offsets      (video + 1,) int64: the frames of video v are rows [offset v, offset v + 1)
    video_ids          (video,) text
    video_names, video_fingerprints   (video,) text: what the source called each video, and a hash of its files
    instances          (video,) text: JSON, one object per instance
    checksums/<array>  (video,) uint32: CRC32C of each video's rows of that array
    statistics/<tap>/<name>   the moments, as in the zarr store

The attribute ``featcache`` (JSON) of the file and of each group keeps the provenance. Frames of all videos follow
each other without padding; features are contiguous, so that they can be mapped. A file by other code only needs
``features/<tap>``, ``video`` and ``video_offsets``.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import numpy.typing as npt

from featcache.errors import DataError, UsageError
from featcache.moments import Moments
from featcache.sources.hdf5_file import Group, opened
from featcache.sources.masks import as_mask
from featcache.sources.video import Instance
from featcache.store.durable import TEMPORARY, cannot_write, make_directory, sync_directory
from featcache.store.encoding import ENCODINGS, recognised
from featcache.store.layout import COMPRESSED, array_layouts
from featcache.store.manifest import Row
from featcache.store.spec import MAX_CHUNK_FRAMES, SplitSpec, StoreSpec, TapSpec

ATTRIBUTE = "featcache"
Arrays = dict[str, npt.NDArray[Any]]


class Hdf5Writer:
    """Writes a file under a temporary name, and renames it when it is complete. ``create`` makes one."""

    def __init__(self, file: Any, spec: StoreSpec, disk: _Disk) -> None:
        self._file, self._spec, self._disk = file, spec, disk
        file.attrs[ATTRIBUTE] = json.dumps(spec.to_json())

    @classmethod
    @contextmanager
    def create(cls, path: Path, spec: StoreSpec) -> Iterator[Hdf5Writer]:
        """The writer of a new file. ``UsageError`` if the file exists, ``DataError`` if the disk is full."""
        if path.exists():
            raise UsageError(f"{path}: exists already; delete it or choose another OUT")
        make_directory(path.absolute().parent)
        temporary = path.with_name(path.name + TEMPORARY)
        try:
            with _Disk(temporary, "w+") as disk:
                with h5py.File(disk, "w") as file:
                    yield cls(file, spec, disk)
                disk.check()
                os.fsync(disk.fileno())
            os.replace(temporary, path)
            sync_directory(path.absolute().parent)
        except OSError as error:
            raise cannot_write(path, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def split(self, name: str, spec: SplitSpec) -> Hdf5SplitWriter:
        return Hdf5SplitWriter(self._file.create_group(name), self._spec, spec, self._disk)


class _Disk(io.FileIO):
    """A file that HDF5 can always write to: a full disk would leave that library in disorder. ``check`` tells of it."""

    _failure: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self._failure is None:
                left = left[super().write(left) :]
        except OSError as error:
            self._failure = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._failure = self._failure or error
            return size or 0

    def check(self) -> None:
        """``OSError`` if anything could not be written."""
        if self._failure is not None:
            raise self._failure


class Hdf5SplitWriter:
    """Writes one group of the file, video by video in order."""

    def __init__(self, group: Any, store: StoreSpec, split: SplitSpec, disk: _Disk) -> None:
        self._group, self._disk = group, disk
        # What there is of each video would not fit an attribute for large data sets.
        without = {"lengths": (), "names": (), "fingerprints": (), "shard_chunks": 0, "statistics_videos": 0}
        group.attrs[ATTRIBUTE] = json.dumps({**asdict(split), **without})
        self._offsets = np.concatenate([[0], np.cumsum(split.lengths)])
        group["video_offsets"] = self._offsets
        videos, text = len(split.lengths), h5py.string_dtype()
        for name in ("video_ids", "instances"):
            group.create_dataset(name, (videos,), text)
        if split.fingerprints:
            group.create_dataset("video_names", data=[os.fsencode(name) for name in split.names], dtype=text)
            group.create_dataset("video_fingerprints", data=split.fingerprints, dtype=text)
        for layout in array_layouts(store, split):
            how = {"chunks": (1, *layout.shape), "compression": "gzip", "compression_opts": 1}
            group.create_dataset(
                layout.name,
                (int(self._offsets[-1]), *layout.shape),
                layout.dtype,
                **(how if layout.name in COMPRESSED else {}),
            )
            group.create_dataset(f"checksums/{layout.name}", (videos,), "uint32")

    def write_arrays(self, row: Row, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add one video's rows of every array, already encoded. ``OSError`` when the disk is full."""
        self._disk.check()
        rows = slice(int(self._offsets[row.video]), int(self._offsets[row.video + 1]))
        for name, values in arrays.items():
            self._group[name][rows] = values
            self._group[f"checksums/{name}"][row.video] = _checksum(values)
        self._group["video_ids"][row.video] = os.fsencode(row.id)  # a file's name, which need not be UTF-8
        self._group["instances"][row.video] = json.dumps([asdict(instance) for instance in row.instances])

    def finish(self, statistics: Mapping[str, Moments]) -> None:
        """Write the statistics of each tap."""
        for tap, moments in statistics.items():
            for name, values in moments.to_arrays().items():
                self._group[f"statistics/{tap}/{name}"] = values


class Hdf5Origin:
    """A file with the layout above, open for reading."""

    def __init__(self, path: Path) -> None:
        """Open a file. ``DataError`` if it is damaged or has another layout."""
        self.path = path
        self._file = file = opened(path)
        groups = [name for name, item in file.items() if isinstance(item, Group) and "features" in item]
        self.splits = {name: _Hdf5Split(file[name], path) for name in sorted(groups)}
        if not groups and "features" in file:
            self.splits = {"train": _Hdf5Split(file, path)}
        if not self.splits:
            raise DataError(f"{path}: no group holds features/<tap>; see docs/store.md for the layout")
        self.spec = self._spec(next(iter(self.splits.values())))

    def _spec(self, first: _Hdf5Split) -> StoreSpec:
        if kept := self._file.attribute(ATTRIBUTE):
            return StoreSpec.from_json(json.loads(kept))
        taps = {}
        for tap, shape in first.taps.items():
            side = math.isqrt(shape[1])
            taps[tap] = TapSpec((side, side) if side * side == shape[1] else (1, shape[1]), shape[2])
        dtype = recognised(first.token_dtypes())
        return StoreSpec("unknown", {"library": "unknown"}, {}, taps, dtype, source=str(self.path))


class _Hdf5Split:
    """Random access to the videos of one group."""

    def __init__(self, group: Group, path: Path) -> None:
        self.group = group
        self._where = f"{path}: {group.name}"
        self._small: dict[str, Any] = {}  # small arrays, each read once
        self.taps = {tap: tuple(array.shape) for tap, array in group["features"].items()}
        for needed in ("video", "video_offsets"):
            if needed not in group:
                raise DataError(f"{self._where}: lacks {needed}; see docs/store.md for the layout")
        self._offsets = np.asarray(group["video_offsets"], np.int64)
        frames = len(group["video"])
        lengths = np.diff(self._offsets)
        if self._offsets[0] != 0 or self._offsets[-1] != frames or not (lengths > 0).all():
            raise DataError(f"{self._where}: video_offsets must rise from 0 to the number of frames, {frames}")
        for name, shape in [(f"features/{tap}", shape) for tap, shape in self.taps.items()]:
            if len(shape) != 3 or shape[0] != frames:
                raise DataError(f"{self._where}: {name} is {shape}; expected ({frames}, patch, feature)")
        self._check_pictures(frames)
        kept = json.loads(group.attribute(ATTRIBUTE) or "{}")
        known: dict[str, Any] = {
            "source_fingerprint": f"{path.name}:{path.stat().st_size}",
            "chunk_frames": int(min(lengths.max(), MAX_CHUNK_FRAMES)),
            "frame_size": group["video"].shape[1:3],
            "masks": "segmentations" in group,
            "ignored": "segmentations" in group and "ignored" in group,
            **kept,
        }
        if "video_fingerprints" in group:
            videos = range(len(lengths))
            known |= {key: [self._text(f"video_{key}", video) for video in videos] for key in ("names", "fingerprints")}
        self.spec = SplitSpec.from_json({**known, "lengths": lengths.tolist()})

    def token_dtypes(self) -> dict[str, str]:
        """The dtypes of the arrays of the first tap's tokens, by folder."""
        tap = next(iter(self.taps))
        folders = {array.folder for encoding in ENCODINGS.values() for array in encoding.arrays}
        return {folder: str(self.group[folder][tap].dtype) for folder in folders if f"{folder}/{tap}" in self.group}

    def _check_pictures(self, frames: int) -> None:
        """Raise ``DataError`` unless frames and masks follow docs/store.md; masks may have any integer type."""
        shape, dtype = self.group["video"].shape, self.group["video"].dtype
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8:
            raise DataError(f"{self._where}: video is {dtype} {shape}; expected uint8 ({frames}, height, width, 3)")
        for name in {"segmentations", "ignored"} & self.group.keys():
            if self.group[name].shape != shape[:3]:
                found = self.group[name].shape
                raise DataError(f"{self._where}: {name} are {found}; expected {shape[:3]}, like the video")

    def read(self, video: int, names: list[str]) -> tuple[Row, Arrays]:
        """One video's manifest row without checksums, and its rows of the named arrays. ``DataError`` if damaged."""
        rows = slice(int(self._offsets[video]), int(self._offsets[video + 1]))
        arrays: Arrays = {}
        for name in names:
            if (array := self.group.get(name)) is None:
                raise DataError(f"{self._where}: lacks {name}")
            arrays[name] = array[rows]
            sums = self._whole(f"checksums/{name}")
            if sums is not None and int(sums[video]) != _checksum(arrays[name]):
                raise DataError(f"{self._where}/{name}: video {video} has another checksum; copy the file again")
            if name == "segmentations":
                arrays[name] = as_mask(arrays[name], f"{self._where}/{name}: video {video}")
            if name == "ignored":
                arrays[name] = arrays[name] != 0
        name = self._text("video_ids", video) or f"{self.group.name.strip('/') or 'train'}_{video:05d}"
        try:
            instances = json.loads(self._text("instances", video) or "[]")
            known = tuple(Instance(**{**item, "visibility": tuple(item["visibility"])}) for item in instances)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self._where}/instances: video {video} is damaged; copy the file again") from error
        fingerprint = self.spec.fingerprints[video] if self.spec.fingerprints else ""
        return Row(video, name, rows.stop - rows.start, {}, known, fingerprint), arrays

    def _text(self, name: str, video: int) -> str:
        texts = self._whole(name)
        value = "" if texts is None else texts[video]
        return os.fsdecode(value) if isinstance(value, bytes) else str(value)

    def _whole(self, name: str) -> Any:
        """All of a small array; None without it."""
        if name not in self._small:
            array = self.group.get(name)
            self._small[name] = None if array is None else array[...]
        return self._small[name]


def _checksum(values: npt.NDArray[Any]) -> int:
    return int(google_crc32c.value(np.ascontiguousarray(values).tobytes()))
