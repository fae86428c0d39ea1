"""The order of samples: shuffled epochs that follow each other, in each share of a split's videos."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache.errors import UsageError
from featcache.store.reading import Split

Rows = npt.NDArray[np.int64]


class Order:
    """The order of some samples: a pure function of the seed and of how many were taken.

    Args:
        starts: first row of each sample, ascending: (samples,).
        share: number of the share that they are; None if they are a whole split.
    """

    def __init__(self, starts: Rows, share: int | None = None) -> None:
        self.starts = starts
        self._share = () if share is None else (share,)
        self._epoch: tuple[int, int, Rows] | None = None  # the last one: seed, number, order

    def take(self, seed: int, taken: int, count: int) -> Rows:
        """The first rows of the next ``count`` samples, in ascending order: neighbours on disk are read together.

        Epochs follow each other without a gap, so they may be the end of one and the start of the next.
        """
        epochs, places = np.divmod(np.arange(taken, taken + count), len(self.starts))
        drawn = [self._permutation(seed, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.sort(self.starts[np.concatenate(drawn)])

    def _permutation(self, seed: int, epoch: int) -> Rows:
        if self._epoch is None or self._epoch[:2] != (seed, epoch):
            generator = np.random.default_rng((seed, epoch, *self._share))
            self._epoch = seed, epoch, generator.permutation(len(self.starts))
        return self._epoch[2]


def orders(split: Split, clip: int, shares: int) -> list[Order]:
    """The order of each share's clips of ``clip`` frames; of a rank's store that of its share alone.

    ``UsageError`` if a share has none.
    """
    starts = clip_starts(split, clip)
    if shares == 1:
        return [Order(starts)]
    found = []
    for share, videos in enumerate(split.spec.shares(shares)):
        if split.spec.part and share != split.spec.part[0]:
            continue
        begin, end = split.spec.starts[[videos.start, videos.stop]]
        own = starts[(starts >= begin) & (starts < end)]
        if not len(own):
            raise UsageError(f"{split.path}: no clips of {clip} frames in share {share} of {shares}; use fewer ranks")
        found.append(Order(own, share))
    return found


def clip_starts(split: Split, clip: int) -> Rows:
    """First row of every run of ``clip`` consecutive frames in a finished video: (samples,). ``UsageError`` if none."""
    starts = split.clip_starts(clip)
    if not len(starts):
        longest = max(split.spec.lengths, default=0)
        raise UsageError(f"{split.path}: no clips of {clip} frames; the longest video has {longest}")
    return starts
