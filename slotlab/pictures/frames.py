"""Other people's pictures, in whatever form they come, as one array of frames."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from featcache.errors import DataError, UsageError
from featcache.sources import video_file
from featcache.sources.folder import IMAGES
from featcache.sources.images import as_rgb, decode_image, stack

Frames = Any  # an array or tensor, a PIL image, a path, or a sequence of these


def as_frames(frames: Frames) -> npt.NDArray[np.uint8]:
    """Frames (T, H, W, 3) uint8.

    Takes uint8 arrays and tensors (H, W, 3) or (T, H, W, 3), tensors also with channels first; PIL images; paths
    (:func:`read_path`); and sequences of these, all of one size. Raises ``UsageError`` for anything else,
    ``DataError`` for files that cannot be read and for sizes that differ.
    """
    if isinstance(frames, str | os.PathLike):
        return read_path(Path(frames))
    if isinstance(frames, Image.Image):
        return _checked(as_rgb(frames, "image"))
    if isinstance(frames, torch.Tensor):
        frames = frames.detach().cpu()
        if frames.ndim in (3, 4) and frames.shape[-1] != 3 and frames.shape[-3] == 3:
            frames = frames.movedim(-3, -1)
        return _checked(frames.numpy())
    if isinstance(frames, np.ndarray):
        return _checked(frames)
    if isinstance(frames, Sequence) and len(frames):
        parts = [as_frames(item) for item in frames]
        flat = [frame for part in parts for frame in part]
        names = [f"frame {index}" for index in range(len(flat))]
        return stack(flat, names)
    raise UsageError(
        f"frames are {type(frames).__name__}; give uint8 (H, W, 3) or (T, H, W, 3), PIL images, paths, or a list"
    )


def _checked(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3 or not array.size:
        raise UsageError(f"frames must be uint8 (H, W, 3) or (T, H, W, 3), not {array.dtype} {array.shape}")
    # Torch shares the memory, and wants it writable.
    return np.require(array if array.ndim == 4 else array[None], requirements=["C", "W"])


def read_path(path: Path) -> npt.NDArray[np.uint8]:
    """A picture (one frame), a video file, or a folder of pictures (a video, in natural order): (T, H, W, 3)."""
    if path.is_dir():
        files = sorted((file for file in path.iterdir() if file.suffix.lower() in IMAGES), key=_natural)
        if not files:
            raise DataError(f"{path}: no picture in it; known are {' '.join(sorted(IMAGES))}")
        return stack([_picture(file) for file in files], [str(file) for file in files])
    return video_file.read_frames(path) if path.suffix.lower() in video_file.SUFFIXES else _checked(_picture(path))


def _picture(path: Path) -> npt.NDArray[np.uint8]:
    try:
        return decode_image(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a picture or a video") from error


def _natural(path: Path) -> list[str | int]:
    """Sort key in which frame2 comes before frame10: text and numbers take turns, text first."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]
