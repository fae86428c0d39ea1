"""Pictures: from the bytes of an image file to an array, upright."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from featcache.errors import DataError


def decode_image(data: bytes, where: str) -> npt.NDArray[np.uint8]:
    """PNG, JPEG or whatever Pillow reads -> (H, W, 3), upright by its EXIF orientation."""
    return as_rgb(open_image(data, where, upright=True), where)


def as_rgb(image: Image.Image, where: str) -> npt.NDArray[np.uint8]:
    """(H, W, 3) of an image of any mode. 16-bit grey is scaled to 8; ``DataError`` for values of unknown range."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG")):  # whose 16 bits come as 32
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise DataError(f"{where}: holds {kind} values, whose range is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGB"))


def open_image(data: bytes, where: str, upright: bool) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: image cannot be decoded ({error}); copy or make it again") from error


def stack(images: Sequence[npt.NDArray[np.uint8]], names: Sequence[str], what: str = "frame") -> npt.NDArray[np.uint8]:
    """Equal images -> (T, ...). ``names`` say where each came from."""
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{name}: {what} is {size_text(image)}, but the video's first is {size_text(images[0])}; "
                "bring all frames of a video to one size"
            )
    return np.stack(images)


def size_text(image: npt.NDArray[np.uint8]) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
