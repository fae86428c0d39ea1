"""Whitening of tokens without a store: by the user's own pictures, or by natural pictures, as the package ships it.

``natural/BACKBONE-TAP.safetensors`` has the mean and the covariance of the tokens of natural pictures; its metadata say
which pictures and weights they are of. ``python -m benchmarks.natural`` makes and judges such a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "natural"


class Natural(NamedTuple):
    """Statistics of the tokens of natural pictures."""

    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64
    pictures: int


def natural(backbone: str, tap: str) -> Natural | None:
    """What the package ships for a backbone's tap; None: nothing."""
    path = _path(FOLDER, backbone, tap)
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        mean, lower = file.get_tensor("mean").double(), file.get_tensor("lower").double()
        pictures = int(file.metadata()["pictures"])
    covariance = mean.new_zeros(len(mean), len(mean))
    covariance[tuple(torch.tril_indices(len(mean), len(mean)))] = lower
    return Natural(mean, covariance + covariance.tril(-1).T, pictures)


def save_natural(found: Natural, backbone: str, tap: str, about: dict[str, str], folder: Path = FOLDER) -> Path:
    """Write what :func:`natural` reads: float32 means, float16 covariances; ``about`` goes into the file's metadata."""
    lower = found.covariance[tuple(torch.tril_indices(*found.covariance.shape))]
    tensors = {"mean": found.mean.float(), "lower": lower.half()}
    path = _path(folder, backbone, tap)
    save_file(tensors, path, {"pictures": str(found.pictures), **about})
    return path


def _path(folder: Path, backbone: str, tap: str) -> Path:
    return folder / f"{backbone.replace('/', '_')}-{tap}.safetensors"
