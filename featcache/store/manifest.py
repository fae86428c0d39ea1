"""The list of finished videos: the only thing that says a video is in the store.

One JSON object a line. A row is appended, and synced, only after every chunk of its video is durable, so a
row is always true; a line torn by a crash is dropped on the next open. Of two rows for one video (a repair)
the later one counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from featcache.errors import DataError
from featcache.sources.video import Instance
from featcache.store.durable import Lines, write_tree

NAME = "manifest.jsonl"


@dataclass(frozen=True)
class Row:
    """One finished video."""

    video: int  # position in the split
    id: str
    frames: int
    crc32c: Mapping[str, tuple[int, ...]]  # array path -> checksum of the encoded bytes of each of its chunks
    instances: tuple[Instance, ...] = field(default=())
    fingerprint: str = ""  # of the files that it was made from; "" in stores of version 0.1

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> Row:
        raw = json.loads(line)
        instances = tuple(Instance(**{**item, "visibility": tuple(item["visibility"])}) for item in raw["instances"])
        crc32c = {path: tuple(sums) for path, sums in raw["crc32c"].items()}
        return cls(raw["video"], raw["id"], raw["frames"], crc32c, instances, raw.get("fingerprint", ""))


def read(folder: Path) -> dict[int, Row]:
    """Finished videos of a split, by position, without a torn last line. ``DataError`` for any other broken line."""
    rows, broken = scan(folder)
    for number, why in broken.items():
        raise DataError(
            f"{folder / NAME}: line {number} is not a manifest row ({why}); "
            f"run: slotlab verify --repair {folder.parent}"
        )
    return rows


def scan(folder: Path) -> tuple[dict[int, Row], dict[int, str]]:
    """Like `read`, but returns the broken lines (number -> reason) instead of raising."""
    path = folder / NAME
    if not path.exists():
        return {}, {}
    rows: dict[int, Row] = {}
    broken: dict[int, str] = {}
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = Row.from_json(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            broken[number] = str(error)
        else:
            rows[row.video] = row
    return dict(sorted(rows.items())), broken


def replace_rows(folder: Path, rows: Mapping[int, Row]) -> None:
    """Write the manifest anew, durably and in one step: for a repair, with the store's lock held."""
    write_tree(folder, {NAME: b"".join(row.to_json().encode() + b"\n" for row in rows.values())})


class Appender(Lines):
    """Appends rows durably. Opening it creates the manifest, or cuts off a torn last line."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / NAME)

    def append(self, row: Row) -> None:
        """Add a row; it is durable on return. ``DataError`` when the disk is full, with no part of it left."""
        self.add(row.to_json())
