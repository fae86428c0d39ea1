"""A source without its damaged videos."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from featcache.errors import DataError
from featcache.sources.splits import check_index
from featcache.sources.video import Size, Source, Video
from featcache.sources.wrapped import Wrapped
from featcache.text import printable

logger = logging.getLogger(__name__)

READERS = 2
SHRINK = 8.0  # the frames are not kept, and a size is no damage


class SoundVideos(Wrapped):
    """The readable videos of a source. All videos of a split are read once, when the split is first used."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._sound: dict[str, dict[int, int]] = {}  # split -> position in the source -> frames
        self._damaged: dict[str, dict[str, str]] = {}  # split -> name -> what is wrong

    def videos(self, split: str) -> int:
        return len(self._look(split))

    def lengths(self, split: str) -> Sequence[int]:
        return tuple(self._look(split).values())

    def fingerprints(self, split: str) -> Sequence[str]:
        return self._of_sound(split, self._source.fingerprints(split))

    def names(self, split: str) -> Sequence[str]:
        return self._of_sound(split, self._source.names(split))

    def size(self, split: str, index: int) -> Size | None:
        return self._source.size(split, tuple(self._look(split))[index])

    def where(self, split: str, index: int) -> str:
        return self._source.where(split, tuple(self._look(split))[index])

    def damaged(self, split: str) -> Mapping[str, str]:
        self._look(split)
        return self._damaged[split]

    def read_smaller(self, split: str, index: int, shrink: float) -> Video:
        sound = tuple(self._look(split))
        check_index(self.location, split, index, len(sound))
        return self._source.read_smaller(split, sound[index], shrink)

    def _of_sound(self, split: str, values: Sequence[str]) -> tuple[str, ...]:
        return tuple(values[index] for index in self._look(split))

    def _look(self, split: str) -> dict[int, int]:
        """Frames of each sound video, by its position in the source. ``DataError`` if no video is sound."""
        if split in self._sound:
            return self._sound[split]
        logger.warning("%s: reading every video of %s once, to find the damaged ones", printable(self.location), split)
        with ThreadPoolExecutor(READERS, "look") as readers:
            found = list(readers.map(lambda index: self._frames(split, index), range(self._source.videos(split))))
        names = self._source.names(split)
        damaged = {names[index]: why for index, why in enumerate(found) if isinstance(why, str)}
        sound = {index: frames for index, frames in enumerate(found) if isinstance(frames, int)}
        if not sound:
            raise DataError(
                f"{self.location}: every video of {split} is damaged; the first: {next(iter(damaged.values()))}"
            )
        self._sound[split], self._damaged[split] = sound, damaged
        return sound

    def _frames(self, split: str, index: int) -> int | str:
        """Number of frames of a video, or the error that it cannot be read for."""
        try:
            return len(self._source.read_smaller(split, index, SHRINK).frames)
        except DataError as error:
            return str(error)
