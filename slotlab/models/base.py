"""The interface of every model: what the trainer, the evaluation and the pictures use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from featcache.errors import DataError
from featcache.moments import Moments
from slotlab.config.model import Masks
from slotlab.config.schema import Config
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws


@dataclass(frozen=True)
class Output:
    """The result of one forward pass. ``attention`` and ``masks`` sum to one over the slots at every patch.

    ``*B`` is (B,) for frames and (B, T) for clips. Slots attend to N patches, and M of them are decoded: all, unless
    the decoder is trained on the random subset ``positions``.
    """

    slots: Float[Tensor, "*B K S"]
    attention: Float[Tensor, "*B K N"]  # how the slots were formed
    logits: Float[Tensor, "*B K N"]  # the attention before its softmax over slots
    masks: Float[Tensor, "*B K M"]  # the decoder's, or the attention (see ``showing``)
    reconstruction: Float[Tensor, "*B M D"]
    target: Float[Tensor, "*B N D"]  # what to reconstruct: normalised features, or pixels
    grid: tuple[int, int]  # rows and columns of the N patches
    positions: Int[Tensor, M] | None = None  # (M,) indices of decoded patches; None: all
    similarity: Float[Tensor, "*B M N"] | None = None  # logits over the patches of a later frame
    active: Bool[Tensor, "*B K"] | None = None  # slots that take part; the others have no mask; None: all
    assigned: Int[Tensor, "*B N"] | None = None  # the slot that each patch should go to
    future: Float[Tensor, "*B K S"] | None = None  # of predicted slots: what they should have been
    present: Bool[Tensor, "*B K"] | None = None  # which of these there were to be seen

    @property
    def decoded_target(self) -> Float[Tensor, "*B M D"]:
        """The target at the decoded positions."""
        return self.target if self.positions is None else self.target[..., self.positions, :]

    @property
    def masks_on_grid(self) -> Float[Tensor, "*B K rows columns"]:
        """The masks on the grid of patches. All patches must have been decoded."""
        return self.masks.reshape(*self.masks.shape[:-1], *self.grid)

    def checked(self) -> Output:
        """Return this output unchanged. ``DataError`` if its masks are not finite."""
        if bool(self.masks.isfinite().all()) and bool(self.attention.isfinite().all()):
            return self
        raise DataError("the model's masks are not finite: it diverged; train again with a lower optim.learning_rate")

    def showing(self, masks: Masks) -> Output:
        """This output with the given kind of masks as its ``masks``."""
        return replace(self, masks=self.attention) if masks == "attention" else self

    def sample(self, index: int) -> Output:
        """Sample ``index`` of the batch; its ``*B`` is () for frames, and (T,) for clips."""
        batched: tuple[str, ...] = ("slots", "attention", "logits", "masks", "reconstruction", "target")
        batched += tuple(
            name
            for name in ("similarity", "active", "assigned", "future", "present")
            if getattr(self, name) is not None
        )
        return replace(self, **{name: getattr(self, name)[index] for name in batched})


class Model(nn.Module):
    """A model that finds slots in frames or clips.

    ``grid`` is the number of rows and columns of its masks, ``slots`` the most slots of a frame.
    """

    grid: tuple[int, int]
    slots: int

    @classmethod
    def of(cls, config: Config, normaliser: Normaliser, grid: tuple[int, int]) -> Model:
        """A fresh model by the configuration. ``UsageError`` if its sizes do not fit the grid."""
        raise NotImplementedError

    def take(self, moments: Moments) -> None:
        """Take constants from the moments of the features, beside those of the normaliser. Most models have none."""

    def calibrate(self, videos: Iterable[Tensor]) -> None:
        """Measure constants that are neither learnt nor statistics of the store, on the input (F, ...) of some videos.

        Most models have none, and do nothing here.
        """

    def of_earlier_version(self, tensors: dict[str, Tensor]) -> list[str]:
        """Make a checkpoint's tensors those of this version; return a sentence for each change of result."""
        return []

    def grow(self, step: int, steps: int, draws: Draws, mean: Callable[[Tensor], Tensor]) -> bool:
        """Change what changes after this step of training, of ``steps``; whether anything did. Most models stay.

        ``mean`` averages a tensor over the ranks, all of which draw alike.
        """
        return False

    def before_compiling(self) -> None:
        """Keep out of torch.compile's graphs what computes on the host. Most models have nothing of it."""

    def forward(self, features: Tensor, draws: Draws) -> Output:
        """The training pass on frames (B, ...) or clips (B, T, ...): features of any float type, or uint8 pixels."""
        raise NotImplementedError

    def segment(self, features: Tensor, draws: Draws) -> Output:
        """Slots and masks of all frames of one video in order, (T, ...); the output's ``*B`` is (T,).

        An image model treats each frame alone, as here; a video model carries its slots from frame to frame.
        """
        output: Output = self(features, draws)
        return output
