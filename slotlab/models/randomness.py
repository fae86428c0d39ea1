"""Random draws that do not depend on how a batch is split.

A step draws for its whole global batch, and each share of it (a rank under torchrun, a micro-batch of gradient
accumulation) takes its own rows: the split run does what the whole one would have done. Draws come from a
generator on the CPU that is seeded by the step, never from global state, so that a resumed run draws what the
unbroken one would have drawn, on every device. On their way to a GPU nothing waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Which part of a global batch this is: ``index`` of ``count`` equal, consecutive parts."""

    index: int = 0
    count: int = 1


WHOLE = Share()


class Draws:
    """A source of random numbers for one forward pass."""

    def __init__(self, seed: int, share: Share = WHOLE) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._share = share

    @classmethod
    def of_step(cls, seed: int, step: int, share: Share = WHOLE) -> Draws:
        """One seed for each (run seed, step): what a step draws does not depend on how the run got there."""
        return cls((seed * 1_000_003 + step) % (1 << 63), share)

    def normal(self, shape: tuple[int, ...], device: torch.device | None = None, batch: int = 0) -> Tensor:
        """Standard normal values on the device (None: the CPU); ``batch`` is the dimension of the batch."""
        return self._own(torch.randn(self._whole(shape, batch), generator=self._generator), device, batch)

    def exponential(self, shape: tuple[int, ...], device: torch.device | None = None, batch: int = 0) -> Tensor:
        """Exponential values of rate 1."""
        whole = torch.empty(self._whole(shape, batch)).exponential_(generator=self._generator)
        return self._own(whole, device, batch)

    def uniform(self, shape: tuple[int, ...], device: torch.device | None = None, batch: int = 0) -> Tensor:
        """Values in [0, 1)."""
        return self._own(torch.rand(self._whole(shape, batch), generator=self._generator), device, batch)

    def integers(self, high: int, count: int, device: torch.device | None = None) -> Tensor:
        """``count`` integers below ``high`` (count,), the same in every share.

        A tensor, to index with: a Python number would be built into what torch.compile makes of the model, which
        would then be compiled again for every other.
        """
        return send(torch.randint(high, (count,), generator=self._generator), device)

    def choice(self, high: int, count: int, device: torch.device | None = None) -> Tensor:
        """``count`` different integers below ``high`` in ascending order (count,), the same in every share."""
        return send(torch.randperm(high, generator=self._generator)[:count].sort().values, device)

    def _whole(self, shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
        return (*shape[:batch], shape[batch] * self._share.count, *shape[batch + 1 :])

    def _own(self, values: Tensor, device: torch.device | None, batch: int) -> Tensor:
        return send(values.chunk(self._share.count, batch)[self._share.index], device)


def send(values: Tensor, device: torch.device | None) -> Tensor:
    """To the device, without waiting for the work that it was given before."""
    if device is None or device.type == "cpu":
        return values
    held = values.pin_memory() if device.type == "cuda" else values  # CUDA waits to copy from any other memory
    return held.to(device, non_blocking=device.type != "mps")  # which would read what is freed here
