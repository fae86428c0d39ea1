"""Computes moments of stored arrays block by block with dask.

It replaces statistics of a store that are missing or in doubt, by a tree of merges over the arrays' chunks or videos,
in bounded memory, here or on dask workers. The result equals the statistics of the extraction up to rounding.
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

Source: TypeAlias = da.Array | zarr.Array[Any] | str | Path


def reduce_moments(
    features: Source | Mapping[str, Source],
    *,
    dtype: Dtype = "float16",
    valid: npt.NDArray[np.bool_] | None = None,
    blocks: Sequence[int] | None = None,
    workers: int = WORKERS,
    client: Client | None = None,
) -> Moments:
    """Moments of stored features (F, N, D).

    ``features`` is a dask or zarr array or the path of a zarr array; or, for a stored form ``dtype`` of several arrays,
    a mapping of all its arrays by folder. ``valid`` (F,) bool selects the real frames; blocks without any are never
    read. ``blocks`` gives the number of rows of each block, by default the array's chunks; motion is counted within a
    block. The computation holds about ``workers`` blocks in float64, or runs on the workers of a dask ``client``, with
    the same result. Raises ``DataError`` for arrays that cannot be read, and for non-finite values, with row and patch;
    ``ValueError`` for shapes and types that do not fit.
    """
    arrays = dict(features) if isinstance(features, Mapping) else {FEATURES: features}
    wanted = {array.folder: array for array in ENCODINGS[dtype].arrays}
    if arrays.keys() != wanted.keys():
        raise ValueError(f"{dtype} has the arrays {', '.join(wanted)}; got {', '.join(arrays)}")
    name = _name(arrays[FEATURES])
    rows = _lazy(arrays[FEATURES]).rechunk({1: -1, 2: -1} if blocks is None else (tuple(blocks), -1, -1))
    frames = rows.shape[0]
    if valid is not None and (valid.dtype != np.bool_ or valid.shape != (frames,)):
        raise ValueError(f"valid must be bool ({frames},), got {valid.dtype} {valid.shape}")

    parts = {FEATURES: rows.to_delayed().ravel()}
    for folder in [folder for folder in arrays if folder != FEATURES]:
        lazy = _lazy(arrays[folder])
        if lazy.shape != (frames, *wanted[folder].shape(*rows.shape[1:])):
            raise ValueError(f"{name}: {folder} {lazy.shape} do not fit features {rows.shape}")
        parts[folder] = lazy.rechunk((rows.chunks[0], *[-1] * (lazy.ndim - 1))).to_delayed().ravel()

    starts = np.cumsum([0, *rows.chunks[0]])
    reduce_block, merge = delayed(_reduce_block), delayed(_merge)
    level: list[Delayed] = []
    for i in range(len(rows.chunks[0])):
        start, stop = int(starts[i]), int(starts[i + 1])
        chosen = np.arange(start, stop) if valid is None else start + np.flatnonzero(valid[start:stop])
        if len(chosen):
            block = {folder: blocks_of[i] for folder, blocks_of in parts.items()}
            level.append(reduce_block(block, dtype, chosen, start, name))
    if not level:
        return Moments.empty(*rows.shape[1:])
    while len(level) > 1:
        level = [merge(level[i : i + FAN_IN]) for i in range(0, len(level), FAN_IN)]
    root: Any = level[0]  # dask is untyped
    total = root.compute(scheduler=client or "threads", num_workers=workers)
    assert isinstance(total, Moments)
    return total


def recomputed_statistics(split: Split, tap: str, client: Client | None = None) -> Moments:
    """Moments of a split's real frames, computed from the stored features video by video.

    With a dask ``client`` its workers read the features; they must see the store under the same path.
    """
    valid = np.zeros(split.spec.rows, np.bool_)
    valid[split.valid_rows()] = True
    arrays = {array.folder: split.path.absolute() / array.path(tap) for array in split.store.encoding.arrays}
    videos = np.diff(split.spec.starts).tolist()
    return reduce_moments(arrays, dtype=split.store.spec.dtype, valid=valid, blocks=videos, client=client)


def _reduce_block(
    block: Mapping[str, npt.NDArray[Any]],
    dtype: Dtype,
    chosen: npt.NDArray[np.int64],
    start: int,
    name: str,
) -> Moments:
    """Moments of the ``chosen`` rows of the arrays; ``block`` holds consecutive rows from row ``start``."""
    local = torch.from_numpy(chosen - start)
    stored = {folder: torch.from_numpy(np.ascontiguousarray(values))[local] for folder, values in block.items()}
    tokens = ENCODINGS[dtype].decode(stored)  # (F', N, D)
    try:
        return Moments.from_tokens(tokens)
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


def _lazy(array: Source) -> Any:  # a dask array
    if isinstance(array, da.Array):
        return array
    if isinstance(array, str | Path):
        try:
            array = zarr.open_array(str(array), mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{array}: no readable zarr array; name features/<tap> of a split") from error
    return da.from_zarr(array)  # type: ignore[no-untyped-call]


def _name(array: Source) -> str:
    if isinstance(array, str | Path):
        return str(array)
    return str(array.store_path) if isinstance(array, zarr.Array) else "features"
