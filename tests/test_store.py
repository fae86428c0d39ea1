"""The store: what is written is what is read, by us, by zarr and by xarray; growth, locking and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.moments import Moments
from featcache.sources.video import Instance
from featcache.store import manifest
from featcache.store.encoding import ENCODINGS
from featcache.store.layout import chunk_path, tables
from featcache.store.reading import FeatureStore, Split
from featcache.store.spec import SplitSpec
from featcache.store.writing import StoreWriter
from featcache.upkeep.verify import verify
from tests.synthetic import DIM, GRID, SIZE, DiscSource, make_store, tokens_of


def test_reads_back_what_was_written(store: FeatureStore) -> None:
    source = DiscSource()
    for name in source.splits():
        split = store[name]
        assert split.complete
        assert split.frames == sum(source.lengths(name))
        for index in split.videos:
            video = source.read(name, index)
            np.testing.assert_array_equal(split.video(index), video.frames)
            np.testing.assert_array_equal(split.segmentations(index), video.segmentations)
            assert split.instances(index) == video.instances
            assert torch.equal(split.tokens("block1", index), tokens_of(video).half())


@given(st.integers(1, 200), st.integers(1, 200))
def test_some_videos_are_spread_over_all(videos: int, most: int) -> None:
    split = SimpleNamespace(videos=tuple(range(videos)), spec=SimpleNamespace(part=()))
    chosen = Split.spread(split, most)  # type: ignore[arg-type]
    assert len(chosen) == min(videos, most) == len(set(chosen))
    gaps = {b - a for a, b in pairwise((*chosen, videos))}
    assert chosen[0] == 0 and max(gaps) - min(gaps) <= 1


def test_zarr_and_xarray_open_it(store: FeatureStore) -> None:
    group = zarr.open_group(str(store.path), mode="r")
    features = group["train/features/block1"]
    assert features.metadata.dimension_names == ("frame", "patch", "feature")
    assert np.isnan(features.fill_value)
    data = xarray.open_zarr(str(store.path), group="train", consolidated=False, zarr_format=3)
    assert data["video"].dims == ("frame", "y", "x", "rgb")
    assert data["segmentations"].shape == (store["train"].spec.rows, SIZE, SIZE)


def test_padding_is_nan_and_outside_every_video(store: FeatureStore) -> None:
    split = store["train"]
    values = np.asarray(split.array("features/block1")[:])
    padding = np.setdiff1d(np.arange(split.spec.rows), split.valid_rows())
    assert len(padding) == split.spec.rows - split.frames > 0
    assert np.isnan(values[padding]).all()
    assert np.isfinite(values[split.valid_rows()]).all()
    assert (np.asarray(split.array("frame_video")[:])[padding] == -1).all()


def test_tables_name_each_frame_and_instance(store: FeatureStore) -> None:
    split = store["train"]
    video_of = np.asarray(split.array("frame_video")[:])
    for video in split.videos:
        rows = split.rows(video)
        assert (video_of[rows] == video).all()
        np.testing.assert_array_equal(split.array("frame_position")[rows], np.arange(rows.stop - rows.start))
        material = split.array("instances/material")
        names = material.attrs["labels"]
        assert tuple(names[c] for c in np.asarray(material[video])) == tuple(i.material for i in split.instances(video))
        truth = split.segmentations(video)
        for k in range(len(split.instances(video))):
            np.testing.assert_array_equal(split.array("instances/visibility")[rows][:, k], (truth == k + 1).sum((1, 2)))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_statistics_are_those_of_the_stored_values(tmp_path: Path, dtype: str) -> None:
    split = make_store(tmp_path / "s.zarr", dtype=dtype)["train"]
    rows = torch.cat([split.tokens("block1", video) for video in split.videos]).double().reshape(-1, DIM)
    moments = split.statistics("block1")
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-10)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.numpy().T, bias=True), rtol=1e-9, atol=1e-12)


def test_long_videos_take_several_chunks(tmp_path: Path) -> None:
    source = DiscSource({"train": (7, 1, 5)})
    split = make_store(tmp_path / "s.zarr", source, chunk_frames=3)["train"]
    assert [split.rows(v).start for v in split.videos] == [0, 9, 12]
    for index in split.videos:
        assert torch.equal(split.tokens("block1", index), tokens_of(source.read("train", index)).half())
    assert verify(split.store.path) == []


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e4))
@settings(max_examples=40, deadline=None)
def test_int8_tokens_stay_close(seed: int, scale: float) -> None:
    tokens = scale * torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(seed))
    back = ENCODINGS["int8"].rounded(tokens)
    # half a code step of the largest value, and the rounding of the float16 scale; tiny scales are subnormal
    bound = tokens.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2**-11) + 127 * 2.0**-24
    assert bool(((back - tokens).abs() <= bound).all())


def test_int8_of_zeros_is_zero() -> None:
    assert torch.equal(ENCODINGS["int8"].rounded(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_another_identity_is_refused_with_what_differs(store: FeatureStore) -> None:
    other = replace(store.spec, preprocessing={"size": 448}, frame_stride=2)
    with pytest.raises(IncompatibleError, match=r"frame_stride: store 1, asked 2; preprocessing.size: store 32"):
        StoreWriter(store.path, other)


def test_another_source_is_refused(store: FeatureStore) -> None:
    with StoreWriter(store.path, store.spec) as writer:
        spec = replace(store["train"].spec, source_fingerprint="other files")
        with pytest.raises(IncompatibleError, match="source_fingerprint"):
            writer.split("train", spec)


def test_free_fields_do_not_refuse(store: FeatureStore) -> None:
    StoreWriter(store.path, replace(store.spec, source="moved/elsewhere", batch_size=99)).close()


def test_one_writer_at_a_time(store: FeatureStore) -> None:
    with (
        StoreWriter(store.path, store.spec),
        pytest.raises(DataError, match=r"another process \(pid \d+\) is writing"),
    ):
        StoreWriter(store.path, store.spec)
    StoreWriter(store.path, store.spec).close()


def test_more_videos_grow_the_split_in_place(tmp_path: Path) -> None:
    short, long = DiscSource({"train": (4, 4)}), DiscSource({"train": (4, 4, 3)})
    store = make_store(tmp_path / "s.zarr", short)
    before = chunk_path(store.path / "train/features/block1", 1, 3).read_bytes()
    with StoreWriter(store.path, store.spec) as writer:
        spec = replace(store["train"].spec, lengths=(4, 4, 3), statistics_videos=0)
        split = writer.split("train", spec)
        assert split.done == {0, 1}
        assert not FeatureStore.open(store.path)["train"].complete
        video = long.read("train", 2)
        split.write(2, video, {"block1": tokens_of(video)})
        split.finish({"block1": Moments.empty(16, DIM)})
    grown = FeatureStore.open(store.path)["train"]
    assert grown.complete and grown.frames == 11
    assert chunk_path(store.path / "train/features/block1", 1, 3).read_bytes() == before
    assert torch.equal(grown.tokens("block1", 2), tokens_of(video).half())


def test_a_torn_manifest_line_is_dropped(store: FeatureStore) -> None:
    path = store.path / "train" / manifest.NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert len(manifest.read(path.parent)) == len(whole.splitlines()) - 1
    appender = manifest.Appender(path.parent)
    appender.close()
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:-1])


def test_a_broken_manifest_line_is_named(store: FeatureStore) -> None:
    path = store.path / "train" / manifest.NAME
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(DataError, match="line 1 is not a manifest row"):
        manifest.read(path.parent)


def test_verify_names_damaged_and_missing_chunks(store: FeatureStore) -> None:
    assert verify(store.path) == []
    damaged = chunk_path(store.path / "train/features/block1", 1, 3)
    data = bytearray(damaged.read_bytes())
    data[17] ^= 1
    damaged.write_bytes(data)
    chunk_path(store.path / "validation/video", 0, 4).unlink()
    found = {(d.split, d.video, d.id) for d in verify(store.path)}
    assert found == {("train", 1, "train-1"), ("validation", 0, "validation-0")}


def test_errors_say_what_to_do(tmp_path: Path, store: FeatureStore) -> None:
    with pytest.raises(DataError, match="no such store; make it with: slotlab extract"):
        FeatureStore.open(tmp_path / "nothing.zarr")
    with pytest.raises(DataError, match="not a featcache store"):
        FeatureStore.open(tmp_path)
    with pytest.raises(UsageError, match="it has: train, validation"):
        store["test"]
    with pytest.raises(IncompatibleError, match="it has: block1"):
        store.tap("block12")
    attributes = json.loads((store.path / "zarr.json").read_text())
    attributes["attributes"]["featcache"]["schema"] = 99
    (store.path / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(IncompatibleError, match="schema 99"):
        FeatureStore.open(store.path)


def test_unfinished_split_says_how_to_finish(tmp_path: Path, store: FeatureStore) -> None:
    with StoreWriter(tmp_path / "new.zarr", store.spec) as writer:
        writer.split("train", SplitSpec("f", (4,), 4, (SIZE, SIZE), True)).close()
    split = FeatureStore.open(tmp_path / "new.zarr")["train"]
    with pytest.raises(DataError, match=r"0 of 1 videos\); run the same slotlab extract command again"):
        split.require_complete()
    assert split.store.spec.taps["block1"].grid == GRID


@pytest.mark.parametrize("names", [1, 255, 256])
def test_table_of_categories(names: int) -> None:
    """A code for each, in two bytes where there are more than 255."""
    each = [Instance(category=f"c{k:03d}") for k in range(names)]
    rows = {video: manifest.Row(video, "v", 1, {}, (instance, Instance())) for video, instance in enumerate(each)}
    rows = {
        video: replace(row, instances=tuple(replace(i, visibility=(3,)) for i in row.instances))
        for video, row in rows.items()
    }
    found = tables(SplitSpec("", (1,) * names, 1, (8, 8), True), rows)
    table = found["instances/category"]
    assert table.values.dtype == (np.uint8 if names < 256 else np.uint16)
    assert [table.labels[code] for code in table.values[:, 0]] == [instance.category for instance in each]
    assert set(table.values[:, 1].tolist()) == {np.iinfo(table.values.dtype).max}


def test_stores_of_earlier_versions_have_no_table_of_categories_and_are_sound(store: FeatureStore) -> None:
    assert not (store.path / "train/instances/category").exists()
    assert verify(store.path) == []
    lines = (store.path / "train/manifest.jsonl").read_text().splitlines()
    assert manifest.Row.from_json(lines[0].replace(',"category":""', "")) == manifest.Row.from_json(lines[0])
    assert '"category":""' in lines[0], "the row above is of no use"
