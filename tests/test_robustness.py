"""Stability of masks and slots: what the measures mean, and both kinds of runs end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from featcache.backbones.backbone import load_backbone
from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.extraction.store_backbone import store_backbone
from featcache.store.reading import FeatureStore
from slotlab.commands.robustness import robustness as command
from slotlab.config.load import load_config
from slotlab.runs.loaded import load_run
from slotlab.scoring.colour_changes import IDENTITY, transformations
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.robustness import View, compare, matched_correlation, matched_iou, robustness
from slotlab.training.train import train
from tests.synthetic import DiscSource
from tests.test_pixel_model import SMALL

SLOTS = ["model.slots=4", "model.slot_dim=16", "model.decoder.hidden=16", "model.slot_mlp_hidden=16"]


def view(seed: int, frames: int = 3, slots: int = 5) -> View:
    generator = torch.Generator().manual_seed(seed)
    masks = (3 * torch.randn(frames, slots, 36, generator=generator, dtype=torch.float64)).softmax(1)
    return View(masks, masks.argmax(1), torch.randn(frames, slots, 8, generator=generator, dtype=torch.float64))


def permuted(of: View, order: Tensor) -> View:
    return View(of.masks[:, order], order.argsort()[of.labels], of.slots[:, order])


# -- the measures ------------------------------------------------------------------------------------------


def test_the_same_slots_in_another_order_are_perfectly_stable() -> None:
    before = view(0)
    for after in (before, permuted(before, torch.tensor([3, 0, 4, 1, 2]))):
        found = compare(before, after)
        assert found == pytest.approx(dict.fromkeys(found, 1.0))
    other = compare(before, view(1))
    assert all(value < 0.5 for value in other.values()), "unrelated masks are not"


def test_mask_stability_by_hand() -> None:
    """Slot 0 loses two of its four pixels to a slot that was not used before; slot 3 is never used."""
    before = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    after = torch.tensor([[2, 2, 0, 0, 1, 1, 1, 1]])
    assert matched_iou(before, after, 4).tolist() == [(2 / 4 + 1 + 0) / 3]
    assert matched_iou(after, before, 4).tolist() == [(2 / 4 + 1 + 0) / 3]
    one_takes_all = torch.zeros_like(before)
    assert matched_iou(before, one_takes_all, 4).tolist() == [(4 / 8) / 2]


def test_mask_correlation_by_hand() -> None:
    """Mask 0 keeps its pixels, and mask 1 is turned around; mask 2 is flat on both sides and has no part in it."""
    one = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64).unsqueeze(0)
    two = torch.tensor([[0.5, 0.5, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.float64).unsqueeze(0)
    slots = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]], dtype=torch.float64)
    labels = torch.zeros(1, 4, dtype=torch.long)
    correlation, cosine = matched_correlation(View(one, labels, slots), View(two, labels, slots))
    # 0 with 0 and 1 with 1 give 1 - 1 = 0; 0 with 1 and 1 with 0 give -1/sqrt(3) + 1/sqrt(3) = 0; 0 with 0 alone,
    # and both others with the flat one, give 1.
    assert float(correlation) == pytest.approx(1 / 2)
    assert float(cosine) == pytest.approx(1), "of the pairs whose masks vary: the first slot and itself"


def test_a_slot_at_the_origin_has_no_direction_to_compare() -> None:
    before = view(0)
    before.slots[:, 2] = 0
    assert compare(before, before)["slot_similarity"] == pytest.approx(1)


def test_masks_that_never_vary_have_no_correlation() -> None:
    flat = View(torch.full((1, 2, 4), 0.5).double(), torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 2, 3).double())
    assert all(bool(values.isnan().all()) for values in matched_correlation(flat, flat))
    assert matched_iou(flat.labels, flat.labels, 2).tolist() == [1]


# -- the colours -------------------------------------------------------------------------------------------


def test_transformations_change_colours_and_nothing_else() -> None:
    flat = torch.tensor([[200, 40, 90], [30, 160, 220]], dtype=torch.uint8)  # two colours
    place = torch.arange(64).view(8, 8) % 3 == 0
    frames = flat[place.long()].permute(2, 0, 1).expand(2, 3, 8, 8)
    state = torch.get_rng_state()
    seen = set()
    for name, change in transformations().items():
        changed, again = change(frames), change(frames)
        assert changed.dtype == torch.uint8 and changed.shape == frames.shape
        assert torch.equal(changed, again), f"{name} is the same every time"
        assert torch.equal(changed, frames) == (name == IDENTITY)
        assert len(changed[0].flatten(1).unique(dim=1).T) == 2, f"{name} keeps what has one colour in one colour"
        seen.add(changed.numpy().tobytes())
    assert len(seen) == len(transformations())
    assert torch.equal(torch.get_rng_state(), state)
    red = transformations()["channels=gbr"](frames)
    assert torch.equal(red[:, 0], frames[:, 1]) and torch.equal(red[:, 1], frames[:, 2])


# -- runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store that a small real backbone of random weights made."""
    path = tmp_path_factory.mktemp("robustness") / "store.zarr"
    backbone = load_backbone("dinov2_vits14", weights="random", taps=("block2", "block1"), input_size=56)
    source = DiscSource({"train": (4, 4, 3), "validation": (4, 4, 4)})
    return extract(plan(path, source, backbone, ExtractOptions(batch_size=3, precision="float32")), source, backbone)


@pytest.fixture(scope="module")
def features_run(real: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = [*SLOTS, "data.tap=block1"]
    config = load_config("dinosaur", None, overrides, optim__steps=3, optim__batch_size=2)
    return train(config, real, tmp_path_factory.mktemp("runs") / "features")


@pytest.fixture(scope="module")
def video_run(real: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips = ["data.clip=2", "model.predictor.kind=mlp", "model.predictor.hidden=16"]
    config = load_config("dinosaur", None, [*SLOTS, *clips], optim__steps=3, optim__batch_size=2)
    return train(config, real, tmp_path_factory.mktemp("runs") / "video")


@pytest.fixture(scope="module")
def pixel_run(real: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config("pixel", None, SMALL, optim__steps=3, optim__batch_size=2)
    return train(config, real, tmp_path_factory.mktemp("runs") / "pixel")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["features_run", "video_run", "pixel_run"])
def test_every_kind_of_run_is_measured(kind: str, request: pytest.FixtureRequest) -> None:
    loaded = load_run(request.getfixturevalue(kind))
    seen: list[tuple[str, int, int]] = []
    result = robustness(loaded, max_videos=2, frames=3, progress=lambda *now: seen.append(now))
    assert (result["videos"], result["videos_in_split"], result["frames_a_video"]) == (2, 3, 3)
    assert set(result["transformations"]) == set(transformations())
    assert seen[-1] == ("robustness", 6 * len(transformations()), 6 * len(transformations()))
    identity = result["transformations"][IDENTITY]
    assert result["relative_error"] < 1e-3, "the way through the backbone gives the store's features"
    assert identity["mask_stability"]["mean"] > 0.98 and identity["slot_similarity"]["mean"] > 0.999
    assert identity["fg_ari_change"]["mean"] == pytest.approx(0, abs=0.02)
    for name, found in result["transformations"].items():
        assert 0 < found["mask_stability"]["mean"] <= 1, name
        for value in found.values():
            assert value["low"] <= value["mean"] <= value["high"] or value["low"] == pytest.approx(value["high"])
    others = [found["mask_stability"]["mean"] for name, found in result["transformations"].items() if name != IDENTITY]
    assert min(others) < 1, "some colours matter"
    assert result["mean"]["mask_stability"]["mean"] == pytest.approx(np.mean(others))
    json.dumps(result, allow_nan=False)


@pytest.mark.slow
def test_before_is_what_the_evaluation_scored(features_run: Path) -> None:
    loaded = load_run(features_run)
    before, whole = robustness(loaded, max_videos=3, frames=4)["before"], evaluate(loaded)
    assert before["mbo"]["mean"] == pytest.approx(whole.values["mbo"])  # videos of equal length: means of means
    assert before["slot_diversity"]["mean"] == pytest.approx(1 - whole.diagnostics["slot_similarity"], abs=1e-6)


@pytest.mark.slow
def test_the_command_prints_and_keeps_its_result(features_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(features_run, None, None, 2, 2, None, "cpu", True)
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert json.loads((features_run / "robustness-validation.json").read_text()) == printed
    command(features_run, None, "train", 1, 2, None, "cpu", False)
    shown = capsys.readouterr().out
    assert "hue=0.5" in shown and "first 2 frames of 1 of 3 videos" in shown
    kept = json.loads((features_run / "robustness-train.json").read_text())
    assert kept["mean"]["mask_stability"]["low"] is None, "one video says nothing of how much videos differ"


def test_other_weights_are_refused(features_run: Path, real: FeatureStore, tmp_path: Path) -> None:
    backbone = load_backbone("dinov2_vits14", weights="random", taps=("block1",), input_size=56)
    state = {name: value + 1e-3 for name, value in backbone._towers[""].model.state_dict().items()}
    file = tmp_path / "other.safetensors"
    save_file(state, file)
    with pytest.raises(IncompatibleError, match=r"made with another backbone \(model.weights_sha256: .*--weights"):
        robustness(load_run(features_run), weights=str(file))
    with pytest.raises(DataError, match="does not exist"):
        store_backbone(real, weights=str(tmp_path / "gone.pth"))


def test_a_store_without_a_known_backbone_is_told(tmp_path: Path, store: FeatureStore) -> None:
    config = load_config("dinosaur", None, SLOTS, optim__steps=1, optim__batch_size=2)
    with pytest.raises(UsageError, match="synthetic"):
        robustness(load_run(train(config, store, tmp_path / "run")))
    pixels = load_run(train(load_config("pixel", None, SMALL, optim__steps=1), store, tmp_path / "pixel"))
    read = pixels.inputs.from_frames(pixels.store, None, torch.device("cpu"))
    assert read(np.zeros((1, 4, 4, 3), np.uint8)).shape == (1, 4, 4, 3), "pixels need none"
