"""What a model reads from a store: a tap's tokens, or the stored frames. No other module of models reads splits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.moments import Moments
from featcache.store.reading import FeatureStore, Split
from featcache.store.spec import JOINT
from featcache.stream.stream import VIDEO
from slotlab.config.model import DynamicsConfig, PixelConfig
from slotlab.config.schema import Config
from slotlab.models.pixel_model import frame_tokens

TRACKS = "tracks"  # the tap of tracked slots

SAMPLE_VIDEOS, SAMPLE_FRAMES = 16, 64  # a model is calibrated on this many videos, and frames of each

FromFrames = Callable[[npt.NDArray[np.uint8]], Tensor]  # turns frames (T, H, W, 3) into a model's input


@dataclass(frozen=True)
class ModelInput(ABC):
    """The input of a model: its name in the store, the rows and columns of its grid, and the width of a token."""

    tap: str  # ``video`` for the stored frames
    grid: tuple[int, int]
    dim: int
    target: ModelInput | None = field(default=None, kw_only=True)  # what is reconstructed; None: the same

    @staticmethod
    def of(config: Config, store: FeatureStore) -> ModelInput:
        """The input of this configuration's model in the store. ``IncompatibleError`` if the store lacks its tap."""
        if isinstance(config.model, DynamicsConfig):
            return Tracks.in_store(store)
        if isinstance(config.model, PixelConfig):  # the configuration allows it with data.tap = video alone
            return Frames(VIDEO, (config.model.resolution, config.model.resolution), dim=3)
        target = None if config.data.target is None else Features.at(config.data.target, store)
        return replace(Features.at(config.data.tap, store), target=target)

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def stored(self) -> str:
        """What is read of a store: the tap, and that of the target, whose channels follow those of the tap."""
        return self.tap if self.target is None else f"{self.tap}{JOINT}{self.target.tap}"

    def settle(self, config: Config, split: Split) -> Config:
        """The configuration with its tap named, so that a store with more taps cannot change which one it means.

        A model that takes its frames from anywhere in a clip has clips no longer than the split's longest video: single
        images train it by the same configuration. A store for one of N ranks has N shares.
        """
        clip, shares = config.data.clip, config.data.shares
        if config.model.frames_a_step is not None:
            clip = min(clip, max(split.spec.lengths))
        if split.spec.part:
            ranks = split.spec.part[1]
            if shares not in (1, ranks):
                raise IncompatibleError(f"{split.path}: is for {ranks} ranks; leave out data.shares = {shares}")
            shares = ranks
        settled = {"tap": self.tap, "clip": clip, "shares": shares}
        return config.model_copy(update={"data": config.data.model_copy(update=settled)})

    def fitted(self, config: Config) -> Config:
        """The configuration of a model that reads such tokens."""
        return config

    def read(self, split: Split, video: int) -> Tensor:
        """One whole video, in the form that the stream gives: tokens (T, N, D), or frames (T, H, W, 3) uint8.

        ``DataError`` if tokens are not finite: no extraction stores such.
        """
        return finite_tokens(split, self.stored, video)

    @abstractmethod
    def tokens(self, split: Split, video: int) -> Float[Tensor, "T N D"]:
        """One whole video as float32 tokens on the grid, for k-means."""

    @abstractmethod
    def moments(self, split: Split) -> Moments:
        """Moments of a split's tokens."""

    @abstractmethod
    def from_frames(self, store: FeatureStore, weights: str | None, device: torch.device) -> FromFrames:
        """A function from frames (T, H, W, 3) uint8 to the model's input, computed as the store's own features were.

        ``weights`` and errors are those of :func:`featcache.extraction.store_backbone.store_backbone`.
        """

    def sample(self, split: Split) -> Iterator[Tensor]:
        """Frames (F, ...) of some videos, both spread evenly: the sample that a model is calibrated on."""
        for video in split.spread(SAMPLE_VIDEOS):
            frames = self.read(split, video)
            yield frames[:: math.ceil(len(frames) / SAMPLE_FRAMES)].clone()  # a copy, so that the rest can be freed


def finite_tokens(split: Split, tap: str, video: int) -> Tensor:
    """A video's tokens (T, N, D) as stored. ``DataError`` if they are not finite."""
    tokens = split.tokens(tap, video)
    if not bool(tokens.isfinite().all()):
        raise DataError(
            f"{split.path}: video {split.names[video]}, tap {tap}: features are not finite, the store is damaged; see "
            f"what can be repaired with slotlab verify {split.store.path}"
        )
    return tokens


class Features(ModelInput):
    """A tap's patch tokens."""

    @classmethod
    def at(cls, tap: str | None, store: FeatureStore) -> Features:
        """Those of a store's tap, None: its first. ``IncompatibleError`` if the store lacks it."""
        name = store.tap(tap)
        return cls(name, store.spec.taps[name].grid, store.spec.taps[name].dim)

    def tokens(self, split: Split, video: int) -> Float[Tensor, "T N D"]:
        return finite_tokens(split, self.tap, video).float()

    def moments(self, split: Split) -> Moments:
        return split.statistics(self.tap)

    def from_frames(self, store: FeatureStore, weights: str | None, device: torch.device) -> FromFrames:
        from featcache.extraction.store_backbone import token_maker  # backbones take seconds to import

        return token_maker(store, self.stored, weights, device)


@dataclass(frozen=True)
class Tracks(ModelInput):
    """The slots that a run followed through every video (``slotlab slots``): each one's mean feature, mask and place.

    ``grid`` and ``dim`` are those of the features that they are means of.
    """

    features: str  # the tap of these features
    slots: int
    actions: int = 0  # numbers of the action after the mask of each token
    refined: bool = False  # whether a place by the frame's edges stands at its end

    @classmethod
    def in_store(cls, store: FeatureStore) -> Tracks:
        """The tracks of a store. ``IncompatibleError`` if it has none."""
        if TRACKS not in store.spec.taps:
            raise IncompatibleError(
                f"{store.path}: has no tracks, which model.kind = dynamics predicts; make them with slotlab slots RUN, "
                "or name a run with --run (train) or a store of tracks with --tracks (rollout)"
            )
        of, model = store.spec.taps[TRACKS], store.spec.model
        grid = (model["grid"][0], model["grid"][1])
        actions, refined = model.get("actions", 0), model.get("refined", False)
        dim = of.dim - grid[0] * grid[1] - actions - (2 if refined else 0)
        return cls(TRACKS, grid, dim, model["tap"], of.patches, actions, refined)

    def masks(self, tokens: Float[Tensor, "*B K C"]) -> Float[Tensor, "*B K N"]:
        """The masks in stored tokens."""
        return tokens[..., self.dim : self.dim + self.patches].float()

    def actions_of(self, tokens: Float[Tensor, "T K C"]) -> Float[Tensor, "T A"]:
        """The actions in stored tokens."""
        start = self.dim + self.patches
        return tokens[:, 0, start : start + self.actions].float()

    def settle(self, config: Config, split: Split) -> Config:
        """The configuration with the tap named, the numbers of slots and of what an action has, and known places.

        ``UsageError`` if no video is long enough, or the configuration wants other actions than there are.
        """
        config, longest = super().settle(config, split), max(split.spec.lengths)
        assert isinstance(config.model, DynamicsConfig)
        wanted = config.model.actions
        if wanted not in (None, 0, self.actions):
            has = f"have {self.actions} numbers" if self.actions else "were stored without any"
            raise UsageError(
                f"{split.store.path}: its actions {has}, and model.actions = {wanted}; leave that out, or make the "
                "tracks with slotlab slots RUN --out NEW --actions FILE"
            )
        if config.data.clip > longest:
            seen = config.model.burn_in
            shorter = f"--set data.clip={longest} --set model.burn_in={min(seen, longest - 1)}"
            raise UsageError(
                f"{split.path}: the longest video has {longest} frames, and data.clip = {config.data.clip} "
                f"(model.burn_in = {seen} of them are seen); "
                + (f"train with {shorter}" if longest > 1 else "single images have no next frame, name a run on videos")
            )
        return self.fitted(config)

    def fitted(self, config: Config) -> Config:
        assert isinstance(config.model, DynamicsConfig)
        settled = {
            "slots": self.slots,
            "actions": self.actions if config.model.actions is None else config.model.actions,
            "refined": config.model.refined and self.refined,
        }
        return config.model_copy(update={"model": config.model.model_copy(update=settled)})

    def tokens(self, split: Split, video: int) -> Float[Tensor, "T N D"]:
        tokens = self.read(split, video).float()
        found: Tensor = self.masks(tokens).mT @ tokens[..., : self.dim]
        return found

    def sample(self, split: Split) -> Iterator[Tensor]:
        """The first frames of some videos, none left out: how far slots go from frame to frame is measured on them."""
        for video in split.spread(SAMPLE_VIDEOS):
            yield self.read(split, video)[:SAMPLE_FRAMES].clone()

    def moments(self, split: Split) -> Moments:
        return split.statistics(self.features)

    def from_frames(self, store: FeatureStore, weights: str | None, device: torch.device) -> FromFrames:
        raise UsageError(
            f"{store.path}: tracks come from a run, not from frames alone; name that run instead: {store.spec.source}"
        )


class Frames(ModelInput):
    """The stored frames, which the model resizes to its grid. A token is a cell's mean colour."""

    def read(self, split: Split, video: int) -> Tensor:
        return torch.from_numpy(split.video(video))

    def tokens(self, split: Split, video: int) -> Float[Tensor, "T N D"]:
        return frame_tokens(self.read(split, video), self.grid)

    def moments(self, split: Split) -> Moments:
        moments = Moments.empty(self.patches, self.dim)
        for video in split.spread(SAMPLE_VIDEOS):  # a store keeps no moments of its frames
            moments += Moments.from_tokens(self.tokens(split, video))
        return moments

    def from_frames(self, store: FeatureStore, weights: str | None, device: torch.device) -> FromFrames:
        return torch.from_numpy
