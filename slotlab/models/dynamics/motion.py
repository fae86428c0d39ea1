"""Masks that move: each is shifted and spread, and all are layered into one picture. Nothing is learnt."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SHARP = 1e-4  # patches; the spread of a mask whose place is certain


def moved(
    masks: Float[Tensor, "*B K N"],
    shift: Float[Tensor, "*B #K 2"],
    spread: Float[Tensor, "*B #K"],
    grid: tuple[int, int],
) -> Float[Tensor, "*B K N"]:
    """Masks shifted by rows and columns, and blurred by a Gaussian; both in patches.

    Each patch of a mask is a box that moves and spreads; a patch of the result holds its overlap with them. So an
    unmoved mask stays what it is, a shift by parts of a patch is bilinear, and what leaves the frame is lost.
    """
    rows, columns = (overlap(side, shift[..., axis], spread) for axis, side in enumerate(grid))
    found: Tensor = rows @ on_grid(masks, grid) @ columns.mT
    return found.flatten(-2)


def on_grid(masks: Float[Tensor, "*B N"], grid: tuple[int, int]) -> Float[Tensor, "*B rows columns"]:
    """Masks as maps of rows and columns."""
    return masks.reshape(*masks.shape[:-1], *grid)


def overlap(side: int, shift: Float[Tensor, "*B"], spread: Float[Tensor, "*B"]) -> Float[Tensor, "*B side side"]:
    """Share of patch i (rows) that the moved patch j (columns) covers, along an axis of ``side`` patches.

    It depends on i - j alone: the box of j, spread by a Gaussian, overlaps that of i by a second difference of the
    Gaussian's second integral.
    """
    apart = torch.arange(-side, side + 1, device=shift.device, dtype=shift.dtype)
    spread = spread.clamp_min(SHARP).unsqueeze(-1)
    offset = apart - shift.unsqueeze(-1)  # (*B, 2 * side + 1)
    unit = (offset / spread).clamp(-9, 9)  # beyond, a density is nothing, and slow to compute
    below = 0.5 * (1 + torch.erf(unit * 0.5**0.5))
    integral = offset * below + spread * (-0.5 * unit.square()).exp() * (2 * math.pi) ** -0.5
    covered = integral[..., 2:] - 2 * integral[..., 1:-1] + integral[..., :-2]  # of i - j from 1 - side to side - 1
    place = torch.arange(side, device=shift.device)
    found: Tensor = covered[..., place[:, None] - place + side - 1]
    return found


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
    spread: Float[Tensor, "H K"],
    grid: tuple[int, int],
) -> Float[Tensor, "H N D"]:
    """What lies under each mask, moved with it: values of one frame in H later ones.

    The background's stay where they are, and are missing where it could not be seen.
    """
    behind = widest(masks)
    bare = moved(masks.expand(len(shift), -1, -1), shift, spread, grid)
    whole = layered(bare, behind.expand(len(shift), -1))
    ground = masks[behind][0].unsqueeze(-1)  # (N, 1)
    found = whole[:, behind][:, 0].unsqueeze(-1) * (ground * values)
    for slot in (~behind & (masks.sum(-1) > 0)).nonzero().flatten().tolist():
        layer = (masks[slot].unsqueeze(-1) * values).T.expand(len(shift), -1, -1)  # (H, D, N)
        part = whole[:, slot] / bare[:, slot].clamp_min(1e-6)  # the rest is shared with others
        found = found + moved(layer, shift[:, slot, None], spread[:, slot, None], grid).mT * part.unsqueeze(-1)
    return found


def widest(masks: Float[Tensor, "*B K N"]) -> Bool[Tensor, "*B K"]:
    """The slot that holds most of the frame: what lies behind the others."""
    areas = masks.sum(-1)
    slots = torch.arange(areas.shape[-1], device=areas.device)
    return slots == areas.argmax(-1, keepdim=True)
