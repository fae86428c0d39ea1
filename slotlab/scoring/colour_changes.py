"""Colour transformations of frames that leave every shape in place; fixed, so that all runs see the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import permutations

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IDENTITY = "identity"
JITTERS = 3
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}

Colours = Callable[[Tensor], Tensor]  # frames (T, 3, H, W) uint8 to frames of the same shape


def transformations() -> Mapping[str, Colours]:
    """The transformations by name, the identity first.

    ``hue`` turns by a share of the circle; ``brightness``, ``contrast`` and ``saturation`` multiply by a factor;
    ``grey`` removes all colour; ``channels`` names the channels that take the places of red, green and blue; ``jitter``
    draws once from torchvision's ``ColorJitter``, by the seed in its name, for all frames of all videos.
    """
    found: dict[str, Colours] = {IDENTITY: lambda frames: frames}
    found |= {f"hue={turn}": partial(F.adjust_hue, hue_factor=turn) for turn in (-0.1, 0.1, 0.5)}
    found |= {f"brightness={f}": partial(F.adjust_brightness, brightness_factor=f) for f in (0.6, 1.4)}
    found |= {f"contrast={f}": partial(F.adjust_contrast, contrast_factor=f) for f in (0.6, 1.4)}
    found |= {f"saturation={f}": partial(F.adjust_saturation, saturation_factor=f) for f in (0.5, 1.5)}
    found["grey"] = partial(F.rgb_to_grayscale, num_output_channels=3)
    for order in list(permutations(range(3)))[1:]:
        found[f"channels={''.join('rgb'[c] for c in order)}"] = partial(_permute, order=order)
    found |= {f"jitter={seed}": partial(_jitter, seed=seed) for seed in range(JITTERS)}
    return found


def _permute(frames: Tensor, order: tuple[int, ...]) -> Tensor:
    return frames[:, list(order)]


def _jitter(frames: Tensor, seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):  # ColorJitter draws from the global generator: keep the caller's state
        torch.manual_seed(seed)
        jittered: Tensor = v2.ColorJitter(**JITTER)(frames)
    return jittered
