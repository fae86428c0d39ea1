"""Which number format the backbone runs in: the fastest whose features stay within 1 % of float32's."""

from __future__ import annotations

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
    """float16 on CUDA and bfloat16 on a CPU, where that is measured to be safe on ``frames`` (T, H, W, 3)."""
    candidate: Precision = "float16" if backbone.device.type == "cuda" else "bfloat16"
    return candidate if relative_error(backbone, frames[:4], candidate) <= MAX_RELATIVE_ERROR else "float32"


def relative_error(backbone: Backbone, frames: np.ndarray, precision: Precision) -> float:
    """Largest over the taps of ‖x - x32‖ / ‖x32‖, x the tokens under ``precision``, x32 those in float32."""
    images = backbone.preprocess(torch.from_numpy(np.ascontiguousarray(frames)))
    exact = backbone(images)
    with autocast(backbone.device, precision):
        rounded = backbone(images)
    return max(float((rounded[tap].float() - exact[tap]).norm() / exact[tap].norm().clamp_min(1e-12)) for tap in exact)
