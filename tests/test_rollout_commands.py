"""The commands for tracks and predictions, and the same from Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import slotlab as product
from featcache.errors import DataError, UsageError
from featcache.store.reading import FeatureStore
from slotlab.config.load import load_config
from slotlab.dynamics.actions import Actions
from slotlab.dynamics.rollout import load_dynamics
from slotlab.dynamics.rows import Clip, rollout
from slotlab.dynamics.tracks import make_tracks
from slotlab.masks.refine import refine
from slotlab.models.dynamics.state import PLACE
from slotlab.runs.folder import store_path
from slotlab.runs.loaded import load_run
from slotlab.training.train import train
from tests.commands import Slotlab
from tests.synthetic import GRID, DiscSource, make_store
from tests.training import of_frames, small

# -- commands ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_slots_as_files(slotlab: Slotlab, tracked_run: Path, tmp_path: Path) -> None:
    told = slotlab("slots", tracked_run, "--json").json
    assert 0 < told["splits"]["validation"]["identity"] <= 1 and told["out"].endswith("tracks.zarr")
    assert "slots keep their object in" in slotlab("slots", tracked_run).out.splitlines()[0]
    assert slotlab("slots", tracked_run, "--format", "npz").code == 2
    ended = slotlab("slots", tracked_run, "--format", "npz", "--out", ".")
    assert ended.code == 3 and ended.said.splitlines()[-1] == "slotlab: .: is a folder; name a file in it, such as NAME"
    for form, name in (("npz", "s.npz"), ("hdf5", "s.h5")):
        assert slotlab("slots", tracked_run, "--format", form, "--out", tmp_path / name).code == 0
    tracks = FeatureStore.open(told["out"])["validation"]
    archive = np.load(tmp_path / "s.npz", allow_pickle=False)
    names = list(tracks.names.values())
    of = {
        key: archive[f"validation/{names[1]}/{key}"]
        for key in ("slots", "masks", "areas", "active", "identity", "centroids")
    }
    assert of["slots"].shape == (6, 4, 6) and of["masks"].shape == (6, 4, *GRID)
    np.testing.assert_allclose(of["areas"], of["masks"].astype(float).mean((2, 3)), atol=1e-3)
    k = int(of["areas"][0].argmax())
    fine = refine(torch.from_numpy(of["masks"][:1]), torch.from_numpy(tracks.video(1)[:1]), "guided")
    centre = (np.array(ndimage.center_of_mass(fine[0].argmax(0).numpy() == k)) + 0.5) / 32
    np.testing.assert_allclose(of["centroids"][0, k], centre, atol=2e-3)
    assert set(np.unique(of["identity"])) <= {-1, 0, 1} and (of["identity"] >= 0).any()
    with h5py.File(tmp_path / "s.h5") as file:
        group = file["validation"]
        assert group["ep_len"][:].tolist() == [6, 6, 6] and group["ep_offset"][:].tolist() == [0, 6, 12]
        for key, values in of.items():
            np.testing.assert_array_equal(group[key][6:12], values)
        assert [name.decode() for name in group["names"][:]] == names


@pytest.mark.slow
def test_a_world_model_from_run_to_rollout(slotlab: Slotlab, tracked_run: Path, tmp_path: Path) -> None:
    options = [
        part for override in ("data.clip=5", "model.burn_in=3", "model.width=16") for part in ("--set", override)
    ]
    out = tmp_path / "world"
    ended = slotlab("train", "--preset", "dynamics", "--run", tracked_run, *options, "--steps", 2, "--out", out)
    assert ended.code == 0 and f"Next: slotlab rollout {out}" in ended.out
    told = slotlab("rollout", out, "--json").json
    assert told["rows"]["rollout"]["mse"]["mean"] > 0 and (out / "rollout-validation.json").exists()
    ended = slotlab("rollout", out, "--film", tmp_path / "film.avi")
    assert ended.code == 2 and "name a file that ends in .mp4, .gif, .webp" in ended.said
    ended = slotlab("rollout", out, "--sheet", tmp_path / "sheet.png", "--film", tmp_path / "film.gif")
    assert "constant velocity of masks" in ended.out and Image.open(tmp_path / "sheet.png").size[0] > 500
    assert (tmp_path / "film.gif").stat().st_size > 0
    ended = slotlab("eval", out)
    assert ended.code == 2 and f"its scores are those of predictions: slotlab rollout {out}" in ended.said


@pytest.mark.slow
def test_a_page_shows_predictions_beside_their_rows(slotlab: Slotlab, predicting: Path, tmp_path: Path) -> None:
    run = shutil.copytree(predicting, tmp_path / "world")
    (run / "rollout-validation.json").unlink(missing_ok=True)
    page, text = tmp_path / "page.html", tmp_path / "page.md"
    told = slotlab("report", run, "-o", page, "--markdown", text, "--figures", tmp_path, "--videos", 1, "--json").json
    kept = json.loads((run / "rollout-validation.json").read_text())
    assert told["runs"][0]["evaluation"] is None and told["runs"][0]["rollout"] == kept
    drawn = page.read_text()
    assert 'id="chart-ahead-skill"' in drawn and 'id="chart-ahead-mbo_still"' in drawn and 'id="scores"' not in drawn
    assert (tmp_path / "predictions.svg").exists()
    row = next(line for line in text.read_text().splitlines() if line.startswith("| constant velocity of masks"))
    assert row.split("|")[2].split()[0] == f"{kept['rows']['velocity_masks']['mse']['by_horizon'][0]:.3f}"
    again = slotlab("report", run, "-o", page, "--videos", 0)
    assert "rolling out" not in again.said, "kept scores are used"


def test_a_page_on_what_has_no_slots_has_its_training(
    slotlab: Slotlab, shared_store: FeatureStore, tmp_path: Path
) -> None:
    parts = ("data.clip=4", "model.burn_in=2", "model.width=8", "model.heads=2")
    config = load_config("dynamics-dense", None, [*parts, "optim.steps=2", "optim.batch_size=2"])
    run = train(config, shared_store, tmp_path / "dense")
    ended = slotlab("report", run, "-o", tmp_path / "page.html")
    assert ended.code == 0 and f"slotlab rollout RUN --dense {run}" in ended.said
    drawn = (tmp_path / "page.html").read_text()
    assert 'id="chart-train-loss"' in drawn and 'id="gallery"' not in drawn
    ended = slotlab("eval", run)
    assert ended.code == 2 and f"slotlab rollout RUN --dense {run}" in ended.said


@pytest.mark.slow
def test_an_ablation_of_world_models_compares_predictions(
    slotlab: Slotlab, shared_tracks: FeatureStore, tmp_path: Path
) -> None:
    parts = """[set]
    "data.clip" = 5
    "model.burn_in" = 3
    "model.width" = 16
    "optim.steps" = 2
    "optim.batch_size" = 2
    [grid]
    "model.kinematics" = [true, false]"""
    file, out = tmp_path / "parts.toml", tmp_path / "out"
    file.write_text(f'preset = "dynamics"\ncache = "{shared_tracks.path}"\nseeds = 1\n{parts}')
    table = slotlab("ablate", file, "--out", out, "--workers", 1, "--json").json
    assert [cell["finished"] for cell in table["cells"]] == [1, 1]
    for cell in table["cells"]:
        kept = json.loads((Path(cell["runs"][0]["path"]) / "rollout-validation.json").read_text())
        assert cell["mse_2"]["mean"] == kept["rows"]["rollout"]["mse"]["by_horizon"][1] == kept["values"]["mse_2"]
        assert cell["centre_2"]["mean"] == pytest.approx(kept["rows"]["rollout"]["centre"]["by_horizon"][1])
    tested = table["cells"][1]["against_first"]["mse_2"]
    one, other = (cell["mse_2"]["mean"] for cell in table["cells"])
    assert tested["difference"] == pytest.approx(other - one)
    by_video = [kept["by_video"][name]["mse_2"] for name in kept["by_video"]]
    assert np.mean(by_video) == pytest.approx(other) and tested["videos"] == 3
    assert "feature MSE, +2" in (out / "table.md").read_text()
    file.write_text(file.read_text().replace('preset = "dynamics"', 'preset = "dynamics-dense"'))
    ended = slotlab("ablate", file, "--out", tmp_path / "no")
    assert ended.code in (2, 4)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("train", "--preset", "dynamics"), "name a store with --cache, or, for --preset dynamics, a run with --run"),
        (("train", "--run", "RUN"), "only a world model is trained on a run's slots; add --preset dynamics"),
        (("compare", "--backbone", "dinov2", "--preset", "dynamics"), "where cache = RUN/tracks.zarr names the slots"),
        (("rollout", "RUN"), "predicts nothing (model.kind = clustering); train a world model on its slots with"),
        (("slots", "nowhere"), "not a run"),
    ],
)
def test_mistakes_are_one_line(slotlab: Slotlab, tracked_run: Path, arguments: tuple[str, ...], told: str) -> None:
    ended = slotlab(*(str(tracked_run) if part == "RUN" else part for part in arguments))
    assert ended.code in (2, 3) and told in ended.said and ended.said.strip().count("\n") == 0


def test_a_world_model_that_is_given_what_it_cannot_use_says_what_it_can(
    slotlab: Slotlab, tracked_run: Path, predicting: Path, shared_store: FeatureStore, tmp_path: Path
) -> None:
    def told(*arguments: object) -> tuple[int, str]:
        ended = slotlab(*arguments)
        assert ended.out == "" and ended.said.strip().count("\n") == 0
        return ended.code, ended.said

    code, said = told("rollout", predicting, "--tracks", shared_store.path)
    assert code == 4 and "has no tracks" in said and "slotlab slots RUN" in said
    code, said = told("rollout", predicting, "--tracks", "gone.zarr")
    assert code == 3 and "make it with: slotlab slots RUN --out gone.zarr" in said
    code, said = told("rollout", predicting, "--cache", "gone.zarr")
    assert code == 3 and "gone.zarr: no such store" in said
    other = make_store(tmp_path / "other.zarr", DiscSource({"train": (3,), "validation": (9, 9, 9)}))
    code, said = told("rollout", predicting, "--cache", other.path)
    assert code == 3 and "not the videos of" in said and "--cache" in said
    code, said = told("masks", predicting, "--cache", shared_store.path, "--out", tmp_path / "masks")
    assert code == 4 and "no tap 'tracks'" in said and "name its own store" in said
    two = make_store(tmp_path / "two.zarr", taps=("block1", "block2"))
    elsewhere = train(small("data.tap=block2", preset="default", optim__steps=1), two, tmp_path / "elsewhere")
    code, said = told("rollout", predicting, "--dense", elsewhere)
    assert code == 2 and "name one of --preset dynamics-dense" in said
    code, said = told("slots", predicting)
    assert code == 2 and "finds no slots, it predicts" in said
    code, said = told("robustness", predicting)
    assert code == 2 and f"name that run instead: {tracked_run.resolve()}" in said
    moved = shutil.copytree(predicting, tmp_path / "moved")
    noted = json.loads((moved / "store.json").read_text())
    (moved / "store.json").write_text(json.dumps(noted | {"path": str(tmp_path / "away"), "from_run": None}))
    code, said = told("rollout", moved)
    assert code == 3 and "say where its store is with --tracks" in said


def test_slots_elsewhere_are_trained_on_from_there(slotlab: Slotlab, tracked_run: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere.zarr"
    assert (
        f"Next: slotlab train --preset dynamics --cache {place}\n" in slotlab("slots", tracked_run, "--out", place).out
    )
    small_ones = ("--set", "data.clip=5", "--set", "model.burn_in=3", "--steps", 1)
    assert (
        slotlab("train", "--preset", "dynamics", "--cache", place, *small_ones, "--out", tmp_path / "world").code == 0
    )


def test_features_that_are_not_finite_are_told_before_they_are_used(
    slotlab: Slotlab, tracked_run: Path, tmp_path: Path
) -> None:
    """The default preset's tracker and its calibration meet them first."""
    store = FeatureStore.open(shutil.copytree(store_path(tracked_run), tmp_path / "nan.zarr"))
    for split in store.splits:
        chunk = min((store.path / split / "features/block1").glob("c.0.*"))
        chunk.write_bytes(b"\x00\x7e" * (len(chunk.read_bytes()) // 2))
    for command in (
        ("eval", tracked_run, "--cache", store.path),
        ("slots", tracked_run, "--cache", store.path, "--out", tmp_path / "t.zarr"),
        ("train", "--cache", store.path, "--set", "data.normalize=slow=8", "--set", "data.clip=2"),
    ):
        ended = slotlab(*command)
        assert ended.code == 3 and "features are not finite" in ended.said, ended
        assert f"slotlab verify {store.path}" in ended.said


def test_damaged_tracks_are_told(tmp_path: Path, shared_tracks: FeatureStore) -> None:
    """NaN in a token reaches no weights."""
    store = FeatureStore.open(shutil.copytree(shared_tracks.path, tmp_path / "t.zarr"))
    chunk = next((store.path / "train/features/tracks").glob("c.1.*"))
    chunk.write_bytes(b"\x00\x7e" * (len(chunk.read_bytes()) // 2))
    with pytest.raises(DataError, match="not finite"):
        train(small(preset="dynamics"), store, tmp_path / "run")


# -- Python ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_your_own_frames_are_rolled_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    store = of_frames(run)
    tracks = make_tracks(load_run(run), tmp_path / "run/tracks.zarr")
    made = train(small(preset="dynamics", optim__steps=2), tracks, tmp_path / "world")
    assert store_path(made) == tracks.path or store_path(made).resolve() == tracks.path.resolve()
    world = product.load(made, device="cpu")
    split = store["validation"]
    found = world.rollout(split.video(0)[:3], 3)
    loaded = load_dynamics(made)
    tokens = store["validation"].tokens(loaded.inputs.features, 0).float()
    clip = Clip.of(loaded.model, loaded.inputs.read(tracks["validation"], 0), tokens)
    expected = rollout(clip)
    assert expected.places is not None
    torch.testing.assert_close(found.slots[..., PLACE], expected.places, atol=0.05, rtol=0.05)
    assert found.masks.shape == (3, 4, 32, 32) and found.features.shape == (3, *tokens.shape[1:])
    standard = loaded.model.normaliser(found.features)
    torch.testing.assert_close(standard, expected.features, atol=0.1, rtol=0.1)
    assert product.load(run, device="cpu").segment(split.video(0)).labels.equal(world.segment(split.video(0)).labels)
    with pytest.raises(UsageError, match="predicts nothing"):
        product.load(run, device="cpu").rollout(split.video(0), 2)
    with pytest.raises(UsageError, match="ask for at least one"):
        world.rollout(split.video(0), 0)
    with pytest.raises(UsageError, match="no actions: it was trained without"):
        world.rollout(split.video(0)[:3], 3, actions=np.zeros((5, 2)))

    drawn = {name: {v: torch.randn(n, 2).half().float() for v, n in enumerate(store[name].spec.lengths)}
             for name in store.splits}  # fmt: skip
    pushed = make_tracks(load_run(run), tmp_path / "pushed.zarr", actions=Actions(2, drawn))
    loaded = load_dynamics(train(small(preset="dynamics", optim__steps=2), pushed, tmp_path / "pushed"))
    clip = Clip.of(loaded.model, loaded.inputs.read(pushed["validation"], 0), tokens)
    world = product.load(tmp_path / "pushed", device="cpu")
    pushes = drawn["validation"][0].numpy()
    places = world.rollout(split.video(0)[:3], 3, actions=pushes[:5]).slots[..., PLACE]
    torch.testing.assert_close(places, rollout(clip).places, atol=0.05, rtol=0.05)
    assert not torch.allclose(world.rollout(split.video(0)[:3], 3, actions=-pushes[:5]).slots[..., PLACE], places)
    with pytest.raises(UsageError, match=r"the model needs actions of shape \(5, 2\), finite"):
        world.rollout(split.video(0)[:3], 3, actions=pushes[:4])
    shutil.rmtree(run)
    with pytest.raises(DataError, match="put that run back"):
        product.load(made, device="cpu")
