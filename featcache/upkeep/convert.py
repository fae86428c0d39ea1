"""Copies a store in another dtype, with fewer taps, or in another layout: raw, sharded, HDF5.

Videos are copied one at a time, and each is checked against its checksums first, so that a copy never gives damage a
valid checksum. The copy's statistics are those of its own stored values. An interrupted copy into a zarr store resumes
where it stopped; an HDF5 file appears only when it is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import numpy.typing as npt
import torch

from featcache.errors import DataError, UsageError
from featcache.moments import Moments
from featcache.store.encoding import ENCODINGS
from featcache.store.layout import array_layouts, fitting_shards
from featcache.store.manifest import Row
from featcache.store.reading import FeatureStore, Split
from featcache.store.spec import SplitSpec, StoreSpec
from featcache.store.writing import StoreWriter
from featcache.upkeep.hdf5_copy import Hdf5Origin, Hdf5Writer
from featcache.upkeep.verify import checked_chunk
from featcache.words import Dtype, StoreFormat

Progress = Callable[[str, int, int], None]  # split, frames done, frames in all
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a copy; by default it keeps everything unchanged."""

    dtype: Dtype | None = None
    taps: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    # Videos that share a file of a zarr store; 0: none; None: as an extraction would choose.
    shard_videos: int | None = None
    # (rank, ranks, videos that every rank has besides): the copy has one rank's share of the split ``divided``.
    part: tuple[int, ...] = ()
    divided: str = ""

    def __post_init__(self) -> None:
        if self.shard_videos is not None and self.shard_videos < 0:
            raise UsageError(f"--shard-videos {self.shard_videos}: must be at least 1, or 0 for no shards")


class OriginSplit(Protocol):
    """A split whose videos are copied."""

    @property
    def spec(self) -> SplitSpec:
        """``DataError`` for a split that is unfinished."""

    def read(self, video: int, names: list[str]) -> tuple[Row, Arrays]:
        """A video's manifest row, and its stored rows of the named arrays. ``DataError`` if they are damaged."""


class Origin(Protocol):
    """The origin of a copy."""

    path: Path
    spec: StoreSpec

    @property
    def splits(self) -> Mapping[str, OriginSplit]:
        """The splits by name."""


class _StoreSplit:
    """A split of a zarr store, read chunk by chunk against its manifest."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._layouts = {layout.name: layout for layout in array_layouts(split.store.spec, split.spec)}

    @property
    def spec(self) -> SplitSpec:
        """``DataError`` for a split that is unfinished."""
        return self._split.require_complete().spec

    def read(self, video: int, names: list[str]) -> tuple[Row, Arrays]:
        row, frames = self._split.manifest[video], self.spec.chunk_frames
        arrays = {}
        for name in names:
            layout = self._layouts[name]
            parts = []
            for place in range(len(row.crc32c[name])):
                try:
                    parts.append(layout.decode(checked_chunk(self._split.path, self.spec, layout, row, place), frames))
                except ValueError as error:
                    raise DataError(
                        f"{self._split.path / name}: chunk {place} of video {row.id} {error}; "
                        f"run: slotlab verify --repair {self._split.store.path}"
                    ) from error
            arrays[name] = np.concatenate(parts)[: row.frames]
        return replace(row, crc32c={}), arrays


class _StoreOrigin:
    def __init__(self, store: FeatureStore) -> None:
        self.path, self.spec = store.path, store.spec
        self.splits = {name: _StoreSplit(store[name]) for name in store.splits}


def open_origin(path: Path) -> Origin:
    """Open a store, or an HDF5 file with the layout of :mod:`featcache.upkeep.hdf5_copy`, as the origin of a copy."""
    return Hdf5Origin(path) if path.is_file() else _StoreOrigin(FeatureStore.open(path))


def convert(
    path: Path,
    out: Path,
    options: ConvertOptions,
    form: StoreFormat = "zarr",
    progress: Progress = lambda *_: None,
) -> None:
    """Copy the store or HDF5 file at ``path`` to ``out``.

    Raises ``DataError`` if the origin is unfinished or damaged, or the disk is full; ``UsageError`` for splits or taps
    that it lacks, ``IncompatibleError`` if ``out`` holds other features.
    """
    if path.resolve() == out.resolve():
        raise UsageError(f"{out}: is the store or file to copy; choose another OUT")
    if form == "hdf5" and options.shard_videos:
        raise UsageError("--shard-videos: an HDF5 file has no shards; leave it out")
    origin = open_origin(path)
    names = _chosen("split", options.splits, origin.splits, path)
    spec = copied_spec(origin, options)
    specs = [origin.splits[name].spec for name in names]
    copies = [
        replace(
            split,
            statistics_videos=0,
            shard_chunks=_shard_chunks(spec, split, options),
            part=options.part if name == options.divided else (),
        )
        for name, split in zip(names, specs, strict=True)
    ]
    with Hdf5Writer.create(out, spec) if form == "hdf5" else StoreWriter(out, spec) as writer:
        for name, copy in zip(names, copies, strict=True):
            with closing(_Target(writer, name, copy)) as target:
                _copy_split(origin, name, target, copy, spec, progress)


class _Target:
    """A split of either writer; only a zarr store may already hold some of the videos."""

    def __init__(self, writer: Hdf5Writer | StoreWriter, name: str, spec: SplitSpec) -> None:
        self.split = writer.split(name, spec)
        self.done = frozenset(getattr(self.split, "done", ()))
        self.complete: bool = getattr(self.split, "complete", False)

    def close(self) -> None:
        if hasattr(self.split, "close"):
            self.split.close()


def _copy_split(
    origin: Origin, name: str, target: _Target, copy: SplitSpec, spec: StoreSpec, progress: Progress
) -> None:
    split, lengths = origin.splits[name], copy.lengths
    total = sum(lengths[video] for video in copy.held)
    if target.complete:
        progress(name, total, total)
        return
    wanted = [layout.name for layout in array_layouts(replace(origin.spec, taps=spec.taps), split.spec)]
    statistics: dict[str, Moments] = {}
    copied = 0
    for video in copy.held:
        row, arrays = split.read(video, wanted)
        for tap in spec.taps:
            tokens = _recode(arrays, tap, origin.spec.dtype, spec)
            try:
                moments = Moments.from_tokens(tokens)
            except ValueError as error:
                raise DataError(f"{origin.path}: {name} video {row.id}, tap {tap}: {error}") from error
            statistics[tap] = statistics[tap] + moments if tap in statistics else moments
        if video not in target.done:
            target.split.write_arrays(row, arrays)
        copied += lengths[video]
        progress(name, copied, total)
    if copy.part:  # all ranks normalise alike
        whole = FeatureStore.open(origin.path)[name]
        statistics = {tap: whole.statistics(tap) for tap in spec.taps}
    target.split.finish(statistics)


def _recode(arrays: Arrays, tap: str, present: Dtype, spec: StoreSpec) -> torch.Tensor:
    """Replace a tap's arrays by those of another dtype; return its tokens (T, N, D) as a reader will see them."""
    origin, target = ENCODINGS[present], ENCODINGS[spec.dtype]
    stored = {array: arrays.pop(array.path(tap)) for array in origin.arrays}
    tokens = origin.decode({array.folder: torch.from_numpy(values) for array, values in stored.items()})
    if origin is target and all(values.dtype == array.dtype for array, values in stored.items()):
        arrays |= {array.path(tap): values for array, values in stored.items()}
        return tokens  # unchanged bits; a file by other code may hold other floats
    encoded = target.encode(tokens)
    arrays |= {array.path(tap): encoded[array.folder].numpy() for array in target.arrays}
    return target.decode(encoded)


def copied_spec(origin: Origin, options: ConvertOptions) -> StoreSpec:
    """The specification of a copy: the origin's provenance with the changes of the copy."""
    present = origin.spec
    taps = _chosen("tap", options.taps, present.taps, origin.path)
    dtype = options.dtype or present.dtype
    ways = [ENCODINGS[word] for word in (present.dtype, present.dtype_through) if word]
    coarsest = max(ways, key=lambda encoding: encoding.error)
    return replace(
        present,
        taps={tap: present.taps[tap] for tap in taps},
        dtype=dtype,
        dtype_through=coarsest.name if coarsest.error > ENCODINGS[dtype].error else "",
        versions={**present.versions, "exported_by_slotlab": version("slotlab"), "exported_by_h5py": h5py.__version__},
        exported_from=str(origin.path.absolute()),
    )


def _chosen(what: str, asked: Sequence[str], known: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    if unknown := [name for name in asked if name not in known]:
        raise UsageError(f"{path}: no {what} {unknown[0]!r}; it has: {', '.join(known)}")
    return tuple(asked) or tuple(known)


def _shard_chunks(store: StoreSpec, spec: SplitSpec, options: ConvertOptions) -> int:
    """Number of chunks in a shard, so that it holds ``shard_videos`` of the longest videos; 0 for no shards."""
    if options.shard_videos is None:
        return fitting_shards(store, spec)
    return options.shard_videos * -(-max(spec.lengths) // spec.chunk_frames)
