"""A decoder of convolutions over the grid of patches, which see a patch's neighbours."""

from __future__ import annotations

from itertools import repeat

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slotlab.config.parts import DecoderConfig
from slotlab.models.competition import hide_padding
from slotlab.models.decoders.base import Decoded, Decoder, Sizes
from slotlab.models.layers import MLP
from slotlab.models.randomness import Draws
from slotlab.models.slot_attention import Attended

KERNEL = 5  # side of all convolutions but the last
LARGEST_LOGIT = 10.0
FRAMES = 4  # that pass the convolutions at a time with ``recompute``


class SpatialBroadcastDecoder(Decoder):
    """Spatial broadcast decoder (Watters et al., 2019, arXiv:1901.07017) onto patch tokens.

    Sizes of the study Menserve/Object-centric-representation (commit 6a307c5). A slot is widened by a LayerNorm and
    two layers, laid on every patch beside the patch's coordinates in [-1, 1], and convolved to a token and a mask logit
    at every patch. The logits are divided by the temperature, then kept within 10 either side; the tokens are averaged
    with their softmax over the slots.

    The first convolution sees the same slot everywhere but at the border, so that it runs on a grid of 5 x 5 whose
    middle is then repeated; the coordinates are convolved once for all slots (it is linear). ``recompute`` takes a few
    frames at a time, and the backward pass computes their activations again.
    """

    coordinates: Tensor  # (1, 2, rows, columns): x and y

    def __init__(self, sizes: Sizes, config: DecoderConfig) -> None:
        super().__init__(sizes, config)
        slot_dim, width = sizes.slot_dim, config.hidden
        self.widen = MLP(
            nn.LayerNorm(slot_dim), nn.Linear(slot_dim, 2 * slot_dim), nn.ReLU(), nn.Linear(2 * slot_dim, width)
        )
        self.first = nn.Conv2d(width + 2, width, KERNEL, padding="same")
        layers: list[nn.Module] = [nn.ReLU()]
        for _ in range(config.layers - 1):
            layers += [nn.Conv2d(width, width, KERNEL, padding="same"), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        channels = sizes.dim + (sizes.patches if sizes.similarity else 0)  # of a token, and of its similarities
        self.last = nn.Conv2d(width, channels + 1, 3, padding="same")  # the mask logit is the last
        y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in sizes.grid), indexing="ij")
        self.register_buffer("coordinates", torch.stack([x, y])[None], persistent=False)

    def forward(self, attended: Attended, target: Float[Tensor, "B N D"], draws: Draws) -> Decoded:
        slots, active = self.widen(attended.slots), attended.active  # (B, K, H)
        if not (self.config.recompute and torch.is_grad_enabled()):
            mixed, masks = self._mix(slots, active)
        else:
            actives = repeat(None) if active is None else torch.split(active, FRAMES)
            parts = [
                checkpoint(self._mix, *given, use_reentrant=False, preserve_rng_state=False)
                for given in zip(torch.split(slots, FRAMES), actives, strict=False)
            ]
            mixed, masks = (torch.cat(part) for part in zip(*parts, strict=True))
        tokens, similarity = mixed[:, : self.sizes.dim], mixed[:, self.sizes.dim :]
        return Decoded(tokens.mT, masks, similarity.mT if self.sizes.similarity else None)

    def _mix(
        self, slots: Float[Tensor, "B K H"], active: Bool[Tensor, "B K"] | None
    ) -> tuple[Float[Tensor, "B C N"], Float[Tensor, "B K N"]]:
        """Channels averaged over the slots by the masks, tokens first, and these masks."""
        hidden = self.hidden(self._first(slots.flatten(0, 1)))  # (B K, H, rows, columns)
        decoded = self.last(hidden).flatten(2).unflatten(0, slots.shape[:2])  # (B, K, C + 1, N)
        channels, logits = torch.split(decoded, [decoded.shape[2] - 1, 1], 2)
        logits = (logits.squeeze(2).float() / self.config.mask_temperature).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        masks = hide_padding(logits, active).softmax(1)  # (B, K, N)
        return (masks.unsqueeze(2).to(channels.dtype) * channels).sum(1), masks

    def _first(self, slots: Float[Tensor, "F H"]) -> Float[Tensor, "F H rows columns"]:
        """The first convolution, of slots at every patch beside its coordinates."""
        of_slots, of_place = self.first.weight[:, :-2], self.first.weight[:, -2:]
        small = [min(side, KERNEL) for side in self.sizes.grid]
        convolved = F.conv2d(slots[:, :, None, None].expand(-1, -1, *small), of_slots, padding="same")
        for axis, side in zip((2, 3), self.sizes.grid, strict=True):
            convolved = repeat_middle(convolved, axis, side)
        return convolved + F.conv2d(self.coordinates, of_place, self.first.bias, padding="same")


def repeat_middle(values: Tensor, axis: int, length: int) -> Tensor:
    """``values`` with the middle of its KERNEL entries along ``axis`` repeated, until there are ``length``."""
    if length <= KERNEL:
        return values
    border = KERNEL // 2
    before, middle, after = torch.split(values, [border, 1, border], axis)
    return torch.cat([before, middle.repeat_interleave(length - 2 * border, axis), after], axis)
