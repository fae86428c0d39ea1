"""TFRecords in one gzip stream, with random access: the stream is read through once, and places in it are kept.

zlib can go on from any place where its state was copied, which takes 40 KB. One such place is kept for every
``STRIDE`` bytes, and one behind the last record that was read, so that reading in order unpacks everything once.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from featcache.errors import DataError
from featcache.sources.tfrecord import FOOTER, HEADER, masked_crc

STRIDE = 1 << 28  # bytes of the unpacked stream
PACKED, UNPACKED = 1 << 14, 1 << 20  # bytes that are read and unpacked at a time
GZIP = 31  # zlib's word for a stream with gzip's header


@dataclass
class _State:
    """A place in the stream, between two bytes."""

    inflate: Any = field(default_factory=lambda: zlib.decompressobj(GZIP))
    packed: int = 0  # bytes of the file that are used up
    unpacked: int = 0
    record: int = 0  # the next one, where the place is between two records

    def copy(self) -> _State:
        return _State(self.inflate.copy(), self.packed, self.unpacked, self.record)

    def take(self, file: BinaryIO, count: int) -> Iterator[bytes]:
        """The next ``count`` bytes in parts; fewer where the stream ends."""
        while count and not self.inflate.eof:
            file.seek(self.packed)
            data = file.read(PACKED)
            part = self.inflate.decompress(data, min(count, UNPACKED))
            if not part and not data:
                return
            self.packed += len(data) - len(self.inflate.unconsumed_tail) - len(self.inflate.unused_data)
            self.unpacked += len(part)
            count -= len(part)
            yield part


class GzipRecords:
    """The records of one file. Threads share it; each read opens the file anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: list[_State] = []  # in rising order of records
        self._last: _State | None = None  # behind the last record that was read
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # zlib's states cannot be sent

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def walk(self) -> Iterator[tuple[bytes, int]]:
        """Every record's data and stored checksum, in order. ``DataError`` where the file is damaged or cut off."""
        state = _State()
        kept = [state.copy()]
        with self._open() as file:
            while (record := self._next(state, file)) is not None:
                if state.unpacked - kept[-1].unpacked >= STRIDE:
                    kept.append(state.copy())
                yield record
        with self._lock:
            self._kept = kept

    def read(self, record: int) -> bytes:
        """Data of one record. ``DataError`` when its checksum does not match."""
        with self._lock:
            if not self._kept:
                self._kept = [_State()]
            places = [*self._kept, *([self._last] if self._last else [])]
            state = max((place for place in places if place.record <= record), key=lambda place: place.record).copy()
        with self._open() as file:
            found: tuple[bytes, int] | None = (b"", 0)
            while found and state.record <= record:
                found = self._next(state, file)
        if not found:
            self._damaged(state, "the file ends before it")
        data, crc = found
        if masked_crc(data) != crc:
            self._damaged(state, "the data's checksum does not match")
        with self._lock:
            self._last = state
        return data

    def _next(self, state: _State, file: BinaryIO) -> tuple[bytes, int] | None:
        """The record behind a place, which moves on; None at the end of the stream."""
        try:
            header = b"".join(state.take(file, HEADER.size))
            if not header and state.inflate.eof:
                return None
            if len(header) < HEADER.size:
                self._damaged(state, "the file ends early")
            length, crc = HEADER.unpack(header)
            if masked_crc(header[:8]) != crc:
                self._damaged(state, "the header's checksum does not match")
            data = b"".join(state.take(file, length + FOOTER.size))
        except zlib.error as error:
            self._damaged(state, str(error))
        if len(data) < length + FOOTER.size:
            self._damaged(state, "the file ends early")
        state.record += 1
        return data[:length], FOOTER.unpack(data[length:])[0]

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}; check the path and its permissions") from error

    def _damaged(self, state: _State, what: str) -> NoReturn:
        raise DataError(
            f"{self.path}: record {state.record} is damaged, at byte {state.packed} of the file: {what}; copy or "
            "download this file again"
        )
