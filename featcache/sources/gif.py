"""Whether a GIF file is whole: FFmpeg ends without a word at the first block that it does not know."""

from __future__ import annotations

from pathlib import Path

EXTENSION, IMAGE, TRAILER = 0x21, 0x2C, 0x3B


def whole(path: Path) -> bool:
    """Whether a file is GIF blocks from its head to its trailer, or to its end (GIF89a, W3C 1990, appendix A)."""
    data = path.read_bytes()
    if data[:6] not in (b"GIF87a", b"GIF89a") or len(data) < 13:
        return False
    at = 13 + _colours(data[10])
    while at < len(data):
        kind = data[at]
        if kind == TRAILER:
            return True
        if kind == EXTENSION:
            at = _behind_parts(data, at + 2)
        elif kind == IMAGE and at + 10 <= len(data):
            at = _behind_parts(data, at + 10 + _colours(data[at + 9]) + 1)  # a byte says how codes begin
        else:
            return False
    return at == len(data)


def _colours(packed: int) -> int:
    """Bytes of the table of colours that a head announces."""
    return 3 << ((packed & 7) + 1) if packed & 0x80 else 0


def _behind_parts(data: bytes, at: int) -> int:
    """Where a chain of parts ends, each behind its length, the last one empty; beyond the data if it is cut off."""
    while at < len(data):
        length = data[at]
        at += 1 + length
        if not length:
            return at
    return len(data) + 1
