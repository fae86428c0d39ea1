"""Unit vectors, with a gradient of few operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def unit(vectors: Float[Tensor, "*B D"], least: float = 1e-12) -> Float[Tensor, "*B D"]:
    """The vectors divided by their lengths, or by ``least`` if they are shorter: ``F.normalize`` over the last axis.

    Autograd takes thirteen operations for its gradient, and here six do. torch.compile gets torch's own.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.normalize(vectors, dim=-1, eps=least)
    divided: Tensor = _Unit.apply(vectors, least)
    return divided


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, least: float) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(least)
        divided = vectors / length
        ctx.least = least
        ctx.save_for_backward(divided, length)
        return divided

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        divided, length = ctx.saved_tensors
        along = (gradient * divided).sum(-1, keepdim=True)  # what would change the length alone
        along = along.masked_fill(length <= ctx.least, 0.0)
        across: Tensor = torch.addcmul(gradient, divided, along, value=-1) / length
        return across, None
