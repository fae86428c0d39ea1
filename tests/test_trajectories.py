"""Stores of a part of the videos, on which benchmarks.trajectories trains world models."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.trajectories import main, stores
from featcache.errors import IncompatibleError
from featcache.store.reading import FeatureStore
from featcache.upkeep.verify import verify
from slotlab.dynamics.rollout import features_at
from slotlab.runs.folder import check_store


@pytest.fixture
def run(tracked_run: Path, shared_tracks: FeatureStore, tmp_path: Path) -> Path:
    shutil.copytree(shared_tracks.path, tmp_path / "run" / "tracks.zarr")
    return tmp_path / "run"


def test_of_a_stride_every_frame_is_in_one_video(run: Path, tmp_path: Path) -> None:
    """Videos of six frames, of which three are seen without a stride: the third is the last one seen with it."""
    whole = FeatureStore.open(run / "tracks.zarr")
    part = FeatureStore.open(stores(run, tmp_path, videos=2, stride=2, hold_out=0, burn_in=3))
    training, scored = part["train"], part["validation"]
    assert training.spec.lengths == (3,) * 4 and len(scored.names) == len(whole["validation"].names)
    for place, (video, first) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        for of in (part, features_at(part)):
            tap = of.tap(None)
            origin = whole if of is part else features_at(whole)
            np.testing.assert_array_equal(of["train"].tokens(tap, place), origin["train"].tokens(tap, video)[first::2])
        np.testing.assert_array_equal(training.video(place), whole["train"].video(video)[first::2])
    np.testing.assert_array_equal(scored.segmentations(1), whole["validation"].segmentations(1)[0::2])
    moments = features_at(part)["train"].statistics("block1")
    np.testing.assert_array_equal(training.statistics("block1").mean, moments.mean)
    assert verify(part.path) == []


def test_a_predictor_keeps_the_pace_that_it_learnt(
    run: Path, predicting: Path, tracked_run: Path, tmp_path: Path
) -> None:
    slower = FeatureStore.open(stores(run, tmp_path, videos=2, stride=2, hold_out=0, burn_in=3))
    with pytest.raises(IncompatibleError, match="not the features that") as caught:
        check_store(predicting, slower)
    assert [row.setting for row in caught.value.differences] == ["frame_stride"]
    check_store(predicting, FeatureStore.open(run / "tracks.zarr"))
    check_store(tracked_run, features_at(slower))  # a model that finds slots reads any frames


def test_videos_that_are_held_out_are_scored(run: Path, tmp_path: Path) -> None:
    whole = FeatureStore.open(run / "tracks.zarr")
    part = FeatureStore.open(stores(run, tmp_path, videos=99, stride=1, hold_out=1, burn_in=3))
    *kept, last = whole["train"].names.values()
    assert [name[:-2] for name in part["train"].names.values()] == kept
    assert [name[:-2] for name in part["validation"].names.values()] == [last]


def test_a_row_for_each_part(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    settings = ["data.clip=5", "model.burn_in=3", "model.width=16", "optim.steps=1", "optim.batch_size=2"]
    monkeypatch.setattr("benchmarks.trajectories.AHEAD", (2,))
    command = ["trajectories", str(run), "--videos", "1", "2", "--seeds", "0", "1", "--folder", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*command, "--strides", "1", "--set", *settings])
    for _ in range(2):  # runs that are there are used again
        main()
    rows = capsys.readouterr().out.splitlines()  # type: ignore[attr-defined]
    assert rows[2] == rows[6] and rows[2].startswith("| 1 videos, stride 1 |") and "–" in rows[2]
