"""The assembled image model: normalise -> project -> slot attention -> decode (DINOSAUR, arXiv:2209.14860)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from slotlab.draws import Draws
from slotlab.models.base import Model, Output
from slotlab.models.config import SlotAttentionConfig
from slotlab.models.decoders import DECODERS
from slotlab.models.initializers import INITIALIZERS
from slotlab.models.slot_attention import SlotAttention
from slotlab.normalise import Normaliser


class SlotModel(Model):
    """Slots of one frame's patch tokens, trained to reconstruct them.

    Args:
        config: parts and sizes.
        normaliser: turns stored features into the tokens that are both input and target.
        grid: rows and columns of patches.
    """

    def __init__(self, config: SlotAttentionConfig, normaliser: Normaliser, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.grid, self.slots = config, grid, config.slots
        dim, slot_dim, patches = normaliser.dim, config.slot_dim, grid[0] * grid[1]
        self.normaliser = normaliser
        hidden = config.projection_hidden or dim
        # Two layers cured the collapse that a single linear map led to; the latter stays for comparison.
        self.project: nn.Module = (
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, slot_dim))
            if config.projection == "mlp"
            else nn.Linear(dim, slot_dim)
        )
        self.initialize = INITIALIZERS[config.initializer](config.slots, slot_dim, config.kmeans_rounds)
        self.attend = SlotAttention(slot_dim, slot_dim, config.slot_mlp_hidden, config.temperature)
        self.decode = DECODERS[config.decoder.kind](
            slot_dim, patches, dim, config.decoder.hidden, config.decoder.layers
        )

    def forward(self, features: Float[Tensor, "B N D"], draws: Draws) -> Output:
        """Stored features of any float type. ``draws`` drive the initialiser."""
        target = self.normaliser(features)  # (B, N, D)
        tokens = self.project(target)  # (B, N, S)
        slots = self.initialize(tokens, target, draws)
        attended = self.attend(tokens, slots, self.config.iterations)
        decoded = self.decode(attended)
        return Output(
            attended.slots, attended.attention, attended.logits, decoded.masks, decoded.reconstruction, target
        )
