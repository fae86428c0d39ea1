"""Your own pictures, in many forms, as one array of frames."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from featcache.errors import DataError, UsageError
from featcache.sources import clips
from featcache.sources.images import MOST_PIXELS, as_rgb, decoded_smaller, size_text, stack
from featcache.sources.scan import natural

Frames = Any  # an array or tensor, a PIL image, a path, or a sequence of these


def as_frames(frames: Frames) -> npt.NDArray[np.uint8]:
    """Pictures or a video as frames (T, H, W, 3) uint8.

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
    # Torch shares the memory and requires it to be writable.
    return np.require(array if array.ndim == 4 else array[None], requirements=["C", "W"])


def read_path(path: Path, short: int | None = None) -> npt.NDArray[np.uint8]:
    """Frames (T, H, W, 3) of a picture (one frame), a video file, or a folder of pictures (a video, in natural order).

    A shorter side of more than ``short`` pixels is scaled down to it. ``DataError`` for files that cannot be read, or
    are too large, and for a folder without pictures.
    """
    files = [path] if not path.is_dir() else _pictures(path)
    size = clips.frame_size(files[0])
    if other := next((file for file in files[1:] if clips.frame_size(file) != size), None):
        raise DataError(
            f"{other}: {size_text(clips.frame_size(other))}, but {files[0].name} in the same folder is "
            f"{size_text(size)}, so they are no video; name the pictures themselves ({path / '*'}), "
            "or bring them to one size"
        )
    if short is None and size[0] * size[1] > MOST_PIXELS:
        raise DataError(
            f"{files[0]}: {size_text(size)} are over {MOST_PIXELS / 1e6:.0f} million pixels; have it scaled down with "
            "--frame-size 1024"
        )
    factor = max(1.0, min(size) / short) if short else 1.0
    count = len(files) if path.is_dir() else clips.count_frames(path) if factor > 1 else 1
    shrink = decoded_smaller(size, count, factor)
    frames = clips.read_images(files, shrink) if path.is_dir() else clips.read_frames(path, shrink)
    if factor > 1:
        smaller = round(size[1] / factor), round(size[0] / factor)
        frames = np.stack([np.asarray(Image.fromarray(f).resize(smaller, Image.Resampling.BICUBIC)) for f in frames])
    return np.require(frames, requirements=["C", "W"])


def _pictures(path: Path) -> list[Path]:
    shown = (file for file in path.iterdir() if not file.name.startswith("."))
    files = sorted(filter(clips.is_image, shown), key=natural)
    if not files:
        raise DataError(f"{path}: no picture in it; known are {clips.KNOWN}")
    if clip := next((file for file in files if clips.has_pages(file)), None):
        raise DataError(f"{clip}: holds several pages, which is a video by itself; name the file, not its folder")
    return files
