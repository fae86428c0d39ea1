"""The embedded sample: it comes with the package, and lies in the repository or is packed in the wheel."""

from __future__ import annotations

from pathlib import Path

from featcache.errors import DataError, UsageError
from featcache.sources.movi import MoviSource
from featcache.sources.place import Layout, Place
from featcache.sources.reading import Reading
from featcache.sources.video import Source

NAME = "movi_a"


def sample_dir() -> Path:
    """Folder of the embedded sample. ``DataError`` where it is missing."""
    package = Path(__file__).resolve().parents[1]
    for root in (package.parent / "data" / NAME, package / "_sample" / NAME):
        if found := sorted(root.glob("*/*/features.json")):
            return found[-1].parent
    raise DataError(
        f"the embedded sample is missing beside {package}: run from a clone of the repository (data/{NAME}), "
        "reinstall the wheel, or name your own videos with --data"
    )


def _open(place: Place, reading: Reading) -> Source:
    if str(place.path) != NAME:
        raise UsageError(f"{place.location}: no such sample; there is sample:{NAME}")
    return MoviSource(sample_dir(), location=place.location, reading=reading)


LAYOUT = Layout("sample", "the embedded sample", lambda path: False, _open, local=False)
