"""YouTube-VIS and YouTube-VOS in the layouts that they are published in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle

from featcache.errors import DataError, UsageError
from featcache.sources import open_source
from tests.published import as_stored, boxes, runs, save_palette, save_picture, write_json

FRAMES = ("00000.jpg", "00005.jpg", "00010.jpg")
CATEGORIES = [{"id": 1, "name": "airplane"}, {"id": 26, "name": "person"}]
FIRST = [boxes((2, 2 + t, 12, 12 + t)) > 0 for t in range(3)]
SECOND = boxes((8, 8, 20, 24)) > 0
POLYGON = [[1.0, 20.0, 9.0, 20.0, 9.0, 23.0]]


def compressed(mask: np.ndarray) -> dict[str, Any]:
    found = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode()}


def video(number: int, name: str) -> dict[str, Any]:
    return {"id": number, "width": 32, "height": 24, "length": 3, "file_names": [f"{name}/{frame}" for frame in FRAMES]}


def objects(number: int, video: int, segmentations: list[Any], category: int = 1, crowd: int = 0) -> dict[str, Any]:
    return {
        "id": number, "video_id": video, "category_id": category, "segmentations": segmentations, "iscrowd": crowd,
        "bboxes": [None] * 3, "areas": [None] * 3,
    }  # fmt: skip


def write_vis(root: Path, split: str, names: list[str], annotations: Any, where: str = "{}/instances.json") -> Path:
    for name in names:
        for seed, frame in enumerate(FRAMES):
            save_picture(root / split / "JPEGImages" / name / frame, seed)
    videos = [video(number, name) for number, name in enumerate(names, start=1)]
    content = {"videos": videos, "annotations": annotations, "categories": CATEGORIES}
    return write_json(root / where.format(split), content)


ANNOTATIONS = [
    objects(1, 2, [runs(FIRST[0]), None, runs(FIRST[2])], 26),
    objects(2, 2, [None, compressed(SECOND), compressed(SECOND)]),
    objects(3, 2, [POLYGON, None, None], 1, crowd=1),
    objects(4, 1, [runs(FIRST[0])] * 3),
]


@pytest.mark.parametrize("where", ["{}/instances.json", "{}.json"])
def test_vis(tmp_path: Path, where: str) -> None:
    write_vis(tmp_path, "train", ["b1", "a2"], ANNOTATIONS, where)
    write_vis(tmp_path, "valid", ["c"], None, where)
    source = open_source(tmp_path)
    assert source.splits() == ("train", "valid") and source.lengths("train") == (3, 3)
    found = source.read("train", 1)
    assert found.id == "a2" and found.labelled is None and source.size("train", 1) == (24, 32)
    np.testing.assert_array_equal(found.frames[1], as_stored(tmp_path / "train/JPEGImages/a2/00005.jpg"))
    both = FIRST[2] & SECOND
    crowd = rle.decode(rle.merge(rle.frPyObjects(POLYGON, 24, 32))) > 0
    nothing = np.zeros_like(SECOND)
    assert both.any() and crowd.any()
    np.testing.assert_array_equal(found.segmentations == 1, [FIRST[0], nothing, FIRST[2] & ~both])
    np.testing.assert_array_equal(found.segmentations == 2, [nothing, SECOND, SECOND & ~both])
    np.testing.assert_array_equal(found.ignore, [crowd, nothing, both])
    assert [i.category for i in found.instances] == ["person", "airplane"]
    assert found.instances[1].visibility == (0, int(SECOND.sum()), int((SECOND & ~both).sum()))
    assert source.read("valid", 0).segmentations is None
    painted = open_source(f"ytvis:{tmp_path}?overlaps=painted").read("train", 1)
    np.testing.assert_array_equal(painted.segmentations[2], np.where(FIRST[2], 1, 2 * SECOND))


def test_the_last_training_videos_by_name_are_held_out(tmp_path: Path) -> None:
    write_vis(tmp_path, "train", ["d", "a", "c", "b"], [objects(1, 1, [runs(FIRST[0])] * 3)])
    source = open_source(f"{tmp_path}?held_out=1")
    assert source.splits() == ("train", "held_out")
    assert [source.read("train", index).id for index in range(3)] == ["a", "b", "c"]
    assert source.read("held_out", 0).id == "d" and source.read("held_out", 0).segmentations.max() == 1
    assert source.fingerprint("train") != source.fingerprint("held_out")
    whole = {
        open_source(tmp_path).read("train", k).id: mark
        for k, mark in enumerate(open_source(tmp_path).fingerprints("train"))
    }
    assert [whole[name] for name in "abc"] == list(source.fingerprints("train"))
    with pytest.raises(UsageError, match=r"held_out=4 leaves none of 4 training videos"):
        open_source(f"{tmp_path}?held_out=4").lengths("train")
    with pytest.raises(UsageError, match=r"held_out=some: give a number of at least 1"):
        open_source(f"{tmp_path}?held_out=some")


def test_vis_mistakes(tmp_path: Path) -> None:
    write_vis(tmp_path, "train", ["a"], [objects(1, 1, [None])])
    with pytest.raises(DataError, match=r"video a has 3 frames, its annotation 1 1; download it again"):
        open_source(tmp_path).lengths("train")
    write_vis(tmp_path, "train", ["a"], [objects(1, 1, [runs(np.ones((30, 32)))] * 3)])
    with pytest.raises(DataError, match=r"video a, annotation 1: mask is 32x30, but its image 32x24"):
        open_source(tmp_path).read("train", 0)
    write_vis(tmp_path, "train", ["a"], [objects(n, 1, [None] * 3) for n in range(256)])
    with pytest.raises(DataError, match=r"video a: 256 objects, and numbers of 8 bits tell 255 apart"):
        open_source(tmp_path).read("train", 0)
    (tmp_path / "train/JPEGImages/a/00005.jpg").unlink()
    with pytest.raises(DataError, match=r"a/00005.jpg: no such file, but train names it"):
        open_source(tmp_path).read("train", 0)
    write_json(tmp_path / "train/instances.json", {"videos": [{}]})
    with pytest.raises(DataError, match=r"no videos and annotations of YouTube-VIS in it \(KeyError"):
        open_source(tmp_path).lengths("train")


def write_vos(root: Path, split: str, videos: dict[str, tuple[int, list[int]]]) -> None:
    """Name -> frames and those with a mask; the second object enters with the second mask."""
    meta = {}
    for name, (frames, masked) in videos.items():
        for frame in range(frames):
            save_picture(root / split / "JPEGImages" / name / f"{frame:05d}.jpg", frame)
        for count, frame in enumerate(masked):
            numbers = boxes((2, 2, 10, 10), *[(12, 4, 20, 20)][: count + 1 - (count == 0)])
            save_palette(root / split / "Annotations" / name / f"{frame:05d}.png", numbers)
        of = {"1": {"category": "penguin", "frames": ["00000"]}, "2": {"category": "hat", "frames": ["00005"]}}
        meta[name] = {"objects": of}
    write_json(root / split / "meta.json", {"videos": meta})


def test_vos(tmp_path: Path) -> None:
    write_vos(tmp_path, "train", {"b": (6, [0, 5]), "a": (2, [0])})
    write_vos(tmp_path, "valid", {"c": (6, [0, 5])})
    source = open_source(tmp_path)
    assert source.splits() == ("train", "valid") and source.lengths("train") == (2, 6)
    found = source.read("train", 1)
    assert found.id == "b" and found.labelled.tolist() == [True, False, False, False, False, True]
    np.testing.assert_array_equal(found.segmentations[0], boxes((2, 2, 10, 10)))
    np.testing.assert_array_equal(found.segmentations[5], boxes((2, 2, 10, 10), (12, 4, 20, 20)))
    assert not found.segmentations[1:5].any() and found.ignore is None
    assert [i.category for i in found.instances] == ["penguin", "hat"]
    assert source.read("valid", 0).labelled.tolist() == [True] + [False] * 5, "later masks show new objects alone"
    (remark,) = source.remarks("train")
    assert "a/00001.jpg: no mask, as for 5 of 8 frames of train" in remark
    assert open_source(f"ytvos:{tmp_path}?held_out=1").read("held_out", 0).id == "b"

    with pytest.raises(DataError, match=r"train_all_frames/JPEGImages: no such folder"):
        open_source(f"{tmp_path}?frames=all").lengths("train")
    for name, frames in (("a", 4), ("b", 8)):
        for frame in range(frames):
            save_picture(tmp_path / "train_all_frames/JPEGImages" / name / f"{frame:05d}.jpg", frame)
    assert open_source(f"{tmp_path}?frames=all").lengths("train") == (4, 8)
    (tmp_path / "train/meta.json").unlink()
    with pytest.raises(
        DataError, match=r"train/meta.json: cannot be read \(No such file or directory\); copy it there"
    ):
        open_source(tmp_path).lengths("train")
