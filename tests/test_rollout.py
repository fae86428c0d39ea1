"""Tracks as data, the scores of what is predicted of them, and the commands for both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from sklearn.metrics import adjusted_rand_score

import slotlab as product
from featcache.backbones.backbone import load_backbone
from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.store.reading import FeatureStore
from featcache.upkeep.verify import verify
from slotlab.config.load import load_config
from slotlab.dynamics.actions import Actions
from slotlab.dynamics.measures import MEASURES, Truth, frame_values, object_centres
from slotlab.dynamics.rollout import features_at, load_dynamics, roll_out
from slotlab.dynamics.rows import ROWS, Clip, Predicted, copy, oracle, rollout, velocity_masks
from slotlab.dynamics.tracks import Identity, make_tracks, store_identity
from slotlab.masks.labels import masks_to_labels
from slotlab.models.dynamics.state import PLACE
from slotlab.pictures.strip import Strips
from slotlab.runs.folder import store_path
from slotlab.runs.loaded import LoadedRun, load_run
from slotlab.training.train import train
from tests.commands import Slotlab
from tests.synthetic import DIM, GRID, DiscSource, make_store
from tests.training import small


@pytest.fixture(scope="module")
def predicting(shared_tracks: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world model of twelve steps."""
    return train(small(preset="dynamics"), shared_tracks, tmp_path_factory.mktemp("dynamics") / "run")


@pytest.fixture(scope="module")
def loaded(predicting: Path) -> LoadedRun:
    return load_dynamics(predicting)


def clip_of(loaded: LoadedRun, video: int = 0) -> Clip:
    split, features = loaded.store["validation"], features_at(loaded.store)["validation"]
    tracks = loaded.inputs.read(split, video)
    return Clip.of(loaded.model, tracks, features.tokens(loaded.inputs.features, video).float())


def truth_of(loaded: LoadedRun, clip: Clip, video: int = 0) -> Truth:
    return Truth.of(loaded.store["validation"], clip, video, {}, 3)


# -- tracks ------------------------------------------------------------------------------------------------


def test_tracks_hold_what_the_run_found(tracked_run: Path, shared_tracks: FeatureStore) -> None:
    run = load_run(tracked_run)
    split, own = shared_tracks["validation"], run.store["validation"]
    output = run.segment(own, 1)
    features = own.tokens("block1", 1).double().numpy()
    tracks = split.tokens("tracks", 1).float().numpy()  # (T, K, D + N)
    masks = output.masks.numpy()
    np.testing.assert_allclose(tracks[..., DIM:], masks, atol=1e-3)
    for t, k in ((0, 0), (3, 1)):
        if masks[t, k].sum() > 0.5:
            expected = np.average(features[t], axis=0, weights=masks[t, k])
            np.testing.assert_allclose(tracks[t, k, :DIM], expected, rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(split.tokens("slots", 1).float().numpy(), output.slots.numpy(), atol=2e-3)
    assert np.array_equal(split.segmentations(1), own.segmentations(1))
    assert np.array_equal(split.video(1), own.video(1)) and split.names[1] == own.names[1]
    mean = split.statistics("block1").mean
    np.testing.assert_array_equal(mean, own.statistics("block1").mean)
    assert verify(shared_tracks.path) == []


def test_tracks_are_made_once_and_not_mixed(tmp_path: Path, tracked_run: Path) -> None:
    run = load_run(tracked_run)
    store = make_tracks(run, tmp_path / "t.zarr")
    chunk = next((store.path / "train/features/tracks").glob("c.0*"))
    written = chunk.stat().st_mtime_ns
    make_tracks(run, store.path)
    assert chunk.stat().st_mtime_ns == written
    other = train(small(preset="default", seed=3), run.store, tmp_path / "other")
    with pytest.raises(IncompatibleError, match="made with other settings") as caught:
        make_tracks(load_run(other), store.path)
    assert {row.setting for row in caught.value.differences} == {"model.weights"}


def test_identity_counts_objects_whose_slot_stays() -> None:
    """Three frames, two objects; the second one's slot changes in the last, in which no slot holds the first."""
    tables = torch.zeros(3, 3, 4, dtype=torch.int64)
    tables[:, 0, 0] = 100
    tables[0, 1, 1] = tables[1, 1, 1] = 10
    tables[0, 2, 2] = tables[1, 2, 2] = tables[2, 2, 3] = 10
    tables[2, 1, 0] = 10  # lost in the background, with an IoU of 10 / 120
    found = Identity.of_tables(tables)
    assert found == Identity(visible=6, held=5, own=4)
    assert found.accuracy == pytest.approx(4 / 5) and found.covered == pytest.approx(5 / 6)
    assert Identity().accuracy is None and found + Identity(1, 1, 0) == Identity(7, 6, 4)


def test_without_ground_truth_there_is_no_identity(tmp_path: Path, slotlab: Slotlab) -> None:
    class Unlabelled(DiscSource):
        masks = False

        def read(self, split: str, index: int) -> object:
            video = super().read(split, index)
            return type(video)(video.id, video.frames)

    source = Unlabelled({"train": (5, 5), "validation": (5,)})
    run = train(small(preset="default", optim__steps=1), make_store(tmp_path / "s.zarr", source), tmp_path / "run")
    store = make_tracks(load_run(run), tmp_path / "t.zarr")
    assert store_identity(store["validation"]) is None
    made = train(small(preset="dynamics", optim__steps=1), store, tmp_path / "dynamics")
    found = roll_out(load_dynamics(made), load_run(run).store, store["validation"]).as_dict()
    assert found["tracks"]["identity"] is None and list(found["rows"]["copy"]).count("mbo") == 0
    assert found["rows"]["copy"]["mse"]["mean"] > 0
    drawn = slotlab("rollout", made, "--sheet", tmp_path / "sheet.png")
    assert drawn.code == 0 and Image.open(tmp_path / "sheet.png").size[0] > 500


def test_the_first_video_is_drawn_where_none_of_those_chosen_is_rolled_out(loaded: LoadedRun, tmp_path: Path) -> None:
    split = loaded.store["validation"]
    strips = Strips(split, [])
    roll_out(loaded, features_at(loaded.store), split, also=[strips.add])
    with Image.open(strips.draw(tmp_path / "sheet.png")) as drawn:
        assert drawn.size[1] < 1200  # one strip


@pytest.mark.parametrize("kind", ["mp4", "gif", "webp"])
def test_a_film_has_the_frames_of_its_video(loaded: LoadedRun, tmp_path: Path, kind: str) -> None:
    """As Pillow and PyAV read them; what was seen is the same in all columns, what is predicted is not."""
    split = loaded.store["validation"]
    strips = Strips(split, [])
    roll_out(loaded, features_at(loaded.store), split, also=[strips.add])
    path = strips.film(tmp_path / f"film.{kind}")
    if kind == "mp4":
        with av.open(path) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    else:
        with Image.open(path) as image:
            frames = [np.asarray(page.convert("RGB")) for page in ImageSequence.Iterator(image)]
    assert len(frames) == 6 and frames[0].shape == (18 + 32, 4 * 32, 3)
    _, *seen = np.split(frames[2][18:].astype(int), 4, axis=1)
    assert max(np.abs(seen[0] - other).mean() for other in seen[1:]) < 12
    truth, *predicted = np.split(frames[5][18:].astype(int), 4, axis=1)
    assert min(np.abs(truth - other).mean() for other in predicted) > 12


# -- scores ------------------------------------------------------------------------------------------------


def test_features_and_masks_are_scored_as_numpy_and_scikit_learn_do(loaded: LoadedRun) -> None:
    clip = clip_of(loaded)
    truth = truth_of(loaded, clip)
    predicted = rollout(clip)
    assert predicted.masks is not None and predicted.places is not None
    found = frame_values(predicted, clip, truth)
    moments = loaded.inputs.moments(loaded.training_split())
    raw = features_at(loaded.store)["validation"].tokens("block1", 0).double().numpy()[3:]
    total, about = (np.sqrt(np.diag(x)) for x in (moments.covariance, moments.position_covariance))
    standard = (raw - moments.mean) / total
    guess = (predicted.features.double().numpy() * about + moments.position_mean - moments.mean) / total
    np.testing.assert_allclose(found["mse"], ((guess - standard) ** 2).mean((1, 2)), rtol=1e-3)
    cosine = (guess * standard).sum(-1) / np.linalg.norm(guess, axis=-1) / np.linalg.norm(standard, axis=-1)
    np.testing.assert_allclose(found["cosine"], cosine.mean(1), rtol=1e-3, atol=1e-4)
    labels = masks_to_labels(predicted.masks.unflatten(-1, GRID), (32, 32)).numpy()
    for t in range(3):
        true = truth.labels[t].numpy()
        shown = true > 0
        assert float(found["fg_ari"][t]) == pytest.approx(adjusted_rand_score(true[shown], labels[t][shown]))
        best = []
        for item in range(1, 3):
            ious = [
                ((labels[t] == k) & (true == item)).sum() / ((labels[t] == k) | (true == item)).sum() for k in range(4)
            ]
            best.append(max(ious))
        assert float(found["mbo"][t]) == pytest.approx(np.mean(best))


def test_places_are_told_in_pixels(loaded: LoadedRun) -> None:
    """A prediction whose own slots lie at the true centres errs by nothing; moved by a patch, by eight pixels."""
    clip = clip_of(loaded)
    truth = truth_of(loaded, clip)
    centres = object_centres(truth.labels, 3)
    for item in range(2):
        rows, columns = np.nonzero(truth.labels[0].numpy() == item + 1)
        np.testing.assert_allclose(centres[0, item], [rows.mean(), columns.mean()])
    assert (truth.own >= 0).any()
    places = clip.vectors[clip.burn_in :, :, PLACE].clone()
    for item, slot in enumerate(truth.own.tolist()):
        if slot >= 0:
            places[:, slot] = ((centres[:, item] - 15.5) / 8).float()
    right = frame_values(Predicted(rollout(clip).features, rollout(clip).masks, places), clip, truth)
    wrong = frame_values(
        Predicted(rollout(clip).features, rollout(clip).masks, places + torch.tensor([0.0, 1.0])), clip, truth
    )
    np.testing.assert_allclose(right["centre"], 0, atol=1e-4)
    np.testing.assert_allclose(wrong["centre"], 8, atol=1e-4)


def test_the_rows_are_what_they_say(loaded: LoadedRun) -> None:
    clip = clip_of(loaded)
    assert torch.equal(copy(clip).features, clip.dense[2].expand(3, -1, -1))
    truth = clip.seen.masks[0, 3:]
    found = oracle(clip)
    torch.testing.assert_close(found.features, truth.mT @ clip.vectors[3:, :, 4:] @ loaded.model.basis.T)
    moved = velocity_masks(clip)
    assert moved.masks is not None
    torch.testing.assert_close(moved.masks.sum(1), torch.ones(3, 16))
    for row, (_, predict) in ROWS.items():
        predicted = predict(clip)
        assert predicted.features.shape == (3, 16, DIM) and bool(predicted.features.isfinite().all()), row


def test_what_stands_still_is_kept_by_constant_velocity(loaded: LoadedRun) -> None:
    clip = clip_of(loaded)
    frozen = Clip.of(
        loaded.model,
        loaded.inputs.read(loaded.store["validation"], 0)[2:3].expand(6, -1, -1),
        features_at(loaded.store)["validation"].tokens("block1", 0).float()[2:3].expand(6, -1, -1),
    )
    moved, kept = velocity_masks(frozen), copy(frozen)
    assert moved.masks is not None and kept.masks is not None
    torch.testing.assert_close(moved.masks, kept.masks, atol=2e-3, rtol=0)
    ground = int(frozen.masks.sum(-1).argmax())
    objects = 1 - frozen.masks[ground]
    near = ((moved.features - kept.features).norm(dim=-1) * (objects > 0.99)).amax()
    assert float(near) < 0.1 * float(clip.dense.norm(dim=-1).mean()), "the features of whole objects go with them"


def test_skill_is_the_share_of_the_copy_s_error(loaded: LoadedRun) -> None:
    found = roll_out(loaded, features_at(loaded.store), loaded.store["validation"])
    told = json.loads(json.dumps(found.as_dict()))
    assert set(told["rows"]) == set(ROWS) and told["videos"] == 3
    error, copied, best = (np.array(told["rows"][row]["mse"]["by_horizon"]) for row in ("rollout", "copy", "oracle"))
    np.testing.assert_allclose(told["rows"]["rollout"]["skill"]["by_horizon"], 1 - error / copied)
    assert told["rows"]["copy"]["skill"]["by_horizon"] == [0.0] * 3
    share = told["rows"]["rollout"]["skill_to_oracle"]["by_horizon"]
    for value, e, c, b in zip(share, error, copied, best, strict=True):
        assert value is None if c <= b else value == pytest.approx((c - e) / (c - b))
    low, high = told["rows"]["rollout"]["confidence"]["mse"]["2"]
    assert low <= error[1] <= high
    assert {measure.key for measure in MEASURES} <= set(told["rows"]["rollout"])


def test_videos_that_an_object_enters_are_flagged_and_can_be_left_out(loaded: LoadedRun, tmp_path: Path) -> None:
    store = FeatureStore.open(shutil.copytree(loaded.store.path, tmp_path / "t.zarr"))
    split = store["validation"]
    hidden = split.segmentations(1).copy()
    hidden[:4][hidden[:4] == 2] = 0  # object 2 of video 1 is not there before the fifth frame

    real = type(split).segmentations
    split.segmentations = lambda video: hidden if video == 1 else real(split, video)  # type: ignore[method-assign]
    found = roll_out(loaded, features_at(loaded.store), split)
    assert found.entering == [split.names[1]] and len(found.names) == 3
    fewer = roll_out(loaded, features_at(loaded.store), split, without_entering=True)
    assert fewer.entering == [split.names[1]] and len(fewer.names) == 2


def test_videos_as_short_as_what_is_seen_cannot_be_scored(tmp_path: Path, tracked_run: Path, loaded: LoadedRun) -> None:
    source = DiscSource({"train": (6, 6, 5, 6), "validation": (3, 2)})
    short = make_store(tmp_path / "s.zarr", source)
    store = make_tracks(load_run(tracked_run, short.path), tmp_path / "t.zarr")
    with pytest.raises(DataError, match="no video to predict: none is longer than the 3 frames that are seen"):
        roll_out(loaded, short, store["validation"])
    with pytest.raises(DataError, match="not the videos of"):
        roll_out(loaded, short, loaded.store["validation"])


# -- commands ----------------------------------------------------------------------------------------------


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
    y, x = (np.indices(GRID) + 0.5) / 4
    k = int(of["areas"][0].argmax())
    weight = of["masks"][0, k].astype(float)
    centre = [(weight * axis).sum() / weight.sum() for axis in (y, x)]
    np.testing.assert_allclose(of["centroids"][0, k], centre, atol=1e-3)
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
    source = DiscSource({"train": (6, 6, 5, 6), "validation": (6, 6)})
    backbone = load_backbone("resnet18", "random", input_size=64)
    options = ExtractOptions(batch_size=4, precision="float32")
    store = extract(plan(tmp_path / "store.zarr", source, backbone, options), source, backbone)
    run = train(small(preset="default", optim__steps=2), store, tmp_path / "run")
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
