"""Refinement: upsamples soft masks from the patch grid to the frame's resolution along the frame's edges.

- ``guided``: the guided filter (He, Sun & Tang 2013, IEEE TPAMI 35(6)) in its fast form (He & Sun 2015,
  arXiv:1505.00996): in every window of about two patches, each mask is a linear function of the colour; the
  functions are found at three times the patch grid and applied to every pixel. Three rounds, the last on six times the
  grid, with the masks sharpened between them. Windows without any colour contrast, where the filter would only blur,
  leave the masks as they are. Where colours are mixed the filter leaves specks: in the end the pixels around each one
  vote for its slot, and a slot's share of the votes is its mask.
- ``crf``: mean field inference in a fully connected CRF (Krähenbühl & Koltun 2011, arXiv:1210.5644), by pydensecrf2
  on the CPU, frame by frame; needs the extra ``slotlab[crf]``.

The defaults were chosen on training videos of the embedded sample (benchmarks/refinement.py), rounds and votes on
training pictures of all kinds (docs/benchmarks-edges.md); lengths are in patches, so that they hold for other grids and
frame sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import UsageError
from slotlab.words import Refinement

# Mask values held at once, as in slotlab.masks.labels: what a cache or a share of a GPU's memory holds.
_VALUES_A_CHUNK = {"cpu": 2**22, "cuda": 2**27}
_WIDEST = 90  # half side of a window of votes, in pixels, at most: an int16 counts to 181 * 181
_SMALLEST = 1e-6  # least mask value, so that masks have a logarithm and a sum above 0


@dataclass(frozen=True)
class Guided:
    """Parameters of the guided filter."""

    scales: tuple[int, ...] = (3, 3, 6)  # each round's grid, as a multiple of the patch grid
    radius: float = 1.0  # half side of the window, in patches
    epsilon: float = 1e-5  # ridge on the colours, which are in [0, 1]
    flat: float = 3e-4  # variance of a window's colours, summed over channels, at which the filter has weight 1/2
    sharpening: float = 4.0  # power that masks are raised to between rounds
    votes: float = 0.08  # half side of the window that votes for a pixel, in patches; 0: the filter's masks
    pixels: int = 2**21  # of a frame whose every pixel is seen; a larger one is seen smaller, to save time and memory


@dataclass(frozen=True)
class Crf:
    """Parameters of the dense CRF: standard deviations and weights of its two kernels."""

    position: float = 1.25  # std of the bilateral kernel, in patches
    colour: float = 13.0  # std of the bilateral kernel, in levels of 0..255
    weight: float = 10.0
    smooth_position: float = 0.1875  # std of the other kernel, in patches
    smooth_weight: float = 1.0
    iterations: int = 5


Parameters = Guided | Crf


def refine(masks: Tensor, frames: Tensor, method: Refinement, parameters: Parameters | None = None) -> Tensor:
    """Refined masks (B, K, H, W) float32 at the frames' resolution; they sum to one over the slots at every pixel.

    masks (B, K, h, w), not negative, of any float type; frames (B, H, W, 3) uint8. The result is on the
    masks' device. Raises ``UsageError`` for a method that is unknown or not installed, ``ValueError`` for masks that
    are not finite.
    """
    if method not in METHODS:
        raise UsageError(f"--refine {method}: not known; choose one of {', '.join(METHODS)}")
    if frames.dtype != torch.uint8 or len(masks) != len(frames):
        raise ValueError(f"{len(masks)} masks need as many uint8 frames, not {len(frames)} {frames.dtype}")
    if not bool(torch.isfinite(masks).all()):
        raise ValueError("masks hold NaN or infinity; did the model diverge?")
    return METHODS[method](masks, frames, parameters)


# -- guided filter -----------------------------------------------------------------------------------------


def _by_guided_filter(masks: Tensor, frames: Tensor, parameters: Parameters | None) -> Tensor:
    guided = parameters if isinstance(parameters, Guided) else Guided()
    height, width = frames.shape[1:3]
    step = max(1, _VALUES_A_CHUNK.get(masks.device.type, 2**24) // (4 * masks.shape[1] * height * width))
    chunks = zip(torch.split(masks, step), torch.split(frames, step), strict=True)
    return torch.cat([_guided(mask.float(), frame.to(masks.device), guided) for mask, frame in chunks])


def _guided(masks: Tensor, frames: Tensor, parameters: Guided) -> Tensor:
    """Masks (B, K, h, w) and frames (B, H, W, 3) to masks (B, K, H, W), in one round for each scale."""
    guide = frames.permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
    rows, columns = masks.shape[-2:]
    whole = guide.shape[-2:]
    if (larger := (whole[0] * whole[1] / parameters.pixels) ** 0.5) > 1:
        guide = F.interpolate(guide, size=[round(side / larger) for side in whole], mode="area")
    sizes = [(min(rows * scale, guide.shape[2]), min(columns * scale, guide.shape[3])) for scale in parameters.scales]
    guides = [F.interpolate(guide, size=size, mode="area") for size in sizes]
    for index, (coarse, fine) in enumerate(zip(guides, [*guides[1:], guide], strict=True)):
        if index:
            masks = _normalised(masks**parameters.sharpening)
        down, along = coarse.shape[-2] / rows, coarse.shape[-1] / columns  # cells a patch
        radius = max(1, round(parameters.radius * down)), max(1, round(parameters.radius * along))
        filtered = fast_guided_filter(masks, coarse, fine, radius, parameters.epsilon, parameters.flat)
        masks = _normalised(filtered.clamp(_SMALLEST, 1))
    down, along = masks.shape[-2] / rows, masks.shape[-1] / columns  # pixels a patch
    reach = round(parameters.votes * down), round(parameters.votes * along)
    if any(reach):
        masks = _voted(masks, reach)
    return F.interpolate(masks, size=whole, mode="bilinear") if larger > 1 else masks


def fast_guided_filter(
    masks: Tensor, coarse: Tensor, fine: Tensor, radius: tuple[int, int], epsilon: float, flat: float
) -> Tensor:
    """Masks (B, K, h, w) as local linear functions of the guide, at the resolution of ``fine``: (B, K, H, W).

    ``coarse`` (B, 3, r, c) and ``fine`` (B, 3, H, W) are the guide in two sizes. The functions are fitted on the coarse
    one, in windows of ``2 * radius + 1`` of its cells (rows, columns), ridge-regularised by ``epsilon``: equations 19
    to 21 of the TPAMI paper. Where the guide's variance v is small, the masks stay: the filter's
    weight is v / (v + flat).
    """
    masks = F.interpolate(masks, size=coarse.shape[-2:], mode="bilinear")
    guide_mean, mask_mean = _window_mean(coarse, radius), _window_mean(masks, radius)
    products = _window_mean((coarse.unsqueeze(1) * coarse.unsqueeze(2)).flatten(1, 2), radius)
    cells = coarse.shape[-2:]
    outer = guide_mean.unsqueeze(1) * guide_mean.unsqueeze(2)
    covariance = products.reshape(-1, 3, 3, *cells) - outer  # (B, 3, 3, r, c)
    ridge = epsilon * torch.eye(3, device=masks.device).view(1, 3, 3, 1, 1)
    inverse = torch.linalg.inv((covariance + ridge).permute(0, 3, 4, 1, 2))  # (B, r, c, 3, 3)
    mixed = _window_mean((coarse.unsqueeze(2) * masks.unsqueeze(1)).flatten(1, 2), radius)
    outer = guide_mean.unsqueeze(2) * mask_mean.unsqueeze(1)
    mixed = mixed.reshape(len(mixed), 3, -1, *cells) - outer  # (B, 3, K, r, c)
    slope = torch.einsum("brcij,bjkrc->bikrc", inverse, mixed)
    offset = mask_mean - (slope * guide_mean.unsqueeze(2)).sum(1)  # (B, K, r, c)
    # Each cell lies in many windows: average their functions, then interpolate between cells for each pixel.
    size = fine.shape[-2:]
    filtered = F.interpolate(_window_mean(offset, radius), size=size, mode="bilinear")
    for channel in range(3):
        slopes = F.interpolate(_window_mean(slope[:, channel], radius), size=size, mode="bilinear")
        filtered.addcmul_(slopes, fine[:, channel : channel + 1])
    variance = covariance.diagonal(dim1=1, dim2=2).sum(-1).unsqueeze(1)  # (B, 1, r, c)
    contrast = _window_mean(variance / (variance + flat), radius)
    return F.interpolate(masks, size=size, mode="bilinear").lerp(
        filtered, F.interpolate(contrast, size=size, mode="bilinear")
    )


def _window_mean(x: Tensor, radius: tuple[int, int]) -> Tensor:
    """Mean over the window around each cell of (B, C, r, c); at the border, over the cells inside."""
    # Products with matrices of averages: of a few hundred cells a side, ten times faster than pooling on a CPU.
    rows, columns = (_averages(size, reach, x.device) for size, reach in zip(x.shape[-2:], radius, strict=True))
    return rows @ x @ columns.mT


def _averages(size: int, radius: int, device: torch.device) -> Tensor:
    """The matrix (size, size) that takes the mean over at most ``radius`` cells to either side."""
    cells = torch.arange(size, device=device)
    near = ((cells - cells.unsqueeze(1)).abs() <= radius).float()
    return near / near.sum(1, keepdim=True)


def _voted(masks: Tensor, radius: tuple[int, int]) -> Tensor:
    """The share of the pixels around each that go to each slot: masks (B, K, H, W) to masks (B, K, H, W)."""
    votes = (masks == masks.amax(1, keepdim=True)).short()  # small numbers are summed fast; slots that tie all get one
    for dim, reach in zip((-2, -1), radius, strict=True):
        size, own, votes = votes.shape[dim], votes, votes.clone()
        for step in range(1, min(reach, _WIDEST, size - 1) + 1):
            here, there = ((0, size - step), (step, size - step))
            votes.narrow(dim, *here).add_(own.narrow(dim, *there))
            votes.narrow(dim, *there).add_(own.narrow(dim, *here))
    return _normalised(votes.float())


def _normalised(masks: Tensor) -> Tensor:
    return masks / masks.sum(1, keepdim=True)


# -- dense CRF ---------------------------------------------------------------------------------------------


def _by_crf(masks: Tensor, frames: Tensor, parameters: Parameters | None) -> Tensor:
    crf = parameters if isinstance(parameters, Crf) else Crf()
    refined = [_crf(mask, frame, crf) for mask, frame in zip(masks.cpu(), frames.cpu(), strict=True)]
    return torch.stack(refined).to(masks.device)


def _crf(masks: Tensor, frame: Tensor, parameters: Crf) -> Tensor:
    """Masks (K, h, w) and a frame (H, W, 3) to masks (K, H, W): the marginals of the mean field."""
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise UsageError("--refine crf needs pydensecrf2; install it with: pip install 'slotlab[crf]'") from error

    height, width = frame.shape[:2]
    patch = height / masks.shape[1], width / masks.shape[2]
    fine = F.interpolate(masks.unsqueeze(0).float(), size=(height, width), mode="bilinear")[0]
    fine = _normalised(fine.clamp_min(1e-5).unsqueeze(0))[0]
    field = DenseCRF2D(width, height, len(masks))
    field.setUnaryEnergy(np.ascontiguousarray(-fine.log().flatten(1).numpy()))
    smooth = tuple(parameters.smooth_position * side for side in patch[::-1])  # x, then y
    wide = tuple(parameters.position * side for side in patch[::-1])
    field.addPairwiseGaussian(sxy=smooth, compat=parameters.smooth_weight)
    field.addPairwiseBilateral(
        sxy=wide,
        srgb=(parameters.colour,) * 3,
        rgbim=np.ascontiguousarray(frame.numpy()),
        compat=parameters.weight,
    )
    marginals = np.array(field.inference(parameters.iterations), np.float32)  # (K, H * W)
    return torch.from_numpy(marginals.reshape(-1, height, width))


METHODS: Mapping[Refinement, Callable[[Tensor, Tensor, Parameters | None], Tensor]] = {
    "guided": _by_guided_filter,
    "crf": _by_crf,
}
