"""Stores for the benchmarks, in the product's layout, without a backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from featcache.sources.video import Instance, Video
from featcache.store import manifest, shards
from featcache.store.layout import COMPRESSED, ArrayLayout, array_layouts, chunk_numbers, chunk_path, fitting_shards
from featcache.store.reading import FeatureStore
from featcache.store.spec import SplitSpec, StoreSpec, TapSpec
from featcache.store.writing import StoreWriter
from featcache.words import Dtype

FRAMES = 24  # of a video, as in MOVi-A
TAP = "block12"
SIDE = 8  # pixels of the frames, which nothing here reads


def specs(videos: int, dtype: Dtype, frames: int = FRAMES) -> tuple[StoreSpec, SplitSpec]:
    store = StoreSpec(
        backbone="random",
        model={"library": "none"},
        preprocessing={"size": 224},
        taps={TAP: TapSpec((16, 16), 384)},  # DINOv2 ViT-S/14 at 224 px
        dtype=dtype,
    )
    return store, SplitSpec("random", (frames,) * videos, frames, (SIDE, SIDE), False)


def random_store(path: Path, videos: int, dtype: Dtype) -> FeatureStore:
    """A finished store of normal values."""
    store, split = specs(videos, dtype)
    generator = torch.Generator().manual_seed(0)
    frames = np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8)
    with StoreWriter(path, store) as writer:
        part = writer.split("train", split)
        for video in range(videos):
            tokens = torch.randn((FRAMES, 256, 384), generator=generator)
            part.write(video, Video(str(video), frames, None, ()), {TAP: tokens})
        part.finish({})
        part.close()
    return FeatureStore.open(path)


def sparse_store(path: Path, videos: int, dtype: Dtype = "float16", frames: int = FRAMES) -> FeatureStore:
    """A finished store whose features are holes in its files: zeros that take no room on the disk.

    Its manifest has rows as large as those of a data set with seven objects a video, COCO's mean.
    """
    store, split = specs(videos, dtype, frames)
    names = tuple(f"train2017/{video:012d}.jpg" for video in range(videos))
    split = replace(split, names=names, fingerprints=tuple(f"{video:016x}" for video in range(videos)))
    split = replace(split, shard_chunks=fitting_shards(store, split))
    objects = tuple(Instance("", "", "", "", (1000 + k,) * frames, f"category{k}") for k in range(7))
    with StoreWriter(path, store) as writer:
        part = writer.split("train", split)
        layouts = array_layouts(store, split)
        for layout in layouts:
            if layout.name not in COMPRESSED:
                _holes(part.path / layout.name, split, layout)
        sums = {layout.name: (4_000_000_000,) for layout in layouts}
        # All at once: there is nothing here that a crash could lose.
        rows = (manifest.Row(v, names[v], frames, sums, objects, split.fingerprints[v]) for v in range(videos))
        manifest.replace_rows(part.path, {row.video: row for row in rows})
        part.finish({})
        part.close()
    return FeatureStore.open(path)


def _holes(folder: Path, split: SplitSpec, layout: ArrayLayout) -> None:
    """The files of an array whose values are all zero."""
    size = split.chunk_frames * int(np.prod(layout.shape)) * np.dtype(layout.dtype).itemsize
    chunks, together = chunk_numbers(split, len(split.lengths) - 1).stop, max(1, split.shard_chunks)
    for number, first in enumerate(range(0, chunks, together)):
        held = min(together, chunks - first)
        with chunk_path(folder, number, layout.ndim).open("wb") as file:
            file.truncate(held * size)
            if split.shard_chunks:
                file.seek(held * size)
                file.write(shards.index(dict.fromkeys(range(held), size), together))
