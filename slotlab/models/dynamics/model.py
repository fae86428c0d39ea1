"""A world model on slots: from the slots of the last frames to those of the next, again and again.

A residual transformer over the slots of the last ``burn_in`` frames (SlotFormer, Wu et al., 2023, arXiv:2210.05861),
with a code of time alone, so that the order of the slots does not matter. Its own predictions are fed back. Beside a
slot's vector (:mod:`.state`) it reads the slot's velocity and acceleration (OCK, Song et al., 2024, arXiv:2404.18423),
and what it predicts is the change of the velocity: untrained, it moves every slot on at constant speed.

A predicted slot is decoded by what was last seen of it: its mask, shifted to the predicted place and spread by how far
off that may be; its feature, at every patch that the mask covers. What no
object covers is the background (:func:`slotlab.models.dynamics.motion.layered`). Nothing in this decoder is learnt, so
it is frozen; through it, errors of features teach where objects will be, and to spread a mask whose place is not known.

Masks of attention are the moved ones without the spread; those of the decoder are with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from featcache.errors import DataError
from featcache.moments import Moments
from slotlab.config.model import DynamicsConfig
from slotlab.config.schema import Config
from slotlab.models.base import Model, Output
from slotlab.models.dynamics.blocks import BLOCKS, time_code
from slotlab.models.dynamics.motion import carried, layered, moved, on_grid, widest
from slotlab.models.dynamics.state import DOUBT, FEATURE, PARTS, PLACE, SIDE, Seen, places, see
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws

LEAST_MASK = 1e-6  # of a logit
LEAST_STRAY = 0.05  # patches, about how well a place is known


class Pictures(NamedTuple):
    """Decoded slots of H frames."""

    masks: Float[Tensor, "B H K N"]  # spread
    sharp: Float[Tensor, "B H K N"]
    features: Float[Tensor, "B H N P"]  # coordinates in the basis


class Moves(NamedTuple):
    """How masks move, in patches."""

    shift: Float[Tensor, "B H K 2"]
    spread: Float[Tensor, "B H K"]


class DynamicsModel(Model):
    """Predicts tracked slots.

    Args:
        config: sizes. Any number of slots is predicted.
        normaliser: of the features that the slots are means of.
        grid: rows and columns of the slots' masks.
        steps: predicted frames of a training clip.
    """

    place: Tensor  # (N, 2)
    basis: Tensor  # (D, P) orthonormal
    mean: Tensor  # (S,) of a vector's parts
    scale: Tensor  # (S,) standard deviation of them; one number for all channels of the feature
    balance: Tensor  # (S,) factors by which place, side and feature weigh alike
    stray: Tensor  # (H,) patches; how far slots are from where constant speed takes them in 1 to H frames, median
    persistence: Tensor  # (D,) correlation of a patch's feature with that of the frame before
    time: Tensor  # (L, 1, W)
    push_mean: Tensor  # (A,) of actions
    push_scale: Tensor  # (A,)

    def __init__(self, config: DynamicsConfig, normaliser: Normaliser, grid: tuple[int, int], steps: int = 1) -> None:
        super().__init__()
        self.config, self.normaliser, self.grid, self.slots = config, normaliser, grid, config.slots
        width, channels = config.width, min(config.channels, normaliser.dim)
        size = PARTS + channels
        self.register_buffer("place", places(grid))
        self.register_buffer("basis", torch.eye(normaliser.dim, channels))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        balance = torch.tensor([1 / 2, 1 / 2, 1, 0] + [1 / channels] * channels) * size / 3
        self.register_buffer("balance", balance.sqrt(), persistent=False)
        self.register_buffer("stray", torch.ones(steps))  # of losses alone
        self.register_buffer("persistence", torch.zeros(normaliser.dim))
        self.register_buffer("time", time_code(config.burn_in, width))
        self.embed = nn.Linear(size + (4 if config.kinematics else 0), width)
        self.actions = config.actions or 0
        if self.actions:
            self.register_buffer("push_mean", torch.zeros(self.actions))
            self.register_buffer("push_scale", torch.ones(self.actions))
            self.push = nn.Linear(self.actions, width, bias=False)
        self.hidden = nn.Parameter(torch.zeros(width)) if config.masked_slots else None
        block = BLOCKS[config.attention]
        self.blocks = nn.ModuleList(block(width, config.heads, 2 * width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.change = nn.Linear(width, size)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    @classmethod
    def of(cls, config: Config, normaliser: Normaliser, grid: tuple[int, int]) -> DynamicsModel:
        assert isinstance(config.model, DynamicsConfig)
        return cls(config.model, normaliser, grid, config.data.clip - config.model.burn_in)

    def take(self, moments: Moments) -> None:
        """The directions of most variance, and how long features last: the correlation of a patch's with those of the
        frame before, by channel."""
        weight = self.normaliser.weight.double().cpu().numpy()
        _, directions = np.linalg.eigh(moments.position_covariance * weight * weight[:, None])  # ascending
        self.basis.copy_(torch.from_numpy(directions[:, ::-1][:, : self.basis.shape[1]].copy()))
        motion, variance = (np.diag(x) for x in (moments.motion_covariance, moments.position_covariance))
        kept = 1 - motion / np.maximum(2 * variance, np.finfo(float).tiny)
        self.persistence.copy_(torch.from_numpy(kept.clip(0, 1)))

    @torch.no_grad()
    def calibrate(self, videos: Iterable[Float[Tensor, "T K C"]]) -> None:
        """Measure the scale of a vector's parts, over slots that hold something. ``DataError`` if none does."""
        seen = [self.see(tokens.unsqueeze(0)) for tokens in videos]
        vectors = torch.cat([of.vectors[of.active] for of in seen])
        if self.actions:
            actions = torch.cat([of.actions.flatten(0, 1) for of in seen])
            self.push_mean.copy_(actions.mean(0))
            self.push_scale.copy_(actions.std(0, correction=0).clamp_min(1e-6))
        if not len(vectors) or not bool(vectors.isfinite().all()):
            raise DataError("the tracks hold no finite slots; make them again with slotlab slots RUN")
        self.mean[SIDE] = vectors[:, SIDE].mean()
        self.scale[PLACE] = vectors[:, PLACE].square().mean().sqrt()
        self.scale[SIDE] = vectors[:, SIDE].std(correction=0).clamp_min(1e-3)
        self.scale[FEATURE] = vectors[:, FEATURE].square().mean().sqrt()
        self.stray.fill_(self.scale[0])  # where no slot is active for so long
        for ahead in range(1, len(self.stray) + 1):
            if len(strays := torch.cat([of.strays(ahead) for of in seen])):
                self.stray[ahead - 1] = strays.median().clamp_min(LEAST_STRAY)

    def of_earlier_version(self, tensors: dict[str, Tensor]) -> list[str]:
        if "stray" in tensors:
            return []
        tensors["stray"] = tensors["scale"][0].expand_as(self.stray).clone()
        return [
            "begun by a version that kept no units of places for loss.slot_mse; it goes on in those of the first "
            "version, their variance at every frame"
        ]

    def forward(self, features: Float[Tensor, "B T K C"], draws: Draws) -> Output:
        """The training pass on clips: the frames after the first ``burn_in`` are predicted. ``*B`` is (B, H)."""
        burn_in = self.config.burn_in
        seen = self.see(self._mirrored(features, draws))
        hidden = self._hidden(seen, draws)
        future = self.roll_out(seen, features.shape[1] - burn_in, hidden)
        known = seen.vectors[:, burn_in:]
        pictures = self.decode(seen, future, hidden)
        truth = seen.masks[:, burn_in:]
        return Output(
            slots=self.in_units(future) * self.near,
            attention=pictures.masks,
            logits=pictures.masks.clamp_min(LEAST_MASK).log(),
            masks=pictures.masks,
            reconstruction=pictures.features * self.share,
            target=truth.mT @ known[..., FEATURE] * self.share,
            grid=self.grid,
            future=self.in_units(known) * self.near,
            present=seen.active[:, burn_in:] & seen.active[:, :burn_in].any(1, keepdim=True),
        )

    def segment(self, features: Float[Tensor, "T K C"], draws: Draws) -> Output:
        """The first ``burn_in`` frames of a video as they were seen, and the others as predicted from them."""
        seen = self.see(features.unsqueeze(0))
        burn_in = min(self.config.burn_in, len(features))
        steps = len(features) - burn_in
        before, masks = seen.vectors[:, :burn_in], seen.masks[:, :burn_in]
        parts = [Pictures(masks, masks, masks.mT @ before[..., FEATURE])]
        vectors = [before]
        if steps:
            vectors.append(self.roll_out(seen, steps))
            parts.append(self.decode(seen, vectors[-1]))
        shown = Pictures(*(torch.cat(of, 1)[0] for of in zip(*parts, strict=True)))
        return Output(
            slots=self.in_units(torch.cat(vectors, 1))[0],
            attention=shown.sharp,
            logits=shown.sharp.clamp_min(LEAST_MASK).log(),
            masks=shown.masks,
            reconstruction=shown.features * self.share,
            target=seen.masks[0].mT @ seen.vectors[0, ..., FEATURE] * self.share,
            grid=self.grid,
        )

    def see(self, tokens: Float[Tensor, "B T K C"]) -> Seen:
        """Stored tokens as slots that were seen."""
        return see(tokens, self.normaliser, self.basis, self.place, self.actions, self.config.refined)

    @property
    def share(self) -> float:
        """Factor of coordinates by which their mean square is one over all D channels, the others being 0."""
        return float((self.basis.shape[1] / self.basis.shape[0]) ** 0.5)

    # -- prediction ------------------------------------------------------------------------------------

    def roll_out(self, seen: Seen, steps: int, hidden: Bool[Tensor, "B K"] | None = None) -> Float[Tensor, "B H K S"]:
        """The vectors of the ``steps`` frames after the first ``burn_in`` ones, each predicted from those before.

        Of slots that are ``hidden`` only the first frame is seen. Actions are known of all frames but the last.
        """
        burn_in = min(self.config.burn_in, seen.vectors.shape[1])
        past = seen.vectors[:, :burn_in]
        if hidden is not None:
            past = torch.where(hidden[:, None, :, None], past[:, :1], past)
        used = seen.active[:, :burn_in].any(1)
        found: list[Tensor] = []
        for ahead in range(steps):
            actions = seen.actions[:, ahead : ahead + burn_in] if self.actions else None
            found.append(self.step(past, used, hidden, actions))
            past = torch.cat([past[:, 1:], found[-1].unsqueeze(1)], 1)
        return torch.stack(found, 1)

    def step(
        self,
        past: Float[Tensor, "B L K S"],
        used: Bool[Tensor, "B K"],
        hidden: Bool[Tensor, "B K"] | None = None,
        actions: Float[Tensor, "B L A"] | None = None,
    ) -> Float[Tensor, "B K S"]:
        """The vectors of the next frame. The last of the actions leads to it."""
        speed = F.pad(past[:, 1:, :, PLACE] - past[:, :-1, :, PLACE], (0, 0, 0, 0, 1, 0))  # (B, L, K, 2)
        tokens = (past - self.mean) / self.scale
        if self.config.kinematics:
            push = F.pad(speed[:, 1:] - speed[:, :-1], (0, 0, 0, 0, 1, 0))
            tokens = torch.cat([tokens, speed, push], -1)
        tokens = self.embed(tokens) + self.time[-past.shape[1] :]
        if self.actions:
            assert actions is not None
            tokens = tokens + self.push((actions - self.push_mean) / self.push_scale).unsqueeze(2)
        if hidden is not None and self.hidden is not None:
            tokens = tokens + hidden[:, None, :, None] * self.hidden
        for block in self.blocks:
            tokens = block(tokens, used)
        change = self.change(self.norm(tokens[:, -1]))
        units = torch.cat([torch.ones_like(self.scale[:PARTS]), self.scale[FEATURE]])
        moved_on: Tensor = past[:, -1] + units * change
        if not self.config.kinematics:
            return moved_on
        return moved_on + F.pad(speed[:, -1], (0, past.shape[-1] - 2))

    # -- decoding --------------------------------------------------------------------------------------

    def decode(
        self, seen: Seen, future: Float[Tensor, "B H K S"], hidden: Bool[Tensor, "B K"] | None = None
    ) -> Pictures:
        """The pictures of predicted vectors, from what was last seen of each slot in the first ``burn_in`` frames."""
        masks, moves = self._moves(seen, future, hidden)
        behind = widest(masks).unsqueeze(1).expand(future.shape[:3])
        masks = masks.unsqueeze(1).expand(*future.shape[:3], -1)
        spread = layered(moved(masks, *moves, self.grid), behind)
        sharp = spread
        if not self.training:
            sharp = layered(moved(masks, moves.shift, torch.zeros_like(moves.spread), self.grid), behind)
        return Pictures(spread, sharp, spread.mT @ future[..., FEATURE])

    def texture(
        self, seen: Seen, future: Float[Tensor, "1 H K S"], dense: Float[Tensor, "N D"]
    ) -> Float[Tensor, "1 H N D"]:
        """What slots do not say of the last seen frame's normalised features, carried along by them, for one video.

        It fades as the features of all patches do from frame to frame, by the store's statistics.
        """
        masks, moves = self._moves(seen, future)
        unsaid = dense - masks[0].T @ seen.vectors[0, self._last(seen), :, FEATURE] @ self.basis.T
        steps = torch.arange(1, future.shape[1] + 1, device=dense.device)
        fades = self.persistence ** steps[:, None, None]  # (H, 1, D)
        return (carried(unsaid, masks[0], moves.shift[0], moves.spread[0], self.grid) * fades).unsqueeze(0)

    def _moves(
        self, seen: Seen, future: Float[Tensor, "B H K S"], hidden: Bool[Tensor, "B K"] | None = None
    ) -> tuple[Float[Tensor, "B K N"], Moves]:
        """The masks that were last seen, and how they move to predicted vectors."""
        last = self._last(seen)
        masks, start = seen.masks_of(last), seen.vectors[:, last]
        if hidden is not None:
            masks = torch.where(hidden.unsqueeze(-1), seen.masks_of(0), masks)
            start = torch.where(hidden.unsqueeze(-1), seen.vectors[:, 0], start)
        shift = future[..., PLACE] - start.unsqueeze(1)[..., PLACE]
        return masks, Moves(shift, F.softplus(future[..., DOUBT]))

    def _last(self, seen: Seen) -> int:
        return min(self.config.burn_in, seen.vectors.shape[1]) - 1

    def in_units(self, vectors: Float[Tensor, "*B S"]) -> Float[Tensor, "*B S"]:
        """Vectors of mean square 1 to which place, side and feature contribute alike; doubt is left out."""
        return (vectors - self.mean) / self.scale * self.balance

    @property
    def near(self) -> Float[Tensor, "H 1 S"]:
        """Factors that put places of each predicted frame into units of how far off constant speed is by then.

        So the first frames, whose errors are small, count as much as the last ones.
        """
        factors = torch.ones(len(self.stray), 1, len(self.scale), device=self.stray.device)
        factors[..., PLACE] = self.scale[PLACE] / self.stray.view(-1, 1, 1)
        return factors

    # -- draws of training -----------------------------------------------------------------------------

    def _mirrored(self, tokens: Float[Tensor, "B T K C"], draws: Draws) -> Float[Tensor, "B T K C"]:
        """Half of the clips with their masks mirrored, left for right, in training: the world has no side."""
        if not self.training or not self.config.mirror or self.actions:  # nobody knows what an action is in a mirror
            return tokens
        dim, end = self.normaliser.dim, self.normaliser.dim + len(self.place)
        masks = on_grid(tokens[..., dim:end], self.grid).flip(-1).flatten(-2)
        rest = tokens[..., end:]
        if self.config.refined:
            rest = torch.cat([rest[..., :-1], -rest[..., -1:]], -1)  # columns from the middle
        turned = torch.cat([tokens[..., :dim], masks, rest], -1)
        chosen = draws.uniform((len(tokens), 1, 1, 1), tokens.device) < 0.5
        return torch.where(chosen, turned, tokens)

    def _hidden(self, seen: Seen, draws: Draws) -> Bool[Tensor, "B K"] | None:
        """Slots of each clip that training hides after its first frame (C-JEPA, 2026, arXiv:2602.11389)."""
        if not self.training or not self.config.masked_slots:
            return None
        order = draws.uniform(tuple(seen.active[:, 0].shape), seen.active.device)
        order = order.masked_fill(~seen.active[:, 0], 2.0)  # only what the first frame shows can be hidden
        return (order.argsort(1).argsort(1) < self.config.masked_slots) & seen.active[:, 0]
