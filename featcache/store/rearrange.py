"""A split whose videos get other places: made anew beside the old one, from hard links to the chunks that stay.

A chunk's file is named by its place and its bytes are the same at any, so nothing is computed or copied. The new
folder takes the old one's name once it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from featcache.store import manifest
from featcache.store.durable import NEXT, cannot_write, sync_directory, write_tree
from featcache.store.layout import array_layouts, chunk_numbers, chunk_path, split_metadata
from featcache.store.spec import SplitSpec, StoreSpec


def rearranged(
    path: Path, store: StoreSpec, present: SplitSpec, asked: SplitSpec, places: Mapping[int, manifest.Row]
) -> Path:
    """A folder beside the split at ``path`` with its videos at the places that ``asked`` gives them.

    ``places`` holds the rows of the finished videos that stay, by their new places; the others are yet to be made.
    """
    folder = path.with_name(f".{path.name}{NEXT}")
    if folder.exists():
        shutil.rmtree(folder)
    write_tree(folder, split_metadata(store, replace(asked, statistics_videos=0)))
    for layout in array_layouts(store, asked):
        here, there = path / layout.name, folder / layout.name
        for video, row in places.items():
            for old, new in zip(chunk_numbers(present, row.video), chunk_numbers(asked, video), strict=True):
                _link(chunk_path(here, old, layout.ndim), chunk_path(there, new, layout.ndim))
        sync_directory(there)
    manifest.replace_rows(folder, {video: replace(row, video=video) for video, row in sorted(places.items())})
    return folder


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except FileNotFoundError:
        pass  # for `verify` to find
    except OSError:  # a file system without links
        try:
            shutil.copyfile(old, new)
            with new.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(new, error) from error
