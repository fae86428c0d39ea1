"""The training loop: it learns, scale and precision do not matter, and what breaks is said."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from featcache.errors import DataError, UsageError
from featcache.store.reading import FeatureStore
from featcache.stream.stream import FeatureStream
from slotlab.config.load import load_config, presets
from slotlab.models.randomness import Draws
from slotlab.runs import checkpoint
from slotlab.runs.loaded import load_run
from slotlab.scoring.collapse import NAMES
from slotlab.scoring.evaluate import evaluate
from slotlab.training import train as train_module
from slotlab.training.processes import Ranks
from slotlab.training.step import TrainStep
from slotlab.training.train import train, training_stream
from tests.synthetic import fitted, make_store
from tests.training import PARTS, rows_of, small


def test_a_seed_gives_a_run_and_another_seed_another(tmp_path: Path, store: FeatureStore) -> None:
    one, same, other = (
        rows_of(train(small(seed=seed), store, tmp_path / name)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == same != other


@pytest.mark.slow
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
def test_every_preset_trains_a_step(tmp_path: Path, store_of: Callable[[str], FeatureStore], preset: str) -> None:
    config, store = load_config(preset, None, fitted(preset), optim__steps=1), store_of(preset)
    run = train(config, store, tmp_path / "run")
    assert np.isfinite(rows_of(run)[-1]["loss"])
    assert evaluate(load_run(run)).summary.frames == store["validation"].frames


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


def test_tf32_is_for_the_step_alone(tmp_path: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; looks, and what comes after, multiply as they did."""
    seen: dict[str, tuple[str, bool]] = {}  # precision of products; whether convolutions may take TF32

    def note(where: str) -> None:
        seen[where] = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    trained, looked = TrainStep.gradients, train_module.look

    def gradients(step: TrainStep, features: torch.Tensor) -> dict[str, torch.Tensor]:
        forward = step.model.register_forward_pre_hook(lambda *_: note("forward"))
        backward = next(step.model.parameters()).register_hook(lambda _: note("backward"))
        found = trained(step, features)
        forward.remove()
        backward.remove()
        return found

    def look(*arguments: Any) -> dict[str, Any]:
        note("look")
        return looked(*arguments)

    monkeypatch.setattr(TrainStep, "gradients", gradients)
    monkeypatch.setattr(train_module, "look", look)
    config = small("optim.precision=tf32", "evaluate_every=2", optim__steps=2)
    rows = rows_of(train(config, store, tmp_path / "run"))
    note("after")
    left = ("highest", True)
    assert seen == {"forward": ("high", True), "backward": ("high", True), "look": left, "after": left}
    exact = rows_of(train(small("evaluate_every=2", optim__steps=2), store, tmp_path / "exact"))
    assert seen == {"forward": ("highest", False), "backward": ("highest", False), "look": left, "after": left}
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in exact], rtol=1e-2)


def test_bfloat16_trains(tmp_path: Path, store: FeatureStore) -> None:
    exact = rows_of(train(small(), store, tmp_path / "a"))
    rounded = rows_of(train(small("optim.precision=bfloat16"), store, tmp_path / "b"))
    assert rounded != exact
    np.testing.assert_allclose([r["loss"] for r in rounded], [r["loss"] for r in exact], rtol=0.1)


COMPILED = ("optim.compile=true", "optim.cuda_graphs=true")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_the_same_training(tmp_path: Path, store: FeatureStore, unchecked: None) -> None:
    """As for CUDA graphs, which a CPU has none of: the loop around them is the same. One iteration compiles sooner."""
    losses = []
    for name, options in {"plain": (), "compiled": COMPILED}.items():
        config = small("model.iterations=1", *options, preset="dinosaur", optim__steps=3)
        losses.append([row["loss"] for row in rows_of(train(config, store, tmp_path / name))])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_int8_store_trains_like_float16(tmp_path: Path) -> None:
    losses = []
    for dtype in ("float16", "int8"):
        store = make_store(tmp_path / f"{dtype}.zarr", dtype=dtype)
        losses.append([row["loss"] for row in rows_of(train(small(), store, tmp_path / dtype))])
    np.testing.assert_allclose(*losses, rtol=5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
def test_accumulated_parts_are_the_whole_batch(tmp_path: Path, store: FeatureStore, parts: tuple[str, ...]) -> None:
    runs = [train(small(*parts, f"optim.accumulate={n}"), store, tmp_path / str(n)) for n in (1, 2, 4)]
    losses = [[row["loss"] for row in rows_of(run)] for run in runs]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-4)
    with pytest.raises(UsageError, match="cannot be shared by 1 processes in 3 parts"):
        train(small(*parts, "optim.accumulate=3"), store, tmp_path / "3")
    assert not (tmp_path / "3").exists(), "what cannot be trained leaves no folder that a better try would meet"


def test_what_a_thread_draws_beside_a_gpu_is_what_the_step_would(
    tmp_path: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(*PARTS[0], "optim.accumulate=2", "checkpoint_every=2", optim__steps=4)
    alone = rows_of(train(config, store, tmp_path / "alone"))
    drawn: list[tuple[int, bool]] = []

    def noted(step: TrainStep, count: int, part: int, draw: Any = TrainStep._draw) -> Draws:
        drawn.append((count, threading.current_thread() is threading.main_thread()))
        return draw(step, count, part)

    monkeypatch.setattr("slotlab.training.step.DRAWN_BESIDE", ("cpu",))
    monkeypatch.setattr(TrainStep, "_draw", noted)
    assert rows_of(train(config, store, tmp_path / "beside")) == alone
    here = [count for count, main in drawn if main]
    assert here == [0, 0, 2], "the first step, and a part that the look at the new weights has used up"


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_loss_that_is_not_finite_names_the_batch(tmp_path: Path, store: FeatureStore, log_every: int) -> None:
    """The error names the first bad step, however late it is noticed, and nothing of it is saved."""
    overrides = (f"log_every={log_every}", "optim.learning_rate=1e30", "optim.warmup_steps=0")
    message = r"not finite at step 2 \(samples that begin at store rows \[\d+, \d+, \d+, \d+\]\); lower --set"
    with pytest.raises(DataError, match=message):
        train(small(*overrides), store, tmp_path / "run")
    assert not checkpoint.exists(tmp_path / "run")


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


def test_a_split_that_is_not_whole_is_not_looked_at(tmp_path: Path) -> None:
    """Said before training, and before there is a folder."""
    store = make_store(tmp_path / "store.zarr")
    (store.path / "validation/manifest.jsonl").write_text("")
    config = small("evaluate_every=2", optim__steps=2)
    with pytest.raises(DataError, match=r"validation: extraction unfinished \(0 of 2 videos\)"):
        train(config, FeatureStore.open(store.path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
