"""From soft masks to the slot of each pixel, by argmax."""

from __future__ import annotations

from collections.abc import Iterator

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
    frames = torch.from_numpy(pictures)
    parts = [refine_masks(masks[t : t + 1], frames[t : t + 1], method).argmax(1) for t in range(len(frames))]
    return torch.cat(parts).to(torch.uint8).cpu().numpy()


# Upsampled mask values held at once: on the CPU about what its cache holds, on a GPU 512 MB.
_VALUES_A_CHUNK = {"cpu": 2**21, "cuda": 2**27}

_VALUES_A_FRAME = 2**27  # of a frame so large that its slots are upsampled a few at a time

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
    if masks.ndim != 4 or not 1 <= masks.shape[1] <= _MAX_LABELS:
        raise ValueError(f"masks must be (B, K, h, w), 1 <= K <= {_MAX_LABELS}, not {tuple(masks.shape)}")
    if not bool(torch.isfinite(masks).all()):
        raise ValueError("masks hold NaN or infinity, so they have no argmax; did the model diverge?")
    slots = masks.shape[1]
    step = max(1, _VALUES_A_CHUNK.get(masks.device.type, 2**24) // (slots * size[0] * size[1]))
    few = max(1, _VALUES_A_FRAME // (size[0] * size[1]))
    for start in range(0, len(masks), step):
        frames = slice(start, start + step)
        best = labels = None
        for first in range(0, slots, few):
            some = masks[frames, first : first + few].float()
            fine = F.interpolate(some, size=size, mode="bilinear", align_corners=False)
            # A running maximum over slots reads memory in order: four times faster than argmax over dim 1, and
            # ties go to the lowest slot on every device.
            for slot, here in enumerate(fine.unbind(1), first):
                if best is None or labels is None:
                    best = here.clone()
                    labels = torch.zeros(best.shape, dtype=torch.uint8, device=masks.device)
                    continue
                labels.masked_fill_(here > best, slot)
                torch.maximum(best, here, out=best)
        assert labels is not None
        yield frames, labels
