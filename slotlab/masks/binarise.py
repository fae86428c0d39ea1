"""From soft masks to hard ones, which scores need. There are three ways:

- ``argmax``: each pixel goes to its largest mask, as in all published scores;
- ``threshold=T``: each pixel goes to its largest mask if that is above T, else to none;
- ``gumbel=T``: each patch goes to a slot drawn with probability proportional to ``mask ** (1 / T)``, by the Gumbel-max
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
    """One way to make masks hard: its name, and a function to labels (B, H, W)."""

    name: str
    label: Callable[[Tensor, tuple[int, int], Draws], Tensor]


def parse_binarisation(text: str) -> Binarisation:
    """The binarisation ``argmax``, ``threshold=T`` (0 <= T < 1) or ``gumbel=T`` (T > 0); else ``UsageError``."""
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
    """Slot of each pixel, (B, H, W) int64, from masks (B, K, h, w); K for pixels of no slot."""
    labels = masks_to_labels(masks, size)
    for start in range(len(masks)):  # frame by frame, as the upsampled masks are large
        fine = F.interpolate(masks[start : start + 1].float(), size=size, mode="bilinear")
        labels[start][fine[0].amax(0) <= threshold] = masks.shape[1]
    return labels


def gumbel_masks(masks: Tensor, temperature: float, draws: Draws) -> Tensor:
    """Masks of 0 and 1 with one drawn slot a patch, (B, K, h, w) like the given masks, which are not negative."""
    noise = -draws.exponential(tuple(masks.shape), masks.device).log()  # standard Gumbel
    drawn = (masks.float().clamp_min(1e-12).log() / temperature + noise).argmax(1)  # (B, h, w)
    return F.one_hot(drawn, masks.shape[1]).movedim(-1, 1).float()
