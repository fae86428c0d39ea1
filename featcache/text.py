"""Text for people: names as they are shown, names of files, and sizes.

A file may be called by any bytes but two. Python holds those that are no UTF-8 as lone surrogates, which no page, table
or terminal takes, and a name may break a line or turn the direction of reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Control characters, line and paragraph separators, marks that turn the direction of reading, lone surrogates.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_KEPT = "\n\t"
_LONGEST = 120, 200  # characters and bytes of a file's name, which may have 255 bytes with its suffix


def printable(text: str, lines: bool = False) -> str:
    r"""Text that every terminal, page and file can hold, on one line: what is not seen becomes an escape, as ``\n`` and
    ``\xff`` (a byte that is no UTF-8). With ``lines``, line breaks and tabs stay."""
    return _UNSEEN.sub(lambda found: found[0] if lines and found[0] in _KEPT else _escape(found[0]), text)


def _escape(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte, as `os.fsdecode` holds it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def file_name(name: str) -> str:
    """A name that any file system accepts as one part of a path, the same for the same name."""
    kept = re.sub(r"[^\w.,=+-]+", "_", name)
    characters, size = _LONGEST
    if len(kept) > characters or len(kept.encode()) > size:
        import hashlib  # inside: OpenSSL takes longer to load than the rest of this file

        mark = hashlib.sha256(kept.encode()).hexdigest()[:8]
        kept = f"{kept[:characters].encode()[:size].decode(errors='ignore')}-{mark}"
    return kept


@contextmanager
def in_utf8(path: Path) -> Iterator[str]:
    """The name of a file for libraries that take UTF-8 alone: its own, or that of an open descriptor of it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield str(path)


def bytes_text(count: float) -> str:
    """A number of bytes in GB, or in MB where it is less than one."""
    return f"{count / 1e9:.1f} GB" if count >= 999.5e6 else f"{count / 1e6:.3g} MB"
