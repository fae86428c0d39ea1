"""Tracks as data, and the scores of what is predicted of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from sklearn.metrics import adjusted_rand_score

from featcache.errors import DataError, IncompatibleError
from featcache.store.reading import FeatureStore
from featcache.upkeep.verify import verify
from slotlab.dynamics.measures import MEASURES, Truth, frame_values, hits, object_centres
from slotlab.dynamics.rollout import features_at, load_dynamics, roll_out
from slotlab.dynamics.rows import ROWS, Clip, Predicted, copy, oracle, rollout, velocity_masks
from slotlab.dynamics.tracks import Identity, make_tracks, refined_places, store_identity
from slotlab.masks.labels import masks_to_labels
from slotlab.models.dynamics.model import DynamicsModel
from slotlab.models.dynamics.state import PLACE, places
from slotlab.pictures.strip import Strips
from slotlab.runs.loaded import LoadedRun, load_run
from slotlab.training.train import train
from tests.commands import Slotlab
from tests.synthetic import DIM, GRID, DiscSource, make_store
from tests.training import small


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
    tracks = split.tokens("tracks", 1).float().numpy()  # (T, K, D + N + 2)
    masks = output.masks.numpy()
    np.testing.assert_allclose(tracks[..., DIM:-2], masks, atol=1e-3)
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


def test_places_are_those_of_the_pixels() -> None:
    """A disc that moves by fractions of a patch, by masks that are its share of every patch."""
    y, x = np.mgrid[:64, :64]
    rng = np.random.default_rng(0)
    centres = np.array([[20.0, 22.0], [21.5, 25.0], [24.0, 29.5]])
    discs = np.stack([(y - a) ** 2 + (x - b) ** 2 < 9**2 for a, b in centres])
    frames = np.where(discs[..., None], 200, rng.integers(40, 60, (3, 64, 64, 3))).astype(np.uint8)
    soft = torch.from_numpy(discs).float().unflatten(1, (8, 8)).unflatten(3, (8, 8)).mean((2, 4)) * 0.8 + 0.1
    found = refined_places(torch.stack([soft, 1 - soft], 1), frames)[:, 0]
    np.testing.assert_allclose(found, (centres - 31.5) / 8, atol=0.05)
    weights = soft.flatten(1).numpy()
    coarse = np.stack([np.average(places((8, 8)), axis=0, weights=weight) for weight in weights])
    assert np.abs(coarse - (centres - 31.5) / 8).max() > 0.2, "which masks on the grid do not tell"


def test_tracks_of_an_earlier_version_are_read_as_they_were(
    tmp_path: Path, tracked_run: Path, monkeypatch: pytest.MonkeyPatch, slotlab: Slotlab
) -> None:
    """They have no places but the masks' centres; unfinished ones are finished so."""
    run, path = load_run(tracked_run), tmp_path / "t.zarr"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as earlier, pytest.raises(KeyboardInterrupt):
        earlier.setattr("slotlab.dynamics.tracks._noted", lambda *_: {})
        make_tracks(run, path, stop)
    store = make_tracks(run, path)
    assert store.spec.taps["tracks"].dim == DIM + GRID[0] * GRID[1]
    options = [part for one in ("data.clip=5", "model.burn_in=3", "model.width=16") for part in ("--set", one)]
    ended = slotlab(
        "train", "--preset", "dynamics", "--cache", path, *options, "--steps", 1, "--out", tmp_path / "world"
    )
    assert ended.code == 0 and "tracks of an earlier version, without places by the frames' edges" in ended.said
    model = load_dynamics(tmp_path / "world").model
    assert isinstance(model, DynamicsModel) and not model.config.refined


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
    coding = max(np.abs(seen[0] - other).mean() for other in seen[1:])  # levels of 255 that a film's coding changes
    assert coding < 4
    truth, *predicted = np.split(frames[5][18:].astype(int), 4, axis=1)
    assert min(np.abs(truth - other).mean() for other in predicted) > 2 * coding + 2


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


def test_what_hits_something_changes_its_acceleration() -> None:
    """One object falls all the way, one turns back between frames 4 and 5, one is hidden in frame 4."""
    t = torch.arange(8.0).double()
    falls = torch.stack([0.05 * t**2, 0.5 * t], -1)
    turns = torch.stack([t, (t - 4.5).abs()], -1)
    hidden = falls.clone()
    hidden[4] = torch.nan
    found = hits(torch.stack([falls, turns, hidden], 1))
    assert found.any(0).tolist() == [False, True, False]
    assert found[:, 1].nonzero().flatten().tolist() == [5, 7], "where the push begins, and where it ends"
    assert not hits(falls[:2].unsqueeze(1)).any()


def test_errors_of_features_are_told_of_objects(loaded: LoadedRun) -> None:
    """Over the patches that an object covers, by how much of each it does."""
    clip = clip_of(loaded)
    truth = truth_of(loaded, clip)
    predicted = rollout(clip)
    one = torch.zeros_like(truth.groups["moving"])
    one[:, 1] = True
    found = frame_values(predicted, clip, replace(truth, groups={"one": one}))
    errors = []  # of each patch: as if it were the whole frame
    for patch in range(16):
        only = Clip(clip.model, clip.seen, predicted.features.new_zeros(clip.dense.shape), clip.burn_in)
        only.dense[:] = clip.dense
        only.dense[clip.burn_in :] = predicted.features
        only.dense[clip.burn_in :, patch] = clip.dense[clip.burn_in :, patch]
        errors.append(16 * frame_values(predicted, only, None)["mse"].numpy())
    share = (truth.labels.numpy() == 2).reshape(3, 4, 8, 4, 8).mean((2, 4)).reshape(3, 16)
    np.testing.assert_allclose(found["mse_one"], (share * np.stack(errors, -1)).sum(-1) / share.sum(-1), rtol=1e-5)
    assert {"mbo_hit", "centre_free", "mse_still"} <= frame_values(predicted, clip, truth).keys()
    bare = frame_values(Predicted(predicted.features), clip, truth)
    assert "mse_moving" in bare and "mbo_moving" not in bare


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
