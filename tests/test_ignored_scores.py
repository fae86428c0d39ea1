"""Pixels and frames whose truth is not known: no score counts them, and pictures show them."""

from __future__ import annotations

import shutil
import zlib
from base64 import b64decode
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from featcache.errors import DataError
from featcache.sources.video import Video
from featcache.store.reading import FeatureStore, Split
from slotlab.masks.binarise import threshold_labels
from slotlab.masks.labels import fine_labels, masks_to_labels
from slotlab.models.kmeans import kmeans
from slotlab.models.randomness import Draws
from slotlab.pictures import palette
from slotlab.report.gallery import pack
from slotlab.report.gather import gather
from slotlab.runs.loaded import LoadedRun, load_run
from slotlab.scoring.boundaries import boundary_f, tolerance_px
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.fine import outline_scores
from slotlab.scoring.follow import follow
from slotlab.scoring.over_frames import trace
from slotlab.training.look import look
from tests.commands import Slotlab
from tests.reporting import make_run
from tests.synthetic import GRID, SIZE, DiscSource, PartlyKnown, make_store

MADE = Path(__file__).parent / "fixtures" / "v0.1"


class Unlabelled(PartlyKnown):
    """Videos with masks by their source's word, but none that is known."""

    def read(self, split: str, index: int) -> Video:
        video = super().read(split, index)
        masks = np.zeros_like(video.segmentations)
        return Video(video.id, video.frames, masks, (), None, np.zeros(len(masks), bool))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store that the tests only read."""
    return make_store(tmp_path_factory.mktemp("ignored") / "s.zarr", PartlyKnown(), chunk_frames=4)


@pytest.fixture(scope="module")
def loaded(kept: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    return load_run(make_run(tmp_path_factory.mktemp("ignored") / "run", kept, steps=20))


@pytest.fixture(scope="module")
def found(loaded: LoadedRun) -> Evaluation:
    return evaluate(loaded)


# -- scores ------------------------------------------------------------------------------------------------


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def reference(true: np.ndarray, pred: np.ndarray, objects: tuple[int, ...] = ()) -> dict[str, float]:
    """Scores of the labels (P,) of some pixels, by scikit-learn, numpy and scipy; of some ``objects`` only."""
    present = [k for k in np.unique(true) if k > 0]
    ious = np.array([[overlap(true == k, pred == slot) for slot in range(5)] for k in present])
    inside, nan = true > 0, float("nan")
    rows, columns = linear_sum_assignment(ious, maximize=True) if present else ((), ())
    own = dict(zip(rows, ious[rows, columns], strict=True)) if present else {}
    chosen = [row for row, k in enumerate(present) if not objects or k in objects]
    return {
        "fg_ari": adjusted_rand_score(true[inside], pred[inside]) if inside.any() else nan,
        "ari": adjusted_rand_score(true, pred),
        "mbo": float(np.mean([ious[row].max() for row in chosen])) if chosen else nan,
        "miou": float(np.mean([own.get(row, 0.0) for row in chosen])) if chosen else nan,
    }


def known_pixels(split: Split) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Each labelled video with its truth and what of it is known, by the source."""
    source = PartlyKnown()
    videos = [(v, source.read(split.name, v).segmentations, source.known(split.name, v)) for v in split.videos]
    return [(v, truth, known) for v, truth, known in videos if known.any()]  # type: ignore[misc]


def mean(rows: list[dict[str, float]], key: str) -> float:
    return float(np.nanmean([row[key] for row in rows]))


def labels_of(loaded: LoadedRun, split: Split, video: int) -> np.ndarray:
    return masks_to_labels(loaded.segment(split, video).masks_on_grid, (SIZE, SIZE)).numpy()


def test_scores_are_those_of_the_known_pixels(loaded: LoadedRun, found: Evaluation) -> None:
    split, frames, videos, metal = loaded.split(), [], [], []
    for video, truth, known in known_pixels(split):
        labels = labels_of(loaded, split, video)
        numbers = tuple(k for k, i in enumerate(split.instances(video), 1) if i.material == "metal")
        seen = [t for t in range(len(truth)) if known[t].any()]
        here = [reference(truth[t][known[t]], labels[t][known[t]]) for t in seen]
        metal += [reference(truth[t][known[t]], labels[t][known[t]], numbers) for t in seen]
        videos.append(reference(truth[known], labels[known]))
        frames += here
        for key in ("fg_ari", "mbo"):
            assert found.by_video[split.names[video]][key] == pytest.approx(mean(here, key))
    for key in ("fg_ari", "ari", "mbo", "miou"):
        assert found.values[key] == pytest.approx(mean(frames, key)), key
        assert found.values[f"{key}_video"] == pytest.approx(mean(videos, key)), key
    for key in ("mbo", "miou"):
        assert found.groups.summaries["by_material"]["metal"].values[key] == pytest.approx(mean(metal, key)), key


def test_an_evaluation_says_what_it_counted(loaded: LoadedRun, found: Evaluation) -> None:
    summary, split = found.summary, loaded.split()
    assert (summary.frames, summary.videos, summary.labelled_frames) == (18, 3, 2 + 5)
    assert found.ignored_pixels == pytest.approx(7 / SIZE)
    assert found.left_out == "7 of 18 frames are labelled, 21.9% of their pixels are ignored"
    assert sum(of.frames for of in found.groups.summaries["by_objects"].values()) == 7
    empty = [not truth[t].any() for _, truth, known in known_pixels(split) for t in range(len(truth)) if known[t].any()]
    assert summary.skipped_frames == sum(empty)
    raw = found.as_dict()
    assert (raw["frames"], raw["labelled_frames"], raw["ignored_pixels"]) == (18, 7, found.ignored_pixels)
    assert Evaluation.from_dict(raw) == found


def test_the_ceiling_averages_known_pixels(loaded: LoadedRun, found: Evaluation) -> None:
    rows, cells = [], SIZE // GRID[0]
    for _, truth, known in known_pixels(loaded.split()):
        for true, sure in zip(truth, known, strict=True):
            if not sure.any():
                continue
            soft = np.zeros((3, *GRID), np.float32)
            for k, y, x in product(range(3), range(GRID[0]), range(GRID[1])):
                cell = (slice(cells * y, cells * (y + 1)), slice(cells * x, cells * (x + 1)))
                soft[k, y, x] = ((true[cell] == k) & sure[cell]).sum() / max(1, sure[cell].sum())
            fine = F.interpolate(torch.from_numpy(soft)[None], size=(SIZE, SIZE), mode="bilinear")[0].argmax(0).numpy()
            rows.append(reference(true[sure], fine[sure]))
    for key in ("fg_ari", "ari", "mbo", "miou"):
        assert found.references.ceiling[key] == pytest.approx(mean(rows, key)), key


def test_the_floor_counts_known_pixels(loaded: LoadedRun, found: Evaluation) -> None:
    split, rows = loaded.split(), []
    for video, truth, known in known_pixels(split):
        seen = known.any((1, 2))
        clusters = kmeans(split.tokens("block1", video)[torch.from_numpy(seen)].float(), 5, 8, Draws(video), 4).labels
        masks = F.one_hot(clusters, 5).transpose(1, 2).reshape(-1, 5, *GRID).float()
        labels = masks_to_labels(masks, (SIZE, SIZE)).numpy()
        rows += [reference(t[k], p[k]) for t, k, p in zip(truth[seen], known[seen], labels, strict=True)]
    for key in ("fg_ari", "ari", "mbo", "miou"):
        assert found.references.floors["kmeans_raw"][key] == pytest.approx(mean(rows, key)), key


def outline_of(mask: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or diagonal neighbour, where both are known, one by one."""
    height, width = mask.shape
    found = set()
    for y, x, (dy, dx) in product(range(height), range(width), ((0, 1), (1, 0), (1, 1))):
        here, there = (y, x), (y + dy, x + dx)
        if there[0] < height and there[1] < width and known[here] and known[there] and mask[here] != mask[there]:
            found.add(here)
    return np.array(sorted(found)).reshape(-1, 2)


def near(one: np.ndarray, other: np.ndarray) -> float:
    distance = ((one[:, None] - other[None]) ** 2).sum(-1)
    return float((distance <= tolerance_px((SIZE, SIZE)) ** 2).any(1).mean()) if len(one) else 1.0


def test_outlines_are_known_ones(loaded: LoadedRun) -> None:
    split, scores, bleeds = loaded.split(), [], []
    for video, truth, known in known_pixels(split):
        (followed,), labels = follow(loaded, split, [video]), labels_of(loaded, split, video)
        for t in (t for t in range(len(truth)) if known[t].any()):
            frame = []
            slots = followed_slots(followed, t)
            for k in (k for k in np.unique(truth[t]) if k):
                slot = slots[k - 1]
                found, true = labels[t] == slot, truth[t] == k
                edges = outline_of(found, known[t]), outline_of(true, known[t])
                precision, recall = near(*edges), near(*edges[::-1])
                hit = slot >= 0 and precision + recall > 0
                frame.append(2 * precision * recall / (precision + recall) if hit else 0.0)
                bleeds += [1 - (found & true).sum() / (found & known[t]).sum()] if slot >= 0 else []
            scores += [np.mean(frame)] if frame else []
    result = outline_scores(loaded)["boundaries"]
    assert result["boundary_f"] == pytest.approx(np.mean(scores))
    assert result["bleeding"] == pytest.approx(np.mean(bleeds))


def test_refined_and_binarised_masks_are_scored_alike(loaded: LoadedRun) -> None:
    split, fine, sure = loaded.split(), [], []
    for video, truth, known in known_pixels(split):
        masks = loaded.segment(split, video).masks_on_grid
        labels = fine_labels(masks, split.video(video), "guided")
        seen = [t for t in range(len(truth)) if known[t].any()]
        fine += [reference(truth[t][known[t]], labels[t][known[t]]) for t in seen]
        sure.append(threshold_labels(masks, (SIZE, SIZE), 0.205).numpy()[known] == 5)
    found = outline_scores(loaded, None, "guided", ["threshold=0.205"])
    for key in ("fg_ari", "mbo", "miou"):
        assert found["refined"][key] == pytest.approx(mean(fine, key)), key
    unassigned = np.concatenate(sure).mean()
    assert found["binarised"]["threshold=0.205"]["unassigned"] == pytest.approx(unassigned) and 0 < unassigned < 1


def followed_slots(followed: Any, t: int) -> list[int]:
    """The slot of each object, matched one to one for the largest total IoU, by the known pixels."""
    table = followed.tables()[t].double().numpy()
    ious = np.nan_to_num(table[1:] / (table[1:].sum(1, keepdims=True) + table.sum(0) - table[1:]))
    slots = [-1] * len(ious)
    for row, column in zip(*linear_sum_assignment(ious, maximize=True), strict=True):
        slots[row] = int(column) if ious[row, column] > 0 else -1
    return slots


def test_an_outline_that_void_hides_has_no_score() -> None:
    truth = torch.zeros(1, 20, 20, dtype=torch.int16)
    truth[0, 5:15, 5:15] = -1
    truth[0, 7:13, 7:13] = 1
    labels = torch.zeros(1, 20, 20, dtype=torch.int64)
    labels[0, 6:14, 6:14] = 1
    assert boundary_f(labels, truth, torch.tensor([[1]]), 1).isnan().all()
    truth[0, 5:10, 5:15] = 0  # the upper half of the ring is background
    assert not boundary_f(labels, truth, torch.tensor([[1]]), 1).isnan().any()


# -- pictures and commands ---------------------------------------------------------------------------------


def test_frames_without_a_mask_have_no_scores_and_are_not_shown_first(loaded: LoadedRun) -> None:
    videos = {followed.video: followed for followed in follow(loaded, loaded.split())}
    assert [videos[v].middle for v in (0, 1, 2)] == [5, 2, 1]
    values = trace(videos[0])
    for key in ("mbo", "switches"):
        assert np.isnan(np.delete(values[key], [0, 5])).all()
    assert not np.isnan(values["effective_slots"]).any()
    assert np.isfinite(look(loaded.model, loaded.config, loaded.store)["eval_mbo"])


def test_ignored_pixels_are_striped() -> None:
    numbers, ignored = np.zeros((12, 12), np.uint8), np.zeros((12, 12), bool)
    numbers[:4], ignored[6:] = 2, True
    colours = palette.truth_colours(numbers, ignored)
    assert (colours[:4] == palette.rgb(palette.OBJECTS[1])).all()
    assert (colours[4:6] == palette.rgb(palette.OTHERS[0])).all()
    stripes = {palette.rgb(colour) for colour in palette.IGNORED}
    assert {tuple(colour) for colour in colours[6:].reshape(-1, 3).tolist()} == stripes
    assert not stripes & {palette.rgb(colour) for colour in (*palette.OBJECTS, *palette.OTHERS[:1])}


def test_the_page_holds_them(loaded: LoadedRun) -> None:
    found = gather([loaded.path])
    for card in pack(found.runs, 24):
        split = found.runs[0].split
        video = next(v for v, name in split.names.items() if name == card["id"])
        ignored = np.frombuffer(zlib.decompress(b64decode(card["ignored"]), -15), np.uint8)
        np.testing.assert_array_equal(ignored.reshape(-1, SIZE, SIZE), split.ignored(video))
        assert card["runs"][0]["by_frame"]["mbo"].count(None) >= (~split.labelled(video)).sum()
    assert len(found.runs[0].choices) == 2  # labelled videos


@pytest.mark.slow
def test_the_command_says_what_it_scored(slotlab: Slotlab, loaded: LoadedRun) -> None:
    told = slotlab("eval", loaded.path, "--sheet", "sheet.png", "--boundaries")
    words = "7 of 18 frames are labelled, 21.9% of their pixels are ignored"
    assert told.code == 0 and words in " ".join(told.out.split())
    assert Image.open("sheet.png").size[1] < 700  # the two labelled videos
    found = slotlab("eval", loaded.path, "--json").json
    assert (found["frames"], found["labelled_frames"]) == (18, 7)
    assert found["ignored_pixels"] == pytest.approx(7 / SIZE)
    page = slotlab("report", loaded.path, "--out", "r.html", "--markdown", "r.md")
    assert page.code == 0 and all(words in Path(file).read_text() for file in ("r.html", "r.md"))


def test_masks_of_which_nothing_is_known_are_none(tmp_path: Path, loaded: LoadedRun) -> None:
    store = make_store(tmp_path / "s.zarr", Unlabelled())
    assert not store["validation"].has_truth
    with pytest.raises(DataError, match="no pixel of its masks has a known truth, so there is nothing to score"):
        evaluate(load_run(loaded.path, store.path))
    found = gather([loaded.path], cache=store.path)
    assert found.runs[0].evaluation is None and all(card["truth"] is None for card in pack(found.runs, 24))


def test_a_run_on_an_earlier_store_is_scored_on_a_new_one(tmp_path: Path) -> None:
    """And all of its frames are labelled in both."""
    new = make_store(tmp_path / "new.zarr", DiscSource({"train": (4, 3, 2), "validation": (3, 2)}))
    old = shutil.copytree(MADE / "float16.zarr", tmp_path / "old.zarr")  # references are kept in it
    one, other = (evaluate(load_run(MADE / "default", path)) for path in (old, new.path))
    assert one.values == pytest.approx(other.values)
    for evaluation in (one, other):
        assert (evaluation.summary.labelled_frames, evaluation.ignored_pixels, evaluation.left_out) == (5, 0.0, "")
