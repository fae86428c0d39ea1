"""Faults beside the killed extraction: power cuts, full disks, lost sources, locks, foreign folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.backbones.backbone import Backbone, load_backbone
from featcache.errors import DataError, IncompatibleError
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.sources import open_source
from featcache.store import manifest
from featcache.store.durable import write_durably
from featcache.store.reading import FeatureStore
from featcache.store.writing import StoreWriter
from featcache.upkeep.verify import verify
from tests import crash
from tests.synthetic import DiscSource, arrays_of, make_store

FIXED = ExtractOptions(batch_size=3, precision="float32")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("resnet18", weights="random", taps=("layer1",), input_size=32)


# -- power -------------------------------------------------------------------------------------------------


class Disk:
    """What a power cut would leave under ``root``: contents that were synced, in directories synced since.

    A name that was renamed or created counts as lost until its directory is synced, the strictest reading of
    POSIX; real file systems promise more.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._open: dict[int, Path] = {}
        self._contents: set[Path] = set()  # files whose bytes are synced
        self._names: set[Path] = set()  # entries whose directory is synced
        self.on_replace: Callable[[Path, Path], None] = lambda _source, _target: None
        real = {name: getattr(os, name) for name in ("open", "write", "pwrite", "fsync", "replace")}

        def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            new = isinstance(path, str | Path) and flags & os.O_CREAT and not Path(path).exists()
            fd: int = real["open"](path, flags, *args, **kwargs)
            if isinstance(path, str | Path):
                self._open[fd] = Path(path).absolute()
                if new:
                    self._names.discard(self._open[fd])
                    self._contents.discard(self._open[fd])
            return fd

        def written(name: str) -> Callable[..., int]:
            def call(fd: int, *args: Any) -> int:
                self._contents.discard(self._open.get(fd, Path()))
                return int(real[name](fd, *args))

            return call

        def synced(fd: int) -> None:
            real["fsync"](fd)
            path = self._open[fd]
            if path.is_dir():
                self._names |= set(path.iterdir())
            else:
                self._contents.add(path)

        def replaced(source: Any, target: Any, **kwargs: Any) -> None:
            old, new = Path(source).absolute(), Path(target).absolute()
            self.on_replace(old, new)
            assert old in self._contents, f"{new} is renamed into place before its bytes are synced"
            real["replace"](source, target, **kwargs)
            self._contents.add(new)
            self._names -= {old, new}

        patch.setattr(os, "open", opened)
        patch.setattr(os, "write", written("write"))
        patch.setattr(os, "pwrite", written("pwrite"))
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "replace", replaced)

    def survives(self, path: Path) -> bool:
        path = path.absolute()
        parents = [p for p in path.parents if p.is_relative_to(self.root)]
        return all(p in self._names for p in (path, *parents)) and (path.is_dir() or path in self._contents)


def test_a_power_cut_never_leaves_a_promise_without_what_it_promises(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "er" / "s.zarr"
    source = DiscSource()
    todo = plan(path, source, backbone, FIXED)
    disk = Disk(tmp_path / "deep", monkeypatch)
    promises = completions = 0
    real_append = manifest.Appender.append

    def files(split: Path, *parts: str) -> list[Path]:
        return [f for part in parts for f in (split / part).rglob("*") if f.is_file()]

    def append(self: manifest.Appender, row: manifest.Row) -> None:
        nonlocal promises
        split = self._path.parent
        needed = [path / "zarr.json", split / "zarr.json", split / manifest.NAME]
        needed += [f for name in row.crc32c for f in (split / name).glob("*") if not f.name.endswith(".tmp")]
        lost = [f for f in needed if not disk.survives(f)]
        assert not lost, f"a row is appended before these are durable: {lost}"
        real_append(self, row)
        assert disk.survives(split / manifest.NAME)
        promises += 1

    def on_replace(temporary: Path, target: Path) -> None:
        nonlocal completions
        split = target.parent
        if target.name != "zarr.json" or not (split / manifest.NAME).exists():
            return
        if json.loads(temporary.read_bytes())["attributes"].get("featcache", {}).get("statistics_videos"):
            needed = files(split, "statistics", "instances", "frame_video", "frame_position")
            assert len(needed) > 20
            lost = [f for f in needed if not disk.survives(f)]
            assert not lost, f"the split is called complete before these are durable: {lost}"
            completions += 1

    disk.on_replace = on_replace
    monkeypatch.setattr(manifest.Appender, "append", append)
    extract(todo, source, backbone)
    assert (promises, completions) == (7, 2)
    assert all(disk.survives(f) for f in path.rglob("*") if f.name != ".lock")


# -- full disks --------------------------------------------------------------------------------------------


def test_a_full_disk_under_the_manifest_leaves_no_torn_row(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, written = tmp_path / "s.zarr", os.pwrite, 0

    def full(fd: int, data: bytes, at: int) -> int:
        nonlocal written
        if not data.startswith(b'{"video":') and written < 3:
            return real(fd, data, at)  # the lock's
        written += 1
        if written > 3:
            raise OSError(28, "No space left on device")
        return real(fd, data[:20] if written == 3 else data, at)  # the third has room for a part

    monkeypatch.setattr(os, "pwrite", full)
    source = DiscSource()
    with pytest.raises(DataError, match="manifest.jsonl: cannot write .No space left on device.*it resumes"):
        extract(plan(path, source, backbone, FIXED), source, backbone)
    monkeypatch.undo()
    assert (path / "train/manifest.jsonl").read_bytes().endswith(b"\n")
    assert len(manifest.read(path / "train")) == 2
    assert verify(path) == []
    extract(plan(path, source, backbone, FIXED), source, backbone)
    extract(plan(tmp_path / "whole.zarr", source, backbone, FIXED), source, backbone)
    assert arrays_of(path) == arrays_of(tmp_path / "whole.zarr")


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def failing(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(DataError, match="Input/output error"):
        write_durably(tmp_path / "a", b"new")
    assert [f.name for f in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path: Path, backbone: Backbone) -> None:
    store = make_store(tmp_path / "s.zarr")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="is a file; name a folder"):
        StoreWriter(tmp_path / "file", store.spec)
    with pytest.raises(DataError, match="cannot write"):
        StoreWriter(tmp_path / "file" / "s.zarr", store.spec)


# -- the source --------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six videos of three frames, as folders of images."""
    discs = DiscSource({"train": (3,) * 6})
    for video in range(6):
        folder = tmp_path / "pictures" / f"video{video}"
        folder.mkdir(parents=True)
        for t, frame in enumerate(discs.read("train", video).frames):
            Image.fromarray(frame).save(folder / f"{t}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("whole", [False, True], ids=["one file", "all of it"])
def test_a_source_that_vanishes_costs_only_what_it_took(
    tmp_path: Path, pictures: Path, backbone: Backbone, whole: bool
) -> None:
    path, kept = tmp_path / "s.zarr", tmp_path / "kept"
    shutil.copytree(pictures, kept)
    source = open_source(pictures)
    name = source.splits()[0]

    def vanish(_split: str, frames: int, _total: int) -> None:
        if frames == 3 and pictures.exists():
            shutil.rmtree(pictures if whole else pictures / "video5")

    todo = plan(path, source, backbone, FIXED)
    with pytest.raises(DataError) as failure:
        extract(todo, source, backbone, vanish)
    assert "pictures" in str(failure.value) and "\n" not in str(failure.value)
    assert 1 <= len(manifest.read(path / name)) < 6 and verify(path) == []
    shutil.rmtree(pictures, ignore_errors=True)
    shutil.copytree(kept, pictures)
    source = open_source(pictures)
    extract(plan(path, source, backbone, FIXED), source, backbone)
    extract(plan(tmp_path / "whole.zarr", source, backbone, FIXED), source, backbone)
    assert arrays_of(path) == arrays_of(tmp_path / "whole.zarr")


def test_a_source_that_changed_is_refused_before_anything_is_written(tmp_path: Path, backbone: Backbone) -> None:
    path, source = tmp_path / "s.zarr", DiscSource()
    extract(plan(path, source, backbone, replace(FIXED, max_videos=2)), source, backbone)
    before = arrays_of(path)
    other = DiscSource({"train": (3, 3, 4, 3, 3), "validation": (3, 3)})
    with pytest.raises(IncompatibleError, match="source_fingerprint"):
        extract(plan(path, other, backbone, FIXED), other, backbone)
    assert arrays_of(path) == before and verify(path) == []


# -- one writer --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr")
    assert crash.run(crash.hold_lock, str(store.path))[0] == -9
    assert (store.path / ".lock").read_text().isdigit()
    StoreWriter(store.path, store.spec).close()


def test_closing_twice_closes_nobody_elses_file(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr")
    writer = StoreWriter(store.path, store.spec)
    writer.close()
    with (tmp_path / "mine").open("w") as mine:
        writer.close()
        mine.write("still open")
    assert (tmp_path / "mine").read_text() == "still open"


def test_a_folder_of_other_things_is_neither_taken_nor_swept(tmp_path: Path) -> None:
    spec = make_store(tmp_path / "s.zarr").spec
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tmp").write_text("mine")
    with pytest.raises(DataError, match="holds thesis.tmp and no store; choose another --out"):
        StoreWriter(tmp_path / "home", spec)
    assert [f.name for f in (tmp_path / "home").iterdir()] == ["thesis.tmp"]


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr")
    leftovers = [store.path / "train/video/c.0.0.0.0.1f.tmp", store.path / "zarr.9c.partial"]
    for file in leftovers:
        file.write_bytes(b"half")
    assert verify(store.path) == []
    StoreWriter(store.path, store.spec).close()
    assert not any(file.exists() for file in leftovers)


def test_a_lost_manifest_does_not_cost_the_features(tmp_path: Path, backbone: Backbone) -> None:
    path, source = tmp_path / "s.zarr", DiscSource()
    extract(plan(path, source, backbone, FIXED), source, backbone)
    chunks = sorted(path.rglob("c.*"))
    (path / "train" / manifest.NAME).unlink()
    with pytest.raises(DataError, match="missing from a split of 5 videos; put the file back"):
        extract(plan(path, source, backbone, FIXED), source, backbone)
    assert sorted(path.rglob("c.*")) == chunks


def test_what_differs_is_a_short_table(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr")
    other = replace(store.spec, preprocessing={"size": 448}, model={"library": "none", "weights_sha256": "0" * 64})
    with pytest.raises(IncompatibleError) as refusal:
        StoreWriter(store.path, other)
    assert refusal.value.render().splitlines() == [
        f"{store.path}: made with other settings; choose another --out or delete the store",
        "                        store  asked",
        "  model.weights_sha256  -      0000000000000000000000000000000000000...",
        "  preprocessing.size    32     448",
    ]


@pytest.mark.slow
def test_a_repair_killed_anywhere_is_finished_by_the_next_extraction(tmp_path: Path) -> None:
    whole = tmp_path / "whole.zarr"
    assert crash.run(crash.extraction, str(whole))[0] == 0
    damaged = tmp_path / "damaged.zarr"
    shutil.copytree(whole, damaged)
    (damaged / "train/features/layer1/c.1.0.0").write_bytes(b"")
    (damaged / "train/frame_video/zarr.json").unlink()
    trial = tmp_path / "trial.zarr"
    shutil.copytree(damaged, trial)
    code, writes = crash.run(crash.repair, str(trial))
    assert code == 0 and arrays_of(trial) == arrays_of(whole)
    for die_at in np.linspace(1, writes - 1, 3).astype(int).tolist():
        path = tmp_path / f"{die_at}.zarr"
        shutil.copytree(damaged, path)
        assert crash.run(crash.repair, str(path), die_at=die_at)[0] == -9
        assert crash.run(crash.repair, str(path))[0] == 0
        assert crash.run(crash.extraction, str(path))[0] == 0
        assert arrays_of(path) == arrays_of(whole) and verify(path) == []
        FeatureStore.open(path)["train"].require_complete()
