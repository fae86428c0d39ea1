"""Slots that keep their object from frame to frame, for a model that finds each frame's slots anew.

Online and causal. The attention of the last frames flows to the patches of this one (:mod:`slotlab.models.flow`): a new
slot goes on with the identity that its patches get most from, by the Hungarian algorithm. One that goes on with none
may be an object that has been away: it takes the identity whose key is like its own. Else it is new.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from featcache.machine import limited
from slotlab.models.flow import Seen, flow

FLOW_FRAMES = 5  # past frames that attention flows from
LEAST_OVERLAP = 0.02  # of a slot and what flows to it (Dice): less is another object; chosen on training videos
SAME_OBJECT = 0.8  # cosine of keys from which a new slot is an object that has been away


@torch.no_grad()
def follow(
    keys: Float[Tensor, "T N S"], masks: Float[Tensor, "T K N"], position: Float[Tensor, "N 2"]
) -> Int[Tensor, "T K"]:
    """The order of each frame's slots by which every slot of a video stays with its object; all on the host."""
    tracks = Tracks(masks.shape[1], position)
    with limited():  # one thread: hundreds of small operations a frame
        return torch.stack([tracks.step(*frame) for frame in zip(keys, masks, strict=True)])


class Tracks:
    """The identities of a video's slots: the key of each, and the attention of the last frames.

    Args:
        slots: K, the most slots of a frame, and the number of identities.
        position: places of the patches, in [-1, 1] along the shorter side.
    """

    def __init__(self, slots: int, position: Float[Tensor, "N 2"]) -> None:
        self.position = position
        self.keys: Tensor | None = None  # (K, S); 0 for an identity that was never used
        self.absent = torch.full((slots,), 10**6)  # frames since each was seen
        self.past: deque[Seen] = deque(maxlen=FLOW_FRAMES)  # newest first

    def step(self, keys: Float[Tensor, "N S"], masks: Float[Tensor, "K N"]) -> Int[Tensor, " K"]:
        """Follow the slots of the next frame; return the order of them by which each is at its identity's place."""
        slots = F.normalize(masks @ keys, dim=-1)
        found = masks.amax(1) > 0  # (K,)
        identity = torch.full((len(masks),), -1)
        if self.past:
            prior = flow(keys, self.position, self.past).T  # (K, N)
            mass = prior.sum(1).unsqueeze(1) + masks.sum(1)
            pair(identity, 2 * prior @ masks.T / mass.clamp_min(1e-6), LEAST_OVERLAP)
            away = self.keys @ slots.T  # type: ignore[operator]
            pair(identity, away, SAME_OBJECT)
        free = [k for k in self.absent.argsort(descending=True, stable=True).tolist() if k not in identity.tolist()]
        identity[identity < 0] = torch.tensor(free[: int((identity < 0).sum())], dtype=identity.dtype)
        order = identity.argsort()
        self.absent = torch.where(found[order], 0, self.absent + 1)
        before = torch.zeros_like(slots) if self.keys is None else self.keys
        self.keys = torch.where(found[order].unsqueeze(1), slots[order], before)
        self.past.appendleft(Seen(keys, masks[order].T))
        return order


def pair(identity: Int[Tensor, " K"], likeness: Float[Tensor, "K K"], least: float) -> None:
    """Give slots without an identity (-1) the free ones (rows) that they are most like, if by more than ``least``."""
    free = torch.ones(len(likeness), dtype=torch.bool)
    free[identity[identity >= 0]] = False
    rows, columns = free.nonzero().flatten(), (identity < 0).nonzero().flatten()
    among = likeness[rows][:, columns]
    for row, column in zip(*linear_sum_assignment(among.numpy(), maximize=True), strict=True):
        if among[row, column] > least:
            identity[columns[column]] = rows[row]
