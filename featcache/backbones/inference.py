"""Frames through a backbone, batch by batch: in which number format, and how many frames at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from featcache.backbones.backbone import Backbone
from featcache.errors import UsageError, out_of_memory
from featcache.words import Precision

LONG_BATCH = 1.0  # seconds

MEASURED_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def forward(
    backbone: Backbone, videos: Sequence[np.ndarray], batch_size: int, precision: Precision
) -> list[dict[str, torch.Tensor]]:
    """Patch tokens of several videos' frames (T, H, W, 3), each a dict of tap -> (T, N, D) on the device.

    ``UsageError`` where its memory does not hold a batch.
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


def measure_batch_size(backbone: Backbone, frames: np.ndarray, precision: Precision) -> int:
    """Smallest batch within 5 % of the best rate; stops where memory ends, or two sizes running gain nothing.

    Each size is timed twice and its better time counts: a busy machine only ever slows one down. A batch that takes
    a second hides whatever larger ones could save.
    """
    best_rate, best, idle = 0.0, 1, 0
    for size in MEASURED_BATCHES:
        batch = frames[np.arange(size) % len(frames)]
        taken = []
        try:
            for _ in range(3):  # the first warms up
                start = time.perf_counter()
                forward(backbone, [batch], size, precision)[0][backbone.taps[0]].sum().item()
                taken.append(time.perf_counter() - start)
        except UsageError:  # the memory does not hold it
            torch.cuda.empty_cache()
            break
        rate = size / min(taken[1:])
        if rate > 1.05 * best_rate:
            best_rate, best, idle = rate, size, 0
        elif (idle := idle + 1) == 2:
            break
        if min(taken) > LONG_BATCH:
            break
    return best


MAX_RELATIVE_ERROR = 1e-2  # Frobenius norm, against float32 on real frames


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def choose_precision(backbone: Backbone, frames: np.ndarray) -> Precision:
    """float16 on CUDA or bfloat16 elsewhere, if measured on ``frames`` (T, H, W, 3) to be safe and faster.

    A processor without instructions for the format emulates it, at a fraction of float32's rate.
    """
    candidate: Precision = "float16" if backbone.device.type == "cuda" else "bfloat16"
    frames = frames[:4]
    if not relative_error(backbone, frames, candidate) <= MAX_RELATIVE_ERROR:  # nor NaN
        return "float32"
    return candidate if _seconds(backbone, frames, candidate) < _seconds(backbone, frames, "float32") else "float32"


def relative_error(backbone: Backbone, frames: np.ndarray, precision: Precision) -> float:
    """Largest over the taps of ‖x - x32‖ / ‖x32‖, x the tokens under ``precision``, x32 those in float32; NaN if any
    is not finite."""
    images = backbone.preprocess(torch.from_numpy(np.ascontiguousarray(frames)))
    exact = backbone(images)
    with autocast(backbone.device, precision):
        rounded = backbone(images)
    errors = [(rounded[tap].float() - exact[tap]).norm() / exact[tap].norm().clamp_min(1e-12) for tap in exact]
    return float(torch.stack(errors).amax())


def _seconds(backbone: Backbone, frames: np.ndarray, precision: Precision) -> float:
    """Best of three forward passes; ``relative_error`` has warmed both formats up."""
    images = backbone.preprocess(torch.from_numpy(np.ascontiguousarray(frames)))
    taken = []
    with autocast(backbone.device, precision):
        for _ in range(3):
            start = time.perf_counter()
            backbone(images)[backbone.taps[0]].sum().item()  # waits for the device
            taken.append(time.perf_counter() - start)
    return min(taken)
