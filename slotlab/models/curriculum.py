"""Slots that are added where the error is large (SlotCurri, Moon et al., 2026, arXiv:2603.22758)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from slotlab.models.randomness import Draws

NOISE = 0.2  # distance of a new slot from its origin, in distances of that from the nearest other


class Curriculum(nn.Module):
    """Few learnt slots at first, half of all from a tenth of the steps on, all from a quarter on.

    A new slot starts beside one there is; of new slots each gets the share that it has in the error, which is that of
    the reconstruction, weighted by its mask, in the step before. (wjun0830/SlotCurri ddc0b1c, ``models.py``.)
    """

    in_use: Tensor  # (), number of slots
    error: Tensor  # (K,), of the last step

    def __init__(self, first: int, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.register_buffer("in_use", torch.tensor(first))
        self.register_buffer("error", torch.zeros(slots))

    def active(self) -> Bool[Tensor, "1 K"]:
        return (torch.arange(self.slots, device=self.in_use.device) < self.in_use).unsqueeze(0)

    @torch.no_grad()
    def note(self, masks: Float[Tensor, "F K M"], found: Float[Tensor, "F M D"], true: Float[Tensor, "F M D"]) -> None:
        """Note the error of each slot in a training pass."""
        error = (found.detach().float() - true).square().mean(-1)  # (F, M)
        self.error.copy_((masks.detach().float() * error.unsqueeze(1)).mean((0, 2)))

    @torch.no_grad()
    def grow(self, queries: Tensor, step: int, steps: int, draws: Draws, mean: Callable[[Tensor], Tensor]) -> bool:
        """Add the slots that come after this step, of ``steps``, to the ``queries`` (1, K, S); whether there were any.

        ``mean`` averages over the ranks. Waits for the device, twice in a run.
        """
        wanted = {max(1, steps // 10): self.slots // 2, max(1, steps // 4): self.slots}.get(step)
        if wanted is None or wanted <= (present := int(self.in_use)):
            return False
        shares = mean(self.error)[:present].cpu()
        parts = shares / shares.sum() * (wanted - present)
        counts = parts.floor().long()
        left = (parts - counts).argsort(descending=True)[: wanted - present - int(counts.sum())]
        counts[left] += 1
        origin = torch.repeat_interleave(torch.arange(present), counts).to(queries.device)  # (new,)
        old = queries[0].clone()  # (K, S)
        likeness = F.normalize(old, dim=-1) @ F.normalize(old, dim=-1).T
        nearest = likeness.fill_diagonal_(-1).argmax(1)
        length = old.norm(dim=-1)
        reach = NOISE * (old - old[nearest]).norm(dim=-1) * length / length.mean()  # (K,)
        ways = F.normalize(draws.normal((len(origin), old.shape[1]), queries.device), dim=-1)
        queries[0, present:wanted] = old[origin] + reach[origin].unsqueeze(1) * ways
        self.in_use.fill_(wanted)
        return True
