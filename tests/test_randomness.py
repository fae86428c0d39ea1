"""Draws: the same however a batch is split, and different from step to step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotlab.models.randomness import DrawnAhead, Draws, Share


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


KINDS = ("normal", "exponential", "uniform", "integers", "choice")


def draw(draws: Draws, sizes: list[tuple[str, int]]) -> list[torch.Tensor]:
    """One draw after the other, of any kinds."""
    return [
        getattr(draws, kind)(9 * size, size)
        if kind in ("integers", "choice")
        else getattr(draws, kind)((2, size), None)
        for kind, size in sizes
    ]


@given(
    sizes=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 4)), min_size=1, max_size=6),
    step=st.integers(0, 2**20),
    share=st.sampled_from([Share(), Share(0, 2), Share(2, 3)]),
)
def test_what_is_drawn_ahead_is_what_would_have_been_drawn(
    sizes: list[tuple[str, int]], step: int, share: Share
) -> None:
    rehearsed = Draws(0)
    draw(rehearsed, sizes)
    ahead = DrawnAhead(Draws.of_step(3, step, share), rehearsed.requests)
    assert all(map(torch.equal, draw(ahead, sizes), draw(Draws.of_step(3, step, share), sizes)))
    with pytest.raises(RuntimeError, match="another draw than the one before it"):
        ahead.normal((1,))


@pytest.mark.parametrize("asked", [("normal", 3), ("uniform", 2)])
def test_another_draw_than_was_foreseen_is_refused(asked: tuple[str, int]) -> None:
    rehearsed = Draws(0)
    draw(rehearsed, [("normal", 2)])
    with pytest.raises(RuntimeError, match="another draw than the one before it"):
        draw(DrawnAhead(Draws(1), rehearsed.requests), [asked])
