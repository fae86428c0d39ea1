"""Decoders that mix the slots into one vector a patch and decode only that: K times cheaper than a broadcast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from slotlab.config.parts import DecoderConfig
from slotlab.models.competition import hide_padding
from slotlab.models.decoders.base import Decoded, Decoder, Heads, Sizes, hidden_layers, positions_parameter, select
from slotlab.models.layers import MLP
from slotlab.models.randomness import Draws
from slotlab.models.slot_attention import Attended
from slotlab.models.transformer import CrossBlock, memories, xavier


class MixDecoder(Decoder):
    """Decoder that mixes the slots by the attention that formed them, and decodes one vector a patch.

    A plain form of VideoSAUR's slot mixer (Zadaianchuk et al., 2023, arXiv:2306.04829): the mixing weights are slot
    attention's, so the scored masks are the trained ones, and no slot is decoded at a patch that it does not hold.
    """

    def __init__(self, sizes: Sizes, config: DecoderConfig) -> None:
        super().__init__(sizes, config)
        self.position = positions_parameter(sizes, sizes.slot_dim)
        self.render = Render(sizes, config)

    def forward(self, attended: Attended, target: Float[Tensor, "B N D"], draws: Draws) -> Decoded:
        positions = self.draw_positions(draws, attended.slots.device)
        masks = attended.attention  # (B, K, M)
        if positions is not None:
            masks = masks[..., positions]
        tokens, similarity = self.render(mix(masks, attended.slots, select(self.position, positions)))
        return Decoded(tokens, masks, similarity, positions)


class SlotMixerDecoder(Decoder):
    """Slot mixer (Sajjadi et al., 2022, arXiv:2206.06922) as VideoSAUR uses it (Zadaianchuk et al., 2023).

    Learnt positions query the slots in a transformer without attention among positions; a last attention of one head
    weighs the slots at each position, and these weights are the masks. An MLP decodes the mixture of slots.
    """

    def __init__(self, sizes: Sizes, config: DecoderConfig) -> None:
        super().__init__(sizes, config)
        width = sizes.slot_dim
        self.position = positions_parameter(sizes, width)
        self.norm_slots = nn.LayerNorm(width)
        sizes_of_block = (width, config.heads, 4 * width, width, config.attention_temperature)
        self.blocks = nn.ModuleList(CrossBlock(*sizes_of_block) for _ in range(config.blocks))
        self.to_query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.to_key = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        for part in (self.blocks, self.to_query, self.to_key):
            part.apply(xavier)
        self.render = Render(sizes, config)

    def forward(self, attended: Attended, target: Float[Tensor, "B N D"], draws: Draws) -> Decoded:
        positions = self.draw_positions(draws, attended.slots.device)
        slots, active = attended.slots, attended.active
        position = select(self.position, positions)  # (M, S)
        query = position.expand(len(slots), -1, -1)
        blocks = cast(Sequence[CrossBlock], self.blocks)
        seen = memories([block.attend for block in blocks], self.norm_slots(slots))
        for block, memory in zip(blocks, seen, strict=True):
            query = block(query, memory, active)
        norm_query, to_query = self.to_query
        # As in slot attention, keys hold the map of the queries and the scale.
        keys = F.linear(self.to_key(slots), to_query.weight.T * slots.shape[-1] ** -0.5)  # (B, K, S)
        logits = (norm_query(query) @ keys.mT).float()  # (B, M, K)
        masks = hide_padding(logits.mT, active).mT.softmax(-1).mT  # (B, K, M)
        tokens, similarity = self.render(mix(masks, slots, position))
        return Decoded(tokens, masks, similarity, positions)


class Render(nn.Module):
    """The MLP from one vector a patch to its token, and, if asked, its similarities."""

    def __init__(self, sizes: Sizes, config: DecoderConfig) -> None:
        super().__init__()
        self.layers = MLP(nn.Linear(sizes.slot_dim, config.hidden), *hidden_layers(config.hidden, config.layers - 1))
        self.heads = Heads(config.hidden, sizes)

    def forward(self, mixed: Float[Tensor, "B M S"]) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B M N"] | None]:
        decoded: tuple[Tensor, Tensor | None] = self.heads(self.layers(mixed))
        return decoded


def mix(
    masks: Float[Tensor, "B K M"], slots: Float[Tensor, "B K S"], position: Float[Tensor, "M S"]
) -> Float[Tensor, "B M S"]:
    """The mean of the slots at each patch, weighted by the masks, and the patch's position."""
    return torch.baddbmm(position, masks.mT.to(slots.dtype), slots)
