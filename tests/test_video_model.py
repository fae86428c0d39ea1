"""Slots carried over clips: the recurrence, where it starts afresh, and where its gradient ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from featcache.errors import UsageError
from slotlab.config.load import load_config
from slotlab.config.model import SlotAttentionConfig
from slotlab.config.schema import LossConfig
from slotlab.models.base import Output
from slotlab.models.normalise import Normaliser
from slotlab.models.predictors import PREDICTORS
from slotlab.models.randomness import Draws
from slotlab.models.slot_model import SlotModel
from slotlab.training.losses import losses, total

B, T, N, K, S, D = 2, 5, 16, 4, 8, 12
CARRYING = [kind for kind in PREDICTORS if kind != "hungarian"]  # from frame to frame


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(
    decoder: dict[str, Any] | None = None,
    similarity: bool = False,
    initializer: str = "gaussian",
    slots: int = K,
    fewest_slots: int | None = None,
    **predictor: Any,
) -> SlotModel:
    torch.manual_seed(0)
    config = SlotAttentionConfig.model_validate(
        {
            "slots": slots, "fewest_slots": fewest_slots, "slot_dim": S, "slot_mlp_hidden": 16,
            "initializer": initializer, "iterations": 1,
            "decoder": {"kind": "mlp", "hidden": 16, **(decoder or {})},
            "predictor": {"kind": "mlp", "hidden": 16, "first_iterations": 2, **predictor},
        }
    )  # fmt: skip
    return SlotModel(config, Normaliser("none", D), (4, 4), similarity=similarity)


def step_by_step(model: SlotModel, video: Tensor, draws: Draws, refresh: int = 0) -> list[Tensor]:
    """Slots of each frame of (T, N, D), from whole parts alone and one frame at a time."""
    recur, slots, found = model.recur, None, []
    assert recur.predict is not None
    for index, frame in enumerate(video):
        tokens = model.project(frame[None])
        fresh = index == 0 or (refresh > 0 and index % refresh == 0)
        start = recur.initialize(tokens, frame[None], draws) if fresh else recur.predict(slots)
        slots = recur.attend(tokens, start, 2 if fresh else 1).slots
        found.append(slots[0])
    return found


@pytest.mark.parametrize("kind", CARRYING)
@pytest.mark.parametrize("refresh", [0, 2])
@torch.no_grad()
def test_a_video_is_segmented_frame_by_frame(kind: str, refresh: int) -> None:
    model = build(kind=kind, refresh=refresh, output_norm=True).eval()
    video = draw(T, N, D)
    output = model.segment(video, Draws(0))
    slots = torch.stack(step_by_step(model, video, Draws(0), refresh))
    torch.testing.assert_close(output.slots, slots)
    assert output.masks.shape == output.attention.shape == (T, K, N)
    learnt = build(kind=kind, refresh=refresh, output_norm=True, initializer="learnt").eval()
    clips = torch.stack([draw(T, N, D, seed=1), video])
    torch.testing.assert_close(learnt(clips, Draws(0)).slots[1], learnt.segment(video, Draws(0)).slots)


@torch.no_grad()
def test_later_frames_do_not_change_earlier_ones() -> None:
    model = build().eval()
    video = draw(T, N, D)
    whole, part = model.segment(video, Draws(0)), model.segment(video[:3], Draws(0))
    for name in ("slots", "masks", "attention", "reconstruction"):
        torch.testing.assert_close(getattr(whole, name)[:3], getattr(part, name))


@torch.no_grad()
def test_a_frame_is_a_clip_of_one() -> None:
    model = build().eval()
    frames = draw(B, N, D)
    of_frames, of_clips = model(frames, Draws(0)), model(frames[:, None], Draws(0))
    torch.testing.assert_close(of_frames.slots, of_clips.slots[:, 0])
    assert of_frames.masks.shape == (B, K, N)


def test_refresh_forgets() -> None:
    """What came before the refresh has no say in what comes after."""
    for refresh, forgets in ((0, False), (2, True)):
        model = build(refresh=refresh).eval()
        one, two = draw(T, N, D), draw(T, N, D)
        two[:2] += draw(2, N, D, seed=1)
        with torch.no_grad():
            a, b = (model.segment(video, Draws(0)).slots[2:] for video in (one, two))
        assert torch.allclose(a, b) == forgets


@pytest.mark.parametrize("kind", CARRYING)
@pytest.mark.parametrize("decoder", ["mlp", "mix", "slot_mixer", "spatial_broadcast", "transformer"])
def test_a_clip_trained_on_some_of_the_slots_has_no_others(kind: str, decoder: str) -> None:
    model = build({"kind": decoder}, kind=kind, initializer="learnt", fewest_slots=2)
    clips = draw(16, T, N, D)
    output = model(clips, Draws(0))
    active = output.masks.sum(-1) > 0  # (B, T, K)
    assert bool((active == active[:, :1]).all()), "the same ones in all frames"
    assert torch.equal(output.attention.sum(-1) > 0, active)
    assert set(active[:, 0].sum(-1).tolist()) == {2, 3, 4}
    assert set(active[:, 0].sum(0).tolist()) <= set(range(1, 16)), "each slot is left out now and then"
    for clip, used, mine in zip(clips, active[:, 0], map(output.sample, range(len(clips))), strict=True):
        few = build({"kind": decoder}, kind=kind, initializer="learnt", slots=int(used.sum()))
        state = model.state_dict()
        few.load_state_dict(state | {"recur.initialize.queries": state["recur.initialize.queries"][:, used]})
        alone = few(clip[None], Draws(0)).sample(0)
        torch.testing.assert_close(mine.reconstruction, alone.reconstruction)
        for name in ("slots", "masks", "attention"):
            torch.testing.assert_close(getattr(mine, name)[:, used], getattr(alone, name))
    assert bool((model.eval()(clips, Draws(0)).masks.sum(-1) > 0).all()), "in use there are all of them"


def test_padded_slots_leave_the_gradient_finite() -> None:
    model = build({"kind": "mlp"}, kind="transformer", fewest_slots=1)
    config = LossConfig(diversity=1.0, sharpness=1.0)
    total(losses(model(draw(8, T, N, D), Draws(0)), config), config).backward()
    norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    assert norms and max(norms) < 1e3


def test_too_many_are_the_fewest() -> None:
    with pytest.raises(ValidationError, match="fewest_slots = 5 is more than slots = 4"):
        build(fewest_slots=K + 1)
    with pytest.raises(UsageError, match="leave out model.fewest_slots"):
        load_config("slotcontrast", None, ["model.fewest_slots=3"])


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("kind", ["identity", "mlp", "transformer"])
def test_stop_gradient_parts_the_frames(stops: bool, kind: str) -> None:
    model = build(kind=kind, stop_gradient=stops)
    clips = draw(B, T, N, D).requires_grad_()
    output: Output = model(clips, Draws(0))
    (gradient,) = torch.autograd.grad(output.slots[:, 2].sum(), clips)
    reached = gradient.abs().amax((0, 2, 3)) > 0
    assert reached.tolist() == [not stops, not stops, True, False, False]


@pytest.mark.parametrize("kind", CARRYING)
@pytest.mark.parametrize("decoder", ["mlp", "mix", "slot_mixer", "transformer"])
def test_clips_train_every_part(kind: str, decoder: str) -> None:
    model = build({"kind": decoder}, similarity=True, kind=kind, output_norm=True, stop_gradient=True)
    names = ("feature_mse", "cosine", "temporal_similarity", "slot_contrast", "diversity", "sharpness")
    config = LossConfig.model_validate({name: 0.3 for name in names})
    clips = draw(B, 1, N, D) + 0.2 * draw(B, T, N, D, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen = []
    for _ in range(12):
        components = losses(model(clips, Draws(0)), config)
        optimizer.zero_grad()
        total(components, config).backward()
        optimizer.step()
        seen.append(float(components["feature_mse"].detach()))
    assert seen[-1] < 0.95 * seen[0]
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_patches_of_clips_are_the_same_in_all_frames() -> None:
    model = build({"patches": 6}, similarity=True)
    output = model(draw(B, T, N, D), Draws(0))
    assert output.masks.shape == (B, T, K, 6) and output.reconstruction.shape == (B, T, 6, D)
    assert output.attention.shape == (B, T, K, N)
    assert output.similarity is not None and output.similarity.shape == (B, T, 6, N)
    assert output.decoded_target.shape == (B, T, 6, D)
    every = LossConfig.model_validate({"temporal_similarity": 1, "cosine": 1, "diversity": 1})
    assert all(bool(value.isfinite()) for value in losses(output, every).values())


def test_parts_that_no_loss_looks_at_are_frozen() -> None:
    config = SlotAttentionConfig.model_validate({"slots": K, "slot_dim": S, "predictor": {"kind": "identity"}})
    model = SlotModel(config, Normaliser("none", D), (4, 4), reconstructs=False, similarity=True)
    loss = LossConfig(feature_mse=0, temporal_similarity=1)
    total(losses(model(draw(B, T, N, D), Draws(0)), loss), loss).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, p in model.named_parameters() if not p.requires_grad} != set()


def test_clips_need_a_predictor_and_predictors_a_gradient() -> None:
    model = SlotModel(SlotAttentionConfig(slots=K, slot_dim=S), Normaliser("none", D), (4, 4))
    with pytest.raises(ValueError, match="need a model with a predictor"):
        model(draw(B, T, N, D), Draws(0))
    with pytest.raises(ValidationError, match="never reaches a predictor"):
        SlotAttentionConfig.model_validate({"gradient": "implicit", "predictor": {"kind": "mlp"}})
    for parts in (
        {"slot_dim": 10, "predictor": {"kind": "transformer"}},
        {"slot_dim": 10, "decoder": {"kind": "slot_mixer"}},
        {"decoder": {"kind": "transformer", "hidden": 30}},
    ):
        with pytest.raises(ValidationError, match="do not divide"):
            SlotAttentionConfig.model_validate(parts)
