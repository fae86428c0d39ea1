"""Slots of the clustering model that keep their object from frame to frame.

The tracker is online and causal: a frame's slots start where the last frame's ended. Object tokens that are far from
every slot start new ones; when two slots have come together, the older one stays; and a slot that holds nothing is
free for another object.

A slot's key alone would lose an object that turns, or pass its slot to a neighbour. So the attention of the last few
frames, enough to bridge a short meeting, flows to the patches that lie near and look alike
(:mod:`slotlab.models.flow`). The tracker uses the result twice: each slot keeps the identity that it receives most
attention from (Hungarian algorithm), and it is the prior of a Bayes filter whose likelihood is the attention by keys.

The decisions are sequential and the arrays small, so all of this runs on the CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from slotlab.config.model import ClusteringConfig
from slotlab.models.flow import PRIOR_FLOOR, Seen, flow, squared_distance

# Constants, not settings: no preset ever changed them. They were chosen on the sample's training videos.
SEED_OBJECTNESS = 0.6  # objectness below which a token starts no slot
ITERATIONS = 2  # rounds that refine carried slots; few are enough, as they start where they ended
LEAST_MASS = 1.0  # patches that a slot must hold to be kept; masks cannot show less

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # keys, objectness, slots, active -> (B, N, K)


@dataclass
class Tracker:
    """State after some frames: K object slots, which of them hold an object, and the last frames' tokens and attention.

    Args:
        config: distances and iterations.
        attend: maps keys (1, N, S), objectness (1, N), slots (1, K, S) and active (1, K) to attention (1, N, K).
        position: places of the patches, in [-1, 1] along the shorter side.
    """

    config: ClusteringConfig
    attend: Attend
    position: Float[Tensor, "N 2"]
    slots: Float[Tensor, "K S"]
    active: Bool[Tensor, " K"]
    past: deque[Seen]  # newest first, at most flow_frames

    @classmethod
    def start(cls, config: ClusteringConfig, attend: Attend, position: Float[Tensor, "N 2"], width: int) -> Tracker:
        count = config.slots - 1
        none = torch.zeros(count, dtype=torch.bool)
        past: deque[Seen] = deque(maxlen=config.flow_frames)
        return cls(config, attend, position, torch.zeros(count, width), none, past)

    def step(
        self, tokens: Float[Tensor, "N D"], keys: Float[Tensor, "N S"], objectness: Float[Tensor, " N"]
    ) -> Float[Tensor, "N K"]:
        """Track the slots into the next frame; return its attention, which sums to the objectness over slots."""
        carried = self.active
        # New slots start first: a carried slot that is refined alone would claim a new object.
        self._give_birth(keys, objectness)
        self._refine(keys, objectness)
        self._merge(self._attention(keys, objectness).sum(0), carried)
        mass = self._refine(keys, objectness).sum(0)  # (K,) patches
        self.active = self.active & (mass >= LEAST_MASS)
        attention = self._attention(keys, objectness)
        directions = F.normalize(tokens, dim=-1)
        if self.past:
            prior = flow(directions, self.position, self.past)  # (N, K)
            attention = self._rename(prior, attention)
            attention = self._filter(prior, attention, objectness)
            self.slots = torch.where(self.active.unsqueeze(-1), slot_means(attention, keys), self.slots)
        self.past.appendleft(Seen(directions, attention))
        return attention

    def _rename(self, prior: Float[Tensor, "N K"], attention: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """The attention with its slots reordered: each slot gets the identity it takes most from, or keeps its own."""
        taken = prior.T @ attention  # (K before, K now): patches
        own = torch.eye(len(self.slots), dtype=torch.bool)
        order = linear_sum_assignment((taken + 1e-4 * own).numpy(), maximize=True)[1]
        self.slots, self.active = self.slots[order], self.active[order]
        return attention[:, order]

    def _filter(self, prior: Tensor, attention: Tensor, objectness: Tensor) -> Float[Tensor, "N K"]:
        """Posterior of prior and attention over the active slots, scaled to the objectness."""
        prior = prior * self.active
        prior = prior / (prior.sum(-1, keepdim=True) + 1e-3) + PRIOR_FLOOR
        posterior = attention * prior**self.config.prior_weight
        whole = posterior.sum(-1, keepdim=True).clamp_min(torch.finfo(posterior.dtype).tiny)
        return posterior / whole * objectness.unsqueeze(-1)

    def _attention(self, keys: Tensor, objectness: Tensor) -> Tensor:
        return self.attend(keys[None], objectness[None], self.slots[None], self.active[None])[0] * self.active

    def _refine(self, keys: Tensor, objectness: Tensor) -> Tensor:
        """Move the slots to the means of their patches; return their attention afterwards."""
        for _ in range(ITERATIONS):
            attention = self._attention(keys, objectness)  # (N, K)
            self.slots = torch.where(self.active.unsqueeze(-1), slot_means(attention, keys), self.slots)
        return self._attention(keys, objectness)

    def _give_birth(self, keys: Tensor, objectness: Tensor) -> None:
        """Start slots at the farthest tokens until every object token is within ``new_slot_distance`` of a slot."""
        candidate = objectness > SEED_OBJECTNESS  # (N,)
        distance = squared_distance(keys, self.slots).masked_fill(~self.active, torch.inf).amin(-1)  # (N,)
        # Without any slot all tokens are infinitely far: the likeliest object comes first.
        distance = distance.where(distance.isfinite(), 1e3 * objectness)
        slots, active = self.slots.clone(), self.active.clone()
        for free in (~active).nonzero().flatten().tolist():
            farthest, chosen = (distance * candidate).max(0)
            if float(farthest) <= self.config.new_slot_distance:
                break
            slots[free], active[free] = keys[chosen], True
            distance = torch.minimum(distance, squared_distance(keys, slots[free : free + 1])[:, 0])
        self.slots, self.active = slots, active

    def _merge(self, mass: Tensor, carried: Tensor) -> None:
        """Free one of any two active slots within ``merge_distance``: the new one, or the one that holds less."""
        close = squared_distance(self.slots, self.slots) < self.config.merge_distance
        pairs = (close & self.active & self.active.unsqueeze(-1)).triu(1).nonzero().tolist()
        active = self.active.clone()
        for one, other in pairs:
            if active[one] and active[other]:
                rank = {slot: (bool(carried[slot]), float(mass[slot])) for slot in (one, other)}
                active[min(rank, key=rank.__getitem__)] = False
        self.active = active


def slot_means(attention: Float[Tensor, "*B N K"], values: Float[Tensor, "*B N S"]) -> Float[Tensor, "*B K S"]:
    """Mean of the patches' values weighted by each slot's attention; 0 for a slot that holds nothing."""
    mass = attention.sum(-2).unsqueeze(-1)  # (*B, K, 1)
    return attention.transpose(-1, -2) @ values / (mass + 1e-3)
