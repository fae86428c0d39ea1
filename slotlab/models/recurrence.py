"""Slots of clips, frame by frame, as in SAVi (Kipf et al., 2022, arXiv:2111.12594)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from slotlab.config.model import RecurrentConfig, SlotAttentionConfig
from slotlab.models.competition import Projected
from slotlab.models.curriculum import Curriculum
from slotlab.models.host import found_on_host
from slotlab.models.initializers import INITIALIZERS, Starts
from slotlab.models.predictors import PREDICTORS
from slotlab.models.randomness import Draws
from slotlab.models.repeated import Repeated, joined
from slotlab.models.slot_attention import Attended, SlotAttention


class Recurrence(nn.Module):
    """Slot attention on every frame of a clip, started from the predictor's output for the frame before.

    The tokens of all frames are projected to keys and values in one pass; only the slots are computed in sequence.
    Without a predictor, a clip has one frame.

    Args:
        config: configuration of the whole model.
        token_dim: width of the tokens that slots attend to.
        grid: rows and columns of these tokens.
    """

    def __init__(self, config: RecurrentConfig, token_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        starts = Starts(config.slots, config.slot_dim, grid)
        self.curriculum: Curriculum | None = None
        if isinstance(config, SlotAttentionConfig):
            starts = starts._replace(kmeans_rounds=config.kmeans_rounds, saliency_weight=config.saliency_weight)
            if config.first_slots is not None:
                self.curriculum = Curriculum(config.first_slots, config.slots)
        self.config = config
        self.initialize = INITIALIZERS[config.initializer](starts)
        # At a fixed point no gradient reaches the first slots, and DDP fails on parameters without a gradient.
        self.initialize.requires_grad_(config.gradient != "implicit")
        self.attend = SlotAttention(
            token_dim,
            config.slot_dim,
            config.slot_mlp_hidden,
            config.temperature,
            config.gradient,
            config.gru_hidden,
        )
        predictor = config.predictor
        self.predict = PREDICTORS[predictor.kind](config.slot_dim, predictor) if predictor else None

    def forward(
        self,
        tokens: Float[Tensor, "B T N S"],
        clustered: Float[Tensor, "B T N D"],
        draws: Draws,
        there_and_back: bool = False,
    ) -> Attended:
        """Slots of all frames, (B * T, ...), each clip's in order; initialisers cluster the tokens ``clustered``.

        ``there_and_back`` gives those of a second pass, from the last frame to the first.

        All is float32, under autocast too: slots are sums over many rounds, and their products are small.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            projected = self.attend.project(tokens)
            active = self._drawn(len(tokens), draws, tokens.device)
            starts = {
                index: self.initialize(*frame, draws)
                for index, frame in enumerate(zip(tokens.unbind(1), clustered.unbind(1), strict=True))
                if self.predict is None or self._starts(index)
            }
            if self._apart() and len(starts) < tokens.shape[1] and not there_and_back:
                return self._at_once(projected, starts, active)
            frames = self._in_turn(projected, starts, active)
            if self.config.on_host:
                frames = self.matched(frames)
            if there_and_back:
                frames = self._back(projected, frames[-1], active)
        if len(frames) == 1:
            return frames[0]
        return Attended(
            torch.stack([frame.slots for frame in frames], 1).flatten(0, 1),
            torch.stack([frame.attention for frame in frames], 1).flatten(0, 1),
            torch.stack([frame.logits for frame in frames], 1).flatten(0, 1),
            _of_frames(len(frames), active),
        )

    def _in_turn(
        self, projected: Projected, starts: Mapping[int, Tensor], active: Bool[Tensor, "B K"] | None
    ) -> list[Attended]:
        """Frame by frame, from given slots ``starts`` (B, K, S) or those predicted by the frame before."""
        patches = projected.frames(active)
        rounds = [self._iterations(index, index in starts) for index in range(len(patches))]
        layers = self.attend.layers(rounds)
        predict = None if self.predict is None else Repeated(self.predict, len(patches) - len(starts))
        frames: list[Attended] = []
        for index, frame in enumerate(patches):
            if index in starts:
                slots = starts[index]
            else:
                assert predict is not None and self.config.predictor is not None
                before = frames[-1].slots
                slots = predict(before.detach() if self.config.predictor.stop_gradient else before, active)
            frames.append(self.attend.refine(frame, layers, slots, rounds[index]))
        return frames

    def _at_once(
        self, projected: Projected, starts: Mapping[int, Tensor], active: Bool[Tensor, "B K"] | None
    ) -> Attended:
        """The slots of :meth:`forward` where no gradient passes from a frame to the next.

        In turn without gradients, for the slots that the predictor gets; then with them, all frames at once. Those with
        more iterations than others begin before them.
        """
        assert self.predict is not None
        frames = projected.rows.unbind(1)
        count = len(frames)
        with torch.no_grad():
            earlier = replace(projected, rows=projected.rows[:, :-1])
            before = [frame.slots for frame in self._in_turn(earlier, starts, active)]
        later = [index for index in range(count) if index not in starts]
        given = joined([before[index - 1] for index in later])  # (frames * B, K, S)
        slots = dict(starts)
        slots |= zip(later, self.predict(given, _for_each(later, active)).chunk(len(later)), strict=True)
        groups: dict[int, list[int]] = {}  # frames by their iterations
        for index in range(count):
            groups.setdefault(self._iterations(index, index in starts), []).append(index)
        layers = self.attend.layers([*groups])
        begun = dict(slots)
        for iterations, group in groups.items():
            if iterations > 1:
                rows, some = (joined([part[index] for index in group]) for part in (frames, slots))
                (patches,) = replace(projected, rows=rows.unsqueeze(1)).frames(_for_each(group, active))
                some = self.attend.begin(patches, layers, some, iterations - 1)
                begun |= zip(group, some.chunk(len(group)), strict=True)
        every = replace(projected, rows=projected.rows.flatten(0, 1).unsqueeze(1))
        (patches,) = every.frames(_of_frames(count, active))
        together, initial = (torch.stack([of[i] for i in range(count)], 1).flatten(0, 1) for of in (begun, slots))
        return self.attend.finish(patches, layers, together, initial)

    def _back(self, projected: Projected, last: Attended, active: Bool[Tensor, "B K"] | None) -> list[Attended]:
        """All frames in their order, each found from the one after it."""
        assert self.predict is not None
        patches = projected.frames(active)
        layers = self.attend.layers([self.config.iterations] * len(patches))
        frames = [last]
        for frame in reversed(patches[:-1]):
            slots = self.predict(frames[-1].slots, active)
            frames.append(self.attend.refine(frame, layers, slots, self.config.iterations))
        return frames[::-1]

    def matched(self, frames: Sequence[Attended]) -> list[Attended]:
        """The frames with their slots in the order of those of the first that they are most like."""
        found = [frames[0]]
        for frame in frames[1:]:
            likeness = F.normalize(found[-1].slots.detach(), dim=-1) @ F.normalize(frame.slots.detach(), dim=-1).mT
            index = found_on_host(likeness, _likeliest, likeness.shape[1]).unsqueeze(-1)  # (B, K, 1)
            slots, attention, logits = (
                part.gather(1, index.expand_as(part)) for part in (frame.slots, frame.attention, frame.logits)
            )
            found.append(Attended(slots, attention, logits, frame.active))
        return found

    def before_compiling(self) -> None:
        """Keep the matching out of torch.compile's graphs: scipy does it, on the host."""
        if self.config.on_host:
            self.matched = torch.compiler.disable(self.matched)  # type: ignore[method-assign,no-untyped-call]

    def _drawn(self, batch: int, draws: Draws, device: torch.device) -> Bool[Tensor, "B K"] | None:
        """Slots of each clip that take part, the same in all frames: those in use so far, or random ones; None if all
        always do."""
        slots, fewest = self.config.slots, self.config.fewest_slots
        if self.curriculum is not None:
            return self.curriculum.active().expand(batch, -1)
        if not self.training or fewest is None:
            return None
        count = fewest + (draws.uniform((batch, 1), device) * (slots - fewest + 1)).long()
        return draws.uniform((batch, slots), device).argsort(1).argsort(1) < count

    def _apart(self) -> bool:
        """Whether there are gradients, and none passes from a frame to the next."""
        return torch.is_grad_enabled() and self.config.predictor is not None and self.config.predictor.stop_gradient

    def _starts(self, index: int) -> bool:
        predictor = self.config.predictor
        if self.config.on_host:
            return True
        return index == 0 or (predictor is not None and predictor.refresh > 0 and index % predictor.refresh == 0)

    def _iterations(self, index: int, fresh: bool) -> int:
        predictor = self.config.predictor
        first = index == 0 if self.config.on_host else fresh
        return predictor.first_iterations if predictor is not None and first else self.config.iterations


def _likeliest(likeness: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The partner of each row, one to one."""
    partners: npt.NDArray[np.int64] = linear_sum_assignment(likeness, maximize=True)[1]
    return partners


def _for_each(frames: Sequence[int], active: Bool[Tensor, "B K"] | None) -> Bool[Tensor, "F K"] | None:
    """What holds for the clips, for that many frames of each, one frame of all clips after the other."""
    return None if active is None else active.repeat(len(frames), 1)


def _of_frames(frames: int, active: Bool[Tensor, "B K"] | None) -> Bool[Tensor, "F K"] | None:
    """The same, all frames of a clip one after the other."""
    return None if active is None else active.repeat_interleave(frames, 0)
