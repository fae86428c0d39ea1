"""COCO, instances and panoptic (Lin et al., ECCV 2014; Kirillov et al., CVPR 2019), and what is annotated alike.

::

    coco/
      train2017/000000000009.jpg ...    val2017/...
      annotations/
        instances_train2017.json  instances_val2017.json       polygons, and run lengths for crowds
        panoptic_val2017.json     panoptic_val2017/*.png       a segment's number in the colour of its pixels

A file of annotations may be named alone, as ``coco:FILE.json``. Numbers of objects follow the annotations of an image.
Ignored are the pixels of crowds (``?crowds=background`` drops crowds, ``?crowds=objects`` takes each for an object),
those of two objects (``?overlaps=painted`` leaves them to the first), and panoptic pixels of no segment. Of panoptic
segments, things are objects, and stuff is background.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import DataError
from featcache.sources.clips import read_bytes
from featcache.sources.images import decode_image
from featcache.sources.listed import PARTIAL, Item, ListedSource, Truth, of_categories
from featcache.sources.masks import check_fit
from featcache.sources.place import Layout, Place
from featcache.sources.reading import Reading
from featcache.sources.regions import CROWDS, OVERLAPS, Canvas, decode_region, read_json, require_coco, require_few
from featcache.sources.video import Size

KINDS = ("instances", "panoptic")
NAME = re.compile(r"(?P<kind>instances|panoptic)_(?P<split>[A-Za-z]+?)(?P<year>\d{4})?")
NO_YEAR = ""


@dataclass(frozen=True)
class CocoItem(Item):
    """One image and what is annotated in it."""

    annotations: tuple[Mapping[str, Any], ...] = ()  # objects and crowds, or panoptic segments


def _files(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return [(path, match) for path in paths if (match := NAME.fullmatch(path.stem))]


def fits(path: Path) -> bool:
    return bool(_files(path / "annotations")) or (path.suffix == ".json" and bool(NAME.fullmatch(path.stem)))


class CocoSource(ListedSource[CocoItem]):
    """Images with the annotations of one kind and one year."""

    def __init__(self, place: Place, reading: Reading) -> None:
        self.overlaps = place.choice("overlaps", OVERLAPS, OVERLAPS[0])
        self.crowds = place.choice("crowds", CROWDS, CROWDS[0])
        if place.path.is_dir():
            files = _files(place.path / "annotations")
            if not files:
                raise DataError(f"{place.path}: no annotations/instances_*.json in it; copy it there, or name the file")
            kinds = [kind for kind in KINDS if any(match["kind"] == kind for _, match in files)]
            kind = place.choice("truth", kinds, kinds[0])
            years = sorted({match["year"] or NO_YEAR for _, match in files if match["kind"] == kind}, reverse=True)
            self.edition = place.choice("year", years, years[0])
            self._files = {m["split"]: p for p, m in files if (m["kind"], m["year"] or NO_YEAR) == (kind, self.edition)}
            self._root = place.path
        else:
            match = NAME.fullmatch(place.path.stem)
            self.edition = (match["year"] if match else None) or NO_YEAR
            self._files = {match["split"] if match else "train": place.path}
            self._root = place.path.parent.parent if place.path.parent.name == "annotations" else place.path.parent
        super().__init__(place, reading, tuple(self._files))
        self._names: dict[str, dict[int, str]] = {}  # split -> category -> its name
        self._things: dict[str, frozenset[int]] = {}  # split -> categories that are objects

    def find(self, split: str) -> Sequence[CocoItem]:
        path = self._files[split]
        content = read_json(path)
        try:
            categories = content.get("categories", [])
            self._names[split] = {int(c["id"]): str(c["name"]) for c in categories}
            self._things[split] = frozenset(int(c["id"]) for c in categories if c.get("isthing", 1))
            of: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
            for annotation in content.get("annotations") or ():
                of[annotation["image_id"]].append(annotation)
            images = content["images"]
            folder = self._folder(path, images[0]["file_name"])
            known = content.get("annotations") is not None
            panoptic = any("segments_info" in each for found in of.values() for each in found[:1])
            return [self._item(path, folder, image, of[image["id"]], known, panoptic) for image in images]
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise DataError(
                f"{path}: no images and annotations of COCO in it ({type(error).__name__} {error}); give such a file"
            ) from error

    def _folder(self, path: Path, first: str) -> Path:
        """Where the images of a file are."""
        match = NAME.fullmatch(path.stem)
        name = f"{match['split']}{match['year'] or ''}" if match else ""
        asked = self.place.options.get("images")
        near = [self._root / name, self._root / "images" / name, self._root / "images", path.parent]
        folders = [path.parent / Path(asked).expanduser()] if asked else near
        found = next((folder for folder in folders if (folder / first).is_file()), None)
        return found or next((folder for folder in folders if folder.is_dir()), folders[0])

    def _item(
        self,
        path: Path,
        folder: Path,
        image: Mapping[str, Any],
        annotations: list[Mapping[str, Any]],
        known: bool,
        panoptic: bool,
    ) -> CocoItem:
        name = str(image["file_name"])
        identity = Path(name).with_suffix("").as_posix()
        frames, size = (folder / name,), (int(image["height"]), int(image["width"]))
        if not panoptic:
            return CocoItem(identity, frames, (), (known,), size, tuple(annotations))
        if not annotations:
            return CocoItem(identity, frames, (), (False,), size)
        pictures = next((f for f in (path.with_suffix(""), self._root / path.stem) if f.is_dir()), path.with_suffix(""))
        masks = (pictures / str(annotations[0]["file_name"]),)
        return CocoItem(identity, frames, masks, (True,), size, tuple(annotations[0]["segments_info"]))

    def written(self, item: CocoItem) -> Iterator[bytes | str]:
        yield from (self.overlaps, json.dumps(item.annotations, sort_keys=True))
        if self.crowds != CROWDS[0]:
            yield self.crowds

    def truth(self, split: str, item: CocoItem, shape: tuple[int, int, int]) -> Truth:
        self.items(split)
        where = f"{self._files[split]}: image {item.id}"
        one = self._panoptic if item.masks else self._instances
        try:
            numbers, ignore, names = one(split, item, shape[1:], where)
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: an annotation lacks {error}; download the annotations again") from error
        return Truth(numbers[None], of_categories(names), ignore[None])

    def _instances(self, split: str, item: CocoItem, size: Size, where: str) -> Any:
        objects = self._objects(item.annotations)
        require_few(len(objects), where)
        canvas = Canvas(size, self.overlaps)
        for number, each in enumerate(objects, start=1):
            canvas.lay(number, decode_region(each["segmentation"], size, f"{where}, annotation {each['id']}"))
        for each in item.annotations:
            if each.get("iscrowd") and self.crowds == "ignored":
                canvas.leave_out(decode_region(each["segmentation"], size, f"{where}, annotation {each['id']}"))
        return (*canvas.finish(), self._categories(split, objects))

    def _panoptic(self, split: str, item: CocoItem, size: Size, where: str) -> Any:
        path = item.masks[0]
        assert path is not None
        colours = decode_image(read_bytes(path), str(path), turn=False).astype(np.int64)
        check_fit((1, *size), (1, *colours.shape[:2]), str(path))
        ids = colours @ np.array([1, 1 << 8, 1 << 16])
        segments = {int(each["id"]): each for each in item.annotations}
        if unknown := set(np.unique(ids).tolist()) - segments.keys() - {0}:
            raise DataError(f"{path}: holds segment {min(unknown)}, which {where} has not; copy both of one data set")
        things = [each for each in item.annotations if int(each["category_id"]) in self._things[split]]
        objects = self._objects(things)
        require_few(len(objects), where)
        crowds = [int(each["id"]) for each in things if each.get("iscrowd")] if self.crowds == "ignored" else []
        ignore = (ids == 0) | np.isin(ids, crowds)
        numbers = np.zeros(size, np.uint8)
        for number, each in enumerate(objects, start=1):
            numbers[ids == int(each["id"])] = number
        return numbers, ignore, self._categories(split, objects)

    def _objects(self, annotations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [each for each in annotations if self.crowds == "objects" or not each.get("iscrowd")]

    def _categories(self, split: str, objects: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        return tuple(self._names[split].get(int(each["category_id"]), "") for each in objects)


def open_coco(place: Place, reading: Reading) -> CocoSource:
    """``UsageError`` where pycocotools, which decodes the masks, is not installed."""
    require_coco()
    return CocoSource(place, reading)


LAYOUT = Layout("coco", "COCO", fits, open_coco, ("year", "truth", "overlaps", "crowds", "images", PARTIAL))
