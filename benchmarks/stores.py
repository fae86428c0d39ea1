"""Stores for the benchmarks, in the product's layout, without a backbone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from featcache.sources.video import Video
from featcache.store import manifest
from featcache.store.layout import COMPRESSED, array_layouts, chunk_path
from featcache.store.reading import FeatureStore
from featcache.store.spec import SplitSpec, StoreSpec, TapSpec
from featcache.store.writing import StoreWriter
from featcache.words import Dtype

FRAMES = 24  # of a video, as in MOVi-A
TAP = "block12"
SIDE = 8  # pixels of the frames, which nothing here reads


def specs(videos: int, dtype: Dtype) -> tuple[StoreSpec, SplitSpec]:
    store = StoreSpec(
        backbone="random",
        model={"library": "none"},
        preprocessing={"size": 224},
        taps={TAP: TapSpec((16, 16), 384)},  # DINOv2 ViT-S/14 at 224 px
        dtype=dtype,
    )
    return store, SplitSpec("random", (FRAMES,) * videos, FRAMES, (SIDE, SIDE), False)


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


def sparse_store(path: Path, videos: int, dtype: Dtype = "float16") -> FeatureStore:
    """A finished store whose features are holes in its files: zeros that take no room on the disk."""
    store, split = specs(videos, dtype)
    with StoreWriter(path, store) as writer:
        part = writer.split("train", split)
        for layout in array_layouts(store, split):
            size = FRAMES * int(np.prod(layout.shape)) * np.dtype(layout.dtype).itemsize
            if layout.name not in COMPRESSED:
                for video in range(videos):
                    file = chunk_path(part.path / layout.name, video, layout.ndim)
                    file.touch()
                    os.truncate(file, size)
        # All at once: there is nothing here that a crash could lose.
        manifest.replace_rows(part.path, {v: manifest.Row(v, str(v), FRAMES, {}, ()) for v in range(videos)})
        part.finish({})
        part.close()
    return FeatureStore.open(path)
