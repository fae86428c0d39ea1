"""The losses. Each is a float32 scalar without its weight, and is logged beside their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from featcache.errors import UsageError
from slotlab.config.schema import LossConfig
from slotlab.models.base import Output
from slotlab.models.competition import NEVER
from slotlab.models.unit import unit
from slotlab.training.processes import gathered, rank

IGNORED = -100  # a target without a loss
BELOW_ZERO = -torch.finfo(torch.float32).tiny


def feature_mse(output: Output, config: LossConfig) -> Tensor:
    """Mean squared error of the reconstruction.

    Normalised targets have a mean square of 1 over the data set (except with ``none`` and ``fixed``), so that always
    predicting the mean scores about 1.
    """
    return F.mse_loss(output.reconstruction.float(), output.decoded_target)


def layer_norm_mse(output: Output, config: LossConfig) -> Tensor:
    """Mean squared error of the tokens after a LayerNorm without weights, so that their scale does not count.

    "channel_norm" of Menserve/Object-centric-representation (commit 6a307c5).
    """
    found, true = output.reconstruction.float(), output.decoded_target
    return F.mse_loss(F.layer_norm(found, found.shape[-1:]), F.layer_norm(true, true.shape[-1:]))


def cosine(output: Output, config: LossConfig) -> Tensor:
    """One minus the cosine between reconstructed and true tokens, mean over the patches; in [0, 2]."""
    return 1 - F.cosine_similarity(output.reconstruction.float(), output.decoded_target, dim=-1).mean()


def structure(output: Output, config: LossConfig) -> Tensor:
    """One minus the structural similarity (Wang et al., 2004) of reconstructed and true tokens, of clips or frames.

    Each channel is a volume over time and grid, in units of its sample's range; a Gaussian window of 3 along each axis
    that is as long (SlotCurri, Moon et al., 2026, arXiv:2603.22758). ``UsageError`` if not all patches are decoded.
    """
    if output.positions is not None:
        raise UsageError("loss.structure: needs all patches; leave out model.decoder.patches")
    found, true = (_volumes(tokens, output.grid) for tokens in (output.reconstruction, output.target))
    with torch.no_grad():
        edges = [torch.aminmax(tokens.flatten(1), dim=1) for tokens in (found, true)]
        least = torch.minimum(*(edge.min for edge in edges)).view(-1, 1, 1, 1, 1)
        span = torch.maximum(*(edge.max for edge in edges)).view(-1, 1, 1, 1, 1) - least + 1e-6
    found, true = ((tokens - least) / span for tokens in (found, true))
    taps = {length: _means_of_three(length, found) for length in {found.shape[1], *output.grid}}
    with torch.autocast(found.device.type, enabled=False):
        mean_true = _window(true, taps)
        squares, products = torch.addcmul(found * found, true, true), found * (2 * true)
        mean, square, product = _window(torch.stack([found, squares, products]), taps).unbind()
    means, squared = mean * (2 * mean_true), torch.addcmul(mean * mean, mean_true, mean_true)
    place = (means + 1e-4) / (squared + 1e-4)
    return 1 - (place * (product - means + 9e-4) / (square - squared + 9e-4)).mean()


def _volumes(tokens: Float[Tensor, "*B N D"], grid: tuple[int, int]) -> Float[Tensor, "B T rows columns D"]:
    clips = tokens if tokens.ndim == 4 else tokens.unsqueeze(1)
    return torch.unflatten(clips.float(), 2, grid)


def _window(volumes: Float[Tensor, "*B T rows columns D"], taps: Mapping[int, Tensor]) -> Float[Tensor, "*B t r c D"]:
    """Means under a Gaussian window of 3, of standard deviation 1.5, without padding: a product along each axis."""
    for axis in (-4, -3, -2):
        rest = volumes.shape[axis + 1 :]
        volumes = torch.unflatten(taps[volumes.shape[axis]] @ volumes.flatten(axis + 1), -1, rest)
    return volumes


def _means_of_three(length: int, like: Tensor) -> Float[Tensor, "l L"]:
    """The matrix of that window along an axis; the identity along a shorter one."""
    alone = torch.eye(length, dtype=like.dtype, device=like.device)
    if length < 3:
        return alone
    side = math.exp(-0.5 / 1.5**2)
    return (alone[:-2] + alone[2:]) * (side / (1 + 2 * side)) + alone[1:-1] * (1 / (1 + 2 * side))


def temporal_similarity(output: Output, config: LossConfig) -> Tensor:
    """Cross-entropy of the predicted place of each patch ``similarity_shift`` frames later, mean over patches.

    The target is a softmax, over the patches of the later frame, of the cosines of features divided by the temperature;
    patches of negative cosine get no share (equal shares if all are negative). (VideoSAUR, arXiv:2306.04829, equations
    4-6.) ``UsageError`` if the model does not predict it.
    """
    if output.similarity is None or output.slots.ndim != 4:
        raise UsageError("loss.temporal_similarity: needs model.kind = slot_attention with a predictor, on clips")
    shift = config.similarity_shift
    predicted = output.similarity[:, :-shift].float()  # (B, T - shift, M, N)
    with torch.autocast(predicted.device.type, enabled=False):
        with torch.no_grad():
            target = output.target.float()  # (B, T, N, D)
            length = torch.linalg.vector_norm(target, dim=-1, keepdim=True).clamp_min(1e-12)
            earlier = target[:, :-shift] / length[:, :-shift]
            later = target[:, shift:] / (length[:, shift:] * config.similarity_temperature)
            if output.positions is not None:
                earlier = earlier[..., output.positions, :]
            logits = earlier @ later.mT  # (B, T - shift, M, N)
            share = F.threshold(logits, BELOW_ZERO, NEVER).softmax(-1)  # if all are NEVER, they have equal shares
        alike = share.unsqueeze(-2) @ predicted.log_softmax(-1).unsqueeze(-1)  # (B, T - shift, M, 1, 1)
    return -alike.mean()


def slot_contrast(output: Output, config: LossConfig) -> Tensor:
    """InfoNCE that lets each slot find itself among the slots of the frame before (SlotContrast, arXiv:2412.14295).

    Over cosines: the positive is the same slot one frame earlier, the negatives are all other slots of the earlier
    frame in the whole batch, of all ranks. Slots that take no part are left out. ``UsageError`` for frames without
    time.
    """
    if output.slots.ndim != 4:
        raise UsageError("loss.slot_contrast: needs slots carried over clips; set model.predictor.kind")
    with torch.autocast(output.slots.device.type, enabled=False):
        frames = unit(output.slots.float()).transpose(0, 1).flatten(1, 2)  # (T, B K, S)
        before = gathered(frames[:-1]).transpose(0, 1)  # (T - 1, R, B K, S)
        logits = frames[1:] @ before.flatten(1, 2).transpose(-2, -1) / config.contrast_temperature  # (.., B K, R B K)
        if output.active is not None:
            active = output.active.transpose(0, 1).flatten(1)  # (T, B K)
            seen = gathered(active[:-1]).transpose(0, 1).flatten(1, 2)  # (T - 1, R B K)
            logits = logits.masked_fill(~seen.unsqueeze(1), NEVER)
    mine = frames.shape[1]
    itself = torch.arange(rank() * mine, (rank() + 1) * mine, device=logits.device)  # (B K,)
    itself = itself.expand(len(logits), -1)
    if output.active is not None:
        itself = itself.where(active[1:], IGNORED)
    return F.cross_entropy(logits.flatten(0, 1), itself.flatten(), ignore_index=IGNORED)


def assignment(output: Output, config: LossConfig) -> Tensor:
    """Cross-entropy of the slot that each patch belongs to, mean over all patches.

    ``UsageError`` for the output of a model that assigns no patches.
    """
    if output.assigned is None:
        raise UsageError("loss.assignment: needs model.kind = agglomerative")
    logits, assigned = output.logits.float().flatten(0, -3), output.assigned.flatten(0, -2)  # (F, K, N), (F, N)
    return F.cross_entropy(logits, assigned)


def slot_mse(output: Output, config: LossConfig) -> Tensor:
    """Squared error of predicted slots in units of the model, mean over all; one that is not present adds 0.

    ``UsageError`` for the output of a model that predicts no slots.
    """
    return _slot_errors(output, "slot_mse").mean()


def slot_huber(output: Output, config: LossConfig) -> Tensor:
    """The same, but for large errors twice the error and not its square (pseudo-Huber, by slot).

    A slot that has lost its object, or that hits what nobody could foresee, so counts no more than some that are near.
    """
    return (2 * ((1 + _slot_errors(output, "slot_huber")).sqrt() - 1)).mean()


def _slot_errors(output: Output, name: str) -> Float[Tensor, "*B K"]:
    """Mean squared error of each predicted slot; 0 for one that is not present."""
    if output.future is None or output.present is None:
        raise UsageError(f"loss.{name}: needs model.kind = dynamics")
    return (output.slots.float() - output.future).square().mean(-1) * output.present


def diversity(output: Output, config: LossConfig) -> Tensor:
    """Mean cosine between the masks of two slots of a frame, in [0, 1].

    Slots that hold nothing, such as padding, are left out.
    """
    masks = _frames(output.masks)
    return _mean_cosine(masks, masks.amax(-1) > 0).clamp_min(0).mean()


def slot_diversity(output: Output, config: LossConfig) -> Tensor:
    """Mean cosine between two slots of a frame, in [-1, 1]. Slots whose mask holds nothing are left out.

    Menserve/Object-centric-representation (commit 6a307c5).
    """
    return _mean_cosine(_frames(output.slots), _frames(output.masks).amax(-1) > 0).mean()


def sharpness(output: Output, config: LossConfig) -> Tensor:
    """Mean entropy of the masks over the slots, in units of its largest value ln K; in [0, 1], 0 for hard masks."""
    masks = _frames(output.masks)
    entropy: Tensor = torch.special.entr(masks.clamp_min(torch.finfo(masks.dtype).tiny)).sum(1)
    return entropy.mean() / math.log(max(2, masks.shape[1]))


def _frames(values: Float[Tensor, "*B K M"]) -> Float[Tensor, "F K M"]:
    """Frames of all clips, in float32."""
    return values.float().reshape(-1, *values.shape[-2:])


def _mean_cosine(vectors: Float[Tensor, "F K M"], kept: Bool[Tensor, "F K"]) -> Tensor:
    """Mean cosine (F,) of the pairs of vectors that are kept; 0 where there are no two."""
    directions = unit(vectors) * kept.unsqueeze(-1)
    count = kept.sum(1)
    # sum over i != j of <u_i, u_j> = |sum of u|^2 - sum of |u|^2
    pairs = directions.sum(1).square().sum(-1) - directions.square().sum((1, 2))
    return pairs / (count * (count - 1)).clamp_min(1)


LOSSES: dict[str, Callable[[Output, LossConfig], Tensor]] = {
    "feature_mse": feature_mse,
    "layer_norm_mse": layer_norm_mse,
    "cosine": cosine,
    "structure": structure,
    "temporal_similarity": temporal_similarity,
    "slot_contrast": slot_contrast,
    "assignment": assignment,
    "slot_mse": slot_mse,
    "slot_huber": slot_huber,
    "diversity": diversity,
    "slot_diversity": slot_diversity,
    "sharpness": sharpness,
}


def losses(output: Output, config: LossConfig) -> dict[str, Tensor]:
    """Every loss in use, by name, without its weight; :func:`total` of them is the training loss."""
    return {name: LOSSES[name](output, config) for name in config.weights()}


def total(components: dict[str, Tensor], config: LossConfig) -> Tensor:
    """The weighted sum of the losses, a scalar."""
    weights = config.weights()
    first, *rest = (value if weights[name] == 1 else weights[name] * value for name, value in components.items())
    return sum(rest, first)
