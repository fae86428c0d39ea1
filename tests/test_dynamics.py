"""The world model on slots: how masks move, what a vector says, and that the order of slots does not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.store.reading import FeatureStore
from slotlab.config.model import DynamicsConfig
from slotlab.config.schema import LossConfig
from slotlab.models.build import build_model
from slotlab.models.dynamics.model import DynamicsModel
from slotlab.models.dynamics.motion import layered, moved, widest
from slotlab.models.dynamics.state import FEATURE, PLACE, SIDE, Seen, places, see
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.training.losses import slot_mse
from slotlab.training.train import train
from tests.training import Interrupted, rows_of, small, stopping

GRID = (5, 7)
DIM, SLOTS = 6, 4


def blobs(count: int, seed: int = 0, grid: tuple[int, int] = GRID) -> Tensor:
    """Soft masks (count, N)."""
    rng = np.random.default_rng(seed)
    maps = ndimage.gaussian_filter(rng.random((count, *grid)), (0, 1, 1))
    return torch.from_numpy(maps / maps.sum(0)).float().flatten(1)


def move(masks: Tensor, shift: tuple[float, float] = (0, 0), spread: float = 0.0) -> Tensor:
    """The masks (K, N) moved alike, as maps."""
    alike = torch.tensor(shift).float().expand(len(masks), 2)
    return moved(masks, alike, torch.full((len(masks),), spread), GRID).unflatten(-1, GRID)


# -- motion ------------------------------------------------------------------------------------------------


def test_a_mask_that_does_not_move_is_the_same() -> None:
    masks = blobs(3)
    torch.testing.assert_close(move(masks).flatten(1), masks, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shift", [(1.0, 0.0), (-2.0, 3.0), (0.5, -0.25), (1.75, 2.5)])
def test_a_shift_is_scipy_s_bilinear_one(shift: tuple[float, float]) -> None:
    masks = blobs(2)
    for found, mask in zip(move(masks, shift), masks.unflatten(-1, GRID), strict=True):
        expected = ndimage.shift(mask.numpy(), shift, order=1, mode="grid-constant")
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_a_spread_is_scipy_s_gaussian_one() -> None:
    """Of a box, which the patch is, on a grid fine enough for sums to be integrals."""
    fine, side = 41, 21
    mask = torch.zeros(1, side * side)
    mask[0, (side * side) // 2] = 1.0
    found = moved(mask, torch.zeros(1, 2), torch.full((1,), 1.5), (side, side)).unflatten(-1, (side, side))[0]
    box = np.zeros((side * fine, side * fine))
    box[10 * fine : 11 * fine, 10 * fine : 11 * fine] = 1.0
    smooth = ndimage.gaussian_filter(box, 1.5 * fine, truncate=6)
    expected = smooth.reshape(side, fine, side, fine).mean((1, 3))
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)


def test_what_moves_out_of_the_frame_is_lost() -> None:
    mask = torch.zeros(1, 5 * 7)
    mask[0, 17] = 1.0  # the middle
    assert float(move(mask, (0.0, 3.5)).sum()) == pytest.approx(0.5, abs=1e-3)
    assert float(move(mask, (9.0, 0.0)).sum()) == pytest.approx(0.0, abs=1e-6)
    assert float(move(mask, spread=0.5).sum()) == pytest.approx(1.0, abs=1e-2)


@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_layers_sum_to_one_and_holes_are_the_background_s(seed: int) -> None:
    masks = blobs(4, seed) * torch.rand(4, 1, generator=torch.Generator().manual_seed(seed)) * 2
    behind = widest(masks)
    found = layered(masks, behind)
    assert int(behind.sum()) == 1 and behind[masks.sum(-1).argmax()]
    torch.testing.assert_close(found.sum(0), torch.ones(masks.shape[1]))
    assert float(found.min()) > -1e-6
    untouched = masks[~behind].sum(0) <= 1
    torch.testing.assert_close(found[~behind][:, untouched], masks[~behind][:, untouched])


# -- vectors -----------------------------------------------------------------------------------------------


def normaliser(seed: int = 0) -> Normaliser:
    rng = np.random.default_rng(seed)
    mean = torch.from_numpy(rng.normal(size=(GRID[0] * GRID[1], DIM)))
    return Normaliser.from_statistics("channel", mean, torch.from_numpy(np.diag(rng.uniform(0.5, 2, DIM))))


def tokens(frames: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tracks (1, T, K, D + N), and the features (T, N, D) and masks (T, K, N) that they are made of."""
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(frames, GRID[0] * GRID[1], DIM))).float()
    masks = torch.stack([blobs(SLOTS, seed + t) for t in range(frames)])
    means = masks @ features / masks.sum(-1, keepdim=True)
    return torch.cat([means, masks], -1).unsqueeze(0), features, masks


READ = (normaliser(), torch.eye(DIM), places(GRID))  # how tokens are read


def test_a_vector_is_the_place_the_size_and_the_mean_normalised_feature() -> None:
    given_tokens, features, masks = tokens(3)
    norm = normaliser()
    seen = see(given_tokens, norm, torch.eye(DIM), places(GRID))
    for t in range(3):
        for k in range(SLOTS):
            vector, mask = seen.vectors[0, t, k], masks[t, k].unflatten(-1, GRID).numpy()
            middle = (np.array(GRID) - 1) / 2
            np.testing.assert_allclose(vector[PLACE], np.array(ndimage.center_of_mass(mask)) - middle, atol=1e-5)
            assert float(vector[SIDE]) == pytest.approx(0.5 * np.log(mask.sum()), abs=1e-5)
            expected = np.average(norm(features[t]).numpy(), axis=0, weights=mask.ravel())
            np.testing.assert_allclose(vector[FEATURE], expected, atol=1e-4)


def test_a_refined_place_stands_at_the_end_after_the_actions() -> None:
    given_tokens, _, _ = tokens(3)
    actions, place = torch.randn(1, 3, 1, 3).expand(-1, -1, SLOTS, -1), torch.randn(1, 3, SLOTS, 2)
    plain, full = see(given_tokens, *READ), torch.cat([given_tokens, actions, place], -1)
    seen = see(full, *READ, actions=3, refined=True)
    assert torch.equal(seen.vectors[..., PLACE], place) and torch.equal(seen.actions, actions[:, :, 0])
    assert torch.equal(seen.vectors[..., SIDE:], plain.vectors[..., SIDE:]) and torch.equal(seen.masks, plain.masks)
    assert torch.equal(see(full, *READ, actions=3).vectors, plain.vectors), "of the masks, where those are wanted"


def test_a_slot_that_is_away_keeps_its_last_vector_and_mask() -> None:
    given_tokens, _, masks = tokens(4)
    given_tokens[0, 0, 1] = 0  # slot 1 comes in frame 1 and is away in frame 3
    given_tokens[0, 3, 1] = 0
    seen = see(given_tokens, normaliser(), torch.eye(DIM), places(GRID))
    assert seen.active[0, :, 1].tolist() == [False, True, True, False]
    assert seen.last[0, :, 1].tolist() == [1, 1, 2, 2]
    assert torch.equal(seen.vectors[0, 0, 1], seen.vectors[0, 1, 1])
    assert torch.equal(seen.vectors[0, 3, 1], seen.vectors[0, 2, 1])
    assert torch.equal(seen.masks_of(3)[0, 1], masks[2, 1]) and torch.equal(seen.masks_of(3)[0, 0], masks[3, 0])


# -- the model ---------------------------------------------------------------------------------------------


def model(seed: int = 0, steps: int = 1, **settings_of: object) -> DynamicsModel:
    """A model whose parameters are all random: the last layer of a fresh one is zero."""
    config = DynamicsConfig(**{"slots": SLOTS, "burn_in": 3, "width": 16, "heads": 2, "mirror": False, **settings_of})
    torch.manual_seed(seed)
    made = DynamicsModel(config, normaliser(), GRID, steps)
    torch.nn.init.normal_(made.change.weight, std=0.05)
    return made.eval()


@pytest.mark.parametrize("attention", ["joint", "sequential", "parallel"])
@given(order=st.permutations(range(SLOTS)), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_the_order_of_slots_does_not_matter(attention: str, order: list[int], seed: int) -> None:
    made = model(attention=attention)
    given_tokens, _, _ = tokens(3, seed)
    plain, permuted = (made.see(x) for x in (given_tokens, given_tokens[:, :, order]))
    with torch.no_grad():
        one, other = made.roll_out(plain, 4), made.roll_out(permuted, 4)
        torch.testing.assert_close(other, one[:, :, order], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(one[:, 0], one[:, -1], atol=1e-3), "something is predicted"
        pictures = [made.decode(of, future) for of, future in ((plain, one), (permuted, other))]
    torch.testing.assert_close(pictures[1].masks, pictures[0].masks[:, :, order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pictures[1].features, pictures[0].features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["joint", "sequential", "parallel"])
def test_slots_that_hold_nothing_change_nothing(attention: str) -> None:
    made = model(attention=attention)
    given_tokens, _, _ = tokens(3)
    more = torch.cat([given_tokens, torch.zeros_like(given_tokens[:, :, :2])], 2)
    with torch.no_grad():
        one, other = (made.roll_out(made.see(x), 2) for x in (given_tokens, more))
    torch.testing.assert_close(other[:, :, :SLOTS], one, atol=1e-5, rtol=1e-5)


def test_an_untrained_model_moves_slots_on_at_constant_speed() -> None:
    made = DynamicsModel(DynamicsConfig(burn_in=3, width=16), normaliser(), GRID).eval()
    given_tokens, _, _ = tokens(3)
    seen = made.see(given_tokens)
    future = made.roll_out(seen, 4)
    last, before = seen.vectors[:, 2], seen.vectors[:, 1]
    for step in range(4):
        expected = last[..., PLACE] + (step + 1) * (last - before)[..., PLACE]
        torch.testing.assert_close(future[:, step, :, PLACE], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(future[:, step, :, FEATURE], last[..., FEATURE])
    still = DynamicsModel(DynamicsConfig(burn_in=3, width=16, kinematics=False), normaliser(), GRID).eval()
    torch.testing.assert_close(still.roll_out(seen, 2)[:, 1], last)


def test_predictions_are_fed_back() -> None:
    """Two steps are one step after the first one's result."""
    made = model()
    given_tokens, _, _ = tokens(3)
    seen = made.see(given_tokens)
    with torch.no_grad():
        both = made.roll_out(seen, 2)
        later = torch.cat([seen.vectors[:, 1:], both[:, :1]], 1)
        then = made.roll_out(Seen(later, seen.masks, seen.active, seen.last, seen.actions), 1)
    torch.testing.assert_close(then[:, 0], both[:, 1])


@pytest.mark.parametrize("empty", [False, True])
def test_the_future_reaches_no_prediction(empty: bool) -> None:
    """Neither what slots do later, nor slots that come later."""
    made = model()
    one, other = tokens(6)[0], tokens(6)[0].clone()
    other[:, 3:] = tokens(6, seed=5)[0][:, 3:]
    if empty:
        one[:, :, 2] = 0
        other[:, :3, 2] = 0
    with torch.no_grad():
        pictures = [made.decode(of, made.roll_out(of, 3)) for of in (made.see(one), made.see(other))]
    torch.testing.assert_close(*(of.masks for of in pictures))
    torch.testing.assert_close(*(of.features for of in pictures))


@pytest.mark.parametrize("refined", [False, True])
def test_a_mirrored_clip_has_a_mirrored_truth(refined: bool) -> None:
    made = model(mirror=True, refined=refined).train()
    given_tokens, _, masks = tokens(4)
    if refined:
        given_tokens = torch.cat([given_tokens, torch.rand(*given_tokens.shape[:3], 2)], -1)
    clips = given_tokens.expand(8, -1, -1, -1)
    output = made(clips, Draws(0))
    plain = masks[3].mT @ made.see(given_tokens).vectors[0, 3, :, FEATURE]
    turned = [not torch.allclose(of, plain, atol=1e-4) for of in output.target[:, 0]]
    assert 0 < sum(turned) < 8
    rows, columns = output.future[..., 0, :, PLACE].unbind(-1)
    one, other = turned.index(True), turned.index(False)
    assert torch.allclose(columns[one], -columns[other], atol=1e-4) and torch.allclose(rows[one], rows[other])


def test_hidden_slots_are_seen_once() -> None:
    """What a hidden slot does after the first frame reaches no prediction."""
    made = model(masked_slots=1)
    given_tokens, _, _ = tokens(3)
    other = given_tokens.clone()
    other[:, 1:, 2] = tokens(3, seed=9)[0][:, 1:, 2]
    hidden = torch.zeros(1, SLOTS, dtype=torch.bool)
    hidden[0, 2] = True
    with torch.no_grad():
        one, same = (made.roll_out(made.see(x), 2, hidden) for x in (given_tokens, other))
        differ = [made.roll_out(made.see(x), 2) for x in (given_tokens, other)]
    assert torch.equal(one, same) and not torch.allclose(*differ)


def test_the_slot_loss_is_the_mean_square_of_standardised_parts() -> None:
    """Of places in units of their own."""
    made = model(steps=2).train()
    made.scale.uniform_(0.5, 2.0)
    made.stray.copy_(torch.tensor([0.4, 0.7]))
    given_tokens, _, _ = tokens(5)
    given_tokens[0, 3, 1] = 0  # is away, so that it adds nothing
    output = made(given_tokens, Draws(0))
    seen = made.see(given_tokens)
    with torch.no_grad():
        future = made.roll_out(seen, 2)
    error = ((future - seen.vectors[:, 3:]) / made.scale).square().numpy()[0]  # (2, K, S)
    places_off = (future - seen.vectors[:, 3:])[0, ..., PLACE] / made.stray.view(2, 1, 1)
    parts = places_off.square().mean(-1).numpy(), error[..., SIDE], error[..., FEATURE].mean(-1)
    each = np.mean(parts, 0)
    each[0, 1] = 0
    assert float(slot_mse(output, LossConfig()).detach()) == pytest.approx(each.mean(), rel=1e-4)


def test_places_count_in_units_of_how_far_off_constant_speed_is() -> None:
    """The median over slots that hold something in the two frames that give the speed, and in the later one."""
    made = model(steps=3)
    videos = [tokens(6, seed)[0][0] for seed in range(2)]
    videos[1][2:4, 0] = 0
    made.calibrate(videos)
    seen = [made.see(video.unsqueeze(0)) for video in videos]
    for ahead in (1, 2, 3):
        off = []
        for of in seen:
            place, here = of.vectors[0, ..., PLACE].numpy(), of.active[0]
            for t in range(1, 6 - ahead):
                for k in range(SLOTS):
                    if here[t - 1, k] and here[t, k] and here[t + ahead, k]:
                        expected = place[t, k] + ahead * (place[t, k] - place[t - 1, k])
                        off.append(np.linalg.norm(place[t + ahead, k] - expected))
        assert len(off) < 2 * SLOTS * (5 - ahead)
        assert float(made.stray[ahead - 1]) == pytest.approx(sorted(off)[(len(off) - 1) // 2], rel=1e-4)


# -- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(), ("model.masked_slots=1", "model.attention=parallel")])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    tmp_path: Path, shared_tracks: FeatureStore, parts: tuple[str, ...]
) -> None:
    config = small("checkpoint_every=2", *parts, preset="dynamics", optim__steps=6)
    whole = train(config, shared_tracks, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, shared_tracks, tmp_path / "broken", report=stopping(3))
    broken = train(config, shared_tracks, tmp_path / "broken", resume=True)
    a, b = (load_file(run / "checkpoint/model.safetensors") for run in (whole, broken))
    assert all(torch.equal(a[key], b[key]) for key in a) and rows_of(whole) == rows_of(broken)


def test_a_run_of_the_first_version_resumes_in_its_units_and_says_so(
    tmp_path: Path, shared_tracks: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which were the same for all frames."""
    losses = ("loss.slot_mse=1.0", "loss.slot_huber=0")
    config = small("checkpoint_every=2", *losses, preset="dynamics", optim__steps=4)
    with monkeypatch.context() as earlier:
        earlier.setattr(DynamicsModel, "near", 1.0)
        whole = train(config, shared_tracks, tmp_path / "whole")
        with pytest.raises(Interrupted):
            train(config, shared_tracks, tmp_path / "broken", report=stopping(3))
    weights = tmp_path / "broken/checkpoint/model.safetensors"
    save_file({key: value for key, value in load_file(weights).items() if key != "stray"}, weights)
    told: list[str] = []
    broken = train(config, shared_tracks, tmp_path / "broken", resume=True, remark=told.append)
    assert rows_of(whole) == rows_of(broken)
    assert "broken: begun by a version that kept no units of places for loss.slot_mse; it goes on" in told[-1]
    told.clear()
    train(config, shared_tracks, broken, resume=True, remark=told.append)
    assert not any("begun by" in line for line in told), "saved again, it has them"


def test_accumulated_parts_are_the_whole_batch(tmp_path: Path, shared_tracks: FeatureStore) -> None:
    """So are the shares of ranks, which draw and average alike."""
    losses = []
    for parts in (1, 2, 4):
        config = small("model.masked_slots=1", f"optim.accumulate={parts}", preset="dynamics", optim__steps=4)
        losses.append([row["loss"] for row in rows_of(train(config, shared_tracks, tmp_path / str(parts)))])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-4)


def test_it_learns_the_discs_drift(tmp_path: Path, shared_tracks: FeatureStore) -> None:
    config = small("optim.learning_rate=0.01", preset="dynamics", optim__steps=60)
    rows = rows_of(train(config, shared_tracks, tmp_path / "run"))
    assert np.mean([row["loss"] for row in rows[-5:]]) < 0.8 * np.mean([row["loss"] for row in rows[:5]])


def test_what_cannot_be_predicted_is_one_line(
    tmp_path: Path, shared_store: FeatureStore, shared_tracks: FeatureStore
) -> None:
    with pytest.raises(
        IncompatibleError, match=r"has no tracks, .* slotlab slots RUN, or name a run with --run \(train\)"
    ):
        train(small(preset="dynamics"), shared_store, tmp_path / "run")
    with pytest.raises(UsageError, match=r"the longest video has 6 frames, and data.clip = 9 \(model.burn_in = 3 of"):
        train(small("data.clip=9", preset="dynamics"), shared_tracks, tmp_path / "run")
    with pytest.raises(UsageError, match=r"train with --set data.clip=6 --set model.burn_in=5$"):
        train(small("data.clip=9", "model.burn_in=8", preset="dynamics"), shared_tracks, tmp_path / "run")
    with pytest.raises(UsageError, match="data.clip must be above model.burn_in"):
        small("data.clip=3", preset="dynamics")
    with pytest.raises(UsageError, match="needs data.normalize = channel and data.center"):
        small("data.normalize=whiten", preset="dynamics")
    with pytest.raises(UsageError, match="loss.slot_mse needs model.kind = dynamics"):
        small("loss.slot_mse=1.0")
    assert not (tmp_path / "run").exists()


def test_tracks_that_hold_nothing_are_not_learnt_from(shared_tracks: FeatureStore) -> None:
    config = small(preset="dynamics")
    made = build_model(config, shared_tracks)
    with pytest.raises(DataError, match="the tracks hold no finite slots; make them again with slotlab slots RUN"):
        made.calibrate([torch.zeros(4, 3, made.normaliser.dim + 16)])
