"""Commands on a store whose only split has a name of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import pytest

import cli
from featcache.backbones.backbone import load_backbone
from featcache.bench.extraction import measure_extract
from featcache.errors import UsageError
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.store.reading import FeatureStore
from featcache.store.writing import StoreWriter
from featcache.upkeep.repair import Means, repair
from featcache.upkeep.verify import verify
from tests.synthetic import SIZE, DiscSource, arrays_of, make_store

SOURCE = DiscSource({"heldout": (6, 7)})


@pytest.fixture
def heldout(tmp_path: Path) -> FeatureStore:
    return make_store(tmp_path / "heldout.zarr", SOURCE)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    cli.app([*arguments, "--json"], standalone_mode=False)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("more", [(), ("--recompute",), ("--split", "heldout")])
def test_stats(heldout: FeatureStore, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]) -> None:
    (report,) = printed(capsys, "stats", str(heldout.path), *more)["stores"]
    assert (report["split"], report["frames"]) == ("heldout", 13)


def test_stats_are_plotted(heldout: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "stats", str(heldout.path), "--plot", str(tmp_path / "scale.png"))
    assert (tmp_path / "scale.png").stat().st_size > 1000


@pytest.mark.parametrize("more", [(), ("--split", "heldout")])
def test_bench_stream(heldout: FeatureStore, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]) -> None:
    command = ("bench", "stream", "--cache", str(heldout.path), "--rounds", "1", "--no-cold", *more)
    found = printed(capsys, *command)
    assert found["split"] == "heldout" and found["patterns"]


def test_verify_and_repair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = load_backbone("resnet18", weights="random", taps=("layer1",), input_size=SIZE)
    path, options = tmp_path / "s.zarr", ExtractOptions(batch_size=4, precision="float32")
    extract(plan(path, SOURCE, backbone, options), SOURCE, backbone)
    whole = arrays_of(path)
    next((path / "heldout/features/layer1").glob("c.*")).unlink()
    with pytest.raises(SystemExit) as ended:
        cli.app(["verify", str(path), "--json"])
    assert ended.value.code == 3 and json.loads(capsys.readouterr().out)["damaged"][0]["split"] == "heldout"
    assert repair(path, Means(data=SOURCE, backbone=backbone)) and verify(path) == []
    assert arrays_of(path) == whole


@pytest.mark.parametrize("form", ["zarr", "hdf5"])
def test_export_and_import(heldout: FeatureStore, tmp_path: Path, form: str) -> None:
    out, back = tmp_path / f"copy.{form}", tmp_path / "back.zarr"
    cli.app(["export", str(heldout.path), str(out), "--format", form], standalone_mode=False)
    if form == "hdf5":
        with h5py.File(out) as file:
            assert list(file) == ["heldout"]
        cli.app(["import", str(out), str(back)], standalone_mode=False)
    copied = FeatureStore.open(back if form == "hdf5" else out)
    assert copied.splits == ("heldout",) and verify(copied.path) == []
    assert copied["heldout"].tokens("block1", 1).equal(heldout["heldout"].tokens("block1", 1))


def test_bench_extract() -> None:
    backbone = load_backbone("resnet18", weights="random", taps=("layer1",), input_size=SIZE)
    options = ExtractOptions(splits=SOURCE.splits(), batch_size=4, precision="float32")
    assert measure_extract(SOURCE, backbone, options, rounds=1).frames == 13


def test_the_split_to_begin_with(tmp_path: Path, heldout: FeatureStore) -> None:
    assert heldout.split(None).name == "heldout"
    assert make_store(tmp_path / "two.zarr", DiscSource({"a": (2,), "train": (2,)})).split(None).name == "train"
    with pytest.raises(UsageError, match="no split 'train'; it has: heldout"):
        heldout.split("train")
    with StoreWriter(tmp_path / "empty.zarr", heldout.spec):
        pass
    with pytest.raises(UsageError, match="no split 'train'; it has: none yet"):
        FeatureStore.open(tmp_path / "empty.zarr").split(None)
