"""Frames through a backbone, batch by batch, and how many frames a batch is best given."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from featcache.backbones import Backbone
from featcache.errors import UsageError
from featcache.precision import autocast
from featcache.store import Precision

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
    except torch.OutOfMemoryError as error:
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
