"""Computes moments of stored arrays block by block with dask.

It replaces statistics of a store that are missing or in doubt, by a tree of merges over the arrays' chunks or blocks of
videos, in bounded memory, here or on dask workers. The result equals the statistics of the extraction up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import dask.array as da
import numpy as np
import numpy.typing as npt
import torch
import zarr
from dask.delayed import Delayed, delayed

from featcache.errors import DataError
from featcache.moments import Moments, NonFiniteTokensError
from featcache.store.encoding import ENCODINGS, FEATURES
from featcache.store.reading import Split
from featcache.words import Dtype

if TYPE_CHECKING:
    from distributed import Client

# Number of moments that one task merges. Dask runs the tree depth first, so few of them wait in memory.
FAN_IN = 8

# One worker reads a block while another reduces one; torch already spreads the reduction over the cores.
WORKERS = 2

# Stored bytes of features that one task reads: a store of single images has hundreds of tasks, not one an image.
BLOCK_BYTES = 32 * 2**20

Source: TypeAlias = da.Array | zarr.Array[Any] | str | Path


def reduce_moments(
    features: Source | Mapping[str, Source],
    *,
    dtype: Dtype = "float16",
    valid: npt.NDArray[np.bool_] | None = None,
    videos: Sequence[int] | None = None,
    workers: int = WORKERS,
    client: Client | None = None,
) -> Moments:
    """Moments of stored features (F, N, D).

    ``features`` is a dask or zarr array or the path of a zarr array; or, for a stored form ``dtype`` of several arrays,
    a mapping of all its arrays by folder. ``valid`` (F,) bool selects the real frames; blocks without any are never
    read. ``videos`` gives the number of rows of each video: motion is counted within a video, and a block holds whole
    videos of ``BLOCK_BYTES`` together, or a longer one. By default each chunk of the array is a video and a block. The
    computation holds about ``workers`` blocks, or runs on the workers of a dask ``client``, with the same result.
    Raises ``DataError`` for arrays that cannot be read, and for non-finite values, with row and patch; ``ValueError``
    for shapes and types that do not fit.
    """
    arrays = dict(features) if isinstance(features, Mapping) else {FEATURES: features}
    wanted = {array.folder: array for array in ENCODINGS[dtype].arrays}
    if arrays.keys() != wanted.keys():
        raise ValueError(f"{dtype} has the arrays {', '.join(wanted)}; got {', '.join(arrays)}")
    name = _name(arrays[FEATURES])
    rows = _lazy(arrays[FEATURES])
    frames = rows.shape[0]
    if valid is not None and (valid.dtype != np.bool_ or valid.shape != (frames,)):
        raise ValueError(f"valid must be bool ({frames},), got {valid.dtype} {valid.shape}")

    if videos is None:
        blocks = [[size] for size in rows.chunks[0]]
    else:
        most = BLOCK_BYTES // max(1, rows.nbytes // max(1, frames))
        blocks = _blocks(videos, np.ones(frames, np.bool_) if valid is None else valid, most)
    sizes = tuple(sum(block) for block in blocks)
    parts: dict[str, Any] = {}
    for folder, array in arrays.items():
        lazy = _lazy(array, None if videos is None else sizes)
        if lazy.shape != (frames, *wanted[folder].shape(*rows.shape[1:])):
            raise ValueError(f"{name}: {folder} {lazy.shape} do not fit features {rows.shape}")
        parts[folder] = lazy.rechunk((sizes, *[-1] * (lazy.ndim - 1))).to_delayed().ravel()

    reduce_block, merge = delayed(_reduce_block), delayed(_merge)
    level: list[Delayed] = []
    start = 0
    for i, block in enumerate(blocks):
        real = np.ones(sizes[i], np.bool_) if valid is None else valid[start : start + sizes[i]]
        if real.any():
            lengths = [int(of.sum()) for of in np.split(real, np.cumsum(block)[:-1])]
            stored = {folder: blocks_of[i] for folder, blocks_of in parts.items()}
            chosen = start + np.flatnonzero(real)
            level.append(reduce_block(stored, dtype, chosen, [n for n in lengths if n], start, name))
        start += sizes[i]
    if not level:
        return Moments.empty(*rows.shape[1:])
    while len(level) > 1:
        level = [merge(level[i : i + FAN_IN]) for i in range(0, len(level), FAN_IN)]
    root: Any = level[0]  # dask is untyped
    total = root.compute(scheduler=client or "threads", num_workers=workers)
    assert isinstance(total, Moments)
    return total


def recomputed_statistics(split: Split, tap: str, client: Client | None = None) -> Moments:
    """Moments of a split's real frames, computed from the stored features, several videos at a time.

    With a dask ``client`` its workers read the features; they must see the store under the same path.
    """
    valid = np.zeros(split.spec.rows, np.bool_)
    valid[split.valid_rows()] = True
    arrays = {array.folder: split.path.absolute() / array.path(tap) for array in split.store.encoding.arrays}
    videos = np.diff(split.spec.starts).tolist()
    return reduce_moments(arrays, dtype=split.store.spec.dtype, valid=valid, videos=videos, client=client)


def _blocks(videos: Sequence[int], valid: npt.NDArray[np.bool_], most: int) -> list[list[int]]:
    """Numbers of rows of consecutive videos, by block of at most ``most`` rows or one video.

    A video without a valid row is a block of its own, which is not read.
    """
    found: list[list[int]] = []
    room, start = 0, 0
    for rows in videos:
        real = bool(valid[start : start + rows].any())
        if found and real and rows <= room:
            found[-1].append(rows)
            room -= rows
        else:
            found.append([rows])
            room = most - rows if real else 0
        start += rows
    return found


def _reduce_block(
    block: Mapping[str, npt.NDArray[Any]],
    dtype: Dtype,
    chosen: npt.NDArray[np.int64],
    lengths: Sequence[int],
    start: int,
    name: str,
) -> Moments:
    """Moments of the ``chosen`` rows of the arrays, of videos of ``lengths``; ``block`` begins at row ``start``."""
    local = torch.from_numpy(chosen - start)
    stored = {folder: torch.from_numpy(np.ascontiguousarray(values))[local] for folder, values in block.items()}
    tokens = ENCODINGS[dtype].decode(stored)  # (F', N, D)
    try:
        return Moments.from_tokens(tokens, lengths)
    except NonFiniteTokensError as error:
        raise DataError(
            f"{name}: {error.count} non-finite values in rows {chosen[0]}-{chosen[-1]}, the first in row "
            f"{chosen[error.frame]}, patch {error.patch}; the store is damaged, extract it again"
        ) from None


def _merge(parts: Sequence[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def _lazy(array: Source, rows: tuple[int, ...] | None = None) -> Any:
    """A dask array, of a stored one in blocks of so many ``rows``: chunk by chunk there would be a task for each."""
    if isinstance(array, da.Array):
        return array
    if isinstance(array, str | Path):
        try:
            array = zarr.open_array(str(array), mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{array}: no readable zarr array; name features/<tap> of a split") from error
    blocks = None if rows is None else (rows, *array.shape[1:])
    return da.from_zarr(array, chunks=blocks)  # type: ignore[no-untyped-call]


def _name(array: Source) -> str:
    if isinstance(array, str | Path):
        return str(array)
    return str(array.store_path) if isinstance(array, zarr.Array) else "features"
