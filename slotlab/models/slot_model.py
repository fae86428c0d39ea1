"""The assembled image model: normalise -> project -> slot attention -> decode (DINOSAUR, arXiv:2209.14860)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slotlab.config import ModelConfig
from slotlab.models.decoders import DECODERS
from slotlab.models.initializers import INITIALIZERS
from slotlab.models.slot_attention import SlotAttention
from slotlab.normalise import Normaliser


@dataclass(frozen=True)
class Output:
    """What one forward pass gives; the loss and the metrics read nothing else."""

    slots: Tensor  # (B, K, S)
    attention: Tensor  # (B, K, N), sums to one over slots
    logits: Tensor  # (B, K, N), before that softmax
    masks: Tensor  # (B, K, N), the decoder's
    reconstruction: Tensor  # (B, N, D)
    target: Tensor  # (B, N, D), the normalised features


class SlotModel(nn.Module):
    """Slots of one frame's patch tokens, trained to reconstruct them.

    Args:
        config: parts and sizes.
        normaliser: turns stored features into the tokens that are both input and target.
        grid: rows and columns of patches.
    """

    def __init__(self, config: ModelConfig, normaliser: Normaliser, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        dim, slot_dim, patches = len(normaliser.shift), config.slot_dim, grid[0] * grid[1]
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

    def forward(self, features: Tensor, generator: torch.Generator) -> Output:
        """Stored features (B, N, D) of any float type. ``generator`` (on the CPU) drives the initialiser."""
        target = self.normaliser(features)  # (B, N, D)
        tokens = self.project(target)  # (B, N, S)
        slots = self.initialize(tokens, target, generator)
        attended = self.attend(tokens, slots, self.config.iterations)
        decoded = self.decode(attended)
        return Output(
            attended.slots, attended.attention, attended.logits, decoded.masks, decoded.reconstruction, target
        )
