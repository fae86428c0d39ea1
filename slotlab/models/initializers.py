"""Slot initialisers: each maps projected tokens (B, N, W) to initial slots (B, K, S); those that take tokens, W = S."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slotlab.models.kmeans import kmeans, kmeans_plus_plus
from slotlab.models.randomness import Draws


class Starts(NamedTuple):
    """What initialisers are built for."""

    slots: int
    slot_dim: int
    grid: tuple[int, int]  # rows and columns of the tokens
    kmeans_rounds: int = 0
    saliency_weight: float = 0.5


class Gaussian(nn.Module):
    """One learnt Gaussian that all slots are drawn from (Locatello et al., 2020)."""

    def __init__(self, starts: Starts) -> None:
        super().__init__()
        self.slots = starts.slots
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, starts.slot_dim)))
        self.log_std = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, starts.slot_dim)))

    def forward(
        self, tokens: Float[Tensor, "B N W"], clustered: Float[Tensor, "B N D"], draws: Draws
    ) -> Float[Tensor, "B K S"]:
        shape = (len(tokens), self.slots, self.mean.shape[-1])
        return torch.addcmul(self.mean, self.log_std.exp(), draws.normal(shape, tokens.device))


class GaussianMeans(Gaussian):
    """A learnt mean for each slot, and one learnt spread for all."""

    def __init__(self, starts: Starts) -> None:
        super().__init__(starts)
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, starts.slots, starts.slot_dim)))


class GaussianPerSlot(GaussianMeans):
    """One learnt Gaussian for each slot."""

    def __init__(self, starts: Starts) -> None:
        super().__init__(starts)
        self.log_std = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, starts.slots, starts.slot_dim)))


class Learnt(nn.Module):
    """Learnt slots without noise, as BO-QSA uses them (Jia et al., 2023, arXiv:2210.08990)."""

    def __init__(self, starts: Starts) -> None:
        super().__init__()
        self.queries = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, starts.slots, starts.slot_dim)))

    def forward(
        self, tokens: Float[Tensor, "B N W"], clustered: Float[Tensor, "B N D"], draws: Draws
    ) -> Float[Tensor, "B K S"]:
        return self.queries.expand(len(tokens), -1, -1)


class KMeansPlusPlus(nn.Module):
    """Projected tokens chosen by k-means++ (Arthur & Vassilvitskii, 2007) on the normalised features."""

    def __init__(self, starts: Starts) -> None:
        super().__init__()
        self.slots = starts.slots

    def forward(
        self, tokens: Float[Tensor, "B N S"], clustered: Float[Tensor, "B N D"], draws: Draws
    ) -> Float[Tensor, "B K S"]:
        chosen = kmeans_plus_plus(clustered, self.slots, draws)  # (B, K)
        return tokens.gather(1, chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class KMeans(nn.Module):
    """Mean projected token of each k-means cluster of the frame's normalised features."""

    def __init__(self, starts: Starts) -> None:
        super().__init__()
        self.slots, self.rounds = starts.slots, starts.kmeans_rounds

    def forward(
        self, tokens: Float[Tensor, "B N S"], clustered: Float[Tensor, "B N D"], draws: Draws
    ) -> Float[Tensor, "B K S"]:
        labels = kmeans(clustered, self.slots, self.rounds, draws).labels  # (B, N)
        members = nn.functional.one_hot(labels, self.slots).to(tokens.dtype)  # (B, N, K)
        return members.transpose(1, 2) @ tokens / members.sum(1).clamp_min(1).unsqueeze(-1)


class Saliency(nn.Module):
    """Projected tokens at the peaks of saliency of the frame's normalised features (Li et al., 2026, arXiv:2605.03650).

    A patch is salient that looks like its neighbours and not like the whole frame: its mean cosine with the 3 x 3
    patches around it, those beyond the border being 0, less ``weight`` times its cosine with the frame's mean. The most
    salient patch is taken, saliency is multiplied everywhere by one minus the cosine with it, and so on.
    """

    def __init__(self, starts: Starts) -> None:
        super().__init__()
        self.slots, self.grid, self.weight = starts.slots, starts.grid, starts.saliency_weight

    def forward(
        self, tokens: Float[Tensor, "B N S"], clustered: Float[Tensor, "B N D"], draws: Draws
    ) -> Float[Tensor, "B K S"]:
        with torch.no_grad():
            chosen = self.peaks(clustered.float())  # (B, K)
        return tokens.gather(1, chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))

    def peaks(self, features: Float[Tensor, "B N D"]) -> Int[Tensor, "B K"]:
        """Indices of the patches that are taken, the most salient first."""
        unit = F.normalize(features, dim=-1)
        around = F.avg_pool2d(unit.mT.reshape(len(unit), -1, *self.grid), 3, stride=1, padding=1).flatten(2).mT
        whole = F.normalize(features.mean(1, keepdim=True), dim=-1)
        saliency = (unit * around).sum(-1) - self.weight * (unit * whole).sum(-1)  # (B, N)
        chosen = []
        for _ in range(self.slots):
            peak = saliency.argmax(1, keepdim=True)  # (B, 1)
            likeness = unit @ unit.gather(1, peak.unsqueeze(-1).expand(-1, -1, unit.shape[-1])).mT  # (B, N, 1)
            saliency = saliency * (1 - likeness.squeeze(-1).clamp(0, 1))
            chosen.append(peak)
        return torch.cat(chosen, 1)


INITIALIZERS = {
    "gaussian": Gaussian,
    "gaussian_means": GaussianMeans,
    "gaussian_per_slot": GaussianPerSlot,
    "learnt": Learnt,
    "kmeans++": KMeansPlusPlus,
    "kmeans": KMeans,
    "saliency": Saliency,
}
