"""Masks in the forms that people have: which numbers they give, what is void, and what is refused."""

from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from featcache.errors import DataError, UsageError
from featcache.sources import Reading, open_source
from featcache.sources.video import Video
from tests.media import oblong, save_images, save_movie
from tests.movi_files import write_movi

NUMBERS = np.repeat(np.repeat(np.arange(12, dtype=np.uint8).reshape(3, 4), 16, 0), 16, 1) % 4  # (48, 64), 0 to 3
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, *[9] * (3 * 251), 224, 224, 192]  # its colours of 0 to 3, and 255


def _read(folder: Path, mask: Image.Image | bytes, name: str = "a.png", reading: Reading | None = None) -> Video:
    """The video of a photo with that mask."""
    save_images(folder, oblong(1), [f"{Path(name).stem}.png"])
    (folder / "masks").mkdir(exist_ok=True)
    if isinstance(mask, bytes):
        (folder / "masks" / name).write_bytes(mask)
    else:
        mask.save(folder / "masks" / name)
    return open_source(folder, reading).read("train", 0)


def _palette(numbers: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.frombytes("P", numbers.shape[::-1], numbers.tobytes())
    image.putpalette(colours)
    return image


def _grey_png(numbers: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits a pixel, which Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = numbers.shape
    spread = (numbers[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(spread.reshape(height, -1).astype(bool), axis=1)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _channels(numbers: np.ndarray, *others: Any) -> np.ndarray:
    return np.stack([np.broadcast_to(np.uint8(other), numbers.shape) for other in others], -1).astype(np.uint8)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_keeps_its_numbers(tmp_path: Path, bits: int) -> None:
    video = _read(tmp_path, _grey_png(NUMBERS, bits))
    np.testing.assert_array_equal(video.segmentations[0], NUMBERS)
    assert len(video.instances) == 3


def test_pgm_of_few_levels_keeps_its_numbers(tmp_path: Path) -> None:
    video = _read(tmp_path, b"P5 64 48 12\n" + NUMBERS.tobytes(), "a.ppm")
    np.testing.assert_array_equal(video.segmentations[0], NUMBERS)


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(NUMBERS),
        Image.fromarray(NUMBERS.astype(np.uint16)),
        _palette(NUMBERS, VOC),
        Image.fromarray(_channels(NUMBERS, NUMBERS, 255), "LA"),
        Image.fromarray(_channels(NUMBERS, NUMBERS, NUMBERS, NUMBERS)),
        Image.fromarray(_channels(NUMBERS, NUMBERS, NUMBERS, NUMBERS, 255)),
        Image.fromarray(_channels(NUMBERS, NUMBERS, NUMBERS, NUMBERS, 7)),
    ],
    ids=["grey", "16 bit", "palette", "LA", "RGB", "RGBA", "RGBA, half clear"],
)
def test_one_channel_in_any_dress(tmp_path: Path, mask: Image.Image) -> None:
    np.testing.assert_array_equal(_read(tmp_path, mask).segmentations[0], NUMBERS)
    np.testing.assert_array_equal(_read(tmp_path / "tif", mask, "a.tif").segmentations[0], NUMBERS)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.fromarray(_channels(NUMBERS, NUMBERS, 0, 0)), "shows colours; pass --mask-colours"),
        (Image.fromarray(_channels(NUMBERS, 1, NUMBERS), "LA"), "has an alpha channel that differs from place to"),
        (Image.fromarray(_channels(NUMBERS, 1, 1, 1, NUMBERS)), "has an alpha channel that differs from place to"),
        (Image.fromarray(_channels(NUMBERS, 1, 2, 3, 4), "CMYK"), r"has 4 channels \(CMYK\)"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(tmp_path: Path, mask: Image.Image, message: str) -> None:
    name = "a.tif" if mask.mode == "CMYK" else "a.png"
    with pytest.raises(DataError, match=rf"masks/{name}: mask {message}"):
        _read(tmp_path, mask, name)


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.jpg", {}), ("a.webp", {}), ("b.webp", {"quality": 100}), ("a.tif", {"compression": "jpeg"})],
)
def test_lossy_masks_are_refused(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    save_images(tmp_path, oblong(1), [f"{Path(name).stem}.png"])
    (tmp_path / "masks").mkdir()
    Image.fromarray(NUMBERS * 60).save(tmp_path / "masks" / name, **options)
    with pytest.raises(DataError, match=rf"masks/{name}: mask is a lossy .* save it as PNG"):
        open_source(tmp_path).read("train", 0)
    if name.endswith("webp"):
        Image.fromarray(NUMBERS).save(tmp_path / "masks" / name, lossless=True)
        np.testing.assert_array_equal(open_source(tmp_path).read("train", 0).segmentations[0], NUMBERS)


def test_a_jpeg_by_another_name_is_refused_too(tmp_path: Path) -> None:
    Image.fromarray(NUMBERS).save(tmp_path / "hidden", format="JPEG")
    with pytest.raises(DataError, match=r"masks/a.png: mask is a lossy JPEG"):
        _read(tmp_path, (tmp_path / "hidden").read_bytes())


@pytest.mark.parametrize("dress", ["grey", "RGB", "white palette", "1 bit"])
def test_black_and_white_is_one_object(tmp_path: Path, dress: str) -> None:
    binary = np.where(NUMBERS == 2, 255, 0).astype(np.uint8)
    image = Image.fromarray(binary)
    if dress == "white palette":
        image = _palette(binary, [0] * 765 + [255] * 3)
    video = _read(tmp_path, image.convert({"RGB": "RGB", "1 bit": "1"}.get(dress, image.mode)))
    np.testing.assert_array_equal(video.segmentations[0], binary // 255)
    assert len(video.instances) == 1 and video.ignore is None


def test_a_palettes_255_beside_small_numbers_is_void(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    voc = NUMBERS.copy()
    voc[:5], voc[40:] = 255, 255
    video = _read(tmp_path, _palette(voc, VOC))
    np.testing.assert_array_equal(video.ignore[0], voc == 255)
    np.testing.assert_array_equal(video.segmentations[0], np.where(voc == 255, 0, voc))
    assert len(video.instances) == 3
    assert "masks/a.png: a palette mask's 255 beside small numbers is taken as void" in caplog.text
    (remark,) = open_source(tmp_path).remarks("train")
    assert "is taken as void" in remark

    only = np.where(voc == 255, 255, 0).astype(np.uint8)  # the object lies outside: VOC's colour of 255 is no white
    video = _read(tmp_path, _palette(only, VOC))
    np.testing.assert_array_equal(video.ignore[0], only == 255)
    assert not video.segmentations.any() and not video.instances

    every = Reading.of(ignore_label="none")
    video = _read(tmp_path, _palette(only, VOC), reading=every)
    np.testing.assert_array_equal(video.segmentations[0], only // 255)
    caplog.clear()
    video = _read(tmp_path, _palette(voc, VOC), reading=every)
    np.testing.assert_array_equal(video.segmentations[0], voc)
    assert len(video.instances) == 255 and not video.ignored.any() and not caplog.text
    assert open_source(tmp_path, every).fingerprint("train") != open_source(tmp_path).fingerprint("train")
    assert "pass --ignore-label none" in remark

    many = (np.arange(48 * 64) % 256).astype(np.uint8).reshape(48, 64)
    assert _read(tmp_path, _palette(many, VOC)).ignore is None  # 255 of 255 objects


def test_grey_255_is_an_object_until_a_label_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grey = NUMBERS.copy()
    grey[:5] = 255
    video = _read(tmp_path, Image.fromarray(grey))
    np.testing.assert_array_equal(video.segmentations[0], grey)
    assert "if it marks void, pass --ignore-label 255" in caplog.text
    caplog.clear()
    video = _read(tmp_path, Image.fromarray(grey), reading=Reading.of(ignore_label="255"))
    np.testing.assert_array_equal(video.ignore[0], grey == 255)
    np.testing.assert_array_equal(video.segmentations[0], np.where(grey == 255, 0, grey))
    assert not caplog.text
    video = _read(tmp_path, Image.fromarray(grey), reading=Reading.of(ignore_label="2"))
    np.testing.assert_array_equal(video.ignore[0], grey == 2)
    assert open_source(tmp_path).fingerprint("train") != open_source(
        tmp_path, Reading.of(ignore_label="2")
    ).fingerprint("train")


def test_colours_are_numbered_as_they_appear_in_the_video(tmp_path: Path) -> None:
    colours = np.array([(0, 0, 0), (0, 200, 0), (200, 0, 0), (0, 0, 200)], np.uint8)
    masks = np.zeros((3, 48, 64), np.uint8)
    masks[0, 20:, 5:] = 2  # the first that appears
    masks[0, 30:, 9:] = 1
    masks[1, :5] = 3
    masks[2, :5], masks[2, 7:9] = 1, 3
    save_images(tmp_path / "clip", oblong(3))
    save_images(tmp_path / "masks" / "clip", colours[masks])
    with pytest.raises(DataError, match="--mask-colours"):
        open_source(tmp_path).read("train", 0)
    video = open_source(tmp_path, Reading(mask_colours=True)).read("train", 0)
    np.testing.assert_array_equal(video.segmentations, np.array([0, 2, 1, 3], np.uint8)[masks])
    video = open_source(tmp_path, Reading.of(True, "#C80000")).read("train", 0)
    np.testing.assert_array_equal(video.segmentations, np.array([0, 1, 0, 2], np.uint8)[masks])
    np.testing.assert_array_equal(video.ignore, masks == 2)
    smooth = np.asarray(Image.fromarray(oblong(1)[0]))
    save_images(tmp_path / "masks" / "clip", np.stack([smooth] * 3))
    with pytest.raises(DataError, match=r"masks of \d+ colours; smoothed edges add colours"):
        open_source(tmp_path, Reading(mask_colours=True)).read("train", 0)


@pytest.mark.parametrize(("colours", "label"), [(False, "256"), (False, "#112233"), (True, "7"), (True, "#12345")])
def test_labels_that_name_nothing(colours: bool, label: str) -> None:
    with pytest.raises(UsageError, match=f"--ignore-label {label}: give"):
        Reading.of(colours, label)


def test_hdf5_and_movi_know_void_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    masks = np.stack([NUMBERS] * 2)
    masks[1, :5] = 255
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["video"], file["mask"] = oblong(2)[None], masks[None]
        file["validation/image"], file["validation/mask"] = oblong(1), np.where(NUMBERS[None] == 1, 255, 0)
    with caplog.at_level(logging.WARNING):
        assert open_source(tmp_path / "v.h5").splits() == ("validation",)
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["video"], file["mask"] = oblong(2)[None], masks[None]
    assert open_source(tmp_path / "w.h5").read("train", 0).segmentations.max() == 255
    assert "w.h5: /mask row 0: 255 beside small numbers is taken as an object" in caplog.text
    np.testing.assert_array_equal(
        open_source(tmp_path / "w.h5", Reading.of(ignore_label="255")).read("train", 0).ignore, masks == 255
    )
    binary = open_source(tmp_path / "v.h5").read("validation", 0)
    np.testing.assert_array_equal(binary.segmentations[0], NUMBERS == 1)
    with pytest.raises(UsageError, match=r"w.h5: --mask-colours is for folders of mask images"):
        open_source(tmp_path / "w.h5", Reading(mask_colours=True))

    folder = write_movi(tmp_path / "movi", {"train": 1})
    plain = open_source(folder).read("train", 0)
    video = open_source(folder, Reading.of(ignore_label="2")).read("train", 0)
    np.testing.assert_array_equal(video.ignore, plain.segmentations == 2)
    assert set(np.unique(video.segmentations)) == {0, 1} and len(video.instances) == 2


# Frames without masks


def test_frames_without_a_mask_are_read_and_marked(tmp_path: Path) -> None:
    save_images(tmp_path / "walk", oblong(6))
    save_images(tmp_path / "other", oblong(2))
    save_images(tmp_path, oblong(2), ["x.png", "y.png"])
    save_images(tmp_path / "masks" / "walk", np.stack([NUMBERS, NUMBERS.T.reshape(48, 64)]), ["0.png", "5.png"])
    save_images(tmp_path / "masks", NUMBERS[None], ["y.png"])
    source = open_source(tmp_path)
    videos = {video.id: video for video in (source.read("train", index) for index in range(4))}
    np.testing.assert_array_equal(videos["walk"].labelled, [True, False, False, False, False, True])
    np.testing.assert_array_equal(videos["walk"].segmentations[5], NUMBERS.T.reshape(48, 64))
    assert not videos["walk"].segmentations[1:5].any()
    for name in ("other", "x.png"):
        assert not videos[name].labelled.any() and not videos[name].segmentations.any()
    assert videos["y.png"].labelled is None
    remark, _ = source.remarks("train")
    assert remark.endswith(": no mask, as for 7 of 10 images and clips; these are not scored")


def _sparse(folder: Path, names: list[str]) -> Video:
    """A clip of 12 frames with a mask in each of the named files, of its own number."""
    save_movie(folder / "clip.mp4", "libx264", oblong(12))
    masks = np.stack([np.full((48, 64), number + 1, np.uint8) for number in range(len(names))])
    save_images(folder / "masks" / "clip", masks, names)
    return open_source(folder).read("train", 0)


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (["00000.png", "00005.png", "00010.png"], [0, 5, 10]),
        (["frame_1.png", "frame_6.png", "frame_12.png"], [0, 5, 11]),  # ffmpeg and many tools count from 1
        (["clip2_000.png", "clip2_011.png"], [0, 11]),
    ],
)
def test_a_clips_masks_are_put_to_their_frames(tmp_path: Path, names: list[str], places: list[int]) -> None:
    video = _sparse(tmp_path, names)
    np.testing.assert_array_equal(np.flatnonzero(video.labelled), places)
    np.testing.assert_array_equal(video.segmentations[places][:, 0, 0], np.arange(len(places)) + 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["5.png", "10.png"], "none is numbered 0 or 12, so they may count from 0 or from 1"),
        (["a.png", "b.png"], "give one mask per frame, or name each by the number"),
        (["0a0.png", "1a0.png"], "give one mask per frame, or name each by the number"),
        (["0.png", "12.png"], "the last of which is numbered 12"),
        (["3.png", "30.png"], "the last of which is numbered 30"),
        ([f"{i}.png" for i in range(14)], "the last of which is numbered 13"),
    ],
)
def test_where_masks_cannot_be_put_they_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=rf"masks/clip: {len(names)} masks of 12 frames of clip.mp4.*{message}"):
        _sparse(tmp_path, names)


def test_void_of_a_partly_labelled_video(tmp_path: Path) -> None:
    voc = NUMBERS.copy()
    voc[:5] = 255
    save_images(tmp_path / "walk", oblong(3))
    (tmp_path / "masks" / "walk").mkdir(parents=True)
    _palette(voc, VOC).save(tmp_path / "masks" / "walk" / "1.png")
    video = open_source(tmp_path).read("train", 0)
    np.testing.assert_array_equal(video.ignore[1], voc == 255)
    assert not video.ignore[[0, 2]].any() and list(video.labelled) == [False, True, False]
