"""A resumed run is the unbroken run, bit for bit, and another run is not taken for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from featcache.errors import IncompatibleError, UsageError
from featcache.store.reading import FeatureStore
from slotlab.runs import checkpoint
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.training.train import train
from tests.synthetic import DiscSource, make_store
from tests.training import Interrupted, rows_of, small, stopping


@pytest.mark.parametrize("stop_at", [3, 5, 11])
@pytest.mark.parametrize(
    ("preset", "parts"),
    [
        ("dinosaur", ("model.decoder.kind=mix", "model.initializer=kmeans")),
        ("dinosaur", ("model.decoder.masks=gumbel", "model.decoder.patches=7")),
        ("default", ()),
        ("objects", ()),
        ("videosaur", ()),
    ],
)
def test_resumed_equals_unbroken_bit_for_bit(
    tmp_path: Path, store: FeatureStore, stop_at: int, preset: str, parts: tuple[str, ...]
) -> None:
    config = small("checkpoint_every=2", *parts, preset=preset)
    whole = train(config, store, tmp_path / "whole")
    broken = tmp_path / "broken"
    with pytest.raises(Interrupted):
        train(config, store, broken, report=stopping(stop_at))
    train(config, store, broken, resume=True)
    for name in ("model", "optimizer"):
        a, b = (load_file(run / f"checkpoint/{name}.safetensors") for run in (whole, broken))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), f"{name} differs"
    assert rows_of(whole) == rows_of(broken)
    assert checkpoint.state(whole) == checkpoint.state(broken)


def test_averaged_weights_are_resumed_and_evaluated(tmp_path: Path, store: FeatureStore) -> None:
    config = small("optim.ema=0.7", "checkpoint_every=4")
    whole = train(config, store, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, store, tmp_path / "broken", report=stopping(6))
    broken = train(config, store, tmp_path / "broken", resume=True)
    a, b = (load_file(run / "checkpoint/average.safetensors") for run in (whole, broken))
    assert all(torch.equal(a[key], b[key]) for key in a)
    last = load_file(whole / "checkpoint/model.safetensors")
    assert any(not torch.equal(a[key], last[key]) for key in a), "an average is not the last step"
    evaluated = load_run(whole).model.state_dict()
    assert all(torch.equal(evaluated[key], a[key]) for key in a)


def test_a_run_starts_from_another_s_parameters(tmp_path: Path, store: FeatureStore) -> None:
    first = train(small(), store, tmp_path / "first")
    scaled = make_store(tmp_path / "scaled.zarr", scale=10.0)
    frozen = small("optim.learning_rate=1e-12", optim__steps=1)
    second = train(frozen, scaled, tmp_path / "second", init_from=first)
    a, b = (load_file(run / "checkpoint/model.safetensors") for run in (first, second))
    learnt = [key for key in a if not key.startswith("normaliser")]
    assert all(torch.allclose(a[key], b[key], atol=1e-9) for key in learnt)
    assert not torch.allclose(a["normaliser.weight"], b["normaliser.weight"]), "the new store's own statistics"
    with pytest.raises(IncompatibleError, match="--init-from .*: another model"):
        train(small(model__slot_dim=5), store, tmp_path / "third", init_from=first)
    assert json.loads((second / "store.json").read_text())["init_from"] == str(first)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("kind", ["whiten=4", "slow=4"])
def test_directions_go_with_the_parameters_that_are_in_them(tmp_path: Path, store: FeatureStore, kind: str) -> None:
    """Begun from a run, another gives the same masks before it has learnt anything, on any store of such features."""
    first = train(small(f"data.normalize={kind}"), store, tmp_path / "first")
    other = make_store(tmp_path / "other.zarr", scale=10.0)
    frozen = small(f"data.normalize={kind}", "optim.learning_rate=1e-12", optim__steps=1)
    second = train(frozen, other, tmp_path / "second", init_from=first)
    a, b = (load_file(run / "checkpoint/model.safetensors") for run in (first, second))
    assert all(torch.equal(a[key], b[key]) for key in a if key.startswith("normaliser"))
    ours, theirs = (load_run(run, other.path).segment(other["validation"], 0).masks for run in (first, second))
    assert torch.allclose(ours, theirs, atol=1e-5)
    by_place = (f"data.normalize={kind}", "data.center=position")
    start = train(small(*by_place), store, tmp_path / "start")
    placed = train(
        small(*by_place, "optim.learning_rate=1e-12", optim__steps=1), other, tmp_path / "p", init_from=start
    )
    a, b = (load_file(run / "checkpoint/model.safetensors") for run in (start, placed))
    assert torch.equal(a["normaliser.weight"], b["normaliser.weight"])
    assert not torch.allclose(a["normaliser.shift"], b["normaliser.shift"]), "what a place looks like is the store's"
    stills = make_store(tmp_path / "stills.zarr", DiscSource(lengths={"train": (1,) * 8, "validation": (1,)}))
    train(small(f"data.normalize={kind}"), stills, tmp_path / "on_stills", init_from=first)  # in which nothing moves
    with pytest.raises(IncompatibleError, match=f"--init-from .*first: has data.normalize={kind}, not whiten=3; add"):
        train(small("data.normalize=whiten=3"), other, tmp_path / "third", init_from=first)
    centred = small(f"data.normalize={kind}", "data.center=position")
    with pytest.raises(IncompatibleError, match="has data.center=channel, not position"):
        train(centred, other, tmp_path / "third", init_from=first)
    assert not (tmp_path / "third").exists()


def test_a_resumed_start_begins_where_it_had_begun(tmp_path: Path, store: FeatureStore) -> None:
    """Before its first checkpoint a run starts again, with the parameters that --init-from had given it."""
    source = train(small(optim__steps=3, seed=5), store, tmp_path / "source")
    whole, broken = (train(small(optim__steps=2), store, tmp_path / n, init_from=source) for n in ("whole", "broken"))
    shutil.rmtree(broken / "checkpoint")
    train(small(optim__steps=2), store, broken, resume=True)
    assert [row["loss"] for row in rows_of(broken)] == [row["loss"] for row in rows_of(whole)]
    train(small(optim__steps=2), store, broken, resume=True, init_from=source)
    with pytest.raises(UsageError, match=r"--init-from .*whole: .*broken was begun with .*source; leave it out"):
        train(small(optim__steps=2), store, broken, resume=True, init_from=whole)


@pytest.mark.parametrize("other", ["default", "videosaur"])
def test_resuming_with_another_preset_says_what_differs(
    shared_run: Path, shared_store: FeatureStore, other: str
) -> None:
    with pytest.raises(IncompatibleError, match=r"another configuration \(.*model\."):
        train(small(preset=other), shared_store, shared_run, resume=True)


def test_a_run_goes_on_with_the_videos_it_was_begun_on(tmp_path: Path, store: FeatureStore) -> None:
    """Other videos of the same features are good enough to be scored, and to start from, but not to resume."""
    config = small("checkpoint_every=1", optim__steps=1)
    run = train(config, store, tmp_path / "run")
    fewer = make_store(tmp_path / "fewer.zarr", DiscSource({"train": (8, 8, 8), "validation": (8, 8)}))
    evaluate(load_run(run, fewer.path))
    with pytest.raises(IncompatibleError, match=r"fewer.zarr: not the videos that .*run was begun on") as caught:
        train(config, fewer, run, resume=True)
    assert {"videos", "frames"} <= {row.setting for row in caught.value.differences}


def test_existing_and_missing_runs(tmp_path: Path, shared_run: Path, shared_store: FeatureStore) -> None:
    with pytest.raises(UsageError, match="exists already; add --resume"):
        train(small(), shared_store, shared_run)
    with pytest.raises(UsageError, match="nothing to resume"):
        train(small(), shared_store, tmp_path / "other", resume=True)
    with pytest.raises(IncompatibleError, match="model.slots: 4 then, 5 now"):
        train(small(model__slots=5), shared_store, shared_run, resume=True)
