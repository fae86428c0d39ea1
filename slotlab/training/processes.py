"""The processes that train together: this one alone, or those that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from featcache.errors import IncompatibleError
from featcache.machine import pick_device


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together. Only ``rank`` 0 writes the run folder and prints."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the ranks, on all of them."""
        if self.count > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
            value /= self.count
        return value

    def agree(self, what: str, where: str) -> None:
        """``IncompatibleError`` on all ranks if one has another text than the first; ``where`` it is from."""
        if self.count == 1:
            return
        all_of: list[tuple[str, str]] = [("", "")] * self.count
        dist.all_gather_object(all_of, (what, where))
        if other := [rank for rank, (text, _) in enumerate(all_of) if text != all_of[0][0]]:
            raise IncompatibleError(
                f"{all_of[other[0]][1]}: rank {other[0]} has other features or videos than rank 0 in "
                f"{all_of[0][1]}; give all ranks the same store, or parts of one export"
            )

    def wait(self) -> None:
        """Wait until every rank has come here."""
        if self.count > 1:
            dist.barrier()


def rank() -> int:
    """The rank of this process; 0 if it is alone. Also valid before :func:`join`."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """The number of processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_leader() -> bool:
    return rank() == 0


def gathered(value: Tensor) -> Tensor:
    """The values of all ranks, (R, ...) in their order, or (1, ...) alone. Gradients of all ranks add up."""
    if not dist.is_initialized():
        return value.unsqueeze(0)
    found: Tensor = _gathered(value)
    return found


def _gathered(value: Tensor) -> Any:
    return _Gather.apply(value)


def before_compiling() -> None:
    """Keep out of torch.compile's graphs where ranks wait for each other. It imports the compiler, two seconds."""
    global _gathered
    _gathered = torch.compiler.disable(_gathered)  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        whole = gradients[0].contiguous()
        dist.all_reduce(whole)
        return whole[dist.get_rank()]


@contextmanager
def join(device: torch.device | str) -> Iterator[Ranks]:
    """Join the process group that torchrun describes (NCCL on CUDA, gloo elsewhere); without it, be the only rank."""
    device = torch.device(device)
    if count() == 1:
        yield Ranks(device)
        return
    if device.type == "cuda":
        device = pick_device("cuda")  # the GPU of this rank
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield Ranks(device, dist.get_rank(), count())
    finally:
        dist.destroy_process_group()
