"""Tracked slots as vectors: what each slot holds, where, and how large it is; all videos share one space.

A token of the tap ``tracks`` (``slotlab slots``) is a slot of one frame: the mean feature of what it holds, as stored
features are (D), its mask (N), the action of its frame, if there are any (A), and its place by the frame's edges (2),
which tracks of an early version do not have. From these come its vector's parts::

    place   2  rows and columns from the frame's middle, in patches
    side    1  logarithm of the square root of its area in patches
    doubt   1  how far off its place may be, before a softplus; what is seen has none (a slot of a predicted frame may)
    feature P  mean feature, normalised as the model's input is, in its P directions of most variance
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slotlab.models.normalise import Normaliser

PLACE, SIDE, DOUBT, FEATURE = slice(0, 2), 2, 3, slice(4, None)
PARTS = 4  # numbers of a vector before its feature
SEEN = -2.0  # doubt of what is seen: a softplus of an eighth of a patch
LEAST_AREA = 0.5  # patches; a slot with less has lost its object


@dataclass(frozen=True)
class Seen:
    """Tracked slots of frames that were seen."""

    vectors: Float[Tensor, "B T K S"]  # a slot that is away keeps its last vector, or has its first one already
    masks: Float[Tensor, "B T K N"]
    active: Bool[Tensor, "B T K"]
    last: Int[Tensor, "B T K"]  # the frame that each vector is from
    actions: Float[Tensor, "B F A"]  # of each frame, and of later ones where they are known; A is 0 without

    def masks_of(self, frame: int) -> Float[Tensor, "B K N"]:
        """The mask that each slot had when it was last seen, as of a frame; none if it came later."""
        chosen = self.last[:, frame, None, :, None].expand(-1, 1, -1, self.masks.shape[-1])
        known = (self.last[:, frame] <= frame).unsqueeze(-1)
        return self.masks.gather(1, chosen)[:, 0] * known

    def strays(self, ahead: int) -> Float[Tensor, " M"]:
        """Distances of slots, after ``ahead`` frames, from where their last step's speed takes them.

        Of those that are active in the two frames of that step, and after.
        """
        last = self.vectors.shape[1] - ahead  # frames that have one so far ahead
        if last < 2:
            return self.vectors.new_zeros(0)
        place, here = self.vectors[..., PLACE], self.active
        speed = place[:, 1:last] - place[:, : last - 1]
        apart = place[:, 1 + ahead :] - place[:, 1:last] - ahead * speed
        found: Tensor = apart[here[:, 1 + ahead :] & here[:, 1:last] & here[:, : last - 1]].norm(dim=-1)
        return found


def places(grid: tuple[int, int]) -> Float[Tensor, "N 2"]:
    """Row and column of each patch, from the middle of the frame, in patches."""
    return torch.cartesian_prod(*(torch.arange(side) - (side - 1) / 2 for side in grid))


def see(
    tokens: Float[Tensor, "B T K C"],
    normaliser: Normaliser,
    basis: Float[Tensor, "D P"],
    place: Float[Tensor, "N 2"],
    actions: int = 0,
    refined: bool = False,
) -> Seen:
    """The vectors and masks of stored tokens, and the first ``actions`` numbers of what follows a mask.

    Places are those at the tokens' ends if ``refined``, else the masks' centres.
    """
    sizes = [normaliser.dim, len(place), tokens.shape[-1] - normaliser.dim - len(place)]
    features, masks, rest = torch.split(tokens.float(), sizes, -1)
    area = masks.sum(-1)
    active = area >= LEAST_AREA
    share = masks / area.clamp_min(LEAST_AREA).unsqueeze(-1)
    parts = [
        rest[..., -2:] if refined else share @ place,
        area.clamp_min(LEAST_AREA).log().unsqueeze(-1) / 2,
        torch.full_like(area, SEEN).unsqueeze(-1),
        normaliser.of_means(features, share) @ basis,
    ]
    last = last_active(active)
    vectors = torch.cat(parts, -1)
    vectors = vectors.gather(1, last.unsqueeze(-1).expand_as(vectors))
    return Seen(vectors, masks, active, last, rest[:, :, 0, :actions])


def last_active(active: Bool[Tensor, "B T K"]) -> Int[Tensor, "B T K"]:
    """The last frame, up to each frame, in which each slot was active; before its first one, that one."""
    frames = torch.arange(active.shape[1], device=active.device)[:, None]
    last = torch.where(active, frames, -1).cummax(1).values
    first = active.int().argmax(1, keepdim=True)
    return torch.where(last < 0, first, last)
