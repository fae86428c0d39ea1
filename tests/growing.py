"""Folders of small videos that change, and the stores that follow them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from featcache.backbones.backbone import Backbone
from featcache.extraction.changes import Changes
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.sources import open_source
from featcache.sources.folder import FolderSource
from featcache.sources.video import Source, Video
from featcache.store import manifest
from featcache.store.reading import Split
from featcache.upkeep.verify import verify
from tests.media import save_images
from tests.movi_files import FRAMES, scene

# Videos of three frames, two to a batch: those of one group are computed together.
OPTIONS = ExtractOptions(batch_size=6, precision="float32")
GROW, PRUNE = replace(OPTIONS, grow=True), replace(OPTIONS, prune=True)


def put(folder: Path, name: str, number: int, frames: int = FRAMES) -> None:
    """One video with masks, in place of what is there; ``number`` decides its pixels."""
    for place, values in zip((folder / name, folder / "masks" / name), scene(number, frames), strict=True):
        shutil.rmtree(place, ignore_errors=True)
        save_images(place, values)


def drop(folder: Path, name: str) -> None:
    for place in (folder / name, folder / "masks" / name):
        shutil.rmtree(place)


def rename(folder: Path, name: str, other: str) -> None:
    for place in (folder, folder / "masks"):
        (place / name).rename(place / other)


def videos(folder: Path, names: Sequence[str] = "abcdef") -> Path:
    for number, name in enumerate(names):
        put(folder, name, number)
    return folder


def run(
    path: Path, source: Source | Path, backbone: Backbone, options: ExtractOptions = OPTIONS
) -> tuple[Split, Changes]:
    source = open_source(source) if isinstance(source, Path) else source
    todo = plan(path, source, backbone, options)
    split = extract(todo, source, backbone)["train"]
    assert split.complete and verify(path) == []
    return split, todo.splits[0].changes


def ids(split: Split) -> list[str]:
    return [row.id for row in split.manifest.values()]


def files(path: Path) -> dict[str, bytes]:
    """Every file of a store but its lock and its root, which names the source; manifests with their rows in order."""
    skipped = (path / ".lock", path / "zarr.json")
    found = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file() and f not in skipped}
    for name, content in found.items():
        if name.endswith(manifest.NAME):
            found[name] = b"".join(sorted(content.splitlines(keepends=True)))
    return found


def same_as_fresh(split: Split, source: Path, backbone: Backbone, options: ExtractOptions = OPTIONS) -> bool:
    path = split.store.path.with_name("fresh.zarr")
    shutil.rmtree(path, ignore_errors=True)
    run(path, source, backbone, options)
    return files(split.store.path) == files(path)


class Reading(FolderSource):
    """Notes which videos are decoded."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.decoded: list[str] = []

    def read_smaller(self, split: str, index: int, shrink: float) -> Video:
        self.decoded.append(self.names(split)[index])
        return super().read_smaller(split, index, shrink)
