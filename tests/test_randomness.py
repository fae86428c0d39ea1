"""Draws: the same however a batch is split, and different from step to step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotlab.models.randomness import Draws, Share


@pytest.mark.parametrize("kind", ["normal", "exponential", "uniform"])
@given(parts=st.integers(1, 5), own=st.integers(1, 4), batch=st.integers(0, 2), seed=st.integers(0, 2**40))
def test_the_shares_of_a_batch_are_the_whole_batch(kind: str, parts: int, own: int, batch: int, seed: int) -> None:
    shape = [3, 2, 4]
    shape[batch] = own * parts
    whole = getattr(Draws(seed), kind)(tuple(shape), batch=batch)
    shape[batch] = own
    shares = [getattr(Draws(seed, Share(i, parts)), kind)(tuple(shape), batch=batch) for i in range(parts)]
    assert torch.equal(torch.cat(shares, batch), whole)
    assert {tuple(share.shape) for share in shares} == {tuple(shape)}


def test_what_a_batch_shares_is_the_same_in_every_share() -> None:
    one, other = (Draws(7, Share(i, 2)) for i in range(2))
    for first, second in ((one, other),):
        assert torch.equal(first.integers(1000, 5), second.integers(1000, 5))
        assert torch.equal(first.choice(50, 9), second.choice(50, 9))


def test_a_choice_is_sorted_and_without_repetition() -> None:
    chosen = Draws(0).choice(20, 8)
    assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == 8


def test_steps_and_seeds_draw_apart() -> None:
    values = [Draws.of_step(seed, step).normal((4,)) for seed in range(3) for step in range(3)]
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
