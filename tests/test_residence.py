"""Where features live: on the device where they fit there beside the trainer, and why, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featcache.machine import free_device_memory, share_memory
from featcache.store.reading import FeatureStore
from featcache.stream.residence import RING, SPARE, Free, choose_home, ring_bytes
from featcache.stream.staging import Format
from featcache.stream.stream import VIDEO, FeatureStream
from slotlab.models.build import build_model
from slotlab.training import train as training
from slotlab.training.processes import Ranks
from slotlab.training.train import train, training_stream
from tests.commands import Slotlab
from tests.training import small

CUDA = torch.device("cuda")
GB = 10**9
MOVI_A = 9703 * 24 * 256  # tokens


def test_all_of_movi_a_fits_a_card_of_32_gb_as_int8() -> None:
    free = Free(host=60 * GB, device=30_100_000_000)
    codes, scales = MOVI_A * 384, MOVI_A * 2
    home = choose_home(codes + scales, 5_000_000_000, free, mapped=True)
    assert home.residence == "device"
    assert home.why == "features (23.0 GB) on the device: 30.1 GB free, 5.0 GB for the model and batches"
    home = choose_home(2 * codes, 5_000_000_000, free, mapped=True)
    assert home.residence == "disk"
    assert home.why == (
        "features (45.8 GB) on the disk and in its page cache; the device has 30.1 GB free, 5.0 GB for the model and "
        "batches"
    )


def test_the_device_holds_what_fits_to_the_byte() -> None:
    free = Free(host=0, device=10 * GB)
    room = 10 * GB - SPARE
    assert choose_home(room - 7, 7, free, mapped=True).residence == "device"
    assert choose_home(room - 6, 7, free, mapped=True).residence == "disk"
    assert choose_home(room - 7, 8, free, mapped=True).residence == "disk"


@pytest.mark.parametrize(("size", "mapped", "where"), [(9, True, "disk"), (5, False, "host"), (6, False, "disk")])
def test_without_its_own_memory_the_host_holds_what_must_be_decoded(size: int, mapped: bool, where: str) -> None:
    home = choose_home(size, 0, Free(host=10), mapped=mapped)
    assert home.residence == where
    assert f"on the {where}" in home.why and ("compressed" in home.why) == (not mapped)


def test_the_ring_holds_what_is_read_and_what_is_decoded() -> None:
    codes, scales = Format((4, 1, 16, 12), torch.int8), Format((4, 1, 16), torch.float16)
    decoded = Format((4, 1, 16, 12), torch.float32)
    assert ring_bytes([codes, scales], decoded) == RING * (4 * 16 * 12 * 5 + 4 * 16 * 2)
    assert ring_bytes([decoded], None) == RING * decoded.bytes


def test_a_stream_reckons_with_its_trainer(shared_store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The features are 24 KB, a batch 12 KB with its ring of three."""
    split = shared_store["train"]
    size = split.array("features/block1").nbytes
    ring = RING * 4 * 16 * 12 * 2
    asked: list[torch.device] = []
    monkeypatch.setattr("featcache.stream.stream.open_readers", lambda split, tap, home, threads: asked.append(home))
    for free, reserve, where in (
        (size + ring + SPARE, 0, "device"),
        (size + ring + SPARE, 1, "disk"),
        (size + ring + SPARE + 1, 1, "device"),
        (size + ring + SPARE - 1, 0, "disk"),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        stream = FeatureStream(split, "block1", batch_size=4, device="cuda", reserve=reserve)
        assert stream.residence == where and f"on the {where}" in stream.home.why
        assert asked[-1] == (CUDA if where == "device" else None)


def test_processes_that_share_a_gpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that start together both find it free."""
    shares: dict[torch.device, float] = {}
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, on: shares.update({on: part}))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda on: shares.get(on, 1.0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1500)
    for processes, free, left in (
        (1, 20_000, 20_500),
        (2, 20_000, 15_000 - 1000),
        (4, 20_000, 7500 - 1000),
        (2, 3000, 3500),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 30_000))
        share_memory(CUDA, processes)
        assert free_device_memory(CUDA) == left
    share_memory(torch.device("cpu"), 4)
    assert list(shares) == [CUDA]


def test_a_residence_that_is_set_is_kept(shared_store: FeatureStore) -> None:
    for residence in ("disk", "host"):
        stream = FeatureStream(shared_store["train"], VIDEO, batch_size=2, residence=residence)  # type: ignore[arg-type]
        assert stream.residence == residence and stream.home.why.endswith(f"on the {residence}, as set")


def test_a_step_s_memory_is_kept_free(shared_store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """And counted only where it decides."""
    monkeypatch.setattr("featcache.stream.stream.open_readers", lambda *_: {})
    config = small()
    split = shared_store["train"]
    needs = training._reserve(config, shared_store, Ranks(CUDA))
    assert needs > 16 * sum(parameter.numel() for parameter in build_model(config, shared_store).parameters())
    enough = split.array("features/block1").nbytes + RING * 4 * 16 * 12 * 2 + needs + SPARE
    for free, where in ((enough, "device"), (enough - 1, "disk")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        assert training_stream(config, shared_store, Ranks(CUDA)).residence == where
    monkeypatch.setattr(training, "count_step", None)
    assert training_stream(config, shared_store, Ranks(torch.device("cpu"))).residence == "disk"
    assert training_stream(small("data.residence=host"), shared_store, Ranks(CUDA)).residence == "host"


def test_training_says_where_they_live(shared_store: FeatureStore, tmp_path: Path, slotlab: Slotlab) -> None:
    said: list[str] = []
    train(small(optim__steps=1), shared_store, tmp_path / "run", remark=said.append)
    assert len(said) == 1 and said[0].startswith("features (") and "on the disk" in said[0]
    command = ("train", "--cache", shared_store.path, "--steps", 1, "--batch-size", 2, "--normalize", "slow=8")
    ended = slotlab(*command, "--set", "model.slots=4", "--out", "other", "--device", "cpu")
    assert ended.code == 0 and said[0] in ended.said
