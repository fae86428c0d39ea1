"""From a configuration and a store to a model."""

from __future__ import annotations

import torch

from featcache.store import FeatureStore, Split, TapSpec
from slotlab.config import Config
from slotlab.models.base import Model
from slotlab.models.clustering_model import ClusteringModel
from slotlab.models.config import ClusteringConfig, SlotAttentionConfig
from slotlab.models.slot_model import SlotModel
from slotlab.normalise import Normaliser

CALIBRATION_VIDEOS = 16


def build_model(config: Config, store: FeatureStore) -> Model:
    """A fresh model, normalised by the statistics of this store's training split."""
    data = config.data
    tap, split = store.tap(data.tap), store[data.train_split]
    normaliser = Normaliser.from_moments(data.normalize, split.statistics(tap), data.shrinkage, data.center)
    model = _assemble(config, normaliser, store.spec.taps[tap])
    if isinstance(model, ClusteringModel):
        model.calibrate(_sample(split, tap))
    return model


def empty_model(config: Config, tap: TapSpec) -> Model:
    """The same model for a checkpoint to fill: what comes from a store is saved with the weights."""
    positions = tap.patches if config.data.center == "position" else 1
    return _assemble(config, Normaliser(config.data.normalize, tap.dim, positions), tap)


def _assemble(config: Config, normaliser: Normaliser, tap: TapSpec) -> Model:
    if isinstance(config.model, ClusteringConfig):
        return ClusteringModel(config.model, normaliser, tap.grid)
    assert isinstance(config.model, SlotAttentionConfig)
    return SlotModel(config.model, normaliser, tap.grid)


def _sample(split: Split, tap: str) -> torch.Tensor:
    """Tokens (F, N, D) of a few videos spread over the split."""
    videos = split.videos[:: max(1, len(split.videos) // CALIBRATION_VIDEOS)][:CALIBRATION_VIDEOS]
    return torch.cat([split.tokens(tap, video) for video in videos])
