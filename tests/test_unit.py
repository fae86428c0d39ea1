"""Unit vectors against torch's own, gradients included."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slotlab.models.unit import unit


def test_values_and_gradients_are_torch_s() -> None:
    """Of vectors of all lengths, shorter than the least divisor, and zero."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64)
    vectors = vectors * torch.tensor([1e3, 1.0, 0.3, 1e-2])[:, None]
    vectors[4] = 0.0
    weight = torch.randn(vectors.shape, generator=generator, dtype=torch.float64)

    def found(of: Tensor) -> tuple[Tensor, Tensor]:
        return of, torch.autograd.grad((of * weight).sum(), given)[0]

    for least in (1e-12, 0.1):
        given = vectors.clone().requires_grad_()
        torch.testing.assert_close(found(unit(given, least)), found(F.normalize(given, dim=-1, eps=least)))
    short = vectors[:, -1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unit(x, 0.1), short[:4])
