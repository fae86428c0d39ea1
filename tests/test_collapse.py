"""A collapse is reported in plain words, and only if there is one."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from slotlab.config.load import load_config, presets
from slotlab.models.base import Output
from slotlab.scoring.collapse import NAMES, Diagnostics, by_frame, kept_slots, warnings

F, K, N = 3, 4, 16


def output(masks: Tensor, slots: Tensor | None = None) -> Output:
    logits = masks.clamp_min(1e-6).log()
    slots = torch.eye(K).expand(len(masks), -1, -1) if slots is None else slots
    tokens = torch.zeros(len(masks), masks.shape[-1], 2)
    return Output(slots, masks, logits, masks, tokens, tokens, (1, masks.shape[-1]))


def quarters() -> Tensor:
    """Each slot holds its own quarter of the patches: (F, K, N)."""
    return torch.eye(K).repeat_interleave(N // K, 1).expand(F, -1, -1)


def told(*outputs: Output, preset: str = "savi-dinosaur", overrides: tuple[str, ...] = ()) -> list[str]:
    collapse = Diagnostics()
    for video in outputs:
        collapse.add(video)
    return warnings(collapse.means(), load_config(preset, None, (*overrides, f"model.slots={K}")))


def test_good_masks_raise_no_warning() -> None:
    assert told(output(quarters())) == []


def test_one_slot_that_takes_all() -> None:
    masks = torch.zeros(F, K, N)
    masks[:, 2] = 1
    said = told(output(masks))
    assert len(said) == 1 and "one slot takes nearly everything (1.00 of 4" in said[0]


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
    frames = by_frame(output(masks))
    assert frames["effective_slots"].tolist() == [4, 4, 1]


def test_kept_slots_weigh_videos_by_their_slots() -> None:
    crowded, empty = torch.tensor([8.0, 6.0, 6.0]), torch.tensor([1.0, 3.0])
    assert kept_slots([crowded]) == 0.75
    assert kept_slots([crowded, empty]) == 1.0, "not (0.75 + 3) / 2"


def test_each_frame_is_averaged_over_the_videos_that_have_it() -> None:
    """Three frames of four slots, and one frame of one."""
    one = torch.zeros(1, K, N)
    one[:, 2] = 1
    collapse = Diagnostics()
    for masks in (quarters(), one):
        collapse.add(output(masks))
    found = collapse.at_each_frame()
    assert set(found) == set(NAMES)
    assert found["effective_slots"] == pytest.approx([2.5, 4, 4])
    assert collapse.means()["effective_slots"] == pytest.approx(2.5), "videos weigh alike"
    assert collapse.means()["kept_slots"] == pytest.approx(1)
    assert collapse.largest_by_slot() == pytest.approx([0.5, 0.5, 1, 0.5])


def test_empty_slots_hide_no_collapse() -> None:
    """A model that uses as many slots as it needs, two of four, and those two alike; and the same two apart."""
    halves = torch.zeros(F, K, N)
    halves[:, :2] = 0.5
    alike = torch.zeros(F, K, K)
    alike[:, :2, 0] = 1
    said = told(output(halves, alike), preset="default")
    assert [sentence.split(" (")[0] for sentence in said] == [
        "all slots have the same mask",
        "all slots hold the same vector",
    ]
    apart = torch.zeros(F, K, N)
    apart[:, 0, : N // 2] = apart[:, 1, N // 2 :] = 1
    assert told(output(apart), preset="default") == []
    assert by_frame(output(halves))["mask_similarity"].tolist() == pytest.approx([1] * F)


def test_a_small_object_before_a_background_is_no_collapse() -> None:
    masks = torch.zeros(F, K, 256)
    masks[:, 0, 20:] = masks[:, 1, :20] = 1
    assert told(output(masks), preset="default") == []


def test_slots_that_are_never_carried_are_not_lost() -> None:
    masks = quarters().clone()
    masks[-1] = 0
    masks[-1, 0] = 1
    assert told(output(masks), preset="image") == [] == told(output(masks), preset="dinosaur")


@pytest.mark.parametrize("preset", presets())
def test_advice_names_what_this_model_has_and_what_it_does_not_do_yet(preset: str) -> None:
    config = load_config(preset)
    worst = {
        "effective_slots": 1.0,
        "mask_similarity": 1.0,
        "slot_similarity": 1.0,
        "logit_std": 0.0,
        "kept_slots": 0.2,
    }
    said = warnings(worst, config) + warnings(worst | {"mask_similarity": 0.0}, config)
    for option in re.findall(r"[a-z_]+(?:\.[a-z_]+)+=[^ ,]+", " ".join(said)):
        changed = load_config(preset, None, [option])
        idle = [note.split(" =")[0] for note in changed.unread()]
        assert changed != config and option.split("=")[0] not in idle, option
    if preset.startswith("log-2026"):  # whose mask temperature another decoder would not read
        assert "model.decoder.kind=mix" in " ".join(said)
