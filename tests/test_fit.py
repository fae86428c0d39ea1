"""Frames that have not the input's proportions: what of them is shown, stored, and brought back; grids that are
not square."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import slotlab
from featcache.backbones.backbone import Backbone, load_backbone
from featcache.errors import IncompatibleError, UsageError
from featcache.extraction.extract import extract
from featcache.extraction.fit import Window
from featcache.extraction.plan import ExtractOptions, plan
from featcache.sources.video import Video
from featcache.store.reading import FeatureStore
from featcache.upkeep.verify import verify
from featcache.words import Fit
from slotlab.config.load import load_config
from slotlab.models.clustering.model import ClusteringModel
from slotlab.models.normalise import Normaliser
from slotlab.pictures.files import Masked, MaskWriter, overlay
from slotlab.training.train import train
from tests.synthetic import DiscSource

FIXED = ExtractOptions(batch_size=3, precision="float32")
SIDES = st.integers(1, 40)


class Wide(DiscSource):
    """Discs in frames of 32 x 56, numbered on in the right part."""

    def read(self, split: str, index: int) -> Video:
        video, right = super().read(split, index), super().read(split, index + 1 if index == 0 else 0)
        length = min(len(video.frames), len(right.frames), self._lengths[split][index])
        frames = np.concatenate([video.frames[:length], right.frames[:length, :, :24]], 2)
        masks = np.concatenate([video.segmentations[:length], right.segmentations[:length, :, :24]], 2)
        return Video(video.id, frames, masks, video.instances)


LENGTHS = {"train": (2, 2), "validation": (2, 2)}


@given(st.sampled_from(["squash", "crop", "pad"]), st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES))
def test_windows_lie_in_the_middle_and_come_back(
    fit: Fit, frame: tuple[int, int], proportions: tuple[int, int]
) -> None:
    window = Window.of(fit, frame, proportions)
    images = np.random.default_rng(0).integers(0, 255, (2, *frame, 3), dtype=np.uint8)
    shown = window.cut(images, [7, 8, 9])
    assert shown.shape[1:3] == window.size
    if fit == "squash":
        assert window.is_frame
        return
    shape = proportions[1] / proportions[0]  # the nearest that whole pixels give
    assert window.width == max(1, round(window.height * shape)) or window.height == max(1, round(window.width / shape))
    back = window.put_back(shown, 0)
    assert back.shape == images.shape
    if fit == "pad":
        np.testing.assert_array_equal(back, images)
        margin = np.ones((1, *window.size), bool)
        margin[:, -window.top : -window.top + frame[0], -window.left : -window.left + frame[1]] = False
        assert (shown[np.repeat(margin, 2, 0)] == [7, 8, 9]).all()
        assert -window.top == (window.height - frame[0] + 1) // 2 and -window.left == (window.width - frame[1] + 1) // 2
    else:
        inside = np.zeros(frame, bool)
        inside[window.top : window.top + window.height, window.left : window.left + window.width] = True
        np.testing.assert_array_equal(back[:, inside], images[:, inside])
        assert (not back[:, ~inside].any() and window.size[0] == frame[0]) or window.size[1] == frame[1]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("dinov2_vits14", weights="random", taps=("block2",), input_size=28)


def _store(path: Path, backbone: Backbone, options: ExtractOptions) -> FeatureStore:
    source = Wide(LENGTHS)
    return extract(plan(path, source, backbone, options), source, backbone)


@pytest.mark.parametrize("frame_size", [None, 16])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_backbone_sees_what_is_stored(tmp_path: Path, backbone: Backbone, fit: Fit, frame_size: int | None) -> None:
    store = _store(tmp_path / "s.zarr", backbone, replace(FIXED, fit=fit, frame_size=frame_size))
    video = Wide(LENGTHS).read("train", 0)
    if fit == "crop":
        frames, masks = video.frames[:, :, 12:44], video.segmentations[:, :, 12:44]
    else:
        frames = np.empty((2, 56, 56, 3), np.uint8)
        frames[:] = (124, 116, 104)  # ImageNet's mean colour
        masks = np.zeros((2, 56, 56), np.uint8)
        frames[:, 12:44], masks[:, 12:44] = video.frames, video.segmentations
    tokens = backbone(backbone.preprocess(torch.from_numpy(np.ascontiguousarray(frames))))["block2"]
    split = store["train"]
    torch.testing.assert_close(split.tokens("block2", 0).float(), tokens, atol=2e-3, rtol=2e-3)
    if frame_size:
        size = (frame_size, frame_size)
        frames = np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames])
        masks = np.stack([np.asarray(Image.fromarray(m).resize(size, Image.Resampling.NEAREST)) for m in masks])
    np.testing.assert_array_equal(split.video(0), frames)
    np.testing.assert_array_equal(split.segmentations(0), masks)
    for number, instance in enumerate(split.instances(0), 1):
        assert instance.visibility == tuple(int((mask == number).sum()) for mask in masks)
    assert store.spec.preprocessing["fit"] == fit
    assert verify(store.path) == []
    with pytest.raises(IncompatibleError, match=f"preprocessing.fit: store '{fit}', asked None"):
        _store(tmp_path / "s.zarr", backbone, replace(FIXED, frame_size=frame_size))


@pytest.mark.slow
def test_a_frame_size_keeps_the_inputs_proportions(tmp_path: Path) -> None:
    wide = load_backbone("dinov2_vits14", weights="random", taps=("block2",), input_size=(28, 56))
    for number, (options, size) in enumerate(
        [
            (replace(FIXED, frame_size=20), (20, 40)),
            (replace(FIXED, frame_size=(20, 30)), (20, 30)),
            (replace(FIXED, frame_size=20, fit="crop"), (20, 40)),
            (replace(FIXED, frame_size=(20, 40), fit="pad"), (20, 40)),
        ]
    ):
        assert _store(tmp_path / f"{number}.zarr", wide, options)["train"].spec.frame_size == size
    with pytest.raises(UsageError, match=r"--frame-size 20x30: --fit crop gives the proportions of the input, 28x56"):
        _store(tmp_path / "no.zarr", wide, replace(FIXED, frame_size=(20, 30), fit="crop"))


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov3_vits16"])
def test_oblong_inputs_are_what_timm_makes_of_them(name: str) -> None:
    side = 14 if "14" in name else 16
    backbone = load_backbone(name, weights="random", taps=("block2",), input_size=(3 * side, 5 * side))
    assert backbone.grid == (3, 5) and backbone.preprocessing["size"] == [3 * side, 5 * side]
    model = timm.create_model(backbone.spec.model_id, num_classes=0, img_size=(3 * side, 5 * side)).eval()
    model.load_state_dict(backbone._towers[""].model.state_dict())
    images = backbone.preprocess(torch.from_numpy(Wide(LENGTHS).read("train", 0).frames))
    assert images.shape == (2, 3, 3 * side, 5 * side)
    with torch.no_grad():
        (expected,) = model.forward_intermediates(images, indices=[1], output_fmt="NCHW", intermediates_only=True)
    torch.testing.assert_close(backbone(images)["block2"], expected.flatten(2).transpose(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_vitb16", "resnet18"])
def test_oblong_inputs_of_other_families(name: str) -> None:
    backbone = load_backbone(name, weights="random", input_size=(64, 96))
    tokens = backbone(backbone.preprocess(torch.zeros(1, 30, 40, 3, dtype=torch.uint8)))[backbone.taps[0]]
    assert tokens.shape[1] == backbone.grid[0] * backbone.grid[1] and backbone.grid[1] * 2 == backbone.grid[0] * 3


def test_patches_are_as_far_apart_in_both_directions() -> None:
    config = load_config("default").model
    places = {
        grid: ClusteringModel(config, Normaliser("none", 128), grid).position.view(*grid, 2)
        for grid in [(4, 4), (4, 7), (6, 4)]
    }
    for grid, place in places.items():
        torch.testing.assert_close(place[1, 0] - place[0, 0], torch.tensor([2 / 3, 0.0]), msg=str(grid))
        torch.testing.assert_close(place[0, 1] - place[0, 0], torch.tensor([0.0, 2 / 3]), msg=str(grid))
        torch.testing.assert_close(place.mean((0, 1)), torch.zeros(2), msg=str(grid))


@pytest.fixture(scope="module", params=["crop", "pad"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fit, Path]:
    folder = tmp_path_factory.mktemp("fit")
    small = load_backbone("resnet18", "random", input_size=64)
    source = Wide(LENGTHS)
    options = replace(FIXED, fit=request.param)
    store = extract(plan(folder / "s.zarr", source, small, options), source, small)
    sizes = ("model.slot_dim=8", "model.decoder.hidden=16", "model.slot_mlp_hidden=16", "model.slots=4")
    return request.param, train(
        load_config("dinosaur", None, sizes, optim__steps=2, optim__batch_size=2), store, folder / "run"
    )


def test_segment_brings_masks_back_to_the_whole_frame(run: tuple[Fit, Path], tmp_path: Path) -> None:
    fit, folder = run
    frames = Wide(LENGTHS).read("validation", 0).frames
    segmenter = slotlab.load(folder, device="cpu")
    found, labels = segmenter.segment(frames), segmenter.label(frames)
    assert found.masks.shape == (2, 4, 32, 56) and found.labels.shape == labels.shape == (2, 32, 56)
    np.testing.assert_array_equal(found.labels, labels)
    if fit == "crop":
        inner = segmenter.segment(np.ascontiguousarray(frames[:, :, 12:44]))  # as proportioned as the input
        torch.testing.assert_close(found.masks[..., 12:44], inner.masks)
        for outside in (found.labels[..., :12], found.labels[..., 44:]):
            assert (outside == 255).all()
        assert not found.masks[..., :12].any() and (labels[:, :, 12:44] < 4).all()
    else:
        torch.testing.assert_close(found.masks.sum(1), torch.ones(2, 32, 56))
        assert (labels < 4).all()
    masked = Masked("a", frames, labels, 4)
    np.testing.assert_array_equal(
        overlay(masked)[:, :, :11], frames[:, :, :11] if fit == "crop" else overlay(masked)[:, :, :11]
    )
    with MaskWriter(tmp_path, "rle") as writer:
        writer.add(masked)
    assert (tmp_path / "masks.json").exists()
