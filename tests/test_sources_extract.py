"""What extraction does with what people have: by the command, on files made on the spot."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import ExifTags, Image

import cli
from featcache.store.reading import FeatureStore
from tests.media import oblong, save_images, save_movie
from tests.published import boxes, voc, write_list

RESNET = ("extract", "--backbone", "resnet18", "--weights", "random", "--tap", "layer1", "--input-size", "32")
QUICK = (*RESNET, "--batch-size", "2", "--precision", "float32", "--out", "s.zarr", "--json")


class Ended(NamedTuple):
    code: int
    out: Any  # the JSON object on stdout
    said: str  # what was logged and written to stderr


Run = Callable[..., Ended]


@pytest.fixture
def slotlab(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Run]:
    """A command, run in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def run(*args: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["slotlab", *map(str, args)])
        capsys.readouterr()
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        said = err + "\n".join(record.getMessage() for record in caplog.records)
        assert "Traceback" not in said
        return Ended(int(ended.value.code or 0), json.loads(out) if out else None, said)

    yield run
    signal.signal(signal.SIGTERM, before)


def test_remarks_are_made_before_anything_is_computed(slotlab: Run) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Path("photos").mkdir()
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save("photos/a.jpg", exif=exif)
    save_images(Path("photos/masks"), np.ones((1, 8, 12), np.uint8), ["a.png"])
    for more in (("--dry-run",), ()):
        ended = slotlab(*QUICK, "--data", "photos", *more)
        assert ended.code == 0 and "EXIF orientation 1, but 3 in photos/a.jpg" in ended.said
        assert more == () or len(ended.out["remarks"]) == 1


def test_damaged_videos_are_refused_or_left_out_and_listed(slotlab: Run) -> None:
    Path("clips").mkdir()
    for name in "abc":
        save_movie(Path(f"clips/{name}.mp4"), "libx264", oblong(5))
    broken = Path("clips/b.mp4")
    broken.write_bytes(broken.read_bytes()[:-300])
    refused = slotlab(*QUICK, "--data", "clips")
    assert refused.code == 3 and "clips/b.mp4" in refused.said and "--skip-damaged" in refused.said
    assert not Path("s.zarr").exists()
    for more in (("--dry-run",), ()):
        ended = slotlab(*QUICK, "--data", "clips", "--skip-damaged", *more)
        assert ended.code == 0
        (line,) = ended.out["damaged"]
        assert line.startswith("clips/b.mp4: ")
    assert ended.out["splits"] == {"train": 10}


@pytest.mark.slow
def test_mixed_sizes_are_found_before_anything_is_computed(slotlab: Run) -> None:
    Path("clips").mkdir()
    for name, frames in (("a", oblong(2)), ("b", oblong(2)), ("z", oblong(2, 64, 48))):
        save_movie(Path(f"clips/{name}.mp4"), "libx264", frames)
    for more in (("--dry-run",), ()):
        ended = slotlab(*QUICK, "--data", "clips", *more)
        assert ended.code == 3 and not Path("s.zarr").exists()
        assert "most frames of train are 64x48, others 48x64 (1, as clips/z.mp4)" in ended.said
        assert "with --frame-size 48, squeezed, or also with --fit crop" in ended.said
    assert slotlab(*QUICK, "--data", "clips", "--frame-size", 48).code == 0  # the remedy works, and in the same place
    assert FeatureStore.open(Path("s.zarr"))["train"].spec.frame_size == (48, 48)
    ended = slotlab(*QUICK[:-2], "c.zarr", "--json", "--data", "clips", "--frame-size", 48, "--fit", "crop")
    assert ended.code == 0 and FeatureStore.open(Path("c.zarr")).spec.preprocessing["fit"] == "crop"


def test_mixed_sizes_within_a_video_and_of_masks(slotlab: Run) -> None:
    save_images(Path("walk/walk"), oblong(2))
    save_images(Path("walk/walk"), oblong(1, 40, 64), ["2.png"])
    ended = slotlab(*QUICK, "--data", "walk", "--dry-run", "--frames-as", "video")
    assert ended.code == 3 and "walk/walk/2.png: frame is 64x40, but the video's first is 64x48" in ended.said
    Path("walk/walk/2.png").unlink()
    save_images(Path("walk/masks/walk"), np.zeros((2, 40, 64), np.uint8))
    ended = slotlab(*QUICK, "--data", "walk", "--frame-size", 16, "--dry-run")
    assert ended.code == 3 and "walk/masks/walk: 2 masks of 64x40 do not match 2 frames of 64x48" in ended.said
    assert not Path("s.zarr").exists()


def test_oblong_inputs_by_the_command(slotlab: Run) -> None:
    save_images(Path("walk/walk"), oblong(2))
    ended = slotlab(*QUICK, "--data", "walk", "--input-size", "32x64", "--frame-size", "16x32")
    assert ended.code == 0
    store = FeatureStore.open(Path("s.zarr"))
    assert store.spec.taps["layer1"].grid == (8, 16) and store["train"].spec.frame_size == (16, 32)
    for option in ("--input-size", "--frame-size"):
        ended = slotlab(*QUICK, "--data", "walk", option, "32*64")
        assert ended.code == 2 and f"{option} 32*64: give N, or ROWSxCOLUMNS such as 224x392" in ended.said


def test_numbered_images_are_asked_about_once(slotlab: Run) -> None:
    save_images(Path("frames"), oblong(5))
    ended = slotlab(*QUICK, "--data", "frames")
    assert ended.code == 2 and "5 images numbered from 0.png to 4.png: pass --frames-as video" in ended.said
    assert not Path("s.zarr").exists()
    assert slotlab(*QUICK, "--data", "frames", "--frames-as", "video").out["splits"] == {"train": 5}
    assert FeatureStore.open(Path("s.zarr"))["train"].spec.lengths == (5,)
    images = (*QUICK[:-2], "i.zarr", "--json", "--data", "frames")
    assert slotlab(*images, "--frames-as", "images").code == 0
    assert slotlab(*images).code == 0  # the store has the answer
    assert FeatureStore.open(Path("i.zarr"))["train"].spec.lengths == (1,) * 5


def test_folders_of_classes_are_asked_about_once(slotlab: Run) -> None:
    for k, name in enumerate(("cat", "dog")):
        save_images(Path("photos/train", name), oblong(2) + k, ["n1_9.jpg", "n1_7.jpg"])
        save_images(Path("photos/train", name), oblong(1, 40, 64), ["n1_8.jpg"])
    ended = slotlab(*QUICK, "--data", "photos", "--dry-run")
    assert ended.code == 2 and "photos/train/cat: 3 images that do not look like the frames of one video" in ended.said
    words = (*QUICK, "--data", "photos", "--frame-size", 32)
    assert slotlab(*words, "--frames-as", "images").out["splits"] == {"train": 6}
    ended = slotlab(*words, "--frames-as", "images")
    assert ended.code == 0 and FeatureStore.open(Path("s.zarr"))["train"].spec.lengths == (1,) * 6
    ended = slotlab(*words, "--out", "v.zarr", "--frames-as", "video")
    assert ended.code == 3 and "n1_8.jpg: frame is 64x40, but the video's first is 64x48" in ended.said


def test_folders_of_frames_are_told(slotlab: Run) -> None:
    for name in ("run", "walk"):
        save_images(Path("clips", name), oblong(3))
    line = "clips/run: 2 folders of images are read as a video each (3 frames here)"
    ended = slotlab(*QUICK, "--data", "clips", "--dry-run")
    assert ended.code == 0 and line in ended.said and any(line in remark for remark in ended.out["remarks"])
    assert line not in slotlab(*QUICK, "--data", "clips", "--dry-run", "--frames-as", "video").said


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("how", ["changed", "added"])
def test_the_remedy_for_a_video_of_another_size_works_in_a_store_that_is_there(
    slotlab: Run, fit: str, how: str
) -> None:
    for name in "abc":
        save_images(Path("clips", name), oblong(2))
    words = (*QUICK, "--data", "clips", "--fit", fit)
    assert slotlab(*words).code == 0
    before = FeatureStore.open(Path("s.zarr"))["train"]
    kept = {k: before.video(k) for k in (0, 2)}
    new = "b" if how == "changed" else "d"
    save_images(Path("clips", new), oblong(2, 40, 60) + 9)
    ended = slotlab(*words, "--grow")
    assert ended.code == 3
    (line,) = [line for line in ended.said.splitlines() if "its frames are" in line]
    assert f"clips/{new}: its frames are" in line
    remedy = line[line.index("--frame-size") :].split(",")[0].split()
    ended = slotlab(*words, "--grow", *remedy)
    assert ended.code == 0, ended.said
    after = FeatureStore.open(Path("s.zarr"))["train"]
    assert after.complete and after.spec.frame_size == before.spec.frame_size
    assert all(np.array_equal(after.video(k), video) for k, video in kept.items())
    frame = (oblong(2, 40, 60) + 9)[0]
    frame = frame[:, 10:50] if fit == "crop" else frame
    wide = Image.fromarray(frame).resize(before.spec.frame_size[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(after.video(1 if how == "changed" else 3)[0], np.asarray(wide))


def test_what_is_left_out_is_said(slotlab: Run) -> None:
    save_images(Path("photos"), oblong(1), ["a.png"])
    for name in ("b.heic", "c.txt", "d.txt"):
        Path("photos", name).write_text("no picture")
    for more in (("--dry-run",), ()):
        ended = slotlab(*QUICK, "--data", "photos", *more)
        assert ended.code == 0 and ended.out["left_out"] == {".heic": 1, ".txt": 2}
        assert (
            "photos: left out files of kinds that are not read here: 1 .heic, 2 .txt; for HEIF: pip install"
            in ended.said
        )


@pytest.mark.slow
def test_a_published_data_set(slotlab: Run) -> None:
    lists = {"train": ["a", "b"], "val": ["c"]}
    voc(Path("VOCdevkit"), lists)
    write_list(Path("VOCdevkit/VOC2012/ImageSets/Segmentation/trainval.txt"), ["a", "b", "c"])
    ended = slotlab(*QUICK, "--data", "VOCdevkit")
    assert ended.code == 0 and ended.out["splits"] == {"train": 2, "val": 1}, "trainval repeats both"
    store = FeatureStore.open(Path("s.zarr"))
    assert [instance.category for instance in store["val"].instances(0)] == ["dog", "person"]
    void = (boxes((1, 1, 11, 13)) > 0) & (boxes((2, 2, 10, 12), (12, 6, 22, 30)) == 0)
    np.testing.assert_array_equal(store["val"].ignored(0)[0], void)
    assert slotlab(*QUICK, "--data", "VOCdevkit", "--split", "trainval").out["splits"]["trainval"] == 3
    ended = slotlab(*QUICK, "--data", "VOCdevkit?year=2011")
    assert ended.code == 2 and "no year '2011'; there is: 2012" in ended.said
    Path("VOCdevkit/VOC2012/JPEGImages/c.jpg").unlink()
    ended = slotlab(*QUICK, "--data", "VOCdevkit", "--split", "val")
    assert ended.code == 3 and "c.jpg: no such file, but val names it" in ended.said
