"""Buffers between the reader and the trainer, and the copies that bring a batch to the device.

On a CPU a batch is used where it was read. For a CUDA device it is read into pinned memory and copied on a
stream of its own, so that the copy of the next batch runs under the computation on this one. Two events for
each slot keep the order without making the host wait: ``filled`` (the trainer's stream waits for it) and
``released`` (the copying stream waits for it before it writes again).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.memory.pages import host_empty
from featcache.store.encoding import dequantise_into
from featcache.stream.rows import Rows


@dataclass(frozen=True)
class Slot:
    """Buffers of one batch."""

    read: list[Tensor]  # where rows are gathered: [tokens] or [codes, scales]; (B, T, ...)
    moved: list[Tensor]  # the same on the device; the same tensors when gathered there
    features: Tensor  # (B, T, N, D) on the device; moved[0], or what its codes are dequantised into
    filled: torch.cuda.Event | None
    released: torch.cuda.Event | None


class Staging:
    """Fills slots in the reader's thread and hands them over in the trainer's."""

    def __init__(self, device: torch.device, *, on_device: bool) -> None:
        self._device = device
        self._home = device if on_device else torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def slot(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> Slot:
        def buffers(device: torch.device) -> list[Tensor]:
            return [self._empty(shape, dtype, device) for shape, dtype in zip(shapes, dtypes, strict=True)]

        read = buffers(self._home)
        moved = read if self._home.type == self._device.type else buffers(self._device)
        codes = len(moved) == 2
        features = self._empty(shapes[0], torch.float32, self._device) if codes else moved[0]
        if self._stream is None:
            return Slot(read, moved, features, None, None)
        slot = Slot(read, moved, features, torch.cuda.Event(), torch.cuda.Event())  # type: ignore[no-untyped-call]
        self.release(slot)  # what used this memory before comes first
        return slot

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type == "cpu" and self._stream is None:
            return host_empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=device.type == "cpu")

    def fill(self, slot: Slot, readers: Sequence[Rows], rows: npt.NDArray[np.int64]) -> None:
        """:meth:`read`, then :meth:`move`. Returns before the device has finished."""
        self.read(slot, readers, rows)
        self.move(slot)

    def read(self, slot: Slot, readers: Sequence[Rows], rows: npt.NDArray[np.int64]) -> None:
        """Gather the rows where they are read to."""
        if slot.filled is not None:
            slot.filled.synchronize()  # the pinned buffers have left for the device
        with self._queue():
            if self._stream is not None and slot.released is not None:
                self._stream.wait_event(slot.released)
            for reader, buffer in zip(readers, slot.read, strict=True):
                reader.gather(rows, buffer)

    def move(self, slot: Slot) -> None:
        """Bring what was read to the device, and dequantise it."""
        with self._queue():
            if slot.moved is not slot.read:
                for moved, buffer in zip(slot.moved, slot.read, strict=True):
                    moved.copy_(buffer, non_blocking=slot.filled is not None)
            if len(slot.moved) == 2:
                codes, scales = slot.moved
                dequantise_into(codes, scales, slot.features)
            if slot.filled is not None:
                slot.filled.record(self._stream)

    def _queue(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()

    def receive(self, slot: Slot) -> Tensor:
        """The batch, for work queued from now on by the calling thread."""
        if slot.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.filled)
        return slot.features

    def release(self, slot: Slot) -> None:
        """Work queued by the calling thread until now was the last to read the batch."""
        if slot.released is not None:
            slot.released.record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """Wait for copies under way, before the memory they write to is given back."""
        if self._stream is not None:
            self._stream.synchronize()
