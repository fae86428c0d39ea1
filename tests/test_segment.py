"""``slotlab.load(RUN).segment(frames)``: pictures give what their stored features gave, in every form they may come."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import slotlab
from cli import app
from featcache.backbones.backbone import load_backbone
from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from slotlab.config.load import load_config
from slotlab.masks.labels import masks_to_labels
from slotlab.runs.loaded import load_run
from slotlab.segment import Segmenter
from slotlab.training.train import train
from tests.synthetic import DiscSource

SMALL = ("model.slot_dim=8", "model.decoder.hidden=16", "model.slot_mlp_hidden=16", "model.slots=4")
# A resnet with random weights: real preprocessing and taps, in a tenth of a second.
BACKBONE, INPUT = "resnet18", 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, torch.Tensor]:
    """A run, the frames of its first validation video, and the labels that the run gave them from the store.

    The store is gone.
    """
    folder = tmp_path_factory.mktemp("api")
    source, backbone = DiscSource(), load_backbone(BACKBONE, "random", input_size=INPUT)
    options = ExtractOptions(batch_size=4, precision="float32")
    store = extract(plan(folder / "store.zarr", source, backbone, options), source, backbone)
    run = train(load_config("dinosaur", None, SMALL, optim__steps=2, optim__batch_size=4), store, folder / "run")
    loaded, split = load_run(run), store["validation"]
    masks = loaded.segment(split, 0).masks_on_grid
    frames, labels = split.video(0), masks_to_labels(masks, split.spec.frame_size)
    shutil.rmtree(store.path)
    return run, frames, labels


@pytest.fixture(scope="module")
def segmenter(trained: tuple[Path, np.ndarray, torch.Tensor]) -> Segmenter:
    return slotlab.load(trained[0], device="cpu")


def test_frames_give_what_their_stored_features_gave(
    trained: tuple[Path, np.ndarray, torch.Tensor], segmenter: Segmenter
) -> None:
    _, frames, labels = trained
    found = segmenter.segment(frames)
    assert found.masks.shape == (4, 4, 32, 32) and found.slots.shape == (4, 4, 8)
    torch.testing.assert_close(found.masks.sum(1), torch.ones(4, 32, 32))
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.labels, segmenter.segment(frames).labels), "the same every time"
    assert np.array_equal(segmenter.label(frames), labels.numpy())


def test_every_form_of_the_same_picture(
    trained: tuple[Path, np.ndarray, torch.Tensor], segmenter: Segmenter, tmp_path: Path
) -> None:
    picture = trained[1][0]
    Image.fromarray(picture).save(tmp_path / "one.png")
    tensor = torch.from_numpy(picture)
    forms = (
        picture, picture[None], tensor, tensor.permute(2, 0, 1), Image.fromarray(picture), tmp_path / "one.png",
        str(tmp_path / "one.png"), [picture], [tmp_path / "one.png"], tmp_path,
    )  # fmt: skip
    expected = segmenter.segment(picture).masks
    assert expected.shape == (1, 4, 32, 32)
    for form in forms:
        assert torch.equal(segmenter.segment(form).masks, expected)


def test_pictures_of_any_proportions_get_masks_of_their_size(segmenter: Segmenter) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (45, 131, 3), dtype=np.uint8)
    for refine in (None, "guided"):
        found = segmenter.segment(picture, refine=refine)  # type: ignore[arg-type]
        assert found.masks.shape == (1, 4, 45, 131) and found.labels.shape == (1, 45, 131)
        assert np.array_equal(segmenter.label(picture, refine=refine), found.labels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((4, 4, 3)), "must be uint8"),
        (np.zeros((4, 4), np.uint8), "must be uint8"),
        (np.zeros((0, 4, 4, 3), np.uint8), "must be uint8"),
        (7, "frames are int"),
        ([], "frames are list"),
    ],
)
def test_wrong_frames_are_told(segmenter: Segmenter, frames: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        segmenter.segment(frames)


def test_missing_files_and_sizes_that_differ_are_told(segmenter: Segmenter, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        segmenter.segment(tmp_path / "none.png")
    with pytest.raises(DataError, match="no picture in it"):
        segmenter.segment(tmp_path)
    with pytest.raises(DataError, match="bring all frames of a video to one size"):
        segmenter.segment([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)])


def test_other_weights_are_refused(trained: tuple[Path, np.ndarray, torch.Tensor], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    raw = json.loads((run / "store.json").read_text())
    raw["spec"]["model"]["weights_sha256"] = "0" * 64
    (run / "store.json").write_text(json.dumps(raw))
    with pytest.raises(IncompatibleError, match="weights_sha256"):
        slotlab.load(run, device="cpu")
    (run / "store.json").unlink()
    with pytest.raises(DataError, match=r"store\.json: missing"):
        slotlab.load(run, device="cpu")


def test_segment_writes_files_for_pictures_and_folders(
    trained: tuple[Path, np.ndarray, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, frames, labels = trained
    (tmp_path / "walk").mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "walk" / f"{index}.png")
    files = [str(tmp_path / "walk" / "0.png"), str(tmp_path / "walk")]
    out = tmp_path / "out"
    app(["segment", str(run), *files, "--out", str(out), "--format", "png", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "files": 5}
    written = [np.asarray(Image.open(path)) for path in sorted((out / "0001-walk").glob("*.png"))]
    assert np.array_equal(np.stack(written), labels.numpy())
    with pytest.raises(UsageError, match="no such file"):
        app(["segment", str(run), str(tmp_path / "none.png"), "--out", str(out)], standalone_mode=False)


def test_a_pixel_model_needs_no_backbone(tmp_path: Path) -> None:
    source, backbone = DiscSource(), load_backbone(BACKBONE, "random", input_size=INPUT)
    options = ExtractOptions(batch_size=4, precision="float32")
    store = extract(plan(tmp_path / "store.zarr", source, backbone, options), source, backbone)
    tiny = ("model.slots=3", "model.resolution=16", "model.broadcast=4", "model.slot_dim=8", "model.encoder_channels=8")
    config = load_config("pixel", None, [*tiny, "model.decoder_channels=8"], optim__steps=2, optim__batch_size=4)
    run = train(config, store, tmp_path / "run")
    expected = load_run(run).segment(store["validation"], 0)
    found = slotlab.load(run, device="cpu").segment(store["validation"].video(0))
    torch.testing.assert_close(found.slots, expected.slots)
    assert found.masks.shape == (4, 3, 32, 32)


def test_a_real_photograph(segmenter: Segmenter) -> None:
    load_sample_image = pytest.importorskip("sklearn.datasets").load_sample_image
    photograph = load_sample_image("china.jpg")  # 427 x 640
    found = segmenter.segment(photograph, refine="guided")
    assert found.labels.shape == (1, 427, 640)
    torch.testing.assert_close(found.masks.sum(1), torch.ones(1, 427, 640))


def test_importing_slotlab_is_light() -> None:
    code = "import sys, slotlab; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
