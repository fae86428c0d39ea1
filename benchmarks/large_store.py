"""A store larger than memory, streamed and measured: how much memory that takes beside the page cache.

    python -m benchmarks.large_store [--gigabytes 30] [--batches 200] [--folder DIR]

The store is sparse: its features are holes that read as zeros, so that it needs no room on the disk. Anonymous
memory (RssAnon) is what a process has beside the page cache; pages of mapped files belong to the cache. Each
job runs in a separate process, whose memory is sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.harness import report
from benchmarks.stores import FRAMES, TAP, sparse_store

BATCH = 1024
VIDEO_BYTES = FRAMES * 256 * 384 * 2


def anonymous_memory() -> int:
    """Bytes of this process's resident memory that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def stream(path: Path, batches: int) -> int:
    """Batches of random frames; bytes handed over."""
    from featcache.store.reading import FeatureStore
    from featcache.stream.stream import FeatureStream

    frames = FeatureStream(FeatureStore.open(path)["train"], TAP, batch_size=BATCH)
    return sum(batch.features.nbytes for batch in islice(frames, batches))


def statistics(path: Path) -> int:
    """Moments of every token by dask; bytes reduced."""
    from featcache.scale.recompute import recomputed_statistics
    from featcache.store.reading import FeatureStore

    split = FeatureStore.open(path)["train"]
    recomputed_statistics(split, TAP)
    return split.array(f"features/{TAP}").nbytes


def measure(job: Callable[[], int], answer: Connection) -> None:
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, busy = time.perf_counter(), time.process_time()
    count = job()
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    over.set()
    watcher.join()
    taken = {"seconds": seconds, "processor_seconds": busy}
    answer.send({"gigabytes": count / 1e9, **taken, "peak_anonymous_mb": peak / 1e6})


class Job:
    """A picklable call."""

    def __init__(self, work: Callable[..., int], *arguments: object) -> None:
        self._work, self._arguments = work, arguments

    def __call__(self) -> int:
        return self._work(*self._arguments)


def in_own_process(work: Callable[..., int], *arguments: object) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(Job(work, *arguments), there))
    process.start()
    there.close()
    result: dict[str, float] = here.recv()  # EOFError if the process died
    process.join()
    return {name: round(value, 2) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=30)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="folder of the store; default: the temporary folder")
    parser.add_argument("--skip-statistics", action="store_true", help="streaming only; statistics take minutes")
    args = parser.parse_args()

    videos = round(args.gigabytes * 1e9 / VIDEO_BYTES)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "large.zarr"
        sparse_store(path, videos)
        figures = {"stream": in_own_process(stream, path, args.batches)}
        if not args.skip_statistics:
            figures["statistics"] = in_own_process(statistics, path)
    report("large_store", {"videos": videos, "gigabytes": videos * VIDEO_BYTES / 1e9, "batch": BATCH, **figures})


if __name__ == "__main__":
    main()
