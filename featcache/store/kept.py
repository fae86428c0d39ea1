"""What has been computed of a split and is kept beside it: JSON, found again as long as the split holds the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from featcache.errors import DataError
from featcache.store.durable import write_durably


class Kept:
    """Values by key, in one file of a split's folder, all made by code of one ``version`` of what the split holds.

    ``Kept(split.path, "references", version)``. Those of another version are not found, and go when one is added. A
    store that cannot be written keeps nothing.
    """

    def __init__(self, folder: Path, name: str, version: str) -> None:
        self._path, self._version = folder / f"{name}.json", version

    def get(self, key: str) -> Any | None:
        """The value, or None."""
        return self._read().get(key)

    def add(self, key: str, value: Any) -> None:
        """Add a value that JSON can hold, or put it in place of the one that was there."""
        found = {"version": self._version, "values": self._read() | {key: value}}
        try:
            write_durably(self._path, json.dumps(found, indent=1).encode(), synced=False)
        except DataError:
            return  # it is computed again next time

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_bytes())
            values: dict[str, Any] = found["values"] if found["version"] == self._version else {}
        except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: it is computed again
            return {}
        return values if isinstance(values, dict) else {}
