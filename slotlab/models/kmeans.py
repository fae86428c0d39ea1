"""Batched k-means over patch tokens: a slot initialiser inside the training step, and the floor of evaluations.

It clusters each sample of the batch alone, but all at once, in matrix products over (B, N, D) and (B, N, K): no
(B, N, K, D) tensor, no loop over samples, no wait for the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slotlab.models.randomness import Draws


class Clusters(NamedTuple):
    """The result of :func:`kmeans`."""

    centres: Float[Tensor, "B K D"]  # float32
    labels: Int[Tensor, "B N"]  # index of the nearest centre


@torch.no_grad()
def kmeans_plus_plus(tokens: Tensor, k: int, draws: Draws | None = None) -> Tensor:
    """Greedy k-means++ seeds (Arthur & Vassilvitskii 2007): indices (B, K) int64 of the tokens chosen.

    tokens (B, N, D). The first seed is drawn evenly. For each further one, 2 + ln K candidates are drawn in proportion
    to their squared distance from the nearest seed so far, and the one that leaves the least total distance is kept,
    as in scikit-learn: on whitened DINOv2 tokens this is worth as much as several restarts. A sample with fewer than K
    different tokens repeats some. Raises ValueError unless 1 <= K <= N.
    """
    with _full_precision(tokens):
        x = _centred(tokens, k)[0]
        return _seed(x, x.square().sum(-1), k, draws)


@torch.no_grad()
def kmeans(tokens: Tensor, k: int, rounds: int = 8, draws: Draws | None = None, restarts: int = 1) -> Clusters:
    """Clusters by Lloyd's k-means from k-means++ seeds: a fixed number of rounds, the best of some restarts.

    tokens (B, N, D), centres (B, K, D) float32, labels (B, N) int64 in [0, K). A cluster that loses all its
    tokens moves to the token farthest from its own centre (several take the next farthest). Each sample keeps
    its restart of least inertia. No gradient passes. Raises ValueError unless 1 <= K <= N and restarts >= 1.
    """
    if restarts < 1:
        raise ValueError(f"k-means needs at least one start, not {restarts}")
    with _full_precision(tokens):
        x, mean = _centred(tokens, k)
        square = x.square().sum(-1)
        best, centres, labels = _lloyd(x, square, k, rounds, draws)
        for _ in range(restarts - 1):
            score, *other = _lloyd(x, square, k, rounds, draws)
            better = score > best  # (B,)
            best = torch.where(better, score, best)
            centres = torch.where(better[:, None, None], other[0], centres)
            labels = torch.where(better[:, None], other[1], labels)
        return Clusters(centres + mean, labels)


def _lloyd(x: Tensor, square: Tensor, k: int, rounds: int, draws: Draws | None) -> tuple[Tensor, Tensor, Tensor]:
    """K-means from one start: summed closeness (B,), largest at the least inertia; centres (B, K, D); labels (B, N).

    square (B, N) is |x|^2, here and below."""
    centres = _take(x, _seed(x, square, k, draws))
    for _ in range(rounds):
        centres = _update(x, square, centres)
    closeness, labels = _closeness(x, centres).max(-1)
    return closeness.sum(-1), centres, labels


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, K, D) of x (B, N, D) at index (B, K)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _full_precision(tokens: Tensor) -> torch.autocast:
    # Squared distances are differences of large numbers: the bfloat16 of a training step is too coarse.
    return torch.autocast(tokens.device.type, enabled=False)


def _centred(tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Tokens less their sample's mean (B, N, D), for accurate distances, and that mean (B, 1, D)."""
    if tokens.ndim != 3 or not 1 <= k <= tokens.shape[1]:
        raise ValueError(f"{k} clusters need tokens (B, N, D) with N >= k >= 1, not {tuple(tokens.shape)}")
    x = tokens.float()
    mean = x.mean(1, keepdim=True)
    return x - mean, mean


def _seed(x: Tensor, square: Tensor, k: int, draws: Draws | None) -> Tensor:
    batch, count, _ = x.shape
    # With exponential variables e_n, the largest p_n / e_n falls on n with probability p_n / sum p, and the next
    # largest are further draws without replacement. This avoids a float cumsum, which is not deterministic on a GPU.
    waits = (draws or Draws(0)).exponential((k, batch, count), x.device, batch=1)
    chosen = waits[0].argmin(-1, keepdim=True)  # (B, 1), each token as likely as any other
    nearest = _distance(x, square, chosen).squeeze(-1)  # (B, N), squared distance to the nearest seed
    trials = min(2 + int(math.log(k)), count)
    for step in range(1, k):
        candidates = (nearest / waits[step]).topk(trials, dim=-1).indices  # (B, trials)
        left = torch.minimum(nearest.unsqueeze(-1), _distance(x, square, candidates))  # (B, N, trials)
        winner = left.sum(1).argmin(-1, keepdim=True)  # (B, 1)
        nearest = left.gather(2, winner.unsqueeze(1).expand(-1, count, -1)).squeeze(-1)
        chosen = torch.cat([chosen, candidates.gather(1, winner)], 1)
    return chosen


def _distance(x: Tensor, square: Tensor, index: Tensor) -> Tensor:
    """Squared distance of every token to those at index (B, K): (B, N, K)."""
    cross = torch.bmm(x, _take(x, index).transpose(1, 2))
    return (square.unsqueeze(-1) - 2 * cross + square.gather(1, index).unsqueeze(1)).clamp_min_(0)


def _closeness(x: Tensor, centres: Tensor) -> Tensor:
    """``x.c - |c|^2 / 2``, (B, N, K): largest where the distance is smallest."""
    offset = centres.square().sum(-1).mul_(-0.5).unsqueeze(1)  # (B, 1, K)
    return torch.baddbmm(offset, x, centres.transpose(1, 2))


def _update(x: Tensor, square: Tensor, centres: Tensor) -> Tensor:
    """One Lloyd round: each centre becomes the mean of its tokens."""
    k = centres.shape[1]
    closeness, labels = _closeness(x, centres).max(-1)  # (B, N)
    member = torch.zeros((*labels.shape, k), device=x.device)  # (B, N, K), one-hot
    member.scatter_(-1, labels.unsqueeze(-1), 1.0)
    size = member.sum(1).unsqueeze(-1)  # (B, K, 1)
    # A product with the one-hot labels sums in a fixed order, which index_add_ on a GPU does not.
    mean = torch.bmm(member.transpose(1, 2), x) / size.clamp_min(1)
    empty = size == 0
    distance = square - 2 * closeness
    farthest = distance.topk(k, dim=1).indices  # (B, K)
    # The e-th empty cluster takes the e-th farthest token.
    turn = (empty.squeeze(-1).cumsum(1) - 1).clamp_min_(0)  # (B, K)
    return torch.where(empty, _take(x, farthest.gather(1, turn)), mean)
