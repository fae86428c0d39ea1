"""Buffers between the reader and the trainer, and the copies that bring a batch to the device.

On a CPU a batch is used where it was read. For a CUDA device it is read into pinned memory and copied on a
separate stream, so that the copy of the next batch runs under the computation on this one. Two events for
each batch keep the order without making the host wait: ``filled`` (the trainer's stream waits for it) and
``released`` (the copying stream waits for it before it writes again).
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.memory.pages import host_empty
from featcache.store.encoding import Encoding
from featcache.stream.rows import Rows


@dataclass(frozen=True)
class Format:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Buffers:
    """Memory of one batch."""

    read: Mapping[str, Tensor]  # where rows of each stored array are gathered; (B, T, ...)
    moved: Mapping[str, Tensor]  # the same on the device; the same tensors when gathered there
    features: Tensor  # (B, T, N, D) on the device: what a trainer gets
    filled: torch.cuda.Event | None
    released: torch.cuda.Event | None


class Stalls:
    """Seconds for which the trainer's device had nothing to do for want of a batch.

    On a CPU that is the time that the trainer waits. The host of a GPU runs ahead of it, and mostly waits for buffers
    that the GPU still reads: it wants none. There two events on the trainer's stream stand around each wait: the GPU
    comes to the first when it has done all work queued before, and to the second when it has the batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # that the GPU has not come to

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While the trainer waits for a batch."""
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
        """So far; of a GPU, so far as it has come: nothing waits for it."""
        self._sum_up()
        return self._seconds

    def _sum_up(self) -> None:
        while self._events and self._events[0][1].query():  # type: ignore[no-untyped-call]
            begun, ended = self._events.popleft()
            self._seconds += begun.elapsed_time(ended) / 1e3


class Staging:
    """Fills buffers in the reader's thread and hands them over in the trainer's.

    ``encoding`` decodes what was read; None where a single array is used as it is.
    """

    def __init__(self, device: torch.device, *, on_device: bool, encoding: Encoding | None = None) -> None:
        self._device, self._encoding = device, encoding
        self._home = device if on_device else torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffers(self, arrays: Mapping[str, Format], batch: Format) -> Buffers:
        """Memory for a batch of that format, read from arrays of those."""

        def empty(device: torch.device) -> dict[str, Tensor]:
            return {name: self._empty(array, device) for name, array in arrays.items()}

        read = empty(self._home)
        moved = read if self._home.type == self._device.type else empty(self._device)
        features = next(iter(moved.values())) if self._encoding is None else self._empty(batch, self._device)
        if self._stream is None:
            return Buffers(read, moved, features, None, None)
        buffers = Buffers(read, moved, features, torch.cuda.Event(), torch.cuda.Event())  # type: ignore[no-untyped-call]
        self.release(buffers)  # what used this memory before comes first
        return buffers

    def _empty(self, of: Format, device: torch.device) -> Tensor:
        if device.type == "cpu" and self._stream is None:
            return host_empty(of.shape, of.dtype)
        return torch.empty(of.shape, dtype=of.dtype, device=device, pin_memory=device.type == "cpu")

    def fill(self, buffers: Buffers, readers: Mapping[str, Rows], rows: npt.NDArray[np.int64]) -> None:
        """:meth:`read`, then :meth:`move`. Returns before the device has finished."""
        self.read(buffers, readers, rows)
        self.move(buffers)

    def read(self, buffers: Buffers, readers: Mapping[str, Rows], rows: npt.NDArray[np.int64]) -> None:
        """Gather the runs of rows that begin at ``rows`` where they are read to: one a sample, or several."""
        if buffers.filled is not None:
            buffers.filled.synchronize()  # the pinned buffers have left for the device
        with self._queue():
            if self._stream is not None and buffers.released is not None:
                self._stream.wait_event(buffers.released)
            for name, reader in readers.items():
                buffer = buffers.read[name]
                reader.gather(rows, buffer.view(len(rows), -1, *buffer.shape[2:]))

    def move(self, buffers: Buffers) -> None:
        """Bring what was read to the device, and decode it."""
        with self._queue():
            if buffers.moved is not buffers.read:
                for name, moved in buffers.moved.items():
                    moved.copy_(buffers.read[name], non_blocking=buffers.filled is not None)
            if self._encoding is not None:
                self._encoding.decode_into(buffers.moved, buffers.features)
            if buffers.filled is not None:
                buffers.filled.record(self._stream)

    def _queue(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()

    def receive(self, buffers: Buffers) -> Tensor:
        """The batch, for work queued from now on by the calling thread."""
        if buffers.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(buffers.filled)
        return buffers.features

    def release(self, buffers: Buffers) -> None:
        """Work queued by the calling thread until now was the last to read the batch."""
        if buffers.released is not None:
            buffers.released.record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """Wait for copies under way, before the memory they write to is given back."""
        if self._stream is not None:
            self._stream.synchronize()
