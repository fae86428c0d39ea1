"""Which way up: EXIF of photos and masks as Pillow turns them, display matrices of videos as ffmpeg does."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from featcache.errors import DataError
from featcache.sources import open_source
from featcache.sources.images import read_header
from slotlab.pictures.frames import as_frames, read_path
from tests.media import MATRICES, copied, ffmpeg_frames, needs_ffmpeg, oblong, save_movie, set_display_matrix

ORIENTATIONS = range(1, 9)
AREA = (slice(5, 20), slice(9, 40))  # off the middle, and neither square nor as the frame


def _save(path: Path, pixels: np.ndarray, orientation: int | None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
        options |= {"exif": exif}
    Image.fromarray(pixels).save(path, **options)
    return path


def _photo_and_mask() -> tuple[np.ndarray, np.ndarray]:
    """Both as the sensor gave them: (48, 64, 3), and (48, 64) with one object."""
    photo, mask = oblong(1)[0], np.zeros((48, 64), np.uint8)
    mask[AREA] = 1
    photo[AREA] = (250, 10, 10)
    return photo, mask


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_display_matrix_as_ffmpeg_shows_it(tmp_path: Path, orientation: int, suffix: str) -> None:
    clip = save_movie(tmp_path / f"clip.{suffix}", "libx264", oblong(), crf="10")
    upright = ffmpeg_frames(clip, 48, 64)
    set_display_matrix(clip, *MATRICES[orientation])
    height, width = (64, 48) if orientation > 4 else (48, 64)
    right = ffmpeg_frames(clip, height, width)
    np.testing.assert_array_equal(open_source(tmp_path).read("train", 0).frames, right)
    np.testing.assert_array_equal(read_path(clip), right)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = Image.fromarray(upright[0])
    picture.info["exif"] = exif.tobytes()
    np.testing.assert_array_equal(right[0], np.asarray(ImageOps.exif_transpose(picture)))  # one meaning everywhere


@needs_ffmpeg
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_display_matrix_in_matroska(tmp_path: Path, orientation: int) -> None:
    """It has no such matrix, but angles that say the same. ffmpeg before version 6 overlooks them, so what it shows of
    the mp4 file counts whose packets and matrix are copied."""
    clip = save_movie(tmp_path / "clip.mp4", "libvpx-vp9", oblong(2), deadline="realtime", **{"cpu-used": "8"})
    set_display_matrix(clip, *MATRICES[orientation])
    right = ffmpeg_frames(clip, *((64, 48) if orientation > 4 else (48, 64)))
    for suffix in ("mkv", "webm"):
        np.testing.assert_array_equal(read_path(copied(clip, tmp_path / f"copy.{suffix}")), right)


@needs_ffmpeg
def test_avi_holds_no_display_matrix_but_its_stream_may(tmp_path: Path) -> None:
    clip, avi = save_movie(tmp_path / "clip.mp4", "libx264", oblong(), crf="10"), tmp_path / "clip.avi"
    plain = read_path(clip)
    set_display_matrix(clip, *MATRICES[6])
    copy = ["ffmpeg", "-v", "error", "-y", "-i", clip, "-c", "copy"]
    subprocess.run([*copy, avi], check=True)
    np.testing.assert_array_equal(read_path(avi), plain)  # the turn is lost, for any reader
    np.testing.assert_array_equal(ffmpeg_frames(avi, 48, 64), plain)
    for words in ("rotate=90", "flip=vertical"):  # a message within H.264, which FFmpeg takes for one frame's
        message = f"h264_metadata=display_orientation=insert:{words}"
        subprocess.run([*copy, "-bsf:v", message, avi], check=True)
        with pytest.raises(DataError, match=r"clip.avi: its display matrix changes near second 0\.\d; .*-noautorotate"):
            read_path(avi)
        subprocess.run([*copy, "-bsf:v", message, "-frames:v", "1", avi], check=True)
        right = ffmpeg_frames(avi, *((64, 48) if words == "rotate=90" else (48, 64)))
        np.testing.assert_array_equal(read_path(avi), right)
        assert right.shape != plain[:1].shape or (right != plain[:1]).any()


def test_a_display_matrix_that_is_no_quarter_turn_is_refused(tmp_path: Path) -> None:
    clip = save_movie(tmp_path / "clip.mp4", "libx264", oblong())
    for matrix in [(0.8, 0.6, -0.6, 0.8), (1, 0.5, 0, 1), (0, 0, 0, 0)]:
        set_display_matrix(clip, *matrix)
        with pytest.raises(DataError, match=r"clip.mp4: its display matrix .*ffmpeg -i FILE new.mp4"):
            open_source(tmp_path).read("train", 0)
    set_display_matrix(clip, 2, 0, 0, 2)  # a scale, which ffmpeg leaves to the player
    np.testing.assert_array_equal(read_path(clip).shape, (3, 48, 64, 3))


@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("tif", {}), ("webp", {"lossless": True})])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_photo_is_turned_by_its_tag(tmp_path: Path, orientation: int, suffix: str, options: dict[str, bool]) -> None:
    photo = _save(tmp_path / f"a.{suffix}", _photo_and_mask()[0], orientation, **options)
    with Image.open(photo) as image:
        right = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(as_frames(image)[0], right)  # segment(PIL image) and segment(path)
    np.testing.assert_array_equal(read_path(photo)[0], right)
    np.testing.assert_array_equal(open_source(tmp_path).read("train", 0).frames[0], right)
    assert read_header(photo).orientation == orientation and read_header(photo).turned() == right.shape[:2]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_mask_is_turned_by_its_own_tag(tmp_path: Path, orientation: int, suffix: str) -> None:
    photo, mask = _photo_and_mask()
    _save(tmp_path / "a.png", photo, orientation)
    path = _save(tmp_path / "masks" / f"a.{suffix}", mask, orientation)
    source = open_source(tmp_path)
    video = source.read("train", 0)
    with Image.open(io.BytesIO(path.read_bytes())) as image:  # Pillow maps a grey TIFF file as if it lay upright
        np.testing.assert_array_equal(video.segmentations[0], np.asarray(ImageOps.exif_transpose(image)))
    assert ((video.frames[0] == (250, 10, 10)).all(-1) == (video.segmentations[0] == 1)).all()
    assert not source.remarks("train")


def test_exif_behind_a_pngs_pixels_counts(tmp_path: Path) -> None:
    photo, _ = _photo_and_mask()
    data = _save(tmp_path / "a.png", photo, 6).read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    (tmp_path / "a.png").write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert read_header(tmp_path / "a.png").turned() == (64, 48)
    assert open_source(tmp_path).read("train", 0).frames.shape == (1, 64, 48, 3)


def test_a_turned_photo_with_an_untagged_mask_is_refused_by_name(tmp_path: Path) -> None:
    photo, mask = _photo_and_mask()
    _save(tmp_path / "a.jpg", photo, 6)
    _save(tmp_path / "masks" / "a.png", mask, None)
    with pytest.raises(DataError, match=r"a.jpg is turned by its EXIF orientation 6, .*masks/a.png has 1: save the"):
        open_source(tmp_path).read("train", 0)
    _save(tmp_path / "masks" / "a.png", np.ascontiguousarray(mask.T[:, ::-1]), None)  # upright: sizes tell
    source = open_source(tmp_path)
    assert source.read("train", 0).segmentations[0, 9, 47 - 5] == 1
    assert not source.remarks("train")


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_where_sizes_cannot_tell_a_line_warns(tmp_path: Path, orientation: int) -> None:
    photo, mask = _photo_and_mask()
    for name in ("a", "b"):
        _save(tmp_path / f"{name}.jpg", photo, orientation)
        _save(tmp_path / "masks" / f"{name}.png", mask, None)
    source = open_source(tmp_path)
    (remark,) = source.remarks("train")
    assert f"masks/a.png (and 1 more): EXIF orientation 1, but {orientation} in" in remark and "a.jpg" in remark
    np.testing.assert_array_equal(source.read("train", 0).segmentations[0], mask)  # as it is


def test_a_square_photo_cannot_tell_either(tmp_path: Path) -> None:
    photo, mask = _photo_and_mask()
    _save(tmp_path / "a.jpg", photo[:, :48], 6)
    _save(tmp_path / "masks" / "a.png", mask[:, :48], None)
    assert len(open_source(tmp_path).remarks("train")) == 1
