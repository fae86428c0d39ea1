"""The quantities of a scale report: the size of a store's features, and the places of their variance."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from featcache.moments import Float, Moments

# The norms of artefact ("register") tokens form a second mode far above the first (Darcet et al.
# 2024, fig. 3). Their cut at 150 fits one model; twice the median does the same at any scale.
OUTLIER_RATIO = 2.0


@dataclass(frozen=True)
class TokenNorm:
    """Euclidean norms of tokens. ``max`` is exact, percentiles are within RELATIVE_ACCURACY."""

    p1: float
    p50: float
    p99: float
    max: float


@dataclass(frozen=True)
class ChannelStd:
    """Spread of the channels' standard deviations."""

    min: float
    p50: float
    max: float


@dataclass(frozen=True)
class VarianceShare:
    """Share of the total variance in the one and the ten channels that vary most."""

    top1: float
    top10: float


@dataclass(frozen=True)
class FrameVariance:
    """Shares of the total variance between frames' means and within frames; they sum to 1."""

    between: float
    within: float


@dataclass(frozen=True)
class Curves:
    """Data for plots; not part of ``as_dict``."""

    channel_std: Float  # (D,)
    eigenvalues: Float  # (D,) of the covariance, largest first
    norm_levels: Float  # (Q,) in [0, 1]
    norm_quantiles: Float  # (Q,)


@dataclass(frozen=True)
class ScaleReport:
    """The scale of one tap's features and the places of their variance, as population statistics."""

    frames: int
    patches: int
    dim: int
    mean: float  # over all entries
    std: float  # over all entries: ``features.std()``
    abs_max: float
    token_norm: TokenNorm
    outlier_tokens: float  # share of tokens with a norm above OUTLIER_RATIO times the median
    channel_std: ChannelStd
    variance_share: VarianceShare
    effective_rank: float  # exp of the entropy of the covariance's spectrum (Roy & Vetterli 2007), 1 to D
    mean_predictor_mse: float  # MSE of predicting each channel's mean, which a decoder must beat
    frame_variance: FrameVariance
    curves: Curves = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers in nested dicts, ready for JSON."""
        plain = asdict(self)
        del plain["curves"]
        return plain


_NORM_LEVELS = np.concatenate([np.linspace(0, 0.98, 99), np.linspace(0.982, 1, 10)])


def scale_report(moments: Moments) -> ScaleReport:
    """The scale report of one tap's moments. ``ValueError`` if they cover no tokens."""
    if moments.tokens == 0:
        raise ValueError("no tokens, so no scale report")
    variance = moments.variance  # (D,)
    std = np.sqrt(variance)
    ranked = np.sort(variance)[::-1]
    total = float(variance.sum())
    # If the rank is not full, rounding leaves eigenvalues slightly below zero.
    eigenvalues = np.linalg.eigvalsh(moments.covariance)[::-1].clip(min=0)
    mean = float(moments.mean.mean())
    median = moments.norm_quantile(0.5)
    quantiles = np.array([moments.norm_quantile(level) for level in _NORM_LEVELS])
    quantiles[-1] = moments.norm_max
    return ScaleReport(
        frames=moments.frames,
        patches=round(moments.tokens / moments.frames),
        dim=moments.dim,
        mean=mean,
        std=math.sqrt(float(variance.mean() + np.square(moments.mean - mean).mean())),
        abs_max=moments.abs_max,
        token_norm=TokenNorm(moments.norm_quantile(0.01), median, moments.norm_quantile(0.99), moments.norm_max),
        outlier_tokens=moments.norm_share_above(OUTLIER_RATIO * median),
        channel_std=ChannelStd(float(std.min()), float(np.median(std)), float(std.max())),
        variance_share=VarianceShare(_share(ranked[0], total), _share(ranked[:10].sum(), total)),
        effective_rank=effective_rank(eigenvalues),
        mean_predictor_mse=float(variance.mean()),
        frame_variance=FrameVariance(
            _share(np.trace(moments.between), total * moments.tokens),
            _share(np.trace(moments.within), total * moments.tokens),
        ),
        curves=Curves(std, eigenvalues, _NORM_LEVELS, quantiles),
    )


def effective_rank(eigenvalues: Float) -> float:
    """Effective rank: exp of the entropy of the normalised spectrum (Roy & Vetterli 2007); 0 for constant data."""
    positive = eigenvalues[eigenvalues > 0]
    if len(positive) == 0:
        return 0.0
    p = positive / positive.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0
