"""The stream: the right rows, in an order that is a function of the seed and the position alone."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featcache.errors import UsageError
from featcache.readers import FileRows, ZarrRows, open_rows
from featcache.store import FeatureStore
from featcache.stream import FeatureStream, Residence, clip_starts
from tests.synthetic import DiscSource, make_store

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


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("residence", RESIDENCES)
@pytest.mark.parametrize("clip", [1, 3])
def test_batches_hold_the_rows_they_name(
    stores: dict[str, FeatureStore], dtype: str, residence: Residence, clip: int
) -> None:
    split = stores[dtype]["train"]
    stream = FeatureStream(split, "block1", batch_size=3, clip=clip, residence=residence)
    for features, rows in take(stream, 8):
        for sample, row in zip(features, rows, strict=True):
            expected = split.read_tokens("block1", slice(row, row + clip))
            assert torch.equal(sample, expected[0] if clip == 1 else expected)


@given(
    residence=st.sampled_from(RESIDENCES),
    clip=st.integers(1, 3),
    batch=st.integers(1, 9),
    before=st.integers(0, 12),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_restarted_stream_goes_on_exactly(
    stores: dict[str, FeatureStore], residence: Residence, clip: int, batch: int, before: int, seed: int
) -> None:
    split = stores["float16"]["train"]

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
    count = len(stream.starts)
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


def test_ranks_share_the_global_batch(stores: dict[str, FeatureStore]) -> None:
    split = stores["float16"]["train"]
    whole = take(FeatureStream(split, "block1", batch_size=6), 5)
    parts = [take(FeatureStream(split, "block1", batch_size=3, rank=r, world_size=2), 5) for r in (0, 1)]
    for step, (_, rows) in enumerate(whole):
        assert sorted(parts[0][step][1] + parts[1][step][1]) == rows


def test_mapped_and_zarr_readers_agree(stores: dict[str, FeatureStore]) -> None:
    split = stores["float16"]["train"]
    reader = open_rows(split, "features/block1")
    assert isinstance(reader, FileRows)
    starts = np.array([0, 2, 3, 5, 13])  # 2, 3 and 5 cross a chunk boundary
    fast, slow = (torch.zeros(5, 3, 16, 12, dtype=torch.float16) for _ in range(2))
    reader.gather(starts, fast)
    ZarrRows(split.array("features/block1")).gather(starts, slow)
    assert torch.equal(torch.nan_to_num(fast), torch.nan_to_num(slow))


@pytest.mark.parametrize("change", ["compressed", "sharded", "big-endian", "split patches"])
def test_only_raw_layouts_are_mapped(tmp_path: Path, change: str) -> None:
    group = zarr.create_group(str(tmp_path / "a.zarr"), zarr_format=3)
    options: dict[str, object] = {
        "shape": (8, 16, 12), "chunks": (4, 16, 12), "dtype": "float16", "compressors": None,
        "chunk_key_encoding": {"name": "default", "separator": "."},
    }  # fmt: skip
    assert FileRows.allowed(group.create_array("plain", **options))  # type: ignore[arg-type]
    options |= {
        "compressed": {"compressors": "auto"},
        "sharded": {"shards": (8, 16, 12)},
        "big-endian": {"dtype": ">f2"},
        "split patches": {"chunks": (4, 8, 12)},
    }[change]
    assert not FileRows.allowed(group.create_array("other", **options))  # type: ignore[arg-type]


def test_the_thread_ends_and_its_errors_arrive(stores: dict[str, FeatureStore]) -> None:
    stream = FeatureStream(stores["float16"]["train"], "block1", batch_size=2)
    take(stream, 2)
    assert not [t for t in threading.enumerate() if t.name == "featcache-stream"]

    class Broken:
        def gather(self, starts: object, out: object) -> None:
            raise OSError("the disk went away")

    stream._readers = [Broken()]
    with pytest.raises(OSError, match="the disk went away"):
        take(stream, 1)
