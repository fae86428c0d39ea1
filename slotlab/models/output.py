"""What every model gives back; the losses, the metrics and the pictures read nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Output:
    """One forward pass. ``attention`` and ``masks`` sum to one over the slots at every patch."""

    slots: Tensor  # (B, K, S)
    attention: Tensor  # (B, K, N), how the slots were formed
    logits: Tensor  # (B, K, N), before that softmax
    masks: Tensor  # (B, K, N), the decoder's
    reconstruction: Tensor  # (B, N, D)
    target: Tensor  # (B, N, D), what it should be: normalised features
