"""Feature normalisation by the store's statistics, so that one configuration trains every backbone.

Kinds, for features x with mean m, covariance C about it, and D channels:

- ``whiten``: ``c (x - m) C'^(-1/2)`` with ``C' = (1 - s) C + s tr(C)/D I``, shrinkage s (Ledoit & Wolf 2004
  with a fixed s), and c such that the mean channel variance is 1. The symmetric root (ZCA) does not depend on the
  sign or order of eigenvectors.
- ``whiten=K``: the K directions of the largest variance (principal components), each of unit variance, largest
  first.
- ``slow=K``: the K directions in which tokens of unit variance change least from frame to frame: linear slow
  feature analysis (Wiskott & Sejnowski 2002), by the covariance of the features' motion. These directions hold
  what distinguishes objects while they move, so D channels can be reduced to K.
- ``channel``: ``(x - m) / sqrt(diag C)``.
- ``scale``: ``(x - m) / sqrt(tr(C)/D)``: centred by channel, with one factor for all channels, so that they keep
  their relative spread.
- ``none``: x.
- ``sample``: each channel of each sample gets mean 0 and std 1 over its own patches. This removes the layout from the
  features and is known to hurt; kept so that the finding can be repeated.
- ``fixed=FACTOR``: ``x * FACTOR``. Known not to help; kept for the same reason.

m is the data set's mean token, or the mean of each patch position, which also removes what the position alone
predicts. The first four kinds give the same output, up to rounding, when the features (and so the statistics) are
multiplied by any factor; and predicting the mean of their output has a squared error of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featcache.errors import DataError, UsageError
from featcache.moments import Moments
from slotlab.config.schema import Center, parse_normalisation

_DEAD = 1e-12  # variance, relative to the largest, below which a direction is rounding noise and is set to 0
_EPSILON = 1e-6  # standard deviation below which ``sample`` does not amplify


@dataclass(frozen=True)
class Statistics:
    """The statistics that a weight is computed from, in float64."""

    kind: str  # data.normalize, for messages
    count: int  # channels to keep: K, or all
    covariance: Tensor  # (D, D)
    motion: Tensor | None  # (D, D), covariance of the motion; None: unknown
    shrinkage: float


def _multiplied(x: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    return (x - shift).float() * weight


def _mapped(x: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    return (x - shift).float() @ weight


@dataclass(frozen=True)
class Recipe:
    """One normalisation: the shape of its weight for D channels of which K are kept, the function that computes the
    weight, and the function that applies shift and weight. Without the former the shift is 0, and the weight is the
    number in the kind's name, or 1.
    """

    shape: Callable[[int, int], tuple[int, ...]] = lambda dim, kept: ()
    measure: Callable[[Statistics], Tensor] | None = None
    apply: Callable[[Tensor, Tensor, Tensor], Tensor] = _multiplied


class Normaliser(nn.Module):
    """Frozen normalisation of patch features, saved and moved with the model that uses it.

    ``Normaliser(kind, dim, positions)`` is empty until ``load_state_dict`` fills it; ``positions`` is the number of
    patches if each has its own mean, else 1. :meth:`from_statistics` and :meth:`from_moments` make a filled one.
    Raises UsageError for an unknown kind.
    """

    shift: Tensor  # (N or 1, D)
    weight: Tensor  # (D, K), (D,) or ()

    def __init__(self, kind: str, dim: int, positions: int = 1) -> None:
        super().__init__()
        self.kind = kind
        form, number = parse_normalisation(kind)
        self.recipe = RECIPES[form]
        self.dim = int(number) if form.endswith("=K") else dim  # of the output
        self.target: Normaliser | None = None  # of the tokens to reconstruct, where these are others
        if self.dim > dim:
            raise UsageError(f"normalisation {kind}: the features have only {dim} channels")
        self.register_buffer("shift", torch.zeros(positions, dim))
        self.register_buffer("weight", torch.full(self.recipe.shape(dim, self.dim), number or 1.0))

    @classmethod
    def from_moments(cls, kind: str, moments: Moments, shrinkage: float, center: Center) -> Normaliser:
        """A normaliser from the moments of the training split, centred by channel or by patch position."""
        by_position = center == "position"
        return cls.from_statistics(
            kind,
            torch.from_numpy(moments.position_mean if by_position else moments.mean),
            torch.from_numpy(moments.position_covariance if by_position else moments.covariance),
            torch.from_numpy(moments.motion_covariance),
            shrinkage,
        )

    @classmethod
    def from_statistics(
        cls,
        kind: str,
        mean: Tensor,
        covariance: Tensor,
        motion: Tensor | None = None,
        shrinkage: float = 0.1,
    ) -> Normaliser:
        """A normaliser from the mean (D,) or (N, D) of tokens, their covariance (D, D), and that of their motion.

        Only ``slow`` needs ``motion`` (D, D), and only ``whiten`` without K uses ``shrinkage``, in [0, 1].
        Computed in float64, stored in float32. Raises DataError when the statistics are not finite or the
        features do not vary, UsageError for a wrong kind or shrinkage.
        """
        mean = mean.double().reshape(-1, mean.shape[-1])  # (N or 1, D)
        positions, dim = mean.shape
        if not 0 <= shrinkage <= 1:
            raise UsageError(f"normalisation shrinkage is {shrinkage}; choose a value from 0 to 1")
        self = cls(kind, dim, positions)
        if self.recipe.measure is None:
            return self
        covariance = _symmetric(covariance, dim, "covariance")
        if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise DataError("feature statistics are not finite; run verify, then extract again")
        if float(covariance.diagonal().max()) <= 0:
            raise DataError("feature statistics: no channel varies; choose another tap or check the backbone")
        if motion is not None:
            motion = _symmetric(motion, dim, "motion")
        self.shift.copy_(mean)
        self.weight.copy_(self.recipe.measure(Statistics(kind, self.dim, covariance, motion, shrinkage)))
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Normalised features: (..., N, D) of any float type to float32 (..., N, D'), even under autocast."""
        if features.shape[-1] != self.shift.shape[-1]:
            raise ValueError(f"features have {features.shape[-1]} channels, the normaliser {self.shift.shape[-1]}")
        with torch.autocast(features.device.type, enabled=False):
            return self.recipe.apply(features, self.shift, self.weight)

    def both(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised tokens to find slots in, and to reconstruct: the same, or, with a ``target``, those of its
        channels, which follow the others in features (..., N, D + D')."""
        if self.target is None:
            tokens = self(features)
            return tokens, tokens
        own = self.shift.shape[-1]
        return self(features[..., :own]), self.target(features[..., own:])

    def of_means(self, means: Tensor, shares: Tensor) -> Tensor:
        """Normalised means (..., K, D') over patches of raw ones (..., K, D).

        ``shares`` (..., K, N) are the patches' weights in each mean, which sum to one. A normalisation that is linear
        commutes with the mean, up to the shift of each patch.
        """
        shift = self.shift.expand(shares.shape[-1], -1)
        return self.recipe.apply(means.float(), shares @ shift, self.weight)

    def undone(self, normalised: Tensor) -> Tensor:
        """Features (..., N, D) of normalised ones, of a kind that multiplies each channel; dead ones are the mean."""
        return normalised * torch.where(self.weight > 0, 1 / self.weight, 0.0) + self.shift

    def extra_repr(self) -> str:
        return f"{self.kind!r}, {self.shift.shape[-1]} -> {self.dim}"


def _symmetric(matrix: Tensor, dim: int, what: str) -> Tensor:
    if matrix.shape != (dim, dim):
        raise DataError(f"feature statistics: {what} {tuple(matrix.shape)} does not fit {dim} channels; extract again")
    return (matrix.double() + matrix.double().T) / 2


def _whitening(of: Statistics) -> Tensor:
    """Symmetric root (D, D) of the inverse of the shrunk covariance, scaled to a mean channel variance of 1."""
    covariance, shrinkage = of.covariance, of.shrinkage
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(shrinkage * covariance.diagonal().mean())
    values, vectors = torch.linalg.eigh(shrunk)
    weight: Tensor = (vectors * _inverse_root(values)) @ vectors.T
    variance = (weight @ covariance @ weight).diagonal().mean()
    return weight * variance.rsqrt()


def _sphere(of: Statistics) -> Tensor:
    """Principal directions (D, R) scaled to unit variance, largest last: all R >= K in which tokens vary."""
    values, vectors = torch.linalg.eigh(of.covariance)  # ascending
    alive = values > _DEAD * values.max()  # a channel that never varies never moves either
    if int(alive.sum()) < of.count:
        raise UsageError(f"normalisation {of.kind}: the features vary in only {int(alive.sum())} directions")
    return torch.mul(vectors[:, alive], values[alive].rsqrt())


def _principal_directions(of: Statistics) -> Tensor:
    """The K directions (D, K) in which tokens vary most, scaled to unit variance, largest first."""
    return _signed(_sphere(of)[:, -of.count :].flip(1))


def _slow_directions(of: Statistics) -> Tensor:
    """The K directions (D, K) of least motion, scaled to unit variance, slowest first."""
    if of.motion is None or not bool(of.motion.any()):
        raise DataError(f"normalisation {of.kind}: nothing moves in single frames; train with --preset image")
    sphere = _sphere(of)  # (D, R)
    _, rotation = torch.linalg.eigh(sphere.T @ of.motion @ sphere)  # ascending: slowest first
    return _signed(sphere @ rotation[:, : of.count])


def _signed(directions: Tensor) -> Tensor:
    """The directions with their largest entry positive: an eigenvector's sign is arbitrary and differs by machine."""
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return torch.mul(directions, largest.sign())


def _inverse_root(variance: Tensor) -> Tensor:
    """``1 / sqrt(variance)``, and 0 where there is no variance."""
    return torch.where(variance > _DEAD * variance.max(), variance.clamp_min(0).rsqrt(), 0.0)


def _by_sample(x: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    deviation, mean = torch.std_mean(x, dim=-2, correction=0, keepdim=True)
    return (x - mean) / (deviation + _EPSILON)


RECIPES: dict[str, Recipe] = {  # by the forms of data.normalize
    "whiten": Recipe(lambda dim, kept: (dim, dim), _whitening, _mapped),
    "whiten=K": Recipe(lambda dim, kept: (dim, kept), _principal_directions, _mapped),
    "slow=K": Recipe(lambda dim, kept: (dim, kept), _slow_directions, _mapped),
    "channel": Recipe(lambda dim, kept: (dim,), lambda of: _inverse_root(of.covariance.diagonal())),
    "scale": Recipe(lambda dim, kept: (), lambda of: of.covariance.diagonal().mean().rsqrt()),
    "none": Recipe(apply=lambda x, shift, weight: x.float()),
    "sample": Recipe(apply=_by_sample),
    "fixed=FACTOR": Recipe(),
}
