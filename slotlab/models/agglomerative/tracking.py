"""Slots that keep their object from frame to frame, for a model that finds each frame's slots anew.

Online and causal. The attention of the last frames flows to the patches of this one (:mod:`slotlab.models.flow`): a new
slot goes on with the identity that its patches get most from, by the Hungarian algorithm. One that goes on with none
may be an object that has been away: it takes the identity whose key is like its own. Else it is new. What flows is also
a prior of each patch's slot, so that a patch in doubt stays with the object that it belonged to.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from featcache.machine import limited
from slotlab.models.flow import FLOW_TEMPERATURE, PRIOR_FLOOR, Seen, flow

FLOW_FRAMES = 5  # past frames that attention flows from
LEAST_OVERLAP = 0.02  # of a slot and what flows to it (Dice): less is another object; chosen on training videos
PATCHES = 16  # a side of the grid that the flow's temperature was chosen at
OTHER_OBJECT = 0.4  # cosine of keys below which a slot is another object, wherever it lies
SAME_OBJECT = 0.8  # cosine of keys from which a new slot is an object that has been away


@torch.no_grad()
def follow(
    keys: Float[Tensor, "T N S"], logits: Float[Tensor, "T K N"], position: Float[Tensor, "N 2"], prior_weight: float
) -> Float[Tensor, "T K N"]:
    """The attention of a video's frames, in which every slot stays with its object; all on the host."""
    tracks = Tracks(logits.shape[1], position, prior_weight)
    with limited():  # one thread: hundreds of small operations a frame
        return torch.stack([tracks.step(*frame) for frame in zip(keys, logits, strict=True)])


class Tracks:
    """The identities of a video's slots: the key of each, and the attention of the last frames.

    Args:
        slots: K, the most slots of a frame, and the number of identities.
        position: places of the patches, in [-1, 1] along the shorter side.
        prior_weight: exponent of the prior that flows from the past.
    """

    def __init__(self, slots: int, position: Float[Tensor, "N 2"], prior_weight: float) -> None:
        self.position, self.prior_weight = position, prior_weight
        # A finer grid has more patches to flow from: at the same temperature the prior would blur.
        self.temperature = FLOW_TEMPERATURE * min(1.0, PATCHES / len(position) ** 0.5)
        self.keys: Tensor | None = None  # (K, S); 0 for an identity that was never used
        self.absent = torch.full((slots,), 10**6)  # frames since each was seen
        self.past: deque[Seen] = deque(maxlen=FLOW_FRAMES)  # newest first

    def step(self, keys: Float[Tensor, "N S"], logits: Float[Tensor, "K N"]) -> Float[Tensor, "K N"]:
        """Follow the slots of the next frame; return its attention, each slot at its identity's place."""
        masks = logits.softmax(0)
        slots = F.normalize(masks @ keys, dim=-1)
        found = masks.amax(1) > 0  # (K,)
        identity = torch.full((len(masks),), -1)
        if self.past:
            prior = flow(keys, self.position, self.past, self.temperature).T  # (K, N)
            mass = prior.sum(1).unsqueeze(1) + masks.sum(1)
            overlap = 2 * prior @ masks.T / mass.clamp_min(1e-6)
            alike = self.keys @ slots.T  # type: ignore[operator]
            pair(identity, overlap.masked_fill(alike < OTHER_OBJECT, 0), LEAST_OVERLAP)
            pair(identity, alike, SAME_OBJECT)
        free = [k for k in self.absent.argsort(descending=True, stable=True).tolist() if k not in identity.tolist()]
        identity[identity < 0] = torch.tensor(free[: int((identity < 0).sum())], dtype=identity.dtype)
        order = identity.argsort()
        self.absent = torch.where(found[order], 0, self.absent + 1)
        before = torch.zeros_like(slots) if self.keys is None else self.keys
        self.keys = torch.where(found[order].unsqueeze(1), slots[order], before)
        logits = logits[order]
        if self.past:
            logits = logits + self.prior_weight * (prior + PRIOR_FLOOR).log()
        attention = logits.softmax(0)
        self.past.appendleft(Seen(keys, attention.T))
        return attention


def pair(identity: Int[Tensor, " K"], likeness: Float[Tensor, "K K"], least: float) -> None:
    """Give slots without an identity (-1) the free ones (rows) that they are most like, if by more than ``least``."""
    free = torch.ones(len(likeness), dtype=torch.bool)
    free[identity[identity >= 0]] = False
    rows, columns = free.nonzero().flatten(), (identity < 0).nonzero().flatten()
    among = likeness[rows][:, columns]
    for row, column in zip(*linear_sum_assignment(among.numpy(), maximize=True), strict=True):
        if among[row, column] > least:
            identity[columns[column]] = rows[row]
