"""The record that every data source returns, and the interface that extraction uses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from featcache.sources.fingerprint import digest

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Instance:
    """One object of a video. Labels are the data set's words; an unknown label is the empty string."""

    shape: str = ""
    size: str = ""
    color: str = ""
    material: str = ""
    visibility: tuple[int, ...] = ()  # pixels of the object in each frame
    category: str = ""


@dataclass(frozen=True)
class Video:
    """Consecutive frames with their ground truth.

    ``segmentations`` holds 0 for the background and ``k`` for ``instances[k - 1]``; it is ``None`` where the
    source has no masks. ``ignore`` marks pixels whose truth is not known: 0 in ``segmentations``, and no background.
    ``labelled`` marks the frames whose masks are known, where some are not. ``ignored`` is both together.
    """

    id: str
    frames: npt.NDArray[np.uint8]  # (T, H, W, 3)
    segmentations: npt.NDArray[np.uint8] | None = None  # (T, H, W)
    instances: tuple[Instance, ...] = field(default=())
    ignore: npt.NDArray[np.bool_] | None = None  # (T, H, W)
    labelled: npt.NDArray[np.bool_] | None = None  # (T,); None if all are, or if there are no masks

    def __post_init__(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"frames must be uint8 (T, H, W, 3), not {self.frames.dtype} {self.frames.shape}")
        if self.segmentations is not None and self.segmentations.shape != self.frames.shape[:3]:
            raise ValueError(f"segmentations {self.segmentations.shape} do not match frames {self.frames.shape}")
        if self.ignore is not None and (self.segmentations is None or self.ignore.shape != self.segmentations.shape):
            raise ValueError(f"ignored pixels {self.ignore.shape} do not match masks")
        if self.labelled is not None and self.labelled.shape != self.frames.shape[:1]:
            raise ValueError(f"{self.labelled.shape} labelled frames do not match frames {self.frames.shape}")

    @property
    def ignored(self) -> npt.NDArray[np.bool_]:
        """Pixels whose truth is not known (T, H, W); in a frame that is not labelled, all of them."""
        ignored = np.zeros(self.frames.shape[:3], bool) if self.ignore is None else self.ignore.copy()
        if self.labelled is not None:
            ignored[~self.labelled] = True
        return ignored


class Source(Protocol):
    """Videos with random access, so that extraction can resume, repair and spread over workers.

    Implementations are safe to call from several threads and cheap to open again in another process.
    """

    location: str  # ``open_source(location)`` opens the same source again
    edition: str = ""  # of a data set that comes in several: its year, variant or letter
    views: int = 1  # of each training frame, which follow each other (featcache.sources.views)

    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, for example ``("train", "validation")``."""

    def usual_splits(self) -> tuple[str, ...]:
        """Those that are read where none is named: others repeat their videos, as trainval those of train and val."""
        return self.splits()

    @abstractmethod
    def lengths(self, split: str) -> Sequence[int]:
        """Number of frames of each video, in order, without decoding any."""

    @abstractmethod
    def fingerprints(self, split: str) -> Sequence[str]:
        """Short hash of each video, in order, that changes when its files do, but not with their names and places."""

    @abstractmethod
    def read(self, split: str, index: int) -> Video:
        """Decode one video. Raises ``DataError`` naming file, record and remedy when it is damaged."""

    def read_smaller(self, split: str, index: int, shrink: float) -> Video:
        """:meth:`read`, but frames and masks may have sides up to ``shrink`` times smaller where that is cheaper."""
        return self.read(split, index)

    def names(self, split: str) -> Sequence[str]:
        """What to call each video, in order: one name a video, by which it is known when its files have changed."""
        return tuple(f"{split}_{index:05d}" for index in range(self.videos(split)))

    def fingerprint(self, split: str) -> str:
        """Short hash that changes when a split's videos do."""
        return digest((*self.names(split), *self.fingerprints(split)))

    def videos(self, split: str) -> int:
        """Number of videos, known even where one is damaged."""
        return len(self.lengths(split))

    def size(self, split: str, index: int) -> Size | None:
        """Height and width of a video's frames from headers alone; None if these do not say.

        Raises ``DataError`` if its frames or masks cannot have one size.
        """
        return None

    def where(self, split: str, index: int) -> str:
        """The name of a video in errors."""
        return f"{self.location}: {split} video {index}"

    def remarks(self, split: str) -> Sequence[str]:
        """Warnings about a split, one line each, on files that may not mean what they seem to.

        Found without decoding any frame.
        """
        return ()

    def left_out(self) -> Mapping[str, int]:
        """Number of files of unknown kinds, by suffix; they are not read."""
        return {}

    def question(self) -> str:
        """What the user must decide before the source is first read, and the option for it; empty if nothing."""
        return ""

    def damaged(self, split: str) -> Mapping[str, str]:
        """What is wrong with each of the videos that were left out for being damaged, by name."""
        return {}
