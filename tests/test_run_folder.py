"""The folder of a run: where its store is found, and what damage and other stores are taken for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featcache.errors import DataError, IncompatibleError
from featcache.store.reading import FeatureStore
from slotlab.runs import checkpoint
from slotlab.runs.folder import keep_result, read_result, read_rows, write_result
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.training.train import train
from tests.synthetic import make_store
from tests.training import small


def test_a_run_finds_its_store_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, after it has moved, and after both have; when the store alone moves it says what to do."""
    (tmp_path / "here/deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    train(small(optim__steps=1), make_store(Path("store.zarr")), Path("runs/one"))
    assert load_run(Path("runs/one")).store.path == Path("store.zarr")
    monkeypatch.chdir(tmp_path / "here/deeper")
    assert load_run(Path("../runs/one")).store.path == tmp_path / "here/store.zarr"
    (tmp_path / "here").rename(tmp_path / "there")
    assert load_run(tmp_path / "there/runs/one").store.path == tmp_path / "there/store.zarr"
    train(small(optim__steps=1), FeatureStore.open(tmp_path / "there/store.zarr"), tmp_path / "there/two")
    (tmp_path / "there/two").rename(tmp_path / "two")
    assert load_run(tmp_path / "two").store.path == tmp_path / "there/store.zarr"
    (tmp_path / "there/store.zarr").rename(tmp_path / "other.zarr")
    with pytest.raises(DataError, match=r"two: was trained on .*store.zarr, which is not there; say .* with --cache"):
        load_run(tmp_path / "two")


def test_another_store_does_not_mean_another_tap(tmp_path: Path) -> None:
    """A run that was given no tap has read the first of its store; elsewhere it reads the same, wherever it stands."""
    one, both = (make_store(tmp_path / f"{len(t)}.zarr", taps=t) for t in (("block1",), ("block0", "block1")))
    run = train(small("checkpoint_every=4", optim__steps=4), one, tmp_path / "run")
    here, there = (evaluate(load_run(run, store.path)) for store in (one, both))
    assert here.tap == there.tap == "block1" and here.values == there.values
    with pytest.raises(IncompatibleError, match=r"data.tap: block1 then, block0 now"):
        train(small("checkpoint_every=4", optim__steps=4), both, run, resume=True)
    with pytest.raises(IncompatibleError, match="no tap 'block1'; it has: block0"):
        load_run(run, make_store(tmp_path / "none.zarr", taps=("block0",)).path)


def test_a_store_json_of_an_earlier_version_or_damaged(run: Path, shared_store: FeatureStore) -> None:
    note = json.loads((run / "store.json").read_text())
    del note["from_run"]
    (run / "store.json").write_text(json.dumps(note))
    assert load_run(run).store.path == shared_store.path
    for damaged in ("{", "[]", "{}", '{"path": 3, "identity": {}, "spec": {}}'):
        (run / "store.json").write_text(damaged)
        with pytest.raises(DataError, match=r"store.json: missing, damaged or of an earlier version"):
            load_run(run)


def test_averaged_weights_that_are_gone_are_missed(tmp_path: Path, store: FeatureStore) -> None:
    """And the others not taken in their place."""
    run = train(small("optim.ema=0.9", optim__steps=2), store, tmp_path / "run")
    (run / "checkpoint/average.safetensors").unlink()
    with pytest.raises(DataError, match=r"average.safetensors: damaged .* restore the file"):
        load_run(run)


def test_an_unfinished_run_and_another_store_are_not_taken_for_the_runs_own(
    tmp_path: Path, store: FeatureStore
) -> None:
    run = train(small(optim__steps=2), store, tmp_path / "run")
    other = make_store(tmp_path / "other.zarr")
    keep_result(run, other, {"split": "validation"})
    assert not (run / "eval-validation.json").exists()
    state = run / "checkpoint/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 1}))
    result = evaluate(load_run(run)).as_dict()
    assert result["warnings"][0] == "the run is not finished: its checkpoint is of step 1 of 2"
    assert keep_result(run, store, result) == []
    kept = run / "eval-validation.json"
    assert json.loads(kept.read_text())["step"] == 1
    kept.unlink()
    kept.mkdir()  # as good as a folder that cannot be written
    assert keep_result(run, store, result) == [f"{kept}: cannot be written (Is a directory), so the result is not kept"]


def test_a_damaged_log_names_the_line(run: Path) -> None:
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines, lines[-1][:20] + "}"]))  # the last line of a crash
    assert len(read_rows(log)) == len(lines)
    log.write_text("\n".join([lines[0][:20] + "}", *lines[1:]]))
    with pytest.raises(DataError, match="line 1: damaged"):
        read_rows(log)
    log.write_text("\n".join([*lines, '{"loss": 1}']))
    assert len(read_rows(log)) == len(lines)
    log.write_text("\n".join(['{"loss": 1}', *lines]))
    with pytest.raises(DataError, match="line 1: damaged"):
        read_rows(log)


def test_another_stores_features_are_refused(tmp_path: Path, shared_run: Path) -> None:
    other = tmp_path / "other.zarr"
    make_store(other)
    attributes = json.loads((other / "zarr.json").read_text())
    spec = attributes["attributes"]["featcache"]
    spec["preprocessing"]["size"], spec["taps"]["block1"]["dim"] = 448, 24
    (other / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(
        IncompatibleError, match=r"block1 dim: store 24, asked 12; preprocessing.size: store 448, asked"
    ):
        load_run(shared_run, other)
    spec["preprocessing"], spec["taps"]["block1"]["dim"] = {"size": 32, "fit": "pad", "margin": [1, 2, 3]}, 12
    (other / "zarr.json").write_text(json.dumps(attributes))
    assert load_run(shared_run, other), "the same features of another part of the frame are welcome"
    int8 = make_store(tmp_path / "int8.zarr", dtype="int8").path
    assert load_run(shared_run, int8).store.spec.dtype == "int8", "the same features in fewer bits are welcome"


def test_damaged_checkpoints_are_named(tmp_path: Path, run: Path) -> None:
    weights = run / "checkpoint/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match=r"model.safetensors: damaged"):
        load_run(run)
    with pytest.raises(DataError, match="no checkpoint"):
        checkpoint.state(tmp_path)


def test_no_pickle_in_a_run(shared_run: Path) -> None:
    suffixes = {path.suffix for path in shared_run.rglob("*") if path.is_file()}
    assert suffixes <= {".toml", ".json", ".jsonl", ".safetensors"}


def test_a_result_is_read_as_it_was_written_and_damage_is_named(tmp_path: Path) -> None:
    assert read_result(tmp_path, "validation") is None
    write_result(tmp_path, {"split": "validation", "mbo": 0.5})
    write_result(tmp_path, {"split": "validation", "mbo": 0.25}, "robustness")
    assert read_result(tmp_path, "validation") == {"split": "validation", "mbo": 0.5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval-validation.json", "robustness-validation.json"]
    for damaged in ('{"split": "vali', "[1, 2]", ""):
        (tmp_path / "eval-validation.json").write_text(damaged)
        with pytest.raises(DataError, match=r"eval-validation\.json: damaged .*; delete it"):
            read_result(tmp_path, "validation")
