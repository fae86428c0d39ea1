"""Writing a store so that nothing finished is lost and nothing unfinished is believed.

Everything depends on the order: chunks are durable before their manifest row, tables and statistics before the
split's attributes say that it is complete, a split's arrays before its manifest exists, the root before any
split.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from featcache.errors import DataError, IncompatibleError
from featcache.moments import Moments
from featcache.sources.video import Video
from featcache.store import manifest
from featcache.store.chunks import Arrays, OpenShard, encoded, write_arrays, write_chunks
from featcache.store.durable import (
    TEMPORARY,
    lock,
    make_directory,
    replace_directory,
    settle_directories,
    sync_directory,
    write_tree,
)
from featcache.store.encoding import ENCODINGS
from featcache.store.layout import (
    METADATA,
    root_metadata,
    split_metadata,
    summary_files,
)
from featcache.store.reading import FeatureStore
from featcache.store.rearrange import rearranged
from featcache.store.spec import SplitSpec, StoreSpec, refuse_if_different

SUMMARIES = ("instances", "statistics")  # folders that `SplitWriter.finish` makes


class StoreWriter:
    """The one process that may write to a store. Use as a context manager; it holds the store's lock.

    Raises ``DataError`` if another process is writing, or if the path holds something other than a store, and
    ``IncompatibleError`` for a store of other features.
    """

    def __init__(self, path: Path, spec: StoreSpec) -> None:
        refuse_foreign(path)
        make_directory(path.absolute())
        self.path = path
        self._lock = lock(path)
        try:
            if (path / METADATA).exists():
                self.spec = FeatureStore.open(path).spec
                refuse_if_different(path, self.spec.identity(), spec.identity())
            else:
                self.spec = spec
                write_tree(path, {METADATA: root_metadata(spec)})
            settle_directories(path)
            # Left by a run that was killed; with the lock held, nobody else is writing them.
            for leftover in [*path.rglob(f"*{TEMPORARY}"), *path.rglob("*.partial")]:  # ours and zarr-python's
                leftover.unlink(missing_ok=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._lock.close()

    def split(self, name: str, spec: SplitSpec, rearrange: bool = False) -> SplitWriter:
        """Create the split, or open it where an earlier run stopped; a longer one grows in place.

        Any other change of its videos is an ``IncompatibleError``. With ``rearrange`` it is carried out: finished
        videos that ``spec`` still has, with the same fingerprint, stay; the others go.
        """
        return SplitWriter(self, name, spec, rearrange)


class SplitWriter:
    """Appends videos to one split, in any order."""

    def __init__(self, writer: StoreWriter, name: str, spec: SplitSpec, rearrange: bool = False) -> None:
        self.store_spec = writer.spec
        self.path = self._place = writer.path / name  # they differ until a rearranged split is finished
        self.name = name
        # The manifest is made after the arrays: a split without one was never finished being created.
        if not (self.path / manifest.NAME).exists():
            self.spec = self._create(spec)
        else:
            self.spec = self._rearrange(spec) if rearrange and spec.fingerprints else self._grow(spec)
        self._appender = manifest.Appender(self.path)
        self.done = set(manifest.read(self.path))
        self._shard = OpenShard(self.path, self.store_spec, self.spec)

    def close(self) -> None:
        """Close the split. Videos that wait for their shard to fill are lost, unless `finish` was called."""
        self._appender.close()

    # -- layout ----------------------------------------------------------------------------------------

    def _create(self, spec: SplitSpec) -> SplitSpec:
        if self.path.exists():
            self._refuse_lost_manifest()
            shutil.rmtree(self.path)  # left by a run that was killed while creating it
        write_tree(self.path, split_metadata(self.store_spec, spec))
        return spec

    def _refuse_lost_manifest(self) -> None:
        try:
            finished = read_split_spec(self.path).statistics_videos
        except DataError:
            return
        if finished:
            raise DataError(
                f"{self.path / manifest.NAME}: missing from a split of {finished} videos; put the file back, "
                f"or delete {self.path} to make it anew"
            )

    def _grow(self, asked: SplitSpec) -> SplitSpec:
        present = read_split_spec(self.path)
        forms = [spec.form() for spec in (present, asked)]
        videos: list[tuple[Any, ...]] = [present.videos, asked.videos]
        if not all(videos):
            videos = [present.lengths, asked.lengths]
            forms = [
                {**form, "source_fingerprint": spec.source_fingerprint}
                for form, spec in zip(forms, (present, asked), strict=True)
            ]
        refuse_if_different(self.path, *forms)
        here, there = videos
        if here[: len(there)] == there:
            return present
        if there[: len(here)] != here:
            raise IncompatibleError(f"{self.path}: holds other videos than the source's; extract to another --out")
        grown = replace(asked, statistics_videos=0)
        # Arrays before attributes: one that is longer than the split says is still whole.
        write_tree(self.path, split_metadata(self.store_spec, grown))
        return grown

    def _rearrange(self, asked: SplitSpec) -> SplitSpec:
        present, rows = read_split_spec(self.path), manifest.read(self.path)
        unfinished, asked = (replace(spec, statistics_videos=0) for spec in (present, asked))
        if not rows and unfinished != asked:
            (self.path / manifest.NAME).unlink()  # first: without it the split was never finished being created
            sync_directory(self.path)
            return self._create(asked)
        refuse_if_different(self.path, present.form(), asked.form())
        known = present.videos or asked.videos  # a split of version 0.1 is asked for with its own videos first
        where = {video: place for place, video in enumerate(asked.videos)}
        places = {where[known[video]]: row for video, row in rows.items() if known[video] in where}
        if any(p != r.video or asked.starts[p] != present.starts[p] for p, r in places.items()) or (
            asked.rows < present.rows
        ):
            folder = rearranged(self.path, self.store_spec, present, asked, places)
            if len(places) == len(asked.lengths):
                self.path = folder  # the old split stays in its place until this one has its statistics
            else:
                replace_directory(folder, self.path)
            return asked
        if unfinished == asked and len(places) == len(rows):
            return present
        if present != unfinished:
            save_split_spec(self.path, unfinished)
        if len(places) < len(rows):
            manifest.replace_rows(self.path, places)
        write_tree(self.path, split_metadata(self.store_spec, asked))
        return asked

    # -- videos ----------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether all videos are finished and the statistics cover them."""
        return len(self.done) == len(self.spec.held) and self.spec.statistics_videos == len(self.spec.lengths)

    def write(self, index: int, video: Video, tokens: Mapping[str, torch.Tensor]) -> None:
        """Store one video durably, with float tokens (T, N, D) of each tap; see `write_chunks`."""
        encode = ENCODINGS[self.store_spec.dtype].encode
        stored = {tap: encode(values) for tap, values in tokens.items()}
        self.append(write_chunks(self.path, self.store_spec, self.spec, index, video, stored))

    def write_arrays(self, row: manifest.Row, arrays: Arrays) -> None:
        """Store one video whose rows are already encoded; ``row`` lacks only the checksums.

        In a sharded split the video is finished when its last shard is full, or by `finish`.
        """
        if not self.spec.shard_chunks:
            self.append(write_arrays(self.path, self.store_spec, self.spec, row, arrays))
            return
        self.append(*self._shard.put(encoded(self.store_spec, self.spec, row, arrays)))

    def append(self, *rows: manifest.Row) -> None:
        """Declare videos finished; their chunks must be durable, whichever process wrote them."""
        if rows:
            self._appender.append(*rows)
            self.done.update(row.video for row in rows)

    # -- the end ---------------------------------------------------------------------------------------

    def finish(self, statistics: Mapping[str, Moments]) -> None:
        """Write tables and statistics once every video is there; marks the split complete."""
        self.append(*self._shard.flush())
        self.unfinish()
        rows = dict(manifest.read(self.path))  # parsed once: each table looks at all of them
        for old in SUMMARIES:  # earlier ones may have had other arrays
            shutil.rmtree(self.path / old, ignore_errors=True)
        write_tree(self.path, summary_files(self.spec, rows, statistics))
        self._save(replace(self.spec, statistics_videos=len(self.spec.lengths)))
        if self.path != self._place:
            replace_directory(self.path, self._place)
            self.path = self._place

    def unfinish(self) -> None:
        """Take back that the split is complete, before its tables or statistics change."""
        if self.spec.statistics_videos:
            self._save(replace(self.spec, statistics_videos=0))

    def _save(self, spec: SplitSpec) -> None:
        save_split_spec(self.path, spec)
        self.spec = spec


def read_split_spec(path: Path) -> SplitSpec:
    """The specification in a split's zarr.json. ``DataError`` if it is missing or damaged."""
    try:
        return SplitSpec.from_json(json.loads((path / METADATA).read_bytes())["attributes"]["featcache"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / METADATA}: missing or damaged; run: slotlab verify --repair {path.parent}") from error


def save_split_spec(path: Path, spec: SplitSpec) -> None:
    """Replace the specification in a split's zarr.json, durably."""
    document = json.loads((path / METADATA).read_bytes())
    document["attributes"]["featcache"] = spec.to_json()  # other programs may have left attributes here
    write_tree(path, {METADATA: json.dumps(document, indent=2).encode()})


def refuse_foreign(path: Path) -> None:
    """``DataError`` for a folder that holds no store but other files, which a writer must not take for leftovers."""
    if not path.exists() or (path / METADATA).exists():
        return
    if not path.is_dir():
        raise DataError(f"{path}: is a file; name a folder for the store, such as cache/dinov2.zarr")
    found = [p.name for p in path.iterdir() if not p.name.startswith((".", METADATA))]
    if any((path / name / manifest.NAME).exists() for name in found):
        raise DataError(
            f"{path / METADATA}: missing, and with it the specification of the features; "
            "put back a copy of that file, or extract to another --out"
        )
    if found:
        raise DataError(f"{path}: holds {found[0]} and no store; choose another --out")
