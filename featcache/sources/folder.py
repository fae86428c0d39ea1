"""A folder of videos, or of images.

::

    FOLDER/                       or FOLDER/train/..., FOLDER/validation/... (val, valid), FOLDER/test/...
      cars/one.mp4                a video file, at any depth
      walk/00.jpg 01.jpg ...      a folder of images: one video, its frames in natural order (2 before 10)
      photo.png                   an image directly in FOLDER: a video of one frame
      masks/                      optional; then every frame has a mask, numbered 0 (background) to 255:
        cars/one/00.png ...         the masks of a video file, in natural order
        walk/00.png 01.png ...      those of a folder of images, by the frame's name
        photo.png                   that of a single image
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.sources import video_file
from featcache.sources.fingerprint import digest, file_digest
from featcache.sources.images import LYING, Header, decode_image, read_header, stack
from featcache.sources.masks import check_fit, decode_mask, unlabelled_instances
from featcache.sources.splits import SPLIT_NAMES, check_index, check_split, split_folders
from featcache.sources.video import Source, Video

IMAGES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"))
MASKS = "masks"


@dataclass(frozen=True)
class Entry:
    """One video: a file, or images."""

    id: str  # path below the split's folder
    video: Path | None
    images: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()  # of images: one a frame; of a video file: its mask folder's files


class FolderSource(Source):
    """Videos found in a folder when it is opened, sorted by name in natural order. Nothing is decoded until asked."""

    def __init__(self, root: Path) -> None:
        self.location = str(root)
        self.root = root
        self._entries = {split: tuple(_scan(folder)) for split, folder in _split_roots(root).items()}
        self._lengths: dict[str, tuple[int, ...]] = {}
        if empty := [split for split, entries in self._entries.items() if not entries]:
            raise DataError(
                f"{root}: no video and no image in it (split {empty[0]}); known are "
                f"{' '.join(sorted(video_file.SUFFIXES | IMAGES))}, and MOVi folders and HDF5 files"
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
                video_file.count_frames(entry.video) if entry.video else len(entry.images)
                for entry in self._entries[split]
            )
        return self._lengths[split]

    def fingerprint(self, split: str) -> str:
        check_split(self.location, split, self._entries)
        return digest(self._fingerprint_parts(split))

    def _fingerprint_parts(self, split: str) -> Iterator[bytes | str]:
        for entry in self._entries[split]:
            yield entry.id
            for path in (*((entry.video,) if entry.video else ()), *entry.images, *entry.masks):
                yield path.name
                yield file_digest(path)

    def read(self, split: str, index: int) -> Video:
        check_split(self.location, split, self._entries)
        check_index(self.location, split, index, len(self._entries[split]))
        entry = self._entries[split][index]
        if entry.video:
            frames = video_file.read_frames(entry.video)
        else:
            names = [str(path) for path in entry.images]
            frames = stack([decode_image(_read(path), str(path)) for path in entry.images], names)
        if not entry.masks:
            return Video(entry.id, frames)
        masks = _masks(entry.masks)
        remedy = _exif_remedy(entry) if masks.shape != frames.shape[:3] else ""
        check_fit(frames, masks, str(entry.masks[0].parent), remedy)
        return Video(entry.id, frames, masks, unlabelled_instances(masks))

    def remarks(self, split: str) -> Sequence[str]:
        check_split(self.location, split, self._entries)
        pairs = [pair for entry in self._entries[split] for pair in zip(entry.images, entry.masks, strict=False)]
        unclear = [(image, mask) for image, mask in pairs if _turn_is_unclear(read_header(image), read_header(mask))]
        if not unclear:
            return ()
        image, mask = unclear[0]
        more = f" (and {len(unclear) - 1} more)" if unclear[1:] else ""
        return (
            f"{mask}{more}: EXIF orientation {read_header(mask).orientation}, but {read_header(image).orientation} in "
            f"{image}, and both ways fit its size; each is turned by its own. If masks lie wrong, give them their "
            "image's tag",
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


def _masks(paths: Sequence[Path]) -> npt.NDArray[np.uint8]:
    return stack([decode_mask(_read(path), str(path)) for path in paths], [str(p) for p in paths], "mask")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; it was there when the folder was opened") from error


def _split_roots(root: Path) -> dict[str, Path]:
    if root.is_file():
        return {"train": root}
    names = split_folders((p.name for p in sorted(root.iterdir()) if p.is_dir()), str(root))
    loose = [p for p in root.iterdir() if p.name.lower() not in SPLIT_NAMES and not p.name.startswith(".")]
    if names and (stray := next((p for p in loose if p.is_dir() or _is_media(p)), None)):
        raise DataError(f"{stray}: lies beside the split folders {', '.join(names.values())}; move it into one")
    return {split: root / name for split, name in names.items()} or {"train": root}


def _is_media(path: Path) -> bool:
    return path.suffix.lower() in video_file.SUFFIXES or path.suffix.lower() in IMAGES


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key in which frame2 comes before frame10."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(1, int(part), "") if i % 2 else (0, 0, part) for i, part in enumerate(parts)]


def _scan(base: Path) -> list[Entry]:
    if base.is_file():
        if base.suffix.lower() not in video_file.SUFFIXES:
            raise DataError(f"{base}: not a video; known are {' '.join(sorted(video_file.SUFFIXES))}, or give a folder")
        return [Entry(base.name, base)]
    masks = base / MASKS
    with_masks = masks.is_dir()
    entries = []
    for folder, below, names in os.walk(base, followlinks=True):
        here = Path(folder)
        below[:] = [name for name in below if not name.startswith(".") and here / name != masks]
        files = [here / name for name in names if not name.startswith(".")]
        images = sorted((p for p in files if p.suffix.lower() in IMAGES), key=_natural)
        relative = here.relative_to(base)
        for path in files:
            if path.suffix.lower() in video_file.SUFFIXES:
                of_file = _mask_folder(masks / relative / path.stem, path) if with_masks else ()
                entries.append(Entry((relative / path.name).as_posix(), path, (), of_file))
        for group in [images] if here != base else [[path] for path in images]:
            if group:
                name = relative.as_posix() if here != base else group[0].name
                of_images = tuple(_mask_of(masks / relative, p) for p in group) if with_masks else ()
                entries.append(Entry(name, None, tuple(group), of_images))
    return sorted(entries, key=lambda entry: _natural(Path(entry.id)))


def _mask_folder(folder: Path, video: Path) -> tuple[Path, ...]:
    paths = sorted((p for p in folder.glob("*") if p.suffix.lower() in IMAGES), key=_natural)
    if not paths:
        raise DataError(f"{folder}: no masks for {video.name}; put one image a frame there, or remove {MASKS}/")
    return tuple(paths)


def _mask_of(folder: Path, image: Path) -> Path:
    for suffix in (".png", *sorted(IMAGES)):
        if (path := folder / f"{image.stem}{suffix}").is_file():
            return path
    raise DataError(f"{folder / image.stem}.png: no mask for {image}; add it, or remove {MASKS}/")
