"""A source that changes after its store was begun: what is finished stays, and the store becomes what it would be."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from featcache.backbones.backbone import Backbone, load_backbone
from featcache.errors import DataError, IncompatibleError
from featcache.extraction.changes import Changes
from featcache.extraction.extract import extract
from featcache.extraction.plan import plan
from featcache.scale.recompute import recomputed_statistics
from featcache.sources import open_source
from featcache.sources.folder import FolderSource
from featcache.sources.video import Video
from featcache.store import durable, manifest
from featcache.store.reading import FeatureStore
from featcache.store.writing import StoreWriter
from featcache.stream.stream import FeatureStream
from featcache.upkeep.convert import ConvertOptions, convert
from featcache.upkeep.repair import Means, repair
from featcache.upkeep.verify import verify
from slotlab.report.gather import current_evaluation
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.training.train import train
from tests.commands import Slotlab
from tests.growing import GROW, OPTIONS, PRUNE, Reading, drop, files, ids, put, rename, run, same_as_fresh, videos
from tests.movi_files import example, scene, write_movi
from tests.training import small


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: what a kill leaves is the matter of test_growth_killed.py."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("resnet18", weights="random", taps=("layer1",), input_size=32)


# -- a finished store --------------------------------------------------------------------------------------


def test_new_videos_are_named_and_added_only_when_asked(
    tmp_path: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    source, path = videos(tmp_path / "v", "abcd"), tmp_path / "s.zarr"
    run(path, source, backbone)
    before = files(path)
    put(source, "e", 4)
    put(source, "f", 5)
    _, changes = run(path, source, backbone)
    assert files(path) == before and changes == Changes(kept=4, new=("e", "f"))
    assert f"{path}/train: 2 videos of {source} are not in the store; --grow adds them: e, f" in caplog.messages
    reading = Reading(source)
    split, changes = run(path, reading, backbone, GROW)
    assert changes == Changes(kept=4, added=("e", "f")) and ids(split) == list("abcdef")
    assert set(reading.decoded) == {"a", "e", "f"}, "the first video is looked at, the others only stream through"
    assert same_as_fresh(split, source, backbone)


def test_videos_keep_the_places_of_their_arrival(tmp_path: Path, backbone: Backbone) -> None:
    source, path = videos(tmp_path / "v", "bcde"), tmp_path / "s.zarr"
    run(path, source, backbone)
    put(source, "a", 7)
    split, _ = run(path, source, backbone, GROW)
    assert ids(split) == list("bcdea") == list(split.spec.names)
    source_index = open_source(source).names("train").index("a")
    np.testing.assert_array_equal(split.video(4), open_source(source).read("train", source_index).frames)
    assert run(path, source, backbone)[1] == Changes(kept=5)


def test_a_changed_video_is_made_anew_and_no_other(
    tmp_path: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    source, path = videos(tmp_path / "v"), tmp_path / "s.zarr"
    run(path, source, backbone)
    put(source, "d", 9)
    reading = Reading(source)
    split, changes = run(path, reading, backbone)
    assert changes == Changes(kept=5, changed=("d",)) and set(reading.decoded) == {"a", "d"}
    assert f"train: 1 video changed in {source} since it was stored, and is made anew: d" in caplog.text
    assert same_as_fresh(split, source, backbone)
    shutil.copy(source / "masks/b/0.png", source / "masks/b/1.png")
    assert run(path, source, backbone)[1].changed == ("b",), "its masks are of it"


@pytest.mark.parametrize("frames", [2, 5, 7])
def test_a_changed_video_may_be_of_another_length(tmp_path: Path, backbone: Backbone, frames: int) -> None:
    """Those behind it get other rows, and keep their chunks."""
    source, path = videos(tmp_path / "v"), tmp_path / "s.zarr"
    before, _ = run(path, source, backbone)
    tokens = [before.tokens("layer1", video) for video in before.videos]
    put(source, "c", 8, frames)
    split, changes = run(path, source, backbone)
    assert changes.changed == ("c",) and split.spec.lengths == (3, 3, frames, 3, 3, 3)
    for video in (0, 1, 3, 4, 5):
        assert split.tokens("layer1", video).equal(tokens[video])
    np.testing.assert_array_equal(split.video(2), scene(8, frames)[0])


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two steps"])
def test_vanished_videos_stay_until_they_are_pruned(
    tmp_path: Path,
    backbone: Backbone,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    exchange: bool,
) -> None:
    if not exchange:
        monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    source, path = videos(tmp_path / "v"), tmp_path / "s.zarr"
    run(path, source, backbone)
    before = files(path)
    drop(source, "c")
    drop(source, "d")
    _, changes = run(path, source, backbone)
    assert changes == Changes(kept=4, vanished=("c", "d")) and files(path) == before
    assert (
        "2 videos are no longer in" in caplog.text and "the store keeps them, --prune removes them: c, d" in caplog.text
    )
    split, changes = run(path, source, backbone, replace(PRUNE, max_videos=4))
    assert changes == Changes(kept=4, removed=("c", "d")) and ids(split) == list("abef")
    assert "keeps its" not in caplog.text
    assert run(path, source, backbone, replace(PRUNE, max_videos=3))[1] == Changes(kept=4)
    assert f"{path}/train: keeps its 4 videos; --prune removes those that the source has no longer" in caplog.text
    assert same_as_fresh(split, source, backbone)


def test_statistics_are_those_of_what_is_there(tmp_path: Path, backbone: Backbone) -> None:
    """Also where the videos were computed in other company than a fresh extraction would give them."""
    source, path = videos(tmp_path / "v", "abcde"), tmp_path / "s.zarr"
    run(path, source, backbone)
    drop(source, "b")
    put(source, "f", 5, 4)
    put(source, "a", 11)
    split, changes = run(path, source, backbone, replace(GROW, prune=True))
    assert changes == Changes(kept=3, added=("f",), changed=("a",), removed=("b",))
    assert ids(split) == list("acdef")
    again = recomputed_statistics(split, "layer1")
    kept = split.statistics("layer1")
    assert kept.frames == again.frames == 16
    np.testing.assert_allclose(kept.covariance, again.covariance, rtol=1e-9, atol=1e-12)


def test_a_renamed_or_moved_video_is_the_same(tmp_path: Path, backbone: Backbone) -> None:
    source, path = videos(tmp_path / "v"), tmp_path / "s.zarr"
    run(path, source, backbone)
    before = files(path)
    rename(source, "a", "z")
    rename(source, "f", "a")  # another one is called a now
    reading = Reading(source)
    split, changes = run(path, reading, backbone)
    assert changes == Changes(kept=6) and files(path) == before
    rename(source, "z", "deep")
    put(source, "deep", 12)  # renamed and changed: nothing says that it was a
    split, changes = run(path, source, backbone, GROW)
    assert changes == Changes(kept=5, vanished=("a",), added=("deep",))
    assert ids(split) == [*"abcdef", "deep"]


def test_another_source_is_refused(tmp_path: Path, backbone: Backbone) -> None:
    source, path = videos(tmp_path / "v", "abc"), tmp_path / "s.zarr"
    run(path, source, backbone)
    before = files(path)
    for number, name in enumerate("abc"):
        put(source, name, 20 + number)
    with pytest.raises(
        IncompatibleError, match=r"train: .*v has none of its videos \(source_fingerprint.*choose another"
    ):
        run(path, source, backbone, replace(GROW, prune=True))
    assert files(path) == before


def test_more_of_the_same_source_needs_no_asking(tmp_path: Path, backbone: Backbone) -> None:
    source, path = videos(tmp_path / "v"), tmp_path / "s.zarr"
    run(path, source, backbone, replace(OPTIONS, max_videos=2))
    _, changes = run(path, source, backbone, replace(OPTIONS, max_videos=4))
    assert changes == Changes(kept=2, added=("c", "d"))
    put(source, "g", 6)
    assert run(path, source, backbone)[1] == Changes(kept=4, new=("e", "f", "g"))
    put(source, "a", 13)  # what is made anew does not bring the others in
    assert run(path, source, backbone)[1] == Changes(kept=3, changed=("a",), new=("e", "f", "g"))
    assert run(path, source, backbone)[1] == Changes(kept=4, new=("e", "f", "g"))


# -- a store that was stopped ------------------------------------------------------------------------------


def stopped(path: Path, source: Path, backbone: Backbone, at: str) -> list[int]:
    """Extract until a video; gives those that are finished."""

    class Stopping(FolderSource):
        def read_smaller(self, split: str, index: int, shrink: float) -> Video:
            if self.names(split)[index] == at:
                raise DataError("damaged")
            return super().read_smaller(split, index, shrink)

    todo = plan(path, Stopping(source), backbone, OPTIONS)
    with pytest.raises(DataError, match="damaged"):
        extract(todo, Stopping(source), backbone)
    return sorted(manifest.read(path / "train"))


CHANGES: dict[str, Callable[[Path], object]] = {
    "repaired": lambda source: put(source, "e", 9),
    "repaired, finished": lambda source: put(source, "b", 9),
    "repaired, longer": lambda source: put(source, "e", 9, 7),
    "removed": lambda source: drop(source, "e"),
    "renamed": lambda source: rename(source, "e", "h"),
    "renamed, finished": lambda source: rename(source, "b", "h"),
    "added": lambda source: put(source, "x", 9),
    "reordered": lambda source: rename(source, "f", "0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_a_stop_spoils_nothing(tmp_path: Path, backbone: Backbone, change: str) -> None:
    source, path = videos(tmp_path / "v", "abcdefgh" if "rename" not in change else "abcdefg"), tmp_path / "s.zarr"
    finished = stopped(path, source, backbone, "e")
    assert 2 <= len(finished) < 6
    CHANGES[change](source)
    split, changes = run(path, source, backbone)
    fresh, _ = run(tmp_path / "fresh.zarr", source, backbone)
    there = open_source(source)
    expected = [name for name in there.names("train") if not (change == "added" and name == "x")]
    kept_name = {"b": "h"} if change == "renamed, finished" else {}
    assert sorted(kept_name.get(name, name) for name in ids(split)) == sorted(expected)
    assert changes.changed == (("b",) if change == "repaired, finished" else ())
    assert changes.new == (("x",) if change == "added" else ())
    index = {fingerprint: place for place, fingerprint in enumerate(fresh.spec.fingerprints)}
    for video, fingerprint in enumerate(split.spec.fingerprints):
        one, other = split.tokens("layer1", video), fresh.tokens("layer1", index[fingerprint])
        assert (one - other).abs().max() <= 2e-3 * other.abs().max()
        np.testing.assert_array_equal(split.video(video), fresh.video(index[fingerprint]))
    if change.startswith("repaired") and "longer" not in change:
        assert files(path) == files(tmp_path / "fresh.zarr")


def test_a_split_without_a_finished_video_is_laid_out_anew(tmp_path: Path, backbone: Backbone) -> None:
    source, path = videos(tmp_path / "v", "ab"), tmp_path / "s.zarr"
    todo = plan(path, open_source(source), backbone, OPTIONS)
    with StoreWriter(path, todo.spec) as writer:
        writer.split("train", todo.splits[0].spec).close()
    put(source, "b", 1, 9)
    split, _ = run(path, source, backbone)
    assert split.spec.chunk_frames == 9 and same_as_fresh(split, source, backbone)


@pytest.mark.slow
def test_a_video_that_was_skipped_comes_once_it_is_whole(tmp_path: Path, slotlab: Slotlab) -> None:
    source = videos(tmp_path / "v", "abcd")
    good = (source / "c/1.png").read_bytes()
    (source / "c/1.png").write_bytes(good[:-40])
    command = (
        *("extract", "--backbone", "resnet18", "--weights", "random", "--tap", "layer1", "--input-size", "32"),
        *("--batch-size", "6", "--precision", "float32", "--out", "s.zarr", "--data", source, "--json"),
    )
    refused = slotlab(*command)
    assert refused.code == 3 and "c/1.png" in refused.said
    first = slotlab(*command, "--skip-damaged")
    assert first.code == 0 and len(first.json["damaged"]) == 1 and first.json["splits"] == {"train": 9}
    (source / "c/1.png").write_bytes(good)
    planned = slotlab(*command, "--skip-damaged", "--dry-run").json
    assert planned["frames_left"] == 3
    assert planned["splits"]["train"] == {
        **{"videos": 4, "frames_left": 3, "kept": 3, "added": 1},
        **{"changed": 0, "vanished": 0, "removed": 0, "new": 0},
    }
    second = slotlab(*command, "--skip-damaged")
    assert second.code == 0 and second.json["changes"]["train"]["added"] == ["c"]
    assert ids(FeatureStore.open("s.zarr")["train"]) == list("abdc") and verify(Path("s.zarr")) == []


# -- other sources -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_of_an_hdf5_file(tmp_path: Path, backbone: Backbone) -> None:
    frames = np.stack([scene(i)[0] for i in range(7)])

    def write(*rows: int) -> Path:
        with h5py.File(tmp_path / "v.h5", "w") as file:
            file["video"] = frames[list(rows)]
        return tmp_path / "v.h5"

    path = tmp_path / "s.zarr"
    run(path, write(0, 1, 2, 3), backbone)
    split, changes = run(path, write(0, 1, 2, 3, 4, 5), backbone, GROW)
    assert (changes.kept, len(changes.added)) == (4, 2) and same_as_fresh(split, tmp_path / "v.h5", backbone)
    split, changes = run(path, write(0, 6, 2, 3, 4, 5), backbone)
    assert changes.changed == ("train_00001",) and same_as_fresh(split, tmp_path / "v.h5", backbone)
    split, changes = run(path, write(4, 5, 0, 6), backbone, PRUNE)  # names are places here: what is there decides
    assert changes.kept == 4 and len(changes.removed) == 2
    for place, row in enumerate((0, 6, 4, 5)):
        np.testing.assert_array_equal(split.video(place), frames[row])
    assert run(path, write(4, 5, 0, 6), backbone)[1] == Changes(kept=4)


def test_shards_that_arrive_later(tmp_path: Path, backbone: Backbone) -> None:
    source = write_movi(tmp_path / "movi" / "1.0.0", {"train": [example(i) for i in range(6)]}, shards=3)
    last = source / "movi_a-train.tfrecord-00002-of-00003"
    kept, path, partial = last.read_bytes(), tmp_path / "s.zarr", Path(f"{source}?partial")
    last.unlink()
    run(path, open_source(str(partial)), backbone)
    last.write_bytes(kept)
    split, changes = run(path, open_source(str(partial)), backbone, GROW)
    assert changes.kept == 4 and changes.added == tuple(f"{last.name}:{record}" for record in range(2))
    assert ids(split) == [f"scene_{i}" for i in range(6)]
    run(tmp_path / "fresh.zarr", open_source(source), backbone)
    assert files(path) == files(tmp_path / "fresh.zarr")


# -- stores of the past, copies, upkeep --------------------------------------------------------------------


def aged(path: Path) -> None:
    """The store as version 0.1 left it."""
    document = json.loads((path / "train/zarr.json").read_text())
    for key in ("names", "fingerprints", "skipped"):
        del document["attributes"]["featcache"][key]
    (path / "train/zarr.json").write_text(json.dumps(document))
    rows = [json.loads(line) for line in (path / "train" / manifest.NAME).read_text().splitlines()]
    lines = [json.dumps({k: v for k, v in row.items() if k != "fingerprint"}) + "\n" for row in rows]
    (path / "train" / manifest.NAME).write_text("".join(lines))


def test_stores_of_the_first_version_resume_and_grow_once_their_source_is_known(
    tmp_path: Path, backbone: Backbone
) -> None:
    source, path = videos(tmp_path / "v"), tmp_path / "s.zarr"
    run(path, source, backbone, replace(OPTIONS, max_videos=4))
    aged(path)
    before = files(path)
    assert run(path, source, backbone, replace(OPTIONS, max_videos=4))[1] == Changes(kept=4) and files(path) == before
    put(source, "g", 6)
    with pytest.raises(IncompatibleError, match="source_fingerprint"):
        run(path, source, backbone, GROW)
    drop(source, "g")
    split, _ = run(path, source, backbone)
    assert len(split.spec.fingerprints) == 6
    put(source, "b", 9)
    split, changes = run(path, source, backbone)
    assert changes.changed == ("b",)
    np.testing.assert_array_equal(split.video(1), scene(9)[0])


@pytest.mark.slow
def test_copies_follow_their_origin(tmp_path: Path, backbone: Backbone) -> None:
    source, path, copy, shards = videos(tmp_path / "v", "abcd"), *(tmp_path / f"{n}.zarr" for n in ("s", "c", "h"))
    run(path, source, backbone)
    convert(path, copy, ConvertOptions())
    convert(path, shards, ConvertOptions(shard_videos=2))
    put(source, "e", 4)
    run(path, source, backbone, GROW)
    for out, options in ((copy, ConvertOptions()), (shards, ConvertOptions(shard_videos=2))):
        convert(path, out, options)
        assert verify(out) == [] and ids(FeatureStore.open(out)["train"]) == list("abcde")
    put(source, "f", 5)
    assert run(shards, source, backbone, GROW)[1] == Changes(kept=5, added=("f",))
    drop(source, "f")
    assert run(shards, source, backbone, PRUNE)[1] == Changes(kept=5, removed=("f",))
    put(source, "a", 9)
    run(path, source, backbone)
    with pytest.raises(IncompatibleError, match="holds other videos than the source's"):
        convert(path, copy, ConvertOptions())
    convert(path, tmp_path / "c.h5", ConvertOptions())
    convert(tmp_path / "c.h5", tmp_path / "back.zarr", ConvertOptions())
    back, here = (FeatureStore.open(p)["train"] for p in (tmp_path / "back.zarr", path))
    assert back.spec.videos == here.spec.videos and back.manifest == here.manifest


@pytest.mark.slow
def test_repair_of_a_store_whose_order_is_its_own(tmp_path: Path, backbone: Backbone) -> None:
    source, path = videos(tmp_path / "v", "cdef"), tmp_path / "s.zarr"
    run(path, source, backbone)
    put(source, "a", 7)
    put(source, "b", 8)
    drop(source, "c")
    drop(source, "d")
    run(path, source, backbone, GROW)
    sound = files(path)
    chunk = path / "train/features/layer1/c.5.0.0"

    def flip() -> None:
        data = bytearray(chunk.read_bytes())
        data[7] ^= 1
        chunk.write_bytes(data)

    flip()
    repair(path, Means(data=open_source(source), backbone=backbone))
    assert files(path) == sound
    document = json.loads((path / "train/zarr.json").read_text())["attributes"]
    (path / "train/zarr.json").unlink()
    repair(path, Means(data=open_source(source), backbone=backbone))
    assert json.loads((path / "train/zarr.json").read_text())["attributes"] == document and verify(path) == []
    flip()
    before = files(path)
    put(source, "b", 9)
    with pytest.raises(IncompatibleError, match=r"does not hold its videos \(b: store .*; give the same videos"):
        repair(path, Means(data=open_source(source), backbone=backbone))
    assert files(path) == before


# -- what uses the store -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_outlives_the_growth_of_its_store(tmp_path: Path, backbone: Backbone) -> None:
    """It is scored on what is there now; it does not go on as if it had been trained on that."""
    root, path = tmp_path / "v", tmp_path / "s.zarr"
    for split in ("train", "validation"):
        videos(root / split, "abcd")
    source = open_source(root)
    extract(plan(path, source, backbone, OPTIONS), source, backbone)
    config = small("data.tap=layer1", "checkpoint_every=2", optim__steps=4)
    trained = train(config, FeatureStore.open(path), tmp_path / "run")
    scored = evaluate(load_run(trained))
    (trained / "eval-validation.json").write_text(json.dumps(scored.as_dict()))
    assert current_evaluation(load_run(trained), FeatureStore.open(path)["validation"]) is not None
    for split in ("train", "validation"):
        drop(root / split, "b")
        put(root / split, "e", 4)
    source = open_source(root)
    grown = extract(plan(path, source, backbone, replace(GROW, prune=True)), source, backbone)
    loaded = load_run(trained)
    assert list(evaluate(loaded).by_video) == list("acde")
    assert current_evaluation(loaded, grown["validation"]) is None, "its scores are of other videos"
    with pytest.raises(IncompatibleError, match="not the videos that"):
        train(config, grown, trained, resume=True)
    batch = next(iter(FeatureStream(grown["train"], "layer1", clip=2, batch_size=8)))  # two clips of each video
    tokens = {tuple(t.flatten().tolist()) for t in grown["train"].read_tokens("layer1", slice(0, 12))}
    assert {tuple(frame.flatten().tolist()) for clip in batch.features for frame in clip} == tokens
    train(config, grown, tmp_path / "other")
