from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from slotlab.models.kmeans import kmeans, kmeans_plus_plus
from slotlab.models.randomness import Draws


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _blobs(batch: int, k: int, each: int, dim: int, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Separated blobs (B, k * each, D), different in each sample, and their labels (k * each,)."""
    generator = _generator(1)
    centres = 20 * torch.randn(batch, k, dim, generator=generator) + offset
    labels = torch.arange(k).repeat_interleave(each)
    return centres[:, labels] + torch.randn(batch, k * each, dim, generator=generator), labels


def _inertia(tokens: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(tokens, centres).amin(-1).square().sum(-1)  # (B,)


@pytest.mark.parametrize("offset", [0.0, 1e5])  # far from the origin, |x|^2 - 2xc + |c|^2 would cancel
def test_finds_separated_blobs_in_every_sample(offset: float) -> None:
    tokens, truth = _blobs(8, 5, 20, 16, offset)
    centres, labels = kmeans(tokens, 5, draws=Draws(0))
    same_blob = truth[:, None] == truth
    assert all(torch.equal(label[:, None] == label, same_blob) for label in labels)
    means = torch.stack([tokens[:, truth == blob].mean(1) for blob in range(5)], 1)
    assert torch.cdist(centres, means).amin(-1).max() < 0.05


def test_inertia_is_about_that_of_scikit_learn() -> None:
    tokens = torch.randn(6, 200, 8, generator=_generator()) * torch.linspace(0.2, 3, 8)
    ours = _inertia(tokens, kmeans(tokens, 7, rounds=30, draws=Draws(0)).centres)
    theirs = [KMeans(7, n_init=1, random_state=0).fit(sample.numpy()).inertia_ for sample in tokens]
    assert float(ours.mean()) == pytest.approx(sum(theirs) / 6, rel=0.05)


def test_lloyd_rounds_from_given_seeds_equal_scikit_learn() -> None:
    tokens = torch.randn(1, 150, 6, generator=_generator(3))
    seeds = kmeans_plus_plus(tokens, 4, Draws(5))
    ours = kmeans(tokens, 4, rounds=100, draws=Draws(5))
    theirs = KMeans(4, init=tokens[0, seeds[0]].numpy(), n_init=1, max_iter=100, tol=0).fit(tokens[0].numpy())
    assert float(_inertia(tokens, ours.centres)) == pytest.approx(theirs.inertia_, rel=1e-4)
    torch.testing.assert_close(ours.centres[0], torch.from_numpy(theirs.cluster_centers_), atol=1e-4, rtol=0)


def test_labels_name_the_nearest_of_the_returned_centres() -> None:
    tokens = torch.randn(3, 60, 5, generator=_generator())
    centres, labels = kmeans(tokens, 6, rounds=2, draws=Draws(0))
    assert torch.equal(labels, torch.cdist(tokens, centres).argmin(-1))


def test_restarts_keep_each_sample_its_best() -> None:
    tokens = torch.randn(8, 100, 4, generator=_generator())
    starts, draws = [], Draws(1)
    for _ in range(5):
        starts.append(_inertia(tokens, kmeans(tokens, 8, draws=draws).centres))
    best = kmeans(tokens, 8, draws=Draws(1), restarts=5)
    torch.testing.assert_close(_inertia(tokens, best.centres), torch.stack(starts).amin(0), rtol=1e-4, atol=0)
    assert torch.equal(best.labels, torch.cdist(tokens, best.centres).argmin(-1))


def test_seeds_fall_in_different_blobs_and_are_repeatable() -> None:
    tokens, truth = _blobs(16, 6, 10, 8)
    seeds = kmeans_plus_plus(tokens, 6, Draws(0))
    assert torch.equal(truth[seeds].sort(-1).values, torch.arange(6).expand(16, 6))
    assert torch.equal(seeds, kmeans_plus_plus(tokens, 6, Draws(0)))
    assert not torch.equal(seeds, kmeans_plus_plus(tokens, 6, Draws(1)))


def test_the_first_seed_is_drawn_evenly() -> None:
    tokens = torch.arange(4.0).view(1, 4, 1).expand(4000, 4, 1)
    counts = kmeans_plus_plus(tokens, 1, Draws(0)).flatten().bincount(minlength=4)
    assert counts.min() > 900 and counts.max() < 1100


def test_a_token_at_distance_0_is_no_seed_while_another_is_left() -> None:
    tokens = torch.tensor([0.0, 0.0, 0.0, 1.0]).view(1, 4, 1).expand(500, 4, 1)
    values = tokens.gather(1, kmeans_plus_plus(tokens, 2, Draws(0)).unsqueeze(-1)).squeeze(-1)
    assert torch.equal(values.sort(-1).values, torch.tensor([0.0, 1.0]).expand(500, 2))


def test_an_emptied_cluster_moves_to_the_farthest_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # Both seeds on one token: the second cluster is empty after the first round, and must take the outlier.
    monkeypatch.setattr("slotlab.models.kmeans._seed", lambda *_: torch.tensor([[[0, 0]]]))
    tokens = torch.tensor([0.0, 0.1, 0.2, 9.0]).view(1, 4, 1)
    centres, labels = kmeans(tokens, 2, rounds=3)
    assert labels.tolist() == [[0, 0, 0, 1]]
    torch.testing.assert_close(centres.flatten(), torch.tensor([0.1, 9.0]))


@pytest.mark.parametrize("k", [1, 6])
def test_equal_tokens_give_finite_centres(k: int) -> None:
    centres, labels = kmeans(torch.full((2, 6, 3), 0.7), k, draws=Draws(0))
    torch.testing.assert_close(centres, torch.full((2, k, 3), 0.7))
    assert labels.min() >= 0 and labels.max() < k


def test_as_many_clusters_as_tokens() -> None:
    tokens = torch.randn(3, 9, 4, generator=_generator())
    centres, labels = kmeans(tokens, 9, draws=Draws(0))
    assert _inertia(tokens, centres).max() < 1e-6
    assert all(len(label.unique()) == 9 for label in labels)


def test_precision_under_autocast_is_that_of_float32() -> None:
    tokens, _ = _blobs(2, 5, 20, 16)
    plain = kmeans(tokens, 5, draws=Draws(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = kmeans(tokens, 5, draws=Draws(0))
    assert mixed.centres.dtype == torch.float32
    assert torch.equal(plain.centres, mixed.centres)


@pytest.mark.parametrize("k", [0, 11])
def test_impossible_numbers_of_clusters_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match="clusters need tokens"):
        kmeans(torch.zeros(1, 10, 2), k)
