"""What shows a collapse, and what to do about it in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from featcache.errors import UsageError
from slotlab import metrics
from slotlab.config import Config, changed_by
from slotlab.models.base import Output

NAMES = ("mask_similarity", "slot_similarity", "effective_slots", "largest_activation", "logit_std")


def by_frame(output: Output) -> dict[str, Tensor]:
    """Diagnostics of each frame (F,) of one video or batch of frames; see :mod:`slotlab.metrics` for each.

    Taken on the host, as not every device has float64.
    """
    masks, slots, logits = (values.detach().cpu() for values in (output.masks, output.slots, output.logits))
    live = metrics.live_slots(masks)
    return {
        "mask_similarity": metrics.mask_similarity(masks, live),
        "slot_similarity": metrics.slot_similarity(slots, live),
        "effective_slots": metrics.effective_slots(masks),
        "largest_activation": metrics.largest_activation(masks).mean(-1),
        "logit_std": metrics.logit_std(logits),
    }


class Diagnostics:
    """The diagnostics of some videos, gathered one by one."""

    def __init__(self) -> None:
        self._videos: list[dict[str, Tensor]] = []  # of by_frame, (T,) each
        self._largest: list[Tensor] = []  # (K,) each

    def add(self, output: Output) -> None:
        """All frames of one video, in order."""
        self._videos.append(by_frame(output))
        self._largest.append(metrics.largest_activation(output.masks).double().mean(0).cpu())

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

    ``effective`` holds (T,) of each video (:func:`slotlab.metrics.effective_slots`). Objects leave and enter, so it
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
