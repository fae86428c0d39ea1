"""The losses. Each is a float32 scalar without its weight, and is logged beside their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    volumes = [_volumes(tokens, output.grid) for tokens in (output.reconstruction.float(), output.target.float())]
    with torch.no_grad():
        both = torch.cat([volume.flatten(1) for volume in volumes], 1)
        least, most = (edge.view(-1, 1, 1, 1, 1) for edge in (both.amin(1), both.amax(1)))
    found, true = ((volume - least) / (most - least + 1e-6) for volume in volumes)
    mean, square, product = _window(torch.stack([found, found * found, found * true])).unbind()
    mean_true, square_true = _window(torch.stack([true, true * true])).unbind()
    covariance, spread = product - mean * mean_true, square + square_true - mean.square() - mean_true.square()
    place = (2 * mean * mean_true + 1e-4) / (mean.square() + mean_true.square() + 1e-4)
    return 1 - (place * (2 * covariance + 9e-4) / (spread + 9e-4)).mean()


def _volumes(tokens: Float[Tensor, "*B N D"], grid: tuple[int, int]) -> Float[Tensor, "B D T rows columns"]:
    clips = tokens if tokens.ndim == 4 else tokens.unsqueeze(1)
    return clips.reshape(*clips.shape[:2], *grid, -1).permute(0, 4, 1, 2, 3)


def _window(volumes: Float[Tensor, "*B T rows columns"]) -> Float[Tensor, "*B t r c"]:
    """Means under a Gaussian window of 3, of standard deviation 1.5, without padding."""
    side = math.exp(-0.5 / 1.5**2)
    weights = [side / (1 + 2 * side), 1 / (1 + 2 * side)]
    for axis in (-3, -2, -1):
        if (length := volumes.shape[axis] - 2) > 0:
            before, middle, after = (volumes.narrow(axis, start, length) for start in range(3))
            volumes = weights[0] * (before + after) + weights[1] * middle
    return volumes


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
    with torch.no_grad(), torch.autocast(predicted.device.type, enabled=False):
        directions = unit(output.target.float())  # (B, T, N, D)
        decoded = directions if output.positions is None else directions[..., output.positions, :]
        closeness = decoded[:, :-shift] @ directions[:, shift:].transpose(-2, -1)  # (B, T - shift, M, N)
        away = closeness < 0
        lost = away.all(-1, keepdim=True)
        logits = closeness.masked_fill(away, -torch.inf).masked_fill(lost, 0.0) / config.similarity_temperature
        share = logits.softmax(-1)
    return -(share * predicted.log_softmax(-1)).sum(-1).mean()


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
