"""Training: a resumed run is the unbroken run, scale does not matter, and wrong uses are refused."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.store.reading import FeatureStore
from featcache.stream.stream import FeatureStream
from slotlab.commands import terminal
from slotlab.commands.tables import scores_table
from slotlab.config.load import load_config, presets
from slotlab.config.schema import Config
from slotlab.models.build import build_model
from slotlab.models.randomness import Draws
from slotlab.runs import checkpoint
from slotlab.runs.folder import keep_result, read_rows
from slotlab.runs.loaded import load_run
from slotlab.scoring.collapse import NAMES
from slotlab.scoring.evaluate import evaluate
from slotlab.training.processes import Ranks
from slotlab.training.schedule import learning_rate, make_schedule, update_average, warmup_steps
from slotlab.training.step import freeze_unreached
from slotlab.training.tensorboard import events
from slotlab.training.train import train, training_stream
from tests.synthetic import DiscSource, fitted, make_store

# What makes each kind of model small enough for the synthetic store (12 channels, a 4x4 grid).
SMALL = {
    "dinosaur": ("model.slot_dim=8", "model.decoder.hidden=16", "model.slot_mlp_hidden=16", "optim.learning_rate=1e-3"),
    "default": ("model.slot_dim=6", "model.hidden=16", "data.normalize=slow=8"),
    "videosaur": (
        "data.clip=2",
        "model.slot_dim=8",
        "model.projection_hidden=16",
        "model.decoder.hidden=16",
        "model.predictor.hidden=16",
        "loss.feature_mse=1.0",
        "loss.slot_contrast=0.1",
    ),
}


def small(*overrides: str, preset: str = "dinosaur", **shorthands: Any) -> Config:
    defaults = {"optim__steps": 12, "optim__batch_size": 4, "model__slots": 4}
    common = ("log_every=1", "optim.warmup_steps=3")
    return load_config(preset, None, [*common, *SMALL[preset], *overrides], **(defaults | shorthands))


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("samples_per_second", "wait_share", "seconds")} for row in rows]


COMPILED = ("optim.compile=true",)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_at", [3, 5, 11])
@pytest.mark.parametrize(
    ("preset", "parts"),
    [
        ("dinosaur", ("model.decoder.kind=mix", "model.initializer=kmeans")),
        ("dinosaur", ("model.decoder.masks=gumbel", "model.decoder.patches=7")),
        ("default", ()),
        ("videosaur", ()),
    ],
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
@pytest.mark.parametrize("factor", [0.2, 1.55, 100.0])
def test_rescaled_features_train_the_same(tmp_path: Path, normalize: str, factor: float) -> None:
    results = []
    preset = "default" if normalize.startswith("slow") else "dinosaur"
    for scale in (1.0, factor):
        store = make_store(tmp_path / f"{scale}.zarr", scale=scale)
        run = train(small(f"data.normalize={normalize}", preset=preset), store, tmp_path / f"run-{scale}")
        results.append([row["loss"] for row in rows_of(run)])
    np.testing.assert_allclose(*results, rtol=2e-2)


def test_channels_rescaled_each_by_its_own_factor_train_the_same(tmp_path: Path) -> None:
    factors = 2.0 ** (np.arange(12) - 5)  # exact in float16, so that nothing is rounded on the way
    results = []
    for name, scale in (("plain", np.ones(12)), ("rescaled", factors)):
        store = make_store(tmp_path / f"{name}.zarr", scale=scale)
        run = train(small("data.normalize=channel"), store, tmp_path / name)
        scores = evaluate(load_run(run)).values
        results.append([row["loss"] for row in rows_of(run)] + [scores["fg_ari"], scores["mbo"]])
    np.testing.assert_allclose(*results, rtol=1e-5)


@pytest.mark.parametrize("preset", presets())
def test_every_preset_trains_a_step(tmp_path: Path, store: FeatureStore, preset: str) -> None:
    config = load_config(preset, None, fitted(preset), optim__steps=1)
    run = train(config, store, tmp_path / "run")
    assert np.isfinite(rows_of(run)[-1]["loss"])
    assert evaluate(load_run(run)).summary.frames == 8


def test_two_frames_of_a_clip_are_drawn_before_they_are_read(store: FeatureStore) -> None:
    """By the step alone, as all its draws: in every share of a batch the same, and after a resumption."""
    config = small("data.clip=3", "data.normalize=slow=8", "seed=5", preset="default")
    split, device = store["train"], torch.device("cpu")
    whole = iter(FeatureStream(split, "block1", batch_size=4, clip=3, seed=5))
    halves = [training_stream(config, store, Ranks(device, rank, 2)) for rank in range(2)]
    resumed = training_stream(config, store, Ranks(device))
    resumed.load_state_dict({"samples_seen": 2 * 4, "seed": 5})
    later = iter(resumed)
    pairs = set()
    for step, *parts in zip(range(5), *halves, strict=False):
        pair = Draws.of_step(5, step).integers(3, 2)
        expected = next(whole).features[:, pair]
        assert torch.equal(torch.cat([part.features for part in parts]), expected)
        assert step < 2 or torch.equal(next(later).features, expected)
        pairs.add(tuple(pair.tolist()))
    assert len(pairs) > 2


def test_bfloat16_trains(tmp_path: Path, store: FeatureStore) -> None:
    exact = rows_of(train(small(), store, tmp_path / "a"))
    rounded = rows_of(train(small("optim.precision=bfloat16"), store, tmp_path / "b"))
    assert rounded != exact
    np.testing.assert_allclose([r["loss"] for r in rounded], [r["loss"] for r in exact], rtol=0.1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_the_same_training(tmp_path: Path, store: FeatureStore) -> None:
    """With CUDA graphs, too, which a CPU has none of: the loop around them is the same."""
    losses = []
    for name, options in {"plain": (), "compiled": COMPILED, "graphs": (*COMPILED, "optim.cuda_graphs=true")}.items():
        config = small(*options, preset="default", optim__steps=3)
        losses.append([row["loss"] for row in rows_of(train(config, store, tmp_path / name))])
    np.testing.assert_allclose(losses[1:], losses[:1] * 2, rtol=1e-3)


def test_int8_store_trains_like_float16(tmp_path: Path) -> None:
    losses = []
    for dtype in ("float16", "int8"):
        store = make_store(tmp_path / f"{dtype}.zarr", dtype=dtype)
        losses.append([row["loss"] for row in rows_of(train(small(), store, tmp_path / dtype))])
    np.testing.assert_allclose(*losses, rtol=5e-2)


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_loss_that_is_not_finite_names_the_batch(tmp_path: Path, store: FeatureStore, log_every: int) -> None:
    """The first bad step is told, however late it is noticed; and nothing of it is saved."""
    overrides = (f"log_every={log_every}", "optim.learning_rate=1e30", "optim.warmup_steps=0")
    message = r"not finite at step 2 \(samples that begin at store rows \[\d+, \d+, \d+, \d+\]\); lower --set"
    with pytest.raises(DataError, match=message):
        train(small(*overrides), store, tmp_path / "run")
    assert not checkpoint.exists(tmp_path / "run")


def test_averaged_weights_are_resumed_and_evaluated(tmp_path: Path, store: FeatureStore) -> None:
    config = small("optim.ema=0.7", "checkpoint_every=4")
    whole = train(config, store, tmp_path / "whole")

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(config, store, tmp_path / "broken", report=stop)
    broken = train(config, store, tmp_path / "broken", resume=True)
    a, b = (load_file(run / "checkpoint/average.safetensors") for run in (whole, broken))
    assert all(torch.equal(a[key], b[key]) for key in a)
    last = load_file(whole / "checkpoint/model.safetensors")
    assert any(not torch.equal(a[key], last[key]) for key in a), "an average is not the last step"
    evaluated = load_run(whole).model.state_dict()
    assert all(torch.equal(evaluated[key], a[key]) for key in a)


UNREACHED = ("loss.feature_mse=0", "loss.temporal_similarity=0")  # by a loss: the decoder
PARTS = (
    ("model.decoder.kind=mix", "model.initializer=kmeans"),
    ("model.initializer=gaussian",),
    ("model.initializer=gaussian", "model.fewest_slots=2"),
)


@pytest.mark.parametrize("parts", PARTS)
def test_accumulated_parts_are_the_whole_batch(tmp_path: Path, store: FeatureStore, parts: tuple[str, ...]) -> None:
    runs = [train(small(*parts, f"optim.accumulate={n}"), store, tmp_path / str(n)) for n in (1, 2, 4)]
    losses = [[row["loss"] for row in rows_of(run)] for run in runs]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-4)
    with pytest.raises(UsageError, match="cannot be shared by 1 processes in 3 parts"):
        train(small(*parts, "optim.accumulate=3"), store, tmp_path / "3")
    assert not (tmp_path / "3").exists(), "what cannot be trained leaves no folder that a better try would meet"


@pytest.mark.parametrize(
    ("preset", "parts"),
    [("dinosaur", PARTS[0]), ("dinosaur", PARTS[2]), ("videosaur", ()), ("videosaur", UNREACHED)],
)
def test_two_ranks_train_the_run_of_one(
    tmp_path: Path, store: FeatureStore, preset: str, parts: tuple[str, ...]
) -> None:
    """The video model's slots are also told from the other rank's (slot_contrast); that alone trains no decoder."""
    config = small(*parts, "checkpoint_every=5", preset=preset, optim__steps=10)
    one = train(config, store, tmp_path / "one")
    (tmp_path / "config.toml").write_text(config.to_toml())
    code = (
        "import sys; from pathlib import Path; from slotlab.config.load import read_toml, validate; "
        "from slotlab.training.train import train; from featcache.store.reading import FeatureStore; "
        "here = Path(sys.argv[1]); "
        "train(validate(read_toml(here / 'config.toml'), ''), FeatureStore.open(sys.argv[2]), here / 'two')"
    )
    (tmp_path / "ranks.py").write_text(code)
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(tmp_path / "ranks.py"), str(tmp_path), str(store.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    two = tmp_path / "two"
    np.testing.assert_allclose([r["loss"] for r in rows_of(two)], [r["loss"] for r in rows_of(one)], rtol=1e-4)
    a, b = (load_file(run / "checkpoint/model.safetensors") for run in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
    assert json.loads((two / "summary.json").read_text())["processes"] == 2


def test_what_no_loss_reaches_is_not_trained(store: FeatureStore) -> None:
    """DDP would wait for its gradient."""
    config = small("loss.feature_mse=0", "loss.diversity=1", "model.decoder.kind=slot_mixer")
    model = build_model(config, store)
    freeze_unreached(model, config, store)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = {name.split(".")[0] for name in trained}
    assert kept == {"project", "recur", "decode"}, "the masks are the decoder's"
    assert not any(name.startswith("decode.heads") for name in trained), "which need no tokens"
    assert all(parameter.grad is None for parameter in model.parameters())


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
def test_resuming_with_another_preset_says_what_differs(tmp_path: Path, store: FeatureStore, other: str) -> None:
    run = train(small(optim__steps=1), store, tmp_path / "run")
    with pytest.raises(IncompatibleError, match=r"another configuration \(.*model\."):
        train(small(preset=other, optim__steps=1), store, run, resume=True)


def test_a_store_json_of_an_earlier_version_or_damaged(tmp_path: Path, store: FeatureStore) -> None:
    run = train(small(optim__steps=1), store, tmp_path / "run")
    note = json.loads((run / "store.json").read_text())
    del note["from_run"]
    (run / "store.json").write_text(json.dumps(note))
    assert load_run(run).store.path == store.path
    for damaged in ("{", "[]", "{}", '{"path": 3, "identity": {}, "spec": {}}'):
        (run / "store.json").write_text(damaged)
        with pytest.raises(DataError, match=r"store.json: missing, damaged or of an earlier version"):
            load_run(run)


def test_averaged_weights_forget_how_they_began() -> None:
    """Even where the run is short beside 1 / (1 - ema) steps; in a long one the decay is what was asked for."""
    average, model = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, value in ((average, 1.0), (model, 0.0)):
        nn.init.constant_(module.weight, value)
    optim = small("optim.ema=0.999").optim
    for step in range(1, 201):
        update_average(average, model, optim, step)
    assert 0 < average.weight.item() < 1e-6
    nn.init.constant_(average.weight, 1.0)
    update_average(average, model, optim, 100_000)
    assert average.weight.item() == pytest.approx(0.999)


def test_looks_at_the_masks_are_logged(tmp_path: Path, store: FeatureStore) -> None:
    config = small("evaluate_every=6", "evaluate_videos=2")
    rows = rows_of(train(config, store, tmp_path / "run"))
    seen = [row for row in rows if "eval_fg_ari" in row]
    assert [row["step"] for row in seen] == [6, 12]
    whole = evaluate(load_run(tmp_path / "run")).as_dict()
    last = seen[-1]
    assert last["eval_fg_ari"] == pytest.approx(whole["fg_ari"], abs=1e-6), "the store has two validation videos"
    assert last["eval_mask_similarity"] == pytest.approx(whole["mask_similarity"], abs=1e-6)
    assert last["eval_largest_activation_by_slot"] == pytest.approx(whole["largest_activation_by_slot"], abs=1e-6)
    assert np.mean(whole["largest_activation_by_slot"]) == pytest.approx(whole["largest_activation"], abs=1e-6)
    by_frame = last["eval_diagnostics_by_frame"]
    assert set(by_frame) == set(NAMES)
    for name, values in by_frame.items():
        assert values == pytest.approx(whole["diagnostics_by_frame"][name], abs=1e-6)
        assert len(values) == 4 and np.mean(values) == pytest.approx(whole[name], rel=1e-5)
    plain = rows_of(train(small(), store, tmp_path / "plain"))
    assert [row["loss"] for row in plain] == [row["loss"] for row in rows], "looking changes nothing"


BREAKING = ("optim.learning_rate=1e38", "optim.warmup_steps=0")  # the first gradient is finite, what it leaves is not


def test_a_run_whose_masks_break_at_a_look_says_so_and_ends(tmp_path: Path, store: FeatureStore) -> None:
    with pytest.raises(DataError, match=r"masks are not finite: it diverged; .* lower optim.learning_rate"):
        train(small("evaluate_every=1", *BREAKING, optim__steps=1), store, tmp_path / "run")
    assert not (tmp_path / "run/summary.json").exists() and not (tmp_path / "run/checkpoint").exists()


def test_an_update_that_breaks_the_model_is_not_saved(tmp_path: Path, store: FeatureStore) -> None:
    """Its own loss was finite, so only the next would have told."""
    bad = tmp_path / "bad"
    with pytest.raises(DataError, match=r"bad: step 1 broke the model; lower --set optim.learning_rate"):
        train(small(*BREAKING, optim__steps=1), store, bad)
    assert not (bad / "checkpoint").exists() and not (bad / "summary.json").exists()
    run = train(small(optim__steps=1), store, tmp_path / "run")
    weights = run / "checkpoint/model.safetensors"  # as an earlier version would have saved them
    save_file({key: torch.full_like(value, torch.nan) for key, value in load_file(weights).items()}, weights)
    with pytest.raises(DataError, match=r"masks are not finite: it diverged"):
        evaluate(load_run(run))


def test_averaged_weights_that_are_gone_are_missed(tmp_path: Path, store: FeatureStore) -> None:
    """And the others not taken in their place."""
    run = train(small("optim.ema=0.9", optim__steps=2), store, tmp_path / "run")
    (run / "checkpoint/average.safetensors").unlink()
    with pytest.raises(DataError, match=r"average.safetensors: damaged .* restore the file"):
        load_run(run)


def test_a_run_goes_on_with_the_videos_it_was_begun_on(tmp_path: Path, store: FeatureStore) -> None:
    """Other videos of the same features are good enough to be scored, and to start from, but not to resume."""
    config = small("checkpoint_every=1", optim__steps=1)
    run = train(config, store, tmp_path / "run")
    fewer = make_store(tmp_path / "fewer.zarr", DiscSource({"train": (8, 8, 8), "validation": (8, 8)}))
    evaluate(load_run(run, fewer.path))
    with pytest.raises(IncompatibleError, match=r"fewer.zarr: not the videos that .*run was begun on") as caught:
        train(config, fewer, run, resume=True)
    assert {"videos", "frames"} <= {row.setting for row in caught.value.differences}


def test_a_split_that_is_not_whole_is_not_looked_at(tmp_path: Path) -> None:
    """Said before training, and before there is a folder."""
    store = make_store(tmp_path / "store.zarr")
    (store.path / "validation/manifest.jsonl").write_text("")
    config = small("evaluate_every=2", optim__steps=2)
    with pytest.raises(DataError, match=r"validation: extraction unfinished \(0 of 2 videos\)"):
        train(config, FeatureStore.open(store.path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_rate_grows_with_the_batch_and_the_warm_up_counts_samples() -> None:
    optim = small("optim.reference_batch=64", "optim.warmup_samples=640").optim
    for batch, scaling, factor in ((64, "sqrt", 1), (256, "sqrt", 2), (256, "linear", 4), (16, "linear", 0.25)):
        scaled = optim.model_copy(update={"batch_size": batch, "scaling": scaling, "steps": 1000})
        assert learning_rate(scaled) == pytest.approx(factor * optim.learning_rate)
        assert warmup_steps(scaled) == math.ceil(640 / batch)


def test_a_run_made_short_is_not_all_warm_up() -> None:
    assert [warmup_steps(load_config("dinosaur", optim__steps=n).optim) for n in (10_000, 1000, 10, 1)] == [
        1000,
        200,
        2,
        0,
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.initializer=kmeans",), "needs a patch for each, and a frame has 16"),
        (("evaluate_every=5", "data.eval_split=nosuch"), "no split 'nosuch'"),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(
    tmp_path: Path, store: FeatureStore, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(small(*overrides, model__slots=17), store, tmp_path / "run")
    assert not (tmp_path / "run").exists()


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


def test_a_damaged_log_names_the_line(tmp_path: Path, store: FeatureStore) -> None:
    log = train(small(optim__steps=3, log_every=1), store, tmp_path / "run") / "metrics.jsonl"
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


def test_more_slots_than_patches_are_scored(tmp_path: Path, store: FeatureStore) -> None:
    config = load_config("default", None, [*fitted("default"), "model.slots=20"], optim__steps=1)
    result = evaluate(load_run(train(config, store, tmp_path / "run")))  # of 16 patches
    assert result.summary.frames == 8 and result.references.floors["kmeans_raw"]["mbo"] > 0


def test_an_evaluation_warns_of_collapse(
    tmp_path: Path, store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small("model.decoder.mask_temperature=1e6", optim__steps=1)
    result = evaluate(load_run(train(config, store, tmp_path / "run")))
    assert "all slots have the same mask" in result.warnings[0]
    assert len(result.largest_activation_by_slot) == 4
    terminal.warn(result.warnings)
    told = capsys.readouterr()
    assert told.out == "" and "warning: all slots have the same mask" in told.err


@pytest.mark.parametrize("decay", ["cosine", "exponential", "constant"])
def test_schedules_warm_up_and_decay(decay: str) -> None:
    overrides = (f"optim.decay={decay}", "optim.half_life=20", "optim.warmup_steps=10", "optim.learning_rate=1.0")
    optim = small(*overrides, optim__steps=50).optim
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, optim)
    rates = []
    for _ in range(50):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[30] == pytest.approx({"cosine": 0.5, "exponential": 0.5, "constant": 1.0}[decay])


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
    spec = attributes["attributes"]["featcache"]
    spec["preprocessing"]["size"], spec["taps"]["block1"]["dim"] = 448, 24
    (other / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(
        IncompatibleError, match=r"block1 dim: store 24, asked 12; preprocessing.size: store 448, asked"
    ):
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
    result = evaluate(load_run(train(small(), store, tmp_path / "run"))).as_dict()
    assert {
        "run", "cache", "split", "frames", "videos", "fg_ari", "ari", "mbo", "miou", "fg_ari_video", "mbo_video",
        "skipped_frames", "reference", "floor", "by_material", "mask_similarity", "slot_similarity",
    } <= result.keys()  # fmt: skip
    assert set(result["floor"]) == {"kmeans_raw", "kmeans_whitened"}
    assert set(result["by_material"]) == {"metal", "rubber"}
    assert {"fg_ari", "mbo"} <= result["reference"].keys()
    assert result["reference"]["mbo"] > 0.3  # a 4x4 grid
    json.dumps(result)


def test_the_masks_that_a_run_publishes_are_scored_first(tmp_path: Path, store: FeatureStore) -> None:
    """And shown; the others are scored beside them. Training is the same."""
    runs = [
        train(small(f"published_masks={kind}", preset="dinosaur", optim__steps=3), store, tmp_path / kind)
        for kind in ("decoder", "attention")
    ]
    assert [row["loss"] for row in rows_of(runs[0])] == [row["loss"] for row in rows_of(runs[1])]
    found = [evaluate(load_run(run)) for run in runs]
    decoder, attention = (result.as_dict() for result in found)
    for kind in ("decoder", "attention"):
        assert decoder[kind] == attention[kind]
    for result in (decoder, attention):
        assert all(result[key] == value for key, value in result[result["published_masks"]].items())
    assert decoder["mbo"] != attention["mbo"]
    assert decoder["logit_std"] == attention["logit_std"]
    assert decoder["largest_activation"] != attention["largest_activation"]
    one, other = (load_run(run).segment(store["validation"], 0) for run in runs)
    assert torch.equal(other.masks, one.attention) and not torch.equal(other.masks, one.masks)
    shown = io.StringIO()
    Console(file=shown, width=100).print(scores_table(found[1]))
    assert "of the decoder" in shown.getvalue()


def test_evaluation_repeats_itself(tmp_path: Path, store: FeatureStore) -> None:
    run = train(small(), store, tmp_path / "run")
    assert evaluate(load_run(run)) == evaluate(load_run(run))


def test_tensorboard_has_every_number_once(tmp_path: Path, store: FeatureStore) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small("checkpoint_every=4", "evaluate_every=6")
    run = tmp_path / "run"

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            raise Interrupted

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
