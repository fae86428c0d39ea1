"""Hidden layers on every slot at every patch and their average over the slots, with a gradient by hand.

Rows of hidden activations, one for each slot and patch, are most of a training step's memory and nearly all of its
time. Autograd would keep a gradient beside every activation, pass over them in several operations, and add up the
gradients of the parameters after every portion of the patches. Here a gradient takes the memory of the activation that
it no longer needs, and products add to the gradients of parameters themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
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
        portions, wanted, saved = ctx.portions, ctx.needs_input_grad[3:], ctx.saved_tensors
        slots, position, weight, _, *layers = saved[: len(wanted)]
        given, kept = Given(slots, position, ctx.noise, ctx.active), iter(saved[len(wanted) :])
        if of_mixed is None:
            of_mixed = slots.new_zeros(len(slots), len(position), slots.shape[2])
        found, of_position = _Sums(wanted), []
        for place, (logits, masks) in zip(portions.places, ctx.weighed, strict=True):
            later = list(islice(kept, len(layers) // 2)) or _activations(given, place, layers)[1:]
            hidden = later[-1] if later else given.first(place)  # (B, m, K, H)
            of_some = of_mixed[:, place]  # (B, m, H)
            of_weights = (hidden @ of_some.unsqueeze(-1)).squeeze(-1).to(masks.dtype)  # (B, m, K)
            if of_masks is not None:
                of_weights = of_weights + of_masks[:, place]
            (of_logits,) = (part.reshape(-1, 1) for part in torch.autograd.grad(masks, logits, of_weights))
            found.linear(2, of_logits, hidden)
            gradient = of_logits @ weight  # (B m K, H), of the last activation, and of those before it further on
            weights = masks.to(hidden.dtype).flatten(0, 1).unsqueeze(-1)  # (B m, K, 1)
            gradient.view(-1, *hidden.shape[2:]).baddbmm_(weights, of_some.flatten(0, 1).unsqueeze(1))
            before = hidden
            for index in reversed(range(0, len(layers), 2)):
                after = later.pop()
                _through_relu(gradient, after)
                before = later[-1] if later else given.first(place)
                found.linear(4 + index, gradient, before)
                gradient = torch.mm(gradient, layers[index], out=after.flatten(0, 2))
            _through_relu(gradient, before)
            of_sum = gradient.view(hidden.shape)
            found.add(0, of_sum.sum(1))
            of_position.append(of_sum.sum((0, 2)))
        found.add(1, joined(of_position))
        return None, None, None, *found.sums


class _Sums:
    """Gradients by several tensors, summed over portions."""

    def __init__(self, wanted: Sequence[bool]) -> None:
        self.wanted = wanted
        self.sums: list[Tensor | None] = [None] * len(wanted)

    def add(self, index: int, more: Tensor) -> None:
        total = self.sums[index]
        self.sums[index] = more if total is None else total.add_(more)

    def linear(self, index: int, gradient: Float[Tensor, "R E"], given: Float[Tensor, "B m K D"]) -> None:
        """What the weight and the bias of a linear layer, ``index`` and the next, get from the gradient of its
        result."""
        rows, total = given.flatten(0, 2), self.sums[index]
        if self.wanted[index]:
            self.sums[index] = gradient.T @ rows if total is None else total.addmm_(gradient.T, rows)
        if self.wanted[index + 1]:
            self.add(index + 1, gradient.sum(0))


def _activations(given: Given, place: slice, layers: Sequence[Tensor]) -> list[Tensor]:
    """The activations of all layers, each (B, m, K, H)."""
    made = [given.first(place)]
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        made.append(linear_relu(made[-1], weight, bias))
    return made


def _through_relu(gradient: Float[Tensor, "R H"], activation: Float[Tensor, "B m K H"]) -> None:
    """The gradient before a ReLU, in place of that after it."""
    after = activation.flatten(0, 2)
    torch.ops.aten.threshold_backward.grad_input(gradient, after, 0, grad_input=gradient)
