"""Where the features of a split live while they stream, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from featcache.machine import free_device_memory, free_memory, readable
from featcache.stream.staging import Format
from featcache.words import Residence

RING = 3  # batches in memory: one with the trainer, one ready, one being filled

SPARE = 2 * 10**9  # bytes of a device that stay free: libraries' scratch memory, and what fragments leave unused


@dataclass(frozen=True)
class Free:
    """Bytes of memory that are free."""

    host: int
    device: int | None = None  # None: the trainer's device uses the host's memory

    @classmethod
    def now(cls, device: torch.device) -> Free:
        return cls(free_memory(), free_device_memory(device))


@dataclass(frozen=True)
class Home:
    """A residence other than ``auto``, and its reason in one line."""

    residence: Residence
    why: str


def choose_home(size: int, needs: int, free: Free, *, mapped: bool) -> Home:
    """The best home of features of ``size`` bytes beside a model and batches that need ``needs`` bytes of the device.

    The device, if both fit on it with ``SPARE`` bytes; else the disk, whose page cache is host memory without a copy;
    but the host for stores that cannot be ``mapped`` (compressed) and fit in half of its free memory.
    """
    features, full = f"features ({readable(size)})", ""
    if free.device is not None:
        beside = f"{readable(free.device)} free, {readable(needs)} for the model and batches"
        if size + needs + SPARE <= free.device:
            return Home("device", f"{features} on the device: {beside}")
        full = f"; the device has {beside}"
    if mapped:
        return Home("disk", f"{features} on the disk and in its page cache{full}")
    if size > free.host // 2:
        return Home("disk", f"{features} on the disk: compressed, and the host has {readable(free.host)} free{full}")
    return Home("host", f"{features} on the host: compressed, and it has {readable(free.host)} free{full}")


def ring_bytes(stored: Iterable[Format], decoded: Format | None) -> int:
    """Bytes of the batches in memory: of each the arrays as stored, and, where they are decoded, the result."""
    return RING * (sum(array.bytes for array in stored) + (0 if decoded is None else decoded.bytes))
