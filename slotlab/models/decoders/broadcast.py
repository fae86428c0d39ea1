"""A decoder that decodes every slot at every patch: DINOSAUR's MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slotlab.config.parts import DecoderConfig
from slotlab.models.competition import hide_padding
from slotlab.models.decoders.base import Decoded, Decoder, Heads, Sizes, hidden_layers, positions_parameter, select
from slotlab.models.decoders.portions import Given, Portions, averaged, mixed
from slotlab.models.randomness import Draws
from slotlab.models.repeated import joined
from slotlab.models.slot_attention import Attended

# Rows of hidden activations (one for each slot and patch) that pass the layers at a time, or nearly as many: few enough
# for a CPU's cache; as many as a GPU has memory for, as each turn has kernels to launch; fewer where a compiler unrolls
# the turns, and keeps gradients beside activations.
ROWS_ON_CPU, ROWS, ROWS_COMPILED = 1 << 11, 1 << 20, 1 << 18


class MLPDecoder(Decoder):
    """MLP broadcast decoder of DINOSAUR (Seitzer et al., 2023, arXiv:2209.14860), by two exact identities.

    As published, an MLP maps (slot + position) to a token and a mask logit for every slot and patch, and the
    tokens are averaged with the softmax of the logits. The first linear layer is applied to slots and
    positions apart and added (it is linear); the last one is applied after the average (it is linear, and
    the weights sum to one). Only the hidden layers run for every slot and patch, and the
    (B, K, N, D) tensor is never made.

    Patches pass the hidden layers a few at a time. The first activation is a cheap sum, so the backward pass computes
    it again instead of keeping it; ``recompute`` does so with all activations.

    The softmax has a temperature. In training, masks can be hard, one slot a patch, with the gradient of soft
    ones: the largest (straight through, Bengio et al., 2013, arXiv:1308.3432), or a draw (Gumbel-
    softmax, Jang et al., 2017, arXiv:1611.01144).
    """

    def __init__(self, sizes: Sizes, config: DecoderConfig) -> None:
        super().__init__(sizes, config)
        self.position = positions_parameter(sizes, sizes.slot_dim)
        self.first = nn.Linear(sizes.slot_dim, config.hidden)
        self.hidden = hidden_layers(config.hidden, config.layers - 1)
        self.mask = nn.Linear(config.hidden, 1)
        self.heads = Heads(config.hidden, sizes)
        self.rows: int | None = None  # of hidden activations at a time; None: what suits the device

    def forward(self, attended: Attended, target: Float[Tensor, "B N D"], draws: Draws) -> Decoded:
        positions = self.draw_positions(draws, attended.slots.device)
        slots, active = attended.slots, attended.active
        from_slots = self.first(slots)  # (B, K, H)
        from_position = F.linear(select(self.position, positions), self.first.weight)  # (M, H)
        noise = None
        if self.training and self.config.masks == "gumbel":
            shape = (len(slots), len(from_position), slots.shape[1])
            noise = -draws.exponential(shape, slots.device).log()  # (B, M, K), of Gumbel's distribution
        patches = len(from_position)
        step = self._patches_at_a_time(slots, patches)
        places = [slice(start, start + step) for start in range(0, patches, step)]
        hidden, masks = self._mix(Given(from_slots, from_position, noise, active), places)
        tokens, similarity = self.heads(hidden)
        return Decoded(tokens, masks.transpose(1, 2), similarity, positions)

    def _patches_at_a_time(self, slots: Float[Tensor, "B K S"], patches: int) -> int:
        usual = ROWS_ON_CPU if slots.device.type == "cpu" else ROWS
        rows = ROWS_COMPILED if torch.compiler.is_compiling() else self.rows or usual
        turns = max(1, round(patches * slots.shape[0] * slots.shape[1] / rows))
        return math.ceil(patches / turns)

    def _mix(self, given: Given, places: Sequence[slice]) -> tuple[Float[Tensor, "B M H"], Float[Tensor, "B M K"]]:
        """Hidden vectors of all patches, averaged over the slots by the masks, and these masks."""
        recompute = self.config.recompute and torch.is_grad_enabled()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            linear = [layer for layer in self.hidden if isinstance(layer, nn.Linear)]
            return mixed(given, Portions(places, self.masks, recompute), linear, self.mask)
        parts = []
        for place in places:  # torch.compile decides itself what to keep, but for this
            if recompute:
                parts.append(checkpoint(self._mix_some, given, place, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._mix_some(given, place))
        hidden, masks = (joined(part, 1) for part in zip(*parts, strict=True))
        return hidden, masks

    def _mix_some(self, given: Given, place: slice) -> tuple[Float[Tensor, "B m H"], Float[Tensor, "B m K"]]:
        hidden = self.hidden(given.slots[:, None] + given.position[place, None])
        masks = self.masks(self.mask(hidden).squeeze(-1), given, place)
        return averaged(hidden, masks), masks

    def masks(self, logits: Float[Tensor, "B m K"], given: Given, place: slice) -> Float[Tensor, "B m K"]:
        """The masks of some patches, by their logits."""
        logits = hide_padding(logits.float().transpose(1, 2), given.active).transpose(1, 2)
        if given.noise is not None:
            logits = logits + given.noise[:, place]
        temperature = self.config.mask_temperature
        soft = (logits if temperature == 1 else logits / temperature).softmax(-1)
        if not self.training or self.config.masks == "soft":
            return soft
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard + soft - soft.detach()
