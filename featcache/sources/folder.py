"""A folder of videos, or of images.

::

    FOLDER/                       or FOLDER/train/..., FOLDER/validation/... (val, valid), FOLDER/test/...
      cars/one.mp4                a clip, at any depth: a video file, or an image of several pages
      walk/00.jpg 01.jpg ...      a folder of images: one video, its frames in natural order (2 before 10)
      photo.png                   an image directly in FOLDER: a video of one frame
      masks/                      optional: masks of frames, numbered 0 (background) to 255
        cars/one/00.png ...         those of a clip, in natural order; or cars/one.tif, with a page a frame
        walk/00.png 01.png ...      those of a folder of images, by the frame's name
        photo.png                   that of a single image

Frames without a mask are read, but not scored. If a clip has fewer masks than frames, its masks are named by frame
number.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from featcache.errors import DataError
from featcache.sources import clips
from featcache.sources.fingerprint import digest, file_digest
from featcache.sources.masks import decode_mask, settle, unlabelled_instances
from featcache.sources.place import Layout
from featcache.sources.reading import Reading
from featcache.sources.scan import Entry, scan, split_roots
from featcache.sources.splits import check_index, check_split
from featcache.sources.truth import check_sizes, read_truth, unclear_turns
from featcache.sources.video import Size, Source, Video
from featcache.text import printable

logger = logging.getLogger(__name__)

LOOKED_AT = 8  # masks of a split that are examined for remarks in advance


class FolderSource(Source):
    """Videos found in a folder when it is opened, in natural order of their names. Decodes nothing before ``read``."""

    def __init__(self, root: Path, reading: Reading | None = None, location: str | None = None) -> None:
        self.location = location or str(root)
        self.root = root
        self.reading = reading or Reading()
        roots = split_roots(root)
        self._has_splits = root not in roots.values()
        self._scans = {split: scan(folder, self.reading.frames_as) for split, folder in roots.items()}
        self._entries = {split: found.entries for split, found in self._scans.items()}
        self._lengths: dict[str, tuple[int, ...]] = {}
        self._hashed: dict[Path, bytes] = {}
        self._remarked: set[str] = set()
        if empty := [split for split, entries in self._entries.items() if not entries]:
            others = clips.listed(self._scans[empty[0]].left_out) or "no file"
            raise DataError(
                f"{root}: no video and no image in it (split {empty[0]}), but {others}; known are {clips.KNOWN}, and "
                "MOVi folders and HDF5 files"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hashed": {}}  # which no other process asks for

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

    def size(self, split: str, index: int) -> Size:
        return check_sizes(self._entries[split][index])

    def where(self, split: str, index: int) -> str:
        entry = self._entries[split][index]
        return str(entry.clip or (entry.images[0] if entry.images[1:] == () else entry.images[0].parent))

    def names(self, split: str) -> Sequence[str]:
        check_split(self.location, split, self._entries)
        return tuple(entry.id for entry in self._entries[split])

    def fingerprints(self, split: str) -> Sequence[str]:
        check_split(self.location, split, self._entries)
        return tuple(digest(self._content(entry)) for entry in self._entries[split])

    def _content(self, entry: Entry) -> Iterator[bytes | str]:
        """The entry's files in their order; a mask with the frame that it is for."""
        yield self.reading.of_masks()
        for path in entry.images or filter(None, (entry.clip,)):
            yield self._digest(path)
        for mask in entry.masks or ():
            # Masks of a clip may be named by the numbers of their frames.
            yield mask.name.removeprefix(entry.clip.stem) if mask and entry.clip else ""
            yield self._digest(mask) if mask else ""

    def fingerprint(self, split: str) -> str:
        check_split(self.location, split, self._entries)
        return digest(self._fingerprint_parts(split))  # as stores of version 0.1 have it

    def _fingerprint_parts(self, split: str) -> Iterator[bytes | str]:
        if how := self.reading.of_masks():
            yield how
        for entry in self._entries[split]:
            yield entry.id
            for path in (*((entry.clip,) if entry.clip else ()), *entry.images, *filter(None, entry.masks or ())):
                yield path.name
                yield self._digest(path)

    def _digest(self, path: Path) -> bytes:
        if path not in self._hashed:
            self._hashed[path] = file_digest(path)
        return self._hashed[path]

    def read(self, split: str, index: int) -> Video:
        return self.read_smaller(split, index, 1.0)

    def read_smaller(self, split: str, index: int, shrink: float) -> Video:
        check_split(self.location, split, self._entries)
        check_index(self.location, split, index, len(self._entries[split]))
        entry = self._entries[split][index]
        frames = clips.read_frames(entry.clip, shrink) if entry.clip else clips.read_images(entry.images, shrink)
        if entry.masks is None:
            return Video(entry.id, frames)
        size = (frames.shape[1], frames.shape[2])
        truth = read_truth(entry, (len(frames), *(size if shrink == 1 else check_sizes(entry))), self.reading)
        masks = truth.masks.resized(size)
        if masks.remark and self._is_new(masks.remark):
            logger.warning("%s", printable(masks.remark))
        return Video(entry.id, frames, masks.numbers, unlabelled_instances(masks.numbers), masks.ignore, truth.labelled)

    def _is_new(self, remark: str) -> bool:
        """Whether this is the first remark of its kind: masks of one data set usually have the same problem."""
        what = remark.rpartition(": ")[2]
        known = what in self._remarked
        self._remarked.add(what)
        return not known

    def left_out(self) -> Mapping[str, int]:
        counts = sum((Counter(found.left_out) for found in self._scans.values()), Counter[str]())
        return dict(sorted(counts.items()))

    def question(self) -> str:
        sequence = next((found.sequence for found in self._scans.values() if found.sequence), ())
        if sequence and not self._has_splits:
            return (
                f"{self.root}: {len(sequence)} images numbered from {sequence[0].name} to {sequence[-1].name}: pass "
                "--frames-as video if they are the frames of one video, --frames-as images if each is by itself"
            )
        if album := next((found.album for found in self._scans.values() if found.album), ()):
            return (
                f"{album[0].parent}: {len(album)} images that do not look like the frames of one video (names or sizes "
                "differ): pass --frames-as images if each is by itself, --frames-as video if every folder is a video"
            )
        return ""

    def remarks(self, split: str) -> Sequence[str]:
        check_split(self.location, split, self._entries)
        entries = self._entries[split]
        scanned = self._scans[split]
        found = [unclear_turns(entries), _without_masks(entries), _stray(scanned.stray_masks), _series(scanned.series)]
        for path in [path for entry in entries for path in entry.masks or () if path][:LOOKED_AT]:
            with suppress(DataError):  # reading the video will raise it
                found.append(
                    settle(
                        decode_mask(clips.read_bytes(path), str(path), self.reading.mask_colours), self.reading
                    ).remark
                )
        return tuple(remark for remark in found if remark and self._is_new(remark))


def _stray(masks: Sequence[Path]) -> str:
    if not masks:
        return ""
    return f"{masks[0]}: one of {len(masks)} masks that belong to no frame; a mask has its frame's place and name"


def _series(entries: Sequence[Entry]) -> str:
    """A remark on folders of images that were taken for videos: they may as well be the classes of single images."""
    if not entries:
        return ""
    folders = "1 folder of images is" if len(entries) == 1 else f"{len(entries)} folders of images are"
    return (
        f"{entries[0].images[0].parent}: {folders} read as a video each ({len(entries[0].images)} frames here); if "
        "every image is by itself, pass --frames-as images"
    )


def _without_masks(entries: Sequence[Entry]) -> str:
    """A remark on images and clips without a mask in a split that has masks; empty if there are none."""
    wanted = [
        (file, mask)
        for entry in entries
        if entry.masks is not None
        for file, mask in ([(entry.clip, entry.masks)] if entry.clip else zip(entry.images, entry.masks, strict=True))
    ]
    missing = [file for file, mask in wanted if not mask]
    if not missing:
        return ""
    return f"{missing[0]}: no mask, as for {len(missing)} of {len(wanted)} images and clips; these are not scored"


LAYOUT = Layout(
    "folder",
    "folders of videos or frames",
    lambda path: True,
    lambda place, reading: FolderSource(place.path, reading, place.location),
    colours=True,
)
