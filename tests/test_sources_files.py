"""Folders of videos and images, and HDF5 files: what they give, and what they refuse."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from featcache.errors import DataError, UsageError
from featcache.sources import open_source
from featcache.sources.fingerprint import file_digest
from featcache.sources.folder import FolderSource
from featcache.sources.hdf5 import Hdf5Source
from slotlab.pictures.frames import as_frames
from tests.media import save_images, save_movie
from tests.movi_files import scene

# Folders


def test_folder_of_images_in_natural_order_with_masks(tmp_path: Path) -> None:
    frames, masks = scene(0, frames=12)
    save_images(tmp_path / "walk", frames)  # 0.png ... 11.png
    save_images(tmp_path / "masks" / "walk", masks)
    save_images(tmp_path, frames[:2], ["b.png", "a.png"])
    save_images(tmp_path / "masks", masks[:2], ["b.png", "a.png"])
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.png").write_bytes(b"not an image")
    source = open_source(tmp_path)
    assert source.splits() == ("train",)
    assert list(source.lengths("train")) == [1, 1, 12]
    walk = source.read("train", 2)
    assert walk.id == "walk"
    np.testing.assert_array_equal(walk.frames, frames)
    np.testing.assert_array_equal(walk.segmentations, masks)
    assert [i.visibility for i in walk.instances] == [tuple(int((m == k).sum()) for m in masks) for k in (1, 2)]
    np.testing.assert_array_equal(source.read("train", 0).frames[0], frames[1])


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.ppm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, name: str) -> None:
    """Pillow by itself would cut them off at 255: white."""
    ramp = np.arange(0, 1 << 16, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / name)
    frames = open_source(tmp_path).read("train", 0).frames
    np.testing.assert_array_equal(frames[0], np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, -1))
    np.testing.assert_array_equal(as_frames(Image.fromarray(ramp)), frames)  # what slotlab.load(RUN).segment takes


@pytest.mark.parametrize(("values", "kind"), [(np.float32(0.5), "floating-point"), (np.int32(200), "32-bit")])
def test_values_of_unknown_range_are_refused(tmp_path: Path, values: np.generic, kind: str) -> None:
    Image.fromarray(np.full((8, 8), values)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=f"a.tif: holds {kind} values, whose range is unknown; save it with 8 or 16"):
        open_source(tmp_path).read("train", 0)


def test_names_that_are_not_utf8_are_names(tmp_path: Path) -> None:
    save_images(tmp_path, scene(0, frames=1)[0])
    (tmp_path / "0.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    source = open_source(tmp_path)
    assert len(source.fingerprint("train")) == 16 and len(source.read("train", 0).frames) == 1


def test_folder_splits_and_their_other_names(tmp_path: Path) -> None:
    for name in ("val", "train"):
        save_images(tmp_path / name / "clip", scene(1)[0])
    source = open_source(tmp_path)
    assert source.splits() == ("train", "validation")
    assert source.read("validation", 0).segmentations is None
    with pytest.raises(UsageError, match=r"no split 'test'; it has: train, validation"):
        source.fingerprint("test")
    (tmp_path / "validation").mkdir()
    with pytest.raises(DataError, match=r"both val and validation"):
        open_source(tmp_path)
    (tmp_path / "validation").rmdir()
    save_images(tmp_path / "extra", scene(1)[0])
    with pytest.raises(DataError, match=r"extra: lies beside the split folders train, val"):
        open_source(tmp_path)


def test_folder_fingerprint_follows_content(tmp_path: Path) -> None:
    frames = scene(0)[0]
    save_images(tmp_path / "a" / "clip", frames)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    before = FolderSource(tmp_path / "a").fingerprint("train")
    assert FolderSource(tmp_path / "b").fingerprint("train") == before
    Image.fromarray(255 - frames[1]).save(tmp_path / "b" / "clip" / "1.png")
    assert FolderSource(tmp_path / "b").fingerprint("train") != before


def test_a_video_keeps_its_fingerprint_under_another_name(tmp_path: Path) -> None:
    frames, numbers = scene(0)
    save_images(tmp_path / "walk", frames)
    save_images(tmp_path / "masks" / "walk", numbers[1:], ["1.png", "2.png"])
    save_images(tmp_path, scene(1)[0][:2], ["p.png", "q.png"])

    def known() -> dict[str, str]:
        source = FolderSource(tmp_path)
        return dict(zip(source.names("train"), source.fingerprints("train"), strict=True))

    before = known()
    assert list(before) == ["p.png", "q.png", "walk"] and len(set(before.values())) == 3
    for old, new in (("walk", "a"), ("masks/walk", "masks/a"), ("q.png", "b.png")):
        (tmp_path / old).rename(tmp_path / new)
    assert known() == {"a": before["walk"], "b.png": before["q.png"], "p.png": before["p.png"]}
    (tmp_path / "masks" / "a" / "1.png").rename(tmp_path / "masks" / "a" / "0.png")
    assert known()["a"] != before["walk"], "the mask is another frame's"
    (tmp_path / "masks" / "a" / "0.png").rename(tmp_path / "masks" / "a" / "1.png")
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "7.png")
    assert known()["a"] != before["walk"], "the frames have another order"


def test_large_files_are_fingerprinted_to_the_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "big"
    content = bytearray(np.random.default_rng(0).bytes(3 << 20))
    path.write_bytes(content)
    before = file_digest(path)
    content[-1] ^= 1
    path.write_bytes(content)
    assert file_digest(path) != before


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "readme.txt").touch()
    with pytest.raises(DataError, match=r"no video and no image in it"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"readme.txt: no video and no image"):
        open_source(tmp_path / "readme.txt")

    frames, masks = scene(0)
    save_images(tmp_path / "sizes" / "clip", np.zeros((2, 8, 8, 3), np.uint8))
    save_images(tmp_path / "sizes" / "clip", np.zeros((1, 8, 6, 3), np.uint8), ["2.png"])
    with pytest.raises(DataError, match=r"sizes/clip/2.png: frame is 6x8, but the video's first is 8x8"):
        open_source(tmp_path / "sizes").read("train", 0)

    save_images(tmp_path / "masked" / "clip", frames)
    save_images(tmp_path / "masked" / "masks" / "clip", masks[:2])
    (tmp_path / "masked" / "masks" / "clip").rename(tmp_path / "masked" / "masks" / "clap")
    with pytest.raises(DataError, match=r"masked/masks: no mask in it has the place and name of an image or a clip"):
        open_source(tmp_path / "masked")
    (tmp_path / "masked" / "masks" / "clap").rename(tmp_path / "masked" / "masks" / "clip")
    save_images(tmp_path / "masked" / "masks" / "clip", masks[:, :-1])
    with pytest.raises(DataError, match=r"masks/clip: 3 masks of 24x23 do not match 3 frames of 24x24"):
        open_source(tmp_path / "masked").read("train", 0)

    broken = tmp_path / "masked" / "clip" / "1.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"clip/1.png: image cannot be decoded"):
        open_source(tmp_path / "masked").read("train", 0)


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options"),
    [
        ("h264.mp4", "libx264", "yuv420p", {"bf": "3"}),
        ("h264.mkv", "libx264", "yuv420p", {}),
        ("mpeg4.avi", "mpeg4", "yuv420p", {"bf": "2"}),
        ("vp8.webm", "libvpx", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "10"}),
        ("vp9.webm", "libvpx-vp9", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "10"}),
        ("mjpeg.mov", "mjpeg", "yuvj420p", {}),
        ("anim.gif", "gif", "rgb8", {}),
    ],
)
def test_video_files(tmp_path: Path, name: str, codec: str, pixels: str, options: dict[str, str]) -> None:
    """Brightness rises by frame, so that a lost, doubled or swapped frame would show."""
    levels = np.arange(30, 230, 10)
    frames = np.broadcast_to(levels[:, None, None, None], (20, 48, 64, 3)).astype(np.uint8)
    save_movie(tmp_path / name, codec, frames, pixels, **options)
    source = open_source(tmp_path)
    assert list(source.lengths("train")) == [20]
    video = source.read("train", 0)
    assert video.id == name
    assert video.frames.shape == frames.shape
    # gif: 8 levels a channel
    np.testing.assert_allclose(video.frames.mean((1, 2, 3)), levels, atol=25 if codec == "gif" else 6)
    assert list(open_source(tmp_path / name).lengths("train")) == [20]


def test_video_file_with_masks_and_damaged_videos(tmp_path: Path) -> None:
    frames, masks = scene(0, frames=5)
    save_movie(tmp_path / "clip.mp4", "libx264", frames)
    save_images(tmp_path / "masks" / "clip", masks)
    video = open_source(tmp_path).read("train", 0)
    np.testing.assert_array_equal(video.segmentations, masks)
    shutil.rmtree(tmp_path / "masks")

    (tmp_path / "cut.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:600])
    source = open_source(tmp_path)
    with pytest.raises(DataError, match=r"cut.mp4: cannot be decoded .*ffmpeg"):
        source.lengths("train")
    with pytest.raises(DataError, match=r"cut.mp4: cannot be decoded"):
        source.read("train", 1)


def test_video_too_long_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_movie(tmp_path / "clip.mp4", "libx264", scene(0, frames=5)[0])
    monkeypatch.setattr("featcache.sources.video_file.MAX_BYTES", 5 * 24 * 24 * 3 - 1)
    with pytest.raises(DataError, match=r"clip.mp4: 5 frames of 24x24 .* cut it into clips"):
        open_source(tmp_path).read("train", 0)


# HDF5


def _hdf5(path: Path, **arrays: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name.replace("__", "/")] = values
    return path


VIDEOS = np.stack([scene(i)[0] for i in range(4)])  # (4, 3, 24, 24, 3)
NUMBERS = np.stack([scene(i)[1] for i in range(4)])  # (4, 3, 24, 24)
ONE_HOT = np.moveaxis(NUMBERS[..., None] == np.arange(3), -1, 2)  # (4, 3, 3, 24, 24)


@pytest.mark.parametrize(
    "masks",
    [NUMBERS, NUMBERS[..., None], NUMBERS.astype(np.float32), ONE_HOT, ONE_HOT[..., None].astype(np.uint8) * 255],
    ids=["numbers", "numbers+1", "float", "one-hot", "one-hot+1"],
)
def test_hdf5_mask_layouts(tmp_path: Path, masks: np.ndarray) -> None:
    source = open_source(_hdf5(tmp_path / "v.hdf5", video=VIDEOS, mask=masks))
    assert list(source.lengths("train")) == [3] * 4
    video = pickle.loads(pickle.dumps(source)).read("train", 3)
    np.testing.assert_array_equal(video.frames, VIDEOS[3])
    np.testing.assert_array_equal(video.segmentations, NUMBERS[3])
    assert video.instances[0].visibility == (36, 36, 36)

    images = open_source(_hdf5(tmp_path / "i.h5", image=VIDEOS[:, 1], mask=masks[:, 1]))
    assert list(images.lengths("train")) == [1] * 4
    np.testing.assert_array_equal(images.read("train", 2).frames, VIDEOS[2, 1:2])
    np.testing.assert_array_equal(images.read("train", 2).segmentations, NUMBERS[2, 1:2])


def test_hdf5_groups_and_fingerprint(tmp_path: Path) -> None:
    path = _hdf5(tmp_path / "v.h5", val__video=VIDEOS[:1], train__video=VIDEOS, train__mask=NUMBERS)
    source = Hdf5Source(path)
    assert source.splits() == ("train", "validation")
    assert source.read("validation", 0).segmentations is None
    assert source.fingerprint("train") != source.fingerprint("validation")
    before = source.fingerprint("train")
    with h5py.File(path, "a") as file:
        file["train/video"][0, 0, 0, 0, 0] ^= 1
    assert Hdf5Source(path).fingerprint("train") != before


@pytest.mark.parametrize("frames", [VIDEOS, VIDEOS[:, 0]], ids=["videos", "images"])
def test_hdf5_rows_have_fingerprints_of_their_own(tmp_path: Path, frames: np.ndarray) -> None:
    masks = NUMBERS[tuple(slice(None, n) for n in frames.shape[:-1])] if frames.ndim == 5 else NUMBERS[:, 0]
    before = Hdf5Source(_hdf5(tmp_path / "a.h5", video=frames, mask=masks)).fingerprints("train")
    assert len(set(before)) == 4
    moved = Hdf5Source(_hdf5(tmp_path / "b.h5", video=frames[[3, 0]], mask=masks[[3, 0]])).fingerprints("train")
    assert moved == (before[3], before[0])
    frames, masks = frames.copy(), masks.copy()
    frames[1][..., -1, :, :] = 0  # the last lines of pixels
    masks[2][..., -1, :] = 2
    after = Hdf5Source(_hdf5(tmp_path / "c.h5", video=frames, mask=masks)).fingerprints("train")
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, False, True]


def test_a_damaged_hdf5_row_leaves_the_others_their_fingerprints(tmp_path: Path) -> None:
    path = tmp_path / "v.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("video", data=VIDEOS, chunks=(1, *VIDEOS.shape[1:]), compression="gzip")
        at = file["video"].id.get_chunk_info(2).byte_offset
    before = Hdf5Source(path).fingerprints("train")
    data = bytearray(path.read_bytes())
    data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    after = Hdf5Source(path).fingerprints("train")
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, True, False, True]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"frames": VIDEOS}, "/ holds frames; name the frames video or image"),
        ({"video": VIDEOS.astype(np.float32)}, "/video is float32"),
        ({"video": np.moveaxis(VIDEOS, -1, 2)}, r"/video is uint8 \(4, 3, 3, 24, 24\); save it as"),
        ({"video": VIDEOS[:0]}, "/video is empty"),
        ({"video": VIDEOS, "mask": NUMBERS[:, :2]}, "/mask .* does not match /video"),
        ({"video": VIDEOS, "mask": NUMBERS[..., :-1]}, "/mask .* does not match /video"),
    ],
)
def test_hdf5_errors_on_opening(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    path = _hdf5(tmp_path / "bad.h5", **arrays)
    with pytest.raises(DataError, match=f"bad.h5: {message}"):
        open_source(path)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (NUMBERS.astype(np.int32) * 200, "masks hold 0..400"),
        (NUMBERS.astype(np.int32) - 1, "masks hold -1..1"),
        (NUMBERS / 2, "masks hold fractions"),
        (np.ones_like(ONE_HOT), "exactly one object a pixel"),
    ],
)
def test_hdf5_masks_that_would_lose_numbers(tmp_path: Path, masks: np.ndarray, message: str) -> None:
    source = open_source(_hdf5(tmp_path / "v.h5", video=VIDEOS, mask=masks))
    with pytest.raises(DataError, match=f"v.h5: /mask row 1: .*{message}"):
        source.read("train", 1)


def test_hdf5_truncated(tmp_path: Path) -> None:
    path = _hdf5(tmp_path / "v.h5", video=VIDEOS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"v.h5: .*truncated.*copy or write this file again"):
        open_source(path)
