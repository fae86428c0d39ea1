"""How long the like of a token is seen: what tells an object from a shadow without a label.

Shadows and reflections stand out of the background as objects do, but they come and go: of an object's tokens some
frames before or after there are others in the same direction, of a passing shadow's there are none. One observation
says little, as objects turn and leave; regressed on the token over many videos, it says which tokens are of a kind
that lasts. The readout is linear, so that a slot's is the mean over its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

LIKE, LIKE_WIDTH = 0.4, 0.1  # cosine from which two tokens are alike, and how softly
ENOUGH = 1 / 128  # of a frame's patches that are alike: more do not make a token last longer
RIDGE = 1.0  # against sums of squares over thousands of unit directions


class Lasting(nn.Module):
    """Expected number of like tokens some frames before and after, relative to the mean token of an object.

    Args:
        dim: channels D of normalised tokens.
    """

    weight: Tensor  # (D,)
    bias: Tensor  # ()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(dim))
        self.register_buffer("bias", torch.ones(()))  # until fitted, everything lasts alike

    def forward(self, tokens: Float[Tensor, "T N D"]) -> Float[Tensor, "T N"]:
        """By the direction alone; 0 and more, 1 on average."""
        return (F.normalize(tokens, dim=-1) @ self.weight + self.bias).clamp_min(0)

    @torch.no_grad()
    def fit(self, videos: Iterable[tuple[Float[Tensor, "_ N D"], Bool[Tensor, "_ N"]]], frames: int) -> None:
        """Ridge regression over the object tokens of some videos, each with the frames ``frames`` before and after.

        ``videos`` gives tokens, and which of them are of objects. A frame with none so far away tells nothing; if
        there is no other, everything lasts.
        """
        dim = len(self.weight)
        count, seen = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        mean, product = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
        gram = torch.zeros(dim, dim, dtype=torch.float64)
        for tokens, objects in videos:
            directions = F.normalize(tokens, dim=-1)
            found = likes(directions, objects, frames)
            told = objects & found.isfinite()
            x, y = directions[told].double(), found[told].double()  # (objects' tokens, D), (objects' tokens)
            count, seen, mean = count + len(x), seen + y.sum(), mean + x.sum(0)
            gram, product = gram + x.T @ x, product + x.T @ y
        if not seen > 0:
            return
        mean, seen = mean / count, seen / count
        gram, product = gram - count * mean.outer(mean), product - count * seen * mean
        weight = torch.linalg.solve(gram + RIDGE * torch.eye(dim, dtype=torch.float64), product) / seen
        self.weight.copy_(weight)
        self.bias.copy_(1 - mean @ weight)


def likes(directions: Float[Tensor, "T N D"], objects: Bool[Tensor, "T N"], frames: int) -> Float[Tensor, "T N"]:
    """Tokens of objects alike, ``frames`` before and after, up to what is enough.

    The mean of both where both exist, NaN where neither does: at the middle of a short video.
    """
    length, patches = objects.shape
    total, sides = torch.zeros(length, patches), torch.zeros(length, 1)
    for here in range(length):
        for there in (here - frames, here + frames):
            if 0 <= there < length:
                cosine = directions[here] @ directions[there, objects[there]].T  # (N, objects' tokens)
                alike = torch.sigmoid((cosine - LIKE) / LIKE_WIDTH).sum(-1)
                total[here] += alike.clamp_max(ENOUGH * patches)
                sides[here] += 1
    return total / sides
