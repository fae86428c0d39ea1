"""Losses, each against a plain loop or a closed form."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from featcache.errors import UsageError
from slotlab.config.schema import LossConfig
from slotlab.models.base import Output
from slotlab.scoring.collapse import live_slots, mask_similarity
from slotlab.training.losses import LOSSES, losses, total

B, T, K, N, S, D = 2, 3, 4, 9, 5, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output(positions: Tensor | None = None, clips: bool = True, slots: int = K) -> Output:
    lead, decoded = ((B, T) if clips else (B,)), N if positions is None else len(positions)
    logits = draw(*lead, slots, N, seed=1)
    return Output(
        slots=draw(*lead, slots, S, seed=2),
        attention=logits.softmax(-2),
        logits=logits,
        masks=draw(*lead, slots, decoded, seed=3).softmax(-2),
        reconstruction=draw(*lead, decoded, D, seed=4),
        target=draw(*lead, N, D, seed=5),
        grid=(1, N),
        positions=positions,
        similarity=draw(*lead, decoded, N, seed=6) if clips else None,
        assigned=(torch.arange(N) % slots).expand(*lead, N),
    )


def predicted(given: Output) -> Output:
    """As a model that predicts slots gives it."""
    future = draw(*given.slots.shape, seed=7)
    return replace(given, future=future, present=future[..., 0] > 0)


def value(name: str, given: Output, **options: float) -> float:
    return float(LOSSES[name](given, LossConfig(**options)))  # type: ignore[arg-type]


@pytest.mark.parametrize("positions", [None, torch.tensor([1, 4, 8])])
def test_cosine(positions: Tensor | None) -> None:
    given = output(positions)
    found = []
    for b in range(B):
        for t in range(T):
            for m, n in enumerate(range(N) if positions is None else positions.tolist()):
                x, y = given.reconstruction[b, t, m], given.target[b, t, n]
                found.append(1 - float(x @ y / (x.norm() * y.norm())))
    assert value("cosine", given) == pytest.approx(sum(found) / len(found), rel=1e-5)


@pytest.mark.parametrize("positions", [None, torch.tensor([1, 4, 8])])
def test_layer_norm_mse_does_not_see_a_token_s_mean_and_scale(positions: Tensor | None) -> None:
    given = output(positions)
    true = given.target if positions is None else given.target[:, :, positions]
    unit = [
        (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True) for x in (given.reconstruction, true)
    ]
    expected = float((unit[0] - unit[1]).square().mean())
    assert value("layer_norm_mse", given) == pytest.approx(expected, rel=1e-3)
    changed = replace(given, target=50 * given.target + 3)
    assert value("layer_norm_mse", changed) == pytest.approx(expected, rel=1e-3)


def test_slot_diversity() -> None:
    given = output()
    given.masks[0, 1, 2] = 0.0  # that slot holds nothing, and counts in no pair
    found = []
    for b in range(B):
        for t in range(T):
            slots = [given.slots[b, t, k] for k in range(K) if (b, t, k) != (0, 1, 2)]
            pairs = [float(x @ y / (x.norm() * y.norm())) for x, y in itertools.combinations(slots, 2)]
            found.append(sum(pairs) / len(pairs))
    assert value("slot_diversity", given) == pytest.approx(sum(found) / len(found), rel=1e-5)


@pytest.mark.parametrize("positions", [None, torch.tensor([1, 4, 8])])
@pytest.mark.parametrize("shift", [1, 2])
def test_temporal_similarity(positions: Tensor | None, shift: int) -> None:
    given = output(positions)
    given.target[0, 0, 4] = 0.0  # no direction: all patches are alike
    given.target[1, 0, 8] = -given.target[1, shift].sum(0)  # away from most of them
    assert given.similarity is not None
    found = []
    for b in range(B):
        for t in range(T - shift):
            for m, n in enumerate(range(N) if positions is None else positions.tolist()):
                x = given.target[b, t, n]
                cosines = [float(x @ y / max(1e-12, float(x.norm() * y.norm()))) for y in given.target[b, t + shift]]
                weights = [math.exp(c / 0.075) if c >= 0 else 0.0 for c in cosines]
                if not any(weights):
                    weights = [1.0] * N
                logits = given.similarity[b, t, m]
                log_shares = [float(logit - logits.logsumexp(0)) for logit in logits]
                found.append(-sum(w / sum(weights) * s for w, s in zip(weights, log_shares, strict=True)))
    expected = sum(found) / len(found)
    assert value("temporal_similarity", given, similarity_shift=shift) == pytest.approx(expected, rel=1e-4)


def test_temporal_similarity_where_all_later_patches_are_away() -> None:
    given = output()
    given.target[:] = 1.0
    given.target[:, 0] = -1.0
    assert given.similarity is not None
    given.similarity[:] = 0.0
    assert value("temporal_similarity", given) == pytest.approx(math.log(N), rel=1e-5)


def test_slot_contrast() -> None:
    given = output()
    found = []
    for t in range(1, T):
        earlier = [given.slots[b, t - 1, k] for b in range(B) for k in range(K)]
        for b in range(B):
            for k in range(K):
                slot = given.slots[b, t, k]
                scores = torch.stack([slot @ e / (slot.norm() * e.norm()) / 0.1 for e in earlier])
                found.append(float(scores.logsumexp(0) - scores[b * K + k]))
    assert value("slot_contrast", given) == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_slots_that_stay_themselves_have_little_contrast_left() -> None:
    given = output()
    apart = torch.eye(B * K).view(B, 1, K, B * K).expand(B, T, K, B * K)
    least = math.log(1 + (B * K - 1) * math.exp(-10))  # all cosines with others 0
    assert value("slot_contrast", replace(given, slots=apart)) == pytest.approx(least, rel=1e-3)
    collapsed = torch.ones(B, T, K, S)
    assert value("slot_contrast", replace(given, slots=collapsed)) == pytest.approx(math.log(B * K))


@pytest.mark.parametrize("clips", [True, False])
def test_diversity_is_the_mask_similarity_that_is_reported(clips: bool) -> None:
    given = output(clips=clips)
    masks = given.masks.reshape(-1, K, N)
    assert value("diversity", given) == pytest.approx(float(mask_similarity(masks).mean()), rel=1e-5)
    given.masks[..., 0, :] = 0  # a slot that pads a sample, or that the frame does not need
    given.masks[:1, ..., 1, :] = 0
    masks = given.masks.reshape(-1, K, N)
    reported = mask_similarity(masks, live_slots(masks)).mean()
    assert value("diversity", given) == pytest.approx(float(reported), rel=1e-5)


def test_diversity_and_sharpness_at_their_ends() -> None:
    given = output()
    given.masks[:] = 1 / K
    assert value("diversity", given) == pytest.approx(1)
    assert value("sharpness", given) == pytest.approx(1)
    given.masks[:] = torch.eye(K)[torch.arange(N) % K].T
    assert value("diversity", given) == pytest.approx(0, abs=1e-6)
    assert value("sharpness", given) == pytest.approx(0, abs=1e-6)
    one = output(slots=1)
    assert value("diversity", one) == value("sharpness", one) == 0


def test_sharpness() -> None:
    given = output()
    found = [
        -sum(float(p * p.log()) for p in given.masks[b, t, :, n]) / math.log(K)
        for b in range(B)
        for t in range(T)
        for n in range(N)
    ]
    assert value("sharpness", given) == pytest.approx(sum(found) / len(found), rel=1e-5)


@pytest.mark.parametrize("clips", [True, False])
def test_assignment(clips: bool) -> None:
    given = output(clips=clips)
    assert given.assigned is not None
    logits, assigned = given.logits.reshape(-1, K, N), given.assigned.reshape(-1, N)
    found = [
        math.log(sum(math.exp(float(v)) for v in logits[f, :, n])) - float(logits[f, k, n])
        for f in range(len(logits))
        for n, k in enumerate(assigned[f].tolist())
    ]
    assert value("assignment", given) == pytest.approx(sum(found) / len(found), rel=1e-5)
    with pytest.raises(UsageError, match=r"assignment: needs model\.kind = agglomerative"):
        value("assignment", replace(given, assigned=None))


@pytest.mark.parametrize("name", ["slot_mse", "slot_huber"])
def test_slot_errors(name: str) -> None:
    given = predicted(output())
    assert given.future is not None and given.present is not None
    error = ((given.slots.double() - given.future.double()) ** 2).numpy().mean(-1)
    if name == "slot_huber":  # of scipy, at 1; twice, so that small errors are their squares
        error = 2 * scipy.special.pseudo_huber(1.0, np.sqrt(error))
    assert value(name, given) == pytest.approx((error * given.present.numpy()).mean(), rel=1e-5)
    with pytest.raises(UsageError, match=name):
        value(name, replace(given, future=None))


def test_all_losses_have_finite_gradients_and_add_up() -> None:
    given = predicted(output())
    given.masks[:] = torch.eye(K)[torch.arange(N) % K].T  # hard: where an entropy's slope is infinite
    leaves = [given.slots, given.masks, given.logits, given.reconstruction, given.similarity]
    for leaf in leaves:
        assert leaf is not None
        leaf.requires_grad_()
    config = LossConfig.model_validate({name: 0.5 for name in LOSSES})
    components = losses(given, config)
    assert set(components) == set(LOSSES)
    loss = total(components, config)
    assert float(loss.detach()) == pytest.approx(0.5 * sum(float(c.detach()) for c in components.values()))
    loss.backward()
    assert all(leaf is not None and leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_losses_of_video_refuse_images() -> None:
    for name in ("temporal_similarity", "slot_contrast"):
        with pytest.raises(UsageError, match=name):
            value(name, output(clips=False))
