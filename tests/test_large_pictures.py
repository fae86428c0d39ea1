"""Large pictures: decoded no larger than is needed, to the same values; refused where they would have to be stored."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from featcache.backbones import backbone as backbones
from featcache.backbones.backbone import Backbone, load_backbone
from featcache.errors import DataError
from featcache.extraction import plan as planning
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.sources import images, open_source, video_file
from featcache.sources.damaged import SoundVideos
from featcache.store.reading import FeatureStore
from featcache.words import Fit
from slotlab.pictures import frames as pictures
from slotlab.pictures.frames import read_path
from tests import published
from tests.commands import Slotlab
from tests.media import save_movie

HEIGHT, WIDTH = 600, 800


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("resnet18", weights="random", taps=("layer1",), input_size=32)


@pytest.fixture
def photo() -> Image.Image:
    """Smooth, as photographs are at that size."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def save(folder: Path, photo: Image.Image, name: str, turned: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    photo.save(folder / name, exif=exif, **({"quality": 95} if name.endswith("jpg") else {}))
    return folder / name


def make(folder: Path, out: Path, backbone: Backbone, options: ExtractOptions) -> FeatureStore:
    source = open_source(folder)
    return extract(plan(out, source, backbone, options), source, backbone)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of the pictures that were decoded."""
    sizes: list[tuple[int, ...]] = []
    real = images.as_rgb

    def spy(*args: Any, **how: Any) -> Any:
        found = real(*args, **how)
        sizes.append(found.shape[:2])
        return found

    monkeypatch.setattr(images, "as_rgb", spy)
    return sizes


@pytest.mark.parametrize(
    ("name", "turned", "fit"),
    [("a.jpg", 1, "squash"), ("a.jpg", 6, "crop"), ("a.jpg", 1, "pad"), ("a.png", 1, "crop"), ("a.tif", 1, "squash")],
)
def test_what_is_decoded_smaller_is_stored_the_same(
    tmp_path: Path,
    backbone: Backbone,
    photo: Image.Image,
    decoded: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    turned: int,
    fit: Fit,
) -> None:
    save(tmp_path / "photos", photo, name, turned)
    mask = np.zeros((HEIGHT, WIDTH) if turned == 1 else (WIDTH, HEIGHT), np.uint8)
    mask[50:350, 150:450] = 1
    (tmp_path / "photos" / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "photos/masks/a.png")
    options = ExtractOptions(frame_size=48, fit=fit, precision="float32")
    plain = make(tmp_path / "photos", tmp_path / "plain.zarr", backbone, options)["train"]
    assert max(decoded[-1]) == WIDTH
    monkeypatch.setattr(images, "LARGE", 1000)
    small = make(tmp_path / "photos", tmp_path / "small.zarr", backbone, options)["train"]
    assert 2 * 48 <= max(decoded[-1]) <= WIDTH // 4
    assert small.spec.frame_size == plain.spec.frame_size == (48, 48)
    shown = plain.video(0)[0].astype(float)
    slopes = sum(np.abs(np.diff(shown, axis=axis)).mean() for axis in (0, 1))
    shift = 0.0 if fit == "squash" else 0.25  # pixels: what is cut ends between two of a picture decoded smaller
    assert np.abs(small.video(0)[0] - shown).mean() < 1 + shift * slopes
    assert (small.segmentations(0) != plain.segmentations(0)).mean() < 0.01
    assert small.instances(0)[0].visibility == ((small.segmentations(0) == 1).sum(),)
    lost = (small.tokens("layer1", 0).float() - plain.tokens("layer1", 0).float()).norm()
    assert lost / plain.tokens("layer1", 0).float().norm() < 0.02 + shift / 4


def test_without_a_size_it_is_decoded_whole(
    tmp_path: Path, backbone: Backbone, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "photos", photo, "a.jpg")
    monkeypatch.setattr(images, "LARGE", 1000)
    store = make(tmp_path / "photos", tmp_path / "s.zarr", backbone, ExtractOptions())["train"]
    np.testing.assert_array_equal(store.video(0)[0], np.asarray(Image.open(tmp_path / "photos/a.jpg")))


def test_a_source_without_its_damaged_videos_decodes_smaller_too(
    tmp_path: Path, photo: Image.Image, decoded: list[tuple[int, ...]]
) -> None:
    save(tmp_path, photo, "b.jpg")
    (tmp_path / "a.jpg").write_bytes(b"none")
    video = SoundVideos(open_source(tmp_path)).read_smaller("train", 0, 8.0)
    assert video.id == "b.jpg" and video.frames.shape[1:3] == decoded[-1] == (75, 100)


def test_a_video_holds_no_more_than_its_smaller_frames(
    tmp_path: Path, photo: Image.Image, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its frames alone are small, and all of them are over the limit."""
    moving = np.stack([np.roll(np.asarray(photo), 40 * t, axis=1) for t in range(3)])
    (tmp_path / "clips").mkdir()
    clip = save_movie(tmp_path / "clips" / "a.mp4", "libx264", moving, crf="1")
    options = ExtractOptions(frame_size=(48, 64), precision="float32")
    plain = make(clip.parent, tmp_path / "plain.zarr", backbone, options)["train"].video(0).astype(float)
    for module in (images, video_file):
        monkeypatch.setattr(module, "MAX_BYTES", moving.nbytes // 2)
    for source in (open_source(clip.parent), SoundVideos(open_source(clip.parent))):
        assert source.lengths("train") == (3,), "too large is not damaged"
        with pytest.raises(DataError, match=r"a.mp4: 3 frames of 800x600 are over .* \(--frame-size 512\)"):
            source.read("train", 0)
    small = make(clip.parent, tmp_path / "small.zarr", backbone, options)["train"].video(0)
    assert np.abs(small - plain).mean() < 1
    np.testing.assert_array_equal(read_path(clip, 48).shape, (3, 48, 64, 3))
    assert np.abs(read_path(clip, 48) - plain).mean() < 1


def test_decoded_frames_do_not_pile_up(tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV's frames refer to themselves, and large ones would fill the memory before a collection comes by itself."""
    frame = np.asarray(photo.resize((64, 48)))
    clip = save_movie(tmp_path / "a.mp4", "libx264", np.tile(frame, (12, 1, 1, 1)))

    def left() -> int:
        monkeypatch.undo()
        gc.collect()
        gc.disable()
        try:
            monkeypatch.setattr(video_file, "UNFREED", limit)
            video_file.read_frames(clip, 8.0)
            return sum(isinstance(each, av.VideoFrame) for each in gc.get_objects())
        finally:
            gc.enable()

    limit = 1 << 30
    assert left() == 12, "else there is nothing to collect, and read_frames need not"
    limit = 2 * frame.nbytes
    assert left() <= 4


def test_pages_are_decoded_smaller(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "a.tif", save_all=True, append_images=[photo.rotate(180)])
    frames = open_source(tmp_path / "a.tif").read_smaller("train", 0, 4.0).frames
    assert frames.shape == (2, 150, 200, 3)
    np.testing.assert_allclose(frames[1].astype(float), frames[0, ::-1, ::-1], atol=1)


@pytest.mark.parametrize("layout", ["voc", "davis", "coco"])
def test_listed_pictures_are_decoded_smaller_too(
    tmp_path: Path, photo: Image.Image, decoded: list[tuple[int, ...]], layout: str
) -> None:
    """Frames, masks, void and tables of objects, against those of the whole picture."""
    size = (HEIGHT, WIDTH)
    if layout == "voc":
        root = published.voc(tmp_path / "VOC", {"train": ["a"]})
        picture = root / "VOC2012/JPEGImages/a.jpg"
        numbers = published.boxes((40, 40, 200, 240), (240, 120, 440, 600), size=size)
        numbers[:, -8:] = 255
        for name in ("SegmentationObject", "SegmentationClass"):
            published.save_palette(root / "VOC2012" / name / "a.png", numbers)
    elif layout == "davis":
        root = published.davis_2016(tmp_path / "DAVIS", {"train": {"a": 1}})
        picture = root / "JPEGImages/480p/a/00000.jpg"
        numbers = published.boxes((40, 40, 200, 240), size=size)
        published.save_grey(root / "Annotations/480p/a/00000.png", 255 * numbers)
    else:
        pytest.importorskip("pycocotools")
        numbers = published.boxes((40, 40, 200, 240), (240, 120, 440, 600), size=size)
        objects = [published.annotation(k, 1, published.runs(numbers == k), category=18, crowd=False) for k in (1, 2)]
        root = tmp_path / "coco"
        published.coco(root, "train", [published.coco_image(1, size)], objects)
        picture = root / "train2017/000000000001.jpg"
    photo.save(picture, quality=95)
    source = open_source(root)
    whole, small = source.read("train", 0), source.read_smaller("train", 0, 4.0)
    assert whole.frames.shape == (1, HEIGHT, WIDTH, 3) and small.frames.shape == (1, HEIGHT // 4, WIDTH // 4, 3)
    assert (HEIGHT // 4, WIDTH // 4) in decoded, "by the decoder"
    theirs = np.asarray(Image.open(picture).resize((WIDTH // 4, HEIGHT // 4), Image.Resampling.BOX), float)
    assert np.abs(small.frames[0] - theirs).mean() < 1
    wanted = np.asarray(Image.fromarray(numbers).resize((WIDTH // 4, HEIGHT // 4), Image.Resampling.NEAREST))
    assert small.segmentations is not None and whole.segmentations is not None
    np.testing.assert_array_equal(small.segmentations[0], np.where(wanted == 255, 0, wanted))
    np.testing.assert_array_equal(small.ignored[0], wanted == 255)
    np.testing.assert_array_equal(whole.segmentations[0], np.where(numbers == 255, 0, numbers))
    for of, video in enumerate(small.instances, start=1):
        assert video.visibility == (int((wanted == of).sum()),)
    assert [each.category for each in small.instances] == [each.category for each in whole.instances]


def test_too_large_to_store_says_how_it_is_scaled_down_and_that_works(
    tmp_path: Path, photo: Image.Image, slotlab: Slotlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MOST_PIXELS", 10**5)
    save(tmp_path / "photos", photo, "a.jpg")
    backbone = ("--backbone", "resnet18", "--weights", "random", "--tap", "layer1", "--input-size", 32)
    words = ("extract", *backbone, "--data", "photos", "--out", "s.zarr")
    refused = slotlab(*words)
    (line,) = refused.said.splitlines()
    assert refused.code == 3
    assert "photos/a.jpg: 800x600 are over 0 million pixels, too many to store as they are" in line
    remedy = line[line.index("--frame-size") :].split()
    assert remedy == ["--frame-size", "512"] and slotlab(*words, *remedy).code == 0
    assert FeatureStore.open("s.zarr")["train"].spec.frame_size == (512, 512)


def test_a_bomb_is_one_line(
    tmp_path: Path, photo: Image.Image, slotlab: Slotlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "photos", photo, "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**5)
    refused = slotlab("extract", "--backbone", "resnet18", "--weights", "random", "--data", "photos", "--out", "s.zarr")
    (line,) = refused.said.splitlines()
    what = "which Pillow takes for a bomb; scale it down first"
    assert refused.code == 3 and "a.png" in line and what in line
    for path in (tmp_path / "photos", tmp_path / "photos/a.png"):
        with pytest.raises(DataError, match=f"a.png: .* {what}"):
            read_path(path)


def test_pillow_warns_of_no_picture_that_is_read(tmp_path: Path) -> None:
    Image.new("L", (10_000, 9_000)).save(tmp_path / "a.png", compress_level=1)  # where Pillow begins to warn
    code = f"from featcache.sources import open_source; print(open_source({str(tmp_path)!r}).size('train', 0))"
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert read.stdout.strip() == "(9000, 10000)" and not read.stderr


def test_pictures_to_segment(tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, photo, "a.jpg")
    whole = read_path(tmp_path / "a.jpg")
    assert whole.shape == (1, HEIGHT, WIDTH, 3)
    plain = read_path(tmp_path / "a.jpg", 90)
    monkeypatch.setattr(images, "LARGE", 1000)
    small = read_path(tmp_path, 90)
    assert plain.shape == small.shape == (1, 90, 120, 3)
    assert np.abs(plain.astype(float) - small).mean() < 1
    np.testing.assert_array_equal(read_path(tmp_path / "a.jpg", HEIGHT + 1), whole)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 10**5)
    for path in (tmp_path, tmp_path / "a.jpg"):
        with pytest.raises(DataError, match=r"a.jpg: 800x600 are over 0 million pixels; .* --frame-size 1024"):
            read_path(path)
        assert read_path(path, 300).shape == (1, 300, 400, 3)


def test_frames_are_prepared_a_few_at_a_time_to_the_same_bits(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 60, 80, 3), dtype=np.uint8))
    whole = backbone.preprocess(frames)
    monkeypatch.setattr(backbones, "PIXELS_AT_ONCE", 2 * 60 * 80)
    assert torch.equal(backbone.preprocess(frames), whole)


def test_what_int8_loses_is_told(tmp_path: Path, photo: Image.Image, slotlab: Slotlab) -> None:
    """Against the tokens of a float32 pass, rounded here."""
    for index in range(3):
        save(tmp_path / "photos", photo.rotate(20 * index).resize((64, 64)), f"{index}.png")
    words = ("extract", "--backbone", "resnet18", "--weights", "random", "--tap", "layer1", "--input-size", 32)
    words = (*words, "--data", "photos", "--dtype", "int8", "--precision", "float32")
    (told,) = json.loads(slotlab(*words, "--out", "a.zarr", "--json").out)["rounding"]
    model = load_backbone("resnet18", weights="random", taps=("layer1",), input_size=32)
    frames = np.stack([open_source("photos").read("train", index).frames[0] for index in range(3)])
    x = model(model.preprocess(torch.from_numpy(frames)))["layer1"].flatten(0, 1)
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()
    lost = ((x / scale).round().clamp(-127, 127) * scale - x).norm(dim=-1) / x.norm(dim=-1)
    assert told["frames"] == 3 and told["tap"] == "layer1"
    assert told["median"] == pytest.approx(float(lost.median()), rel=0.05)
    assert told["p99"] == pytest.approx(float(lost.quantile(0.99)), rel=0.05)
    said = slotlab(*words, "--out", "b.zarr").out
    assert f"int8 at layer1: relative error of a token {told['median']:.1%} (median)" in said
    assert not json.loads(slotlab(*words, "--out", "b.zarr", "--json").out)["rounding"]  # nothing is left to do


HOLDER = """
import h5py, sys, time
with h5py.File(sys.argv[1], "a") as file:
    print("open", flush=True)
    time.sleep(60)
"""


def test_an_hdf5_file_that_another_program_writes(tmp_path: Path) -> None:
    import h5py

    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["image"] = np.zeros((2, 8, 8, 3), np.uint8)
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"open\n"
            with pytest.raises(DataError, match=r"a.h5: another program has it open for writing; close it there, or"):
                open_source(path)
            code = f"from featcache.sources import open_source; print(open_source({str(path)!r}).videos('train'))"
            how = {"env": {"PYTHONPATH": ":".join(sys.path), "HDF5_USE_FILE_LOCKING": "FALSE"}, "text": True}
            read = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, **how)
            assert read.stdout == "2\n", read.stderr
        finally:
            holder.kill()
    for _ in range(50):
        time.sleep(0.02)
        if open_source(path).videos("train") == 2:
            break
