"""Runs frames through a backbone batch by batch, and chooses the batch size and the number format."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from featcache.backbones.backbone import Backbone
from featcache.errors import UsageError, out_of_memory
from featcache.machine import exact_convolutions, native_bfloat16
from featcache.text import bytes_text
from featcache.words import Precision

CPU_BATCH = 8  # frames; see `choose_batch_size`
GPU_BATCH = 128  # frames; enough that a ViT-S computes for longer than its kernels take to launch
PROBED = 4  # frames that the memory of one frame is measured with

MAX_RELATIVE_ERROR = 1e-2  # Frobenius norm, against float32 on real frames
HALF_PRECISION = (7, 0)  # least compute capability of a GPU that multiplies float16 several times faster than float32

logger = logging.getLogger(__name__)


def forward(
    backbone: Backbone, videos: Sequence[np.ndarray], batch_size: int, precision: Precision
) -> list[dict[str, torch.Tensor]]:
    """Patch tokens of videos, given as frames (T, H, W, 3) uint8: for each a dict tap -> (T, N, D) on the device.

    ``UsageError`` if the device's memory does not hold a batch.
    """
    lengths = [len(frames) for frames in videos]
    starts = np.cumsum([0, *lengths])
    parts = []
    try:
        with autocast(backbone.device, precision):
            for start in range(0, int(starts[-1]), batch_size):  # prepared batch by batch: a video may be long
                within = [slice(max(0, start - first), start + batch_size - first) for first in starts[:-1]]
                some = [frames[span] for frames, span in zip(videos, within, strict=True) if span.stop > 0]
                images = [backbone.preprocess(torch.from_numpy(frames)) for frames in some if len(frames)]
                parts.append({tap: tokens.float() for tap, tokens in backbone(torch.cat(images)).items()})
        tokens = {tap: torch.split(torch.cat([part.pop(tap) for part in parts]), lengths) for tap in backbone.taps}
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UsageError(
            f"the memory of {backbone.device} does not hold {batch_size} frames at a time and the tokens of their "
            "videos; choose a smaller --batch-size and another --out"
        ) from error
    return [{tap: values[i] for tap, values in tokens.items()} for i in range(len(videos))]


def choose_batch_size(backbone: Backbone, precision: Precision) -> int:
    """Number of frames in a batch. It depends on the backbone and the machine only, never on a timing.

    On a CPU: 8. DINOv2 ViT-S/14 at 224 px (AVX-512 with bfloat16, CPU seconds per frame, sizes in turn) runs at these
    shares of its best rate:

    ========  ====  ====  ====  ====  ====  ====  ====  ====
    frames       1     2     4     8    12    16    24    32
    float32   0.90  0.95  1.00  0.99  0.98  0.92  0.86  0.84
    bfloat16  0.78  0.90  0.96  0.98  0.99  1.00  0.99  0.87
    ========  ====  ====  ====  ====  ====  ====  ====  ====

    On a GPU: 128, or the largest power of two whose activations fit in half of its memory; fewer, with a warning, if
    too little of it is free.
    """
    device = backbone.device
    if device.type != "cuda":
        return CPU_BATCH
    free, total = torch.cuda.mem_get_info(device)
    frame = _frame_memory(backbone, precision)
    batch, now = _power_of_two(total // 2 // frame), _power_of_two(free // frame)
    if now < batch:
        logger.warning("%s of %s are free: %d frames at a time instead of %d", bytes_text(free), device, now, batch)
    return min(batch, now)


def _power_of_two(most: int) -> int:
    """The largest power of two up to ``most`` and `GPU_BATCH`; at least 1."""
    return 1 << (min(max(most, 1), GPU_BATCH).bit_length() - 1)


def _frame_memory(backbone: Backbone, precision: Precision) -> int:
    """Bytes of GPU memory that each frame of a batch takes, besides the weights."""
    torch.cuda.reset_peak_memory_stats(backbone.device)
    before = torch.cuda.memory_allocated(backbone.device)
    forward(backbone, [np.zeros((PROBED, *backbone.input_size, 3), np.uint8)], PROBED, precision)
    return max(1, (torch.cuda.max_memory_allocated(backbone.device) - before) // PROBED)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """A context in which torch computes in ``precision`` on the device."""
    if precision == "float32":
        return exact_convolutions()
    return torch.autocast(device.type, getattr(torch, precision))


def fast_precision(device: torch.device) -> Precision:
    """The narrowest format that the device multiplies natively, and so faster than float32.

    float16 on a GPU of compute capability 7.0 or more, bfloat16 on a processor with instructions for it; elsewhere
    float32, as emulated formats are slower.
    """
    if device.type == "cuda":
        return "float16" if torch.cuda.get_device_capability(device) >= HALF_PRECISION else "float32"
    return "bfloat16" if device.type == "cpu" and native_bfloat16() else "float32"


def choose_precision(backbone: Backbone, videos: Sequence[np.ndarray]) -> Precision:
    """:func:`fast_precision` if its error on the videos' frames (T, H, W, 3) is small; else float32."""
    fast = fast_precision(backbone.device)
    if fast == "float32" or not relative_error(backbone, videos, fast) <= MAX_RELATIVE_ERROR:  # nor NaN
        return "float32"
    return fast


def relative_error(backbone: Backbone, videos: Sequence[np.ndarray], precision: Precision) -> float:
    """Relative error of ``precision`` on the frames (T, H, W, 3) of videos, the largest over the taps.

    It is ‖x - x32‖ / ‖x32‖, x being the tokens in that precision and x32 those in float32; NaN if any is not finite.
    """
    exact, rounded = (forward(backbone, videos, CPU_BATCH, kind) for kind in ("float32", precision))
    errors = []
    for tap in backbone.taps:
        x, x32 = (torch.cat([video[tap] for video in tokens]) for tokens in (rounded, exact))
        errors.append((x - x32).norm() / x32.norm().clamp_min(1e-12))
    return float(torch.stack(errors).amax())
