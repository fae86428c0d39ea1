"""From soft masks to the slot of each pixel, by argmax."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from slotlab.masks.refine import refine as refine_masks
from slotlab.words import Refinement

UNSEEN = 255  # label of pixels that the model was not shown


def fine_labels(
    masks: Tensor, pictures: npt.NDArray[np.uint8], method: Refinement | None = None
) -> npt.NDArray[np.uint8]:
    """Slot of each pixel (T, H, W) from masks (T, K, h, w), refined along the pictures' edges if there is a method."""
    size = (pictures.shape[1], pictures.shape[2])
    if method is None:
        return torch.cat([labels for _, labels in label_chunks(masks, size)]).cpu().numpy()
    _check(masks)
    labels = torch.zeros((len(masks), *size), dtype=torch.uint8, device=masks.device)
    for mask, picture, part in zip(masks, torch.from_numpy(pictures), labels, strict=True):
        held = (mask > 0).flatten(1).any(1).nonzero()[:, 0]  # slots without a patch get no pixel
        if not len(held):
            continue  # equal masks: the lowest slot's
        fine = refine_masks(mask[held].unsqueeze(0), picture.unsqueeze(0), method)[0]
        _label_largest(part, zip(held.tolist(), fine, strict=True))
    return labels.cpu().numpy()


# Pixels whose labels are found at once: on the CPU what its cache holds of them, on a GPU enough to fill it.
_PIXELS_A_CHUNK = {"cpu": 2**18, "cuda": 2**24}

_MAX_LABELS = 256  # labels are held as uint8 between upsampling and counting


def masks_to_labels(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Slot index of every pixel: soft masks upsampled bilinearly (align_corners=False), then argmax.

    masks (B, K, h, w) of any float type, size (H, W) in pixels; returns (B, H, W) int64. If masks are equal, the
    lowest slot wins, on every device. Raises ValueError on NaN or infinite masks and on more than 256 slots.
    """
    chunks = [labels.long() for _, labels in label_chunks(masks, size)]
    return torch.cat(chunks) if chunks else masks.new_zeros((0, *size), dtype=torch.int64)


def label_chunks(masks: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the batch with their labels (b, H, W) uint8; arguments and errors as for :func:`masks_to_labels`."""
    _check(masks)
    step = max(1, _PIXELS_A_CHUNK.get(masks.device.type, 2**20) // (size[0] * size[1]))
    for start in range(0, len(masks), step):
        frames = slice(start, start + step)
        yield frames, _labels(masks[frames].float(), size)


def _check(masks: Tensor) -> None:
    if masks.ndim != 4 or not 1 <= masks.shape[1] <= _MAX_LABELS:
        raise ValueError(f"masks must be (B, K, h, w), 1 <= K <= {_MAX_LABELS}, not {tuple(masks.shape)}")
    if not bool(torch.isfinite(masks).all()):
        raise ValueError("masks hold NaN or infinity, so they have no argmax; did the model diverge?")


def _labels(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (b, H, W) uint8 of masks (b, K, h, w). Pixels between the centres of the same two rows of the grid are a
    strip; there, only slots that somewhere lie above the lower ends of all others need upsampling: few of many.
    """
    rows = masks.shape[2]
    across = F.interpolate(masks, size=(rows, size[1]), mode="bilinear", align_corners=False)  # (b, K, h, W)
    at = ((torch.arange(size[0]) + 0.5) * (rows / size[0]) - 0.5).clamp(min=0)  # (H,), in rows of the grid
    upper = at.long()
    shares = (at - upper).to(masks.device)[:, None]  # (H, 1), of the lower row
    lower = torch.cat([across[:, :, 1:], across[:, :, -1:]], 2)
    least = torch.minimum(across, lower).amax(1, keepdim=True)  # what the best slot has at least, (b, 1, h, W)
    wins = (torch.maximum(across, lower) >= least).any(3).any(0).cpu()  # (K, h)
    labels = torch.empty((len(masks), *size), dtype=torch.uint8, device=masks.device)
    heights = torch.bincount(upper, minlength=rows).tolist()
    for row, (part, share) in enumerate(
        zip(torch.split(labels, heights, 1), torch.split(shares, heights), strict=True)
    ):
        slots = wins[:, row].nonzero().flatten().tolist()
        ends = ((slot, across[:, slot, row, None], lower[:, slot, row, None]) for slot in slots)
        _label_largest(part, ((slot, here.lerp(below, share)) for slot, here, below in ends))
    return labels


def _label_largest(labels: Tensor, values: Iterable[tuple[int, Tensor]]) -> None:
    """Write the slot of the largest value into labels (...) uint8. values: slots in rising order, with theirs (...)."""
    # A running maximum over slots reads memory in order: four times faster than argmax over dim 1, and ties go to the
    # lowest slot on every device.
    best: Tensor | None = None
    for slot, value in values:
        if best is None:
            best = value.clone()
            labels.fill_(slot)
            continue
        labels.masked_fill_(value > best, slot)
        torch.maximum(best, value, out=best)
