"""The entropy of soft masks: its maps, and its means by material and by spare slots."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy as scipy_entropy

from slotlab.models.base import Output
from slotlab.pictures.sheet import HEADER, SINGLE_SLOTS, TITLES, draw_sheet
from slotlab.pictures.still import Still
from slotlab.scoring.entropy import EntropyScorer, entropy_maps
from slotlab.scoring.follow import Followed
from slotlab.scoring.tables import count_labels, ground_truth
from tests.synthetic import make_store

K = 5


def test_the_parts_of_the_slots_add_up_to_the_entropy() -> None:
    masks = torch.randn(2, K, 3, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    expected = scipy_entropy(masks.double().numpy(), base=K, axis=1)
    np.testing.assert_allclose(entropy_maps(masks).sum(1).numpy(), expected, atol=1e-6)
    assert float(entropy_maps(torch.full((1, K, 1, 1), 1 / K)).sum()) == pytest.approx(1)
    assert not bool(entropy_maps(torch.eye(K).view(1, K, K, 1)).any())


def followed_of(split: object, video: int, undecided: int) -> Followed:
    """Slots that have the labels' pixels to themselves, but for one label, which all share equally."""
    truth = ground_truth(split, video)  # type: ignore[arg-type]
    masks = torch.nn.functional.one_hot(truth.long().clamp_min(0), K).permute(0, 3, 1, 2).float()
    masks = torch.where((truth == undecided).unsqueeze(1), 1 / K, masks).flatten(2)
    tokens = torch.zeros(len(truth), masks.shape[-1], 1)
    output = Output(torch.zeros(len(truth), K, 2), masks, masks, masks, tokens, tokens, tuple(truth.shape[1:]))  # type: ignore[arg-type]
    return Followed(video, output, "decoder", truth, count_labels(split))  # type: ignore[arg-type]


def test_entropy_is_told_by_material_and_by_spare_slots(tmp_path: Path) -> None:
    split = make_store(tmp_path / "store.zarr")["train"]
    scorer = EntropyScorer(split, count_labels(split))
    for video in (0, 1):  # of video 0 both discs are of metal, of video 1 the second is of rubber
        scorer.add(followed_of(split, video, undecided=2))
    found = scorer.result()
    assert found["by_material"]["rubber"]["mean"] == pytest.approx(1, abs=1e-6)
    assert 0 < found["by_material"]["metal"]["mean"] < 1 and found["background"]["mean"] == pytest.approx(0, abs=1e-6)
    shares = []
    for video in (0, 1):
        truth = split.segmentations(video)
        shares += [(frame == 2).mean() for frame in truth]
    assert found["all"]["mean"] == pytest.approx(np.mean(shares), abs=1e-6) and found["all"]["frames"] == len(shares)
    seen = [len(set(np.unique(frame)) - {0}) for video in (0, 1) for frame in split.segmentations(video)]
    assert set(found["by_spare_slots"]) == {str(K - 1 - count) for count in seen}
    assert (found["per_spare_slot"] is None) == (len(set(seen)) == 1)


def test_the_slope_over_spare_slots_is_the_least_squares_one(tmp_path: Path) -> None:
    split = make_store(tmp_path / "store.zarr")["train"]
    scorer = EntropyScorer(split, count_labels(split))
    scorer._spare, scorer._videos = [1, 2, 4, 4], [0, 0, 1, 1]
    scorer._frames["all"] = [0.1, 0.3, 0.4, 0.5]
    expected = np.polyfit(scorer._spare, scorer._frames["all"], 1)[0]
    found = scorer.result()
    assert found["per_spare_slot"] == pytest.approx(expected)
    assert found["by_spare_slots"]["4"]["mean"] == pytest.approx(0.45) and math.isfinite(expected)


def test_the_sheet_shows_the_slots_along_the_frames_edges(tmp_path: Path) -> None:
    split = make_store(tmp_path / "store.zarr")["train"]
    still = Still.of(followed_of(split, 0, undecided=-1))
    coarse = replace(still, masks=torch.nn.functional.avg_pool2d(still.masks, 8))
    with Image.open(draw_sheet(split, [coarse], tmp_path / "sheet.png")) as picture:
        drawn = np.asarray(picture.convert("RGB")).astype(int)
    cell = drawn.shape[1] / (len(TITLES) + SINGLE_SLOTS)
    truth, plain, along = (drawn[-200:, round(cell * c + 9) : round(cell * c + cell - 9)] for c in (1, 2, 3))
    width = min(part.shape[1] for part in (truth, plain, along))
    off = [abs(part[:, :width] - truth[:, :width]).mean() for part in (plain, along)]
    assert off[1] < off[0], "nearer to the truth than masks on the grid"


def test_the_sheet_shows_the_entropy_below_the_masks(tmp_path: Path) -> None:
    split = make_store(tmp_path / "store.zarr")["train"]
    path = draw_sheet(split, [Still.of(followed_of(split, 0, undecided=2))], tmp_path / "sheet.png", entropy=True)
    with Image.open(path) as picture:
        rows = np.asarray(picture.convert("RGB"))
    assert len(rows) == round((HEADER + 2 * 1.75) * 130)
    assert np.ptp(rows[len(rows) * 2 // 3 :], axis=(0, 1)).max() > 100, "something is drawn there"
