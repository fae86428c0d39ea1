"""Masks as files: run lengths as COCO has them, palette PNGs, overlays that other programs open."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cli import app
from featcache.errors import DataError
from featcache.sources.video import Video
from featcache.store.reading import FeatureStore
from slotlab.config.load import load_config
from slotlab.masks.labels import masks_to_labels
from slotlab.pictures import palette
from slotlab.pictures.coco import decode, encode
from slotlab.pictures.files import Masked, MaskWriter, overlay, store_masks
from slotlab.runs.loaded import load_run
from slotlab.training.train import train
from tests.synthetic import SIZE, DiscSource, make_store

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 60))


def test_a_slot_has_its_objects_colour_and_the_others_are_muted() -> None:
    objects = np.array([palette.rgb(colour) for colour in palette.OBJECTS])
    found = palette.slot_colours(30, {4: 0, 1: 2, 29: len(objects)})
    assert np.array_equal(found[[4, 1, 29]], objects[[0, 2, 0]])  # the eleven colours of objects begin again
    muted = {palette.rgb(colour) for colour in palette.OTHERS}
    assert {tuple(colour) for n, colour in enumerate(found.tolist()) if n not in (4, 1, 29)} == muted
    alone = palette.slot_colours(45)
    assert np.array_equal(alone[: len(objects)], objects) and len(np.unique(alone[:20], axis=0)) == 20
    assert np.array_equal(alone[20:40], alone[:20]) and len(palette.slot_colours(0)) == 0


@given(shape=SHAPES, seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]))
@settings(max_examples=60, deadline=None)
def test_run_lengths_give_the_mask_back(shape: tuple[int, int], seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random(shape) < share
    assert np.array_equal(decode(encode(mask)), mask)


def test_run_lengths_are_those_of_coco() -> None:
    reference = pytest.importorskip("pycocotools.mask")
    random = np.random.default_rng(0)
    masks = [random.random((37, 53)) < share for share in (0.0, 0.02, 0.5, 0.98, 1.0)]
    blob = np.zeros((300, 400), bool)
    blob[40:290, 30:333] = True  # runs long enough for three characters, and equal ones, whose differences are 0
    for mask in [*masks, blob]:
        ours = encode(mask)
        theirs = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert ours["counts"] == theirs["counts"].decode() and ours["size"] == list(theirs["size"])
        assert np.array_equal(reference.decode(ours).astype(bool), mask)


def test_a_known_run_length_text() -> None:
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True  # columns: 5 off, 2 on, 2 off, 2 on, 5 off
    assert encode(mask) == {"size": [4, 4], "counts": "52203"}


def test_run_lengths_that_do_not_fill_the_mask_are_refused() -> None:
    with pytest.raises(DataError, match="run lengths of 16 pixels in a mask of 4x5"):
        decode({"size": [4, 5], "counts": "52203"})


class Unlabelled(DiscSource):
    """The same videos without ground truth."""

    masks = False

    def read(self, split: str, index: int) -> Video:
        video = super().read(split, index)
        return Video(video.id, video.frames)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    store: FeatureStore = make_store(folder / "store.zarr")
    small = ("model.slot_dim=8", "model.decoder.hidden=16", "model.slot_mlp_hidden=16", "model.slots=4")
    config = load_config("dinosaur", None, small, optim__steps=2, optim__batch_size=4)
    return train(config, store, folder / "run")


def test_pngs_hold_the_labels_that_are_scored(run: Path, tmp_path: Path) -> None:
    app(["masks", str(run), "--out", str(tmp_path), "--device", "cpu"], standalone_mode=False)
    loaded = load_run(run)
    split = loaded.store["validation"]
    for video in split.videos:
        masks = loaded.segment(split, video).masks_on_grid
        expected = masks_to_labels(masks, (SIZE, SIZE)).numpy()
        folder = tmp_path / f"{video:04d}-{split.manifest[video].id}"
        pictures = [Image.open(path) for path in sorted(folder.glob("*.png"))]
        assert all(picture.mode == "P" for picture in pictures)
        assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), expected)


def test_one_coco_file_covers_every_pixel_once(run: Path, tmp_path: Path) -> None:
    app(["masks", str(run), "--out", str(tmp_path), "--format", "rle", "--videos", "1"], standalone_mode=False)
    coco = json.loads((tmp_path / "masks.json").read_text())
    assert len(coco["images"]) == 4 and [c["id"] for c in coco["categories"]] == [1, 2, 3, 4]
    for image in coco["images"]:
        found = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        masks = [decode(a["segmentation"]) for a in found]
        assert np.array_equal(np.sum(masks, 0), np.ones((SIZE, SIZE)))
        for annotation, mask in zip(found, masks, strict=True):
            left, top, width, height = annotation["bbox"]
            assert annotation["area"] == mask.sum() == mask[top : top + height, left : left + width].sum()


def test_videos_of_masks_play(run: Path, tmp_path: Path) -> None:
    for form in ("overlay-mp4", "overlay-gif"):
        app(
            ["masks", str(run), "--out", str(tmp_path), "--format", form, "--refine", "guided", "--json"],
            standalone_mode=False,
        )
    films = sorted(tmp_path.glob("*.mp4"))
    assert len(films) == len(list(tmp_path.glob("*.gif"))) == 2
    with av.open(str(films[0])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    assert len(frames) == 4 and frames[0].shape == (SIZE, SIZE, 3)
    with Image.open(films[0].with_suffix(".gif")) as film:
        assert film.n_frames == 4  # type: ignore[attr-defined]


def test_odd_sides_and_one_frame_can_be_written(tmp_path: Path) -> None:
    frames = np.full((1, 33, 47, 3), 90, np.uint8)
    masked = Masked("a/b c", frames, np.zeros((1, 33, 47), np.uint8), 2)
    for form in ("overlay-mp4", "overlay-gif", "overlay-png"):
        with MaskWriter(tmp_path, form) as writer:  # type: ignore[arg-type]
            writer.add(masked)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_b_c", "a_b_c.gif", "a_b_c.mp4"]
    with av.open(str(tmp_path / "a_b_c.mp4")) as container:
        assert next(container.decode(video=0)).to_ndarray(format="rgb24").shape == (34, 48, 3)


def test_the_background_keeps_its_colours_and_slots_get_theirs() -> None:
    frames = np.full((1, 20, 20, 3), 100, np.uint8)
    labels = np.zeros((1, 20, 20), np.uint8)
    labels[0, 5:10, 5:10] = 1
    drawn = overlay(Masked("x", frames, labels, 2))[0]
    assert (drawn[15, 15] == 100).all() and (drawn[7, 7] != 100).any() and (drawn[5, 5] == 245).all()


def test_no_ground_truth_is_needed(run: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "plain.zarr", Unlabelled())
    found = list(store_masks(load_run(run, store.path), videos=1))
    assert len(found) == 1 and found[0].labels.shape == (4, SIZE, SIZE)
