"""A change of a store that dies leaves the store that was or the one that comes, and goes on from there."""

from __future__ import annotations

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
    "added": added_and_moved,
    "repaired": lambda source: put(source, "b", 9),
    "removed": lambda source: drop(source, "c"),
    "removed, where names cannot be exchanged": lambda source: drop(source, "c"),
    "all of it": everything,
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_killed_anywhere_it_comes_to_the_same_store(tmp_path: Path, backbone: Backbone, change: str) -> None:
    prune, exchange = "removed" in change or change == "all of it", "cannot" not in change
    options = replace(GROW, prune=prune)
    source, old, new = videos(tmp_path / "v", "abcd"), tmp_path / "old.zarr", tmp_path / "new.zarr"
    run(old, source, backbone)
    CHANGES[change](source)
    shutil.copytree(old, new)
    code, writes = crash.run(crash.follow, str(new), str(source), prune, exchange)
    assert code == 0 and writes > 30
    before, after = files(old), files(new)
    assert before != after
    for die_at in np.linspace(1, writes - 1, 8).astype(int).tolist():
        path = shutil.copytree(old, tmp_path / "s.zarr")
        code, _ = crash.run(crash.follow, str(path), str(source), prune, exchange, die_at=die_at)
        assert code == -9
        assert verify(path) == []
        if exchange or (path / "train").exists():
            split = FeatureStore.open(path)["train"]
            assert split.complete or change.startswith(("added", "repaired", "all"))
            if split.complete:
                assert ids(split) in (list("abcd"), ids(FeatureStore.open(new)["train"]))
        run(path, source, backbone, options)
        assert files(path) == after, f"differs after dying at write {die_at} of {writes}"
        shutil.rmtree(path)


def test_what_a_kill_leaves_between_two_names_is_undone(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = videos(tmp_path / "v", "abcd"), tmp_path / "s.zarr"
    run(path, source, backbone)
    before = files(path)
    drop(source, "c")

    class Killed(BaseException):
        pass

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
