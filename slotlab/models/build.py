"""From a configuration and a store to a model."""

from __future__ import annotations

import torch

from featcache.errors import UsageError
from featcache.store.reading import FeatureStore
from slotlab.config.model import ClusteringConfig, PixelConfig
from slotlab.config.schema import Config
from slotlab.models.base import Model
from slotlab.models.clustering.model import ClusteringModel
from slotlab.models.inputs import ModelInput
from slotlab.models.normalise import Normaliser
from slotlab.models.pixel_model import PixelModel
from slotlab.models.slot_model import SlotModel

LASTING_VIDEOS = 64


def build_model(config: Config, store: FeatureStore) -> Model:
    """A fresh model, normalised by the statistics of this store's training split."""
    data, inputs, split = config.data, ModelInput.of(config, store), store[config.data.train_split]
    normaliser = Normaliser.from_moments(data.normalize, inputs.moments(split), data.shrinkage, data.center)
    model = _assemble(config, normaliser, inputs)
    if isinstance(model, ClusteringModel):
        model.calibrate(torch.cat(list(inputs.sample(split))))
        if model.config.lasting_threshold > 0:
            model.learn_lasting(inputs.read(split, video) for video in split.spread(LASTING_VIDEOS))
    return model


def empty_model(config: Config, inputs: ModelInput) -> Model:
    """The same model for a checkpoint to fill: what comes from a store is saved with the weights."""
    positions = inputs.patches if config.data.center == "position" else 1
    return _assemble(config, Normaliser(config.data.normalize, inputs.dim, positions), inputs)


def _assemble(config: Config, normaliser: Normaliser, inputs: ModelInput) -> Model:
    if isinstance(config.model, ClusteringConfig):
        return ClusteringModel(config.model, normaliser, inputs.grid)
    if isinstance(config.model, PixelConfig):
        return PixelModel(config.model, normaliser, inputs.grid)
    if config.model.initializer.startswith("kmeans") and config.model.slots > inputs.patches:
        raise UsageError(
            f"model.slots = {config.model.slots}: model.initializer = {config.model.initializer} needs a patch for "
            f"each, and a frame has {inputs.patches}; set fewer"
        )
    loss = config.loss
    return SlotModel(
        config.model,
        normaliser,
        inputs.grid,
        reconstructs=loss.reconstructs,
        similarity=loss.temporal_similarity > 0,
    )
