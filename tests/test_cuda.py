"""Training on a real GPU, where there is one: the run of the CPU, without a wait, with and without CUDA graphs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from featcache.backbones import inference
from featcache.backbones.backbone import load_backbone
from featcache.store.reading import FeatureStore
from featcache.stream.stream import Batch, FeatureStream
from slotlab.config.load import load_config, presets
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
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
def test_a_run_is_the_cpu_s(tmp_path: Path, store_of: Callable[[str], FeatureStore], preset: str) -> None:
    store = store_of(preset)
    config = load_config(preset, None, [*fitted(preset), "log_every=1"], optim__steps=4)
    here, there = (train(config, store, tmp_path / device, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(losses(here), losses(there), rtol=2e-2)
    assert evaluate(load_run(there, device="cuda")).summary.frames == store["validation"].frames


def test_tf32_is_float32_with_shorter_products(tmp_path: Path, store: FeatureStore) -> None:
    runs = []
    for precision in ("float32", "tf32"):
        overrides = [*fitted("dinosaur"), "log_every=1", f"optim.precision={precision}"]
        config = load_config("dinosaur", None, overrides, optim__steps=4)
        runs.append(losses(train(config, store, tmp_path / precision, device="cuda")))
    np.testing.assert_allclose(*runs, rtol=1e-2)
    assert runs[0] != runs[1] or torch.cuda.get_device_capability()[0] < 8


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("preset", ["default", "dinosaur", "log-2026-video", "mix"])
def test_graphs_change_nothing(tmp_path: Path, store: FeatureStore, preset: str) -> None:
    """Eight steps: a graph is recorded in the second or third."""
    runs = []
    for name, options in {"plain": (), "graphs": GRAPHS}.items():
        config = load_config(preset, None, [*fitted(preset), "log_every=1", *options], optim__steps=8)
        runs.append(losses(train(config, store, tmp_path / name, device="cuda")))
    np.testing.assert_allclose(*runs, rtol=1e-2)


@pytest.mark.parametrize("preset", [name for name in presets() if not load_config(name).model.on_host])
def test_the_loop_waits_at_logged_steps_alone(
    tmp_path: Path,
    store_of: Callable[[str], FeatureStore],
    preset: str,
    strict: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What :mod:`tests.test_step` shows of an absent GPU, of the second to the fifth step."""
    batches = FeatureStream.__iter__

    def watched(stream: FeatureStream) -> Iterator[Batch]:
        for index, batch in enumerate(batches(stream), 1):
            torch.cuda.set_sync_debug_mode("error" if 1 < index < 6 else "default")
            yield batch
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(FeatureStream, "__iter__", watched)
    config = load_config(preset, None, [*fitted(preset), "log_every=6", "data.residence=disk"], optim__steps=6)
    assert len(losses(train(config, store_of(preset), tmp_path / "run", device="cuda"))) == 2


def test_a_batch_of_frames_fits_by_what_one_takes() -> None:
    backbone = load_backbone("dinov2_vits14", weights="random", input_size=224, device="cuda")
    frame, total = inference._frame_memory(backbone, "float16"), torch.cuda.mem_get_info()[1]
    assert 2**20 < frame < 2**30
    size = inference.choose_batch_size(backbone, "float16")
    assert size == inference.choose_batch_size(backbone, "float16") and size * frame <= total // 2
