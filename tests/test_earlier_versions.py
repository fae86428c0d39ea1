"""Runs of earlier versions: their settings, and the tensors of their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featcache.errors import DataError
from featcache.store.reading import FeatureStore
from slotlab.config.load import load_config
from slotlab.config.schema import Config
from slotlab.runs import checkpoint
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.training.train import train

SMALL = ("data.normalize=slow=8", "data.clip=2", "model.slots=4", "model.slot_dim=8", "model.hidden=16")
GONE = "lasting_frames = 8\nlasting_threshold = 0.8\nflow_radius = 0.34\nprior_floor = 0.05\n"


def small() -> Config:
    return load_config("default", None, SMALL, optim__steps=4, optim__batch_size=4, log_every=1, checkpoint_every=2)


def aged(run: Path, lasting: float) -> Path:
    """The run as the first version left it: with settings that are constants now, and a readout that is gone."""
    config = run / "config.toml"
    config.write_text(config.read_text().replace("[model]\n", f"[model]\n{GONE}"))
    weights = checkpoint.folder(run) / checkpoint.MODEL
    tensors = load_file(weights)
    save_file(tensors | {"lasting.weight": torch.full((8,), lasting), "lasting.bias": torch.ones(())}, weights)
    return run


def test_a_run_of_the_first_version_opens_and_says_what_differs(tmp_path: Path, store: FeatureStore) -> None:
    fitted, never = (aged(train(small(), store, tmp_path / name), lasting) for name, lasting in (("a", 0.5), ("b", 0)))
    told = [evaluate(load_run(run))["warnings"] for run in (fitted, never)]
    assert "made by a version that gave slots of what soon passes to the background" in told[0][0]
    assert told[0][1:] == told[1], "where it was off, nothing differs"
    one, other = (load_run(run).segment(store["validation"], 0) for run in (fitted, never))
    assert torch.equal(one.masks, other.masks)


def test_a_run_of_the_first_version_resumes(tmp_path: Path, store: FeatureStore) -> None:
    whole, run = train(small(), store, tmp_path / "whole"), tmp_path / "run"

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(), store, run, report=stop)
    train(small(), store, aged(run, 0.5), resume=True)
    one, other = (load_file(checkpoint.folder(path) / checkpoint.MODEL) for path in (whole, run))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_setting_that_meant_something_else_is_named(tmp_path: Path, store: FeatureStore) -> None:
    run = aged(train(small(), store, tmp_path / "run"), 0.5)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("flow_radius = 0.34", "flow_radius = 0.5"))
    with pytest.raises(DataError, match=r"config\.toml: model\.flow_radius: is fixed at 0\.34 now; leave it out"):
        load_run(run)
