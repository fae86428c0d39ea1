"""From a configuration and a store to a model."""

from __future__ import annotations

import torch

from featcache.errors import UsageError
from featcache.store.reading import FeatureStore
from featcache.store.spec import TapSpec
from slotlab.config.model import ClusteringConfig, PixelConfig
from slotlab.config.schema import Config
from slotlab.models.base import Model
from slotlab.models.clustering.model import ClusteringModel
from slotlab.models.inputs import CALIBRATION_VIDEOS, model_moments, model_spec, thinned
from slotlab.models.normalise import Normaliser
from slotlab.models.pixel_model import PixelModel
from slotlab.models.slot_model import SlotModel

LASTING_VIDEOS = 64


def build_model(config: Config, store: FeatureStore) -> Model:
    """A fresh model, normalised by the statistics of this store's training split."""
    data = config.data
    normaliser = Normaliser.from_moments(data.normalize, model_moments(config, store), data.shrinkage, data.center)
    model = _assemble(config, normaliser, model_spec(config, store))
    if isinstance(model, ClusteringModel):
        split = store[data.train_split]
        tap = store.tap(data.tap)
        model.calibrate(torch.cat([thinned(split.tokens(tap, video)) for video in split.spread(CALIBRATION_VIDEOS)]))
        if model.config.lasting_threshold > 0:
            model.learn_lasting(split.tokens(tap, video) for video in split.spread(LASTING_VIDEOS))
    return model


def empty_model(config: Config, tap: TapSpec) -> Model:
    """The same model for a checkpoint to fill: what comes from a store is saved with the weights."""
    positions = tap.patches if config.data.center == "position" else 1
    return _assemble(config, Normaliser(config.data.normalize, tap.dim, positions), tap)


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
