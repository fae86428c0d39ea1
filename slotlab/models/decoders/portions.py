"""Hidden layers on every slot at every patch and their average over the slots, with a gradient by hand.

Rows of hidden activations, one for each slot and patch, are most of a training step's memory and nearly all of its
time. Autograd would keep a gradient beside every activation, pass over them in several operations, and add up the
gradients of the parameters after every portion of the patches. Here a gradient takes the memory of the activation that
it no longer needs, and products add to the gradients of parameters themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slotlab.models.layers import linear_relu
from slotlab.models.repeated import joined


class Given(NamedTuple):
    """What is decoded: the results of the first linear layer, and what changes the masks."""

    slots: Float[Tensor, "B K H"]
    position: Float[Tensor, "M H"]
    noise: Float[Tensor, "B M K"] | None = None  # of the logits
    active: Bool[Tensor, "B K"] | None = None

    def first(self, place: slice) -> Float[Tensor, "B m K H"]:
        """The first activation at some patches: a sum, so cheap that it is made again and not kept."""
        return (self.slots[:, None] + self.position[place, None]).relu_()


class Portions(NamedTuple):
    """How it is decoded."""

    places: Sequence[slice]  # the patches of each portion
    masks: Callable[[Float[Tensor, "B m K"], Given, slice], Float[Tensor, "B m K"]]  # by their logits
    recompute: bool  # all activations again, and not the first alone


def mixed(
    given: Given, portions: Portions, hidden: Sequence[nn.Linear], mask: nn.Linear
) -> tuple[Float[Tensor, "B M H"], Float[Tensor, "B M K"]]:
    """Hidden vectors averaged over the slots by the masks, and these masks."""
    parameters = [parameter.to(given.slots.dtype) for layer in (mask, *hidden) for parameter in layer.parameters()]
    found: tuple[Tensor, Tensor] = _Mixed.apply(portions, given.noise, given.active, *given[:2], *parameters)
    return found


def averaged(hidden: Float[Tensor, "B m K H"], masks: Float[Tensor, "B m K"]) -> Float[Tensor, "B m H"]:
    """The average over the slots. With these in the last dimension but one it is a product without a copy."""
    return (masks.unsqueeze(2).to(hidden.dtype) @ hidden).squeeze(2)


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, portions: Portions, noise: Tensor | None, active: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        slots, position, weight, bias, *layers = tensors
        given = Given(slots, position, noise, active)
        parts, kept = [], []
        ctx.portions, ctx.noise, ctx.active, ctx.weighed = portions, noise, active, []
        for place in portions.places:
            *earlier, hidden = _activations(given, place, layers)
            logits = torch.addmm(bias, hidden.flatten(0, 2), weight.T).view(hidden.shape[:3])
            with torch.enable_grad():  # a graph of its own, as there are masks of several kinds
                logits.requires_grad_()
                masks = portions.masks(logits, given, place)
            ctx.weighed.append((logits, masks))
            parts.append((averaged(hidden, masks.detach()), masks.detach()))
            if layers and not portions.recompute:
                kept += [*earlier[1:], hidden]
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        mixed, masks = (joined(part, 1) for part in zip(*parts, strict=True))
        return mixed, masks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mixed: Tensor | None, of_masks: Tensor | None) -> tuple[Tensor | None, ...]:
        portions, wanted = ctx.portions, ctx.needs_input_grad[3:]
        saved = ctx.saved_tensors
        (slots, position, weight, bias, *layers), kept = saved[: len(wanted)], saved[len(wanted) :]
        given = Given(slots, position, ctx.noise, ctx.active)
        if of_mixed is None:
            of_mixed = slots.new_zeros(len(slots), len(position), slots.shape[2])
        found = _Sums(wanted)
        of_position = []
        for turn, (place, (logits, masks)) in enumerate(zip(portions.places, ctx.weighed, strict=True)):
            count = len(layers) // 2
            if kept:
                activations = [None, *kept[turn * count : (turn + 1) * count]]
            else:
                activations = _activations(given, place, layers)
            hidden, of_some = activations[-1], of_mixed[:, place]  # (B, m, K, H), (B, m, H)
            rows = hidden.flatten(0, 2)
            of_weights = (hidden @ of_some.unsqueeze(-1)).squeeze(-1).to(masks.dtype)  # (B, m, K)
            if of_masks is not None:
                of_weights = of_weights + of_masks[:, place]
            (of_logits,) = torch.autograd.grad(masks, logits, of_weights)
            of_logits = of_logits.reshape(-1, 1)
            found.add(2, of_logits, rows)
            # From here on the gradient of each layer's result, in place.
            gradient = of_logits @ weight  # (B m K, H)
            gradient.view(-1, *hidden.shape[2:]).baddbmm_(
                masks.to(hidden.dtype).flatten(0, 1).unsqueeze(-1), of_some.flatten(0, 1).unsqueeze(1)
            )
            for layer in reversed(range(count)):
                after = activations.pop().flatten(0, 2)
                _through_relu(gradient, after)
                if activations[-1] is None:
                    activations[-1] = given.first(place)
                found.add(4 + 2 * layer, gradient, activations[-1].flatten(0, 2))
                gradient = torch.mm(gradient, layers[2 * layer], out=after)
            _through_relu(gradient, activations.pop().flatten(0, 2))
            of_sum = gradient.view(hidden.shape)
            found.plus(0, of_sum.sum(1))
            of_position.append(of_sum.sum((0, 2)))
        found.plus(1, joined(of_position))
        return None, None, None, *found.sums


class _Sums:
    """Gradients by several tensors, summed over portions."""

    def __init__(self, wanted: Sequence[bool]) -> None:
        self.wanted = wanted
        self.sums: list[Tensor | None] = [None] * len(wanted)

    def plus(self, index: int, more: Tensor) -> None:
        total = self.sums[index]
        self.sums[index] = more if total is None else total.add_(more)

    def add(self, index: int, gradient: Float[Tensor, "R E"], rows: Float[Tensor, "R D"]) -> None:
        """What a linear layer's weight and bias, ``index`` and the next, get from the gradient of its result."""
        if self.wanted[index]:
            total = self.sums[index]
            self.sums[index] = gradient.T @ rows if total is None else total.addmm_(gradient.T, rows)
        if self.wanted[index + 1]:
            self.plus(index + 1, gradient.sum(0))


def _activations(given: Given, place: slice, layers: Sequence[Tensor]) -> list[Tensor]:
    """The activations of all layers."""
    made = [given.first(place)]
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        made.append(linear_relu(made[-1], weight, bias))
    return made


def _through_relu(gradient: Tensor, activation: Tensor) -> None:
    """The gradient before a ReLU, in place of that after it."""
    torch.ops.aten.threshold_backward.grad_input(gradient, activation, 0, grad_input=gradient)
