"""The assembled image model: normalise -> project -> slot attention -> decode (DINOSAUR, arXiv:2209.14860)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slotlab.config import SlotAttentionConfig
from slotlab.models.decoders import DECODERS
from slotlab.models.initializers import INITIALIZERS
from slotlab.models.output import Output
from slotlab.models.slot_attention import SlotAttention
from slotlab.normalise import Normaliser


class SlotModel(nn.Module):
    """Slots of one frame's patch tokens, trained to reconstruct them.

    Args:
        config: parts and sizes.
        normaliser: turns stored features into the tokens that are both input and target.
        grid: rows and columns of patches.
    """

    def __init__(self, config: SlotAttentionConfig, normaliser: Normaliser, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.grid = config, grid
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
        self.decode = DECODERS[config.decoder](slot_dim, patches, dim, config.decoder_hidden, config.decoder_layers)

    def forward(self, features: Float[Tensor, "B N D"], generator: torch.Generator) -> Output:
        """Stored features of any float type. ``generator`` (on the CPU) drives the initialiser."""
        target = self.normaliser(features)  # (B, N, D)
        tokens = self.project(target)  # (B, N, S)
        slots = self.initialize(tokens, target, generator)
        attended = self.attend(tokens, slots, self.config.iterations)
        decoded = self.decode(attended)
        return Output(
            attended.slots, attended.attention, attended.logits, decoded.masks, decoded.reconstruction, target
        )
