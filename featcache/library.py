"""featcache as a library: open a store, read it, stream it, feed it to a trainer, and make one.

Everything public is named in ``featcache.__all__``; the rest may change without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from featcache.errors import UsageError
from featcache.sources.reading import Reading
from featcache.store.reading import FeatureStore
from featcache.stream.dataset import Batches, Clips
from featcache.stream.stream import FeatureStream
from featcache.words import Residence

Progress = Callable[[str, int, int], None]  # split, frames done, frames in all


class Cache(FeatureStore):
    """A store, and the ways to read it. ``cache["train"]`` is a :class:`featcache.store.reading.Split`:

    its ``tokens(tap, video)`` (T, N, D), ``video(video)`` (T, H, W, 3), ``segmentations(video)`` (T, H, W),
    ``instances(video)`` and ``statistics(tap)``. ``cache.splits``, ``cache.spec.taps`` say what there is.
    """

    def stream(
        self,
        split: str | None = None,
        tap: str | None = None,
        *,
        batch_size: int,
        clip: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        residence: Residence = "auto",
        rank: int = 0,
        world_size: int = 1,
    ) -> FeatureStream:
        """Endless shuffled batches in reused buffers: the fastest way to a trainer; see :class:`FeatureStream`.

        ``split`` is by default ``train``, ``tap`` the store's first.
        """
        found = self.split(split).require_complete()
        return FeatureStream(
            found,
            self.tap(tap),
            batch_size=batch_size,
            clip=clip,
            seed=seed,
            device=device,
            residence=residence,
            rank=rank,
            world_size=world_size,
        )

    def clips(self, split: str | None = None, *taps: str, **options: Any) -> Clips:
        """A map-style data set for ``torch.utils.data.DataLoader``; see :class:`Clips` for its options."""
        return Clips(self.split(split).require_complete(), taps, **options)

    def batches(self, split: str | None = None, tap: str | None = None, **options: Any) -> Batches:
        """An iterable data set of whole batches; see :class:`Batches` for its options."""
        return Batches(self.split(split).require_complete(), tap, **options)


def open(path: str | Path) -> Cache:
    """Open a store. Raises ``DataError`` where there is none, ``IncompatibleError`` for one of another version."""
    store = FeatureStore.open(path)
    return Cache(store.path, store.spec)


def extract(
    data: str | Path | None,
    out: str | Path,
    *,
    backbone: str = "dinov2",
    taps: Sequence[str] = (),
    input_size: int | tuple[int, int] | None = None,
    weights: str | None = None,
    device: str = "auto",
    reading: Reading | None = None,
    progress: Progress = lambda *_: None,
    **options: Any,
) -> Cache:
    """Run a frozen backbone over ``data`` once, as ``slotlab extract`` does, and open the finished store.

    Args:
        data: what ``--data`` takes; None is the embedded sample.
        out: the store to make or to resume.
        input_size: of the backbone, in pixels: a side, or (rows, columns); None is the backbone's own.
        weights: checkpoint file, or ``random``; None fetches the published ones.
        reading: how masks and loose images are taken; see `featcache.sources.reading.Reading`.
        progress: called with a split, its frames done, and its frames in all.
        options: the fields of :class:`featcache.extraction.plan.ExtractOptions` (``splits``, ``dtype``,
            ``frame_stride``, ``max_videos``, ``batch_size``, ``precision``, ``frame_size``, ``fit``).

    Raises ``DataError`` for data that are missing or damaged and for a full disk, ``IncompatibleError`` where ``out``
    holds other features, ``UsageError`` for options that mean nothing. What is finished stays, and is not done again.
    """
    from featcache.backbones.backbone import load_backbone
    from featcache.extraction.extract import extract as run
    from featcache.extraction.plan import ExtractOptions, plan
    from featcache.machine import pick_device
    from featcache.sources import open_source

    known = [field.name for field in fields(ExtractOptions)]
    if unknown := [name for name in options if name not in known]:
        raise UsageError(f"extract: no option {unknown[0]!r}; it takes: {', '.join(known)}")
    source = open_source(data, reading)
    model = load_backbone(backbone, weights, tuple(taps), input_size, pick_device(device))
    run(plan(Path(out), source, model, ExtractOptions(**options)), source, model, progress)
    return open(out)
