"""Whether the tables of an mp4 or mov file hold what they promise: FFmpeg takes what is there, without a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

OF_BOXES = frozenset((b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"))
# Tables of a track (ISO/IEC 14496-12, 8.6 and 8.7): where their count lies behind the box's head, bytes of an entry.
TABLES = {b"stts": (4, 8), b"ctts": (4, 8), b"stss": (4, 4), b"stsc": (4, 12), b"stco": (4, 4), b"co64": (4, 8)}
TABLES |= {b"stsz": (8, 4)}  # none where all samples have one size


def broken_table(path: Path) -> str:
    """What is wrong with the first table that promises more entries than its box has room for; empty if all hold."""
    for kind, data in _boxes(_moov(path)):
        at, entry = TABLES.get(kind, (0, 0))
        same_size = kind == b"stsz" and any(data[4:8])
        if at and not same_size:
            promised, held = int.from_bytes(data[at : at + 4], "big"), (len(data) - at - 4) // entry
            if promised > held:
                return f"its table {kind.decode()} has {max(held, 0)} of {promised} entries"
    return ""


def _moov(path: Path) -> bytes:
    """The box of the tracks; empty if there is none at the top."""
    with path.open("rb") as file:
        at = 0
        while len(head := file.read(16)) >= 8:
            size = int.from_bytes(head[:4], "big")
            if size == 1:  # a large box
                size = int.from_bytes(head[8:16], "big")
            if head[4:8] == b"moov":
                file.seek(at)
                return file.read(size or -1)
            if size < 8:  # the last box, or none
                return b""
            at += size
            file.seek(at)
    return b""


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of all boxes that hold no others, at any depth."""
    at = 0
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size < 8:
            return
        if kind in OF_BOXES:
            yield from _boxes(data[at + 8 : at + size])
        else:
            yield kind, data[at + 8 : at + size]
        at += size
