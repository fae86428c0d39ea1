"""featcache as a library: what is public, and the data sets that feed other people's trainers."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

import featcache
from featcache.errors import DataError, UsageError
from featcache.store.reading import FeatureStore, Split
from tests.commands import Slotlab
from tests.media import oblong, save_images
from tests.synthetic import make_store

TAP = "block1"


@pytest.fixture
def train(shared_store: FeatureStore) -> Split:
    return shared_store["train"]


def _frames(split: Split) -> list[tuple[int, int]]:
    """(video, frame) of every frame."""
    return [(video, frame) for video in split.videos for frame in range(split.spec.lengths[video])]


def test_what_is_public_is_there_and_comes_late() -> None:
    for name in featcache.__all__:
        assert getattr(featcache, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        featcache.opne  # noqa: B018
    light = "import featcache, sys; assert not {'torch', 'zarr', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", light], check=True)


def test_a_cache_is_read_by_what_is_in_it(shared_store: FeatureStore) -> None:
    cache = featcache.open(shared_store.path)
    assert cache.splits == ("train", "validation") and [*cache.spec.taps] == [TAP]
    split = cache["train"]
    assert split.tokens(TAP, 0).shape == (4, 16, 12) and split.video(0).shape == (4, 32, 32, 3)
    batch = next(iter(cache.stream(batch_size=3, clip=2)))
    assert batch.features.shape == (3, 2, 16, 12)
    with pytest.raises(DataError, match="no such store"):
        featcache.open(shared_store.path / "nothing")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(("clip", "stride", "every"), [(None, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (1, 1, 3)])
def test_clips_are_the_stores_values(tmp_path: Path, dtype: str, clip: int | None, stride: int, every: int) -> None:
    split = make_store(tmp_path / "s.zarr", dtype=dtype)["train"]
    clips = featcache.Clips(split, clip=clip, stride=stride, every=every, frames=True, segmentations=True)
    span = ((clip or 1) - 1) * stride
    right = [(v, f) for v, f in _frames(split) if f + span < split.spec.lengths[v] and f % every == 0]
    assert [(item["video"], item["frame"]) for item in clips] == right
    for item, (video, frame) in zip(clips, right, strict=True):
        taken = slice(frame, frame + span + 1, stride) if clip else frame
        torch.testing.assert_close(item["features"], split.tokens(TAP, video)[taken].float(), rtol=0, atol=0)
        np.testing.assert_array_equal(item["frames"], split.video(video)[taken])
        np.testing.assert_array_equal(item["segmentations"], split.segmentations(video)[taken])


def test_a_batch_of_indices_is_read_as_each(train: Split) -> None:
    clips = featcache.Clips(train, clip=2)
    wanted = [7, 0, 7, 3]
    for item, index in zip(clips.__getitems__(wanted), wanted, strict=True):
        assert torch.equal(item["features"], clips[index]["features"])
    assert {item["features"].dtype for item in clips.__getitems__([0])} == {torch.float32}
    assert featcache.Clips(train, dtype=None)[0]["features"].dtype == torch.float16


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_loaders_samplers_and_workers(train: Split, workers: int) -> None:
    clips = featcache.Clips(train, names={"features": "video", "video": "index"})
    clips[0]  # opened before the workers are started
    options = {"batch_size": 4, "num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    in_order = [b for b in DataLoader(clips, sampler=SequentialSampler(clips), **options)]
    together = torch.cat([batch["video"] for batch in in_order])
    right = torch.cat([train.tokens(TAP, video) for video in train.videos]).float()
    assert torch.equal(together, right)
    mixed = DataLoader(clips, sampler=RandomSampler(clips), **options)
    seen = sorted((int(v), int(f)) for b in mixed for v, f in zip(b["index"], b["frame"], strict=True))
    assert seen == _frames(train)
    assert torch.equal(pickle.loads(pickle.dumps(clips))[3]["video"], clips[3]["video"])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_are_an_epoch_and_nothing_comes_twice(train: Split, workers: int) -> None:
    batches = featcache.Batches(train, batch_size=2, seed=3)
    loader = DataLoader(batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    epochs = []
    for _ in range(2):
        found = [*loader]
        assert all(batch["features"].shape == (2, 16, 12) for batch in found)
        seen = [(int(v), int(f)) for b in found for v, f in zip(b["video"], b["frame"], strict=True)]
        assert len(set(seen)) == len(seen) == 16  # of 17 frames: a smaller batch is left out
        for batch in found:
            for features, video, frame in zip(*(batch[k] for k in ("features", "video", "frame")), strict=True):
                assert torch.equal(features, train.tokens(TAP, int(video))[int(frame)].float())
        epochs.append(seen)
    assert epochs[0] != epochs[1], "the next epoch has another order"
    if not workers:
        batches.set_epoch(0)
        again = [(int(v), int(f)) for b in batches for v, f in zip(b["video"], b["frame"], strict=True)]
        assert again == epochs[0]


def test_items_own_their_memory(train: Split) -> None:
    held = [*featcache.Batches(train, batch_size=2)]
    again = [*featcache.Batches(train, batch_size=2)]
    assert all(torch.equal(a["features"], b["features"]) for a, b in zip(held, again, strict=True))


def test_what_cannot_be_is_one_line(train: Split) -> None:
    with pytest.raises(UsageError, match="no clips of 9 frames; the longest video has 4"):
        featcache.Clips(train, clip=5, stride=2)
    with pytest.raises(UsageError, match="names: no key 'tokens'; an item has: features, video, frame"):
        featcache.Clips(train, names={"tokens": "video"})
    both = "names: 'features' and 'video' would both be called 'video'; give 'video' another name, too"
    for made in (featcache.Clips, lambda split, names: featcache.Batches(split, batch_size=2, names=names)):
        with pytest.raises(UsageError, match=both):
            made(train, names={"features": "video"})
    with pytest.raises(UsageError, match="names: no key 'tokens'; an item has: features, video, frame"):
        featcache.Batches(train, batch_size=2, names={"tokens": "video"})
    with pytest.raises(UsageError, match="stride=0: must be at least 1"):
        featcache.Clips(train, stride=0)
    with pytest.raises(UsageError, match="17 samples make no batch of 99 x 1 ranks"):
        featcache.Batches(train, batch_size=99)


@pytest.mark.slow
def test_extraction_from_python_is_that_of_the_command(tmp_path: Path, slotlab: Slotlab) -> None:
    save_images(tmp_path / "data" / "train" / "a", oblong(3))
    said: list[tuple[str, int, int]] = []
    out = tmp_path / "one.zarr"
    options = {"backbone": "resnet18", "weights": "random", "input_size": 64, "batch_size": 2}
    cache = featcache.extract(tmp_path / "data", out, progress=lambda *now: said.append(now), **options)
    assert said[-1] == ("train", 3, 3) and cache["train"].frames == 3 and len(cache.clips()) == 3
    command = ["extract", "--data", tmp_path / "data", "--backbone", "resnet18", "--weights", "random"]
    assert slotlab(*command, "--input-size", 64, "--batch-size", 2, "--out", tmp_path / "two.zarr").code == 0
    tap = cache.tap(None)
    assert torch.equal(cache["train"].tokens(tap, 0), featcache.open(tmp_path / "two.zarr")["train"].tokens(tap, 0))
    with pytest.raises(UsageError, match="extract: no option 'stride'; it takes: splits, dtype, frame_stride"):
        featcache.extract(tmp_path / "data", out, stride=2)
