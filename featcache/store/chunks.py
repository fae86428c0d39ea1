"""Videos' chunks on the disk: each in a file, or many together in a shard.

Chunks are encoded here rather than through zarr-python because zarr-python does not sync, and because the bytes that
are checked are then the bytes that are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy.typing as npt

from featcache.sources.video import Video
from featcache.store import manifest, shards
from featcache.store.durable import sync_directory, write_durably
from featcache.store.encoding import ENCODINGS, Stored
from featcache.store.layout import ArrayLayout, array_layouts, chunk_numbers, chunk_path
from featcache.store.spec import SplitSpec, StoreSpec

Arrays = Mapping[str, npt.NDArray[Any]]  # one video's rows as stored, by array


@dataclass(frozen=True)
class Encoded:
    """One video as it will lie on the disk: its manifest row, and by array the bytes of its chunks in order."""

    row: manifest.Row
    chunks: Mapping[str, Sequence[bytes]]


def write_chunks(
    path: Path, store: StoreSpec, split: SplitSpec, index: int, video: Video, tokens: Mapping[str, Stored]
) -> manifest.Row:
    """Make one video's chunks durable in the split at ``path``, and return its manifest row.

    ``tokens`` maps each tap to its tokens in the store's form (`featcache.store.encoding`). Any process may call this;
    only the one with the store's lock may append the row. Raises ``DataError`` when the disk is full; the videos
    finished before stay. Not for shards, which several videos share: see `OpenShard`.
    """
    return write_arrays(path, store, split, *_video_arrays(store, split, index, video, tokens))


def encoded_video(
    store: StoreSpec, split: SplitSpec, index: int, video: Video, tokens: Mapping[str, Stored]
) -> Encoded:
    """What `write_chunks` would write, for a shard."""
    return encoded(store, split, *_video_arrays(store, split, index, video, tokens))


def write_arrays(path: Path, store: StoreSpec, split: SplitSpec, row: manifest.Row, arrays: Arrays) -> manifest.Row:
    """`write_chunks` of a video whose rows are already in the store's form; ``row`` lacks only the checksums."""
    assert not split.shard_chunks, "several videos share a shard: only `OpenShard` fills them"
    crc32c = {}
    for layout in array_layouts(store, split):
        sums = []
        for number, data in zip(
            chunk_numbers(split, row.video), _chunks(layout, split, row.video, arrays[layout.name]), strict=True
        ):
            write_durably(chunk_path(path / layout.name, number, layout.ndim), data)
            sums.append(google_crc32c.value(data))
        crc32c[layout.name] = tuple(sums)
        sync_directory(path / layout.name)
    return replace(row, crc32c=crc32c)


def encoded(store: StoreSpec, split: SplitSpec, row: manifest.Row, arrays: Arrays) -> Encoded:
    """A video whose rows are already in the store's form; ``row`` lacks only the checksums."""
    chunks = {
        layout.name: list(_chunks(layout, split, row.video, arrays[layout.name]))
        for layout in array_layouts(store, split)
    }
    crc32c = {name: tuple(google_crc32c.value(data) for data in parts) for name, parts in chunks.items()}
    return Encoded(replace(row, crc32c=crc32c), chunks)


def _video_arrays(
    store: StoreSpec, split: SplitSpec, index: int, video: Video, tokens: Mapping[str, Stored]
) -> tuple[manifest.Row, Arrays]:
    arrays: dict[str, npt.NDArray[Any]] = {"video": video.frames}
    if split.masks:
        assert video.segmentations is not None
        arrays["segmentations"] = video.segmentations
    if split.ignored:
        arrays["ignored"] = video.ignored
    for array in ENCODINGS[store.dtype].arrays:
        arrays |= {array.path(tap): stored[array.folder].cpu().numpy() for tap, stored in tokens.items()}
    fingerprint = split.fingerprints[index] if split.fingerprints else ""
    return manifest.Row(index, video.id, len(video.frames), {}, video.instances, fingerprint), arrays


def _chunks(layout: ArrayLayout, split: SplitSpec, video: int, values: npt.NDArray[Any]) -> Iterable[bytes]:
    """Encoded bytes of the chunks of one video's rows."""
    assert len(values) == split.lengths[video], (layout.name, video, len(values))
    frames = split.chunk_frames
    for place in range(len(chunk_numbers(split, video))):
        yield layout.encode(values[place * frames : (place + 1) * frames], frames)


class OpenShard:
    """The shard that is being filled, the same one of every array, and the videos that wait for it.

    Videos come in ascending order. What another run, or an earlier video, left in a shard stays there. Any process may
    fill shards, if no other one fills the same.
    """

    def __init__(self, path: Path, store: StoreSpec, split: SplitSpec) -> None:
        self._path, self._split, self._layouts = path, split, array_layouts(store, split)
        self._number: int | None = None
        self._chunks: dict[str, dict[int, bytes]] = {}
        self._waiting: list[manifest.Row] = []

    def put(self, video: Encoded) -> list[manifest.Row]:
        """Add a video; return the rows that became durable on the way."""
        finished: list[manifest.Row] = []
        for place, chunk in enumerate(chunk_numbers(self._split, video.row.video)):
            number, within = divmod(chunk, self._split.shard_chunks)
            if number != self._number:
                finished += self.flush()
                self._open(number)
            for name, chunks in video.chunks.items():
                self._chunks[name][within] = chunks[place]
        self._waiting.append(video.row)
        return finished

    def flush(self) -> list[manifest.Row]:
        """Write the open shard; return the rows that became durable. ``DataError`` when the disk is full."""
        if self._number is None:
            return []
        for layout in self._layouts:
            folder = self._path / layout.name
            data = shards.pack(self._chunks[layout.name], self._split.shard_chunks)
            write_durably(chunk_path(folder, self._number, layout.ndim), data)
            sync_directory(folder)
        finished, self._waiting, self._number = self._waiting, [], None
        return finished

    def _open(self, number: int) -> None:
        self._number = number
        for layout in self._layouts:
            file = chunk_path(self._path / layout.name, number, layout.ndim)
            try:
                self._chunks[layout.name] = shards.unpack(file.read_bytes(), self._split.shard_chunks)
            except (FileNotFoundError, ValueError):
                self._chunks[layout.name] = {}
