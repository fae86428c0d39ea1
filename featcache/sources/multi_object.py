"""CLEVR with masks, Multi-dSprites, Objects Room and Tetrominoes, as Multi-Object Datasets publishes them
(Kabra et al., 2019), and their HDF5 ports, which keep names and shapes.

::

    clevr_with_masks_train.tfrecords            one gzip stream of TFRecords of tf.train.Example:
      image       (240, 320, 3)                   each element is a string of one byte
      mask        (11, 240, 320, 1)               0 or 255, background first; Multi-dSprites: (64, 64, 6, 1)
      visibility  (11,)                           1 for entities that are there, the background among them
      shape, size, color, material  (11,)         the data set's numbers, for which it has no words
    clevr_with_masks.hdf5                       the same as arrays (N, ...), the mask's entities first

``?objects=6`` keeps scenes of at most six objects (CLEVR6); the background is none of them. ``?held_out=N`` makes the
split ``held_out`` of the last N scenes of the file. Objects Room's sky, floor and walls are background.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError, UsageError
from featcache.sources.fingerprint import digest, file_digest
from featcache.sources.gzip_records import GzipRecords
from featcache.sources.hdf5_file import Dataset, opened
from featcache.sources.masks import counted, without_void
from featcache.sources.place import Layout, Place
from featcache.sources.reading import Reading
from featcache.sources.splits import check_index, check_split
from featcache.sources.video import Instance, Size, Source, Video
from featcache.text import printable

logger = logging.getLogger(__name__)

HELD_OUT = "held_out"
SUFFIXES = (".tfrecords", ".hdf5", ".h5")
LABELS = ("shape", "size", "color", "material")
CODED = frozenset(("clevr_with_masks",))  # whose labels are whole numbers; elsewhere they are colours and indices


@dataclass(frozen=True)
class Family:
    """What all files of a data set have in common."""

    name: str  # how their names begin
    size: Size
    background: int = 1  # masks that are no object, at the start
    last: bool = False  # whether records have the mask's entities behind its rows and columns


FAMILIES = (
    Family("clevr_with_masks", (240, 320)),
    Family("multi_dsprites", (64, 64), last=True),
    Family("objects_room", (64, 64), background=4),
    Family("tetrominoes", (35, 35)),
)
Row = Mapping[str, npt.NDArray[Any]]


def family_of(path: Path) -> Family | None:
    if path.suffix.lower() not in SUFFIXES:
        return None
    return next((family for family in FAMILIES if path.stem.startswith(family.name)), None)


def _files(path: Path) -> list[Path]:
    """The file, or those in a folder."""
    return [
        each for each in (sorted(path.iterdir()) if path.is_dir() else [path]) if each.is_file() and family_of(each)
    ]


class Rows(ABC):
    """The scenes of one file, by their place in it."""

    @abstractmethod
    def look(self, visible: bool) -> list[tuple[str, int | None]]:
        """A hash of each scene and, where ``visible`` is asked for, its number of objects."""

    @abstractmethod
    def read(self, row: int) -> Row:
        """Image (H, W, C), mask (K, H, W) and labels (K,) of one scene."""


class RecordRows(Rows):
    """Scenes of TFRecords."""

    def __init__(self, path: Path, family: Family) -> None:
        self._records, self._family = GzipRecords(path), family

    def look(self, visible: bool) -> list[tuple[str, int | None]]:
        logger.warning("%s: reading all of it once, to find its scenes", printable(str(self._records.path)))
        return [
            (f"{crc:08x}", _objects(_floats(features(data), "visibility"), self._family) if visible else None)
            for data, crc in self._records.walk()
        ]

    def read(self, row: int) -> Row:
        where = f"{self._records.path}: record {row}"
        try:
            found = features(self._records.read(row))
            height, width = self._family.size
            image = _single_bytes(found["image"]).reshape(height, width, -1)
            mask = _single_bytes(found["mask"])
            mask = (
                mask.reshape(height, width, -1).transpose(2, 0, 1)
                if self._family.last
                else mask.reshape(-1, height, width)
            )
            labels = {name: _single_bytes(found[name]) for name in LABELS if self._family.name in CODED}
            visibility = {"visibility": _floats(found, "visibility")} if "visibility" in found else {}
        except (KeyError, ValueError, IndexError) as error:
            raise DataError(f"{where}: no {self._family.name} in it ({error}); download this file again") from error
        return {"image": image, "mask": mask, **labels, **visibility}


class Hdf5Rows(Rows):
    """Scenes of the HDF5 port."""

    def __init__(self, path: Path, family: Family) -> None:
        self._path, self._family = path, family
        file = opened(path)
        names = ("image", "mask", "visibility", *(LABELS if family.name in CODED else ()))
        self._arrays = {name: array for name in names if isinstance(array := file.get(name), Dataset)}

    def look(self, visible: bool) -> list[tuple[str, int | None]]:
        whole = file_digest(self._path).hex()
        if "image" not in self._arrays:
            raise DataError(f"{self._path}: no array image in it; give a port of {self._family.name}")
        count = len(self._arrays["image"])
        if not visible:
            return [(f"{whole}{row}", None) for row in range(count)]
        if "visibility" not in self._arrays:
            raise DataError(f"{self._path}: no visibility in it, which counts objects; leave objects= out")
        values = self._arrays["visibility"][...].reshape(count, -1)
        return [(f"{whole}{row}", _objects(values[row], self._family)) for row in range(count)]

    def read(self, row: int) -> Row:
        found = {name: array[row] for name, array in self._arrays.items()}
        found |= {name: found[name].ravel() for name in LABELS if name in found}
        try:
            height, width = found["image"].shape[:2]
            mask = found["mask"].reshape(-1, height, width)
        except (KeyError, ValueError) as error:
            raise DataError(
                f"{self._path}: no images (N, H, W, 3) and masks (N, K, H, W, 1) in it ({error})"
            ) from error
        if len(mask) == 1:  # numbers, as some ports have them
            mask = mask == np.arange(int(mask.max()) + 1)[:, None, None]
        return {**found, "mask": mask}


class MultiObjectSource(Source):
    """Scenes of one file, each a video of one frame."""

    def __init__(self, place: Place, reading: Reading) -> None:
        files = _files(place.path)
        if len(files) != 1:
            what = f"several files of scenes: {', '.join(path.name for path in files)}; give one" if files else (
                f"no file of scenes; known are {', '.join(each.name for each in FAMILIES)} as .tfrecords or .hdf5"
            )  # fmt: skip
            raise DataError(f"{place.path}: {what}")
        (self.path,) = files
        family = family_of(self.path)
        assert family is not None
        self.location, self.reading, self.family = place.location, reading, family
        self.most, self.held_out = place.number("objects"), place.number(HELD_OUT)
        if self.most and family.name == "objects_room":
            raise UsageError(
                f"{place.location}: Objects Room says of no object whether it is there; leave objects= out"
            )
        self._rows: Rows = (RecordRows if self.path.suffix == ".tfrecords" else Hdf5Rows)(self.path, family)
        self._split = "test" if "test" in self.path.stem else "train"
        self._found: dict[str, list[tuple[int, str]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_found": {}}  # found again by another process, which has to unpack the stream anyway

    def splits(self) -> tuple[str, ...]:
        return (self._split, HELD_OUT) if self.held_out else (self._split,)

    def lengths(self, split: str) -> Sequence[int]:
        return (1,) * len(self._scenes(split))

    def names(self, split: str) -> Sequence[str]:
        return tuple(f"{self.path.stem}_{row:07d}" for row, _ in self._scenes(split))

    def fingerprints(self, split: str) -> Sequence[str]:
        how = self.reading.of_masks()
        return tuple(digest((how, mark)) for _, mark in self._scenes(split))

    def size(self, split: str, index: int) -> Size | None:
        return self.family.size if isinstance(self._rows, RecordRows) else None

    def where(self, split: str, index: int) -> str:
        return f"{self.path}: record {self._scenes(split)[index][0]}"

    def read(self, split: str, index: int) -> Video:
        scenes = self._scenes(split)
        check_index(self.location, split, index, len(scenes))
        row = self._rows.read(scenes[index][0])
        image = np.repeat(row["image"], 3, axis=-1) if row["image"].shape[-1] == 1 else row["image"]
        shown = row["mask"] != 0
        numbers = np.maximum(shown.argmax(axis=0) - (self.family.background - 1), 0).astype(np.uint8)[None]
        ignore = (shown.sum(axis=0) != 1)[None]  # no mask, or several
        numbers[ignore] = 0
        more = self.reading.ignore_label
        numbers, void = without_void(numbers, more)
        ignore = ignore if void is None else ignore | void
        there = counted(numbers, self._instances(row, int(numbers.max(initial=0))))
        name = f"{self.path.stem}_{scenes[index][0]:07d}"
        return Video(name, image[None], numbers, there, ignore if ignore.any() else None)

    def _instances(self, row: Row, top: int) -> list[Instance]:
        """Objects up to the last that is there. Of numbers, what they are of is said: the data set names none."""
        there = np.flatnonzero(row["visibility"].ravel() > 0) if "visibility" in row else np.zeros(0, int)
        count = max(top, int(there.max(initial=0)) - self.family.background + 1)
        labels = {
            name: row[name] for name in LABELS if name in row and row[name].size >= self.family.background + count
        }
        names: list[dict[str, Any]] = [
            {name: f"{name} {codes[self.family.background + k]}" for name, codes in labels.items()}
            for k in range(count)
        ]
        return [Instance(**of) for of in names]

    def _scenes(self, split: str) -> list[tuple[int, str]]:
        """Place in the file and hash of each scene of a split."""
        check_split(self.location, split, self.splits())
        if not self._found:
            looked = enumerate(self._rows.look(bool(self.most)))
            kept = [(row, mark) for row, (mark, count) in looked if count is None or count <= (self.most or count)]
            cut = len(kept) - (self.held_out or 0)
            if cut < 1:
                raise UsageError(f"{self.location}: {HELD_OUT}={self.held_out} leaves none of {len(kept)} scenes")
            self._found = {self._split: kept[:cut], HELD_OUT: kept[cut:]}
        return self._found[split]


def _objects(visibility: npt.NDArray[Any], family: Family) -> int:
    return int((visibility.ravel()[family.background :] > 0).sum())


# -- tf.train.Example of strings of one byte -----------------------------------------------------------------


def features(data: bytes) -> dict[str, memoryview]:
    """The features of a tf.train.Example, each still encoded.

    protobuf would make a Python object of every byte of an image, which takes a hundred times as long.
    """
    found = {}
    for _, inside in _fields(memoryview(data)):  # Example: features = 1
        for _, entry in _fields(inside):  # Features: map<string, Feature> feature = 1
            parts = dict(_fields(entry))
            found[bytes(parts[1]).decode()] = parts[2]
    return found


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field of a message whose fields all have a length."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        length, at = _varint(data, at)
        if tag & 7 != 2 or at + length > len(data):
            raise ValueError("not a tf.train.Example")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _single_bytes(feature: memoryview) -> npt.NDArray[np.uint8]:
    """The bytes of a Feature's bytes_list, whose values have one byte each: tag 10, length 1, the byte."""
    ((number, values),) = _fields(feature)
    triples = np.frombuffer(values, np.uint8)
    if number != 1 or triples.size % 3 or (triples[0::3] != 10).any() or (triples[1::3] != 1).any():
        raise ValueError("values of more than one byte")
    return triples[2::3]


def _floats(found: Mapping[str, memoryview], name: str) -> npt.NDArray[np.float32]:
    """The numbers of a Feature's float_list, which are packed."""
    ((_, values),) = _fields(found[name])
    ((_, packed),) = _fields(values)
    return np.frombuffer(packed, "<f4")


LAYOUT = Layout(
    "multi_object",
    "CLEVR with masks, Multi-dSprites, Objects Room or Tetrominoes",
    lambda path: bool(_files(path)),
    MultiObjectSource,
    ("objects", HELD_OUT),
)
