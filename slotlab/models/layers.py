"""Linear layers with the activation after them, as one operation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HAS_IT = ("cpu", "cuda")  # the devices for which torch has the operation


class MLP(nn.Sequential):
    """Layers in a row; a linear one and the ReLU after it are computed as one."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.few_kernels: bool | None = None  # rather than little work on the host; None: what suits the device

    def forward(self, input: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if isinstance(layer, nn.Linear) and layers and isinstance(layers[0], nn.ReLU):
                layers.pop(0)
                input = linear_relu(input, layer.weight, layer.bias, self.few_kernels)
            else:
                input = layer(input)
        return input


def linear_relu(
    input: Float[Tensor, "*B D"],
    weight: Float[Tensor, "E D"],
    bias: Float[Tensor, " E"],
    few_kernels: bool | None = None,
) -> Float[Tensor, "*B E"]:
    """``F.relu(F.linear(input, weight, bias))``, as one operation.

    torch has no gradient for that operation. Ours takes 50 µs of the host, so that on a CPU, where two operations cost
    no more than one, there are two. torch.compile fuses them itself.
    """
    device = input.device.type
    by_hand = torch.is_grad_enabled() and (device == "cuda" if few_kernels is None else few_kernels)
    if torch.compiler.is_compiling() or device not in HAS_IT or (torch.is_grad_enabled() and not by_hand):
        return F.relu(F.linear(input, weight, bias))  # in place is slower: the result is a view
    if torch.is_autocast_enabled(device):  # which does not know the operation
        input, weight, bias = (part.to(torch.get_autocast_dtype(device)) for part in (input, weight, bias))
    rows = input.reshape(-1, input.shape[-1])
    if by_hand:
        made: Tensor = _ReLU.apply(_LinearReLU.apply(rows, weight, bias))
    else:
        made = torch._addmm_activation(bias, rows, weight.T)
    return made.view(*input.shape[:-1], -1)


class _LinearReLU(torch.autograd.Function):
    """Both going forward; going back, the linear layer alone, so that the memory of the other's gradient is free."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return torch._addmm_activation(bias, rows, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            gradient @ weight if of_rows else None,
            gradient.T @ rows if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


class _ReLU(torch.autograd.Function):
    """Going back alone."""

    @staticmethod
    def forward(ctx: Any, made: Tensor) -> Tensor:
        made = made.view_as(made)
        ctx.save_for_backward(made)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (made,) = ctx.saved_tensors
        before: Tensor = torch.ops.aten.threshold_backward(gradient, made, 0)
        return before
