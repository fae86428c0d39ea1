"""Images of several pages are videos: every page of a TIFF, an APNG, an animated WebP and a GIF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from featcache.errors import DataError
from featcache.sources import open_source
from slotlab.pictures.frames import read_path
from tests.media import ffmpeg_frames, needs_ffmpeg, oblong, save_images, save_movie

FRAMES = oblong(5)
MASKS = (np.indices((5, 48, 64)).sum(0) // 16 % 4).astype(np.uint8)
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("stack.tif", {}),
    ("packed.tiff", {"compression": "tiff_deflate"}),
    ("anim.webp", {"lossless": True, "exact": True}),
    ("anim.png", {}),
    ("anim.apng", {}),
]


def _save(path: Path, frames: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=rest, **options)
    return path


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_every_page_is_a_frame(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    path = _save(tmp_path / "below" / name, FRAMES, **options)
    save_images(tmp_path / "below", FRAMES[:2])  # a video of two images, beside it
    source = open_source(tmp_path)
    assert dict(zip([source.read("train", i).id for i in range(2)], source.lengths("train"), strict=True)) == {
        "below": 2,
        f"below/{name}": 5,
    }
    np.testing.assert_array_equal(source.read("train", 1).frames, FRAMES)
    np.testing.assert_array_equal(read_path(path), FRAMES)
    np.testing.assert_array_equal(open_source(path).read("train", 0).frames, FRAMES)
    with pytest.raises(DataError, match=f"{name}: holds several pages"):
        read_path(tmp_path / "below")


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["apng", "gif"])
def test_animations_as_ffmpeg_plays_them(tmp_path: Path, suffix: str) -> None:
    """Frames that hold only what changed are laid over the ones before."""
    moving = np.repeat(FRAMES[:1], 5, axis=0)
    for t in range(5):
        moving[t, 10:20, 5 + 8 * t : 15 + 8 * t] = (200, 30, 60)
    path = _save(tmp_path / f"a.{suffix}", moving)
    np.testing.assert_array_equal(open_source(tmp_path).read("train", 0).frames, ffmpeg_frames(path, 48, 64))
    if suffix == "apng":
        np.testing.assert_array_equal(read_path(path), moving)


def test_masks_in_as_many_pages_or_files(tmp_path: Path) -> None:
    _save(tmp_path / "a.tif", FRAMES)
    _save(tmp_path / "b.webp", FRAMES, lossless=True)
    save_movie(tmp_path / "c.mp4", "libx264", FRAMES)
    _save(tmp_path / "masks" / "a.tif", MASKS)
    save_images(tmp_path / "masks" / "b", MASKS)
    _save(tmp_path / "masks" / "c.png", MASKS)
    for index in range(3):
        np.testing.assert_array_equal(open_source(tmp_path).read("train", index).segmentations, MASKS)
    _save(tmp_path / "masks" / "a.tif", MASKS[:4])
    with pytest.raises(DataError, match=r"masks: 4 masks of 5 frames of a.tif; give one mask per frame"):
        open_source(tmp_path).read("train", 0)


def test_previews_and_posters_are_no_frames(tmp_path: Path) -> None:
    first, *rest = map(Image.fromarray, FRAMES)
    preview = first.resize((16, 12))
    preview.encoderinfo = {"tiffinfo": {254: 1}}
    first.save(tmp_path / "pyramid.tif", save_all=True, append_images=[preview, *rest])
    np.testing.assert_array_equal(open_source(tmp_path).read("train", 0).frames, FRAMES)
    (tmp_path / "pyramid.tif").unlink()
    first.save(tmp_path / "photo.tif", save_all=True, append_images=[preview])
    np.testing.assert_array_equal(open_source(tmp_path).read("train", 0).frames, FRAMES[:1])
    (tmp_path / "photo.tif").unlink()
    poster = Image.new("RGB", first.size)
    poster.save(tmp_path / "poster.png", save_all=True, default_image=True, append_images=[first, *rest])
    np.testing.assert_array_equal(open_source(tmp_path).read("train", 0).frames, FRAMES)
    (tmp_path / "poster.png").unlink()
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[preview])  # a photo and its preview
    assert open_source(tmp_path).lengths("train") == (1,)


def test_pages_are_turned_and_must_be_of_one_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    _save(tmp_path / "a.webp", FRAMES, lossless=True, exact=True, exif=exif)
    upright = np.rot90(FRAMES, -1, axes=(1, 2))
    np.testing.assert_array_equal(open_source(tmp_path).read("train", 0).frames, upright)
    Image.fromarray(FRAMES[0]).save(
        tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(FRAMES[1, :, :40])]
    )
    with pytest.raises(DataError, match=r"a.tif: page 1: frame is 40x48, but the video's first is 64x48"):
        open_source(tmp_path).read("train", 0)


def test_pages_that_are_cut_off_are_refused(tmp_path: Path) -> None:
    for name, options in KINDS:
        path = _save(tmp_path / name, FRAMES, **options)
        whole = path.read_bytes()
        for percent in (30, 60, 90, 99):
            path.write_bytes(whole[: len(whole) * percent // 100])
            try:
                frames = read_path(path)
            except DataError as error:
                assert name in str(error)
            else:
                np.testing.assert_array_equal(frames, FRAMES)
