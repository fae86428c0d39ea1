"""The recurrent cell of slot attention (Cho et al., 2014, arXiv:1406.1078), whose input may have been mapped before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GRU(nn.GRUCell):
    """torch's GRU cell, whose input may have been mapped before.

    On a GPU slot attention applies ``weight_ih`` to its values, once, and not to their means in every round; and the
    cell is torch's kernel, with a gradient of two operations. On a CPU, where it is operations of any size that take
    time, the values would be three times as wide, and the cell is torch's own. It is written out for torch.compile,
    which fuses it with its neighbours.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.few_kernels: bool | None = None  # rather than little arithmetic; None: what suits the device

    def map_of_values(self, device: torch.device) -> Tensor | None:
        """The map (G, S) that its input must have passed on this device, for G = 3 S gates; None: none."""
        few = device.type == "cuda" if self.few_kernels is None else self.few_kernels
        return self.weight_ih if few else None

    def forward(self, input: Float[Tensor, "B V"], hx: Float[Tensor, "B S"] | None = None) -> Float[Tensor, "B S"]:
        """The state after ``input``, which has passed :meth:`map_of_values`."""
        assert hx is not None
        mapped = self.map_of_values(hx.device) is not None
        if not torch.compiler.is_compiling():
            if not mapped:
                return super().forward(input, hx)
            after: Tensor = _Kernel.apply(input, hx, self.weight_hh, self.bias_ih, self.bias_hh)
            return after
        gates = input + self.bias_ih if mapped else F.linear(input, self.weight_ih, self.bias_ih)
        reset, update, new = gates.chunk(3, -1)
        from_reset, from_update, from_new = F.linear(hx, self.weight_hh, self.bias_hh).chunk(3, -1)
        update = torch.sigmoid(update + from_update)
        new = torch.tanh(new + torch.sigmoid(reset + from_reset) * from_new)
        return new + update * (hx - new)


class _Kernel(torch.autograd.Function):
    """The cell by torch's kernel; going back, the product with the weight adds to the state's own gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, state: Tensor, weight: Tensor, bias_input: Tensor, bias_state: Tensor
    ) -> Tensor:
        after, workspace = torch.ops.aten._thnn_fused_gru_cell(input, state @ weight.T, state, bias_input, bias_state)
        ctx.save_for_backward(state, weight, workspace)
        made: Tensor = after
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        state, weight, workspace = ctx.saved_tensors
        _, of_state, of_weight, of_bias, _ = ctx.needs_input_grad
        kernel = torch.ops.aten._thnn_fused_gru_cell_backward
        of_input, of_gates, directly, *of_biases = kernel(gradient.contiguous(), workspace, of_bias)
        return (
            of_input,
            torch.addmm(directly, of_gates, weight) if of_state else None,
            of_gates.T @ state if of_weight else None,
            *of_biases,
        )
