"""Modules that one pass calls again and again: the gradients of their parameters are computed once, over all calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Repeated:
    """A module for several calls in one pass. It treats samples (the first dimension) apart, and draws nothing.

    Autograd takes a product, a sum and an addition for each parameter after every call; with small batches these are
    most of a step's kernels. Here they wait: at the end of the backward pass the module is applied once more, to the
    samples of all calls together, and differentiated by its parameters. Gradients are the same up to rounding.

    torch.compile gets the module as it is, and so does a pass without gradients.
    """

    def __init__(self, module: nn.Module, calls: int) -> None:
        self.module = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.inputs: list[tuple[Tensor | None, ...]] = []  # of the calls whose results the loss has reached
        self.gradients: list[Tensor] = []  # of their results
        apart = calls > 1 and self.parameters and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self._end: Tensor | None = _End.apply(self, *self.parameters) if apart else None

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        if self._end is None or not torch.is_grad_enabled():
            result: Tensor = self.module(*inputs)
            return result
        with _constant(self.parameters):
            result = self.module(*inputs)
        kept = tuple(None if tensor is None else tensor.detach() for tensor in inputs)
        noted: Tensor = _Call.apply(result, self._end, self, kept)
        return noted

    def parameter_gradients(self) -> Sequence[Tensor | None]:
        """Gradients by the parameters, of all calls that were noted; forgets them. None for one that has no part."""
        inputs, gradients = self.inputs, self.gradients
        self.inputs, self.gradients = [], []
        if not gradients:
            return [None] * len(self.parameters)
        together = [None if parts[0] is None else joined(parts) for parts in zip(*inputs, strict=True)]
        with torch.enable_grad():
            result = self.module(*together)
        return torch.autograd.grad(result, self.parameters, joined(gradients), allow_unused=True)


def joined(parts: list[Tensor] | tuple[Tensor, ...], dim: int = 0) -> Tensor:
    """The tensors one after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class _Call(torch.autograd.Function):
    """The result of one call; going back, its gradient is noted. ``end`` only makes all calls precede :class:`_End`."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, end: Tensor, repeated: Repeated, inputs: tuple[Tensor | None, ...]) -> Tensor:
        ctx.repeated, ctx.inputs = repeated, inputs
        return result.view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.repeated.inputs.append(ctx.inputs)
        ctx.repeated.gradients.append(gradient)
        return gradient, None, None, None


class _End(torch.autograd.Function):
    """The node of a graph that gives the parameters their gradients, when all calls have had theirs."""

    @staticmethod
    def forward(ctx: Any, repeated: Repeated, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.repeated = repeated
        return parameters[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.repeated.parameter_gradients()


@contextmanager
def _constant(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the context autograd takes these parameters for constants."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
