"""A run on other people's videos: stores with any single split, of any name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli import app
from featcache.errors import UsageError
from featcache.sources.video import Video
from featcache.store.reading import FeatureStore
from slotlab.report.write import write_report
from slotlab.runs.folder import LOG, read_rows
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.references import KnownReferences, references
from slotlab.training.train import train
from tests.reporting import make_run
from tests.synthetic import DiscSource, make_store
from tests.training import small


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on a store of their own, and a store of other videos, which calls its only split otherwise."""
    folder = tmp_path_factory.mktemp("runs")
    store = make_store(folder / "own.zarr")
    make_run(folder / "features", store)
    make_run(folder / "pixels", store, "pixel")
    make_store(folder / "other.zarr", DiscSource({"heldout": (4, 5, 3)}))
    return folder


def printed(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[dict[str, Any], str]:
    """A command's JSON, and what it said."""
    capsys.readouterr()
    app([*map(str, args), "--json", "--device", "cpu"], standalone_mode=False)
    out, err = capsys.readouterr()
    return json.loads(out), err


@pytest.mark.slow
@pytest.mark.parametrize("run", ["features", "pixels"])
def test_every_command_takes_the_only_split_and_says_so(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: str
) -> None:
    there = ("--cache", home / "other.zarr")
    sheet = tmp_path / "sheet.png"
    found, said = printed(capsys, "eval", home / run, *there, "--sheet", sheet, "--against", home / "features")
    assert (found["split"], found["frames"], found["videos"]) == ("heldout", 12, 3)
    assert "no split 'validation'; taking 'heldout'" in " ".join(said.split())
    assert found["floor_statistics"] == str(home / "own.zarr" / "train")
    assert found["against"]["scores"]["mbo"]["videos"] == 3
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert not (home / run / "eval-heldout.json").exists(), "the run's own store is there"

    found, said = printed(capsys, "masks", home / run, *there, "--out", tmp_path / "masks")
    assert found["files"] == 12 and "taking 'heldout'" in said
    found, said = printed(capsys, "report", home / run, *there, "-o", tmp_path / "r.html")
    assert found["runs"][0]["split"] == "heldout" and found["runs"][0]["evaluation"]["videos"] == 3
    assert "no split 'validation'; it shows 'heldout'" in " ".join(said.split())
    if run == "pixels":  # needs no backbone
        found, said = printed(capsys, "robustness", home / run, *there, "--max-videos", 1, "--frames", 2)
        assert found["split"] == "heldout" and "taking 'heldout'" in said


def test_the_table_names_the_statistics_of_the_floor(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["eval", str(home / "features"), "--cache", str(home / "other.zarr"), "--device", "cpu"], standalone_mode=False)
    text = "".join(capsys.readouterr().out.split())
    assert f"thewhitenedfloorsusethestatisticsof{home}/own.zarr/train" in text


def test_without_its_own_store_the_floor_takes_the_statistics_of_the_split_itself(home: Path, tmp_path: Path) -> None:
    run = shutil.copytree(home / "features", tmp_path / "run")
    note = json.loads((run / "store.json").read_text())
    (run / "store.json").write_text(json.dumps(note | {"path": str(tmp_path / "gone.zarr"), "from_run": None}))
    found = evaluate(load_run(run, home / "other.zarr"))
    assert found.references.statistics == str(home / "other.zarr" / "heldout")
    whole = evaluate(load_run(home / "features", home / "other.zarr"))
    assert found.values == whole.values
    raw, white = "kmeans_raw", "kmeans_whitened"
    assert found.references.floors[raw] == whole.references.floors[raw]
    assert found.references.floors[white] != whole.references.floors[white]


def test_another_store_in_the_place_of_its_own_is_not_taken_for_it(home: Path, tmp_path: Path) -> None:
    run = shutil.copytree(home / "features", tmp_path / "run")
    other = make_store(tmp_path / "otherwise.zarr", backbone="another")
    note = json.loads((run / "store.json").read_text())
    (run / "store.json").write_text(json.dumps(note | {"path": str(other.path), "from_run": None}))
    found = evaluate(load_run(run, home / "other.zarr"))
    assert found.references.statistics == str(home / "other.zarr" / "heldout")


def test_a_published_name_of_the_evaluation_split_is_found(tmp_path: Path) -> None:
    """DAVIS, VOC and COCO call it val."""
    store = FeatureStore.open(make_store(tmp_path / "davis.zarr", DiscSource({"train": (4,), "val": (4, 3)})).path)
    run = train(small("evaluate_every=6", "optim.steps=6"), store, tmp_path / "run")
    assert "eval_mbo" in read_rows(run / LOG)[-1]
    found = evaluate(load_run(run))
    assert (found.split, found.summary.videos) == ("val", 2)
    with pytest.raises(UsageError, match="no split 'nosuch'"):
        train(small("evaluate_every=6", "data.eval_split=nosuch"), store, tmp_path / "other")


class OneDisc(DiscSource):
    """As DAVIS 2016: one object a video."""

    def read(self, split: str, index: int) -> Video:
        video = super().read(split, index)
        assert video.segmentations is not None
        return replace(video, segmentations=np.minimum(video.segmentations, 1), instances=video.instances[:1])


def test_of_one_object_there_is_no_fg_ari(tmp_path: Path) -> None:
    """Neither in the scores nor on a page, which then draws mBO over the frames."""
    run = make_run(tmp_path / "run", make_store(tmp_path / "one.zarr", OneDisc()))
    write_report([run], tmp_path / "page.html")
    kept = json.loads((run / "eval-validation.json").read_text())
    assert kept["fg_ari"] is None and kept["fg_ari_video"] is None and kept["mbo"] > 0
    page = (tmp_path / "page.html").read_text()
    assert "mBO by frame" in page and "FG-ARI by frame" not in page  # charts over the frames, too


def test_of_several_splits_one_must_be_named(home: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "two.zarr", DiscSource({"day": (4,), "night": (4, 3)}))
    with pytest.raises(UsageError, match=r"no split 'validation'; choose one with --split: day, night"):
        evaluate(load_run(home / "features", store.path))
    with pytest.raises(UsageError, match=r"no split 'validation'; choose one with --split: day, night"):
        write_report([home / "features"], tmp_path / "r.html", cache=store.path)
    assert evaluate(load_run(home / "features", store.path), "night").summary.videos == 2


def test_runs_that_differ_in_their_training_split_have_floors_of_their_own(tmp_path: Path) -> None:
    """In one report, and in one process of an experiment."""
    lengths = {"train": (4, 4, 3), "night": (2, 4, 5), "validation": (4, 4)}
    store = FeatureStore.open(make_store(tmp_path / "store.zarr", DiscSource(lengths)).path)
    runs = [make_run(tmp_path / name, store, train_split=name) for name in ("train", "night")]
    alone = [references(store["validation"], load_run(run)) for run in runs]
    assert alone[0].floors["kmeans_whitened"] != alone[1].floors["kmeans_whitened"]
    known: KnownReferences = {}
    assert [references(store["validation"], load_run(run), known) for run in runs] == alone
    found = write_report(runs, tmp_path / "r.html")["runs"]
    assert [run["evaluation"]["floor"] for run in found] == [of.as_dict()["floor"] for of in alone]
    assert len(known) == 2 and references(store["validation"], load_run(runs[0]), known) is known[next(iter(known))]
