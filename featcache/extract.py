"""Extraction: videos -> decode -> preprocess -> forward -> store, overlapped and resumable.

Decoding runs ahead in threads, the backbone runs in the calling thread, and encoding and durable writes follow in
threads of their own, so that the backbone waits for neither. Batches are cut from fixed groups of
videos: which frames share a batch depends only on their position, never on where an earlier run stopped or
which process a group went to (`featcache.distributed`), and so all their stores are equal byte for byte.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from featcache.backbones import Backbone
from featcache.errors import DataError, UsageError
from featcache.forward import forward, measure_batch_size
from featcache.layout import COMPRESSED, array_layouts
from featcache.manifest import Row
from featcache.precision import choose_precision
from featcache.quantise import as_stored
from featcache.sources.base import Source, Video
from featcache.sources.decode import visibility
from featcache.stats import Moments, NonFiniteTokensError
from featcache.store import MAX_CHUNK_FRAMES, Dtype, FeatureStore, Precision, Split, SplitSpec, StoreSpec, TapSpec
from featcache.threads import limited_executor
from featcache.writer import SplitWriter, StoreWriter, write_chunks

READ_AHEAD = 2  # groups decoded ahead of the backbone, and written behind it
WRITERS = 4  # videos of a group that are written at a time: most of it is waiting for the disk

Tokens = Mapping[str, torch.Tensor]  # tap -> (T, N, D)
TapMoments = Mapping[str, Moments]
Progress = Callable[[str, int, int], None]  # split, frames done, frames in all


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract; the backbone and the source are given apart."""

    splits: tuple[str, ...] = ()  # () is every split of the source
    dtype: Dtype = "float16"
    frame_stride: int = 1
    max_videos: int | None = None
    batch_size: int | None = None  # None measures
    precision: Precision | Literal["auto"] = "auto"
    frame_size: int | None = None  # side of the stored frames and masks; None keeps the source's

    def __post_init__(self) -> None:
        if self.frame_stride < 1:
            raise UsageError(f"--frame-stride {self.frame_stride}: must be at least 1")
        if self.max_videos is not None and self.max_videos < 1:
            raise UsageError(f"--max-videos {self.max_videos}: must be at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: must be at least 1, or auto")
        if self.frame_size is not None and self.frame_size < 1:
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
    resize_frames: bool = False  # the user asked for stored frames of a size of their own

    @property
    def frames_left(self) -> int:
        return sum(split.frames_left for split in self.splits)

    @property
    def bytes_left(self) -> int:
        return sum(split.bytes_left for split in self.splits)


def plan(path: Path, source: Source, backbone: Backbone, options: ExtractOptions) -> ExtractPlan:
    """Settle the store's specification (measuring batch size and precision if asked) and the work left.

    An existing store lends its measured batch size, so that a resumed run cuts the same batches.
    """
    names = options.splits or source.splits()
    if unknown := [name for name in names if name not in source.splits()]:
        raise UsageError(f"{source.location}: no split {unknown[0]!r}; it has: {', '.join(source.splits())}")
    probes = {name: _strided(source.read(name, 0), options.frame_stride) for name in names}
    store = FeatureStore.open(path) if (path / "zarr.json").exists() else None
    sample = next(iter(probes.values())).frames
    precision, batch_size = options.precision, options.batch_size
    if precision == "auto":
        precision = store.spec.precision if store else choose_precision(backbone, sample)
    if batch_size is None:
        batch_size = store.spec.batch_size if store else measure_batch_size(backbone, sample, precision)
    spec = StoreSpec(
        backbone=backbone.spec.name,
        model=backbone.provenance,
        preprocessing=backbone.preprocessing,
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
        height, width = (options.frame_size,) * 2 if options.frame_size else probe.frames.shape[1:3]
        split_spec = SplitSpec(
            source_fingerprint=source.fingerprint(name),
            lengths=tuple(lengths[: options.max_videos]),
            chunk_frames=chunk_frames,
            frame_size=(height, width),
            masks=probe.segmentations is not None,
        )
        done: Sequence[int] = store[name].videos if store and name in store.splits else ()
        left = [length for i, length in enumerate(split_spec.lengths) if i not in set(done)]
        padded = sum(-(-length // chunk_frames) * chunk_frames for length in left)  # raw chunks are written full
        bytes_left = sum(
            (sum(left) if layout.name in COMPRESSED else padded)
            * int(np.prod(layout.shape))
            * np.dtype(layout.dtype).itemsize
            for layout in array_layouts(spec, split_spec)
        )
        splits.append(SplitPlan(name, split_spec, len(done), sum(left), bytes_left))
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return ExtractPlan(path, spec, tuple(splits), shutil.disk_usage(existing).free, options.frame_size is not None)


def extract(
    plan: ExtractPlan, source: Source, backbone: Backbone, progress: Progress = lambda *_: None
) -> FeatureStore:
    """Carry out a plan and return the finished store.

    Raises ``DataError`` when the disk is too small (before starting) or a video is damaged,
    ``IncompatibleError`` when the store at this path holds something else.
    """
    if (store := _finished(plan)) is not None:
        for split in plan.splits:
            progress(split.name, sum(split.spec.lengths), sum(split.spec.lengths))
        return store
    require_space(plan)
    with StoreWriter(plan.path, plan.spec) as writer:
        for split in plan.splits:
            with closing(writer.split(split.name, split.spec)) as split_writer:
                _extract_split(split_writer, SplitJob.of(split_writer, plan, source), source, backbone, progress)
    return FeatureStore.open(plan.path)


def _finished(plan: ExtractPlan) -> FeatureStore | None:
    """The store, where nothing is left to do: one that may only be read will do, too."""
    if plan.frames_left or not (plan.path / "zarr.json").exists():
        return None
    store = FeatureStore.open(plan.path)
    if store.spec.identity() != plan.spec.identity():
        return None  # the writer says what differs
    for split in plan.splits:
        there = store[split.name]
        if not there.complete or replace(there.spec, statistics_videos=0, shard_chunks=0) != split.spec:
            return None
    return store


def require_space(plan: ExtractPlan) -> None:
    """``DataError`` if what is left to do cannot fit on the disk."""
    if plan.bytes_left > plan.bytes_free:
        raise DataError(
            f"{plan.path}: needs up to {plan.bytes_left / 1e9:.1f} GB and {plan.bytes_free / 1e9:.1f} GB are free; "
            "free space, or use --dtype int8, --frame-stride or --max-videos"
        )


def _extract_split(writer: SplitWriter, job: SplitJob, source: Source, backbone: Backbone, progress: Progress) -> None:
    total = sum(job.spec.lengths)
    if writer.complete:
        progress(job.name, total, total)
        return
    done = frozenset(writer.done)
    statistics: dict[str, Moments] = {}
    frames_done = 0

    def record(group: range, videos: Sequence[Video], tokens: Sequence[Tokens], moments: TapMoments) -> None:
        """In the writing thread, in order."""
        nonlocal frames_done
        for row in job.store_group(group, done, videos, tokens, chunks.map):
            writer.append(row)
        merge(statistics, moments)
        frames_done += sum(job.spec.lengths[index] for index in group)
        progress(job.name, frames_done, total)

    with limited_executor("chunks", WRITERS) as chunks, limited_executor("write") as writing:
        pending: list[Future[None]] = []
        for group, videos in _decoded_groups(source, job, done):
            tokens = job.forward(backbone, videos) if videos else []
            # Here rather than in the writing thread: on a GPU they are taken where the tokens are, and on a CPU
            # a second thread of arithmetic would cost the backbone more than it saves.
            moments = job.measure(group, done, tokens)
            pending.append(writing.submit(record, group, videos, tokens, moments))
            while len(pending) > READ_AHEAD:
                pending.pop(0).result()
        for future in pending:
            future.result()
    writer.finish(statistics)


@dataclass(frozen=True)
class SplitJob:
    """How the groups of one split are read, run and stored, in whichever process."""

    path: Path  # the split's folder
    name: str
    store: StoreSpec
    spec: SplitSpec
    location: str  # of the source, for messages
    resize_frames: bool

    @classmethod
    def of(cls, writer: SplitWriter, plan: ExtractPlan, source: Source) -> SplitJob:
        path = writer.path.absolute()
        return cls(path, writer.name, plan.spec, writer.spec, source.location, plan.resize_frames)

    def groups(self) -> list[range]:
        """Videos that share batches: a matter of position and batch size alone."""
        size = max(1, self.store.batch_size // self.spec.chunk_frames)
        videos = len(self.spec.lengths)
        return [range(i, min(i + size, videos)) for i in range(0, videos, size)]

    def read(self, source: Source, index: int) -> Video:
        return _strided(source.read(self.name, index), self.store.frame_stride)

    def forward(self, backbone: Backbone, videos: Sequence[Video]) -> list[dict[str, torch.Tensor]]:
        return forward(backbone, [v.frames for v in videos], self.store.batch_size, self.store.precision)

    def measure(self, group: range, done: Container[int], tokens: Sequence[Tokens]) -> TapMoments:
        """Moments of the group's videos together, of the tokens as stored; old videos are read back."""
        return {tap: self._moments(group, tap, done, tokens) for tap in self.store.taps}

    def store_group(
        self,
        group: range,
        done: Container[int],
        videos: Sequence[Video],
        tokens: Sequence[Tokens],
        each: Callable[[Callable[[int], Row], Sequence[int]], Iterator[Row]] = map,
    ) -> Iterator[Row]:
        """Make the chunks of the group's new videos durable; gives the rows to append, in order.

        ``each`` may be an executor's ``map``, which writes several at a time.
        """

        def store(position: int) -> Row:
            index = group[position]
            where = f"{self.location}: {self.name} video {index}"
            video = _fitted(videos[position], self.spec, self.resize_frames, where)
            return write_chunks(self.path, self.store, self.spec, index, video, tokens[position])

        return each(store, [position for position, index in enumerate(group) if index not in done])

    @cached_property
    def _stored(self) -> Split:
        return Split(FeatureStore.open(self.path.parent), self.name)

    def _moments(self, group: range, tap: str, done: Container[int], tokens: Sequence[Tokens]) -> Moments:
        stored = [
            self._stored.tokens(tap, index) if index in done else as_stored(tokens[position][tap], self.store.dtype)
            for position, index in enumerate(group)
        ]
        device = tokens[0][tap].device if tokens else "cpu"
        lengths = [self.spec.lengths[index] for index in group]
        try:
            return Moments.from_tokens(torch.cat([video.to(device) for video in stored]), lengths)
        except NonFiniteTokensError:
            for index, video in zip(group, stored, strict=True):
                try:
                    Moments.from_tokens(video)
                except NonFiniteTokensError as error:
                    raise DataError(f"{self.location}: {self.name} video {index}, tap {tap}: {error}") from error
            raise


def merge(total: dict[str, Moments], part: TapMoments) -> None:
    """Add moments by tap to ``total``. Videos are measured together with their group, and groups are merged in order,
    wherever they ran: the sums are rounded alike."""
    for tap, moments in part.items():
        total[tap] = total[tap] + moments if tap in total else moments


def _decoded_groups(source: Source, job: SplitJob, done: frozenset[int]) -> Iterator[tuple[range, list[Video]]]:
    """The job's groups, decoded ahead; a group that is finished comes without its videos."""
    with ThreadPoolExecutor(2, "decode") as decoding:
        ahead: list[tuple[range, list[Future[Video]]]] = []
        try:
            for group in job.groups():
                wanted = [] if done.issuperset(group) else list(group)
                ahead.append((group, [decoding.submit(job.read, source, index) for index in wanted]))
                if len(ahead) > READ_AHEAD:
                    first, futures = ahead.pop(0)
                    yield first, [future.result() for future in futures]
            for first, futures in ahead:
                yield first, [future.result() for future in futures]
        finally:
            decoding.shutdown(wait=True, cancel_futures=True)


def measure_seconds(plan: ExtractPlan, source: Source, backbone: Backbone) -> float:
    """How long the frames left will take, from one batch of real frames after a warm-up."""
    name, count = plan.splits[0].name, plan.spec.batch_size
    frames = source.read(name, 0).frames
    batch = frames[np.arange(count) % len(frames)]
    forward(backbone, [batch], count, plan.spec.precision)
    start = time.perf_counter()
    forward(backbone, [batch], count, plan.spec.precision)[0][backbone.taps[0]].sum().item()
    return (time.perf_counter() - start) / count * plan.frames_left


def _strided(video: Video, stride: int) -> Video:
    if stride == 1:
        return video
    instances = tuple(replace(i, visibility=i.visibility[::stride]) for i in video.instances)
    masks = None if video.segmentations is None else video.segmentations[::stride]
    return Video(video.id, video.frames[::stride], masks, instances)


def _fitted(video: Video, spec: SplitSpec, resize: bool, where: str) -> Video:
    """The video at the store's frame size, or ``DataError`` if it would have to be resized unasked."""
    if (video.segmentations is not None) != spec.masks:
        raise DataError(f"{where}: {'has' if not spec.masks else 'lacks'} masks, unlike the first video of its split")
    if video.frames.shape[1:3] == spec.frame_size:
        return video
    height, width = spec.frame_size
    if not resize:
        raise DataError(
            f"{where}: {video.frames.shape[2]}x{video.frames.shape[1]} frames in a store of {width}x{height}; "
            "pass --frame-size N to store all frames at one size"
        )

    def resized(images: np.ndarray, how: Image.Resampling) -> np.ndarray:
        return np.stack([np.asarray(Image.fromarray(i).resize((width, height), how)) for i in images])

    frames = resized(video.frames, Image.Resampling.BICUBIC)
    if video.segmentations is None:
        return Video(video.id, frames, None, video.instances)
    masks = resized(video.segmentations, Image.Resampling.NEAREST)
    pixels = [tuple(row.tolist()) for row in visibility(masks, len(video.instances))]
    seen = tuple(replace(item, visibility=row) for item, row in zip(video.instances, pixels, strict=True))
    return Video(video.id, frames, masks, seen)
