"""A folder of videos, or of images.

::

    FOLDER/                       or FOLDER/train/..., FOLDER/validation/... (val, valid), FOLDER/test/...
      cars/one.mp4                a clip, at any depth: a video file, or an image of several pages
      walk/00.jpg 01.jpg ...      a folder of images: one video, its frames in natural order (2 before 10)
      photo.png                   an image directly in FOLDER: a video of one frame
      masks/                      optional; then every frame has a mask, numbered 0 (background) to 255:
        cars/one/00.png ...         the masks of a clip, in natural order; or cars/one.tif, with a page a frame
        walk/00.png 01.png ...      those of a folder of images, by the frame's name
        photo.png                   that of a single image
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from featcache.errors import DataError
from featcache.sources import clips
from featcache.sources.fingerprint import digest, file_digest
from featcache.sources.images import LYING, Header, read_header
from featcache.sources.masks import Masks, check_fit, decode_mask, settle, unlabelled_instances
from featcache.sources.reading import Reading
from featcache.sources.scan import Entry, scan, split_roots
from featcache.sources.splits import check_index, check_split
from featcache.sources.video import Source, Video

logger = logging.getLogger(__name__)

LOOKED_AT = 4  # videos of a split whose masks are looked at for remarks before all are read


class FolderSource(Source):
    """Videos found in a folder when it is opened, sorted by name in natural order. Nothing is decoded until asked."""

    def __init__(self, root: Path, reading: Reading | None = None) -> None:
        self.location = str(root)
        self.root = root
        self.reading = reading or Reading()
        self._entries = {split: tuple(scan(folder)) for split, folder in split_roots(root).items()}
        self._lengths: dict[str, tuple[int, ...]] = {}
        self._remarked: set[str] = set()
        if empty := [split for split, entries in self._entries.items() if not entries]:
            raise DataError(
                f"{root}: no video and no image in it (split {empty[0]}); known are {clips.KNOWN}, and MOVi folders "
                "and HDF5 files"
            )

    def splits(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def videos(self, split: str) -> int:
        check_split(self.location, split, self._entries)
        return len(self._entries[split])

    def lengths(self, split: str) -> Sequence[int]:
        check_split(self.location, split, self._entries)
        if split not in self._lengths:
            self._lengths[split] = tuple(
                clips.count_frames(entry.clip) if entry.clip else len(entry.images) for entry in self._entries[split]
            )
        return self._lengths[split]

    def fingerprint(self, split: str) -> str:
        check_split(self.location, split, self._entries)
        return digest(self._fingerprint_parts(split))

    def _fingerprint_parts(self, split: str) -> Iterator[bytes | str]:
        if self.reading != Reading():
            yield repr(self.reading)
        for entry in self._entries[split]:
            yield entry.id
            for path in (*((entry.clip,) if entry.clip else ()), *entry.images, *entry.masks):
                yield path.name
                yield file_digest(path)

    def read(self, split: str, index: int) -> Video:
        check_split(self.location, split, self._entries)
        check_index(self.location, split, index, len(self._entries[split]))
        entry = self._entries[split][index]
        frames = clips.read_frames(entry.clip) if entry.clip else clips.read_images(entry.images)
        if not entry.masks:
            return Video(entry.id, frames)
        masks = self._masks(entry)
        remedy = _exif_remedy(entry) if masks.numbers.shape != frames.shape[:3] else ""
        check_fit(frames, masks.numbers, str(entry.masks[0].parent), remedy)
        if masks.remark and self._is_new(masks.remark):
            logger.warning("%s", masks.remark)
        return Video(entry.id, frames, masks.numbers, unlabelled_instances(masks.numbers), masks.ignore)

    def _masks(self, entry: Entry) -> Masks:
        colours = self.reading.mask_colours
        files = [decode_mask(clips.read_bytes(path), str(path), colours) for path in entry.masks]
        return settle([page for file in files for page in file], self.reading)

    def _is_new(self, remark: str) -> bool:
        """Whether nothing of the kind was said before: masks of one data set are alike."""
        what = remark.rpartition(": ")[2]
        known = what in self._remarked
        self._remarked.add(what)
        return not known

    def remarks(self, split: str) -> Sequence[str]:
        check_split(self.location, split, self._entries)
        entries = self._entries[split]
        found = [_unclear_turns(entries)]
        for entry in [entry for entry in entries if entry.masks][:LOOKED_AT]:
            with suppress(DataError):  # which reading the video will raise
                found.append(self._masks(entry).remark)
        return tuple(remark for remark in found if remark and self._is_new(remark))


def _unclear_turns(entries: Sequence[Entry]) -> str:
    """What to look at where images and masks have different EXIF tags, and sizes do not tell whether that is meant."""
    pairs = [pair for entry in entries for pair in zip(entry.images, entry.masks, strict=False)]
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


def _exif_remedy(entry: Entry) -> str:
    """What to do about masks of the wrong size, if that comes from one being turned and the other not."""
    for image, mask in zip(entry.images, entry.masks, strict=False):
        here, there = read_header(image).orientation, read_header(mask).orientation
        if (here in LYING) != (there in LYING):
            return (
                f"{image} is turned by its EXIF orientation {here}, {mask} has {there}: "
                "save the mask with its image's tag, or both upright and without"
            )
    return ""


def _turn_is_unclear(image: Header, mask: Header) -> bool:
    """Whether image and mask are turned differently, and the mask would fit if it were turned as the image is."""
    return (
        image.orientation != mask.orientation
        and image.turned() == mask.turned()
        and image.turned() == mask.turned(image.orientation)
    )
