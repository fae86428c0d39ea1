"""What a model reads of a store: a tap's tokens or the stored frames, their grid, width and moments."""

from __future__ import annotations

import math

import torch

from featcache.moments import Moments
from featcache.store.reading import FeatureStore, Split
from featcache.store.spec import TapSpec
from featcache.stream.stream import VIDEO
from slotlab.config.model import PixelConfig
from slotlab.config.schema import Config
from slotlab.models.pixel_model import frame_tokens

CALIBRATION_VIDEOS, CALIBRATION_FRAMES = 16, 64  # frames of each


def model_tap(config: Config, store: FeatureStore) -> str:
    """What of a store the model reads: a tap's name, or ``video`` for the stored frames."""
    return config.data.tap if config.data.tap == VIDEO else store.tap(config.data.tap)


def settled(config: Config, store: FeatureStore) -> Config:
    """With the tap named, so that another store with more taps cannot mean another one."""
    return config.model_copy(update={"data": config.data.model_copy(update={"tap": model_tap(config, store)})})


def model_input(config: Config, split: Split, video: int) -> torch.Tensor:
    """All that the model reads of one video, as the stream would give it: (T, N, D), or (T, H, W, 3) uint8."""
    tap = model_tap(config, split.store)
    return torch.from_numpy(split.video(video)) if tap == VIDEO else split.tokens(tap, video)


def model_spec(config: Config, store: FeatureStore) -> TapSpec:
    """Grid and width of what the model reads; frames are read at the model's resolution."""
    if isinstance(config.model, PixelConfig):
        return TapSpec((config.model.resolution, config.model.resolution), dim=3)
    return store.spec.taps[model_tap(config, store)]


def model_tokens(config: Config, split: Split, video: int) -> torch.Tensor:
    """The same on the model's grid, float (T, N, D): what there is to cluster. Of frames, the mean colours."""
    features = model_input(config, split, video)
    grid = model_spec(config, split.store).grid
    return frame_tokens(features, grid) if isinstance(config.model, PixelConfig) else features.float()


def model_moments(config: Config, store: FeatureStore) -> Moments:
    """Moments of the training split: as stored for features, of the colours of some videos for frames."""
    split, spec = store[config.data.train_split], model_spec(config, store)
    if not isinstance(config.model, PixelConfig):
        return split.statistics(model_tap(config, store))
    moments = Moments.empty(spec.patches, spec.dim)
    for video in split.spread(CALIBRATION_VIDEOS):
        moments += Moments.from_tokens(model_tokens(config, split, video))
    return moments


def thinned(frames: torch.Tensor) -> torch.Tensor:
    """A few frames of a video; a copy, so that the others can be freed."""
    return frames[:: math.ceil(len(frames) / CALIBRATION_FRAMES)].clone()
