"""What a model reads of a store, in both kinds: the tokens of a tap, and the stored frames."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from featcache.errors import IncompatibleError
from featcache.moments import Moments
from featcache.store.reading import FeatureStore
from featcache.stream.stream import FeatureStream
from slotlab.config.load import load_config
from slotlab.models.inputs import ModelInput

FEATURES, FRAMES = load_config("dinosaur"), load_config("pixel", None, ["model.resolution=16", "model.broadcast=4"])


def test_features_are_a_tap_s_tokens_and_frames_the_model_s_own_grid(store: FeatureStore) -> None:
    features, frames = ModelInput.of(FEATURES, store), ModelInput.of(FRAMES, store)
    assert (features.tap, features.grid, features.dim, features.patches) == ("block1", (4, 4), 12, 16)
    assert (frames.tap, frames.grid, frames.dim, frames.patches) == ("video", (16, 16), 3, 256)
    settled = features.settle(FEATURES, store["train"])
    assert settled.data.tap == "block1", "another store with more taps cannot mean another one"
    with pytest.raises(IncompatibleError, match=r"no tap 'block7'; it has: block1"):
        ModelInput.of(load_config("dinosaur", None, ["data.tap=block7"]), store)


@pytest.mark.parametrize(("preset", "clip"), [("objects", 4), ("videosaur", 9)])
def test_clips_of_a_model_of_pairs_are_no_longer_than_the_videos(store: FeatureStore, preset: str, clip: int) -> None:
    config = load_config(preset, None, ["data.clip=9"])
    assert ModelInput.of(config, store).settle(config, store["train"]).data.clip == clip


@pytest.mark.parametrize("config", [FEATURES, FRAMES], ids=["features", "frames"])
def test_a_video_is_read_as_the_stream_gives_it(store: FeatureStore, config: object) -> None:
    inputs, split = ModelInput.of(config, store), store["train"]  # type: ignore[arg-type]
    stream = FeatureStream(split, inputs.tap, batch_size=4)
    for batch in itertools.islice(stream, 4):
        for sample, row in zip(batch.features, batch.rows, strict=True):
            video = next(v for v in split.videos if split.rows(v).start <= row < split.rows(v).stop)
            assert torch.equal(sample, inputs.read(split, video)[row - split.rows(video).start])


def test_moments_are_those_of_the_tokens(store: FeatureStore) -> None:
    split = store["train"]
    for config in (FEATURES, FRAMES):
        inputs = ModelInput.of(config, store)
        tokens = [inputs.tokens(split, video) for video in split.videos]
        assert all(video.dtype == torch.float32 and video.shape[1:] == (inputs.patches, inputs.dim) for video in tokens)
        found, expected = (
            inputs.moments(split),
            sum(map(Moments.from_tokens, tokens), Moments.empty(*tokens[0].shape[1:])),
        )
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-5, atol=1e-9)


def test_a_sample_is_spread_over_the_split(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, split = ModelInput.of(FEATURES, store), store["train"]
    monkeypatch.setattr("slotlab.models.inputs.SAMPLE_FRAMES", 2)
    for video, frames in zip(split.videos, inputs.sample(split), strict=True):
        whole = inputs.read(split, video)
        assert len(frames) <= 2 and torch.equal(frames[0], whole[0])
        assert frames.untyped_storage().nbytes() == frames.nbytes, "the other frames can be freed"
