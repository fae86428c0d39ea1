"""PASCAL VOC 2007 to 2012, segmentation (Everingham et al., IJCV 2010).

::

    VOCdevkit/VOC2012/
      JPEGImages/2007_000032.jpg ...
      SegmentationObject/2007_000032.png ...     object numbers, 255 is void
      SegmentationClass/2007_000032.png ...      the class of every pixel, 255 is void
      SegmentationClassAug/2008_000002.png ...   optional: SBD's classes (Hariharan et al., ICCV 2011), for trainaug
      ImageSets/Segmentation/train.txt val.txt trainval.txt trainaug.txt ...

An image that has classes but no objects is read with one region for each class, one that has neither without truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.errors import DataError
from featcache.sources.fingerprint import file_digest
from featcache.sources.listed import (
    PARTIAL,
    Item,
    ListedSource,
    Truth,
    laid,
    of_categories,
    read_list,
    read_masks,
    usual,
)
from featcache.sources.masks import VOID, Numbers, without_void
from featcache.sources.place import Layout, Place
from featcache.sources.reading import Reading

LISTS = Path("ImageSets", "Segmentation")
OBJECTS = "SegmentationObject"
CLASSES = ("SegmentationClass", "SegmentationClassAug")
NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def _years(path: Path) -> dict[str, Path]:
    """Year -> its folder, the last first. A folder may be that of one year, or hold several."""
    folders = [path, *(path.glob("VOC*") if path.is_dir() else ())]
    found = {folder.name.removeprefix("VOC"): folder for folder in folders if (folder / LISTS).is_dir()}
    return dict(sorted(found.items(), reverse=True))


@dataclass(frozen=True)
class VocItem(Item):
    """One image."""

    classes: Path | None = None  # the image of its classes
    objects: bool = False  # whether its mask has objects, and not classes


class VocSource(ListedSource[VocItem]):
    """The images of one year, each a video of one frame."""

    def __init__(self, place: Place, reading: Reading) -> None:
        years = _years(place.path)
        if not years:
            raise DataError(f"{place.path}: no {LISTS} in it or in a VOC2012 below it; give the folder VOCdevkit")
        self.edition = place.choice("year", years, next(iter(years)))
        self._root = years[self.edition]
        lists = sorted((self._root / LISTS).glob("*.txt"))
        self._names = {path.stem: [words[0] for words in read_list(path)] for path in lists}
        if not self._names:
            raise DataError(f"{self._root / LISTS}: no list in it, such as train.txt; copy the lists there")
        super().__init__(place, reading, tuple(self._names), usual(self._names))

    def find(self, split: str) -> Sequence[VocItem]:
        return [self._item(name) for name in dict.fromkeys(self._names[split])]

    def _item(self, name: str) -> VocItem:
        image = self._root / "JPEGImages" / f"{name}.jpg"
        objects = self._root / OBJECTS / f"{name}.png"
        classes = next((p for kind in CLASSES if (p := self._root / kind / f"{name}.png").is_file()), None)
        mask = objects if objects.is_file() else classes
        return VocItem(name, (image,), (mask,), (mask is not None,), None, classes, mask == objects)

    def written(self, item: VocItem) -> Iterator[bytes | str]:
        if item.classes and item.objects:
            yield file_digest(item.classes)

    def truth(self, split: str, item: VocItem, shape: tuple[int, int, int]) -> Truth:
        numbers, ignore = without_void(laid(read_masks(item.masks, shape), shape), VOID)
        classes = laid(read_masks((item.classes,), shape), shape)
        if item.objects:
            return Truth(numbers, of_categories(_names(numbers, classes)), ignore)
        present = np.unique(numbers[numbers > 0])
        return Truth(
            np.searchsorted(present, numbers).astype(np.uint8) + (numbers > 0),
            of_categories(map(_name, present)),
            ignore,
        )

    def remarks(self, split: str) -> Sequence[str]:
        items = self.items(split)
        without = [item for item in items if any(item.labelled) and not item.objects]
        if not without:
            return super().remarks(split)
        return (
            *super().remarks(split),
            f"{without[0].masks[0]}: classes without objects, as in {len(without)} of {len(items)} images of {split}; "
            "a class is one region there",
        )


def _names(numbers: Numbers, classes: Numbers) -> Iterator[str]:
    """The class of each object: that of most of its pixels."""
    for number in range(1, int(numbers.max(initial=0)) + 1):
        here = classes[(numbers == number) & (classes > 0) & (classes < VOID)]
        yield _name(int(np.bincount(here).argmax())) if here.size else ""


def _name(number: int) -> str:
    return NAMES[number] if number < len(NAMES) else str(number)


LAYOUT = Layout("voc", "PASCAL VOC", lambda path: bool(_years(path)), VocSource, ("year", PARTIAL))
