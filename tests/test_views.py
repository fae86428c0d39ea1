"""Views of pictures: crops that show what the frame shows, with its truth, the same whenever they are read."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import cli
from featcache.errors import DataError, UsageError
from featcache.sources import Reading, open_source
from featcache.sources.damaged import SoundVideos
from featcache.sources.masks import visibility
from featcache.sources.views import LEAST, MOST, STRETCH, WHOLE, Crop
from featcache.store.reading import FeatureStore
from slotlab.training.train import train
from tests.training import small

HEIGHT, WIDTH, VIEWS = 48, 64, 7
GREY = 20  # a step of it for each number in a mask


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three training photographs and one to score, whose grey says what their masks say; 255 is void."""
    root = tmp_path / "photos"
    for split, names in {"train": ("a", "b", "c"), "validation": ("d",)}.items():
        (root / split / "masks").mkdir(parents=True)
        for number, name in enumerate(names):
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            mask[8:30, 10 + number : 40] = 1
            mask[20:44, 44:60] = 2
            Image.fromarray((GREY * mask)[..., None].repeat(3, -1)).save(root / split / f"{name}.png")
            mask[:4] = 255
            Image.fromarray(mask).save(root / split / "masks" / f"{name}.png")
    return root


def test_views_are_the_frame_whole_and_crops_of_it_with_their_truth(photos: Path) -> None:
    plain, source = (open_source(f"{photos}{option}", Reading.of(ignore_label="255")) for option in ("", "?views=7"))
    assert source.lengths("train") == (VIEWS,) * 3 and source.names("train") == plain.names("train")
    whole, video = plain.read("train", 1), source.read("train", 1)
    assert whole.segmentations is not None and video.segmentations is not None and video.ignore is not None
    np.testing.assert_array_equal(video.frames[0], whole.frames[0])
    np.testing.assert_array_equal(video.segmentations[0], whole.segmentations[0])
    np.testing.assert_array_equal(video.ignore[0], whole.ignored[0])
    assert video.ignored.any() and not video.ignored.all()
    counts = visibility(video.segmentations, len(video.instances))
    np.testing.assert_array_equal([each.visibility for each in video.instances], counts)
    assert len({frame.tobytes() for frame in video.frames}) == VIEWS
    known = ~video.ignored
    grey = video.frames[..., 0].astype(int)[known]
    close = np.abs(grey - GREY * video.segmentations[known].astype(int)) < GREY / 2
    assert close.mean() > 0.95, "a crop's mask is of the pixels that it shows, but for edges that bicubic blurs"


def test_other_splits_are_as_they_are(photos: Path) -> None:
    plain, source = (open_source(f"{photos}{option}") for option in ("", "?views=7"))
    assert source.lengths("validation") == (1,)
    assert source.fingerprint("validation") == plain.fingerprint("validation")
    assert source.fingerprints("validation") == plain.fingerprints("validation")
    np.testing.assert_array_equal(source.read("validation", 0).frames, plain.read("validation", 0).frames)


def test_views_are_the_same_in_any_process_and_order_and_known_by_their_number(photos: Path) -> None:
    first = open_source(f"{photos}?views=7")
    again = pickle.loads(pickle.dumps(open_source(f"{photos}?views=7")))
    backwards = [again.read("train", index).frames for index in (2, 1, 0)][::-1]
    for index, frames in enumerate(backwards):
        np.testing.assert_array_equal(first.read("train", index).frames, frames)
        np.testing.assert_array_equal(SoundVideos(first).read("train", index).frames, frames)
    kinds = [open_source(f"{photos}{option}") for option in ("", "?views=6", "?views=7")]
    assert len({source.fingerprint("train") for source in kinds}) == 3
    assert len({source.fingerprints("train") for source in kinds}) == 3
    assert kinds[1].read("train", 0).frames[3].tobytes() != kinds[1].read("train", 1).frames[3].tobytes()
    assert isinstance(open_source(f"{photos}?views=1"), type(kinds[0])), "one view is the frame itself"


def test_frames_of_a_video_are_seen_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "walk").mkdir()
    for number in range(3):
        Image.new("RGB", (WIDTH, HEIGHT), (60 * number,) * 3).save(tmp_path / "walk" / f"{number}.png")
    video = open_source(f"{tmp_path}?views=2", Reading(frames_as="video")).read("train", 0)
    assert video.frames[:, 5, 5, 0].tolist() == [0, 0, 60, 60, 120, 120]


@given(st.integers(0, 2**32 - 1))
def test_a_crop_lies_in_the_frame_and_is_as_large_as_it_says(seed: int) -> None:
    crop = Crop.drawn(np.random.default_rng(seed))
    assert 0 <= crop.top < crop.bottom <= 1 and 0 <= crop.left < crop.right <= 1
    height, width = crop.bottom - crop.top, crop.right - crop.left
    cut = height == 1 or width == 1  # a long one is cut off at the frame's end
    assert height * width <= MOST + 1e-9 and (cut or height * width >= LEAST - 1e-9)
    assert abs(np.log(width / height)) <= STRETCH + 1e-9


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40))
def test_a_crop_s_masks_are_pillow_s_nearest_pixels(seed: int, height: int, width: int) -> None:
    crop = Crop.drawn(np.random.default_rng(seed))
    numbers = np.arange(height * width).reshape(height, width).astype(np.int32)
    box = (crop.left * width, crop.top * height, crop.right * width, crop.bottom * height)
    theirs = np.asarray(Image.fromarray(numbers).resize((width, height), Image.Resampling.NEAREST, box=box))
    np.testing.assert_array_equal(numbers[crop.places((height, width))], theirs[:, ::-1] if crop.mirrored else theirs)
    np.testing.assert_array_equal(numbers[WHOLE.places((height, width))], numbers)


def test_what_cannot_have_views_is_refused(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.sources.images.MAX_BYTES", VIEWS * 3 * HEIGHT * WIDTH)
    open_source(f"{photos}?views={VIEWS}").read("train", 0)
    with pytest.raises(DataError, match=r"a.png: 8 views of its 1 frames are over .* have fewer"):
        open_source(f"{photos}?views={VIEWS + 1}").read("train", 0)
    with pytest.raises(UsageError, match=r"views=0: give a number of at least 1"):
        open_source(f"{photos}?views=0")
    with pytest.raises(UsageError, match=r"no option 'view' .*; known: views"):
        open_source(f"{photos}?view=3")
    (photos / "train").rename(photos.parent / "gone")
    with pytest.raises(UsageError, match=r"views are of the split train, and there is none, but validation; leave"):
        open_source(f"{photos}?views=3")


def test_a_store_of_views_trains_and_is_made_alike_by_workers(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["extract", "--backbone", "resnet18", "--weights", "random", "--tap", "layer1", "--input-size", "32"]
    command += ["--batch-size", "2", "--precision", "float32", "--ignore-label", "255", "--json"]

    def run(*args: str) -> int:
        monkeypatch.setattr(sys, "argv", ["slotlab", *command, *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    stores = [tmp_path / "one.zarr", tmp_path / "workers.zarr"]
    assert run("--data", f"{photos}?views=7", "--out", str(stores[0])) == 0
    assert json.loads(capsys.readouterr().out)["splits"] == {"train": 3 * VIEWS, "validation": 1}
    assert run("--data", f"{photos}?views=7", "--out", str(stores[1]), "--workers", "1") == 0
    one, other = (FeatureStore.open(path)["train"] for path in stores)
    for video in range(3):
        np.testing.assert_array_equal(one.tokens("layer1", video), other.tokens("layer1", video))
        np.testing.assert_array_equal(one.segmentations(video), other.segmentations(video))
    assert run("--data", f"{photos}?views=5", "--out", str(stores[0])) == 4, "other views are other features"
    assert run("--data", f"{photos}?views=7", "--out", str(tmp_path / "s.zarr"), "--frame-stride", "2") == 2
    assert "7 views of a frame, which follow each other" in capsys.readouterr().err
    run_folder = train(small("data.normalize=whiten=4", preset="objects"), one.store, tmp_path / "run")
    assert (run_folder / "metrics.jsonl").stat().st_size
