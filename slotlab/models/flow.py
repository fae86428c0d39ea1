"""Attention that flows from the frames before to the patches of this one that lie near and look alike, as labels do in
video segmentation by propagation (Jabri et al., 2020, arXiv:2006.14613). Nothing in it is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Constants, not settings: no preset ever changed them. They were chosen on the sample's training videos.
FLOW_RADIUS = 0.34  # reach of the flow, a frame's side being 2: 2.5 patches of 16; half as much more a frame back
FLOW_TEMPERATURE = 0.1  # divisor of the tokens' cosines: a cosine 0.3 lower gets a twentieth of the weight
PRIOR_FLOOR = 0.05  # a slot's share of patches that nothing flows to; at 0 no object could come into sight


class Seen(NamedTuple):
    """What is kept of a past frame."""

    directions: Float[Tensor, "N D"]  # unit vectors of the tokens
    attention: Float[Tensor, "N K"]


def patch_positions(grid: tuple[int, int]) -> Float[Tensor, "N 2"]:
    """Places of the patches, row by row, in [-1, 1] along the shorter side.

    A patch is as far from the next one in both directions, so the longer side reaches beyond -1 and 1.
    """
    reach = [(side - 1) / max(1, min(grid) - 1) for side in grid]
    axes = [torch.linspace(-1, 1, side) * times for side, times in zip(grid, reach, strict=True)]
    return torch.cartesian_prod(*axes)


def flow(
    directions: Float[Tensor, "N D"],
    position: Float[Tensor, "N 2"],
    past: Sequence[Seen],
    temperature: float = FLOW_TEMPERATURE,
) -> Float[Tensor, "N K"]:
    """The past frames' attention, newest first, at the patches of this frame, whose tokens have these directions."""
    squared = squared_distance(position, position)  # (N, N)
    likeness = torch.cat(
        [
            # The further back, the further an object may have come from.
            (directions @ seen.directions.T).masked_fill(squared > (FLOW_RADIUS * (1 + lag / 2)) ** 2, -torch.inf)
            for lag, seen in enumerate(past)
        ],
        -1,
    )  # (N, frames * N): similarity to each past token
    share = (likeness / temperature).softmax(-1)
    return share @ torch.cat([seen.attention for seen in past])


def squared_distance(a: Float[Tensor, "N S"], b: Float[Tensor, "K S"]) -> Float[Tensor, "N K"]:
    return (a.unsqueeze(1) - b).square().sum(-1)
