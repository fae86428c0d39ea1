"""Transformer blocks over the slots of several frames: all together, or over slots and over time by turns.

Each takes tokens (B, L, K, W) and which slots are in use (B, K); attention sees no others.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from slotlab.models.transformer import Attention, FeedForward, SelfBlock


class JointBlock(nn.Module):
    """Every slot of every frame attends to all of them (SlotFormer)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.block = SelfBlock(width, heads, hidden)

    def forward(self, tokens: Float[Tensor, "B L K W"], used: Bool[Tensor, "B K"]) -> Float[Tensor, "B L K W"]:
        everywhere = used.unsqueeze(1).expand(tokens.shape[:3]).flatten(1)
        moved: Tensor = self.block(tokens.flatten(1, 2), everywhere).unflatten(1, tokens.shape[1:3])
        return moved


class SequentialBlock(nn.Module):
    """Slots of one frame attend to each other, then each slot to its own past (OCVP-Seq, arXiv:2302.11850)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.among_slots = SelfBlock(width, heads, hidden)
        self.over_time = SelfBlock(width, heads, hidden)

    def forward(self, tokens: Float[Tensor, "B L K W"], used: Bool[Tensor, "B K"]) -> Float[Tensor, "B L K W"]:
        tokens = self.among_slots(tokens.flatten(0, 1), each_frame(used, tokens)).unflatten(0, tokens.shape[:2])
        return tracks(self.over_time(tracks(tokens).flatten(0, 1)).unflatten(0, tracks(tokens).shape[:2]))


class ParallelBlock(nn.Module):
    """Both at once, added (OCVP-Par)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.among_slots, self.over_time = Attention(width, heads), Attention(width, heads)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, tokens: Float[Tensor, "B L K W"], used: Bool[Tensor, "B K"]) -> Float[Tensor, "B L K W"]:
        normed = self.norm(tokens)
        frames, paths = normed.flatten(0, 1), tracks(normed).flatten(0, 1)
        among = self.among_slots(frames, frames, active=each_frame(used, tokens)).unflatten(0, tokens.shape[:2])
        over = tracks(self.over_time(paths, paths).unflatten(0, tracks(tokens).shape[:2]))
        moved: Tensor = self.feed_forward(tokens + among + over)
        return moved


def each_frame(used: Bool[Tensor, "B K"], tokens: Float[Tensor, "B L K W"]) -> Bool[Tensor, "F K"]:
    """The slots in use of every frame, (B * L, K)."""
    return used.repeat_interleave(tokens.shape[1], 0)


def tracks(tokens: Float[Tensor, "B L K W"]) -> Float[Tensor, "B K L W"]:
    return tokens.transpose(1, 2)


BLOCKS: dict[str, type[nn.Module]] = {
    "joint": JointBlock,
    "sequential": SequentialBlock,
    "parallel": ParallelBlock,
}


def time_code(frames: int, width: int) -> Float[Tensor, "L 1 W"]:
    """Sines and cosines of the frame's number (Vaswani et al., 2017)."""
    rate = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(frames)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, None, :width]
