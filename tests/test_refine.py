"""Refinement follows the edges of the frame, keeps masks masks, and eval reports what it gains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cli import app
from featcache.errors import UsageError
from featcache.store.reading import FeatureStore
from slotlab.config.load import load_config
from slotlab.masks.labels import fine_labels, masks_to_labels
from slotlab.masks.refine import METHODS, Guided, _window_mean, refine
from slotlab.runs.loaded import load_run
from slotlab.scoring.boundaries import boundary_f
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.fine import outline_scores
from slotlab.scoring.metrics import object_iou
from slotlab.scoring.references import grid_masks
from slotlab.scoring.tables import mask_tables
from slotlab.training.train import train
from slotlab.words import Refinement


def needs(method: Refinement) -> None:
    if method == "crf":
        pytest.importorskip("pydensecrf.densecrf")


def scene(size: int = 96, frames: int = 2) -> tuple[Tensor, Tensor]:
    """Frames (T, S, S, 3) uint8 of two coloured discs on noise, and their masks (T, S, S)."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(120, 136, (frames, size, size, 3), generator=generator, dtype=torch.uint8)
    truth = torch.zeros(frames, size, size, dtype=torch.int64)
    for t in range(frames):
        for k, (cy, cx, colour) in enumerate(((30 + t, 33, (200, 60, 50)), (62, 58 + t, (40, 90, 210)))):
            inside = (y - cy).square() + (x - cx).square() < 14**2
            truth[t][inside] = k + 1
            noise = torch.randint(-8, 9, (int(inside.sum()), 3), generator=generator)
            pictures[t][inside] = (torch.tensor(colour) + noise).to(torch.uint8)
    return pictures, truth


@pytest.mark.parametrize("method", METHODS)
def test_masks_of_patches_come_to_follow_the_edges(method: Refinement) -> None:
    needs(method)
    pictures, truth = scene()
    masks = grid_masks(truth, (8, 8), 3)
    slots = torch.tensor([[1, 2]] * 2)
    plain = boundary_f(masks_to_labels(masks, (96, 96)), truth, slots, 1).mean()
    refined = refine(masks, pictures, method)
    assert refined.shape == (2, 3, 96, 96) and refined.dtype == torch.float32
    torch.testing.assert_close(refined.sum(1), torch.ones(2, 96, 96))
    assert refined.min() >= 0
    assert boundary_f(refined.argmax(1), truth, slots, 1).mean() > plain + 0.2


def test_without_edges_masks_are_smoothed_and_stay_where_they_are() -> None:
    truth = scene()[1]
    masks = grid_masks(truth, (8, 8), 3)
    flat = torch.full((2, 96, 96, 3), 128, dtype=torch.uint8)
    table = mask_tables(refine(masks, flat, "guided"), truth, 3)
    assert object_iou(table)[:, [0, 1], [1, 2]].min() > 0.4


def test_frames_do_not_change_each_other_and_sizes_may_be_odd() -> None:
    pictures, truth = scene()
    pictures, truth = pictures[:, :61, :83], truth[:, :61, :83]  # no multiple of anything, not square
    masks = grid_masks(truth, (5, 7), 3)
    both = refine(masks, pictures, "guided")
    assert both.shape == (2, 3, 61, 83)
    torch.testing.assert_close(refine(masks[1:], pictures[1:], "guided")[0], both[1])


def test_labels_along_edges_are_those_of_the_refined_masks_without_the_slots_that_hold_nothing() -> None:
    pictures, truth = scene()
    masks = torch.zeros(2, 9, 8, 8)
    masks[0, [1, 4, 6]], masks[1, [0, 4, 8]] = grid_masks(truth, (8, 8), 3)  # other slots in each frame
    labels = torch.from_numpy(fine_labels(masks, pictures.numpy(), "guided")).long()
    expected = refine(masks, pictures, "guided").argmax(1)
    assert (labels == expected).float().mean() > 0.9999  # six masks of 1e-6 less move what they share by that
    assert not fine_labels(torch.zeros(2, 9, 8, 8), pictures.numpy(), "guided").any()  # as where all tie
    with pytest.raises(ValueError, match="NaN"):
        fine_labels(masks.where(masks > 0, torch.nan), pictures.numpy(), "guided")


def test_specks_are_outvoted_and_masks_are_shares_of_the_votes() -> None:
    truth = (torch.arange(256) >= 120).expand(1, 256, 256).long()  # halves, but their edge is not between two patches
    specks = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0)) < 0.02  # of the other half's colour
    pictures = torch.tensor(((90, 90, 90), (200, 60, 50)), dtype=torch.uint8)[truth ^ specks.long()]
    masks = grid_masks(truth, (8, 8), 2)
    filtered = refine(masks, pictures, "guided", Guided(votes=0)).argmax(1)
    refined = refine(masks, pictures, "guided")
    inside = slice(3, -3)  # 32 pixels a patch: 7 x 7 of them vote
    shares = F.avg_pool2d(F.one_hot(filtered, 2).permute(0, 3, 1, 2).float(), 7, stride=1)
    torch.testing.assert_close(refined[..., inside, inside], shares)
    assert (filtered != truth)[specks].float().mean() > 0.1, "near the edge the filter takes specks for the other half"
    assert (refined.argmax(1) != truth).float().mean() < 0.01


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 7), st.integers(0, 7))
def test_a_windows_mean_is_that_of_pooling(rows: int, columns: int, up: int, left: int) -> None:
    x = torch.rand(1, 2, rows, columns, generator=torch.Generator().manual_seed(rows))
    inside = F.pad(torch.ones_like(x), (left, left, up, up))  # cells beyond the border do not count
    window = {"kernel_size": (2 * up + 1, 2 * left + 1), "stride": 1}
    expected = F.avg_pool2d(F.pad(x, (left, left, up, up)), **window) / F.avg_pool2d(inside, **window)
    torch.testing.assert_close(_window_mean(x, (up, left)), expected)


def test_a_grid_as_fine_as_the_frame_works() -> None:
    pictures, truth = scene()
    masks = grid_masks(truth, (96, 96), 3)
    assert refine(masks, pictures, "guided", Guided(scales=(1,))).shape == (2, 3, 96, 96)


def test_a_large_frame_is_seen_smaller() -> None:
    pictures, truth = scene(256)
    pictures, truth = pictures[:, :200], truth[:, :200]
    masks = grid_masks(truth, (8, 10), 3)
    small = refine(masks, pictures, "guided", Guided(pixels=2**14))
    assert small.shape == (2, 3, 200, 256)
    torch.testing.assert_close(small.sum(1), torch.ones(2, 200, 256))
    agree = small.argmax(1) == refine(masks, pictures, "guided").argmax(1)
    assert 0.98 < agree.float().mean() < 1


def test_one_slot_and_wrong_inputs() -> None:
    pictures, _ = scene()
    assert torch.equal(refine(torch.ones(2, 1, 4, 4), pictures, "guided"), torch.ones(2, 1, 96, 96))
    with pytest.raises(ValueError, match="NaN"):
        refine(torch.full((2, 3, 4, 4), torch.nan), pictures, "guided")
    with pytest.raises(ValueError, match="frames"):
        refine(torch.ones(1, 3, 4, 4), pictures, "guided")
    with pytest.raises(UsageError, match="choose one of guided, crf"):
        refine(torch.ones(2, 3, 4, 4), pictures, "sharp")  # type: ignore[arg-type]


def test_without_pydensecrf_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydensecrf.densecrf", None)
    with pytest.raises(UsageError, match=r"pip install 'slotlab\[crf\]'"):
        refine(torch.ones(2, 3, 4, 4), scene()[0], "crf")


@pytest.fixture
def run(tmp_path: Path, store: FeatureStore) -> Path:
    small = ("model.slot_dim=8", "model.decoder.hidden=16", "model.slot_mlp_hidden=16", "model.slots=4")
    config = load_config("dinosaur", None, small, optim__steps=2, optim__batch_size=4)
    return train(config, store, tmp_path / "run")


def test_outline_scores_agree_with_eval(run: Path) -> None:
    loaded = load_run(run)
    plain = evaluate(loaded).values
    found = outline_scores(loaded, None, "guided", ["argmax", "gumbel=1"])
    refined = found["refined"]
    for key in ("fg_ari", "mbo", "miou"):
        assert refined[key] - refined["gain"][key] == pytest.approx(plain[key])
    assert refined["boundary_f"] == refined["boundaries"]["boundary_f"]
    assert refined["gain"]["boundary_f"] == pytest.approx(refined["boundary_f"] - found["boundaries"]["boundary_f"])
    assert found["binarised"]["argmax"]["mbo"] == pytest.approx(plain["mbo"])
    assert found["binarised"]["gumbel=1"]["mbo"] != pytest.approx(plain["mbo"])
    assert found["boundaries"]["reference"]["boundary_f"] > 0
    json.dumps(found, allow_nan=False)


def test_eval_reports_refined_scores_beside_the_plain_ones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["eval", str(run), "--refine", "guided", "--json", "--device", "cpu"], standalone_mode=False)
    printed = json.loads(capsys.readouterr().out)
    assert {"method", "fg_ari", "mbo", "miou", "boundary_f", "seconds"} <= printed["refined"].keys()
    assert printed["refined"]["method"] == "guided" and np.isfinite(printed["refined"]["seconds"])
    assert json.loads((run / "eval-validation.json").read_text()) == printed
    app(["eval", str(run), "--boundaries", "--binarise", "threshold=0.4"], standalone_mode=False)
    text = capsys.readouterr().out
    assert "boundary F" in text and "threshold=0.4" in text
