"""What is special to the published recipes: slots that grow, slots that are matched, slots that decode later frames."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import UsageError
from slotlab.config.load import load_config
from slotlab.config.model import SlotAttentionConfig
from slotlab.config.schema import LossConfig
from slotlab.models.base import Output
from slotlab.models.curriculum import Curriculum
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.models.slot_attention import Attended
from slotlab.models.slot_model import SlotModel
from slotlab.training.losses import slot_contrast, structure
from slotlab.training.processes import Ranks
from slotlab.training.step import TrainStep

B, T, N, K, S, D = 2, 3, 36, 6, 8, 12
GRID = (6, 6)
CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(grid: tuple[int, int] = GRID, **options: Any) -> SlotModel:
    torch.manual_seed(0)
    plain = {"slots": K, "slot_dim": S, "slot_mlp_hidden": 16, "decoder": {"kind": "mlp", "hidden": 16}}
    return SlotModel(SlotAttentionConfig.model_validate(plain | options), Normaliser("none", D), grid)


def output_of(slots: Tensor, found: Tensor | None = None, true: Tensor | None = None) -> Output:
    """The output of clips with these slots (B, T, K, S) and tokens (B, T, 16, D); its masks are equal shares."""
    found = draw(*slots.shape[:2], 16, D) if found is None else found
    shares = torch.full((*slots.shape[:3], 16), 1 / slots.shape[2])
    return Output(slots, shares, shares, shares, found, found if true is None else true, (4, 4))


# -- grounded -------------------------------------------------------------------------------------------


def two_blobs() -> tuple[Tensor, list[list[int]]]:
    """Features of eight frames of two blobs that pass each other on a plain floor, and where their middles are."""
    rows, columns = 6, 10
    features = torch.eye(D)[0].expand(8, rows, columns, D).clone()
    middles = []
    for t in range(8):
        places = ((1, t + 1), (4, 8 - t))
        for blob, (row, column) in enumerate(places):
            features[t, row - 1 : row + 2, column - 1 : column + 2] = torch.eye(D)[1 + blob]
        middles.append([row * columns + column for row, column in places])
    return features.flatten(1, 2) + 0.02 * draw(8, rows * columns, D), middles


@torch.no_grad()
def test_matched_slots_stay_with_their_objects() -> None:
    video, middles = two_blobs()
    predictor = {"kind": "hungarian", "first_iterations": 1}
    parts = {"slots": 3, "slot_dim": D, "projection": "linear", "iterations": 1, "temperature": 0.2}
    model = build((6, 10), initializer="saliency", predictor=predictor, **parts).eval()
    for layer in (model.project, model.recur.attend.to_key, model.recur.attend.to_query):
        torch.nn.init.eye_(layer.weight)  # type: ignore[arg-type]
    attention = model.segment(video, Draws(0)).attention  # (T, K, N)
    holders = [attention[t, :, middles[t]].argmax(0).tolist() for t in range(len(video))]
    assert len(set(holders[0])) == 2 and holders == [holders[0]] * len(video)
    apart = [model(frame[None], Draws(0)).attention[0] for frame in video]
    alone = [attention[:, middle].argmax(0).tolist() for attention, middle in zip(apart, middles, strict=True)]
    assert any(a != b for a, b in pairwise(alone)), "the order of the peaks alone would not do"


def test_matching_changes_the_order_of_the_slots_and_nothing_else() -> None:
    recur = build(initializer="saliency", predictor={"kind": "hungarian"}).recur
    first, order = F.normalize(draw(B, K, S), dim=-1), torch.stack([torch.randperm(K), torch.randperm(K)])
    index = order.unsqueeze(-1)
    mixed = first.gather(1, index.expand(-1, -1, S)) + 0.01 * draw(B, K, S, seed=1)
    marks = order.unsqueeze(-1).expand(-1, -1, N).float()
    frames = [Attended(slots, marks, marks) for slots in (first, mixed)]
    found = recur.matched(frames)[1]
    torch.testing.assert_close(found.slots, first, atol=0.05, rtol=0)
    assert torch.equal(found.attention[..., 0], torch.arange(K).float().expand(B, K))


def test_what_is_matched_learns() -> None:
    model = build(initializer="saliency", predictor={"kind": "hungarian"})
    output = model(draw(B, T, N, D), Draws(0))
    config = LossConfig(slot_contrast=1.0)
    slot_contrast(output, config).backward()  # type: ignore[no-untyped-call]
    assert float(model.project[3].weight.grad.abs().max()) > 0  # type: ignore[index]


# -- slotcurri ------------------------------------------------------------------------------------------


def test_new_slots_start_beside_those_with_the_error() -> None:
    curriculum = Curriculum(first=2, slots=8)
    curriculum.error[:2] = torch.tensor([0.9, 0.3])
    before = 10 * torch.eye(8)[None].clone()
    queries = before.clone()
    calm = [curriculum.grow(queries, step, 40, Draws(0), lambda value: value) for step in (1, 3)]
    assert calm == [False, False] and torch.equal(queries, before)
    assert curriculum.grow(queries, 4, 40, Draws(0), lambda value: value)
    assert curriculum.active()[0].tolist() == [True] * 4 + [False] * 4
    assert torch.equal(queries[0, :2], before[0, :2]) and torch.equal(queries[0, 4:], before[0, 4:])
    distance = torch.cdist(queries[0, 2:4], before[0, :2])  # 1.5 of two new ones are due to the first, 0.5 to the other
    assert distance.argmin(1).tolist() == [0, 0] or distance.argmin(1).tolist() == [0, 1]
    reach = 0.2 * 10 * 2**0.5
    torch.testing.assert_close(distance.min(1).values, torch.full((2,), reach))


def test_slots_are_added_while_it_trains_and_stay() -> None:
    overrides = ["model.slots=6", "model.slot_dim=8", "model.slot_mlp_hidden=16", "model.projection_hidden=16"]
    overrides += ["model.decoder.hidden=16", "model.predictor.hidden=16", "data.clip=2", "optim.batch_size=2"]
    config = load_config("slotcurri", None, [*overrides, "optim.steps=20", "optim.ema=0.5", "data.normalize=none"])
    model = SlotModel.of(config, Normaliser("none", D), GRID)
    step = TrainStep(config, model, Ranks(CPU))
    held, losses = [], []
    for index in range(7):
        taken = step(draw(2, 2, N, D, seed=index))
        losses.append(float(taken.components["slot_contrast"]))
        assert step.average is not None
        with torch.no_grad():
            held.append(
                [int((m(draw(1, 2, N, D), Draws(0)).masks.amax(-1) > 0)[0, 0].sum()) for m in (model, step.best)]
            )
    assert held == [[2, 2], [3, 3], [3, 3], [3, 3], [6, 6], [6, 6], [6, 6]]
    assert losses[0] < np.log(4) + 1, "of two clips of two slots: chance is the logarithm of four"


def test_contrast_leaves_out_slots_that_take_no_part() -> None:
    slots, active = draw(B, T, K, S), torch.arange(K).expand(B, T, K) < 4
    config = LossConfig(slot_contrast=1.0)
    few = slot_contrast(output_of(slots[:, :, :4]), config)
    torch.testing.assert_close(slot_contrast(replace(output_of(slots), active=active), config), few)


def test_structure_is_what_its_paper_defines() -> None:
    """By its definition, window for window; a single frame has no neighbours in time."""
    offsets = np.arange(-1, 2)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    line /= line.sum()
    for clip in (1, 3):  # the window is shorter along an axis that is
        true, found = draw(B, clip, 16, 2), draw(B, clip, 16, 2, seed=1)
        window = np.einsum("i,j,k->ijk", line if clip > 1 else [1.0], line, line)
        kept = []
        for b in range(B):
            both = torch.cat([true[b].flatten(), found[b].flatten()])
            x, y = (
                ((v[b] - both.min()) / (both.max() - both.min() + 1e-6)).view(clip, 4, 4, 2).double().numpy()
                for v in (found, true)
            )
            for c in range(2):
                for i in range(2):
                    for j in range(2):
                        a, b_ = (v[:, i : i + 3, j : j + 3, c] for v in (x, y))
                        mean, mean_ = (window * a).sum(), (window * b_).sum()
                        cross = (window * (a - mean) * (b_ - mean_)).sum()
                        spread = (window * (a - mean) ** 2).sum() + (window * (b_ - mean_) ** 2).sum()
                        place = (2 * mean * mean_ + 0.01**2) / (mean**2 + mean_**2 + 0.01**2)
                        kept.append(place * (2 * cross + 0.03**2) / (spread + 0.03**2))
        output = output_of(draw(B, clip, K, S), found, true)
        assert float(structure(output, LossConfig(structure=1.0))) == pytest.approx(1 - np.mean(kept), abs=1e-5)


def test_structure_needs_all_patches() -> None:
    model = build(decoder={"kind": "mlp", "hidden": 16, "patches": 5})
    with pytest.raises(UsageError, match="needs all patches"):
        structure(model(draw(B, N, D), Draws(0)), LossConfig(structure=1.0))


@torch.no_grad()
def test_there_and_back_is_the_video_reversed_from_its_last_slots() -> None:
    parts = {"initializer": "learnt", "iterations": 1, "predictor": {"kind": "mlp", "hidden": 16}}
    model, plain = build(there_and_back=True, **parts).eval(), build(**parts).eval()
    video = draw(T, N, D)
    found, there = model.segment(video, Draws(0)).slots, plain.segment(video, Draws(0)).slots
    torch.testing.assert_close(found[-1], there[-1])
    slots = there[-1][None]
    for t in reversed(range(T - 1)):
        assert plain.recur.predict is not None
        slots = plain.recur.attend(plain.project(video[t][None]), plain.recur.predict(slots), 1).slots
        torch.testing.assert_close(found[t], slots[0])
    torch.testing.assert_close(model(video[None], Draws(0)).slots[0], there, msg="training goes there alone")


# -- semantic-slots -------------------------------------------------------------------------------------


@torch.no_grad()
def test_frames_train_what_carries_slots_in_use() -> None:
    config = load_config("semantic-slots")
    assert config.data.clip == 1 and config.model.carries
    model = build(gradient="bilevel", iterations=2, predictor={"kind": "identity", "first_iterations": 2}).eval()
    video = draw(T, N, D)
    slots = model.segment(video, Draws(0)).slots
    for t in range(1, T):
        expected = model.recur.attend(model.project(video[t][None]), slots[t - 1][None], 2).slots[0]
        torch.testing.assert_close(slots[t], expected)
    with pytest.raises(UsageError, match="needs clips"):
        load_config("semantic-slots", None, ["model.predictor.kind=mlp"])
