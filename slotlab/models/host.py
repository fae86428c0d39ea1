"""What is computed on the host from values, for which it waits until the device has found them.

Tensors without values, as a cost is counted on, get results of the right shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def all_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity among the values."""
    return isinstance(values, FakeTensor) or bool(values.isfinite().all())


def found_on_host(
    values: Tensor, find: Callable[[npt.NDArray[Any]], npt.NDArray[np.int64]], count: int
) -> Int[Tensor, "B count"]:
    """What ``find`` makes of each sample of ``values`` (B, ...): ``count`` integers, as int64 on the same device."""
    if isinstance(values, FakeTensor):
        return values.new_zeros((len(values), count), dtype=torch.int64)
    found = [find(sample) for sample in values.cpu().numpy()]
    return torch.from_numpy(np.stack(found).astype(np.int64, copy=False)).to(values.device)
