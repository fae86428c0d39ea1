"""TFRecord files without TensorFlow: an index of the records, checked random access, and a writer.

A record is ``length`` (uint64), masked CRC32C of the length, ``data``, masked CRC32C of the data, all little
endian (tensorflow/core/lib/io/record_writer.h).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import NoReturn

import google_crc32c
import numpy as np
import numpy.typing as npt

from featcache.errors import DataError

HEADER = struct.Struct("<QI")  # length, its CRC
FOOTER = struct.Struct("<I")  # CRC of the data
OVERHEAD = HEADER.size + FOOTER.size


def masked_crc(data: bytes) -> int:
    """CRC32C, rotated and offset, because the CRC of data that contains CRCs is weak."""
    crc: int = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class TFRecordFile:
    """Index of one file. Every ``read`` opens the file anew, so that threads share no seek position."""

    path: Path
    offsets: npt.NDArray[np.int64]  # (N,) byte at which each record's header starts
    lengths: npt.NDArray[np.int64]  # (N,) bytes of each record's data
    crcs: npt.NDArray[np.uint32]  # (N,) stored CRC of each record's data

    @classmethod
    def open(cls, path: Path) -> TFRecordFile:
        """Walk the length headers (16 bytes are read a record). ``DataError`` for a damaged header or a short file."""
        offsets: list[int] = []
        lengths: list[int] = []
        crcs: list[int] = []
        try:
            size = path.stat().st_size
            with path.open("rb", buffering=0) as file:
                offset = 0
                while offset < size:
                    record = len(offsets)
                    header = file.read(HEADER.size)
                    if len(header) < HEADER.size:
                        _damaged(path, record, offset, f"the file ends {len(header)} bytes into the header")
                    length, crc = HEADER.unpack(header)
                    if masked_crc(header[:8]) != crc:
                        _damaged(path, record, offset, "the header's checksum does not match")
                    end = offset + OVERHEAD + length
                    if end > size:
                        _damaged(path, record, offset, f"the file ends {end - size} bytes early")
                    file.seek(end - FOOTER.size)
                    offsets.append(offset)
                    lengths.append(length)
                    crcs.append(FOOTER.unpack(file.read(FOOTER.size))[0])
                    offset = end
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; check the path and its permissions") from error
        return cls(path, np.array(offsets, np.int64), np.array(lengths, np.int64), np.array(crcs, np.uint32))

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, record: int) -> bytes:
        """Data of one record. ``DataError`` when its checksum does not match or the file has shrunk."""
        offset, length = int(self.offsets[record]), int(self.lengths[record])
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset + HEADER.size)
                data = _read_exactly(file, length)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}; check the path and its permissions") from error
        if len(data) < length:
            _damaged(self.path, record, offset, f"the file ends {length - len(data)} bytes early")
        if masked_crc(data) != self.crcs[record]:
            _damaged(self.path, record, offset, "the data's checksum does not match")
        return data


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """Write a file that ``TFRecordFile`` and TensorFlow read."""
    with path.open("wb") as file:
        for data in records:
            length = struct.pack("<Q", len(data))
            file.write(HEADER.pack(len(data), masked_crc(length)))
            file.write(data)
            file.write(FOOTER.pack(masked_crc(data)))


def _read_exactly(file: RawIOBase, size: int) -> bytes:
    """Read ``size`` bytes, or all that are left: an unbuffered read may return fewer, and always does beyond 2 GiB."""
    parts: list[bytes] = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _damaged(path: Path, record: int, offset: int, what: str) -> NoReturn:
    raise DataError(f"{path}: record {record} at byte {offset} is damaged: {what}; copy or download this file again")
