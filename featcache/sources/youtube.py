"""YouTube-VIS 2019 and 2021 (Yang et al., ICCV 2019) and YouTube-VOS 2018 and 2019 (Xu et al., 2018).

::

    ytvis/
      train/JPEGImages/0043f083b5/00000.jpg 00005.jpg ...    valid/... test/...
      train/instances.json                                   or train.json beside the folder train, as in 2019
    ytvos/
      train/JPEGImages/003234408d/00000.jpg ...              valid/... test/...
      train_all_frames/JPEGImages/...                        optional, for ?frames=all: the frames between those, too
      train/Annotations/003234408d/00000.png 00005.png ...   object numbers of every fifth frame
      train/meta.json                                        categories

Annotations of ``valid`` and ``test`` are withheld, but for the masks with which YouTube-VOS introduces objects: only
the first of a video shows all objects of its frame. The usual split for object-centric learning is ``?held_out=300``:
the last 300 training videos by name become the split ``held_out``.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import DataError, UsageError
from featcache.sources.listed import PARTIAL, Item, ItemT, ListedSource, Truth, laid, of_categories, read_masks
from featcache.sources.place import Layout, Place
from featcache.sources.reading import Reading
from featcache.sources.regions import CROWDS, OVERLAPS, Canvas, decode_region, read_json, require_coco, require_few
from featcache.sources.scan import natural

SPLITS = ("train", "valid", "test")
IMAGES, MASKS, META, INSTANCES = "JPEGImages", "Annotations", "meta.json", "instances.json"
HELD_OUT = "held_out"


def _annotations(root: Path) -> dict[str, Path]:
    """Split -> its file of YouTube-VIS."""
    places = {split: (root / split / INSTANCES, root / f"{split}.json") for split in SPLITS}
    found = {split: next((path for path in paths if path.is_file()), None) for split, paths in places.items()}
    return {split: path for split, path in found.items() if path and (root / split / IMAGES).is_dir()}


def _masks(root: Path) -> list[str]:
    """Splits that are there as YouTube-VOS has them."""
    return [
        s
        for s in SPLITS
        if (root / s / IMAGES).is_dir() and ((root / s / META).is_file() or (root / s / MASKS).is_dir())
    ]


class YouTubeSource(ListedSource[ItemT]):
    """Videos in the folders of splits, of which the last ones of ``train`` may be held out."""

    def __init__(self, place: Place, reading: Reading, splits: Sequence[str]) -> None:
        self.held_out = place.number(HELD_OUT)
        more = (HELD_OUT,) if self.held_out else ()
        super().__init__(place, reading, (*splits, *more))

    def find(self, split: str) -> Sequence[ItemT]:
        if not self.held_out or split not in ("train", HELD_OUT):
            return self.found(split)
        items = sorted(self.found("train"), key=lambda item: item.id)
        if len(items) <= self.held_out:
            raise UsageError(f"{self.location}: {HELD_OUT}={self.held_out} leaves none of {len(items)} training videos")
        return items[-self.held_out :] if split == HELD_OUT else items[: -self.held_out]

    @abstractmethod
    def found(self, split: str) -> Sequence[ItemT]:
        """The videos of a split as it is published."""


@dataclass(frozen=True)
class VisItem(Item):
    """One video of YouTube-VIS."""

    annotations: tuple[Mapping[str, Any], ...] = ()  # objects, each with a region or None for each frame
    categories: tuple[str, ...] = ()  # of the same


class YouTubeVisSource(YouTubeSource[VisItem]):
    """YouTube-VIS. Pixels of two objects and of crowds are ignored, as in COCO."""

    def __init__(self, place: Place, reading: Reading) -> None:
        self.overlaps = place.choice("overlaps", OVERLAPS, OVERLAPS[0])
        self.crowds = place.choice("crowds", CROWDS, CROWDS[0])
        self._files = _annotations(place.path)
        if not self._files:
            raise DataError(f"{place.path}: no train/{INSTANCES} or train.json beside train/{IMAGES}; copy it there")
        super().__init__(place, reading, tuple(self._files))

    def found(self, split: str) -> Sequence[VisItem]:
        path = self._files[split]
        content = read_json(path)
        try:
            names = {int(each["id"]): str(each["name"]) for each in content.get("categories") or ()}
            of: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
            for annotation in content.get("annotations") or ():
                of[annotation["video_id"]].append(annotation)
            known = bool(content.get("annotations"))
            return [self._item(path, split, video, of[video["id"]], known, names) for video in content["videos"]]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{path}: no videos and annotations of YouTube-VIS in it ({type(error).__name__} {error}); "
                "download it again"
            ) from error

    def _item(
        self,
        path: Path,
        split: str,
        video: Mapping[str, Any],
        annotations: list[Mapping[str, Any]],
        known: bool,
        names: Mapping[int, str],
    ) -> VisItem:
        frames = tuple(self.place.path / split / IMAGES / str(name) for name in video["file_names"])
        name = Path(video["file_names"][0]).parent.as_posix()
        for each in annotations:
            if len(each["segmentations"]) != len(frames):
                raise DataError(
                    f"{path}: video {name} has {len(frames)} frames, its annotation {each['id']} "
                    f"{len(each['segmentations'])}; download it again"
                )
        return VisItem(
            name,
            frames,
            (),
            () if known else (False,) * len(frames),
            (int(video["height"]), int(video["width"])),
            tuple(annotations),
            tuple(names.get(int(each["category_id"]), "") for each in annotations),
        )

    def written(self, item: VisItem) -> Iterator[bytes | str]:
        yield from (self.overlaps, json.dumps(item.annotations, sort_keys=True))
        if self.crowds != CROWDS[0]:
            yield self.crowds

    def truth(self, split: str, item: VisItem, shape: tuple[int, int, int]) -> Truth:
        where = f"{self._files['train' if split == HELD_OUT else split]}: video {item.id}"
        taken = self.crowds == "objects"
        objects = [k for k, each in enumerate(item.annotations) if taken or not each.get("iscrowd")]
        require_few(len(objects), where)
        frames = []
        for frame in range(shape[0]):
            canvas = Canvas(shape[1:], self.overlaps)
            regions = {
                k: decode_region(each["segmentations"][frame], shape[1:], f"{where}, annotation {each['id']}")
                for k, each in enumerate(item.annotations)
                if each["segmentations"][frame]
            }
            for number, k in enumerate(objects, start=1):
                if k in regions:
                    canvas.lay(number, regions[k])
            for k in regions.keys() - set(objects) if self.crowds == "ignored" else ():
                canvas.leave_out(regions[k])
            frames.append(canvas.finish())
        numbers, ignore = (np.stack(parts) for parts in zip(*frames, strict=True))
        return Truth(numbers, of_categories(item.categories[k] for k in objects), ignore)


@dataclass(frozen=True)
class VosItem(Item):
    """One video of YouTube-VOS."""

    categories: tuple[str, ...] = ()  # of objects 1, 2, ...


class YouTubeVosSource(YouTubeSource[VosItem]):
    """YouTube-VOS."""

    def __init__(self, place: Place, reading: Reading) -> None:
        splits = _masks(place.path)
        if not splits:
            raise DataError(f"{place.path}: no train/{MASKS} beside train/{IMAGES}; give the folder that holds train")
        self._all = place.choice("frames", ("annotated", "all"), "annotated") == "all"
        super().__init__(place, reading, splits)

    def found(self, split: str) -> Sequence[VosItem]:
        root = self.place.path
        images = root / (f"{split}_all_frames" if self._all else split) / IMAGES
        if not images.is_dir():
            raise DataError(f"{images}: no such folder; copy it there, or leave frames=all out")
        path = root / split / META
        try:
            videos: Mapping[str, Any] = read_json(path)["videos"]
            names = {video: _names(of["objects"]) for video, of in videos.items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: no videos of YouTube-VOS in it ({error!r}); download it again") from error
        return [self._item(split, images / video, names[video]) for video in sorted(names)]

    def _item(self, split: str, folder: Path, categories: tuple[str, ...]) -> VosItem:
        frames = tuple(sorted(folder.glob("*.jpg"), key=natural)) or (folder,)
        masks = [self.place.path / split / MASKS / folder.name / f"{frame.stem}.png" for frame in frames]
        there: list[Path | None] = [mask if mask.is_file() else None for mask in masks]
        if split != "train" and (first := next((k for k, mask in enumerate(there) if mask), None)) is not None:
            there[first + 1 :] = [None] * (len(there) - first - 1)
        return VosItem(folder.name, frames, tuple(there), tuple(mask is not None for mask in there), None, categories)

    def truth(self, split: str, item: VosItem, shape: tuple[int, int, int]) -> Truth:
        return Truth(laid(read_masks(item.masks, shape), shape), of_categories(item.categories))


def _names(objects: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Categories of objects 1, 2, ..., by their numbers."""
    found = {int(number): str(each["category"]) for number, each in objects.items()}
    return tuple(found.get(number, "") for number in range(1, max(found, default=0) + 1))


def open_vis(place: Place, reading: Reading) -> YouTubeVisSource:
    """``UsageError`` where pycocotools, which decodes the masks, is not installed."""
    require_coco()
    return YouTubeVisSource(place, reading)


VIS = Layout(
    "ytvis", "YouTube-VIS", lambda path: bool(_annotations(path)), open_vis, (HELD_OUT, "overlaps", "crowds", PARTIAL)
)
VOS = Layout("ytvos", "YouTube-VOS", lambda path: bool(_masks(path)), YouTubeVosSource, (HELD_OUT, "frames", PARTIAL))
