"""Masks: from image files and arrays to object numbers, and the table of the objects in them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from featcache.errors import DataError
from featcache.sources.images import open_image, open_pages, size_text
from featcache.sources.video import Instance


def decode_mask(data: bytes, where: str) -> npt.NDArray[np.uint8]:
    """A single-channel image (grey, palette, 1 or 16 bit) of object numbers -> (H, W), upright by its own EXIF tag."""
    return _numbers(open_image(data, where), where)


def decode_mask_pages(data: bytes, where: str) -> list[npt.NDArray[np.uint8]]:
    """As `decode_mask`, of every image in the file."""
    return [_numbers(page, name) for page, name in open_pages(data, where)]


def _numbers(image: Image.Image, where: str) -> npt.NDArray[np.uint8]:
    image = ImageOps.exif_transpose(image)
    if len(image.getbands()) != 1:
        raise DataError(
            f"{where}: mask has {len(image.getbands())} channels; save object numbers 0..255 in one channel "
            "(grey or palette)"
        )
    return as_mask(np.asarray(image), where)


def as_mask(values: npt.NDArray[np.generic], where: str) -> npt.NDArray[np.uint8]:
    """Object numbers of any dtype -> uint8, unless a number would be lost."""
    if values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if values.dtype.kind not in "iuf":
        raise DataError(f"{where}: masks are {values.dtype}; save object numbers 0..255 as integers")
    numbers = values.astype(np.float64) if values.dtype.kind == "f" else values.astype(np.int64)
    if numbers.dtype.kind == "f" and not np.array_equal(numbers, np.rint(numbers)):
        raise DataError(f"{where}: masks hold fractions or NaN; save object numbers 0..255 as integers")
    if numbers.size and (numbers.min() < 0 or numbers.max() > 255):
        raise DataError(
            f"{where}: masks hold {numbers.min():g}..{numbers.max():g}; renumber the objects to 0 (background)..255"
        )
    return numbers.astype(np.uint8)


def check_fit(frames: npt.NDArray[np.uint8], masks: npt.NDArray[np.uint8], where: str, remedy: str = "") -> None:
    """``DataError`` unless masks (T, H, W) cover frames (T, H, W, 3)."""
    if masks.shape != frames.shape[:3]:
        raise DataError(
            f"{where}: {len(masks)} masks of {size_text(masks[0]) if len(masks) else 'no size'} do not match "
            f"{len(frames)} frames of {size_text(frames[0])}; "
            + (remedy or "give one mask a frame, of the frame's size")
        )


def visibility(masks: npt.NDArray[np.uint8], instances: int) -> npt.NDArray[np.int64]:
    """Pixels of objects 1..instances in each frame of (T, H, W) -> (instances, T)."""
    counts = [np.bincount(mask.ravel(), minlength=256)[1 : instances + 1] for mask in masks]
    return np.stack(counts, axis=1)


def unlabelled_instances(masks: npt.NDArray[np.uint8]) -> tuple[Instance, ...]:
    """Instance table of masks (T, H, W) that come without one: objects 1..max, known by their pixels only."""
    counts = visibility(masks, int(masks.max(initial=0)))
    return tuple(Instance(visibility=tuple(row.tolist())) for row in counts)
