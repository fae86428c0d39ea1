"""FeatureStream: endless shuffled batches of cached tokens, or of frames, in reused buffers on a device.

One thread reads ahead into a small ring of buffers. There are no worker processes, as they would only add copies to
what is already a copy. The order is a pure function of the seed and the number of samples seen, so that one number
tells where a stream continues.
"""

from __future__ import annotations

import atexit
import os
import queue
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor

from featcache.errors import UsageError
from featcache.machine import readable, start_limited
from featcache.store.encoding import FEATURES, Decoder
from featcache.store.reading import Split
from featcache.store.spec import taps_of
from featcache.stream.order import orders
from featcache.stream.residence import RING, Free, Home, choose_home, ring_bytes
from featcache.stream.rows import TORCH_DTYPES, FileRows, ResidentRows, Rows, open_rows
from featcache.stream.staging import Buffers, Format, Staging, Stalls
from featcache.words import Residence

VIDEO = "video"  # the tap that stands for the stored frames


@dataclass(frozen=True)
class Batch:
    """Tokens (B, N, D), or (B, T, N, D) for clips; ``rows`` (B,) are the first rows of the samples.

    ``features`` is float16 (float32 from int8 stores), on the stream's device; for the tap ``video``, frames
    (B, H, W, 3) or (B, T, H, W, 3), uint8. Its buffer is reused: it is valid until the next batch is requested.
    """

    features: Tensor
    rows: npt.NDArray[np.int64]
    samples_seen: int  # by all ranks, before this batch


@dataclass(frozen=True)
class BatchSeconds:
    """Seconds to read a batch to host memory, and to copy it from there to the device.

    Decoding counts where it happens: on a CPU, which copies nothing, with the read; else with the copy.
    """

    read: float
    copy: float


class FeatureStream:
    """Endless iterator of :class:`Batch` over a split's frames or clips.

    Args:
        split: a finished split of a store.
        tap: name of the features; of several, ``A+B``, whose channels follow each other; or ``video`` for the stored
            frames. These are compressed, so that they stream best from ``host`` or ``device``.
        batch_size: samples in a batch of this rank.
        clip: consecutive frames T of one video in a sample; 1 gives single frames without a time axis.
        frames: function from the number of samples seen to the frames that the next batch takes of each clip: indices
            below ``clip``, always the same number, which is then T. Only these are read. None: all frames.
        residence: place of the features while they stream. ``auto``: the device if they fit there beside the batches
            and the trainer, else the disk or the host; see :func:`featcache.stream.residence.choose_home`.
        reserve: bytes of the device that the trainer needs beside the batches.
        rank, world_size: each rank takes its part of every global batch; see :meth:`rows_at`.
        shares: consecutive shares of the split's videos, each of which gives an equal part of every global batch.
        threads: number of copying threads. None: one beside a trainer on the CPU, which needs the cores; for a GPU a
            share of the machine's cores, up to four.

    Raises ``UsageError`` if no video, of a share, is as long as the clip, or a batch has no equal parts of all shares.
    Damaged files raise ``DataError`` from the iterator.
    """

    def __init__(
        self,
        split: Split,
        tap: str,
        *,
        batch_size: int,
        clip: int = 1,
        frames: Callable[[int], npt.NDArray[np.int64]] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        residence: Residence = "auto",
        reserve: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shares: int = 1,
        threads: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.batch_size, self.clip, self.seed = batch_size, clip, seed
        self.rank, self.world_size = rank, world_size
        self.samples_seen = 0
        self._stalls = Stalls(self.device)
        if batch_size * world_size % shares:
            raise UsageError(f"a batch of {batch_size * world_size} has no equal parts of {shares} shares")
        self.orders, self._shares = orders(split, clip, shares), shares
        self._frames = frames
        samples = (batch_size, clip if frames is None else len(frames(0)))
        self._encoding = decoder(split, tap)
        self._arrays, self._batch = batch_formats(split, tap, samples)
        needs = reserve + ring_bytes(self._arrays.values(), self._batch if self._encoding else None)
        self.home = _home(split, tap, residence, needs, self.device)
        homes = {"disk": None, "host": torch.device("cpu"), "device": self.device}
        self.threads = threads or reader_threads(self.device, world_size)
        self._readers = open_readers(split, tap, homes[self.residence], self.threads)

    # -- the order -------------------------------------------------------------------------------------

    def rows_at(self, samples_seen: int) -> npt.NDArray[np.int64]:
        """First rows of this rank's batch after ``samples_seen`` samples, in ascending order: (B,).

        The global batch is drawn and sorted, and the ranks take consecutive parts of it: together they see the same
        samples in the same order as one process with the whole batch. Each share of the videos gives its part of the
        batch, in epochs of its own; with a share for each rank, a rank needs the videos of its share alone.
        """
        samples = self.world_size * self.batch_size
        drawn = [order.take(self.seed, samples_seen // self._shares, samples // self._shares) for order in self.orders]
        together = np.concatenate(drawn)
        begin = 0 if len(together) < samples else self.rank * self.batch_size
        return together[begin : begin + self.batch_size]

    def _rows_to_read(self, samples_seen: int) -> npt.NDArray[np.int64]:
        """:meth:`rows_at`, or every row of the batch, sample by sample, if only some frames of a clip are read."""
        rows = self.rows_at(samples_seen)
        return rows if self._frames is None else (rows[:, None] + self._frames(samples_seen)).ravel()

    def state_dict(self) -> dict[str, int]:
        """The position in the stream, for a checkpoint."""
        return {"samples_seen": self.samples_seen, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the position of :meth:`state_dict`."""
        self.samples_seen, self.seed = state["samples_seen"], state["seed"]

    # -- the batches -----------------------------------------------------------------------------------

    @property
    def residence(self) -> Residence:
        """Where the features live: ``disk``, ``host`` or ``device``."""
        return self.home.residence

    @property
    def wait_seconds(self) -> float:
        """Seconds for which the trainer, or its GPU, has waited for batches."""
        return self._stalls.seconds

    def _staging(self) -> Staging:
        return Staging(self.device, on_device=self.residence == "device", encoding=self._encoding)

    def batch_seconds(self, batches: int) -> BatchSeconds:
        """Seconds to read and to copy a batch: medians over the stream's next ``batches``."""
        staging = self._staging()
        buffers = staging.buffers(self._arrays, self._batch)
        taken: list[dict[str, float]] = []
        for batch in range(batches + 1):
            rows = self._rows_to_read(self.samples_seen + batch * self.batch_size * self.world_size)
            taken.append({"read": 0.0, "copy": 0.0})
            began = time.perf_counter()
            for part in staging.parts(buffers, self._readers, rows):
                staging.close()
                now = time.perf_counter()
                taken[-1][part] += now - began
                began = now
        read, copy = (statistics.median(seconds[part] for seconds in taken[1:]) for part in ("read", "copy"))
        return BatchSeconds(read + copy, 0.0) if self.device.type == "cpu" else BatchSeconds(read, copy)

    def __iter__(self) -> Iterator[Batch]:
        staging = self._staging()
        free: queue.SimpleQueue[Buffers | None] = queue.SimpleQueue()
        ready: queue.SimpleQueue[tuple[Buffers, npt.NDArray[np.int64], int] | BaseException] = queue.SimpleQueue()
        for _ in range(RING):
            free.put(staging.buffers(self._arrays, self._batch))
        step = self.batch_size * self.world_size
        begin = self.samples_seen

        def fill() -> None:
            samples = begin
            try:
                while (buffers := free.get()) is not None:
                    staging.fill(buffers, self._readers, self._rows_to_read(samples))
                    ready.put((buffers, self.rows_at(samples), samples))
                    samples += step
            except BaseException as error:  # raised in the trainer
                ready.put(error)

        thread = start_limited(fill, "featcache-stream", self.threads)

        def stop() -> None:
            free.put(None)
            thread.join()

        atexit.register(stop)  # an iterator that outlives main is closed too late for its thread to stop
        try:
            while True:
                with self._stalls.waiting():
                    item = ready.get()
                    if isinstance(item, BaseException):
                        raise item
                    buffers, rows, samples = item
                    features = staging.receive(buffers)
                self.samples_seen = samples + step
                yield Batch(features[:, 0] if self.clip == 1 else features, rows, samples)
                staging.release(buffers)
                free.put(buffers)
        finally:  # also when the iterator is dropped
            atexit.unregister(stop)
            stop()
            staging.close()


def feature_arrays(split: Split, tap: str) -> dict[str, zarr.Array[Any]]:
    """The arrays that hold a tap's tokens, by folder; for the tap ``video``, the frames (F, H, W, 3)."""
    return {VIDEO: split.array(VIDEO)} if tap == VIDEO else split.token_arrays(tap)


def decoder(split: Split, tap: str) -> Decoder | None:
    """What decodes :func:`feature_arrays`; None if there is one of them, which needs no decoding."""
    if tap == VIDEO or (split.store.encoding.plain and len(taps_of(tap)) == 1):
        return None
    return split.decoder(tap)


def open_readers(split: Split, tap: str, home: torch.device | None, threads: int = 1) -> dict[str, Rows]:
    """Readers of :func:`feature_arrays`, from memory on ``home``, or from files if it is None.

    All arrays but those of the features are held in memory in any case: int8's scales are half a kilobyte per frame,
    and such small copies from files would take as long as those of the codes.
    """
    readers: dict[str, Rows] = {}
    for name, array in feature_arrays(split, tap).items():
        reader = open_rows(split, array.path, threads)
        small = tap != VIDEO and not name.startswith(FEATURES)
        keep = torch.device("cpu") if home is None and small else home
        readers[name] = reader if keep is None else ResidentRows.load(reader, array, split, keep, threads)
    return readers


def reader_threads(device: torch.device, world_size: int) -> int:
    """The default number of copying threads; see :class:`FeatureStream`."""
    return 1 if device.type == "cpu" else max(1, min(4, (os.cpu_count() or 1) // (2 * world_size)))


def batch_formats(split: Split, tap: str, samples: tuple[int, int]) -> tuple[dict[str, Format], Format]:
    """Of a batch of (samples, frames of each): the arrays that it is read from, by their folders; and the batch."""
    stored = {
        name: Format((*samples, *array.shape[1:]), TORCH_DTYPES[str(array.dtype)])
        for name, array in feature_arrays(split, tap).items()
    }
    if (encoding := decoder(split, tap)) is None:
        return stored, next(iter(stored.values()))
    spec = split.store.spec.tap(tap)
    return stored, Format((*samples, spec.patches, spec.dim), encoding.decoded)


def _home(split: Split, tap: str, residence: Residence, needs: int, device: torch.device) -> Home:
    arrays = feature_arrays(split, tap).values()
    rows = split.spec.extent.stop - split.spec.extent.start
    size = sum(array.nbytes // max(1, split.spec.rows) * rows for array in arrays)
    if residence != "auto":
        return Home(residence, f"features ({readable(size)}) on the {residence}, as set")
    return choose_home(size, needs, Free.now(device), mapped=all(FileRows.allowed(array) for array in arrays))
