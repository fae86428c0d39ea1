"""Scores by group, how sure they are, and tests between runs: against plain loops, formulas and scipy."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from featcache.errors import IncompatibleError
from featcache.sources.video import Video
from featcache.store import manifest
from featcache.store.reading import FeatureStore, Split
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.groups import ATTRIBUTES, objects_by, subgroup_scores
from slotlab.scoring.intervals import Bootstrap
from slotlab.scoring.paired import paired, paired_scores
from slotlab.scoring.scores import Scores
from tests.synthetic import DiscSource, make_store

OBJECTS, SLOTS = 4, 4  # labels with the background's, and slots


class SizedSource(DiscSource):
    """Discs of several sizes and materials, some of which leave the picture."""

    def read(self, split: str, index: int) -> Video:
        video = super().read(split, index)
        sizes = ("small", "large") if index % 2 else ("large", "")
        assert video.segmentations is not None
        video.segmentations[: index % 3][video.segmentations[: index % 3] == 2] = 0  # hidden at first
        return Video(
            video.id,
            video.frames,
            video.segmentations,
            tuple(
                replace(i, size=s, category=c)
                for i, s, c in zip(video.instances, sizes, ("cat", "dog")[:: -1 if index % 2 else 1], strict=True)
            ),
        )


@pytest.fixture
def split(tmp_path: Any) -> Split:
    lengths = {"train": (4,), "validation": (4, 3, 2, 4, 4)}
    store: FeatureStore = make_store(tmp_path / "s.zarr", SizedSource(lengths))
    return store["validation"]


def scores_of(split: Split, seed: int = 0) -> Scores:
    """Scores of random tables that have the split's objects in sight."""
    rng, scores = np.random.default_rng(seed), Scores()
    for video in split.videos:
        truth = split.segmentations(video)
        seen = np.stack([(truth == k).sum((1, 2)) for k in range(OBJECTS)], 1)  # (T, OBJECTS)
        tables = np.stack([[rng.multinomial(n, rng.dirichlet(np.ones(SLOTS))) for n in frame] for frame in seen])
        scores.add(torch.from_numpy(tables), torch.full((len(truth),), video))
    return scores


# -- intervals ---------------------------------------------------------------------------------------------


def test_interval_of_one_value_a_video_is_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(0.6, 0.1, 400)
    low, high = Bootstrap().of_mean(values) or ()
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_interval_of_frames_treats_the_video_as_the_sample() -> None:
    """Frames that only repeat their video's value say nothing new, and videos weigh by their frames."""
    per_video = torch.from_numpy(np.random.default_rng(4).uniform(size=30))
    videos = torch.arange(30)
    once = Bootstrap().intervals({"x": per_video}, videos)["x"]
    often = Bootstrap().intervals({"x": per_video.repeat_interleave(24)}, videos.repeat_interleave(24))["x"]
    assert once == pytest.approx(often)
    lengths = torch.randint(1, 9, (30,), generator=torch.Generator().manual_seed(0))
    values, ids = per_video.repeat_interleave(lengths), videos.repeat_interleave(lengths)
    values[::7] = torch.nan  # frames without a score
    bootstrap = Bootstrap(resamples=400)
    found = bootstrap.intervals({"x": values}, ids)["x"]
    draws = np.random.default_rng(bootstrap.seed).multinomial(30, np.full(30, 1 / 30), 400)
    means = [np.nanmean(np.concatenate([np.tile(values[ids == v], k) for v, k in enumerate(draw)])) for draw in draws]
    assert found == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-9)


def test_coverage_is_near_the_level() -> None:
    rng, hits = np.random.default_rng(5), 0
    for _ in range(200):
        effects = rng.normal(0.5, 0.1, 40)
        frames = torch.from_numpy(effects[:, None] + rng.normal(0, 0.1, (40, 6))).flatten()
        found = Bootstrap(resamples=500).intervals({"x": frames}, torch.arange(40).repeat_interleave(6))["x"]
        assert found is not None
        hits += found[0] <= 0.5 <= found[1]
    assert 0.89 <= hits / 200 <= 0.99


def test_too_little_for_an_interval() -> None:
    values = {"one": torch.tensor([0.5, 0.7, torch.nan]), "two": torch.tensor([0.5, 0.7, 0.1])}
    found = Bootstrap().intervals(values, torch.tensor([0, 0, 1]))
    assert found["one"] is None and found["two"] is not None


def test_many_videos_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole = Bootstrap(resamples=300).of_mean(values)
    monkeypatch.setattr("slotlab.scoring.intervals._DRAWS_AT_ONCE", 50 * 37)
    assert Bootstrap(resamples=300).of_mean(values) == pytest.approx(whole)


# -- groups ------------------------------------------------------------------------------------------------


def test_groups_are_the_objects_with_that_label(split: Split) -> None:
    scores = scores_of(split)
    found = subgroup_scores(scores, split, Bootstrap(resamples=200)).summaries
    assert set(found["by_material"]) == {"metal", "rubber"} and set(found["by_size"]) == {"large", "small"}
    tables, videos = scores.frame_tables()
    assert set(found["by_category"]) == {"cat", "dog"}
    for attribute in ATTRIBUTES:
        for name, of in found[f"by_{attribute}"].items():
            ious = []  # by a plain loop over frames and objects
            for table, video in zip(tables.double(), videos.tolist(), strict=True):
                union = table.sum(1, keepdim=True) + table.sum(0) - table
                frame = [
                    float((table[k + 1] / union[k + 1]).max())
                    for k, instance in enumerate(split.instances(video))
                    if getattr(instance, attribute) == name and table[k + 1].sum() > 0
                ]
                ious += [np.mean(frame)] if frame else []
            assert of.frames == len(ious)
            assert of.values["mbo"] == pytest.approx(np.mean(ious))


def test_frames_by_objects_in_sight_are_all_frames(split: Split) -> None:
    scores = scores_of(split)
    found, total = subgroup_scores(scores, split, Bootstrap(resamples=200)), scores.summary()
    groups = found.summaries["by_objects"]
    assert {"1", "2"} <= set(groups)
    assert sum(of.frames for of in groups.values()) == total.frames
    for name in ("mbo", "miou", "ari"):
        shown = [of for of in groups.values() if of.values[name] is not None]
        mean = sum(of.values[name] * of.frames for of in shown) / sum(of.frames for of in shown)
        assert mean == pytest.approx(total.values[name])


def test_confidence_has_every_score_and_contains_it(split: Split) -> None:
    scores = scores_of(split)
    found = subgroup_scores(scores, split)
    sure = found.confidence
    assert sure.level == 0.95 and sure.resamples == 10_000
    for name, value in scores.summary().values.items():
        low, high = sure.total[name]
        assert low <= value <= high
    assert sure.groups.keys() == found.summaries.keys() == {f"by_{of}" for of in (*ATTRIBUTES, "objects")}
    for key, groups in found.summaries.items():
        assert sure.groups[key].keys() == groups.keys()
        for group, of in groups.items():
            for name, interval in sure.groups[key][group].items():
                assert interval is None or interval[0] <= of.values[name] <= interval[1]
    assert subgroup_scores(scores_of(split), split) == found, "the same for the same scores"


def test_videos_average_to_the_totals_when_equally_long(tmp_path: Any) -> None:
    split = make_store(tmp_path / "even.zarr", SizedSource({"train": (4,), "validation": (4, 4, 4)}))["validation"]
    scores = scores_of(split)
    videos = subgroup_scores(scores, split, Bootstrap(resamples=10)).by_video
    assert list(videos) == [split.manifest[v].id for v in split.videos]
    for name in ("mbo", "fg_ari_video", "miou_video"):
        assert np.mean([of[name] for of in videos.values()]) == pytest.approx(scores.summary().values[name])
    assert {"fg_ari", "mbo", "miou", "mbo_metal", "miou_small"} <= next(iter(videos.values())).keys()


def test_without_instances_there_are_no_groups(split: Split, tmp_path: Path) -> None:
    manifest.replace_rows(tmp_path, {video: replace(row, instances=()) for video, row in split.manifest.items()})
    split.manifest = manifest.read(tmp_path)
    assert not list(objects_by(split, OBJECTS, "material"))
    found = subgroup_scores(scores_of(split), split, Bootstrap(resamples=10)).summaries
    assert found["by_material"] == {} and found["by_objects"]


# -- two runs ----------------------------------------------------------------------------------------------


def evaluation(values: np.ndarray, **more: Any) -> Evaluation:
    videos = {f"v{i}": {"mbo": float(v) if np.isfinite(v) else None} for i, v in enumerate(values)}
    return evaluation_of(by_video=videos, **more)


def evaluation_of(**more: Any) -> Evaluation:
    known = {"run": "runs/x", "cache": "x", "split": "validation", "tap": "block1", "step": 1, "resolution": [32, 32]}
    return Evaluation.from_dict(known | {"frames": 1, "videos": 1, "skipped_frames": 0} | more)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 40), st.integers(0, 10_000), st.floats(-0.2, 0.2))
def test_paired_test_is_scipys(videos: int, seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    one = rng.uniform(size=videos)
    other = one + rng.normal(shift, 0.1, videos)
    found = paired(evaluation(one), evaluation(other))["scores"]["mbo"]
    assert found["p"] == pytest.approx(wilcoxon(one, other).pvalue)
    assert found["difference"] == pytest.approx((one - other).mean())
    assert found["low"] <= found["difference"] <= found["high"]
    assert found["ahead"] == (one > other).sum() and found["videos"] == videos
    back = paired(evaluation(other), evaluation(one))["scores"]["mbo"]
    assert back["p"] == pytest.approx(found["p"]) and back["difference"] == pytest.approx(-found["difference"])


def test_a_run_against_itself_differs_in_nothing() -> None:
    values = np.random.default_rng(0).uniform(size=12)
    found = paired(evaluation(values), evaluation(values))["scores"]["mbo"]
    assert (found["difference"], found["low"], found["high"], found["p"], found["ahead"]) == (0, 0, 0, 1, 0)


def test_pairing_removes_what_videos_share() -> None:
    """Hard and easy videos differ by far more than the runs: only the pairs tell that one is better."""
    rng = np.random.default_rng(1)
    hard = rng.uniform(0.1, 0.9, 24)
    found = paired(evaluation(hard + 0.02 + rng.normal(0, 0.01, 24)), evaluation(hard))["scores"]["mbo"]
    assert found["p"] < 1e-4 and found["low"] > 0.01 and found["high"] < 0.03


def test_videos_without_a_score_on_either_side_are_left_out() -> None:
    one, other = np.array([0.5, np.nan, 0.7, 0.9]), np.array([0.4, 0.4, np.nan, 0.7])
    found = paired(evaluation(one), evaluation(other))["scores"]["mbo"]
    assert found["videos"] == 2 and found["difference"] == pytest.approx(0.15)
    assert paired_scores({"v": {"mbo": None}}, {"v": {"mbo": 0.5}}) == {}


def test_other_videos_are_refused() -> None:
    values = np.full(4, 0.5)
    with pytest.raises(IncompatibleError, match="other videos"):
        paired(evaluation(values), evaluation(values[:3]))
    with pytest.raises(IncompatibleError, match="has split train"):
        paired(evaluation(values), evaluation(values, split="train"))
    with pytest.raises(IncompatibleError, match="resolution"):
        paired(evaluation(values), evaluation(values, resolution=[64, 64]))


class NamelessSource(DiscSource):
    """All its videos are called the same, as where a data set's records carry a constant."""

    def read(self, split: str, index: int) -> Video:
        return replace(super().read(split, index), id="clip")


def test_videos_of_one_name_are_told_apart(tmp_path: Any) -> None:
    split = make_store(tmp_path / "s.zarr", NamelessSource({"train": (4,), "validation": (4, 4, 4)}))["validation"]
    one, other = (evaluation_of(by_video=subgroup_scores(scores_of(split, s), split).by_video) for s in (0, 1))
    assert list(one.by_video) == ["clip#0", "clip#1", "clip#2"]
    assert paired(one, other)["scores"]["mbo"]["videos"] == 3
