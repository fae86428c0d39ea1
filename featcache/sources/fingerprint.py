"""Short hashes that change when files do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

BLOCK, BLOCKS = 1 << 16, 16  # a larger file is fingerprinted by this many evenly spaced blocks


def digest(parts: Iterable[bytes | str]) -> str:
    """Short hash of a sequence. Lengths are hashed too, so that the same bytes in other parts hash differently."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "little"))
        hashed.update(data)
    return hashed.hexdigest()[:16]


def file_digest(path: Path) -> bytes:
    """Hash of size and content; of evenly spaced blocks if the file is over 1 MiB.

    Times are left out, so that a copy of the files keeps its fingerprint.
    """
    size = path.stat().st_size
    hashed = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb", buffering=0) as file:
        if size <= BLOCK * BLOCKS:
            hashed.update(file.readall())
        else:
            for block in range(BLOCKS):
                file.seek((size - BLOCK) * block // (BLOCKS - 1))
                hashed.update(file.read(BLOCK))
    return hashed.digest()
