"""What an extraction would do, settled before it starts."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from featcache.backbones.backbone import Backbone
from featcache.backbones.inference import choose_batch_size, choose_precision
from featcache.errors import DataError, UsageError
from featcache.extraction.fit import Window, fitted, fitting
from featcache.sources.clips import listed
from featcache.sources.video import Size, Source, Video
from featcache.store.encoding import ENCODINGS
from featcache.store.layout import array_bytes, array_layouts
from featcache.store.reading import FeatureStore
from featcache.store.spec import MAX_CHUNK_FRAMES, SplitSpec, StoreSpec, TapSpec
from featcache.words import Dtype, Fit, Precision

logger = logging.getLogger(__name__)


PROBED_VIDEOS, PROBED_FRAMES = 4, 16  # that a format's error is measured on, at most


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract; the backbone and the source are given apart."""

    splits: tuple[str, ...] = ()  # () is every split of the source
    dtype: Dtype = "float16"
    frame_stride: int = 1
    max_videos: int | None = None
    batch_size: int | None = None  # None is what suits the machine
    precision: Precision | Literal["auto"] = "auto"
    # Height and width of the stored frames and masks, or their shorter side; None keeps the source's.
    frame_size: int | tuple[int, int] | None = None
    fit: Fit = "squash"

    def __post_init__(self) -> None:
        if self.frame_stride < 1:
            raise UsageError(f"--frame-stride {self.frame_stride}: must be at least 1")
        if self.max_videos is not None and self.max_videos < 1:
            raise UsageError(f"--max-videos {self.max_videos}: must be at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: must be at least 1, or auto")
        if self.frame_size is not None and min(np.atleast_1d(self.frame_size)) < 1:
            raise UsageError(f"--frame-size {self.frame_size}: must be at least 1")


@dataclass(frozen=True)
class SplitPlan:
    """What one split still needs."""

    name: str
    spec: SplitSpec
    videos_done: int
    frames_left: int
    bytes_left: int  # upper bound: frames and masks counted uncompressed


@dataclass(frozen=True)
class ExtractPlan:
    """What an extraction would do, known before it starts."""

    path: Path
    spec: StoreSpec
    splits: tuple[SplitPlan, ...]
    bytes_free: int
    resize_frames: bool = False  # the user chose the size of the stored frames
    remarks: tuple[str, ...] = ()  # what the source says before its videos are trusted

    @property
    def frames_left(self) -> int:
        return sum(split.frames_left for split in self.splits)

    @property
    def bytes_left(self) -> int:
        return sum(split.bytes_left for split in self.splits)


def plan(path: Path, source: Source, backbone: Backbone, options: ExtractOptions) -> ExtractPlan:
    """Settle the store's specification and the work left.

    Batch size and precision, where they are not given, follow from the backbone, the machine and some of the frames
    alone: the same command gives the same store, however busy the machine is. An existing store lends its own, so that
    a resumed run cuts the same batches.
    """
    names = options.splits or source.splits()
    if unknown := [name for name in names if name not in source.splits()]:
        raise UsageError(f"{source.location}: no split {unknown[0]!r}; it has: {', '.join(source.splits())}")
    store = FeatureStore.open(path) if (path / "zarr.json").exists() else None
    if store is None and (question := source.question()):
        raise UsageError(question)
    remarks = _remarks(source, names)
    for line in remarks:
        logger.warning("%s", line)
    preprocessing = {**backbone.preprocessing, **fitting(options.fit, backbone.spec.mean)}
    stored = {name: _stored_size(source, name, backbone, options) for name in names}
    probes = {name: fitted(strided(source.read(name, 0), options.frame_stride), preprocessing) for name in names}
    precision, batch_size = options.precision, options.batch_size
    if precision == "auto":
        frames = [] if store else _some_frames(source, names[0], options, preprocessing)
        precision = store.spec.precision if store else choose_precision(backbone, frames)
    if batch_size is None:
        batch_size = store.spec.batch_size if store else choose_batch_size(backbone, precision)
    spec = StoreSpec(
        backbone=backbone.spec.name,
        model=backbone.provenance,
        preprocessing=preprocessing,
        taps={tap: TapSpec(backbone.grid, backbone.dims[tap]) for tap in backbone.taps},
        dtype=options.dtype,
        frame_stride=options.frame_stride,
        precision=precision,
        source=source.location,
        batch_size=batch_size,
        versions={"python": platform.python_version(), **{p: version(p) for p in ("torch", "zarr", "slotlab")}},
    )
    splits = []
    for name, probe in probes.items():
        lengths = [-(-length // options.frame_stride) for length in source.lengths(name)]
        chunk_frames = min(max(lengths), MAX_CHUNK_FRAMES)
        height, width = stored[name] or probe.frames.shape[1:3]
        split_spec = SplitSpec(
            source_fingerprint=source.fingerprint(name),
            lengths=tuple(lengths[: options.max_videos]),
            chunk_frames=chunk_frames,
            frame_size=(height, width),
            masks=probe.segmentations is not None,
        )
        done: Sequence[int] = store[name].videos if store and name in store.splits else ()
        left = replace(split_spec, lengths=tuple(n for i, n in enumerate(split_spec.lengths) if i not in set(done)))
        bytes_left = sum(array_bytes(layout, left) for layout in array_layouts(spec, left))
        splits.append(SplitPlan(name, split_spec, len(done), sum(left.lengths), bytes_left))
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    return ExtractPlan(path, spec, tuple(splits), free, options.frame_size is not None, remarks)


def _remarks(source: Source, names: Sequence[str]) -> tuple[str, ...]:
    lines = [line for name in names for line in source.remarks(name)]
    if left_out := source.left_out():
        lines.append(f"{source.location}: left out files of kinds that are not read here: {listed(left_out)}")
    return tuple(lines)


def _some_frames(
    source: Source, split: str, options: ExtractOptions, preprocessing: Mapping[str, Any]
) -> list[npt.NDArray[np.uint8]]:
    """A few frames of a few videos, spread evenly over those to extract: (T, H, W, 3) each."""
    videos = len(source.lengths(split)[: options.max_videos])
    chosen = range(0, videos, -(-videos // PROBED_VIDEOS))
    frames = PROBED_FRAMES // len(chosen)
    shown = [fitted(source.read(split, index), preprocessing).frames for index in chosen]
    return [video[:: -(-len(video) // frames)] for video in shown]


def _stored_size(source: Source, split: str, backbone: Backbone, options: ExtractOptions) -> Size | None:
    """Height and width of a split's stored frames; None if only its first video tells.

    ``DataError`` where frames are of several sizes and were not to be brought to one.
    """
    wished, (rows, columns) = options.frame_size, backbone.input_size
    videos = range(len(source.lengths(split)[: options.max_videos]))
    sizes: dict[Size, list[int]] = {}
    for index in videos:  # also where all are resized: masks that do not fit are found before anything is computed
        if size := source.size(split, index):
            sizes.setdefault(Window.of(options.fit, size, backbone.input_size).size, []).append(index)
    if isinstance(wished, int):  # the shorter side
        short = min(rows, columns)
        return round(wished * rows / short), round(wished * columns / short)
    if wished is not None:
        if options.fit != "squash" and abs(wished[0] * columns - wished[1] * rows) > max(rows, columns):
            raise UsageError(
                f"--frame-size {wished[0]}x{wished[1]}: --fit {options.fit} gives the proportions of the input, "
                f"{rows}x{columns}; name the shorter side alone"
            )
        return wished
    if len(sizes) > 1:
        most, *others = sorted(sizes, key=lambda size: -len(sizes[size]))
        listed = ", ".join(
            f"{size[1]}x{size[0]} ({len(sizes[size])}, as {source.where(split, sizes[size][0])})" for size in others[:3]
        )
        raise DataError(
            f"{source.location}: most frames of {split} are {most[1]}x{most[0]}, others {listed}"
            f"{' ...' if others[3:] else ''}; store all at one size with --frame-size {min(most)}, squeezed, or also "
            "with --fit crop or --fit pad"
        )
    return next(iter(sizes), None)


def require_space(plan: ExtractPlan) -> None:
    """``DataError`` if what is left to do cannot fit on the disk."""
    if plan.bytes_left > plan.bytes_free:
        dim = next(iter(plan.spec.taps.values())).dim
        smallest = min(ENCODINGS.values(), key=lambda encoding: encoding.token_bytes(dim)).name
        smaller = "" if smallest == plan.spec.dtype else f"--dtype {smallest}, "
        raise DataError(
            f"{plan.path}: needs up to {plan.bytes_left / 1e9:.1f} GB and {plan.bytes_free / 1e9:.1f} GB are free; "
            f"free space, or use {smaller}--frame-stride or --max-videos"
        )


def strided(video: Video, stride: int) -> Video:
    if stride == 1:
        return video
    instances = tuple(replace(i, visibility=i.visibility[::stride]) for i in video.instances)
    masks = None if video.segmentations is None else video.segmentations[::stride]
    ignore = None if video.ignore is None else video.ignore[::stride]
    labelled = None if video.labelled is None else video.labelled[::stride]
    return Video(video.id, video.frames[::stride], masks, instances, ignore, labelled)
