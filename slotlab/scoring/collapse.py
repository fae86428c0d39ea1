"""Diagnostics that show a collapse of the slots, and advice against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import UsageError
from slotlab.config.load import changed_by
from slotlab.config.model import Remedy, Sign
from slotlab.config.schema import Config
from slotlab.models.base import Output
from slotlab.scoring.intervals import Float

NAMES = ("mask_similarity", "slot_similarity", "effective_slots", "largest_activation", "logit_std")


def by_frame(output: Output) -> dict[str, Tensor]:
    """Each diagnostic at each frame, (F,), of one video or batch of frames; the functions below define them.

    They are computed on the host, because some devices have no float64.
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
    """Collects the diagnostics of videos, one by one."""

    def __init__(self) -> None:
        self._videos: list[Float] = []  # by_frame of each video, (NAMES, T) each
        self._largest: list[Float] = []  # (K,) each

    def add(self, output: Output) -> None:
        """Add all frames of one video, in order."""
        found = by_frame(output)
        self._videos.append(torch.stack([found[name].double() for name in NAMES]).numpy())
        self._largest.append(largest_activation(output.masks).cpu().double().mean(0).numpy())

    def means(self) -> dict[str, float]:
        """The mean of each diagnostic over the videos, and ``kept_slots``."""
        found = np.stack([video.mean(1) for video in self._videos]).mean(0)
        kept = kept_slots([video[NAMES.index("effective_slots")] for video in self._videos])
        return dict(zip(NAMES, found.tolist(), strict=True)) | {"kept_slots": kept}

    def at_each_frame(self) -> dict[str, list[float]]:
        """The mean of each diagnostic at every frame index, over the videos that have such a frame."""
        longest = max(video.shape[1] for video in self._videos)
        padded = np.full((len(self._videos), len(NAMES), longest), np.nan)
        for row, video in zip(padded, self._videos, strict=True):
            row[:, : video.shape[1]] = video
        return dict(zip(NAMES, np.nanmean(padded, 0).tolist(), strict=True))

    def largest_by_slot(self) -> list[float]:
        """Largest activation of each slot (K values), averaged over frames, then over videos."""
        largest: list[float] = np.stack(self._largest).mean(0).tolist()
        return largest


def kept_slots(effective: Sequence[Float]) -> float:
    """Effective slots at the videos' last frames divided by those at their first: 1 means that none are lost.

    ``effective`` holds :func:`effective_slots` of each video, (T,). Objects leave and enter, so compare the value with
    that of the ground truth.
    """
    return float(sum(frames[-1] for frames in effective) / sum(frames[0] for frames in effective))


Means = Mapping[str, float]  # Diagnostics.means


class Collapse(NamedTuple):
    """One way to collapse: its test, its description, and what helps any model."""

    shows: Callable[[Means, Config], bool]
    says: str
    helps: str


# Thresholds allow for the ground truth: small objects before a wide background also have few effective slots (below 1.5
# in a third of the embedded videos), and objects leave (the truth keeps 0.86 of its slots there).
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

    ``found`` are :meth:`Diagnostics.means`. The model's configuration lists the options (``remedies``).
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
    """``key=value``; empty if it is set already, has no effect, or contradicts the rest of the configuration."""
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


_LEAST_ACTIVATION = 0.01  # least mask value of a slot that holds anything


def live_slots(masks: Tensor) -> Tensor:
    """Slots that hold anything of their frame, (B, K) bool: their mask exceeds 0.01 somewhere.

    masks (B, K, h, w) or (B, K, N). A model that uses as many slots as a frame needs leaves the others empty; flat
    masks of up to 100 slots are live.
    """
    return masks.flatten(2).amax(-1) > _LEAST_ACTIVATION


def mask_similarity(masks: Tensor, live: Tensor | None = None) -> Tensor:
    """Mean cosine between the masks of two slots: ``mean_{i<j} <m_i, m_j> / (|m_i| |m_j|)``, (B,) in [0, 1].

    masks (B, K, h, w) or (B, K, N), not negative; live (B, K) bool: the slots to compare, by default all. 0: no
    overlap, or fewer than two slots. 1: all slots have the same mask.
    """
    return _mean_pairwise_cosine(masks.flatten(2), live)


def slot_similarity(slots: Tensor, live: Tensor | None = None) -> Tensor:
    """Mean cosine between two slot vectors: ``mean_{i<j} <s_i, s_j> / (|s_i| |s_j|)``, (B,) in [-1, 1].

    slots (B, K, D); live (B, K) bool: the slots to compare, by default all. 1: the slots have collapsed to one
    direction. 0: orthogonal, or fewer than two slots.
    """
    return _mean_pairwise_cosine(slots, live)


def _mean_pairwise_cosine(vectors: Tensor, live: Tensor | None) -> Tensor:
    """Mean cosine (B,) of the pairs of vectors (B, K, N); a zero vector has cosine 0 with every other."""
    unit = F.normalize(vectors.double(), dim=-1)
    live = torch.ones_like(unit[..., 0]) if live is None else live.double()  # (B, K)
    unit = unit * live.unsqueeze(-1)
    # sum over i != j of <u_i, u_j> = |sum of u|^2 - sum of |u|^2: no (K, K) matrix
    count = live.sum(1)
    return (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))) / (count * (count - 1)).clamp_min(1)


def effective_slots(masks: Tensor) -> Tensor:
    """Effective number of slots, (B,): ``exp(-sum_k p_k log p_k)``, p_k being slot k's share of the mask mass.

    masks (B, K, h, w) or (B, K, N), not negative. 1: one slot takes all; K: all have equal mass (which is
    also what flat, useless masks give: read it beside :func:`mask_similarity`).
    """
    mass = masks.double().flatten(2).sum(-1)  # (B, K)
    share = mass / mass.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy.exp()


def largest_activation(masks: Tensor) -> Tensor:
    """The largest mask value of each slot, ``max_n m_kn``, (B, K).

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
