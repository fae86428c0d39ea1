"""Any TFDS video data set in MOVi's features, read by TensorFlow (``pip install 'slotlab[tf]'``).

``MoviSource`` reads the same files faster and without TensorFlow from a local disk; this source is for places that only
TensorFlow reaches, such as a bucket: ``tfds:movi_a/256x256?data_dir=gs://kubric-public/tfds``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from featcache.errors import DataError, UsageError
from featcache.sources.fingerprint import digest
from featcache.sources.masks import as_mask, check_fit, without_void
from featcache.sources.movi import LABELS, instance_table
from featcache.sources.place import Layout
from featcache.sources.reading import Reading
from featcache.sources.splits import check_index, check_split
from featcache.sources.video import Size, Source, Video

DATA_DIR = "?data_dir="
BUCKET = "gs://kubric-public/tfds"


class TfdsSource(Source):
    """Random access by TFDS's split slices, which skip within one shard: slower than ``MoviSource``, but general."""

    def __init__(self, location: str, reading: Reading | None = None) -> None:
        self.location = location
        self.reading = reading or Reading()
        name, _, data_dir = location.removeprefix("tfds:").partition(DATA_DIR)
        if not name or "?" in name:
            raise UsageError(f"{location}: write tfds:NAME or tfds:NAME{DATA_DIR}ADDRESS")
        if importlib.util.find_spec("tensorflow") is None:
            raise UsageError(
                f"{location}: TFDS reads through TensorFlow, which is missing: pip install 'slotlab[tf]'; "
                "MOVi files on a local disk need no TensorFlow, give their folder"
            )
        self._name, self._data_dir = name, data_dir or None
        self._builder = self._open()
        self._lengths: dict[str, tuple[int, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "reading": self.reading}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["location"], state["reading"])  # type: ignore[misc]

    def splits(self) -> tuple[str, ...]:
        return tuple(self._builder.info.splits)

    def lengths(self, split: str) -> Sequence[int]:
        check_split(self.location, split, self.splits())
        if split not in self._lengths:
            count = self._builder.info.splits[split].num_examples
            frames = self._builder.info.features["video"].shape[0]
            self._lengths[split] = (
                (frames,) * count
                if frames is not None
                else tuple(len(self._example(split, index)["video"]) for index in range(count))
            )
        return self._lengths[split]

    def fingerprints(self, split: str) -> Sequence[str]:
        """A prepared data set never changes: its version stands for all of it."""
        whole = self.fingerprint(split)
        return tuple(digest((whole, str(index))) for index in range(self.videos(split)))

    def videos(self, split: str) -> int:
        check_split(self.location, split, self.splits())
        return int(self._builder.info.splits[split].num_examples)

    def fingerprint(self, split: str) -> str:
        check_split(self.location, split, self.splits())
        info = self._builder.info.splits[split]
        how = (masks,) if (masks := self.reading.of_masks()) else ()
        return digest(map(str, (*how, self._builder.info.full_name, split, info.num_bytes, *info.shard_lengths)))

    def size(self, split: str, index: int) -> Size | None:
        _, height, width, _ = self._builder.info.features["video"].shape
        return (height, width) if height and width else None

    def read(self, split: str, index: int) -> Video:
        check_split(self.location, split, self.splits())
        check_index(self.location, split, index, self._builder.info.splits[split].num_examples)
        where = f"{self.location}: {split} record {index}"
        example = self._example(split, index)
        frames = example["video"]
        masks = ignore = None
        if "segmentations" in example:
            masks = as_mask(example["segmentations"][..., 0], where)
            check_fit(frames.shape, masks.shape, where)
            masks, ignore = without_void(masks, self.reading.ignore_label)
        instances = example.get("instances", {})
        features = _inside(self._builder.info.features, "instances")
        names = {
            field: [features[key].int2str(int(number)) for number in instances[key]]
            for field, key in LABELS.items()
            if key in instances
        }
        pixels = np.asarray(instances.get("visibility", np.zeros((0, len(frames)))), np.int64)
        name = example.get("metadata", {}).get("video_name", f"{split}_{index:05d}".encode())
        return Video(
            name.decode("utf-8", "replace"), frames, masks, instance_table(names, pixels, masks, where), ignore
        )

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(self._name, data_dir=self._data_dir)
        except Exception as error:  # TFDS raises many kinds, by registry, file system and network
            raise DataError(
                f"{self.location}: {_line(error)}; MOVi lies at tfds:{self._name}{DATA_DIR}{BUCKET}"
            ) from error
        if not builder.info.splits or "video" not in builder.info.features:
            raise DataError(f"{self.location}: no prepared data set with a feature named video; prepare it with TFDS")
        return builder

    def _example(self, split: str, index: int) -> dict[str, Any]:
        """One decoded example, with only the features in use."""
        import tensorflow_datasets as tfds

        features = self._builder.info.features
        wanted: dict[str, Any] = {"video": True}
        if "segmentations" in features:
            wanted["segmentations"] = True
        if "video_name" in _inside(features, "metadata"):
            wanted["metadata"] = {"video_name": True}
        if present := {*LABELS.values(), "visibility"} & set(_inside(features, "instances")):
            wanted["instances"] = dict.fromkeys(present, True)
        try:
            dataset = self._builder.as_dataset(
                split=f"{split}[{index}:{index + 1}]",
                decoders=tfds.decode.PartialDecoding(wanted),
                read_config=tfds.ReadConfig(try_autocache=False),
            )
            example: dict[str, Any] = next(iter(tfds.as_numpy(dataset)))
        except Exception as error:  # TensorFlow's own kinds; a bucket is known to break off in the middle
            raise DataError(
                f"{self.location}: {split} record {index} cannot be read: {_line(error)}; "
                "try again, or download the files and give their folder"
            ) from error
        return example


def _inside(features: Any, key: str) -> Any:
    """The features of a nested dictionary, or of a sequence of dictionaries; empty if there is none."""
    if key not in features:
        return {}
    return getattr(features[key], "feature", features[key])


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


LAYOUT = Layout(
    "tfds",
    "TFDS",
    lambda path: False,
    lambda place, reading: TfdsSource(place.location, reading),
    ("data_dir",),
    local=False,
)
