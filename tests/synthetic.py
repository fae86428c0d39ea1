"""Small inputs made on the spot: videos with real masks, and stores without a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from featcache.moments import Moments
from featcache.sources.video import Instance, Source, Video
from featcache.store.encoding import ENCODINGS
from featcache.store.reading import FeatureStore
from featcache.store.spec import SplitSpec, StoreSpec, TapSpec
from featcache.store.writing import StoreWriter
from slotlab.config.load import load_config

SIZE = 32
GRID = (4, 4)
DIM = 12
PARTLY = {"train": (4, 4, 2), "validation": (10, 5, 3)}  # frames of `PartlyKnown`
Scale = float | npt.NDArray[np.float64]  # of all channels, or of each


class DiscSource(Source):
    """Videos of coloured discs that drift over a noisy floor."""

    location = "synthetic discs"
    masks = True  # whether its videos have ground truth

    def __init__(self, lengths: Mapping[str, tuple[int, ...]] | None = None, size: int = SIZE) -> None:
        self._lengths = dict(lengths or {"train": (4, 4, 3, 4, 2), "validation": (4, 4)})
        self._size = size

    def splits(self) -> tuple[str, ...]:
        return tuple(self._lengths)

    def lengths(self, split: str) -> tuple[int, ...]:
        return self._lengths[split]

    def fingerprint(self, split: str) -> str:
        return f"{split}-{self._lengths[split]}"  # which stands in fixtures/v0.1

    def fingerprints(self, split: str) -> tuple[str, ...]:
        return tuple(f"{split}-{index}-{length}" for index, length in enumerate(self._lengths[split]))

    def read(self, split: str, index: int) -> Video:
        rng = np.random.default_rng((index, len(split)))
        length, size = self._lengths[split][index], self._size
        frames = rng.integers(90, 110, (length, size, size, 3), dtype=np.uint8)
        masks = np.zeros((length, size, size), np.uint8)
        y, x = np.mgrid[:size, :size]
        materials = ("metal", "rubber") if index % 2 else ("metal", "metal")
        for k in range(len(materials)):
            centre, speed, colour = rng.uniform(8, size - 8, 2), rng.uniform(-1, 1, 2), rng.integers(0, 255, 3)
            for t in range(length):
                inside = (y - centre[0] - t * speed[0]) ** 2 + (x - centre[1] - t * speed[1]) ** 2 < (size / 6) ** 2
                frames[t][inside] = colour
                masks[t][inside] = k + 1
        instances = tuple(
            Instance("sphere", "large", "red", m, tuple(int(n) for n in (masks == k + 1).sum((1, 2))))
            for k, m in enumerate(materials)
        )
        return Video(f"{split}-{index}", frames, masks, instances)


class PartlyKnown(DiscSource):
    """Discs behind a stripe of void. Of video 0 every fifth frame has a mask, of video 2 none."""

    def __init__(self, lengths: Mapping[str, tuple[int, ...]] = PARTLY) -> None:
        super().__init__(lengths)

    def read(self, split: str, index: int) -> Video:
        video = super().read(split, index)
        assert video.segmentations is not None
        ignore = np.zeros(video.segmentations.shape, bool)
        ignore[:, :, 5 * index + 6 : 5 * index + 13] = True
        frames = np.arange(len(ignore))
        labelled = {0: frames % 5 == 0, 1: None}.get(index, frames < 0)
        known = ~ignore if labelled is None else ~ignore & labelled[:, None, None]
        masks = np.where(known, video.segmentations, np.uint8(0))
        instances = tuple(
            replace(instance, visibility=tuple((masks == k).sum((1, 2)).tolist()))
            for k, instance in enumerate(video.instances, 1)
        )
        return Video(video.id, video.frames, masks, instances, ignore, labelled)

    def known(self, split: str, index: int) -> npt.NDArray[np.bool_]:
        """Pixels of known truth (T, H, W)."""
        video = self.read(split, index)
        assert video.ignore is not None
        labelled = np.ones(len(video.frames), bool) if video.labelled is None else video.labelled
        return ~video.ignore & labelled[:, None, None]


def tokens_of(video: Video, grid: tuple[int, int] = GRID, dim: int = DIM, scale: Scale = 1.0) -> torch.Tensor:
    """Tokens (T, N, D) that a frozen backbone might give: a fixed random map of each patch's mean colour."""
    length, size = len(video.frames), video.frames.shape[1]
    cell = size // grid[0]
    patches = video.frames.reshape(length, grid[0], cell, grid[1], cell, 3).mean((2, 4)).reshape(length, -1, 3)
    mixing = np.random.default_rng(0).normal(size=(3, dim))
    noise = np.random.default_rng(len(video.id)).normal(size=(length, grid[0] * grid[1], dim))
    return torch.from_numpy(scale * ((patches / 64) @ mixing + 0.1 * noise)).float()


def make_store(
    path: Path,
    source: DiscSource | None = None,
    *,
    dtype: str = "float16",
    scale: Scale = 1.0,
    chunk_frames: int | None = None,
    backbone: str = "synthetic",
    taps: tuple[str, ...] = ("block1",),
    like: StoreSpec | None = None,
) -> FeatureStore:
    """A finished store of synthetic tokens, by the product's own writer; negated in all taps but ``block1``.

    ``like`` is what the store says of itself, and of how large its tokens are, in place of the rest.
    """
    source = source or DiscSource()
    spec = StoreSpec(
        backbone=backbone,
        model={"library": "none"},
        preprocessing={"size": SIZE},
        taps={tap: TapSpec(GRID, DIM) for tap in taps},
        dtype=dtype,  # type: ignore[arg-type]
        batch_size=4,
    )
    if like is not None:
        spec, taps = replace(like, batch_size=4), tuple(like.taps)
    with StoreWriter(path, spec) as writer:
        for name in source.splits():
            lengths = source.lengths(name)
            frames, truth = chunk_frames or max(lengths), source.masks
            spec_of_split = SplitSpec(source.fingerprint(name), lengths, frames, (SIZE, SIZE), truth, ignored=truth)
            split = writer.split(name, spec_of_split)
            rounded = ENCODINGS[spec.dtype].rounded
            of = spec.taps[taps[0]]
            moments = {tap: Moments.empty(of.patches, of.dim) for tap in taps}
            for index in range(len(lengths)):
                video = source.read(name, index)
                tokens = {
                    tap: tokens_of(video, of.grid, of.dim, scale) * (1 if tap == "block1" else -1) for tap in taps
                }
                split.write(index, video, tokens)
                for tap, values in tokens.items():
                    moments[tap] = moments[tap] + Moments.from_tokens(rounded(values))
            split.finish(moments)
            split.close()
    return FeatureStore.open(path)


def arrays_of(path: Path) -> dict[str, bytes]:
    """Every file of a store that holds array values or describes them, by its place in the store."""
    skipped = ("manifest.jsonl", ".lock", "references.json")
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in skipped and "statistics" not in file.parts
    }


def fitted(preset: str) -> list[str]:
    """Overrides under which a preset trains on such a store: two to four frames a video, 12 channels."""
    config = load_config(preset)
    data, slots = config.data, [] if config.model.kind == "dense" else ["model.slots=4"]  # which has none
    kind, reduces, _ = data.normalize.partition("=")
    fewer = [f"data.normalize={kind}=8"] if reduces else []
    seen = ["model.burn_in=1"] if preset.startswith("dynamics") else []
    return [*seen, *slots, f"data.clip={min(data.clip, 2)}", "optim.batch_size=2", *fewer]
