"""Random draws that do not depend on how a batch is split.

A step draws for its whole global batch, and each share of it (a rank under torchrun, a micro-batch of gradient
accumulation) takes its own rows: the split run does what the whole one would have done. Draws come from a
generator on the CPU that is seeded by the step, never from global state, so that a resumed run draws what the
unbroken one would have drawn, on every device. On their way to a GPU nothing waits for it.

A model draws while it runs. What torch.compile traces must not: it can neither pin memory nor seed a generator. Such
a pass is given the same values, drawn before it (:class:`DrawnAhead`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Which part of a global batch this is: ``index`` of ``count`` equal, consecutive parts."""

    index: int = 0
    count: int = 1


WHOLE = Share()


FILL: dict[str, Callable[..., Tensor]] = {
    "normal": Tensor.normal_,
    "exponential": Tensor.exponential_,
    "uniform": Tensor.uniform_,
}


class Request(NamedTuple):
    """What is drawn at once: a kind of draw, named as the method of :class:`Draws`, its size, and where it goes."""

    kind: str
    size: tuple[int, ...]
    batch: int  # dimension of the batch
    device: torch.device | None


class Draws:
    """A source of random numbers for one forward pass."""

    def __init__(self, seed: int, share: Share = WHOLE) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._share = share
        self.requests: list[Request] = []  # so far

    @classmethod
    def of_step(cls, seed: int, step: int, share: Share = WHOLE) -> Draws:
        """One seed for each (run seed, step): what a step draws does not depend on how the run got there."""
        return cls((seed * 1_000_003 + step) % (1 << 63), share)

    def normal(self, shape: tuple[int, ...], device: torch.device | None = None, batch: int = 0) -> Tensor:
        """Standard normal values on the device (None: the CPU); ``batch`` is the dimension of the batch."""
        return self.drawn(Request("normal", shape, batch, device))

    def exponential(self, shape: tuple[int, ...], device: torch.device | None = None, batch: int = 0) -> Tensor:
        """Exponential values of rate 1."""
        return self.drawn(Request("exponential", shape, batch, device))

    def uniform(self, shape: tuple[int, ...], device: torch.device | None = None, batch: int = 0) -> Tensor:
        """Values in [0, 1)."""
        return self.drawn(Request("uniform", shape, batch, device))

    def integers(self, high: int, count: int, device: torch.device | None = None) -> Tensor:
        """``count`` integers below ``high`` (count,), the same in every share.

        A tensor, to index with: a Python number would be built into what torch.compile makes of the model, which
        would then be compiled again for every other.
        """
        return self.drawn(Request("integers", (high, count), 0, device))

    def choice(self, high: int, count: int, device: torch.device | None = None) -> Tensor:
        """``count`` different integers below ``high`` in ascending order (count,), the same in every share."""
        return self.drawn(Request("choice", (high, count), 0, device))

    def drawn(self, request: Request) -> Tensor:
        """This share's rows of the next draw, on their way to the device."""
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
    """The same values in the same order, drawn before the pass, of which it is known what it asks for."""

    def __init__(self, draws: Draws, requests: Sequence[Request]) -> None:
        self._requests = tuple(requests)
        self._values = tuple(draws.drawn(request) for request in requests)
        self._given = 0

    def drawn(self, request: Request) -> Tensor:
        """``RuntimeError`` for another than the next of the requests foreseen."""
        index = self._given
        self._given += 1
        if index >= len(self._requests) or self._requests[index] != request:
            raise RuntimeError(f"a pass asked for another draw than the one before it: {request.kind} {request.size}")
        return self._values[index]


def send(values: Tensor, device: torch.device | None) -> Tensor:
    """To the device, without waiting for the work that it was given before."""
    if device is None or device.type == "cpu":
        return values
    held = values.pin_memory() if device.type == "cuda" else values  # CUDA waits to copy from any other memory
    return held.to(device, non_blocking=device.type != "mps")  # which would read what is freed here
