"""Reads masks from image files and arrays as object numbers, and makes the table of their objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import ImageOps

from featcache.errors import DataError
from featcache.sources.images import Page, errors_named, one_size, open_pages, size_text
from featcache.sources.reading import Reading
from featcache.sources.video import Instance, Size

LOSSY = frozenset(("JPEG", "MPO", "JPEG2000", "AVIF", "HEIF"))  # formats that blur numbers, or may
VOID = 255  # number of pixels without known truth in Pascal VOC and similar data sets
SMALL = 128  # if all other numbers are below it, 255 may mark void

Numbers = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class MaskPage:
    """One mask with the numbers of its file."""

    values: npt.NDArray[np.generic]  # (H, W) numbers, or 0xRRGGBB if masks are read by colour
    name: str
    palette: bool = False
    white: bool = False  # the palette shows 255 as white


@dataclass(frozen=True)
class Masks:
    """The masks of one video."""

    numbers: Numbers  # (T, H, W), 0 for the background
    ignore: npt.NDArray[np.bool_] | None = None  # (T, H, W) pixels whose truth is not known
    remark: str = ""  # the assumption made about ambiguous numbers

    def resized(self, size: Size) -> Masks:
        """The same of frames of another height and width, by the nearest pixel."""
        if self.numbers.shape[1:] == size:
            return self
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(int)
            for new, old in zip(size, self.numbers.shape[1:], strict=True)
        )
        place = (slice(None), rows[:, None], columns)
        return Masks(self.numbers[place], None if self.ignore is None else self.ignore[place], self.remark)


def decode_mask(data: bytes, where: str, colours: bool = False, turn: bool = True) -> list[MaskPage]:
    """Every mask in an image file, upright by its EXIF orientation, or with ``turn=False`` as the file stores it.

    One channel of any packing (grey, palette, 1 to 16 bits) gives its numbers, as do equal channels and a constant
    alpha. ``DataError`` for anything ambiguous, and for lossy files.
    """
    return [_mask(page, colours, turn, data) for page in open_pages(data, where)]


def _mask(page: Page, colours: bool, turn: bool, data: bytes) -> MaskPage:
    image, name = page.image, page.name
    if image.format in LOSSY or str(image.info.get("compression", "")).endswith("jpeg") or _lossy_webp(data):
        raise DataError(f"{name}: mask is a lossy {image.format}, whose numbers are blurred; save it as PNG")
    with errors_named(name):
        image = ImageOps.exif_transpose(image) if turn else image
        if colours:
            rgb = np.asarray(image.convert("RGB")).astype(np.uint32)
            return MaskPage(rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2], name)
        palette = image.mode == "P"
        white = palette and (image.getpalette() or [])[3 * VOID :] == [VOID] * 3
        values = np.asarray(image)
    if values.ndim == 3:
        return MaskPage(_one_channel(values, page), name)
    if page.levels < 255 or (image.format == "PPM" and page.levels < 65535):
        top = 65535 if image.mode.startswith("I") else 255
        values = np.rint(values.astype(np.float64) * page.levels / top).astype(np.int64)
    return MaskPage(values, name, palette, white)


def _one_channel(values: npt.NDArray[np.generic], page: Page) -> npt.NDArray[np.generic]:
    """The channel (H, W) that holds everything in an image (H, W, C). ``DataError`` if there is none."""
    colour = values[..., :-1] if page.image.mode in ("LA", "RGBA", "PA") else values
    kept = colour.shape[-1] < values.shape[-1] and (values[..., -1] != values[0, 0, -1]).any()
    if "16" in page.packing:
        problem = f"has {values.shape[-1]} channels of 16 bits"
    elif kept:
        problem = "has an alpha channel that differs from place to place"
    elif page.image.mode == "PA" or (colour == colour[..., :1]).all():
        return colour[..., 0]
    elif colour.shape[-1] != 3 or page.image.mode not in ("RGB", "RGBA"):
        problem = f"has {values.shape[-1]} channels ({page.image.mode})"
    else:
        raise DataError(
            f"{page.name}: mask shows colours; pass --mask-colours to number each colour as an object, "
            "or save object numbers 0..255 in one channel (grey or palette)"
        )
    raise DataError(f"{page.name}: mask {problem}; save object numbers 0..255 in one channel (grey or palette)")


def _lossy_webp(data: bytes) -> bool:
    """Whether any picture of a WebP file is coded as VP8, which is lossy; VP8L is not."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return False
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind == b"VP8 ":
            return True
        at += 8 + (16 if kind == b"ANMF" else size + size % 2)  # a frame of an animation holds further chunks
    return False


def settle(pages: Sequence[MaskPage], reading: Reading) -> Masks:
    """The masks of one video as object numbers, with void pixels marked."""
    name = pages[0].name
    one_size([page.values.shape for page in pages], [page.name for page in pages], "mask")
    shown = np.stack([page.values for page in pages])
    if reading.mask_colours:
        ignore = None if reading.ignore_label is None else shown == reading.ignore_label
        return Masks(_numbered(shown, ignore, name), ignore)
    numbers, ignore = without_void(as_mask(shown, name), reading.ignore_label)
    present = set(np.flatnonzero(np.bincount(numbers.ravel(), minlength=256)).tolist())
    others, palette = present - {0, VOID}, all(page.palette for page in pages)
    said = reading.ignore_label is not None
    if VOID in present and not others and (said or not palette or any(page.white for page in pages)):
        return Masks(np.minimum(numbers, 1), ignore)
    if VOID not in present or max(others, default=0) >= SMALL or said:
        return Masks(numbers, ignore)
    if not palette:
        what = "255 beside small numbers is taken as an object; if it marks void, pass --ignore-label 255"
        return Masks(numbers, None, f"{name}: {what}")
    what = "a palette mask's 255 beside small numbers is taken as void; if it is an object, pass --ignore-label none"
    return Masks(*without_void(numbers, VOID), f"{name}: {what}")


def without_void(numbers: Numbers, label: int | None) -> tuple[Numbers, npt.NDArray[np.bool_] | None]:
    """Numbers with ``label`` replaced by the background, and a mask of those pixels; None without a label."""
    if label is None:
        return numbers, None
    ignore = numbers == label
    return np.where(ignore, np.uint8(0), numbers), ignore


def _numbered(colours: npt.NDArray[np.generic], ignore: npt.NDArray[np.bool_] | None, where: str) -> Numbers:
    """Colours (T, H, W) as object numbers in order of first appearance; black is the background."""
    numbers = {0: 0}
    out = np.zeros(colours.shape, np.uint8)
    for index, frame in enumerate(colours):
        here = frame if ignore is None else np.where(ignore[index], 0, frame)
        found, first, places = np.unique(here, return_index=True, return_inverse=True)
        for place in np.argsort(first):
            numbers.setdefault(int(found[place]), len(numbers))
        if len(numbers) > 256:
            raise DataError(
                f"{where}: masks of {len(numbers) - 1} colours; smoothed edges add colours, so save them without, "
                "or save object numbers 0..255"
            )
        out[index] = np.array([numbers[int(colour)] for colour in found], np.uint8)[places.reshape(frame.shape)]
    return out


def as_mask(values: npt.NDArray[np.generic], where: str) -> Numbers:
    """Object numbers of any dtype -> uint8. ``DataError`` if a number does not fit."""
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


def check_fit(frames: Sequence[int], masks: Sequence[int], where: str, remedy: str = "") -> None:
    """``DataError`` unless masks of a shape (T, H, W) cover frames of a shape (T, H, W, ...)."""
    if tuple(masks) != tuple(frames[:3]):
        raise DataError(
            f"{where}: {masks[0]} masks of {size_text(masks[1:]) if masks[0] else 'no size'} do not match "
            f"{frames[0]} frames of {size_text(frames[1:])}; "
            + (remedy or "give one mask per frame, of the frame's size")
        )


def visibility(masks: npt.NDArray[np.uint8], instances: int) -> npt.NDArray[np.int64]:
    """Pixels of objects 1..instances in each frame of (T, H, W) -> (instances, T)."""
    counts = [np.bincount(mask.ravel(), minlength=256)[1 : instances + 1] for mask in masks]
    return np.stack(counts, axis=1)


def unlabelled_instances(masks: npt.NDArray[np.uint8]) -> tuple[Instance, ...]:
    """Instance table of masks (T, H, W) that come without one: objects 1..max, known by their pixels only."""
    return counted(masks, [Instance()] * int(masks.max(initial=0)))


def counted(masks: npt.NDArray[np.uint8], instances: Sequence[Instance]) -> tuple[Instance, ...]:
    """Instances 1, 2, ... with their pixels in each frame of masks (T, H, W)."""
    counts = visibility(masks, len(instances))
    return tuple(replace(each, visibility=tuple(row.tolist())) for each, row in zip(instances, counts, strict=True))
