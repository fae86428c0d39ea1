"""Assigns the masks of a folder's video to its frames."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.sources import clips
from featcache.sources.images import LYING, Header, one_size, read_header
from featcache.sources.masks import MaskPage, Masks, check_fit, decode_mask, settle
from featcache.sources.reading import Reading
from featcache.sources.scan import Entry
from featcache.sources.video import Size


@dataclass(frozen=True)
class Truth:
    """The ground truth of a video."""

    masks: Masks  # (T, H, W), background in frames without a mask
    labelled: npt.NDArray[np.bool_] | None  # (T,) frames that have a mask; None if all have


def read_truth(entry: Entry, shape: tuple[int, int, int], reading: Reading) -> Truth:
    """Masks of the entry's frames (T, H, W). ``DataError`` if they do not fit."""
    files = [path for path in entry.masks or () if path]
    frames, *size = shape
    if not files:
        return Truth(Masks(np.zeros(shape, np.uint8)), np.zeros(frames, bool))
    decoded = [decode_mask(clips.read_bytes(path), str(path), reading.mask_colours) for path in files]
    pages = [page for file in decoded for page in file]
    places = _places(entry, pages, frames)
    masks = settle(pages, reading)
    where = str(files[0].parent)
    covered = (len(places), *size)
    remedy = exif_remedy(entry) if masks.numbers.shape != covered else ""
    check_fit(covered, masks.numbers.shape, where, remedy)
    if len(places) == frames:
        return Truth(masks, None)
    numbers, labelled = np.zeros(shape, np.uint8), np.zeros(frames, bool)
    numbers[places], labelled[places] = masks.numbers, True
    ignore = None
    if masks.ignore is not None:
        ignore = np.zeros(shape, bool)
        ignore[places] = masks.ignore
    return Truth(Masks(numbers, ignore, masks.remark), labelled)


def check_sizes(entry: Entry) -> Size:
    """Height and width of the entry's frames, from headers. ``DataError`` if frames or masks differ in size."""
    files = [entry.clip] if entry.clip else list(entry.images)
    sizes = [clips.frame_size(file) for file in files]
    one_size(sizes, [str(file) for file in files])
    masks = [path for path in entry.masks or () if path]
    if masks:
        sizes_of_masks = [read_header(path).turned() for path in masks]
        one_size(sizes_of_masks, [str(path) for path in masks], "mask")
        if sizes_of_masks[0] != sizes[0]:
            count = len(masks)  # compare sizes only, as some frames may have no mask
            shapes = (count, *sizes[0]), (count, *sizes_of_masks[0])
            check_fit(*shapes, str(masks[0].parent), exif_remedy(entry))
    return sizes[0]


def _places(entry: Entry, pages: Sequence[MaskPage], frames: int) -> list[int]:
    """The frame index of each mask. ``DataError`` if the names of the masks do not say."""
    assert entry.masks is not None
    if entry.clip is None:
        return [place for place, path in enumerate(entry.masks) if path]
    if len(pages) == frames:
        return list(range(frames))
    first = entry.masks[0]
    assert first is not None
    what = f"{first.parent}: {len(pages)} masks of {frames} frames of {entry.clip.name}"
    numbers = [int(match[0]) for path in entry.masks if path and (match := re.search(r"\d+(?=\D*$)", path.stem))]
    if len(numbers) < len(pages) or len(set(numbers)) < len(numbers):
        raise DataError(f"{what}; give one mask per frame, or name each by the number of its frame, from 0")
    start = 0 if 0 in numbers else 1 if frames in numbers else None
    if start is None and max(numbers) < frames:
        raise DataError(
            f"{what}, of which none is numbered 0 or {frames}, so they may count from 0 or from 1; add the mask of the "
            "first or the last frame"
        )
    if start is None or max(numbers) - start >= frames:
        raise DataError(f"{what}, the last of which is numbered {max(numbers)}; number them as the frames, from 0")
    return [number - start for number in numbers]


def exif_remedy(entry: Entry) -> str:
    """The remedy for masks of the wrong size, if only the mask or only the image is turned; else empty."""
    for image, mask in _pairs(entry):
        here, there = read_header(image).orientation, read_header(mask).orientation
        if (here in LYING) != (there in LYING):
            return (
                f"{image} is turned by its EXIF orientation {here}, {mask} has {there}: "
                "save the mask with its image's tag, or both upright and without"
            )
    return ""


def unclear_turns(entries: Sequence[Entry]) -> str:
    """A remark on images and masks whose EXIF tags differ, if their sizes do not show a mistake; else empty."""
    pairs = [pair for entry in entries for pair in _pairs(entry)]
    unclear = [(image, mask) for image, mask in pairs if _turn_is_unclear(read_header(image), read_header(mask))]
    if not unclear:
        return ""
    image, mask = unclear[0]
    more = f" (and {len(unclear) - 1} more)" if unclear[1:] else ""
    return (
        f"{mask}{more}: EXIF orientation {read_header(mask).orientation}, but {read_header(image).orientation} in "
        f"{image}, and both ways fit its size; each is turned by its own. If masks lie wrong, give them their "
        "image's tag"
    )


def _turn_is_unclear(image: Header, mask: Header) -> bool:
    """Whether image and mask are turned differently, and the mask would fit if it were turned as the image is."""
    return (
        image.orientation != mask.orientation
        and image.turned() == mask.turned()
        and image.turned() == mask.turned(image.orientation)
    )


def _pairs(entry: Entry) -> list[tuple[Path, Path]]:
    """Images that have a mask, with that mask."""
    return [(image, mask) for image, mask in zip(entry.images, entry.masks or (), strict=False) if mask]
