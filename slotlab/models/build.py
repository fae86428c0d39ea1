"""Builds a model from a configuration and a store."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from featcache.errors import IncompatibleError
from featcache.moments import Moments
from featcache.store.reading import FeatureStore, Split
from slotlab.config.schema import Config
from slotlab.models.agglomerative.model import AgglomerativeModel
from slotlab.models.base import Model
from slotlab.models.clustering.model import ClusteringModel
from slotlab.models.dynamics.dense import DenseModel
from slotlab.models.dynamics.model import DynamicsModel
from slotlab.models.inputs import ModelInput
from slotlab.models.normalise import Normaliser
from slotlab.models.pixel_model import PixelModel
from slotlab.models.slot_model import SlotModel

MODELS: dict[str, type[Model]] = {  # by model.kind
    "slot_attention": SlotModel,
    "clustering": ClusteringModel,
    "agglomerative": AgglomerativeModel,
    "pixel": PixelModel,
    "dynamics": DynamicsModel,
    "dense": DenseModel,
}


def build_model(config: Config, store: FeatureStore, directions: Mapping[str, Tensor] | None = None) -> Model:
    """A fresh model, normalised by the statistics of the store's training split and calibrated on a sample of it.

    ``directions`` are a normaliser's tensors, in place of those statistics; means of patch positions are always the
    store's. ``IncompatibleError`` if they do not fit or the store lacks the tap, ``UsageError`` if sizes do not.
    """
    inputs, split = ModelInput.of(config, store), store[config.data.train_split]
    moments = inputs.moments(split)
    if directions is None:
        normaliser = _measured(config, inputs, split, moments)
    else:
        normaliser = _empty(config, inputs)
        if config.data.center == "position":
            places = {"shift": moments}
            if inputs.target is not None:
                places["target.shift"] = inputs.target.moments(split)
            directions = {**directions, **{name: torch.from_numpy(of.position_mean) for name, of in places.items()}}
        try:
            normaliser.load_state_dict(directions)
        except RuntimeError as error:
            raise IncompatibleError(f"{store.path}: {str(error).splitlines()[-1].strip()}") from error
    model = MODELS[config.model.kind].of(config, normaliser, inputs.grid)
    model.take(moments)
    model.calibrate(inputs.sample(split))
    return model


def empty_model(config: Config, inputs: ModelInput) -> Model:
    """The model before a checkpoint is loaded into it: statistics of the store are saved with the weights."""
    return MODELS[config.model.kind].of(config, _empty(config, inputs), inputs.grid)


def _measured(config: Config, inputs: ModelInput, split: Split, moments: Moments) -> Normaliser:
    data = config.data
    normaliser = Normaliser.from_moments(data.normalize, moments, data.shrinkage, data.center)
    if inputs.target is not None:
        of_target = inputs.target.moments(split)
        normaliser.target = Normaliser.from_moments(data.normalize, of_target, data.shrinkage, data.center)
    return normaliser


def _empty(config: Config, inputs: ModelInput) -> Normaliser:
    positions = inputs.patches if config.data.center == "position" else 1
    normaliser = Normaliser(config.data.normalize, inputs.dim, positions)
    if inputs.target is not None:
        normaliser.target = Normaliser(config.data.normalize, inputs.target.dim, positions)
    return normaliser
