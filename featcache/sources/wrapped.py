"""A source as another one reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featcache.sources.video import Size, Source, Video


class Wrapped(Source):
    """All of another source; what is to be different, a subclass overrides."""

    def __init__(self, source: Source) -> None:
        self.location, self.edition, self.views = source.location, source.edition, source.views
        self._source = source

    def splits(self) -> tuple[str, ...]:
        return self._source.splits()

    def usual_splits(self) -> tuple[str, ...]:
        return self._source.usual_splits()

    def lengths(self, split: str) -> Sequence[int]:
        return self._source.lengths(split)

    def fingerprints(self, split: str) -> Sequence[str]:
        return self._source.fingerprints(split)

    def fingerprint(self, split: str) -> str:
        return self._source.fingerprint(split)

    def names(self, split: str) -> Sequence[str]:
        return self._source.names(split)

    def videos(self, split: str) -> int:
        return self._source.videos(split)

    def size(self, split: str, index: int) -> Size | None:
        return self._source.size(split, index)

    def where(self, split: str, index: int) -> str:
        return self._source.where(split, index)

    def remarks(self, split: str) -> Sequence[str]:
        return self._source.remarks(split)

    def left_out(self) -> Mapping[str, int]:
        return self._source.left_out()

    def question(self) -> str:
        return self._source.question()

    def damaged(self, split: str) -> Mapping[str, str]:
        return self._source.damaged(split)

    def read(self, split: str, index: int) -> Video:
        return self.read_smaller(split, index, 1.0)

    def read_smaller(self, split: str, index: int, shrink: float) -> Video:
        return self._source.read_smaller(split, index, shrink)
