"""What lies in a folder: which files make which video, and which are its masks."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import DataError
from featcache.sources.clips import KNOWN, has_pages, is_image, is_video
from featcache.sources.images import SUFFIXES as IMAGES
from featcache.sources.splits import SPLIT_NAMES, split_folders

MASKS = "masks"


@dataclass(frozen=True)
class Entry:
    """One video: a clip, which is one file of all its frames, or images."""

    id: str  # path below the split's folder
    clip: Path | None
    images: tuple[Path, ...] = ()
    # Of images: one a frame, or None. Of a clip: its mask folder's files, or one of as many pages. None without masks/.
    masks: tuple[Path | None, ...] | None = None


def split_roots(root: Path) -> dict[str, Path]:
    """Split -> its folder, or the one file."""
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


def scan(base: Path) -> list[Entry]:
    """The videos below a split's folder, sorted by name in natural order. No pixel is decoded."""
    if base.is_file():
        if not (is_video(base) or is_image(base)):
            raise DataError(f"{base}: no video and no image; known are {KNOWN}, or give a folder")
        return [Entry(base.name, base)]
    masks = base / MASKS
    with_masks = masks.is_dir()
    entries = []
    for folder, below, names in os.walk(base, followlinks=True):
        here = Path(folder)
        below[:] = [name for name in below if not name.startswith(".") and here / name != masks]
        files = sorted((here / name for name in names if not name.startswith(".")), key=natural)
        relative = here.relative_to(base)
        clips = [p for p in files if is_video(p) or (is_image(p) and has_pages(p))]
        stills = [p for p in files if is_image(p) and p not in set(clips)]
        for path in clips:
            of_clip = _masks_of_clip(masks / relative, path) if with_masks else None
            entries.append(Entry((relative / path.name).as_posix(), path, (), of_clip))
        for group in [stills] if here != base else [[path] for path in stills]:
            if group:
                name = relative.as_posix() if here != base else group[0].name
                of_images = tuple(_mask_file(masks / relative, p) for p in group) if with_masks else None
                entries.append(Entry(name, None, tuple(group), of_images))
    if with_masks and not any(entry.masks and any(entry.masks) for entry in entries):
        raise DataError(
            f"{masks}: no mask in it has the place and name of an image or a clip; name masks as "
            f"{MASKS}/walk/00.png for walk/00.jpg, or remove {MASKS}/"
        )
    return sorted(entries, key=lambda entry: natural(Path(entry.id)))


def _masks_of_clip(folder: Path, clip: Path) -> tuple[Path, ...]:
    paths = sorted((p for p in (folder / clip.stem).glob("*") if is_image(p)), key=natural)
    if not paths and (file := _mask_file(folder, clip)):
        paths = [file]
    return tuple(paths)


def _mask_file(folder: Path, image: Path) -> Path | None:
    paths = (folder / f"{image.stem}{suffix}" for suffix in (".png", *sorted(IMAGES)))
    return next((path for path in paths if path.is_file()), None)
