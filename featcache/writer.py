"""Writing a store so that nothing finished is lost and nothing unfinished is believed.

A chunk goes to a temporary name, is synced and renamed; when all chunks of a video and their directory are
durable, its row is appended to the manifest. Chunks are encoded here rather than through zarr-python because
zarr-python does not sync, and because the bytes that are checked are then the bytes that are written.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import ZstdCodec

from featcache import manifest
from featcache.errors import DataError, IncompatibleError
from featcache.quantise import dequantise, quantise
from featcache.sources.base import Video
from featcache.stats import Moments
from featcache.store import FeatureStore, SplitSpec, StoreSpec

COMPRESSED = ("video", "segmentations")  # features are raw, so that they can be mapped
ZSTD_LEVEL = 3
TEMPORARY = ".tmp"
LABELS = ("shape", "size", "color", "material")
UNKNOWN = 255


class StoreWriter:
    """The one process that may write to a store. Use as a context manager; it holds the store's lock."""

    def __init__(self, path: Path, spec: StoreSpec) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = _lock(path)
        try:
            # Left by a run that was killed; with the lock held, nobody else is writing them.
            for leftover in [*path.rglob(f"*{TEMPORARY}"), *path.rglob("*.partial")]:  # ours and zarr-python's
                leftover.unlink()
            if (path / "zarr.json").exists():
                present = FeatureStore.open(path).spec
                refuse_if_different(path, present.identity(), spec.identity())
                self.spec = present
            else:
                self.spec = spec
                zarr.create_group(str(path), attributes={"featcache": spec.to_json()}, zarr_format=3)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._lock)

    def split(self, name: str, spec: SplitSpec) -> SplitWriter:
        """Create the split, or open it where an earlier run stopped; a longer one grows in place."""
        return SplitWriter(self, name, spec)


class SplitWriter:
    """Appends videos to one split, in any order."""

    def __init__(self, writer: StoreWriter, name: str, spec: SplitSpec) -> None:
        self.store_spec = writer.spec
        self.path = writer.path / name
        self.name = name
        # The manifest is made after the arrays: a split without one was never finished being created.
        self.spec = self._grow(spec) if (self.path / manifest.NAME).exists() else self._create(spec)
        self._appender = manifest.Appender(self.path)
        self.done = set(manifest.read(self.path))

    def close(self) -> None:
        self._appender.close()

    # -- layout ----------------------------------------------------------------------------------------

    def _create(self, spec: SplitSpec) -> SplitSpec:
        group = zarr.create_group(str(self.path), attributes={"featcache": asdict(spec)}, overwrite=True, zarr_format=3)
        for layout in array_layouts(self.store_spec, spec):
            group.create_array(
                layout.name,
                shape=(spec.rows, *layout.shape),
                chunks=(spec.chunk_frames, *layout.shape),
                dtype=layout.dtype,
                fill_value=layout.fill,
                compressors=[ZstdCodec(level=ZSTD_LEVEL)] if layout.name in COMPRESSED else None,
                chunk_key_encoding={"name": "default", "separator": "."},
                dimension_names=("frame", *layout.dimensions),
            )
        return spec

    def _grow(self, asked: SplitSpec) -> SplitSpec:
        group = zarr.open_group(str(self.path), mode="r+")
        present = SplitSpec.from_json(group.attrs["featcache"])  # type: ignore[arg-type]
        longer, shorter = sorted((present.lengths, asked.lengths), key=len, reverse=True)
        fixed = [asdict(replace(spec, lengths=(), statistics_videos=0)) for spec in (present, asked)]
        refuse_if_different(self.path, *fixed)
        if longer[: len(shorter)] != shorter:
            raise IncompatibleError(
                f"{self.path}: its videos have other lengths than the source's; extract to another --out"
            )
        if longer == present.lengths:
            return present
        for layout in array_layouts(self.store_spec, present):
            array = group[layout.name]
            assert isinstance(array, zarr.Array)
            array.resize((asked.rows, *layout.shape))
        grown = replace(asked, statistics_videos=0)
        group.attrs["featcache"] = asdict(grown)
        return grown

    # -- videos ----------------------------------------------------------------------------------------

    def write(self, index: int, video: Video, tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Store one video durably and return its tokens as a reader will see them.

        ``tokens`` holds (T, N, D) floats for each tap. Raises ``DataError`` when the disk is full; the
        videos finished before stay.
        """
        arrays: dict[str, npt.NDArray[Any]] = {"video": video.frames}
        if self.spec.masks:
            assert video.segmentations is not None
            arrays["segmentations"] = video.segmentations
        stored: dict[str, torch.Tensor] = {}
        for tap, values in tokens.items():
            if self.store_spec.dtype == "int8":
                codes, scale = (part.cpu() for part in quantise(values))
                arrays[f"features/{tap}"], arrays[f"scales/{tap}"] = codes.numpy(), scale.numpy()
                stored[tap] = dequantise(codes, scale)
            else:
                stored[tap] = values.to(torch.float16).cpu()
                arrays[f"features/{tap}"] = stored[tap].numpy()
        crc32c = {name: self._write_array(name, index, values) for name, values in arrays.items()}
        for name in arrays:
            _sync_directory(self.path / name)
        self._appender.append(manifest.Row(index, video.id, len(video.frames), crc32c, video.instances))
        self.done.add(index)
        return stored

    def _write_array(self, name: str, index: int, values: npt.NDArray[Any]) -> tuple[int, ...]:
        length, frames = self.spec.lengths[index], self.spec.chunk_frames
        assert len(values) == length, (name, index, len(values), length)
        first = int(self.spec.starts[index]) // frames
        sums = []
        for number, start in enumerate(range(0, length, frames)):
            chunk = values[start : start + frames]
            if len(chunk) < frames:
                fill = np.nan if chunk.dtype == np.float16 else 0
                padding = np.full((frames - len(chunk), *chunk.shape[1:]), fill, chunk.dtype)
                chunk = np.concatenate([chunk, padding])
            data = np.ascontiguousarray(chunk).tobytes()
            if name in COMPRESSED:
                data = bytes(Zstd(level=ZSTD_LEVEL).encode(data))
            write_durably(chunk_path(self.path / name, first + number, chunk.ndim), data)
            sums.append(google_crc32c.value(data))
        return tuple(sums)

    # -- the end ---------------------------------------------------------------------------------------

    def finish(self, statistics: Mapping[str, Moments]) -> None:
        """Write tables and statistics once every video is there; marks the split complete."""
        rows = manifest.read(self.path)
        group = zarr.open_group(str(self.path), mode="r+")
        self._write_tables(group, rows)
        for tap, moments in statistics.items():
            for name, values in moments.to_arrays().items():
                _put(group, f"statistics/{tap}/{name}", values, None)
        self.spec = replace(self.spec, statistics_videos=len(rows))
        group.attrs["featcache"] = asdict(self.spec)

    def _write_tables(self, group: zarr.Group, rows: Mapping[int, manifest.Row]) -> None:
        frame_video = np.full(self.spec.rows, -1, np.int32)
        frame_position = np.full(self.spec.rows, -1, np.int32)
        slots = max((len(row.instances) for row in rows.values()), default=0)
        visibility = np.zeros((self.spec.rows, slots), np.int32)
        for video, row in rows.items():
            start = int(self.spec.starts[video])
            frame_video[start : start + row.frames] = video
            frame_position[start : start + row.frames] = np.arange(row.frames)
            for k, instance in enumerate(row.instances):
                visibility[start : start + row.frames, k] = instance.visibility
        _put(group, "frame_video", frame_video, ("frame",))
        _put(group, "frame_position", frame_position, ("frame",))
        if not slots:
            return
        _put(group, "instances/visibility", visibility, ("frame", "instance"))
        for label in LABELS:
            names = sorted({getattr(i, label) for row in rows.values() for i in row.instances} - {""})
            codes = np.full((len(self.spec.lengths), slots), UNKNOWN, np.uint8)
            for video, row in rows.items():
                for k, instance in enumerate(row.instances):
                    value = getattr(instance, label)
                    codes[video, k] = names.index(value) if value else UNKNOWN
            _put(group, f"instances/{label}", codes, ("video_index", "instance"), {"labels": names})


@dataclass(frozen=True)
class ArrayLayout:
    """One per-frame array of a split; ``shape`` is that of a frame."""

    name: str
    shape: tuple[int, ...]
    dimensions: tuple[str, ...]
    dtype: str
    fill: float


def array_layouts(store: StoreSpec, split: SplitSpec) -> list[ArrayLayout]:
    """Every per-frame array that a split of this store has."""
    height, width = split.frame_size
    layouts = [ArrayLayout("video", (height, width, 3), ("y", "x", "rgb"), "uint8", 0)]
    if split.masks:
        layouts.append(ArrayLayout("segmentations", (height, width), ("y", "x"), "uint8", 0))
    # A chunk that is missing reads as the fill value: NaN cannot be mistaken for a feature.
    nan = float("nan")
    for tap, spec in store.taps.items():
        shape, dimensions = (spec.patches, spec.dim), ("patch", "feature")
        if store.dtype == "int8":
            layouts.append(ArrayLayout(f"features/{tap}", shape, dimensions, "int8", 0))
            layouts.append(ArrayLayout(f"scales/{tap}", shape[:1], dimensions[:1], "float16", nan))
        else:
            layouts.append(ArrayLayout(f"features/{tap}", shape, dimensions, "float16", nan))
    return layouts


def _put(
    group: zarr.Group,
    name: str,
    values: npt.NDArray[Any],
    dimensions: tuple[str, ...] | None,
    attributes: dict[str, Any] | None = None,
) -> None:
    group.create_array(
        name,
        data=values,
        chunks=values.shape or "auto",
        dimension_names=dimensions,
        attributes=attributes,
        overwrite=True,
    )


def chunk_path(array: Path, number: int, ndim: int) -> Path:
    """File of the ``number``-th chunk along the first axis; the other axes have one chunk each."""
    return array / ".".join(["c", str(number), *["0"] * (ndim - 1)])


def write_durably(path: Path, data: bytes) -> None:
    """Write to a temporary name, sync, rename. ``DataError`` names the file when the disk is full."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"{path}: cannot write ({error.strerror}); free space and run the same command again, it resumes"
        ) from error


def refuse_if_different(path: Path, present: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """``IncompatibleError`` with every key that differs."""
    differences = [
        f"{key}: store {present.get(key)!r}, asked {asked.get(key)!r}"
        for key in sorted({*present, *asked})
        if present.get(key) != asked.get(key)
    ]
    if differences:
        raise IncompatibleError(
            f"{path}: made with other settings ({'; '.join(differences)}); choose another --out or delete the store"
        )


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(path: Path) -> int:
    """Exclusive lock for as long as the process lives; the system drops it even after ``kill -9``."""
    fd = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise DataError(
            f"{path}: another process (pid {holder}) is writing to this store; wait for it or choose another --out"
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd
