"""J, F and J&F of tracks, against the definition written out pixel by pixel."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotlab.scoring.tracks import MOST_TRACKS, track_scores


def _j(one: np.ndarray, other: np.ndarray) -> float:
    return 1.0 if not (one | other).any() else (one & other).sum() / (one | other).sum()


def _edge(mask: np.ndarray) -> list[tuple[int, int]]:
    """Pixels that differ from their right, lower or diagonal neighbour, where there is one."""
    height, width = mask.shape
    found = []
    for y, x in itertools.product(range(height), range(width)):
        beside = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
        if any(v < height and u < width and mask[v, u] != mask[y, x] for v, u in beside):
            found.append((y, x))
    return found


def _f(one: np.ndarray, other: np.ndarray) -> float:
    reach = math.ceil(0.008 * math.hypot(*one.shape))
    edges = _edge(one), _edge(other)
    if not edges[0] or not edges[1]:
        return float(not edges[0] and not edges[1])
    shares = []
    for own, others in (edges, edges[::-1]):
        met = [any(math.hypot(y - v, x - u) <= reach for v, u in others) for y, x in own]
        shares.append(sum(met) / len(met))
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def _by_definition(found: np.ndarray, truth: np.ndarray, known: np.ndarray) -> tuple[float, float]:
    """J and F, means over the objects, by the best of all assignments."""
    objects = [n for n in np.unique(truth[known]) if n]
    tracks = [*np.unique(found[known])]
    tracks += [-1] * (len(objects) - len(tracks))  # empty ones, where there are fewer than objects
    values = {
        (i, n): np.mean(
            [
                [score((a == tracks[i]) & k, (b == n) & k) for score in (_j, _f)]
                for a, b, k in zip(found, truth, known, strict=True)
            ],
            axis=0,
        )
        for i in range(len(tracks))
        for n in objects
    }
    best = max(
        itertools.permutations(range(len(tracks)), len(objects)),
        key=lambda chosen: sum(values[i, n].sum() for i, n in zip(chosen, objects, strict=True)),
    )
    j, f = np.mean([values[i, n] for i, n in zip(best, objects, strict=True)], axis=0)
    return float(j), float(f)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_the_scores_are_those_of_the_definition(seed: int, objects: int, slots: int, void: bool) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, objects + 1, (2, 3, 4)), rng.integers(0, slots, (2, 3, 4))
    truth, found = (np.repeat(np.repeat(labels, 4, 1), 4, 2) for labels in coarse)
    truth[rng.random(truth.shape) < 0.05] = 0
    truth[0, 0, 0] = 1  # at least one object
    known = rng.random(truth.shape) > (0.1 if void else -1)
    known[0, 0, 0] = True
    scores = track_scores(found, truth, ~known if void else None)
    j, f = scores.j.mean(), scores.f.mean()
    right_j, right_f = _by_definition(found, truth, known)
    assert scores.j_and_f.mean() == pytest.approx((right_j + right_f) / 2, abs=1e-12)
    assert (j, f) == pytest.approx((right_j, right_f), abs=1e-9) or j + f == pytest.approx(right_j + right_f, abs=1e-9)


def test_a_perfect_track_scores_one_and_names_its_slot() -> None:
    truth = np.zeros((3, 20, 30), np.uint8)
    truth[:2, 4:9, 3:12] = 1  # leaves the scene
    truth[:, 12:18, 15:25] = 2
    found = np.array([7, 3, 5])[truth]
    scores = track_scores(found, truth)
    np.testing.assert_array_equal(scores.j, [1, 1])
    np.testing.assert_array_equal(scores.f, [1, 1])
    np.testing.assert_array_equal(scores.tracks, [3, 5])


def test_a_track_that_changes_its_object_is_half_right() -> None:
    truth = np.zeros((2, 20, 30), np.uint8)
    truth[:, 2:8, 2:12], truth[:, 12:18, 15:25] = 1, 2
    found = truth.copy()
    found[1] = np.array([0, 2, 1])[truth[1]]
    np.testing.assert_allclose(track_scores(found, truth).j, [0.5, 0.5])


def test_more_objects_than_tracks_and_more_tracks_than_count() -> None:
    truth = np.zeros((1, 20, 30), np.uint8)
    truth[0, 2:8, 2:12], truth[0, 12:18, 15:25] = 1, 2
    scores = track_scores(np.zeros_like(truth), truth)
    assert sorted(scores.tracks) == [-1, 0] and scores.j.min() == 0
    many = np.arange(600).reshape(1, 20, 30) // 20  # 30 tracks
    assert track_scores(many, truth).left_out == 30 - MOST_TRACKS


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="without objects"):
        track_scores(np.zeros((1, 4, 4), int), np.zeros((1, 4, 4), int))
    with pytest.raises(ValueError, match="differ"):
        track_scores(np.zeros((1, 4, 4), int), np.ones((2, 4, 4), int))
