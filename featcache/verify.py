"""Checking a store against its manifest: every chunk file's checksum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from featcache.store import FeatureStore, Split
from featcache.writer import chunk_path


@dataclass(frozen=True)
class Damage:
    """One video that is not what the manifest promises."""

    split: str
    video: int
    id: str
    what: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def row(self) -> tuple[str, int, str, str]:
        return self.split, self.video, self.id, self.what


def verify(path: Path) -> list[Damage]:
    """Damaged videos of a store; an empty list says that every finished video is whole.

    Raises ``DataError`` when there is no store, or a manifest cannot be read.
    """
    store = FeatureStore.open(path)
    return [damage for name in store.splits for damage in _verify_split(store[name])]


def _verify_split(split: Split) -> Iterator[Damage]:
    for video, row in split.manifest.items():
        first = int(split.spec.starts[video]) // split.spec.chunk_frames
        for array, sums in row.crc32c.items():
            for number, expected in enumerate(sums):
                file = chunk_path(split.path / array, first + number, split.array(array).ndim)
                what = _problem(file, expected)
                if what:
                    yield Damage(split.name, video, row.id, f"{file.relative_to(split.store.path)} {what}")


def _problem(file: Path, expected: int) -> str | None:
    try:
        found = google_crc32c.value(file.read_bytes())
    except FileNotFoundError:
        return "is missing"
    return None if found == expected else f"has checksum {found:08x}, the manifest says {expected:08x}"
