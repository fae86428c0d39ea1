"""Slots keep their objects over a video: moving, entering, leaving, meeting."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slotlab.config.model import ClusteringConfig
from slotlab.models.clustering.model import ClusteringModel
from slotlab.models.clustering.tracking import Tracker
from slotlab.models.flow import Seen, flow, patch_positions
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws

SIDE, DIM = 10, 12
Box = tuple[int, int]  # top left corner of a 2x2 object


def model(**options: object) -> ClusteringModel:
    torch.manual_seed(0)
    small_grid = {"position_weight": 0.4, "new_slot_distance": 1.0, "merge_distance": 1.0}  # where a patch is wide
    config = ClusteringConfig.model_validate({"slots": 6, "slot_dim": DIM, "hidden": 16, **small_grid, **options})
    return ClusteringModel(config, Normaliser("none", DIM), (SIDE, SIDE))


def video(*paths: list[Box | None]) -> tuple[Tensor, Tensor]:
    """Tokens (T, N, D) of objects on paths (None: not there), and labels (T, N), 0 for the background."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0]
    length = len(paths[0])
    tokens = 0.2 * torch.randn(length, SIDE, SIDE, DIM, generator=generator)
    labels = torch.zeros(length, SIDE, SIDE, dtype=torch.long)
    for k, path in enumerate(paths):
        for t, box in enumerate(path):
            if box is not None:
                y, x = box
                labels[t, y : y + 2, x : x + 2] = k + 1
                tokens[t, y : y + 2, x : x + 2] = 6 * directions[k]
    return tokens.flatten(1, 2), labels.flatten(1)


def slot_of(masks: Tensor, labels: Tensor, label: int) -> list[int | None]:
    """The slot that holds most of an object in each frame; None where it is not there."""
    hard = masks.argmax(1)  # (T, N)
    return [
        int(hard[t][labels[t] == label].mode().values) if bool((labels[t] == label).any()) else None
        for t in range(len(masks))
    ]


def segment(clustering: ClusteringModel, tokens: Tensor) -> Tensor:
    clustering.calibrate([tokens])
    with torch.no_grad():
        output = clustering.segment(tokens, Draws(0))
    torch.testing.assert_close(output.masks.sum(1), torch.ones(tokens.shape[:2]))
    return output.masks


def test_slots_follow_objects_that_move_past_each_other() -> None:
    one: list[Box | None] = [(1, x) for x in range(8)]
    other: list[Box | None] = [(6, 8 - x) for x in range(8)]
    tokens, labels = video(one, other)
    masks = segment(model(), tokens)
    seen = [slot_of(masks, labels, label) for label in (1, 2)]
    assert all(len(set(slots)) == 1 for slots in seen) and seen[0][0] != seen[1][0]


def test_an_object_that_enters_takes_a_slot_of_its_own() -> None:
    stays: list[Box | None] = [(1, 1)] * 6
    enters: list[Box | None] = [None] * 3 + [(6, 6)] * 3
    tokens, labels = video(stays, enters)
    masks = segment(model(), tokens)
    first, second = (slot_of(masks, labels, label) for label in (1, 2))
    assert len(set(first)) == 1
    assert second[:3] == [None] * 3 and len(set(second[3:])) == 1 and second[3] not in (0, first[0])


def test_a_slot_whose_object_left_is_free_again() -> None:
    """Six objects one after the other in a model of two object slots."""
    paths = [[(4, 4) if t == k else None for t in range(6)] for k in range(6)]
    tokens, labels = video(*paths)
    masks = segment(model(slots=3), tokens)
    assert all(slot_of(masks, labels, k + 1)[k] not in (0, None) for k in range(6))


@pytest.mark.parametrize("older", [0, 1])
def test_of_two_slots_on_one_object_the_older_stays(older: int) -> None:
    clustering = model()
    tracker = Tracker.start(clustering.config, clustering.attend, clustering.position, width=4)
    tracker.slots[:2] = torch.ones(4) + 0.01 * torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    tracker.active[:2] = True
    carried, mass = torch.zeros_like(tracker.active), torch.full((len(tracker.active),), 3.0)
    carried[older], mass[older] = True, 1.0  # though it holds less
    tracker._merge(mass, carried)
    assert tracker.active.nonzero().flatten().tolist() == [older]


def turning(degrees: float, frames: int = 4) -> tuple[Tensor, Tensor]:
    """One object that stays, and one beside it that looks different by so many degrees in every frame."""
    tokens, labels = video([(1, 1)] * frames, [(4, 4)] * frames)
    one, other = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)))[0][1:3]
    for t in range(frames):
        angle = torch.tensor(math.radians(degrees * t))
        tokens[t][labels[t] == 2] = 6 * (angle.cos() * one + angle.sin() * other)
    return tokens, labels


def test_an_object_that_turns_keeps_its_slot() -> None:
    tokens, labels = turning(70)  # farther than a new slot's distance: 2 - 2 cos(70 degrees) = 1.3
    masks = segment(model(), tokens)
    stays, turns = (set(slot_of(masks, labels, label)) for label in (1, 2))
    assert len(stays) == len(turns) == 1 and stays != turns and 0 not in turns


@pytest.mark.parametrize(("moves", "flows"), [(1, True), (3, False)])  # a patch is 0.22 wide
def test_nothing_flows_farther_than_the_radius(moves: int, flows: bool) -> None:
    tokens, labels = video([(1, 1), (1, 1 + moves)])
    before, now = F.normalize(tokens, dim=-1)
    past = [Seen(before, F.one_hot(labels[0], 5).float())]
    came = flow(now, patch_positions((SIDE, SIDE)), past)[labels[1] == 1, 1]
    assert bool((came > 0.9).all() if flows else (came == 0).all())


@pytest.mark.parametrize(("frames", "flows"), [(1, False), (2, True)])
def test_attention_flows_past_a_frame_in_which_the_object_was_hidden(frames: int, flows: bool) -> None:
    tokens, labels = video([(4, 4), None, (4, 5)])
    directions = F.normalize(tokens, dim=-1)
    past = [Seen(directions[t], F.one_hot(labels[t], 5).float()) for t in (1, 0)]
    came = flow(directions[2], patch_positions((SIDE, SIDE)), past[:frames])[labels[2] == 1, 1]
    assert bool((came > 0.9).all() if flows else (came == 0).all())


def test_the_future_changes_nothing() -> None:
    tokens, _ = video([(1, x) for x in range(6)], [(6, 8 - x) for x in range(6)])
    clustering = model()
    whole = segment(clustering, tokens)
    with torch.no_grad():
        part = clustering.segment(tokens[:3], Draws(0)).masks
    torch.testing.assert_close(part, whole[:3])


def test_an_empty_video_is_all_background() -> None:
    tokens, _ = video([(4, 4)] * 2)
    clustering = model()
    clustering.calibrate([tokens])
    empty = 0.1 * torch.randn(3, SIDE * SIDE, DIM, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        masks = clustering.segment(empty, Draws(0)).masks
    assert float(masks[:, 0].min()) > 0.5


@pytest.mark.parametrize("frames", [1, 2])
def test_single_frames_are_videos_too(frames: int) -> None:
    tokens, labels = video([(4, 4)] * frames)
    masks = segment(model(), tokens)
    assert all(slot not in (0, None) for slot in slot_of(masks, labels, 1))


def test_without_tracking_pictures_know_nothing_of_each_other() -> None:
    tokens, labels = video([(1, x) for x in range(6)], [(6, 8 - x) for x in range(6)])
    clustering = model(tracking=False)
    whole = segment(clustering, tokens)
    assert all(slot not in (0, None) for slot in slot_of(whole, labels, 1) + slot_of(whole, labels, 2))
    with torch.no_grad():
        alone = [clustering.segment(tokens[t : t + 1], Draws(0)).masks for t in range(6)]
    torch.testing.assert_close(torch.cat(alone), whole)
