from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from slotlab.masks.labels import _PIXELS_A_CHUNK, masks_to_labels
from slotlab.scoring import metrics
from slotlab.scoring.collapse import effective_slots, largest_activation, logit_std, mask_similarity, slot_similarity
from slotlab.scoring.scores import Means, Scores
from slotlab.scoring.tables import contingency, mask_tables

SLOTS, OBJECTS = 5, 4
_labels = st.integers(1, 60).flatmap(
    lambda pixels: st.tuples(
        hnp.arrays(np.uint8, pixels, elements=st.integers(0, SLOTS - 1)),
        hnp.arrays(np.uint8, pixels, elements=st.integers(0, OBJECTS - 1)),
    )
)


def _table(pred: object, true: object, n_pred: int = SLOTS, n_true: int = OBJECTS) -> Tensor:
    return contingency(torch.as_tensor(pred)[None], torch.as_tensor(true)[None], n_pred, n_true)


def test_contingency_counts_each_sample_apart() -> None:
    pred = torch.tensor([[0, 0, 1, 2], [2, 2, 2, 0]])
    true = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.uint8)
    expected = [[[1, 0, 0], [1, 1, 1]], [[0, 0, 2], [1, 0, 1]]]
    assert contingency(pred, true, 3, 2).tolist() == expected
    kept = true.long()
    contingency(pred, kept, 3, 2)
    assert torch.equal(kept, true.long())  # the caller's labels are not counted in place


@pytest.mark.parametrize(("pred", "true"), [([0, 5], [0, 0]), ([0, -1], [0, 0]), ([0, 0], [0, 4])])
def test_contingency_refuses_labels_that_would_fall_in_another_cell(pred: list[int], true: list[int]) -> None:
    with pytest.raises(ValueError, match="outside 0"):
        _table(pred, true)


@settings(deadline=None)
@given(_labels)
def test_ari_equals_scikit_learn(labels: tuple[np.ndarray, np.ndarray]) -> None:
    pred, true = labels
    table = _table(pred, true)
    assert float(metrics.adjusted_rand_index(table, foreground=False)) == pytest.approx(
        adjusted_rand_score(true, pred), abs=1e-12
    )
    inside = true > 0
    foreground = float(metrics.adjusted_rand_index(table, foreground=True))
    if inside.any():
        assert foreground == pytest.approx(adjusted_rand_score(true[inside], pred[inside]), abs=1e-12)
    else:
        assert math.isnan(foreground)
    group = torch.tensor([[True, False, True]])
    inside = (true == 1) | (true == 3)
    if inside.any():
        score = float(metrics.adjusted_rand_index(table, foreground=True, objects=group))
        assert score == pytest.approx(adjusted_rand_score(true[inside], pred[inside]), abs=1e-12)


def test_ari_beyond_two_to_the_31_pairs() -> None:
    # 1.6 million pixels, the size of a video: products of pair counts reach 1e24, far beyond int64.
    rng = np.random.default_rng(0)
    true = rng.integers(0, OBJECTS, 1_600_000)
    pred = np.where(rng.random(true.size) < 0.3, rng.integers(0, SLOTS, true.size), true)
    table = _table(pred, true)
    score = float(metrics.adjusted_rand_index(table, foreground=False))
    assert score == pytest.approx(adjusted_rand_score(true, pred), abs=1e-9)
    collapsed = _table(np.zeros_like(true), true)
    assert float(metrics.adjusted_rand_index(collapsed, foreground=True)) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("pred", "true", "score"),
    [
        ([2, 2, 2, 2], [1, 1, 2, 3], 0.0),  # collapsed: one slot takes all
        ([0, 0, 2, 2], [0, 0, 1, 1], 1.0),  # one object, one slot
        ([0, 0, 1, 2], [0, 0, 1, 1], 0.0),  # one object, split
        ([0, 1, 2, 3], [0, 1, 2, 3], 1.0),  # every pixel its own
        ([0, 1, 2, 3], [0, 0, 0, 0], math.nan),  # no foreground
    ],
)
def test_degenerate_fg_ari(pred: list[int], true: list[int], score: float) -> None:
    got = float(metrics.adjusted_rand_index(_table(pred, true), foreground=True))
    assert got == pytest.approx(score, nan_ok=True)


def test_background_counts_in_ari_but_not_in_fg_ari() -> None:
    table = _table([0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 1, 2])  # a slot covers object 1 and half the background
    assert float(metrics.adjusted_rand_index(table, foreground=True)) == 1.0
    assert float(metrics.adjusted_rand_index(table, foreground=False)) < 0.5


#       slots:    0  1  2
_HAND = torch.tensor(
    [
        [
            [6, 2, 0],  # background
            [0, 4, 0],  # object 1: slot 1 has 4 of its 4 pixels and 4 + 2 + 3 = 9 in all: 4/9
            [1, 3, 2],  # object 2: 1/12 with slot 0, 3/12 with slot 1, 2/6 with slot 2
            [0, 0, 0],  # object 3: absent
        ]
    ]
)


def test_iou_by_hand() -> None:
    iou = metrics.object_iou(_HAND)[0]
    expected = [[0 / 11, 4 / 9, 0 / 6], [1 / 12, 3 / 12, 2 / 6]]
    np.testing.assert_allclose(iou[:2], expected)
    assert iou[2].isnan().all()
    best = metrics.best_overlap(_HAND)[0]
    np.testing.assert_allclose(best, [4 / 9, 1 / 3, np.nan])
    assert float(metrics.mean_best_overlap(_HAND)) == pytest.approx((4 / 9 + 1 / 3) / 2)
    only_second = torch.tensor([[False, True, True]])
    assert float(metrics.mean_best_overlap(_HAND, only_second)) == pytest.approx(1 / 3)
    assert metrics.mean_best_overlap(_HAND, torch.tensor([[False, False, True]])).isnan().all()


def test_matching_is_one_to_one_and_best_overlap_is_not() -> None:
    # Slot 0 covers both objects whole, slot 1 nothing of them.
    table = torch.tensor([[[0, 8], [4, 0], [2, 0]]])
    assert float(metrics.mean_best_overlap(table)) == pytest.approx((4 / 6 + 2 / 6) / 2)
    assert metrics.matched_iou(table)[0].tolist() == pytest.approx([4 / 6, 0.0])
    assert float(metrics.mean_iou(table)) == pytest.approx(4 / 12)


def test_more_objects_than_slots_leaves_some_unmatched() -> None:
    table = torch.tensor([[[10, 0], [0, 5], [0, 3], [2, 0]]])
    # slot 0: 2 of 12; slot 1: 5 of 8 or 3 of 8
    assert metrics.matched_iou(table)[0].tolist() == pytest.approx([5 / 8, 0.0, 2 / 12])


def test_matching_maximises_the_total_not_each_in_turn() -> None:
    table = torch.tensor([[[0, 0], [50, 40], [60, 0]]])
    iou = metrics.object_iou(table)[0]
    assert float(iou[0, 0]) > 0.3  # object 1 overlaps slot 0, but object 2 has nowhere else to go
    assert metrics.matched_iou(table)[0].tolist() == pytest.approx([40 / 90, 60 / 110])


@settings(deadline=None)
@given(_labels, st.permutations(range(SLOTS)))
def test_scores_do_not_depend_on_slot_order(labels: tuple[np.ndarray, np.ndarray], order: list[int]) -> None:
    table = _table(*labels)
    shuffled = table[:, :, torch.tensor(order)]
    for score in metrics.SCORES:
        values = [float(score.of_tables(of)) for of in (table, shuffled)]
        assert values[0] == pytest.approx(values[1], abs=1e-12, nan_ok=True), score.key


def test_masks_to_labels_upsamples_before_it_decides() -> None:
    # Two patches a row: 0.9/0.1 against 0.4/0.6. Bilinear to 8 pixels, centres of patches at 1.5 and 5.5: the
    # masks are equal 0.8 of the way, at pixel 4.7; deciding first would put the border at 3.5.
    masks = torch.tensor([[0.9, 0.4], [0.1, 0.6]]).view(1, 2, 1, 2)
    labels = masks_to_labels(masks, (2, 8))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [[[0, 0, 0, 0, 0, 1, 1, 1]] * 2]


def test_masks_to_labels_equals_argmax_over_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.rand(7, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    masks[:, 3] = masks[:, 1]  # ties go to the lower slot
    monkeypatch.setitem(_PIXELS_A_CHUNK, "cpu", 2 * 24 * 25)
    fine = torch.nn.functional.interpolate(masks, (24, 25), mode="bilinear", align_corners=False)
    labels = masks_to_labels(masks, (24, 25))
    assert torch.equal(labels, fine.argmax(1))
    truth = torch.randint(0, 3, (7, 24, 25), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mask_tables(masks, truth, 3), contingency(labels.flatten(1), truth.flatten(1), 4, 3))


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)),  # B, K, h, w
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([1, 3]),  # decimals: many ties, or few
    st.integers(0, 2**16),
)
def test_only_slots_that_can_win_are_upsampled_and_none_is_missed(
    shape: tuple[int, int, int, int], size: tuple[int, int], decimals: int, seed: int
) -> None:
    masks = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).softmax(1).round(decimals=decimals)
    masks[:, ::4] = 0  # slots that hold nothing
    masks = torch.cat([masks, masks], 1)  # equal ones: the lower wins
    fine = torch.nn.functional.interpolate(masks.double(), size, mode="bilinear", align_corners=False)
    labels = masks_to_labels(masks, size)
    assert torch.allclose(fine.gather(1, labels[:, None])[:, 0], fine.amax(1), atol=1e-6)
    assert labels.max() < shape[1]


def test_masks_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        masks_to_labels(torch.full((1, 2, 2, 2), torch.nan), (4, 4))


def test_diagnostics_tell_separate_flat_and_collapsed_masks_apart() -> None:
    slots, patches = 4, 16
    separate = torch.eye(slots).repeat_interleave(patches // slots, 1).view(1, slots, 4, 4)
    flat = torch.full((1, slots, 4, 4), 1 / slots)
    collapsed = torch.zeros(1, slots, 4, 4)
    collapsed[:, 1] = 1
    masks = torch.cat([separate, flat, collapsed])
    assert mask_similarity(masks).tolist() == pytest.approx([0, 1, 0])
    assert effective_slots(masks).tolist() == pytest.approx([4, 4, 1])
    assert largest_activation(masks).tolist() == [[1] * 4, [0.25] * 4, [0, 1, 0, 0]]


def test_slot_similarity_is_the_mean_over_pairs() -> None:
    slots = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    for sample, got in zip(slots, slot_similarity(slots), strict=True):
        pairs = [torch.nn.functional.cosine_similarity(sample[i], sample[j], dim=0) for i in range(5) for j in range(i)]
        assert float(got) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)


def test_logit_std_ignores_what_all_slots_share() -> None:
    logits = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    shared = 100 * torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    assert float(logit_std(logits + shared)) == pytest.approx(1.0, abs=1e-4)


def _random_tables(frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randint(0, SLOTS, (frames, 400), generator=generator)
    true = torch.randint(0, OBJECTS, (frames, 400), generator=generator)
    true[0] = 0  # a frame without foreground
    return contingency(torch.where(pred == 0, pred, true), true, SLOTS, OBJECTS)


def test_scores_gather_frames_and_videos() -> None:
    tables = _random_tables(6)
    videos = torch.tensor([7, 7, 3, 3, 3, 7])
    scores = Scores()
    scores.add(tables[:4], videos[:4])
    scores.add(tables[4:], videos[4:])
    by_video, ids = scores.video_tables()
    assert ids.tolist() == [3, 7]
    assert torch.equal(by_video, torch.stack([tables[videos == 3].sum(0), tables[videos == 7].sum(0)]))
    summary = scores.summary()
    assert (summary.frames, summary.videos, summary.skipped_frames) == (6, 2, 1)
    per_frame = metrics.adjusted_rand_index(tables[1:], foreground=True)
    assert summary.values["fg_ari"] == pytest.approx(float(per_frame.mean()))
    per_video = metrics.mean_best_overlap(by_video)
    assert summary.values["mbo_video"] == pytest.approx(float(per_video.mean()))


def test_many_videos_score_as_their_tables_at_once() -> None:
    """More than are held apart: a frame of each is without foreground, and some have no known pixel."""
    videos, tables = 700, _random_tables(1400)
    tables[::2][::9] = 0
    tables[::7, 1:] = 0
    kept, passed = Scores(), Means()
    for video in range(videos):
        for scores in (kept, passed):
            scores.add_video(tables[2 * video : 2 * video + 2], video)
    assert passed.summary() == kept.summary() and passed.summary().frames == 1400
    labelled = tables.sum((1, 2)) > 0
    gathered, of = kept.frame_tables()
    assert torch.equal(gathered, tables[labelled]) and torch.equal(of, torch.arange(1400)[labelled] // 2)
    values = metrics.mean_iou(tables[labelled])
    assert kept.summary().values["miou"] == pytest.approx(float(values[~values.isnan()].mean()))
    assert passed.summary().labelled_frames == int(labelled.sum()) < 1400
    with pytest.raises(ValueError, match="empty"):
        Means().summary()


def test_a_video_scores_as_its_pixels_together() -> None:
    generator = torch.Generator().manual_seed(1)
    pred, true = (torch.randint(0, 4, (5, 300), generator=generator) for _ in range(2))
    scores = Scores()
    scores.add(contingency(pred, true, SLOTS, OBJECTS), torch.zeros(5, dtype=torch.int64))
    whole = adjusted_rand_score(true.flatten().numpy(), pred.flatten().numpy())
    assert scores.summary().values["ari_video"] == pytest.approx(whole, abs=1e-12)


def test_scores_of_some_objects() -> None:
    tables = _random_tables(3)
    scores = Scores()
    scores.add(tables, torch.tensor([0, 0, 1]))
    every = scores.of_objects(torch.ones(2, OBJECTS - 1, dtype=torch.bool))
    summary = scores.summary()
    assert {key: every.values[key] for key in ("fg_ari", "mbo", "miou")} == pytest.approx(
        {key: summary.values[key] for key in ("fg_ari", "mbo", "miou")}
    )
    assert every.frames == 2 and "ari" not in every.values
    # One object of video 1 alone: an IoU, but no Rand index, which needs two.
    one = scores.of_objects(torch.tensor([[False] * 3, [False, True, False]]))
    assert one.values["mbo"] == pytest.approx(float(metrics.best_overlap(tables)[2, 1]))
    assert (one.frames, one.frames_ari, one.values["fg_ari"]) == (1, 0, None)


@pytest.mark.parametrize("kind", [Scores, Means])
def test_where_no_two_objects_meet_there_is_no_fg_ari(kind: type[Scores | Means]) -> None:
    """Of one object it is 1, or 0 if a slot of another number takes a pixel: a mean of that says nothing."""
    tables = torch.zeros(3, OBJECTS, SLOTS, dtype=torch.int64)
    tables[:, 0] = 5
    tables[0, 1, 0] = tables[1, 1, 0] = tables[2, 2, 1] = 9  # one object a frame, and in video 1 another one
    apart, together = kind(), kind()
    apart.add_video(tables[:2], 0)
    apart.add_video(tables[2:], 1)
    values = apart.summary().values
    assert (values["fg_ari"], values["fg_ari_video"]) == (None, None) and values["mbo"] is not None
    together.add_video(tables, 0)
    values = together.summary().values
    assert values["fg_ari"] is None and values["fg_ari_video"] == 1
    together.add_video(tables[:1] + tables[2:], 1)
    assert together.summary().values["fg_ari"] == 1


def test_a_split_without_frames_or_foreground() -> None:
    with pytest.raises(ValueError, match="empty"):
        Scores().summary()
    scores = Scores()
    scores.add(_random_tables(1), torch.tensor([0]))
    summary = scores.summary()
    values = summary.values
    assert summary.skipped_frames == 1
    assert values["fg_ari"] is None and values["mbo"] is None and values["ari"] is not None
