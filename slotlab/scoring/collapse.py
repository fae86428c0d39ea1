"""What shows a collapse, and what to do about it in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from featcache.errors import UsageError
from slotlab.config.load import changed_by
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


def warnings(found: Mapping[str, float], config: Config) -> list[str]:
    """One sentence for each way in which the slots of a run have collapsed, with the options that help such a model.

    ``found`` are :meth:`Diagnostics.means`. Small objects before a wide background have few
    effective slots, too: in a third of the embedded videos less than 1.5 for the truth.
    """
    said = []
    scale = ("data.normalize=whiten",) if config.model.kind == "slot_attention" else ()
    if found["effective_slots"] < 1.15:
        said.append(
            f"one slot takes nearly everything ({found['effective_slots']:.2f} of {config.model.slots} in use)"
            + helpful(
                config,
                "model.initializer=kmeans",
                "model.projection=mlp",
                *scale,
                "model.objectness.threshold=0.8",
                "a lower optim.learning_rate",
            )
        )
    if found["mask_similarity"] > 0.9:
        said.append(
            f"all slots have the same mask (mean cosine {found['mask_similarity']:.2f})"
            + helpful(
                config,
                half(config, "model.decoder.mask_temperature"),
                half(config, "model.temperature"),
                "model.decoder.kind=mix",
                "more training",
            )
        )
    elif found["logit_std"] < 0.1:
        said.append(
            f"the attention over slots is flat (logit std {found['logit_std']:.2f})"
            + helpful(config, half(config, "model.temperature"), *scale, "more training")
        )
    if found["slot_similarity"] > 0.95:
        said.append(
            f"all slots hold the same vector (mean cosine {found['slot_similarity']:.2f})"
            + helpful(
                config,
                "model.initializer=kmeans",
                "model.initializer=gaussian_per_slot",
                "more training",
            )
        )
    if config.model.carries and found["kept_slots"] < 0.6:  # objects leave, too: 0.86 in the embedded videos
        said.append(
            f"slots are lost over the frames ({found['kept_slots']:.0%} left at the last one)"
            + helpful(
                config,
                "model.predictor.stop_gradient=true",
                "model.predictor.output_norm=true",
                "loss.slot_contrast=0.5",
                "model.merge_distance=0.05",
                "longer clips (data.clip)",
            )
        )
    return said


def helpful(config: Config, *advice: str) -> str:
    """Those of ``key=value`` that change something in this configuration, as the end of a sentence; words are kept."""
    kept = [item for item in advice if "=" not in item or _changes(config, *item.split("="))]
    return ": try " + ", or ".join(filter(None, (", ".join(kept[:-1]), kept[-1])))


def half(config: Config, key: str) -> str:
    """``key=value`` with half of the present value; of a model that has no such key, nothing that would be kept."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return f"{key}={value / 2:g}" if isinstance(value, float) else f"{key}=none"


def _changes(config: Config, key: str, value: str) -> bool:
    try:
        changed = changed_by(config, key, value)
    except UsageError:
        return False  # this kind of model has no such part, or does not go with it
    return changed != config and not any(idle.startswith(f"{key} =") for idle in changed.unread())


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
