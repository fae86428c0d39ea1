"""Pre-LayerNorm transformer blocks, whose cross-attention can be read as masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from slotlab.models.competition import NEVER
from slotlab.models.layers import MLP


class Memory(NamedTuple):
    """The keys and values of what tokens attend to, by heads."""

    key: Float[Tensor, "B H K E"]
    value: Float[Tensor, "B H K E"]


class Attention(nn.Module):
    """Multi-head attention of tokens of width ``dim`` to a memory of width ``memory_dim`` (default: the same).

    ``temperature`` divides the logits, beside the usual root of a head's width.
    """

    def __init__(
        self, dim: int, heads: int, memory_dim: int | None = None, *, bias: bool = True, temperature: float = 1.0
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        self.heads, self.scale = heads, (dim // heads) ** -0.5 / temperature
        self.to_query = nn.Linear(dim, dim, bias)
        self.to_key = nn.Linear(memory_dim or dim, dim, bias)
        self.to_value = nn.Linear(memory_dim or dim, dim, bias)
        self.out = nn.Linear(dim, dim, bias)

    def forward(
        self,
        tokens: Float[Tensor, "B M D"],
        memory: Float[Tensor, "B K S"] | Memory,
        *,
        causal: bool = False,
        active: Bool[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B M D"]:
        """Attended tokens. ``causal``: token i sees the first i entries of memory. ``active``: False for padding."""
        query, key, value = self._heads(tokens, memory)
        visible = None if active is None else active[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, is_causal=causal, scale=self.scale)
        return self._merge(mixed)

    def with_weights(
        self,
        tokens: Float[Tensor, "B M D"],
        memory: Float[Tensor, "B K S"] | Memory,
        active: Bool[Tensor, "B K"] | None = None,
    ) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B K M"]]:
        """The attended tokens, and the attention weights: means over the heads, which sum to one over the memory."""
        query, key, value = self._heads(tokens, memory)
        logits = (query * self.scale @ key.transpose(-2, -1)).float()  # (B, heads, M, K)
        if active is not None:
            logits = logits.masked_fill(~active[:, None, None], NEVER)
        weights = logits.softmax(-1)
        return self._merge(weights.to(value.dtype) @ value), weights.mean(1).transpose(1, 2)

    def by_head(self, tokens: Float[Tensor, "B K D"]) -> Float[Tensor, "B H K E"]:
        return tokens.view(*tokens.shape[:-1], self.heads, -1).transpose(1, 2)

    def _heads(self, tokens: Tensor, memory: Tensor | Memory) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, M, D / heads), keys and values (B, heads, K, D / heads)."""
        if memory is tokens:
            query, key, value = map(self.by_head, applied((self.to_query, self.to_key, self.to_value), tokens))
            return query, key, value
        if not isinstance(memory, Memory):
            (memory,) = memories([self], memory)
        return self.by_head(self.to_query(tokens)), *memory

    def _merge(self, mixed: Tensor) -> Tensor:
        merged: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return merged


class FeedForward(nn.Module):
    """Residual two-layer MLP after a LayerNorm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = MLP(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, tokens: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        moved: Tensor = tokens + self.layers(tokens)
        return moved


class SelfBlock(nn.Module):
    """Tokens attend to each other, padding (``active`` False) excepted."""

    def __init__(self, dim: int, heads: int, hidden: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attend = Attention(dim, heads, temperature=temperature)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(
        self, tokens: Float[Tensor, "B M D"], active: Bool[Tensor, "B M"] | None = None
    ) -> Float[Tensor, "B M D"]:
        normed = self.norm(tokens)
        moved: Tensor = self.feed_forward(tokens + self.attend(normed, normed, active=active))
        return moved


class CrossBlock(nn.Module):
    """Tokens attend to slots, whose keys and values are ``attend``'s, but not to each other."""

    def __init__(self, dim: int, heads: int, hidden: int, memory_dim: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attend = Attention(dim, heads, memory_dim, temperature=temperature)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(
        self, tokens: Float[Tensor, "B M D"], slots: Memory, active: Bool[Tensor, "B K"] | None
    ) -> Float[Tensor, "B M D"]:
        moved: Tensor = self.feed_forward(tokens + self.attend(self.norm(tokens), slots, active=active))
        return moved


class CausalCrossBlock(nn.Module):
    """Tokens attend to the tokens before them and to themselves, then to slots, by keys and values of ``to_slots``.

    ``bias`` is that of the attentions; ``opens`` adds what is seen of the past to the normed tokens, not to the tokens
    (the first block of SLATE and SPOT).
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, memory_dim: int, *, bias: bool = True, opens: bool = False
    ) -> None:
        super().__init__()
        self.opens = opens
        self.norm_past, self.norm_slots = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_past = Attention(dim, heads, bias=bias)
        self.to_slots = Attention(dim, heads, memory_dim, bias=bias)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(
        self, tokens: Float[Tensor, "B M D"], slots: Memory, active: Bool[Tensor, "B K"] | None
    ) -> Float[Tensor, "B M D"]:
        tokens = self._past(tokens)
        moved: Tensor = self.feed_forward(tokens + self.to_slots(self.norm_slots(tokens), slots, active=active))
        return moved

    def with_weights(
        self, tokens: Float[Tensor, "B M D"], slots: Memory, active: Bool[Tensor, "B K"] | None
    ) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B K M"]]:
        """The tokens after the block, and their attention to the slots, which sums to one over the slots."""
        tokens = self._past(tokens)
        seen, weights = self.to_slots.with_weights(self.norm_slots(tokens), slots, active)
        return self.feed_forward(tokens + seen), weights

    def _past(self, tokens: Tensor) -> Tensor:
        normed = self.norm_past(tokens)
        seen: Tensor = (normed if self.opens else tokens) + self.to_past(normed, normed, causal=True)
        return seen


def memories(attentions: Sequence[Attention], memory: Float[Tensor, "B K S"]) -> list[Memory]:
    """The keys and values of the same memory for several attentions, by one product."""
    layers = [layer for attention in attentions for layer in (attention.to_key, attention.to_value)]
    parts = [attentions[0].by_head(part) for part in applied(layers, memory)]
    return [Memory(*both) for both in zip(parts[::2], parts[1::2], strict=True)]


def applied(layers: Sequence[nn.Linear], tokens: Float[Tensor, "*B D"]) -> tuple[Tensor, ...]:
    """The results of linear layers of one width, by one product."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return F.linear(tokens, weight, bias).chunk(len(layers), -1)


def xavier(module: torch.nn.Module) -> None:
    """Initialise a linear layer with Glorot's weights and no bias; for ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
