"""The learning rate by step (warm-up, then decay), and the running average of the weights."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)
from torch.optim.swa_utils import get_ema_multi_avg_fn

from slotlab.config.schema import OptimConfig


def learning_rate(optim: OptimConfig) -> float:
    """The highest learning rate, for this batch size.

    The configured rate belongs to ``reference_batch``; for another batch it grows linearly (Goyal et al. 2017,
    arXiv:1706.02677) or, for Adam, with the square root (Malladi et al. 2022, arXiv:2205.10287).
    """
    if optim.reference_batch is None:
        return optim.learning_rate
    ratio = optim.batch_size / optim.reference_batch
    return optim.learning_rate * (ratio if optim.scaling == "linear" else math.sqrt(ratio))


def update_average(average: nn.Module, model: nn.Module, optim: OptimConfig, step: int) -> None:
    """Move the averaged weights towards the model's, after its ``step``-th step.

    The decay is ``optim.ema``, but at first (1 + step) / (10 + step), as in TensorFlow: otherwise a run that is shorter
    than 1 / (1 - ema) steps would be evaluated with nearly its initial weights.
    """
    decay = min(optim.ema, (1 + step) / (10 + step))
    approach = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    approach(list(average.parameters()), list(model.parameters()), step)


def warmup_steps(optim: OptimConfig) -> int:
    """Number of warm-up steps, at most a fifth of the run, so that a preset with a long warm-up can run shortened."""
    steps = optim.warmup_steps
    if optim.warmup_samples is not None:
        steps = math.ceil(optim.warmup_samples / optim.batch_size)
    return min(steps, optim.steps // 5)


def make_schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig) -> LRScheduler:
    """The schedule: linear warm-up, then the decay; call its ``step`` after each optimiser step."""
    warmup = warmup_steps(optim)
    decay: LRScheduler
    if optim.decay == "cosine":
        decay = CosineAnnealingLR(optimizer, max(1, optim.steps - warmup), optim.final_learning_rate)
    elif optim.decay == "exponential":
        decay = ExponentialLR(optimizer, 0.5 ** (1 / optim.half_life))
    else:
        decay = ConstantLR(optimizer, factor=1.0)
    if not warmup:
        return decay
    linear = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
    return SequentialLR(optimizer, [linear, decay], milestones=[warmup])


def plain_state(schedule: LRScheduler) -> dict[str, Any]:
    """The state of the schedule as JSON-able values."""
    state = dict(schedule.state_dict())
    if "_schedulers" in state:
        state["_schedulers"] = [dict(inner) for inner in state["_schedulers"]]
    return dict(json.loads(json.dumps(state, default=lambda value: None)))
