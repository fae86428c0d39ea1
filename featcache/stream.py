"""FeatureStream: endless shuffled batches of cached tokens, in reused buffers, on a device.

One thread reads a batch ahead into a small ring of buffers (pinned for CUDA); there are no worker processes,
which only add copies to what is already a copy. The order is a pure function of the seed and the number of
samples seen, so a stream continues exactly from that one number.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor

from featcache.errors import UsageError
from featcache.quantise import dequantise
from featcache.store import Split
from featcache.writer import chunk_path

Residence = Literal["auto", "disk", "host", "device"]
RING = 3  # one with the trainer, one ready, one being filled


@dataclass(frozen=True)
class Batch:
    """Tokens (B, N, D), or (B, T, N, D) for clips; ``rows`` (B,) are the first rows of the samples.

    ``features`` is float16 (float32 from int8 stores). It may live in a buffer that is reused: it is valid
    until the next batch is asked for.
    """

    features: Tensor
    rows: npt.NDArray[np.int64]
    samples_seen: int  # of the whole stream, before this batch


class Rows(Protocol):
    """Random access to the rows of one array."""

    def gather(self, starts: npt.NDArray[np.int64], out: Tensor) -> None:
        """Fill ``out`` (B, T, ...) with T consecutive rows from each start."""


class MappedRows:
    """Rows of an array whose chunk files are raw bytes, through one memory map a file."""

    def __init__(self, array: zarr.Array[Any], folder: Path) -> None:
        self.chunk_frames: int = array.chunks[0]
        self._shape = (self.chunk_frames, *array.shape[1:])
        self._dtype = {"float16": torch.float16, "int8": torch.int8}[str(array.dtype)]
        self._folder = folder
        self._maps: dict[int, Tensor] = {}

    @staticmethod
    def allowed(array: zarr.Array[Any]) -> bool:
        """Whether the metadata says that a chunk file holds exactly the chunk's values in C order."""
        metadata = array.metadata.to_dict()
        codecs: Any = metadata.get("codecs", ())
        names = [codec["name"] for codec in codecs]
        little = all(codec.get("configuration", {}).get("endian", "little") == "little" for codec in codecs)
        key: Any = metadata.get("chunk_key_encoding", {})
        return (
            names == ["bytes"]
            and little
            and key == {"name": "default", "configuration": {"separator": "."}}
            and array.chunks[1:] == array.shape[1:]
            and str(array.dtype) in ("float16", "int8")
        )

    def _map(self, chunk: int) -> Tensor:
        if chunk not in self._maps:
            path = chunk_path(self._folder, chunk, len(self._shape))
            size = int(np.prod(self._shape))
            flat = torch.from_file(str(path), shared=False, size=size, dtype=self._dtype)
            self._maps[chunk] = flat.view(self._shape)
        return self._maps[chunk]

    def gather(self, starts: npt.NDArray[np.int64], out: Tensor) -> None:
        length = out.shape[1]
        for sample, start in enumerate(starts.tolist()):
            filled = 0
            while filled < length:  # one turn, but for clips that cross a chunk boundary
                chunk, offset = divmod(start + filled, self.chunk_frames)
                rows = min(length - filled, self.chunk_frames - offset)
                out[sample, filled : filled + rows].copy_(self._map(chunk)[offset : offset + rows])
                filled += rows


class ZarrRows:
    """Rows of any legal zarr array (compressed, sharded, remote), through zarr-python."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array = array

    def gather(self, starts: npt.NDArray[np.int64], out: Tensor) -> None:
        length = out.shape[1]
        for sample, start in enumerate(starts.tolist()):
            out[sample].copy_(torch.from_numpy(np.asarray(self._array[start : start + length])))


class ResidentRows:
    """Rows held in memory, on the host or on the device."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @classmethod
    def load(cls, source: Rows, rows: int, like: zarr.Array[Any], device: torch.device) -> ResidentRows:
        dtype = {"float16": torch.float16, "int8": torch.int8}[str(like.dtype)]
        held = torch.empty((rows, *like.shape[1:]), dtype=dtype, device=device)
        step = like.chunks[0]
        for start in range(0, rows, step):
            part = torch.empty((1, min(step, rows - start), *like.shape[1:]), dtype=dtype)
            source.gather(np.array([start]), part)
            held[start : start + step].copy_(part[0])
        return cls(held)

    def gather(self, starts: npt.NDArray[np.int64], out: Tensor) -> None:
        index = torch.from_numpy(starts[:, None] + np.arange(out.shape[1])).flatten().to(self.rows.device)
        torch.index_select(self.rows, 0, index, out=out.flatten(0, 1))


def open_rows(split: Split, path: str) -> Rows:
    """The fastest reader that the array's metadata allows."""
    array = split.array(path)
    return MappedRows(array, split.path / path) if MappedRows.allowed(array) else ZarrRows(array)


class FeatureStream:
    """Endless iterator of :class:`Batch` over a split's frames or clips.

    Args:
        split: a finished split of a store.
        tap: which features.
        batch_size: samples a batch, for this rank.
        clip: T consecutive frames of one video a sample; 1 gives single frames without a time axis.
        residence: where the features live while training; ``auto`` is the device if they fit in half of its
            free memory, else the disk (which the page cache turns into host memory where there is enough).
        rank, world_size: each rank takes its own share of every global batch.
    """

    def __init__(
        self,
        split: Split,
        tap: str,
        *,
        batch_size: int,
        clip: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        residence: Residence = "auto",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.device = torch.device(device)
        self.batch_size, self.clip, self.seed = batch_size, clip, seed
        self.rank, self.world_size = rank, world_size
        self.samples_seen = 0
        self.wait_seconds = 0.0
        self.starts = clip_starts(split, clip)  # (samples,)
        paths = [f"features/{tap}"] + ([f"scales/{tap}"] if split.store.spec.dtype == "int8" else [])
        arrays = [split.array(path) for path in paths]
        readers: list[Rows] = [open_rows(split, path) for path in paths]
        self.residence = self._choose(residence, arrays)
        if self.residence != "disk":
            home = self.device if self.residence == "device" else torch.device("cpu")
            readers = [
                ResidentRows.load(reader, split.spec.rows, array, home)
                for reader, array in zip(readers, arrays, strict=True)
            ]
        self._readers = readers
        self._shapes = [(batch_size, clip, *array.shape[1:]) for array in arrays]
        self._dtypes = [{"float16": torch.float16, "int8": torch.int8}[str(array.dtype)] for array in arrays]
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def _choose(self, residence: Residence, arrays: list[zarr.Array[Any]]) -> Residence:
        if residence != "auto":
            return residence
        if self.device.type != "cuda":
            return "disk"
        free, _ = torch.cuda.mem_get_info(self.device)
        return "device" if sum(array.nbytes for array in arrays) <= free // 2 else "disk"

    # -- the order -------------------------------------------------------------------------------------

    def rows_at(self, samples_seen: int) -> npt.NDArray[np.int64]:
        """First rows of this rank's batch after ``samples_seen`` samples: (B,).

        Epochs follow each other without a gap, so a batch may take the end of one and the start of the next.
        """
        first = samples_seen + self.rank * self.batch_size
        rows = [self._sample(position) for position in range(first, first + self.batch_size)]
        return np.sort(np.asarray(rows, np.int64))  # neighbours on disk are read together

    def _sample(self, position: int) -> int:
        epoch, index = divmod(position, len(self.starts))
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.starts))
            self._order = (epoch, order)
        return int(self.starts[self._order[1][index]])

    def state_dict(self) -> dict[str, int]:
        return {"samples_seen": self.samples_seen, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.samples_seen, self.seed = state["samples_seen"], state["seed"]
        self._order = None

    # -- the batches -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        on_device = self.residence == "device"
        pin = self.device.type == "cuda" and not on_device
        home = self.device if on_device else torch.device("cpu")
        ring = [
            [
                torch.empty(shape, dtype=dtype, device=home, pin_memory=pin)
                for shape, dtype in zip(self._shapes, self._dtypes, strict=True)
            ]
            for _ in range(RING)
        ]
        free: queue.Queue[list[Tensor] | None] = queue.Queue()
        ready: queue.Queue[tuple[list[Tensor], npt.NDArray[np.int64], int] | BaseException] = queue.Queue()
        for buffers in ring:
            free.put(buffers)
        step = self.batch_size * self.world_size
        begin = self.samples_seen

        def fill() -> None:
            torch.set_num_threads(1)  # this thread's own copies; it must not fight the trainer for cores
            samples = begin
            try:
                while (buffers := free.get()) is not None:
                    rows = self.rows_at(samples)
                    for reader, buffer in zip(self._readers, buffers, strict=True):
                        reader.gather(rows, buffer)
                    ready.put((buffers, rows, samples))
                    samples += step
            except BaseException as error:  # handed to the trainer, which raises it
                ready.put(error)

        thread = threading.Thread(target=fill, name="featcache-stream", daemon=True)
        thread.start()
        held: list[tuple[list[Tensor], torch.cuda.Event | None]] = []
        try:
            while True:
                waited = time.perf_counter()
                item = ready.get()
                self.wait_seconds += time.perf_counter() - waited
                if isinstance(item, BaseException):
                    raise item
                buffers, rows, samples = item
                parts = [buffer.to(self.device, non_blocking=pin) for buffer in buffers]
                copied = torch.cuda.Event() if pin else None  # type: ignore[no-untyped-call]
                if copied:
                    copied.record()
                held.append((buffers, copied))
                if len(held) > 1:
                    used, event = held.pop(0)
                    if event:
                        event.synchronize()
                    free.put(used)
                features = dequantise(*parts) if len(parts) == 2 else parts[0]
                if self.clip == 1:
                    features = features[:, 0]
                self.samples_seen = samples + step
                yield Batch(features, rows, samples)
        finally:
            free.put(None)
            while thread.is_alive():
                thread.join(0.1)


def clip_starts(split: Split, clip: int) -> npt.NDArray[np.int64]:
    """First row of every run of ``clip`` consecutive frames inside one finished video: (samples,)."""
    parts = [
        np.arange(split.rows(video).start, split.rows(video).stop - clip + 1, dtype=np.int64) for video in split.videos
    ]
    starts = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if not len(starts):
        longest = max(split.spec.lengths, default=0)
        raise UsageError(f"{split.path}: no clips of {clip} frames; the longest video has {longest}")
    return starts
