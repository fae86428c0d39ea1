"""Training in several processes: the run of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from featcache.machine import pick_device
from featcache.store.reading import FeatureStore
from slotlab.config.schema import Config
from slotlab.models.build import build_model
from slotlab.models.randomness import Draws
from slotlab.training.processes import Ranks, join
from slotlab.training.step import TrainStep, freeze_unreached
from slotlab.training.train import train
from tests.training import PARTS, rows_of, small

UNREACHED = ("loss.feature_mse=0", "loss.temporal_similarity=0")  # by a loss: the decoder


CASES: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> preset, overrides
    "batch": ("dinosaur", PARTS[0]),
    "clips": ("dinosaur", PARTS[2]),
    "video": ("videosaur", ()),
    "unreached": ("videosaur", UNREACHED),
    "tracks": ("dynamics", ()),
}
RANK = """
import os, socket, sys, time
from pathlib import Path
from featcache.store.reading import FeatureStore
from slotlab.config.load import read_toml, validate
from slotlab.training.train import train

os.environ.update(MASTER_ADDR="localhost", TORCHELASTIC_USE_AGENT_STORE="False")  # a store of keys for each case
for case in sorted(Path(sys.argv[1]).iterdir()):
    port = case / "port"
    if os.environ["RANK"] == "0":
        with socket.create_server(("localhost", 0)) as free:
            port.with_suffix(".new").write_text(str(free.getsockname()[1]))
        port.with_suffix(".new").rename(port)
    while not port.exists():
        time.sleep(0.01)
    os.environ["MASTER_PORT"] = port.read_text()
    train(validate(read_toml(case / "config.toml"), ""), FeatureStore.open(case / "store.zarr"), case / "two")
"""


def case_config(name: str) -> Config:
    preset, parts = CASES[name]
    return small(*parts, "checkpoint_every=5", preset=preset, optim__steps=10)


@pytest.fixture(scope="module")
def ranks(
    shared_store: FeatureStore, shared_tracks: FeatureStore, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The runs of two processes, which train one case after the other: most of their time is their start."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, (preset, _) in CASES.items():
        (folder / name).mkdir()
        (folder / name / "config.toml").write_text(case_config(name).to_toml())
        (folder / name / "store.zarr").symlink_to((shared_tracks if preset == "dynamics" else shared_store).path)
    script = folder.with_suffix(".py")
    script.write_text(RANK)
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(script), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return {name: folder / name / "two" for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_the_run_of_one(
    tmp_path: Path, store_of: Callable[[str], FeatureStore], ranks: dict[str, Path], case: str
) -> None:
    """The video model's slots are also told from the other rank's (slot_contrast); that alone trains no decoder."""
    one, two = train(case_config(case), store_of(CASES[case][0]), tmp_path / "one"), ranks[case]
    np.testing.assert_allclose([r["loss"] for r in rows_of(two)], [r["loss"] for r in rows_of(one)], rtol=1e-4)
    a, b = (load_file(run / "checkpoint/model.safetensors") for run in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
    assert json.loads((two / "summary.json").read_text())["processes"] == 2


def test_each_rank_touches_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` would open the first one in every process; NCCL is told the device, or it guesses."""
    opened: list[str] = []
    joined: dict[str, Any] = {}

    def empty(*_: object, device: str) -> SimpleNamespace:
        opened.append(device)
        return SimpleNamespace(device=torch.device(device))

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: opened.append(str(device)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: joined.update(more, backend=backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    for name, value in {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    with join(pick_device("auto")) as ranks:
        assert ranks == Ranks(torch.device("cuda:1"), 5, 8)
    assert set(opened) == {"cuda:1"}
    assert joined == {"backend": "nccl", "device_id": torch.device("cuda:1")}


def test_ranks_do_not_send_what_all_have(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers: D x D numbers of a whitening, before every pass."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr("slotlab.training.step.DistributedDataParallel", lambda model, **more: asked.update(more))
    TrainStep.fresh(small(), store, Ranks(torch.device("cpu"), 0, 2))
    assert asked == {"broadcast_buffers": False}


def test_what_no_loss_reaches_is_not_trained(store: FeatureStore) -> None:
    """DDP would wait for its gradient."""
    config = small("loss.feature_mse=0", "loss.diversity=1", "model.decoder.kind=slot_mixer")
    model = build_model(config, store)
    freeze_unreached(model, config, store["train"].tokens("block1", 0)[:1], Draws(0))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = {name.split(".")[0] for name in trained}
    assert kept == {"project", "recur", "decode"}, "the masks are the decoder's"
    assert not any(name.startswith("decode.heads") for name in trained), "which need no tokens"
    assert all(parameter.grad is None for parameter in model.parameters())
