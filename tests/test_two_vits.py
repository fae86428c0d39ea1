"""Models that find slots in tokens of one ViT and reconstruct those of another: from the file of weights to scores."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from featcache.backbones.backbone import load_backbone
from featcache.errors import IncompatibleError
from featcache.stream.dataset import Clips
from featcache.stream.stream import FeatureStream
from featcache.words import Residence
from slotlab.config.load import load_config
from slotlab.models.build import build_model
from slotlab.models.inputs import ModelInput
from slotlab.models.randomness import Draws
from slotlab.runs.loaded import load_run
from slotlab.training.train import train
from tests.commands import Slotlab
from tests.published_models import HEADS, K, S, Sums, spot, tensors
from tests.synthetic import DIM, make_store

VIT, SIDE, WIDTH, BLOCKS = "timm:test_vit.r160_in1k", 64, 64, 6  # a grid of 4 x 4
NAMES = ("encoder", "second_encoder")


@pytest.fixture(scope="module")
def vits() -> dict[str, nn.Module]:
    """The same ViT twice, of which the first was trained further in its last blocks."""
    torch.manual_seed(0)
    frozen, trained = (timm.create_model("test_vit", num_classes=0, img_size=SIDE).eval() for _ in NAMES)
    trained.load_state_dict(frozen.state_dict())
    with torch.no_grad():
        for parameter in trained.blocks[-2:].parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return dict(zip(NAMES, (trained, frozen), strict=True))


@pytest.fixture(scope="module")
def of() -> dict[str, Tensor]:
    return tensors(spot(WIDTH, 16, learnt=True, orders=9))


@pytest.fixture(scope="module")
def student(vits: dict[str, nn.Module], of: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as SPOT's ``train_spot_2.py`` saves it."""
    both = {f"{name}.{key}": value for name, vit in vits.items() for key, value in vit.state_dict().items()}
    path = tmp_path_factory.mktemp("student") / "checkpoint.pt.tar"
    torch.save({"model": both | of, "epoch": 3, "best_mbo_i": torch.tensor(34.9)}, path)
    return path


def test_a_tap_says_which_vit_of_a_file_it_is_of(vits: dict[str, nn.Module], student: Path, tmp_path: Path) -> None:
    taps = [f"{name}.block{BLOCKS}.norm" for name in reversed(NAMES)]
    backbone = load_backbone(VIT, str(student), taps, SIDE)
    images = backbone.preprocess(torch.randint(256, (2, 40, 40, 3), dtype=torch.uint8))
    found = backbone(images)
    assert tuple(found) == backbone.taps == tuple(taps)
    with torch.no_grad():
        expected = {f"{name}.block{BLOCKS}.norm": vit.forward_features(images)[:, 1:] for name, vit in vits.items()}  # type: ignore[operator]
    for tap, tokens in expected.items():
        torch.testing.assert_close(found[tap], tokens)
    assert not torch.allclose(*found.values(), atol=0.1)
    for tap, said in (
        (f"block{BLOCKS}", "holds 2 ViTs; .*: encoder, second_encoder"),
        ("student.block1", "no ViT 'st"),
    ):
        with pytest.raises(IncompatibleError, match=said):
            load_backbone(VIT, str(student), [tap], SIDE)
    alone = {key: value for key, value in torch.load(student)["model"].items() if not key.startswith(NAMES[1])}
    torch.save({"model": alone}, tmp_path / "teacher.pt.tar")  # the only one needs no name
    plain = load_backbone(VIT, str(tmp_path / "teacher.pt.tar"), [f"block{BLOCKS}.norm"], SIDE)
    torch.testing.assert_close(plain(images)[f"block{BLOCKS}.norm"], expected[taps[1]])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("residence", ["disk", "device"])
def test_taps_are_read_side_by_side(dtype: str, residence: Residence, tmp_path: Path) -> None:
    split = make_store(tmp_path / "a.zarr", taps=("block1", "block2"), dtype=dtype)["train"]
    each = [split.tokens(tap, 0) for tap in ("block1", "block2")]
    assert torch.equal(split.tokens("block2+block1", 0), torch.cat([each[1], each[0]], -1))
    stream = FeatureStream(split, "block1+block2", batch_size=3, clip=2, residence=residence)
    for batch in itertools.islice(stream, 4):
        assert batch.features.shape == (3, 2, 16, 2 * DIM)
        for sample, row in zip(batch.features, batch.rows, strict=True):
            apart = [split.read_tokens(tap, slice(row, row + 2)) for tap in ("block1", "block2")]
            assert torch.equal(sample, torch.cat(apart, -1))
    item = Clips(split, ("block1+block2",), clip=4)[0]
    assert torch.equal(item["features"], torch.cat(each, -1).float())
    with pytest.raises(IncompatibleError, match=r"no tap 'block3'; it has: block1, block2"):
        split.store.tap("block1+block3")


def test_slots_are_of_one_tap_and_the_reconstruction_of_another(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.zarr", taps=("block1", "block2"), scale=np.linspace(0.1, 3, DIM))
    settings = ["data.tap=block1", "data.target=block2", "data.normalize=channel", "model.slots=3"]
    config = load_config("dinosaur-ar", None, [*settings, "model.decoder.heads=2", "optim.steps=10"])
    torch.manual_seed(0)
    model, inputs, split = build_model(config, store).eval(), ModelInput.of(config, store), store["train"]
    tokens = inputs.read(split, 0).float()
    changed = [tokens.clone() for _ in range(2)]
    changed[0][..., :DIM] += torch.randn(DIM)
    changed[1][..., DIM:] += torch.randn(DIM)
    with torch.no_grad():
        found, read, target = (model.segment(features, Draws(0)) for features in (tokens, *changed))
    assert torch.equal(found.target, read.target) and torch.equal(found.slots, target.slots)
    assert not torch.allclose(found.slots, read.slots) and not torch.allclose(found.target, target.target)
    moments = split.statistics("block2")  # its own, which normalise it
    expected = (
        split.tokens("block2", 0).double() - torch.from_numpy(moments.mean)
    ) / moments.covariance.diagonal() ** 0.5
    torch.testing.assert_close(found.target.double(), expected, rtol=1e-4, atol=1e-4)
    losses: list[dict[str, float]] = []
    train(config, store, tmp_path / "run", report=losses.append)
    assert losses[-1]["feature_mse"] < losses[0]["feature_mse"]
    again = load_run(tmp_path / "run")
    assert again.inputs == inputs and again.segment(split, 0).target.shape == (4, 16, DIM)
    with pytest.raises(IncompatibleError, match="no tap 'block2'; it has: block1; "):
        load_run(tmp_path / "run", make_store(tmp_path / "b.zarr").path)


def test_a_student_of_spot_is_imported_extracted_scored_and_shown(
    student: Path, of: dict[str, Tensor], tmp_path: Path, slotlab: Slotlab
) -> None:
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        picture, mask = rng.integers(256, size=(32, 32, 3), dtype=np.uint8), np.zeros((32, 32), np.uint8)
        mask[8:20, 4:16], mask[18:30, 18:30] = 1, 2
        picture[mask == 1], picture[mask == 2] = (200, 30, 30), (20, 200, 90)
        for folder, values in (("validation", picture), ("validation/masks", mask)):
            (tmp_path / "pictures" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(tmp_path / "pictures" / folder / f"{name}.png")
    taps = [f"data.{key}={name}.block{BLOCKS}" for key, name in zip(("tap", "target"), NAMES, strict=True)]
    settings = [word for each in (*taps, f"model.decoder.heads={HEADS}") for word in ("--set", each)]
    command = ("import-run", student, "--from", "spot", "--backbone", VIT, *settings, "--out", "run", "--json")
    told = slotlab(*command).json
    words = shlex.split(told["extract"])
    assert f"--weights {student}" in told["extract"] and words[:2] == ["slotlab", "extract"]
    assert "imported without a store; make one with: " + told["extract"] in slotlab("eval", "run").said
    words[words.index("VIDEOS")] = "pictures"
    assert slotlab(*words[1:]).code == 0
    store = words[words.index("--out") + 1]

    loaded = load_run(tmp_path / "run", tmp_path / store)
    split = loaded.split()
    read, targets = (split.tokens(tap, 0).float() for tap in loaded.config.data.taps)
    assert not torch.allclose(read, targets, atol=0.1)
    first = of["slot_attn.slots_init.weight"].view(K, S)
    theirs = Sums(of).spot(read, first, 9, targets)
    found = loaded.output(loaded.inputs.read(split, 0), 0)
    for name, expected in zip(
        ("slots", "attention", "masks", "reconstruction"), zip(*theirs, strict=True), strict=True
    ):
        torch.testing.assert_close(getattr(found, name), torch.stack(expected), rtol=1e-4, atol=1e-5)

    scores = slotlab("eval", "run", "--cache", store, "--json").json
    assert scores["tap"] == "encoder.block6" and scores["frames"] == 2 and scores["fg_ari"] is not None
    stable = slotlab("robustness", "run", "--cache", store, "--json").json
    assert stable["relative_error"] < 1e-3
    assert slotlab("report", "run", "--cache", store, "--out", "report.html").code == 0
    assert "second_encoder.block6" in (tmp_path / "report.html").read_text()
    assert slotlab("segment", "run", "pictures/validation/one.png", "--out", "masks").code == 0
    other = ("--tap", f"block{BLOCKS}", "--weights", "random", "--input-size", SIDE, "--out", "other.zarr")
    assert slotlab("extract", "--backbone", VIT, "--data", "pictures", *other).code == 0
    refused = slotlab("eval", "run", "--cache", "other.zarr")
    assert refused.code == 4 and f"--weights {student}" in refused.said
