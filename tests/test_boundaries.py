"""Outlines: boundary F and bleeding against plain definitions, and binarisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt, gaussian_filter
from torch import Tensor

from featcache.errors import UsageError
from slotlab.masks.binarise import gumbel_masks, parse_binarisation, threshold_labels
from slotlab.models.randomness import Draws
from slotlab.scoring.boundaries import BoundaryScores, bleeding, boundary_f, outline, tolerance_px
from slotlab.scoring.fine import BinarisedScores
from slotlab.scoring.metrics import matched_slots
from slotlab.scoring.tables import contingency


def square(size: int, top: int, left: int, side: int) -> Tensor:
    """(1, size, size) int64: one object on background."""
    labels = torch.zeros(1, size, size, dtype=torch.int64)
    labels[0, top : top + side, left : left + side] = 1
    return labels


def f_of(labels: Tensor, truth: Tensor, tolerance: int) -> Tensor:
    table = contingency(labels.flatten(1), truth.flatten(1), int(labels.max()) + 1, int(truth.max()) + 1)
    return boundary_f(labels, truth, matched_slots(table), tolerance)


def test_tolerance_is_davis() -> None:
    assert tolerance_px((256, 256)) == 3
    assert tolerance_px((480, 854)) == 8


def share_near(edge: np.ndarray, other: np.ndarray, tolerance: int) -> float:
    """By every pair of pixels, in whole numbers."""
    pairs = ((np.argwhere(edge)[:, None] - np.argwhere(other)[None]) ** 2).sum(-1)
    return float((pairs <= tolerance**2).any(1).sum()) / len(pairs) if len(pairs) else 1.0


@given(seed=st.integers(0, 10_000), tolerance=st.integers(0, 9), size=st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_boundary_f_of_any_outlines_is_that_of_all_pairs_of_pixels(seed: int, tolerance: int, size: int) -> None:
    """To the bit, for ragged masks, holes, touching borders, and masks that fill the frame and so have no outline."""
    random = np.random.default_rng(seed)
    smooth = gaussian_filter(random.standard_normal((2, size, size + 3)), (0, 2, 2))
    masks = smooth > np.quantile(smooth, random.choice([0.0, 0.3, 0.7, 0.95]))
    masks[:, 0, 0] = True
    one, other = (outline(torch.from_numpy(mask)).numpy() for mask in masks)
    precision, recall = share_near(one, other, tolerance), share_near(other, one, tolerance)
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    labels, truth = torch.from_numpy(masks.astype(np.int64))
    assert float(boundary_f(labels[None], truth[None], torch.tensor([[1]]), tolerance)) == expected


@given(seed=st.integers(0, 1000), tolerance=st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_boundary_f_equals_its_definition_on_whole_frames(seed: int, tolerance: int) -> None:
    """Against the distances of every pixel of the frame."""
    random = np.random.default_rng(seed)
    truth, labels = (
        square(24, *random.integers(0, 14, 2).tolist(), 6),
        square(24, *random.integers(0, 14, 2).tolist(), 7),
    )
    slots = torch.tensor([[1]])
    edges = [outline(x[0] == 1).numpy() for x in (labels, truth)]
    shares = [(distance_transform_edt(~other)[edge] <= tolerance + 1e-9).mean() for edge, other in (edges, edges[::-1])]
    expected = 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0
    assert float(boundary_f(labels, truth, slots, tolerance)[0, 0]) == pytest.approx(expected)


def test_a_shift_within_the_tolerance_costs_nothing_and_beyond_it_all() -> None:
    truth = square(48, 10, 10, 20)
    assert float(f_of(square(48, 10, 10, 20), truth, 0)) == 1.0
    assert float(f_of(square(48, 12, 10, 20), truth, 2)) == 1.0
    assert float(f_of(square(48, 13, 13, 20), truth, 1)) < 0.2


def test_absent_objects_are_left_out_and_unmatched_ones_count_as_0() -> None:
    truth = square(16, 2, 2, 4)
    truth[0, 12:15, 12:15] = 3  # object 2 is absent
    labels = torch.zeros_like(truth)  # one slot for all: it can serve only one object
    score = f_of(labels, truth, 2)[0]
    assert score[1].isnan()
    assert score[2] == 0.0 or score[0] == 0.0


def test_bleeding_is_the_share_of_the_slot_outside() -> None:
    truth, labels = square(20, 4, 4, 4), square(20, 4, 4, 8)
    table = contingency(labels.flatten(1), truth.flatten(1), 2, 2)
    assert float(bleeding(table, matched_slots(table))) == 1 - 16 / 64
    assert bleeding(table, torch.tensor([[-1]])).isnan().all()


def test_areas_are_split_in_thirds_and_small_objects_bleed_most() -> None:
    scores = BoundaryScores((64, 64))
    truth = torch.cat([square(64, 8, 8, side) for side in (3, 4, 9, 10, 30, 31)])
    labels = torch.cat([square(64, 7, 7, side) for side in (5, 6, 11, 12, 32, 33)])  # one pixel too wide all round
    scores.add(labels, truth, 2, 2)
    found = scores.summary()
    classes = found["by_area"]
    assert [classes[name]["area_px"] for name in ("small", "medium", "large")] == [[9, 16], [81, 100], [900, 961]]
    assert classes["small"]["bleeding"] > classes["medium"]["bleeding"] > classes["large"]["bleeding"] > 0
    assert found["boundary_f"] > 0.9, "the tolerance is 1 px, and only corners are farther"
    assert found["objects"] == 6 and found["without_slot"] == 0


def test_frames_without_objects_have_no_score() -> None:
    scores = BoundaryScores((16, 16))
    empty = torch.zeros(2, 16, 16, dtype=torch.int64)
    scores.add(empty, empty, 3, 4)
    found = scores.summary()
    assert found["boundary_f"] is None and found["bleeding"] is None and found["by_area"] == {}


# --- binarisation -------------------------------------------------------------------------------------------


def soft() -> Tensor:
    return torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).softmax(1)


def test_threshold_leaves_out_what_is_unsure() -> None:
    masks = soft()
    everything, nothing = threshold_labels(masks, (8, 8), 0.0), threshold_labels(masks, (8, 8), 0.99)
    assert int(everything.max()) < 3 and bool((nothing == 3).all())
    half = threshold_labels(masks, (8, 8), 0.4)
    assert 0 < float((half == 3).float().mean()) < 1
    assert torch.equal(half[half < 3], everything[half < 3])


def test_gumbel_draws_slots_as_often_as_masks_say_and_cold_it_is_argmax() -> None:
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    masks = probabilities.view(1, 3, 1, 1).expand(1, 3, 100, 100)
    drawn = gumbel_masks(masks, 1.0, Draws(0))
    assert torch.equal(drawn.sum(1), torch.ones(1, 100, 100))
    torch.testing.assert_close(drawn.mean((0, 2, 3)), probabilities, atol=0.02, rtol=0)
    masks = soft()
    assert torch.equal(gumbel_masks(masks, 1e-4, Draws(0)).argmax(1), masks.argmax(1))


def test_unassigned_pixels_are_no_slots() -> None:
    truth = square(8, 2, 2, 4)
    scores = BinarisedScores()
    scores.add(torch.where(truth == 1, 2, 0), truth, 2, 2)  # all of the object unassigned
    found = scores.summary()
    assert found["mbo"] == 0.0 and found["unassigned"] == 16 / 64 and found["fg_ari"] == 1.0


@pytest.mark.parametrize("text", ["otsu", "threshold", "threshold=1", "threshold=x", "gumbel=0", "gumbel=inf", ""])
def test_wrong_binarisations_are_told(text: str) -> None:
    with pytest.raises(UsageError, match="choose one of argmax, threshold=T, gumbel=T"):
        parse_binarisation(text)
