"""Decoders: slots -> patch tokens and masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slotlab.models.slot_attention import Attended


@dataclass(frozen=True)
class Decoded:
    """``masks`` sum to one over the slots at every patch."""

    reconstruction: Float[Tensor, "B N D"]
    masks: Float[Tensor, "B K N"]


def _hidden_layers(width: int, count: int) -> nn.Sequential:
    """``count`` further hidden layers behind an activation."""
    layers: list[nn.Module] = [nn.ReLU()]
    for _ in range(count):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers)


class MLPDecoder(nn.Module):
    """MLP broadcast decoder of DINOSAUR (Seitzer et al., 2023, arXiv:2209.14860), by two exact identities.

    As published, an MLP maps (slot + position) to a token and a mask logit for every slot and patch, and the
    tokens are averaged with the softmax of the logits. The first linear layer is applied to slots and
    positions apart and added (it is linear); the last one is applied after the average (it is linear, and
    the weights sum to one). What remains for every slot and patch are the hidden layers alone, and the
    (B, K, N, D) tensor is never made.
    """

    def __init__(self, slot_dim: int, patches: int, dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(patches, slot_dim) * slot_dim**-0.5)
        self.first = nn.Linear(slot_dim, hidden)
        self.hidden = _hidden_layers(hidden, layers - 1)
        self.last = nn.Linear(hidden, dim)
        self.mask = nn.Linear(hidden, 1)

    def forward(self, attended: Attended) -> Decoded:
        from_slots = self.first(attended.slots)  # (B, K, H)
        from_position = nn.functional.linear(self.position, self.first.weight)  # (N, H)
        hidden = self.hidden(from_slots[:, :, None] + from_position)  # (B, K, N, H)
        masks = self.mask(hidden)[..., 0].float().softmax(dim=1)  # (B, K, N)
        mixed = torch.einsum("bkn,bknh->bnh", masks.to(hidden.dtype), hidden)
        return Decoded(self.last(mixed), masks)


class MixDecoder(nn.Module):
    """Mix the slots by the attention that formed them, then decode one vector a patch.

    The plain form of VideoSAUR's slot mixer (Zadaianchuk et al., 2023, arXiv:2306.04829): the mixing weights
    are slot attention's own, so the masks that are scored are the masks that are trained, and no slot is
    decoded at a patch it does not hold. K times cheaper than the broadcast decoder.
    """

    def __init__(self, slot_dim: int, patches: int, dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(patches, slot_dim) * slot_dim**-0.5)
        self.first = nn.Linear(slot_dim, hidden)
        self.hidden = _hidden_layers(hidden, layers - 1)
        self.last = nn.Linear(hidden, dim)

    def forward(self, attended: Attended) -> Decoded:
        masks = attended.attention  # (B, K, N)
        mixed = torch.einsum("bkn,bks->bns", masks.to(attended.slots.dtype), attended.slots)
        return Decoded(self.last(self.hidden(self.first(mixed + self.position))), masks)


DECODERS = {"mlp": MLPDecoder, "mix": MixDecoder}
