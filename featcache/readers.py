"""Rows of one stored array into a given tensor: from raw chunk files, through zarr-python, or from memory.

A chunk file without a codec but ``bytes`` is the chunk's values, so its rows are copied from a memory map of it
straight into the batch's buffer. What the page cache holds then moves at the rate of a copy in memory (``preadv``
reaches half of that where the cache is made of 4 KiB pages). What it does not hold would come in page by page;
so, as soon as the thread is seen to wait for the disk, the rest of the batch is asked for all at once
(``MADV_WILLNEED``), which keeps the disk's queue full without further threads.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor

from featcache.errors import DataError
from featcache.store import Split

TORCH_DTYPES = {"float16": torch.float16, "int8": torch.int8}
MAPS = 1 << 14  # files mapped at a time: a quarter of what Linux gives a process (vm.max_map_count)
ADVICE = 128 << 10  # bytes asked for in one call: Linux cuts it down to a device's readahead, by default this
CHECK = 8  # copies between two looks at whether the disk had to be waited for
STAY_COLD = 16  # batches that are still asked for ahead after the last one that came from the disk

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Rows(Protocol):
    """Random access to the rows of one array."""

    def gather(self, starts: npt.NDArray[np.int64], out: Tensor) -> None:
        """Fill ``out`` (B, T, ...) with T consecutive rows from each start (B,)."""


def open_rows(split: Split, path: str) -> Rows:
    """The fastest reader that the array's metadata allows."""
    array = split.array(path)
    return FileRows(array, split.path / path) if FileRows.allowed(array) else ZarrRows(array)


class FileRows:
    """Rows of an array whose chunk files hold raw values."""

    def __init__(self, array: zarr.Array[Any], folder: Path) -> None:
        key: Any = array.metadata.to_dict()["chunk_key_encoding"]
        self._separator: str = key["configuration"]["separator"]
        self._ndim = array.ndim
        self._folder = folder
        self._chunk_rows: int = array.chunks[0]
        self._row_bytes = int(np.prod(array.shape[1:])) * array.dtype.itemsize
        self._maps: OrderedDict[int, Tensor] = OrderedDict()  # by chunk, the one used last at the end
        self._cold = STAY_COLD  # batches yet to be asked for ahead
        self._lock = threading.Lock()  # a map must not go while another thread reads from it

    @staticmethod
    def allowed(array: zarr.Array[Any]) -> bool:
        """Whether the metadata says that a chunk file holds exactly the chunk's rows in C order."""
        metadata = array.metadata.to_dict()
        codecs: Any = metadata.get("codecs", ())
        names = [codec["name"] for codec in codecs]
        little = all(codec.get("configuration", {}).get("endian", "little") == "little" for codec in codecs)
        key: Any = metadata.get("chunk_key_encoding", {})
        return (
            names == ["bytes"]
            and little
            and key.get("name") == "default"
            and array.chunks[1:] == array.shape[1:]
            and str(array.dtype) in TORCH_DTYPES
        )

    def path(self, chunk: int) -> Path:
        return self._folder / self._separator.join(["c", str(chunk), *["0"] * (self._ndim - 1)])

    def _address(self, chunk: int) -> int:
        mapped = self._maps.get(chunk)
        if mapped is None:
            path = self.path(chunk)
            try:  # a private map, for the stores that may only be read
                size = self._chunk_rows * self._row_bytes
                mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            except RuntimeError as error:
                what = "cannot be mapped" if path.exists() else "is missing"
                raise DataError(f"{path}: {what}; slotlab verify names the damaged videos") from error
            self._maps[chunk] = mapped
        else:
            self._maps.move_to_end(chunk)
        return mapped.data_ptr()

    def gather(self, starts: npt.NDArray[np.int64], out: Tensor) -> None:
        assert out.is_contiguous() and out.device.type == "cpu" and out[0, 0].nbytes == self._row_bytes
        with self._lock:
            pieces = self._pieces(starts, out.shape[1], out.data_ptr())
            before = _disk_reads()
            advised = self._cold > 0
            if advised:
                _advise(pieces)
            for first in range(0, len(pieces), CHECK):
                for target, source, size in pieces[first : first + CHECK]:
                    ctypes.memmove(target, source, size)  # without the GIL, and half the call of Tensor.copy_
                if not advised and _disk_reads() != before:
                    _advise(pieces[first + CHECK :])
                    advised = True
            self._cold = STAY_COLD if _disk_reads() != before else max(0, self._cold - 1)
            while len(self._maps) > MAPS:  # only now: pieces are bare addresses
                self._maps.popitem(last=False)

    def _pieces(self, starts: npt.NDArray[np.int64], length: int, target: int) -> list[tuple[int, int, int]]:
        """Target address, source address and bytes of each run of rows inside one chunk."""
        pieces = []
        for start in starts.tolist():
            stop = start + length
            while start < stop:  # one turn, but for clips that cross a chunk boundary
                chunk, row = divmod(start, self._chunk_rows)
                rows = min(stop - start, self._chunk_rows - row)
                size = rows * self._row_bytes
                pieces.append((target, self._address(chunk) + row * self._row_bytes, size))
                target += size
                start += rows
        return pieces


def _advise(pieces: list[tuple[int, int, int]]) -> None:
    """Start reading from the disk what the page cache does not hold of the pieces' sources."""
    for _, source, size in pieces:
        page = source - source % mmap.PAGESIZE
        for address in range(page, source + size, ADVICE):
            _libc.madvise(address, min(ADVICE, source + size - address), mmap.MADV_WILLNEED)


def _disk_reads() -> int:
    """Grows whenever the calling thread reads from a disk (for the whole process where that is all there is)."""
    usage = resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF))
    return usage.ru_majflt + usage.ru_inblock


class ZarrRows:
    """Rows of any legal zarr array (compressed, sharded, other byte orders), through zarr-python."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array = array

    def gather(self, starts: npt.NDArray[np.int64], out: Tensor) -> None:
        wanted = (starts[:, None] + np.arange(out.shape[1])).ravel()
        rows, places = np.unique(wanted, return_inverse=True)  # so that each chunk is decoded once
        values = np.asarray(self._array.oindex[rows])
        held = torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))
        torch.index_select(held, 0, torch.from_numpy(places), out=out.flatten(0, 1))


class ResidentRows:
    """Rows held in memory, on the host or on the device."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows  # (F, ...)

    @classmethod
    def load(cls, source: Rows, array: zarr.Array[Any], spans: Iterable[slice], device: torch.device) -> ResidentRows:
        """Holds the rows of ``array`` that lie in ``spans`` on ``device``; the others are undefined."""
        rows = torch.empty(array.shape, dtype=TORCH_DTYPES[str(array.dtype)], device=device)
        for span in spans:
            target = rows[span].unsqueeze(0)
            part = target if device.type == "cpu" else torch.empty_like(target, device="cpu")
            source.gather(np.array([span.start]), part)
            if part is not target:
                target.copy_(part)
        return cls(rows)

    def gather(self, starts: npt.NDArray[np.int64], out: Tensor) -> None:
        index = torch.from_numpy((starts[:, None] + np.arange(out.shape[1])).ravel()).to(self.rows.device)
        torch.index_select(self.rows, 0, index, out=out.flatten(0, 1))
