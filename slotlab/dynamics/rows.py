"""What predictions are compared with: rows that learn nothing, and the oracle that sees the frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slotlab.models.dynamics.dense import DenseModel
from slotlab.models.dynamics.model import DynamicsModel
from slotlab.models.dynamics.motion import carried, layered, moved, widest
from slotlab.models.dynamics.state import FEATURE, PLACE, Seen


@dataclass(frozen=True)
class Predicted:
    """H frames to come; a part that a row does not predict is None."""

    features: Tensor  # (H, N, D), normalised
    masks: Tensor | None = None  # (H, K, N)
    places: Tensor | None = None  # (H, K, 2) from the frame's middle, in patches


@dataclass(frozen=True)
class Clip:
    """One video: frames that are seen, and frames to come, which the oracle alone may look at."""

    model: DynamicsModel
    seen: Seen  # all frames, a batch of one
    dense: Tensor  # (T, N, D) normalised features
    burn_in: int

    @classmethod
    def of(cls, model: DynamicsModel, tracks: Tensor, features: Tensor) -> Clip:
        """A clip of stored tracks (T, K, D + N) and features (T, N, D)."""
        seen = model.see(tracks.unsqueeze(0))
        return cls(model, seen, model.normaliser(features), model.config.burn_in)

    @property
    def steps(self) -> int:
        return len(self.dense) - self.burn_in

    @property
    def last(self) -> int:
        """The last seen frame."""
        return self.burn_in - 1

    @property
    def horizons(self) -> Tensor:
        """1 to H, (H, 1, 1)."""
        return torch.arange(1.0, self.steps + 1).view(-1, 1, 1)

    @property
    def vectors(self) -> Tensor:
        """(T, K, S)"""
        return self.seen.vectors[0]

    def spelt(self, coordinates: Tensor) -> Tensor:
        """Normalised features (..., D) of their coordinates (..., P)."""
        return coordinates @ self.model.basis.T

    @property
    def masks(self) -> Tensor:
        """(K, N), as each slot was last seen."""
        return self.seen.masks_of(self.last)[0]

    @property
    def velocity(self) -> Tensor:
        """(K, 2) patches a frame, of the last step that is seen."""
        return (self.vectors[self.last] - self.vectors[max(0, self.last - 1)])[:, PLACE]


@torch.no_grad()
def rollout(clip: Clip) -> Predicted:
    """The model."""
    future = clip.model.roll_out(clip.seen, clip.steps)
    pictures = clip.model.decode(clip.seen, future)
    features = clip.spelt(pictures.features) + clip.model.texture(clip.seen, future, clip.dense[clip.last])
    return Predicted(features[0], pictures.sharp[0], future[0, ..., PLACE])


def copy_slots(clip: Clip) -> Predicted:
    """The last slots, decoded."""
    return decoded(clip, clip.vectors[clip.last].expand(clip.steps, -1, -1))


def copy(clip: Clip) -> Predicted:
    """The last frame's features, masks and places."""
    places = clip.vectors[clip.last, :, PLACE].expand(clip.steps, -1, -1)
    masks = clip.seen.masks[0, clip.last].expand(clip.steps, -1, -1)
    return Predicted(clip.dense[clip.last].expand(clip.steps, -1, -1), masks, places)


def velocity_slots(clip: Clip) -> Predicted:
    """Slots that go on changing as they did in the last step, no feature growing beyond the largest one seen."""
    last, before = clip.vectors[clip.last], clip.vectors[max(0, clip.last - 1)]
    future = last + clip.horizons * (last - before)
    feature = future[..., FEATURE]
    most = clip.vectors[: clip.burn_in, :, FEATURE].norm(dim=-1).amax()
    feature = feature * (most / feature.norm(dim=-1, keepdim=True).clamp_min(1e-6)).clamp_max(1.0)
    return decoded(clip, torch.cat([future[..., : FEATURE.start], feature], -1))


def velocity_masks(clip: Clip) -> Predicted:
    """Masks shifted by the last step, their features with them, and holes filled with the background's feature."""
    behind = widest(clip.masks)
    shift = (clip.horizons * clip.velocity).masked_fill(behind[:, None], 0.0)
    still = torch.zeros_like(shift[..., 0])
    bare = moved(clip.masks.expand(clip.steps, -1, -1), shift, still, clip.model.grid)
    masks = layered(bare, behind.expand(clip.steps, -1))
    ground = int(behind.nonzero()[0])
    hidden = (1 - clip.masks[ground]).unsqueeze(-1)  # (N, 1): the share of each patch where others hid the background
    filled = masks[:, ground].unsqueeze(-1) * hidden * clip.spelt(clip.vectors[clip.last, ground, FEATURE])
    features = carried(clip.dense[clip.last], clip.masks, shift, still, clip.model.grid) + filled
    return Predicted(features, masks, clip.vectors[clip.last, :, PLACE] + shift)


def mean(clip: Clip) -> Predicted:
    """The training videos' mean at each patch."""
    return Predicted(torch.zeros(clip.steps, *clip.dense.shape[1:]))


def oracle(clip: Clip) -> Predicted:
    """The slots of the true frame, decoded with their true masks: what a perfect predictor of slots would reach."""
    masks, vectors = clip.seen.masks[0, clip.burn_in :], clip.vectors[clip.burn_in :]
    return Predicted(clip.spelt(masks.mT @ vectors[..., FEATURE]), masks, vectors[..., PLACE])


def decoded(clip: Clip, future: Tensor) -> Predicted:
    """Vectors (H, K, S) decoded as the model's are."""
    pictures = clip.model.decode(clip.seen, future.unsqueeze(0))
    return Predicted(clip.spelt(pictures.features[0]), pictures.sharp[0], future[..., PLACE])


def dense(model: DenseModel) -> tuple[str, Row]:
    """The row of a forecaster of patch tokens, from as many of the seen frames as it takes."""

    def predicted(clip: Clip) -> Predicted:
        seen = clip.dense[max(0, clip.burn_in - model.config.burn_in) : clip.burn_in]
        return Predicted(model.roll_out(seen.unsqueeze(0), clip.steps)[0])

    return "patch tokens, without slots", predicted


Row = Callable[[Clip], Predicted]
ROWS: dict[str, tuple[str, Row]] = {  # key -> title, and the row
    "rollout": ("rollout", rollout),
    "copy_slots": ("copy-last slots", copy_slots),
    "copy": ("copy-last features and masks", copy),
    "velocity_slots": ("constant velocity of slots", velocity_slots),
    "velocity_masks": ("constant velocity of masks", velocity_masks),
    "mean": ("mean feature at each place", mean),
    "oracle": ("oracle: the true frame's slots", oracle),
}
