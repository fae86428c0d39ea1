"""Reads rows of one stored array into a given tensor: from raw chunk files, through zarr-python, or from memory.

A chunk whose only codec is ``bytes`` is just its values, in a file or at some place in a shard. So rows are copied from
a memory map of the file straight into the batch's buffer. Cached pages move at the rate of a copy in memory (``preadv``
reaches half of that if the cache has 4 KiB pages). Other pages would arrive one by one; so, once the thread waits for
the disk, the rest of the batch is requested at once (``MADV_WILLNEED``), which keeps the disk's queue full without
further threads.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor

from featcache.errors import DataError
from featcache.memory import pages
from featcache.memory.copying import Copier, Piece
from featcache.store import shards
from featcache.store.reading import Split
from featcache.text import in_utf8

# torch's types by the arrays' names for them; arrays of other types cannot be read.
TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
}
MAPS = 1 << 14  # files mapped at a time: a quarter of what Linux allows a process (vm.max_map_count)
LOADED = 64 << 20  # bytes that are loaded at a time into memory
STAY_COLD = 16  # batches that are requested ahead after the last one that came from the disk

Int64 = npt.NDArray[np.int64]


class Rows(Protocol):
    """Random access to the rows of one array."""

    def gather(self, starts: Int64, out: Tensor) -> None:
        """Fill ``out`` (B, T, ...) with T consecutive rows from each of ``starts`` (B,), which ascend."""


def open_rows(split: Split, path: str, threads: int = 1) -> Rows:
    """The fastest reader that the array's metadata allows; ``threads`` threads copy raw values."""
    array = split.array(path)
    return FileRows(array, split.path / path, threads) if FileRows.allowed(array) else ZarrRows(array)


class FileRows:
    """Rows of an array whose files hold raw values: one chunk each, or a shard of them."""

    def __init__(self, array: zarr.Array[Any], folder: Path, threads: int = 1) -> None:
        self._copy = Copier(threads)
        key: Any = array.metadata.to_dict()["chunk_key_encoding"]
        self._separator: str = key["configuration"]["separator"]
        self._ndim = array.ndim
        self._folder = folder
        self._chunk_rows: int = array.chunks[0]
        self._row_bytes = int(np.prod(array.shape[1:])) * array.dtype.itemsize
        self._shard_chunks = array.shards[0] // array.chunks[0] if array.shards else 0
        self._maps: OrderedDict[int, Tensor] = OrderedDict()  # by file, least recently used first
        # Where each chunk lies in memory; 0 until its file is mapped.
        self._addresses = np.zeros(-(-array.shape[0] // self._chunk_rows), np.int64)
        self._cold = STAY_COLD  # batches yet to be requested ahead
        self._lock = threading.Lock()  # keeps a map open while a thread reads from it

    @staticmethod
    def allowed(array: zarr.Array[Any]) -> bool:
        """Whether a chunk's bytes, by the metadata, are its rows in C order at a known place."""
        metadata = array.metadata.to_dict()
        codecs: Any = metadata.get("codecs", ())
        if [codec["name"] for codec in codecs] == ["sharding_indexed"]:
            sharding = codecs[0]["configuration"]
            plain_index = [codec["name"] for codec in sharding["index_codecs"]] == ["bytes", "crc32c"]
            if not (plain_index and _little(sharding["index_codecs"]) and sharding["index_location"] == "end"):
                return False
            codecs = sharding["codecs"]
        key: Any = metadata.get("chunk_key_encoding", {})
        return (
            [codec["name"] for codec in codecs] == ["bytes"]
            and _little(codecs)
            and key.get("name") == "default"
            and array.shape[1:] == array.chunks[1:] == (array.shards or array.chunks)[1:]
            and str(array.dtype) in TORCH_DTYPES
        )

    def path(self, chunk: int) -> Path:
        """The file that holds a chunk."""
        number = chunk // self._shard_chunks if self._shard_chunks else chunk
        return self._folder / self._separator.join(["c", str(number), *["0"] * (self._ndim - 1)])

    def gather(self, starts: Int64, out: Tensor) -> None:
        assert out.is_contiguous() and out.device.type == "cpu" and out[0, 0].nbytes == self._row_bytes
        with self._lock:
            pieces = self._pieces(starts, out.shape[1], out.data_ptr())
            before = pages.disk_reads()
            advised = self._cold > 0
            if advised:
                pages.read_ahead((source, size) for _, source, size in pieces)

            def look(left: Sequence[Piece]) -> None:
                nonlocal advised
                if not advised and pages.disk_reads() != before:
                    pages.read_ahead((source, size) for _, source, size in left)
                    advised = True

            self._copy(pieces, look)
            self._cold = STAY_COLD if pages.disk_reads() != before else max(0, self._cold - 1)
            while len(self._maps) > MAPS:  # only after the copies, which use bare addresses
                file, _ = self._maps.popitem(last=False)
                self._addresses[self._chunks_of(file)] = 0

    def _pieces(self, starts: Int64, length: int, target: int) -> list[Piece]:
        """Target address, source address and bytes of each run of rows that are contiguous in memory."""
        first, last = starts // self._chunk_rows, (starts + length - 1) // self._chunk_rows
        counts = last - first + 1  # 1, except for clips that cross a chunk boundary
        sample = np.repeat(np.arange(len(starts)), counts)
        chunk = np.arange(len(sample)) + np.repeat(first - np.cumsum(counts) + counts, counts)
        begin = np.maximum(starts[sample], chunk * self._chunk_rows)
        end = np.minimum(starts[sample] + length, (chunk + 1) * self._chunk_rows)
        sizes = (end - begin) * self._row_bytes
        sources = self._map(chunk)[chunk] + (begin - chunk * self._chunk_rows) * self._row_bytes
        targets = target + np.cumsum(sizes) - sizes
        heads = np.flatnonzero(np.concatenate([[True], sources[1:] != sources[:-1] + sizes[:-1]]))
        sizes = np.add.reduceat(sizes, heads)
        return list(zip(targets[heads].tolist(), sources[heads].tolist(), sizes.tolist(), strict=True))

    def _chunks_of(self, file: int) -> slice:
        count = self._shard_chunks or 1
        return slice(file * count, (file + 1) * count)

    def _map(self, chunks: Int64) -> Int64:
        """The addresses of all chunks; those of ``chunks`` are valid. ``DataError`` if one is missing or damaged."""
        for file in np.unique(chunks // (self._shard_chunks or 1)).tolist():
            if file in self._maps:
                self._maps.move_to_end(file)
            else:
                self._maps[file] = self._open(file)
        if not self._addresses[chunks].all():
            chunk = int(chunks[self._addresses[chunks] == 0][0])
            raise DataError(f"{self.path(chunk)}: chunk {chunk} is missing; slotlab verify names the damaged videos")
        return self._addresses

    def _open(self, file: int) -> Tensor:
        """Map a file and note where its chunks are."""
        chunks = self._chunks_of(file)
        path, chunk_bytes = self.path(chunks.start), self._chunk_rows * self._row_bytes
        try:  # a private map, which read-only files allow
            size = os.path.getsize(path) if self._shard_chunks else chunk_bytes
            with in_utf8(path) as name:
                mapped = torch.from_file(name, shared=False, size=size, dtype=torch.uint8)
            offsets = self._offsets(path, chunk_bytes) if self._shard_chunks else np.zeros(1, np.int64)
        except (OSError, RuntimeError, ValueError) as error:
            missing, damaged = not path.exists(), isinstance(error, ValueError)
            what = "is missing" if missing else "its index is damaged" if damaged else "cannot be mapped"
            raise DataError(f"{path}: {what}; slotlab verify names the damaged videos") from error
        address = mapped.data_ptr()
        places = self._addresses[chunks]  # a view; shorter than a shard at the array's end
        places[:] = np.where(offsets >= 0, address + offsets, 0)[: len(places)]
        # The kernel reports another user's file as fully cached, and populating would then read it.
        if os.access(path, os.W_OK) and pages.cached_share(address, size) == 1:
            pages.populate(address, size)
        return mapped

    def _offsets(self, path: Path, chunk_bytes: int) -> Int64:
        """The offset of each chunk in a shard; -1 for those it lacks. ``ValueError`` for a damaged index."""
        with path.open("rb") as file:
            index = shards.read_index(file, self._shard_chunks)
            end = file.seek(0, os.SEEK_END)
        absent = index[:, 0] == shards.ABSENT
        offsets = np.where(absent, 0, index[:, 0]).astype(np.int64)
        if (index[~absent, 1] != chunk_bytes).any() or (offsets[~absent] + chunk_bytes > end).any():
            raise ValueError("the index names other places than its chunks'")
        return np.where(absent, -1, offsets)


def _little(codecs: Any) -> bool:
    return all(codec.get("configuration", {}).get("endian", "little") == "little" for codec in codecs)


class ZarrRows:
    """Rows of any legal zarr array (compressed, split, other byte orders), through zarr-python."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array = array

    def gather(self, starts: Int64, out: Tensor) -> None:
        wanted = (starts[:, None] + np.arange(out.shape[1])).ravel()
        rows, places = np.unique(wanted, return_inverse=True)  # so that each chunk is decoded once
        values = np.asarray(self._array.oindex[rows])
        held = torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))
        torch.index_select(held, 0, torch.from_numpy(places), out=out.flatten(0, 1))


class ResidentRows:
    """Rows held in memory, on the host or on the device."""

    def __init__(self, rows: Tensor, threads: int = 1, first: int = 0) -> None:
        self.rows = rows  # (F, ...)
        self._first = first  # the array's row that comes first here
        self._copy = Copier(threads)

    @classmethod
    def load(
        cls, source: Rows, array: zarr.Array[Any], split: Split, device: torch.device, threads: int = 1
    ) -> ResidentRows:
        """Load the rows of the finished videos that are trained on to ``device``; the other rows are undefined."""
        dtype = TORCH_DTYPES[str(array.dtype)]
        on_host = device.type == "cpu"
        first, end = split.spec.extent.start, split.spec.extent.stop
        shape = (end - first, *array.shape[1:])
        rows = pages.host_empty(shape, dtype) if on_host else torch.empty(shape, dtype=dtype, device=device)
        for span in split.spans(max(1, LOADED // rows[:1].nbytes)):
            target = rows[span.start - first : span.stop - first].unsqueeze(0)
            part = target if on_host else torch.empty_like(target, device="cpu")
            source.gather(np.array([span.start]), part)
            if part is not target:
                target.copy_(part)
        return cls(rows, threads, first)

    def gather(self, starts: Int64, out: Tensor) -> None:
        starts = starts - self._first
        if self.rows.device.type == "cpu":
            assert out.is_contiguous() and out.device.type == "cpu"
            sources = self.rows.data_ptr() + starts * self.rows[0].nbytes
            size = out[0].nbytes
            self._copy([(out.data_ptr() + i * size, source, size) for i, source in enumerate(sources.tolist())])
        else:
            rows = torch.from_numpy((starts[:, None] + np.arange(out.shape[1])).ravel()).to(self.rows.device)
            torch.index_select(self.rows, 0, rows, out=out.flatten(0, 1))
