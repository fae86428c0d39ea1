"""Measures the stream's rate beside those of the machine's memory and disk."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.machine import alternate, limited, paired_ratio, timed
from featcache.memory.pages import cached_share, host_empty
from featcache.store.reading import Split
from featcache.stream.order import Order, clip_starts
from featcache.stream.residence import RING
from featcache.stream.rows import TORCH_DTYPES, FileRows
from featcache.stream.stream import FeatureStream, feature_arrays, open_readers
from featcache.words import Residence

WINDOW = 2 << 30  # bytes of features that a measurement reads: far more than caches, far less than memory

MEMORY = "index_select of float16 in memory"

DISK = "sequential read of the disk"

BARE_MODEL = "the bare model on ready images"

STILL_CACHED = 0.05  # share of pages that may remain after the cache is dropped

Starts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Access:
    """Random access in batches of ``samples`` clips, each of ``frames`` consecutive frames."""

    samples: int
    frames: int

    @property
    def name(self) -> str:
        return f"frames {self.samples}" if self.frames == 1 else f"clips {self.samples}x{self.frames}"


ACCESSES = (Access(32, 6), Access(128, 6), Access(1024, 1))


@dataclass(frozen=True)
class Rate:
    """One pattern's median rate, its limit's, and the median of their ratios within each round.

    Rates in memory count the tokens as float16, so that int8 stores compare by samples a second; cold rates count bytes
    on the disk.
    """

    name: str
    bytes_per_s: float
    limit_bytes_per_s: float
    ratio: float
    limit: str

    @classmethod
    def of(cls, name: str, rates: dict[str, list[float]], job: str, limit: str) -> Rate:
        median, median_limit = (round(statistics.median(rates[key])) for key in (job, "limit"))
        return cls(name, median, median_limit, round(paired_ratio(rates, job, "limit"), 3), limit)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Window:
    """Part of a split that fits in memory, so that a measurement can make it warm or cold."""

    def __init__(self, split: Split, tap: str, threads: int = 1) -> None:
        self.split, self.tap = split, tap
        self.arrays = feature_arrays(split, tap)
        self.readers = open_readers(split, tap, None, threads)
        self.tokens = next(iter(self.arrays.values()))  # the largest of the arrays that a stream reads
        self.frame_bytes = int(np.prod(self.tokens.shape[1:])) * 2  # as float16
        self.stop = min(split.spec.rows, max(1, WINDOW // self.frame_bytes))  # only rows before this one are read
        self._rng = np.random.default_rng(0)

    def starts(self, clip: int) -> Starts:
        """First rows (samples,) of the clips of ``clip`` frames in the window; at least one."""
        starts = clip_starts(self.split, clip)
        inside = starts[starts <= self.stop - clip]
        return inside if len(inside) else starts[:1]

    def draws(self, access: Access, batches: int) -> list[Starts]:
        """The starts of each batch's samples, sorted; no sample comes twice in a batch if there are enough."""
        starts = self.starts(access.frames)
        few = len(starts) < access.samples
        return [np.sort(self._rng.choice(starts, access.samples, replace=few)) for _ in range(batches)]

    def buffers(self, access: Access) -> dict[str, Tensor]:
        """Buffers for a batch, in the same memory as the stream's, with their pages already mapped."""
        shape = (access.samples, access.frames)
        return {
            name: host_empty((*shape, *array.shape[1:]), TORCH_DTYPES[str(array.dtype)]).zero_()
            for name, array in self.arrays.items()
        }

    def read(self, starts: Starts, buffers: Mapping[str, Tensor]) -> None:
        """Read the clips that begin at ``starts`` into the buffers."""
        for name, reader in self.readers.items():
            reader.gather(starts, buffers[name])

    def files(self) -> list[str]:
        """The raw chunk files of the tokens, in the order of their rows; empty for stores that must be decoded."""
        reader, chunk_rows = next(iter(self.readers.values())), self.tokens.chunks[0]
        if not isinstance(reader, FileRows):
            return []
        chunks = np.unique(self.starts(1) // chunk_rows).tolist()
        return list(dict.fromkeys(str(reader.path(chunk)) for chunk in chunks))  # a shard holds several chunks


def epoch_batches(window: Window, access: Access) -> int:
    """Number of batches that touch about the whole window, as the first touch of a mapped page costs a fault."""
    return -(-window.stop // (access.samples * access.frames))


def memory_limit(window: Window, access: Access, batches: int) -> Callable[[], float]:
    """A job whose rate is the memory's limit: ``torch.index_select`` of random float16 rows into reused buffers."""
    rows = torch.ones((window.stop, *window.tokens.shape[1:]), dtype=torch.float16)  # ones: zeros stay unmapped
    count = access.samples * access.frames
    ring = [torch.zeros((count, *rows.shape[1:]), dtype=torch.float16) for _ in range(RING)]
    chosen = [
        torch.from_numpy((starts[:, None] + np.arange(access.frames)).ravel() % window.stop)
        for starts in window.draws(access, batches)
    ]

    def work() -> int:
        for batch, index in enumerate(chosen):
            torch.index_select(rows, 0, index, out=ring[batch % RING])
        return batches * count * window.frame_bytes

    return lambda: timed(work)


def bare_read(window: Window, access: Access, batches: int) -> Callable[[], float]:
    """A job that runs the stream's reader alone, into reused buffers, without reading ahead."""
    ring = [window.buffers(access) for _ in range(RING)]

    def read(draws: list[Starts]) -> int:
        for batch, starts in enumerate(draws):
            window.read(starts, ring[batch % RING])
        return len(draws) * access.samples * access.frames * window.frame_bytes

    read(window.draws(access, epoch_batches(window, access)))

    def job() -> float:
        draws = window.draws(access, batches)
        return timed(lambda: read(draws))

    return job


def whole_stream(
    window: Window,
    access: Access,
    batches: int,
    device: torch.device,
    residence: Residence,
    threads: int | None = None,
) -> Callable[[], float]:
    """A job that takes batches from the stream as a trainer does, ready for use on the device."""
    stream = FeatureStream(
        window.split,
        window.tap,
        batch_size=access.samples,
        clip=access.frames,
        device=device,
        residence=residence,
        threads=threads,
    )
    stream.orders = [Order(window.starts(access.frames))]
    iterator = iter(stream)
    for _ in islice(iterator, epoch_batches(window, access)):
        pass

    def work() -> int:
        for _ in islice(iterator, batches):
            pass
        return batches * access.samples * access.frames * window.frame_bytes

    def job() -> float:
        for _ in islice(iterator, RING):  # skip batches that were read ahead during other jobs
            pass
        achieved = timed(work, device)
        time.sleep(2 * RING * access.samples * access.frames * window.frame_bytes / achieved)
        return achieved  # by now the thread has read ahead again, and does not disturb the next job

    return job


def measure_stream(
    split: Split,
    tap: str,
    *,
    device: torch.device | str = "cpu",
    residence: Residence = "auto",
    rounds: int = 7,
    batches: int = 6,
    cold: bool = True,
) -> list[Rate]:
    """Rates of the bare read and of the whole stream on random clips and frames, and of the disk behind them.

    It reads on one core, like the stream's thread. ``cold`` drops the store's pages from the page cache (without
    changing the files); cold rates are left out if the system cannot do that (macOS, or another process maps the
    files), and for stores that must be decoded.
    """
    with limited():
        results = measure_warm(split, tap, torch.device(device), residence, rounds, batches)
        if cold and hasattr(os, "posix_fadvise"):
            results += measure_cold(split, tap, max(3, rounds // 2))
    return results


def measure_warm(
    split: Split, tap: str, device: torch.device, residence: Residence, rounds: int, batches: int
) -> list[Rate]:
    """Rates of random clips and frames from files in the page cache, beside copying them in memory."""
    window = Window(split, tap)
    results = []
    for access in ACCESSES:
        if access.frames > max(split.spec.lengths):
            continue
        sequential_read(window.files())  # into the page cache
        jobs = {
            "limit": memory_limit(window, access, batches),
            "read": bare_read(window, access, batches),
            "stream": whole_stream(window, access, batches, device, residence),
        }
        rates = alternate(jobs, rounds)
        results += [Rate.of(f"{job} {access.name}", rates, job, MEMORY) for job in ("read", "stream")]
    return results


def drop_cache(files: list[str]) -> None:
    """Drop the files' clean pages from the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def still_cached(files: list[str]) -> bool:
    """Whether the page cache still holds more than a few pages of the files."""
    shares = []
    for file in files:
        size = os.path.getsize(file)
        mapped = torch.from_file(file, shared=False, size=size, dtype=torch.uint8)
        shares.append(cached_share(mapped.data_ptr(), size))
    return statistics.mean(shares) > STILL_CACHED


def sequential_read(files: list[str]) -> int:
    """Read files from end to end, one after the other; return the number of bytes."""
    buffer, total = memoryview(bytearray(8 << 20)), 0
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                total += count
    return total


def measure_cold(split: Split, tap: str, rounds: int) -> list[Rate]:
    """Rates of random frames and whole videos from files outside the page cache, beside reading them in order.

    Empty if the cache keeps the files: another process maps them, or they are not on a disk.
    """
    window = Window(split, tap)
    files = window.files()
    drop_cache(files)
    if not files or still_cached(files):
        return []
    frame_bytes = window.tokens.nbytes // split.spec.rows  # as stored
    whole = split.spec.starts[list(split.videos)]
    longest = max(split.spec.lengths)
    patterns = {
        "cold frames": (window.starts(1), Access(1024, 1)),
        "cold videos": (whole[whole <= window.stop - longest], Access(64, longest)),
    }
    results = []
    for name, (starts, access) in patterns.items():
        count = min(access.samples, len(starts))
        buffers = window.buffers(Access(count, access.frames))

        def limit() -> float:
            drop_cache(files)
            return timed(lambda: sequential_read(files))

        def read(
            starts: Starts = starts,
            buffers: dict[str, Tensor] = buffers,
            count: int = count,
            frames: int = access.frames,
        ) -> float:
            chosen = np.sort(np.random.default_rng().choice(starts, count, replace=False))
            drop_cache(files)
            fresh = Window(split, tap)  # existing maps keep their pages in the cache

            def work() -> int:
                fresh.read(chosen, buffers)
                return len(chosen) * frames * frame_bytes

            return timed(work)

        rates = alternate({"limit": limit, "read": read}, rounds)
        results.append(Rate.of(name, rates, "read", DISK))
    return results
