"""Splits of many small videos lie in shards: what is in them, and every promise of a store, are as without."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.stores import specs
from featcache.backbones.backbone import Backbone, load_backbone
from featcache.errors import DataError
from featcache.extraction.changes import Changes
from featcache.extraction.job import SplitJob
from featcache.sources import open_source
from featcache.store import layout, manifest, shards
from featcache.store.layout import chunk_numbers, fitting_shards
from featcache.store.reading import FeatureStore, Split
from featcache.store.spec import TapSpec
from featcache.store.writing import StoreWriter
from featcache.stream.stream import FeatureStream
from featcache.upkeep.convert import ConvertOptions, convert
from featcache.upkeep.repair import Means, repair
from featcache.upkeep.verify import verify
from tests.growing import GROW, OPTIONS, PRUNE, drop, files, ids, put, run, same_as_fresh, videos
from tests.test_growth_killed import Killed, dead_after

PLACES = 4  # videos in a shard of these tests
TAP = "layer1"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("resnet18", weights="random", taps=(TAP,), input_size=32)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SHARDED", PLACES)
    monkeypatch.setattr(layout, "SHARD_CHUNKS", (2, PLACES))
    monkeypatch.setattr(os, "fsync", lambda _: None)


def shard(path: Path, number: int, array: str = f"features/{TAP}") -> Path:
    return next((path / "train" / array).glob(f"c.{number}.*"))


def tokens(split: Split) -> torch.Tensor:
    return torch.cat([split.tokens(TAP, video) for video in split.videos])


# -- how many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "frames", "side", "patches", "dim", "expected"),
    [
        (118_000, 1, 224, 16, 384, 256),  # 196 KB of tokens
        (118_000, 1, 224, 37, 768, 16),  # 2.1 MB
        (118_000, 1, 640, 16, 384, 32),  # 1.2 MB of pixels
        (118_000, 1, 2048, 16, 384, 0),  # 12.6 MB
        (9_703, 24, 256, 16, 384, 0),  # MOVi-A: 4.7 MB of tokens
        (9_703, 6, 256, 16, 384, 32),  # with every fourth frame
        (1_023, 1, 224, 16, 384, 0),
    ],
)
def test_many_small_chunks_share_files(
    monkeypatch: pytest.MonkeyPatch, images: int, frames: int, side: int, patches: int, dim: int, expected: int
) -> None:
    monkeypatch.undo()
    store, split = specs(images, "float16", frames)
    store = replace(store, taps={"tap": TapSpec((patches, patches), dim)})
    assert fitting_shards(store, replace(split, frame_size=(side, side))) == expected


@pytest.mark.parametrize("batch", [1, 6, 30, 1000])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_group_has_its_files_to_itself(tmp_path: Path, count: int, batch: int) -> None:
    """So that workers never write the same one; some videos here have several chunks, and lie in two shards."""
    store, split = specs(60, "float16", 3)
    lengths = np.random.default_rng(0).choice([1, 3, 3, 3, 3, 5, 14], 60).tolist()
    split = replace(split, lengths=tuple(lengths), shard_chunks=count)
    job = SplitJob(tmp_path, "train", replace(store, batch_size=batch), split, "", False)
    groups = job.groups()
    assert [video for group in groups for video in group] == list(range(60))
    held = [{chunk // max(1, count) for video in group for chunk in chunk_numbers(split, video)} for group in groups]
    assert sum(map(len, held)) == len(set.union(*held)), "two groups share a file"
    if count < 2:
        assert max(map(len, groups)) == max(1, batch // 3) or batch == 1000


# -- what is in them ---------------------------------------------------------------------------------------


def test_sharded_is_the_same_store_in_fewer_files(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = videos(tmp_path / "v", "abcdefghij")
    split, _ = run(tmp_path / "shards.zarr", source, backbone)
    monkeypatch.setattr(layout, "SHARDED", 1024)
    plain, _ = run(tmp_path / "plain.zarr", source, backbone)
    assert (split.spec.shard_chunks, plain.spec.shard_chunks) == (PLACES, 0)
    assert [len(list((s.path / "features" / TAP).glob("c.*"))) for s in (split, plain)] == [3, 10]
    assert list(split.manifest.values()) == list(plain.manifest.values()), "checksums of chunks, wherever they lie"
    assert torch.equal(tokens(split), tokens(plain))
    for video in plain.videos:
        np.testing.assert_array_equal(split.video(video), plain.video(video))
        np.testing.assert_array_equal(split.segmentations(video), plain.segmentations(video))
        np.testing.assert_array_equal(split.ignored(video), plain.ignored(video))
    found, wanted = split.statistics(TAP), plain.statistics(TAP)
    assert found.frames == wanted.frames == 30
    np.testing.assert_allclose(found.covariance, wanted.covariance, rtol=1e-9)
    np.testing.assert_array_equal(found.norm_counts, wanted.norm_counts)
    for how in ({}, {"clip": 2}, {"residence": "host"}):
        batches = [next(iter(FeatureStream(s, TAP, batch_size=7, seed=3, **how))) for s in (split, plain)]
        assert torch.equal(batches[0].features, batches[1].features)
        np.testing.assert_array_equal(batches[0].rows, batches[1].rows)


def test_the_rows_of_a_shard_are_appended_at_once(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    appended: list[list[int]] = []
    real = manifest.Appender.append

    def append(self: manifest.Appender, *rows: manifest.Row) -> None:
        appended.append([row.video for row in rows])
        real(self, *rows)

    monkeypatch.setattr(manifest.Appender, "append", append)
    run(tmp_path / "s.zarr", videos(tmp_path / "v"), backbone)
    assert appended == [[0, 1, 2, 3], [4, 5]]


def test_a_row_that_is_broken_inside_is_named_when_it_is_asked_for(tmp_path: Path, backbone: Backbone) -> None:
    split, _ = run(tmp_path / "s.zarr", videos(tmp_path / "v", "abcd"), backbone)
    file = split.path / manifest.NAME
    file.write_bytes(file.read_bytes().replace(b'"id":"c",', b'"id":"c,', 1))
    rows = manifest.read(split.path)
    assert list(rows) == [0, 1, 2, 3] and rows[1].id == "b" and 4 not in rows
    with pytest.raises(DataError, match="line 3 is not a manifest row.*slotlab verify --repair"):
        rows[2]
    assert [damage.kind for damage in verify(split.store.path) if "line 3" in damage.what] == ["manifest"]


def test_copies_have_shards_unless_told_otherwise(tmp_path: Path, backbone: Backbone) -> None:
    split, _ = run(tmp_path / "s.zarr", videos(tmp_path / "v", "abcdef"), backbone)
    for name, options, count in (("same", ConvertOptions(), PLACES), ("none", ConvertOptions(shard_videos=0), 0)):
        out = tmp_path / name
        convert(split.store.path, out, options)
        copied = FeatureStore.open(out)["train"]
        assert copied.spec.shard_chunks == count and verify(out) == []
        assert torch.equal(tokens(copied), tokens(split))
    sound, file = files(tmp_path / "same"), shard(tmp_path / "same", 1)
    file.write_bytes(file.read_bytes()[:-1])
    assert repair(tmp_path / "same") and files(tmp_path / "same") == sound


# -- a source that changes ---------------------------------------------------------------------------------


def test_a_shard_that_is_not_full_grows(tmp_path: Path, backbone: Backbone) -> None:
    source, path = videos(tmp_path / "v", "abcdef"), tmp_path / "s.zarr"
    run(path, source, backbone)
    full = shard(path, 0).stat()
    for number, name in enumerate("ghi", start=6):
        put(source, name, number)
    split, changes = run(path, source, backbone, GROW)
    assert changes == Changes(kept=6, added=("g", "h", "i")) and ids(split) == list("abcdefghi")
    assert shard(path, 0).stat() == full, "what is full is not written again"
    assert same_as_fresh(split, source, backbone)


def test_removed_videos_leave_no_place(tmp_path: Path, backbone: Backbone) -> None:
    source, path = videos(tmp_path / "v", "abcdefghij"), tmp_path / "s.zarr"
    run(path, source, backbone)
    full = shard(path, 0).stat().st_ino
    drop(source, "e")
    drop(source, "f")
    split, changes = run(path, source, backbone, PRUNE)
    assert changes == Changes(kept=8, removed=("e", "f")) and ids(split) == list("abcdghij")
    assert shard(path, 0).stat().st_ino == full, "a link to what stays whole"
    assert len(list((split.path / "features" / TAP).glob("c.*"))) == 2
    assert same_as_fresh(split, source, backbone)


@pytest.mark.parametrize("frames", [3, 7])
def test_a_changed_video_is_made_anew(tmp_path: Path, backbone: Backbone, frames: int) -> None:
    """With more frames it has several chunks, here of two shards, and those behind it move."""
    source, path = videos(tmp_path / "v", "abcdefg"), tmp_path / "s.zarr"
    before, _ = run(path, source, backbone)
    kept = {name: before.tokens(TAP, video) for video, name in enumerate("abcdefg")}
    put(source, "c", 11, frames)
    split, changes = run(path, source, backbone)
    assert changes == Changes(kept=6, changed=("c",))
    for video, name in enumerate("abcdefg"):
        assert split.tokens(TAP, video).equal(kept[name]) == (name != "c")
    np.testing.assert_array_equal(split.video(2), open_source(source).read("train", 2).frames)


def test_stores_without_shards_stay_as_they_are(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = videos(tmp_path / "v", "abcd"), tmp_path / "s.zarr"
    monkeypatch.setattr(layout, "SHARDED", 1024)
    run(path, source, backbone)
    monkeypatch.setattr(layout, "SHARDED", PLACES)
    put(source, "e", 4)
    split, _ = run(path, source, backbone, GROW)
    assert split.spec.shard_chunks == 0 and ids(split) == list("abcde")


# -- damage and death --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["a chunk", "the index", "the file"])
def test_damage_is_named_and_repaired(tmp_path: Path, backbone: Backbone, damage: str) -> None:
    source, path = videos(tmp_path / "v", "abcdefg"), tmp_path / "s.zarr"
    run(path, source, backbone)
    sound, file = files(path), shard(path, 0)
    data = bytearray(file.read_bytes())
    data[-1 if damage == "the index" else len(data) // PLACES * 2 + 9] ^= 1
    file.unlink() if damage == "the file" else file.write_bytes(data)
    named = [d.id for d in verify(path)]
    assert named == (["c"] if damage == "a chunk" else ["a", "b", "c", "d"])
    repair(path, Means(data=open_source(source), backbone=backbone))
    assert files(path) == sound


def test_a_full_disk_loses_the_open_shard_alone(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = videos(tmp_path / "v", "abcdefghij"), tmp_path / "s.zarr"
    real = os.write

    def full(fd: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(str(path / f"train/features/{TAP}/c.1.")):
            raise OSError(28, "No space left on device")
        return real(fd, data)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="No space left.*it resumes"):
        patch.setattr(os, "write", full)
        run(path, source, backbone)
    assert list(manifest.read(path / "train"))[:PLACES] == [0, 1, 2, 3] and verify(path) == []
    split, _ = run(path, source, backbone)
    assert same_as_fresh(split, source, backbone)


def everything(source: Path) -> None:
    put(source, "a", 9)
    put(source, "x", 6)
    drop(source, "c")


@pytest.mark.parametrize("change", [None, everything], ids=["begun", "changed"])
@pytest.mark.slow
def test_dead_at_any_step_it_comes_to_the_same_bytes(
    tmp_path: Path, backbone: Backbone, change: Callable[[Path], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, old, new, path = videos(tmp_path / "v", "abcdef"), *(tmp_path / f"{n}.zarr" for n in ("old", "new", "s"))
    options = replace(GROW, prune=True) if change else OPTIONS
    if change:
        run(old, source, backbone)
        change(source)
        shutil.copytree(old, new)
    with monkeypatch.context() as patch:
        made = dead_after(patch, math.inf)
        run(new, source, backbone, options)
        writes = len(made)
    for die_at in np.linspace(writes // 3, writes - 1, 6).astype(int).tolist():
        if change:
            shutil.copytree(old, path)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dead_after(patch, die_at)
            run(path, source, backbone, options)
        assert verify(path) == []
        run(path, source, backbone, options)
        StoreWriter(path, FeatureStore.open(path).spec).close()  # a finished store is not opened for writing
        assert files(path) == files(new), f"differs after dying at write {die_at} of {writes}"
        shutil.rmtree(path)


def test_the_end_of_a_shard_says_where_its_chunks_are() -> None:
    packed = shards.pack({1: b"four", 3: b"sixsix"}, 5)
    assert packed == b"foursixsix" + shards.index({1: 4, 3: 6}, 5)
    assert shards.unpack(packed, 5) == {1: b"four", 3: b"sixsix"}
