"""Sources whose splits are lists that come with the data set: what published layouts share.

Their annotations count pixels as the files store them, so that pictures are not turned by their EXIF tags.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.sources.clips import read_bytes
from featcache.sources.fingerprint import digest, file_digest
from featcache.sources.images import decode_image, one_size, read_header, size_text, stack
from featcache.sources.masks import MaskPage, Masks, Numbers, as_mask, check_fit, counted, decode_mask, without_void
from featcache.sources.place import Place
from featcache.sources.reading import Reading
from featcache.sources.splits import check_index, check_split
from featcache.sources.video import Instance, Size, Source, Video

ORDER = ("train", "val", "valid", "validation", "test")
PARTIAL = "partial"  # the option that takes what is there of a list


@dataclass(frozen=True)
class Item:
    """One video of a list, before anything is decoded."""

    id: str
    frames: tuple[Path, ...]  # an image each, or one video file
    masks: tuple[Path | None, ...] = ()  # mask image of each frame, where truth comes so
    labelled: tuple[bool, ...] = ()  # frames whose truth is known; () is all, one value stands for all
    size: Size | None = None  # height and width by the annotations


@dataclass(frozen=True)
class Truth:
    """What is known of a video's pixels."""

    numbers: Numbers  # (T, H, W), 0 for the background
    objects: Sequence[Instance] = ()  # 1, 2, ... as far as they are known
    ignore: npt.NDArray[np.bool_] | None = None  # (T, H, W)
    labelled: npt.NDArray[np.bool_] | None = None  # (T,) where only the truth itself tells

    def instances(self) -> tuple[Instance, ...]:
        """Objects 1, 2, ... up to the last that is known or has a pixel, with their pixels in each frame."""
        more = int(self.numbers.max(initial=0)) - len(self.objects)
        return counted(self.numbers, [*self.objects, *[Instance()] * more])


def of_categories(names: Iterable[str]) -> list[Instance]:
    return [Instance(category=name) for name in names]


ItemT = TypeVar("ItemT", bound=Item)


class ListedSource(Source, Generic[ItemT]):
    """A source that knows its splits by name and finds the videos of each when it is first asked for them.

    A picture that a list names and that is not there is a ``DataError``, but with the option ``partial``.
    """

    def __init__(self, place: Place, reading: Reading, splits: Sequence[str], usual: Sequence[str] | None = None):
        """``usual`` are the splits that are read where none is named; None is all."""
        self.location = place.location
        self.place = place
        self.reading = reading
        self._splits = tuple(
            sorted(splits, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
        )
        self._usual = tuple(name for name in self._splits if usual is None or name in usual)
        self._items: dict[str, tuple[ItemT, ...]] = {}
        self._fingerprints: dict[str, tuple[str, ...]] = {}

    @abstractmethod
    def find(self, split: str) -> Sequence[ItemT]:
        """The videos of a split, in the order of its list; called once."""

    @abstractmethod
    def truth(self, split: str, item: ItemT, shape: tuple[int, int, int]) -> Truth:
        """What is known of an item's frames (T, H, W), at least one of which is labelled."""

    def written(self, item: ItemT) -> Iterator[bytes | str]:
        """What belongs to an item's fingerprint besides its files: annotations, and options that change the truth."""
        yield from ()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_items": {}}  # found again by another process, which costs less than sending it

    def splits(self) -> tuple[str, ...]:
        return self._splits

    def usual_splits(self) -> tuple[str, ...]:
        return self._usual

    def videos(self, split: str) -> int:
        return len(self.items(split))

    def lengths(self, split: str) -> Sequence[int]:
        return tuple(len(item.frames) for item in self.items(split))

    def items(self, split: str) -> tuple[ItemT, ...]:
        check_split(self.location, split, self._splits)
        if split not in self._items:
            found = tuple(self._there(split, self.find(split)))
            if not found:
                raise DataError(f"{self.location}: no video in split {split}; copy its list and its pictures again")
            self._items[split] = found
        return self._items[split]

    def item(self, split: str, index: int) -> ItemT:
        items = self.items(split)
        check_index(self.location, split, index, len(items))
        return items[index]

    def _there(self, split: str, items: Sequence[ItemT]) -> Iterator[ItemT]:
        missing = {item.id: path for item in items for path in item.frames[::-1] if not path.exists()}
        if missing and PARTIAL not in self.place.options:
            first = next(iter(missing.values()))
            sign = "&" if self.place.options else "?"
            raise DataError(
                f"{first}: no such file, but {split} names it, as {len(missing)} of {len(items)} that are not whole; "
                f"copy them, or write {self.location}{sign}{PARTIAL} to use those that are"
            )
        yield from (item for item in items if item.id not in missing)

    def where(self, split: str, index: int) -> str:
        item = self.item(split, index)
        return str(item.frames[0] if len(item.frames) == 1 else item.frames[0].parent)

    def size(self, split: str, index: int) -> Size | None:
        item = self.item(split, index)
        sizes = [read_header(path).size for path in item.frames]
        one_size(sizes, [str(path) for path in item.frames])
        if item.size and sizes[0] != item.size:
            raise DataError(
                f"{item.frames[0]}: is {size_text(sizes[0])}, but its annotations are for {size_text(item.size)}; "
                "copy the pictures and the annotations of one data set"
            )
        for path in filter(None, item.masks):
            check_fit((1, *sizes[0]), (1, *read_header(path).size), str(path))
        return sizes[0]

    def names(self, split: str) -> Sequence[str]:
        return tuple(item.id for item in self.items(split))

    def fingerprints(self, split: str) -> Sequence[str]:
        if split not in self._fingerprints:
            self._fingerprints[split] = tuple(digest(self._parts(item)) for item in self.items(split))
        return self._fingerprints[split]

    def _parts(self, item: ItemT) -> Iterator[bytes | str]:
        yield from (self.reading.of_masks(), str(item.labelled), *self.written(item))
        for path in (*item.frames, *filter(None, item.masks)):
            yield file_digest(path)

    def frames(self, item: ItemT, shrink: float = 1.0) -> npt.NDArray[np.uint8]:
        """All frames of an item (T, H, W, 3); the sides may be up to ``shrink`` times smaller."""
        names = [str(path) for path in item.frames]
        images = [decode_image(read_bytes(path), str(path), turn=False, shrink=shrink) for path in item.frames]
        return stack(images, names)

    def read(self, split: str, index: int) -> Video:
        return self.read_smaller(split, index, 1.0)

    def read_smaller(self, split: str, index: int, shrink: float) -> Video:
        item = self.item(split, index)
        frames = self.frames(item, shrink)
        if not self._has_truth(split):
            return Video(item.id, frames)
        shape = frames.shape[:3]
        if shrink > 1 or (item.size and item.size != shape[1:]):
            shape = shape[0], *(self.size(split, index) or shape[1:])
        known = any(item.labelled or (True,))
        truth = self.truth(split, item, shape) if known else Truth(np.zeros(shape, np.uint8))
        labelled = np.broadcast_to(item.labelled or (True,), shape[:1]) if truth.labelled is None else truth.labelled
        numbers, ignore = without_void(truth.numbers, self.reading.ignore_label)
        if truth.ignore is not None:
            ignore = truth.ignore if ignore is None else ignore | truth.ignore
        masks = Masks(numbers, ignore).resized((frames.shape[1], frames.shape[2]))
        return Video(
            item.id,
            frames,
            masks.numbers,
            replace(truth, numbers=masks.numbers).instances(),
            masks.ignore if masks.ignore is not None and masks.ignore.any() else None,
            None if labelled.all() else labelled.copy(),
        )

    def _has_truth(self, split: str) -> bool:
        return any(not item.labelled or any(item.labelled) for item in self.items(split))

    def remarks(self, split: str) -> Sequence[str]:
        items = self.items(split)
        known = [item.labelled.count(True) if item.labelled else len(item.frames) for item in items]
        frames = sum(len(item.labelled) or len(item.frames) for item in items)
        missing = frames - sum(known)
        if not missing:
            return ()
        first = next(item for item in items if item.labelled and not all(item.labelled))
        path = first.frames[first.labelled.index(False) if len(first.frames) > 1 else 0]
        return (f"{path}: no mask, as for {missing} of {frames} frames of {split}; these are not scored",)


def read_masks(paths: Sequence[Path | None], shape: tuple[int, int, int]) -> dict[int, MaskPage]:
    """The mask image of each frame that has one, of the frames' size; ``shape`` is (T, H, W)."""
    pages = {}
    for frame, path in enumerate(paths):
        if path:
            pages[frame] = decode_mask(read_bytes(path), str(path), turn=False)[0]
            check_fit((1, *shape[1:]), (1, *pages[frame].values.shape), str(path))
    return pages


def laid(pages: Mapping[int, MaskPage], shape: tuple[int, int, int]) -> Numbers:
    """Object numbers of the frames (T, H, W), 0 where a frame has no mask."""
    out = np.zeros(shape, np.uint8)
    for frame, page in pages.items():
        out[frame] = as_mask(page.values, page.name)
    return out


def read_list(path: Path) -> list[list[str]]:
    """The words of each line of a list, without empty lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list ({error}); copy it again") from error
    return [words for line in lines if (words := line.split())]


def usual(lists: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Of lists, by name, those that hold no other one whole: train and val, but not trainval."""
    names = {name: frozenset(members) for name, members in lists.items()}
    return tuple(
        name
        for name, members in names.items()
        if not any(other < members for key, other in names.items() if key != name and other)
    )
