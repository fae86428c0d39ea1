"""Slots that start from segments of learnt keys, as many as a frame has, trained by what stays the same.

One frame, in training and in use:

- **keys** (B, N, S): unit vectors; a linear map of the normalised tokens, which starts as their first S channels, plus
  a small MLP that starts at zero. So an untrained model is a training-free one;
- **segments** (:mod:`slotlab.models.segments`): average linkage of the keys' affinities, up to a cut. They say how many
  slots the frame has; no part of it is taken for the background;
- **slots** (B, K, S): the mean key of each segment, as a unit vector;
- **competition** (slot attention's: Locatello et al., 2020, arXiv:2006.15055): the share of a patch that each slot
  holds is the softmax over slots of the cosine of slot and key, divided by a temperature.

Training is swapped prediction (Caron et al., 2020, arXiv:2006.09882) of segments: the slots of one frame compete for
the patches of another frame of the clip, and the segments of that frame say which slot should have won: the one whose
segment is the likeliest for theirs, and theirs for it. A patch whose segment has no such partner teaches nothing. The
keys so learn what stays the same within an object and over time, and what differs between objects. The segments are
those of the keys as they are, without gradient; nothing else is kept from step to step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from featcache.errors import DataError
from featcache.machine import limited
from slotlab.config.model import AgglomerativeConfig
from slotlab.config.schema import Config
from slotlab.models.agglomerative.tracking import Tracks
from slotlab.models.base import NO_SLOT, Model, Output
from slotlab.models.flow import patch_positions
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.models.segments import segments

NEVER = -1e4  # a logit whose softmax is 0
LEAST_LIKENESS = 0.5  # cosine of two frames' slots below which they are of no common object


class AgglomerativeModel(Model):
    """Slots from segments of learnt keys. Slot 0 of a frame by itself is its largest segment, and nothing more.

    Args:
        config: sizes; a frame of more than ``config.slots`` segments is cut higher.
        normaliser: gives channels ordered by importance, as ``whiten=K`` does, so that the first ones are good keys.
        grid: rows and columns of patches.
    """

    def __init__(self, config: AgglomerativeConfig, normaliser: Normaliser, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.normaliser, self.grid, self.slots = config, normaliser, grid, config.slots
        self.line = nn.Linear(normaliser.dim, config.slot_dim, bias=False)
        nn.init.eye_(self.line.weight)
        self.bend = nn.Sequential(
            nn.Linear(normaliser.dim, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.slot_dim)
        )
        last = self.bend[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    @classmethod
    def of(cls, config: Config, normaliser: Normaliser, grid: tuple[int, int]) -> AgglomerativeModel:
        assert isinstance(config.model, AgglomerativeConfig)
        return cls(config.model, normaliser, grid)

    def forward(self, features: Float[Tensor, "B N D"] | Float[Tensor, "B T N D"], draws: Draws) -> Output:
        """The training pass: the slots of a clip's last frame compete for the patches of its first.

        A single image competes with itself.
        """
        frames = features if features.ndim == 4 else features.unsqueeze(1)
        tokens, other = self.normaliser(frames[:, 0]), self.normaliser(frames[:, -1])
        keys, other_keys = self.keys(tokens), self.keys(other)
        held, other_held = self.segments(keys), self.segments(other_keys)  # (B, N, K) each
        slots = slot_means(other_held, other_keys)
        logits = self.compete(keys, slots, other_held.sum(1) > 0)
        partners = matched(slot_means(held, keys), slots, held.sum(1) > 0, other_held.sum(1) > 0)  # (B, K)
        assigned = partners.gather(1, held.argmax(-1))
        return self.output(tokens, logits, slots, means(other_held, other), assigned)

    def segment(self, features: Float[Tensor, "T N D"], draws: Draws) -> Output:
        """Slots and masks of all frames of a video in order; each slot stays with its object (:mod:`.tracking`)."""
        tokens = self.normaliser(features)
        keys = self.keys(tokens)
        held = self.segments(keys)
        logits = self.compete(keys, slot_means(held, keys), held.sum(1) > 0)
        if self.config.tracking:
            tracks = Tracks(self.slots, patch_positions(self.grid))
            with limited():  # one thread: hundreds of small operations a frame
                order = [tracks.step(*frame) for frame in zip(keys.cpu(), logits.softmax(1).cpu(), strict=True)]
            logits = logits.gather(1, torch.stack(order).to(logits.device).unsqueeze(-1).expand_as(logits))
        attention = logits.softmax(1).transpose(1, 2)  # (T, N, K)
        return self.output(tokens, logits, slot_means(attention, keys), means(attention, tokens))

    def keys(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N S"]:
        """Unit keys of normalised tokens."""
        unit = F.normalize(tokens, dim=-1)
        return F.normalize((self.line(unit) + self.bend(unit)).float(), dim=-1)

    @torch.no_grad()
    @torch.compiler.disable
    def segments(self, keys: Float[Tensor, "B N S"]) -> Float[Tensor, "B N K"]:
        """The segment of each patch, one-hot. ``DataError`` for keys that are not finite."""
        if not bool(keys.isfinite().all()):
            raise DataError(
                "the model's keys are not finite: the store holds NaN (slotlab verify), or the model diverged (train "
                "again with a lower optim.learning_rate)"
            )
        return F.one_hot(segments(keys, self.grid, self.config.cut, self.slots), self.slots).float()

    def compete(
        self, keys: Float[Tensor, "B N S"], slots: Float[Tensor, "B K S"], active: Bool[Tensor, "B K"]
    ) -> Float[Tensor, "B K N"]:
        """Logits of the slots at each patch; a slot that is not active holds nothing."""
        return (slots @ keys.mT / self.config.temperature).masked_fill(~active.unsqueeze(-1), NEVER)

    def output(
        self,
        tokens: Float[Tensor, "B N D"],
        logits: Float[Tensor, "B K N"],
        slots: Float[Tensor, "B K S"],
        held: Float[Tensor, "B K D"],
        assigned: Int[Tensor, "B N"] | None = None,
    ) -> Output:
        """The output; it is decoded by mixing what the slots hold, their mean tokens, by their attention."""
        attention = logits.softmax(1)
        return Output(
            slots=slots,
            attention=attention,
            logits=logits,
            masks=attention,
            reconstruction=attention.mT @ held,
            target=tokens,
            grid=self.grid,
            assigned=assigned,
        )


def means(held: Float[Tensor, "B N K"], values: Float[Tensor, "B N S"]) -> Float[Tensor, "B K S"]:
    """Mean of the values that each slot holds; 0 for a slot that holds nothing."""
    return held.mT @ values / held.sum(1).clamp_min(1e-6).unsqueeze(-1)


def slot_means(held: Float[Tensor, "B N K"], keys: Float[Tensor, "B N S"]) -> Float[Tensor, "B K S"]:
    """Mean direction of the keys that each slot holds; 0 for a slot that holds nothing."""
    return F.normalize(held.mT @ keys, dim=-1)


@torch.no_grad()
def matched(
    slots: Float[Tensor, "B K S"],
    others: Float[Tensor, "B K S"],
    active: Bool[Tensor, "B K"],
    others_active: Bool[Tensor, "B K"],
) -> Int[Tensor, "B K"]:
    """The other frame's slot that is the likeliest for each slot of a frame, and it for that one; else NO_SLOT."""
    likeness = slots @ others.mT  # (B, K, K)
    likeness = likeness.masked_fill(~(active.unsqueeze(2) & others_active.unsqueeze(1)), -1.0)
    best, there = likeness.max(2)
    mutual = likeness.argmax(1).gather(1, there) == torch.arange(slots.shape[1], device=slots.device)
    return torch.where(mutual & active & (best > LEAST_LIKENESS), there, NO_SLOT)
