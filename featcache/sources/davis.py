"""DAVIS 2016 and 2017 (Perazzi et al., CVPR 2016; Pont-Tuset et al., 2017; Caelles et al., 2019 for unsupervised).

::

    DAVIS/
      JPEGImages/480p/bear/00000.jpg ...               480p, 1080p or Full-Resolution
      Annotations/480p/bear/00000.png ...              object numbers, 255 is void; in 2016's 0 and 255, one object
      Annotations_unsupervised/480p/bear/00000.png     2017's masks of every object that stands out
      ImageSets/2017/train.txt val.txt ...             names of videos
      ImageSets/480p/train.txt val.txt trainval.txt    2016's first form: pairs of paths, an image and its mask

2016 knows one object a video: where its masks come from 2017's files, their objects are one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.errors import DataError
from featcache.sources.listed import PARTIAL, Item, ListedSource, Truth, laid, read_list, read_masks, usual
from featcache.sources.masks import VOID, without_void
from featcache.sources.place import Layout, Place
from featcache.sources.reading import Reading
from featcache.sources.scan import natural

IMAGES, LISTS = "JPEGImages", "ImageSets"
ANNOTATIONS = ("Annotations_unsupervised", "Annotations")
FIRST = "2016"  # the year of one object a video
USUAL_RESOLUTION = "480p"


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _resolutions(root: Path) -> list[str]:
    """Folders of videos that have annotations; the usual one first."""
    found = [
        name
        for name in _folders(root / IMAGES)
        if any((root / kind / name).is_dir() for kind in ANNOTATIONS) and _folders(root / IMAGES / name)
    ]
    return sorted(found, key=lambda name: (name != USUAL_RESOLUTION, name))


def _lists(root: Path, resolution: str) -> dict[str, dict[str, Path]]:
    """Year -> split -> its list, the last year first."""
    folders = {name: root / LISTS / name for name in _folders(root / LISTS) if name.isdigit() and len(name) == 4}
    if FIRST not in folders and (root / LISTS / resolution).is_dir():
        folders[FIRST] = root / LISTS / resolution
    found = {year: {path.stem: path for path in sorted(folders[year].glob("*.txt"))} for year in sorted(folders)[::-1]}
    return {year: lists for year, lists in found.items() if lists}


@dataclass(frozen=True)
class _Sequence:
    """One video as a list names it."""

    name: str
    pairs: tuple[tuple[str, str], ...] = ()  # paths of images and masks, where the list has them


class DavisSource(ListedSource[Item]):
    """The videos of one year, at one resolution."""

    def __init__(self, place: Place, reading: Reading) -> None:
        root = place.path
        resolutions = _resolutions(root)
        if not resolutions:
            raise DataError(
                f"{root}: no folder of videos in {IMAGES} with its like in Annotations; give DAVIS's folder"
            )
        resolution = place.choice("resolution", resolutions, resolutions[0])
        years = _lists(root, resolution)
        if not years:
            raise DataError(f"{root / LISTS}: no list of a year, such as {LISTS}/2017/train.txt; copy {LISTS} there")
        self.edition = self.year = place.choice("year", years, next(iter(years)))
        kinds = [kind for kind in ANNOTATIONS if (root / kind / resolution).is_dir()]
        self._masks = root / place.choice("annotations", kinds, kinds[-1 if self.year == FIRST else 0]) / resolution
        self._images = root / IMAGES / resolution
        self._lists = {split: _sequences(path) for split, path in years[self.year].items()}
        names: Mapping[str, Sequence[str]] = {s: [video.name for video in of] for s, of in self._lists.items()}
        super().__init__(place, reading, tuple(self._lists), usual(names))

    def find(self, split: str) -> Sequence[Item]:
        return [self._item(split, video) for video in self._lists[split]]

    def _item(self, split: str, video: _Sequence) -> Item:
        folder = self._images / video.name
        images = sorted(folder.glob("*.jpg"), key=natural) or [folder]  # none: to be missed by name
        masks = [self._masks / video.name / f"{image.stem}.png" for image in images]
        if video.pairs:
            images = [self.place.path / image.lstrip("/") for image, _ in video.pairs]
            masks = [self.place.path / mask.lstrip("/") for _, mask in video.pairs]
        there = tuple(mask if mask.is_file() else None for mask in masks)
        return Item(video.name, tuple(images), there, tuple(mask is not None for mask in there))

    def written(self, item: Item) -> Iterator[str]:
        yield "one object" if self.year == FIRST else ""

    def truth(self, split: str, item: Item, shape: tuple[int, int, int]) -> Truth:
        pages = read_masks(item.masks, shape)
        numbers = laid(pages, shape)
        if self.year != FIRST:
            numbers, ignore = without_void(numbers, VOID)
            return Truth(numbers, ignore=ignore)
        if all(page.palette for page in pages.values()):  # 2017's; where 2016's have 255 it is the object
            numbers, ignore = without_void(numbers, VOID)
            return Truth(np.minimum(numbers, 1), ignore=ignore)
        return Truth(np.minimum(numbers, 1))


def _sequences(path: Path) -> list[_Sequence]:
    """The videos of a list, in either form. ``DataError`` for a line that is in none."""
    found: dict[str, list[tuple[str, str]]] = {}
    for words in read_list(path):
        if len(words) == 1 and "/" not in words[0]:
            found.setdefault(words[0], [])
        elif len(words) == 2:
            found.setdefault(Path(words[0]).parent.name, []).append((words[0], words[1]))
        else:
            raise DataError(f"{path}: {' '.join(words)!r} is no name of a video and no pair of paths; copy it again")
    return [_Sequence(name, tuple(pairs)) for name, pairs in found.items()]


LAYOUT = Layout(
    "davis", "DAVIS", lambda path: bool(_resolutions(path)), DavisSource, ("year", "resolution", "annotations", PARTIAL)
)
