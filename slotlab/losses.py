"""Losses, by component: the total never hides one."""

from __future__ import annotations

from torch import Tensor

from slotlab.models.output import Output


def feature_mse(output: Output) -> Tensor:
    """Mean squared error of the reconstruction, scalar.

    Targets have a mean square of 1 over the data set, so that always predicting the mean scores about 1.
    """
    return (output.reconstruction.float() - output.target).square().mean()


def losses(output: Output) -> dict[str, Tensor]:
    """Every component with its weight applied; the training loss is their sum."""
    return {"feature_mse": feature_mse(output)}
