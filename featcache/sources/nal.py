"""Whether a packet of H.264 or HEVC holds zeros where none can be: FFmpeg reads over some of them without a word.

A unit of these formats (H.264, 7.4.1; HEVC, 7.4.2) has three zero bytes in a row at its end alone. Zeros in its middle
are a hole: a part of the file that was never written, or lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

CODECS = frozenset(("h264", "hevc"))
HOLE = re.compile(rb"\0\0\0+[^\0\1]")


def has_hole(packet: bytes, extradata: bytes | None, codec: str) -> bool:
    """``extradata`` is the stream's: it says whether units begin with 0 0 1, or with their lengths."""
    return any(HOLE.search(unit) for unit in _units(packet, extradata or b"", codec))


def _units(packet: bytes, extradata: bytes, codec: str) -> Iterator[bytes]:
    """The units of a packet; with start codes, all as one."""
    place = 4 if codec == "h264" else 21  # of the number of bytes of a length, less one
    if extradata[:1] != b"\1" or len(extradata) <= place:
        yield packet
        return
    size, at = (extradata[place] & 3) + 1, 0
    while at + size < len(packet):
        begin = at + size
        at = begin + int.from_bytes(packet[at:begin], "big")
        yield packet[begin:at]
