"""Slot initialisers: each maps projected tokens (B, N, S) to initial slots (B, K, S)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slotlab.models.kmeans import kmeans, kmeans_plus_plus
from slotlab.models.randomness import Draws


class Gaussian(nn.Module):
    """One learnt Gaussian that all slots are drawn from (Locatello et al., 2020)."""

    def __init__(self, slots: int, slot_dim: int, kmeans_rounds: int) -> None:
        super().__init__()
        self.slots = slots
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, slot_dim)))
        self.log_std = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, slot_dim)))

    def forward(
        self, tokens: Float[Tensor, "B N S"], clustered: Float[Tensor, "B N D"], draws: Draws
    ) -> Float[Tensor, "B K S"]:
        shape = (len(tokens), self.slots, self.mean.shape[-1])
        return self.mean + self.log_std.exp() * draws.normal(shape, tokens.device)


class GaussianMeans(Gaussian):
    """A learnt mean for each slot, and one learnt spread for all."""

    def __init__(self, slots: int, slot_dim: int, kmeans_rounds: int) -> None:
        super().__init__(slots, slot_dim, kmeans_rounds)
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, slots, slot_dim)))


class GaussianPerSlot(GaussianMeans):
    """One learnt Gaussian for each slot."""

    def __init__(self, slots: int, slot_dim: int, kmeans_rounds: int) -> None:
        super().__init__(slots, slot_dim, kmeans_rounds)
        self.log_std = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, slots, slot_dim)))


class Learnt(nn.Module):
    """Learnt slots without noise, as BO-QSA uses them (Jia et al., 2023, arXiv:2210.08990)."""

    def __init__(self, slots: int, slot_dim: int, kmeans_rounds: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, slots, slot_dim)))

    def forward(
        self, tokens: Float[Tensor, "B N S"], clustered: Float[Tensor, "B N D"], draws: Draws
    ) -> Float[Tensor, "B K S"]:
        return self.queries.expand(len(tokens), -1, -1)


class KMeansPlusPlus(nn.Module):
    """Projected tokens chosen by k-means++ (Arthur & Vassilvitskii, 2007) on the normalised features."""

    def __init__(self, slots: int, slot_dim: int, kmeans_rounds: int) -> None:
        super().__init__()
        self.slots = slots

    def forward(
        self, tokens: Float[Tensor, "B N S"], clustered: Float[Tensor, "B N D"], draws: Draws
    ) -> Float[Tensor, "B K S"]:
        chosen = kmeans_plus_plus(clustered, self.slots, draws)  # (B, K)
        return tokens.gather(1, chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class KMeans(nn.Module):
    """Mean projected token of each k-means cluster of the frame's normalised features."""

    def __init__(self, slots: int, slot_dim: int, kmeans_rounds: int) -> None:
        super().__init__()
        self.slots, self.rounds = slots, kmeans_rounds

    def forward(
        self, tokens: Float[Tensor, "B N S"], clustered: Float[Tensor, "B N D"], draws: Draws
    ) -> Float[Tensor, "B K S"]:
        labels = kmeans(clustered, self.slots, self.rounds, draws).labels  # (B, N)
        members = nn.functional.one_hot(labels, self.slots).to(tokens.dtype)  # (B, N, K)
        return members.transpose(1, 2) @ tokens / members.sum(1).clamp_min(1).unsqueeze(-1)


INITIALIZERS = {
    "gaussian": Gaussian,
    "gaussian_means": GaussianMeans,
    "gaussian_per_slot": GaussianPerSlot,
    "learnt": Learnt,
    "kmeans++": KMeansPlusPlus,
    "kmeans": KMeans,
}
