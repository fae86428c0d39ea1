"""Masks that move: each is shifted, scaled and spread, and all are layered into one picture. Nothing is learnt."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SHARP = 1e-4  # patches; the spread of a mask whose place is certain
LARGEST_SCALE = 2.0  # of a mask's sides from the frame that it was seen in


def moved(
    masks: Float[Tensor, "*B K N"],
    shift: Float[Tensor, "*B K 2"],
    scale: Float[Tensor, "*B K"],
    spread: Float[Tensor, "*B K"],
    centre: Float[Tensor, "*B K 2"],
    grid: tuple[int, int],
) -> Float[Tensor, "*B K N"]:
    """Masks shifted by rows and columns, scaled about their centres, and blurred by a Gaussian; all in patches.

    Each patch of a mask is a box that moves, grows and spreads; a patch of the result holds its overlap with them. So
    an unmoved mask stays what it is, a shift by parts of a patch is bilinear, and what leaves the frame is lost.
    """
    maps = masks.unflatten(-1, grid)  # (*B, K, rows, columns)
    rows, columns = (
        overlap(side, shift[..., axis], scale, spread, centre[..., axis]) for axis, side in enumerate(grid)
    )
    return (rows @ maps @ columns.mT).flatten(-2)


def overlap(
    side: int,
    shift: Float[Tensor, "*B K"],
    scale: Float[Tensor, "*B K"],
    spread: Float[Tensor, "*B K"],
    centre: Float[Tensor, "*B K"],
) -> Float[Tensor, "*B K side side"]:
    """Share of patch i (rows) that the moved patch j (columns) covers, along an axis of ``side`` patches.

    The box of j, ``scale`` wide, is spread by a Gaussian: the overlap is a second difference of the Gaussian's second
    integral.
    """
    place = torch.arange(side, device=shift.device, dtype=shift.dtype)
    shift, scale, spread, centre = (x[..., None, None] for x in (shift, scale, spread, centre))
    scale = scale.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
    spread = spread.clamp_min(SHARP)
    offset = place[:, None] - (centre + shift + scale * (place - centre))  # (*B, K, side, side)
    outer, inner = (scale + 1) / 2, (scale - 1) / 2

    def integral(x: Tensor) -> Tensor:
        unit = x / spread
        below = 0.5 * (1 + torch.erf(unit * 0.5**0.5))
        return x * below + spread * (-0.5 * unit.square()).exp() * (2 * math.pi) ** -0.5

    ends = integral(offset + outer) + integral(offset - outer)
    return ends - integral(offset + inner) - integral(offset - inner)


def layered(masks: Float[Tensor, "*B K N"], background: Bool[Tensor, "*B K"]) -> Float[Tensor, "*B K N"]:
    """Moved masks as masks that sum to one over the slots at every patch.

    Where objects overlap they share the patch; what no object covers, such as the hole that one leaves, is the
    background's.
    """
    behind = background.unsqueeze(-1)
    objects = masks.masked_fill(behind, 0.0)
    objects = objects / objects.sum(-2, keepdim=True).clamp_min(1.0)
    rest = 1 - objects.sum(-2, keepdim=True)
    return torch.where(behind, rest, objects)


def carried(
    values: Float[Tensor, "N D"],
    masks: Float[Tensor, "K N"],
    shift: Float[Tensor, "H K 2"],
    scale: Float[Tensor, "H K"],
    spread: Float[Tensor, "H K"],
    centre: Float[Tensor, "H K 2"],
    grid: tuple[int, int],
) -> Float[Tensor, "H N D"]:
    """What lies under each mask, moved with it: values of one frame in H later ones.

    The background's stay where they are, and are missing where it could not be seen.
    """
    behind = widest(masks)
    moves = (shift, scale, spread, centre)
    bare = moved(masks.expand(len(shift), -1, -1), *moves, grid)
    whole = layered(bare, behind.expand(len(shift), -1))
    ground = masks[behind][0].unsqueeze(-1)  # (N, 1)
    found = whole[:, behind][:, 0].unsqueeze(-1) * (ground * values)
    for slot in (~behind & (masks.sum(-1) > 0)).nonzero().flatten().tolist():
        layer = (masks[slot].unsqueeze(-1) * values).T.expand(len(shift), -1, -1)  # (H, D, N)
        of = (move[:, slot, None].expand(-1, len(layer[0]), *move.shape[2:]) for move in moves)
        part = whole[:, slot] / bare[:, slot].clamp_min(1e-6)  # the rest is shared with others
        found = found + moved(layer, *of, grid).mT * part.unsqueeze(-1)
    return found


def widest(masks: Float[Tensor, "*B K N"]) -> Bool[Tensor, "*B K"]:
    """The slot that holds most of the frame: what lies behind the others."""
    areas = masks.sum(-1)
    slots = torch.arange(areas.shape[-1], device=areas.device)
    return slots == areas.argmax(-1, keepdim=True)
