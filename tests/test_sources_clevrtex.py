"""CLEVRTex, CLEVRER and OBJ3D in the layouts that they are published in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.errors import DataError, UsageError
from featcache.sources import open_source
from tests.media import oblong, save_images, save_movie
from tests.published import as_stored, boxes, runs, save_grey, save_picture, write_json


def write_clevrtex(root: Path, variant: str, count: int) -> Path:
    """Images in folders of a thousand, as if there were ten to a thousand."""
    home = root / f"clevrtex_{variant}"
    for number in range(count):
        stem = home / str(number // 10) / f"CLEVRTEX_{variant}_{number:06d}"
        save_picture(stem.with_suffix(".png"), number)
        for further in ("albedo", "normal", "depth_0001"):
            save_picture(stem.with_name(f"{stem.name}_{further}.png"), number)
        save_grey(stem.with_name(f"{stem.name}_flat.png"), boxes((2, 2, 9, 9), (12, 3, 20, 9 + number % 9)))
        objects = [
            {"shape": "cube", "size": "small", "material": "PoliigonBricks01", "rotation": 3.2, "color": None},
            {"shape": "monkey", "size": 1.5, "material": "whitemarble", "rotation": 9.0},
        ]
        write_json(stem.with_suffix(".json"), {"ground_material": "fabric", "objects": objects})
    return home


def test_clevrtex(tmp_path: Path) -> None:
    home = write_clevrtex(tmp_path, "full", 25)
    source = open_source(home)
    assert source.splits() == ("train", "val", "test")
    numbers = {
        split: [int(source.read(split, i).id[-6:]) for i in range(source.videos(split))] for split in source.splits()
    }
    assert numbers == {"test": [0, 1], "val": [2, 3, 4], "train": list(range(5, 25))}
    image = source.read("train", 7)
    np.testing.assert_array_equal(image.frames[0], as_stored(home / "1/CLEVRTEX_full_000012.png"))
    np.testing.assert_array_equal(image.segmentations[0], boxes((2, 2, 9, 9), (12, 3, 20, 12)))
    first, second = image.instances
    assert (first.shape, first.size, first.material, first.color) == ("cube", "small", "PoliigonBricks01", "")
    assert (second.shape, second.size, second.visibility) == ("monkey", "", (72,))
    assert open_source(write_clevrtex(tmp_path, "outd", 3)).lengths("test") == (1, 1, 1)
    with pytest.raises(DataError, match=r"holds CLEVRTex in clevrtex_full; give"):
        open_source(tmp_path)


def test_the_centre_of_clevrtex(tmp_path: Path) -> None:
    """The square that the published evaluator crops: 0.8 of the shorter side, rounded down."""
    home = write_clevrtex(tmp_path, "full", 12)
    whole, source = open_source(home), open_source(f"{home}?crop=0.8")
    left, top = (32 - 19) // 2, (24 - 19) // 2
    for index in range(source.videos("train")):
        image = source.read("train", index)
        with Image.open(home / f"{(index + 2) // 10}/CLEVRTEX_full_{index + 2:06d}.png") as picture:
            cut = np.asarray(picture.convert("RGB").crop((left, top, left + 19, top + 19)))
        np.testing.assert_array_equal(image.frames[0], cut)
        mask = whole.read("train", index).segmentations
        assert image.segmentations is not None and mask is not None
        np.testing.assert_array_equal(image.segmentations[0], mask[0, top : top + 19, left : left + 19])
        assert [each.visibility for each in image.instances] == [
            (int((image.segmentations == k).sum()),) for k in (1, 2)
        ]
    assert source.size("train", 0) == (19, 19) and whole.size("train", 0) == (24, 32)
    assert source.fingerprint("train") != whole.fingerprint("train")
    for wrong in ("0", "1.5", "half"):
        with pytest.raises(UsageError, match=r"give a share of the shorter side, such as 0.8"):
            open_source(f"{home}?crop={wrong}")


def test_clevrtex_mistakes(tmp_path: Path) -> None:
    home = write_clevrtex(tmp_path, "pbg", 12)
    with pytest.raises(DataError, match=r"has full and pbg; give one of them"):
        write_clevrtex(tmp_path, "full", 1)
        open_source(f"clevrtex:{tmp_path}")
    (home / "0/CLEVRTEX_pbg_000000_flat.png").unlink()
    with pytest.raises(DataError, match=r"CLEVRTEX_pbg_000000_flat.png: cannot be read"):
        open_source(home).read("test", 0)
    save_grey(home / "0/CLEVRTEX_pbg_000000_flat.png", boxes(*[(k, 0, k + 1, 9) for k in range(3)]))
    with pytest.raises(DataError, match=r"has object 3, of 2 in CLEVRTEX_pbg_000000.json"):
        open_source(home).read("test", 0)
    write_json(home / "0/CLEVRTEX_pbg_000000.json", {"objects": 3})
    with pytest.raises(DataError, match=r"000000.json: no objects of CLEVRTex in it"):
        open_source(home).read("test", 0)
    (home / "0/CLEVRTEX_pbg_000004.png").unlink()
    with pytest.raises(DataError, match=r"image 000004 is missing, as 1 of 12, and splits go by number.*\?partial"):
        open_source(home)
    assert len(open_source(f"{home}?partial").lengths("train")) == 9


def write_clevrer(root: Path, number: int, frames: np.ndarray, objects: list[list[dict[str, Any]]] | None) -> None:
    split = "train" if number < 10_000 else "validation"
    path = (
        root
        / f"video_{split}/video_{number // 1000 * 1000:05d}-{number // 1000 * 1000 + 1000:05d}/video_{number:05d}.mp4"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_movie(path, "libx264", frames)
    if objects is not None:
        of = [{"frame_index": t, "frame_filename": "", "objects": each} for t, each in enumerate(objects)]
        content = {"video_index": number, "video_name": f"sim_{number:05d}", "frames": of}
        write_json(root / "derender_proposals" / f"proposal_{number:05d}.json", content)


def detected(mask: np.ndarray, color: str, shape: str = "cube") -> dict[str, Any]:
    return {"mask": runs(mask), "material": "rubber", "color": color, "shape": shape, "score": 0.99}


def test_clevrer(tmp_path: Path) -> None:
    frames, size = oblong(3), (48, 64)
    red, blue = boxes((4, 4, 20, 20), size=size) > 0, boxes((10, 10, 30, 40), size=size) > 0
    objects = [[detected(blue, "blue")], [detected(red, "red"), detected(blue, "blue")], [detected(red, "red")]]
    write_clevrer(tmp_path, 3, frames, objects)
    write_clevrer(tmp_path, 4, frames, [[], [detected(red, "red"), detected(blue, "red")]])
    write_clevrer(tmp_path, 5, frames, None)
    write_clevrer(tmp_path, 10_000, frames, None)
    source = open_source(tmp_path)
    assert source.splits() == ("train", "val") and source.lengths("train") == (3, 3, 3)
    assert source.size("train", 0) == size
    video = source.read("train", 0)
    both, nothing = red & blue, np.zeros(size, bool)
    np.testing.assert_array_equal(video.segmentations == 1, [blue, blue & ~both, nothing])
    np.testing.assert_array_equal(video.segmentations == 2, [nothing, red & ~both, red])
    np.testing.assert_array_equal(video.ignore, [nothing, both, nothing])
    assert [(i.color, i.material, i.shape) for i in video.instances] == [
        ("blue", "rubber", "cube"), ("red", "rubber", "cube"),
    ]  # fmt: skip
    assert video.labelled is None
    twice = source.read("train", 1)
    assert twice.labelled.tolist() == [True, True, False] and len(twice.instances) == 2
    assert source.read("train", 2).labelled.tolist() == [False] * 3
    assert source.read("val", 0).segmentations is None
    missing, made = source.remarks("train")
    assert "video_00005.mp4: no masks, as 1 of 3 videos" in missing and "a detector's" in made
    write_clevrer(tmp_path, 4, frames, [[detected(red[:40], "red")]])
    with pytest.raises(DataError, match=r"proposal_00004.json: frame 0: mask is 64x40, but its image 64x48"):
        open_source(tmp_path).read("train", 1)
    write_clevrer(tmp_path, 4, frames, [[]] * 4)
    with pytest.raises(DataError, match=r"proposal_00004.json: frame 3 of a video of 3"):
        open_source(tmp_path).read("train", 1)


def test_obj3d_is_a_folder_of_frames(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for video in ("0", "10", "2"):
            names = [f"{split}_{video}_{frame:03d}.png" for frame in range(3)]
            save_images(tmp_path / split / video, oblong(3), names)
    source = open_source(tmp_path)
    assert source.splits() == ("train", "validation", "test") and source.lengths("test") == (3, 3, 3)
    assert [source.read("train", index).id for index in range(3)] == ["0", "2", "10"]
