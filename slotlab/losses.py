"""Losses, by component: the total never hides one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from slotlab.config import LossConfig
from slotlab.models.base import Output


def feature_mse(output: Output, config: LossConfig) -> Tensor:
    """Mean squared error of the reconstruction, scalar.

    Targets have a mean square of 1 over the data set, so that always predicting the mean scores about 1.
    """
    return (output.reconstruction.float() - output.decoded_target).square().mean()


LOSSES: dict[str, Callable[[Output, LossConfig], Tensor]] = {"feature_mse": feature_mse}


def losses(output: Output, config: LossConfig) -> dict[str, Tensor]:
    """Every component that is on, without its weight; the training loss is :func:`total` of them."""
    return {name: LOSSES[name](output, config) for name in config.weights()}


def total(components: dict[str, Tensor], config: LossConfig) -> Tensor:
    """The weighted sum, scalar."""
    weights = config.weights()
    first, *rest = (weights[name] * value for name, value in components.items())
    return sum(rest, first)
