"""A change of a store that dies leaves the store that was or the one that comes, and goes on from there."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.backbones.backbone import Backbone, load_backbone
from featcache.store import durable
from featcache.store.durable import BEFORE, NEXT
from featcache.store.reading import FeatureStore
from featcache.store.writing import StoreWriter
from featcache.upkeep.verify import verify
from tests import crash
from tests.growing import GROW, PRUNE, drop, files, ids, put, rename, run, videos

STEPS = 8  # of a change, at which it dies


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("resnet18", weights="random", taps=("layer1",), input_size=32)


def added_and_moved(source: Path) -> None:
    put(source, "0", 6)
    rename(source, "a", "z")


def everything(source: Path) -> None:
    put(source, "a", 9, 5)
    put(source, "x", 6)
    drop(source, "c")


CHANGES: dict[str, Callable[[Path], object]] = {
    "added, another renamed": added_and_moved,
    "repaired": lambda source: put(source, "b", 9),
    "removed": lambda source: drop(source, "c"),
    "removed, where names cannot be exchanged": lambda source: drop(source, "c"),
    "all of it": everything,
}


class Killed(BaseException):
    pass


def dead_after(patch: pytest.MonkeyPatch, writes: float) -> list[str]:
    """Let no more than so many calls reach the disk, as if the process had died then; gives those that did."""
    made: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def counting(*args: Any, **how: Any) -> Any:
            if len(made) >= writes:
                raise Killed
            made.append(name)
            return None if name == "fsync" else real(*args, **how)

        patch.setattr(os, name, counting)

    for name in crash.WRITES:
        wrap(name)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_dead_at_any_step_it_comes_to_the_same_store(
    tmp_path: Path, backbone: Backbone, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(GROW, prune="removed" in change or change == "all of it")
    if in_two_steps := "cannot" in change:
        monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    source, old, new, path = videos(tmp_path / "v", "abcd"), *(tmp_path / f"{n}.zarr" for n in ("old", "new", "s"))
    with monkeypatch.context() as patch:
        dead_after(patch, math.inf)
        run(old, source, backbone)
        CHANGES[change](source)
        shutil.copytree(old, new)
        made = dead_after(patch, math.inf)
        run(new, source, backbone, options)
        writes = len(made)
    after = files(new)
    assert files(old) != after and writes > 30
    for die_at in np.linspace(1, writes - 1, STEPS).astype(int).tolist():
        shutil.copytree(old, path)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dead_after(patch, die_at)
            run(path, source, backbone, options)
        assert verify(path) == []
        if not in_two_steps:
            split = FeatureStore.open(path)["train"]
            assert not split.complete or ids(split) in (list("abcd"), ids(FeatureStore.open(new)["train"]))
            assert split.complete or not change.startswith("removed"), "what needs no extraction is never unfinished"
        with monkeypatch.context() as patch:
            dead_after(patch, math.inf)
            run(path, source, backbone, options)
            StoreWriter(path, FeatureStore.open(path).spec).close()  # a finished store is not opened for writing
        assert files(path) == after, f"differs after dying at write {die_at} of {writes}"
        shutil.rmtree(path)


@pytest.mark.slow
def test_killed_for_good(tmp_path: Path, backbone: Backbone) -> None:
    """The same in a process of its own, by the system."""
    source, old, new = videos(tmp_path / "v", "abcd"), tmp_path / "old.zarr", tmp_path / "new.zarr"
    run(old, source, backbone)
    everything(source)
    shutil.copytree(old, new)
    code, writes = crash.run(crash.follow, str(new), str(source))
    assert code == 0
    for die_at in (writes // 4, writes // 2):
        path = shutil.copytree(old, tmp_path / f"{die_at}.zarr")
        assert crash.run(crash.follow, str(path), str(source), die_at=die_at)[0] == -9
        assert verify(path) == []
        run(path, source, backbone, replace(GROW, prune=True))
        assert files(path) == files(new)


def test_what_a_kill_leaves_between_two_names_is_undone(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = videos(tmp_path / "v", "abcd"), tmp_path / "s.zarr"
    run(path, source, backbone)
    before = files(path)
    drop(source, "c")

    moved: list[str] = []

    def dying(old: Any, new: Any) -> None:
        moved.append(os.fspath(old))
        if len(moved) == 2:
            raise Killed
        os.replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(durable, "_exchange", lambda *_: False)
        patch.setattr(os, "rename", dying)
        run(path, source, backbone, PRUNE)
    assert not (path / "train").exists() and (path / f".train{BEFORE}").exists() and (path / f".train{NEXT}").exists()
    StoreWriter(path, FeatureStore.open(path).spec).close()
    assert files(path) == before
    assert ids(run(path, source, backbone, PRUNE)[0]) == list("abd")
