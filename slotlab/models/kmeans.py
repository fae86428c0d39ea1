"""Batched k-means over patch tokens: a slot initialiser inside the training step, and the floor of evaluations.

It clusters each sample of the batch alone, but all at once, in matrix products over (B, N, D) and (B, N, K): no
(B, N, K, D) tensor, no loop over samples, no wait for the device. All R starts of a sample move together, too.
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
        return _seed(x, x.square().sum(-1), k, draws, 1)[:, 0]


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
        centres = _take(x, _seed(x, square, k, draws, restarts))
        for _ in range(rounds):
            centres = _update(x, square, centres)
        closeness, labels = _closeness(x, centres).max(-1)  # (B, N, R)
        if restarts == 1:  # a training step's: nothing to choose from
            return Clusters(centres[:, 0] + mean, labels[..., 0])
        best = closeness.sum(1).argmax(-1)[:, None, None]  # (B, 1, 1), the first one of least inertia
        found = centres.gather(1, best.unsqueeze(-1).expand_as(centres[:, :1])).squeeze(1)
        return Clusters(found + mean, labels.gather(2, best.expand(-1, x.shape[1], -1)).squeeze(2))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, R, K, D) of x (B, N, D) at index (B, R, K)."""
    taken = x.gather(1, index.flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return torch.unflatten(taken, 1, index.shape[1:])


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


def _seed(x: Tensor, square: Tensor, k: int, draws: Draws | None, starts: int) -> Tensor:
    """Indices (B, R, K) of the first centres of each start; square (B, N) is |x|^2, here and below."""
    batch, count, _ = x.shape
    draws = draws or Draws(0)
    # With exponential variables e_n, the largest p_n / e_n falls on n with probability p_n / sum p, and the next
    # largest are further draws without replacement. This avoids a float cumsum, which is not deterministic on a GPU.
    each = [draws.exponential((k, batch, count), x.device, batch=1).unsqueeze(2) for _ in range(starts)]
    waits = torch.cat(each, 2) if starts > 1 else each[0]  # (K, B, R, N)
    chosen = waits[0].argmin(-1, keepdim=True)  # (B, R, 1), each token as likely as any other
    nearest = _distance(x, square, chosen).squeeze(-1).mT  # (B, R, N), squared distance to the nearest seed
    trials = min(2 + int(math.log(k)), count)
    for step in range(1, k):
        candidates = (nearest / waits[step]).topk(trials, dim=-1).indices  # (B, R, trials)
        left = torch.minimum(nearest.mT.unsqueeze(-1), _distance(x, square, candidates))  # (B, N, R, trials)
        winner = left.sum(1).argmin(-1, keepdim=True)  # (B, R, 1)
        nearest = left.gather(3, winner.unsqueeze(1).expand(-1, count, -1, -1)).squeeze(-1).mT
        chosen = torch.cat([chosen, candidates.gather(-1, winner)], -1)
    return chosen


def _distance(x: Tensor, square: Tensor, index: Tensor) -> Tensor:
    """Squared distance of every token to those at index (B, R, K): (B, N, R, K)."""
    cross = torch.bmm(x, _take(x, index).flatten(1, 2).transpose(1, 2))  # (B, N, R K)
    apart = square.unsqueeze(-1) - 2 * cross + square.gather(1, index.flatten(1)).unsqueeze(1)
    return torch.unflatten(apart.clamp_min_(0), -1, index.shape[1:])


def _closeness(x: Tensor, centres: Tensor) -> Tensor:
    """``x.c - |c|^2 / 2``, (B, N, R, K): largest where the distance is smallest."""
    flat = centres.flatten(1, 2)  # (B, R K, D)
    offset = flat.square().sum(-1).mul_(-0.5).unsqueeze(1)  # (B, 1, R K)
    return torch.unflatten(torch.baddbmm(offset, x, flat.transpose(1, 2)), -1, centres.shape[1:3])


def _update(x: Tensor, square: Tensor, centres: Tensor) -> Tensor:
    """One Lloyd round of all starts (B, R, K, D): each centre becomes the mean of its tokens."""
    k = centres.shape[2]
    closeness, labels = _closeness(x, centres).max(-1)  # (B, N, R)
    member = torch.zeros((*labels.shape, k), device=x.device)  # (B, N, R, K), one-hot
    member.scatter_(-1, labels.unsqueeze(-1), 1.0)
    size = member.sum(1).unsqueeze(-1)  # (B, R, K, 1)
    # A product with the one-hot labels sums in a fixed order, which index_add_ on a GPU does not.
    total = torch.bmm(member.flatten(2).transpose(1, 2), x)
    mean = torch.unflatten(total, 1, centres.shape[1:3]) / size.clamp_min(1)
    empty = size == 0
    distance = square.unsqueeze(-1) - 2 * closeness
    farthest = distance.topk(k, dim=1).indices.mT  # (B, R, K)
    # The e-th empty cluster takes the e-th farthest token.
    turn = (empty.squeeze(-1).cumsum(-1) - 1).clamp_min_(0)  # (B, R, K)
    return torch.where(empty, _take(x, farthest.gather(-1, turn)), mean)
