"""Copies: the same values in every layout and close ones in another dtype, checked on the way and cut short safely."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.moments import Moments
from featcache.store import shards
from featcache.store.encoding import ENCODINGS
from featcache.store.layout import chunk_path
from featcache.store.reading import FeatureStore, Split
from featcache.store.spec import SplitSpec, StoreSpec, TapSpec
from featcache.store.writing import StoreWriter
from featcache.stream.stream import FeatureStream
from featcache.upkeep.convert import ConvertOptions, convert
from featcache.upkeep.repair import Means, repair
from featcache.upkeep.verify import verify
from tests import crash
from tests.synthetic import DIM, GRID, SIZE, DiscSource, arrays_of, make_store, tokens_of

SOURCE = DiscSource({"train": (4, 4, 3, 7, 2, 5), "validation": (4, 4)})


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Videos of one to three chunks."""
    return make_store(tmp_path / "a.zarr", SOURCE, chunk_frames=3)


def copy(store: FeatureStore, out: Path, **options: object) -> FeatureStore:
    convert(store.path, out, ConvertOptions(**options))  # type: ignore[arg-type]
    assert verify(out) == []
    return FeatureStore.open(out)


def values(split: Split) -> dict[str, list[torch.Tensor]]:
    return {
        "features": [split.tokens("block1", video) for video in split.videos],
        "video": [torch.from_numpy(split.video(video)) for video in split.videos],
        "segmentations": [torch.from_numpy(split.segmentations(video)) for video in split.videos],
    }


def assert_same(store: FeatureStore, other: FeatureStore) -> None:
    assert store.splits == other.splits
    for name in store.splits:
        a, b = store[name], other[name]
        for what, tensors in values(a).items():
            assert all(torch.equal(x, y) for x, y in zip(tensors, values(b)[what], strict=True)), what
        assert [(r.id, r.instances) for r in a.manifest.values()] == [(r.id, r.instances) for r in b.manifest.values()]
        assert {k: v for k, v in asdict(a.spec).items() if k != "shard_chunks"} == {
            k: v for k, v in asdict(b.spec).items() if k != "shard_chunks"
        }
        for key, moment in a.statistics("block1").to_arrays().items():
            np.testing.assert_array_equal(moment, b.statistics("block1").to_arrays()[key], err_msg=key)


# -- round trips -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_hdf5_and_back_is_the_same_store(tmp_path: Path, dtype: str) -> None:
    store = make_store(tmp_path / "a.zarr", SOURCE, chunk_frames=3, dtype=dtype)
    convert(store.path, tmp_path / "a.h5", ConvertOptions(), "hdf5")
    convert(tmp_path / "a.h5", tmp_path / "b.zarr", ConvertOptions())
    back = FeatureStore.open(tmp_path / "b.zarr")
    assert verify(back.path) == []
    assert_same(store, back)
    a, b = arrays_of(store.path), arrays_of(back.path)
    assert {n: d for n, d in a.items() if n != "zarr.json"} == {n: d for n, d in b.items() if n != "zarr.json"}
    assert back.spec.identity() == store.spec.identity()
    assert back.spec.exported_from == str(tmp_path / "a.h5")


def test_int8_and_back_is_close_and_says_so(tmp_path: Path, store: FeatureStore) -> None:
    small = copy(store, tmp_path / "int8.zarr", dtype="int8")
    again = copy(small, tmp_path / "again.zarr", dtype="float16")
    for video in store["train"].videos:
        tokens = store["train"].tokens("block1", video).float()
        expected = ENCODINGS["int8"].rounded(tokens)
        assert torch.equal(small["train"].tokens("block1", video), expected)
        back = again["train"].tokens("block1", video)
        assert back.dtype == torch.float16 and torch.equal(back, expected.half())
        bound = tokens.abs().amax(-1, keepdim=True) / 127 * 0.51 + tokens.abs() * 2e-3
        assert bool(((back.float() - tokens).abs() <= bound).all())
    assert (small.spec.dtype, small.spec.dtype_through) == ("int8", "")
    assert (again.spec.dtype, again.spec.dtype_through) == ("float16", "int8")
    with pytest.raises(IncompatibleError, match="dtype_through: store 'int8', asked ''"):
        StoreWriter(again.path, store.spec)


def test_statistics_are_those_of_the_copy(tmp_path: Path, store: FeatureStore) -> None:
    small = copy(store, tmp_path / "int8.zarr", dtype="int8")["train"]
    expected = None
    for video in small.videos:
        moments = Moments.from_tokens(small.tokens("block1", video))
        expected = moments if expected is None else expected + moments
    assert expected is not None
    np.testing.assert_array_equal(small.statistics("block1").covariance, expected.covariance)
    assert not np.array_equal(small.statistics("block1").covariance, store["train"].statistics("block1").covariance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("shard_videos", [1, 2, 50])
def test_sharded_equals_raw_through_zarr_and_the_stream(tmp_path: Path, shard_videos: int, dtype: str) -> None:
    store = make_store(tmp_path / "a.zarr", SOURCE, chunk_frames=3, dtype=dtype)
    sharded = copy(store, tmp_path / "b.zarr", shard_videos=shard_videos)
    assert_same(store, sharded)
    raw, few = (len(list((s.path / "train/features/block1").glob("c.*"))) for s in (store, sharded))
    assert (raw, few) == (11, {1: 4, 2: 2, 50: 1}[shard_videos])
    assert sharded["train"].array("features/block1").shards == (3 * 3 * shard_videos, *GRID[:0], 16, DIM)
    streams = [iter(FeatureStream(s["train"], "block1", batch_size=5, clip=2, seed=3)) for s in (store, sharded)]
    for _ in range(8):
        a, b = (next(stream) for stream in streams)
        assert torch.equal(a.features, b.features) and np.array_equal(a.rows, b.rows)


@given(st.lists(st.one_of(st.none(), st.binary(max_size=40)), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_shards_unpack_to_what_was_packed(places: list[bytes | None]) -> None:
    chunks = {place: data for place, data in enumerate(places) if data is not None}
    shard = shards.pack(chunks, len(places))
    assert shards.unpack(shard, len(places)) == chunks
    with pytest.raises(ValueError, match="index is damaged"):
        shards.unpack(shard[:-1] + bytes([shard[-1] ^ 1]), len(places))


def test_taps_and_splits_are_chosen(tmp_path: Path) -> None:
    taps = {"block1": TapSpec(GRID, DIM), "block2": TapSpec(GRID, 5)}
    spec = StoreSpec("synthetic", {"library": "none"}, {"size": SIZE}, taps, batch_size=4)
    with StoreWriter(tmp_path / "a.zarr", spec) as writer:
        for name in ("train", "validation"):
            split = writer.split(name, SplitSpec("f", (4,), 4, (SIZE, SIZE), True))
            video = SOURCE.read(name, 0)
            tokens = {"block1": tokens_of(video), "block2": tokens_of(video, dim=5)}
            split.write(0, video, tokens)
            split.finish({tap: Moments.from_tokens(values.half()) for tap, values in tokens.items()})
            split.close()
    store = FeatureStore.open(tmp_path / "a.zarr")
    one = copy(store, tmp_path / "b.zarr", taps=("block2",), splits=("validation",))
    assert list(one.spec.taps) == ["block2"] and one.splits == ("validation",)
    assert torch.equal(one["validation"].tokens("block2", 0), store["validation"].tokens("block2", 0))
    with pytest.raises(UsageError, match="no tap 'block3'; it has: block1, block2"):
        copy(store, tmp_path / "c.zarr", taps=("block3",))
    with pytest.raises(UsageError, match="no split 'test'; it has: train, validation"):
        copy(store, tmp_path / "c.zarr", splits=("test",))
    assert not (tmp_path / "c.zarr").exists()


# -- HDF5 --------------------------------------------------------------------------------------------------


def test_hdf5_is_laid_out_for_other_code(tmp_path: Path, store: FeatureStore) -> None:
    convert(store.path, tmp_path / "a.h5", ConvertOptions(), "hdf5")
    with h5py.File(tmp_path / "a.h5") as file:
        group, split = file["train"], store["train"]
        offsets = group["video_offsets"][:]
        assert offsets.tolist() == [0, 4, 8, 11, 18, 20, 25]
        assert group["features/block1"].shape == (25, 16, DIM) and group["features/block1"].chunks is None
        for video in split.videos:
            rows = slice(offsets[video], offsets[video + 1])
            np.testing.assert_array_equal(group["features/block1"][rows], split.tokens("block1", video).numpy())
            np.testing.assert_array_equal(group["segmentations"][rows], split.segmentations(video))
        assert group["video_ids"][2] == b"train-2"
        assert json.loads(group["instances"][1])[1]["material"] == "rubber"
        assert json.loads(file.attrs["featcache"])["backbone"] == "synthetic"


def test_a_file_by_other_code_is_imported(tmp_path: Path) -> None:
    tokens = torch.randn(7, 9, 6, generator=torch.Generator().manual_seed(0))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features/dino"] = tokens.numpy()
        file["video"] = np.zeros((7, 8, 8, 3), np.uint8)
        file["video_offsets"] = [0, 4, 7]
    convert(tmp_path / "other.h5", tmp_path / "b.zarr", ConvertOptions())
    store = FeatureStore.open(tmp_path / "b.zarr")
    assert verify(store.path) == []
    split = store["train"]
    assert store.spec.taps["dino"].grid == (3, 3) and split.spec.lengths == (4, 3) and not split.spec.masks
    assert torch.equal(split.tokens("dino", 1), tokens[4:].half())
    convert(tmp_path / "other.h5", tmp_path / "c.zarr", ConvertOptions(dtype="int8"))
    small = FeatureStore.open(tmp_path / "c.zarr")["train"].tokens("dino", 0)
    assert torch.equal(small, ENCODINGS["int8"].rounded(tokens[:4]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.__delitem__("train/video"), "/train: lacks video; see docs/store.md"),
        (lambda f: f["train/video_offsets"].__setitem__(1, 90), "video_offsets must rise from 0"),
        (lambda f: f["train/features/block1"].__setitem__((5, 0, 0), 9), "video 1 has another checksum"),
        (lambda f: [f.__delitem__(n) for n in list(f)], "no group holds features/<tap>"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, store: FeatureStore, edit: object, message: str) -> None:
    convert(store.path, tmp_path / "a.h5", ConvertOptions(), "hdf5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        edit(file)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        convert(tmp_path / "a.h5", tmp_path / "b.zarr", ConvertOptions())
    (tmp_path / "a.h5").write_bytes(b"not HDF5")
    with pytest.raises(DataError, match="copy or write this file again"):
        convert(tmp_path / "a.h5", tmp_path / "c.zarr", ConvertOptions())


# -- safety ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zarr", "hdf5"])
def test_damage_is_not_copied(tmp_path: Path, store: FeatureStore, form: str) -> None:
    file = chunk_path(store.path / "train/features/block1", 4, 3)
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    with pytest.raises(DataError, match="chunk 0 of video train-2 has checksum.*run: slotlab verify --repair"):
        convert(store.path, tmp_path / "out", ConvertOptions(), form)  # type: ignore[arg-type]
    if form == "hdf5":
        assert not list(tmp_path.glob("out*"))
    else:
        assert FeatureStore.open(tmp_path / "out")["train"].videos == (0, 1)


def test_what_must_not_be_overwritten_is_not(tmp_path: Path, store: FeatureStore) -> None:
    with pytest.raises(UsageError, match="is the store or file to copy"):
        copy(store, store.path)
    (tmp_path / "a.h5").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        convert(store.path, tmp_path / "a.h5", ConvertOptions(), "hdf5")
    assert (tmp_path / "a.h5").read_text() == "mine"
    copy(store, tmp_path / "b.zarr")
    with pytest.raises(IncompatibleError, match="shard_chunks: store 0, asked 6"):
        copy(store, tmp_path / "b.zarr", shard_videos=2)


def test_an_unfinished_store_is_not_exported(tmp_path: Path, store: FeatureStore) -> None:
    manifest = store.path / "train/manifest.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="extraction unfinished"):
        copy(store, tmp_path / "b.zarr")


def test_an_unfinished_split_does_not_stop_a_finished_one(tmp_path: Path, store: FeatureStore) -> None:
    manifest = store["validation"].path / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    out = copy(FeatureStore.open(store.path), tmp_path / "b.zarr", splits=("train",))
    assert out.splits == ("train",)
    with pytest.raises((DataError, UsageError), match="validation"):
        convert(store.path, tmp_path / "c.zarr", ConvertOptions(splits=("validation",)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("segmentations", lambda v: v[..., None], r"segmentations are \(25, 32, 32, 1\); expected \(25, 32, 32\)"),
        ("segmentations", lambda v: v[:, ::2], r"segmentations are \(25, 16, 32\)"),
        ("segmentations", lambda v: v.astype(np.int64) + 300, "renumber the objects"),
        ("video", lambda v: v.astype(np.float32), r"video is float32 .*; expected uint8 \(25, height, width, 3\)"),
        ("video", lambda v: v[..., 0], r"video is uint8 \(25, 32, 32\)"),
        ("segmentations", lambda v: v.astype(np.int64), ""),
    ],
)
def test_pictures_of_other_code_are_checked(
    tmp_path: Path, store: FeatureStore, name: str, change: Any, message: str
) -> None:
    """Masks may have any type that holds their numbers."""
    convert(store.path, tmp_path / "a.h5", ConvertOptions(), "hdf5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["train/checksums"]
        values = change(file[f"train/{name}"][...])
        del file[f"train/{name}"]
        file[f"train/{name}"] = values
    if message:
        with pytest.raises(DataError, match=message):
            convert(tmp_path / "a.h5", tmp_path / "b.zarr", ConvertOptions())
    else:
        convert(tmp_path / "a.h5", tmp_path / "b.zarr", ConvertOptions())
        again = FeatureStore.open(tmp_path / "b.zarr")["train"]
        assert all((again.segmentations(v) == store["train"].segmentations(v)).all() for v in again.videos)


@pytest.mark.slow
@pytest.mark.parametrize("shard_videos", [0, 2])
def test_an_export_killed_anywhere_goes_on_to_the_same_bytes(tmp_path: Path, shard_videos: int) -> None:
    store = make_store(tmp_path / "a.zarr", SOURCE, chunk_frames=3)
    whole = tmp_path / "whole.zarr"
    code, writes = crash.run(crash.export, str(store.path), str(whole), shard_videos)
    assert code == 0
    for die_at in np.linspace(4, writes - 1, 3).astype(int).tolist():
        path = tmp_path / f"{die_at}.zarr"
        assert crash.run(crash.export, str(store.path), str(path), shard_videos, die_at=die_at)[0] == -9
        if (path / "zarr.json").exists():
            assert verify(path) == []
        assert crash.run(crash.export, str(store.path), str(path), shard_videos)[0] == 0
        assert arrays_of(path) == arrays_of(whole) and verify(path) == []


@pytest.mark.parametrize("shard_videos", [0, 2])
def test_a_copy_is_repaired_from_its_origin(tmp_path: Path, store: FeatureStore, shard_videos: int) -> None:
    small = copy(store, tmp_path / "b.zarr", dtype="int8", shard_videos=shard_videos)
    before = arrays_of(small.path)
    file = chunk_path(small.path / "train/features/block1", 1, 3)
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    moved = Path(shutil.move(store.path, tmp_path / "moved.zarr"))
    with pytest.raises(DataError, match="gone, and .* was exported from it; name where it is now with --data"):
        repair(small.path)
    assert len({d.video for d in repair(small.path, Means(data=str(moved)))}) == 1
    assert arrays_of(small.path) == before and verify(small.path) == []


@pytest.mark.slow
def test_the_commands_as_people_type_them(
    tmp_path: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cli

    monkeypatch.setattr("signal.signal", lambda *_: None)  # the test process keeps its own

    def slotlab(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["slotlab", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    file, back, small = tmp_path / "a.h5", tmp_path / "b.zarr", tmp_path / "c.zarr"
    assert slotlab("export", store.path, file, "--format", "hdf5", "--split", "train")[0] == 0
    assert slotlab("import", file, back, "--shard-videos", 2)[0] == 0
    assert FeatureStore.open(back).splits == ("train",)
    assert slotlab("export", back, small, "--dtype", "int8", "--tap", "block1")[0] == 0
    code, _, errors = slotlab("export", store.path, small)
    assert (code, errors.splitlines()[-2:]) == (4, ["         store  asked", "  dtype  int8   float16"])
    assert slotlab("import", tmp_path / "none.h5", back)[0] == 3
    assert slotlab("export", store.path, small, "--format", "webdataset")[0] == 2

    chunk_path(small / "train/features/block1", 0, 3).unlink()
    code, out, _ = slotlab("verify", small, "--json")
    assert code == 3 and json.loads(out)["damaged"][0]["id"] == "train-0"
    code, out, _ = slotlab("verify", small, "--repair", "--json")
    assert (code, json.loads(out)["damaged"], len(json.loads(out)["repaired"])) == (0, [], 1)
    assert slotlab("verify", small)[0] == 0
