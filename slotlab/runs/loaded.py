"""A trained model with its configuration and store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from featcache.errors import FeatcacheError, UsageError
from featcache.machine import exact_convolutions
from featcache.store.reading import FeatureStore, Split
from slotlab.config.schema import Config
from slotlab.models.base import Model, Output
from slotlab.models.build import empty_model
from slotlab.models.inputs import ModelInput
from slotlab.models.randomness import Draws
from slotlab.runs import checkpoint
from slotlab.runs.folder import check_store, store_path


def evaluation_split(
    config: Config, store: FeatureStore, name: str | None = None, *, or_training: bool = False
) -> Split:
    """The split ``name``; by default the configuration's evaluation split.

    A store that lacks the latter gives its only split besides the training split (DAVIS names it ``val``), or its only
    one; with ``or_training``, for looks and reports, at last the training split. ``UsageError`` if none of these is
    there.
    """
    data, known = config.data, store.splits
    chosen = name or data.scored(known)
    if name is None and chosen not in known:
        if len(known) == 1:
            chosen = known[0]
        elif or_training and data.train_split in known:
            chosen = data.train_split
    if chosen not in known:
        raise UsageError(f"{store.path}: no split {chosen!r}; choose one with --split: {', '.join(known)}")
    return store[chosen]


@dataclass(frozen=True)
class StoreModel:
    """A model with its configuration, and a store whose videos it segments."""

    config: Config
    store: FeatureStore
    inputs: ModelInput
    model: Model

    @property
    def tap(self) -> str:
        return self.inputs.tap

    def split(self, name: str | None = None) -> Split:
        """The split of :func:`evaluation_split`. ``DataError`` if it is incomplete."""
        return evaluation_split(self.config, self.store, name).require_complete()

    def segment(self, split: Split, video: int) -> Output:
        """The model's output on all frames of one video, with the masks that the run publishes. It is deterministic."""
        return self.segment_input(self.inputs.read(split, video), video)

    def segment_input(self, features: Tensor, video: int) -> Output:
        """The output of :meth:`segment` on another input for that video: (T, N, D), or (T, H, W, 3) uint8."""
        return self.output(features, video).showing(self.config.published_masks)

    @torch.no_grad()
    def output(self, features: Tensor, video: int) -> Output:
        """The output of :meth:`segment_input` with the decoder's masks always. ``DataError`` if they are not finite."""
        device = next(self.model.parameters()).device
        with exact_convolutions():
            return self.model.segment(features.to(device), Draws.of_step(self.config.seed, video)).checked()


@dataclass(frozen=True)
class LoadedRun(StoreModel):
    """A trained model, from its run folder."""

    path: Path
    differs: tuple[str, ...] = ()  # sentences on differences from the version that made the run

    def training_split(self) -> Split | None:
        """The run's training split, in this store or else in the run's own; None if neither has a complete one."""
        name = self.config.data.train_split
        if name in self.store.splits and self.store[name].complete:
            return self.store[name]
        try:
            own = FeatureStore.open(store_path(self.path))
            check_store(self.path, own)
            return own[name] if own[name].complete else None
        except FeatcacheError:  # gone, or replaced by another store
            return None


def load_run(run: Path, cache: Path | None = None, device: torch.device | str = "cpu") -> LoadedRun:
    """Open a run folder; ``cache`` replaces the store that it was trained on.

    ``DataError`` for a missing or damaged run or store, ``IncompatibleError`` for a store of other features.
    """
    config = checkpoint.load_run_config(run)
    store = FeatureStore.open(cache or store_path(run))
    check_store(run, store)
    inputs = ModelInput.of(config, store)
    model = empty_model(config, inputs)
    differs = checkpoint.load_model(run, model)
    return LoadedRun(config, store, inputs, model.to(device).eval(), run, tuple(differs))
