"""Feature normalisation by the store's statistics, so that one configuration trains every backbone.

Kinds, for features x with data-set mean m, covariance C and D channels:

- ``whiten``: ``(x - m) C'^(-1/2)`` with ``C' = (1 - s) C + s tr(C)/D I``, shrinkage s (Ledoit & Wolf 2004
  with a fixed s). The symmetric root (ZCA) is the one that no eigenvector's sign or order can change.
- ``channel``: ``(x - m) / sqrt(diag C)``.
- ``scale``: ``(x - m) / sqrt(tr(C)/D)``: centred by channel, one factor for all, so that the channels keep
  their relative spread.
- ``none``: x.
- ``sample``: each sample and channel to mean 0 and std 1 over its own patches. It takes the layout out of the
  features and is known to hurt; kept so that the finding can be repeated.
- ``fixed=FACTOR``: ``x * FACTOR``. Known not to help; kept for the same reason.

``whiten``, ``channel`` and ``scale`` give the same output, up to rounding, when the features, and with them
the statistics, are multiplied by any factor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from featcache.errors import DataError, UsageError

KINDS = ("whiten", "channel", "scale", "none", "sample", "fixed=FACTOR")
_DEAD = 1e-12  # variance, relative to the largest, below which a direction is rounding noise and is set to 0
_EPSILON = 1e-6  # standard deviation below which ``sample`` does not amplify


class Normaliser(nn.Module):
    """Frozen normalisation of patch features, saved and moved with the model that uses it.

    ``Normaliser(kind, dim)`` alone is the empty shell that ``load_state_dict`` fills;
    :meth:`from_statistics` makes one from a store. Raises UsageError for a kind that does not exist.
    """

    shift: Tensor  # (D,)
    weight: Tensor  # (D, D) for ``whiten``, (D,) or () otherwise

    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        self.kind, factor = _parse(kind)
        self.register_buffer("shift", torch.zeros(dim))
        shape = {"whiten": (dim, dim), "channel": (dim,)}.get(self.kind, ())
        self.register_buffer("weight", torch.full(shape, factor))

    @classmethod
    def from_statistics(cls, kind: str, mean: Tensor, covariance: Tensor, shrinkage: float = 0.1) -> Normaliser:
        """From the mean (D,) and covariance (D, D) of all patch tokens of the training split.

        ``shrinkage`` in [0, 1] is used by ``whiten`` alone. Computed in float64, stored in float32. Raises
        DataError when the statistics are not finite or the features do not vary, UsageError for a wrong kind
        or shrinkage.
        """
        self = cls(kind, len(mean))
        if not 0 <= shrinkage <= 1:
            raise UsageError(f"normalisation shrinkage is {shrinkage}; choose a value from 0 to 1")
        if self.kind not in ("whiten", "channel", "scale"):
            return self
        mean, covariance = mean.double(), covariance.double()
        if covariance.shape != (len(mean), len(mean)):
            raise DataError(
                f"feature statistics: mean {tuple(mean.shape)} and covariance {tuple(covariance.shape)} "
                "do not fit; run extract again"
            )
        variance = covariance.diagonal()
        if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise DataError("feature statistics are not finite; run verify, then extract again")
        if float(variance.max()) <= 0:
            raise DataError("feature statistics: no channel varies; choose another tap or check the backbone")
        self.shift.copy_(mean)
        level = variance.mean()
        if self.kind == "whiten":
            covariance = (1 - shrinkage) * (covariance + covariance.T) / 2
            covariance.diagonal().add_(shrinkage * level)
            values, vectors = torch.linalg.eigh(covariance)
            self.weight.copy_((vectors * _inverse_root(values)) @ vectors.T)
        elif self.kind == "channel":
            self.weight.copy_(_inverse_root(variance))
        else:
            self.weight.copy_(level.rsqrt())
        return self

    def forward(self, features: Tensor) -> Tensor:
        """features (..., N, D) of any float type to float32 (..., N, D); autocast does not reach it."""
        if features.shape[-1] != len(self.shift):
            raise ValueError(f"features have {features.shape[-1]} channels, the normaliser {len(self.shift)}")
        with torch.autocast(features.device.type, enabled=False):
            x = features.float()
            if self.kind == "none":
                return x
            if self.kind == "sample":
                deviation, mean = torch.std_mean(x, dim=-2, correction=0, keepdim=True)
                return (x - mean) / (deviation + _EPSILON)
            if self.kind == "fixed":
                return x * self.weight
            x = x - self.shift
            return x @ self.weight if self.kind == "whiten" else x * self.weight

    def extra_repr(self) -> str:
        return f"{self.kind!r}, dim={len(self.shift)}"


def _parse(kind: str) -> tuple[str, float]:
    """The kind's name and its factor (1 where it has none)."""
    name, _, value = kind.partition("=")
    if name == "fixed":
        try:
            factor = float(value)
        except ValueError:
            factor = math.nan
        if math.isfinite(factor) and factor > 0:
            return name, factor
    elif kind in KINDS:
        return kind, 1.0
    raise UsageError(f"normalisation {kind!r} is not known; choose one of {', '.join(KINDS)} with FACTOR > 0")


def _inverse_root(variance: Tensor) -> Tensor:
    """``1 / sqrt(variance)``, and 0 for directions without any."""
    return torch.where(variance > _DEAD * variance.max(), variance.clamp_min(0).rsqrt(), 0.0)
