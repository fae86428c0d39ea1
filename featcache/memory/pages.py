"""What the kernel is asked about memory: huge pages for buffers, and which pages of a mapped file it holds.

Addresses are bare integers, as ``Tensor.data_ptr`` gives them. Where the system has no such call (the advice is
Linux's), everything still works, without what the advice would have gained.
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
ADVICE = 128 << 10  # bytes asked for in one call: Linux cuts it down to a device's readahead, by default this
POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14; older kernels refuse it, and pages come in one by one

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def host_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in host memory, in huge pages where it is large enough and the system has them.

    Copying between 4 KiB pages waits for address translation: huge pages on the target's side gain about a
    tenth, on both sides a third.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    held = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory
    start = -held.data_ptr() % HUGE
    return held[start : start + size].view(dtype).view(shape)


def cached_share(address: int, size: int) -> float:
    """Share of a mapped file's pages that the page cache holds; 1 where the file is another user's (Linux hides it)."""
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    if _libc.mincore(address, size, pages):
        return 0.0
    return float((np.frombuffer(pages.raw, np.uint8) & 1).mean())


def populate(address: int, size: int) -> None:
    """Enter pages of a map that the page cache holds into the page table at once, instead of fault by fault."""
    _libc.madvise(address, size, POPULATE_READ)


def read_ahead(spans: Iterable[tuple[int, int]]) -> None:
    """Start reading from the disk what the page cache does not hold of the mapped (address, size) spans."""
    for address, size in spans:
        page = address - address % mmap.PAGESIZE
        for part in range(page, address + size, ADVICE):
            _libc.madvise(part, min(ADVICE, address + size - part), mmap.MADV_WILLNEED)


def disk_reads() -> int:
    """Grows whenever the calling thread reads from a disk (for the whole process where that is all there is)."""
    usage = resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF))
    return usage.ru_majflt + usage.ru_inblock
