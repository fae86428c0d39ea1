"""COCO's annotations against pycocotools."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from featcache.errors import DataError, UsageError
from featcache.sources import open_source
from tests.published import annotation, as_stored, boxes, coco, coco_image, runs, write_json

TRIANGLE = [[2.0, 2.0, 20.5, 3.0, 6.0, 18.5]]
TWO_PARTS = [[22.0, 2.0, 30.0, 2.0, 30.0, 8.0, 22.0, 8.0], [22.0, 12.0, 30.0, 12.5, 26.0, 20.0]]
CROWD = boxes((14, 0, 24, 20)) > 0
COMPRESSED = rle.encode(np.asfortranarray(boxes((4, 10, 14, 24))))
IMAGES = [coco_image(9), coco_image(25, (20, 40)), coco_image(30)]


def annotations() -> list[dict[str, object]]:
    return [
        annotation(1, 9, TRIANGLE, 18),
        annotation(2, 9, runs(CROWD), 1, crowd=True),
        annotation(3, 9, TWO_PARTS, 90),
        annotation(4, 9, {"size": COMPRESSED["size"], "counts": COMPRESSED["counts"].decode()}),
        annotation(5, 25, [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]),
    ]


def by_pycocotools(file: Path, image: int, capsys: pytest.CaptureFixture[str]) -> list[np.ndarray]:
    """Each object's mask and, last, that of all crowds."""
    api = COCO(str(file))
    capsys.readouterr()
    of = api.loadAnns(api.getAnnIds(image, iscrowd=None))
    crowds = [api.annToMask(each) for each in of if each["iscrowd"]]
    return [api.annToMask(each) for each in of if not each["iscrowd"]] + [sum(crowds, np.zeros_like(CROWD))]


def test_instances(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = coco(tmp_path, "train", IMAGES, annotations())
    source = open_source(tmp_path)
    assert source.splits() == ("train",) and source.lengths("train") == (1, 1, 1)
    assert [source.size("train", index) for index in range(3)] == [(24, 32), (20, 40), (24, 32)]
    image = source.read("train", 0)
    assert image.id == "000000000009" and image.labelled is None
    np.testing.assert_array_equal(image.frames[0], as_stored(tmp_path / "train2017/000000000009.jpg"))
    *objects, crowd = by_pycocotools(file, 9, capsys)
    covers = sum(mask.astype(int) for mask in objects)
    ignored = (covers > 1) | (crowd > 0)
    assert (covers > 1).any() and (crowd & (covers > 0)).any(), "the case is of no use"
    np.testing.assert_array_equal(image.ignore[0], ignored)
    for number, mask in enumerate(objects, start=1):
        np.testing.assert_array_equal(image.segmentations[0] == number, (mask > 0) & ~ignored)
    assert [i.category for i in image.instances] == ["dog", "toothbrush", "person"]
    assert [i.visibility for i in image.instances] == [(int(((m > 0) & ~ignored).sum()),) for m in objects]
    empty = source.read("train", 2)
    assert empty.segmentations.max() == 0 and empty.instances == () and empty.ignore is None and empty.labelled is None

    painted = open_source(f"{tmp_path}?overlaps=painted").read("train", 0)
    first = np.zeros(ignored.shape, int)
    for number, mask in reversed(list(enumerate(objects, start=1))):
        first[mask > 0] = number
    np.testing.assert_array_equal(painted.segmentations[0], first)
    np.testing.assert_array_equal(painted.ignore[0], (crowd > 0) & (covers == 0))
    assert open_source(f"{tmp_path}?overlaps=painted").fingerprint("train") != source.fingerprint("train")


def test_files_years_and_images(tmp_path: Path) -> None:
    coco(tmp_path, "val", IMAGES[:1], annotations()[:1], "2014")
    coco(tmp_path, "val", IMAGES[1:2], annotations()[4:])
    file = coco(tmp_path, "train", IMAGES[2:], [])
    source = open_source(tmp_path)
    assert source.splits() == ("train", "val") and source.read("val", 0).id == "000000000025"
    old = open_source(f"coco:{tmp_path}?year=2014")
    assert old.splits() == ("val",) and old.read("val", 0).id == "000000000009"
    for place in (f"coco:{file}", file):
        assert open_source(place).splits() == ("train",)
    mine = tmp_path / "mine.json"
    mine.write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"mine.json: no video and no image"):
        open_source(mine)
    with pytest.raises(DataError, match=r"000000000030.jpg: no such file, but train names it"):
        open_source(f"coco:{mine}").lengths("train")
    for folder in ("train2017", tmp_path / "train2017"):
        assert open_source(f"coco:{mine}?images={folder}").lengths("train") == (1,)
    with pytest.raises(UsageError, match=r"no overlaps 'mixed'; there is: ignored, painted"):
        open_source(f"{tmp_path}?overlaps=mixed")
    with pytest.raises(UsageError, match=r"no year '2015'; there is: 2017, 2014"):
        open_source(f"{tmp_path}?year=2015")
    with pytest.raises(DataError, match=r"none.json: no such file"):
        open_source(f"coco:{tmp_path / 'none.json'}")


def test_pictures_are_read_as_they_are_stored(tmp_path: Path) -> None:
    """Annotations were made on pixels as stored: an EXIF tag turns neither."""
    coco(tmp_path, "train", IMAGES[1:2], annotations()[4:])
    path = tmp_path / "train2017/000000000025.jpg"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[274] = 6
        image.save(path, exif=exif)
    source = open_source(tmp_path)
    assert source.size("train", 0) == (20, 40)
    np.testing.assert_array_equal(source.read("train", 0).frames[0], as_stored(path))


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = coco(tmp_path, "val", [{**coco_image(1), "height": 25}], [])
    file.write_text(file.read_text())
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(tmp_path / "val2017/000000000001.jpg")
    for attempt in (open_source(tmp_path).size, open_source(tmp_path).read):
        with pytest.raises(DataError, match=r"000000000001.jpg: is 32x24, but its annotations are for 32x25"):
            attempt("val", 0)
    coco(tmp_path, "val", [coco_image(1)], [annotation(7, 1, runs(np.ones((20, 32))))])
    with pytest.raises(DataError, match=r"image 000000000001, annotation 7: mask is 32x20, but its image 32x24"):
        open_source(tmp_path).read("val", 0)
    for broken in ([["x"]], {"size": [24, 32]}, {"size": [24, 32], "counts": ["a"]}):
        coco(tmp_path, "val", [coco_image(1)], [annotation(7, 1, broken)])
        with pytest.raises(DataError, match=r"annotation 7: its segmentation cannot be decoded"):
            open_source(tmp_path).read("val", 0)
    coco(tmp_path, "val", [coco_image(1)], [annotation(n, 1, TRIANGLE) for n in range(256)])
    with pytest.raises(DataError, match=r"image 000000000001: 256 objects, and numbers of 8 bits tell 255 apart"):
        open_source(tmp_path).read("val", 0)
    file.write_text('{"images": [')
    with pytest.raises(DataError, match=r"instances_val2017.json: is no JSON"):
        open_source(tmp_path).lengths("val")
    write_json(file, {"images": [{"id": 1}]})
    with pytest.raises(DataError, match=r"instances_val2017.json: no images and annotations of COCO in it \(KeyError"):
        open_source(tmp_path).lengths("val")
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(UsageError, match=r"pip install 'slotlab\[coco\]'"):
        open_source(tmp_path)


def test_panoptic(tmp_path: Path) -> None:
    """Colours hold the segments' numbers: red, and 256 times green, and 65536 times blue."""
    ids = np.zeros((24, 32), np.int64)
    ids[:10], ids[12:20, 4:9], ids[12:20, 12:28], ids[20:, 3:30] = 70_001, 258, 3_226_957, 5
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    images, segments = [coco_image(9), coco_image(25)], [(70_001, 184, 0), (258, 18, 0), (3_226_957, 1, 0), (5, 1, 1)]
    content = {
        "images": images,
        "annotations": [{
            "image_id": 9, "file_name": "000000000009.png",
            "segments_info": [{"id": i, "category_id": c, "iscrowd": k} for i, c, k in segments],
        }],
        "categories": [
            {"id": 1, "name": "person", "isthing": 1}, {"id": 18, "name": "dog", "isthing": 1},
            {"id": 184, "name": "tree-merged", "isthing": 0},
        ],
    }  # fmt: skip
    coco(tmp_path, "val", images, [])
    file = write_json(tmp_path / "annotations/panoptic_val2017.json", content)
    (tmp_path / "panoptic_val2017").mkdir()
    Image.fromarray(colours).save(tmp_path / "panoptic_val2017/000000000009.png")
    for place in (f"coco:{file}", f"{tmp_path}?truth=panoptic"):
        source = open_source(place)
        image = source.read("val", 0)
        np.testing.assert_array_equal(image.segmentations[0], (ids == 258) + 2 * (ids == 3_226_957))
        np.testing.assert_array_equal(image.ignore[0], (ids == 0) | (ids == 5))
        assert [i.category for i in image.instances] == ["dog", "person"]
        assert source.read("val", 1).labelled.tolist() == [False]
    content["annotations"][0]["segments_info"].pop(1)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"000000000009.png: holds segment 258, which .* has not"):
        open_source(f"coco:{file}").read("val", 0)
    (tmp_path / "panoptic_val2017/000000000009.png").unlink()
    with pytest.raises(DataError, match=r"000000000009.png: cannot be read"):
        open_source(f"coco:{file}").read("val", 0)
