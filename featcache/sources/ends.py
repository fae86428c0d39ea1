"""Whether a file whose header does not say how long it is ends where one of its own units does.

FFmpeg drops what is left over without a word: half a packet of a transport stream, half a frame of raw video.
"""

from __future__ import annotations

from pathlib import Path

SYNC, TS_PACKET = 0x47, 188  # first byte of a packet of a transport stream, and its bytes (ISO/IEC 13818-1, 2.4.3)
SPACINGS = (TS_PACKET, 192, 204)  # bytes from a packet to the next: with a time before it (m2ts), or parity behind it
PACKETS = 10  # so many in a row are no accident
LAST_PAGE = 4  # a flag of an Ogg page (RFC 3533, 6)


def unfinished(path: Path, container: str, end: int) -> str:
    """What is cut off at the end of a file, or empty. ``end`` is where the data of its last frame end."""
    if container == "mpegts":
        return _transport_stream(path)
    if container == "ogg":
        return _ogg(path)
    if container == "yuv4mpegpipe" and end < path.stat().st_size:
        return "its last frame is cut off"
    return ""


def _transport_stream(path: Path) -> str:
    """The packets at the end tell where they begin: those at the start may be of another recording."""
    tail = _tail(path, PACKETS * SPACINGS[-1])
    for spacing in SPACINGS:
        for first in range(min(spacing, len(tail))):
            begins = range(first, len(tail), spacing)
            if len(begins) >= min(PACKETS, len(tail) // spacing) and all(tail[at] == SYNC for at in begins):
                whole = spacing if spacing == 204 else TS_PACKET
                return "" if len(tail) - begins[-1] == whole else "its last packet is cut off"
    return ""


def _ogg(path: Path) -> str:
    """Each stream's last page says so; a page is a head of 27 bytes, the lengths of its segments, and these."""
    tail = _tail(path, 1 << 17)  # a page is shorter than half of that
    at = tail.rfind(b"OggS")
    page = tail[at:] if at >= 0 else b""
    if len(page) < 27 or len(page) != 27 + page[26] + sum(page[27 : 27 + page[26]]):
        return "its last page is cut off"
    return "" if page[5] & LAST_PAGE else "its last page is missing"


def _tail(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read()
