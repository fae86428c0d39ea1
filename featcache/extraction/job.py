"""Reads, runs and stores the groups of one split, in any process."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from featcache.backbones.backbone import Backbone
from featcache.backbones.inference import forward
from featcache.errors import DataError
from featcache.extraction.fit import recounted
from featcache.extraction.plan import ExtractPlan, SplitPlan, read_shown
from featcache.moments import Moments, NonFiniteTokensError
from featcache.sources.video import Source, Video
from featcache.store.chunks import Encoded, OpenShard, encoded_video, write_chunks
from featcache.store.encoding import ENCODINGS, FEATURES, Stored
from featcache.store.manifest import Row
from featcache.store.reading import FeatureStore, Split
from featcache.store.spec import SplitSpec, StoreSpec
from featcache.store.writing import SplitWriter

Tokens = Mapping[str, Stored]  # tap -> tokens of one video, in the store's form

TapMoments = Mapping[str, Moments]

GROUP_BYTES = 2 << 30  # of frames that are held for one pass, unless a single video has more


@dataclass(frozen=True)
class Shown:
    """One video as the backbone gets it, and as it is stored."""

    frames: npt.NDArray[np.uint8]  # (T, H, W, 3)
    stored: Video


@dataclass(frozen=True)
class SplitJob:
    """The work on one split, group by group, in any process."""

    path: Path  # the split's folder
    name: str
    store: StoreSpec
    spec: SplitSpec
    location: str  # of the source
    resize_frames: bool
    origins: Sequence[int | None] = ()  # place of each video in the source; None where it is no longer

    @classmethod
    def of(cls, writer: SplitWriter, split: SplitPlan, plan: ExtractPlan, source: Source) -> SplitJob:
        """The job of a split that is open for writing."""
        path = writer.path.absolute()
        spec = replace(writer.spec, names=())  # it is sent to workers with every group
        return cls(path, writer.name, plan.spec, spec, source.location, plan.resize_frames, split.origins)

    def groups(self) -> list[range]:
        """Videos that share batches; only their position, the batch size and the size of the frames decide.

        A group has its files to itself: videos that share a shard are in one.
        """
        size = min(self.store.batch_size // self.spec.chunk_frames, GROUP_BYTES // self.chunk_bytes)
        file_rows = self.spec.chunk_frames * max(1, self.spec.shard_chunks)
        begins = np.flatnonzero(self.spec.starts[:-1] % file_rows == 0).tolist()  # videos that begin a file
        groups, first = [], 0
        for begin, end in pairwise([*begins, len(self.spec.lengths)]):
            if end - first > size and begin > first:
                groups.append(range(first, begin))
                first = begin
        return [*groups, range(first, len(self.spec.lengths))]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the frames of a full chunk: most videos have one."""
        return 3 * self.spec.chunk_frames * self.spec.frame_size[0] * self.spec.frame_size[1]

    def read(self, source: Source, index: int, done: Container[int]) -> Shown:
        """One video of the split; ``DataError`` if it is damaged or does not fit.

        One that is ``done`` is read from the store: it shares its group's batch, and its source may have lost it.
        """
        if index in done:
            frames = self._stored.video(index)
            return Shown(frames, Video("", frames))
        origin = self.origins[index]
        assert origin is not None, "a video that its source has lost was asked for"
        stored = self.spec.frame_size if self.resize_frames else None
        video = read_shown(source, self.name, origin, self.store.frame_stride, self.store.preprocessing, stored)
        return Shown(video.frames, _resized(video, self.spec, self.resize_frames, source.where(self.name, origin)))

    def forward(self, backbone: Backbone, videos: Sequence[Shown]) -> list[Tokens]:
        """Each video's tokens in the store's form, on the backbone's device."""
        encode = ENCODINGS[self.store.dtype].encode
        found = forward(backbone, [v.frames for v in videos], self.store.batch_size, self.store.precision)
        return [{tap: encode(tokens) for tap, tokens in taps.items()} for taps in found]

    def measure(self, group: range, done: Container[int], tokens: Sequence[Tokens]) -> TapMoments:
        """Moments of the stored tokens over the whole group; finished videos are read back."""
        return {tap: self._moments(group, tap, done, tokens) for tap in self.store.taps}

    def store_group(
        self,
        group: range,
        done: Container[int],
        videos: Sequence[Shown],
        tokens: Sequence[Tokens],
        each: Callable[[Callable[[int], Any], Sequence[int]], Iterator[Any]] = map,
    ) -> Iterator[Sequence[Row]]:
        """Make the chunks of the group's new videos durable; yields the manifest rows to append, in order: those of
        videos that became durable together.

        ``each`` may be the ``map`` of an executor, which writes or encodes several videos at a time.
        """
        new = [position for position, index in enumerate(group) if index not in done]

        def encode(position: int) -> Encoded:
            return encoded_video(self.store, self.spec, group[position], videos[position].stored, tokens[position])

        def write(position: int) -> Sequence[Row]:
            video = videos[position].stored
            return (write_chunks(self.path, self.store, self.spec, group[position], video, tokens[position]),)

        return self._fill_shards(each(encode, new)) if self.spec.shard_chunks else each(write, new)

    def _fill_shards(self, videos: Iterable[Encoded]) -> Iterator[Sequence[Row]]:
        shard = OpenShard(self.path, self.store, self.spec)
        for video in videos:
            yield shard.put(video)
        yield shard.flush()

    @cached_property
    def _stored(self) -> Split:
        return Split(FeatureStore.open(self.path.parent), self.path.name)

    def _stored_tokens(self, group: range, tap: str) -> list[torch.Tensor]:
        """The tokens (T, N, D) of each video of a finished group, by one read: a shard has many of them."""
        starts = self.spec.starts[group.start : group.stop + 1].tolist()
        rows = self._stored.read_tokens(tap, slice(starts[0], starts[-1]))
        return [rows[at - starts[0] :][: self.spec.lengths[i]] for at, i in zip(starts[:-1], group, strict=True)]

    def _moments(self, group: range, tap: str, done: Container[int], tokens: Sequence[Tokens]) -> Moments:
        decode = ENCODINGS[self.store.dtype].decode
        if tokens:
            stored = [
                self._stored.tokens(tap, index) if index in done else decode(tokens[position][tap])
                for position, index in enumerate(group)
            ]
        else:
            stored = self._stored_tokens(group, tap)
        device = tokens[0][tap][FEATURES].device if tokens else "cpu"
        lengths = [self.spec.lengths[index] for index in group]
        try:
            return Moments.from_tokens(torch.cat([video.to(device) for video in stored]), lengths)
        except NonFiniteTokensError:
            for index, video in zip(group, stored, strict=True):
                try:
                    Moments.from_tokens(video)
                except NonFiniteTokensError as error:
                    raise DataError(f"{self.location}: {self.name} video {index}, tap {tap}: {error}") from error
            raise


def merge(total: dict[str, Moments], part: TapMoments) -> None:
    """Add moments by tap to ``total``. Each group is measured as a whole, and groups are merged in order, wherever they
    ran, so that sums are rounded alike."""
    for tap, moments in part.items():
        total[tap] = total[tap] + moments if tap in total else moments


def _resized(video: Video, spec: SplitSpec, resize: bool, where: str) -> Video:
    """The video at the store's frame size. ``DataError`` if that needs a resize that the user did not ask for."""
    if (video.segmentations is not None) != spec.masks:
        raise DataError(f"{where}: {'has' if not spec.masks else 'lacks'} masks, unlike the first video of its split")
    if video.ignore is not None and video.segmentations is not None:  # a source may count pixels of every number
        video = replace(video, instances=recounted(video, video.segmentations))
    if spec.masks and not spec.ignored and video.ignored.any():
        raise DataError(
            f"{where}: has pixels or frames whose truth is not known, and the store, by an earlier version, has no "
            "place for that; extract to another --out"
        )
    if video.frames.shape[1:3] == spec.frame_size:
        return video
    height, width = spec.frame_size
    if not resize:
        raise DataError(
            f"{where}: {video.frames.shape[2]}x{video.frames.shape[1]} frames in a store of {width}x{height}; "
            f"pass --frame-size {height}x{width} to store all frames at that size"
        )

    def resized(images: np.ndarray, how: Image.Resampling) -> np.ndarray:
        return np.stack([np.asarray(Image.fromarray(i).resize((width, height), how)) for i in images])

    frames = resized(video.frames, Image.Resampling.BICUBIC)
    if video.segmentations is None:
        return replace(video, frames=frames)
    masks = resized(video.segmentations, Image.Resampling.NEAREST)
    ignore = None if video.ignore is None else resized(video.ignore, Image.Resampling.NEAREST)
    return replace(video, frames=frames, segmentations=masks, instances=recounted(video, masks), ignore=ignore)
