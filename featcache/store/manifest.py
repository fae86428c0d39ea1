"""The list of finished videos: the only thing that says a video is in the store.

One JSON object a line. A row is appended, and synced, only after every chunk of its video is durable, so a
row is always true; a line torn by a crash is dropped on the next open. Of two rows for one video (a repair)
the later one counts. Videos of one shard are appended together.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
        return json.dumps(vars(self), default=vars, separators=(",", ":"))  # asdict takes ten times as long

    @classmethod
    def from_json(cls, line: str | bytes) -> Row:
        raw = json.loads(line)
        for item in raw["instances"]:
            item["visibility"] = tuple(item["visibility"])
        instances = tuple(Instance(**item) for item in raw["instances"])
        crc32c = {path: tuple(sums) for path, sums in raw["crc32c"].items()}
        return cls(raw["video"], raw["id"], raw["frames"], crc32c, instances, raw.get("fingerprint", ""))


class Rows(Mapping[int, Row]):
    """Finished videos of a split, by position. A row is parsed when it is asked for: many are never.

    ``DataError`` when it is then found to be broken.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        lines: dict[int, tuple[int, bytes]] = {}  # by video: the number of its line, and the line
        for number, line in enumerate(_lines(folder), start=1):
            start = _START.match(line)
            video = int(start[1]) if start and line.endswith(b"}") else self._parsed(number, line).video
            lines[video] = number, line
        self._lines = dict(sorted(lines.items()))

    def _parsed(self, number: int, line: bytes) -> Row:
        try:
            return Row.from_json(line)
        except _BROKEN as error:
            raise DataError(
                f"{self._folder / NAME}: line {number} is not a manifest row ({error}); "
                f"run: slotlab verify --repair {self._folder.parent}"
            ) from error

    def ids(self) -> dict[int, str]:
        """The name of each video, read from the beginning of its row."""
        starts = {video: _NAMED.match(line) for video, (_, line) in self._lines.items()}
        return {video: json.loads(start[1]) if start else self[video].id for video, start in starts.items()}

    def digest(self) -> str:
        """A hash of all rows, and so of the checksums of all that is stored of their videos."""
        found = hashlib.sha256()
        for _, line in self._lines.values():
            found.update(line)
        return found.hexdigest()

    def most_instances(self) -> int:
        """The most instances that a video has; 0 without videos."""
        return max((line.count(_INSTANCE) for _, line in self._lines.values()), default=0)

    def __getitem__(self, video: int) -> Row:
        return self._parsed(*self._lines[video])

    def __iter__(self) -> Iterator[int]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, video: object) -> bool:
        return video in self._lines


_START = re.compile(rb'\{"video":(\d+),')
_NAMED = re.compile(rb'\{"video":\d+,"id":("(?:[^"\\]|\\.)*"),')
_INSTANCE = b'"visibility":'  # the key that each instance has; in a name its quotes would be escaped
_BROKEN = (ValueError, KeyError, TypeError, AttributeError)


def read(folder: Path) -> Rows:
    """Finished videos of a split, without a torn last line. ``DataError`` for a line that cannot be a row."""
    return Rows(folder)


def scan(folder: Path) -> tuple[dict[int, Row], dict[int, str]]:
    """Like `read`, but parses every line, and returns the broken ones (number -> reason) instead of raising."""
    rows: dict[int, Row] = {}
    broken: dict[int, str] = {}
    for number, line in enumerate(_lines(folder), start=1):
        try:
            row = Row.from_json(line)
        except _BROKEN as error:
            broken[number] = str(error)
        else:
            rows[row.video] = row
    return dict(sorted(rows.items())), broken


def _lines(folder: Path) -> list[bytes]:
    """The lines of a manifest, without a torn last one; none where there is no manifest."""
    path = folder / NAME
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def replace_rows(folder: Path, rows: Mapping[int, Row]) -> None:
    """Write the manifest anew, durably and in one step: for a repair, with the store's lock held."""
    write_tree(folder, {NAME: b"".join(row.to_json().encode() + b"\n" for row in rows.values())})


class Appender(Lines):
    """Appends rows durably. Opening it creates the manifest, or cuts off a torn last line."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / NAME)

    def append(self, *rows: Row) -> None:
        """Add rows; they are durable on return. ``DataError`` when the disk is full, with no part of them left."""
        self.add(*(row.to_json() for row in rows))
