"""A split whose videos get other places: made anew beside the old one, from the chunks that stay.

A chunk's bytes are the same at any place, so nothing is computed. Files that stay whole are hard links to the old ones;
shards that lose or get chunks are put together anew. The new folder takes the old one's name once it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from featcache.store import manifest, shards
from featcache.store.durable import NEXT, cannot_write, sync_directory, write_durably, write_tree
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
    moves = {  # new place of a chunk -> old one
        new: old
        for video, row in sorted(places.items())
        for old, new in zip(chunk_numbers(present, row.video), chunk_numbers(asked, video), strict=True)
    }
    for layout in array_layouts(store, asked):
        here, there = path / layout.name, folder / layout.name
        if count := asked.shard_chunks:
            _move_within_shards(here, there, layout.ndim, moves, count)
        else:
            for new, old in moves.items():
                _link(chunk_path(here, old, layout.ndim), chunk_path(there, new, layout.ndim))
        sync_directory(there)
    manifest.replace_rows(folder, {video: replace(row, video=video) for video, row in sorted(places.items())})
    return folder


def _move_within_shards(here: Path, there: Path, ndim: int, moves: Mapping[int, int], count: int) -> None:
    @lru_cache(maxsize=2)  # neighbours stay neighbours: most shards are made of two
    def chunks_of(shard: int) -> dict[int, bytes]:
        try:
            return shards.unpack(chunk_path(here, shard, ndim).read_bytes(), count)
        except (FileNotFoundError, ValueError):
            return {}  # for `verify` to find

    wanted: dict[int, dict[int, int]] = {}
    for new, old in moves.items():
        wanted.setdefault(new // count, {})[new % count] = old
    for shard, sources in wanted.items():
        old_file, new_file = (chunk_path(folder, shard, ndim) for folder in (here, there))
        if all(old == shard * count + place for place, old in sources.items()) and _places(old_file, count) == set(
            sources
        ):
            _link(old_file, new_file)
            continue
        found = {place: chunks_of(old // count).get(old % count) for place, old in sources.items()}
        packed = shards.pack({place: data for place, data in found.items() if data is not None}, count)
        write_durably(new_file, packed)


def _places(shard: Path, count: int) -> set[int]:
    """Places of a shard that hold a chunk; none of a shard that is missing or damaged."""
    try:
        with shard.open("rb") as file:
            return {
                place for place, (at, _) in enumerate(shards.read_index(file, count).tolist()) if at != shards.ABSENT
            }
    except (FileNotFoundError, ValueError):
        return set()


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
