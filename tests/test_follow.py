"""One pass of a run over a split: what it gives of each video, and what it holds."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from featcache.errors import DataError
from slotlab.masks.labels import masks_to_labels
from slotlab.runs.loaded import LoadedRun, load_run
from slotlab.scoring.follow import Followed, follow
from slotlab.scoring.metrics import MATCHED_IOU, SCORES
from tests.reporting import NoMasks, disc_store, make_run
from tests.synthetic import make_store


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """A run whose decoder and attention differ."""
    folder = tmp_path_factory.mktemp("follow")
    return load_run(make_run(folder / "run", disc_store(folder / "discs.zarr"), steps=20))


def test_each_video_comes_with_its_masks_truth_and_tables(loaded: LoadedRun) -> None:
    split = loaded.split()
    found = list(follow(loaded, split))
    assert [followed.video for followed in found] == list(split.videos)
    assert [len(followed) for followed in found] == [4, 6, 4, 5]
    for followed in found:
        truth, masks = split.segmentations(followed.video), loaded.segment(split, followed.video).masks
        assert torch.equal(followed.masks.flatten(2), masks) and np.array_equal(followed.truth, truth)
        for kind in ("decoder", "attention"):
            labels = masks_to_labels(followed.output.showing(kind).masks_on_grid, split.spec.frame_size).numpy()
            for frame, table in enumerate(followed.tables(kind)):
                counted = np.zeros(table.shape, int)
                np.add.at(counted, (truth[frame].ravel(), labels[frame].ravel()), 1)
                assert np.array_equal(table, counted)
        labels = masks_to_labels(followed.masks, split.spec.frame_size).numpy()
        expected = [
            adjusted_rand_score(t[t > 0], p[t > 0]) if (t > 0).any() else np.nan
            for t, p in zip(truth, labels, strict=True)
        ]
        assert followed.score(SCORES[0]).numpy() == pytest.approx(expected, nan_ok=True)
    assert not torch.equal(found[0].tables("decoder"), found[0].tables("attention"))


def test_objects_and_slots_point_at_each_other(loaded: LoadedRun) -> None:
    matched = 0
    for followed in follow(loaded, loaded.split()):
        for table, slots, objects in zip(followed.tables(), followed.slots, followed.objects, strict=True):
            pairs = {(item, slot) for item, slot in enumerate(slots.tolist()) if slot >= 0}
            assert pairs == {(item, slot) for slot, item in enumerate(objects.tolist()) if item >= 0}
            for item, slot in pairs:
                union = int(table[item + 1].sum() + table[:, slot].sum() - table[item + 1, slot])
                assert int(table[item + 1, slot]) / union > MATCHED_IOU
            matched += len(pairs)
    assert matched > 10


def test_some_videos_in_the_order_asked(loaded: LoadedRun) -> None:
    assert [followed.video for followed in follow(loaded, loaded.split(), (2, 0))] == [2, 0]


@pytest.mark.slow
def test_one_video_is_held_at_a_time(loaded: LoadedRun) -> None:
    videos = follow(loaded, loaded.split())
    for _ in range(3):
        followed = next(videos)
        followed.tables()
        held = [weakref.ref(value) for value in (followed.output.masks, followed.truth, followed)]
        del followed
        gc.collect()
        assert [value() for value in held] == [None] * 3


def test_a_model_of_one_kind_of_masks_is_tabled_once(loaded: LoadedRun) -> None:
    followed = next(follow(loaded, loaded.split()))
    output = followed.output.showing("attention")
    same = Followed(0, output, "decoder", followed.truth, followed.labels)
    assert same.tables("attention") is same.tables("decoder") is same.tables()


def test_without_ground_truth_there_are_masks_alone(tmp_path: Path, loaded: LoadedRun) -> None:
    store = make_store(tmp_path / "bare.zarr", NoMasks({"validation": (3, 2)}))
    bare = load_run(loaded.path, store.path)
    for followed in follow(bare, bare.split()):
        assert followed.truth is None and (followed.objects == -1).all()
        with pytest.raises(ValueError, match="no masks to make tables with"):
            followed.tables()


def test_masks_that_are_not_finite_stop_it(loaded: LoadedRun) -> None:
    parameter = next(loaded.model.parameters())
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(torch.nan)
    try:
        with pytest.raises(DataError, match="not finite"):
            next(follow(loaded, loaded.split()))
    finally:
        with torch.no_grad():
            parameter.copy_(kept)
