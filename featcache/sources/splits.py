"""Names of splits, and checks that a split or a video exists."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from featcache.errors import DataError, UsageError

SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


def check_split(location: str, split: str, known: Collection[str]) -> None:
    """``UsageError`` unless the split is known."""
    if split not in known:
        raise UsageError(f"{location}: no split {split!r}; it has: {', '.join(known)}")


def check_index(location: str, split: str, index: int, videos: int) -> None:
    """``UsageError`` unless a split of ``videos`` videos has one at ``index``."""
    if not 0 <= index < videos:
        raise UsageError(f"{location}: no video {index} in {split}; it has 0..{videos - 1}")


def split_folders(names: Iterable[str], where: str) -> dict[str, str]:
    """The names that are splits: canonical split name -> given name, in the usual order.

    ``DataError`` if two names mean the same split.
    """
    found: dict[str, str] = {}
    for name in names:
        if split := SPLIT_NAMES.get(name.lower()):
            if split in found:
                raise DataError(f"{where}: both {found[split]} and {name} mean split {split}; rename one")
            found[split] = name
    return {split: found[split] for split in dict.fromkeys(SPLIT_NAMES.values()) if split in found}
