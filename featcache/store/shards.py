"""Chunks in zarr's shards: one file for many videos, for file systems that are short of inodes.

A shard (zarr v3 codec ``sharding_indexed``, https://zarr-specs.readthedocs.io, section "Sharding codec") is its
chunks' bytes end to end, then an index of (offset, length) pairs of little-endian uint64 and the index's
CRC32C. A chunk's bytes are the same inside a shard as in a separate file, so the manifest's checksums do not
depend on where they lie.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt

from featcache.store.layout import chunk_path
from featcache.store.spec import SplitSpec

ABSENT = 2**64 - 1  # both numbers of a chunk that the shard does not have


def pack(chunks: Mapping[int, bytes], count: int) -> bytes:
    """A shard of ``count`` places from the chunks at some of them."""
    there = sorted(chunks.items())
    return b"".join([*(data for _, data in there), index({place: len(data) for place, data in there}, count)])


def index(sizes: Mapping[int, int], count: int) -> bytes:
    """The end of a shard of ``count`` places whose chunks, by ascending place, are of these sizes."""
    places = np.full((count, 2), ABSENT, "<u8")
    offset = 0
    for place, size in sizes.items():
        places[place] = offset, size
        offset += size
    return places.tobytes() + _checksum(places.tobytes())


def unpack(shard: bytes, count: int) -> dict[int, bytes]:
    """Inverse of `pack`. ``ValueError`` if the index is damaged."""
    places = read_index(io.BytesIO(shard), count).tolist()
    return {place: shard[at : at + size] for place, (at, size) in enumerate(places) if at != ABSENT}


def read_index(shard: BinaryIO, count: int) -> npt.NDArray[np.uint64]:
    """Offset and length of each of a shard's ``count`` places: (count, 2). ``ValueError`` if it is damaged."""
    size = shard.seek(0, io.SEEK_END)
    shard.seek(max(0, size - (count * 16 + 4)))
    tail = shard.read()
    if len(tail) != count * 16 + 4 or _checksum(tail[:-4]) != tail[-4:]:
        raise ValueError("lies in a shard whose index is damaged")  # the subject is a chunk
    return np.frombuffer(tail[:-4], "<u8").reshape(count, 2)


def read_chunk(array: Path, split: SplitSpec, number: int, ndim: int) -> bytes | None:
    """Encoded bytes of a chunk, from its file or its shard; None if there are none.

    Raises ``ValueError`` for a shard whose index is damaged.
    """
    count = split.shard_chunks
    try:
        if not count:
            return chunk_path(array, number, ndim).read_bytes()
        with chunk_path(array, number // count, ndim).open("rb") as file:
            at, length = read_index(file, count)[number % count].tolist()
            if at == ABSENT:
                return None
            file.seek(at)
            return file.read(length)
    except FileNotFoundError:
        return None


def _checksum(places: bytes) -> bytes:
    return int(google_crc32c.value(places)).to_bytes(4, "little")
