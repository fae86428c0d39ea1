"""From soft masks to hard ones: what a score calls a slot's mask is a decision, and here are three.

- ``argmax``: each pixel to its largest mask, as all published scores have it;
- ``threshold=T``: to its largest mask if that is above T, else to none;
- ``gumbel=T``: each patch to a slot drawn with probabilities proportional to ``mask ** (1 / T)``, by the Gumbel-max
  trick (Jang et al. 2017, arXiv:1611.01144); the drawn masks are then upsampled like any others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from featcache.errors import UsageError
from slotlab.masks.labels import masks_to_labels
from slotlab.models.randomness import Draws

KINDS = ("argmax", "threshold=T", "gumbel=T")


@dataclass(frozen=True)
class Binarisation:
    """One way to decide, by name."""

    name: str
    label: Callable[[Tensor, tuple[int, int], Draws], Tensor]


def parse_binarisation(text: str) -> Binarisation:
    """``argmax``, ``threshold=T`` with T in [0, 1), or ``gumbel=T`` with T above 0; ``UsageError`` otherwise."""
    kind, _, value = text.partition("=")
    try:
        number = float(value) if value else None
    except ValueError:
        number = None
    if text == "argmax":
        return Binarisation(text, lambda masks, size, _: masks_to_labels(masks, size))
    if kind == "threshold" and number is not None and 0 <= number < 1:
        return Binarisation(text, lambda masks, size, _: threshold_labels(masks, size, number))
    if kind == "gumbel" and number is not None and 0 < number < float("inf"):
        return Binarisation(text, lambda masks, size, draws: masks_to_labels(gumbel_masks(masks, number, draws), size))
    raise UsageError(f"--binarise {text}: not known; choose one of {', '.join(KINDS)}, 0 <= threshold < 1, gumbel > 0")


def threshold_labels(masks: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Slot of each pixel, and K for pixels of none: masks (B, K, h, w) to (B, H, W) int64."""
    labels = masks_to_labels(masks, size)
    for start in range(len(masks)):  # frame by frame, as the upsampled masks are large
        fine = F.interpolate(masks[start : start + 1].float(), size=size, mode="bilinear")
        labels[start][fine[0].amax(0) <= threshold] = masks.shape[1]
    return labels


def gumbel_masks(masks: Tensor, temperature: float, draws: Draws) -> Tensor:
    """One slot a patch, drawn: masks (B, K, h, w), not negative, to masks of 0 and 1 of the same shape."""
    noise = -draws.exponential(tuple(masks.shape), masks.device).log()  # standard Gumbel
    drawn = (masks.float().clamp_min(1e-12).log() / temperature + noise).argmax(1)  # (B, h, w)
    return F.one_hot(drawn, masks.shape[1]).movedim(-1, 1).float()
