"""Slots that start from segments of learnt keys, as many as a frame has, trained by what stays the same.

One frame, in training and in use:

- **keys** (B, N, S): unit vectors; a linear map of the tokens' directions, which starts as their first S channels, plus
  a small MLP that starts at zero. So an untrained model is a training-free one. A share of the frame's mean token is
  taken from its tokens first: pictures of another kind than the training set's have it in common, and it says little of
  what differs within them;
- **segments** (:mod:`slotlab.models.segments`): average linkage of the keys' affinities, up to a cut. They say how many
  slots the frame has; no part of it is taken for the background;
- **slots** (B, K, S): the mean key of each segment, as a unit vector;
- **competition**: attention is the softmax over slots (Locatello et al., 2020, arXiv:2006.15055) of a mixture model's
  logits, by a slot's likeness and its share of a patch's surroundings::

      logit = slot . key / temperature + near_weight * log near

  where keys are evened out over 3 x 3 patches, and near is the part of the patches around, in a Gaussian of an eighth
  of the grid's side, that the segment holds. Patches on an edge, which look a little like both sides, so go to the side
  that surrounds them, and equal objects in two places stay apart.

Nothing that is learnt depends on the grid, and lengths are in sides of it: keys of 16 x 16 patches serve finer ones.

Training is swapped prediction (Caron et al., 2020, arXiv:2006.09882) of segments: the slots of one frame compete for
the patches of another frame of the clip, by their likeness alone, and that frame's own segments say which one should
have won: the one whose segment is the likeliest for theirs. The keys so learn what stays the same within an object and
over time, and what differs between objects. The segments are those of the keys as they are, without gradient; nothing
else is kept from step to step. A single image is best stored in views (:mod:`featcache.sources.views`): paired with
itself, it teaches its keys to tell apart what its segments happen to be.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from featcache.errors import DataError
from slotlab.config.model import AgglomerativeConfig
from slotlab.config.schema import Config
from slotlab.models.agglomerative.tracking import follow
from slotlab.models.base import Model, Output
from slotlab.models.flow import patch_positions
from slotlab.models.host import all_finite
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.models.segments import distances, segments, side, smoothed
from slotlab.models.unit import unit

NEVER = -1e4  # a cosine whose share is 0
LEAST = 1e-6  # what a logarithm is taken of, at least
TRAIN_TEMPERATURE = 0.1  # divisor of the cosines in training
NEAR = 1 / 8  # standard deviation of a patch's surroundings, in sides of the grid


class AgglomerativeModel(Model):
    """Slots from segments of learnt keys. Slot 0 of a frame by itself is its largest segment, and nothing more.

    Args:
        config: sizes; a frame of more than ``config.slots`` segments is cut higher.
        normaliser: gives channels ordered by importance, as ``whiten=K`` does, so that the first ones are good keys.
        grid: rows and columns of patches.
    """

    def __init__(self, config: AgglomerativeConfig, normaliser: Normaliser, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.normaliser, self.grid, self.slots = config, normaliser, grid, config.slots
        self.line = nn.Linear(normaliser.dim, config.slot_dim, bias=False)
        nn.init.eye_(self.line.weight)
        self.bend = nn.Sequential(
            nn.Linear(normaliser.dim, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.slot_dim)
        )
        last = self.bend[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    @classmethod
    def of(cls, config: Config, normaliser: Normaliser, grid: tuple[int, int]) -> AgglomerativeModel:
        assert isinstance(config.model, AgglomerativeConfig)
        return cls(config.model, normaliser, grid)

    def forward(self, features: Float[Tensor, "B N D"] | Float[Tensor, "B T N D"], draws: Draws) -> Output:
        """The training pass: the slots of a clip's last frame compete for the patches of its first.

        The two frames are drawn before they are read (``AgglomerativeConfig.frames_a_step``).
        """
        clips = features if features.ndim == 4 else features.unsqueeze(1)
        pairs = clips[:, :: max(1, clips.shape[1] - 1)]  # (B, 2, N, D); of images (B, 1, N, D)
        tokens = self.normaliser(pairs)
        keys = self.keys(tokens.flatten(0, 1))
        held = self.segments(keys, self.config.train_cut)
        keys, held = (x.reshape(*pairs.shape[:3], -1) for x in (keys, held))  # (B, 2, N, S) and (B, 2, N, K)
        slots = slot_means(held[:, -1], keys[:, -1])
        logits = likeness(slots, keys[:, 0], held[:, -1]) / TRAIN_TEMPERATURE
        partners = likeness(slots, slot_means(held[:, 0], keys[:, 0]), held[:, -1]).argmax(1)  # (B, K)
        assigned = partners.gather(1, held[:, 0].argmax(-1))
        known = means(held[:, -1], tokens[:, -1])
        return self.output(tokens[:, 0], logits.softmax(1), logits, slots, known, assigned)

    def segment(self, features: Float[Tensor, "T N D"], draws: Draws) -> Output:
        """Slots and masks of all frames of a video in order; each slot stays with its object (:mod:`.tracking`)."""
        tokens = self.normaliser(features)
        keys = self.keys(tokens)
        logits = self.compete(keys)  # (T, K, N)
        if self.config.tracking:
            place = patch_positions(self.grid)
            attention = follow(keys.cpu(), logits.cpu(), place, self.config.prior_weight).to(keys.device)
        else:
            attention = logits.softmax(1)
        held = attention.mT
        logits = attention.clamp_min(LEAST).log()
        return self.output(tokens, attention, logits, slot_means(held, keys), means(held, tokens))

    def keys(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N S"]:
        """Unit keys of normalised tokens."""
        directions = self.directions(tokens)
        return unit((self.line(directions) + self.bend(directions)).float())

    def directions(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Unit vectors of what sets tokens apart from their frame's mean."""
        return unit(tokens - self.config.centre * tokens.mean(1, keepdim=True))

    def before_compiling(self) -> None:
        # Not a decorator: it would import torch's compiler, two seconds, wherever a model is imported.
        self.segments = torch.compiler.disable(self.segments)  # type: ignore[method-assign,no-untyped-call]

    @torch.no_grad()
    def segments(self, keys: Float[Tensor, "B N S"], cut: float) -> Float[Tensor, "B N K"]:
        """The segment of each patch, one-hot. ``DataError`` for keys that are not finite."""
        if not all_finite(keys):
            raise DataError(
                "the model's keys are not finite: the store holds NaN (slotlab verify), or the model diverged (train "
                "again with a lower optim.learning_rate)"
            )
        return F.one_hot(segments(keys, self.grid, cut, self.slots), self.slots).float()

    def compete(self, keys: Float[Tensor, "B N S"]) -> Float[Tensor, "B K N"]:
        """Logits of the slots that a frame's own segments give, by likeness and by what surrounds a patch."""
        held = self.segments(keys, self.config.cut)  # (B, N, K)
        smooth = unit(keys + smoothed(keys, self.grid))
        alike = likeness(slot_means(held, smooth), smooth, held)
        apart = distances(self.grid).to(keys.device) / (NEAR * side(self.grid))  # (N, N)
        around = (-apart.square() / 2).softmax(-1)
        near = (around @ held).mT.clamp_min(LEAST)  # (B, K, N)
        logits: Tensor = alike / self.config.temperature + self.config.near_weight * near.log()
        return logits

    def output(
        self,
        tokens: Float[Tensor, "B N D"],
        attention: Float[Tensor, "B K N"],
        logits: Float[Tensor, "B K N"],
        slots: Float[Tensor, "B K S"],
        known: Float[Tensor, "B K D"],
        assigned: Int[Tensor, "B N"] | None = None,
    ) -> Output:
        """The output, decoded by mixing what the slots know, the mean token of each, by their attention."""
        return Output(
            slots=slots,
            attention=attention,
            logits=logits,
            masks=attention,
            reconstruction=attention.mT @ known,
            target=tokens,
            grid=self.grid,
            assigned=assigned,
        )


def likeness(
    slots: Float[Tensor, "B K S"], keys: Float[Tensor, "B N S"], held: Float[Tensor, "B M K"]
) -> Float[Tensor, "B K N"]:
    """Cosines of slots and keys; far below any for a slot that holds none of its own frame's M patches."""
    return (slots @ keys.mT).masked_fill((held.sum(1) == 0).unsqueeze(-1), NEVER)


def means(held: Float[Tensor, "B N K"], values: Float[Tensor, "B N S"]) -> Float[Tensor, "B K S"]:
    """Mean of the values that each slot holds; 0 for a slot that holds nothing."""
    return held.mT @ values / held.sum(1).clamp_min(LEAST).unsqueeze(-1)


def slot_means(held: Float[Tensor, "B N K"], keys: Float[Tensor, "B N S"]) -> Float[Tensor, "B K S"]:
    """Mean direction of the keys that each slot holds; 0 for a slot that holds nothing."""
    return unit(held.mT @ keys)
