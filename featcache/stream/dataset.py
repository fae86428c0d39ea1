"""A split as PyTorch data sets, for trainers that have their own loop: single clips by index, or batches in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from featcache.errors import UsageError
from featcache.store.encoding import Decoder
from featcache.store.reading import FeatureStore, Split
from featcache.stream.order import clip_starts
from featcache.stream.rows import TORCH_DTYPES, Rows, open_rows
from featcache.stream.stream import FeatureStream, decoder, feature_arrays
from featcache.words import Residence

Item = dict[str, Any]
GROUND_TRUTH = {"frames": "video", "segmentations": "segmentations"}  # key of an item -> array of the store


class Clips(Dataset[Item]):
    """Clips of a split by index; the keys of an item, before ``names`` renames them:

    ==================  ==========================================================================
    ``features``        tokens (T, N, D) in ``dtype``; of several taps, ``features/TAP`` each
    ``frames``          (T, H, W, 3) uint8, if asked for
    ``segmentations``   (T, H, W) uint8, 0 background, if asked for
    ``video``           position of the video in the split, int
    ``frame``           position of the clip's first frame in its video, int
    ==================  ==========================================================================

    Without ``clip`` an item is a single frame and the T axis is gone. It works with any sampler and with worker
    processes, whatever their start method: each opens the store for itself. Reading is a copy out of a memory map, so
    a few workers, or none, keep up with most trainers.

    Args:
        split: a finished split of a store.
        taps: the taps to read; none: the store's first.
        clip: T, the number of frames of a clip; None: single frames.
        stride: distance of the frames of a clip.
        every: distance of the first frames of neighbouring clips of one video; ``clip * stride`` gives disjoint ones.
        dtype: of the features; None keeps float16 (float32 of a store of int8).
        frames, segmentations: whether items hold them.
        names: key -> the key by which a trainer calls it, e.g. ``{"features": "video", "video": "position"}``.

    Raises ``UsageError`` where no video is as long as a clip, or two keys would be called the same; ``DataError`` for
    damaged files when they are read.
    """

    def __init__(
        self,
        split: Split,
        taps: Sequence[str] = (),
        *,
        clip: int | None = None,
        stride: int = 1,
        every: int = 1,
        dtype: torch.dtype | None = torch.float32,
        frames: bool = False,
        segmentations: bool = False,
        names: Mapping[str, str] | None = None,
    ) -> None:
        for name, value in {"clip": clip or 1, "stride": stride, "every": every}.items():
            if value < 1:
                raise UsageError(f"{name}={value}: must be at least 1")
        self.clip, self.stride, self.dtype = clip, stride, dtype
        self.taps = tuple(split.store.tap(tap) for tap in taps or (None,))
        self._place = (split.store.path, split.name)
        span = ((clip or 1) - 1) * stride + 1  # rows from a clip's first frame to its last
        starts = clip_starts(split, span)
        first = split.spec.starts[np.searchsorted(split.spec.starts, starts, side="right") - 1]
        self.starts = starts[(starts - first) % every == 0]  # (clips,) rows
        self._span = span
        self._truth = [key for key, wanted in {"frames": frames, "segmentations": segmentations}.items() if wanted]
        if segmentations and not split.spec.masks:
            raise UsageError(f"{split.path}: its source had no masks; leave out segmentations=True")
        self._names = _renaming(names, self._keys())
        self._opened: tuple[int, _Readers] | None = None

    def _keys(self) -> list[str]:
        return [*map(self._feature_key, self.taps), *self._truth, "video", "frame"]

    def _feature_key(self, tap: str) -> str:
        return "features" if len(self.taps) == 1 else f"features/{tap}"

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Several items by one read; PyTorch's loader calls it with the indices of a batch."""
        readers = self._readers()
        starts = self.starts[np.asarray(indices, np.int64)]
        order = np.argsort(starts, kind="stable")  # readers take rows in ascending order
        back = np.argsort(order)
        found: dict[str, Any] = {}  # (B, ...) each
        for tap in self.taps:
            tokens = readers.tokens[tap](starts[order], self._span)[back][:, :: self.stride]  # (B, T, N, D)
            found[self._feature_key(tap)] = tokens if self.dtype is None else tokens.to(self.dtype)
        for key in self._truth:
            found[key] = readers.truth[key](starts[order], self._span)[back][:, :: self.stride]
        if self.clip is None:
            found = {key: values[:, 0] for key, values in found.items()}
        videos = np.searchsorted(readers.split.spec.starts, starts, side="right") - 1
        found["video"] = videos.tolist()
        found["frame"] = (starts - readers.split.spec.starts[videos]).tolist()
        named = {self._names[key]: values for key, values in found.items()}
        return [{key: values[i] for key, values in named.items()} for i in range(len(starts))]

    def _readers(self) -> _Readers:
        if self._opened is None or self._opened[0] != os.getpid():  # a fork must not share its parent's locks
            path, name = self._place
            self._opened = (os.getpid(), _Readers(FeatureStore.open(path)[name], self.taps, self._truth))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}


class _Readers:
    """What one process has open of a split."""

    def __init__(self, split: Split, taps: Sequence[str], truth: Sequence[str]) -> None:
        self.split = split
        self.tokens = {tap: _Gather(split, feature_arrays(split, tap), decoder(split, tap)) for tap in taps}
        self.truth = {key: _Gather(split, {key: split.array(GROUND_TRUTH[key])}, None) for key in truth}


class _Gather:
    """Reads spans of consecutive rows of a few arrays, and decodes them."""

    def __init__(self, split: Split, arrays: Mapping[str, Any], encoding: Decoder | None) -> None:
        self._rows: dict[str, Rows] = {name: open_rows(split, array.path) for name, array in arrays.items()}
        self._formats = {name: (array.shape[1:], TORCH_DTYPES[str(array.dtype)]) for name, array in arrays.items()}
        self._encoding = encoding

    def __call__(self, starts: np.ndarray[Any, np.dtype[np.int64]], span: int) -> Tensor:
        """(B, span, ...) from each start (B,), which ascend."""
        read = {}
        for name, rows in self._rows.items():
            shape, dtype = self._formats[name]
            read[name] = torch.empty((len(starts), span, *shape), dtype=dtype)
            rows.gather(starts, read[name])
        return next(iter(read.values())) if self._encoding is None else self._encoding.decode(read)


def _renaming(names: Mapping[str, str] | None, keys: Sequence[str]) -> dict[str, str]:
    """What each key of an item is called. ``UsageError`` for an unknown key, or two that are called the same."""
    names = names or {}
    if unknown := names.keys() - set(keys):
        raise UsageError(f"names: no key {sorted(unknown)[0]!r}; an item has: {', '.join(keys)}")
    found: dict[str, str] = {}  # by what it is called
    for key in keys:
        called = names.get(key, key)
        if called in found:
            raise UsageError(
                f"names: {found[called]!r} and {key!r} would both be called {called!r}; give {key!r} another name, too"
            )
        found[called] = key
    return {key: called for called, key in found.items()}


class Batches(IterableDataset[Item]):
    """Shuffled batches of a split, an epoch each time it is iterated; see :class:`FeatureStream` for the order.

    Give it to ``DataLoader(batches, batch_size=None)``. Items are ``features`` (B, N, D), or (B, T, N, D) for clips,
    ``video`` and ``frame`` (B,) int64, renamed by ``names``; they own their memory. Under ``torch.distributed`` each
    rank, and with ``num_workers`` each worker, takes its part of the order, so nothing is seen twice in an epoch. The
    next iteration is the next epoch; :meth:`set_epoch` goes to any. ``batch_size`` is that of one rank, or worker; the
    last batches of an epoch, which would be smaller, are left out.
    """

    def __init__(
        self,
        split: Split,
        tap: str | None = None,
        *,
        batch_size: int,
        clip: int | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = torch.float32,
        residence: Residence = "auto",
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._place = (split.store.path, split.name)
        self.tap = split.store.tap(tap)
        self.batch_size, self.clip, self.seed = batch_size, clip, seed
        self.dtype, self.residence = dtype, residence
        self._names = _renaming(names, ("features", "video", "frame"))
        self._samples = len(clip_starts(split, clip or 1))
        self._epoch = 0
        self._rank, self._world = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if not len(self):
            raise UsageError(
                f"{split.path}: {self._samples} samples make no batch of {batch_size} x {self._world} ranks"
            )

    def __len__(self) -> int:
        """Number of batches of this rank in an epoch, without workers or with one."""
        return self._samples // (self.batch_size * self._world)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, from 0, as ``DistributedSampler.set_epoch`` does."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        path, name = self._place
        split = FeatureStore.open(path)[name]
        stream = FeatureStream(
            split,
            self.tap,
            batch_size=self.batch_size,
            clip=self.clip or 1,
            seed=self.seed,
            residence=self.residence,
            rank=self._rank * workers + number,
            world_size=self._world * workers,
        )
        together = self.batch_size * self._world * workers
        stream.samples_seen = self._epoch * self._samples
        self._epoch += 1
        starts = split.spec.starts
        for _, batch in zip(range(self._samples // together), stream, strict=False):
            videos = np.searchsorted(starts, batch.rows, side="right") - 1
            item = {
                "features": batch.features.to(self.dtype or batch.features.dtype, copy=True),
                "video": torch.from_numpy(videos),
                "frame": torch.from_numpy(batch.rows - starts[videos]),
            }
            yield {self._names[key]: value for key, value in item.items()}
