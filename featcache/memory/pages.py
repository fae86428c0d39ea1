"""Requests to the kernel about memory: huge pages for buffers, and the cached pages of a mapped file.

Addresses are integers, as from ``Tensor.data_ptr``. On systems without a call (the advice is Linux's) everything still
works, only slower.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of a huge page on x86-64 and, mostly, on arm64
ADVICE = 128 << 10  # bytes in one call; Linux limits it to a device's readahead, which is this by default
POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14; older kernels refuse it, and pages are mapped one by one

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def host_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in host memory, in huge pages if it is large enough and the system has them.

    A copy between 4 KiB pages waits for address translation: huge pages for the target gain about a tenth, for both
    sides a third.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    held = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory alive
    start = -held.data_ptr() % HUGE
    return held[start : start + size].view(dtype).view(shape)


def cached_share(address: int, size: int) -> float:
    """Share of a mapped file's pages in the page cache; 1 if the file is another user's (Linux hides it)."""
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    if _libc.mincore(address, size, pages):
        return 0.0
    return float((np.frombuffer(pages.raw, np.uint8) & 1).mean())


def populate(address: int, size: int) -> None:
    """Map the cached pages of a mapped file into the page table at once, instead of fault by fault."""
    _libc.madvise(address, size, POPULATE_READ)


def read_ahead(spans: Iterable[tuple[int, int]]) -> None:
    """Start reading those parts of the mapped (address, size) spans that the page cache lacks from the disk."""
    for address, size in spans:
        page = address - address % mmap.PAGESIZE
        for part in range(page, address + size, ADVICE):
            _libc.madvise(part, min(ADVICE, address + size - part), mmap.MADV_WILLNEED)


def disk_reads() -> int:
    """A count that grows when the calling thread reads from a disk (the whole process on some systems)."""
    usage = resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF))
    return usage.ru_majflt + usage.ru_inblock
