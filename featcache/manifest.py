"""The list of finished videos: the only thing that says a video is in the store.

One JSON object a line. A row is appended, and synced, only after every chunk of its video is durable, so a
row is always true; a line torn by a crash is dropped on the next open. Of two rows for one video (a repair)
the later one counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from featcache.errors import DataError
from featcache.sources.base import Instance

NAME = "manifest.jsonl"


@dataclass(frozen=True)
class Row:
    """One finished video."""

    video: int  # position in the source's split
    id: str
    frames: int
    crc32c: Mapping[str, tuple[int, ...]]  # array path -> checksum of each of its chunk files
    instances: tuple[Instance, ...] = field(default=())

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Row:
        raw = json.loads(line)
        instances = tuple(Instance(**{**item, "visibility": tuple(item["visibility"])}) for item in raw["instances"])
        crc32c = {path: tuple(sums) for path, sums in raw["crc32c"].items()}
        return cls(raw["video"], raw["id"], raw["frames"], crc32c, instances)


def read(folder: Path) -> dict[int, Row]:
    """Finished videos of a split, by position. A last line without its newline was never promised."""
    path = folder / NAME
    if not path.exists():
        return {}
    rows: dict[int, Row] = {}
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = Row.from_json(line)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: line {number} is not a manifest row ({error}); delete that line and run extract again"
            ) from error
        rows[row.video] = row
    return dict(sorted(rows.items()))


class Appender:
    """Appends rows durably. Opening it cuts off a torn last line."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        size = os.fstat(self._fd).st_size
        whole = os.pread(self._fd, size, 0).rfind(b"\n") + 1
        if whole != size:
            os.ftruncate(self._fd, whole)
        os.lseek(self._fd, 0, os.SEEK_END)

    def append(self, row: Row) -> None:
        data = row.to_json().encode() + b"\n"
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
