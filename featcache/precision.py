"""Which number format the backbone runs in: the fastest whose features stay within 1 % of float32's."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from featcache.backbones import Backbone
from featcache.store import Precision

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
