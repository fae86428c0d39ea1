"""Plans an extraction before it starts: its store, the work left, and the space it needs."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from featcache.backbones.backbone import Backbone
from featcache.backbones.inference import choose_batch_size, choose_precision
from featcache.backbones.registry import input_size
from featcache.errors import DataError, UsageError
from featcache.extraction.changes import Changes, Found, settle
from featcache.extraction.fit import Window, fitted, fitting, shown
from featcache.sources.clips import listed
from featcache.sources.images import MOST_PIXELS, decoded_smaller, size_text
from featcache.sources.video import Size, Source, Video
from featcache.store.encoding import ENCODINGS
from featcache.store.layout import array_bytes, array_layouts, fitting_shards
from featcache.store.reading import FeatureStore, Split
from featcache.store.spec import MAX_CHUNK_FRAMES, SCHEMA, SplitSpec, StoreSpec, TapSpec, refuse_if_different
from featcache.text import bytes_text, printable
from featcache.words import Dtype, Fit, Precision

logger = logging.getLogger(__name__)


# What a number format's error is measured on: most frames of videos; most frames that are decoded for it, unless a few
# videos, the least that tell, have more. Of single images, so many are read.
PROBED_FRAMES, PROBED_DECODED, PROBED_VIDEOS = 16, 32, 4


@dataclass(frozen=True)
class ExtractOptions:
    """Options of an extraction, besides its backbone and its source."""

    splits: tuple[str, ...] = ()  # empty: every split of the source that repeats no other
    dtype: Dtype = "float16"
    frame_stride: int = 1
    max_videos: int | None = None
    batch_size: int | None = None  # None: chosen for the machine
    precision: Precision | Literal["auto"] = "auto"
    # Height and width of the stored frames and masks, or their shorter side; None: those of the source.
    frame_size: int | tuple[int, int] | None = None
    fit: Fit = "squash"
    grow: bool = False  # videos that the source has got since are added
    prune: bool = False  # videos that the source has no longer are removed

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
    """The work that is left on one split."""

    name: str
    spec: SplitSpec
    origins: tuple[int | None, ...]  # place of each video in the source; None where it is no longer
    changes: Changes = field(default_factory=Changes)
    frames_left: int = 0
    bytes_left: int = 0  # upper bound: frames and masks counted uncompressed


@dataclass(frozen=True)
class ExtractPlan:
    """The plan of an extraction."""

    path: Path
    spec: StoreSpec
    splits: tuple[SplitPlan, ...]
    bytes_free: int
    resize_frames: bool = False  # the user chose the size of the stored frames
    remarks: tuple[str, ...] = ()  # warnings about the source

    @property
    def frames_left(self) -> int:
        return sum(split.frames_left for split in self.splits)

    @property
    def bytes_left(self) -> int:
        return sum(split.bytes_left for split in self.splits)


def plan(path: Path, source: Source, backbone: Backbone, options: ExtractOptions) -> ExtractPlan:
    """Settle the store's specification and the work left.

    Batch size and precision, if not given, depend only on the backbone, the machine and some of the frames, so that the
    same command gives the same store, however busy the machine is. An existing store keeps its values, so that a
    resumed run cuts the same batches. Raises ``UsageError`` for a split that the source lacks or a question that the
    user must answer first, ``DataError`` for frames of several sizes.
    """
    names = options.splits or source.usual_splits()
    if unknown := [name for name in names if name not in source.splits()]:
        raise UsageError(f"{source.location}: no split {unknown[0]!r}; it has: {', '.join(source.splits())}")
    if options.frame_stride > 1 and source.views > 1:
        raise UsageError(
            f"--frame-stride {options.frame_stride}: {source.location} has {source.views} views of a frame, which "
            "follow each other; leave one of the two out"
        )
    store = FeatureStore.open(path) if (path / "zarr.json").exists() else None
    if store is None and (question := source.question()):
        raise UsageError(question)
    remarks = _remarks(source, names)
    for line in remarks:
        logger.warning("%s", printable(line))
    preprocessing = {**backbone.preprocessing, **fitting(options.fit, backbone.spec.mean)}
    present = {name: store[name] for name in names if store and name in store.splits}
    stored = {name: _stored_size(source, name, backbone, options, present.get(name)) for name in names}
    chosen = {name: None if options.frame_size is None else stored[name] for name in names}
    probes = {name: read_shown(source, name, 0, options.frame_stride, preprocessing, chosen[name]) for name in names}
    precision, batch_size = options.precision, options.batch_size
    if precision == "auto":
        frames = [] if store else some_frames(source, names[0], options.max_videos, preprocessing, chosen[names[0]])
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
        schema=store.spec.schema if store else SCHEMA,
    )
    if store:
        refuse_if_different(path, store.spec.identity(), spec.identity())
    splits = []
    for name, probe in probes.items():
        found = Found(source, name, options.frame_stride)
        height, width = stored[name] or probe.frames.shape[1:3]
        fresh = SplitSpec(
            source_fingerprint=found.fingerprint,
            lengths=found.lengths,
            chunk_frames=min(max(found.lengths), MAX_CHUNK_FRAMES),
            frame_size=(height, width),
            masks=probe.segmentations is not None,
            ignored=probe.segmentations is not None and spec.schema > 1,
        )
        fresh = replace(fresh, shard_chunks=fitting_shards(spec, fresh))
        settled = settle(fresh, found, present.get(name), options.max_videos, options.grow, options.prune)
        split_spec = settled.spec
        lines = settled.changes.lines(str(path / name), source.location)
        if options.prune and len(split_spec.lengths) > (options.max_videos or len(split_spec.lengths)):
            lines.append(
                f"{path / name}: keeps its {len(split_spec.lengths)} videos; --prune removes those that the source has "
                "no longer, not those beyond --max-videos"
            )
        for line in lines:
            logger.warning("%s", printable(line))
        remarks += tuple(lines)
        lengths = tuple(n for i, n in enumerate(split_spec.lengths) if i not in settled.finished)
        left = replace(split_spec, lengths=lengths)
        bytes_left = sum(array_bytes(layout, left) for layout in array_layouts(spec, split_spec))
        splits.append(SplitPlan(name, split_spec, settled.origins, settled.changes, sum(lengths), bytes_left))
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    return ExtractPlan(path, spec, tuple(splits), free, options.frame_size is not None, remarks)


def _remarks(source: Source, names: Sequence[str]) -> tuple[str, ...]:
    lines = [line for name in names for line in source.remarks(name)]
    if left_out := source.left_out():
        lines.append(f"{source.location}: left out files of kinds that are not read here: {listed(left_out)}")
    return tuple(lines)


def some_frames(
    source: Source, split: str, max_videos: int | None, preprocessing: Mapping[str, Any], stored: Size | None
) -> list[npt.NDArray[np.uint8]]:
    """A few frames of a few videos, both evenly spaced: (T, H, W, 3) each; `read_shown`."""
    lengths = source.lengths(split)[:max_videos]
    most = max(PROBED_VIDEOS, PROBED_DECODED // max(lengths))
    chosen = range(0, len(lengths), -(-len(lengths) // most))
    frames = max(1, PROBED_FRAMES // len(chosen))
    shown = (read_shown(source, split, index, 1, preprocessing, stored).frames for index in chosen)
    return [video[:: -(-len(video) // frames)] for video in shown]


def _stored_size(
    source: Source, split: str, backbone: Backbone, options: ExtractOptions, present: Split | None
) -> Size | None:
    """Height and width of a split's stored frames; None: those of its first video.

    ``DataError`` if frames have several sizes and no frame size is given. ``present`` is the split in the store.
    """
    wished, (rows, columns) = options.frame_size, backbone.input_size
    videos = range(len(source.lengths(split)[: options.max_videos]))
    sizes: dict[Size, list[int]] = {}
    for index in videos:  # even if all are resized: this finds masks that do not fit before anything is computed
        if size := source.size(split, index):
            sizes.setdefault(Window.of(options.fit, size, backbone.input_size).size, []).append(index)
            if wished is None and size[0] * size[1] > MOST_PIXELS:
                raise DataError(
                    f"{source.where(split, index)}: {size_text(size)} are over {MOST_PIXELS / 1e6:.0f} million "
                    "pixels, too many to store as they are; have them scaled down with --frame-size 512"
                )
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
    if len(sizes) > 1 and present:
        rows, columns = present.spec.frame_size
        other = next(size for size in sizes if size != (rows, columns))
        raise DataError(
            f"{source.where(split, sizes[other][0])}: its frames are {size_text(other)}, those of {present.path} "
            f"{columns}x{rows}; store all at that size with --frame-size {rows}x{columns}, or extract to another --out"
        )
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
    """``DataError`` if the rest of the store does not fit on the disk."""
    if plan.bytes_left > plan.bytes_free:
        dim = next(iter(plan.spec.taps.values())).dim
        smallest = min(ENCODINGS.values(), key=lambda encoding: encoding.token_bytes(dim)).name
        smaller = "" if smallest == plan.spec.dtype else f"--dtype {smallest}, "
        raise DataError(
            f"{plan.path}: needs up to {bytes_text(plan.bytes_left)} and {bytes_text(plan.bytes_free)} are free; "
            f"free space, or use {smaller}--frame-stride or --max-videos"
        )


def read_shown(
    source: Source, split: str, index: int, stride: int, preprocessing: Mapping[str, Any], stored: Size | None
) -> Video:
    """A video as its store's backbone is shown it, every ``stride``-th frame.

    ``stored`` is the size of the stored frames where that was chosen: large pictures are then decoded no larger than
    what is stored and what the backbone takes need.
    """
    shrink = 1.0
    if stored and (size := source.size(split, index)):
        window, wanted = shown(preprocessing, size), input_size(preprocessing)
        sides = zip(window.size, stored, wanted, strict=True)
        frames = source.lengths(split)[index]
        shrink = decoded_smaller(size, frames, min(side / max(kept, taken) for side, kept, taken in sides))
    return fitted(strided(source.read_smaller(split, index, shrink), stride), preprocessing)


def strided(video: Video, stride: int, first: int = 0) -> Video:
    """Every ``stride``-th frame of a video from the ``first`` on, with its ground truth."""
    if stride == 1 and first == 0:
        return video
    kept = slice(first, None, stride)
    instances = tuple(replace(i, visibility=i.visibility[kept]) for i in video.instances)
    masks = None if video.segmentations is None else video.segmentations[kept]
    ignore = None if video.ignore is None else video.ignore[kept]
    labelled = None if video.labelled is None else video.labelled[kept]
    return Video(video.id, video.frames[kept], masks, instances, ignore, labelled)
