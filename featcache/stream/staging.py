"""Buffers between the reader and the trainer, and the copies that bring a batch to the device.

On a CPU a batch is used where it was read. On its way to a CUDA device it passes through a few pieces of page-locked
memory and is copied on a separate stream, so that the copy of the next batch overlaps the computation on this one.
Page-locked memory is scarce (WSL and containers have little), so the pieces have one size, whatever the batch. Two
events for each batch keep the order without making the host wait: ``filled`` (the trainer's stream waits for it) and
``released`` (the copying stream waits for it before it writes again). One event for each piece, ``left``, keeps the
host from writing to memory that is still being copied.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.memory.pages import host_empty
from featcache.store.encoding import Decoder
from featcache.stream.rows import Rows

PIECE, PIECES = 32 << 20, 3  # bytes of a piece of page-locked memory, and their number: one is always being read

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """Shape (B, T, ...) and type of a batch of rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[2:]) * self.dtype.itemsize


@dataclass(frozen=True)
class Buffers:
    """The memory of one batch, on the device."""

    stored: Mapping[str, Tensor]  # rows of each stored array; (B, T, ...)
    features: Tensor  # (B, T, N, D), or frames (B, T, H, W, 3): what a trainer gets
    filled: torch.cuda.Event | None
    released: torch.cuda.Event | None


@dataclass(frozen=True)
class Piece:
    """A piece of host memory that rows pass through."""

    memory: Tensor  # (bytes,) uint8
    left: torch.cuda.Event | None  # reached when the copy from it is done


class Stalls:
    """Counts the seconds for which the trainer's device was idle because no batch was ready.

    On a CPU that is the time that the trainer waits. The host of a GPU runs ahead, and mostly waits for buffers that
    the GPU still reads, which does not count. So two events on the trainer's stream enclose each wait: the GPU reaches
    the first when it has done all work queued before, and the second when it has the batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # pairs that the GPU has not reached

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures a wait: enter it when the trainer asks for a batch, leave it with the batch."""
        if self._device.type == "cuda":
            begun = self._reached()
            yield
            self._events.append((begun, self._reached()))
            self._sum_up()
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def _reached(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    @property
    def seconds(self) -> float:
        """The total so far; for a GPU, up to the last event that it has reached, as nothing waits for it."""
        self._sum_up()
        return self._seconds

    def _sum_up(self) -> None:
        while self._events and self._events[0][1].query():  # type: ignore[no-untyped-call]
            begun, ended = self._events.popleft()
            self._seconds += begun.elapsed_time(ended) / 1e3


class Staging:
    """Fills buffers in the reader's thread and hands them over in the trainer's.

    ``encoding`` decodes the stored arrays; None: there is one array, used as it is.
    """

    def __init__(self, device: torch.device, *, on_device: bool, encoding: Decoder | None = None) -> None:
        self._device, self._encoding = device, encoding
        self._direct = on_device or device.type == "cpu"  # rows are gathered where they are used
        self._pieces: list[Piece] = []
        self._turn = 0
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffers(self, arrays: Mapping[str, Format], batch: Format) -> Buffers:
        """Memory for a batch of one format, read from arrays of their formats."""
        if not self._direct and not self._pieces:
            self._make_pieces(arrays.values())
        stored = {name: self._empty(array) for name, array in arrays.items()}
        features = next(iter(stored.values())) if self._encoding is None else self._empty(batch)
        if self._stream is None:
            return Buffers(stored, features, None, None)
        buffers = Buffers(stored, features, torch.cuda.Event(), torch.cuda.Event())  # type: ignore[no-untyped-call]
        self.release(buffers)  # earlier work on this memory comes first
        return buffers

    def _empty(self, of: Format) -> Tensor:
        if self._device.type == "cpu":
            return host_empty(of.shape, of.dtype)
        return torch.empty(of.shape, dtype=of.dtype, device=self._device)

    def _make_pieces(self, arrays: Iterable[Format]) -> None:
        size = max(min(PIECE, array.bytes) // array.row * array.row or array.row for array in arrays)
        lockable = self._stream is not None
        for _ in range(PIECES):
            memory = page_locked(size) if lockable else None
            lockable = memory is not None
            event = None if self._stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._pieces.append(Piece(host_empty((size,), torch.uint8) if memory is None else memory, event))

    def fill(self, buffers: Buffers, readers: Mapping[str, Rows], rows: npt.NDArray[np.int64]) -> None:
        """Gather the runs of rows that begin at ``rows`` (one or several per sample), copy them to the device, decode.

        Returns before the device has finished.
        """
        for _ in self.parts(buffers, readers, rows):
            pass

    def parts(self, buffers: Buffers, readers: Mapping[str, Rows], rows: npt.NDArray[np.int64]) -> Iterator[str]:
        """:meth:`fill` in parts: yields ``read`` or ``copy`` after each, by what it did."""
        with self._queue():
            if self._stream is not None and buffers.released is not None:
                self._stream.wait_event(buffers.released)
            for name, reader in readers.items():
                target = buffers.stored[name].flatten(0, 1)  # (B T, ...)
                if self._direct:
                    reader.gather(rows, target.view(len(rows), -1, *target.shape[1:]))
                    yield "read"
                else:
                    every = (rows[:, None] + np.arange(len(target) // len(rows))).ravel()
                    yield from self._through_pieces(reader, every, target)
            if self._encoding is not None:
                self._encoding.decode_into(buffers.stored, buffers.features)
            if buffers.filled is not None:
                buffers.filled.record(self._stream)
            yield "copy"

    def _through_pieces(self, reader: Rows, rows: npt.NDArray[np.int64], target: Tensor) -> Iterator[str]:
        """Gather ``rows`` (R,) into ``target`` (R, ...) on the device. Readers copy neighbouring rows together, so that
        clips cost no more when given row by row."""
        row = target[0].nbytes
        for first in range(0, len(rows), max(1, PIECE // row)):
            some = rows[first : first + max(1, PIECE // row)]
            piece = self._pieces[self._turn % PIECES]
            self._turn += 1
            if piece.left is not None:
                piece.left.synchronize()
            part = piece.memory[: len(some) * row].view(target.dtype).view(len(some), *target.shape[1:])
            reader.gather(some, part.unsqueeze(1))
            yield "read"
            target[first : first + len(some)].copy_(part, non_blocking=piece.left is not None)
            if piece.left is not None:
                piece.left.record(self._stream)
            yield "copy"

    def _queue(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()

    def receive(self, buffers: Buffers) -> Tensor:
        """The batch, for work that the calling thread queues from now on."""
        if buffers.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(buffers.filled)
        return buffers.features

    def release(self, buffers: Buffers) -> None:
        """Free the batch once the work that the calling thread has queued so far is done."""
        if buffers.released is not None:
            buffers.released.record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """Wait for copies under way, before the memory that they use is freed."""
        if self._stream is not None:
            self._stream.synchronize()


def page_locked(size: int) -> Tensor | None:
    """Page-locked host memory (size,) uint8, which a device reads directly; None, with a warning, if there is none."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("no page-locked memory (%s): batches pass through ordinary memory, more slowly", reason)
        return None
