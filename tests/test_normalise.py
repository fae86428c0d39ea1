from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor

from featcache.errors import DataError, UsageError
from featcache.moments import Moments
from slotlab.models.normalise import Normaliser

DIM = 6
STATISTICAL = ["whiten", "whiten=4", "slow=4", "channel", "scale"]


def _features(seed: int = 0) -> Tensor:
    """Correlated features (40, 25, 6) with offsets and very different channel scales."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 1, DIM, dtype=torch.float64)
    offset = torch.randn(DIM, generator=generator, dtype=torch.float64)
    noise = torch.randn(40, 25, DIM, generator=generator, dtype=torch.float64)
    return (noise @ mix + offset) * scales


def _statistics(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance and covariance of the motion, frame after frame."""
    flat = features.double().flatten(0, -2)
    moved = features.double().diff(dim=0).flatten(0, -2)
    return flat.mean(0), flat.T.cov(correction=0), moved.T @ moved / len(moved)


def test_whitened_covariance_is_the_identity_without_shrinkage() -> None:
    features = _features()
    out = Normaliser.from_statistics("whiten", *_statistics(features), shrinkage=0.0)(features)
    mean, covariance, _ = _statistics(out)
    assert out.dtype == torch.float32
    assert float(mean.abs().max()) < 1e-4
    assert float((covariance - torch.eye(DIM)).abs().max()) < 1e-3


def test_shrinkage_bounds_the_gain_of_weak_directions() -> None:
    mean, covariance = torch.zeros(DIM), torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0, 0.0, 0.0]))
    weight = Normaliser.from_statistics("whiten", mean, covariance, shrinkage=0.1).weight
    gains = (0.9 * covariance.diagonal() + 0.1 * 1.0).rsqrt()  # tr(C)/D = 1
    gains /= (gains.square() * covariance.diagonal()).mean().sqrt()  # for a mean variance of 1
    torch.testing.assert_close(weight, torch.diag(gains))
    full = Normaliser.from_statistics("whiten", mean, covariance, shrinkage=1.0)
    torch.testing.assert_close(full.weight, torch.eye(DIM))  # its mean variance is 1


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(STATISTICAL),
    factor=st.floats(1e-4, 1e4),
    shrinkage=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 20),
)
def test_the_backbones_scale_does_not_reach_the_model(kind: str, factor: float, shrinkage: float, seed: int) -> None:
    features = _features(seed)
    plain = Normaliser.from_statistics(kind, *_statistics(features), shrinkage=shrinkage)(features)
    scaled = features * factor
    other = Normaliser.from_statistics(kind, *_statistics(scaled), shrinkage=shrinkage)(scaled)
    torch.testing.assert_close(plain, other, atol=2e-2 if shrinkage == 0 and kind == "whiten" else 1e-4, rtol=1e-3)


def test_channel_and_scale() -> None:
    features = _features()
    statistics = _statistics(features)
    _, covariance, _ = _statistics(Normaliser.from_statistics("channel", *statistics)(features))
    torch.testing.assert_close(covariance.diagonal(), torch.ones(DIM).double(), atol=1e-4, rtol=0)
    mean, covariance, _ = _statistics(Normaliser.from_statistics("scale", *statistics)(features))
    assert float(mean.abs().max()) < 1e-5
    ratio = covariance.diagonal() / statistics[1].diagonal()  # one factor for all channels
    torch.testing.assert_close(ratio, ratio[:1].expand(DIM), atol=0, rtol=1e-4)
    assert float(covariance.diagonal().mean()) == pytest.approx(1.0, abs=1e-4)


def test_slow_directions_are_decorrelated_and_ordered_by_their_motion() -> None:
    generator = torch.Generator().manual_seed(1)
    # four channels that drift ever faster, hidden behind a mixing matrix
    steps = torch.tensor([0.01, 0.05, 0.2, 1.0]).double()
    start = torch.randn(30, 4, generator=generator).double()
    drift = torch.randn(40, 30, 4, generator=generator).double().cumsum(0)
    hidden = start * 10 + drift * steps
    features = hidden @ torch.randn(4, 4, generator=generator).double() + 5
    out = Normaliser.from_statistics("slow=3", *_statistics(features))(features)
    mean, covariance, motion = _statistics(out)
    assert float(mean.abs().max()) < 1e-3
    torch.testing.assert_close(covariance, torch.eye(3).double(), atol=1e-3, rtol=0)
    moves = motion.diagonal()
    assert bool((moves.diff() > 0).all()), "slowest first"
    # the slowest direction is the channel that hardly drifts
    assert (
        abs(float(torch.corrcoef(torch.stack([out[..., 0].flatten(), hidden[..., 0].flatten().float()]))[0, 1])) > 0.99
    )


def test_principal_directions_are_those_of_scikit_learn() -> None:
    features = _features()
    out = Normaliser.from_statistics("whiten=3", *_statistics(features))(features).flatten(0, 1)
    expected = torch.from_numpy(PCA(3, whiten=True).fit_transform(features.flatten(0, 1).numpy()))
    alike = torch.corrcoef(torch.cat([out, expected.float()], 1).T)[:3, 3:]  # but for the sign
    torch.testing.assert_close(alike.abs(), torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["slow", "whiten"])
def test_directions_leave_out_what_never_varies(name: str) -> None:
    features = _features()
    features[..., 2] = 0.3
    out = Normaliser.from_statistics(f"{name}=5", *_statistics(features))(features)
    torch.testing.assert_close(_statistics(out)[1], torch.eye(5).double(), atol=1e-3, rtol=0)
    with pytest.raises(UsageError, match="vary in only 5 directions"):
        Normaliser.from_statistics(f"{name}=6", *_statistics(features))
    with pytest.raises(UsageError, match="only 6 channels"):
        Normaliser(f"{name}=7", DIM)


def test_slow_directions_need_something_that_moves() -> None:
    features = _features()
    with pytest.raises(DataError, match="nothing moves in single frames; train with --preset image"):
        Normaliser.from_statistics("slow=2", *_statistics(features)[:2])


def test_each_position_can_have_its_own_mean() -> None:
    features = _features() + 7 * torch.randn(25, DIM, generator=torch.Generator().manual_seed(5)).double()
    moments = Moments.from_tokens(features)
    by_position = Normaliser.from_moments("whiten", moments, 0.0, "position")
    out = by_position(features)
    torch.testing.assert_close(out.mean(0), torch.zeros(25, DIM), atol=1e-4, rtol=0)
    torch.testing.assert_close(_statistics(out)[1], torch.eye(DIM).double(), atol=1e-3, rtol=0)
    loaded = Normaliser("whiten", DIM, positions=25)
    loaded.load_state_dict(by_position.state_dict())
    assert torch.equal(loaded(features), out)
    by_channel = Normaliser.from_moments("whiten", moments, 0.0, "channel")
    assert by_channel.shift.shape == (1, DIM) and float(by_channel(features).mean(0).abs().max()) > 0.1


def test_sample_fixed_and_none_need_no_statistics() -> None:
    features = _features()
    out = Normaliser("sample", DIM)(features)
    torch.testing.assert_close(out.mean(1), torch.zeros(40, DIM), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(1, correction=0), torch.ones(40, DIM), atol=1e-4, rtol=0)
    torch.testing.assert_close(Normaliser("fixed=0.25", DIM)(features), features.float() * 0.25)
    assert torch.equal(Normaliser("none", DIM)(features.half()), features.half().float())


@pytest.mark.parametrize("kind", ["whiten", "channel"])
@pytest.mark.parametrize("factor", [1e-8, 1.0])
def test_a_channel_that_never_varies_becomes_zero_and_no_other(kind: str, factor: float) -> None:
    features = _features()
    features[..., 2] = 0.3
    features *= factor
    out = Normaliser.from_statistics(kind, *_statistics(features), shrinkage=0.0)(features)
    assert torch.isfinite(out).all()
    assert float(out[..., 2].abs().max()) < 1e-3
    assert out.flatten(0, 1).std(0)[[0, 1, 3, 4, 5]].min() > 0.5


@pytest.mark.parametrize("kind", [*STATISTICAL, "sample", "fixed=3", "none"])
def test_it_is_saved_with_the_model(kind: str) -> None:
    features = _features()
    saved = Normaliser.from_statistics(kind, *_statistics(features))
    assert not list(saved.parameters())
    loaded = Normaliser(kind, DIM)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(features), saved(features))


def test_autocast_does_not_lower_its_precision() -> None:
    features = _features()
    normaliser = Normaliser.from_statistics("whiten", *_statistics(features))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = normaliser(features)
    assert torch.equal(mixed, normaliser(features))


@pytest.mark.parametrize(
    "kind",
    [
        "whitening",
        "fixed",
        "fixed=",
        "fixed=0",
        "fixed=nan",
        "none=1",
        "fixed=FACTOR",
        "slow",
        "whiten=K",
        "whiten=2.5",
    ],
)
def test_unknown_kinds_are_refused(kind: str) -> None:
    with pytest.raises(UsageError, match="choose one of"):
        Normaliser(kind, DIM)


@pytest.mark.parametrize("kind", STATISTICAL)
def test_statistics_that_cannot_be_used_are_refused(kind: str) -> None:
    mean, covariance, motion = torch.zeros(DIM), torch.eye(DIM), torch.eye(DIM)
    with pytest.raises(DataError, match="no channel varies"):
        Normaliser.from_statistics(kind, mean, torch.zeros(DIM, DIM), motion)
    with pytest.raises(DataError, match="not finite"):
        Normaliser.from_statistics(kind, mean * torch.nan, covariance, motion)
    with pytest.raises(DataError, match="does not fit"):
        Normaliser.from_statistics(kind, mean, torch.eye(DIM + 1), motion)
    with pytest.raises(UsageError, match="shrinkage"):
        Normaliser.from_statistics(kind, mean, covariance, motion, shrinkage=1.5)
