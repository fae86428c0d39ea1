"""DAVIS and PASCAL VOC in the layouts that they are published in."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.errors import DataError, UsageError
from featcache.sources import Source, absolute, open_source
from tests.published import (
    as_stored,
    boxes,
    davis_2016,
    davis_2017,
    save_grey,
    save_palette,
    save_picture,
    voc,
    write_list,
)

VIDEOS = {"train": {"bear": 3, "dog": 2}, "val": {"cows": 2}}


def names(source: Source, split: str) -> list[str]:
    return [source.read(split, index).id for index in range(source.videos(split))]


def test_davis_2016(tmp_path: Path) -> None:
    root = davis_2016(tmp_path, VIDEOS)
    save_grey(root / "Annotations/480p/bear/00001.png", np.zeros((24, 32)))
    Image.fromarray(np.full((24, 32), 255, np.uint8)).convert("LA").save(root / "Annotations/480p/bear/00002.png")
    write_list(root / "ImageSets/480p/trainval.txt", [
        line for split in VIDEOS for line in (root / f"ImageSets/480p/{split}.txt").read_text().splitlines()
    ])  # fmt: skip
    source = open_source(root)
    assert source.splits() == ("train", "val", "trainval") and source.usual_splits() == ("train", "val")
    assert source.lengths("train") == (3, 2) and names(source, "trainval") == ["bear", "dog", "cows"]
    assert source.size("train", 0) == (24, 32) and source.remarks("train") == ()
    bear = source.read("train", 0)
    np.testing.assert_array_equal(bear.frames[1], as_stored(root / "JPEGImages/480p/bear/00001.jpg"))
    shown = [(boxes((2, 0, 9, 8)) > 0).sum(), 0, 24 * 32]
    assert bear.segmentations is not None and bear.segmentations.max() == 1
    assert bear.segmentations.sum((1, 2)).tolist() == shown == list(bear.instances[0].visibility)
    assert bear.ignore is None and bear.labelled is None and len(bear.instances) == 1
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(source)).read("val", 0).segmentations[1], boxes((2, 1, 9, 9))
    )


def test_davis_2017_has_objects_and_void(tmp_path: Path) -> None:
    source = open_source(davis_2017(tmp_path, VIDEOS))
    video = source.read("train", 0)
    expected = np.stack([boxes((2, t, 9, t + 8), (10, 4, 20, 12 + t)) for t in range(3)])
    void = np.zeros(expected.shape, bool)
    void[..., -1] = True
    np.testing.assert_array_equal(video.segmentations, np.where(void, 0, expected))
    np.testing.assert_array_equal(video.ignore, void)
    assert [i.visibility for i in video.instances] == [
        tuple(((expected == k) & ~void).sum((1, 2)).tolist()) for k in (1, 2)
    ]
    # 2016 knows one object a video, whatever files it comes in
    write_list(tmp_path / "ImageSets/2016/val.txt", ["cows"])
    assert open_source(tmp_path).splits() == ("train", "val")
    one = open_source(f"davis:{tmp_path}?year=2016")
    assert one.splits() == ("val",)
    np.testing.assert_array_equal(one.read("val", 0).segmentations, np.where(void, 0, expected > 0)[:2])
    np.testing.assert_array_equal(one.read("val", 0).ignore, void[:2])


def test_davis_unsupervised_masks_are_preferred(tmp_path: Path) -> None:
    davis_2017(tmp_path, VIDEOS)
    for path in sorted((tmp_path / "Annotations").rglob("*.png")):
        save_palette(
            tmp_path / "Annotations_unsupervised" / path.relative_to(tmp_path / "Annotations"), boxes((0, 0, 5, 5))
        )
    assert open_source(tmp_path).read("val", 0).segmentations.max() == 1
    semi = open_source(f"{tmp_path}?annotations=Annotations")
    assert semi.read("val", 0).segmentations.max() == 2
    assert semi.fingerprint("val") != open_source(tmp_path).fingerprint("val")


def test_davis_frames_without_a_mask_are_not_labelled(tmp_path: Path) -> None:
    davis_2017(tmp_path, {"test-dev": {"a": 3, "b": 2}})
    for frame in (1, 2):
        (tmp_path / f"Annotations/480p/a/{frame:05d}.png").unlink()
    source = open_source(tmp_path)
    video = source.read("test-dev", 0)
    assert video.labelled.tolist() == [True, False, False] and video.segmentations[1:].max() == 0
    assert source.read("test-dev", 1).labelled is None
    (remark,) = source.remarks("test-dev")
    assert "a/00001.jpg: no mask, as for 2 of 5 frames of test-dev" in remark


def test_davis_mistakes(tmp_path: Path) -> None:
    root = davis_2016(tmp_path / "DAVIS", VIDEOS)
    with pytest.raises(UsageError, match=r"no year '2018'; there is: 2016"):
        open_source(f"{root}?year=2018")
    with pytest.raises(
        UsageError, match=r"no option 'yaer' after the question mark for DAVIS; known: year, resolution"
    ):
        open_source(f"{root}?yaer=2016")
    with pytest.raises(UsageError, match=r"no split 'test'; it has: train, val"):
        open_source(root).lengths("test")
    with pytest.raises(DataError, match=r"holds DAVIS in DAVIS; give .*/DAVIS, or folder:"):
        open_source(tmp_path)
    assert open_source(f"folder:{tmp_path}").videos("train") == 6  # all of it, as it was before

    (root / "JPEGImages/480p/dog/00001.jpg").unlink()
    with pytest.raises(DataError, match=r"dog/00001.jpg: no such file, but train names it, as 1 of 2.*\?partial"):
        open_source(root).lengths("train")
    assert names(open_source(f"{root}?partial"), "train") == ["bear"]
    save_grey(root / "Annotations/480p/bear/00001.png", np.zeros((20, 32)))
    source = open_source(f"{root}?partial")
    for attempt in (source.size, source.read):
        with pytest.raises(DataError, match=r"bear/00001.png: 1 masks of 32x20 do not match 1 frames of 32x24"):
            attempt("train", 0)
    save_picture(root / "JPEGImages/480p/cows/00001.jpg", 0, (24, 30))
    with pytest.raises(DataError, match=r"cows/00001.jpg: frame is 30x24, but the video's first is 32x24"):
        open_source(root).size("val", 0)
    write_list(root / "ImageSets/480p/train.txt", ["a b c"])
    with pytest.raises(DataError, match=r"train.txt: 'a b c' is no name of a video and no pair of paths"):
        open_source(root)
    for path in (root / "ImageSets/480p").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"ImageSets: no list of a year"):
        open_source(root)


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    davis_2017(tmp_path / "odd?name", VIDEOS)
    assert open_source(tmp_path / "odd?name").splits() == ("train", "val")
    monkeypatch.chdir(tmp_path)
    here = absolute("davis:odd?name?year=2017&partial")
    assert here == f"davis:{tmp_path}/odd?name?year=2017&partial" and open_source(here).splits() == ("train", "val")
    for same in ("tfds:movi_a/256x256?data_dir=odd", "nowhere"):
        assert absolute(same) == same
    with pytest.raises(DataError, match=r"nowhere: no such file or folder.*davis, ytvis, .*voc, coco"):
        open_source("voc:nowhere")
    with pytest.raises(DataError, match=r"no ImageSets/Segmentation in it"):
        open_source("voc:odd?name")


LISTS = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}


def test_voc(tmp_path: Path) -> None:
    root = voc(tmp_path, LISTS)
    write_list(root / "VOC2012/ImageSets/Segmentation/trainval.txt", [*LISTS["train"], *LISTS["val"]])
    for place in (root, root / "VOC2012", f"voc:{root}?year=2012"):
        source = open_source(place)
        assert source.splits() == ("train", "val", "trainval") and source.usual_splits() == ("train", "val")
        assert source.lengths("trainval") == (1, 1, 1) and names(source, "train") == LISTS["train"]
    image = source.read("train", 1)
    np.testing.assert_array_equal(image.frames[0], as_stored(root / "VOC2012/JPEGImages/2007_000039.jpg"))
    objects = boxes((2, 2, 10, 12), (12, 7, 22, 30))
    np.testing.assert_array_equal(image.segmentations[0], objects)
    np.testing.assert_array_equal(image.ignore[0], (boxes((1, 1, 11, 13)) > 0) & (objects == 0))
    assert [(i.category, i.visibility) for i in image.instances] == [("dog", (80,)), ("person", (230,))]
    before = source.fingerprint("train")
    save_palette(root / "VOC2012/SegmentationClass/2007_000039.png", objects)
    assert open_source(root).fingerprint("train") != before


def test_voc_trainaug_reads_classes_where_there_are_no_objects(tmp_path: Path) -> None:
    root = voc(tmp_path, {**LISTS, "trainaug": ["2007_000032", "2008_000002", "2008_000007"]})
    home = root / "VOC2012"
    for name in ("2008_000002", "2008_000007"):
        for kind in ("SegmentationObject", "SegmentationClass"):
            (home / kind / f"{name}.png").unlink()
    save_grey(
        home / "SegmentationClassAug/2008_000002.png",
        np.array([0, 20, 7, 255])[boxes((1, 1, 5, 5), (8, 8, 12, 12), (20, 0, 24, 3))],
    )
    source = open_source(root)
    assert source.usual_splits() == ("train", "val", "trainaug")
    image = source.read("trainaug", 1)
    np.testing.assert_array_equal(
        image.segmentations[0], np.array([0, 2, 1, 0])[boxes((1, 1, 5, 5), (8, 8, 12, 12), (20, 0, 24, 3))]
    )
    assert [i.category for i in image.instances] == ["car", "tvmonitor"] and image.ignore.sum() == 12
    assert source.read("trainaug", 2).labelled.tolist() == [False]
    missing, classes = source.remarks("trainaug")
    assert "2008_000007.jpg: no mask, as for 1 of 3 frames" in missing
    assert "2008_000002.png: classes without objects, as in 1 of 3 images of trainaug" in classes


def test_voc_mistakes(tmp_path: Path) -> None:
    root = voc(tmp_path, LISTS)
    with pytest.raises(UsageError, match=r"no year '2007'; there is: 2012"):
        open_source(f"{root}?year=2007")
    (root / "VOC2012/JPEGImages/2007_000033.jpg").unlink()
    with pytest.raises(DataError, match=r"2007_000033.jpg: no such file, but val names it"):
        open_source(root).read("val", 0)
    with pytest.raises(DataError, match=r"no video in split val"):
        open_source(f"{root}?partial").read("val", 0)
    save_palette(root / "VOC2012/SegmentationObject/2007_000032.png", np.zeros((30, 32)))
    with pytest.raises(DataError, match=r"2007_000032.png: 1 masks of 32x30 do not match 1 frames of 32x24"):
        open_source(root).read("train", 0)
