"""Slot attention (Locatello et al., 2020, arXiv:2006.15055)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Attended:
    """Slots and who they took: ``attention`` sums to one over the slots at every patch."""

    slots: Float[Tensor, "B K S"]
    attention: Float[Tensor, "B K N"]
    logits: Float[Tensor, "B K N"]  # before the softmax over slots


class SlotAttention(nn.Module):
    """Competitive attention of K slots over N patch tokens, refined over a few iterations.

    Args:
        input_dim: width of the tokens; they are normalised here.
        slot_dim: width of the slots.
        mlp_hidden: width of the residual MLP after the GRU.
        temperature: divides the logits; below one sharpens the competition.
    """

    def __init__(self, input_dim: int, slot_dim: int, mlp_hidden: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.scale = slot_dim**-0.5 / temperature
        self.norm_inputs = nn.LayerNorm(input_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.norm_mlp = nn.LayerNorm(slot_dim)
        self.to_key = nn.Linear(input_dim, slot_dim, bias=False)
        self.to_value = nn.Linear(input_dim, slot_dim, bias=False)
        self.to_query = nn.Linear(slot_dim, slot_dim, bias=False)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.mlp = nn.Sequential(nn.Linear(slot_dim, mlp_hidden), nn.ReLU(), nn.Linear(mlp_hidden, slot_dim))

    def forward(self, inputs: Float[Tensor, "B N D"], slots: Float[Tensor, "B K S"], iterations: int) -> Attended:
        """Tokens and initial slots -> slots and attention of the last iteration."""
        inputs = self.norm_inputs(inputs)
        key, value = self.to_key(inputs), self.to_value(inputs)  # (B, N, S)
        batch, count, width = slots.shape
        for _ in range(iterations):
            query = self.to_query(self.norm_slots(slots))  # (B, K, S)
            logits = torch.einsum("bks,bns->bkn", query * self.scale, key).float()
            attention = logits.softmax(dim=1)  # the slots compete for each patch
            # Weighted mean over the patches; the epsilon keeps a slot that lost every patch finite.
            weights = (attention + 1e-8) / (attention + 1e-8).sum(-1, keepdim=True)
            updates = torch.einsum("bkn,bns->bks", weights.to(value.dtype), value)
            slots = self.gru(updates.reshape(-1, width), slots.reshape(-1, width)).view(batch, count, width)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return Attended(slots, attention, logits)
