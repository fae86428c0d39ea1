"""Mergeable moments of patch tokens.

One pass over a store's tokens gives everything that training needs to know of their scale: moments of two sets of
frames add up to those of their union (Chan, Golub & LeVeque 1979). They can therefore be gathered video by video during
extraction, or block by block from a finished store, with the same result up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

# Token norms are counted in log-spaced buckets (DDSketch, Masson et al. 2019): with a base g, bucket k holds
# (g^(k-1), g^k], and 2 g^k / (g + 1) is within RELATIVE_ACCURACY of every norm in it. The edges are the same
# for all stores, so counts of two sketches add up. Norms outside the range go to the end buckets.
RELATIVE_ACCURACY = 0.005
_LOG_GAMMA = math.log((1 + RELATIVE_ACCURACY) / (1 - RELATIVE_ACCURACY))
_FIRST_BUCKET = math.floor(math.log(1e-8) / _LOG_GAMMA)  # holds everything up to 1e-8, zero too
_LAST_BUCKET = math.ceil(math.log(1e8) / _LOG_GAMMA)
BUCKETS = _LAST_BUCKET - _FIRST_BUCKET + 1

# Tokens in a block of frames, about: bounds the float64 copies of a long video.
_BLOCK_TOKENS = 2**14

# Number of blocks of columns in a product: two need 3/4 of the work of the whole product, and are still large.
GRAM_BLOCKS = 2


class NonFiniteTokensError(ValueError):
    """Tokens hold NaN or infinity: the number of such values, and the frame and patch of the first."""

    def __init__(self, count: int, frame: int, patch: int) -> None:
        super().__init__(f"{count} non-finite values, the first at frame {frame}, patch {patch}")
        self.count = count
        self.frame = frame
        self.patch = patch


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of the tokens of a set of frames, with D channels, in float64 on the host.

    ``within`` and ``between`` split the total co-moment (the sum over tokens of the outer product of
    deviations from the overall mean): ``within`` takes deviations from the token's own frame's mean,
    ``between`` deviations of the frames' means, weighted by their tokens. They sum to the total exactly.

    ``motion`` sums the outer products of each token's change since the previous frame at the same position.
    """

    frames: int
    position_mean: Float  # (N, D), mean token of each patch position
    min: Float  # (D,); +inf when empty
    max: Float  # (D,); -inf when empty
    within: Float  # (D, D)
    between: Float  # (D, D)
    norm_counts: Int  # (BUCKETS,) counts of token norms
    norm_max: float  # exact, unlike the sketch
    motion: Float  # (D, D)
    motion_tokens: int  # number of tokens with a previous frame

    @classmethod
    def empty(cls, patches: int, dim: int) -> Self:
        """Moments of no frames, with N patches and D channels: the neutral element of ``merge``."""
        return cls(
            frames=0,
            position_mean=np.zeros((patches, dim)),
            min=np.full(dim, np.inf),
            max=np.full(dim, -np.inf),
            within=np.zeros((dim, dim)),
            between=np.zeros((dim, dim)),
            norm_counts=np.zeros(BUCKETS, np.int64),
            norm_max=0.0,
            motion=np.zeros((dim, dim)),
            motion_tokens=0,
        )

    @classmethod
    def from_tokens(cls, tokens: Tensor, lengths: Sequence[int] | None = None) -> Self:
        """Moments of tokens (F, N, D) of any float type on any device, computed in float64 where they are.

        ``lengths`` are the numbers of frames of consecutive videos; None: all frames are of one video.
        Raises :class:`NonFiniteTokensError` (a ``ValueError``) if any value is NaN or infinite.
        """
        if tokens.ndim != 3 or not tokens.is_floating_point():
            raise ValueError(f"expected float tokens (F, N, D), got {tokens.dtype} {tuple(tokens.shape)}")
        frames, patches, dim = tokens.shape
        total = cls.empty(patches, dim)
        if tokens.numel() == 0:
            return total
        if tokens.device.type == "mps":  # has no float64
            tokens = tokens.cpu()
        step = max(1, _BLOCK_TOKENS // patches)
        follows = np.ones(frames, np.bool_)  # the frame has a previous one in its video
        follows[np.cumsum([0, *(lengths or [frames])])[:-1]] = False
        for start in range(0, frames, step):
            try:
                before = tokens[max(0, start - 1)].detach()
                block = slice(start, start + step)
                total = total.merge(cls._from_block(tokens[block].detach(), before, follows[block]))
            except NonFiniteTokensError:
                # Search all frames, not the block: the message counts all values.
                bad = ~torch.isfinite(tokens)
                frame, patch, _ = torch.nonzero(bad)[0].tolist()
                raise NonFiniteTokensError(int(bad.sum()), frame, patch) from None
        return total

    @classmethod
    def _from_block(cls, tokens: Tensor, before: Tensor, follows: npt.NDArray[np.bool_]) -> Self:
        frames, patches, dim = tokens.shape
        x = tokens.to(torch.float64, copy=True)  # (F, N, D); ours to centre in place
        low, high = x.aminmax(dim=1)  # (F, D) each; NaN and infinity show in these
        low, high = low.amin(0), high.amax(0)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise NonFiniteTokensError(0, 0, 0)
        norms = torch.linalg.vector_norm(x, dim=-1)  # (F, N)
        position_mean = x.mean(0)  # (N, D)
        moved = torch.diff(x, dim=0, prepend=before.double().unsqueeze(0))  # (F, N, D)
        moved = moved[torch.from_numpy(follows).to(x.device)].reshape(-1, dim)  # (tokens with a frame before, D)
        means = x.mean(1)  # (F, D)
        mean = means.mean(0)  # (D,)
        # Centring before the product, never E[xx'] - mean mean': that cancels when the mean is large.
        x -= means.unsqueeze(1)
        flat = x.reshape(-1, dim)  # (F*N, D)
        shift = means - mean  # (F, D)
        return cls(
            frames=frames,
            position_mean=_host(position_mean),
            min=_host(low),
            max=_host(high),
            within=_gram(flat),
            between=_gram(shift) * patches,
            norm_counts=_count_norms(norms),
            norm_max=float(norms.max()),
            motion=_gram(moved),
            motion_tokens=len(moved),
        )

    def merge(self, other: Moments) -> Self:
        """Moments of the union of both sets. ``ValueError`` if their shapes differ."""
        if self.position_mean.shape != other.position_mean.shape:
            shapes = f"{self.position_mean.shape} and {other.position_mean.shape}"
            raise ValueError(f"cannot merge moments of {shapes} patches and channels")
        tokens = self.tokens + other.tokens
        share = other.tokens / tokens if tokens else 0.0
        shift = other.mean - self.mean  # (D,)
        # Pairwise update (Chan et al. 1979, eq. 2.1). A move of the mean is between frames, never within one.
        gap = np.outer(shift, shift) * (self.tokens * share)
        return type(self)(
            frames=self.frames + other.frames,
            position_mean=self.position_mean + (other.position_mean - self.position_mean) * share,
            min=np.minimum(self.min, other.min),
            max=np.maximum(self.max, other.max),
            within=self.within + other.within,
            between=self.between + other.between + gap,
            norm_counts=self.norm_counts + other.norm_counts,
            norm_max=max(self.norm_max, other.norm_max),
            motion=self.motion + other.motion,
            motion_tokens=self.motion_tokens + other.motion_tokens,
        )

    __add__ = merge

    # -- storage ---------------------------------------------------------------------------------------

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The fields as arrays (scalars are 0-d), without loss: ``from_arrays`` restores the moments."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """The moments of ``to_arrays``, whatever number type holds the counts. ``ValueError`` if fields are missing."""
        missing = {f.name for f in fields(cls)} - set(arrays)
        if missing:
            raise ValueError(f"statistics lack {', '.join(sorted(missing))}")
        if arrays["norm_counts"].shape != (BUCKETS,):
            raise ValueError(f"token norm sketch is {arrays['norm_counts'].shape}, expected ({BUCKETS},)")
        names = ("position_mean", "min", "max", "within", "between", "motion")
        return cls(
            frames=int(arrays["frames"]),
            norm_counts=np.asarray(arrays["norm_counts"]).astype(np.int64),
            norm_max=float(arrays["norm_max"]),
            motion_tokens=int(arrays["motion_tokens"]),
            **{name: np.asarray(arrays[name], np.float64) for name in names},
        )

    # -- derived statistics ------------------------------------------------------------------------------

    @property
    def patches(self) -> int:
        return int(self.position_mean.shape[0])

    @property
    def dim(self) -> int:
        return int(self.position_mean.shape[1])

    @property
    def tokens(self) -> int:
        return self.frames * self.patches

    @property
    def mean(self) -> Float:
        """Mean of each channel (D,)."""
        return np.asarray(self.position_mean.mean(0))

    @property
    def comoment(self) -> Float:
        """Sum over tokens of outer products of deviations from the mean (D, D)."""
        return self.within + self.between

    @property
    def covariance(self) -> Float:
        """Population covariance of the tokens (D, D)."""
        return self.comoment / self.tokens

    @property
    def position_covariance(self) -> Float:
        """Population covariance of the deviations from each position's mean (D, D)."""
        shift = self.position_mean - self.mean  # (N, D)
        return self.covariance - shift.T @ shift / self.patches

    @property
    def motion_covariance(self) -> Float:
        """Mean outer product of tokens' changes since the previous frame (D, D); zeros if all are first frames."""
        return self.motion / max(self.motion_tokens, 1)

    @property
    def variance(self) -> Float:
        """Population variance of each channel (D,)."""
        return (np.diagonal(self.within) + np.diagonal(self.between)) / self.tokens

    @property
    def std(self) -> Float:
        """Population standard deviation of each channel (D,)."""
        return np.sqrt(self.variance)

    @property
    def abs_max(self) -> float:
        return float(np.maximum(-self.min, self.max).max())

    def norm_quantile(self, q: float) -> float:
        """The ``q`` quantile (0 to 1, the lower of two neighbours) of token norms, to RELATIVE_ACCURACY.

        ``ValueError`` if there are no tokens.
        """
        if self.tokens == 0:
            raise ValueError("no tokens, so no quantiles")
        cumulative = np.cumsum(self.norm_counts)
        bucket = int(np.searchsorted(cumulative, math.floor(q * (self.tokens - 1)), side="right"))
        if bucket == 0:
            return 0.0
        gamma = math.exp(_LOG_GAMMA)
        return min(2 * math.exp(_LOG_GAMMA * (bucket + _FIRST_BUCKET)) / (gamma + 1), self.norm_max)

    def norm_share_above(self, threshold: float) -> float:
        """Share of tokens with a norm above ``threshold``, which is rounded to RELATIVE_ACCURACY."""
        bucket = int(_buckets(torch.tensor([threshold], dtype=torch.float64)))
        return float(self.norm_counts[bucket + 1 :].sum() / self.tokens)


def _gram(rows: Tensor) -> Float:
    """Sum of the outer products of rows (R, D) float64, (D, D).

    It multiplies blocks of columns, because the result is symmetric: blocks below the diagonal are copies.
    """
    dim = rows.shape[1]
    step = -(-dim // GRAM_BLOCKS)
    total = rows.new_empty(dim, dim)
    for i in range(0, dim, step):
        for j in range(i, dim, step):
            block = rows[:, i : i + step].T @ rows[:, j : j + step]
            total[i : i + step, j : j + step] = block
            total[j : j + step, i : i + step] = block.T
    return _host(total)


def _host(values: Tensor) -> Float:
    # A copy, so that moments do not keep a larger tensor's memory alive.
    return np.array(values.cpu().numpy())


def _buckets(norms: Tensor) -> Tensor:
    """Index of each norm's bucket, int64 in [0, BUCKETS)."""
    powers = torch.ceil(torch.log(norms) / _LOG_GAMMA)  # -inf for 0
    return (powers.clamp(_FIRST_BUCKET, _LAST_BUCKET) - _FIRST_BUCKET).long()


def _count_norms(norms: Tensor) -> Int:
    counts: Int = torch.bincount(_buckets(norms).flatten(), minlength=BUCKETS).cpu().numpy()
    return counts
