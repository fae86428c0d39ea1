"""What a plan knows of a data set: what its store would be, known without extracting it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from featcache.backbones.backbone import Backbone
from featcache.sources.video import Source
from featcache.store.encoding import ENCODINGS, FEATURES
from featcache.store.layout import array_bytes, array_layouts
from featcache.store.reading import FeatureStore
from featcache.store.spec import MAX_CHUNK_FRAMES, SplitSpec, StoreSpec, TapSpec, taps_of
from featcache.stream.rows import TORCH_DTYPES
from featcache.stream.staging import Format
from featcache.stream.stream import VIDEO
from featcache.words import Dtype
from slotlab.models.inputs import TRACKS


@dataclass(frozen=True)
class DataSet:
    """A store's own words for what it holds, or will hold; one rank's store plans its own share of a training."""

    name: str
    spec: StoreSpec
    splits: Mapping[str, SplitSpec]
    processes: int = 1  # that share every batch of a store which is not in parts

    @classmethod
    def of_store(cls, store: FeatureStore, processes: int = 1) -> DataSet:
        """Of a store that so many processes train on: the share of one of them."""
        splits = {name: store[name].spec for name in store.splits}
        part = next((f" (rank {spec.part[0]} of {spec.part[1]})" for spec in splits.values() if spec.part), "")
        shared = f" (one of {processes} processes)" if processes > 1 and not part else ""
        return cls(f"{store.path}{part}{shared}", store.spec, splits, processes)

    @classmethod
    def of_source(cls, source: Source, backbone: Backbone) -> DataSet:
        """Of all videos of a source, of which one a split is decoded: it tells whether there are masks."""
        splits = {}
        for name in source.splits():
            probe = source.read(name, 0)
            height, width = source.size(name, 0) or probe.frames.shape[1:3]
            splits[name] = _split(tuple(source.lengths(name)), (height, width), probe.segmentations is not None)
        return cls(source.location, _spec(backbone), splits)

    @classmethod
    def of_counts(
        cls, videos: int, frames: int, frame_size: tuple[int, int], backbone: Backbone, split: str
    ) -> DataSet:
        """Of so many videos with masks, all of one length."""
        name = f"{videos} videos of {frames} frames"
        return cls(name, _spec(backbone), {split: _split((frames,) * videos, frame_size, True)})

    def tracked(self, slots: int) -> DataSet:
        """The tracks of these videos as a run of so many slots leaves them (``slotlab slots``); not its vectors."""
        tap, of = next(iter(self.spec.taps.items()))
        taps = {TRACKS: TapSpec((slots, 1), of.dim + of.patches + 2)}
        model = {"tap": tap, "grid": list(of.grid), "refined": True}
        return replace(self, spec=replace(self.spec, taps=taps, model=model))

    def stored_as(self, dtype: Dtype) -> DataSet:
        """The same data in another stored form."""
        return replace(self, spec=replace(self.spec, dtype=dtype))

    def held(self) -> dict[str, SplitSpec]:
        """The splits, of videos that the store has."""
        return {name: _of_videos(spec, spec.held) for name, spec in self.splits.items()}

    def trained(self, split: str) -> SplitSpec:
        """A split, of videos that are trained on from this store."""
        return _of_videos(self.splits[split], self.splits[split].own)

    def ranks(self, split: str) -> int:
        """The processes that share a batch of it."""
        part = self.splits[split].part
        return part[1] if part else self.processes

    def samples(self, split: str, clip: int) -> int:
        """Clips of an epoch that a process trains on."""
        found = int((np.asarray(self.trained(split).lengths) - clip + 1).clip(0).sum())
        return found if self.splits[split].part else found // self.processes

    @property
    def frames(self) -> int:
        return sum(sum(split.lengths) for split in self.held().values())

    def token_bytes(self, split: str | None = None, tap: str | None = None) -> int:
        """Bytes on disk of the tokens, exactly: of all splits and taps, or of one."""
        splits = self.held()
        return sum(self._bytes(spec, tap) for name, spec in splits.items() if split in (None, name))

    def _bytes(self, split: SplitSpec, tap: str | None) -> int:
        folders = {array.folder for array in ENCODINGS[self.spec.dtype].arrays}
        return sum(
            array_bytes(layout, split)
            for layout in array_layouts(self.spec, split)
            if layout.name.partition("/")[0] in folders and tap in (None, layout.name.partition("/")[2])
        )

    def frame_bytes(self, split: str | None = None) -> int:
        """Bytes of frames and masks uncompressed; on disk they are fewer."""
        return sum(
            array_bytes(layout, spec)
            for name, spec in self.held().items()
            for layout in array_layouts(replace(self.spec, taps={}), spec)
            if split in (None, name)
        )

    def stream_bytes(self, split: str, tap: str) -> int:
        """Bytes that live somewhere while a tap is streamed: its tokens, or all frames, padding included."""
        spec = self.trained(split)
        if tap != VIDEO:
            return sum(self._bytes(spec, each) for each in taps_of(tap))
        return spec.rows * int(np.prod(spec.frame_size)) * 3

    def formats(self, split: str, tap: str, samples: tuple[int, int]) -> tuple[list[Format], Format | None]:
        """Of a batch of (samples, frames of each): the arrays as they are read, and what is decoded from them; None
        where the first of them is the batch."""
        if tap == VIDEO:
            return [Format((*samples, *self.splits[split].frame_size, 3), TORCH_DTYPES["uint8"])], None
        encoding, of, several = ENCODINGS[self.spec.dtype], self.spec.tap(tap), taps_of(tap)
        stored = [
            Format((*samples, *array.shape(of.patches, self.spec.taps[each].dim)), TORCH_DTYPES[array.dtype])
            for each in several
            for array in encoding.arrays
        ]
        assert encoding.arrays[0].folder == FEATURES
        plain = encoding.plain and len(several) == 1
        return stored, None if plain else Format((*samples, of.patches, of.dim), encoding.decoded)

    @property
    def opened(self) -> FeatureStore:
        """The store's specification where a store is asked for; it has no files."""
        return FeatureStore(Path(self.name), self.spec)


def _of_videos(split: SplitSpec, videos: Sequence[int]) -> SplitSpec:
    """A split of some of its videos, without their names."""
    lengths = tuple(split.lengths[video] for video in videos)
    return replace(split, lengths=lengths, names=(), fingerprints=(), part=())


def _spec(backbone: Backbone) -> StoreSpec:
    taps = {tap: TapSpec(backbone.grid, backbone.dims[tap]) for tap in backbone.taps}
    return StoreSpec(backbone.spec.name, backbone.provenance, backbone.preprocessing, taps)


def _split(lengths: tuple[int, ...], frame_size: tuple[int, int], masks: bool) -> SplitSpec:
    return SplitSpec("", lengths, min(max(lengths), MAX_CHUNK_FRAMES), frame_size, masks, ignored=masks)
