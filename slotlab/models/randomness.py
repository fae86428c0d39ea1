"""Random draws that do not depend on how a batch is split.

Every step draws for its whole global batch, and each share of it (a rank under torchrun, a micro-batch of gradient
accumulation) takes its own rows: a split batch gives the same result as a whole one. Draws come from a CPU generator
that is seeded by the step, never from global state, so that a resumed run draws the same values as an unbroken one, on
every device. Copying them to a GPU does not wait for it.

A model draws while it runs. Code that torch.compile traces cannot: it can neither pin memory nor seed a generator. A
compiled pass therefore gets the same values drawn in advance (:class:`DrawnAhead`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """A part of a global batch: number ``index`` of ``count`` equal, consecutive parts."""

    index: int = 0
    count: int = 1


WHOLE = Share()


FILL: dict[str, Callable[..., Tensor]] = {
    "normal": Tensor.normal_,
    "exponential": Tensor.exponential_,
    "uniform": Tensor.uniform_,
}


class Request(NamedTuple):
    """One draw: its kind (a method of :class:`Draws`), its size, its batch dimension and its device."""

    kind: str
    size: tuple[int, ...]
    batch: int  # the dimension that is shared out
    device: torch.device | None


class Draws:
    """A source of random numbers for one forward pass."""

    def __init__(self, seed: int, share: Share = WHOLE) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._share = share
        self.requests: list[Request] = []  # so far

    @classmethod
    def of_step(cls, seed: int, step: int, share: Share = WHOLE) -> Draws:
        """The draws of one step. Their seed depends on the run's seed and the step alone, not on earlier draws."""
        return cls((seed * 1_000_003 + step) % (1 << 63), share)

    def normal(self, shape: tuple[int, ...], device: torch.device | None = None, batch: int = 0) -> Tensor:
        """Standard normal values on the device (None: the CPU); ``batch`` is the dimension of the batch."""
        return self.drawn(Request("normal", shape, batch, device))

    def exponential(self, shape: tuple[int, ...], device: torch.device | None = None, batch: int = 0) -> Tensor:
        """Exponential values of rate 1; arguments as for :meth:`normal`."""
        return self.drawn(Request("exponential", shape, batch, device))

    def uniform(self, shape: tuple[int, ...], device: torch.device | None = None, batch: int = 0) -> Tensor:
        """Uniform values in [0, 1); arguments as for :meth:`normal`."""
        return self.drawn(Request("uniform", shape, batch, device))

    def integers(self, high: int, count: int, device: torch.device | None = None) -> Tensor:
        """``count`` integers below ``high`` (count,), the same in every share.

        They come as a tensor to index with: torch.compile would build a Python number into the code, and compile again
        for every other number.
        """
        return self.drawn(Request("integers", (high, count), 0, device))

    def choice(self, high: int, count: int, device: torch.device | None = None) -> Tensor:
        """``count`` different integers below ``high`` in ascending order (count,), the same in every share."""
        return self.drawn(Request("choice", (high, count), 0, device))

    def drawn(self, request: Request) -> Tensor:
        """This share's rows of the next draw; the copy to the device may still be under way."""
        self.requests.append(request)
        kind, size, batch, device = request
        if kind == "integers":
            return send(torch.randint(size[0], (size[1],), generator=self._generator), device)
        if kind == "choice":
            return send(torch.randperm(size[0], generator=self._generator)[: size[1]].sort().values, device)
        whole = torch.empty((*size[:batch], size[batch] * self._share.count, *size[batch + 1 :]))
        FILL[kind](whole, generator=self._generator)
        return send(whole.chunk(self._share.count, batch)[self._share.index], device)


class DrawnAhead(Draws):
    """The values of another source, drawn before a pass whose requests are known."""

    def __init__(self, draws: Draws, requests: Sequence[Request]) -> None:
        self._requests = tuple(requests)
        self._values = tuple(draws.drawn(request) for request in requests)
        self._given = 0

    def drawn(self, request: Request) -> Tensor:
        """The next value. ``RuntimeError`` if the pass asks for another draw than the one expected."""
        index = self._given
        self._given += 1
        if index >= len(self._requests) or self._requests[index] != request:
            raise RuntimeError(f"a pass asked for another draw than the one before it: {request.kind} {request.size}")
        return self._values[index]


class Undrawn(Draws):
    """The shapes of draws, whose values are not set: for a pass that is counted and not computed."""

    def drawn(self, request: Request) -> Tensor:
        kind, size, _, device = request
        if kind in FILL:
            return torch.empty(size, device=device)
        return torch.empty(size[1], dtype=torch.int64, device=device)


def send(values: Tensor, device: torch.device | None) -> Tensor:
    """Copy values to the device without waiting for the work already queued there."""
    if device is None or device.type == "cpu":
        return values
    held = values.pin_memory() if device.type == "cuda" else values  # from pageable memory CUDA would wait
    return held.to(device, non_blocking=device.type != "mps")  # MPS would read memory that is freed here
