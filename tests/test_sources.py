"""TFRecord files, MOVi and locations: what they give, and how damage is named."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import DataError, UsageError
from featcache.sources import open_source
from featcache.sources.masks import as_mask
from featcache.sources.movi import MoviSource, find_features
from featcache.sources.tfrecord import HEADER, TFRecordFile, masked_crc, write_records
from tests.movi_files import example, png, scene, write_movi

SHARD = "movi_a-train.tfrecord-00000-of-00001"


# TFRecord files


def test_masked_crc_is_tensorflows() -> None:
    """The header of a record that TFDS wrote."""
    assert masked_crc(bytes.fromhex("dd68170000000000")) == 0xF481725B


@settings(max_examples=60, deadline=None)
@given(records=st.lists(st.binary(max_size=200), max_size=12), data=st.data())
def test_index_gives_back_every_record_in_any_order(tmp_path_factory, records: list[bytes], data) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("index") / "records"
    write_records(path, records)
    file = TFRecordFile.open(path)
    assert len(file) == len(records)
    for record in data.draw(st.permutations(range(len(records)))):
        assert file.read(record) == records[record]


@settings(max_examples=60, deadline=None)
@given(records=st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=5), data=st.data())
def test_any_flipped_bit_is_found_and_named(tmp_path_factory, records: list[bytes], data) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("flip") / "records"
    write_records(path, records)
    offsets = TFRecordFile.open(path).offsets
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    damaged = int(np.searchsorted(offsets, at, side="right")) - 1
    with pytest.raises(DataError, match=f"records: record {damaged} at byte {offsets[damaged]} is damaged: .*again"):
        file = TFRecordFile.open(path)
        file.read(damaged)
    if at >= offsets[damaged] + HEADER.size:  # the others still read
        for record in set(range(len(records))) - {damaged}:
            assert file.read(record) == records[record]


@settings(max_examples=60, deadline=None)
@given(records=st.lists(st.binary(max_size=60), min_size=1, max_size=5), data=st.data())
def test_any_truncation_is_found_and_named(tmp_path_factory, records: list[bytes], data) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("cut") / "records"
    write_records(path, records)
    offsets = TFRecordFile.open(path).offsets.tolist()
    cut = data.draw(st.integers(1, path.stat().st_size - 1).filter(lambda n: n not in offsets))
    path.write_bytes(path.read_bytes()[:cut])
    damaged = int(np.searchsorted(offsets, cut, side="left")) - 1
    with pytest.raises(DataError, match=f"record {damaged} at byte {offsets[damaged]} is damaged: the file ends"):
        TFRecordFile.open(path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "records"
    write_records(path, [b"a" * 50, b"b" * 50])
    file = TFRecordFile.open(path)
    path.write_bytes(path.read_bytes()[:100])
    assert file.read(0) == b"a" * 50
    with pytest.raises(DataError, match=r"record 1 at byte 66"):
        file.read(1)


# MOVi


def test_movi_reads_frames_masks_and_instances_over_shards(tmp_path: Path) -> None:
    write_movi(tmp_path / "movi_a/24x24/1.0.0", {"validation": 3, "train": 7}, shards=3)
    source = open_source(tmp_path)
    assert source.splits() == ("train", "validation")
    assert list(source.lengths("train")) == [3] * 7
    for index in range(7):
        video = source.read("train", index)
        frames, masks = scene(index)
        assert video.id == f"scene_{index}"
        np.testing.assert_array_equal(video.frames, frames)
        np.testing.assert_array_equal(video.segmentations, masks)
        assert len(video.instances) == 2
        assert video.instances[1].visibility == (0, *[int((m == 2).sum()) for m in masks[1:]])
    first, second = source.read("train", 1).instances
    assert (first.shape, first.size, first.color, first.material) == ("cylinder", "large", "brown", "rubber")
    assert (second.shape, second.size, second.color, second.material) == ("sphere", "small", "cyan", "metal")


def test_movi_c_and_later_have_categories(tmp_path: Path) -> None:
    """Kubric's movi_c.py to movi_f.py: instances have a class label ``category``, and no shape, size or material."""
    folder = write_movi(tmp_path / "movi_e" / "128x128" / "1.0.0", {"train": 2})
    content = json.loads((folder / "features.json").read_text())
    of = content["featuresDict"]["features"]["instances"]["sequence"]["feature"]["featuresDict"]
    of["features"] = {"category": {"classLabel": {"numClasses": "2"}}, "asset_id": {"text": {}}}
    (folder / "features.json").write_text(json.dumps(content))
    (folder / "instances-category.labels.txt").write_text("Action Figures\nShoe\n")
    for path in folder.glob("instances-*_label.labels.txt"):
        path.unlink()
    write_records(folder / SHARD, [
        example(index, edit=lambda feature: feature["instances/category"].int64_list.value.extend([1, 0]))
        for index in range(2)
    ])  # fmt: skip
    for instance, category in zip(
        open_source(tmp_path).read("train", 1).instances, ("Shoe", "Action Figures"), strict=True
    ):
        assert (instance.category, instance.shape, instance.material) == (category, "", "")
        assert len(instance.visibility) == 3


def test_movi_lengths_are_parsed_where_the_specification_leaves_them_open(tmp_path: Path) -> None:
    records = [example(0, 2), example(1, 5)]
    source = MoviSource(write_movi(tmp_path / "m", {"train": records}, frames=-1))
    assert list(source.lengths("train")) == [2, 5]
    assert source.read("train", 1).frames.shape[0] == 5


def test_movi_source_pickles_and_serves_threads(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(MoviSource(write_movi(tmp_path / "m", {"train": 6}, shards=2))))
    with ThreadPoolExecutor(4) as pool:
        videos = list(pool.map(lambda i: source.read("train", i % 6), range(48)))
    for i, video in enumerate(videos):
        np.testing.assert_array_equal(video.frames, scene(i % 6)[0])


def test_movi_fingerprint_follows_content_not_place_or_time(tmp_path: Path) -> None:
    folder = write_movi(tmp_path / "a", {"train": 3, "validation": 2})
    shutil.copytree(folder, tmp_path / "b", copy_function=shutil.copyfile)
    a, b = MoviSource(folder), MoviSource(tmp_path / "b")
    assert a.fingerprint("train") == b.fingerprint("train") != a.fingerprint("validation")
    write_records(tmp_path / "b" / SHARD, [example(0), example(1), example(9)])
    assert MoviSource(tmp_path / "b").fingerprint("train") != a.fingerprint("train")
    assert MoviSource(tmp_path / "b").fingerprint("validation") == a.fingerprint("validation")
    assert MoviSource(tmp_path / "b").fingerprints("train")[:2] == a.fingerprints("train")[:2]
    assert MoviSource(tmp_path / "b").fingerprints("train")[2] != a.fingerprints("train")[2]
    assert list(a.names("train")) == [f"{SHARD}:{record}" for record in range(3)]


def test_movi_missing_shard_is_named_and_partial_reads_the_rest(tmp_path: Path) -> None:
    folder = write_movi(tmp_path / "m", {"train": 6}, shards=3)
    (folder / "movi_a-train.tfrecord-00001-of-00003").unlink()
    with pytest.raises(DataError, match=r"1 of 3 shards of split train.*00001-of-00003.*\?partial"):
        open_source(folder)
    source = open_source(f"{folder}?partial")
    assert source.location == f"{folder}?partial"
    assert [source.read("train", i).id for i in range(len(source.lengths("train")))] == [
        "scene_0",
        "scene_1",
        "scene_4",
        "scene_5",
    ]


def test_movi_file_cut_between_two_records(tmp_path: Path) -> None:
    folder = write_movi(tmp_path / "m", {"train": 3})
    write_records(folder / SHARD, [example(0), example(1)])
    with pytest.raises(DataError, match=r"2 records where dataset_info.json says 3"):
        MoviSource(folder).lengths("train")


def _set(key: str, values: list[bytes] | list[int]) -> Callable[[Any], None]:
    def edit(feature: Any) -> None:
        kind = "bytes_list" if isinstance(values[0], bytes) else "int64_list"
        getattr(feature[key], kind).value[:] = values

    return edit


GREY = png(np.zeros((24, 24), np.uint8))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("video", [b"no image"] * 3), "frame 0: image cannot be decoded"),
        (_set("video", [png(scene(0)[0][0])[:-300]] * 3), "frame 0: image cannot be decoded"),
        (_set("video", [GREY] * 2), "2 frames where features.json says 3"),
        (_set("video", [GREY, GREY, png(np.zeros((20, 24), np.uint8))]), "frame 2: frame is 24x20, but .* 24x24"),
        (_set("segmentations", [GREY] * 2), "2 masks of 24x24 do not match 3 frames of 24x24"),
        (_set("segmentations", [png(np.zeros((12, 12), np.uint8))] * 3), "3 masks of 12x12 do not match"),
        (_set("segmentations", [png(np.full((24, 24, 3), (0, 1, 2), np.uint8))] * 3), "mask 0: mask shows colours"),
        (_set("segmentations", [png(np.full((24, 24), 300, np.uint16))] * 3), "mask 0: masks hold 300..300"),
        (_set("segmentations", [png(np.full((24, 24), 7, np.uint8))] * 3), "masks with 7 objects"),
        (_set("instances/shape_label", [0, 5]), "shape_label holds 5, but its label file has 3 names"),
        (_set("instances/shape_label", [0, 1, 2]), r"tables of \[2, 3\] rows"),
        (_set("instances/visibility", [1, 2, 3, 4]), "4 visibilities for 3 frames"),
    ],
)
def test_movi_sound_record_with_bad_content(tmp_path: Path, edit: Callable[[Any], None], message: str) -> None:
    good, bad = example(0), example(1, edit=edit)
    source = MoviSource(write_movi(tmp_path / "m", {"train": [good, bad]}))
    assert source.read("train", 0).id == "scene_0"
    with pytest.raises(DataError, match=f"{SHARD}: record 1 at byte {len(good) + 16}.*{message}"):
        source.read("train", 1)


def test_movi_record_that_is_no_example(tmp_path: Path) -> None:
    source = MoviSource(write_movi(tmp_path / "m", {"train": [b"\xff" * 40]}))
    with pytest.raises(DataError, match=r"record 0 at byte 0: not a tf.train.Example"):
        source.read("train", 0)


def test_movi_wrong_folders(tmp_path: Path) -> None:
    folder = write_movi(tmp_path / "movi" / "a", {"train": 1})
    with pytest.raises(UsageError, match=r"no split 'val'; it has: train"):
        MoviSource(folder).lengths("val")
    with pytest.raises(UsageError, match=r"no video 1 in train"):
        MoviSource(folder).read("train", 1)
    with pytest.raises(DataError, match=r"one shard alone"):
        open_source(folder / SHARD)

    shutil.copytree(folder, tmp_path / "movi" / "b")
    with pytest.raises(DataError, match=r"several data sets below it.*movi/a.*movi/b"):
        open_source(tmp_path / "movi")

    (folder / "instances-shape_label.labels.txt").unlink()
    with pytest.raises(DataError, match=r"instances-shape_label.labels.txt: No such file"):
        MoviSource(folder)
    (folder / "features.json").unlink()
    with pytest.raises(DataError, match=r"no features.json beside it"):
        open_source(folder)
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": {"image": {}}}}))
    with pytest.raises(DataError, match=r"features.json: no MOVi video in it"):
        open_source(folder)

    empty = write_movi(tmp_path / "empty", {"train": []})
    with pytest.raises(DataError, match=r"split train holds no video"):
        MoviSource(empty).lengths("train")
    (empty / SHARD).unlink()
    with pytest.raises(DataError, match=r"no file named"):
        open_source(empty)


def test_find_features_prefers_the_folder_itself(tmp_path: Path) -> None:
    folder = write_movi(tmp_path / "movi", {"train": 1})
    write_movi(folder / "older", {"train": 1})
    assert find_features(folder) == folder
    assert find_features(tmp_path / "movi" / "older") == folder / "older"


# Masks, locations


def test_as_mask_refuses_nan() -> None:
    with pytest.raises(DataError, match=r"here: masks hold fractions or NaN"):
        as_mask(np.array([[0.0, np.nan]]), "here")


def test_tfds_without_tensorflow_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'slotlab\[tf\]'"):
        open_source("tfds:movi_a/256x256?data_dir=gs://kubric-public/tfds")
    with pytest.raises(UsageError, match=r"no option 'version' after the question mark for TFDS; known: data_dir"):
        open_source("tfds:movi_a?version=1")
    with pytest.raises(UsageError, match=r"write tfds:NAME"):
        open_source("tfds:")


def test_remote_address() -> None:
    with pytest.raises(UsageError, match=r"gs://bucket/movi: remote addresses are not read directly"):
        open_source("gs://bucket/movi")


def test_importing_sources_stays_light() -> None:
    heavy = {"torch", "h5py", "av", "PIL", "tensorflow_datasets"}
    code = f"import sys, featcache.sources; print(*{heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
