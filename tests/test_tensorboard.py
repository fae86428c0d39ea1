"""Logged rows as TensorBoard events."""

from __future__ import annotations

from pathlib import Path

import pytest

from featcache.errors import IncompatibleError
from featcache.store.reading import FeatureStore
from slotlab.training.tensorboard import events
from slotlab.training.train import train
from tests.training import Interrupted, rows_of, small, stopping


def test_tensorboard_has_every_number_once(tmp_path: Path, store: FeatureStore) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small("checkpoint_every=4", "evaluate_every=6")
    run = tmp_path / "run"
    stop = stopping(6)
    with pytest.raises(Interrupted), events(run, False) as write:
        train(config, store, run, report=lambda row: (write(row), stop(row)))  # type: ignore[func-returns-value]
    with events(run, True) as write:
        train(config, store, run, resume=True, report=write)
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    logged = {e.step: e.value for e in read.Scalars("train/loss")}
    assert logged == pytest.approx({row["step"]: row["loss"] for row in rows_of(run)})
    assert [e.step for e in read.Scalars("eval/fg_ari")] == [6, 12]


def test_a_refused_run_leaves_no_events(tmp_path: Path, store: FeatureStore) -> None:
    with pytest.raises(IncompatibleError), events(tmp_path / "run", False) as write:
        train(small("data.tap=block99"), store, tmp_path / "run", report=write)
    assert not (tmp_path / "run").exists()
