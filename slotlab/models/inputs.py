"""What a model reads of a store: a tap's tokens, or the stored frames. The only room of models that reads splits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from featcache.moments import Moments
from featcache.store.reading import FeatureStore, Split
from featcache.stream.stream import VIDEO
from slotlab.config.model import PixelConfig
from slotlab.config.schema import Config
from slotlab.models.pixel_model import frame_tokens

SAMPLE_VIDEOS, SAMPLE_FRAMES = 16, 64  # that a model is measured on before training; frames of each

FromFrames = Callable[[npt.NDArray[np.uint8]], Tensor]  # frames (T, H, W, 3) to the model's input


@dataclass(frozen=True)
class ModelInput(ABC):
    """What a model reads: its name in the store, the rows and columns of its grid, and the width of a token."""

    tap: str  # or ``video``, the stored frames
    grid: tuple[int, int]
    dim: int

    @staticmethod
    def of(config: Config, store: FeatureStore) -> ModelInput:
        """What this configuration's model reads of this store. ``IncompatibleError`` where the store lacks the tap."""
        if isinstance(config.model, PixelConfig):  # which goes with data.tap = video, and only with it
            return Frames(VIDEO, (config.model.resolution, config.model.resolution), dim=3)
        tap = store.tap(config.data.tap)
        spec = store.spec.taps[tap]
        return Features(tap, spec.grid, spec.dim)

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def settle(self, config: Config) -> Config:
        """The configuration with the tap named, so that another store with more taps cannot mean another one."""
        return config.model_copy(update={"data": config.data.model_copy(update={"tap": self.tap})})

    @abstractmethod
    def read(self, split: Split, video: int) -> Tensor:
        """The whole of one video, as the stream would give it: (T, N, D), or (T, H, W, 3) uint8."""

    @abstractmethod
    def tokens(self, split: Split, video: int) -> Float[Tensor, "T N D"]:
        """The same on the grid, float32: what there is to cluster."""

    @abstractmethod
    def moments(self, split: Split) -> Moments:
        """Moments of the tokens of a split."""

    @abstractmethod
    def from_frames(self, store: FeatureStore, weights: str | None, device: torch.device) -> FromFrames:
        """Frames that are in no store to the model's input, just as the store's own were made.

        ``weights`` are as for :func:`featcache.extraction.store_backbone.store_backbone`, which says what is raised.
        """

    def sample(self, split: Split) -> Iterator[Tensor]:
        """Some frames of some videos, spread evenly over the split, as they are read: (F, ...) each."""
        for video in split.spread(SAMPLE_VIDEOS):
            frames = self.read(split, video)
            yield frames[:: math.ceil(len(frames) / SAMPLE_FRAMES)].clone()  # so that the others can be freed


class Features(ModelInput):
    """A tap's patch tokens."""

    def read(self, split: Split, video: int) -> Tensor:
        return split.tokens(self.tap, video)

    def tokens(self, split: Split, video: int) -> Float[Tensor, "T N D"]:
        return self.read(split, video).float()

    def moments(self, split: Split) -> Moments:
        return split.statistics(self.tap)

    def from_frames(self, store: FeatureStore, weights: str | None, device: torch.device) -> FromFrames:
        from featcache.extraction.store_backbone import token_maker  # backbones take seconds to import

        return token_maker(store, self.tap, weights, device)


class Frames(ModelInput):
    """The stored frames, which the model resizes to its grid. A token is a cell's mean colour."""

    def read(self, split: Split, video: int) -> Tensor:
        return torch.from_numpy(split.video(video))

    def tokens(self, split: Split, video: int) -> Float[Tensor, "T N D"]:
        return frame_tokens(self.read(split, video), self.grid)

    def moments(self, split: Split) -> Moments:
        moments = Moments.empty(self.patches, self.dim)
        for video in split.spread(SAMPLE_VIDEOS):  # a store has none of its frames
            moments += Moments.from_tokens(self.tokens(split, video))
        return moments

    def from_frames(self, store: FeatureStore, weights: str | None, device: torch.device) -> FromFrames:
        return torch.from_numpy
