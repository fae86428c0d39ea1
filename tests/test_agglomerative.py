"""Slots from segments of learnt keys: as many as there are, trained by what stays the same, followed over a video."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss
from torch import Tensor

from featcache.errors import DataError
from featcache.store.reading import FeatureStore
from slotlab.config.model import AgglomerativeConfig
from slotlab.config.schema import LossConfig
from slotlab.models.agglomerative.model import AgglomerativeModel
from slotlab.models.agglomerative.tracking import Tracks
from slotlab.models.flow import patch_positions
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.models.segments import segments, smoothed
from slotlab.runs.loaded import load_run
from slotlab.training.losses import losses, total
from slotlab.training.train import train
from tests.training import rows_of, small

GRID, DIM = (8, 12), 16  # not square
Box = tuple[int, int]  # top left corner of a 3x3 object
LOSS = LossConfig(feature_mse=0.0, assignment=1.0)


def model(**options: object) -> AgglomerativeModel:
    torch.manual_seed(0)
    # A smaller cut would divide a plain wall, for its width alone.
    config = AgglomerativeConfig.model_validate(
        {"slots": 9, "slot_dim": 12, "hidden": 16, "cut": 0.6, "train_cut": 0.6, **options}
    )
    return AgglomerativeModel(config, Normaliser("none", DIM), GRID)


def video(*paths: list[Box | None], noise: float = 0.05) -> tuple[Tensor, Tensor]:
    """Tokens (T, N, D) of objects on paths (None: not there) before a wall, and labels (T, N), 0 for the wall."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0]
    labels = torch.zeros(len(paths[0]), *GRID, dtype=torch.long)
    for k, path in enumerate(paths):
        for t, box in enumerate(path):
            if box is not None:
                y, x = box
                labels[t, y : y + 3, x : x + 3] = k + 1
    tokens = directions[labels] + noise * torch.randn(*labels.shape, DIM, generator=generator)
    return tokens.flatten(1, 2), labels.flatten(1)


THREE: tuple[list[Box | None], ...] = ([(0, 0), (0, 1)], [(0, 8), (1, 8)], [(5, 3), (5, 5)])


@torch.no_grad()
def masks_of(of: AgglomerativeModel, tokens: Tensor) -> Tensor:
    masks = of.segment(tokens, Draws(0)).checked().masks
    torch.testing.assert_close(masks.sum(1), torch.ones(tokens.shape[:2]))
    return masks


@pytest.mark.parametrize("objects", [0, 1, 3])
def test_a_frame_has_as_many_slots_as_it_shows_things(objects: int) -> None:
    tokens, labels = video(*THREE[:objects]) if objects else video([None, None])
    hard = masks_of(model(tracking=False), tokens).argmax(1)  # (T, N)
    for of_frame, true in zip(hard, labels, strict=True):
        pairs = {(int(t), int(s)) for t, s in zip(true, of_frame, strict=True)}
        assert len(pairs) == objects + 1, "one slot a thing, one thing a slot"
        assert set(of_frame.tolist()) == set(range(objects + 1)), "the largest first, and no gap"


def test_a_patch_goes_by_likeness_and_by_what_surrounds_it() -> None:
    """The shares of a frame's slots, patch by patch, from their definition."""
    tokens, _ = video(*THREE, noise=0.3)
    of, (rows, columns) = model(tracking=False), GRID
    with torch.no_grad():
        keys = of.keys(tokens)
        labels, shares = (
            segments(keys, GRID, 0.6, 9)[0],
            of.compete(keys).softmax(1)[0],
        )  # (N,), (K, N)
        smooth = F.normalize(keys + smoothed(keys, GRID), dim=-1)[0].double()
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    reach = (rows * columns) ** 0.5 / 8
    slots = [F.normalize(smooth[labels == k].mean(0), dim=0) for k in range(int(labels.max()) + 1)]
    for patch in range(0, rows * columns, 7):
        weight = torch.exp(-(places - places[patch]).square().sum(1) / (2 * reach**2))
        near = [(weight[labels == k].sum() / weight.sum()).clamp_min(1e-6) for k in range(len(slots))]
        odds = [float((slot @ smooth[patch] / 0.4).exp() * p**0.5) for slot, p in zip(slots, near, strict=True)]
        expected = torch.tensor([each / sum(odds) for each in odds])
        torch.testing.assert_close(shares[: len(slots), patch], expected, atol=1e-5, rtol=1e-4)


def test_what_does_not_exist_holds_nothing() -> None:
    tokens, _ = video(*THREE)
    with torch.no_grad():
        output = model(tracking=False).segment(tokens, Draws(0))
    assert float(output.masks[:, 4:].max()) == 0 and float(output.slots[:, 4:].abs().max()) == 0


def test_more_segments_than_slots_are_joined() -> None:
    tokens, _ = video(*THREE)
    hard = masks_of(model(slots=2, tracking=False), tokens).argmax(1)
    assert set(hard.flatten().tolist()) == {0, 1}


def test_the_slots_of_one_frame_find_the_patches_of_another() -> None:
    """Objects have moved, and one has gone: its patches go to a slot that there is, the others to their own."""
    (one, gone, other) = THREE
    tokens, labels = video(one, [gone[0], None], other)
    output = model()(tokens.unsqueeze(0), Draws(0))
    assert output.assigned is not None
    assigned, won = output.assigned[0], output.attention[0].argmax(0)  # (N,) each
    assert bool((output.slots[0, assigned].norm(dim=-1) > 0).all())
    kept = labels[0] != 2
    assert torch.equal(assigned[kept], won[kept])
    assert len({(int(t), int(s)) for t, s in zip(labels[0][kept], won[kept], strict=True)}) == 3


def test_the_loss_is_the_cross_entropy_of_the_assignment() -> None:
    tokens, _ = video(THREE[0], [THREE[1][0], None], THREE[2], noise=0.5)
    output = model()(torch.stack([tokens, tokens.flip(0)]), Draws(0))
    assert output.assigned is not None
    shares = output.logits.double().transpose(1, 2).flatten(0, 1).softmax(-1).detach()
    known = log_loss(output.assigned.flatten(), shares, labels=list(range(9)))
    assert float(losses(output, LOSS)["assignment"]) == pytest.approx(known, rel=1e-5)


@pytest.mark.parametrize("clips", [True, False])
def test_training_lowers_the_loss_and_reaches_every_parameter(clips: bool) -> None:
    tokens, _ = video(*THREE, noise=0.12)
    features = tokens.unsqueeze(0) if clips else tokens
    trained = model()
    optimizer = torch.optim.Adam(trained.parameters(), 1e-2)
    seen = []
    for step in range(30):
        loss = total(losses(trained(features, Draws(step)), LOSS), LOSS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.7 * seen[0]
    assert not [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("where", ["store", "model"])
def test_what_is_not_finite_is_refused(where: str) -> None:
    tokens, _ = video(*THREE)
    broken = model()
    if where == "store":
        tokens[1, 5, 0] = torch.nan
    else:
        broken.line.weight.data[0, 0] = torch.inf
    for run in (broken.segment, broken):
        with pytest.raises(DataError, match=r"not finite.*verify.*learning_rate"):
            run(tokens, Draws(0))


@pytest.mark.parametrize("clip", [1, 2])
def test_a_seed_gives_one_run_and_the_run_is_read_back(tmp_path: Path, store: FeatureStore, clip: int) -> None:
    config = small(f"data.clip={clip}", preset="objects")
    one, two = (train(config, store, tmp_path / name) for name in "ab")
    assert rows_of(one) == rows_of(two)
    loaded = load_run(one)
    split = loaded.split()
    output = loaded.segment(split, split.videos[0])
    assert torch.equal(output.masks, load_run(two).segment(split, split.videos[0]).masks)


# -- over a video ------------------------------------------------------------------------------------------


def slots_of(masks: Tensor, labels: Tensor, label: int) -> list[int]:
    """The slot that holds most of an object, in each frame that shows it."""
    return [
        int(m.argmax(0)[t == label].mode().values) for m, t in zip(masks, labels, strict=True) if (t == label).any()
    ]


def test_slots_stay_with_objects_that_move_past_each_other() -> None:
    tokens, labels = video([(0, x) for x in range(9)], [(4, 8 - x) for x in range(9)])
    masks = masks_of(model(), tokens)
    seen = [set(slots_of(masks, labels, label)) for label in range(3)]
    assert all(len(slots) == 1 for slots in seen) and len(set.union(*seen)) == 3


def test_a_camera_that_moves_changes_no_identity() -> None:
    """All that is seen shifts by a patch a frame, the wall too."""
    tokens, labels = video([(0, x) for x in range(8)], [(4, x + 1) for x in range(8)])
    masks = masks_of(model(), tokens)
    assert all(len(set(slots_of(masks, labels, label))) == 1 for label in range(3))


def test_an_object_that_comes_back_gets_its_slot_again() -> None:
    away: list[Box | None] = [(0, 0), *[None] * 7, (5, 9)]
    new: list[Box | None] = [None] * 4 + [(3, 4)] * 5
    tokens, labels = video(away, new)
    masks = masks_of(model(), tokens)
    back, other = slots_of(masks, labels, 1), slots_of(masks, labels, 2)
    assert len(back) == 2 and back[0] == back[1]
    assert len(set(other)) == 1 and other[0] not in (back[0], *slots_of(masks, labels, 0))


def test_a_full_house_gives_a_new_object_the_slot_that_was_left_longest_ago() -> None:
    places = [(0, 0), (5, 9), (0, 9), (5, 0), (0, 5)]
    paths: list[list[Box | None]] = [[None] * k + [place] + [None] * (4 - k) for k, place in enumerate(places)]
    tokens, labels = video(*paths)
    masks = masks_of(model(slots=4), tokens)
    assert [slots_of(masks, labels, k + 1)[0] for k in range(5)] == [1, 2, 3, 1, 2]


def test_the_future_changes_nothing() -> None:
    tokens, _ = video([(0, x) for x in range(6)], [(4, 8 - x) for x in range(6)])
    torch.testing.assert_close(masks_of(model(), tokens[:3]), masks_of(model(), tokens)[:3])


def test_without_tracking_frames_know_nothing_of_each_other() -> None:
    tokens, _ = video([(0, x) for x in range(6)], [(4, 8 - x) for x in range(6)])
    apart = model(tracking=False)
    torch.testing.assert_close(torch.cat([masks_of(apart, frame[None]) for frame in tokens]), masks_of(apart, tokens))


def test_without_a_prior_slots_are_only_reordered() -> None:
    tokens, _ = video(*THREE)
    tracks = Tracks(4, patch_positions(GRID), prior_weight=0.0)
    logits = torch.randn(2, 4, GRID[0] * GRID[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for keys, of_frame in zip(model().keys(tokens), logits, strict=True):
            followed = tracks.step(keys, of_frame)  # (K, N)
            torch.testing.assert_close(followed.sort(0).values, of_frame.softmax(0).sort(0).values)


def test_a_patch_in_doubt_stays_with_the_object_that_it_belonged_to() -> None:
    """A patch like two slots at once goes half to each by itself, and to the one before that held it by the prior."""
    tokens, labels = video([(0, 0), (0, 0)], [(0, 3), (0, 3)], noise=0)
    edge = 2  # the last patch of the first object's first row
    tokens[1, edge] = tokens[1, edge] + tokens[1, 3]
    shares = [masks_of(model(prior_weight=weight, near_weight=0.0), tokens) for weight in (0.0, 0.3)]
    first = slots_of(shares[0], labels, 1)[0]
    assert float(shares[1][1, first, edge]) > float(shares[0][1, first, edge]) + 0.05


def test_what_a_frame_has_in_common_is_no_likeness() -> None:
    """With all of the mean taken away, a shift of all tokens of a frame changes nothing."""
    tokens, _ = video(*THREE)
    of = model(centre=1.0)
    with torch.no_grad():
        torch.testing.assert_close(of.keys(tokens), of.keys(tokens + torch.randn(DIM)))
        assert not torch.allclose(model().keys(tokens), model().keys(tokens + 1))
