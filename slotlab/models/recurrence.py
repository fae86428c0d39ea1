"""Slots of clips, frame by frame, as in SAVi (Kipf et al., 2022, arXiv:2111.12594)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from slotlab.config.model import RecurrentConfig, SlotAttentionConfig
from slotlab.models.initializers import INITIALIZERS
from slotlab.models.predictors import PREDICTORS
from slotlab.models.randomness import Draws
from slotlab.models.slot_attention import Attended, SlotAttention


class Recurrence(nn.Module):
    """Slot attention on every frame of a clip, started from the predictor's output for the frame before.

    The tokens of all frames are projected to keys and values in one pass; only the slots are computed in sequence.
    Without a predictor, a clip has one frame.

    Args:
        config: configuration of the whole model.
        token_dim: width of the tokens that slots attend to.
    """

    def __init__(self, config: RecurrentConfig, token_dim: int) -> None:
        super().__init__()
        rounds = config.kmeans_rounds if isinstance(config, SlotAttentionConfig) else 0
        self.config = config
        self.initialize = INITIALIZERS[config.initializer](config.slots, config.slot_dim, rounds)
        # At a fixed point no gradient reaches the first slots, and DDP fails on parameters without a gradient.
        self.initialize.requires_grad_(config.gradient != "implicit")
        self.attend = SlotAttention(
            token_dim, config.slot_dim, config.slot_mlp_hidden, config.temperature, config.gradient
        )
        predictor = config.predictor
        self.predict = PREDICTORS[predictor.kind](config.slot_dim, predictor) if predictor else None

    def forward(self, tokens: Float[Tensor, "B T N S"], clustered: Float[Tensor, "B T N D"], draws: Draws) -> Attended:
        """Slots of all frames, (B * T, ...), each clip's in order; initialisers cluster the tokens ``clustered``."""
        projected = self.attend.project(tokens)
        active = self._drawn(len(tokens), draws, tokens.device)
        frames: list[Attended] = []
        for index in range(tokens.shape[1]):
            fresh = self.predict is None or self._starts(index)
            if fresh:
                slots = self.initialize(tokens[:, index], clustered[:, index], draws)
            else:
                slots = self._next(frames[-1].slots, active)
            frames.append(self.attend.refine(projected.frame(index), slots, self._iterations(fresh), active))
        return Attended(
            torch.stack([frame.slots for frame in frames], 1).flatten(0, 1),
            torch.stack([frame.attention for frame in frames], 1).flatten(0, 1),
            torch.stack([frame.logits for frame in frames], 1).flatten(0, 1),
            None if active is None else active.repeat_interleave(len(frames), 0),
        )

    def _drawn(self, batch: int, draws: Draws, device: torch.device) -> Bool[Tensor, "B K"] | None:
        """Random slots of each clip that take part, the same in all frames; None if all always do."""
        slots, fewest = self.config.slots, self.config.fewest_slots
        if not self.training or fewest is None:
            return None
        count = fewest + (draws.uniform((batch, 1), device) * (slots - fewest + 1)).long()
        return draws.uniform((batch, slots), device).argsort(1).argsort(1) < count

    def _starts(self, index: int) -> bool:
        predictor = self.config.predictor
        return index == 0 or (predictor is not None and predictor.refresh > 0 and index % predictor.refresh == 0)

    def _iterations(self, fresh: bool) -> int:
        predictor = self.config.predictor
        return predictor.first_iterations if predictor is not None and fresh else self.config.iterations

    def _next(self, slots: Float[Tensor, "B K S"], active: Bool[Tensor, "B K"] | None) -> Float[Tensor, "B K S"]:
        assert self.predict is not None and self.config.predictor is not None
        predicted: Tensor = self.predict(slots.detach() if self.config.predictor.stop_gradient else slots, active)
        return predicted
