"""From a configuration and a store to a model."""

from __future__ import annotations

import math

import torch

from featcache.errors import UsageError
from featcache.stats import Moments
from featcache.store import FeatureStore, Split, TapSpec
from featcache.stream import VIDEO
from slotlab.config import Config
from slotlab.models.base import Model
from slotlab.models.clustering_model import ClusteringModel
from slotlab.models.config import ClusteringConfig, PixelConfig
from slotlab.models.pixel_model import PixelModel, frame_tokens
from slotlab.models.slot_model import SlotModel
from slotlab.normalise import Normaliser

CALIBRATION_VIDEOS, CALIBRATION_FRAMES = 16, 64  # frames of each
LASTING_VIDEOS = 64


def build_model(config: Config, store: FeatureStore) -> Model:
    """A fresh model, normalised by the statistics of this store's training split."""
    data = config.data
    normaliser = Normaliser.from_moments(data.normalize, model_moments(config, store), data.shrinkage, data.center)
    model = _assemble(config, normaliser, model_spec(config, store))
    if isinstance(model, ClusteringModel):
        split = store[data.train_split]
        tap = store.tap(data.tap)
        model.calibrate(torch.cat([_thinned(split.tokens(tap, video)) for video in split.spread(CALIBRATION_VIDEOS)]))
        if model.config.lasting_threshold > 0:
            model.learn_lasting(split.tokens(tap, video) for video in split.spread(LASTING_VIDEOS))
    return model


def empty_model(config: Config, tap: TapSpec) -> Model:
    """The same model for a checkpoint to fill: what comes from a store is saved with the weights."""
    positions = tap.patches if config.data.center == "position" else 1
    return _assemble(config, Normaliser(config.data.normalize, tap.dim, positions), tap)


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


def _thinned(frames: torch.Tensor) -> torch.Tensor:
    """A few frames of a video; a copy, so that the others can be freed."""
    return frames[:: math.ceil(len(frames) / CALIBRATION_FRAMES)].clone()


def _assemble(config: Config, normaliser: Normaliser, tap: TapSpec) -> Model:
    if isinstance(config.model, ClusteringConfig):
        return ClusteringModel(config.model, normaliser, tap.grid)
    if isinstance(config.model, PixelConfig):
        return PixelModel(config.model, normaliser, tap.grid)
    if config.model.initializer.startswith("kmeans") and config.model.slots > tap.patches:
        raise UsageError(
            f"model.slots = {config.model.slots}: model.initializer = {config.model.initializer} needs a patch for "
            f"each, and a frame has {tap.patches}; set fewer"
        )
    loss = config.loss
    return SlotModel(
        config.model,
        normaliser,
        tap.grid,
        reconstructs=loss.reconstructs,
        similarity=loss.temporal_similarity > 0,
    )
