"""Slots as soft clusters of learnt keys, trained across time.

With slow, position-centred tokens (``data.normalize = "slow=128"``, ``data.center = "position"``; for still images,
principal components, ``whiten=128``) the background lies near the origin: a token's *norm* shows that there is an
object, and its *direction* which one. The model is built on that:

- **keys** (B, N, S): direction of the first S channels, smoothed over 3x3 patches, plus a learnt residual that
  starts at zero; each patch's position is added to them, so that two equal objects stay apart;
- **objectness** (B, N): a logistic function of the norm around Otsu's threshold (Otsu 1979), with a learnt
  residual; the rest is the background slot;
- **slots**: started from the tokens farthest from each other (Gonzalez 1985), as many as the frame needs, and refined
  by slot attention (Locatello et al., 2020, arXiv:2006.15055) in its k-means form: attention is the softmax over
  slots of the negative squared distance, and a slot is the weighted mean of its patches;
- **decoding** by mixing (see :class:`slotlab.models.decoders.mixing.MixDecoder`): the slots of one frame attend to and
  reconstruct another frame of the clip, so that a slot learns to hold what lasts. A single image is reconstructed from
  its own slots.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from featcache.machine import limited
from slotlab.config.model import ClusteringConfig, Logistic
from slotlab.config.schema import Config
from slotlab.models.base import Model, Output
from slotlab.models.clustering.tracking import SEED_OBJECTNESS, Tracker, slot_means
from slotlab.models.flow import patch_positions
from slotlab.models.layers import MLP
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.models.repeated import joined
from slotlab.models.unit import unit

GRADIENT_ITERATIONS = 3  # iterations that the gradient passes; earlier ones only move the slots into place
RESIDUAL_GAIN = 4.0  # factor of the learnt objectness, whose logits are large
NEVER = -1e4  # a logit whose softmax is 0
LEAST_NORM = 1e-2  # divisor of a key is at least this: the gradient of normalising grows with the inverse norm


class ClusteringModel(Model):
    """Soft clusters of learnt keys; slot 0 is the background.

    Args:
        config: sizes; ``config.slots`` counts the background.
        normaliser: gives channels ordered by importance, as ``slow=K`` and ``whiten=K`` do.
        grid: rows and columns of patches.
    """

    otsu: Tensor  # (), threshold of token norms
    target_scale: Tensor  # (), for targets of mean square 1
    position: Tensor  # (N, 2) in [-1, 1] along the shorter side

    def __init__(self, config: ClusteringConfig, normaliser: Normaliser, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.normaliser, self.grid, self.slots = config, normaliser, grid, config.slots
        self.keys = min(config.slot_dim, normaliser.dim)
        self.by_turns: bool | None = None  # frames through the encoder; None: what suits the device
        self.register_buffer("position", patch_positions(grid))
        self.register_buffer("otsu", torch.tensor(float(normaliser.dim) ** 0.5))
        self.register_buffer("target_scale", torch.ones(()))
        hidden = config.hidden
        self.embed = nn.Linear(normaliser.dim + 3, hidden)
        self.context = nn.Conv2d(hidden, hidden, 3, groups=hidden)
        self.residual = MLP(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, self.keys + 1))
        last = self.residual[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.decode = MLP(
            nn.Linear(self.keys + 3, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, self.keys),
        )

    @classmethod
    def of(cls, config: Config, normaliser: Normaliser, grid: tuple[int, int]) -> ClusteringModel:
        assert isinstance(config.model, ClusteringConfig)
        return cls(config.model, normaliser, grid)

    @torch.no_grad()
    def calibrate(self, videos: Iterable[Float[Tensor, "_ N D"]]) -> None:
        """Measure the objectness threshold and the scale of the target."""
        features = torch.cat(list(videos))
        self.otsu.copy_(otsu_threshold(self.normaliser(features).norm(dim=-1)))
        tokens = self.tokens(features)
        self.target_scale.copy_(self.target(tokens).square().mean().rsqrt())

    def of_earlier_version(self, tensors: dict[str, Tensor]) -> list[str]:
        weight = tensors.pop("lasting.weight", None)
        tensors.pop("lasting.bias", None)
        if weight is None or not bool(weight.any()):
            return []
        return ["made by a version that gave short-lived slots to the background; in this version they stay slots"]

    def forward(self, features: Float[Tensor, "B N D"] | Float[Tensor, "B T N D"], draws: Draws) -> Output:
        """The training pass on stored features of frames or clips: slots of the first frame reconstruct the last.

        The two frames are drawn before they are read (``ClusteringConfig.frames_a_step``).
        """
        frames = [features] if features.ndim == 3 else [features[:, 0], features[:, -1]]
        encoded = self._encoded(frames)
        _, first_keys, first_objectness = encoded[0]
        tokens, keys, objectness = encoded[-1]  # a frame alone is first and last
        slots, active = self.find_slots(first_keys, first_objectness)
        return self.output(tokens, slots, self.attend(keys, objectness, slots, active), 1 - objectness)

    def _encoded(self, frames: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """Tokens, keys and objectness of each: together, as few operations, or by turns, as a CPU's cache holds one."""
        by_turns = frames[0].device.type == "cpu" if self.by_turns is None else self.by_turns
        parts: list[tuple[Tensor, ...]] = []
        for some in frames if by_turns else [joined(frames)]:
            tokens = self.tokens(some)
            parts.append((tokens, *self.encode(tokens)))
        if by_turns:
            return parts
        return list(zip(*(torch.split(part, len(frames[0])) for part in parts[0]), strict=True))

    def segment(self, features: Float[Tensor, "T N D"], draws: Draws) -> Output:
        """Slots and masks of all frames of a video in order; each slot stays with its object (:mod:`.tracking`)."""
        tokens = self.tokens(features)
        keys, objectness = self.encode(tokens)
        if not self.config.tracking:
            slots, active = self.find_slots(keys, objectness)
            attention = self.attend(keys, objectness, slots, active)  # (T, N, K)
            return self.output(tokens, slots, attention, 1 - attention.sum(-1))
        tracker = Tracker.start(self.config, self.attend, self.position.cpu(), keys.shape[-1])
        carried, held = [], []
        with limited():  # one thread: hundreds of operations a frame, each on 256 tokens by 10 slots
            for frame in zip(tokens.cpu(), keys.cpu(), objectness.cpu(), strict=True):
                held.append(tracker.step(*frame))
                carried.append(tracker.slots)
        slots, attention = (torch.stack(frames).to(tokens.device) for frames in (carried, held))
        return self.output(tokens, slots, attention, 1 - attention.sum(-1))

    def tokens(self, features: Float[Tensor, "B N C"]) -> Float[Tensor, "B N D"]:
        """Normalised features of frames, moved so that the background is at the origin.

        In a nearly empty frame a ViT may displace all tokens together, along slow directions by several times the norm
        of an object, so that everything would look like an object. The background is estimated from the quarter of the
        patches nearest the origin; if its norm exceeds an object's threshold, all tokens are moved back by it.
        """
        tokens = self.normaliser(features)
        nearest = tokens.norm(dim=-1).topk(max(1, tokens.shape[1] // 4), largest=False).indices  # (B, N / 4)
        background = tokens.gather(1, nearest.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])).mean(1, keepdim=True)
        displaced = background.norm(dim=-1, keepdim=True) > self.config.objectness.threshold * self.otsu  # (B, 1, 1)
        return torch.where(displaced, tokens - background, tokens)

    def output(
        self,
        tokens: Float[Tensor, "B N D"],
        slots: Float[Tensor, "B K S"],
        attention: Float[Tensor, "B N K"],
        left: Float[Tensor, "B N"],
    ) -> Output:
        """The output for object slots and the background's slot, whose mask is ``left``."""
        background = left.unsqueeze(-1)  # (B, N, 1)
        masks = torch.cat([background, attention], -1).transpose(1, 2)  # (B, K, N)
        found = F.pad(slots[..., : self.keys], (0, 0, 1, 0))  # the background's key is the origin
        return Output(
            slots=found,
            attention=masks,
            logits=masks.clamp_min(1e-6).log(),
            masks=masks,
            reconstruction=self.reconstruct(attention, slots, background),
            target=self.target(tokens),
            grid=self.grid,
        )

    def target(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N S"]:
        """Targets of the reconstruction: the tokens' directions on objects, and 0 on the background."""
        direction = F.normalize(tokens[..., : self.keys], dim=-1)
        return (
            direction
            * self.objectness_logit(tokens, self.config.target_objectness).sigmoid().unsqueeze(-1)
            * self.target_scale
        )

    def encode(self, tokens: Float[Tensor, "B N D"]) -> tuple[Float[Tensor, "B N S"], Float[Tensor, "B N"]]:
        """Keys of normalised tokens, with their weighted position in the last two channels, and their objectness."""
        logit = self.objectness_logit(tokens, self.config.objectness)
        position = self.position.expand(len(tokens), -1, -1)
        hidden = F.relu(self.embed(torch.cat([tokens, logit.unsqueeze(-1) / RESIDUAL_GAIN, position], -1)))
        hidden = hidden + self.context(self._bordered_map(hidden)).flatten(2).transpose(1, 2)
        residual = self.residual(hidden)  # (B, N, S + 1)
        leading = tokens[..., : self.keys]
        smooth = F.avg_pool2d(self._bordered_map(leading), 3, stride=1)
        base = F.normalize((leading + smooth.flatten(2).transpose(1, 2)) / 2, dim=-1)
        keys = unit(base + residual[..., :-1], LEAST_NORM)
        objectness = (logit + RESIDUAL_GAIN * residual[..., -1]).sigmoid()
        return torch.cat([keys, self.config.position_weight * position], -1), objectness

    def objectness_logit(self, tokens: Float[Tensor, "B N D"], logistic: Logistic) -> Float[Tensor, "B N"]:
        """Logit of the objectness that the norm alone gives."""
        return torch.div(tokens.norm(dim=-1) / (logistic.threshold * self.otsu) - 1, logistic.width)

    def find_slots(
        self, keys: Float[Tensor, "B N S"], objectness: Float[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "B K S"], Bool[Tensor, "B K"]]:
        """Object slots (without the background's), and a mask of those that the frame needs."""
        with torch.no_grad():
            slots, active = self.seed(keys, objectness)
        for iteration in range(self.config.iterations):
            with torch.set_grad_enabled(
                torch.is_grad_enabled() and iteration >= self.config.iterations - GRADIENT_ITERATIONS
            ):
                attention = self.attend(keys, objectness, slots, active)
                slots = slot_means(attention, keys)
        return slots, active

    def seed(
        self, keys: Float[Tensor, "B N S"], objectness: Float[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "B K S"], Bool[Tensor, "B K"]]:
        """Initial slots by farthest-first traversal of object tokens, and a mask of those that the frame needs.

        New slots stop when every object token is within ``new_slot_distance`` of one.
        """
        batch = torch.arange(len(keys), device=keys.device)
        candidate = objectness > SEED_OBJECTNESS  # (B, N)
        chosen = objectness.argmax(1)
        slots, active = [keys[batch, chosen]], [candidate.any(1)]
        # (B, N) to the nearest slot; 0 where none may begin
        distance = (keys - slots[0].unsqueeze(1)).square().sum(-1) * candidate
        for _ in range(self.config.slots - 2):
            farthest, chosen = distance.max(1)
            active.append(farthest > self.config.new_slot_distance)
            slots.append(keys[batch, chosen])
            distance = torch.minimum(distance, (keys - slots[-1].unsqueeze(1)).square().sum(-1))
        return torch.stack(slots, 1), torch.stack(active, 1)

    def attend(
        self,
        keys: Float[Tensor, "B N S"],
        objectness: Float[Tensor, "B N"],
        slots: Float[Tensor, "B K S"],
        active: Bool[Tensor, "B K"],
    ) -> Float[Tensor, "B N K"]:
        """Attention of tokens to slots, which sums to the objectness over the slots."""
        closeness = 2 * keys @ slots.transpose(1, 2) - slots.square().sum(-1).unsqueeze(1)  # |key|^2 cancels
        logits = (closeness / self.config.temperature).masked_fill(~active.unsqueeze(1), NEVER)
        return logits.softmax(-1) * objectness.unsqueeze(-1)

    def reconstruct(
        self, attention: Float[Tensor, "B N K"], slots: Float[Tensor, "B K S"], background: Float[Tensor, "B N 1"]
    ) -> Float[Tensor, "B N D"]:
        """Tokens decoded from each patch's mixture of slots, relative to the patch's position."""
        mixed = attention @ slots  # (B, N, S + 2)
        key, place = mixed[..., : self.keys], mixed[..., self.keys :]
        here = self.config.position_weight * self.position * (1 - background)
        decoded: Tensor = self.decode(torch.cat([key, place - here, background], -1))
        return decoded

    def _bordered_map(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) as a map (B, C, rows + 2, columns + 2) with the outer patches repeated once.

        Written out, because torch.compile miscompiles the gradient of replication padding (torch 2.14).
        """
        x = tokens.transpose(1, 2).reshape(len(tokens), -1, *self.grid)
        x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
        return torch.cat([x[..., :1], x, x[..., -1:]], 3)


def otsu_threshold(values: Tensor, bins: int = 256) -> Tensor:
    """The threshold between two classes of values with the largest between-class variance (Otsu 1979), a scalar."""
    low, high = values.aminmax()
    counts = torch.histc(values.float().cpu(), bins, float(low), float(high)).double()
    middle = torch.linspace(float(low), float(high), bins, dtype=torch.float64)
    below, sum_below = counts.cumsum(0), (counts * middle).cumsum(0)
    above, sum_above = below[-1] - below, sum_below[-1] - sum_below
    gap = sum_below / below.clamp_min(1) - sum_above / above.clamp_min(1)
    variance = below * above * gap.square()
    return middle[variance >= variance.max() * (1 - 1e-9)].mean().to(values)  # the middle of an empty gap
