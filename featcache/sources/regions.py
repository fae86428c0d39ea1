"""Regions as COCO's annotations write them, and how regions that overlap become object numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError, UsageError
from featcache.sources.images import size_text
from featcache.sources.masks import Numbers
from featcache.sources.video import Size

MOST = 255  # objects that numbers of 8 bits tell apart
OVERLAPS = ("ignored", "painted")
CROWDS = ("ignored", "background", "objects")  # the first is usual; the others are those of published evaluations

Region = npt.NDArray[np.bool_]


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); copy it there") from error
    except ValueError as error:
        raise DataError(f"{path}: is no JSON ({error}); copy or download it again") from error


def require_coco() -> None:
    """``UsageError`` where pycocotools is not installed."""
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "masks of polygons and run lengths are read by pycocotools, which is missing: pip install 'slotlab[coco]'"
        ) from error


def decode_region(segmentation: Any, size: Size, where: str) -> Region:
    """Polygons, or run lengths, compressed or not -> (H, W). ``DataError`` if they are damaged or of another size."""
    require_coco()
    from pycocotools import mask

    try:
        if isinstance(segmentation, dict):
            if tuple(segmentation["size"]) != size:
                raise DataError(
                    f"{where}: mask is {size_text(segmentation['size'])}, but its image {size_text(size)}; "
                    "copy the pictures and the annotations of one data set"
                )
            runs = segmentation
            if not isinstance(segmentation["counts"], (str, bytes)):
                runs = mask.frPyObjects(segmentation, *size)
        else:
            runs = mask.merge(mask.frPyObjects(segmentation, *size))
        return np.asarray(mask.decode(runs)).astype(bool)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # pycocotools raises many kinds
        raise DataError(
            f"{where}: its segmentation cannot be decoded ({error}); download the annotations again"
        ) from error


class Canvas:
    """One frame on which objects are laid in the order of their numbers."""

    def __init__(self, size: Size, overlaps: str) -> None:
        self._painted = overlaps == "painted"
        self.numbers: Numbers = np.zeros(size, np.uint8)
        self.ignore: Region = np.zeros(size, bool)

    def lay(self, number: int, region: Region) -> None:
        """Add an object. Where one lies already, that stays, and the pixel is ignored unless overlaps are painted."""
        taken = region & (self.numbers > 0)
        self.numbers[region & ~taken] = number
        if not self._painted:
            self.ignore |= taken

    def leave_out(self, region: Region) -> None:
        """Mark pixels whose truth is not known; after all objects are laid, which keep theirs if they are painted."""
        self.ignore |= region & (self.numbers == 0) if self._painted else region

    def finish(self) -> tuple[Numbers, Region]:
        """Object numbers and ignored pixels, (H, W) each; an ignored pixel has no object."""
        self.numbers[self.ignore] = 0
        return self.numbers, self.ignore


def require_few(count: int, where: str) -> None:
    """``DataError`` where objects are too many to be numbered."""
    if count > MOST:
        raise DataError(
            f"{where}: {count} objects, and numbers of 8 bits tell {MOST} apart; extract without it (--skip-damaged)"
        )
