"""The stream: the right rows, in an order that is a function of the seed and the position alone."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, ShardingCodec

from featcache.errors import DataError, UsageError
from featcache.memory import copying, pages
from featcache.store import shards
from featcache.store.encoding import ENCODINGS
from featcache.store.reading import FeatureStore
from featcache.stream.order import clip_starts
from featcache.stream.rows import TORCH_DTYPES, FileRows, ZarrRows, open_rows
from featcache.stream.stream import VIDEO, FeatureStream, reader_threads
from featcache.upkeep.convert import ConvertOptions, convert
from featcache.words import Residence
from tests.synthetic import DiscSource, make_store

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RESIDENCES: tuple[Residence, ...] = ("disk", "host", "device")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FeatureStore]:
    folder = tmp_path_factory.mktemp("stores")
    source = DiscSource({"train": (7, 3, 5, 6)})
    return {
        dtype: make_store(folder / f"{dtype}.zarr", source, dtype=dtype, chunk_frames=4)
        for dtype in ("float16", "int8")
    }


def take(stream: FeatureStream, count: int) -> list[tuple[torch.Tensor, list[int]]]:
    batches = iter(stream)
    taken = [(batch.features.clone(), batch.rows.tolist()) for batch in islice(batches, count)]
    batches.close()  # type: ignore[attr-defined]
    return taken


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("residence", RESIDENCES)
@pytest.mark.parametrize("clip", [1, 3])
def test_batches_hold_the_rows_they_name(
    stores: dict[str, FeatureStore], device: str, dtype: str, residence: Residence, clip: int
) -> None:
    split = stores[dtype]["train"]
    stream = FeatureStream(split, "block1", batch_size=3, clip=clip, device=device, residence=residence)
    for features, rows in take(stream, 8):
        assert features.device.type == device
        features = features.cpu()
        for sample, row in zip(features, rows, strict=True):
            expected = split.read_tokens("block1", slice(row, row + clip))
            assert torch.equal(sample, expected[0] if clip == 1 else expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("residence", RESIDENCES)
def test_of_a_clip_only_the_frames_that_are_asked_for_are_read(
    stores: dict[str, FeatureStore], device: str, dtype: str, residence: Residence
) -> None:
    split, options = stores[dtype]["train"], {"batch_size": 3, "clip": 4, "device": device, "residence": residence}

    def frames(samples_seen: int) -> np.ndarray:
        return np.array([[3, 0], [1, 1], [0, 2]][samples_seen // 3 % 3])

    whole, some = FeatureStream(split, "block1", **options), FeatureStream(split, "block1", frames=frames, **options)
    assert some.batch_seconds(1).read > 0
    for batch, ((clips, rows), (found, named)) in enumerate(zip(take(whole, 7), take(some, 7), strict=True)):
        assert named == rows, "which clips they are is the same"
        assert torch.equal(found, clips[:, frames(3 * batch)])


@pytest.mark.slow
@given(
    dtype=st.sampled_from(["float16", "int8"]),
    residence=st.sampled_from(RESIDENCES),
    clip=st.integers(1, 3),
    batch=st.integers(1, 40),  # of at most 21 samples, so that a batch may span epochs
    before=st.integers(0, 12),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_restarted_stream_goes_on_exactly(
    stores: dict[str, FeatureStore], dtype: str, residence: Residence, clip: int, batch: int, before: int, seed: int
) -> None:
    split = stores[dtype]["train"]

    def fresh(seed: int) -> FeatureStream:
        return FeatureStream(split, "block1", batch_size=batch, clip=clip, seed=seed, residence=residence)

    unbroken = take(fresh(seed), before + 4)
    first = fresh(seed)
    take(first, before)
    second = fresh(seed + 1)  # the state brings the seed
    second.load_state_dict(first.state_dict())
    for (features, rows), (expected, expected_rows) in zip(take(second, 4), unbroken[before:], strict=True):
        assert rows == expected_rows
        assert torch.equal(features, expected)


def test_an_epoch_sees_every_sample_once(stores: dict[str, FeatureStore]) -> None:
    split = stores["float16"]["train"]
    stream = FeatureStream(split, "block1", batch_size=7)
    count = len(stream.orders[0].starts)
    assert count == split.frames == 21
    seen = [row for _, rows in take(stream, 6) for row in rows]
    assert sorted(seen[:count]) == sorted(seen[count:]) == split.valid_rows().tolist()
    assert seen[:count] != seen[count:], "each epoch has its own order"


def test_clips_stay_inside_their_video(stores: dict[str, FeatureStore]) -> None:
    split = stores["float16"]["train"]
    starts = clip_starts(split, 5)
    assert len(starts) == 3 + 1 + 2  # videos of 7, 5 and 6 frames
    for start in starts:
        assert any(split.rows(v).start <= start and start + 5 <= split.rows(v).stop for v in split.videos)
    with pytest.raises(UsageError, match="no clips of 8 frames; the longest video has 7"):
        clip_starts(split, 8)


@given(
    world_size=st.integers(1, 5),
    batch=st.integers(1, 12),  # of 21 samples: a global batch may span several epochs
    clip=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_see_together_what_one_process_would(
    stores: dict[str, FeatureStore], world_size: int, batch: int, clip: int, seed: int
) -> None:
    split = stores["float16"]["train"]

    def rows(batch_size: int, **ranks: int) -> list[list[int]]:
        stream = FeatureStream(split, "block1", batch_size=batch_size, clip=clip, seed=seed, **ranks)
        return [rows for _, rows in take(stream, 3)]

    parts = [rows(batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]
    assert together == rows(world_size * batch)


@pytest.mark.parametrize("maps", [1, 2, 100])
@pytest.mark.parametrize("disk", ["warm", "cold", "turns cold"])
def test_file_and_zarr_readers_agree(
    stores: dict[str, FeatureStore], monkeypatch: pytest.MonkeyPatch, maps: int, disk: str
) -> None:
    split = stores["float16"]["train"]
    reader = open_rows(split, "features/block1")
    assert isinstance(reader, FileRows)
    monkeypatch.setattr("featcache.stream.rows.MAPS", maps)
    monkeypatch.setattr(copying, "CHECK", 2)
    reads, advised = itertools.count(), []
    monkeypatch.setattr(pages, "disk_reads", (lambda: 0) if disk == "warm" else lambda: next(reads))
    monkeypatch.setattr(pages, "read_ahead", lambda spans: advised.append(len(list(spans))))
    reader._cold = int(disk == "cold")
    starts = np.array([0, 2, 3, 5, 13])  # 2, 3, 5 and 13 cross a chunk boundary: 9 pieces
    fast, slow = (torch.zeros(5, 4, 16, 12, dtype=torch.float16) for _ in range(2))
    reader.gather(starts, fast)
    ZarrRows(split.array("features/block1")).gather(starts, slow)
    assert torch.equal(torch.nan_to_num(fast), torch.nan_to_num(slow))
    assert advised == {"warm": [], "cold": [9], "turns cold": [7]}[disk]
    assert len(reader._maps) <= maps


@given(threads=st.integers(2, 5), clip=st.integers(1, 4), starts=st.lists(st.integers(0, 20), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_threads_share_a_copy(stores: dict[str, FeatureStore], threads: int, clip: int, starts: list[int]) -> None:
    split, rows = stores["float16"]["train"], np.sort(np.array(starts))
    alone, shared = (torch.zeros(len(rows), clip, 16, 12, dtype=torch.float16) for _ in range(2))
    open_rows(split, "features/block1").gather(rows, alone)
    open_rows(split, "features/block1", threads).gather(rows, shared)
    assert torch.equal(torch.nan_to_num(alone), torch.nan_to_num(shared))


def test_a_gpu_gets_several_copying_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [reader_threads(cuda, ranks) for ranks in (1, 2, 4, 8, 16)] == [4, 4, 2, 1, 1]
    assert reader_threads(cpu, 1) == 1


def test_zarr_s_own_chunk_names_are_read_too(tmp_path: Path) -> None:
    values = np.arange(8 * 3 * 2, dtype=np.float16).reshape(8, 3, 2)
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=values.shape, chunks=(4, 3, 2), dtype="float16", compressors=None
    )
    array[:] = values
    out = torch.zeros(2, 3, 3, 2, dtype=torch.float16)
    assert FileRows.allowed(array)
    FileRows(array, tmp_path / "a.zarr").gather(np.array([2, 5]), out)
    assert torch.equal(out, torch.from_numpy(np.stack([values[2:5], values[5:8]])))


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    store = make_store(tmp_path / "damaged.zarr")
    file = next((store.path / "train" / "features" / "block1").glob("c.1.*"))
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, 100)
    with pytest.raises(DataError, match=f"{file.name}: .*slotlab verify"):
        take(FeatureStream(store["train"], "block1", batch_size=17), 1)


@pytest.mark.parametrize(
    "change", ["compressed", "shards of compressed", "shards with their index first", "big-endian", "split patches"]
)
def test_only_raw_layouts_are_mapped(tmp_path: Path, change: str) -> None:
    group = zarr.create_group(str(tmp_path / "a.zarr"), zarr_format=3)
    options: dict[str, Any] = {
        "shape": (8, 16, 12), "chunks": (4, 16, 12), "dtype": "float16", "compressors": None,
        "chunk_key_encoding": {"name": "default", "separator": "."},
    }  # fmt: skip
    assert FileRows.allowed(group.create_array("plain", **options))
    assert FileRows.allowed(group.create_array("sharded", **options, shards=(8, 16, 12)))
    options |= {
        "compressed": {"compressors": "auto"},
        "shards of compressed": {"compressors": "auto", "shards": (8, 16, 12)},
        "shards with their index first": {
            "serializer": ShardingCodec(chunk_shape=(2, 16, 12), codecs=[BytesCodec()], index_location="start")
        },
        "big-endian": {"serializer": BytesCodec(endian="big")},
        "split patches": {"chunks": (4, 8, 12)},
    }[change]
    assert not FileRows.allowed(group.create_array("other", **options))


@given(
    shard_chunks=st.integers(0, 4),  # 0: a file each
    chunk_rows=st.integers(1, 5),
    chunks=st.integers(1, 7),
    length=st.integers(1, 9),
    samples=st.integers(1, 20),
    dtype=st.sampled_from(["float16", "int8", "uint8"]),
    maps=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_rows_of_any_raw_layout(
    shard_chunks: int, chunk_rows: int, chunks: int, length: int, samples: int, dtype: str, maps: int, seed: int
) -> None:
    """Clips that cross chunks and shards, repeated and neighbouring samples, more files than may be mapped."""
    rng = np.random.default_rng(seed)
    rows = chunk_rows * chunks
    length = min(length, rows)
    values = rng.integers(1, 100, (rows, 3, 2)).astype(dtype)
    starts = np.sort(rng.integers(0, rows - length + 1, samples))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.stream.rows.MAPS", maps)
        array = zarr.create_array(
            folder, shape=values.shape, chunks=(chunk_rows, 3, 2), dtype=dtype, compressors=None, overwrite=True,
            shards=(chunk_rows * shard_chunks, 3, 2) if shard_chunks else None,
        )  # fmt: skip
        array[:] = values
        reader = FileRows(array, Path(folder))
        for _ in range(2):
            out = torch.zeros((samples, length, 3, 2), dtype=TORCH_DTYPES[dtype])
            reader.gather(starts, out)
            assert np.array_equal(out.numpy(), values[starts[:, None] + np.arange(length)])
        assert len(reader._maps) <= maps


@pytest.fixture
def sharded(tmp_path: Path) -> FeatureStore:
    plain = make_store(tmp_path / "plain.zarr", DiscSource({"train": (7, 3, 5, 6)}), chunk_frames=4)
    convert(plain.path, tmp_path / "sharded.zarr", ConvertOptions(shard_videos=2))
    return FeatureStore.open(tmp_path / "sharded.zarr")


@pytest.mark.parametrize("damage", ["missing", "not there", "index", "elsewhere"])
def test_damaged_shards_are_named(sharded: FeatureStore, damage: str) -> None:
    split = sharded["train"]
    count = split.spec.shard_chunks
    file = sorted((split.path / "features" / "block1").glob("c.*"))[0]
    chunks = shards.unpack(file.read_bytes(), count)
    take(FeatureStream(split, "block1", batch_size=17), 1)
    if damage == "missing":
        file.unlink()
    elif damage == "not there":
        file.write_bytes(shards.pack({k: v for k, v in chunks.items() if k != 1}, count))
    elif damage == "index":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    else:
        file.write_bytes(shards.pack({**chunks, 1: chunks[1][:-2]}, count))
    expected = {"not there": "chunk 1 is missing", "missing": "is missing"}.get(damage, "its index is damaged")
    with pytest.raises(DataError, match=f"{file.name}: {expected}; slotlab verify"):
        take(FeatureStream(split, "block1", batch_size=17), 1)


@pytest.mark.parametrize(
    "options", [{"compressors": "auto"}, {"shards": (24, 16, 12)}, {"serializer": BytesCodec(endian="big")}]
)
@pytest.mark.parametrize("residence", ["auto", *RESIDENCES])
def test_stores_of_other_layouts_give_the_same_batches(
    tmp_path: Path, options: dict[str, Any], residence: Residence
) -> None:
    store = make_store(tmp_path / "other.zarr", DiscSource({"train": (7, 3, 5, 6)}), chunk_frames=4)
    expected = take(FeatureStream(store["train"], "block1", batch_size=5, clip=2), 6)
    group = zarr.open_group(str(store.path / "train"), mode="r+")
    values = np.asarray(group["features/block1"])
    settings: dict[str, Any] = {"chunks": (4, 16, 12), "compressors": None, "overwrite": True} | options
    array = group.create_array("features/block1", shape=values.shape, dtype="float16", **settings)
    array[:] = values

    stream = FeatureStream(store["train"], "block1", batch_size=5, clip=2, residence=residence)
    assert residence != "auto" or stream.residence == ("disk" if "shards" in options else "host")
    for (features, rows), (expected_features, expected_rows) in zip(take(stream, 6), expected, strict=True):
        assert rows == expected_rows
        assert torch.equal(features, expected_features)


@pytest.mark.parametrize("residence", ["auto", *RESIDENCES])
@pytest.mark.parametrize("clip", [1, 3])
def test_frames_stream_as_tokens_do(stores: dict[str, FeatureStore], clip: int, residence: Residence) -> None:
    split = stores["int8"]["train"]  # the frames have no scales
    stream = FeatureStream(split, VIDEO, batch_size=4, clip=clip, residence=residence)
    assert residence != "auto" or stream.residence == "host"
    frames = {split.rows(v).start + t: frame for v in split.videos for t, frame in enumerate(split.video(v))}
    for batch, rows in take(stream, 4):
        assert batch.dtype == torch.uint8 and batch.shape == (4, *([clip] if clip > 1 else []), 32, 32, 3)
        for sample, row in zip(batch, rows, strict=True):
            expected = np.stack([frames[row + t] for t in range(clip)])
            assert np.array_equal(sample.numpy(), expected[0] if clip == 1 else expected)


@pytest.mark.parametrize("shape", [(5, 1000, 3), (3, 2, 700, 8), (0, 4, 4), (2, 5000, 2)])
def test_dequantising_by_blocks_is_the_product(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    scale = torch.rand(shape[:-1]).half()
    assert torch.equal(
        ENCODINGS["int8"].decode({"features": codes, "scales": scale}), codes.float() * scale.float().unsqueeze(-1)
    )


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "featcache-stream"]


def test_the_thread_ends_with_its_iterator(stores: dict[str, FeatureStore]) -> None:
    stream = FeatureStream(stores["float16"]["train"], "block1", batch_size=2)
    take(stream, 2)
    assert not running()
    for _ in stream:  # abandoned without a close
        assert len(running()) == 1
        break
    assert not running()


def test_its_errors_arrive(stores: dict[str, FeatureStore]) -> None:
    class Broken:
        def gather(self, starts: object, out: object) -> None:
            raise OSError("the disk went away")

    stream = FeatureStream(stores["float16"]["train"], "block1", batch_size=2)
    stream._readers = {"features": Broken()}
    with pytest.raises(OSError, match="the disk went away"):
        take(stream, 1)
    assert not running()


def test_the_trainer_keeps_its_threads(stores: dict[str, FeatureStore]) -> None:
    before, born_later = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        take(FeatureStream(stores["float16"]["train"], "block1", batch_size=2), 1)
        assert torch.get_num_threads() == 3
        thread = threading.Thread(target=lambda: born_later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert born_later == [3]
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_a_program_ends_while_its_stream_is_open(stores: dict[str, FeatureStore]) -> None:
    code = f"""
from featcache.store.reading import FeatureStore
from featcache.stream.stream import FeatureStream
batches = iter(FeatureStream(FeatureStore.open({str(stores["float16"].path)!r})["train"], "block1", batch_size=2))
next(batches)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
