"""The layout of a split on disk, as a function of its specifications: arrays, their metadata, their chunks.

Everything that describes a store can be computed from its specs and manifest alone. The writer writes what is
computed here, ``verify`` compares with it, and ``repair`` puts it back. Metadata documents are made by
zarr-python in memory, so that they are its own, and written by `featcache.store.durable`, because it does not sync.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from featcache.moments import Moments
from featcache.store import manifest
from featcache.store.encoding import ENCODINGS
from featcache.store.spec import SplitSpec, StoreSpec

COMPRESSED = ("video", "segmentations", "ignored")  # features are raw, so that they can be mapped
METADATA = "zarr.json"
ZSTD_LEVEL = 3
LABELS = ("shape", "size", "color", "material", "category")
LATER = ("category",)  # labels without a table where no object has one, as in stores by earlier versions

Files = dict[str, bytes]  # by their paths below the split's folder


@dataclass(frozen=True)
class ArrayLayout:
    """One per-frame array of a split; ``shape`` is that of a frame."""

    name: str
    shape: tuple[int, ...]
    dimensions: tuple[str, ...]
    dtype: str
    fill: float

    @property
    def ndim(self) -> int:
        return len(self.shape) + 1

    def encode(self, values: npt.NDArray[Any], frames: int) -> bytes:
        """One chunk's bytes from at most ``frames`` rows, padded with the fill value."""
        assert values.dtype == self.dtype and values.shape[1:] == self.shape, (self, values.dtype, values.shape)
        if len(values) < frames:
            padding = np.full((frames - len(values), *self.shape), self.fill, self.dtype)
            values = np.concatenate([values, padding])
        data = np.ascontiguousarray(values).tobytes()
        return bytes(Zstd(level=ZSTD_LEVEL).encode(data)) if self.name in COMPRESSED else data

    def decode(self, data: bytes, frames: int) -> npt.NDArray[Any]:
        """Rows (frames, ...) of one chunk. ``ValueError`` if the bytes cannot be one."""
        if self.name in COMPRESSED:
            try:
                data = Zstd().decode(data)
            except RuntimeError as error:
                raise ValueError(str(error)) from error
        return np.frombuffer(data, self.dtype).reshape(frames, *self.shape)


def array_layouts(store: StoreSpec, split: SplitSpec) -> list[ArrayLayout]:
    """Every per-frame array that a split of this store has."""
    height, width = split.frame_size
    layouts = [ArrayLayout("video", (height, width, 3), ("y", "x", "rgb"), "uint8", 0)]
    if split.masks:
        layouts.append(ArrayLayout("segmentations", (height, width), ("y", "x"), "uint8", 0))
    if split.ignored:
        layouts.append(ArrayLayout("ignored", (height, width), ("y", "x"), "bool", False))
    for tap, spec in store.taps.items():
        for array in ENCODINGS[store.dtype].arrays:
            shape = array.shape(spec.patches, spec.dim)
            layouts.append(ArrayLayout(array.path(tap), shape, array.dimensions, array.dtype, array.fill))
    return layouts


def array_bytes(layout: ArrayLayout, split: SplitSpec) -> int:
    """Bytes of an array's chunk files, all videos finished; of a compressed one the most that they can be, nearly."""
    frames = sum(split.lengths) if layout.name in COMPRESSED else split.rows  # raw chunks are written full
    return frames * int(np.prod(layout.shape)) * np.dtype(layout.dtype).itemsize


# A split of many small chunks has them in shards, so that it has few files. A shard is made durable as a whole: a kill
# loses the videos of those that are not full.
SHARD_BYTES = 64 << 20  # of a shard's values, at most
SHARD_CHUNKS = (16, 256)  # in a shard; where fewer fit, each chunk has a file that is large enough
SHARDED = 1024  # chunks from which a split counts as one of many


def fitting_shards(store: StoreSpec, split: SplitSpec) -> int:
    """``shard_chunks`` of a split that is made of these videos: a power of two, so that batches fit, or 0."""
    if split.rows < SHARDED * split.chunk_frames:
        return 0
    frame = max(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in array_layouts(store, split))
    least, most = SHARD_CHUNKS
    fitting = SHARD_BYTES // (split.chunk_frames * frame)
    return 0 if fitting < least else min(most, 1 << (fitting.bit_length() - 1))


def chunk_numbers(split: SplitSpec, video: int) -> range:
    """Chunks along the first axis that hold one video."""
    return range(int(split.starts[video]) // split.chunk_frames, int(split.starts[video + 1]) // split.chunk_frames)


def chunk_path(array: Path, number: int, ndim: int) -> Path:
    """File of the ``number``-th chunk (or shard) along the first axis; the other axes have one each."""
    return array / ".".join(["c", str(number), *["0"] * (ndim - 1)])


# -- metadata ----------------------------------------------------------------------------------------------


def root_metadata(store: StoreSpec) -> bytes:
    """The root group's zarr.json."""
    return _files(lambda group: group.attrs.put({"featcache": store.to_json()}))[METADATA]


def split_metadata(store: StoreSpec, split: SplitSpec) -> Files:
    """Every zarr.json of a split's groups and per-frame arrays; the split's own, which vouches for them, last."""

    def build(group: zarr.Group) -> None:
        group.attrs.put({"featcache": split.to_json()})
        for layout in array_layouts(store, split):
            chunk = (split.chunk_frames, *layout.shape)
            shard = (split.chunk_frames * split.shard_chunks, *layout.shape)
            group.create_array(
                layout.name,
                shape=(split.rows, *layout.shape),
                chunks=chunk,
                shards=shard if split.shard_chunks else None,
                dtype=layout.dtype,
                fill_value=layout.fill,
                compressors=[ZstdCodec(level=ZSTD_LEVEL)] if layout.name in COMPRESSED else None,
                chunk_key_encoding={"name": "default", "separator": "."},
                dimension_names=("frame", *layout.dimensions),
            )

    files = _files(build)
    return {**{name: data for name, data in files.items() if name != METADATA}, METADATA: files[METADATA]}


# -- tables and statistics ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableArray:
    """One table: its values for the whole split, its dimensions, and the names that its codes stand for."""

    values: npt.NDArray[Any]
    dimensions: tuple[str, ...]
    labels: tuple[str, ...] | None = None


def tables(split: SplitSpec, rows: Mapping[int, manifest.Row]) -> dict[str, TableArray]:
    """Each frame's video and position, each instance's labels and visibility, from the manifest."""
    frame_video = np.full(split.rows, -1, np.int32)
    frame_position = np.full(split.rows, -1, np.int32)
    slots = max((len(row.instances) for row in rows.values()), default=0)
    visibility = np.zeros((split.rows, slots), np.int32)
    for video, row in rows.items():
        start = int(split.starts[video])
        frame_video[start : start + row.frames] = video
        frame_position[start : start + row.frames] = np.arange(row.frames)
        for k, instance in enumerate(row.instances):
            visibility[start : start + row.frames, k] = instance.visibility
    found = {
        "frame_video": TableArray(frame_video, ("frame",)),
        "frame_position": TableArray(frame_position, ("frame",)),
    }
    if not slots:
        return found
    found["instances/visibility"] = TableArray(visibility, ("frame", "instance"))
    for label in LABELS:
        names = sorted({getattr(i, label) for row in rows.values() for i in row.instances} - {""})
        if label in LATER and not names:
            continue
        places = {name: place for place, name in enumerate(names)}
        dtype = np.uint8 if len(names) <= np.iinfo(np.uint8).max else np.uint16
        unknown = np.iinfo(dtype).max
        codes = np.full((len(split.lengths), slots), unknown, dtype)
        for video, row in rows.items():
            for k, instance in enumerate(row.instances):
                codes[video, k] = places.get(getattr(instance, label), unknown)
        found[f"instances/{label}"] = TableArray(codes, ("video_index", "instance"), tuple(names))
    return found


def summary_files(
    split: SplitSpec, rows: Mapping[int, manifest.Row], statistics: Mapping[str, Moments]
) -> dict[str, bytes]:
    """Files of the tables and of each tap's statistics."""

    def build(group: zarr.Group) -> None:
        for name, table in tables(split, rows).items():
            attributes = {} if table.labels is None else {"labels": list(table.labels)}
            _put(group, name, table.values, table.dimensions, attributes)
        for tap, moments in statistics.items():
            for name, values in moments.to_arrays().items():
                _put(group, f"statistics/{tap}/{name}", values, None, {})

    files = _files(build)
    del files[METADATA]  # the split's own has other attributes
    return files


def _put(
    group: zarr.Group,
    name: str,
    values: npt.NDArray[Any],
    dimensions: tuple[str, ...] | None,
    attributes: dict[str, Any],
) -> None:
    group.create_array(
        name,
        data=values,
        chunks=values.shape or "auto",
        # The manifest has no checksums of these arrays, so zstd's frames carry them.
        compressors=[ZstdCodec(level=ZSTD_LEVEL, checksum=True)],
        dimension_names=dimensions,
        attributes=attributes,
        config={"write_empty_chunks": True},  # the files are the same whatever the values
    )


def _files(build: Any) -> Files:
    """The files that zarr-python writes for a group, by path, in the order of paths."""
    held: dict[str, Any] = {}
    build(zarr.create_group(MemoryStore(held), zarr_format=3))
    return {path: held[path].to_bytes() for path in sorted(held)}
