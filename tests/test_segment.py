"""``slotlab.load(RUN).segment(frames)``: pictures give what their stored features gave, in every form they may come;
``slotlab.training_free().segment(frames)``: they need no run."""

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
from slotlab.models.normalise import Normaliser
from slotlab.models.segments import segments, soft_segments
from slotlab.models.whitening import Natural
from slotlab.runs.loaded import load_run
from slotlab.segment import ENOUGH, RunSegmenter
from slotlab.training.train import train
from tests.commands import Slotlab
from tests.synthetic import DiscSource
from tests.training import small

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
def segmenter(trained: tuple[Path, np.ndarray, torch.Tensor]) -> RunSegmenter:
    return slotlab.load(trained[0], device="cpu")


def test_frames_give_what_their_stored_features_gave(
    trained: tuple[Path, np.ndarray, torch.Tensor], segmenter: RunSegmenter
) -> None:
    _, frames, labels = trained
    found = segmenter.segment(frames)
    assert found.masks.shape == (4, 4, 32, 32) and found.slots.shape == (4, 4, 8)
    torch.testing.assert_close(found.masks.sum(1), torch.ones(4, 32, 32))
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.labels, segmenter.segment(frames).labels), "the same every time"
    assert np.array_equal(segmenter.label(frames), labels.numpy())


def test_every_form_of_the_same_picture(
    trained: tuple[Path, np.ndarray, torch.Tensor], segmenter: RunSegmenter, tmp_path: Path
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


def test_pictures_of_any_proportions_get_masks_of_their_size(segmenter: RunSegmenter) -> None:
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
def test_wrong_frames_are_told(segmenter: RunSegmenter, frames: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        segmenter.segment(frames)


def test_missing_files_and_sizes_that_differ_are_told(segmenter: RunSegmenter, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        segmenter.segment(tmp_path / "none.png")
    with pytest.raises(DataError, match="no picture in it"):
        segmenter.segment(tmp_path)
    for name, width in {"a.png": 5, "b.png": 4}.items():
        Image.new("RGB", (width, 4)).save(tmp_path / name)
    with pytest.raises(DataError, match=r"b.png: 4x4, but a.png in the same folder is 5x4, .* name the pictures"):
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
    fine = slotlab.load(run).label(frames, refine="guided")
    for options, expected in (([], fine), (["--refine", "none"], labels.numpy())):
        app(
            ["segment", str(run), *files, "--out", str(out), "--format", "png", "--json", *options],
            standalone_mode=False,
        )
        assert json.loads(capsys.readouterr().out) == {"out": str(out), "files": 5}
        written = [np.asarray(Image.open(path)) for path in sorted((out / "0001-walk").glob("*.png"))]
        assert np.array_equal(np.stack(written), expected)
    assert (fine != labels.numpy()).any(), "edges are guided unless told otherwise"
    with pytest.raises(UsageError, match="no such file"):
        app(["segment", str(run), str(tmp_path / "none.png"), "--out", str(out)], standalone_mode=False)


def test_another_input_size(trained: tuple[Path, np.ndarray, torch.Tensor], tmp_path: Path) -> None:
    """A run that knows nothing of places segments a store of a finer grid, and pictures at that size the same."""
    source = DiscSource()
    stores = {
        size: extract(
            plan(tmp_path / f"{size}.zarr", source, backbone, ExtractOptions(batch_size=4, precision="float32")),
            source,
            backbone,
        )
        for size in (64, 128)
        for backbone in (load_backbone(BACKBONE, "random", input_size=size),)
    }
    run = train(small(preset="objects"), stores[64], tmp_path / "run")
    fine = load_run(run, stores[128].path)
    expected = fine.segment(fine.split(), 0).masks_on_grid
    coarse = load_run(run).segment(load_run(run).split(), 0).masks_on_grid
    assert expected.shape[2] == 2 * coarse.shape[2]
    frames = fine.split().video(0)
    found = slotlab.load(run, input_size=128, device="cpu").segment(frames)
    assert torch.equal(found.labels, masks_to_labels(expected, (32, 32)))
    with pytest.raises(UsageError, match="no multiple of the patch"):
        slotlab.load(run, input_size=100, device="cpu")
    other, _, _ = trained
    with pytest.raises(UsageError, match="one grid of patches"):
        slotlab.load(other, input_size=128, device="cpu")
    with pytest.raises(IncompatibleError, match="preprocessing.size"):
        load_run(other, stores[128].path)


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


def test_a_real_photograph(segmenter: RunSegmenter) -> None:
    load_sample_image = pytest.importorskip("sklearn.datasets").load_sample_image
    photograph = load_sample_image("china.jpg")  # 427 x 640
    found = segmenter.segment(photograph, refine="guided")
    assert found.labels.shape == (1, 427, 640)
    torch.testing.assert_close(found.masks.sum(1), torch.ones(1, 427, 640))


# -- without training --------------------------------------------------------------------------------------


def pictures(count: int) -> list[np.ndarray]:
    """Single frames of different videos, (1, 32, 32, 3) each."""
    source = DiscSource({"train": (1,) * count})
    return [source.read("train", index).frames for index in range(count)]


def training_free(own: object, **options: object) -> slotlab.segment.TrainingFreeSegmenter:
    return slotlab.training_free(own, backbone=BACKBONE, input_size=INPUT, device="cpu", weights="random", **options)


def test_without_training_pictures_get_the_segments_of_their_whitened_tokens() -> None:
    own = pictures(ENOUGH)
    segmenter = training_free(own)
    assert segmenter.measured == f"the {ENOUGH} given"
    found = segmenter.segment(own[3])
    backbone = load_backbone(BACKBONE, "random", input_size=INPUT)
    read = [backbone(backbone.preprocess(torch.from_numpy(one)))[backbone.taps[0]] for one in own]  # (1, 16, 256)
    x = torch.cat(read).flatten(0, 1).double()
    covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    shrunk = 0.9 * covariance + 0.1 * covariance.diagonal().mean() * torch.eye(256)
    values, vectors = torch.linalg.eigh(shrunk)
    white = ((read[3][0].double() - x.mean(0)) @ vectors / values.sqrt())[None]  # turned, but no less white
    labels = segments(white, backbone.grid)[0]
    assert len(labels.unique()) > 1
    masks = soft_segments(white, backbone.grid)
    assert found.masks.shape == (1, masks.shape[1], 32, 32) and found.labels.shape == (1, 32, 32)
    expected = masks_to_labels(masks.unflatten(-1, backbone.grid), (32, 32))
    assert torch.equal(found.labels, expected)
    assert np.array_equal(segmenter.label(own[3]), expected.numpy())
    assert found.slots.shape == (1, masks.shape[1], 256)
    torch.testing.assert_close(found.masks.sum(1), torch.ones(1, 32, 32))
    assert segmenter.segment(own[3], refine="guided").masks.shape == found.masks.shape


@pytest.mark.slow
def test_a_higher_cut_gives_fewer_segments() -> None:
    own = pictures(ENOUGH)
    counts = [training_free(own, cut=cut).segment(own[0]).masks.shape[1] for cut in (0.2, 0.6, 1.5)]
    assert counts[0] > counts[1] >= counts[2] == 1


def test_few_pictures_of_a_backbone_that_nothing_is_shipped_for_are_said_to_be_few() -> None:
    assert f"the 2 given; they are few: {ENOUGH} or more" in training_free(pictures(2)).measured
    with pytest.raises(UsageError, match=f"{BACKBONE}: no statistics of natural pictures are shipped for layer3"):
        training_free([])


def test_shipped_statistics_whiten_where_own_pictures_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Natural(torch.linspace(0, 1, 256).double(), torch.eye(256).double() * 4, 99)
    monkeypatch.setattr("slotlab.segment.natural", lambda backbone, tap: made)
    weights = load_backbone(BACKBONE, "random", input_size=INPUT)  # as if they were the published ones
    monkeypatch.setattr("featcache.backbones.backbone.load_backbone", lambda *_: weights)
    one, *others = pictures(ENOUGH)
    few, none = (slotlab.training_free(own, backbone=BACKBONE, device="cpu") for own in ([one], []))
    assert few.measured == none.measured == "99 natural pictures"
    tokens = weights(weights.preprocess(torch.from_numpy(one)))[weights.taps[0]]
    expected = soft_segments(Normaliser.from_statistics("whiten", made.mean, made.covariance)(tokens), weights.grid)
    torch.testing.assert_close(few.segment(one).slots.shape[1], expected.shape[1])
    assert torch.equal(few.segment(one).labels, masks_to_labels(expected.unflatten(-1, weights.grid), (32, 32)))
    assert slotlab.training_free([one, *others], backbone=BACKBONE, device="cpu").measured == f"the {ENOUGH} given"


def test_segment_needs_no_run(tmp_path: Path, slotlab: Slotlab) -> None:
    for index, picture in enumerate(pictures(3)):
        Image.fromarray(picture[0]).save(tmp_path / f"{index}.png")
    clip = tmp_path / "clip"
    clip.mkdir()
    for index, frame in enumerate(DiscSource().read("train", 0).frames):
        Image.fromarray(frame).save(clip / f"{index}.png")
    files = ["0.png", "1.png", "clip"]
    options = ("--no-training", "--backbone", BACKBONE, "--weights", "random", "--device", "cpu", "--format", "png")
    done = slotlab("segment", *files, *options, "--input-size", INPUT, "--out", "a", "--json")
    assert done.code == 0 and done.json["files"] == 6 and done.json["whitened_by"].startswith("the 3 given")
    assert "features whitened by the 3 given; they are few" in done.said
    assert len(list((tmp_path / "a" / "0002-clip").glob("*.png"))) == 4
    plain = slotlab("segment", *files, *options, "--input-size", INPUT, "--out", "b", "--refine", "none")
    assert plain.code == 0 and "b: 6 files written" in plain.out
    one, other = (np.asarray(Image.open(tmp_path / out / "0000-0" / "00000.png")) for out in "ab")
    assert one.shape == other.shape == (32, 32) and (one != other).any(), "edges are guided unless told otherwise"
    wide = slotlab("segment", *files, *options, "--input-size", "64x96", "--cut", "9", "--out", "c", "--json")
    assert wide.code == 0
    assert not np.asarray(Image.open(tmp_path / "c" / "0000-0" / "00000.png")).any(), "one segment"


def test_segment_says_how_to_name_run_and_pictures(tmp_path: Path, slotlab: Slotlab) -> None:
    Image.fromarray(pictures(1)[0][0]).save(tmp_path / "a.png")
    (tmp_path / "run").mkdir()
    for words, told in (
        (["a.png", "a.png"], "a.png: is no run folder; name the run first, or segment without one by --no-training"),
        (["run"], "run: no pictures to segment"),
        (["run", "a.png", "--backbone", "dino"], "--backbone: a run has its own"),
        (["run", "a.png", "--cut", "0.7"], "--cut: a run has its own"),
        (["b.png", "--no-training"], "b.png: no such file"),
        (["a.png", "--no-training", "--backbone", "dinov22"], "unknown backbone 'dinov22'"),
    ):
        done = slotlab("segment", *words, "--out", "out")
        assert done.code == 2 and told in done.said, done.said


def test_importing_slotlab_is_light() -> None:
    code = "import sys, slotlab; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
