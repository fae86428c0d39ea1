"""Backbones side by side: one grid, the stores they need, and from videos to a report in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featcache.backbones.registry import get_spec
from featcache.errors import DataError, IncompatibleError, UsageError
from slotlab.experiments.comparison import Comparison, Settings, plan_comparison
from slotlab.experiments.plan import opened, require_free
from tests.commands import Slotlab
from tests.synthetic import DiscSource

PAIR = Settings(backbones=("dinov2", "resnet18"), weights=("random",), grid=2, seeds=(0,), max_videos=2)


@pytest.fixture
def discs(monkeypatch: pytest.MonkeyPatch) -> DiscSource:
    source = DiscSource()
    monkeypatch.setattr("slotlab.experiments.comparison.open_source", lambda *_: source)
    return source


def changed(**more: Any) -> Settings:
    return Settings(**{**PAIR.__dict__, **more})


def test_a_comparison_matches_the_grid_and_trains_pixels_once(tmp_path: Path, discs: DiscSource) -> None:
    settings = changed(
        backbones=("dinov2", "dino", "dinov2_vits14"), taps=("block2", "block3"), presets=("dinosaur", "pixel")
    )
    comparison = plan_comparison(settings, tmp_path / "out", tmp_path / "cache")
    assert [cell.name for cell in comparison.plan.cells] == [
        *(f"{b}-{tap}-dinosaur" for b in ("dinov2_vits14", "dino_vits16") for tap in ("block2", "block3")),
        "pixel",
    ]
    dinov2, dino = comparison.missing
    assert dinov2.taps == ("block2", "block3") and dinov2.splits == ("train", "validation")
    assert (dinov2.load("cpu").input_size, dino.load("cpu").input_size) == ((28, 28), (32, 32))
    assert comparison.plan.cells[-1].config.data.tap == "video"
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()
    sixteen = [16 * get_spec(name).patch for name in ("dinov2_vits14", "dino_vits16")]
    assert sixteen == [224, 256]


def test_a_comparison_scores_the_split_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*splits: str, **more: Any) -> Comparison:
        source = DiscSource(dict.fromkeys(splits, (5, 6)))
        monkeypatch.setattr("slotlab.experiments.comparison.open_source", lambda *_: source)
        return plan_comparison(changed(**more), tmp_path / "out", tmp_path / "cache")

    named = of("train", "val")
    assert named.plan.split == "val" and named.missing[0].splits == ("train", "val")
    assert {cell.config.data.eval_split for cell in named.plan.cells} == {"val"}
    assert of("train", "val", "test", split="test").plan.split == "test"
    (tmp_path / "named.toml").write_text('[data]\neval_split = "vall"')
    with pytest.raises(UsageError, match="no split 'vall'"):  # a name is taken at its word
        of("train", "val", config=tmp_path / "named.toml")
    for splits in (("train",), ("train", "val", "test")):
        with pytest.raises(UsageError, match="no split 'validation'; it has: train.*choose one to score with --split"):
            of(*splits)


def test_stores_that_fit_are_found_and_others_are_not(tmp_path: Path, discs: DiscSource) -> None:
    cache = tmp_path / "cache"
    one = changed(backbones=("resnet18",))

    def missing(settings: Settings, out: str = "out") -> list[Path]:
        return [request.path for request in plan_comparison(settings, tmp_path / out, cache).missing]

    comparison = plan_comparison(one, tmp_path / "out", cache)
    comparison.extract("cpu", lambda *_: None)
    made = cache / "resnet18-2x2-random.zarr"
    assert made.exists() and missing(one) == []
    made.rename(cache / "mine.zarr")
    assert plan_comparison(one, tmp_path / "out", cache).plan.cells[0].cache == str(cache / "mine.zarr")
    for other in (changed(backbones=("resnet18",), grid=4), changed(backbones=("resnet18",), max_videos=1)):
        assert len(missing(other)) == 1
    discs._lengths["train"] = (4, 3, 4)  # another second video
    assert missing(one) == [made]


@pytest.mark.slow
def test_an_earlier_plans_stores_are_kept_to(tmp_path: Path, discs: DiscSource) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    one = changed(backbones=("resnet18",))
    plan = plan_comparison(one, out, cache).plan
    with opened(plan, out):
        pass
    plan_comparison(one, tmp_path / "other", cache).extract("cpu", lambda *_: None)
    (cache / "resnet18-2x2-random.zarr").rename(cache / "a.zarr")
    again = plan_comparison(one, out, cache)
    assert again.plan == plan and len(again.missing) == 1
    for more, message in [
        ({"grid": 4}, "grid: 2 then, 4 now"),
        ({"max_videos": 1}, "max_videos: 2 then, 1 now"),
        ({"steps": 9}, "optim.steps: .* then, 9 now"),
        ({"backbones": ("dino",)}, "cell resnet18-layer3-default then, not now"),
    ]:
        with pytest.raises(IncompatibleError, match=message):
            require_free(plan_comparison(changed(**{"backbones": ("resnet18",), **more}), out, cache).plan, out)
    require_free(plan_comparison(PAIR, out, cache).plan, out)  # one more backbone
    (cache / "a.zarr").rename(cache / "resnet18-2x2-random.zarr")
    with pytest.raises(UsageError, match=r"--tap layer1: missing in .*resnet18.*zarr, the store of .*; choose another"):
        plan_comparison(changed(backbones=("resnet18",), taps=("layer3", "layer1")), out, cache)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"taps": ("block13",)}, "no block 13"),
        ({"overrides": ("model.slot=3",)}, "did you mean model.slots"),
        ({"overrides": ("data.tap=block2",)}, "use --tap"),
        ({"overrides": ("seed=2",)}, "use --seeds"),
        ({"presets": ("best",)}, "--preset best: unknown"),
        ({"split": "test"}, "no split 'test'"),
        ({"weights": ("none.pth",)}, "no such file"),
        ({"weights": ("clip=random",)}, "clip_vitb16 is not compared"),
    ],
)
def test_wrong_comparisons_are_refused_before_anything(
    tmp_path: Path, discs: DiscSource, more: dict[str, Any], message: str
) -> None:
    with pytest.raises((UsageError, DataError), match=message):
        plan_comparison(changed(backbones=("dinov2",), **more), tmp_path / "out", tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_compare_from_videos_to_a_report(tmp_path: Path, slotlab: Slotlab) -> None:
    args = (
        "compare", "--backbone", "resnet18", "--weights", "random", "--grid", 2,
        "--preset", "dinosaur", "--preset", "pixel", "--max-videos", 2, "--seeds", 1, "--steps", 2,
        "--set", "optim.batch_size=2", "--set", "model.slots=3", "--workers", 1, "--out", "c", "--json",
    )  # fmt: skip
    table = slotlab(*args).json
    assert [cell["name"] for cell in table["cells"]] == ["resnet18-layer3-dinosaur", "pixel"]
    assert all(cell["finished"] == 1 for cell in table["cells"])
    report = (tmp_path / table["report"]).read_text()
    assert f"{table['cells'][0]['fg_ari']['mean']:.3f}" in report
    refused = slotlab(*args, "--max-videos", 1)
    assert refused.code == IncompatibleError.exit_code and "max_videos: 2 then, 1 now" in refused.said
