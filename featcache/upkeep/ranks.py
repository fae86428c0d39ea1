"""Stores for the ranks of a training: one rank's videos each, for the disk of the machine that it runs on.

A rank's store keeps the whole store's rows, names and statistics, so that all ranks draw, normalise and resume alike;
it lacks the files of other ranks' videos. The split that is trained on is divided, other splits are whole in each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.store.layout import METADATA
from featcache.store.reading import FeatureStore
from featcache.upkeep.convert import ConvertOptions, Progress, convert

_NAME = re.compile(r"rank-(\d+)-of-(\d+)\.zarr")


def rank_store(folder: Path, rank: int, ranks: int) -> Path:
    """The place of one rank's store in a folder of them."""
    return folder / f"rank-{rank}-of-{ranks}.zarr"


def export_for_ranks(
    path: Path,
    out: Path,
    options: ConvertOptions,
    ranks: int,
    only: Sequence[int] = (),
    besides: int = 0,
    progress: Progress = lambda *_: None,
) -> list[Path]:
    """Copy the store at ``path`` to a store for each of ``ranks``, or for those in ``only``, in the folder ``out``.

    Each also has ``besides`` videos, spread over the split, on which models are calibrated alike on all ranks. Copies
    that were interrupted resume. Raises what `convert` raises, and ``UsageError`` for options that it cannot follow.
    """
    if ranks < 2:
        raise UsageError(f"--for-ranks {ranks}: must be at least 2; one rank trains on the whole store")
    if wrong := [rank for rank in only if not 0 <= rank < ranks]:
        raise UsageError(f"--rank {wrong[0]}: must be from 0 to {ranks - 1}")
    if path.is_file() or options.dtype is not None:
        raise UsageError(f"{path}: --for-ranks copies a store's tokens as they are; first make that store")
    store = FeatureStore.open(path)
    divided = store.split(None).require_complete()
    if options.splits and divided.name not in options.splits:
        raise UsageError(f"--split: --for-ranks divides {divided.name}; name it too")
    divided.spec.shares(ranks)  # refuses more ranks than videos, before anything is written
    made = []
    for rank in only or range(ranks):
        shared = replace(options, part=(rank, ranks, besides), divided=divided.name)

        def tell(split: str, done: int, total: int, rank: int = rank) -> None:
            progress(f"rank {rank}: {split}", done, total)

        made.append(rank_store(out, rank, ranks))
        convert(path, made[-1], shared, progress=tell)
    return made


def own_store(path: Path, rank: int, ranks: int) -> Path:
    """The store of one of ``ranks`` at ``path``: in a folder of ranks' stores its own, else ``path`` itself.

    ``DataError`` if it is missing there, ``IncompatibleError`` if all are for another number of ranks.
    """
    found = {} if (path / METADATA).exists() else {p: _NAME.fullmatch(p.name) for p in path.glob("rank-*")}
    counts = {int(name[2]): place for place, name in found.items() if name}
    if not counts or rank_store(path, rank, ranks) in found:
        return path if not counts else rank_store(path, rank, ranks)
    origin = FeatureStore.open(next(iter(counts.values()))).spec.exported_from
    if ranks in counts:
        raise DataError(
            f"{rank_store(path, rank, ranks)}: missing; make it here with: "
            f"slotlab export {origin} {path} --for-ranks {ranks} --rank {rank}"
        )
    known = " or ".join(map(str, sorted(counts)))
    raise IncompatibleError(
        f"{path}: has stores for {known} ranks, and {ranks} {'trains' if ranks == 1 else 'train'}; start {known} "
        f"processes with torchrun, or name the whole store, {origin}"
    )
