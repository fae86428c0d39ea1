"""What every model gives back; the losses, the metrics and the pictures read nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Output:
    """One forward pass. ``attention`` and ``masks`` sum to one over the slots at every patch."""

    slots: Float[Tensor, "B K S"]
    attention: Float[Tensor, "B K N"]  # how the slots were formed
    logits: Float[Tensor, "B K N"]  # before that softmax
    masks: Float[Tensor, "B K N"]  # the decoder's
    reconstruction: Float[Tensor, "B N D"]
    target: Float[Tensor, "B N D"]  # what it should be: normalised features
