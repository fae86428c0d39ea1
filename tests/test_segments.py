"""Training-free segments: values against a plain reimplementation, and what must not change them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import DataError
from slotlab.models import segments as module
from slotlab.models.segments import affinity, normalised_cuts, segments, soft_segments

GRIDS = [(4, 4), (3, 7), (6, 2), (1, 5)]


def scenes(frames: int, grid: tuple[int, int], noise: float = 0.7, seed: int = 0) -> Tensor:
    """Tokens (T, N, 8) of vertical stripes with a vector each, under noise."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(grid[1]).repeat(grid[0]) // 2
    vectors = torch.randn(frames, grid[1], 8, generator=generator)
    return vectors[:, columns] + noise * torch.randn(frames, len(columns), 8, generator=generator)


def plain_affinity(tokens: npt.NDArray[np.float64], grid: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Patch by patch, in float64."""
    rows, columns = grid
    z = [token / np.linalg.norm(token) for token in tokens]
    smooth = []
    for i, token in enumerate(z):
        total = np.zeros(len(token))
        for j, other in enumerate(z):
            if max(abs(i // columns - j // columns), abs(i % columns - j % columns)) <= 1:
                total += max(token @ other, 0) * other
        smooth.append(total / np.linalg.norm(total))
    found = np.empty((len(z), len(z)))
    for i in range(len(z)):
        for j in range(len(z)):
            apart = np.hypot(i // columns - j // columns, i % columns - j % columns)
            found[i, j] = (z[i] @ z[j] + smooth[i] @ smooth[j]) / 2 - 0.6 * apart / np.sqrt(rows * columns)
    return found


def plain_segments(found: npt.NDArray[np.float64], cut: float, most: int = 64) -> list[list[int]]:
    """Joins the two groups of the largest mean affinity, while that is 1 - cut or more, or there are too many."""
    groups = [[patch] for patch in range(len(found))]
    while len(groups) > 1:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        means = [found[np.ix_(groups[i], groups[j])].mean() for i, j in pairs]
        if max(means) < 1 - cut and len(groups) <= most:
            break
        i, j = pairs[int(np.argmax(means))]
        groups[j] += groups.pop(i)
    return sorted((sorted(group) for group in groups), key=lambda group: (-len(group), group[0]))


def groups(labels: Tensor) -> list[list[int]]:
    """The patches of each label of one frame, by label."""
    return [torch.nonzero(labels == label).flatten().tolist() for label in range(int(labels.max()) + 1)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("cut", [0.4, 0.6, 0.9])
def test_values_are_those_of_a_plain_reimplementation(grid: tuple[int, int], cut: float) -> None:
    tokens = scenes(2, grid)
    expected = [plain_affinity(frame.double().numpy(), grid) for frame in tokens]
    torch.testing.assert_close(affinity(tokens, grid).double(), torch.from_numpy(np.stack(expected)), atol=1e-5, rtol=0)
    labels = segments(tokens, grid, cut)
    assert labels.dtype == torch.int64
    assert [groups(frame) for frame in labels] == [plain_segments(frame, cut) for frame in expected]
    masks = soft_segments(tokens, grid, cut, temperature=0.1)
    for frame, mask, found in zip(labels, masks, expected, strict=True):
        means = np.stack([found[:, group].mean(1) for group in groups(frame)])
        shares = torch.from_numpy(means / 0.1).softmax(0)
        torch.testing.assert_close(mask[: len(shares)].double(), shares, atol=1e-4, rtol=0)
        assert not mask[len(shares) :].any(), "empty ones at the end"


def test_several_segments_and_several_numbers_of_them_were_compared() -> None:
    counts = {
        tuple((segments(scenes(3, grid), grid, cut).amax(1) + 1).tolist()) for grid in GRIDS for cut in (0.4, 0.9)
    }
    assert len(counts) > 4 and max(map(max, counts)) > 5


def test_segments_do_not_depend_on_the_order_or_the_scale_of_channels() -> None:
    tokens = scenes(4, (4, 6))
    labels = segments(tokens, (4, 6))
    assert len(labels.unique()) > 2
    mixed = tokens[..., torch.randperm(8, generator=torch.Generator().manual_seed(1))]
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))[0]
    length = torch.rand(4, 24, 1, generator=torch.Generator().manual_seed(3)) + 0.1
    for same in (mixed, tokens @ rotation, 1000 * tokens, length * tokens):
        assert torch.equal(segments(same, (4, 6)), labels)


def test_segments_turn_with_the_frame() -> None:
    tokens = scenes(4, (3, 6))
    turned = tokens.unflatten(1, (3, 6)).transpose(1, 2).flatten(1, 2)
    labels = segments(tokens, (3, 6)).unflatten(1, (3, 6)).transpose(1, 2).flatten(1)
    for one, other in zip(labels, segments(turned, (6, 3)), strict=True):
        assert sorted(groups(one)) == sorted(groups(other))


def test_each_frame_is_cut_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = scenes(5, (4, 4))
    labels, masks = segments(tokens, (4, 4)), soft_segments(tokens, (4, 4))
    monkeypatch.setattr(module, "_VALUES_A_CHUNK", 2 * 16**2)
    assert torch.equal(segments(tokens, (4, 4)), labels)
    torch.testing.assert_close(soft_segments(tokens, (4, 4)), masks)
    for index, frame in enumerate(tokens):
        assert torch.equal(segments(frame[None], (4, 4))[0], labels[index])
        alone = soft_segments(frame[None], (4, 4))[0]
        torch.testing.assert_close(F.pad(alone, (0, 0, 0, len(masks[index]) - len(alone))), masks[index])


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_a_constant_frame_is_one_segment(value: float) -> None:
    tokens = torch.full((2, 256, 12), value)
    assert not segments(tokens, (16, 16)).any()
    torch.testing.assert_close(soft_segments(tokens, (16, 16)), torch.ones(2, 1, 256))


def test_one_patch_and_no_frame() -> None:
    assert segments(torch.randn(2, 1, 4), (1, 1)).tolist() == [[0], [0]]
    assert soft_segments(torch.randn(2, 1, 4), (1, 1)).tolist() == [[[1.0]], [[1.0]]]
    assert segments(torch.empty(0, 6, 4), (2, 3)).shape == (0, 6)
    assert soft_segments(torch.empty(0, 6, 4), (2, 3)).shape == (0, 1, 6)


def test_a_full_frame_is_cut_higher() -> None:
    """At the height that leaves as many segments as it may have: no other patches are thrown together."""
    tokens = torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(0))  # hardly alike
    assert int(segments(tokens, (6, 8), 0.3).max()) == 47
    few = segments(tokens, (6, 8), 0.3, most=5)
    for frame, labels in zip(tokens, few, strict=True):
        assert groups(labels) == plain_segments(plain_affinity(frame.double().numpy(), (6, 8)), 0.3, most=5)
        assert len(groups(labels)) == 5


def test_higher_cuts_join_segments() -> None:
    tokens, before = scenes(1, (5, 8)), None
    for cut in (0.2, 0.4, 0.6, 0.8, 1.2):
        labels = segments(tokens, (5, 8), cut)[0]
        assert [len(group) for group in groups(labels)] == sorted((len(g) for g in groups(labels)), reverse=True)
        if before is not None:
            assert all(len(labels[torch.tensor(group)].unique()) == 1 for group in groups(before))
        before = labels


def test_half_precision_and_autocast_change_nothing() -> None:
    tokens = scenes(2, (4, 6)).half()
    with torch.autocast("cpu", torch.bfloat16):
        found = affinity(tokens, (4, 6))
    assert found.dtype == torch.float32 and torch.equal(found, affinity(tokens.float(), (4, 6)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    tokens = scenes(2, (4, 4))
    tokens[1, 3, 2] = value
    for function in (segments, soft_segments):
        with pytest.raises(DataError, match="NaN or infinity"):
            function(tokens, (4, 4))


# -- normalised cuts ---------------------------------------------------------------------------------------


def plain_weights(tokens: npt.NDArray[np.float64], grid: tuple[int, int]) -> npt.NDArray[np.float64]:
    rows, columns = grid
    y, x = np.divmod(np.arange(rows * columns), columns)
    apart = np.hypot(y[:, None] - y, x[:, None] - x)
    alike = plain_affinity(tokens, grid) + 0.6 * apart / np.sqrt(rows * columns)
    return np.maximum(alike, 1e-6) * np.exp(-(apart**2) / 18)


def plain_cut(weights: npt.NDArray[np.float64], apart: npt.NDArray[np.bool_]) -> float:
    between = weights[apart][:, ~apart].sum()
    return between / weights[apart].sum() + between / weights[~apart].sum()


@pytest.mark.parametrize("grid", [(3, 6), (4, 4)])
def test_a_normalised_cut_is_the_best_threshold_of_the_second_eigenvector(grid: tuple[int, int]) -> None:
    """By the generalised eigenproblem (D - W) y = lambda D y, threshold by threshold."""
    for tokens in scenes(4, grid).double().numpy():
        weights = plain_weights(tokens, grid)
        volume = np.diag(weights.sum(1))
        y = scipy.linalg.eig(volume - weights, volume)
        second = y[1][:, np.argsort(y[0].real)[1]].real
        tried = {plain_cut(weights, second > t): second > t for t in np.sort(second)[:-1]}
        labels = normalised_cuts(torch.from_numpy(tokens)[None], grid, largest=9.0, most=2)[0].numpy()
        best = tried[min(tried)]
        assert (labels == labels[0]).tolist() == (best == best[0]).tolist()
        # The threshold decides whether it is made.
        for largest, count in ((min(tried) - 1e-4, 1), (min(tried) + 1e-4, 2)):
            found = normalised_cuts(torch.from_numpy(tokens)[None], grid, largest=largest, most=2)
            assert len(found.unique()) == count


def test_normalised_cuts_go_on_within_the_parts() -> None:
    columns = torch.arange(8).repeat(4) // 2
    tokens = torch.eye(8)[columns] + 0.05 * scenes(3, (4, 8))
    for labels in normalised_cuts(tokens, (4, 8), largest=0.5):
        assert groups(labels) == [torch.nonzero(columns == column).flatten().tolist() for column in range(4)]
    assert (
        not normalised_cuts(torch.ones(1, 32, 8), (4, 8)).any()
        and not normalised_cuts(torch.ones(1, 1, 8), (1, 1)).any()
    )
    assert normalised_cuts(torch.empty(0, 6, 4), (2, 3)).shape == (0, 6)
    with pytest.raises(DataError, match="NaN or infinity"):
        normalised_cuts(torch.full((1, 6, 4), torch.nan), (2, 3))


def test_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="16 tokens a frame do not lie on a grid of 3 x 5"):
        segments(scenes(1, (4, 4)), (3, 5))
