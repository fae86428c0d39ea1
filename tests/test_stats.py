"""Moments merge exactly, match numpy in float64, and say what the scale report claims."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import torch
import zarr
from dask.callbacks import Callback
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from featcache.errors import DataError
from featcache.moments import BUCKETS, RELATIVE_ACCURACY, Moments, NonFiniteTokensError
from featcache.scale import recompute
from featcache.scale.quantities import effective_rank, scale_report
from featcache.scale.recompute import recomputed_statistics, reduce_moments
from featcache.scale.report import StoreReport
from featcache.store.encoding import ENCODINGS
from slotlab.commands.tables import render
from tests.synthetic import DiscSource, make_store

DIM = 6
da: Any = dask.array  # untyped


def tokens(frames: int, patches: int = 5, dim: int = DIM, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    """Correlated channels of different scales, frames with means of their own: (F, N, D) float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    shift = torch.randn(frames, 1, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(frames, patches, dim, generator=generator, dtype=torch.float64)
    return noise @ mixing + shift + mean


def assert_same(a: Moments, b: Moments, rtol: float = 1e-10) -> None:
    """Equal to rounding; counts, extremes and the sketch exactly."""
    assert (a.frames, a.tokens, a.norm_max) == (b.frames, b.tokens, b.norm_max)
    np.testing.assert_array_equal(a.norm_counts, b.norm_counts)
    np.testing.assert_array_equal(a.min, b.min)
    np.testing.assert_array_equal(a.max, b.max)
    scale = float(np.trace(b.comoment)) + 1e-300
    np.testing.assert_allclose(a.position_mean, b.position_mean, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(a.within, b.within, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(a.between, b.between, rtol=rtol, atol=rtol * scale)


@st.composite
def splits(draw: st.DrawFn) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tokens, and the same frames cut into parts (some empty) in any order."""
    frames = draw(st.integers(1, 12))
    mean = draw(st.sampled_from([0.0, -3.0, 1e4]))
    whole = tokens(frames, draw(st.integers(1, 7)), seed=draw(st.integers(0, 2**16)), mean=mean)
    cuts = sorted(draw(st.lists(st.integers(0, frames), max_size=5)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, frames], strict=True)]
    return whole, draw(st.permutations(parts))


@settings(max_examples=60, deadline=None)
@given(splits(), st.randoms(use_true_random=False))
def test_merging_parts_in_any_order_and_tree_equals_the_whole(
    case: tuple[torch.Tensor, list[torch.Tensor]], random: object
) -> None:
    whole, parts = case
    pool = [Moments.from_tokens(part) for part in parts]
    while len(pool) > 1:  # any binary tree
        i = random.randrange(len(pool) - 1)  # type: ignore[attr-defined]
        pool[i : i + 2] = [pool[i] + pool[i + 1]]
    assert_same(pool[0], Moments.from_tokens(whole))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_moments_match_numpy_in_float64(dtype: torch.dtype) -> None:
    x = tokens(9, 7).to(dtype)
    flat = x.double().numpy().reshape(-1, DIM)
    m = Moments.from_tokens(x)
    assert (m.frames, m.tokens, m.dim) == (9, 63, DIM)
    np.testing.assert_allclose(m.mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(m.covariance, np.cov(flat.T, bias=True), rtol=1e-10)
    np.testing.assert_allclose(m.std, flat.std(0), rtol=1e-12)
    np.testing.assert_array_equal(m.min, flat.min(0))
    np.testing.assert_array_equal(m.max, flat.max(0))
    assert m.abs_max == np.abs(flat).max()
    assert m.norm_max == pytest.approx(np.linalg.norm(flat, axis=1).max(), rel=1e-14)


def test_motion_is_the_change_since_the_frame_before(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tokens(9, 7), tokens(4, 7, seed=1)
    change = torch.cat([x.diff(dim=0).reshape(-1, DIM) for x in (first, second)]).numpy()
    monkeypatch.setattr("featcache.moments._BLOCK_TOKENS", 21)  # blocks of three frames leave no gap
    m = Moments.from_tokens(first) + Moments.from_tokens(second)  # between two videos nothing moves
    assert m.motion_tokens == len(change) == 11 * 7
    np.testing.assert_allclose(m.motion_covariance, change.T @ change / len(change), rtol=1e-10)


@settings(max_examples=60, deadline=None)
@given(splits(), st.integers(1, 30))
def test_videos_measured_together_are_the_sum_of_each(
    case: tuple[torch.Tensor, list[torch.Tensor]], block: int
) -> None:
    parts = [part for part in case[1] if len(part)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.moments._BLOCK_TOKENS", block)
        together = Moments.from_tokens(torch.cat(parts), [len(part) for part in parts])
    each = sum((Moments.from_tokens(part) for part in parts), Moments.empty(*parts[0].shape[1:]))
    assert_same(together, each)
    assert together.motion_tokens == each.motion_tokens
    np.testing.assert_allclose(together.motion, each.motion, rtol=1e-10, atol=1e-10)


def test_position_covariance_leaves_out_what_the_position_tells() -> None:
    x = tokens(9, 7) + 10 * torch.randn(7, DIM, generator=torch.Generator().manual_seed(3)).double()
    m = Moments.from_tokens(x[:2]) + Moments.from_tokens(x[2:])
    np.testing.assert_allclose(m.position_mean, x.mean(0), rtol=1e-10)
    rest = (x - x.mean(0)).reshape(-1, DIM).numpy()
    np.testing.assert_allclose(m.position_covariance, rest.T @ rest / len(rest), rtol=1e-9, atol=1e-9)


def test_input_is_left_alone_and_long_videos_are_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(11)
    before = x.clone()
    whole = Moments.from_tokens(x)
    assert torch.equal(x, before)
    monkeypatch.setattr("featcache.moments._BLOCK_TOKENS", 12)
    assert_same(Moments.from_tokens(x), whole)


def test_a_large_mean_does_not_cancel_a_small_variance() -> None:
    # E[x²] - mean² would keep no digit of the variance in float32 and four in float64.
    x = 1e4 + 1e-2 * tokens(64, 16)
    total = Moments.empty(16, DIM)
    for start in range(0, len(x), 5):
        total += Moments.from_tokens(x[start : start + 5])
    exact = (x - 1e4).numpy().reshape(-1, DIM)
    np.testing.assert_allclose(total.covariance, np.cov(exact.T, bias=True), rtol=1e-7, atol=1e-11)


def test_between_and_within_are_the_variances_of_and_around_frame_means() -> None:
    x = tokens(8, 5)
    total = Moments.from_tokens(x[:3]) + Moments.from_tokens(x[3:])
    means = x.mean(1, keepdim=True)
    inner = (x - means).reshape(-1, DIM)
    outer = (means.expand_as(x) - x.mean((0, 1))).reshape(-1, DIM)
    np.testing.assert_allclose(total.within, (inner.T @ inner).numpy(), rtol=1e-10)
    np.testing.assert_allclose(total.between, (outer.T @ outer).numpy(), rtol=1e-10)
    flat = x.reshape(-1, DIM).numpy()
    np.testing.assert_allclose(total.comoment, np.cov(flat.T, bias=True) * len(flat), rtol=1e-10)
    shares = scale_report(total).frame_variance
    assert shares.between + shares.within == pytest.approx(1, abs=1e-12)
    assert shares.between == pytest.approx(outer.numpy().var(0).sum() / flat.var(0).sum(), rel=1e-10)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.floats(0, 3), st.floats(0, 1))
def test_norm_quantiles_are_within_the_stated_accuracy(seed: int, spread: float, q: float) -> None:
    norms = torch.exp(spread * torch.randn(300, generator=torch.Generator().manual_seed(seed)).double())
    x = torch.zeros(3, 100, 2, dtype=torch.float64)
    x[..., 1] = norms.view(3, 100)
    m = Moments.from_tokens(x[:1]) + Moments.from_tokens(x[1:])
    exact = np.sort(norms.numpy())[int(q * (len(norms) - 1))]
    assert abs(m.norm_quantile(q) - exact) <= (RELATIVE_ACCURACY + 1e-9) * exact


def test_norms_beyond_the_sketch_are_counted_at_its_ends() -> None:
    x = torch.tensor([0.0, 1e-30, 1.0, 1e30], dtype=torch.float64).view(1, 4, 1)
    m = Moments.from_tokens(x)
    assert m.norm_counts.sum() == 4
    assert m.norm_counts[0] == 2 and m.norm_counts[BUCKETS - 1] == 1
    assert m.norm_quantile(0) == 0 and m.norm_max == 1e30
    assert m.norm_share_above(0.5) == 0.5


def test_arrays_round_trip_exactly_through_zarr(tmp_path: Path) -> None:
    m = Moments.from_tokens(tokens(4).half())
    group = zarr.create_group(str(tmp_path / "statistics.zarr"))
    for name, values in m.to_arrays().items():
        group.create_array(name, data=values.astype(np.float64))
    back = Moments.from_arrays({name: np.asarray(array[...]) for name, array in group.arrays()})
    for name, values in m.to_arrays().items():
        again = back.to_arrays()[name]
        assert again.dtype == values.dtype, name
        np.testing.assert_array_equal(again, values, strict=True)


def test_arrays_of_another_layout_are_refused() -> None:
    arrays = Moments.empty(5, 3).to_arrays()
    with pytest.raises(ValueError, match="lack within"):
        Moments.from_arrays({k: v for k, v in arrays.items() if k != "within"})
    with pytest.raises(ValueError, match="sketch"):
        Moments.from_arrays(arrays | {"norm_counts": np.zeros(7)})


def test_empty_is_neutral_and_dimensions_must_agree() -> None:
    m = Moments.from_tokens(tokens(3))
    for total in (Moments.empty(5, DIM) + m, m + Moments.empty(5, DIM)):
        for name, values in total.to_arrays().items():
            np.testing.assert_array_equal(values, m.to_arrays()[name])
    assert Moments.from_tokens(torch.zeros(0, 5, DIM)).tokens == 0
    with pytest.raises(ValueError, match=r"\(5, 6\) and \(5, 7\)"):
        m.merge(Moments.empty(5, 7))
    with pytest.raises(ValueError, match="no tokens"):
        scale_report(Moments.empty(5, DIM))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_counted_and_located(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.moments._BLOCK_TOKENS", 10)  # two frames a block
    x = tokens(6).half()
    x[3, 2, 1] = x[3, 4, 0] = x[5, 0, 0] = bad
    with pytest.raises(NonFiniteTokensError, match="3 non-finite values, the first at frame 3, patch 2"):
        Moments.from_tokens(x)


def test_integers_and_flat_tokens_are_refused() -> None:
    for wrong in (torch.zeros(2, 3, 4, dtype=torch.int8), torch.zeros(3, 4)):
        with pytest.raises(ValueError, match="expected float tokens"):
            Moments.from_tokens(wrong)


# -- the scale report --------------------------------------------------------------------------------------


def test_effective_rank_of_isotropic_and_of_one_direction() -> None:
    assert effective_rank(np.full(37, 2.5)) == pytest.approx(37)
    assert effective_rank(np.array([3.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(np.zeros(4)) == 0
    # Exactly isotropic tokens: plus and minus each axis.
    axes = torch.cat([torch.eye(DIM), -torch.eye(DIM)])
    assert scale_report(Moments.from_tokens(axes.unsqueeze(0))).effective_rank == pytest.approx(DIM)
    line = torch.randn(1, 50, 1).double() * torch.arange(1.0, DIM + 1)
    assert scale_report(Moments.from_tokens(line)).effective_rank == pytest.approx(1, abs=1e-6)


def test_report_matches_definitions() -> None:
    x = tokens(12, 20, mean=1.5)
    x[0, 0] *= 100  # one artefact token
    flat = x.reshape(-1, DIM).numpy()
    report = scale_report(Moments.from_tokens(x))
    assert (report.frames, report.patches, report.dim) == (12, 20, DIM)
    assert report.mean == pytest.approx(flat.mean())
    assert report.std == pytest.approx(flat.std())
    assert report.abs_max == np.abs(flat).max()
    assert report.mean_predictor_mse == pytest.approx(((flat - flat.mean(0)) ** 2).mean())
    assert report.channel_std.p50 == pytest.approx(np.median(flat.std(0)))
    variance = np.sort(flat.var(0))[::-1]
    assert report.variance_share.top1 == pytest.approx(variance[0] / variance.sum())
    assert report.variance_share.top10 == pytest.approx(1)  # of six channels
    norms = np.linalg.norm(flat, axis=1)
    assert report.outlier_tokens == pytest.approx((norms > 2 * np.median(norms)).mean(), abs=1.5 / len(norms))
    assert report.outlier_tokens > 0


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3))
def test_report_scales_with_the_data(factor: float) -> None:
    x = tokens(6, 20, mean=0.5)
    one, other = (scale_report(Moments.from_tokens(y)) for y in (x, factor * x))
    for name in ("mean", "std", "abs_max"):
        assert getattr(other, name) == pytest.approx(factor * getattr(one, name), rel=1e-9)
    assert other.token_norm.max == pytest.approx(factor * one.token_norm.max)
    for name in ("p1", "p50", "p99"):
        expected = factor * getattr(one.token_norm, name)
        assert getattr(other.token_norm, name) == pytest.approx(expected, rel=2.1 * RELATIVE_ACCURACY)
    assert other.mean_predictor_mse == pytest.approx(factor**2 * one.mean_predictor_mse)
    assert other.effective_rank == pytest.approx(one.effective_rank)
    assert other.variance_share.top1 == pytest.approx(one.variance_share.top1)
    assert other.frame_variance.between == pytest.approx(one.frame_variance.between)


def store_report(scale: float, dim: int = DIM) -> StoreReport:
    moments = Moments.from_tokens(scale * tokens(6, 20, dim=dim))
    return StoreReport(f"cache/s{scale:g}.zarr", "train", "dinov2_vits14", "block12", scale_report(moments))


def test_json_holds_the_contract() -> None:
    entry = json.loads(json.dumps(store_report(1).as_dict(), allow_nan=False))
    place, shape = {"path", "backbone", "tap"}, {"frames", "patches", "dim"}
    assert place | shape | {"mean", "std", "abs_max", "token_norm", "channel_std"} <= set(entry)
    assert set(entry["token_norm"]) == {"p1", "p50", "p99", "max"}
    assert set(entry["channel_std"]) == {"min", "p50", "max"}


def test_constant_features_give_a_report_without_nan() -> None:
    report = scale_report(Moments.from_tokens(torch.ones(2, 3, 4)))
    assert report.std == 0 and report.effective_rank == 0
    json.dumps(report.as_dict(), allow_nan=False)


def test_table_shows_every_store_and_warns_of_their_spread() -> None:
    reports = [store_report(scale) for scale in (1, 2, 3, 4, 50)]  # more than one table holds
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(reports))
    text = console.export_text()
    for report in reports:
        assert Path(report.path).name in text
        assert f"{report.scale.std:.3g}" in text
    assert "std differs 50.0-fold" in text


# -- dask ----------------------------------------------------------------------------------------------------


def padded(dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    """Nine videos of three frames in chunks of four rows, NaN in the padding: (36, N, D) and valid (36,)."""
    rows = torch.full((36, 5, DIM), float("nan"), dtype=dtype)
    valid = np.arange(36) % 4 != 3
    rows[torch.from_numpy(valid)] = tokens(27, mean=2).to(dtype)
    return rows, valid


def streamed(rows: torch.Tensor, valid: np.ndarray) -> Moments:
    total = Moments.empty(*rows.shape[1:])
    for start in range(0, len(rows), 4):
        total += Moments.from_tokens(rows[start : start + 4][torch.from_numpy(valid[start : start + 4])])
    return total


def test_blockwise_equals_streamed_from_zarr_path_array_and_dask(tmp_path: Path) -> None:
    rows, valid = padded(torch.float16)
    path = tmp_path / "features"
    array = zarr.create_array(str(path), data=rows.numpy(), chunks=(4, 5, DIM))
    expected = streamed(rows, valid)
    for source in (path, str(path), array, da.from_array(rows.numpy(), chunks=(7, 2, 3))):
        assert_same(reduce_moments(source, valid=valid), expected)


def test_blockwise_dequantises(tmp_path: Path) -> None:
    rows, valid = padded(torch.float32)
    rows = rows.nan_to_num()
    stored = ENCODINGS["int8"].encode(rows)
    features = zarr.create_array(str(tmp_path / "f"), data=stored["features"].numpy(), chunks=(4, 5, DIM))
    scales = zarr.create_array(str(tmp_path / "s"), data=stored["scales"].numpy(), chunks=(6, 5))
    expected = streamed(ENCODINGS["int8"].decode(stored), valid)
    assert_same(reduce_moments({"features": features, "scales": scales}, dtype="int8", valid=valid), expected)
    with pytest.raises(ValueError, match="int8 has the arrays features, scales; got features"):
        reduce_moments(features, dtype="int8", valid=valid)
    with pytest.raises(ValueError, match="do not fit"):
        reduce_moments({"features": features, "scales": da.from_array(stored["scales"].numpy()[:-1])}, dtype="int8")


def test_blockwise_names_the_row_of_a_non_finite_value(tmp_path: Path) -> None:
    rows, valid = padded(torch.float16)
    rows[14, 3, 0] = float("inf")
    path = tmp_path / "features"
    zarr.create_array(str(path), data=rows.numpy(), chunks=(4, 5, DIM))
    with pytest.raises(DataError, match=r"features: 1 non-finite values .* row 14, patch 3"):
        reduce_moments(path, valid=valid)
    # Padding that is not masked counts as damage; which block is met first depends on the threads.
    with pytest.raises(DataError, match=r"3[01] non-finite values"):
        reduce_moments(path)


def test_blockwise_never_reads_blocks_without_valid_rows(tmp_path: Path) -> None:
    rows, valid = padded(torch.float16)
    path = tmp_path / "features"
    zarr.create_array(str(path), data=rows.numpy(), chunks=(4, 5, DIM))
    (path / "c" / "2" / "0" / "0").write_bytes(b"torn")
    valid[8:12] = False
    assert reduce_moments(path, valid=valid).frames == 24
    assert reduce_moments(path, valid=np.zeros(36, bool)).tokens == 0


def test_a_task_takes_many_videos_and_motion_stays_within_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (*[1] * 50, 4, 3, *[1] * 10, 5)
    split = make_store(tmp_path / "s.zarr", DiscSource({"train": lengths}), chunk_frames=2)["train"]
    ran: list[object] = []
    with Callback(pretask=lambda key, *_: ran.append(key)):
        together = recomputed_statistics(split, "block1")
    assert len(ran) < 10  # not one for each of 63 videos
    assert_same(together, split.statistics("block1"))
    assert together.motion_tokens == split.statistics("block1").motion_tokens == 9 * 16
    np.testing.assert_allclose(together.motion, split.statistics("block1").motion, rtol=1e-10)
    for rows in (1, 3, 7):  # blocks of one long video, and of a few short ones
        monkeypatch.setattr(recompute, "BLOCK_BYTES", rows * 16 * 12 * 2)
        in_blocks = recomputed_statistics(split, "block1")
        assert_same(in_blocks, together)
        np.testing.assert_allclose(in_blocks.motion, together.motion, rtol=1e-10)


def test_a_video_that_is_not_there_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "features"
    zarr.create_array(str(path), data=tokens(12).numpy().astype(np.float16), chunks=(2, 5, DIM))
    (path / "c" / "3" / "0" / "0").write_bytes(b"torn")
    valid = np.repeat([True, True, True, False, True, True], 2)
    assert reduce_moments(path, valid=valid, videos=[2, 4, 2, 4]).frames == 10


def test_blockwise_refuses_what_is_no_array(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no readable zarr array"):
        reduce_moments(tmp_path / "absent")
    with pytest.raises(ValueError, match="valid must be bool"):
        reduce_moments(da.zeros((4, 2, 3)), valid=np.ones(3, bool))
