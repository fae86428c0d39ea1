"""A decoder that predicts patches one after the other, each from the slots and the patches before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from featcache.errors import UsageError
from slotlab.config.parts import DecoderConfig
from slotlab.models.decoders.base import Decoded, Decoder, Heads, Sizes, positions_parameter
from slotlab.models.randomness import Draws
from slotlab.models.slot_attention import Attended
from slotlab.models.transformer import CausalCrossBlock, Memory, memories, xavier


class TransformerDecoder(Decoder):
    """Autoregressive transformer of SLATE (Singh et al., 2022, arXiv:2110.11405) and DINOSAUR, on patch tokens.

    A causal transformer predicts each token from the true ones before it and, by cross-attention, from the slots.
    The masks are the last block's cross-attention, averaged over the heads.

    ``config.source`` says whose layers, from a token to the next one:

    - ``slotlab``: a linear layer, positions of the tokens to predict, blocks, a LayerNorm, a linear layer.
    - ``dinosaur`` (amazon-science/object-centric-learning-framework 0a97292): a linear layer and a LayerNorm, the start
      token included; blocks as wide as the tokens, which they give. Where a token lies is read from the token.
    - ``spot`` (gkakogeorgiou/spot 13c5926): as that, but attentions have no biases, the first block adds to its normed
      input, and a LayerNorm ends it.
    - ``semantic`` (sabrikhalil/Semantic-Slots b0f248d): a linear layer and a LayerNorm, positions of the tokens that
      are read, blocks as wide as the tokens, a linear layer without bias.

    ``permuted`` trains with a random scan of the patches at each step, from any corner along rows or columns, each with
    its start token, so that fewer patches can be predicted from their neighbours alone (SPOT, Kakogeorgiou et
    al., 2024, arXiv:2312.00648); SPOT itself has a ninth, a spiral. Without it patches come row by row, and so they do
    when a trained model is used. With ``config.scans`` = ``all`` tokens and masks are then the means over all scans, as
    SPOT is evaluated (``--eval_permutations all``).
    """

    orders: Tensor  # (O, N): patches in the order of each scan

    def __init__(self, sizes: Sizes, config: DecoderConfig) -> None:
        super().__init__(sizes, config)
        source, slot_dim, tokens = config.source, sizes.slot_dim, sizes.dim
        own, spot = source == "slotlab", source == "spot"
        width = config.hidden if own else tokens
        if width % config.heads:
            raise UsageError(f"model.decoder.heads = {config.heads} do not divide the features' width of {width}")
        orders = [scan_orders(sizes.grid)] if config.permuted else [torch.arange(sizes.patches)[None]]
        if config.permuted and spot:
            orders.append(spiral(sizes.grid)[None])
        self.register_buffer("orders", torch.cat(orders), persistent=False)
        self.begin = nn.Parameter(torch.randn(len(self.orders), width) * width**-0.5)
        self.position = positions_parameter(sizes, width) if source in ("slotlab", "semantic") else None
        self.embed: nn.Module = nn.Linear(tokens, width)
        if not own:
            self.embed = nn.Sequential(nn.Linear(tokens, width, bias=False), nn.LayerNorm(width))
        self.norm_slots = nn.Sequential(nn.Linear(slot_dim, width, bias=False), nn.LayerNorm(width))
        blocks = [
            CausalCrossBlock(width, config.heads, 4 * width, width, bias=not spot, opens=spot and index == 0)
            for index in range(config.blocks)
        ]
        self.blocks, self.last = nn.ModuleList(blocks[:-1]), blocks[-1]
        self.norm: nn.Module = nn.LayerNorm(width) if own or spot else nn.Identity()
        for part in (self.embed, self.blocks, self.last):
            part.apply(xavier)
        self.heads = Heads(width, sizes)
        if source == "semantic":
            self.heads.tokens = nn.Linear(width, tokens, bias=False)
        elif not own:
            self.heads.tokens = nn.Identity()

    def forward(self, attended: Attended, target: Float[Tensor, "B N D"], draws: Draws) -> Decoded:
        if self.training and len(self.orders) > 1:
            drawn = draws.integers(len(self.orders), 1, target.device)  # (1,)
            scans = [(self.orders[drawn][0], self.begin[drawn])]
        else:
            count = len(self.orders) if self.config.scans == "all" else 1
            scans = [(self.orders[scan], self.begin[scan : scan + 1]) for scan in range(count)]
        attentions = [block.to_slots for block in (*self.blocks, self.last)]
        slots = memories(attentions, self.norm_slots(attended.slots))
        passes = [self._scan(order, begin, slots, attended, target) for order, begin in scans]
        tokens, masks = (
            torch.stack(parts).mean(0) if len(parts) > 1 else parts[0] for parts in zip(*passes, strict=True)
        )
        decoded, similarity = self.heads(tokens)
        return Decoded(decoded, masks, similarity)

    def _scan(
        self,
        order: Int[Tensor, N],
        begin: Float[Tensor, "1 W"],
        slots: Sequence[Memory],
        attended: Attended,
        target: Float[Tensor, "B N D"],
    ) -> tuple[Float[Tensor, "B N W"], Float[Tensor, "B K N"]]:
        """What the blocks give of all patches, and the masks, by one scan. ``slots`` as each block attends to them."""
        tokens = self._before(target[:, order], begin.expand(len(target), 1, -1), order)  # (B, N, W)
        for block, memory in zip(self.blocks, slots[:-1], strict=True):
            tokens = block(tokens, memory, attended.active)
        tokens, masks = self.last.with_weights(tokens, slots[-1], attended.active)
        back = order.argsort()
        return self.norm(tokens)[:, back], masks[..., back]

    def _before(
        self, target: Float[Tensor, "B N D"], begin: Float[Tensor, "B 1 W"], order: Int[Tensor, N]
    ) -> Float[Tensor, "B N W"]:
        """What each token is predicted from: the one before it, of the first the start token."""
        if self.config.source in ("dinosaur", "spot"):
            embedded: Tensor = self.embed(torch.cat([begin.to(target.dtype), target[:, :-1]], 1))
            return embedded
        assert self.position is not None
        before = self.embed(target[:, :-1])
        if self.config.source == "semantic":
            before = before + self.position[order[:-1]]
            return torch.cat([begin.to(before.dtype), before], 1)
        return torch.cat([begin.to(before.dtype), before], 1) + self.position[order]


def scan_orders(grid: tuple[int, int]) -> Int[Tensor, "8 N"]:
    """Indices of the patches in eight scans: by rows and by columns from each corner; by rows from patch 0 first."""
    cells = torch.arange(grid[0] * grid[1]).view(grid)
    flips = [cells.flip(axes) for axes in ((), (1,), (0,), (0, 1))]
    return torch.stack([way.flatten() for flip in flips for way in (flip, flip.T)])


def spiral(grid: tuple[int, int]) -> Int[Tensor, N]:
    """Indices of the patches from the middle outwards, the last of them up the right side."""
    cells = torch.arange(grid[0] * grid[1]).view(grid).rot90()
    rounds = []
    while cells.numel():
        rounds.append(cells[0])
        cells = cells[1:].T.flip(0)
    return torch.cat(rounds).flip(0)
