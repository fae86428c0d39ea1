"""What the trainer, the evaluation and the pictures know of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor, nn

from featcache.errors import DataError
from slotlab.config.model import Masks
from slotlab.config.schema import Config
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws


@dataclass(frozen=True)
class Output:
    """One forward pass. ``attention`` and ``masks`` sum to one over the slots at every patch.

    ``*B`` is (B,) for frames and (B, T) for clips. N patches were attended to, M of them decoded: all, unless the
    decoder is trained on the random subset ``positions``.
    """

    slots: Float[Tensor, "*B K S"]
    attention: Float[Tensor, "*B K N"]  # how the slots were formed
    logits: Float[Tensor, "*B K N"]  # before that softmax
    masks: Float[Tensor, "*B K M"]  # the decoder's
    reconstruction: Float[Tensor, "*B M D"]
    target: Float[Tensor, "*B N D"]  # what it should be: normalised features, or pixels
    grid: tuple[int, int]  # rows and columns of the N patches
    positions: Int[Tensor, M] | None = None  # None: all
    similarity: Float[Tensor, "*B M N"] | None = None  # logits of where each patch is in a later frame

    @property
    def decoded_target(self) -> Float[Tensor, "*B M D"]:
        """The target at the decoded positions."""
        return self.target if self.positions is None else self.target[..., self.positions, :]

    @property
    def masks_on_grid(self) -> Float[Tensor, "*B K rows columns"]:
        """The masks where they are in the frame, of all patches."""
        return self.masks.reshape(*self.masks.shape[:-1], *self.grid)

    def checked(self) -> Output:
        """Itself. ``DataError`` where masks are not finite."""
        if bool(self.masks.isfinite().all()) and bool(self.attention.isfinite().all()):
            return self
        raise DataError("the model's masks are not finite: it diverged; train again with a lower optim.learning_rate")

    def showing(self, masks: Masks) -> Output:
        """With these in the place of the decoder's masks."""
        return replace(self, masks=self.attention) if masks == "attention" else self

    def sample(self, index: int) -> Output:
        """One sample of the batch: its ``*B`` is () for frames, and (T,) for clips."""
        batched = ("slots", "attention", "logits", "masks", "reconstruction", "target")
        similarity = None if self.similarity is None else self.similarity[index]
        return replace(self, **{name: getattr(self, name)[index] for name in batched}, similarity=similarity)


class Model(nn.Module):
    """Slots of frames or clips.

    ``grid`` are the rows and columns of its masks, ``slots`` how many a frame has at most.
    """

    grid: tuple[int, int]
    slots: int

    @classmethod
    def of(cls, config: Config, normaliser: Normaliser, grid: tuple[int, int]) -> Model:
        """The model of a configuration. ``UsageError`` where its sizes do not go with the grid."""
        raise NotImplementedError

    def calibrate(self, videos: Iterable[Tensor]) -> None:
        """Measure what is neither learnt nor a statistic of the store, on stored features of some videos (F, ...) each.

        Most models have no such thing.
        """

    @classmethod
    def of_earlier_version(cls, tensors: dict[str, Tensor]) -> list[str]:
        """Take out of a checkpoint what this version has no use for; a sentence for each thing that differs by that."""
        return []

    def forward(self, features: Tensor, draws: Draws) -> Output:
        """As trained: stored frames (B, ...) or clips (B, T, ...) of any float type, or uint8 pixels."""
        raise NotImplementedError

    def segment(self, features: Tensor, draws: Draws) -> Output:
        """As used: all frames of one video in order, (T, ...); the output's ``*B`` is (T,).

        An image model takes the frames apart, as here; a video model carries its slots from frame to frame.
        """
        output: Output = self(features, draws)
        return output
