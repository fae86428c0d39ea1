"""Parts a GIF file into its pictures.

FFmpeg's own parting joins pictures whose codes look like blocks (as those of noise do), and ends without a word at the
first block that it does not know.
"""

from __future__ import annotations

EXTENSION, IMAGE, TRAILER = 0x21, 0x2C, 0x3B


def pictures(data: bytes) -> list[bytes]:
    """A file's bytes by picture, each with the extensions before it, the first with the file's head.

    ``ValueError`` unless it is blocks from its head to its trailer, or to its end (GIF89a, W3C 1990, appendix A).
    """
    if data[:6] not in (b"GIF87a", b"GIF89a") or len(data) < 13:
        raise ValueError("it has no head")
    found, begin, at = [], 0, 13 + _colours(data[10])
    while at < len(data) and data[at] != TRAILER:
        if data[at] == EXTENSION:
            at = _behind_parts(data, at + 2)
        elif data[at] == IMAGE and at + 10 <= len(data):
            at = _behind_parts(data, at + 10 + _colours(data[at + 9]) + 1)  # a byte says how codes begin
            found.append(data[begin:at])
            begin = at
        else:
            break
    if at > len(data) or (at < len(data) and data[at] != TRAILER):
        raise ValueError("its blocks do not join up to its end")
    return found


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
