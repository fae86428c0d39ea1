"""CLEVRTex and its variants (Karazija et al., NeurIPS 2021 Datasets and Benchmarks).

::

    clevrtex_full/0/CLEVRTEX_full_000000.png         the image
                    CLEVRTEX_full_000000_flat.png    object numbers, 0 for the background
                    CLEVRTEX_full_000000.json        shape, size and material of each object
                  1/ ... 49/

By number, the first tenth is the split ``test``, the next one ``val``, the rest ``train``; all of ``clevrtex_outd`` is
``test``. ``?crop=0.8`` reads the centred square that the published evaluation scores: 0.8 of the shorter side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import DataError, UsageError
from featcache.sources.fingerprint import file_digest
from featcache.sources.listed import PARTIAL, Item, ListedSource, Truth, laid, read_masks
from featcache.sources.masks import counted
from featcache.sources.place import Layout, Place
from featcache.sources.reading import Reading
from featcache.sources.regions import read_json
from featcache.sources.video import Instance, Size, Video

NAME = re.compile(r"CLEVRTEX_(?P<variant>[a-z]+)_(?P<number>\d{6})\.png")
UNSPLIT = "outd"
TENTHS = {"test": (0, 0.1), "val": (0.1, 0.2), "train": (0.2, 1)}
LABELS = ("shape", "size", "material", "color")
CROP = "crop"  # the option that reads the centre of each image


def fits(path: Path) -> bool:
    first = (image for folder in (path, path / "0") for image in folder.glob("CLEVRTEX_*_000000.png"))
    return any(NAME.fullmatch(image.name) for image in first)


@dataclass(frozen=True)
class ClevrTexItem(Item):
    """One image."""

    scene: Path = Path()  # the file that describes its objects


class ClevrTexSource(ListedSource[ClevrTexItem]):
    """The images of one variant, each a video of one frame."""

    def __init__(self, place: Place, reading: Reading) -> None:
        found = {}
        for image in sorted(place.path.rglob("CLEVRTEX_*.png")):
            if match := NAME.fullmatch(image.name):
                found[match["variant"], int(match["number"])] = image
        variants = sorted({variant for variant, _ in found})
        if len(variants) != 1:
            what = f"has {' and '.join(variants)}; give one of them" if variants else "has no CLEVRTEX_*_000000.png"
            raise DataError(f"{place.path}: {what}")
        self._images = [image for _, image in sorted(found.items())]
        numbers = {number for _, number in found}
        gaps = sorted(set(range(max(numbers))) - numbers)
        if gaps and PARTIAL not in place.options:
            raise DataError(
                f"{place.path}: image {gaps[0]:06d} is missing, as {len(gaps)} of {max(numbers) + 1}, and splits go by "
                f"number; copy it, or write {place.location}?{PARTIAL} to split those that are there"
            )
        self.edition = variants[0]
        self._whole = self.edition == UNSPLIT
        self._crop = _share(place)
        super().__init__(place, reading, ("test",) if self._whole else tuple(TENTHS))

    def find(self, split: str) -> Sequence[ClevrTexItem]:
        start, end = (0, 1) if self._whole else (int(part * len(self._images)) for part in TENTHS[split])
        return [_item(image) for image in self._images[start : len(self._images) if self._whole else end]]

    def written(self, item: ClevrTexItem) -> Iterator[bytes | str]:
        if item.scene.is_file():
            yield file_digest(item.scene)
        if self._crop != 1:
            yield f"{CROP} {self._crop}"

    def size(self, split: str, index: int) -> Size | None:
        size = super().size(split, index)
        return size if size is None or self._crop == 1 else self._side(size)

    def read(self, split: str, index: int) -> Video:
        video = super().read(split, index)
        if self._crop == 1 or video.segmentations is None:
            return video
        height, width = video.frames.shape[1:3]
        side, _ = self._side((height, width))
        rows, columns = (slice((length - side) // 2, (length - side) // 2 + side) for length in (height, width))
        masks = np.ascontiguousarray(video.segmentations[:, rows, columns])
        frames = np.ascontiguousarray(video.frames[:, rows, columns])
        return replace(
            video,
            frames=frames,
            segmentations=masks,
            instances=counted(masks, video.instances),
            ignore=None if video.ignore is None else video.ignore[:, rows, columns],
        )

    def _side(self, size: Size) -> Size:
        side = int(self._crop * min(size))
        return side, side

    def truth(self, split: str, item: ClevrTexItem, shape: tuple[int, int, int]) -> Truth:
        try:
            objects = [_instance(each) for each in read_json(item.scene)["objects"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{item.scene}: no objects of CLEVRTex in it ({error!r}); download it again") from error
        numbers = laid(read_masks(item.masks, shape), shape)
        if numbers.max(initial=0) > len(objects):
            raise DataError(
                f"{item.masks[0]}: has object {numbers.max()}, of {len(objects)} in {item.scene.name}; download both "
                "again"
            )
        return Truth(numbers, objects)


def _item(image: Path) -> ClevrTexItem:
    mask, scene = image.with_name(f"{image.stem}_flat.png"), image.with_suffix(".json")
    return ClevrTexItem(image.stem, (image,), (mask,), (), None, scene)


def _instance(described: dict[str, Any]) -> Instance:
    return replace(Instance(), **{name: described[name] for name in LABELS if isinstance(described.get(name), str)})


def _share(place: Place) -> float:
    """The share of the shorter side that is read, in (0, 1]."""
    text = place.options.get(CROP, "1")
    if not re.fullmatch(r"1|0?\.\d+", text) or not float(text):
        raise UsageError(f"{place.location}: {CROP}={text}: give a share of the shorter side, such as 0.8")
    return float(text)


LAYOUT = Layout("clevrtex", "CLEVRTex", fits, ClevrTexSource, (CROP, PARTIAL))
