"""Scans a folder: which files make which video, which are its masks, and which are left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from featcache.errors import DataError
from featcache.sources.clips import KNOWN, frame_size, has_pages, is_image, is_video
from featcache.sources.images import PERHAPS
from featcache.sources.images import SUFFIXES as IMAGES
from featcache.sources.splits import SPLIT_NAMES, split_folders
from featcache.words import FramesAs

MASKS = "masks"
SEQUENCE = 5  # least number of images, numbered by one step, that may be the frames of a video


@dataclass(frozen=True)
class Entry:
    """One video: a clip (one file with all frames), or images."""

    id: str  # path below the split's folder
    clip: Path | None
    images: tuple[Path, ...] = ()
    # Images: one per frame, or None. A clip: the files of its mask folder, or one file of pages. None without masks/.
    masks: tuple[Path | None, ...] | None = None


@dataclass(frozen=True)
class Scan:
    """The contents of a split's folder."""

    entries: tuple[Entry, ...]  # in natural order of their names
    left_out: Mapping[str, int]  # files of other kinds, by suffix
    stray_masks: tuple[Path, ...] = ()  # images in masks/ that belong to no frame
    sequence: tuple[Path, ...] = ()  # images in the folder itself that look like frames of one video
    album: tuple[Path, ...] = ()  # images of a folder below, taken for one video, that do not look like its frames
    series: tuple[Entry, ...] = ()  # folders of images that were taken for videos unasked


def split_roots(root: Path) -> dict[str, Path]:
    """Split -> its folder, or the only file. ``DataError`` for videos beside split folders."""
    if root.is_file():
        return {"train": root}
    names = split_folders((p.name for p in sorted(root.iterdir()) if p.is_dir()), str(root))
    loose = [p for p in root.iterdir() if p.name.lower() not in SPLIT_NAMES and not p.name.startswith(".")]
    if names and (stray := next((p for p in loose if p.is_dir() or is_video(p) or is_image(p)), None)):
        raise DataError(f"{stray}: lies beside the split folders {', '.join(names.values())}; move it into one")
    return {split: root / name for split, name in names.items()} or {"train": root}


def natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key in which frame2 comes before frame10."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(1, int(part), "") if i % 2 else (0, 0, part) for i, part in enumerate(parts)]


def scan(base: Path, frames_as: FramesAs | None = None) -> Scan:
    """The videos below a split's folder. No pixel is decoded.

    With ``frames_as="video"`` the images of a folder are one video, with ``"images"`` each is one; without, the former
    in folders below, the latter in the folder itself. ``DataError`` for masks at the wrong place.
    """
    if base.is_file():
        if not (is_video(base) or is_image(base)):
            raise DataError(f"{base}: no video and no image; known are {KNOWN}, or give a folder")
        return Scan((Entry(base.name, base),), {})
    masks = base / MASKS
    with_masks = masks.is_dir()
    entries: list[Entry] = []
    left_out: Counter[str] = Counter()
    sequence: tuple[Path, ...] = ()
    album: tuple[Path, ...] = ()
    series: list[Entry] = []
    for here, files in _folders(base, masks):
        relative = here.relative_to(base)
        _refuse_masks(base, relative, files)
        clips, stills = [], []
        for path in sorted(files, key=natural):
            if is_video(path) or (is_image(path) and has_pages(path)):
                clips.append(path)
            elif is_image(path):
                stills.append(path)
            else:
                left_out[path.suffix.lower() or "no suffix"] += 1
        for path in clips:
            of_clip = _masks_of_clip(masks / relative, path) if with_masks else None
            entries.append(Entry((relative / path.name).as_posix(), path, (), of_clip))
        together = frames_as == "video" or (frames_as is None and here != base)
        for group in [stills] if together else [[path] for path in stills]:
            if group:
                name = (relative.as_posix() if here != base else base.name) if together else group[0].name
                name = name if together else (relative / name).as_posix()
                of_images = tuple(_mask_file(masks / relative, p) for p in group) if with_masks else None
                entries.append(Entry(name, None, tuple(group), of_images))
        if frames_as is None and here == base and _counts_up(stills):
            sequence = tuple(stills)
        elif frames_as is None and here != base and stills[1:]:
            series.append(entries[-1])
            album = album or (() if _alike(stills) else tuple(stills))
    used = {mask for entry in entries for mask in entry.masks or () if mask}
    if with_masks and entries and not used:
        raise DataError(
            f"{masks}: no mask in it has the place and name of an image or a clip; name masks as "
            f"{MASKS}/walk/00.png for walk/00.jpg, or remove {MASKS}/"
        )
    stray = [p for _, files in _folders(masks) for p in files if is_image(p) and p not in used] if with_masks else []
    order = sorted(entries, key=lambda entry: natural(Path(entry.id)))
    return Scan(
        tuple(order),
        dict(sorted(left_out.items())),
        tuple(sorted(stray, key=natural)),
        sequence,
        album,
        tuple(series),
    )


def _folders(base: Path, without: Path | None = None) -> Iterator[tuple[Path, list[Path]]]:
    """``base`` and the folders below it, each with its files, without hidden ones. A folder that several links lead to
    comes once, by the path with the fewest links."""
    entered: set[tuple[int, int]] = set()
    level = [base]
    while level:
        links: list[Path] = []
        while level:
            here = level.pop(0)
            state = here.stat()
            if (state.st_dev, state.st_ino) in entered:
                continue
            entered.add((state.st_dev, state.st_ino))
            files = []
            with os.scandir(here) as listed:
                for found in sorted(listed, key=lambda entry: natural(Path(entry.name))):
                    path = here / found.name
                    if found.name.startswith(".") or path == without:
                        continue
                    if found.is_dir():
                        (links if found.is_symlink() else level).append(path)
                    elif found.is_file() or found.is_symlink():  # a broken link is reported when it is read
                        files.append(path)
            yield here, files
        level = links


def _refuse_masks(base: Path, relative: Path, files: Sequence[Path]) -> None:
    """``DataError`` where a folder below the base's own holds masks, which would be read as videos."""
    parts = relative.parts
    at = next((place for place, part in enumerate(parts) if part.lower() == MASKS), None)
    if at is not None and any(is_image(path) or is_video(path) for path in files):
        right = base.joinpath(MASKS, *parts[:at], *parts[at + 1 :])
        raise DataError(
            f"{base / relative}: masks of {base} lie directly in {base / MASKS}; move these to {right}, or give the "
            f"folder another name if they are no masks"
        )


def _alike(images: Sequence[Path]) -> bool:
    """Whether images have one size, and names that differ in numbers alone, as the frames of a video do."""
    if len({re.sub(r"\d+", "0", path.name) for path in images}) > 1:
        return False
    try:
        return len({frame_size(path) for path in images}) == 1
    except DataError:
        return True  # reading it will say what is wrong


def _counts_up(images: Sequence[Path]) -> bool:
    """Whether images have one size and are numbered by a constant step, like the frames of a video."""
    if len(images) < SEQUENCE:
        return False
    parts = [re.fullmatch(r"(.*?)(\d+)(\D*)", path.name) for path in images]
    if not all(parts) or len({(part[1], part[3]) for part in parts if part}) > 1:
        return False
    numbers = [int(part[2]) for part in parts if part]
    if len({after - before for before, after in pairwise(numbers)}) > 1:
        return False
    try:
        return len({frame_size(path) for path in images}) == 1
    except DataError:
        return False


def _masks_of_clip(folder: Path, clip: Path) -> tuple[Path, ...]:
    paths = sorted((p for p in (folder / clip.stem).glob("*") if is_image(p)), key=natural)
    if not paths and (file := _mask_file(folder, clip)):
        paths = [file]
    return tuple(paths)


def _mask_file(folder: Path, image: Path) -> Path | None:
    paths = (folder / f"{image.stem}{suffix}" for suffix in (".png", *sorted(IMAGES | PERHAPS)))
    return next((path for path in paths if path.is_file()), None)
