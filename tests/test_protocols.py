"""Scores under published protocols, against scikit-learn, pycocotools and definitions written out pixel by pixel."""

from __future__ import annotations

import itertools
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import adjusted_rand_score

from featcache.errors import IncompatibleError, UsageError
from featcache.sources import open_source
from featcache.sources.video import Instance, Video
from featcache.store.reading import FeatureStore
from slotlab.masks.labels import masks_to_labels
from slotlab.masks.refine import refine
from slotlab.protocols.clevrtex import pairs
from slotlab.protocols.detections import Detections, confidence
from slotlab.protocols.protocol import ANY, Protocol, Terms, Void
from slotlab.protocols.published import PROTOCOLS, asked
from slotlab.protocols.scorer import ProtocolScorer, _nearest
from slotlab.protocols.scores import SCORES, TableScore, counted
from slotlab.protocols.store import Applied, apply
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.follow import follow
from slotlab.scoring.metrics import mean_best_overlap
from slotlab.scoring.refined import Refined
from slotlab.scoring.tables import contingency, labelled_frames
from slotlab.scoring.tracks import track_scores
from tests.commands import Slotlab
from tests.published import annotation, coco, coco_image, voc
from tests.synthetic import DiscSource, PartlyKnown, make_store

PAGE = Path(__file__).parent.parent / "docs" / "protocols.md"
SLOTS, OBJECTS = 4, 3
VOIDS: tuple[Void, ...] = ("left out", "background", "in predictions")


# -- the records -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda each: each.name)
def test_a_protocol_is_whole(protocol: Protocol) -> None:
    page = PAGE.read_text()
    assert f"## {protocol.name}" in page and protocol.of.split(" ")[0] in page, "the page says nothing of it"
    for data, terms in protocol.on.items():
        assert terms.scores and all(set(keys) <= SCORES.keys() for keys in terms.scores.values())
        assert ("chunk" in terms.scores) is (terms.chunk > 0)
        assert bool(terms.beside) is (data != ANY), "numbers are published of data sets"
        assert data == ANY or data in page


def test_names_are_taken_apart() -> None:
    found = asked(["spot:voc", "all", "davis-unsupervised"])
    assert {each.protocol.name for each in found} == PROTOCOLS.keys()
    assert {each.protocol.name for each in found if each.required} == {"spot", "davis-unsupervised"}
    assert next(each.data for each in found if each.protocol.name == "spot") == "voc"
    for name, said in {
        "dinosaurus": "no such protocol; there is: slotlab, dinosaur",
        "spot:mars": "no terms for",
    }.items():
        with pytest.raises(UsageError, match=said):
            asked([name])


# -- scores of tables --------------------------------------------------------------------------------------


def random_case(seed: int, least: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """The slot of each pixel, and its truth from ``least``: -1 is not known. Often slots or objects are absent."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(3, 9, 2))
    found = rng.integers(0, rng.integers(1, SLOTS + 1), shape)
    truth = rng.integers(least, rng.integers(1, OBJECTS + 2), shape)
    copied = rng.random(shape) < 0.6  # so that some overlap is large
    return np.where(copied & (truth >= 0), truth % SLOTS, found), truth


def score(key: str, found: np.ndarray, truth: np.ndarray, void: Void = "left out") -> float:
    counts = contingency(torch.from_numpy(found.ravel()[None]), torch.from_numpy(truth.ravel()[None] + 1), SLOTS, 5)
    of = SCORES[key]
    assert isinstance(of, TableScore)
    return float(of.of(counted(counts, void, of.rows)))


def iou(one: np.ndarray, other: np.ndarray) -> float:
    union = (one | other).sum()
    return (one & other).sum() / union if union else 0.0


def overlaps(found: np.ndarray, truth: np.ndarray, void: Void, background: bool) -> np.ndarray:
    """IoU of each true segment that is there (rows) with each slot."""
    truth = np.where((truth < 0) & (void == "background"), 0, truth)
    seen = np.ones(truth.shape, bool) if void == "in predictions" else truth >= 0
    numbers = [n for n in np.unique(truth) if n >= (0 if background else 1)]
    return np.array([[iou(truth == n, (found == slot) & seen) for slot in range(SLOTS)] for n in numbers])


def best_matching(values: np.ndarray) -> float:
    rows, columns = values.shape
    wide = np.pad(values, ((0, 0), (0, max(0, rows - columns))))
    return max(
        sum(wide[k, c] for k, c in enumerate(order)) for order in itertools.permutations(range(wide.shape[1]), rows)
    )


@pytest.mark.parametrize("void", VOIDS)
@pytest.mark.parametrize("seed", range(40))
def test_overlaps_are_those_of_their_definition(seed: int, void: Void) -> None:
    found, truth = random_case(seed)
    for background, suffix in ((False, ""), (True, "_all")):
        values = overlaps(found, truth, void, background)
        expected = (values.max(1).mean(), best_matching(values) / len(values)) if len(values) else (np.nan, np.nan)
        for key, value in zip(("mbo", "miou"), expected, strict=True):
            if background or void != "in predictions":  # a protocol with that void counts the background
                assert score(f"{key}{suffix}", found, truth, void) == pytest.approx(value, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("void", VOIDS)
@pytest.mark.parametrize("seed", range(40))
def test_rand_indices_are_scikit_learns(seed: int, void: Void) -> None:
    found, truth = random_case(seed)
    pixels = np.where((truth < 0) & (void == "background"), 0, truth)
    inside = pixels > 0
    expected = adjusted_rand_score(pixels[inside], found[inside]) if inside.any() else np.nan
    assert score("fg_ari", found, truth, void) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    several = expected if len(np.unique(pixels[inside])) > 1 else np.nan
    assert score("fg_ari_many", found, truth, void) == pytest.approx(several, abs=1e-12, nan_ok=True)
    known = pixels >= 0
    expected = adjusted_rand_score(pixels[known], found[known]) if known.any() else np.nan
    assert score("ari", found, truth, void) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("seed", range(40))
def test_clevrtex_scores_are_those_of_their_definition(seed: int) -> None:
    found, truth = random_case(seed, least=0)
    numbers = np.unique(truth)
    values = np.array([[iou(truth == n, found == slot) for slot in range(SLOTS)] for n in range(SLOTS)])
    assert score("miou_true", found, truth) == pytest.approx(best_matching(values) / len(numbers), abs=1e-12)
    areas = np.array([(truth == n).sum() for n in range(SLOTS)])
    assert score("msc", found, truth) == pytest.approx((areas * values.max(1)).sum() / areas.sum(), abs=1e-12)
    # Of several best matchings one counts: the means over pairs are those of some matching of the largest total.
    best = best_matching(values)
    means = []
    for order in itertools.permutations(range(SLOTS)):
        own = values[range(SLOTS), order]
        if own.sum() > best - 1e-9:
            there = np.array([(truth == n).any() or (found == s).any() for n, s in enumerate(order)])
            areas = [(truth == n).sum() + (found == s).sum() for n, s in enumerate(order)]
            both = [2 * ((truth == n) & (found == s)).sum() for n, s in enumerate(order)]
            dice = np.array([b / a if a else 0.0 for a, b in zip(areas, both, strict=True)])
            few = max(there.sum() - 1, 1e-300) if there.sum() > 1 else np.nan
            means.append((own.sum() / there.sum(), own[1:].sum() / few, dice.sum() / there.sum(), dice[1:].sum() / few))
    ours = [score(key, found, truth) for key in ("miou_pairs", "miou_pairs_fg", "dice", "dice_fg")]
    assert any(np.allclose(ours, expected, rtol=0, atol=1e-12, equal_nan=True) for expected in means)


def test_pairs_of_more_objects_than_masks() -> None:
    table = torch.zeros(9, 2, dtype=torch.int64)
    table[[0, 3, 7], [0, 1, 1]] = torch.tensor([5, 4, 1])
    found = pairs(table)
    assert found.iou.tolist() == [1.0, 0, 0, 0.8, 0, 0, 0, 0] and int(found.either.sum()) == int(found.true.sum()) == 3


# -- detections --------------------------------------------------------------------------------------------


def average_precision(frames: list[tuple[np.ndarray, np.ndarray, np.ndarray]], threshold: float) -> tuple[float, float]:
    """AP and recall at one IoU: greedy matches in order of confidence, precision made monotonous, 101 recalls."""
    hits, total = [], 0
    for found, truth, sure in frames:
        free = [n for n in np.unique(truth) if n > 0]
        total += len(free)
        slots = [s for s in np.unique(found[truth >= 0])]
        for slot in sorted(slots, key=lambda s: -sure[s]):
            mask = (found == slot) & (truth >= 0)
            best = max(free, key=lambda n: iou(mask, truth == n), default=None)
            hit = best is not None and iou(mask, truth == best) >= threshold
            if hit:
                free.remove(best)
            hits.append((sure[slot], hit))
    right = np.cumsum([hit for _, hit in sorted(hits, key=lambda each: -each[0])])
    precision = right / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    recall = right / total
    at = [precision[recall >= r - 1e-12].max(initial=0) for r in np.linspace(0, 1, 101)]
    return float(np.mean(at)), float(recall[-1])


@pytest.mark.parametrize("seed", range(8))
def test_ap_and_ar_are_those_of_their_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = [(*random_case(100 * seed + k), rng.random(SLOTS)) for k in range(12)]
    detections = Detections()
    for frame in frames:
        detections.add(*frame)
    stats = detections.stats()
    each = [average_precision(frames, threshold) for threshold in np.linspace(0.5, 0.95, 10)]
    expected = (np.mean([ap for ap, _ in each]), each[0][0], np.mean([recall for _, recall in each]))
    assert [stats[0], stats[1], stats[8]] == pytest.approx(expected, abs=1e-9)


def test_confidence_is_that_of_the_pixels_a_slot_holds() -> None:
    masks = torch.tensor([[[1.0, 1.0, 0.0]], [[0.0, 0.0, 0.5]], [[0.0, 0.0, 0.5]]])
    assert confidence(masks).tolist() == [1.0, 0.5, 0.5]


# -- one pass over a store ---------------------------------------------------------------------------------


class Labelled(PartlyKnown):
    """Discs of two classes, two of one in every second video."""

    def read(self, split: str, index: int) -> Video:
        video = super().read(split, index)
        names = ("dog", "cat") if index % 2 else ("dog", "dog")
        instances: tuple[Instance, ...] = tuple(
            replace(each, category=name) for each, name in zip(video.instances, names, strict=True)
        )
        return replace(video, instances=instances)


def scored(run: Path, store: FeatureStore, *applied: Applied) -> dict[str, Any]:
    loaded = load_run(run, store.path)
    split = loaded.split("validation")
    scorer = ProtocolScorer(split, applied, loaded.model.slots)
    for followed in follow(loaded, split):
        scorer.add(followed)
    found: dict[str, Any] = scorer.result()
    return found


def protocol(scores: dict[Any, tuple[str, ...]], size: int = 32, **terms: Any) -> Applied:
    of = Terms(scores, **terms)
    return Applied(Protocol("mine", "a test", {ANY: of}), of, ANY, (size, size))


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("partly") / "s.zarr", Labelled())


def test_the_own_protocol_is_what_eval_scores(shared_run: Path, partly: FeatureStore) -> None:
    split = partly["validation"]
    found = scored(shared_run, partly, apply(PROTOCOLS["slotlab"], split))["slotlab"]["scores"]
    values = evaluate(load_run(shared_run, partly.path), "validation").values
    for key in ("fg_ari", "mbo", "miou", "ari"):
        assert found["frame"][key] == pytest.approx(values[key], abs=1e-12)
        assert found["video"][key] == pytest.approx(values[f"{key}_video"], abs=1e-12)
    assert found["frame"]["units"] == 7  # labelled: frames 0 and 5 of video 0, all 5 of video 1


@pytest.mark.parametrize(("size", "chunk"), [(32, 2), (16, 3), (8, 4)])
def test_units_and_sizes_are_those_asked_for(shared_run: Path, partly: FeatureStore, size: int, chunk: int) -> None:
    """Against masks, truth and units put together by hand: truth resized by Pillow, scores by scikit-learn and sets."""
    keys = ("fg_ari", "mbo", "mbo_class")
    applied = protocol({"frame": keys, "chunk": keys, "video": keys}, size, chunk=chunk)
    found = scored(shared_run, partly, applied)["mine"]["scores"]
    loaded = load_run(shared_run, partly.path)
    split = loaded.split("validation")
    by_hand: dict[str, list[tuple[float, float, float]]] = {unit: [] for unit in ("frame", "chunk", "video")}
    for followed in follow(loaded, split):
        slots = masks_to_labels(followed.masks, (size, size)).numpy()
        assert followed.truth is not None
        pixels = [
            np.asarray(Image.fromarray(t.astype(np.int32)).resize((size, size), 0)) for t in followed.truth.numpy()
        ]
        truth = np.stack(pixels)
        names = [each.category for each in split.instances(followed.video)]
        for unit, length in (("frame", 1), ("chunk", chunk), ("video", len(truth))):
            for start in range(0, len(truth) - length + 1, length):
                one, other = slots[start : start + length], truth[start : start + length]
                if not (other > 0).any():
                    continue
                classes = np.where(other > 0, np.array([0, *({"dog": 1, "cat": 2}[n] for n in names)])[other], other)
                inside = other > 0
                by_hand[unit].append(
                    (
                        adjusted_rand_score(other[inside], one[inside]),
                        overlaps(one, other, "left out", False).max(1).mean(),
                        overlaps(one, classes, "left out", False).max(1).mean(),
                    )
                )
    for unit, values in by_hand.items():
        assert [found[unit][key] for key in keys] == pytest.approx(np.mean(values, axis=0).tolist(), abs=1e-12)


@pytest.mark.parametrize(("stored", "scored"), [(256, 224), (256, 128), (448, 320), (1080, 480), (854, 427)])
def test_truth_is_taken_as_by_torch(stored: int, scored: int) -> None:
    """But where a centre lies on the edge of two pixels, which torch's rounding decides."""
    ours, places = _nearest(stored, scored), torch.arange(stored, dtype=torch.float64)
    theirs = F.interpolate(places.view(1, 1, -1), scored, mode="nearest-exact").flatten()
    clear = (2 * torch.arange(scored) + 1) * stored % (2 * scored) != 0
    assert torch.equal(ours[clear].double(), theirs[clear]) and (ours - theirs).abs().max() <= 1


def test_tracks_are_means_over_the_objects_of_all_videos(shared_run: Path, partly: FeatureStore) -> None:
    found = scored(shared_run, partly, protocol({"video": ("j_and_f", "j", "f")}))["mine"]["scores"]["video"]
    loaded = load_run(shared_run, partly.path)
    values = []
    for followed in follow(loaded, loaded.split("validation")):
        assert followed.truth is not None
        known = followed.truth.numpy() >= 0
        frames = known.any((1, 2))
        if frames.any():
            slots = masks_to_labels(followed.masks, (32, 32)).numpy()
            truth = np.where(known, followed.truth.numpy(), 0)
            of = track_scores(slots[frames], truth[frames], ~known[frames])
            values += [*zip(of.j_and_f, of.j, of.f, strict=True)]
    assert found["objects"] == len(values) and found["units"] == 2
    assert [found[key] for key in ("j_and_f", "j", "f")] == pytest.approx(np.mean(values, axis=0).tolist())


class OneDisc(DiscSource):
    def read(self, split: str, index: int) -> Video:
        video = super().read(split, index)
        assert video.segmentations is not None
        return Video(video.id, video.frames, np.minimum(video.segmentations, 1), video.instances[:1])


def test_videos_of_one_object_have_no_fg_ari(shared_run: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "one.zarr", OneDisc())
    found = scored(shared_run, store, apply(PROTOCOLS["slotlab"], store["validation"]))["slotlab"]["scores"]
    for unit, count in (("frame", 8), ("video", 2)):
        assert found[unit]["one_object"] == found[unit]["units"] == count
        assert found[unit]["fg_ari"] is None and found[unit]["fg_ari_many"] is None and found[unit]["mbo"] > 0
    assert found["frame"]["mbo_class"] is None  # no object has a category


# -- stores that a protocol asks for -----------------------------------------------------------------------


def extracted(slotlab: Slotlab, *words: object) -> None:
    ended = slotlab("extract", *words)
    assert ended.code == 0, ended.said


@pytest.mark.parametrize("data", ["coco", "voc"])
def test_the_extraction_that_it_names_fits(data: str, slotlab: Slotlab, tmp_path: Path) -> None:
    place = tmp_path / "data set"
    if data == "coco":
        image = coco_image(9, (24, 32))
        crowd = annotation(2, 9, {"size": [24, 32], "counts": [500, 20, 248]}, iscrowd=1)
        coco(place, "val", [image], [annotation(1, 9, [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]), crowd])
        split = "val"
    else:
        voc(place, {"val": ["2007_000032"]})
        split = "val"
    words = ("--backbone", "resnet18", "--weights", "random", "--tap", "layer1", "--input-size", 64)
    extracted(slotlab, *words, "--data", place, "--split", split, "--out", "first.zarr")
    with pytest.raises(IncompatibleError) as told:
        apply(PROTOCOLS["spot"], FeatureStore.open("first.zarr")[split])
    line = str(told.value)
    assert (
        "\n" not in line and "frames cut by crop (these: squash)" in line and "masks of 320 px (these: 32x24)" in line
    )
    assert ("crowds=objects" in line) is (data == "coco")
    command = shlex.split(line.partition("make it with: ")[2].partition("; then ")[0])
    assert command[:2] == ["slotlab", "extract"]
    extracted(slotlab, *command[2:])
    store = FeatureStore.open(command[command.index("--out") + 1])
    applied = apply(PROTOCOLS["spot"], store[split])
    assert applied.data == data and applied.size == (320, 320) == store[split].spec.frame_size
    assert applied.edition == ("2017" if data == "coco" else "2012") and applied.beside
    if data == "coco":
        assert len(store[split].instances(0)) == 2
    with pytest.raises(IncompatibleError, match=r"davis-unsupervised scores videos, and these are single images"):
        apply(PROTOCOLS["davis-unsupervised"], store[split])
    with pytest.raises(IncompatibleError, match=rf"clevrtex is for clevrtex, and this is {data}; leave it out, or say"):
        apply(PROTOCOLS["clevrtex"], store[split])


def test_crowds_are_read_as_asked(tmp_path: Path) -> None:
    crowd = annotation(2, 9, {"size": [24, 32], "counts": [500, 20, 248]}, iscrowd=1)
    coco(tmp_path, "val", [coco_image(9)], [crowd, annotation(1, 9, [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]])])
    found = {}
    for how in ("ignored", "background", "objects"):
        source = open_source(f"{tmp_path}?crowds={how}")
        image = source.read("val", 0)
        assert image.segmentations is not None
        found[how] = (
            len(image.instances),
            int(image.ignored.sum()),
            np.bincount(image.segmentations.ravel(), minlength=3)[1:].tolist(),
            source.fingerprint("val"),
        )
    objects = found["background"][2][0]
    assert found["ignored"][:3] == (1, 20, [objects, 0]) and found["background"][:3] == (1, 0, [objects, 0])
    assert found["objects"][:3] == (2, 0, [20, objects])  # in the order of the annotations
    assert len({of[3] for of in found.values()}) == 3
    assert open_source(tmp_path).fingerprint("val") == found["ignored"][3]


def test_nothing_stands_beside_another_edition(slotlab: Slotlab, tmp_path: Path) -> None:
    voc(tmp_path / "VOCdevkit", {"val": ["2007_000032"]}, year="2007")
    words = ("--backbone", "resnet18", "--weights", "random", "--tap", "layer1", "--input-size", 224)
    cut = ("--fit", "crop", "--frame-size", 320)
    extracted(slotlab, *words, *cut, "--data", tmp_path / "VOCdevkit", "--out", "s.zarr")
    split = FeatureStore.open("s.zarr")["val"]
    beside = {name: apply(PROTOCOLS[name], split).beside for name in ("dinosaur", "spot", "genera1z")}
    assert beside["dinosaur"] == beside["spot"] == "" and beside["genera1z"].startswith("SmoothSA")
    assert open_source().edition == "a"  # the embedded MOVi-A


# -- the command -------------------------------------------------------------------------------------------


def test_eval_by_protocol(slotlab: Slotlab, run: Path) -> None:
    plain = slotlab("eval", run, "--json").json
    assert "protocols" not in plain
    found = slotlab("eval", run, "--protocol", "slotlab", "--protocol", "all", "--json").json
    told = found.pop("protocols")
    assert found == plain and told.keys() == PROTOCOLS.keys()
    assert set(told["slotlab"]["scores"]["frame"]) >= {"fg_ari", "fg_ari_many", "units", "one_object", "intervals"}
    assert told["davis-unsupervised"]["scores"]["video"]["objects"] == 4
    assert told["class-agnostic"]["scores"]["frame"]["units"] == 8
    assert "is for movi, and this is a store that records no source" in told["savi"]["left_out"]
    ended = slotlab("eval", run, "--protocol", "all")
    assert ended.code == 0 and "J&F" in ended.out and "may stand" in ended.out
    assert "masks of 32x32; 2 videos, 4 objects, 0 tracks left out" in " ".join(ended.out.split())
    assert "not scored: " in ended.said and "protocol spot is for coco, voc, movi" in " ".join(ended.said.split())


def test_refined_masks_are_scored_beside_the_plain_ones(slotlab: Slotlab, run: Path) -> None:
    words = ("eval", run, "--protocol", "slotlab", "--protocol", "davis-unsupervised", "--protocol", "class-agnostic")
    plain = slotlab(*words, "--json").json["protocols"]
    found = slotlab(*words, "--refine", "guided", "--json").json
    told = found["protocols"]
    refined = {name: of.pop("refined") for name, of in told.items()}
    assert told == plain and {of["method"] for of in refined.values()} == {"guided"}
    for key in ("fg_ari", "mbo", "miou"):  # by the scorer of outlines, which knows no protocols
        assert refined["slotlab"]["scores"]["frame"][key] == pytest.approx(found["refined"][key], abs=1e-12)
    loaded = load_run(run)
    split = loaded.split("validation")
    tracks = []
    for followed in follow(loaded, split):
        assert followed.truth is not None
        fine = refine(followed.masks, torch.from_numpy(split.video(followed.video)), "guided").argmax(1)
        tracks.append(track_scores(fine.numpy(), followed.truth.numpy(), np.zeros_like(followed.truth.numpy(), bool)))
    j = np.concatenate([each.j for each in tracks]).mean()
    scores = refined["davis-unsupervised"]["scores"]["video"]
    assert scores["j"] == pytest.approx(float(j)) and scores["j"] != plain["davis-unsupervised"]["scores"]["video"]["j"]
    assert refined["class-agnostic"]["scores"]["frame"].keys() == plain["class-agnostic"]["scores"]["frame"].keys()
    ended = slotlab(*words, "--refine", "guided")
    assert ended.code == 0 and ended.out.count("guided") >= 3


def test_refined_masks_at_another_size_are_read_where_pixels_lie(shared_run: Path, partly: FeatureStore) -> None:
    loaded = load_run(shared_run, partly.path)
    split = loaded.split("validation")
    applied = protocol({"frame": ("mbo",)}, 16)  # half the size of the stored frames
    scorer = ProtocolScorer(split, [applied], loaded.model.slots, Refined(split, "guided"))
    overlaps = []
    for followed in follow(loaded, split):
        scorer.add(followed)
        assert followed.truth is not None
        known = labelled_frames(followed.truth)
        if not known.any():
            continue
        fine = refine(followed.masks[known], torch.from_numpy(split.video(followed.video))[known], "guided").argmax(1)
        half, truth = fine[:, 1::2, 1::2], followed.truth[known][:, 1::2, 1::2]
        overlaps.append(mean_best_overlap(contingency(half.flatten(1), truth.flatten(1), SLOTS, followed.labels)))
    values = torch.cat(overlaps)
    assert scorer.result()["mine"]["refined"]["scores"]["frame"]["mbo"] == pytest.approx(float(values.nanmean()))


def test_a_missing_evaluator_is_one_line(slotlab: Slotlab, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    ended = slotlab("eval", run, "--protocol", "class-agnostic")
    assert ended.code == 2 and "pip install 'slotlab[coco]'" in " ".join(ended.said.split())
    found = slotlab("eval", run, "--protocol", "all", "--json").json["protocols"]
    assert "pip install" in found["class-agnostic"]["left_out"] and "scores" in found["slotlab"]


def test_eval_refuses_a_protocol_that_does_not_fit(slotlab: Slotlab, run: Path) -> None:
    ended = slotlab("eval", run, "--protocol", "spot")
    assert ended.code == 4 and "leave it out, or say that the videos are of such a data set: --protocol spot:coco" in (
        " ".join(ended.said.split())
    )
    named = slotlab("eval", run, "--protocol", "savi:movi")
    assert named.code == 4 and "masks of 128 px (these: 32x32)" in " ".join(named.said.split())
    assert slotlab("eval", run, "--protocol", "dinosaurus").code == 2
