"""What is soon gone, as a shadow is, becomes background; what was once found to last stays an object."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slotlab.models.clustering.lasting import Lasting, likes
from slotlab.models.clustering.model import ClusteringModel
from slotlab.models.clustering.tracking import Tracker
from slotlab.models.randomness import Draws
from tests.test_tracking import Box, model, slot_of, turning, video

STAYS, PASSES = 1, 2
LENGTH, SHOWN = 8, 2


def with_a_shadow() -> tuple[Tensor, Tensor]:
    """An object that moves through the video, and something that stands out as much for two frames."""
    stays: list[Box | None] = [(1, x) for x in range(LENGTH)]
    passes: list[Box | None] = [(6, 6)] * SHOWN + [None] * (LENGTH - SHOWN)
    return video(stays, passes)


def fitted(tokens: Tensor, **options: object) -> ClusteringModel:
    clustering = model(lasting_frames=3, **options)
    clustering.calibrate([tokens])
    clustering.learn_lasting([tokens])
    return clustering


@pytest.mark.parametrize("tracking", [True, False])
def test_what_is_soon_gone_is_background(tracking: bool) -> None:
    tokens, labels = with_a_shadow()
    for threshold, shown in ((0.8, False), (0.0, True)):
        clustering = fitted(tokens, tracking=tracking, lasting_threshold=threshold)
        with torch.no_grad():
            output = clustering.segment(tokens, Draws(0))
        torch.testing.assert_close(output.masks.sum(1), torch.ones(tokens.shape[:2]))
        assert 0 not in slot_of(output.masks, labels, STAYS)
        assert [slot != 0 for slot in slot_of(output.masks, labels, PASSES)[:SHOWN]] == [shown] * SHOWN


def test_a_slot_that_was_found_to_last_stays_an_object() -> None:
    tokens, labels = video([(1, 1)] * 3, [(6, 6)] * 3)
    clustering = model(lasting_threshold=0.8)
    clustering.calibrate([tokens])
    with torch.no_grad():
        keys, objectness = clustering.encode(clustering.tokens(tokens))
        tracker = Tracker.start(clustering.config, clustering.attend, clustering.position, keys.shape[-1])
        upper = (clustering.position[:, 0] < 0).float()  # the first object's half
        lasting = [upper, 0.1 * upper, 0.1 * upper]
        held = [tracker.step(*frame) for frame in zip(tokens, keys, objectness, lasting, strict=True)]
    for attention, label in zip(held, labels, strict=True):
        assert bool((attention.sum(-1)[label == 1] > 0.5).all()) and bool((attention.sum(-1)[label == 2] < 0.1).all())
    assert int(tracker.active.sum()) == 2  # the other is carried on, or the first would take what it holds


def test_a_slot_taken_by_another_object_knows_nothing_of_the_last() -> None:
    tokens, labels = video([(1, 1), None, None], [None, None, (6, 6)])
    clustering = model(lasting_threshold=0.8, slots=2, least_mass=5.0)  # one for objects, free when empty
    clustering.calibrate([tokens])
    with torch.no_grad():
        keys, objectness = clustering.encode(clustering.tokens(tokens))
        tracker = Tracker.start(clustering.config, clustering.attend, clustering.position, keys.shape[-1])
        ones = torch.ones(tokens.shape[1])
        held = [
            tracker.step(*frame, lasts * ones)
            for *frame, lasts in zip(tokens, keys, objectness, (1.0, 1.0, 0.1), strict=True)
        ]
    assert bool((held[0].sum(-1)[labels[0] == 1] > 0.5).all())
    assert held[2].sum() == 0


@pytest.mark.parametrize("hidden", [0, 1, 2])
def test_an_object_that_comes_back_to_its_name_is_still_known(hidden: int) -> None:
    """One that turns at once does so as well: its slot is a new one that takes from what it was."""
    turned = hidden == 0
    tokens, labels = turning(70, 4) if turned else video([(4, 4)] * 2 + [None] * hidden + [(4, 4)] * 2)
    clustering = model(lasting_threshold=0.8)
    clustering.calibrate([tokens])
    ones = torch.ones(tokens.shape[1])
    with torch.no_grad():
        keys, objectness = clustering.encode(clustering.tokens(tokens))
        tracker = Tracker.start(clustering.config, clustering.attend, clustering.position, keys.shape[-1])
        for t, frame in enumerate(zip(tokens, keys, objectness, strict=True)):
            held = tracker.step(*frame, ones if t < 2 else 0.1 * ones)
            assert bool((held.sum(-1)[labels[t] > 0] > 0.5).all())


def test_likes_are_counted_before_and_after() -> None:
    directions = torch.eye(200).repeat(4, 1, 1)  # (T, N, D): patch n is unlike all others
    objects = torch.zeros(4, 200, dtype=torch.bool)
    objects[:, :4] = True
    objects[3, 0] = False
    found = likes(directions, objects, 3)
    assert found[0, 0] < 0.1 and found[0, 1] > 1 and found[3, 1] > 1  # gone after; there after; there before
    assert bool(found[1:3].isnan().all())  # nothing three frames away


@pytest.mark.parametrize("frames", [LENGTH, LENGTH + 1])
def test_a_video_too_short_to_tell_says_that_everything_lasts(frames: int) -> None:
    tokens, _ = with_a_shadow()
    lasting = Lasting(tokens.shape[-1])
    lasting.fit([(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))], frames=frames)
    assert bool((lasting(tokens) == 1).all())


@pytest.mark.parametrize("length", [4, 5, 6])
def test_the_middle_of_a_short_video_is_not_held_against_its_objects(length: int) -> None:
    """With three frames between, the middle frames of five have neither a before nor an after."""
    one, other = torch.eye(8)[:2]
    objects = torch.tensor([True] * 4 + [False] * 4)
    lasting = Lasting(8)
    lasting.fit(
        [
            (direction.repeat(frames, 8, 1), objects.repeat(frames, 1))
            for direction, frames in ((one, 12), (other, length))
        ],
        frames=3,
    )
    torch.testing.assert_close(lasting(torch.stack([one, other])[None]), torch.ones(1, 2))


def test_scale_changes_nothing() -> None:
    tokens, _ = with_a_shadow()
    one, other = fitted(tokens), fitted(100 * tokens)
    torch.testing.assert_close(one.lasting(tokens), other.lasting(100 * tokens))
