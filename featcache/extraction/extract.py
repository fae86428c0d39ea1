"""Extraction: videos -> decode -> preprocess -> forward -> store, overlapped and resumable.

Decoding runs ahead in threads, the backbone runs in the calling thread, and encoding and durable writes follow in
other threads, so that the backbone waits for neither. Batches are cut from fixed groups of videos: only their position
decides which frames share a batch, not where an earlier run stopped, nor which process runs a group
(`featcache.extraction.distributed`). So all stores of a plan are equal, byte for byte.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from featcache.backbones.backbone import Backbone
from featcache.backbones.inference import forward
from featcache.extraction.job import Shown, SplitJob, TapMoments, Tokens, merge
from featcache.extraction.plan import ExtractPlan, read_shown, require_space
from featcache.machine import limited_executor
from featcache.moments import Moments
from featcache.sources.video import Source
from featcache.store.reading import FeatureStore
from featcache.store.writing import SplitWriter, StoreWriter

READ_AHEAD = 2  # groups decoded ahead of the backbone, and written behind it
AHEAD_BYTES = 2 << 30  # of frames that these hold, at most

WRITERS = 4  # videos of a group that are written at a time; they mostly wait for the disk

Progress = Callable[[str, int, int], None]  # split, frames done, frames in all


def extract(
    plan: ExtractPlan, source: Source, backbone: Backbone, progress: Progress = lambda *_: None
) -> FeatureStore:
    """Carry out a plan and return the finished store.

    Raises ``DataError`` if the disk is too small (before starting) or a video is damaged, ``IncompatibleError`` if the
    store at this path holds other features.
    """
    if (store := _finished(plan)) is not None:
        for split in plan.splits:
            progress(split.name, sum(split.spec.lengths), sum(split.spec.lengths))
        return store
    require_space(plan)
    with StoreWriter(plan.path, plan.spec) as writer:
        for split in plan.splits:
            with closing(writer.split(split.name, split.spec, rearrange=True)) as split_writer:
                job = SplitJob.of(split_writer, split, plan, source)
                _extract_split(split_writer, job, source, backbone, progress)
    return FeatureStore.open(plan.path)


def _finished(plan: ExtractPlan) -> FeatureStore | None:
    """The finished store, or None. Needs read access only."""
    if plan.frames_left or not (plan.path / "zarr.json").exists():
        return None
    store = FeatureStore.open(plan.path)
    if store.spec.identity() != plan.spec.identity():
        return None  # the writer will report the differences
    for split in plan.splits:
        there = store[split.name]
        if not there.complete or replace(there.spec, statistics_videos=0) != split.spec:
            return None
    return store


def _extract_split(writer: SplitWriter, job: SplitJob, source: Source, backbone: Backbone, progress: Progress) -> None:
    total = sum(job.spec.lengths)
    if writer.complete:
        progress(job.name, total, total)
        return
    done, most = frozenset(writer.done), _ahead(job)
    statistics: dict[str, Moments] = {}
    frames_done = 0

    def record(group: range, videos: Sequence[Shown], tokens: Sequence[Tokens], moments: TapMoments) -> None:
        """Write a group; called in order, in the writing thread."""
        nonlocal frames_done
        for rows in job.store_group(group, done, videos, tokens, chunks.map):
            writer.append(*rows)
        merge(statistics, moments)
        frames_done += sum(job.spec.lengths[index] for index in group)
        progress(job.name, frames_done, total)

    with limited_executor("chunks", WRITERS) as chunks, limited_executor("write") as writing:
        pending: list[Future[None]] = []
        for group, videos in _decoded_groups(source, job, done, decoders(backbone.device)):
            tokens = job.forward(backbone, videos) if videos else []
            # Computed here and not in the writing thread: on a GPU the tokens are still on the device, and on a CPU a
            # second thread of arithmetic would slow the backbone by more than it saves.
            moments = job.measure(group, done, tokens)
            pending.append(writing.submit(record, group, videos, tokens, moments))
            while len(pending) > most:
                pending.pop(0).result()
        for future in pending:
            future.result()
    writer.finish(statistics)


def decoders(device: torch.device) -> int:
    """Threads that decode videos: two beside a backbone on the CPU, which needs the cores; for a GPU half of the cores,
    up to eight: it takes frames faster than two give them."""
    return 2 if device.type == "cpu" else max(2, min(8, (os.cpu_count() or 1) // 2))


def _decoded_groups(
    source: Source, job: SplitJob, done: frozenset[int], threads: int
) -> Iterator[tuple[range, list[Shown]]]:
    """The job's groups with their videos, decoded ahead by some threads; a finished group comes without videos."""
    most = _ahead(job)
    with ThreadPoolExecutor(threads, "decode") as decoding:
        ahead: list[tuple[range, list[Future[Shown]]]] = []
        try:
            for group in job.groups():
                wanted = [] if done.issuperset(group) else list(group)
                ahead.append((group, [decoding.submit(job.read, source, index, done) for index in wanted]))
                if len(ahead) > most:
                    first, futures = ahead.pop(0)
                    yield first, [future.result() for future in futures]
            for first, futures in ahead:
                yield first, [future.result() for future in futures]
        finally:
            decoding.shutdown(wait=True, cancel_futures=True)


def _ahead(job: SplitJob) -> int:
    """Groups that may be decoded ahead, and as many that may wait to be written."""
    return min(READ_AHEAD, AHEAD_BYTES // (len(job.groups()[0]) * job.chunk_bytes))


def measure_seconds(plan: ExtractPlan, source: Source, backbone: Backbone) -> float:
    """Estimated seconds for the remaining frames, from one batch of real frames after a warm-up."""
    split, count = plan.splits[0], plan.spec.batch_size
    stored = split.spec.frame_size if plan.resize_frames else None
    frames = read_shown(source, split.name, 0, 1, plan.spec.preprocessing, stored).frames
    batch = [frames[i : i + 1] for i in np.arange(count) % len(frames)]
    forward(backbone, batch, count, plan.spec.precision)
    start = time.perf_counter()
    forward(backbone, batch, count, plan.spec.precision)[-1][backbone.taps[0]].sum().item()
    return (time.perf_counter() - start) / count * plan.frames_left
