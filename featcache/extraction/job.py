"""How the groups of one split are read, run and stored, in whichever process."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from featcache.backbones.backbone import Backbone
from featcache.backbones.inference import forward
from featcache.errors import DataError
from featcache.extraction.fit import recounted
from featcache.extraction.plan import ExtractPlan, read_shown
from featcache.moments import Moments, NonFiniteTokensError
from featcache.sources.video import Source, Video
from featcache.store.encoding import ENCODINGS, FEATURES, Stored
from featcache.store.manifest import Row
from featcache.store.reading import FeatureStore, Split
from featcache.store.spec import SplitSpec, StoreSpec
from featcache.store.writing import SplitWriter, write_chunks

Tokens = Mapping[str, Stored]  # tap -> one video's, in the store's form

TapMoments = Mapping[str, Moments]

GROUP_BYTES = 2 << 30  # of frames that are held for one pass, unless a single video has more


@dataclass(frozen=True)
class Shown:
    """One video as the backbone is shown it, and as it is stored."""

    frames: npt.NDArray[np.uint8]  # (T, H, W, 3)
    stored: Video


@dataclass(frozen=True)
class SplitJob:
    """How the groups of one split are read, run and stored, in whichever process."""

    path: Path  # the split's folder
    name: str
    store: StoreSpec
    spec: SplitSpec
    location: str  # of the source, for messages
    resize_frames: bool

    @classmethod
    def of(cls, writer: SplitWriter, plan: ExtractPlan, source: Source) -> SplitJob:
        path = writer.path.absolute()
        return cls(path, writer.name, plan.spec, writer.spec, source.location, plan.resize_frames)

    def groups(self) -> list[range]:
        """Videos that share batches: a matter of position, batch size and size of the frames alone."""
        size = max(1, min(self.store.batch_size // self.spec.chunk_frames, GROUP_BYTES // self.chunk_bytes))
        videos = len(self.spec.lengths)
        return [range(i, min(i + size, videos)) for i in range(0, videos, size)]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the frames of a full chunk: most videos have one."""
        return 3 * self.spec.chunk_frames * self.spec.frame_size[0] * self.spec.frame_size[1]

    def read(self, source: Source, index: int) -> Shown:
        stored = self.spec.frame_size if self.resize_frames else None
        video = read_shown(source, self.name, index, self.store.frame_stride, self.store.preprocessing, stored)
        return Shown(video.frames, _resized(video, self.spec, self.resize_frames, source.where(self.name, index)))

    def forward(self, backbone: Backbone, videos: Sequence[Shown]) -> list[Tokens]:
        """Each video's tokens as they are stored, where the backbone runs."""
        encode = ENCODINGS[self.store.dtype].encode
        found = forward(backbone, [v.frames for v in videos], self.store.batch_size, self.store.precision)
        return [{tap: encode(tokens) for tap, tokens in taps.items()} for taps in found]

    def measure(self, group: range, done: Container[int], tokens: Sequence[Tokens]) -> TapMoments:
        """Moments of the group's videos together, of the tokens as stored; old videos are read back."""
        return {tap: self._moments(group, tap, done, tokens) for tap in self.store.taps}

    def store_group(
        self,
        group: range,
        done: Container[int],
        videos: Sequence[Shown],
        tokens: Sequence[Tokens],
        each: Callable[[Callable[[int], Row], Sequence[int]], Iterator[Row]] = map,
    ) -> Iterator[Row]:
        """Make the chunks of the group's new videos durable; gives the rows to append, in order.

        ``each`` may be an executor's ``map``, which writes several at a time.
        """

        def store(position: int) -> Row:
            return write_chunks(
                self.path, self.store, self.spec, group[position], videos[position].stored, tokens[position]
            )

        return each(store, [position for position, index in enumerate(group) if index not in done])

    @cached_property
    def _stored(self) -> Split:
        return Split(FeatureStore.open(self.path.parent), self.name)

    def _moments(self, group: range, tap: str, done: Container[int], tokens: Sequence[Tokens]) -> Moments:
        decode = ENCODINGS[self.store.dtype].decode
        stored = [
            self._stored.tokens(tap, index) if index in done else decode(tokens[position][tap])
            for position, index in enumerate(group)
        ]
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
    """Add moments by tap to ``total``. Videos are measured together with their group, and groups are merged in order,
    wherever they ran: the sums are rounded alike."""
    for tap, moments in part.items():
        total[tap] = total[tap] + moments if tap in total else moments


def _resized(video: Video, spec: SplitSpec, resize: bool, where: str) -> Video:
    """The video at the store's frame size, or ``DataError`` if it would have to be resized unasked."""
    if (video.segmentations is not None) != spec.masks:
        raise DataError(f"{where}: {'has' if not spec.masks else 'lacks'} masks, unlike the first video of its split")
    if video.frames.shape[1:3] == spec.frame_size:
        return video
    height, width = spec.frame_size
    if not resize:
        raise DataError(
            f"{where}: {video.frames.shape[2]}x{video.frames.shape[1]} frames in a store of {width}x{height}; "
            "pass --frame-size N to store all frames at one size"
        )

    def resized(images: np.ndarray, how: Image.Resampling) -> np.ndarray:
        return np.stack([np.asarray(Image.fromarray(i).resize((width, height), how)) for i in images])

    frames = resized(video.frames, Image.Resampling.BICUBIC)
    if video.segmentations is None:
        return replace(video, frames=frames)
    masks = resized(video.segmentations, Image.Resampling.NEAREST)
    ignore = None if video.ignore is None else resized(video.ignore, Image.Resampling.NEAREST)
    return replace(video, frames=frames, segmentations=masks, instances=recounted(video, masks), ignore=ignore)
