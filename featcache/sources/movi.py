"""MOVi (Greff et al., "Kubric", CVPR 2022) in its TFDS layout of TFRecord files, read without TensorFlow.

Only the frames, masks, instance labels, visibility and name are decoded; the rest of a record
(depth, flow, normals, cameras, collisions) is skipped. Labels that a MOVi variant lacks are empty: A and B have
shapes, colours, materials (and A sizes), C to F categories.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.sources.fingerprint import digest
from featcache.sources.images import decode_image, stack
from featcache.sources.masks import as_mask, check_fit, decode_mask, visibility, without_void
from featcache.sources.place import Layout, Place
from featcache.sources.reading import Reading
from featcache.sources.splits import check_index, check_split
from featcache.sources.tfrecord import TFRecordFile
from featcache.sources.video import Instance, Size, Source, Video

SHARD = re.compile(r"(?P<stem>.+-(?P<split>[^-]+)\.tfrecord)-(?P<shard>\d{5})-of-(?P<shards>\d{5})")
SEARCH_DEPTH = 3  # data/ -> movi_a -> 256x256 -> 1.0.0
SPLIT_ORDER = ("train", "validation", "test")
PARTIAL = "partial"  # the option that takes the shards that are there
# Instance field -> the feature that holds it.
LABELS = {
    "shape": "shape_label",
    "size": "size_label",
    "color": "color_label",
    "material": "material_label",
    "category": "category",
}


def find_features(folder: Path) -> Path | None:
    """The folder with ``features.json`` in or below ``folder``; None if there is none. ``DataError`` for several."""
    level = [folder]
    for _ in range(SEARCH_DEPTH + 1):
        found = [path for path in level if (path / "features.json").is_file()]
        if len(found) > 1:
            names = ", ".join(str(path) for path in found)
            raise DataError(f"{folder}: several data sets below it; give one of: {names}")
        if found:
            return found[0]
        for path in level:
            if shard := next(path.glob("*.tfrecord*"), None):
                raise DataError(f"{shard}: no features.json beside it; copy it from where the records came from")
        level = sorted(p for path in level for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    return None


@dataclass(frozen=True)
class Features:
    """What ``features.json`` and its label files say."""

    frames: int | None  # of every video; None if they differ
    size: Size | None  # of every frame; None if they differ
    masks: bool
    labels: Mapping[str, tuple[str, tuple[str, ...]]]  # Instance field -> feature key, names

    @classmethod
    def load(cls, directory: Path) -> Features:
        """What a data set's folder says. ``DataError`` if it is not a MOVi data set."""
        path = directory / "features.json"
        try:
            features = json.loads(path.read_text(encoding="utf-8"))["featuresDict"]["features"]
            video = features["video"]["video"]
            dimensions = video["shape"]["dimensions"]
            instances = (
                features.get("instances", {}).get("sequence", {}).get("feature", {}).get("featuresDict", {})
            ).get("features", {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: no MOVi video in it ({error!r}); give the folder of a MOVi data set") from error
        labels = {}
        for field, name in LABELS.items():
            if "classLabel" in instances.get(name, {}):
                labels[field] = (f"instances/{name}", _label_names(directory / f"instances-{name}.labels.txt"))
        frames, height, width = (max(int(dimension), 0) for dimension in dimensions[:3])
        return cls(frames or None, (height, width) if height and width else None, "segmentations" in features, labels)


def _label_names(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; copy it from where features.json came from") from error


class MoviSource(Source):
    """MOVi videos in TFRecord shards. The index of the shards is made on first use and travels when pickled."""

    def __init__(
        self, directory: Path, location: str | None = None, partial: bool = False, reading: Reading | None = None
    ) -> None:
        """``partial`` accepts missing shards."""
        self.reading = reading or Reading()
        self.directory = directory
        self.location = location or str(directory)
        self.partial = partial
        self._features = Features.load(directory)
        self._paths = _shards(directory, partial)
        first = next((path for paths in self._paths.values() for path in paths), Path())
        self.edition = match[1] if (match := re.match(r"movi_([a-f])-", first.name)) else ""
        self._files: dict[str, tuple[TFRecordFile, ...]] = {}
        self._lengths: dict[str, tuple[int, ...]] = {}

    def splits(self) -> tuple[str, ...]:
        return tuple(self._paths)

    def lengths(self, split: str) -> Sequence[int]:
        if split not in self._lengths:
            records = sum(len(file) for file in self._open(split))
            if self._features.frames is None:
                self._lengths[split] = tuple(
                    len(_bytes(self._example(split, record)[0], "video")) for record in range(records)
                )
            else:
                self._lengths[split] = (self._features.frames,) * records
        return self._lengths[split]

    def names(self, split: str) -> Sequence[str]:
        return tuple(f"{file.path.name}:{record}" for file in self._open(split) for record in range(len(file)))

    def fingerprints(self, split: str) -> Sequence[str]:
        how = self.reading.of_masks()
        return tuple(
            digest((how, length.tobytes(), crc.tobytes()))
            for file in self._open(split)
            for length, crc in zip(file.lengths, file.crcs, strict=True)
        )

    def fingerprint(self, split: str) -> str:
        return digest(self._fingerprint_parts(split))

    def _fingerprint_parts(self, split: str) -> Iterator[bytes | str]:
        """Uses the records' checksums in place of their data, so that only the index is read."""
        if how := self.reading.of_masks():
            yield how
        yield split
        for file in self._open(split):
            yield file.path.name
            yield file.lengths.tobytes()
            yield file.crcs.tobytes()

    def size(self, split: str, index: int) -> Size | None:
        return self._features.size

    def read(self, split: str, index: int) -> Video:
        features, where = self._example(split, index)
        encoded = _bytes(features, "video")
        if not encoded or (self._features.frames is not None and len(encoded) != self._features.frames):
            raise DataError(
                f"{where}: {len(encoded)} frames where features.json says {self._features.frames or 'at least 1'}; "
                "the two files do not belong together"
            )
        frames = _decode_all(encoded, decode_image, where, "frame")
        masks = ignore = None
        if self._features.masks:
            masks = _decode_all(_bytes(features, "segmentations"), _decode_mask, where, "mask")
            check_fit(frames.shape, masks.shape, where)
            masks, ignore = without_void(masks, self.reading.ignore_label)
        name = _bytes(features, "metadata/video_name")
        return Video(
            id=name[0].decode("utf-8", "replace") if name else f"{split}_{index:05d}",
            frames=frames,
            segmentations=masks,
            instances=self._instances(features, masks, len(frames), where),
            ignore=ignore,
        )

    def _instances(
        self, features: Any, masks: npt.NDArray[np.uint8] | None, frames: int, where: str
    ) -> tuple[Instance, ...]:
        names: dict[str, list[str]] = {}
        for field, (key, known) in self._features.labels.items():
            numbers = _ints(features, key)
            if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(known):
                raise DataError(
                    f"{where}: {key} holds {numbers.max()}, but its label file has {len(known)} names; "
                    "copy the label files again"
                )
            names[field] = [known[number] for number in numbers]
        pixels = _ints(features, "instances/visibility")
        if pixels.size % frames:
            raise DataError(f"{where}: {pixels.size} visibilities for {frames} frames; copy or download it again")
        return instance_table(names, pixels.reshape(-1, frames), masks, where)

    def _example(self, split: str, index: int) -> tuple[Any, str]:
        """The record's feature map, and its name in errors."""
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        record = index
        files = self._open(split)
        check_index(self.location, split, index, sum(len(file) for file in files))
        for file in files:
            if record < len(file):
                break
            record -= len(file)
        where = f"{file.path}: record {record} at byte {file.offsets[record]}"
        try:
            return tf_example_pb2.Example.FromString(file.read(record)).features.feature, where
        except DecodeError as error:
            raise DataError(f"{where}: not a tf.train.Example ({error}); give MOVi's own TFRecord files") from error

    def _open(self, split: str) -> tuple[TFRecordFile, ...]:
        check_split(self.location, split, self._paths)
        if split not in self._files:
            files = tuple(TFRecordFile.open(path) for path in self._paths[split])
            expected = _expected_records(self.directory, split)
            for file in files:
                if len(file) != expected.get(file.path.name, len(file)):
                    raise DataError(
                        f"{file.path}: {len(file)} records where dataset_info.json says "
                        f"{expected[file.path.name]}; copy or download this file again"
                    )
            if not sum(len(file) for file in files):
                raise DataError(f"{self.directory}: split {split} holds no video; copy or download it again")
            self._files[split] = files
        return self._files[split]


def instance_table(
    names: Mapping[str, Sequence[str]],
    pixels: npt.NDArray[np.int64],
    masks: npt.NDArray[np.uint8] | None,
    where: str,
) -> tuple[Instance, ...]:
    """Instances of one video from label names (field -> K names) and visibility (K, T), in instance order.

    Missing visibility is counted from the masks (T, H, W). ``DataError`` where the parts disagree.
    """
    sizes = {len(column) for column in names.values()} | ({len(pixels)} if pixels.size else set())
    top = int(masks.max(initial=0)) if masks is not None else 0
    if len(sizes) > 1 or (sizes and top > max(sizes)):
        raise DataError(
            f"{where}: instance tables of {sorted(sizes)} rows for masks with {top} objects; copy or download it again"
        )
    count = max(sizes, default=top)
    if not pixels.size and masks is not None:
        pixels = visibility(masks, count)
    return tuple(
        Instance(
            **{field: column[k] for field, column in names.items()},
            visibility=tuple(pixels[k].tolist()) if pixels.size else (),
        )
        for k in range(count)
    )


def _shards(directory: Path, partial: bool) -> dict[str, tuple[Path, ...]]:
    """Split -> its shards in order. ``DataError`` for a missing one, unless ``partial``."""
    splits: dict[str, list[tuple[Path, re.Match[str]]]] = {}
    for path in sorted(directory.iterdir()):
        if match := SHARD.fullmatch(path.name):
            splits.setdefault(match["split"], []).append((path, match))
    if not splits:
        raise DataError(f"{directory}: no file named *-SPLIT.tfrecord-00000-of-00001; copy the records there")
    for split, shards in splits.items():
        stems = sorted({(match["stem"], match["shards"]) for _, match in shards})
        if len(stems) > 1:
            raise DataError(f"{directory}: shards of two versions of split {split} ({stems}); remove one set")
        count = int(stems[0][1])
        missing = sorted(set(range(count)) - {int(match["shard"]) for _, match in shards})
        if missing and not partial:
            raise DataError(
                f"{directory}: {len(missing)} of {count} shards of split {split} are missing, first "
                f"{stems[0][0]}-{missing[0]:05d}-of-{count:05d}; copy them, or write {directory}?partial "
                "to use those that are there"
            )
    order = sorted(splits, key=lambda s: (SPLIT_ORDER.index(s) if s in SPLIT_ORDER else len(SPLIT_ORDER), s))
    return {split: tuple(path for path, _ in splits[split]) for split in order}


def _expected_records(directory: Path, split: str) -> dict[str, int]:
    """Shard name -> its records by ``dataset_info.json``: the only sign of a file cut between two records."""
    path = directory / "dataset_info.json"
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        lengths: list[str] = next((s["shardLengths"] for s in info["splits"] if s["name"] == split), [])
        stem = f"{info['name']}-{split}.tfrecord"
        return {f"{stem}-{i:05d}-of-{len(lengths):05d}": int(length) for i, length in enumerate(lengths)}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not in TFDS's format ({error!r}); copy it again, or remove it") from error


def _decode_mask(data: bytes, where: str) -> npt.NDArray[np.uint8]:
    return as_mask(decode_mask(data, where)[0].values, where)


def _decode_all(encoded: Sequence[bytes], decode: Any, where: str, what: str) -> npt.NDArray[np.uint8]:
    names = [f"{where}, {what} {i}" for i in range(len(encoded))]
    images = [decode(data, name) for data, name in zip(encoded, names, strict=True)]
    return stack(images, names, what) if images else np.zeros((0, 0, 0), np.uint8)


def _bytes(features: Any, key: str) -> Sequence[bytes]:
    return features[key].bytes_list.value if key in features else ()


def _ints(features: Any, key: str) -> npt.NDArray[np.int64]:
    return np.array(features[key].int64_list.value if key in features else (), np.int64)


def fits(path: Path) -> bool:
    if path.is_file() and ".tfrecord" in path.name:
        raise DataError(f"{path}: one shard alone is not readable; give its folder, which holds features.json")
    return path.is_dir() and find_features(path) is not None


def open_movi(place: Place, reading: Reading) -> MoviSource:
    """The data set in or below a folder."""
    if (directory := find_features(place.path)) is None:
        raise DataError(f"{place.path}: no features.json in or below it; give the folder of a MOVi data set")
    return MoviSource(directory, place.location, PARTIAL in place.options, reading)


LAYOUT = Layout("movi", "MOVi", fits, open_movi, (PARTIAL,))
