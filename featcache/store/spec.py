"""The specifications of a store and its splits, and the test of whether two of them agree."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from featcache.errors import IncompatibleError, UsageError, compare_settings
from featcache.sources.fingerprint import digest
from featcache.words import Dtype, Precision

SCHEMA = 2
READABLE = (1, SCHEMA)  # stores of schema 1 have no array of ignored pixels: all of their truth is known

MAX_CHUNK_FRAMES = 64
JOINT = "+"  # between the names of taps that are read together


# xarray wants dimension names; zarr-python warns that unsigned bytes are fine but strings are not: none here.
warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")


@dataclass(frozen=True)
class TapSpec:
    """Shape of the tokens of one tap."""

    grid: tuple[int, int]  # rows, columns of patches
    dim: int

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class StoreSpec:
    """The features of a store. Two runs may share a store only if ``identity`` agrees."""

    backbone: str
    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    taps: Mapping[str, TapSpec]
    dtype: Dtype = "float16"
    frame_stride: int = 1
    precision: Precision = "float32"
    # Recorded, but free to change:
    source: str = ""
    batch_size: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA
    exported_from: str = ""  # the store or file that the values were copied from; "" for an extraction
    dtype_through: Dtype | Literal[""] = ""  # a coarser form that the values passed through before a copy

    def tap(self, name: str) -> TapSpec:
        """The shape of the tokens of a tap; of several, ``A+B``, the channels of one follow those of the other."""
        each = [self.taps[tap] for tap in taps_of(name)]
        return TapSpec(each[0].grid, sum(tap.dim for tap in each))  # all taps of a store have one grid

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> StoreSpec:
        taps = {name: TapSpec(tuple(tap["grid"]), tap["dim"]) for name, tap in raw["taps"].items()}
        return cls(**{**raw, "taps": taps})

    def at_size(self, size: tuple[int, int]) -> StoreSpec:
        """The specification of the same features of another input size, rows and columns in pixels.

        A multiple of the backbone's patch, else ``UsageError`` comes from loading it.
        """
        grid = (size[0] // self.model["patch"], size[1] // self.model["patch"])
        return replace(
            self,
            model={**self.model, "grid": list(grid)},
            preprocessing={**self.preprocessing, "size": size[0] if size[0] == size[1] else list(size)},
            taps={name: TapSpec(grid, tap.dim) for name, tap in self.taps.items()},
        )

    def identity(self) -> dict[str, Any]:
        """Flat mapping of everything that must agree before a run may add to this store."""
        raw = self.to_json()
        for free in ("source", "batch_size", "versions", "exported_from", "schema"):
            del raw[free]
        raw["model"] = {k: v for k, v in raw["model"].items() if k not in ("library_version", "weights_origin")}
        return flatten(raw)


@dataclass(frozen=True)
class SplitSpec:
    """Videos of one split and how their frames are laid out."""

    source_fingerprint: str
    lengths: tuple[int, ...]  # frames of each video, after the frame stride
    chunk_frames: int
    frame_size: tuple[int, int]  # height, width of the stored frames and masks
    masks: bool
    statistics_videos: int = 0  # number of videos that the stored statistics cover
    shard_chunks: int = 0  # chunks that share a file; 0 gives each its own
    ignored: bool = False  # whether an array says which pixels of the masks are not known
    # Of each video, in the store's order, when it was asked for; empty in stores of version 0.1:
    names: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # names of videos that were left out because they were damaged
    # Of a store for one rank: the rank, the number of ranks, and how many videos every rank has besides its own.
    part: tuple[int, ...] = ()

    @cached_property
    def frames(self) -> npt.NDArray[np.int64]:
        """``lengths`` as an array: (videos,)."""
        return np.asarray(self.lengths, np.int64)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """First row of each video, and the number of rows at the end: (videos + 1,)."""
        chunks = -(-self.frames // self.chunk_frames)
        return np.concatenate([[0], np.cumsum(chunks)]) * self.chunk_frames

    @property
    def rows(self) -> int:
        """Number of rows of the split's arrays, padding included."""
        return int(self.starts[-1])

    def shares(self, ranks: int) -> list[range]:
        """The videos as consecutive shares that have about as many frames, each with one video at least.

        The order of training follows from them: they depend on the lengths alone, by a rule that must not change.
        """
        count, ends = len(self.lengths), np.cumsum(self.frames)
        if ranks > count:
            raise UsageError(f"{count} videos cannot be shared by {ranks} ranks; use fewer ranks")
        begins = [0]
        for share in range(1, ranks):
            before = int(np.searchsorted(ends * ranks, share * ends[-1])) + 1  # the fewest videos with these frames
            begins.append(min(max(before, begins[-1] + 1), count - ranks + share))
        return [range(begin, end) for begin, end in pairwise([*begins, count])]

    @cached_property
    def own(self) -> range:
        """The videos that are trained on from this store: all, or its rank's share."""
        return self.shares(self.part[1])[self.part[0]] if self.part else range(len(self.lengths))

    @property
    def held(self) -> Sequence[int]:
        """The videos that this store has once it is finished."""
        if not self.part:
            return self.own
        return sorted({*self.own, *spread(range(len(self.lengths)), self.part[2])})

    @property
    def extent(self) -> slice:
        """The rows of `own`."""
        return slice(int(self.starts[self.own.start]), int(self.starts[self.own.stop]))

    @property
    def videos(self) -> tuple[tuple[str, str, int], ...]:
        """Name, fingerprint and frames of each video; () where the fingerprints are not known."""
        return tuple(zip(self.names, self.fingerprints, self.lengths, strict=True)) if self.fingerprints else ()

    @property
    def content(self) -> str:
        """A short hash that two splits share if they hold the same videos in the same order."""
        return digest((*self.fingerprints, str(self.lengths))) if self.fingerprints else self.source_fingerprint

    def form(self) -> dict[str, Any]:
        """What holds for every video of the split, whichever they are."""
        return {key: value for key, value in self.to_json().items() if key not in _OF_VIDEOS}

    def to_json(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}  # asdict copies every video's values
        if not self.part:
            del values["part"]  # earlier versions read whole splits
        return values

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> SplitSpec:
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in raw.items()}
        return cls(**values)


def taps_of(name: str) -> list[str]:
    """The taps that are read together under a name: of ``A+B``, A and B."""
    return name.split(JOINT)


def spread(videos: Sequence[int], most: int) -> tuple[int, ...]:
    """At most ``most`` of the videos, evenly spaced, so that a sorted folder is not represented by its first scene."""
    count = min(most, len(videos))
    return tuple(videos[len(videos) * i // count] for i in range(count))


_OF_VIDEOS = ("source_fingerprint", "lengths", "statistics_videos", "names", "fingerprints", "skipped")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys; sequences become lists, as JSON gives them back."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def refuse_if_different(path: Path, present: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """``IncompatibleError`` with every setting that differs."""
    if differences := compare_settings(present, asked):
        raise IncompatibleError(
            f"{path}: made with other settings", differences, "choose another --out or delete the store"
        )
