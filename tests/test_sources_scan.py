"""Which files of a folder are read, what is said of the others, and what is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, features

from featcache.errors import DataError
from featcache.sources import Reading, open_source
from featcache.sources.damaged import SoundVideos
from tests.media import ffmpeg_frames, needs_ffmpeg, oblong, save_images, save_movie


def _ids(folder: Path, reading: Reading | None = None) -> list[str]:
    source = open_source(folder, reading)
    return [source.read("train", index).id for index in range(source.videos("train"))]


def test_files_of_unknown_kind_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    save_images(tmp_path / "a", oblong(1))
    save_images(tmp_path / "masks" / "a", np.zeros((1, 48, 64), np.uint8))
    (tmp_path / "masks" / "palette.txt").touch()
    for name in ("notes.txt", "a/notes.TXT", "a/b.HEIC", "a/c.heic", "a/Makefile", ".hidden", "app.ts"):
        (tmp_path / name).write_text("Good morning" if name != "a/c.heic" else "ftypheic")
    source = open_source(tmp_path)
    assert source.left_out() == {".heic": 2, ".ts": 1, ".txt": 2, "no suffix": 1}
    assert SoundVideos(source).left_out() == source.left_out() and source.lengths("train") == (1,)
    for split in ("train", "val"):
        save_images(tmp_path / "splits" / split, oblong(1))
        (tmp_path / "splits" / split / "x.xml").touch()
    assert open_source(tmp_path / "splits").left_out() == {".xml": 2}


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.pgm", "a.pnm", "a.avif", "a.heic"])
def test_further_images_are_read(tmp_path: Path, name: str) -> None:
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    pixels = oblong(1)[0] if "p" not in name[2:4] else oblong(1)[0, ..., 0]
    formats = {"a.jfif": "JPEG", "a.JPE": "JPEG", "a.heic": "JPEG"}  # phones' programs rename what they convert
    Image.fromarray(pixels).save(tmp_path / name, format=formats.get(name))
    with Image.open(tmp_path / name) as image:
        np.testing.assert_array_equal(
            open_source(tmp_path).read("train", 0).frames[0], np.asarray(image.convert("RGB"))
        )
    assert not open_source(tmp_path).left_out()


def test_heif_is_read_where_its_plugin_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin registers itself with Pillow: here one that knows a format of its own."""
    plugin = ModuleType("pillow_heif")

    def register_heif_opener() -> None:
        Image.register_open(
            "TOY", lambda file, _: Image.open(__import__("io").BytesIO(file.read()[8:])), lambda b: b[:8] == b"toyheif0"
        )

    plugin.register_heif_opener = register_heif_opener  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    Image.fromarray(oblong(1)[0]).save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"toyheif0" + (tmp_path / "a.png").read_bytes())
    assert _ids(tmp_path) == ["a.png", "b.heic"]


@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.wmv", "a.ts", "a.m2ts", "a.flv", "a.3gp", "a.ogv", "a.mxf", "a.y4m", "a.vob"])
def test_further_videos_are_read(tmp_path: Path, name: str) -> None:
    made = save_movie(tmp_path / "made.mp4", "libx264", np.tile(oblong(6), (1, 3, 2, 1)))
    more = ["-s", "352x288"] if name == "a.3gp" else []
    subprocess.run(["ffmpeg", "-v", "error", "-i", made, "-r", "25", *more, tmp_path / name], check=True)
    made.unlink()
    frames = open_source(tmp_path).read("train", 0).frames
    np.testing.assert_array_equal(frames, ffmpeg_frames(tmp_path / name, *frames.shape[1:3]))
    assert len(frames) >= 6


def test_a_folder_is_entered_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    save_images(tmp_path / "data" / "walk", oblong(2))
    (tmp_path / "data" / "again").symlink_to("walk")
    (tmp_path / "data" / "walk" / "back").symlink_to("..")
    save_images(tmp_path / "elsewhere" / "run", oblong(2))
    for link in ("a", "b"):
        (tmp_path / "data" / link).symlink_to(tmp_path / "elsewhere")
    assert _ids(tmp_path / "data") == ["a/run", "walk"]
    (tmp_path / "data" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"gone.png: cannot be read \(No such file"):
        _ids(tmp_path / "data")


def test_nothing_but_unknown_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"no image in it \(split train\), but 1 .heic; for HEIF: pip install"):
        open_source(tmp_path)


def test_masks_of_nothing_are_said(tmp_path: Path) -> None:
    save_images(tmp_path / "walk", oblong(2))
    save_images(tmp_path / "masks" / "walk", np.zeros((4, 48, 64), np.uint8))
    (remark,) = open_source(tmp_path, Reading(frames_as="video")).remarks("train")
    assert "masks/walk/2.png: one of 2 masks that belong to no frame" in remark


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        ([f"{i:04d}.png" for i in range(5)], True),
        ([f"frame{i}_left.png" for i in range(0, 50, 10)], True),
        ([f"{i:04d}.png" for i in range(4)], False),
        ([f"2007_{i:06d}.png" for i in (27, 32, 39, 61, 63)], False),  # Pascal VOC
        ([*(f"{i}.png" for i in range(5)), "cover.png"], False),
    ],
)
def test_numbered_images_in_the_folder_itself_are_asked_about(tmp_path: Path, names: list[str], asked: bool) -> None:
    save_images(tmp_path, oblong(len(names)), names)
    question = open_source(tmp_path).question()
    assert bool(question) == asked
    if asked:
        assert f"5 images numbered from {names[0]} to {names[-1]}: pass --frames-as video" in question
    assert not open_source(tmp_path, Reading(frames_as="images")).question()
    assert len(_ids(tmp_path)) == len(names)  # as before, for a store that is there
    video = open_source(tmp_path, Reading(frames_as="video"))
    assert not video.question() and video.lengths("train") == (len(names),)
    assert video.read("train", 0).id == tmp_path.name


def test_what_no_video_looks_like_is_not_asked_about(tmp_path: Path) -> None:
    save_images(tmp_path / "train", oblong(6))  # split folders hold images, as they always did
    assert not open_source(tmp_path).question()
    assert open_source(tmp_path).videos("train") == 6
    assert open_source(tmp_path, Reading(frames_as="video")).videos("train") == 1
    save_images(tmp_path / "photos", oblong(5))
    save_images(tmp_path / "photos", oblong(1, 40, 64), ["2.png"])  # photos differ in size
    assert not open_source(tmp_path / "photos").question()
    save_images(tmp_path / "clip" / "below", oblong(6))
    assert not open_source(tmp_path / "clip").question()


def test_masks_of_a_video_in_the_folder_itself(tmp_path: Path) -> None:
    save_images(tmp_path, oblong(5))
    save_images(tmp_path / "masks", np.ones((2, 48, 64), np.uint8), ["0.png", "3.png"])
    video = open_source(tmp_path, Reading(frames_as="video")).read("train", 0)
    assert list(video.labelled) == [True, False, False, True, False]


# -- folders for classes -----------------------------------------------------------------------------------


def _classes(root: Path, names: list[str], sizes: list[tuple[int, int]]) -> Path:
    """A folder for each class of single images, as torchvision's ImageFolder reads them."""
    for k, of in enumerate(("cat", "dog")):
        for name, size in zip(names, sizes, strict=True):
            save_images(root / of, oblong(1, *size) + k, [name])
    return root


MIXED, ONE = [(48, 64), (40, 64), (48, 60)], [(48, 64)] * 3


@pytest.mark.parametrize(
    ("names", "sizes", "asked"),
    [
        (["n02_7.jpg", "n02_9.jpg", "n02_11.jpg"], MIXED, True),  # as ImageNet
        (["a3f.png", "77e.png", "b10.png"], ONE, True),
        (["1305031102.175304.png", "1305031103.2.png", "1305031103.3.png"], ONE, False),  # as of a camera with times
        (["0001.png", "0002.png", "0003.png"], ONE, False),
    ],
)
def test_folders_of_images_are_asked_about_or_told(
    tmp_path: Path, names: list[str], sizes: list[tuple[int, int]], asked: bool
) -> None:
    for root in (
        _classes(tmp_path / "all", names, sizes),
        _classes(tmp_path / "splits" / "train", names, sizes).parent,
    ):
        source = open_source(root)
        assert bool(source.question()) == asked
        if asked:
            assert "cat: 3 images that do not look like the frames of one video" in source.question()
            assert "pass --frames-as images if each is by itself" in source.question()
        (remark,) = source.remarks("train")
        assert "cat: 2 folders of images are read as a video each (3 frames here); if every image" in remark
        single = open_source(root, Reading(frames_as="images"))
        assert not single.question() and not single.remarks("train")
        assert single.lengths("train") == (1,) * 6
        assert sorted(single.names("train")) == sorted(f"{of}/{name}" for of in ("cat", "dog") for name in names)
        at = single.names("train").index(f"dog/{names[1]}")
        with Image.open(single.where("train", at)) as image:
            np.testing.assert_array_equal(single.read("train", at).frames[0], np.asarray(image))
        video = open_source(root, Reading(frames_as="video"))
        assert not video.question() and not video.remarks("train") and video.lengths("train") == (3, 3)


def test_masks_of_single_images_in_folders(tmp_path: Path) -> None:
    _classes(tmp_path, ["a.png", "b.png", "c.png"], MIXED)
    save_images(tmp_path / "masks" / "dog", np.ones((1, 40, 64), np.uint8), ["b.png"])
    source = open_source(tmp_path, Reading(frames_as="images"))
    found = {source.names("train")[k]: source.read("train", k) for k in range(6)}
    assert [name for name, video in found.items() if video.labelled is None] == ["dog/b.png"]
    assert (found["dog/b.png"].segmentations == 1).all()


@pytest.mark.parametrize("place", ["walk/masks", "cars/masks/one", "Masks/walk", "train/walk/masks"])
def test_masks_at_the_wrong_place_are_refused(tmp_path: Path, place: str) -> None:
    base = tmp_path / ("train" if place.startswith("train") else "")
    save_images(base / "walk", oblong(2))
    save_images(tmp_path / place, np.zeros((2, 48, 64), np.uint8))
    with pytest.raises(DataError) as error:
        open_source(tmp_path)
    line = str(error.value)
    assert f"{tmp_path / place}: masks of {base} lie directly in {base / 'masks'}; move these to " in line
    right = Path(line.split("move these to ")[1].split(", or")[0])
    right.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).rename(right)
    if "one" not in place:
        assert open_source(tmp_path).read("train", 0).segmentations is not None
