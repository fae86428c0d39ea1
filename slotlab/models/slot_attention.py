"""Slot attention (Locatello et al., 2020, arXiv:2006.15055)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from slotlab.config.model import Gradient, GRUHidden
from slotlab.models.competition import TAIL, Patches, Projected
from slotlab.models.gru import GRU
from slotlab.models.layers import MLP
from slotlab.models.repeated import Repeated


@dataclass(frozen=True)
class Layers:
    """What is applied to the slots in every round."""

    norm: Callable[[Tensor], Tensor]
    gru: Callable[[Tensor, Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Attended:
    """Slots and their attention, which sums to one over the slots at every patch."""

    slots: Float[Tensor, "B K S"]
    attention: Float[Tensor, "B K N"]
    logits: Float[Tensor, "B K N"]  # before the softmax over slots
    active: Bool[Tensor, "B K"] | None = None  # False: padding, which takes no patch and has no mask


class SlotAttention(nn.Module):
    """Competitive attention of K slots over N patch tokens, refined over a few iterations.

    Args:
        input_dim: width of the tokens; a LayerNorm normalises them here.
        slot_dim: width of the slots.
        mlp_hidden: width of the residual MLP after the GRU; 0: none.
        temperature: divides the logits; below one sharpens the competition.
        gradient: the iterations that the gradient passes. ``full``: all of them. ``implicit``: the last alone, as at a
            fixed point (Chang et al., 2022, arXiv:2207.00787); none reaches the initial slots. ``bilevel``: the last,
            then straight to the initial slots (BO-QSA, Jia et al., 2023, arXiv:2210.08990).
        gru_hidden: hidden state of the GRU: the slots of the round before (Locatello et al.), or these after their
            LayerNorm, as in the source of VideoSAUR and SlotContrast.
    """

    one: Float[Tensor, " W"]  # after key and value; see Projected

    def __init__(
        self,
        input_dim: int,
        slot_dim: int,
        mlp_hidden: int,
        temperature: float = 1.0,
        gradient: Gradient = "full",
        gru_hidden: GRUHidden = "slots",
    ) -> None:
        super().__init__()
        self.scale, self.gradient, self.gru_hidden = slot_dim**-0.5 / temperature, gradient, gru_hidden
        self.norm_inputs = nn.LayerNorm(input_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.to_key = nn.Linear(input_dim, slot_dim, bias=False)
        self.to_value = nn.Linear(input_dim, slot_dim, bias=False)
        self.to_query = nn.Linear(slot_dim, slot_dim, bias=False)
        self.gru = GRU(slot_dim, slot_dim)
        self.register_buffer("one", F.pad(torch.ones(1), (4 * slot_dim, TAIL - 1)), persistent=False)
        self.mlp = (
            MLP(nn.LayerNorm(slot_dim), nn.Linear(slot_dim, mlp_hidden), nn.ReLU(), nn.Linear(mlp_hidden, slot_dim))
            if mlp_hidden
            else None
        )

    def forward(
        self,
        inputs: Float[Tensor, "B N D"],
        slots: Float[Tensor, "B K S"],
        iterations: int,
        active: Bool[Tensor, "B K"] | None = None,
    ) -> Attended:
        """Slots and attention after ``iterations`` >= 1 rounds from initial slots; ``active``: False for padding."""
        (patches,) = self.project(inputs.unsqueeze(1)).frames(active)
        return self.refine(patches, self.layers([iterations]), slots, iterations)

    def project(self, inputs: Float[Tensor, "B T N D"]) -> Projected:
        """Keys and values of all tokens of clips.

        A logit is (W_q q) . (W_k x), which is q . (W_q^T W_k x): the queries' map is applied here, once. So may be the
        GRU's map of its input, which is a mean of values.
        """
        inputs = self.norm_inputs(inputs)
        keys = self.to_query.weight.T @ self.to_key.weight * self.scale  # (S, D)
        values, further = self.to_value.weight, self.gru.map_of_values(inputs.device)
        if further is not None:
            values = further @ values  # (3 S, D)
        weight = F.pad(torch.cat([keys, values]), (0, 0, 0, TAIL))
        return Projected(F.linear(inputs, weight, self.one[-len(weight) :]), len(keys))

    def layers(self, iterations: Sequence[int]) -> Layers:
        """The layers for refinements of so many rounds each in one pass, of which some have gradients."""
        rounds = sum(iterations) if self.gradient == "full" else len(iterations)
        mlp = None if self.mlp is None else Repeated(self.mlp, rounds)
        return Layers(Repeated(self.norm_slots, rounds), Repeated(self.gru, rounds), mlp)

    def refine(self, patches: Patches, layers: Layers, slots: Float[Tensor, "B K S"], iterations: int) -> Attended:
        """Slots and attention after ``iterations`` >= 1 rounds of attention and update."""
        return self.finish(patches, layers, self.begin(patches, layers, slots, iterations - 1), slots)

    def begin(
        self, patches: Patches, layers: Layers, slots: Float[Tensor, "B K S"], rounds: int
    ) -> Float[Tensor, "B K S"]:
        """The slots after so many rounds, which come before the last."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient == "full"):
            for _ in range(rounds):
                slots = self._iterate(patches, layers, slots)[0]
        return slots

    def finish(
        self, patches: Patches, layers: Layers, slots: Float[Tensor, "B K S"], initial: Float[Tensor, "B K S"]
    ) -> Attended:
        """Slots and attention after the last round, of ``slots`` which began as ``initial``."""
        if self.gradient != "full":
            slots = slots.detach()
        if self.gradient == "bilevel":
            slots = slots + initial - initial.detach()  # value of slots, gradient to initial
        return Attended(*self._iterate(patches, layers, slots), patches.active)

    def _iterate(self, patches: Patches, layers: Layers, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots, their attention and its logits after one more round."""
        updates, attention, logits, normed = patches.shared_among(layers.norm(slots))
        hidden = normed if self.gru_hidden == "normalised" else slots
        updated = layers.gru(updates.flatten(0, 1), hidden.flatten(0, 1)).view_as(slots)
        if layers.mlp is not None:
            updated = updated + layers.mlp(updated)
        return updated, attention, logits
