"""Stores and runs that an earlier version made: they open, verify, score, resume, copy and segment as they did.

How ``fixtures/v0.1`` was made stands in its README.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import slotlab
from featcache.errors import DataError
from featcache.scale.report import store_reports
from featcache.store.reading import FeatureStore
from featcache.upkeep.convert import ConvertOptions, convert
from featcache.upkeep.verify import verify
from slotlab.config.load import load_config
from slotlab.config.schema import Config
from slotlab.masks.labels import masks_to_labels
from slotlab.runs import checkpoint
from slotlab.runs.folder import read_rows, store_path
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.training.train import train
from tests import training
from tests.synthetic import DiscSource, tokens_of

MADE = Path(__file__).parent / "fixtures" / "v0.1"
STORES = {"float16": 2e-3, "int8": 2e-2}  # relative error of a stored token
RUNS = ("default", "default-plain", "dinosaur", "pixel-small")
ROUNDING = 2e-3  # of a score: a handful of pixels, where another build of torch rounds otherwise
SOURCE = DiscSource({"train": (4, 3, 2), "validation": (3, 2)})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, far from where the runs say that their stores lie."""
    return shutil.copytree(MADE, tmp_path_factory.mktemp("earlier") / "v0.1")


@pytest.mark.parametrize("name", STORES)
def test_a_store_holds_the_tokens_it_was_given(made: Path, name: str) -> None:
    path = made / f"{name}.zarr"
    assert verify(path) == []
    store = FeatureStore.open(path)
    assert store.spec.dtype == name and store.splits == SOURCE.splits()
    for split in SOURCE.splits():
        for index in range(len(SOURCE.lengths(split))):
            video, found = SOURCE.read(split, index), store[split].tokens("block1", index).float()
            error = (found - tokens_of(video)).abs() / tokens_of(video).abs().amax(-1, keepdim=True)
            assert float(error.max()) < STORES[name]
            assert np.array_equal(store[split].video(index), video.frames)
            assert np.array_equal(store[split].segmentations(index), video.segmentations)
            assert store[split].instances(index) == video.instances
    kept, again = store_reports(path), store_reports(path, recompute=True)
    assert kept[0].scale.std == pytest.approx(again[0].scale.std, rel=1e-9)


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("out", ["copy.zarr", "copy.h5"])
def test_a_store_is_exported(made: Path, tmp_path: Path, name: str, out: str) -> None:
    """To shards, or to HDF5 and back; nothing that is stored changes."""
    before, path = FeatureStore.open(made / f"{name}.zarr"), tmp_path / out
    convert(before.path, path, ConvertOptions(shard_videos=2) if path.suffix == ".zarr" else ConvertOptions())
    if path.suffix == ".h5":
        convert(path, tmp_path / "back.zarr", ConvertOptions())
        path = tmp_path / "back.zarr"
    assert verify(path) == []
    after = FeatureStore.open(path)
    for split in before.splits:
        for index in before[split].videos:
            assert before[split].tokens("block1", index).equal(after[split].tokens("block1", index))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_scores_the_same(made: Path, name: str) -> None:
    run = made / name
    kept = json.loads((run / "eval-validation.json").read_text())
    assert_same(json.loads(json.dumps(evaluate(load_run(run)).as_dict())), kept)


def assert_same(found: Any, kept: Any, where: str = "") -> None:
    """Every key and number of ``kept``, but for places, words and the digest of the code. ``found`` may have more."""
    if isinstance(kept, dict):
        for key, value in kept.items():
            if key not in ("run", "cache", "code", "warnings"):
                assert key in found, f"{where}.{key}"
                assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(kept, list):
        assert len(found) == len(kept), where
        for index, (one, other) in enumerate(zip(found, kept, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(kept, float):
        assert found == pytest.approx(kept, abs=ROUNDING, rel=ROUNDING), where
    else:
        assert found == kept, where


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_masks_it_gave(made: Path, name: str) -> None:
    loaded = load_run(made / name)
    split = loaded.store["validation"]
    kept = np.stack([np.asarray(Image.open(path)) for path in sorted((made / name / "masks").rglob("*.png"))])
    masks = loaded.segment(split, 0).masks_on_grid
    found = [masks_to_labels(masks, split.spec.frame_size).numpy()]
    if name == "pixel-small":  # needs no backbone
        found.append(slotlab.load(made / name, device="cpu").label(split.video(0)))
    for labels in found:
        assert labels.shape == kept.shape and (labels == kept).mean() > 0.99


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes(made: Path, name: str) -> None:
    """From its checkpoint of step 3, to the losses and the scores that the earlier version came to."""
    run = shutil.copytree(made / name, made / f"{name}-resumed")
    kept = json.loads((run / "resumed.json").read_text())
    train(checkpoint.load_run_config(run), FeatureStore.open(store_path(run)), run, resume=True)
    assert [row["loss"] for row in read_rows(run / "metrics.jsonl")] == pytest.approx(kept.pop("loss"), rel=1e-4)
    assert_same(evaluate(load_run(run)).as_dict(), kept)


# -- settings that are gone ----------------------------------------------------------------------------------

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
    told = [evaluate(load_run(run)).warnings for run in (fitted, never)]
    assert "made by a version that gave short-lived slots to the background" in told[0][0]
    assert told[0][1:] == told[1], "where it was off, nothing differs"
    one, other = (load_run(run).segment(store["validation"], 0) for run in (fitted, never))
    assert torch.equal(one.masks, other.masks)


def test_a_run_with_a_setting_that_is_gone_says_what_differs(tmp_path: Path, store: FeatureStore) -> None:
    run = train(training.small(preset="objects", optim__steps=2), store, tmp_path / "run")
    assert evaluate(load_run(run)).warnings == []
    config = run / "config.toml"
    config.write_text(config.read_text().replace("[model]\n", "[model]\nshare_weight = 0.5\n"))
    (told,) = evaluate(load_run(run)).warnings
    assert told.startswith("made by a version in which a slot's share of the whole frame counted")


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
