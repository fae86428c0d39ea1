"""Slots compete for the patches of frames: the attention of slot attention, in as few operations as it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from slotlab.models.repeated import joined

EPSILON = 1e-8  # keeps the mean of a slot without patches finite
TAIL = 4  # columns after keys and values
NEVER = -1e9  # a logit whose softmax is 0; finite, so that a frame without any active slot gives no NaN


@dataclass(frozen=True)
class Projected:
    """What slots attend to, as one product makes it: of every patch a key, which holds the map of the queries and the
    scale too; a value, which may hold a map of what the means of values go to; and a 1, whose weighted sum is the sum
    of the weights, with zeros after it, so that rows of float32 begin at multiples of 16 bytes."""

    rows: Float[Tensor, "B T N W"]  # W = S + V + TAIL
    width: int  # S, of a key

    def frames(self, active: Bool[Tensor, "B K"] | None = None) -> list[Patches]:
        """The patches of each frame; ``active``: False for slots that get none.

        Autograd takes two products and two additions after every round for the gradients of keys and values. Here they
        wait, as in :mod:`slotlab.models.repeated`: at the end of the backward pass, two products give those of all
        rounds and frames.
        """
        rows, end = self.rows, None
        rounds: list[list[Round]] = [[] for _ in range(rows.shape[1])]
        if torch.is_grad_enabled() and rows.requires_grad and not torch.compiler.is_compiling():
            end = _End.apply(rounds, rows)
            rows = rows.detach()
        key, value = rows[..., : self.width], rows[..., self.width : 1 - TAIL]
        least = value.sum(-2, keepdim=True)  # (B, T, 1, V + 1)
        padding = None if active is None else hide_padding(key.new_zeros(*active.shape, 1), active)
        frames = zip(key.unbind(1), value.unbind(1), least.unbind(1), rounds, strict=True)
        return [Patches(keys, values, sums, active, padding, end, of) for keys, values, sums, of in frames]


@dataclass(frozen=True)
class Patches:
    """The patches of one frame."""

    key: Float[Tensor, "B N S"]
    value: Float[Tensor, "B N U"]  # U = V + 1: and a 1
    least: Float[Tensor, "B 1 U"]  # their sum, of which every slot gets EPSILON
    active: Bool[Tensor, "B K"] | None  # False: a slot that gets none
    padding: Float[Tensor, "B K 1"] | None  # what is added to the logits of each slot
    end: Tensor | None  # precedes all rounds, so that its gradient comes after theirs
    rounds: list[Round]

    def shared_among(
        self, slots: Float[Tensor, "B K S"]
    ) -> tuple[Float[Tensor, "B K V"], Float[Tensor, "B K N"], Float[Tensor, "B K N"], Float[Tensor, "B K S"]]:
        """Each slot's mean value, weighted by its attention; the attention, which sums to one over the slots at every
        patch; the logits before it; and the slots as they are, for what follows: the product that gives their gradient
        then adds to that of what follows."""
        if self.end is None or not torch.is_grad_enabled():
            return *self.means(slots)[:3], slots
        means, attention, logits, passed = _Shared.apply(slots, self.end, self)
        return means, attention, logits, passed

    def means(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same, and the sums of the weights (B, K, 1)."""
        keys = self.key.mT
        logits = torch.bmm(slots, keys) if self.padding is None else torch.baddbmm(self.padding, slots, keys)
        attention = logits.softmax(1)
        sums = torch.baddbmm(self.least, attention, self.value, beta=EPSILON)  # (B, K, V + 1)
        weight = sums[..., -1:]
        return sums[..., :-1] / weight, attention, logits, weight


class Round(NamedTuple):
    """What the gradients of keys and values are found from."""

    slots: Float[Tensor, "B K S"]
    attention: Float[Tensor, "B K N"]
    of_logits: Float[Tensor, "B K N"]  # their gradient
    of_sums: Float[Tensor, "B K V"]  # and that of the values' sums, before their division


class _Shared(torch.autograd.Function):
    """:meth:`Patches.shared_among`; going back, it notes what keys and values wait for."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, end: Tensor, patches: Patches) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        means, attention, logits, weight = patches.means(slots)
        ctx.patches = patches
        ctx.save_for_backward(slots, means, attention, weight)
        ctx.set_materialize_grads(False)
        return means, attention, logits, slots.view_as(slots)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        of_means: Tensor | None,
        of_attention: Tensor | None,
        of_logits: Tensor | None,
        of_passed: Tensor | None,
    ) -> tuple[Tensor | None, None, None]:
        slots, means, attention, weight = ctx.saved_tensors
        of_sums = torch.zeros_like(means) if of_means is None else of_means / weight
        # A mean moves by the distance of a patch from it.
        middle = (of_sums.unsqueeze(-2) @ means.unsqueeze(-1)).squeeze(-1)  # (B, K, 1)
        through = torch.baddbmm(middle, of_sums, ctx.patches.value[..., :-1].mT, beta=-1)  # (B, K, N)
        if of_attention is not None:
            through = through + of_attention
        through = torch.ops.aten._softmax_backward_data(through, attention, 1, attention.dtype)
        if of_logits is not None:
            through = through + of_logits
        ctx.patches.rounds.append(Round(slots, attention, through, of_sums))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        key = ctx.patches.key
        of_slots = torch.bmm(through, key) if of_passed is None else torch.baddbmm(of_passed, through, key)
        return of_slots, None, None


class _End(torch.autograd.Function):
    """The node of a graph that gives keys and values their gradients, when all rounds have had theirs."""

    @staticmethod
    def forward(ctx: Any, rounds: Sequence[list[Round]], rows: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.rounds, ctx.shape = rounds, rows.shape
        return rows.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[None, Tensor | None]:
        most = max(map(len, ctx.rounds))
        if most == 0:
            return None, None
        some = next(rounds[0] for rounds in ctx.rounds if rounds)
        if any(len(rounds) < most for rounds in ctx.rounds):  # rounds that others lack, and which add nothing
            some = some._replace(of_logits=torch.zeros_like(some.of_logits), of_sums=torch.zeros_like(some.of_sums))
        filled = [round for rounds in ctx.rounds for round in [*rounds, *[some] * (most - len(rounds))]]
        for rounds in ctx.rounds:
            rounds.clear()
        clips, frames, *patch = ctx.shape
        batch, count = clips * frames, most * some.slots.shape[1]
        slots, attention, of_logits, of_sums = (
            joined(parts, 1).reshape(batch, count, -1) for parts in zip(*filled, strict=True)
        )
        found = slots.new_empty(batch, *patch)
        sizes = [slots.shape[-1], of_sums.shape[-1], TAIL]
        of_key, of_value, of_tail = torch.split(found, sizes, -1)
        torch.bmm(of_logits.mT, slots, out=of_key)
        torch.baddbmm(of_sums.sum(1, keepdim=True), attention.mT, of_sums, beta=EPSILON, out=of_value)
        of_tail.zero_()
        return None, found.view(ctx.shape)


def hide_padding(logits: Float[Tensor, "B K N"], active: Bool[Tensor, "B K"] | None) -> Float[Tensor, "B K N"]:
    """The logits with padded slots (``active`` False) set so low that the softmax over slots gives them 0."""
    return logits if active is None else logits.masked_fill(~active.unsqueeze(-1), NEVER)
