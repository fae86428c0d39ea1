"""What shows a collapse, and what to do about it in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from slotlab import metrics
from slotlab.models.base import Output

NAMES = ("mask_similarity", "slot_similarity", "effective_slots", "largest_activation", "logit_std")


def by_frame(output: Output) -> dict[str, Tensor]:
    """Diagnostics of each frame (F,) of one video or batch of frames; see :mod:`slotlab.metrics` for each.

    Taken on the host, as not every device has float64.
    """
    masks, slots, logits = (values.detach().cpu() for values in (output.masks, output.slots, output.logits))
    return {
        "mask_similarity": metrics.mask_similarity(masks),
        "slot_similarity": metrics.slot_similarity(slots),
        "effective_slots": metrics.effective_slots(masks),
        "largest_activation": metrics.largest_activation(masks).mean(-1),
        "logit_std": metrics.logit_std(logits),
    }


def means(found: Mapping[str, Tensor]) -> dict[str, float]:
    """Over the frames of :func:`by_frame`."""
    return {name: float(values.double().mean()) for name, values in found.items()}


def kept_slots(effective: Sequence[Tensor]) -> float:
    """Effective slots at the last frames over those at the first, each summed over videos: 1 means none are lost.

    ``effective`` holds (T,) of each video (:func:`slotlab.metrics.effective_slots`). Objects leave and enter, so it
    is to be read beside the same of the ground truth.
    """
    return float(sum(frames[-1] for frames in effective) / sum(frames[0] for frames in effective))


def warnings(found: Mapping[str, float], slots: int) -> list[str]:
    """One sentence for each way in which the slots of a run have collapsed, with the options that help.

    ``found`` are :func:`means`, and ``kept_slots`` for video models.
    """
    said = []
    if found["effective_slots"] < 1.5:
        said.append(
            f"one slot takes nearly everything ({found['effective_slots']:.1f} of {slots} in use): try model."
            "initializer=kmeans, model.projection=mlp, data.normalize=whiten, or a lower optim.learning_rate"
        )
    if found["mask_similarity"] > 0.9:
        said.append(
            f"all slots have the same mask (mean cosine {found['mask_similarity']:.2f}): try model.decoder."
            "mask_temperature=0.5, model.temperature=0.5, more training, or model.decoder.kind=mix"
        )
    elif found["logit_std"] < 0.1:
        said.append(
            f"the masks are flat (logit std {found['logit_std']:.2f}): try model.temperature=0.5, "
            "data.normalize=whiten, or more training"
        )
    if found["slot_similarity"] > 0.95:
        said.append(
            f"all slots hold the same vector (mean cosine {found['slot_similarity']:.2f}): try model.initializer="
            "kmeans, or loss.slot_contrast for video"
        )
    if found.get("kept_slots", 1.0) < 0.7:
        said.append(
            f"slots are lost over the frames ({found['kept_slots']:.0%} left at the last one): try model.predictor."
            "stop_gradient=true, model.predictor.output_norm=true, loss.slot_contrast=0.5, or longer clips"
        )
    return said
