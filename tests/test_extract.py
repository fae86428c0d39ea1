"""Extraction: the right features, resumable at every point, and nothing lost or believed too early."""

from __future__ import annotations

import os
import shutil
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featcache.backbones.backbone import Backbone, load_backbone
from featcache.backbones.inference import forward
from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.extraction import job
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.sources.video import Video
from featcache.store import manifest
from featcache.store.reading import FeatureStore
from featcache.upkeep.verify import verify
from tests import crash
from tests.synthetic import DiscSource, arrays_of


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("dinov2_vits14", weights="random", taps=("block2", "block1.key"), input_size=28)


FIXED = ExtractOptions(batch_size=3, precision="float32")


def run(path: Path, backbone: Backbone, options: ExtractOptions = FIXED, source: Any = None) -> FeatureStore:
    source = source or DiscSource()
    return extract(plan(path, source, backbone, options), source, backbone)


def test_features_are_the_backbones(tmp_path: Path, backbone: Backbone) -> None:
    store = run(tmp_path / "s.zarr", backbone)
    source = DiscSource()
    assert store.splits == ("train", "validation")
    for name in source.splits():
        for index in store[name].videos:
            frames = torch.from_numpy(source.read(name, index).frames)
            expected = backbone(backbone.preprocess(frames))
            for tap in backbone.taps:
                torch.testing.assert_close(store[name].tokens(tap, index).float(), expected[tap], atol=2e-3, rtol=2e-3)
    assert verify(store.path) == []


def test_stride_and_video_count(tmp_path: Path, backbone: Backbone) -> None:
    options = replace(FIXED, frame_stride=2, max_videos=2, splits=("train",))
    split = run(tmp_path / "s.zarr", backbone, options)["train"]
    assert split.spec.lengths == (2, 2) and split.complete
    video = DiscSource().read("train", 1)
    np.testing.assert_array_equal(split.video(1), video.frames[::2])
    assert split.instances(1)[0].visibility == video.instances[0].visibility[::2]


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_batch_size_changes_speed_not_features(tmp_path: Path, backbone: Backbone, batch_size: int) -> None:
    one = run(tmp_path / "a.zarr", backbone)["train"]
    other = run(tmp_path / "b.zarr", backbone, replace(FIXED, batch_size=batch_size))["train"]
    for index in one.videos:
        torch.testing.assert_close(one.tokens("block2", index), other.tokens("block2", index), atol=4e-3, rtol=4e-3)


@pytest.mark.slow
def test_more_videos_later_equals_all_at_once(tmp_path: Path, backbone: Backbone) -> None:
    whole, grown = tmp_path / "whole.zarr", tmp_path / "grown.zarr"
    run(whole, backbone)
    run(grown, backbone, replace(FIXED, max_videos=2))
    run(grown, backbone)
    a, b = arrays_of(whole), arrays_of(grown)
    chunks = [name for name in a if "/c." in name]
    assert chunks and {n: a[n] for n in chunks} == {n: b[n] for n in chunks}
    assert FeatureStore.open(grown)["train"].complete


# -- dying -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_anywhere_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    unbroken = tmp_path / "unbroken.zarr"
    code, writes = crash.run(crash.extraction, str(unbroken))
    assert code == 0 and writes > 100
    expected = arrays_of(unbroken)
    for die_at in sorted({0, 1, 5, *np.linspace(8, writes - 1, 10).astype(int).tolist()}):
        path = tmp_path / f"killed-{die_at}.zarr"
        code, _ = crash.run(crash.extraction, str(path), die_at=die_at)
        assert code == -9
        if (path / "train" / manifest.NAME).exists():  # nothing unfinished is believed
            assert verify(path) == []
        code, _ = crash.run(crash.extraction, str(path))
        assert code == 0
        assert arrays_of(path) == expected, f"differs after dying at write {die_at}"
        for split in ("train", "validation"):
            found, wanted = (FeatureStore.open(p)[split].statistics("layer1") for p in (path, unbroken))
            np.testing.assert_array_equal(found.covariance, wanted.covariance)
        shutil.rmtree(path)


def test_a_row_is_promised_only_after_its_chunks_are_durable(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power loss keeps what was synced: replay the order of calls and check that nothing runs ahead."""
    names: dict[int, str] = {}
    synced: set[str] = set()
    real_open, real_fsync, real_replace, real_append = os.open, os.fsync, os.replace, manifest.Appender.append

    def spy_open(path: Any, *args: Any, **kwargs: Any) -> int:
        fd = real_open(path, *args, **kwargs)
        names[fd] = str(path)
        return fd

    def spy_fsync(fd: int) -> None:
        real_fsync(fd)
        synced.add(names[fd])

    def spy_replace(source: Any, target: Any) -> None:
        real_replace(source, target)
        if str(source).endswith(".tmp") and "/c." in str(source):
            assert str(source) in synced, "renamed before its content was synced"
            synced.add(str(target))
            synced.discard(str(Path(target).parent))  # the directory must be synced after the rename

    checked = 0

    def spy_append(self: manifest.Appender, row: manifest.Row) -> None:
        nonlocal checked
        for array in row.crc32c:
            folders = [f for f in synced if f.endswith(f"/{array}")]
            assert folders, f"{array}: directory not synced before its manifest row"
            checked += 1
        real_append(self, row)

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(manifest.Appender, "append", spy_append)
    run(tmp_path / "s.zarr", backbone)
    assert checked == 7 * 5  # videos x arrays


def test_interrupt_keeps_what_was_finished(tmp_path: Path, backbone: Backbone) -> None:
    class Interrupting(DiscSource):
        def read(self, split: str, index: int) -> Video:
            if (split, index) == ("train", 4):
                raise KeyboardInterrupt
            return super().read(split, index)

    path = tmp_path / "s.zarr"
    with pytest.raises(KeyboardInterrupt):
        run(path, backbone, source=Interrupting())
    assert len(manifest.read(path / "train")) >= 1
    assert verify(path) == []
    assert run(path, backbone)["train"].complete
    ours = ("decode", "chunks", "write")  # others belong to zarr, and stay
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(ours)]


def test_videos_written_side_by_side_are_promised_in_order(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, source = replace(FIXED, batch_size=16, splits=("train",)), DiscSource({"train": (4, 4, 4, 4, 4)})
    whole = run(tmp_path / "whole.zarr", backbone, options, source)
    writing = threading.Barrier(3)
    write = job.write_chunks

    def failing(path: Path, store: Any, split: Any, index: int, video: Video, tokens: Any) -> manifest.Row:
        if index < 3:
            writing.wait(timeout=30)  # three at a time, or this breaks
        if index == 1:
            raise DataError("the second video cannot be written")
        return write(path, store, split, index, video, tokens)

    monkeypatch.setattr(job, "write_chunks", failing)
    with pytest.raises(DataError, match="the second video"):
        run(tmp_path / "s.zarr", backbone, options, source)
    promised = set(manifest.read(tmp_path / "s.zarr" / "train"))
    assert promised - {4} == {0}  # none of the group behind the one that failed; the next group stands by itself
    monkeypatch.setattr(job, "write_chunks", write)
    assert arrays_of(run(tmp_path / "s.zarr", backbone, options, source).path) == arrays_of(whole.path)


def test_a_full_disk_says_so_and_loses_nothing(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.zarr"
    real, written = os.write, 0

    def full(fd: int, data: Any) -> int:
        nonlocal written
        written += len(data)
        if written > 60_000:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DataError, match="No space left on device.*it resumes"):
        run(path, backbone)
    monkeypatch.undo()
    finished = len(manifest.read(path / "train"))
    assert finished >= 1 and verify(path) == []
    run(path, backbone)
    run(tmp_path / "unbroken.zarr", backbone)
    assert arrays_of(path) == arrays_of(tmp_path / "unbroken.zarr")


def test_too_small_a_disk_is_refused_before_starting(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(DataError, match="needs up to .* MB and 0.001 MB are free; .* use --dtype int8, --frame-st"):
        run(tmp_path / "s.zarr", backbone)
    with pytest.raises(DataError, match=r"are free; free space, or use --frame-stride or --max-videos"):
        run(tmp_path / "s.zarr", backbone, replace(FIXED, dtype="int8"))
    assert not (tmp_path / "s.zarr").exists()


# -- refusing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "bad", "video", "frame"), [(3, 2, 0, 2), (17, 9, 2, 1)])
def test_features_that_are_not_finite_name_their_video(
    tmp_path: Path, batch_size: int, bad: int, video: int, frame: int
) -> None:
    """A video by itself, and one of several that share a batch: they have 4, 4, 3, 4 and 2 frames."""
    broken = load_backbone("dinov2_vits14", weights="random", taps=("block2",), input_size=28)
    real = type(broken).__call__

    class Overflowing(type(broken)):  # type: ignore[misc]
        def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            factors = torch.where(torch.arange(len(images)) < bad, 1.0, 1e6)[:, None, None]
            return {tap: tokens * factors for tap, tokens in real(self, images).items()}

    broken.__class__ = Overflowing
    message = rf"synthetic discs: train video {video}, tap block2: \d+ non-finite values, the first at frame {frame},"
    with pytest.raises(DataError, match=message):
        run(tmp_path / "s.zarr", broken, replace(FIXED, batch_size=batch_size))


def test_another_input_size_is_refused(tmp_path: Path, backbone: Backbone) -> None:
    run(tmp_path / "s.zarr", backbone)
    other = load_backbone("dinov2_vits14", weights="random", taps=("block2", "block1.key"), input_size=42)
    with pytest.raises(IncompatibleError, match=r"preprocessing.size: store 28, asked 42"):
        run(tmp_path / "s.zarr", other)


def test_unknown_split_lists_the_known(tmp_path: Path, backbone: Backbone) -> None:
    with pytest.raises(UsageError, match="no split 'test'; it has: train, validation"):
        run(tmp_path / "s.zarr", backbone, replace(FIXED, splits=("test",)))


class Uneven(DiscSource):
    """The second video is larger than the first."""

    def read(self, split: str, index: int) -> Video:
        return DiscSource(self._lengths, size=48 if index == 1 else 32).read(split, index)


def test_frames_of_several_sizes_are_resized_only_when_asked(tmp_path: Path, backbone: Backbone) -> None:
    source = Uneven({"train": (2, 2)})
    with pytest.raises(DataError, match="train video 1: 48x48 frames in a store of 32x32; pass --frame-size"):
        run(tmp_path / "a.zarr", backbone, source=source)
    split = run(tmp_path / "b.zarr", backbone, replace(FIXED, frame_size=32), source)["train"]
    assert split.video(1).shape == (2, 32, 32, 3)
    masks = split.segmentations(1)
    assert set(np.unique(masks)) <= {0, 1, 2}
    for number, instance in enumerate(split.instances(1), 1):  # pixels of the masks as stored
        assert instance.visibility == tuple(int((mask == number).sum()) for mask in masks)
    whole = backbone(backbone.preprocess(torch.from_numpy(source.read("train", 1).frames)))["block2"]
    torch.testing.assert_close(split.tokens("block2", 1).float(), whole, atol=2e-3, rtol=2e-3)


def test_a_finished_store_need_not_be_writable(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = arrays_of(run(tmp_path / "s.zarr", backbone).path)
    monkeypatch.setattr("featcache.extraction.extract.StoreWriter", lambda *_: pytest.fail("opened for writing"))
    seen: list[tuple[str, int, int]] = []
    todo = plan(tmp_path / "s.zarr", DiscSource(), backbone, FIXED)
    assert arrays_of(extract(todo, DiscSource(), backbone, lambda *row: seen.append(row)).path) == before
    assert seen == [("train", 17, 17), ("validation", 8, 8)]


def test_space_is_asked_for_whole_chunks(tmp_path: Path, backbone: Backbone) -> None:
    """Raw chunks are written full: one long video makes room of its length for each short one."""
    source = DiscSource({"train": (9, 1, 1, 1)})
    todo = plan(tmp_path / "s.zarr", source, backbone, FIXED)
    extract(todo, source, backbone)
    written = sum(file.stat().st_size for file in (tmp_path / "s.zarr/train/features").rglob("c.*"))
    frames = 12 * 32 * 32 * (3 + 2)  # and masks with what is known of them, all compressed: padding takes nothing
    assert written == todo.bytes_left - frames and todo.frames_left == 12


@pytest.mark.parametrize("wrong", [{"frame_size": -5}, {"frame_size": 0}, {"batch_size": 0}])
def test_sizes_are_at_least_one(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        replace(FIXED, **wrong)  # type: ignore[arg-type]


# -- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 20])
def test_videos_share_batches_in_their_order(backbone: Backbone, batch_size: int) -> None:
    """Whatever the batch cuts through; and it is never given more frames than it may hold."""
    videos = [DiscSource().read("train", index).frames for index in (0, 2, 4)]  # 4, 3 and 2 frames
    real, sizes = type(backbone).__call__, []

    class Counting(type(backbone)):  # type: ignore[misc]
        def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            sizes.append(len(images))
            return real(self, images)

    counting = load_backbone("dinov2_vits14", weights="random", taps=("block2",), input_size=28)
    expected = [counting(counting.preprocess(torch.from_numpy(frames)))["block2"] for frames in videos]
    counting.__class__ = Counting
    found = forward(counting, videos, batch_size, "float32")
    for tokens, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(tokens["block2"], exact, atol=1e-4, rtol=1e-4)
    assert sizes == [min(batch_size, 9 - start) for start in range(0, 9, batch_size)]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_too_little_memory_is_told_in_one_line(backbone: Backbone, error: RuntimeError) -> None:
    class Full(type(backbone)):  # type: ignore[misc]
        def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            raise error

    full = load_backbone("dinov2_vits14", weights="random", taps=("block2",), input_size=28)
    full.__class__ = Full
    with pytest.raises(UsageError, match="the memory of cpu does not hold 3 frames at a time"):
        forward(full, [DiscSource().read("train", 0).frames], 3, "float32")


def test_forward_equals_the_backbone(backbone: Backbone) -> None:
    frames = DiscSource().read("train", 0).frames
    images = backbone.preprocess(torch.from_numpy(frames))
    tokens = forward(backbone, [frames], 2, "float32")[0]
    torch.testing.assert_close(tokens["block2"], backbone(images)["block2"], atol=1e-4, rtol=1e-4)
