"""Training: a resumed run is the unbroken run, scale does not matter, and wrong uses are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.store import FeatureStore
from slotlab import checkpoint
from slotlab.config import Config, load_config, presets
from slotlab.evaluate import beats_floor, evaluate, load_run
from slotlab.train import train
from tests.synthetic import make_store

# What makes each kind of model small enough for the synthetic store (12 channels, a 4x4 grid).
SMALL = {
    "dinosaur": ("model.slot_dim=8", "model.decoder.hidden=16", "model.slot_mlp_hidden=16", "optim.learning_rate=1e-3"),
    "default": ("model.slot_dim=6", "model.hidden=16", "data.normalize=slow=8"),
}


def small(*overrides: str, preset: str = "dinosaur", **shorthands: Any) -> Config:
    defaults = {"optim__steps": 12, "optim__batch_size": 4, "model__slots": 4}
    common = ("log_every=1", "optim.warmup_steps=3")
    return load_config(preset, None, [*common, *SMALL[preset], *overrides], **(defaults | shorthands))


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("samples_per_second", "wait_share")} for row in rows]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_at", [3, 5, 11])
@pytest.mark.parametrize(
    ("preset", "parts"),
    [("dinosaur", ("model.decoder.kind=mix", "model.initializer=kmeans")), ("dinosaur", ()), ("default", ())],
)
def test_resumed_equals_unbroken_bit_for_bit(
    tmp_path: Path, store: FeatureStore, stop_at: int, preset: str, parts: tuple[str, ...]
) -> None:
    config = small("checkpoint_every=2", *parts, preset=preset)
    whole = train(config, store, tmp_path / "whole")

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == stop_at:
            raise Interrupted

    broken = tmp_path / "broken"
    with pytest.raises(Interrupted):
        train(config, store, broken, report=stop)
    train(config, store, broken, resume=True)
    for name in ("model", "optimizer"):
        a, b = (load_file(run / f"checkpoint/{name}.safetensors") for run in (whole, broken))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), f"{name} differs"
    assert rows_of(whole) == rows_of(broken)
    assert checkpoint.state(whole) == checkpoint.state(broken)


def test_a_seed_gives_a_run_and_another_seed_another(tmp_path: Path, store: FeatureStore) -> None:
    one, same, other = (
        rows_of(train(small(seed=seed), store, tmp_path / name)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == same != other


def test_loss_falls_below_the_mean_predictor(tmp_path: Path, store: FeatureStore) -> None:
    parts = ("model.slot_dim=32", "model.decoder.kind=mix", "model.initializer=kmeans", "optim.learning_rate=0.01")
    rows = rows_of(train(small(*parts, optim__steps=150), store, tmp_path / "run"))
    assert rows[-1]["feature_mse"] < 0.85 < rows[0]["feature_mse"], "1 is the mean predictor; the rest is noise"


@pytest.mark.parametrize("normalize", ["whiten", "channel", "scale", "slow=3"])
@pytest.mark.parametrize("factor", [0.2, 100.0])
def test_rescaled_features_train_the_same(tmp_path: Path, normalize: str, factor: float) -> None:
    results = []
    preset = "default" if normalize.startswith("slow") else "dinosaur"
    for scale in (1.0, factor):
        store = make_store(tmp_path / f"{scale}.zarr", scale=scale)
        run = train(small(f"data.normalize={normalize}", preset=preset), store, tmp_path / f"run-{scale}")
        results.append([row["loss"] for row in rows_of(run)])
    np.testing.assert_allclose(*results, rtol=2e-2)


@pytest.mark.parametrize("preset", presets())
def test_every_preset_trains_a_step(tmp_path: Path, store: FeatureStore, preset: str) -> None:
    fitted = ["data.normalize=slow=8"] if load_config(preset).data.normalize.startswith("slow") else []
    config = load_config(preset, None, ["model.slots=4", *fitted], optim__steps=1, optim__batch_size=2)
    run = train(config, store, tmp_path / "run")
    assert np.isfinite(rows_of(run)[-1]["loss"])
    assert evaluate(load_run(run))["frames"] == 8


def test_bfloat16_trains(tmp_path: Path, store: FeatureStore) -> None:
    exact = rows_of(train(small(), store, tmp_path / "a"))
    rounded = rows_of(train(small("optim.precision=bfloat16"), store, tmp_path / "b"))
    assert rounded != exact
    np.testing.assert_allclose([r["loss"] for r in rounded], [r["loss"] for r in exact], rtol=0.1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_the_same_training(tmp_path: Path, store: FeatureStore) -> None:
    losses = []
    for compiled in (False, True):
        config = small(f"optim.compile={str(compiled).lower()}", preset="default", optim__steps=3)
        losses.append([row["loss"] for row in rows_of(train(config, store, tmp_path / str(compiled)))])
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_int8_store_trains_like_float16(tmp_path: Path) -> None:
    losses = []
    for dtype in ("float16", "int8"):
        store = make_store(tmp_path / f"{dtype}.zarr", dtype=dtype)
        losses.append([row["loss"] for row in rows_of(train(small(), store, tmp_path / dtype))])
    np.testing.assert_allclose(*losses, rtol=5e-2)


def test_a_loss_that_is_not_finite_names_the_batch(tmp_path: Path, store: FeatureStore) -> None:
    with pytest.raises(DataError, match=r"step \d+ .*store rows \d+-\d+\); lower --set optim.learning_rate"):
        train(small("optim.learning_rate=1e30", "optim.warmup_steps=0"), store, tmp_path / "run")


def test_existing_and_missing_runs(tmp_path: Path, store: FeatureStore) -> None:
    run = train(small(optim__steps=1), store, tmp_path / "run")
    with pytest.raises(UsageError, match="exists already; add --resume"):
        train(small(optim__steps=1), store, run)
    with pytest.raises(UsageError, match="nothing to resume"):
        train(small(), store, tmp_path / "other", resume=True)
    with pytest.raises(IncompatibleError, match="model.slots: 4 then, 5 now"):
        train(small(model__slots=5, optim__steps=1), store, run, resume=True)


def test_another_stores_features_are_refused(tmp_path: Path, store: FeatureStore) -> None:
    run = train(small(optim__steps=1), store, tmp_path / "run")
    other = tmp_path / "other.zarr"
    make_store(other)
    attributes = json.loads((other / "zarr.json").read_text())
    attributes["attributes"]["featcache"]["preprocessing"]["size"] = 448
    (other / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(IncompatibleError, match=r"preprocessing.size: 32 then, 448 now"):
        load_run(run, other)
    int8 = make_store(tmp_path / "int8.zarr", dtype="int8").path
    assert load_run(run, int8).store.spec.dtype == "int8", "the same features in fewer bits are welcome"


def test_damaged_checkpoints_are_named(tmp_path: Path, store: FeatureStore) -> None:
    run = train(small(optim__steps=1), store, tmp_path / "run")
    weights = run / "checkpoint/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match=r"model.safetensors: damaged"):
        load_run(run)
    with pytest.raises(DataError, match="no checkpoint"):
        checkpoint.state(tmp_path)


def test_no_pickle_in_a_run(tmp_path: Path, store: FeatureStore) -> None:
    run = train(small(optim__steps=2), store, tmp_path / "run")
    suffixes = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert suffixes <= {".toml", ".json", ".jsonl", ".safetensors"}


def test_evaluation_has_the_promised_keys(tmp_path: Path, store: FeatureStore) -> None:
    result = evaluate(load_run(train(small(), store, tmp_path / "run")))
    assert {
        "run", "cache", "split", "frames", "videos", "fg_ari", "ari", "mbo", "miou", "fg_ari_video", "mbo_video",
        "skipped_frames", "reference", "floor", "by_material", "mask_similarity", "slot_similarity",
    } <= result.keys()  # fmt: skip
    assert set(result["floor"]) == {"kmeans_raw", "kmeans_whitened"}
    assert set(result["by_material"]) == {"metal", "rubber"}
    assert {"fg_ari", "mbo"} <= result["reference"].keys()
    assert result["reference"]["mbo"] > 0.3  # a 4x4 grid
    assert isinstance(beats_floor(result), bool)
    json.dumps(result)


def test_evaluation_repeats_itself(tmp_path: Path, store: FeatureStore) -> None:
    run = train(small(), store, tmp_path / "run")
    assert evaluate(load_run(run)) == evaluate(load_run(run))
