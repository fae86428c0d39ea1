"""Training on a real GPU, where there is one: the run of the CPU, without a wait, with and without CUDA graphs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from featcache.store.reading import FeatureStore
from slotlab.config.load import load_config, presets
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.training.speed import Trainee
from slotlab.training.train import train
from tests.synthetic import fitted, make_store

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GRAPHS = ("optim.compile=true", "optim.cuda_graphs=true")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("cuda") / "store.zarr")


@pytest.fixture
def strict() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("preset", presets())
def test_a_run_is_the_cpu_s(tmp_path: Path, store: FeatureStore, preset: str) -> None:
    config = load_config(preset, None, [*fitted(preset), "log_every=1"], optim__steps=4)
    here, there = (train(config, store, tmp_path / device, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(losses(here), losses(there), rtol=2e-2)
    assert evaluate(load_run(there, device="cuda")).summary.frames == 8


@pytest.mark.parametrize("preset", ["default", "dinosaur", "log-2026"])
def test_graphs_change_nothing(tmp_path: Path, store: FeatureStore, preset: str) -> None:
    """Eight steps: a graph is recorded in the second or third."""
    runs = []
    for name, options in {"plain": (), "graphs": GRAPHS}.items():
        config = load_config(preset, None, [*fitted(preset), "log_every=1", *options], optim__steps=8)
        runs.append(losses(train(config, store, tmp_path / name, device="cuda")))
    np.testing.assert_allclose(*runs, rtol=1e-2)


@pytest.mark.parametrize("preset", presets())
def test_a_step_does_not_wait(store: FeatureStore, preset: str, strict: None) -> None:
    """What :mod:`tests.test_step` shows of an absent GPU."""
    config = load_config(preset, None, fitted(preset))
    trainee = Trainee(config, store, torch.device("cuda"))
    tokens = store["train"].video(0) if config.data.tap == "video" else store["train"].tokens("block1", 0)
    clip = torch.as_tensor(tokens)[: config.data.clip].cuda()
    batch = torch.stack([clip, clip]) if config.data.clip > 1 else torch.cat([clip, clip])
    trainee.step(batch)  # allocates, and makes libraries ready
    torch.cuda.set_sync_debug_mode("error")
    trainee.step(batch)
