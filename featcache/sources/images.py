"""What the sources share: images and masks to arrays, instance tables, fingerprints, and their errors."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from featcache.errors import DataError, UsageError
from featcache.sources.video import Instance

BLOCK, BLOCKS = 1 << 16, 16  # a larger file is fingerprinted by this many evenly spaced blocks
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


def decode_image(data: bytes, where: str) -> npt.NDArray[np.uint8]:
    """PNG, JPEG or whatever Pillow reads -> (H, W, 3), upright by its EXIF orientation."""
    return as_rgb(_open(data, where, upright=True), where)


def as_rgb(image: Image.Image, where: str) -> npt.NDArray[np.uint8]:
    """(H, W, 3) of an image of any mode. 16-bit grey is scaled to 8; ``DataError`` for values of unknown range."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG")):  # whose 16 bits come as 32
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise DataError(f"{where}: holds {kind} values, whose range is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGB"))


def decode_mask(data: bytes, where: str) -> npt.NDArray[np.uint8]:
    """A single-channel image (grey, palette, 1 or 16 bit) of object numbers -> (H, W)."""
    image = _open(data, where, upright=False)
    if len(image.getbands()) != 1:
        raise DataError(
            f"{where}: mask has {len(image.getbands())} channels; save object numbers 0..255 in one channel "
            "(grey or palette)"
        )
    return as_mask(np.asarray(image), where)


def _open(data: bytes, where: str, upright: bool) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: image cannot be decoded ({error}); copy or make it again") from error


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


def stack(images: Sequence[npt.NDArray[np.uint8]], names: Sequence[str], what: str = "frame") -> npt.NDArray[np.uint8]:
    """Equal images -> (T, ...). ``names`` say where each came from."""
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{name}: {what} is {_size(image)}, but the video's first is {_size(images[0])}; "
                "bring all frames of a video to one size"
            )
    return np.stack(images)


def check_fit(frames: npt.NDArray[np.uint8], masks: npt.NDArray[np.uint8], where: str) -> None:
    """``DataError`` unless masks (T, H, W) cover frames (T, H, W, 3)."""
    if masks.shape != frames.shape[:3]:
        raise DataError(
            f"{where}: {len(masks)} masks of {_size(masks[0]) if len(masks) else 'no size'} do not match "
            f"{len(frames)} frames of {_size(frames[0])}; give one mask a frame, of the frame's size"
        )


def _size(image: npt.NDArray[np.uint8]) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def visibility(masks: npt.NDArray[np.uint8], instances: int) -> npt.NDArray[np.int64]:
    """Pixels of objects 1..instances in each frame of (T, H, W) -> (instances, T)."""
    counts = [np.bincount(mask.ravel(), minlength=256)[1 : instances + 1] for mask in masks]
    return np.stack(counts, axis=1)


def unlabelled_instances(masks: npt.NDArray[np.uint8]) -> tuple[Instance, ...]:
    """Instance table of masks (T, H, W) that come without one: objects 1..max, known by their pixels only."""
    counts = visibility(masks, int(masks.max(initial=0)))
    return tuple(Instance(visibility=tuple(row.tolist())) for row in counts)


def check_split(location: str, split: str, known: Collection[str]) -> None:
    if split not in known:
        raise UsageError(f"{location}: no split {split!r}; it has: {', '.join(known)}")


def check_index(location: str, split: str, index: int, videos: int) -> None:
    if not 0 <= index < videos:
        raise UsageError(f"{location}: no video {index} in {split}; it has 0..{videos - 1}")


def split_folders(names: Iterable[str], where: str) -> dict[str, str]:
    """Of the given names, those that are splits: canonical split name -> given name, in the usual order."""
    found: dict[str, str] = {}
    for name in names:
        if split := SPLIT_NAMES.get(name.lower()):
            if split in found:
                raise DataError(f"{where}: both {found[split]} and {name} mean split {split}; rename one")
            found[split] = name
    return {split: found[split] for split in dict.fromkeys(SPLIT_NAMES.values()) if split in found}


def digest(parts: Iterable[bytes | str]) -> str:
    """Short hash of a sequence; the lengths are hashed too, so that parts cannot run together."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "little"))
        hashed.update(data)
    return hashed.hexdigest()[:16]


def file_digest(path: Path) -> bytes:
    """Hash of size and content; of evenly spaced blocks if the file is over 1 MiB.

    Times are left out, so that a copy of the files keeps its fingerprint.
    """
    size = path.stat().st_size
    hashed = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb", buffering=0) as file:
        if size <= BLOCK * BLOCKS:
            hashed.update(file.readall())
        else:
            for block in range(BLOCKS):
                file.seek((size - BLOCK) * block // (BLOCKS - 1))
                hashed.update(file.read(BLOCK))
    return hashed.digest()
