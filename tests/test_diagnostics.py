"""Collapse is told in plain words, and only where there is one."""

from __future__ import annotations

import torch
from torch import Tensor

from slotlab import diagnostics, metrics
from slotlab.models.base import Output

F, K, N = 3, 4, 16


def output(masks: Tensor, slots: Tensor | None = None) -> Output:
    logits = masks.clamp_min(1e-6).log()
    slots = torch.eye(K).expand(len(masks), -1, -1) if slots is None else slots
    tokens = torch.zeros(len(masks), N, 2)
    return Output(slots, masks, logits, masks, tokens, tokens)


def quarters() -> Tensor:
    """Each slot holds its own quarter of the patches: (F, K, N)."""
    return torch.eye(K).repeat_interleave(N // K, 1).expand(F, -1, -1)


def told(*outputs: Output) -> list[str]:
    means = diagnostics.means(diagnostics.by_frame(outputs[0])) | {
        "kept_slots": diagnostics.kept_slots([metrics.effective_slots(o.masks) for o in outputs])
    }
    return diagnostics.warnings(means, K)


def test_good_masks_raise_no_warning() -> None:
    assert told(output(quarters())) == []


def test_one_slot_that_takes_all() -> None:
    masks = torch.zeros(F, K, N)
    masks[:, 2] = 1
    said = told(output(masks))
    assert len(said) == 1 and "one slot takes nearly everything (1.0 of 4" in said[0]


def test_flat_masks() -> None:
    said = told(output(torch.full((F, K, N), 1 / K)))
    assert len(said) == 1 and "all slots have the same mask (mean cosine 1.00)" in said[0]


def test_equal_slots() -> None:
    said = told(output(quarters(), torch.ones(F, K, K)))
    assert len(said) == 1 and "all slots hold the same vector" in said[0]


def test_slots_that_are_lost_over_a_video() -> None:
    masks = quarters().clone()
    masks[-1] = 0
    masks[-1, 0] = 1
    said = told(output(masks))
    assert len(said) == 1 and "slots are lost over the frames (25% left" in said[0]
    frames = diagnostics.by_frame(output(masks))
    assert frames["effective_slots"].tolist() == [4, 4, 1]


def test_kept_slots_weigh_videos_by_their_slots() -> None:
    crowded, empty = torch.tensor([8.0, 6.0, 6.0]), torch.tensor([1.0, 3.0])
    assert diagnostics.kept_slots([crowded]) == 0.75
    assert diagnostics.kept_slots([crowded, empty]) == 1.0, "not (0.75 + 3) / 2"
