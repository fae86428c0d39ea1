"""What shows a collapse, and what to do about it in plain words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from featcache.errors import UsageError
from slotlab.config.load import changed_by
from slotlab.config.model import Remedy, Sign
from slotlab.config.schema import Config
from slotlab.models.base import Output

NAMES = ("mask_similarity", "slot_similarity", "effective_slots", "largest_activation", "logit_std")


def by_frame(output: Output) -> dict[str, Tensor]:
    """Diagnostics of each frame (F,) of one video or batch of frames; see :mod:`slotlab.scoring.metrics` for each.

    Taken on the host, as not every device has float64.
    """
    masks, slots, logits = (values.detach().cpu() for values in (output.masks, output.slots, output.logits))
    live = live_slots(masks)
    return {
        "mask_similarity": mask_similarity(masks, live),
        "slot_similarity": slot_similarity(slots, live),
        "effective_slots": effective_slots(masks),
        "largest_activation": largest_activation(masks).mean(-1),
        "logit_std": logit_std(logits),
    }


class Diagnostics:
    """The diagnostics of some videos, gathered one by one."""

    def __init__(self) -> None:
        self._videos: list[dict[str, Tensor]] = []  # of by_frame, (T,) each
        self._largest: list[Tensor] = []  # (K,) each

    def add(self, output: Output) -> None:
        """All frames of one video, in order."""
        self._videos.append(by_frame(output))
        self._largest.append(largest_activation(output.masks).double().mean(0).cpu())

    def means(self) -> dict[str, float]:
        """Of each diagnostic over the videos, and ``kept_slots``."""
        found = {name: torch.stack([video[name].double().mean() for video in self._videos]).mean() for name in NAMES}
        return {name: float(value) for name, value in found.items()} | {
            "kept_slots": kept_slots([video["effective_slots"] for video in self._videos])
        }

    def at_each_frame(self) -> dict[str, list[float]]:
        """Of each diagnostic, its mean at every frame index over the videos that are so long."""
        found = {}
        for name in NAMES:
            values = [video[name].double() for video in self._videos]
            padded = pad_sequence(values, batch_first=True, padding_value=torch.nan)  # (V, T)
            found[name] = padded.nanmean(0).tolist()
        return found

    def largest_by_slot(self) -> list[float]:
        """Largest activation of each slot, mean over frames and videos."""
        return [float(value) for value in torch.stack(self._largest).mean(0)]


def kept_slots(effective: Sequence[Tensor]) -> float:
    """Effective slots at the last frames over those at the first, each summed over videos: 1 means none are lost.

    ``effective`` holds (T,) of each video (:func:`effective_slots`). Objects leave and enter, so it
    is to be read beside the same of the ground truth.
    """
    return float(sum(frames[-1] for frames in effective) / sum(frames[0] for frames in effective))


Means = Mapping[str, float]  # Diagnostics.means


class Collapse(NamedTuple):
    """One way to collapse: when it shows, how it is said, and what helps any model."""

    shows: Callable[[Means, Config], bool]
    says: str
    helps: str


# Small objects before a wide background have few effective slots, too: in a third of the embedded videos less than 1.5
# for the truth. Objects leave: of the truth's slots 0.86 are kept there.
COLLAPSES: dict[Sign, Collapse] = {
    "one_slot": Collapse(
        lambda found, config: found["effective_slots"] < 1.15,
        "one slot takes nearly everything ({effective_slots:.2f} of {slots} in use)",
        "a lower optim.learning_rate",
    ),
    "same_masks": Collapse(
        lambda found, config: found["mask_similarity"] > 0.9,
        "all slots have the same mask (mean cosine {mask_similarity:.2f})",
        "more training",
    ),
    "flat_attention": Collapse(
        lambda found, config: found["logit_std"] < 0.1 and found["mask_similarity"] <= 0.9,
        "the attention over slots is flat (logit std {logit_std:.2f})",
        "more training",
    ),
    "same_slots": Collapse(
        lambda found, config: found["slot_similarity"] > 0.95,
        "all slots hold the same vector (mean cosine {slot_similarity:.2f})",
        "more training",
    ),
    "lost_slots": Collapse(
        lambda found, config: config.model.carries and found["kept_slots"] < 0.6,
        "slots are lost over the frames ({kept_slots:.0%} left at the last one)",
        "longer clips (data.clip)",
    ),
}


def warnings(found: Means, config: Config) -> list[str]:
    """One sentence for each way in which the slots of a run have collapsed, with the options that help such a model.

    ``found`` are :meth:`Diagnostics.means`. Which options those are, the model's configuration says (``remedies``).
    """
    said = []
    for sign, collapse in COLLAPSES.items():
        if collapse.shows(found, config):
            advice = [_advice(remedy, config) for remedy in config.model.remedies.get(sign, ())]
            *others, last = [*filter(None, advice), collapse.helps]
            text = collapse.says.format(**found, slots=config.model.slots)
            said.append(f"{text}: try {', or '.join(filter(None, (', '.join(others), last)))}")
    return said


def _advice(remedy: Remedy, config: Config) -> str:
    """``key=value``; nothing where that is so already, is not read, or does not go with the rest."""
    key, value = remedy.key, remedy.value
    if value is None:
        value = float(attrgetter(key)(config)) * remedy.factor
    text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
    try:
        changed = changed_by(config, key, text)
    except UsageError:
        return ""
    idle = any(note.startswith(f"{key} =") for note in changed.unread())
    return "" if changed == config or idle else f"{key}={text}"


_LEAST_ACTIVATION = 0.01  # of a slot that holds anything


def live_slots(masks: Tensor) -> Tensor:
    """Which slots hold anything of their frame, (B, K) bool: those with a mask above 0.01 somewhere.

    masks (B, K, h, w) or (B, K, N). A model that uses as many slots as a frame needs leaves the others empty; flat
    masks of up to 100 slots are live.
    """
    return masks.flatten(2).amax(-1) > _LEAST_ACTIVATION


def mask_similarity(masks: Tensor, live: Tensor | None = None) -> Tensor:
    """Mean cosine between the masks of two slots: ``mean_{i<j} <m_i, m_j> / (|m_i| |m_j|)``, (B,) in [0, 1].

    masks (B, K, h, w) or (B, K, N), not negative; live (B, K): the slots to be compared, all without it. 0: no
    overlap, or less than two slots. 1: all slots have the same mask.
    """
    return _mean_pairwise_cosine(masks.flatten(2), live)


def slot_similarity(slots: Tensor, live: Tensor | None = None) -> Tensor:
    """Mean cosine between two slot vectors: ``mean_{i<j} <s_i, s_j> / (|s_i| |s_j|)``, (B,) in [-1, 1].

    slots (B, K, D); live (B, K): the slots to be compared, all without it. 1: the slots have collapsed to one
    direction. 0: less than two slots.
    """
    return _mean_pairwise_cosine(slots, live)


def _mean_pairwise_cosine(vectors: Tensor, live: Tensor | None) -> Tensor:
    """vectors (B, K, N) to (B,); a zero vector has cosine 0 with every other."""
    unit = F.normalize(vectors.double(), dim=-1)
    live = torch.ones_like(unit[..., 0]) if live is None else live.double()  # (B, K)
    unit = unit * live.unsqueeze(-1)
    # sum over i != j of <u_i, u_j> = |sum of u|^2 - sum of |u|^2: no (K, K) matrix
    count = live.sum(1)
    return (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))) / (count * (count - 1)).clamp_min(1)


def effective_slots(masks: Tensor) -> Tensor:
    """How many slots share the image: ``exp(-sum_k p_k log p_k)``, p_k slot k's share of the mask mass, (B,).

    masks (B, K, h, w) or (B, K, N), not negative. 1: one slot takes all; K: all have equal mass (which is
    also what flat, useless masks give: read it beside :func:`mask_similarity`).
    """
    mass = masks.double().flatten(2).sum(-1)  # (B, K)
    share = mass / mass.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy.exp()


def largest_activation(masks: Tensor) -> Tensor:
    """Each slot's largest mask value, ``max_n m_kn``, (B, K).

    masks (B, K, h, w) or (B, K, N). Near 1/K for every slot: the softmax over slots is flat; near 0 for some:
    dead slots.
    """
    return masks.flatten(2).amax(-1)


def logit_std(logits: Tensor) -> Tensor:
    """Spread of the mask logits over slots: ``sqrt(mean_n var_k(l_kn))``, (B,) float64.

    logits (B, K, h, w) or (B, K, N), before the softmax over slots. That softmax ignores what all slots of a
    patch share, so the spread is taken within each patch: 0.03 means flat masks, 1 and more decided ones.
    """
    return logits.double().flatten(2).var(1, correction=0).mean(-1).sqrt()
