"""A store opened for reading: what its features are, and the videos, tokens, tables and statistics of each split."""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.moments import Moments
from featcache.sources.fingerprint import digest
from featcache.sources.video import Instance
from featcache.store import manifest
from featcache.store.encoding import ENCODINGS, Decoder, Encoding, Joined
from featcache.store.spec import READABLE, SplitSpec, StoreSpec, spread, taps_of


class FeatureStore:
    """A store opened for reading. ``store["train"]`` is a :class:`Split`."""

    def __init__(self, path: Path, spec: StoreSpec) -> None:
        self.path = path
        self.spec = spec

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Open for reading. ``DataError`` without a store, ``IncompatibleError`` for another schema or stored form."""
        path = Path(path)
        if not path.exists():
            raise DataError(f"{path}: no such store; make it with: slotlab extract --out {path}")
        try:
            raw: Any = zarr.open_group(str(path), mode="r").attrs["featcache"]
        except Exception as error:
            raise DataError(
                f"{path}: not a featcache store; name one made by slotlab extract (for example cache/dinov2.zarr)"
            ) from error
        if raw.get("schema") not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise IncompatibleError(
                f"{path}: store schema {raw.get('schema')}, this version reads {known}; extract it again"
            )
        if raw.get("dtype", "float16") not in ENCODINGS:
            raise IncompatibleError(
                f"{path}: stored as {raw['dtype']}, this version reads {', '.join(ENCODINGS)}; "
                "use the version that made it"
            )
        return cls(path, StoreSpec.from_json(raw))

    @property
    def encoding(self) -> Encoding:
        """The stored form of its tokens."""
        return ENCODINGS[self.spec.dtype]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, sorted."""
        return tuple(sorted(p.parent.name for p in self.path.glob(f"[!.]*/{manifest.NAME}")))

    def __getitem__(self, name: str) -> Split:
        if name not in self.splits:
            known = ", ".join(self.splits) or "none yet"
            raise UsageError(f"{self.path}: no split {name!r}; it has: {known}")
        return Split(self, name)

    def split(self, name: str | None) -> Split:
        """The split ``name``; None: ``train``, or the first one in a store without ``train``."""
        return self[name or ("train" if "train" in self.splits else next(iter(self.splits), "train"))]

    def tap(self, name: str | None) -> str:
        """The name of a tap, or of several, ``A+B``, that are read together; None: the first one.

        ``IncompatibleError`` if the store lacks one.
        """
        if name is None:
            return next(iter(self.spec.taps))
        for tap in taps_of(name):
            if tap not in self.spec.taps:
                raise IncompatibleError(f"{self.path}: no tap {tap!r}; it has: {', '.join(self.spec.taps)}")
        return name


class Split:
    """One split of a store: rows of frames, tables and statistics."""

    def __init__(self, store: FeatureStore, name: str) -> None:
        self.store = store
        self.name = name
        self.path = store.path / name
        self._arrays: dict[str, zarr.Array[Any]] = {}  # opened so far: opening one takes longer than reading an image
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
        """At most ``most`` finished videos, evenly spaced; of a rank's store the whole store's, if it has them."""
        if not self.spec.part:
            return spread(self.videos, most)
        chosen = spread(range(len(self.spec.lengths)), most)
        if not self.manifest.keys() >= set(chosen):
            self.require_complete()
        return chosen

    @cached_property
    def names(self) -> dict[int, str]:
        """The source's name for each finished video, followed by the position if several have the same name."""
        ids = self.manifest.ids()
        counts = Counter(ids.values())
        return {video: name if counts[name] == 1 else f"{name}#{video}" for video, name in ids.items()}

    @cached_property
    def digest(self) -> str:
        """A hash of what is stored of the split, and of how: two of the same hold the same values."""
        return digest((json.dumps([self.store.spec.identity(), self.spec.form()]), self.manifest.digest()))

    @property
    def complete(self) -> bool:
        """Whether all videos are here, finished, and the statistics cover them."""
        return not self.spec.part and self._finished

    @property
    def _finished(self) -> bool:
        return len(self.manifest) == len(self.spec.held) and self.spec.statistics_videos == len(self.spec.lengths)

    def require_complete(self) -> Split:
        """This split. ``DataError`` when its extraction has not finished, ``IncompatibleError`` for one of a rank."""
        if self.spec.part:
            raise IncompatibleError(
                f"{self.path}: has the videos of {self._rank}, for training alone; name the store that it was "
                f"exported from, {self.store.spec.exported_from}"
            )
        return self._require_finished("extraction", "extract")

    def require_share(self, rank: int, ranks: int) -> Split:
        """This split, to train on as one of ``ranks``: the whole split, or the part that was exported for this rank.

        ``DataError`` where it is unfinished, ``IncompatibleError`` for another rank's part.
        """
        if not self.spec.part:
            return self.require_complete()
        if tuple(self.spec.part[:2]) != (rank, ranks):
            raise IncompatibleError(
                f"{self.path}: has the videos of {self._rank}, this is rank {rank} of {ranks}; "
                + (
                    "name the folder of all parts with --cache"
                    if self.spec.part[1] == ranks
                    else f"start {self.spec.part[1]} processes with torchrun, or name the whole store with --cache"
                )
            )
        return self._require_finished("export", "export")

    @property
    def _rank(self) -> str:
        return f"rank {self.spec.part[0]} of {self.spec.part[1]}"

    def _require_finished(self, work: str, command: str) -> Split:
        if not self._finished:
            raise DataError(
                f"{self.path}: {work} unfinished ({len(self.manifest)} of {len(self.spec.held)} videos); "
                f"run the same slotlab {command} command again, it resumes"
            )
        return self

    @property
    def frames(self) -> int:
        """Number of real frames in finished videos."""
        return sum(self.spec.lengths[video] for video in self.manifest)

    def rows(self, video: int) -> slice:
        """Rows of the arrays that hold this video's frames."""
        start = int(self.spec.starts[video])
        return slice(start, start + self.spec.lengths[video])

    def clip_starts(self, clip: int) -> npt.NDArray[np.int64]:
        """First row of every run of ``clip`` consecutive frames of a finished video, in order: (clips,).

        Of a rank's store, in the videos that the rank trains on.
        """
        videos = np.fromiter((video for video in self.manifest if video in self.spec.own), np.int64)
        clips = np.maximum(self.spec.frames[videos] - clip + 1, 0)  # of each video
        skipped = self.spec.starts[videos] - (np.cumsum(clips) - clips)
        return np.repeat(skipped, clips) + np.arange(clips.sum())

    def valid_rows(self) -> npt.NDArray[np.int64]:
        """Rows of all finished videos' frames, padding left out, in order: (frames,)."""
        return self.clip_starts(1)

    def spans(self, most: int) -> list[slice]:
        """`valid_rows` as runs without a gap, each of at most ``most`` rows."""
        rows = self.valid_rows()
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
        ends = [(int(run[0]), int(run[-1]) + 1) for run in runs]
        return [slice(at, min(at + most, end)) for begin, end in ends for at in range(begin, end, most)]

    def array(self, path: str) -> zarr.Array[Any]:
        """The array at ``path`` below the split. ``DataError`` if it is missing or damaged."""
        if path not in self._arrays:
            try:
                item = self.group[path]
            except Exception as error:
                raise self._damaged(f"{self.name}/{path}/zarr.json") from error
            assert isinstance(item, zarr.Array)
            self._arrays[path] = item
        return self._arrays[path]

    def _damaged(self, what: str) -> DataError:
        return DataError(
            f"{self.store.path / what}: missing or damaged; run: slotlab verify --repair {self.store.path}"
        )

    def tokens(self, tap: str, video: int) -> torch.Tensor:
        """Patch tokens of one video as stored: float16 (T, N, D), or float32 from int8."""
        return self.read_tokens(tap, self.rows(video))

    def read_tokens(self, tap: str, rows: slice) -> torch.Tensor:
        """Patch tokens of consecutive rows (F, N, D), through zarr, decoded."""
        arrays = self.token_arrays(tap)
        return self.decoder(tap).decode({k: torch.from_numpy(np.asarray(a[rows])) for k, a in arrays.items()})

    def token_arrays(self, tap: str) -> dict[str, zarr.Array[Any]]:
        """The arrays that hold a tap's tokens, by their folders; those of several taps, ``A+B``, by their paths."""
        several, stored = taps_of(tap), self.store.encoding.arrays
        if len(several) > 1:
            return {array.path(tap): self.array(array.path(tap)) for tap in several for array in stored}
        return {array.folder: self.array(array.path(tap)) for array in stored}

    def decoder(self, tap: str) -> Decoder:
        """What makes tokens of :meth:`token_arrays`."""
        dims = {tap: self.store.spec.taps[tap].dim for tap in taps_of(tap)}
        return self.store.encoding if len(dims) == 1 else Joined(self.store.encoding, dims)

    def video(self, video: int) -> npt.NDArray[np.uint8]:
        """Frames (T, H, W, 3)."""
        return np.asarray(self.array("video")[self.rows(video)])

    def segmentations(self, video: int) -> npt.NDArray[np.uint8]:
        """Ground-truth masks (T, H, W): 0 background, k for instance k - 1. ``DataError`` without masks."""
        if not self.spec.masks:
            raise DataError(f"{self.path}: its source had no masks, so there is nothing to score against")
        return np.asarray(self.array("segmentations")[self.rows(video)])

    def ignored(self, video: int) -> npt.NDArray[np.bool_]:
        """Pixels whose truth is not known (T, H, W); they are 0 in the masks, and no background."""
        if not self.spec.ignored:
            return np.zeros((self.spec.lengths[video], *self.spec.frame_size), bool)
        return np.asarray(self.array("ignored")[self.rows(video)])

    def labelled(self, video: int) -> npt.NDArray[np.bool_]:
        """Frames (T,) with pixels whose truth is known."""
        return np.asarray(~self.ignored(video).all((1, 2)))

    @cached_property
    def has_truth(self) -> bool:
        """Whether the truth of any pixel is known."""
        return self.spec.masks and any(self.labelled(video).any() for video in self.videos)

    def instances(self, video: int) -> tuple[Instance, ...]:
        """The instance table of a video."""
        return self.manifest[video].instances

    def statistics(self, tap: str) -> Moments:
        """Moments of this split's tokens, as gathered by the extraction that finished it; all of them, in a rank's."""
        if not self.spec.part:
            self.require_complete()
        group = self.group[f"statistics/{tap}"]
        assert isinstance(group, zarr.Group)
        return Moments.from_arrays({name: np.asarray(array[...]) for name, array in group.arrays()})
