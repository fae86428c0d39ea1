"""What the form of a store loses of its tokens, measured on some of the frames that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from featcache.backbones.backbone import Backbone
from featcache.backbones.inference import forward
from featcache.extraction.plan import ExtractPlan, some_frames
from featcache.sources.video import Source
from featcache.store.encoding import ENCODINGS


@dataclass(frozen=True)
class Rounding:
    """‖x - x'‖ / ‖x‖ of a tap's tokens, x' a token x (D,) as it is read back."""

    tap: str
    median: float
    p99: float
    frames: int  # that it was measured on


def measure_rounding(plan: ExtractPlan, source: Source, backbone: Backbone) -> list[Rounding]:
    """The rounding of each tap; none for a form as fine as float16, nor where nothing is left to extract."""
    encoding, split = ENCODINGS[plan.spec.dtype], plan.splits[0]
    if encoding.error <= ENCODINGS["float16"].error or not plan.frames_left:
        return []
    stored = split.spec.frame_size if plan.resize_frames else None
    frames = some_frames(source, split.name, len(split.spec.lengths), plan.spec.preprocessing, stored)
    videos = forward(backbone, frames, plan.spec.batch_size, plan.spec.precision)
    found = []
    for tap in backbone.taps:
        tokens = torch.cat([video[tap] for video in videos]).flatten(0, 1)  # (T * N, D)
        lost = (encoding.rounded(tokens).to(tokens) - tokens).norm(dim=-1) / tokens.norm(dim=-1).clamp_min(1e-12)
        median, p99 = lost.quantile(lost.new_tensor([0.5, 0.99])).tolist()
        found.append(Rounding(tap, median, p99, sum(map(len, frames))))
    return found
