"""The whole model: normalise, project, find slots, decode (DINOSAUR, Seitzer et al., 2023, arXiv:2209.14860)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featcache.errors import UsageError
from slotlab.config.model import SlotAttentionConfig
from slotlab.config.schema import Config
from slotlab.models.base import Model, Output
from slotlab.models.decoders import DECODERS
from slotlab.models.decoders.base import Sizes
from slotlab.models.initializers import Learnt
from slotlab.models.layers import MLP
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.models.recurrence import Recurrence


class SlotModel(Model):
    """Slots of patch tokens, trained to reconstruct those tokens: of frames, or, with a predictor, of clips.

    Args:
        config: parts and sizes.
        normaliser: turns stored features into the tokens that slots are found in and those that are reconstructed.
        grid: rows and columns of patches.
        reconstructs: whether a loss uses the reconstruction.
        similarity: whether a loss uses the predicted similarity with the patches of a later frame.
    """

    def __init__(
        self,
        config: SlotAttentionConfig,
        normaliser: Normaliser,
        grid: tuple[int, int],
        *,
        reconstructs: bool = True,
        similarity: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.grid, self.slots = config, grid, config.slots
        dim, slot_dim, target = normaliser.dim, config.slot_dim, normaliser.target or normaliser
        self.normaliser = normaliser
        hidden = config.projection_hidden or dim
        width = dim if config.projection == "wide" else slot_dim
        # Two layers cured a collapse that one linear map caused; the linear map stays for comparison.
        self.project: nn.Module = (
            nn.Linear(dim, width)
            if config.projection == "linear"
            else MLP(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, width))
        )
        self.recur = Recurrence(config, width, grid)
        self.decode = DECODERS[config.decoder.kind](
            Sizes(slot_dim, grid, target.dim, reconstructs, similarity), config.decoder
        )

    @classmethod
    def of(cls, config: Config, normaliser: Normaliser, grid: tuple[int, int]) -> SlotModel:
        assert isinstance(config.model, SlotAttentionConfig)
        patches = grid[0] * grid[1]
        if config.model.initializer.startswith("kmeans") and config.model.slots > patches:
            raise UsageError(
                f"model.slots = {config.model.slots}: model.initializer = {config.model.initializer} needs a patch for "
                f"each, and a frame has {patches}; set fewer"
            )
        return cls(
            config.model,
            normaliser,
            grid,
            reconstructs=config.loss.reconstructs,
            similarity=config.loss.temporal_similarity > 0,
        )

    def forward(self, features: Float[Tensor, "B N D"] | Float[Tensor, "B T N D"], draws: Draws) -> Output:
        """The training pass on stored features of any float type: frames, or, with a predictor, clips.

        ``ValueError`` for clips without a predictor.
        """
        return self._pass(features, draws)

    def _pass(
        self, features: Float[Tensor, "B N D"] | Float[Tensor, "B T N D"], draws: Draws, there_and_back: bool = False
    ) -> Output:
        clips = features if features.ndim == 4 else features.unsqueeze(1)
        if clips.shape[1] > 1 and self.recur.predict is None:
            raise ValueError("clips of several frames need a model with a predictor")
        tokens, target = self.normaliser.both(clips)  # (B, T, N, D)
        attended = self.recur(self.project(tokens), tokens, draws, there_and_back)  # B * T frames from here on
        true = target.flatten(0, 1)
        decoded = self.decode(attended, true, draws)
        if self.recur.curriculum is not None and self.training:
            decoded_true = true if decoded.positions is None else true[:, decoded.positions]
            self.recur.curriculum.note(decoded.masks, decoded.reconstruction, decoded_true)
        lead = features.shape[:-2]  # (B,) or (B, T)
        similarity, active = decoded.similarity, attended.active
        return Output(
            slots=attended.slots.unflatten(0, lead),
            attention=attended.attention.unflatten(0, lead),
            logits=attended.logits.unflatten(0, lead),
            masks=decoded.masks.unflatten(0, lead),
            reconstruction=decoded.reconstruction.unflatten(0, lead),
            target=torch.unflatten(true, 0, lead),
            grid=self.grid,
            positions=decoded.positions,
            active=None if active is None else active.unflatten(0, lead),
            similarity=None if similarity is None else similarity.unflatten(0, lead),
        )

    def segment(self, features: Float[Tensor, "T N D"], draws: Draws) -> Output:
        """Slots and masks of all frames of one video; a predictor carries the slots from frame to frame."""
        if self.recur.predict is None:
            return super().segment(features, draws)
        return self._pass(features.unsqueeze(0), draws, self.config.there_and_back).sample(0)

    def grow(self, step: int, steps: int, draws: Draws, mean: Callable[[Tensor], Tensor]) -> bool:
        if self.recur.curriculum is None:
            return False
        assert isinstance(self.recur.initialize, Learnt)
        return self.recur.curriculum.grow(self.recur.initialize.queries, step, steps, draws, mean)

    def before_compiling(self) -> None:
        self.recur.before_compiling()
