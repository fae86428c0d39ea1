"""Predictors: from the slots of one frame to the initial slots of the next.

``active`` is False for padded slots. A predictor treats the samples of a batch apart, and draws nothing at random: its
parameters get their gradients from a second call (:mod:`slotlab.models.repeated`).
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from slotlab.config.parts import PredictorConfig
from slotlab.models.transformer import FeedForward, SelfBlock


class IdentityPredictor(nn.Module):
    """The slots unchanged: the next frame starts where this one ended."""

    def __init__(self, slot_dim: int, config: PredictorConfig) -> None:
        super().__init__()

    def forward(
        self, slots: Float[Tensor, "B K S"], active: Bool[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B K S"]:
        return slots


class MLPPredictor(nn.Module):
    """A residual MLP on each slot alone, and optionally a LayerNorm that keeps the slots from growing."""

    def __init__(self, slot_dim: int, config: PredictorConfig) -> None:
        super().__init__()
        self.move = FeedForward(slot_dim, config.hidden)
        self.norm = nn.LayerNorm(slot_dim) if config.output_norm else nn.Identity()

    def forward(
        self, slots: Float[Tensor, "B K S"], active: Bool[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B K S"]:
        moved: Tensor = self.norm(self.move(slots))
        return moved


class TransformerPredictor(nn.Module):
    """One pre-LayerNorm transformer block over the slots: SAVi's predictor, as in VideoSAUR (arXiv:2306.04829)."""

    def __init__(self, slot_dim: int, config: PredictorConfig) -> None:
        super().__init__()
        self.move = SelfBlock(slot_dim, config.heads, config.hidden, config.attention_temperature)
        self.norm = nn.LayerNorm(slot_dim) if config.output_norm else nn.Identity()

    def forward(
        self, slots: Float[Tensor, "B K S"], active: Bool[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B K S"]:
        moved: Tensor = self.norm(self.move(slots, active))
        return moved


PREDICTORS: dict[str, type[nn.Module]] = {
    "identity": IdentityPredictor,
    "mlp": MLPPredictor,
    "transformer": TransformerPredictor,
    "hungarian": IdentityPredictor,  # frames start afresh: slotlab.models.recurrence matches their slots
}
