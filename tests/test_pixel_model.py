"""The pixel model: what it sees, its masks, that it learns, and that a run of it is evaluated like any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from featcache.errors import UsageError
from featcache.store.reading import FeatureStore
from slotlab.config.load import load_config
from slotlab.config.model import PixelConfig
from slotlab.config.schema import LossConfig
from slotlab.models.build import build_model
from slotlab.models.inputs import ModelInput
from slotlab.models.normalise import Normaliser
from slotlab.models.pixel_model import BroadcastDecoder, PixelModel, frame_tokens
from slotlab.models.randomness import Draws
from slotlab.runs.loaded import load_run
from slotlab.scoring.collapse import slot_similarity
from slotlab.scoring.evaluate import evaluate
from slotlab.training.losses import losses, total
from slotlab.training.train import train
from tests.synthetic import DiscSource, make_store

SIDE = 16
SMALL = [f"model.resolution={SIDE}", "model.broadcast=4", "model.slots=4", "model.slot_dim=16"]
SMALL += ["model.encoder_channels=8", "model.decoder_channels=8", "model.slot_mlp_hidden=16"]


def pixel_model(**options: object) -> PixelModel:
    torch.manual_seed(0)
    config = PixelConfig.model_validate(
        {"resolution": SIDE, "broadcast": 4, "slots": 4, "slot_dim": 16, "encoder_channels": 8, "decoder_channels": 8}
        | options
    )
    return PixelModel(config, Normaliser("none", 3), (SIDE, SIDE))


def frames(count: int = 3) -> Tensor:
    return torch.from_numpy(DiscSource({"train": (count,)}).read("train", 0).frames)


def test_frames_are_resized_by_area() -> None:
    pixels = frames(2)  # (2, 32, 32, 3)
    tokens = frame_tokens(pixels, (8, 16))
    expected = pixels.double().view(2, 8, 4, 16, 2, 3).mean((2, 4)).flatten(1, 2) / 127.5 - 1
    torch.testing.assert_close(tokens.double(), expected, rtol=0, atol=1e-6)
    clips = frame_tokens(pixels.unsqueeze(0), (8, 16))
    assert torch.equal(clips[0], tokens)


def test_both_masks_share_out_every_pixel() -> None:
    output = pixel_model()(frames(), Draws(0))
    for masks in (output.masks, output.attention):
        assert masks.shape == (3, 4, SIDE * SIDE)
        torch.testing.assert_close(masks.sum(1), torch.ones(3, SIDE * SIDE))
    torch.testing.assert_close(output.logits.softmax(1), output.attention)


def test_a_slot_is_decoded_by_itself() -> None:
    """The picture of one slot depends on no other: permuted slots give permuted masks and the same sum."""
    torch.manual_seed(0)
    decode = BroadcastDecoder(
        PixelConfig(resolution=SIDE, broadcast=4, slot_dim=8, decoder_channels=8), 3, (SIDE, SIDE)
    )
    slots, order = torch.randn(2, 5, 8), torch.randperm(5)
    (picture, masks), (same, permuted) = decode(slots), decode(slots[:, order])
    torch.testing.assert_close(picture, same)
    torch.testing.assert_close(masks[:, order], permuted)


def test_padded_slots_are_in_no_picture() -> None:
    model, pixels = pixel_model(fewest_slots=1), frames(12)
    output = model(pixels, Draws(0))
    active = output.masks.sum(-1) > 0  # (B, K)
    assert set(active.sum(1).tolist()) == {1, 2, 3, 4}
    assert torch.equal(output.attention.sum(-1) > 0, active)
    for slots, used, mine in zip(output.slots, active, output.reconstruction, strict=True):
        torch.testing.assert_close(model.decode(slots[None, used])[0][0], mine)
    assert bool((model.eval()(pixels, Draws(0)).masks.sum(-1) > 0).all())


def test_the_decoder_knows_where_it_is() -> None:
    """Without positions every cell of a broadcast slot would be decoded alike, but for the borders."""
    decode = BroadcastDecoder(PixelConfig(resolution=64, slot_dim=8, decoder_channels=8), 3, (64, 64))
    with torch.no_grad():
        picture, _ = decode(torch.randn(1, 1, 8))
    middle = picture.view(64, 64, 3)[24:40, 24:40]
    assert float((middle[8:] - middle[:8]).abs().max()) > 1e-4


def test_every_parameter_learns() -> None:
    model, pixels = pixel_model(), frames(8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen = []
    for step in range(40):
        loss = total(losses(model(pixels, Draws(step)), LossConfig()), LossConfig())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.5 * seen[0]
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("normalize", ["scale", "channel", "whiten"])
def test_targets_have_unit_energy(store: FeatureStore, normalize: str) -> None:
    config = load_config("pixel", None, [*SMALL, f"data.normalize={normalize}"])
    model, split, inputs = build_model(config, store), store["train"], ModelInput.of(config, store)
    energy = [model(inputs.read(split, v), Draws(0)).target.square().mean(2).flatten().detach() for v in split.videos]
    assert float(torch.cat(energy).mean()) == pytest.approx(1, rel=1e-4), "a mean predictor scores 1"


def test_a_run_is_trained_and_evaluated_like_any_other(tmp_path: Path, store: FeatureStore) -> None:
    config = load_config("pixel", None, [*SMALL, "checkpoint_every=2"], optim__steps=4, optim__batch_size=3)
    run = train(config, store, tmp_path / "run")
    result = evaluate(load_run(run))
    assert result.tap == "video" and result.summary.frames == 8
    assert {"fg_ari", "mbo", "attention", "by_material", "mask_similarity"} <= result.as_dict().keys()
    assert result.references.ceiling["mbo"] > 0.8, (
        "the ceiling is that of the model's own grid, much finer than the patches"
    )
    assert result.references.floors["kmeans_raw"]["fg_ari"] is not None
    json.dumps(result.as_dict())
    first, again = (load_run(run).segment(store["validation"], 1) for _ in range(2))
    assert torch.equal(first.masks, again.masks)
    assert slot_similarity(first.slots).shape == (4,)


def test_a_run_on_frames_goes_with_any_store_of_them(tmp_path: Path, store: FeatureStore) -> None:
    config = load_config("pixel", None, SMALL, optim__steps=2, optim__batch_size=3)
    run = train(config, store, tmp_path / "run")
    other = make_store(tmp_path / "other.zarr", backbone="another")
    assert evaluate(load_run(run, other.path)).values == evaluate(load_run(run)).values


@pytest.mark.slow
def test_loss_falls_below_the_mean_predictor(tmp_path: Path, store: FeatureStore) -> None:
    overrides = [*SMALL, "optim.warmup_steps=5", "optim.learning_rate=0.01"]
    run = train(load_config("pixel", None, overrides, optim__steps=150, optim__batch_size=6), store, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["feature_mse"] < 0.7 < rows[0]["feature_mse"]
    assert np.isfinite(rows[-1]["grad_norm"])


CLIPS = ["data.clip=2", "model.predictor.kind=mlp", "model.predictor.hidden=16"]


def test_a_video_model_of_pixels_carries_its_slots(tmp_path: Path, store: FeatureStore) -> None:
    config = load_config("pixel", None, [*SMALL, *CLIPS], optim__steps=2, optim__batch_size=2)
    loaded = load_run(train(config, store, tmp_path / "run"))
    assert evaluate(loaded).summary.frames == 8
    pixels = loaded.inputs.read(store["validation"], 0)
    whole, cut = loaded.segment_input(pixels, 0), loaded.segment_input(pixels[1:], 0)
    assert whole.masks.shape == (4, 4, SIDE * SIDE)
    assert torch.equal(whole.target[1:], cut.target)
    assert not torch.allclose(whole.slots[1:], cut.slots, atol=1e-4), "later frames depend on the first"


def test_clips_and_frames_are_the_same_to_an_image_models_parts() -> None:
    model = pixel_model(predictor={"kind": "identity", "first_iterations": 3})
    clip = frames(2).unsqueeze(0)
    both, first = model(clip, Draws(0)), model(clip[:, 0], Draws(0))
    torch.testing.assert_close(both.masks[:, 0], first.masks)
    assert both.masks.shape == (1, 2, 4, SIDE * SIDE)
    with pytest.raises(ValueError, match="need a model with a predictor"):
        pixel_model()(clip, Draws(0))


@pytest.mark.parametrize("resolution", [8 * 3, 100, 8])
def test_a_resolution_that_the_decoder_cannot_reach_is_refused(resolution: int) -> None:
    with pytest.raises(UsageError, match=r"model.resolution"):
        load_config("pixel", None, [f"model.resolution={resolution}"])


def test_pixels_go_with_stored_frames() -> None:
    with pytest.raises(UsageError, match=r"data.tap = video"):
        load_config("pixel", None, ["data.tap=block12"])
