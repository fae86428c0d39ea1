"""A trained model with the configuration and store it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from featcache.errors import FeatcacheError, UsageError
from featcache.store.reading import FeatureStore, Split
from slotlab.config.schema import Config
from slotlab.models.base import Model, Output
from slotlab.models.build import empty_model
from slotlab.models.inputs import ModelInput
from slotlab.models.randomness import Draws
from slotlab.runs import checkpoint
from slotlab.runs.folder import check_store, store_path


def evaluation_split(config: Config, store: FeatureStore, name: str | None = None) -> Split:
    """The split of this name; else the configuration's for evaluation, or where the store lacks that, its only one.

    ``UsageError`` where that is none.
    """
    known, chosen = store.splits, name or config.data.eval_split
    if name is None and chosen not in known and len(known) == 1:
        chosen = known[0]
    if chosen not in known:
        raise UsageError(f"{store.path}: no split {chosen!r}; choose one with --split: {', '.join(known)}")
    return store[chosen]


@dataclass(frozen=True)
class StoreModel:
    """A model with its configuration, on a store whose videos it segments."""

    config: Config
    store: FeatureStore
    inputs: ModelInput
    model: Model

    @property
    def tap(self) -> str:
        return self.inputs.tap

    def split(self, name: str | None = None) -> Split:
        """:func:`evaluation_split`. ``DataError`` for one that is not whole."""
        return evaluation_split(self.config, self.store, name).require_complete()

    def segment(self, split: Split, video: int) -> Output:
        """The model's output on all frames of one video, with the masks that the run publishes; always the same."""
        return self.segment_input(self.inputs.read(split, video), video)

    def segment_input(self, features: Tensor, video: int) -> Output:
        """The same for another input in the place of that video's: (T, N, D), or (T, H, W, 3) uint8."""
        return self.output(features, video).showing(self.config.published_masks)

    @torch.no_grad()
    def output(self, features: Tensor, video: int) -> Output:
        """The same with the decoder's masks, whichever the run publishes. ``DataError`` where they are not finite."""
        device = next(self.model.parameters()).device
        return self.model.segment(features.to(device), Draws.of_step(self.config.seed, video)).checked()


@dataclass(frozen=True)
class LoadedRun(StoreModel):
    """A trained model, from its run folder."""

    path: Path
    differs: tuple[str, ...] = ()  # from the version that made the run

    def training_split(self) -> Split | None:
        """What the run was trained on: in this store, or else in its own; None where neither has it, whole."""
        name = self.config.data.train_split
        if name in self.store.splits and self.store[name].complete:
            return self.store[name]
        try:
            own = FeatureStore.open(store_path(self.path))
            check_store(self.path, own)
            return own[name] if own[name].complete else None
        except FeatcacheError:  # gone, or another store in its place
            return None


def load_run(run: Path, cache: Path | None = None, device: torch.device | str = "cpu") -> LoadedRun:
    """Open a run folder; ``cache`` overrides the store that it was trained on."""
    config = checkpoint.load_run_config(run)
    store = FeatureStore.open(cache or store_path(run))
    check_store(run, store)
    inputs = ModelInput.of(config, store)
    model = empty_model(config, inputs)
    differs = checkpoint.load_model(run, model)
    return LoadedRun(config, store, inputs, model.to(device).eval(), run, tuple(differs))
