"""The competition for patches against its formula, line by line: results and every gradient, in fewer operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from slotlab.models.competition import EPSILON, TAIL, Projected
from slotlab.training.cost import Tally

B, T, N, K, S = 2, 3, 9, 4, 5
ACTIVE = torch.tensor([[True, True, False, True], [True, False, False, True]])

Found = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def projected(key: Tensor, value: Tensor) -> Projected:
    tail = F.pad(key.new_ones(*key.shape[:-1], 1), (0, TAIL - 1))
    return Projected(torch.cat([key, value, tail], -1), key.shape[-1])


def as_published(key: Tensor, value: Tensor, slots: Tensor, active: Tensor | None) -> Found:
    """Means, attention and logits of Locatello et al. (2020), algorithm 1, without the slots that take no part; and
    the slots."""
    logits = slots @ key.mT
    if active is not None:
        logits = logits.where(active.unsqueeze(-1), -torch.inf)
    attention = logits.softmax(1)
    weights = attention + EPSILON
    return weights / weights.sum(-1, keepdim=True) @ value, attention, logits, slots


@pytest.mark.parametrize("active", [None, ACTIVE], ids=["all slots", "some slots"])
@pytest.mark.parametrize("loses", [1.0, 60.0], ids=["near", "a slot without patches"])
def test_results_and_gradients_are_those_of_the_formula(active: Tensor | None, loses: float) -> None:
    """Over frames that take part in one, two and no rounds, one after the other, with each result in the loss."""
    key, value, slots = draw(B, T, N, S, seed=0), draw(B, T, N, S, seed=1), draw(B, K, S, seed=2)
    seen = torch.ones(B, K, 1) if active is None else active.unsqueeze(-1)
    mine = [frame.shared_among for frame in projected(key, value).frames(active)]
    theirs = [lambda given, t=t: as_published(key[:, t], value[:, t], given, active) for t in range(T)]  # type: ignore[misc]

    def found(rounds: list) -> tuple[Found, list[Tensor]]:  # type: ignore[type-arg]
        first = rounds[0](slots * torch.tensor([1.0, -loses, 1.0, loses])[:, None])
        middle = rounds[1](first[0] + slots)
        means, attention, logits, passed = rounds[1](middle[0].tanh())
        rounds[2](slots)  # no loss reaches it
        loss = (means * seen).square().sum() + (attention * draw(B, K, N, seed=3).detach()).sum()
        loss = loss + (logits.where(seen.bool(), 0.0) ** 3).sum() + first[1].square().sum() + (passed**3).sum()
        return (means * seen, attention, logits * seen, passed), list(torch.autograd.grad(loss, (key, value, slots)))

    ours, formula = found(mine), found(theirs)
    for result, expected in zip(ours[0][:2], formula[0][:2], strict=True):
        torch.testing.assert_close(result, expected)
    torch.testing.assert_close(ours[1], formula[1])


def test_a_further_round_adds_no_operation_for_the_gradients_of_keys_and_values() -> None:
    """Four there, and five on the way back: of the division, the means, the attention, its softmax and the slots."""

    def operations(rounds: int) -> int:
        tally = Tally()
        with FakeTensorMode(), tally:
            rows = torch.empty(B, T, N, 2 * S + TAIL, requires_grad=True)
            slots = torch.empty(B, K, S, requires_grad=True)
            frames = Projected(rows, S).frames()
            tally.restart()
            for _ in range(rounds):
                for frame in frames:
                    slots = frame.shared_among(slots)[0]
            slots.backward(torch.empty_like(slots))
        return tally.cost(0, 0).operations

    assert operations(5) - operations(4) == operations(9) - operations(8) == 9 * T
