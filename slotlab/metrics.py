"""Segmentation scores and collapse diagnostics.

Every segmentation score is computed from the contingency table of predicted slots and ground-truth
objects, never from pixels. A video's table is the sum of its frames' tables, so frames and whole videos share
one path. All functions work on a batch, on any device; counts are int64 and scores float64. NaN means "not
defined here": the frame was skipped, and means over a split leave it out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# Upsampled mask values alive at once: on the CPU about what its cache holds, on a GPU 512 MB.
_VALUES_A_CHUNK = {"cpu": 2**21, "cuda": 2**27}
_MAX_LABELS = 256  # labels are held as uint8 between upsampling and counting
_LEAST_ACTIVATION = 0.01  # of a slot that holds anything


# --- from masks to tables ---------------------------------------------------------------------------------


def masks_to_labels(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Slot index of every pixel: soft masks upsampled bilinearly (align_corners=False), then argmax.

    masks (B, K, h, w) of any float type, size (H, W) in pixels; returns (B, H, W) int64. Of equal slots the
    lowest index wins, on every device. Raises ValueError on NaN or infinite masks and on more than 256 slots.
    """
    chunks = [labels.long() for _, labels in _label_chunks(masks, size)]
    return torch.cat(chunks) if chunks else masks.new_zeros((0, *size), dtype=torch.int64)


def mask_tables(masks: Tensor, segmentations: Tensor, n_true: int) -> Tensor:
    """Contingency tables of soft masks against ground truth, at the ground truth's resolution.

    masks (B, K, h, w) float, segmentations (B, H, W) integer labels below n_true, 0 being background;
    returns (B, n_true, K) int64 pixel counts. The same as ``contingency(masks_to_labels(...))``, without ever
    holding the labels of more than one chunk. Raises ValueError as those two do.
    """
    if len(masks) != len(segmentations):
        raise ValueError(f"{len(masks)} masks but {len(segmentations)} segmentations; give one each a frame")
    slots = masks.shape[1]
    tables = masks.new_zeros((len(masks), n_true, slots), dtype=torch.int64)
    for frames, labels in _label_chunks(masks, (segmentations.shape[1], segmentations.shape[2])):
        truth = segmentations[frames].to(masks.device)
        tables[frames] = contingency(labels.flatten(1), truth.flatten(1), slots, n_true)
    return tables


def _label_chunks(masks: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the batch with their uint8 labels (b, H, W)."""
    if masks.ndim != 4 or not 1 <= masks.shape[1] <= _MAX_LABELS:
        raise ValueError(f"masks must be (B, K, h, w), 1 <= K <= {_MAX_LABELS}, not {tuple(masks.shape)}")
    if not bool(torch.isfinite(masks).all()):
        raise ValueError("masks hold NaN or infinity, so they have no argmax; did the model diverge?")
    slots = masks.shape[1]
    step = max(1, _VALUES_A_CHUNK.get(masks.device.type, 2**24) // (slots * size[0] * size[1]))
    for start in range(0, len(masks), step):
        frames = slice(start, start + step)
        fine = F.interpolate(masks[frames].float(), size=size, mode="bilinear", align_corners=False)
        # A running maximum over slots reads memory in order: four times faster than argmax over dim 1, and
        # ties go to the lowest slot on every device.
        best = fine[:, 0].clone()
        labels = torch.zeros(best.shape, dtype=torch.uint8, device=masks.device)
        for slot in range(1, slots):
            labels.masked_fill_(fine[:, slot] > best, slot)
            torch.maximum(best, fine[:, slot], out=best)
        yield frames, labels


def contingency(pred: Tensor, true: Tensor, n_pred: int, n_true: int) -> Tensor:
    """How many pixels of each ground-truth object fell to each predicted slot.

    pred, true (B, P) integer labels in [0, n_pred) and [0, n_true), true 0 being background; returns
    (B, n_true, n_pred) int64. Raises ValueError when shapes differ or a label is out of range.
    """
    if pred.shape != true.shape or pred.ndim != 2:
        raise ValueError(f"labels must both be (B, P), not {tuple(pred.shape)} and {tuple(true.shape)}")
    _check_range("predicted", pred, n_pred)
    _check_range("ground-truth", true, n_true)
    batch = torch.arange(len(pred), device=pred.device).unsqueeze(1)  # (B, 1)
    cell = (true.long() + batch * n_true).mul_(n_pred).add_(pred)  # (B, P), index into the flat table
    counts = torch.bincount(cell.flatten(), minlength=len(pred) * n_true * n_pred)
    return counts.view(len(pred), n_true, n_pred)


def _check_range(what: str, labels: Tensor, count: int) -> None:
    if labels.numel() == 0:
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{what} labels run from {low} to {high}, outside 0..{count - 1}")


# --- scores ---------------------------------------------------------------------------------------------


def adjusted_rand_index(table: Tensor, foreground: bool, objects: Tensor | None = None) -> Tensor:
    """Adjusted Rand index (Hubert & Arabie 1985), (B,) float64, at most 1 and 0 in expectation for chance.

    table (B, n_true, n_pred). With ``foreground`` the pixels whose ground truth is background (row 0) are
    left out; the prediction keeps all its slots (FG-ARI). ``objects`` (B, n_true - 1) bool restricts that
    further to the pixels of some objects, for a score by material, and needs ``foreground``.

    NaN where no pixel is left. Degenerate cases follow scikit-learn: one object in one slot scores 1, one
    object split among slots 0. Values can be slightly below 0, and are not clipped.
    """
    counts = table.double()
    if objects is not None:
        if not foreground:
            raise ValueError("a score of some objects leaves the background out: pass foreground=True")
        counts = counts[:, 1:] * objects.unsqueeze(-1)
    elif foreground:
        counts = counts[:, 1:]
    # Ordered pairs of pixels in float64: the counts are exact up to 2**53, and their products, which would
    # wrap around in int64 beyond 2**31 pairs, are only rounded.
    total = counts.sum((1, 2))
    both = counts.square().sum((1, 2))
    same_true = counts.sum(2).square().sum(1)
    same_pred = counts.sum(1).square().sum(1)
    together = both - total  # same object, same slot
    split = same_true - both  # same object, different slots
    merged = same_pred - both  # different objects, same slot
    apart = total.square() - same_true - same_pred + both  # different objects, different slots
    above = 2 * (together * apart - split * merged)
    below = (together + split) * (split + apart) + (together + merged) * (merged + apart)
    score = torch.where((split == 0) & (merged == 0), 1.0, above / below)
    return torch.where(total > 0, score, torch.nan)


def object_iou(table: Tensor) -> Tensor:
    """Intersection over union of each object with each slot, (B, n_true - 1, n_pred) float64.

    table (B, n_true, n_pred); background pixels that a slot covers count in its union. NaN where the object
    has no pixel.
    """
    counts = table.double()
    inter = counts[:, 1:]  # (B, objects, n_pred)
    true = inter.sum(2, keepdim=True)  # (B, objects, 1)
    iou = inter / (true + counts.sum(1, keepdim=True) - inter)
    return torch.where(true > 0, iou, torch.nan)


def best_overlap(table: Tensor) -> Tensor:
    """IoU of each object with the slot that fits it best, (B, n_true - 1) float64; NaN for absent objects."""
    return object_iou(table).amax(-1)


def mean_best_overlap(table: Tensor, objects: Tensor | None = None) -> Tensor:
    """mBO: mean over a frame's objects of the IoU of the slot that fits each best, (B,) float64.

    One slot may serve several objects; background is ignored. ``objects`` (B, n_true - 1) bool says which
    objects count; NaN where none is present. (Pont-Tuset et al. 2017, as used by DINOSAUR.)
    """
    return _mean_over_objects(best_overlap(table), objects)


def matched_slots(table: Tensor) -> Tensor:
    """The slot of each object, (B, n_true - 1) int64; -1 for an absent object and for one without a slot.

    Objects and slots are matched one to one for the largest total IoU (Hungarian algorithm); a slot that does not
    touch its object is none.
    """
    matched = table.new_full((len(table), table.shape[1] - 1), -1, dtype=torch.int64, device="cpu")
    for frame, overlaps in enumerate(object_iou(table).nan_to_num(0.0).cpu().numpy()):
        # Rows of absent objects are all 0, so they take no slot that a present one could use.
        rows, columns = linear_sum_assignment(overlaps, maximize=True)
        touching = overlaps[rows, columns] > 0
        matched[frame, rows[touching]] = torch.from_numpy(columns[touching])
    return matched.to(table.device)


def matched_iou(table: Tensor) -> Tensor:
    """IoU of each object with its own slot (:func:`matched_slots`), (B, n_true - 1) float64.

    An object left without a slot gets 0, an absent one NaN.
    """
    iou, slots = object_iou(table), matched_slots(table)
    own = iou.gather(-1, slots.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where((slots < 0) & ~own.isnan(), 0.0, own)  # NaN stays NaN


def mean_iou(table: Tensor, objects: Tensor | None = None) -> Tensor:
    """mIoU: mean over a frame's objects of :func:`matched_iou`, (B,) float64.

    The matching is always among all objects; ``objects`` (B, n_true - 1) bool only says whose IoU is
    averaged. NaN where none of them is present.
    """
    return _mean_over_objects(matched_iou(table), objects)


def _mean_over_objects(values: Tensor, objects: Tensor | None) -> Tensor:
    if objects is not None:
        values = torch.where(objects, values, torch.nan)
    return values.nanmean(-1)


# --- collapse diagnostics -------------------------------------------------------------------------------


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
