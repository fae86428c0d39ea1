"""Predictors: the slots of one frame -> where the slots of the next one start.

``active`` are those that are no padding.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from slotlab.config.model import PredictorConfig
from slotlab.models.transformer import FeedForward, SelfBlock


class IdentityPredictor(nn.Module):
    """The next frame starts where this one ended."""

    def __init__(self, slot_dim: int, config: PredictorConfig) -> None:
        super().__init__()

    def forward(
        self, slots: Float[Tensor, "B K S"], active: Bool[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B K S"]:
        return slots


class MLPPredictor(nn.Module):
    """Each slot by itself: a residual MLP, and, if asked, a LayerNorm that keeps the slots from growing."""

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
    """Slots that see each other: one pre-LayerNorm block for SAVi's predictor, as in VideoSAUR (arXiv:2306.04829)."""

    def __init__(self, slot_dim: int, config: PredictorConfig) -> None:
        super().__init__()
        self.move = SelfBlock(slot_dim, config.heads, config.hidden)
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
}
