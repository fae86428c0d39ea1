"""The interface of decoders, and the layers that they share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slotlab.config.parts import DecoderConfig
from slotlab.models.layers import MLP
from slotlab.models.randomness import Draws
from slotlab.models.slot_attention import Attended


@dataclass(frozen=True)
class Decoded:
    """Decoded patches: M of N, all or those at ``positions``. ``masks`` sum to one over the slots at every patch."""

    reconstruction: Float[Tensor, "B M D"]
    masks: Float[Tensor, "B K M"]
    similarity: Float[Tensor, "B M N"] | None = None  # logits over the patches of a later frame
    positions: Int[Tensor, M] | None = None


@dataclass(frozen=True)
class Sizes:
    """The sizes that a decoder is built for."""

    slot_dim: int
    grid: tuple[int, int]
    dim: int  # of the tokens to reconstruct
    reconstructs: bool = True  # False: no loss uses the reconstruction, and its layer is not trained
    similarity: bool = False  # also predict each patch's similarity with those of a later frame

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


class Decoder(nn.Module):
    """A decoder from slots to patch tokens and masks."""

    def __init__(self, sizes: Sizes, config: DecoderConfig) -> None:
        super().__init__()
        self.sizes, self.config = sizes, config

    def forward(self, attended: Attended, target: Float[Tensor, "B N D"], draws: Draws) -> Decoded:
        """Tokens and masks from slots. Autoregressive decoders read ``target``; ``draws`` are for training alone."""
        raise NotImplementedError

    def draw_positions(self, draws: Draws, device: torch.device) -> Tensor | None:
        """Random patches (M,) to decode in training; None for all.

        If patches are decoded independently, a subset estimates a mean loss over them without bias.
        """
        wanted = self.config.patches
        if wanted is None or not self.training or wanted >= self.sizes.patches:
            return None
        return draws.choice(self.sizes.patches, wanted, device)


class Heads(nn.Module):
    """The last linear layers: to tokens, and, if asked, to similarities with the patches of a later frame."""

    def __init__(self, width: int, sizes: Sizes) -> None:
        super().__init__()
        self.tokens: nn.Module = nn.Linear(width, sizes.dim).requires_grad_(sizes.reconstructs)
        self.similarity = nn.Linear(width, sizes.patches) if sizes.similarity else None

    def forward(self, hidden: Float[Tensor, "B M H"]) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B M N"] | None]:
        return self.tokens(hidden), None if self.similarity is None else self.similarity(hidden)


def positions_parameter(sizes: Sizes, width: int) -> nn.Parameter:
    """Learnt positions (N, width)."""
    return nn.Parameter(torch.randn(sizes.patches, width) * width**-0.5)


def select(positions: Float[Tensor, "N W"], chosen: Int[Tensor, M] | None) -> Float[Tensor, "M W"]:
    """The chosen rows of the positions; all of them if ``chosen`` is None."""
    return positions if chosen is None else positions[chosen]


def hidden_layers(width: int, count: int) -> MLP:
    """An activation, and ``count`` further hidden layers."""
    layers: list[nn.Module] = [nn.ReLU()]
    for _ in range(count):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return MLP(*layers)
