"""FeatureStore: cached patch tokens, masks and frames in one zarr v3 hierarchy.

Layout (see docs/store.md)::

    cache/dinov2.zarr            attributes.featcache: the StoreSpec
      train/                     attributes.featcache: the SplitSpec
        manifest.jsonl           one row a finished video
        features/<tap>           (frame, patch, feature) float16, or int8 with
        scales/<tap>             (frame, patch) float16
        segmentations            (frame, y, x) uint8
        video                    (frame, y, x, rgb) uint8
        frame_video, frame_position   (frame,) int32, -1 in padding
        instances/<label>        (video, instance) uint8; instances/visibility (frame, instance)
        statistics/<tap>/<name>  float64 moments

Every video starts on a chunk boundary, so that a chunk belongs to one video and can be written, checked and
replaced alone; the rows between a video's end and the next boundary are padding.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import zarr

from featcache import manifest
from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.quantise import dequantise
from featcache.sources.base import Instance
from featcache.stats import Moments

SCHEMA = 1
MAX_CHUNK_FRAMES = 64

Dtype = Literal["float16", "int8"]  # of the stored tokens
Precision = Literal["float32", "float16", "bfloat16"]  # the backbone ran in

# xarray wants dimension names; zarr-python warns that unsigned bytes are fine but strings are not: none here.
warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")


@dataclass(frozen=True)
class TapSpec:
    """Where in the backbone the tokens come from, and their shape."""

    grid: tuple[int, int]  # rows, columns of patches
    dim: int

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class StoreSpec:
    """What the features of a store are. Two runs may share a store only if ``identity`` agrees."""

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
    dtype_through: str = ""  # int8 where float16 values were int8 on their way, which extraction cannot repeat

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> StoreSpec:
        taps = {name: TapSpec(tuple(tap["grid"]), tap["dim"]) for name, tap in raw["taps"].items()}
        return cls(**{**raw, "taps": taps})

    def identity(self) -> dict[str, Any]:
        """Flat mapping of everything that must agree before a run may add to this store."""
        raw = self.to_json()
        for free in ("source", "batch_size", "versions", "exported_from"):
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
    statistics_videos: int = 0  # how many videos the stored statistics cover
    shard_chunks: int = 0  # chunks that share a file; 0 gives each its own

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """First row of each video, and the number of rows at the end: (videos + 1,)."""
        chunks = -(-np.asarray(self.lengths, np.int64) // self.chunk_frames)
        return np.concatenate([[0], np.cumsum(chunks)]) * self.chunk_frames

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> SplitSpec:
        return cls(
            **{**raw, "lengths": tuple(raw["lengths"]), "frame_size": tuple(raw["frame_size"])},
        )


class FeatureStore:
    """A store opened for reading. ``store["train"]`` is a :class:`Split`."""

    def __init__(self, path: Path, spec: StoreSpec) -> None:
        self.path = path
        self.spec = spec

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Open for reading. Raises ``DataError`` where there is no store, ``IncompatibleError`` for another schema."""
        path = Path(path)
        if not path.exists():
            raise DataError(f"{path}: no such store; make it with: slotlab extract --out {path}")
        try:
            raw: Any = zarr.open_group(str(path), mode="r").attrs["featcache"]
        except Exception as error:
            raise DataError(
                f"{path}: not a featcache store; name one made by slotlab extract (for example cache/dinov2.zarr)"
            ) from error
        if raw.get("schema") != SCHEMA:
            raise IncompatibleError(
                f"{path}: store schema {raw.get('schema')}, this version reads {SCHEMA}; extract it again"
            )
        return cls(path, StoreSpec.from_json(raw))

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(sorted(p.parent.name for p in self.path.glob(f"*/{manifest.NAME}")))

    def __getitem__(self, name: str) -> Split:
        if name not in self.splits:
            known = ", ".join(self.splits) or "none yet"
            raise UsageError(f"{self.path}: no split {name!r}; it has: {known}")
        return Split(self, name)

    def tap(self, name: str | None) -> str:
        """Canonical tap name; ``None`` is the only tap, or the first of several."""
        if name is None:
            return next(iter(self.spec.taps))
        if name not in self.spec.taps:
            raise IncompatibleError(f"{self.path}: no tap {name!r}; it has: {', '.join(self.spec.taps)}")
        return name


class Split:
    """One split of a store: rows of frames, tables and statistics."""

    def __init__(self, store: FeatureStore, name: str) -> None:
        self.store = store
        self.name = name
        self.path = store.path / name
        try:
            self.group = zarr.open_group(str(self.path), mode="r")
            self.spec = SplitSpec.from_json(self.group.attrs["featcache"])  # type: ignore[arg-type]
        except Exception as error:  # zarr raises many kinds for a damaged document
            raise self._damaged(f"{name}/zarr.json") from error
        self.manifest = manifest.read(self.path)

    def __repr__(self) -> str:
        return f"Split({str(self.path)!r}, {len(self.manifest)}/{len(self.spec.lengths)} videos)"

    @property
    def videos(self) -> tuple[int, ...]:
        """Positions of the finished videos."""
        return tuple(self.manifest)

    def spread(self, most: int) -> tuple[int, ...]:
        """Up to so many videos, evenly spread over all: a folder in order of its scenes is not judged by the first."""
        count = min(most, len(self.videos))
        return tuple(self.videos[len(self.videos) * i // count] for i in range(count))

    @cached_property
    def names(self) -> dict[int, str]:
        """What the source calls each finished video, with its position behind where it calls several so."""
        counts = Counter(row.id for row in self.manifest.values())
        return {v: row.id if counts[row.id] == 1 else f"{row.id}#{v}" for v, row in self.manifest.items()}

    @property
    def complete(self) -> bool:
        return len(self.manifest) == len(self.spec.lengths) == self.spec.statistics_videos

    def require_complete(self) -> Split:
        """This split, or ``DataError`` when its extraction has not finished."""
        if not self.complete:
            raise DataError(
                f"{self.path}: extraction unfinished ({len(self.manifest)} of {len(self.spec.lengths)} videos); "
                "run the same slotlab extract command again, it resumes"
            )
        return self

    @property
    def frames(self) -> int:
        """Number of real frames in finished videos."""
        return sum(self.manifest[video].frames for video in self.manifest)

    def rows(self, video: int) -> slice:
        """Rows of the arrays that hold this video's frames."""
        start = int(self.spec.starts[video])
        return slice(start, start + self.spec.lengths[video])

    def valid_rows(self) -> npt.NDArray[np.int64]:
        """Rows of all finished videos' frames, padding left out, in order: (frames,)."""
        parts = [np.arange(self.rows(v).start, self.rows(v).stop) for v in self.videos]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def array(self, path: str) -> zarr.Array[Any]:
        try:
            item = self.group[path]
        except Exception as error:
            raise self._damaged(f"{self.name}/{path}/zarr.json") from error
        assert isinstance(item, zarr.Array)
        return item

    def _damaged(self, what: str) -> DataError:
        return DataError(
            f"{self.store.path / what}: missing or damaged; run: slotlab verify --repair {self.store.path}"
        )

    def tokens(self, tap: str, video: int) -> torch.Tensor:
        """Patch tokens of one video as stored: float16 (T, N, D), or float32 from int8."""
        return self.read_tokens(tap, self.rows(video))

    def read_tokens(self, tap: str, rows: slice) -> torch.Tensor:
        """Patch tokens of consecutive rows (F, N, D), through zarr; dequantised where stored as int8."""
        codes = torch.from_numpy(np.asarray(self.array(f"features/{tap}")[rows]))
        if self.store.spec.dtype == "float16":
            return codes
        return dequantise(codes, torch.from_numpy(np.asarray(self.array(f"scales/{tap}")[rows])))

    def video(self, video: int) -> npt.NDArray[np.uint8]:
        """Frames (T, H, W, 3)."""
        return np.asarray(self.array("video")[self.rows(video)])

    def segmentations(self, video: int) -> npt.NDArray[np.uint8]:
        """Ground-truth masks (T, H, W): 0 background, k for instance k - 1. ``DataError`` if the source had none."""
        if not self.spec.masks:
            raise DataError(f"{self.path}: its source had no masks, so there is nothing to score against")
        return np.asarray(self.array("segmentations")[self.rows(video)])

    def instances(self, video: int) -> tuple[Instance, ...]:
        return self.manifest[video].instances

    def statistics(self, tap: str) -> Moments:
        """Moments of this split's tokens, as gathered by the extraction that finished it."""
        self.require_complete()
        group = self.group[f"statistics/{tap}"]
        assert isinstance(group, zarr.Group)
        return Moments.from_arrays({name: np.asarray(array[...]) for name, array in group.arrays()})


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys; sequences become lists, as JSON gives them back."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
